//! A tier behind a server: any NBD server, over TCP or a Unix socket, with TLS or without; or any S3 server ([`s3`]).
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
//!
//! **S3** is the same with one carrier, that has many requests under way, each on a connection of its own: HTTP answers
//! one at a time, and a page's round trip is long. What asks, and what is told, is no different.

mod carrier;
mod conversation;
mod names;
mod objects;
mod office;
mod post;
#[cfg(feature = "s3")]
mod s3;
mod table;
mod tls;
mod transport;

use super::backing::{bad, check_free, head_of, is_head_of, SIGNATURES_BYTES};
use super::medium::{Callers, MOST_DISCARDS};
use super::{Buffer, TierKey, BLOCK_BYTES};
use crate::config::{format_size, DiskTier, NbdPlace, NbdTls, S3Place, MIN_DISK_BYTES};
use crate::error::{system, Error, Result};
use crate::nbd::handshake::Failure;
use carrier::{Carrier, Way};
use names::Addresses;
use objects::{Alone, Objects};
use office::{Identity, Office};
use post::{Post, Waiter};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use objects::S3;
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

/// A tier behind a server, and the threads that speak with it. They end with it.
pub(crate) struct Remote {
    office: Arc<Office>,
    carriers: Vec<JoinHandle<()>>,
    tier: DiskTier,
    /// None: an export.
    objects: Option<(Box<dyn Objects>, Alone)>,
}

impl Remote {
    /// Looks up addresses (`names.rs`), reads certificates, starts the carriers. Waits for no server: they begin to connect, as
    /// for a store that stands by.
    pub fn start_nbd(tier: &DiskTier, nbd: &NbdPlace, callers: &Callers) -> Result<Remote> {
        let load = |files: &NbdTls| match callers.tls {
            Some(tls) => tls.load(files),
            None => Err("this program was built without TLS (cargo build --features tls)".into()),
        };
        let tls = nbd.tls.as_ref().map(load).transpose().map_err(|why| bad(tier, &why))?;
        let addresses = Addresses::of(&nbd.address).map_err(|e| bad(tier, &e.to_string()))?;
        let way = Arc::new(Way { addresses, export: nbd.export.clone(), tls });
        let count = usize::from(nbd.connections.unwrap_or(CONNECTIONS));
        let mut remote = Remote::new(tier, None, count, nbd.timeout_s)?;
        let stack = if nbd.tls.is_some() { TLS_STACK_BYTES } else { STACK_BYTES };
        for n in 0..count {
            let carrier = Carrier::new(n, remote.office.clone(), way.clone())?;
            remote.begin(callers.thread_start, stack, move || carrier.run())?;
        }
        Ok(remote)
    }

    /// The same of a bucket.
    pub fn start_s3(tier: &DiskTier, place: &S3Place, callers: &Callers) -> Result<Remote> {
        let load = match callers.s3 {
            Some(s3) => s3.load(place),
            None => Err("this program was built without S3 (cargo build --features s3)".into()),
        };
        let objects = load.map_err(|why| bad(tier, &why))?;
        let mut remote = Remote::new(tier, Some((objects, Alone::new(place))), 1, place.timeout_s)?;
        let (objects, _) = remote.objects.as_ref().expect("it was just put there");
        let run = objects.carrier(remote.office.clone(), callers.thread_start)?;
        remote.begin(callers.thread_start, TLS_STACK_BYTES, run)?;
        Ok(remote)
    }

    fn new(
        tier: &DiskTier,
        objects: Option<(Box<dyn Objects>, Alone)>,
        carriers: usize,
        timeout_s: u32,
    ) -> Result<Remote> {
        Post::check()?;
        let office = Office::new(carriers, Duration::from_secs(timeout_s.into()));
        let office = office.map_err(|source| Error::System { what: "eventfd for a tier behind a server", source })?;
        Ok(Remote { office: Arc::new(office), carriers: Vec::with_capacity(carriers), tier: tier.clone(), objects })
    }

    fn begin(
        &mut self,
        thread_start: Option<fn(&str)>,
        stack: usize,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let body = move || {
            if let Some(hook) = thread_start {
                hook("carrier");
            }
            run();
        };
        let name = format!("ghost-carrier{}", self.carriers.len());
        let thread = std::thread::Builder::new().name(name).stack_size(stack).spawn(body);
        self.carriers.push(thread.map_err(|_| system("starting a carrier"))?);
        Ok(())
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
        if self.has_objects() {
            // A bucket has no size.
            return self.tier.size.ok_or_else(|| bad(&self.tier, "it wants a size, as in size=1T"));
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

    /// What goes there becomes objects, of an extent each.
    pub fn has_objects(&self) -> bool {
        self.objects.is_some()
    }

    /// Takes it for this process alone, as far as that can be had. An error too while the server is away.
    pub fn claim(&self) -> Result<()> {
        match &self.objects {
            _ if !self.is_up() => Err(bad(&self.tier, "it is away")),
            Some((_, alone)) if !alone.claim() => Err(bad(&self.tier, "another store of this machine has it")),
            _ => Ok(()),
        }
    }

    /// Whose it must be, how large at least, and in extents of what size, on each connection from now on.
    pub fn bind(&self, id: &TierKey, bytes: u64, extent_bytes: u64) {
        // Said once for a store.
        let _ = self.office.identity.set(Identity { id: *id, bytes, extent_bytes });
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
        if let Some((objects, _)) = &self.objects {
            return objects.initialise(id).map_err(|why| bad(&self.tier, &why));
        }
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

    /// Tells the server that ranges hold nothing any more, all at once, and waits for that. Of each, true: it may do so
    /// later once more.
    pub fn discard(&self, all: &[u64], bytes: u64) -> [bool; MOST_DISCARDS] {
        let waiters: [Waiter; MOST_DISCARDS] = std::array::from_fn(|_| Waiter::new());
        for (at, waiter) in all.iter().zip(&waiters) {
            let reply = Reply::Waiter(std::ptr::from_ref(waiter) as usize);
            self.push(&Request { kind: Kind::Trim, at: *at, bytes: bytes as u32, buffer: 0, reply });
        }
        std::array::from_fn(|i| i < all.len() && decode(waiters[i].wait()).1)
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
