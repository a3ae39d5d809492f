//! What a user can choose, and the checks that turn it into what the store accepts.
//! Flags, keys and fields have the same names.

mod below;
mod nbd;
mod s3;
mod settings;
mod tier;

pub(crate) use below::{which, OF_SERVER};
pub use below::{with_tier, without_tier};
pub use nbd::{NbdAddress, NbdPlace, NbdTls};
pub use s3::S3Place;
pub use settings::{TierName, TierSettings};
pub(crate) use tier::MIN_DISK_BYTES;
pub use tier::{parse_time, DiskTier, Marks, Place, RamTier, TierConfig};

use crate::error::{Error, Result};
use crate::io::{Callers, Tls, S3};
use crate::page::{MAX_TIERS_BELOW, PAGE_BYTES};
use std::fmt;
use std::str::FromStr;

/// Parses a size such as `512`, `64K`, `1.5G` or `16T` (powers of 1024; an `iB` or `B` may follow).
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let bad = || format!("'{text}' is not a size: give a number with an optional K, M, G, T, as in 16T");
    let t = text.trim();
    let t = t.strip_suffix("iB").or_else(|| t.strip_suffix('B')).unwrap_or(t);
    let (digits, shift) = match t.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&t[..t.len() - 1], 10),
        Some('M') => (&t[..t.len() - 1], 20),
        Some('G') => (&t[..t.len() - 1], 30),
        Some('T') => (&t[..t.len() - 1], 40),
        Some('P') => (&t[..t.len() - 1], 50),
        _ => (t, 0),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large a size"));
    }
    let number: f64 = digits.parse().map_err(|_| bad())?;
    if !number.is_finite() || number < 0.0 || digits.contains(['e', 'E']) {
        return Err(bad());
    }
    let bytes = number * (1u64 << shift) as f64;
    if bytes >= u64::MAX as f64 {
        return Err(format!("'{text}' is too large a size"));
    }
    Ok(bytes as u64)
}

/// Writes a size the way people read it: `16.0 TiB`, `12.5 MiB`, `512 B`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// How much memory a tier may hold, everything counted: segments, reserve, metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Bytes.
    Bytes(u64),
    /// Percent of the machine's memory, 1 to 95.
    Percent(u8),
    /// Not given: half of the machine's memory, or for a second tier what the first may hold.
    Default,
}

impl Limit {
    /// The limit in bytes on a machine with `ram_bytes` of memory.
    pub fn resolve(self, ram_bytes: u64) -> u64 {
        match self {
            Limit::Bytes(b) => b,
            Limit::Percent(p) => ram_bytes / 100 * u64::from(p),
            Limit::Default => ram_bytes / 2,
        }
    }
}

impl FromStr for Limit {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        if let Some(p) = s.strip_suffix('%') {
            return match p.parse::<u8>() {
                Ok(n) if (1..=95).contains(&n) => Ok(Limit::Percent(n)),
                _ => Err(format!("limit={s}: a percentage goes from 1% to 95%")),
            };
        }
        parse_size(s).map(Limit::Bytes)
    }
}

/// What compresses the pages of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecChoice {
    /// lz4: fast.
    Lz4,
    /// zstd at a level from -7 to 19: dense.
    Zstd(i32),
}

impl CodecChoice {
    /// Its bit among the codecs in use in an arena: the number that records give it.
    pub(crate) fn bit(self) -> u64 {
        match self {
            CodecChoice::Lz4 => 1 << crate::codec::LZ4,
            CodecChoice::Zstd(_) => 1 << crate::codec::ZSTD,
        }
    }
}

impl FromStr for CodecChoice {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s.split_once(':') {
            None if s == "lz4" => Ok(CodecChoice::Lz4),
            None if s == "zstd" => Ok(CodecChoice::Zstd(1)),
            Some(("zstd", level)) => match level.parse::<i32>() {
                Ok(n) if (-7..=19).contains(&n) && n != 0 => Ok(CodecChoice::Zstd(n)),
                _ => Err(format!("codec={s}: zstd levels go from -7 to 19, without 0")),
            },
            _ => Err(format!("codec={s}: known codecs are lz4 and zstd[:LEVEL]")),
        }
    }
}

impl fmt::Display for CodecChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CodecChoice::Lz4 => write!(f, "lz4"),
            CodecChoice::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// Most lanes of a store.
