//! What a disk tier asks of the operating system: files and block devices read and written past the page
//! cache, in whole blocks, and servers, of NBD and S3, over sockets. Knows nothing of segments.

mod backing;
mod buffer;
mod medium;
mod pull;
mod reads;
mod remote;
mod writes;

pub(crate) use backing::{Backing, TierKey};
pub use buffer::Buffer;
pub(crate) use medium::Callers;
pub use medium::{At, Begun, Source};
pub(crate) use medium::{Medium, MOST_DISCARDS};
pub(crate) use pull::Pull;
pub use reads::{EndedRead, Reads};
pub use remote::{Tls, S3};
pub(crate) use writes::{EndedWrite, Writes};

/// Unit of reading and writing, and its alignment on disk and in memory.
pub const BLOCK_BYTES: usize = 4096;
