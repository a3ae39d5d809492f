//! What a tier below memory lies on: a file or block device of this machine, an NBD server's export, or objects of an
//! S3 server.
#![allow(unsafe_code, reason = "a promise that requesters give of their buffers")]

use super::remote::{Door, Remote, Tls, S3};
use super::{Backing, TierKey};
use crate::config::{DiskTier, Place};
use crate::error::Result;
use crate::page::{TierNo, MAX_TIERS_BELOW};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

/// What whoever opens a store lends to its lower tier: what each thread does first, and what the program can do.
#[derive(Clone, Copy, Default)]
pub(crate) struct Callers {
    pub thread_start: Option<fn(&str)>,
    pub tls: Option<Tls>,
    pub s3: Option<S3>,
}

/// One of the two.
pub(crate) enum Medium {
    Disk(Backing),
    Remote(Arc<Remote>),
}

impl Medium {
    /// Opens it. Writes nothing, and waits for no server.
    pub fn open(tier: &DiskTier, callers: &Callers) -> Result<Medium> {
        match &tier.place {
            Place::Nbd(nbd) => Ok(Medium::Remote(Arc::new(Remote::start_nbd(tier, nbd, callers)?))),
            Place::S3(s3) => Ok(Medium::Remote(Arc::new(Remote::start_s3(tier, s3, callers)?))),
            Place::File(_) | Place::Block(_) => Backing::open(tier).map(Medium::Disk),
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
            Medium::Remote(remote) => remote.claim(),
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

    /// Whether it was that when it was opened or, if it was no tier then, is now.
    pub fn bears(&self, id: &TierKey) -> bool {
        match self {
            Medium::Disk(backing) => backing.bore().map_or_else(|| backing.check(id).is_ok(), |own| own == *id),
            Medium::Remote(remote) => remote.check(id).is_ok(),
        }
    }

    /// Reads all of the buffer from byte `at` on.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        match self {
            Medium::Disk(backing) => backing.read(buffer, at),
            Medium::Remote(remote) => remote.read(buffer, at),
        }
    }

    /// Tells that so many bytes from each of these on hold nothing any more. Of each, true: that may be done later once
    /// more.
    pub fn discard(&self, all: &[u64], bytes: u64) -> [bool; MOST_DISCARDS] {
        match self {
            Medium::Disk(backing) => {
                all.iter().for_each(|at| backing.discard(*at, bytes));
                [false; MOST_DISCARDS]
            }
            Medium::Remote(remote) => remote.discard(all, bytes),
        }
    }

    /// How many ranges at once. Objects are deleted one by one, and each takes as long as a round trip.
    pub fn discards_at_once(&self) -> usize {
        match self {
            Medium::Remote(remote) if remote.has_objects() => MOST_DISCARDS,
            _ => 1,
        }
    }

    /// Segments are written in parts. Objects are not: what is written is all that there is.
    pub fn takes_parts(&self) -> bool {
        !matches!(self, Medium::Remote(remote) if remote.has_objects())
    }

    /// Behind a server.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match self {
            Medium::Disk(_) => None,
            Medium::Remote(remote) => Some(remote),
        }
    }

    /// How a requester with such a ring reads from it.
    fn way(&self, ring: BorrowedFd<'_>) -> Result<From> {
        match self {
            Medium::Disk(backing) => Ok(From::Disk(backing.fd().as_raw_fd(), backing.is_file())),
            Medium::Remote(remote) => Ok(From::Remote(Door::new(remote.clone(), ring)?)),
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

/// Most ranges that are discarded at once.
pub(crate) const MOST_DISCARDS: usize = 16;

/// Where on which tier something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct At {
    tier: TierNo,
    byte: u64,
}

impl At {
    pub(crate) fn new(tier: TierNo, byte: u64) -> At {
        At { tier, byte }
    }

    /// How far from its beginning.
    pub fn byte(self) -> u64 {
        self.byte
    }
}

/// Where what is to be fetched is read from, by a requester with an io_uring of its own: the tiers by their places in
/// the arena.
#[derive(Default)]
pub struct Source([Option<From>; MAX_TIERS_BELOW]);

enum From {
    /// True: a file.
    Disk(RawFd, bool),
    Remote(Door),
}

/// What has become of a read that was to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The requester reads it itself, from this descriptor.
    ByYou {
        #[allow(missing_docs, reason = "said above")]
        fd: RawFd,
        /// A file system may keep whoever asks waiting for what waits for memory, which is not to be who frees it: a
        /// thread of the kernel's is to ask (IOSQE_ASYNC). ext4 looks under a lock where a block of a file is, which a
        /// write to space that was never written holds while it asks for memory.
        apart: bool,
    },
    /// It is on its way. A completion comes in the requester's ring, as of a read of its own.
    ByOthers,
    /// Too many are under way: later.
    NotNow,
}

impl Source {
    /// For a requester with such a ring.
    pub(crate) fn add(&mut self, tier: TierNo, medium: &Medium, ring: BorrowedFd<'_>) -> Result<()> {
        self.0[tier.index()] = Some(medium.way(ring)?);
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn disk(fd: RawFd) -> Source {
        Source([Some(From::Disk(fd, true)), None, None, None])
    }

    /// Begins to read so many bytes from there on, or leaves that to the requester. Neither waits nor allocates.
    ///
    /// # Safety
    /// The buffer has so many bytes, and stays, with nobody looking into it, until the completion came; and so does
    /// this source.
    pub unsafe fn begin(&self, at: At, bytes: usize, buffer: *mut u8, user_data: u64) -> Begun {
        match self.0[at.tier.index()].as_ref().expect("what is fetched lies on a tier of the store") {
            From::Disk(fd, is_file) => Begun::ByYou { fd: *fd, apart: *is_file },
            From::Remote(door) if door.read(at.byte, bytes as u32, buffer, user_data) => Begun::ByOthers,
            From::Remote(_) => Begun::NotNow,
        }
    }
}