pub const MOST_LANES: usize = 1024;
/// Smallest memory limit: a few segments for writers, two for the cleaner, the map's nodes.
pub const MIN_LIMIT_BYTES: u64 = 4 << 20;

/// The tiers of a store that is not told of any.
pub fn default_tiers() -> Vec<TierConfig> {
    let second = RamTier { codec: CodecChoice::Zstd(3), group: 64 << 10, idle_s: Some(IDLE_S), ..RamTier::default() };
    vec![TierConfig::Ram(RamTier::default()), TierConfig::Ram(second)]
}

/// Everything a store is opened with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Tiers, hottest first. Empty: `ram,limit=50%,codec=lz4` and `ram,codec=zstd:3,group=64K,idle=10m`.
    pub tiers: Vec<TierConfig>,
    /// Most lanes open at once. Default 16.
    pub max_lanes: usize,
    /// So many of them are not for [`crate::Volume::lane`] but for [`crate::Volume::helper_lane`]. Default 0.
    pub helper_lanes: usize,
    /// Called with the thread's name at the start of each background thread, before it does
    /// anything: a front end makes it an IO_FLUSHER there.
    pub thread_start: Option<fn(&str)>,
    /// Given, a tier behind an NBD server may be reached by TLS.
    pub tls: Option<Tls>,
    /// Given, a tier may be a bucket of an S3 server.
    pub s3: Option<S3>,
    /// Takes the arena from hugetlbfs pages that the administrator has set aside; they are not
    /// given back while the store lives.
    pub hugetlb: bool,
    /// Bytes of a segment, a power of two from 64K to 1M. Default: by the limit.
    pub segment_bytes: Option<u32>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            tiers: Vec::new(),
            max_lanes: 16,
            helper_lanes: 0,
            thread_start: None,
            tls: None,
            s3: None,
            hugetlb: false,
            segment_bytes: None,
        }
    }
}

/// The checked form of [`StoreConfig`]: what the store is built from.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub limit_bytes: u64,
    pub codec: CodecChoice,
    pub group_pages: usize,
    /// Bytes of dictionaries for single pages, 0: none.
    pub dict_bytes: usize,
    pub max_lanes: usize,
    pub helper_lanes: usize,
    pub segment_bytes: u32,
    /// The user chose `segment_bytes`: an arena with another size is refused.
    pub segment_bytes_given: bool,
    pub hugetlb: bool,
    pub thread_start: Option<fn(&str)>,
    pub tls: Option<Tls>,
    pub s3: Option<S3>,
    /// Most pages that a record in the arena may hold when it is opened: `group_pages`, or more by an earlier store.
    pub group_pages_seen: usize,
    /// Codecs of which the arena may hold records when it is opened, a bit each.
    pub codecs_seen: u64,
    /// Memory that may be held before pages are compressed again whatever their age.
    pub hot_bytes: u64,
    pub cold: Option<Cold>,
    /// When segments go where memory has no room for them.
    pub marks: Marks,
    /// Where segments go that memory has no room for, and then from one to the next.
    pub below: Vec<DiskTier>,
    /// What these are called.
    pub names: Vec<String>,
    /// Bytes of each, once it is open.
    pub below_bytes: Vec<u64>,
}

/// How pages that have lain still are compressed again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cold {
    pub codec: CodecChoice,
    pub group_pages: usize,
    pub dict_bytes: usize,
    pub idle_s: u32,
    pub cpu_percent: u8,
}

/// Of one processor, for compressing again, and for training dictionaries.
pub(crate) const CPU_PERCENT: u8 = 25;

/// Seconds until a page is taken for cold.
const IDLE_S: u32 = 600;

impl Checked {
    /// What whoever opens the store lends to what lies below it.
    pub fn callers(&self) -> Callers {
        Callers { thread_start: self.thread_start, tls: self.tls, s3: self.s3 }
    }

    /// Most pages that a record will ever hold.
    pub fn most_group_pages(&self) -> usize {
        self.group_pages_seen.max(self.cold.map_or(0, |cold| cold.group_pages))
    }

