//! Stays beside a connected device: sees connections die, and gives the driver fresh ones.
//!
//! A slot for each connection. A slot without a live socket gets one by a handshake; one whose socket the driver
//! has not taken offers it again. The driver takes what it is offered only in the place of a connection that it knows to
//! be dead, and does not say whether it did:
//! - with several connections a socket that was taken has the driver's time limit for sending. That must be known:
//!   offered again, it might come in two places, and both would read from it.
//! - with one connection there is no other place; it is offered again now and then, for ever.
//!
//! While a connection is missing it allocates nothing and touches no file. Nor does it ever write to the log, which may need
//! memory and whose reader may wait for a page: another thread does (`tell`).

use super::device::Device;
use super::handshake::{Export, Failure};
use super::tell::{Event, Teller};
use super::{check_may_become_swap, end_watcher, usable, Lock, Options, Way, LOOK, MAX_CONNECTIONS};
use crate::notify;
use anyhow::{anyhow, bail, ensure, Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{pidfd_open, PidfdFlags};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use socket2::Socket;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between attempts: at first, and at most.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Before another process stands by, where one has ended.
const STANDBY_PAUSE: Duration = Duration::from_secs(5);
/// Between offers that need not be taken.
const SPARE_PAUSE: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Slot {
    socket: Option<Socket>,
    /// The driver is known to have it.
    taken: bool,
}

/// What is missing, since when, and how often it was tried in vain.
struct Outage {
    since: Instant,
    failed: u32,
    last: Option<Failure>,
}

pub struct Watch {
    device: Device,
    way: Way,
    export: Export,
    backend: String,
    slots: Vec<Slot>,
    /// A socket that was taken shows it.
    taken_shows: bool,
    outage: Option<Outage>,
    /// A connection to an export that only has the name was refused, and that was said.
    told_of_loss: bool,
    signals: UnixStream,
    ending: Arc<AtomicBool>,
    standby: Option<Child>,
    /// When to start one, if there is none.
    standby_due: Option<Instant>,
    teller: Teller,
}

impl Watch {
    /// `taken_shows`: the driver has a time limit for requests.
    pub fn new(
        device: Device,
        way: Way,
        export: Export,
        backend: String,
        connections: usize,
        taken_shows: bool,
    ) -> Result<Watch> {
        let (signals, its) = UnixStream::pair().context("cannot make a socket pair")?;
        signals.set_nonblocking(true).context("cannot make a socket pair")?;
        let ending = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT, SIGCHLD] {
            let its = its.try_clone().context("cannot catch signals")?;
            if signal != SIGCHLD {
                // First, so that it is set when the pipe wakes us.
                signal_hook::flag::register(signal, ending.clone()).context("cannot catch signals")?;
            }
            signal_hook::low_level::pipe::register(signal, its).context("cannot catch signals")?;
        }
        let slots = std::iter::repeat_with(Slot::default).take(connections).collect();
        let teller = Teller::start(&device.path)?;
        Ok(Watch {
            device,
            way,
            export,
            backend,
            slots,
            taken_shows,
            outage: None,
            told_of_loss: false,
            signals,
            ending,
            standby: None,
            standby_due: None,
            teller,
        })
    }

    /// Connects the device, or prepares to take it over, with a first connection. True: it is to become swap.
    pub fn begin(&mut self, options: &Options, mut socket: Socket, taken_over: bool) -> Result<bool> {
        let bytes = usable(&self.export, self.slots.len())?;
        let again = || self.way.again(&self.export).map_err(|failure| anyhow!("no further connection: {failure}"));
        let swapon = options.swapon && !self.device.is_swap();
        if swapon {
            ensure!(!self.export.is_read_only(), "the export is read-only: no swap space");
            check_may_become_swap(&socket)?;
            socket = again()?;
        }
        let mut sockets = vec![socket];
        while sockets.len() < self.slots.len() {
            sockets.push(again()?);
        }
        let patience = options.patience();
        let done = if taken_over {
            self.device.set_patience(&self.backend, patience)
        } else {
            let given: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
            self.device.connect(&given, bytes, self.export.flags, &self.backend, patience)
        };
        done.with_context(|| format!("cannot connect {}", self.device.path.display()))?;
        if patience.request.is_zero() {
            self.device.look_at_requests_after(LOOK)?;
        }
        for (slot, socket) in self.slots.iter_mut().zip(sockets) {
            *slot = Slot { socket: Some(socket), taken: self.taken_shows && !taken_over };
        }
        Ok(swapon)
    }

    /// Starts this program once more, which then finds that it is watched. Not while a connection is missing.
    pub fn have_another_stand_by(&mut self) {
        self.standby_due = None;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("ghostswap-nbd").args(std::env::args_os().skip(1)).stdin(Stdio::null());
        match command.spawn() {
            Ok(child) => self.standby = Some(child),
            Err(error) => {
                self.standby_due = Some(Instant::now() + STANDBY_PAUSE);
                self.teller.tell(Event::NoStandby(error));
            }
        }
    }

    /// Waits for the death of who watches. False: told to end, and the device is disconnected.
    pub fn stand_by(&mut self, lock: &Lock) -> Result<bool> {
        self.teller.tell(Event::StandsBy);
        notify::say("READY=1");
        loop {
            if lock.take()? {
                self.begin_outage();
                self.standby_due = Some(Instant::now());
                return Ok(true);
            }
            if self.ending.swap(false, Ordering::Relaxed) && !self.is_in_use() {
                end_watcher(&self.device, lock)?;
                return Ok(false);
            }
            let holder = lock.holder().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
            let Some(holder) = holder else {
                // It has only just come or gone.
                std::thread::sleep(PAUSE);
                continue;
            };
            let mut watched = [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&holder, PollFlags::IN)];
            match poll(&mut watched, None) {
                Ok(_) | Err(Errno::INTR) => self.hear_signals(),
                Err(error) => return Err(error).context("cannot wait for a process"),
            }
        }
    }

    fn hear_signals(&self) {
        while (&self.signals).read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
    }

    pub fn run(mut self, swapon: bool) -> Result<ExitCode> {
        let mut swapon = swapon.then(|| Swapon::begin(&self.device)).transpose()?;
        if swapon.is_none() && self.outage.is_none() {
            self.ready();
        }
        let mut pause = PAUSE;
        loop {
            if !self.mend()? {
                self.teller.tell(Event::Disconnected);
                break;
            }
            self.tell_of_end();
            pause = self.wait(pause)?;
            if let Some(at_it) = &mut swapon {
                match at_it.go_on() {
                    Ok(false) => {}
                    Ok(true) => {
                        swapon = None;
                        self.ready();
                    }
                    Err(error) => {
                        self.device.disconnect().context("cannot disconnect it either")?;
                        return Err(error);
                    }
                }
            }
            self.look_after_standby();
            if self.ending.swap(false, Ordering::Relaxed) && !self.is_in_use() {
                self.device.disconnect().context("cannot disconnect the device")?;
                self.teller.tell(Event::Ended);
                break;
            }
        }
        self.teller.finish();
        Ok(ExitCode::SUCCESS)
    }

    fn ready(&self) {
        self.teller.tell(Event::Connected { connections: self.slots.len() });
        notify::say("READY=1");
    }

    /// Tries to give the driver what it lacks. False: the device is not connected any more.
    fn mend(&mut self) -> Result<bool> {
        // The driver answers when it is done with a disconnection that it is at.
        if self.slots.iter().any(|slot| slot.socket.is_none()) && self.device.status().is_ok_and(|connected| !connected)
        {
            return Ok(false);
        }
        for slot in &mut self.slots {
            if slot.socket.is_none() {
                match self.way.again(&self.export) {
                    Ok(socket) => (slot.socket, slot.taken) = (Some(socket), false),
                    Err(failure) => {
                        if matches!(failure, Failure::Replaced) && !self.told_of_loss {
                            self.told_of_loss = true;
                            self.teller.tell(Event::Lost);
                        }
                        failed(&mut self.outage, failure);
                        continue;
                    }
                }
            }
            let Some(socket) = slot.socket.as_ref().filter(|_| !slot.taken) else { continue };
            match self.device.offer(socket.as_fd(), &self.backend) {
                Ok(()) => slot.taken = self.taken_shows && socket.write_timeout()?.is_some(),
                // The device is nobody's, or somebody else's; or the driver itself is gone.
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INVAL | Errno::NOENT)) => {
                    return Ok(false);
                }
                // Out of memory, say; later, then.
                Err(error) => failed(&mut self.outage, Failure::Io(error)),
            }
        }
        Ok(true)
    }

    /// An outage is over when every slot has a socket again.
    fn tell_of_end(&mut self) {
        if self.slots.iter().all(|slot| slot.socket.is_some()) {
            if let Some(Outage { since, failed, last }) = self.outage.take() {
                self.teller.tell(Event::Replaced { within: since.elapsed(), failed, last });
            }
        }
    }

    fn look_after_standby(&mut self) {
        if let Some(Ok(Some(status))) = self.standby.as_mut().map(Child::try_wait) {
            self.standby = None;
            self.standby_due = Some(Instant::now() + STANDBY_PAUSE);
            self.teller.tell(Event::StandbyEnded(status));
        }
        if self.outage.is_none() && self.standby_due.is_some_and(|due| Instant::now() >= due) {
            self.have_another_stand_by();
        }
    }

    /// Waits for a signal, the death of a connection, or the time of the next attempt, which follows `pause`. Returns the
    /// pause to follow that.
    fn wait(&mut self, pause: Duration) -> Result<Duration> {
        let missing = self.slots.iter().any(|slot| slot.socket.is_none());
        let offering = self.slots.iter().any(|slot| !slot.taken);
        let limit = match (missing, offering) {
            (true, _) => Some(pause.min(LONGEST_PAUSE)),
            (false, true) => Some(pause.min(SPARE_PAUSE)),
            (false, false) => self.standby_due.map(|_| STANDBY_PAUSE),
        };
        let limit =
            limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
        let deaths = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let signals = PollFd::new(&self.signals, PollFlags::IN);
        let mut watched: [PollFd<'_>; MAX_CONNECTIONS + 1] = std::array::from_fn(|_| signals.clone());
        let mut at: [usize; MAX_CONNECTIONS + 1] = [0; MAX_CONNECTIONS + 1];
        let mut len = 1;
        for (number, slot) in self.slots.iter().enumerate() {
            if let Some(socket) = &slot.socket {
                (watched[len], at[len]) = (PollFd::new(socket, PollFlags::RDHUP), number);
                len += 1;
            }
        }
        match poll(&mut watched[..len], limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for connections"),
        }
        let mut died = [false; MAX_CONNECTIONS];
        for (number, watched) in at[1..len].iter().zip(&watched[1..len]) {
            died[*number] = watched.revents().intersects(deaths);
        }
        self.hear_signals();
        let mut any = false;
        for (slot, died) in self.slots.iter_mut().zip(died) {
            if died {
                *slot = Slot::default();
                any = true;
            }
        }
        if !any {
            return Ok((pause * 2).min(SPARE_PAUSE));
        }
        self.begin_outage();
        Ok(PAUSE)
    }

    fn begin_outage(&mut self) {
        if self.outage.is_none() {
            self.outage = Some(Outage { since: Instant::now(), failed: 0, last: None });
        }
    }

    /// Whether it is, which is then said: a device in use is not torn down.
    fn is_in_use(&self) -> bool {
        let in_use = self.device.is_in_use();
        if in_use {
            self.teller.tell(Event::InUse);
        }
        in_use
    }
}

