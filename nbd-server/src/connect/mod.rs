//! `ghostswap-nbd connect`: a client for the kernel's nbd driver, for machines that swap to an export.
//!
//! It agrees with the server on the export (`ghostswap::nbd::handshake`), hands the sockets to the kernel (`device`, by `netlink`),
//! and stays (`watch`): when connections die it agrees anew and gives the kernel fresh ones. Meanwhile the driver
//! holds what waits; what was sent and not answered it sends again.
//!
//! A machine that swaps has perhaps no memory to start a process with while connections are missing. So the first process
//! has a second one stand by, all made beforehand, which follows it if it dies. And one that is started while another
//! watches stands by as well; one that is started while none does takes the device over as it is.
//!
//! Which requests are sent again, and when, the driver decides by a clock:
//! - with one connection it looks at requests every [`LOOK`], and sends those again whose connection has been replaced.
//!   One that is only slow it leaves alone.
//! - with several it gives up a connection on which a request has waited for `--timeout`, and sends it again on
//!   another; also if the server is only slow. A request may then be carried out twice, and in a server that stood
//!   still the first copy may be the later one.
//!
//! No pages of another export: a server that has lost what it held has an export of that name, but of another
//! identity, and the driver never gets a connection to it. Servers other than ours show no identity.

mod device;
mod netlink;
mod tell;
mod watch;

use crate::protect;
use anyhow::{bail, ensure, Context, Result};
use device::{Device, Patience, BLOCK_BYTES};
pub use ghostswap::nbd::handshake;
use ghostswap::nbd::proto::reply;
use ghostswap::Error;
use handshake::{negotiate, read_page, Export, Failure};
use rustix::fs::{fcntl_lock, FlockOperation};
use rustix::io::Errno;
use rustix::process::{fcntl_getlk, kill_process, Flock, FlockType, Pid, Signal};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// For all of a handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// With one connection. Half a minute is the kernel's own; each time, it logs what has waited for so long.
const LOOK: Duration = Duration::from_secs(2);
/// With several.
const TIMEOUT_SECONDS: u32 = 30;
/// What a request of the kernel may carry.
const REQUEST_BYTES: u32 = 32 << 20;
const MAX_BACKEND_BYTES: usize = handshake::MAX_NAME_BYTES + 64;
const MAX_CONNECTIONS: usize = 16;
/// For a watcher that is told to end.
const END_TIME: Duration = Duration::from_secs(30);
/// An idle peer that vanished is noticed after 30 + 3 × 10 seconds.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TRIES: u32 = 3;
/// One that does not acknowledge what it is sent.
const UNACKNOWLEDGED_TIME: Duration = Duration::from_secs(30);

/// What to connect to, and how.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("server").required(true).args(["at_unix", "at_tcp"]))]
pub struct Options {
    /// The server listens at this Unix socket
    #[arg(long = "unix", id = "at_unix", value_name = "PATH")]
    unix: Option<PathBuf>,
    /// The server listens at this TCP address
    #[arg(long = "tcp", id = "at_tcp", value_name = "ADDR:PORT")]
    tcp: Option<String>,
    /// The export
    #[arg(long = "export", id = "export_name", value_name = "NAME")]
    export: String,
    /// The device of the kernel's nbd driver, as /dev/nbd0
    device: PathBuf,
    /// How many connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_CONNECTIONS as i64))]
    connections: u16,
    /// With several connections: give up one on which a request has waited for so long [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86400))]
    timeout: Option<u32>,
    /// Fail what waits when there was no connection for so long; for a machine that swaps, that may be its end
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..))]
    dead_time: u32,
    /// Make it swap space and swap to it
    #[arg(long)]
    swapon: bool,
}

/// The way to a server, with the address looked up.
struct Way {
    address: SockAddr,
    export: String,
}

impl Options {
    fn patience(&self) -> Patience {
        let seconds = if self.connections == 1 { 0 } else { self.timeout.unwrap_or(TIMEOUT_SECONDS) };
        Patience { request: Duration::from_secs(seconds.into()), dead: Duration::from_secs(self.dead_time.into()) }
    }

    fn check(&self) -> Result<(), Error> {
        let bad = |why: &str| Err(Error::InvalidConfig(why.to_owned()));
        if self.timeout.is_some() && self.connections == 1 {
            return bad("--timeout needs --connections 2 or more: a single one is never given up");
        }
        if self.export.is_empty() || self.export.len() > handshake::MAX_NAME_BYTES {
            return bad("an export's name has 1 to 255 bytes here");
        }
        if self.export.bytes().any(|byte| byte == 0) {
            return bad("an export's name has no NUL");
        }
        Ok(())
    }

