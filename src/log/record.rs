//! The record: 1 to 16 pages compressed together, with the reverse map (which pages these are) in
//! its header. Records follow each other without padding.
//!
//! ```text
//! bytes 0..4  page number of the first page, little endian
//! bytes 4..7  9..0 volume · 10 several pages · 11 codec: 0 lz4, 1 zstd
//!             single: 23..12 payload length - 1; length 4096 stands for codec 0 raw, 1 an 8-byte pattern
//!             group:  15..12 pages - 1 · 23..16 zero
//! bytes 7..9  group only: payload length
//! payload
//! ```

use crate::codec::{FILL, LZ4, RAW, ZSTD};
use crate::page::{PageNo, VolumeId, PAGE_BYTES};

/// Header bytes of a record of one page.
pub(crate) const SINGLE_HEADER: usize = 7;
/// Header bytes of a record of several pages.
pub(crate) const GROUP_HEADER: usize = 9;
/// Payload of a page that one pattern fills.
pub(crate) const FILL_BYTES: usize = 8;
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
        out[..4].copy_from_slice(&self.page.0.to_le_bytes());
        let (codec, less_one) = match self.codec {
            RAW => (0, PAGE_BYTES - 1),
            FILL => (1, PAGE_BYTES - 1),
            codec => (u32::from(codec == ZSTD), self.payload - 1),
        };
        debug_assert!(self.volume.0 < 1 << 10 && (self.pages == 1 || matches!(self.codec, LZ4 | ZSTD)));
        let of_pages = if self.pages == 1 { less_one } else { self.pages - 1 };
        let tail = u32::from(self.volume.0) | u32::from(self.pages > 1) << 10 | codec << 11 | (of_pages as u32) << 12;
        out[4..7].copy_from_slice(&tail.to_le_bytes()[..3]);
        if self.pages > 1 {
            out[7..9].copy_from_slice(&(self.payload as u16).to_le_bytes());
        }
    }

    /// True if a header that begins with these bytes is that of a group.
    pub fn is_group(head: &[u8]) -> bool {
        head.get(5).is_some_and(|b| b >> 2 & 1 == 1)
    }

    /// None: too short for a header.
    pub fn read(bytes: &[u8]) -> Option<Header> {
        let head: [u8; SINGLE_HEADER] = bytes.get(..SINGLE_HEADER)?.try_into().ok()?;
        let page = PageNo(u32::from_le_bytes([head[0], head[1], head[2], head[3]]));
        let tail = u32::from_le_bytes([head[4], head[5], head[6], 0]);
        let compressed = if tail >> 11 & 1 == 0 { LZ4 } else { ZSTD };
        let (pages, codec, payload) = if tail >> 10 & 1 == 0 {
            match ((tail >> 12) as usize + 1, compressed) {
                (PAGE_BYTES, LZ4) => (1, RAW, PAGE_BYTES),
                (PAGE_BYTES, _) => (1, FILL, FILL_BYTES),
                (payload, codec) => (1, codec, payload),
            }
        } else {
            let len: [u8; 2] = bytes.get(7..9)?.try_into().ok()?;
            ((tail >> 12 & 0xf) as usize + 1, compressed, usize::from(u16::from_le_bytes(len)))
        };
        Some(Header { page, volume: VolumeId(tail as u16 & 0x3ff), pages, codec, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_shares_add_up() {
        let single = [(1, RAW, 4096), (1, FILL, 8), (1, LZ4, 1), (1, ZSTD, 1), (1, LZ4, 4095), (1, ZSTD, 4095)];
        let groups = [(2, LZ4, 700), (3, ZSTD, 10_001), (16, ZSTD, 65_280)];
        for (pages, codec, payload) in single.into_iter().chain(groups) {
            let h = Header { page: PageNo(u32::MAX), volume: VolumeId(1023), pages, codec, payload };
            let mut bytes = vec![0; h.total()];
            h.write(&mut bytes);
            assert_eq!(Header::read(&bytes), Some(h));
            assert_eq!(Header::is_group(&bytes), pages > 1);
            assert_eq!(Header::read(&bytes[..h.bytes() - 1]), None);
            assert_eq!((0..pages).map(|i| h.share(i) as usize).sum::<usize>(), h.total());
        }
    }

    /// What counts as compressed leaves the length that stands for raw and pattern free.
    #[test]
    fn no_compressed_page_is_as_long_as_a_raw_one() {
        assert!(crate::codec::most_payload(PAGE_BYTES) < PAGE_BYTES);
    }

    #[test]
    fn bytes_are_as_docs_format_says() {
        let bytes = |volume, pages, codec, payload| {
            let h = Header { page: PageNo(0x0403_0201), volume: VolumeId(volume), pages, codec, payload };
            let mut b = vec![0; h.total()];
            h.write(&mut b);
            b[..h.bytes()].to_vec()
        };
        assert_eq!(bytes(5, 1, LZ4, 0x235), [1, 2, 3, 4, 0x05, 0x40, 0x23]);
        assert_eq!(bytes(0x305, 1, ZSTD, 0x235), [1, 2, 3, 4, 0x05, 0x4b, 0x23]);
        assert_eq!(bytes(5, 1, RAW, 4096), [1, 2, 3, 4, 0x05, 0xf0, 0xff]);
        assert_eq!(bytes(5, 1, FILL, 8), [1, 2, 3, 4, 0x05, 0xf8, 0xff]);
        assert_eq!(bytes(5, 16, ZSTD, 0x1234), [1, 2, 3, 4, 0x05, 0xfc, 0x00, 0x34, 0x12]);
    }
}
