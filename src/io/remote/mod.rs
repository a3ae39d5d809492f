//! A tier behind an NBD server: any server, over TCP or a Unix socket, with TLS or without.
//!
//! Requesters (a queue's thread, a connection of the NBD front end, the mover, a lane that waits) hand what they want
//! to a table ([`table`]) and are told of its end in their own io_uring, as the kernel tells of a read it did for them
//! ([`post`]). Between the two are *carriers* ([`carrier`]), a thread for each connection, which connect, negotiate
//! ([`crate::nbd::handshake`]), send and receive ([`conversation`]), and share what is waiting ([`office`]). So
//! nobody on the I/O path knows of sockets, and a carrier may wait for the network as long as it takes.
//!
//! Why a thread for each connection, and not one with an io_uring for all: whatever holds one connection up, a
//! negotiation, TLS, a peer that sends byte by byte, holds no other up, and negotiating is plain code that the front
//! end's client shares.
//!
//! **Late writes.** A connection that breaks may leave a write in the server, to be done at any time. Sending it again
//! does no harm, since it writes the same; writing something else there might. So a write, or trim, that was sent and
//! not answered on the same connection is called *late* when it ends, and `tier/late.rs` keeps its place free.

mod carrier;
mod conversation;
mod office;
mod post;
mod table;
mod tls;
mod transport;

use super::backing::{bad, check_free, head_of, is_head_of, SIGNATURES_BYTES};
use super::{Buffer, TierKey, BLOCK_BYTES};
use crate::config::{format_size, DiskTier, NbdAddress, NbdPlace, NbdTls, Place, MIN_DISK_BYTES};
use crate::error::{system, Error, Result};
use crate::nbd::handshake::Failure;
use carrier::{Carrier, Way};
use office::{Identity, Office};
use post::{Post, Waiter};
use socket2::SockAddr;
use std::net::ToSocketAddrs;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) use post::decode;
pub(crate) use table::{Kind, Reply, Request};
pub use tls::Tls;

/// Connections if the user does not say, where several agree.
const CONNECTIONS: u8 = 2;
/// A carrier's stack: a front end makes all of it resident. TLS wants more.
const STACK_BYTES: usize = 128 << 10;
const TLS_STACK_BYTES: usize = 512 << 10;
/// How long a new store waits for the server.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// Trimmed at once when an export is taken that was a tier before.
const TRIM_BYTES: u64 = 1 << 30;

/// A tier behind an NBD server, and the threads that speak with it. They end with it.
pub(crate) struct Remote {
    office: Arc<Office>,
    carriers: Vec<JoinHandle<()>>,
    tier: DiskTier,
}

impl Remote {
    /// Looks up addresses, reads certificates, starts the carriers. Waits for no server: they begin to connect, as
    /// for a store that stands by.
    pub fn start(tier: &DiskTier, nbd: &NbdPlace, thread_start: Option<fn(&str)>, tls: Option<Tls>) -> Result<Remote> {
        Post::check()?;
        let load = |files: &NbdTls| match tls {
            Some(tls) => tls.load(files),
            None => Err("this program was built without TLS (cargo build --features tls)".into()),
        };
        let tls = nbd.tls.as_ref().map(load).transpose().map_err(|why| bad(tier, &why))?;
        let way = Arc::new(Way { addresses: look_up(tier, nbd)?, export: nbd.export.clone(), tls });
        let count = usize::from(nbd.connections.unwrap_or(CONNECTIONS));
        let timeout = Duration::from_secs(nbd.timeout_s.into());
        let office =
            Office::new(count, timeout).map_err(|source| Error::System { what: "eventfd for an nbd tier", source })?;
        let mut remote = Remote { office: Arc::new(office), carriers: Vec::with_capacity(count), tier: tier.clone() };
        let stack = if nbd.tls.is_some() { TLS_STACK_BYTES } else { STACK_BYTES };
        for n in 0..count {
            let carrier = Carrier::new(n, remote.office.clone(), way.clone())?;
            let body = move || {
                if let Some(hook) = thread_start {
                    hook("carrier");
                }
                carrier.run();
            };
            let thread = std::thread::Builder::new().name(format!("ghost-carrier{n}")).stack_size(stack).spawn(body);
            remote.carriers.push(thread.map_err(|_| system("starting a carrier"))?);
        }
        Ok(remote)
    }

