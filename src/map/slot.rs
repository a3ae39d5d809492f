//! The slot word: 8 bytes that say what a page is. Exchanged with one atomic operation, which is
//! the commit point of every write.
//!
//! ```text
//! bits 1..0   kind
//! 00 special  bits 5..2: 0 empty · 1 frozen (63..32: next retired node) · 2 lost ·
//!                        3 fill32 (63..32: a 4-byte pattern, repeated)
//! 01 fill     bits 63..2: the low 62 bits of an 8-byte pattern whose top two bits are 00
//! 11 fill     the same, top two bits are 11
//! 10 stored   14..2 share (13) · 18..15 index in record (4) · 38..19 offset (20) ·
//!             62..39 segment (24) · 63 zero
//! ```
//! `share` is what the page costs its segment in bytes, header included, so that its death can be
//! accounted without touching the record. Of a group of n pages and T bytes, page i has
//! `T(i+1)/n - Ti/n` (integer division).
//!
//! A frozen slot belongs to a leaf that is being taken out of the map: readers see an empty page,
//! writers look the leaf up anew.

use crate::page::SegmentId;

/// A slot word, as loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot(pub u64);

/// Where a stored page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stored {
    pub segment: SegmentId,
    pub offset: u32,
    pub index: u32,
    pub share: u32,
}

/// A slot word, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Empty,
    Frozen,
    Lost,
    Fill(u64),
    Stored(Stored),
}

const SPECIAL_FROZEN: u64 = 1 << 2;
const SPECIAL_LOST: u64 = 2 << 2;
const SPECIAL_FILL32: u64 = 3 << 2;
const SPECIAL_MASK: u64 = 0b11_1100;

impl Slot {
    pub const EMPTY: Slot = Slot(0);

    /// A frozen slot; `next` links retired nodes.
    pub fn frozen(next: u32) -> Slot {
        Slot(SPECIAL_FROZEN | u64::from(next) << 32)
    }

    pub fn is_frozen(self) -> bool {
        self.0 & (SPECIAL_MASK | 3) == SPECIAL_FROZEN
    }

    /// The link kept in a frozen slot.
    pub fn frozen_next(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The word for a page filled with `pattern`, or None if the pattern needs a record.
    pub fn fill(pattern: u64) -> Option<Slot> {
        match pattern >> 62 {
            0 => Some(Slot(pattern << 2 | 1)),
            3 => Some(Slot(pattern << 2 | 3)),
            _ if pattern as u32 == (pattern >> 32) as u32 => Some(Slot(SPECIAL_FILL32 | pattern << 32)),
            _ => None,
        }
    }

    pub fn stored(at: Stored) -> Slot {
        debug_assert!(at.share < 1 << 13 && at.index < 16 && at.offset < 1 << 20 && at.segment.0 < 1 << 24);
        Slot(
            2 | u64::from(at.share) << 2
                | u64::from(at.index) << 15
                | u64::from(at.offset) << 19
                | u64::from(at.segment.0) << 39,
        )
    }

    pub fn kind(self) -> Kind {
        match self.0 & 3 {
            1 => Kind::Fill(self.0 >> 2),
            3 => Kind::Fill(self.0 >> 2 | 3 << 62),
            2 => Kind::Stored(Stored {
                share: (self.0 >> 2 & 0x1fff) as u32,
                index: (self.0 >> 15 & 0xf) as u32,
                offset: (self.0 >> 19 & 0xf_ffff) as u32,
                segment: SegmentId((self.0 >> 39 & 0xff_ffff) as u32),
            }),
            _ => match self.0 & SPECIAL_MASK {
                0 => Kind::Empty,
                SPECIAL_FROZEN => Kind::Frozen,
                SPECIAL_FILL32 => Kind::Fill(self.0 >> 32 | self.0 & 0xffff_ffff_0000_0000),
                _ => Kind::Lost,
            },
        }
    }
}

/// The word of a page that was acknowledged and cannot be had any more.
pub(crate) const LOST: Slot = Slot(SPECIAL_LOST);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        for p in [0, 1, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 0x4142_4344_4142_4344, 3 << 62] {
            assert_eq!(Slot::fill(p).map(Slot::kind), Some(Kind::Fill(p)), "{p:x}");
        }
        assert_eq!(Slot::fill(0x4142_4344_4546_4748), None);
        let at = Stored { segment: SegmentId(0xff_ffff), offset: 0xf_ffff, index: 15, share: 0x1fff };
        assert_eq!(Slot::stored(at).kind(), Kind::Stored(at));
        assert_eq!(Slot::EMPTY.kind(), Kind::Empty);
        assert_eq!(Slot::frozen(77).kind(), Kind::Frozen);
        assert_eq!(Slot::frozen(77).frozen_next(), 77);
        assert_eq!(LOST.kind(), Kind::Lost);
    }

    #[test]
    fn words_are_as_docs_format_says() {
        let at = Stored { segment: SegmentId(1), offset: 1, index: 1, share: 1 };
        assert_eq!(Slot::stored(at).0, 1 << 39 | 1 << 19 | 1 << 15 | 1 << 2 | 2);
        assert_eq!(Slot::fill(0).unwrap().0, 1);
    }
}