    /// The levels at which dictionaries are used.
    pub fn dict_levels(&self) -> Vec<i32> {
        let hot = (self.dict_bytes > 0).then_some(self.codec);
        let cold = self.cold.filter(|cold| cold.dict_bytes > 0).map(|cold| cold.codec);
        let level = |codec| match codec {
            CodecChoice::Zstd(level) => Some(level),
            CodecChoice::Lz4 => None,
        };
        let mut levels: Vec<i32> = hot.into_iter().chain(cold).filter_map(level).collect();
        levels.dedup();
        levels
    }

    /// Bytes of dictionaries that are trained. 0: there are none.
    pub fn most_dict_bytes(&self) -> usize {
        self.dict_bytes.max(self.cold.map_or(0, |cold| cold.dict_bytes))
    }

    /// Fits the choices to an arena that is there already. Its segments keep their size; a limit
    /// may be lower than the one it was made for, a higher one ends where its frames do.
    pub fn fit(&mut self, segment_bytes: usize, capacity_bytes: u64) -> Result<()> {
        if self.segment_bytes_given && self.segment_bytes as usize != segment_bytes {
            return Err(Error::BadArena(format!(
                "its segments have {segment_bytes} bytes, not the {} asked for",
                self.segment_bytes
            )));
        }
        self.segment_bytes = segment_bytes as u32;
        if self.limit_bytes / segment_bytes as u64 > capacity_bytes / segment_bytes as u64 {
            tracing::warn!("the arena was made for a limit of {}: that holds", format_size(capacity_bytes));
            self.limit_bytes = capacity_bytes;
        }
        Ok(())
    }
}

