//! A device from its making to its end, seen from the daemon's main thread.
//!
//! Start: protect the process, open the store, make the kernel's device, start one thread for each
//! queue, make everything resident, go live. Then the main thread sleeps in `poll` until a signal,
//! a control message or a report of the queues comes. Stop: the driver drains the device's
//! requests while the queues still serve, then the queues end, then the device is deleted.

#![allow(unsafe_code)] // signalfd, poll.

use crate::cli::{Add, DEFAULT_TIER};
use crate::control::{self, Answer, Request};
use crate::queue::{self, Counters, SLICE_BYTES};
use crate::{log, protect};
use anyhow::{anyhow, bail, Context, Result};
use ghostswap::config::StoreConfig;
use ghostswap::{Store, Volume};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{sys, UblkError, UblkFlags};
use serde_json::json;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{mpsc, Arc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Stack of every thread: all of it is made resident, so no more than needed.
const STACK_BYTES: usize = 256 << 10;
/// Largest request: what the kernel splits 2 MiB folios into.
const MAX_IO_BYTES: u32 = 512 << 10;
/// Largest discard, just under 4 GiB.
const MAX_DISCARD_SECTORS: u32 = (u32::MAX >> 9) & !7;
/// How often trouble on the queues is reported at most.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// The driver's own node, there once it is loaded.
pub const CONTROL_NODE: &str = "/dev/ublk-control";

/// Threads of the queues, each with its result.
type Threads = Vec<JoinHandle<Result<()>>>;

/// The parts of a live device.
struct Device {
    ctrl: UblkCtrl,
    path: PathBuf,
    add: Add,
    store: Store,
    counters: Arc<Counters>,
}

/// Serves a device until it is stopped. `live` is called with its path once it is.
pub fn run(add: &Add, live: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    check_driver(add.id)?;
    let signals = block_signals()?;
    protect::process()?;
    let (store, volume) = open_store(add)?;
    let ctrl = make_device(add)?;
    let id = ctrl.dev_info().dev_id;
    let listener = control::listen(id)?;
    let sink = match add.foreground {
        true => log::Sink::Stderr,
        false => log::Sink::file(&control::run_dir().join(format!("ublk{id}.log")))?,
    };
    log::start(sink, STACK_BYTES, protect::store_thread)?;
    let path = PathBuf::from(ctrl.get_bdev_path());
    let device = Device { ctrl, path, add: add.clone(), store, counters: Arc::default() };
    let outcome = device.serve(&volume, &listener, &signals, live);
    let _ = std::fs::remove_file(control::socket_path(id));
    outcome
}

/// Says in one line why there can be no device, before anything is set up for it.
fn check_driver(id: Option<u32>) -> Result<()> {
    if !Path::new(CONTROL_NODE).exists() {
        bail!("no ublk driver ({CONTROL_NODE} is missing): run `modprobe ublk_drv` as root first");
    }
    if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(CONTROL_NODE) {
        bail!("cannot open {CONTROL_NODE}: {e}; adding a device needs root");
    }
    match id {
        Some(id) if kernel_has(id) => bail!("id {id} is taken: /dev/ublkb{id} exists"),
        _ => Ok(()),
    }
}

/// Whether the kernel has a device of this number, whoever serves it.
pub fn kernel_has(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists() || Path::new(&format!("/dev/ublkc{id}")).exists()
}

fn open_store(add: &Add) -> Result<(Store, Volume)> {
    let mut tiers = add.tiers.clone();
    if tiers.is_empty() {
        tiers.push(DEFAULT_TIER.parse().map_err(|e: String| anyhow!(e))?);
    }
    let config = StoreConfig {
        tiers,
        max_lanes: usize::from(add.queues),
        thread_start: Some(protect::store_thread),
        ..StoreConfig::default()
    };
    let store = Store::open(config)?;
    let volume = store.create_volume(add.size)?;
    Ok((store, volume))
}

fn make_device(add: &Add) -> Result<UblkCtrl> {
    let features = UblkCtrl::get_features().unwrap_or(0);
    if features & u64::from(sys::UBLK_F_USER_COPY) == 0 {
        bail!("this kernel's ublk driver has no user copy: Linux 6.5 or later is needed");
    }
    let built = UblkCtrlBuilder::default()
        .name("ghostswap")
        .id(add.id.map_or(-1, |id| id as i32))
        .nr_queues(add.queues)
        .depth(add.depth)
        .io_buf_bytes(MAX_IO_BYTES)
        .ctrl_flags(u64::from(sys::UBLK_F_USER_COPY))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build();
    built.map_err(|e| match (errno(&e), add.id) {
        (libc::EEXIST, Some(id)) => anyhow!("id {id} is taken: /dev/ublkb{id} exists"),
        (libc::EPERM | libc::EACCES, _) => anyhow!("the ublk driver refuses: adding a device needs root"),
        _ => anyhow!("the ublk driver cannot add the device: {}", describe(&e)),
    })
}

/// libublk's errors carry negative errnos in several shapes.
fn errno(e: &UblkError) -> i32 {
    match e {
        UblkError::OtherError(n) | UblkError::UringIOError(n) => n.abs(),
        UblkError::IOError(e) => e.raw_os_error().unwrap_or(libc::EIO),
        UblkError::InvalidVal => libc::EINVAL,
        _ => libc::EIO,
    }
}

/// The same for people, in one line.
fn describe(e: &UblkError) -> String {
    std::io::Error::from_raw_os_error(errno(e)).to_string()
}

fn set_params(dev: &mut UblkDev, size_bytes: u64) {
    dev.set_default_params(size_bytes);
    let params = &mut dev.tgt.params;
    params.types = sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD;
    // Neither rotational nor with a volatile cache: an answered write is kept.
    params.basic.attrs = 0;
    params.basic.logical_bs_shift = 12;
    params.basic.physical_bs_shift = 12;
    params.basic.io_min_shift = 12;
    params.basic.io_opt_shift = SLICE_BYTES.trailing_zeros() as u8;
    params.basic.max_sectors = MAX_IO_BYTES >> 9;
    params.discard.discard_granularity = 4096;
    params.discard.max_discard_sectors = MAX_DISCARD_SECTORS;
    params.discard.max_write_zeroes_sectors = MAX_DISCARD_SECTORS;
    params.discard.max_discard_segments = 1;
}

impl Device {
    fn serve(
        &self,
        volume: &Volume,
        listener: &UnixListener,
        signals: &OwnedFd,
        live: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let set = |dev: &mut UblkDev| {
            set_params(dev, self.add.size);
            Ok(())
        };
        let dev = UblkDev::new("ghostswap".into(), set, &self.ctrl)
            .map_err(|e| anyhow!("cannot open the new device: {}", describe(&e)))?;
        let dev = Arc::new(dev);
        let threads = self.start_queues(&dev, volume)?;
        let resident = protect::make_resident()?;
        self.ctrl.start_dev(&dev).map_err(|e| anyhow!("the ublk driver cannot start the device: {}", describe(&e)))?;
        tracing::info!("{} is live, {} KiB of the daemon resident", self.path.display(), resident >> 10);
        let announced = live(&self.path);
        if announced.is_ok() {
            self.wait_for_stop(listener, signals, &threads);
        }
        tracing::info!("{} stops", self.path.display());
        if let Err(e) = self.ctrl.kill_dev() {
            tracing::warn!("stop: {}", describe(&e));
        }
        for thread in threads {
            let _ = thread.join();
        }
        announced
    }

    /// Starts the threads of the queues and waits until each is ready to fetch: the driver's
    /// start command waits for all of them, however long.
    fn start_queues(&self, dev: &Arc<UblkDev>, volume: &Volume) -> Result<Threads> {
        let mut threads = Threads::new();
        for qid in 0..dev.dev_info.nr_hw_queues {
            let lane = volume.lane()?;
            let (dev, counters) = (dev.clone(), self.counters.clone());
            let (tell, told) = mpsc::channel::<Result<libc::pid_t>>();
            let body = move || {
                // Sets the flusher attribute without checking; `queue::serve` checks.
                let tid = UblkCtrl::init_queue_thread();
                let ready = tell.clone();
                let served = queue::serve(qid, &dev, lane, &counters, move || drop(ready.send(Ok(tid))));
                match served {
                    Err(e) => drop(tell.send(Err(e))),
                    Ok(()) => drop(tell),
                }
                Ok(())
            };
            let thread = std::thread::Builder::new().name(format!("gs-queue{qid}")).stack_size(STACK_BYTES);
            threads.push(thread.spawn(body).context("cannot start a queue's thread")?);
            let tid = told.recv().context("a queue's thread died")??;
            self.ctrl.set_thread_affinity(qid, tid);
        }
        Ok(threads)
    }

    fn wait_for_stop(&self, listener: &UnixListener, signals: &OwnedFd, threads: &Threads) {
        let mut reported = [0; 3];
        loop {
            let [signal, control] = poll([signals.as_raw_fd(), listener.as_raw_fd()], REPORT_EVERY);
            self.report(&mut reported);
            if threads.iter().any(|t| t.is_finished()) {
                return;
            }
            if signal {
                drain_signal(signals);
                match control::in_use_as_swap(&self.path) {
                    true => {
                        tracing::warn!("signal ignored: {} is in use as swap; swapoff it first", self.path.display())
                    }
                    false => return,
                }
            }
            if control {
                let mut stop = false;
                let served = control::serve_one(listener, |request| self.carry_out(&request, &mut stop));
                if let Err(e) = served {
                    tracing::warn!("control socket: {e:#}");
                }
                if stop {
                    return;
                }
            }
        }
    }

    fn carry_out(&self, request: &Request, stop: &mut bool) -> Answer {
        match request {
            Request::Status => self.status(),
            Request::Stop { force } if !force && control::in_use_as_swap(&self.path) => {
                let path = self.path.display();
                Answer::refusal(format!("{path} is in use as swap: swapoff {path} first"))
            }
            Request::Stop { .. } => {
                *stop = true;
                Answer { ok: true, ..Answer::default() }
            }
        }
    }

    fn status(&self) -> Answer {
        let stats = self.store.stats();
        let info = self.ctrl.dev_info();
        let count = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        let device = json!({
            "id": info.dev_id,
            "path": self.path,
            "size_bytes": self.add.size,
            "pid": std::process::id(),
            "queues": info.nr_hw_queues,
            "depth": info.queue_depth,
            "writes_parked": count(&self.counters.parked),
            "writes_refused": count(&self.counters.refused),
            "requests_failed": count(&self.counters.failed),
            "stats": stats,
        });
        Answer { ok: true, device: Some(device), report: Some(stats.to_string()), error: None }
    }

    /// Logs what the queues counted since the last time.
    fn report(&self, reported: &mut [u64; 3]) {
        let c = &self.counters;
        let now = [&c.parked, &c.refused, &c.failed].map(|n| n.load(Ordering::Relaxed));
        if now[1] != reported[1] || now[2] != reported[2] {
            tracing::warn!(
                "since the last report {} writes waited for room, {} were refused, {} requests failed",
                now[0] - reported[0],
                now[1] - reported[1],
                now[2] - reported[2]
            );
        }
        *reported = now;
    }
}

/// SIGTERM, SIGINT and SIGHUP, from here on read from the descriptor. Before any thread starts.
fn block_signals() -> Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; the new descriptor is owned by
    // nothing else.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(std::io::Error::last_os_error()).context("cannot receive signals"),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

fn drain_signal(signals: &OwnedFd) {
    let mut info = [0u8; std::mem::size_of::<libc::signalfd_siginfo>()];
    // SAFETY: the buffer is as long as said.
    unsafe { libc::read(signals.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
}

/// Which of two descriptors can be read; waits for one.
fn poll(fds: [RawFd; 2], timeout: Duration) -> [bool; 2] {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the array is live and its length is given.
    unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout.as_millis() as libc::c_int) };
    polled.map(|p| p.revents != 0)
}
