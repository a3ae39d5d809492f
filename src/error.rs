//! The library's one error type. Only a front end maps it to an errno or a protocol code.

use crate::config::format_size;
use std::fmt;

/// Result of the library's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The limits of all tiers are reached and cleaning gave no room within the time allowed.
    NoSpace,
    /// The range does not lie within the volume, in bytes.
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the volume.
        volume_bytes: u64,
    },
    /// Offset or length is not a multiple of 512.
    Unaligned {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The page was acknowledged but its content can no longer be had.
    Lost {
        /// Number of the page within its volume.
        page: u32,
    },
    /// A record does not decode: the arena's content is damaged.
    Corrupt {
        /// Number of the page within its volume.
        page: u32,
        /// Logical segment of the record.
        segment: u32,
        /// Byte offset of the record in its segment.
        offset: u32,
    },
    /// A configuration that cannot be served; says what and why.
    InvalidConfig(String),
    /// What was handed over as an arena cannot be opened as one; says why. Nothing in it was lost.
    BadArena(String),
    /// A disk tier that cannot be used; says which and why. Nothing in it was changed.
    BadTier {
        /// Its path.
        tier: String,
        /// What is wrong.
        why: String,
    },
    /// A page that lies on a disk tier could not be read.
    Unreadable {
        /// Number of the page within its volume.
        page: u32,
        /// Logical segment of its record.
        segment: u32,
        /// What the disk answered.
        source: std::io::Error,
    },
    /// The volume holds as much as it may: what it writes is refused, an overwrite included, until it discards.
    OverQuota {
        /// What it may hold.
        quota_bytes: u64,
    },
    /// No volume has this number.
    NoVolume {
        /// The number asked for.
        volume: u16,
    },
    /// All lanes or volumes that the store was opened for are taken.
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many the store was opened for.
        max: usize,
    },
    /// The operating system refused.
    System {
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoSpace => write!(f, "no space: the limits of all tiers are reached; raise limit= or add a tier"),
            Error::OutOfRange { offset, len, volume_bytes } => {
                write!(f, "range {offset}+{len} is outside the volume of {volume_bytes} bytes")
            }
            Error::Unaligned { offset, len } => write!(f, "range {offset}+{len} is not a multiple of 512 bytes"),
            Error::Lost { page } => write!(f, "page {page} is lost"),
            Error::Corrupt { page, segment, offset } => {
                write!(f, "page {page}: its record at segment {segment} offset {offset} does not decode")
            }
            Error::InvalidConfig(why) => write!(f, "{why}"),
            Error::BadArena(why) => write!(f, "the arena cannot be opened: {why}"),
            Error::BadTier { tier, why } => write!(f, "tier {tier} cannot be used: {why}"),
            Error::Unreadable { page, segment, source } => {
                write!(f, "page {page}: its record in segment {segment} cannot be read from its tier: {source}")
            }
            Error::OverQuota { quota_bytes } => {
                write!(
                    f,
                    "the volume holds its quota of {}: discard some of it, or raise quota=",
                    format_size(*quota_bytes)
                )
            }
            Error::NoVolume { volume } => write!(f, "there is no volume {volume}"),
            Error::TooMany { what, max } => write!(f, "all {max} {what} are in use"),
            Error::System { what, source } => write!(f, "{what}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::System { source, .. } | Error::Unreadable { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// The last error of the operating system, with what was tried.
pub(crate) fn system(what: &'static str) -> Error {
    Error::System { what, source: std::io::Error::last_os_error() }
}
