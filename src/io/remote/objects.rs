//! What the rest of the store knows of a tier of objects, and that no second store of this machine has the same.
//!
//! Nothing else here names what speaks S3 (`s3/`), and nothing but [`S3::new`] leads there: a program that does not call
//! it is some MiB smaller, all of which a daemon keeps in memory.
#![allow(unsafe_code, reason = "asking whose a socket is")]

use super::office::Office;
use crate::config::S3Place;
use crate::io::TierKey;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Arc, OnceLock};
use xxhash_rust::xxh3::xxh3_128;

/// That a store may keep objects on an S3 server.
#[derive(Clone, Copy)]
pub struct S3(fn(&S3Place) -> Result<Box<dyn Objects>, String>);

impl S3 {
    /// It may.
    #[cfg(feature = "s3")]
    #[allow(clippy::new_without_default, reason = "a choice, not a value")]
    pub fn new() -> S3 {
        S3(super::s3::load)
    }

    /// Err: one line that says what is wrong.
    pub(super) fn load(self, place: &S3Place) -> Result<Box<dyn Objects>, String> {
        self.0(place)
    }
}

impl std::fmt::Debug for S3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("S3")
    }
}

/// A bucket, or what lies under a prefix of one.
pub(super) trait Objects: Send + Sync {
    /// What the carrier's thread does.
    fn carrier(&self, office: Arc<Office>, thread_start: Option<fn(&str)>) -> crate::Result<Box<dyn FnOnce() + Send>>;

    /// Makes it the tier with this identity, unless it holds what is not ours; waits for that. Err: one line.
    fn initialise(&self, id: &TierKey) -> Result<(), String>;
}

/// What keeps stores of one machine apart, as `flock` does with files: a name among its abstract sockets, which goes
/// with the process that has it. Other machines are told by the header (`s3/bucket.rs`).
pub(super) struct Alone {
    name: String,
    held: OnceLock<UnixListener>,
    /// Whoever else had it when that was first asked counts. Not asked again: nobody there takes connections away.
    counts: OnceLock<bool>,
}

impl Alone {
    pub fn new(place: &S3Place) -> Alone {
        let endpoint = place.endpoint.as_deref().unwrap_or_default();
        let what = format!("{endpoint} {:?} {} {}", place.region, place.bucket, place.prefix);
        Alone {
            name: format!("ghostswap-s3-{:032x}", xxh3_128(what.as_bytes())),
            held: OnceLock::new(),
            counts: OnceLock::new(),
        }
    }

    /// False: another process has it.
    pub fn claim(&self) -> bool {
        if self.held.get().is_some() {
            return true;
        }
        let Ok(address) = SocketAddr::from_abstract_name(self.name.as_bytes()) else { return true };
        match UnixListener::bind_addr(&address) {
            Ok(listener) => {
                let _ = self.held.set(listener);
                true
            }
            // No such thing here, in a container say.
            Err(e) if e.kind() != ErrorKind::AddrInUse => true,
            Err(_) => !*self.counts.get_or_init(|| is_ours(&self.name)),
        }
    }
}

/// Whether who listens there is root, or who we are: anybody may take a name, so it counts only with those who could do
/// harm anyway.
fn is_ours(name: &str) -> bool {
    let Ok(stream) = Socket::new(Domain::UNIX, Type::STREAM, None) else { return true };
    let connected = stream.set_nonblocking(true).and_then(|()| stream.connect(&SockAddr::unix(format!("\0{name}"))?));
    if connected.is_err() {
        return true;
    }
    let mut who = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: as many bytes as it says that are there, all of which live.
    let asked = unsafe {
        let place = (&raw mut who).cast();
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, place, &raw mut bytes)
    };
    // SAFETY: takes and gives numbers.
    let own = unsafe { libc::geteuid() };
    asked == 0 && (who.uid == 0 || who.uid == own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskTier, Place, TierConfig};

    #[test]
    fn a_prefix_is_one_stores_of_a_machine() {
        let alone = |name: &str| match name.parse() {
            Ok(TierConfig::Disk(DiskTier { place: Place::S3(place), .. })) => Alone::new(&place),
            other => panic!("{other:?}"),
        };
        let name = format!("s3:claims/{},region=a", std::process::id());
        let (first, second, other) = (alone(&name), alone(&name), alone(&format!("{name}b")));
        assert!(first.claim() && first.claim() && other.claim());
        assert!(!second.claim());
        drop(first);
        assert!(second.claim());
    }
}
