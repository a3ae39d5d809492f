//! What an arena says of the disk tiers that it is bound to: of the first where it always was, of the others, and what
//! came later of the first too, in a table of four (`superblock.rs` draws it).

use super::file::START_BYTES;
use crate::page::{TierNo, MAX_TIERS_BELOW};

const TIER_AT: usize = 88;
const DRAIN_AT: usize = 152;
const EXTENTS_AT: usize = 160;
/// Within the superblock's 4 KiB, which are zero where nothing is said of them.
const TIERS_AT: usize = 256;
const TIER_BYTES: usize = 64;

/// A disk tier that an arena is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bound {
    pub id: [u8; 16],
    pub extents: u32,
    /// A number for what its place was called, 0: not known.
    pub place: u64,
}

/// Those that there are, by their places in the arena.
pub(crate) type AllBound = [Option<Bound>; MAX_TIERS_BELOW];

/// The disk tiers that an arena with this start is bound to.
pub(super) fn tiers_of(start: &[u8; START_BYTES]) -> AllBound {
    let word = |at: usize| u64::from_le_bytes(start[at..at + 8].try_into().expect("8 bytes"));
    std::array::from_fn(|no| bound(TierNo(no as u8), word))
}

/// By the words of the superblock.
pub(super) fn bound(no: TierNo, word: impl Fn(usize) -> u64) -> Option<Bound> {
    let at = TierAt::of(no);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&word(at.id).to_le_bytes());
    id[8..].copy_from_slice(&word(at.id + 8).to_le_bytes());
    is_whole(&id).then(|| Bound { id, extents: word(at.extents) as u32, place: word(at.place) })
}

/// Where what is said of a disk tier stands.
pub(super) struct TierAt {
    pub id: usize,
    pub drain: usize,
    pub extents: usize,
    pub place: usize,
}

impl TierAt {
    pub fn of(no: TierNo) -> TierAt {
        let at = TIERS_AT + no.index() * TIER_BYTES;
        match no {
            TierNo(0) => TierAt { id: TIER_AT, drain: DRAIN_AT, extents: EXTENTS_AT, place: at + 32 },
            _ => TierAt { id: at, drain: at + 16, extents: at + 24, place: at + 32 },
        }
    }
}

/// Of half an id nothing is bound: whoever bound the arena to it, or let it go, was killed on the way.
fn is_whole(id: &[u8; 16]) -> bool {
    id[..8] != [0; 8] && id[8..] != [0; 8]
}