fn failed(outage: &mut Option<Outage>, failure: Failure) {
    if let Some(outage) = outage {
        (outage.failed, outage.last) = (outage.failed + 1, Some(failure));
    }
}

/// Makes the device swap space, and swaps to it, while the watch goes on.
struct Swapon {
    device: std::path::PathBuf,
    child: Child,
    at_mkswap: bool,
}

impl Swapon {
    fn begin(device: &Device) -> Result<Swapon> {
        let child = start(Command::new("mkswap").arg(&device.path))?;
        Ok(Swapon { device: device.path.clone(), child, at_mkswap: true })
    }

    /// True: it is done.
    fn go_on(&mut self) -> Result<bool> {
        let Some(status) = self.child.try_wait().context("cannot wait for mkswap and swapon")? else {
            return Ok(false);
        };
        if !status.success() {
            bail!(
                "{} failed on {} ({status})",
                if self.at_mkswap { "mkswap" } else { "swapon" },
                self.device.display()
            );
        }
        if !self.at_mkswap {
            return Ok(true);
        }
        self.at_mkswap = false;
        self.child = start(Command::new("swapon").arg("--discard=pages").arg(&self.device))?;
        Ok(false)
    }
}

fn start(command: &mut Command) -> Result<Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdout(Stdio::null()).spawn().with_context(|| format!("cannot start {name}"))
}
