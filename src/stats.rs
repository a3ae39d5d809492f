//! What is stored and what it costs: the physical truth.

use crate::config::format_size;
use serde::Serialize;
use std::fmt;

/// A snapshot of a store. Sizes are bytes.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "each field is explained where it is not plain")]
pub struct Stats {
    pub volumes: u64,
    /// Sum of the volumes' sizes: a label.
    pub virtual_bytes: u64,
    /// Pages whose content is in records.
    pub stored_pages: u64,
    /// Pages filled with a pattern other than zero, kept in the slot.
    pub filled_pages: u64,
    pub zero_pages: u64,
    /// Pages that were acknowledged and cannot be had any more.
    pub lost_pages: u64,
    /// Bytes of records that are live, headers included.
    pub live_bytes: u64,
    pub segments_used: u64,
    pub segment_bytes: u64,
    /// Free frames held ready.
    pub reserve_bytes: u64,
    /// Memory held: segments, reserve, metadata pages.
    pub held_bytes: u64,
    pub limit_bytes: u64,
    /// Nodes and leaves of the maps.
    pub map_bytes: u64,
    pub table_bytes: u64,
    pub read_pages: u64,
    pub written_pages: u64,
    /// Writes refused for want of room.
    pub refused_writes: u64,
    pub cleaned_segments: u64,
    /// Live bytes of records that were compressed again.
    pub cold_bytes: u64,
    pub recompressed_segments: u64,
    /// What zstd compresses single pages with.
    pub dictionaries: DictionaryStats,
    /// The disk tiers, if there are any, taken together.
    pub disk: Option<DiskStats>,
    /// Each of them, in the order in which pages go down.
    pub disks: Vec<DiskStats>,
}

/// Dictionaries, trained from what is stored.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DictionaryStats {
    /// In use now.
    pub count: u64,
    /// Their bytes, which the memory held has too.
    pub bytes: u64,
    /// What the store has made ready of them, beside the memory held.
    pub held_bytes: u64,
    /// Taken into use by this store.
    pub trained: u64,
    /// Trained, and no better than what there was.
    pub refused: u64,
    /// Out of use since no page was compressed with them any more.
    pub dropped: u64,
    /// Pages compressed with one by this store.
    pub pages: u64,
}

/// A tier and what it holds. Sizes are bytes.
#[derive(Clone, Debug, Serialize)]
pub struct TierStats {
    /// `ram`, `cold` (memory compressed again), `disk` or, of several below memory, what each is called.
    pub name: String,
    /// How it compresses, or where it is.
    pub what: String,
    /// What it may hold.
    pub limit_bytes: u64,
    /// What it does hold: segments, live or dead, and of the first the reserve and the map too.
    pub held_bytes: u64,
    /// Bytes of records there that are live.
    pub live_bytes: u64,
    /// `used`, `being drained`, `drained` or `failing`.
    pub state: &'static str,
}

/// What lies on a disk tier.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "each field is explained where it is not plain")]
pub struct DiskStats {
    /// What it is called.
    pub name: String,
    pub path: String,
    pub capacity_bytes: u64,
    /// In extents that hold a segment, live or dead.
    pub used_bytes: u64,
    /// Bytes of records there that are live.
    pub live_bytes: u64,
    pub written_bytes: u64,
    pub written_segments: u64,
    /// Reads for pages, of one block or a few.
    pub fetches: u64,
    pub fetched_bytes: u64,
    /// Pages that were in what had been fetched for others.
    pub beside_pages: u64,
    pub compacted_segments: u64,
    /// Segments brought up because they were asked for again and again.
    pub promoted_segments: u64,
    /// Segments that went on to another tier.
    pub passed_on_segments: u64,
    pub write_errors: u64,
    pub read_errors: u64,
    /// In extents that were to be compacted or drained and could not be read.
    pub unreadable_bytes: u64,
    /// In extents of a server's that are kept free for some minutes: a write that broke off may yet come there.
    pub late_bytes: u64,
    /// Fetches whose blocks were not what was written there.
    pub corrupt: u64,
    /// The last page found so: volume and number.
    pub last_corrupt: Option<(u64, u64)>,
    /// The last write failed: it rests and is tried again.
    pub failing: bool,
    /// It is to be empty, and used no more.
    pub draining: bool,
    /// What is old enough is on its way there, by hand.
    pub writing_back: bool,
}