    /// A store counts on it from here on.
    pub fn serve(&self) {
        self.office.serve();
    }

    /// Waits for the first connection. Returns the bytes that may be used.
    pub fn wait(&self) -> Result<u64> {
        let begun = Instant::now();
        while !self.office.is_up() {
            let failure = self.office.failure.lock().unwrap_or_else(PoisonError::into_inner);
            // What is refused is refused the second time too.
            let hopeless = match &*failure {
                Some(Failure::Refused { .. } | Failure::Rude(_)) => true,
                // A certificate that is not believed.
                Some(Failure::Io(e)) => e.kind() == std::io::ErrorKind::InvalidData,
                _ => false,
            };
            if hopeless || begun.elapsed() >= CONNECT_TIME {
                let why = failure.as_ref().map_or_else(|| "no answer from the server".into(), Failure::to_string);
                return Err(bad(&self.tier, &why));
            }
            drop(failure);
            std::thread::sleep(Duration::from_millis(2));
        }
        let there = self.office.export.get().map_or(0, |export| export.bytes);
        match self.tier.size {
            Some(size) if size > there => {
                Err(bad(&self.tier, &format!("it has {}, less than size={size}", format_size(there))))
            }
            None if there < MIN_DISK_BYTES => {
                Err(bad(&self.tier, &format!("it has {}, less than 16 MiB", format_size(there))))
            }
            size => Ok(size.unwrap_or(there)),
        }
    }

    /// Whose it must be, and how large at least, on each connection from now on.
    pub fn bind(&self, id: &TierKey, bytes: u64) {
        // Said once for a store.
        let _ = self.office.identity.set(Identity { id: *id, bytes });
        self.office.wake_all();
    }

    /// There is a connection.
    pub fn is_up(&self) -> bool {
        self.office.is_up()
    }

    /// How long there has been none.
    pub fn away(&self) -> Option<Duration> {
        self.office.away()
    }

    /// It is away, but may come back in time, or is back for less than that.
    pub fn comes_and_goes(&self, back_for: Duration) -> bool {
        self.office.is_back_for_less(back_for) || !self.is_up() && !self.is_lost()
    }

    /// Whoever asks now is refused: the server has been away for long, or is another.
    pub fn is_lost(&self) -> bool {
        self.office.is_lost()
    }

    /// Has somebody told why there is no connection.
    pub fn tell_why(&self, tell: impl FnOnce(&Failure)) {
        let failure = self.office.failure.lock().unwrap_or_else(PoisonError::into_inner);
        tell(failure.as_ref().unwrap_or(&Failure::Io(std::io::ErrorKind::NotConnected.into())));
    }

    /// Makes it a tier with this identity, unless it holds what is not ours.
    pub fn initialise(&self, id: &TierKey, bytes: u64) -> Result<()> {
        let io = |e: std::io::Error| bad(&self.tier, &e.to_string());
        let mut start = Buffer::new(SIGNATURES_BYTES);
        self.read(&mut start, 0).map_err(io)?;
        if check_free(&self.tier, &start)? {
            // What a store before this one left there. Servers that cannot trim keep it until it is written over.
            for at in (0..bytes).step_by(TRIM_BYTES as usize) {
                let (result, late) = self.ask(Kind::Trim, at, TRIM_BYTES.min(bytes - at) as u32, 0);
                if late {
                    return Err(bad(&self.tier, "the connection broke while it was being emptied: try again"));
                }
                if result.is_err() {
                    break;
                }
            }
        }
        let mut head = head_of(id);
        let (result, _) = self.ask(Kind::Write, 0, head.len() as u32, head.as_mut_ptr() as usize);
        result.map(drop).map_err(io)
    }

