//! What a tier below memory lies on: a file or block device of this machine, or an NBD server's export.
#![allow(unsafe_code, reason = "a promise that requesters give of their buffers")]

use super::remote::{Door, Remote, Tls};
use super::{Backing, TierKey};
use crate::config::DiskTier;
use crate::error::Result;
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

/// One of the two.
pub(crate) enum Medium {
    Disk(Backing),
    Remote(Arc<Remote>),
}

impl Medium {
    /// Opens it. Writes nothing, and waits for no server.
    pub fn open(tier: &DiskTier, thread_start: Option<fn(&str)>, tls: Option<Tls>) -> Result<Medium> {
        match tier.nbd() {
            Some(nbd) => Ok(Medium::Remote(Arc::new(Remote::start(tier, nbd, thread_start, tls)?))),
            None => Backing::open(tier).map(Medium::Disk),
        }
    }

    /// Bytes that may be used; of a server only `if_new`, when it is waited for: whoever takes over does not wait.
    pub fn bytes(&self, if_new: bool) -> Result<Option<u64>> {
        match self {
            Medium::Disk(backing) => Ok(Some(backing.bytes())),
            Medium::Remote(remote) if if_new => {
                remote.serve();
                remote.wait().map(Some)
            }
            Medium::Remote(_) => Ok(None),
        }
    }

    /// Takes it for this process alone, as far as that can be had. An error too while a server is away.
    pub fn claim(&self) -> Result<()> {
        match self {
            Medium::Disk(backing) => backing.claim(),
            Medium::Remote(remote) if remote.is_up() => Ok(()),
            Medium::Remote(remote) => Err(crate::Error::BadTier { tier: remote.to_string(), why: "it is away".into() }),
        }
    }

    /// Makes it a tier with this identity, unless it holds what is not ours.
    pub fn initialise(&self, id: &TierKey, bytes: u64) -> Result<()> {
        match self {
            Medium::Disk(backing) => backing.initialise(id),
            Medium::Remote(remote) => remote.initialise(id, bytes),
        }
    }

    /// Makes sure that it is the one with this identity.
    pub fn check(&self, id: &TierKey) -> Result<()> {
        match self {
            Medium::Disk(backing) => backing.check(id),
            Medium::Remote(remote) => remote.check(id),
        }
    }

    /// Reads all of the buffer from byte `at` on.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        match self {
            Medium::Disk(backing) => backing.read(buffer, at),
            Medium::Remote(remote) => remote.read(buffer, at),
        }
    }

    /// Tells that a range holds nothing any more. True: that may be done later once more.
    pub fn discard(&self, at: u64, bytes: u64) -> bool {
        match self {
            Medium::Disk(backing) => {
                backing.discard(at, bytes);
                false
            }
            Medium::Remote(remote) => remote.discard(at, bytes),
        }
    }

    /// Behind a server.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match self {
            Medium::Disk(_) => None,
            Medium::Remote(remote) => Some(remote),
        }
    }

    /// How a requester with such a ring reads from it.
    pub fn source(&self, ring: BorrowedFd<'_>) -> Result<Source> {
        match self {
            Medium::Disk(backing) => Ok(Source::disk(backing.fd().as_raw_fd())),
            Medium::Remote(remote) => Ok(Source(From::Remote(Door::new(remote.clone(), ring)?))),
        }
    }
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Medium::Disk(backing) => backing.fmt(f),
            Medium::Remote(remote) => remote.fmt(f),
        }
    }
}

/// Where what is to be fetched is read from, by a requester with an io_uring of its own.
pub struct Source(From);

enum From {
    Disk(RawFd),
    Remote(Door),
}

/// What has become of a read that was to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The requester reads it itself, from this descriptor.
    ByYou(RawFd),
    /// It is on its way. A completion comes in the requester's ring, as of a read of its own.
    ByOthers,
    /// Too many are under way: later.
    NotNow,
}

impl Source {
    pub(crate) fn disk(fd: RawFd) -> Source {
        Source(From::Disk(fd))
    }

    /// Begins to read so many bytes from byte `at` on, or leaves that to the requester. Neither waits nor allocates.
    ///
    /// # Safety
    /// The buffer has so many bytes, and stays, with nobody looking into it, until the completion came; and so does
    /// this source.
    pub unsafe fn begin(&self, at: u64, bytes: usize, buffer: *mut u8, user_data: u64) -> Begun {
        match &self.0 {
            From::Disk(fd) => Begun::ByYou(*fd),
            From::Remote(door) if door.read(at, bytes as u32, buffer, user_data) => Begun::ByOthers,
            From::Remote(_) => Begun::NotNow,
        }
    }
}
