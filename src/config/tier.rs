//! A tier as the user gives it: `--tier KIND[:WHERE][,key=value…]`.

use super::below::parse_name;
use super::nbd::NbdPlace;
use super::s3::{S3Place, DEFAULT_BYTES};
use super::{parse_size, CodecChoice, Limit, MIN_LIMIT_BYTES};
use crate::page::PAGE_BYTES;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// One `--tier`.
#[derive(Clone, Debug, PartialEq)]
pub enum TierConfig {
    /// `ram[,limit=SIZE|PERCENT%][,codec=lz4|zstd[:LEVEL]][,group=SIZE][,dict=SIZE|on|off][,high=PERCENT%]
    /// [,low=PERCENT%][,idle=TIME][,cpu=PERCENT%]`
    Ram(RamTier),
    /// `file:PATH,size=SIZE[,encrypt=off][,prealloc=off][,name=NAME]` or `block:PATH[,size=SIZE][,encrypt=off][,name=NAME]` or
    /// `nbd:URI[,size=SIZE][,encrypt=off][,connections=N][,timeout=TIME][,ca=PATH][,cert=PATH,key=PATH]` or
    /// `s3:BUCKET[/PREFIX],endpoint=URL[,region=NAME][,size=SIZE][,encrypt=off][,connections=N][,timeout=TIME]
    /// [,ca=PATH][,credentials=PATH[,profile=NAME]]`
    Disk(DiskTier),
}

/// Memory.
#[derive(Clone, Debug, PartialEq)]
pub struct RamTier {
    /// Memory the tier may hold. Default: half of the machine's.
    pub limit: Limit,
    /// Compression. Default: lz4.
    pub codec: CodecChoice,
    /// Contiguous bytes compressed together, 4K to 64K. Default 4K: every page alone.
    pub group: u32,
    /// Bytes of the dictionaries that zstd compresses single pages with, trained from what is stored; 0: none.
    /// Default: 32K where every page is compressed alone by zstd, else none.
    pub dict: Option<u32>,
    /// Of a second tier: seconds after which what was written is compressed again. Default: 600.
    pub idle_s: Option<u32>,
    /// Of a second tier: percent of one processor that compressing again may take, unless memory is short. Default: 25.
    pub cpu_percent: Option<u8>,
    /// Of the first tier: when segments go down to a tier below memory.
    pub marks: Marks,
}

/// Percent of the memory that may be held: above `high` the coldest segments go to the tier below, until no more than
/// `low` is held. The reserve's needs come first, whatever they say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// 2 to 93. None: fifteen sixteenths.
    pub high: Option<u8>,
    /// 1 to 92, below `high`. None: when half as much again is free as `high` leaves.
    pub low: Option<u8>,
}

/// Of a dictionary that is trained, unless said.
const DICT_BYTES: u32 = 32 << 10;

/// Above it less would be free than what is swapped out in a burst is to find.
const MOST_HIGH: u8 = 93;

impl Marks {
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let (mark, least, most) =
            if key == "high" { (&mut self.high, 2, MOST_HIGH) } else { (&mut self.low, 1, MOST_HIGH - 1) };
        let percent = value.strip_suffix('%').and_then(|percent| percent.parse().ok());
        *mark = match percent {
            _ if value == "auto" => None,
            Some(percent) if (least..=most).contains(&percent) => Some(percent),
            _ => return Err(format!("{key}={value}: from {least}% to {most}% of what memory may hold, or auto")),
        };
        Ok(())
    }

    pub(crate) fn check(self) -> Result<(), String> {
        match (self.low, self.high) {
            (Some(low), Some(high)) if low >= high => Err(format!("low={low}% must be below high={high}%")),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |mark: Option<u8>| mark.map_or_else(|| "auto".into(), |percent| format!("{percent}%"));
        write!(f, "high={},low={}", text(self.high), text(self.low))
    }
}

/// A file, a block device, an NBD server's export or a bucket's objects, below memory.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskTier {
    /// Which of them.
    pub place: Place,
    /// Bytes of it to use. Default: all of a block device or an export, 1T of a bucket.
    pub size: Option<u64>,
    /// Whether what goes there is encrypted. Otherwise it is only checked. Default: it is.
    pub encrypt: bool,
    /// What `tier list` calls it, and whoever changes it. Default: by its kind, or `disk` where it is the only one.
    pub name: Option<String>,
    /// Whether the file's space is taken at once. Default: it is, so that the file system has nothing to
    /// look for, and so to wait for, when memory is short.
    pub prealloc: bool,
}

/// Where a disk tier is.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// A file of its own, made if it is not there.
    File(PathBuf),
    /// A block device, all of it.
    Block(PathBuf),
    /// An export of an NBD server, all of it.
    Nbd(Box<NbdPlace>),
    /// A bucket of an S3 server, or what lies under a prefix of one.
    S3(Box<S3Place>),
}