impl DiskStats {
    /// All of them taken together, as if they were one: what is true of one of them is true of it.
    pub(crate) fn of_all(disks: &[DiskStats]) -> Option<DiskStats> {
        let (first, rest) = disks.split_first()?;
        let add = |mut all: DiskStats, one: &DiskStats| {
            all.name = "disk".into();
            all.path = format!("{}, {}", all.path, one.path);
            for (sum, n) in [
                (&mut all.capacity_bytes, one.capacity_bytes),
                (&mut all.used_bytes, one.used_bytes),
                (&mut all.live_bytes, one.live_bytes),
                (&mut all.written_bytes, one.written_bytes),
                (&mut all.written_segments, one.written_segments),
                (&mut all.fetches, one.fetches),
                (&mut all.fetched_bytes, one.fetched_bytes),
                (&mut all.beside_pages, one.beside_pages),
                (&mut all.compacted_segments, one.compacted_segments),
                (&mut all.promoted_segments, one.promoted_segments),
                (&mut all.passed_on_segments, one.passed_on_segments),
                (&mut all.write_errors, one.write_errors),
                (&mut all.read_errors, one.read_errors),
                (&mut all.unreadable_bytes, one.unreadable_bytes),
                (&mut all.late_bytes, one.late_bytes),
                (&mut all.corrupt, one.corrupt),
            ] {
                *sum += n;
            }
            all.last_corrupt = one.last_corrupt.or(all.last_corrupt);
            all.failing |= one.failing;
            all.draining |= one.draining;
            all
        };
        Some(rest.iter().fold(first.clone(), add))
    }
}

impl Stats {
    /// Bytes of the disk tiers that can be written to.
    pub fn usable_disk_bytes(&self) -> u64 {
        let usable = self.disks.iter().filter(|disk| !disk.failing && !disk.draining);
        usable.map(|disk| disk.capacity_bytes).sum()
    }

    /// Metadata bytes for each stored page: slots and inner nodes, record headers, segment table.
    pub fn metadata_per_page(&self) -> f64 {
        if self.stored_pages == 0 {
            return 0.0;
        }
        let headers = self.stored_pages as f64 * crate::RECORD_HEADER_BYTES as f64;
        (self.map_bytes as f64 + self.table_bytes as f64 + headers) / self.stored_pages as f64
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = self.stored_pages * 4096;
        let ratio = if self.live_bytes == 0 { 0.0 } else { plain as f64 / self.live_bytes as f64 };
        writeln!(
            f,
            "pages     {} compressed or raw, {} same-filled, {} zero",
            self.stored_pages, self.filled_pages, self.zero_pages
        )?;
        if self.lost_pages > 0 {
            writeln!(f, "LOST      {} pages", self.lost_pages)?;
        }
        writeln!(f, "stored    {} of data in {} ({ratio:.2} to 1)", format_size(plain), format_size(self.live_bytes))?;
        writeln!(
            f,
            "memory    {} held of {} allowed: {} segments of {}, reserve {}, map {}",
            format_size(self.held_bytes),
            format_size(self.limit_bytes),
            self.segments_used,
            format_size(self.segment_bytes),
            format_size(self.reserve_bytes),
            format_size(self.map_bytes)
        )?;
        if self.recompressed_segments > 0 || self.cold_bytes > 0 {
            writeln!(
                f,
                "cold      {} of what is stored; {} segments compressed again",
                format_size(self.cold_bytes),
                self.recompressed_segments
            )?;
        }
        let d = &self.dictionaries;
        if d.count + d.trained + d.refused > 0 {
            writeln!(
                f,
                "dicts     {} of {}; {} trained, {} no better, {} dropped; {} pages compressed with one",
                d.count,
                format_size(d.bytes),
                d.trained,
                d.refused,
                d.dropped,
                d.pages
            )?;
        }
        for d in &self.disks {
            writeln!(
                f,
                "{:<9} {} of {} at {}: {} live; {} written, {} fetched in {} reads, {} pages with others'{}",
                d.name,
                format_size(d.used_bytes),
                format_size(d.capacity_bytes),
                d.path,
                format_size(d.live_bytes),
                format_size(d.written_bytes),
                format_size(d.fetched_bytes),
                d.fetches,
                d.beside_pages,
                match (d.failing, d.draining) {
                    (true, _) => "; WRITES FAIL",
                    (_, true) => "; being drained",
                    _ => "",
                }
            )?;
            if d.write_errors + d.read_errors > 0 {
                writeln!(f, "          {} writes failed, {} reads failed", d.write_errors, d.read_errors)?;
            }
            if let Some((volume, page)) = d.last_corrupt {
                writeln!(f, "DAMAGED   {} reads, the last of page {page} of volume {volume}", d.corrupt)?;
            }
        }
        writeln!(f, "metadata  {:.1} bytes per stored page", self.metadata_per_page())?;
        writeln!(
            f,
            "traffic   {} pages read, {} written, {} writes refused, {} segments cleaned",
            self.read_pages, self.written_pages, self.refused_writes, self.cleaned_segments
        )?;
        write!(f, "virtual   {} in {} volume(s)", format_size(self.virtual_bytes), self.volumes)
    }
}