impl StoreConfig {
    pub(crate) fn validate(&self, ram_bytes: u64) -> Result<Checked> {
        let bad = |why: String| Err(Error::InvalidConfig(why));
        let by_default = default_tiers();
        let (ram, disks) = below::in_order(if self.tiers.is_empty() { &by_default } else { &self.tiers })?;
        let (tier, second) = match ram.as_slice() {
            [] => (RamTier::default(), None),
            [one] => ((*one).clone(), None),
            [one, second] => ((*one).clone(), Some(*second)),
            _ => return bad("at most two ram tiers are supported: one to write to, one to compress again in".into()),
        };
        if tier.idle_s.is_some() || tier.cpu_percent.is_some() {
            return bad("idle= and cpu= belong to a second tier, below the one that is written to".into());
        }
        if second.is_some_and(|t| t.marks != Marks::default()) {
            return bad(
                "high= and low= belong to the first ram tier: they are of all the memory that may be held".into()
            );
        }
        let has_none = |t: &RamTier| t.codec == CodecChoice::Lz4 && t.dict.is_some_and(|bytes| bytes > 0);
        if has_none(&tier) || second.is_some_and(has_none) {
            return bad("dict= is for codec=zstd: lz4 takes no dictionary".into());
        }
        let hot_bytes = tier.limit.resolve(ram_bytes);
        let limit_bytes = match second.map(|t| t.limit) {
            None | Some(Limit::Default) => hot_bytes,
            Some(own) => hot_bytes.saturating_add(own.resolve(ram_bytes)),
        };
        if second.is_some_and(|t| (t.codec, t.group) == (tier.codec, tier.group)) {
            return bad("the second tier would compress as the first does: give it codec=zstd:3,group=64K".into());
        }
        let cold = second.map(|t| Cold {
            codec: t.codec,
            group_pages: t.group as usize / PAGE_BYTES,
            dict_bytes: t.dict_bytes(),
            idle_s: t.idle_s.unwrap_or(IDLE_S),
            cpu_percent: t.cpu_percent.unwrap_or(CPU_PERCENT),
        });
        if limit_bytes < MIN_LIMIT_BYTES {
            return bad(format!("the tier's limit of {limit_bytes} bytes is too small: at least 4M"));
        }
        if limit_bytes > ram_bytes {
            return bad(format!(
                "the tier's limit of {} is more than the machine's memory of {}",
                format_size(limit_bytes),
                format_size(ram_bytes)
            ));
        }
        if self.max_lanes == 0 || self.max_lanes > MOST_LANES {
            return bad(format!("max_lanes={}: from 1 to {MOST_LANES}", self.max_lanes));
        }
        if self.helper_lanes >= self.max_lanes {
            return bad(format!("helper_lanes={}: fewer than max_lanes={}", self.helper_lanes, self.max_lanes));
        }
        let by_limit = (limit_bytes / 256).next_power_of_two().clamp(64 << 10, 1 << 20) as u32;
        let segment_bytes = self.segment_bytes.unwrap_or(by_limit);
        if !segment_bytes.is_power_of_two() || !(64 << 10..=1 << 20).contains(&segment_bytes) {
            return bad(format!("segment_bytes={segment_bytes}: a power of two from 64K to 1M"));
        }
        Ok(Checked {
            limit_bytes,
            codec: tier.codec,
            group_pages: tier.group as usize / PAGE_BYTES,
            dict_bytes: tier.dict_bytes(),
            max_lanes: self.max_lanes,
            helper_lanes: self.helper_lanes,
            segment_bytes,
            segment_bytes_given: self.segment_bytes.is_some(),
            hugetlb: self.hugetlb,
            thread_start: self.thread_start,
            tls: self.tls,
            s3: self.s3,
            group_pages_seen: tier.group as usize / PAGE_BYTES,
            codecs_seen: tier.codec.bit(),
            hot_bytes,
            cold,
            marks: tier.marks,
            below_bytes: vec![0; disks.len()],
            names: below::names(&disks),
            below: disks.into_iter().cloned().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("16T"), Ok(1 << 44));
        assert_eq!(parse_size("64KiB"), Ok(65536));
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("0"), Ok(0));
        for bad in ["", "G", "x", "-1", "1e9", "99999999P", "nan"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(format_size(1 << 44), "16.0 TiB");
    }

    #[test]
    fn a_second_tier_adds_its_limit_or_shares_the_first_ones() {
        let check = |tiers: &[&str]| {
            let tiers = tiers.iter().map(|t| t.parse().unwrap()).collect();
            StoreConfig { tiers, ..StoreConfig::default() }.validate(1 << 30)
        };
        let shared = check(&["ram,limit=100M", "ram,codec=zstd:3,group=64K"]).unwrap();
        assert_eq!((shared.limit_bytes, shared.hot_bytes), (100 << 20, 100 << 20));
        let own = check(&["ram,limit=100M", "ram,limit=50M,codec=zstd:3,group=64K,idle=5"]).unwrap();
        assert_eq!((own.limit_bytes, own.hot_bytes, own.cold.unwrap().idle_s), (150 << 20, 100 << 20, 5));
        assert_eq!((own.group_pages, own.group_pages_seen, own.most_group_pages()), (1, 1, 16));
        let none = check(&[]).unwrap();
        assert_eq!(
            (none.limit_bytes, none.cold.map(|cold| (cold.group_pages, cold.idle_s))),
            (512 << 20, Some((16, 600)))
        );
        assert!(check(&["ram"]).unwrap().cold.is_none() && check(&["file:/x,size=1G"]).unwrap().cold.is_none());
        assert!(check(&["ram", "ram"]).is_err(), "it would compress no better");
        assert!(check(&["ram,dict=on"]).is_err() && check(&["ram", "ram,group=8K,dict=4K"]).is_err());
        assert!(check(&["ram,idle=5"]).is_err() && check(&["ram,cpu=5%"]).is_err());
        assert!(check(&["ram", "ram,codec=zstd,high=80%"]).is_err());
        assert!(check(&["ram", "ram,limit=60%,codec=zstd"]).is_err(), "more than there is");
        let dictionaries = |tiers: &[&str]| {
            let checked = check(tiers).unwrap();
            (checked.most_dict_bytes(), checked.dict_levels())
        };
        assert_eq!(dictionaries(&["ram", "ram,codec=zstd:3,group=64K"]), (0, vec![]));
        assert_eq!(dictionaries(&["ram,codec=zstd:1,dict=off"]), (0, vec![]));
        assert_eq!(dictionaries(&["ram,codec=zstd:1"]), (32 << 10, vec![1]));
        assert_eq!(dictionaries(&["ram,codec=zstd:1", "ram,codec=zstd:9,group=64K,dict=64K"]), (64 << 10, vec![1, 9]));
        let below = check(&["ram,limit=100M", "ram,codec=zstd:3,group=64K", "file:/x,size=1G"]).unwrap();
        assert_eq!((below.limit_bytes, below.below[0].size), (100 << 20, Some(1 << 30)));
        assert!(check(&["file:/x,size=1G", "ram"]).is_err(), "the wrong way round");
    }
}