impl Default for RamTier {
    fn default() -> Self {
        RamTier {
            limit: Limit::Default,
            codec: CodecChoice::Lz4,
            group: PAGE_BYTES as u32,
            dict: None,
            idle_s: None,
            cpu_percent: None,
            marks: Marks::default(),
        }
    }
}

impl RamTier {
    /// One more key.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "limit" => self.limit = value.parse()?,
            "codec" => self.codec = value.parse()?,
            "group" => self.group = parse_group(value)?,
            "dict" => self.dict = Some(parse_dict(value)?),
            "idle" => self.idle_s = Some(parse_time(value)?),
            "cpu" => self.cpu_percent = Some(parse_share(value)?),
            "high" | "low" => self.marks.set(key, value)?,
            _ => {
                let known = "limit, codec, group, dict, high, low, idle, cpu";
                return Err(format!("unknown option '{key}' of a ram tier: known are {known}"));
            }
        }
        Ok(())
    }

    /// What is wrong with all of it.
    pub(super) fn check(&self) -> Result<(), String> {
        match self.limit {
            Limit::Bytes(b) if b < MIN_LIMIT_BYTES => Err(format!("limit={b} is too small: at least 4M")),
            _ => self.marks.check(),
        }
    }

    /// Bytes of its dictionaries, 0: it has none.
    pub(crate) fn dict_bytes(&self) -> usize {
        let alone = self.group as usize == PAGE_BYTES;
        match self.codec {
            CodecChoice::Lz4 => 0,
            CodecChoice::Zstd(_) => self.dict.unwrap_or(if alone { DICT_BYTES } else { 0 }) as usize,
        }
    }
}

impl Place {
    /// Its path, or URI, or bucket and prefix.
    pub fn path(&self) -> &Path {
        match self {
            Place::File(path) | Place::Block(path) => path,
            Place::Nbd(nbd) => Path::new(&nbd.uri),
            Place::S3(s3) => Path::new(&s3.name),
        }
    }
}

impl FromStr for TierConfig {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let (head, options) = s.split_once(',').unwrap_or((s, ""));
        let options = options.split(',').filter(|part| !part.is_empty());
        if ["file", "file:", "block", "block:"].contains(&head) {
            return Err(format!("tier '{head}' wants a path, as in file:/var/lib/ghostswap/cold,size=64G"));
        }
        if ["nbd", "nbd:"].contains(&head) {
            return Err(format!("tier '{head}' wants a URI, as in nbd:nbd://pool.example/cold"));
        }
        if ["s3", "s3:"].contains(&head) {
            let example = "s3:pages/node1,endpoint=https://s3.example.net,size=1T";
            return Err(format!("tier '{head}' wants a bucket, as in {example}"));
        }
        match head.split_once(':') {
            // A daemon has no working directory of its user's.
            Some(("file" | "block", path)) if !path.starts_with('/') => {
                Err(format!("tier '{head}': give the whole path, from / on"))
            }
            None if head == "ram" => ram(options).map(TierConfig::Ram),
            Some(("file", path)) => disk(Place::File(path.into()), options).map(TierConfig::Disk),
            Some(("block", path)) => disk(Place::Block(path.into()), options).map(TierConfig::Disk),
            Some(("nbd", uri)) => disk(Place::Nbd(Box::new(NbdPlace::parse(uri)?)), options).map(TierConfig::Disk),
            Some(("s3", name)) => disk(Place::S3(Box::new(S3Place::parse(name)?)), options).map(TierConfig::Disk),
            _ => Err(format!("unknown tier '{head}': known kinds are: ram, file:PATH, block:PATH, nbd:URI, s3:BUCKET")),
        }
    }
}

pub(super) fn key_and_value(part: &str) -> Result<(&str, &str), String> {
    part.split_once('=').ok_or_else(|| format!("tier option '{part}' wants a value, as in limit=4G"))
}

fn ram<'a>(options: impl Iterator<Item = &'a str>) -> Result<RamTier, String> {
    let mut tier = RamTier::default();
    for part in options {
        let (key, value) = key_and_value(part)?;
        tier.set(key, value)?;
    }
    tier.check()?;
    Ok(tier)
}

/// Smallest disk tier: a few of the largest segments.
pub(crate) const MIN_DISK_BYTES: u64 = 16 << 20;

fn disk<'a>(place: Place, options: impl Iterator<Item = &'a str>) -> Result<DiskTier, String> {
    let mut tier = DiskTier { place, size: None, encrypt: true, name: None, prealloc: true };
    for part in options {
        let (key, value) = key_and_value(part)?;
        tier.set(key, value)?;
    }
    if matches!(tier.place, Place::S3(_)) {
        tier.size = tier.size.or(Some(DEFAULT_BYTES));
    }
    tier.check()?;
    Ok(tier)
}