    /// The server's place, in words.
    fn place(&self) -> String {
        match &self.unix {
            Some(path) => path.display().to_string(),
            None => self.tcp.clone().unwrap_or_default(),
        }
    }

    fn addresses(&self) -> Result<Vec<SockAddr>> {
        if let Some(path) = &self.unix {
            return Ok(vec![SockAddr::unix(path).with_context(|| format!("not a socket's path: {}", path.display()))?]);
        }
        let found = self.place().to_socket_addrs();
        let found: Vec<SockAddr> =
            found.with_context(|| format!("cannot look up {}", self.place()))?.map(SockAddr::from).collect();
        ensure!(!found.is_empty(), "{} has no address", self.place());
        Ok(found)
    }

    /// The first of the addresses that leads to the export.
    fn find(&self) -> Result<(Way, Socket, Export)> {
        let mut failed = None;
        for address in self.addresses()? {
            let way = Way { address, export: self.export.clone() };
            match way.go() {
                Ok((socket, export)) => return Ok((way, socket, export)),
                Err(failure) => failed = Some(failure),
            }
        }
        match failed {
            Some(failure) => {
                let tls = matches!(failure, Failure::Refused { reply: reply::ERR_TLS_REQD, .. });
                let advice = if tls {
                    ", which the kernel does not speak: let it listen without at another address"
                } else {
                    ""
                };
                bail!("no way to export '{}' at {}: {failure}{advice}", self.export, self.place())
            }
            None => bail!("{} has no address", self.place()),
        }
    }
}

impl Way {
    /// A connection to the export. Allocates nothing here.
    fn go(&self) -> Result<(Socket, Export), Failure> {
        let end = Instant::now() + HANDSHAKE_TIME;
        let socket = Socket::new(self.address.domain(), Type::STREAM, None)?;
        socket.connect_timeout(&self.address, HANDSHAKE_TIME)?;
        if self.address.domain() != Domain::UNIX {
            socket.set_tcp_nodelay(true)?;
            let keepalive = TcpKeepalive::new()
                .with_time(KEEPALIVE_IDLE)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_TRIES);
            socket.set_tcp_keepalive(&keepalive)?;
            socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIME))?;
        }
        let export = negotiate(&mut Timed { socket: &socket, end }, self.export.as_bytes())?;
        // The driver's waiting is its own affair.
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok((socket, export))
    }

    /// Another one to the same export.
    fn again(&self, export: &Export) -> Result<Socket, Failure> {
        let (socket, now) = self.go()?;
        if now == *export {
            Ok(socket)
        } else {
            Err(Failure::Replaced)
        }
    }
}

/// A socket on which all waiting together ends by then.
struct Timed<'a> {
    socket: &'a Socket,
    end: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Some(left))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(into)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the kernel can use of an export, in bytes.
fn usable(export: &Export, connections: usize) -> Result<u64> {
    let bytes = export.bytes - export.bytes % BLOCK_BYTES;
    ensure!(bytes > 0 && i64::try_from(bytes).is_ok(), "the export has {} bytes: not of use", export.bytes);
    ensure!(
        u64::from(export.min_block_bytes) <= BLOCK_BYTES,
        "the server takes blocks of {} bytes and more: swap needs 4096",
        export.min_block_bytes
    );
    ensure!(
        export.max_payload_bytes == 0 || export.max_payload_bytes >= REQUEST_BYTES,
        "the server takes at most {} bytes at once: the kernel may send {REQUEST_BYTES}",
        export.max_payload_bytes
    );
    ensure!(
        connections == 1 || export.can_multi_conn(),
        "the server cannot have several connections agree on an export: give --connections 1"
    );
    Ok(bytes)
}

/// What the kernel keeps beside the device, for whoever would take it over.
fn backend(export: &Export, name: &str) -> String {
    let identity = export.identity.map(|identity| String::from_utf8_lossy(&identity).into_owned());
    format!("ghostswap-nbd {} {name}", identity.as_deref().unwrap_or("-"))
}

