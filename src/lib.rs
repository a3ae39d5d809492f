//! ghostswap: a log-structured, compressed store for swap, seen as huge sparse volumes.
//!
//! A page's way down: [`Lane::try_write`] takes a run of pages; a page that one pattern fills
//! becomes a slot word and nothing else; any other is compressed straight into the tail of the
//! lane's open segment (`store/append.rs`), and one atomic exchange of its slot word commits it
//! (`store/lane.rs`, `commit`). The old word tells what died. And back: the slot names segment and
//! offset, the segment table says where the segment is, the record is decompressed into the
//! caller's buffer. Neither takes a lock, allocates, or waits.
//!
//! A record that lies on a disk tier is fetched first (`store/fetch.rs`): a lane says what to read, and
//! whoever serves requests reads it as it likes best.
//!
//! Behind them the growth thread keeps memory ready (`store/grow.rs`) and the cleaner makes room
//! (`store/clean.rs`), on disk if need be (`store/demote.rs`). What a store wrote outlives it: [`Store::open_arena`] takes up the arena
//! that a killed process left (`store/recover.rs`). docs/ARCHITECTURE.md tells the rest.

#![cfg_attr(loom, allow(dead_code, reason = "models simulate the mapping and need no file"))]

#[macro_use]
mod crash;

mod arena;
mod codec;
pub mod config;
mod error;
mod io;
mod log;
mod map;
pub mod nbd;
mod page;
mod stats;
mod store;
mod sync;
mod tier;
mod volume;

pub use arena::{create_arena, Spare, ARENA_VERSION, OLDEST_ARENA_VERSION};
pub use config::{StoreConfig, TierConfig};
#[cfg(feature = "crash-points")]
#[doc(hidden)]
pub use crash::set_hook as set_crash_hook;
pub use error::{Error, Result};
pub use io::{At, Begun, Buffer, EndedRead, Reads, Source, Tls, S3};
pub use page::{Placement, MAX_TIERS_BELOW, MAX_VOLUMES, MAX_VOLUME_BYTES, PAGE_BYTES};
pub use stats::{DiskStats, Stats, TierStats};
#[cfg(feature = "crash-points")]
#[doc(hidden)]
pub use store::Steps;
pub use store::{Fetch, Held, Lane, PageKind, Standby, Store, Taken};
pub use volume::Volume;

/// Bytes of a record's header for a page stored alone.
pub const RECORD_HEADER_BYTES: usize = log::record::SINGLE_HEADER;