impl DiskTier {
    /// One more key.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let own = match &mut self.place {
            Place::Nbd(nbd) => nbd.set(key, value),
            Place::S3(s3) => s3.set(key, value),
            Place::File(_) | Place::Block(_) => None,
        };
        if let Some(set) = own {
            return set;
        }
        let (kind, known) = match &self.place {
            Place::File(_) => ("a file", "size, encrypt, prealloc, name"),
            Place::Block(_) => ("a block", "size, encrypt, name"),
            Place::Nbd(_) => ("an nbd", "size, encrypt, name, connections, timeout, ca, cert, key"),
            Place::S3(_) => {
                ("an s3", "endpoint, region, size, encrypt, name, connections, timeout, ca, credentials, profile")
            }
        };
        match key {
            "size" => self.size = Some(parse_size(value)?),
            "encrypt" => self.encrypt = on_or_off(key, value)?,
            "name" => self.name = Some(parse_name(value)?),
            "prealloc" if matches!(self.place, Place::File(_)) => self.prealloc = on_or_off(key, value)?,
            _ => return Err(format!("unknown option '{key}' of {kind} tier: known are {known}")),
        }
        Ok(())
    }

    /// What is wrong with all of it.
    pub(super) fn check(&self) -> Result<(), String> {
        match &self.place {
            Place::Nbd(nbd) => nbd.check()?,
            Place::S3(s3) => s3.check()?,
            Place::File(_) | Place::Block(_) => {}
        }
        match self.size {
            None if matches!(self.place, Place::File(_)) => {
                Err("a file tier wants a size, as in file:/var/lib/ghostswap/cold,size=64G".into())
            }
            Some(b) if b < MIN_DISK_BYTES => Err(format!("size={b} is too small: at least 16M")),
            _ => Ok(()),
        }
    }
}

fn on_or_off(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={value}: on or off")),
    }
}

/// Seconds of a time such as `90`, `90s`, `10m`, `2h`.
pub fn parse_time(text: &str) -> Result<u32, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    let seconds = digits.parse::<u32>().ok().and_then(|n| n.checked_mul(unit));
    seconds.ok_or_else(|| format!("'{text}' is not a time: give a whole number with an optional s, m, h, as in 10m"))
}

/// Percent of one processor.
fn parse_share(value: &str) -> Result<u8, String> {
    match value.strip_suffix('%').and_then(|percent| percent.parse::<u8>().ok()) {
        Some(percent @ 1..=100) => Ok(percent),
        _ => Err(format!("cpu={value}: of one processor from 1% to 100%")),
    }
}

fn parse_group(value: &str) -> Result<u32, String> {
    match parse_size(value)? {
        b @ (0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000) => Ok(b as u32),
        _ => Err(format!("group={value}: one of 4K, 8K, 16K, 32K, 64K")),
    }
}

fn parse_dict(value: &str) -> Result<u32, String> {
    match value {
        "on" => return Ok(DICT_BYTES),
        "off" => return Ok(0),
        _ => {}
    }
    match parse_size(value) {
        Ok(b @ (0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000)) => Ok(b as u32),
        _ => Err(format!("dict={value}: on, off, or one of 4K, 8K, 16K, 32K, 64K")),
    }
}

impl fmt::Display for TierConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TierConfig::Ram(tier) => tier.fmt(f),
            TierConfig::Disk(tier) => tier.fmt(f),
        }
    }
}

impl fmt::Display for RamTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ram")?;
        match self.limit {
            Limit::Bytes(b) => write!(f, ",limit={b}")?,
            Limit::Percent(p) => write!(f, ",limit={p}%")?,
            Limit::Default => {}
        }
        write!(f, ",codec={},group={}", self.codec, self.group)?;
        match self.dict {
            None => {}
            Some(0) => write!(f, ",dict=off")?,
            Some(bytes) => write!(f, ",dict={}K", bytes / 1024)?,
        }
        self.idle_s.map_or(Ok(()), |s| write!(f, ",idle={s}s"))?;
        self.cpu_percent.map_or(Ok(()), |percent| write!(f, ",cpu={percent}%"))?;
        match self.marks == Marks::default() {
            true => Ok(()),
            false => write!(f, ",{}", self.marks),
        }
    }
}