/// Connects the device, or takes it over, and stays until it is disconnected. Where another process watches it
/// already, stands by to follow that.
pub fn run(options: &Options) -> Result<ExitCode> {
    options.check()?;
    let device = Device::open(&options.device)?;
    let lock = Lock::open(&device)?;
    let first = lock.take()?;
    let (way, socket, export) = options.find()?;
    let backend = backend(&export, &options.export);
    let taken_over = device.is_connected();
    let connections = match taken_over {
        true => check_taken_over(&device, &export, &backend, options)?,
        false => usize::from(options.connections),
    };
    let taken_shows = !options.patience().request.is_zero();
    let mut watch = watch::Watch::new(device, way, export, backend, connections, taken_shows)?;
    if !first {
        ensure!(taken_over, "another process connects {} at this moment", options.device.display());
        drop(socket);
        protect::client()?;
        return match watch.stand_by(&lock)? {
            true => watch.run(false),
            false => Ok(ExitCode::SUCCESS),
        };
    }
    protect::client()?;
    let swapon = watch.begin(options, socket, taken_over)?;
    watch.have_another_stand_by();
    watch.run(swapon)
}

/// How many connections a device has that somebody connected before.
fn check_taken_over(device: &Device, export: &Export, backend: &str, options: &Options) -> Result<usize> {
    let (path, has) = (device.path.display(), device.backend().unwrap_or_default());
    ensure!(has.starts_with("ghostswap-nbd "), "{path} is connected already, and not by this program");
    ensure!(
        has == backend,
        "{path} is connected to another export ('{has}'), or the server has lost what it held (now '{backend}')"
    );
    ensure!(
        device.bytes() == Some(export.bytes - export.bytes % BLOCK_BYTES),
        "{path} is of another size than the export"
    );
    let connections = device.connections().filter(|n| (1..=MAX_CONNECTIONS).contains(n));
    let connections = connections.with_context(|| format!("cannot tell how many connections {path} has"))?;
    if connections != usize::from(options.connections) {
        bail!("{path} has {connections} connection(s): give --connections {connections} to take it over");
    }
    Ok(connections)
}

/// Whether an export that was just gone to is empty, or swap space already.
fn check_may_become_swap(socket: &Socket) -> Result<()> {
    let mut page = [0; BLOCK_BYTES as usize];
    read_page(&mut Timed { socket, end: Instant::now() + HANDSHAKE_TIME }, &mut page).map_err(anyhow::Error::new)?;
    let may = page.ends_with(b"SWAPSPACE2") || page.iter().all(|byte| *byte == 0);
    ensure!(may, "the export holds something that is not swap: not made swap space");
    Ok(())
}

/// The process that watches a device holds this lock. Nothing is in the file: a page of it might lie in the very swap
/// that whoever takes the lock is to bring back.
struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Opened once, as this is not to be done while a connection is missing. No other descriptor of it may be closed.
    fn open(device: &Device) -> Result<Lock> {
        let path = Path::new("/run/ghostswap").join(format!("{}.lock", device.name()));
        let place = || format!("cannot use {}", path.display());
        std::fs::create_dir_all("/run/ghostswap").with_context(place)?;
        let file = File::options().write(true).create(true).truncate(false).open(&path).with_context(place)?;
        Ok(Lock { file, path })
    }

    /// False: another process has it.
    fn take(&self) -> Result<bool> {
        match fcntl_lock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::ACCESS | Errno::AGAIN) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot lock {}", self.path.display())),
        }
    }

    /// Who has it.
    fn holder(&self) -> Option<Pid> {
        fcntl_getlk(&self.file, &Flock::from(FlockType::WriteLock)).ok().flatten()?.pid
    }
}

/// Disconnects a device that is not in use, and ends who watches it.
pub fn disconnect(path: &Path) -> Result<ExitCode> {
    let mut device = Device::open(path)?;
    let shown = path.display();
    ensure!(device.is_connected(), "{shown} is not connected");
    ensure!(!device.is_in_use(), "{shown} is in use: swapoff or umount it first");
    let lock = Lock::open(&device)?;
    match lock.take()? {
        true => device.disconnect().with_context(|| format!("cannot disconnect {shown}"))?,
        false => end_watcher(&device, &lock)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// It disconnects the device itself; otherwise it might take that for a connection that died.
fn end_watcher(device: &Device, lock: &Lock) -> Result<()> {
    let pid = lock.holder().context("cannot tell which process watches it")?;
    kill_process(pid, Signal::TERM).context("cannot end the process that watches it")?;
    let end = Instant::now() + END_TIME;
    while device.is_connected() || !lock.take()? {
        ensure!(Instant::now() < end, "process {pid}, which watches {}, does not end", device.path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