    /// Makes sure that it is the one with this identity.
    pub fn check(&self, id: &TierKey) -> Result<()> {
        let mut head = Buffer::new(BLOCK_BYTES);
        self.read(&mut head, 0).map_err(|e| bad(&self.tier, &e.to_string()))?;
        match is_head_of(&head, id) {
            true => Ok(()),
            false => Err(bad(&self.tier, "it is not the one that this arena's pages went to")),
        }
    }

    /// The same, with room to read the first block. Allocates nothing.
    pub fn is_ours(&self, id: &TierKey, block: &mut [u8]) -> bool {
        self.read(block, 0).is_ok() && is_head_of(block, id)
    }

    /// Reads all of the buffer from byte `at` on; waits for it.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        self.ask(Kind::Read, at, buffer.len() as u32, buffer.as_mut_ptr() as usize).0.map(drop)
    }

    /// Tells the server that a range holds nothing any more, and waits for that. True: it may do so later once more.
    pub fn discard(&self, at: u64, bytes: u64) -> bool {
        self.ask(Kind::Trim, at, bytes as u32, 0).1
    }

    fn ask(&self, kind: Kind, at: u64, bytes: u32, buffer: usize) -> (std::io::Result<u32>, bool) {
        let waiter = Waiter::new();
        let reply = Reply::Waiter(&raw const waiter as usize);
        self.push(&Request { kind, at, bytes, buffer, reply });
        decode(waiter.wait())
    }

    /// Hands a request over, waiting while there are too many.
    pub fn push(&self, request: &Request) {
        while !self.office.push(request) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The same, but does not wait. False: too many at this moment.
    pub fn try_push(&self, request: &Request) -> bool {
        self.office.push(request)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.office.stop.store(true, Ordering::SeqCst);
        self.office.wake_all();
        for carrier in self.carriers.drain(..) {
            // One that panicked has said so on standard error already.
            let _ = carrier.join();
        }
    }
}

impl std::fmt::Display for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.tier.place.path().display().fmt(f)
    }
}

fn look_up(tier: &DiskTier, nbd: &NbdPlace) -> Result<Vec<SockAddr>> {
    match &nbd.address {
        NbdAddress::Unix(path) => {
            let address = SockAddr::unix(path);
            Ok(vec![address.map_err(|_| bad(tier, &format!("not a socket's path: {}", path.display())))?])
        }
        NbdAddress::Tcp(host, port) => {
            let found = (host.as_str(), *port).to_socket_addrs();
            let found: Vec<_> = found.map_err(|e| bad(tier, &e.to_string()))?.map(SockAddr::from).collect();
            match found.is_empty() {
                true => Err(bad(tier, "the host has no address")),
                false => Ok(found),
            }
        }
    }
}

/// A requester's ring, by which it is told.
pub(crate) struct Door {
    remote: Arc<Remote>,
    /// Its own descriptor of it: that number is nobody else's while something may be told.
    ring: OwnedFd,
}

impl Door {
    pub fn new(remote: Arc<Remote>, ring: BorrowedFd<'_>) -> Result<Door> {
        let ring = ring.try_clone_to_owned().map_err(|source| Error::System { what: "a ring's descriptor", source })?;
        Ok(Door { remote, ring })
    }

    /// Begins to read. The buffer has to stay, and this door too, until the completion came. False: there are too many
    /// reads at this moment.
    pub fn read(&self, at: u64, bytes: u32, buffer: *mut u8, user_data: u64) -> bool {
        let reply = Reply::Ring(self.ring.as_raw_fd(), user_data);
        self.remote.try_push(&Request { kind: Kind::Read, at, bytes, buffer: buffer as usize, reply })
    }
}

impl DiskTier {
    /// Where the server is, if it lies behind one.
    pub(crate) fn nbd(&self) -> Option<&NbdPlace> {
        match &self.place {
            Place::Nbd(nbd) => Some(nbd),
            _ => None,
        }
    }
}