impl fmt::Display for DiskTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::File(path) => write!(f, "file:{}", path.display())?,
            Place::Block(path) => write!(f, "block:{}", path.display())?,
            Place::Nbd(nbd) => write!(f, "nbd:{}", nbd.uri)?,
            Place::S3(s3) => write!(f, "{}", s3.name)?,
        }
        self.size.map_or(Ok(()), |b| write!(f, ",size={b}"))?;
        let off = |f: &mut fmt::Formatter<'_>, on: bool, key| if on { Ok(()) } else { write!(f, ",{key}=off") };
        off(f, self.encrypt, "encrypt")?;
        off(f, self.prealloc, "prealloc")?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, ",name={name}"))?;
        match &self.place {
            Place::Nbd(nbd) => nbd.fmt(f),
            Place::S3(s3) => s3.fmt(f),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood_and_said_again() {
        let parsed = |s: &str| s.parse::<TierConfig>().unwrap();
        let TierConfig::Ram(t) = parsed("ram,limit=25%,codec=zstd:3,group=64K") else { panic!("not ram") };
        assert_eq!((t.limit, t.codec, t.group), (Limit::Percent(25), CodecChoice::Zstd(3), 65536));
        let TierConfig::Ram(t) = parsed("ram,codec=zstd:3,idle=10m") else { panic!("not ram") };
        assert_eq!((t.limit, t.idle_s), (Limit::Default, Some(600)));
        let TierConfig::Disk(t) = parsed("file:/a/b,size=64G") else { panic!("not a disk") };
        assert_eq!((t.place, t.size, t.encrypt), (Place::File("/a/b".into()), Some(64 << 30), true));
        for s in [
            "ram,limit=25%,codec=zstd:3,group=64K",
            "ram,idle=10m,cpu=5%",
            "ram,codec=zstd:1,dict=64K",
            "ram,codec=zstd:1,group=64K,dict=off",
            "ram,high=90%,low=80%",
            "ram,high=auto,low=1%",
            "file:/a/b,size=1G,encrypt=off,prealloc=off",
            "block:/dev/x",
            "nbd:nbd://host/cold",
            "nbd:nbd+unix:///x?socket=/run/s,size=1T,encrypt=off,connections=4,timeout=5s",
            "nbd:nbds://host:1/x,ca=/a,cert=/b,key=/c",
            "s3:pages,region=eu-central-1",
            "s3:pages/a/b,endpoint=http://127.0.0.1:9000/base,region=x,size=10T,encrypt=off,connections=64,timeout=5s",
            "s3:my.pages/n-1/,endpoint=https://[::1]:1,ca=/a,credentials=/b,profile=c",
        ] {
            let t = parsed(s);
            assert_eq!(parsed(&t.to_string()), t);
        }
        for bad in [
            "",
            "disk",
            "ram,limit=0%",
            "ram,limit=1K",
            "ram,codec=gzip",
            "ram,codec=zstd:99",
            "ram,x=1",
            "ram,limit",
            "ram,idle=ever",
            "ram,cpu=5",
            "ram,cpu=0%",
            "ram,cpu=101%",
            "ram,high=90",
            "ram,high=94%",
            "ram,high=1%",
            "ram,low=0%",
            "ram,low=93%",
            "ram,high=80%,low=80%",
            "ram,low=81%,high=80%",
            "ram:/x",
            "file",
            "file:",
            "file:/x",
            "file:/x,size=1M",
            "block:,size=1G",
            "file:cold,size=1G",
            "block:/x,prealloc=on",
            "file:/x,size=1G,encrypt=maybe",
            "nbd",
            "nbd:",
            "nbd:host/x",
            "nbd:nbd://host/x,prealloc=off",
            "nbd:nbd://host/x,connections=0",
            "nbd:nbd://host/x,connections=9",
            "nbd:nbd://host/x,timeout=0s",
            "nbd:nbd://host/x,size=1M",
            "nbd:nbd://host/x,ca=/a",
            "nbd:nbds://host/x",
            "nbd:nbds://host/x,ca=a",
            "nbd:nbds://host/x,ca=/a,cert=/b",
            "nbd:nbds+unix:///x?socket=/s,ca=/a",
            "s3",
            "s3:",
            "s3:pages",
            "s3:/x,region=a",
            "s3:ab,region=a",
            "s3:pages//x,region=a",
            "s3:pages/../x,region=a",
            "s3:pages/ä,region=a",
            "s3:pages,endpoint=host:9000",
            "s3:pages,endpoint=http://",
            "s3:pages,endpoint=http://key:secret@host",
            "s3:pages,endpoint=http://host:x",
            "s3:pages,endpoint=http://host/?x",
            "s3:pages,endpoint=http://host,ca=/a",
            "s3:pages,endpoint=http://host,profile=a",
            "s3:pages,endpoint=http://host,credentials=a",
            "s3:pages,endpoint=http://host,connections=65",
            "s3:pages,endpoint=http://host,size=1M",
            "s3:pages,endpoint=http://host,prealloc=off",
            "s3:pages,endpoint=http://host,secret=x",
        ] {
            let e = bad.parse::<TierConfig>().unwrap_err();
            assert!(!e.contains('\n') && !e.contains("key:secret"), "{e}");
        }
    }
}
