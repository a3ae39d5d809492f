//! The record: 1 to 16 pages compressed together, with the reverse map (which pages these are) in
//! its header. Records follow each other without padding.
//!
//! ```text
//! bytes 0..4  page number of the first page, little endian
//! byte  4     volume
//! bytes 5..7  single: 11..0 payload length - 1 · 14..12 codec · 15 zero
//!             group:  3..0 pages - 1 · 11..4 zero · 14..12 codec · 15 one
//! bytes 7..9  group only: payload length
//! payload
//! ```

use crate::page::{PageNo, VolumeId, PAGE_BYTES};

/// Header bytes of a record of one page.
pub(crate) const SINGLE_HEADER: usize = 7;
/// Header bytes of a record of several pages.
pub(crate) const GROUP_HEADER: usize = 9;
/// Most pages in a record.
pub(crate) const MAX_GROUP: usize = 16;

/// No record of so many pages has more bytes.
pub(crate) const fn most_total(pages: usize) -> usize {
    GROUP_HEADER + pages * PAGE_BYTES
}

/// A record's header, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub page: PageNo,
    pub volume: VolumeId,
    pub pages: usize,
    pub codec: u8,
    pub payload: usize,
}

impl Header {
    pub fn bytes(&self) -> usize {
        if self.pages == 1 {
            SINGLE_HEADER
        } else {
            GROUP_HEADER
        }
    }

    /// Header and payload.
    pub fn total(&self) -> usize {
        self.bytes() + self.payload
    }

    /// What page `index` of the record costs its segment; the shares add up to `total`.
    pub fn share(&self, index: usize) -> u32 {
        (self.total() * (index + 1) / self.pages - self.total() * index / self.pages) as u32
    }

    pub fn write(&self, out: &mut [u8]) {
        debug_assert!(self.payload >= 1 && self.codec < 8);
        out[..4].copy_from_slice(&self.page.0.to_le_bytes());
        out[4] = self.volume.0;
        let tail = u16::from(self.codec) << 12
            | if self.pages == 1 { (self.payload - 1) as u16 } else { (self.pages - 1) as u16 | 1 << 15 };
        out[5..7].copy_from_slice(&tail.to_le_bytes());
        if self.pages > 1 {
            out[7..9].copy_from_slice(&(self.payload as u16).to_le_bytes());
        }
    }

    /// True if a header that begins with these bytes is that of a group.
    pub fn is_group(head: &[u8]) -> bool {
        head.get(6).is_some_and(|b| b >> 7 == 1)
    }

    /// None: too short for a header.
    pub fn read(bytes: &[u8]) -> Option<Header> {
        let head: [u8; SINGLE_HEADER] = bytes.get(..SINGLE_HEADER)?.try_into().ok()?;
        let tail = u16::from_le_bytes([head[5], head[6]]);
        let codec = (tail >> 12 & 7) as u8;
        let (pages, payload) = if tail >> 15 == 0 {
            (1, usize::from(tail & 0xfff) + 1)
        } else {
            let len: [u8; 2] = bytes.get(7..9)?.try_into().ok()?;
            (usize::from(tail & 0xf) + 1, usize::from(u16::from_le_bytes(len)))
        };
        let page = PageNo(u32::from_le_bytes([head[0], head[1], head[2], head[3]]));
        Some(Header { page, volume: VolumeId(head[4]), pages, codec, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_shares_add_up() {
        for (pages, payload) in [(1, 1), (1, 4096), (2, 700), (3, 10_001), (16, 65_280)] {
            let h = Header { page: PageNo(u32::MAX), volume: VolumeId(63), pages, codec: 2, payload };
            let mut bytes = vec![0; h.total()];
            h.write(&mut bytes);
            assert_eq!(Header::read(&bytes), Some(h));
            assert_eq!(Header::is_group(&bytes), pages > 1);
            assert_eq!(Header::read(&bytes[..h.bytes() - 1]), None);
            assert_eq!((0..pages).map(|i| h.share(i) as usize).sum::<usize>(), h.total());
        }
    }

    #[test]
    fn bytes_are_as_docs_format_says() {
        let h = Header { page: PageNo(0x0403_0201), volume: VolumeId(5), pages: 1, codec: 1, payload: 0x235 };
        let mut b = vec![0; h.total()];
        h.write(&mut b);
        assert_eq!(&b[..7], &[1, 2, 3, 4, 5, 0x34, 0x12]);
    }
}
