//! The command line: raw arguments become checked values here and nowhere else.

use crate::slotfree::Wish;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use ghostswap::config::{parse_size, parse_time, TierConfig, TierSettings};
use ghostswap::MAX_VOLUME_BYTES;
use std::path::PathBuf;

/// The version; whoever builds a variant names it by `GHOSTSWAP_VERSION`.
pub const VERSION: &str = match option_env!("GHOSTSWAP_VERSION") {
    Some(named) => named,
    None => env!("CARGO_PKG_VERSION"),
};

/// What `tier set` can set.
const SETTABLE: &str = "\
ram   limit, high, low; codec, group, dict: by a take-over
cold  limit, idle, cpu; codec, group, dict: by a take-over
disk  by a take-over: timeout, connections, ca, cert, key, credentials, profile; of several tiers below memory each by
      its name in tier list";

/// A compressed, sparse store as a swap device.
#[derive(Parser)]
#[command(name = "ghostswap-ublk", version = VERSION, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The arguments of this process.
    pub fn given() -> Result<Cli, clap::Error> {
        let cli = Cli::try_parse()?;
        if let Command::Tier(Tier::Set { words, .. }) = &cli.command {
            settings(words).map_err(|why| Cli::command().error(ErrorKind::ValueValidation, why))?;
        }
        Ok(cli)
    }
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Make a device and serve it; prints its path once it is live
    Add(Add),
    /// List the devices
    List,
    /// Report what devices hold and what that costs
    Status(Status),
    /// Stop and remove a device
    Del(Del),
    /// Swap a device off and remove it, unless what is swapped out would not fit into memory
    Stop(Stop),
    /// Have the kernel swap to a device, by windows that are opened and closed as needed
    Swapon(SwapOnArgs),
    /// Swap a device off, or one window of it; ended halfway, what is left stays in use
    Swapoff(SwapOffArgs),
    /// Compress again, now, all pages that the second tier would come to when they have lain still
    Recompress(Recompress),
    /// Move to the first disk tier that takes them, now, all pages that were written some time ago
    Writeback(WriteBack),
    /// List the tiers of a device, or change them while it is in use
    #[command(subcommand)]
    Tier(Tier),
    /// Make a live device larger
    Resize(Resize),
    /// Replace the running daemon of a device by this program, while the device is in use
    Upgrade(Upgrade),
    /// Print which formats this program hands over and takes over, as JSON
    #[command(hide = true)]
    Formats,
    /// Check whether this machine is fit to swap to a device
    Doctor(Doctor),
}

/// `add`.
#[derive(Args, Clone)]
pub struct Add {
    /// Size of the device, a label: only what is stored costs memory
    #[arg(long, default_value = "16T", value_parser = volume_bytes)]
    pub size: u64,
    /// Number of the device, as in /dev/ublkbN [default: the next free one]
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=1_048_575))]
    pub id: Option<u32>,
    /// Hardware queues, one thread each (two or more keep the kernel's I/O scheduler away)
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// Requests in flight for each queue
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub depth: u16,
    /// Where pages are kept, as in ram,limit=4G,codec=lz4 [default: ram,limit=50%,codec=lz4 and ram,codec=zstd:3,group=64K,idle=10m]. A second one:
    /// how they are compressed again when they have lain still, as in ram,codec=zstd:3,group=64K,idle=10m.
    /// Last, up to four below memory, each of which passes on to the next what it has no room for: a disk,
    /// file:/var/lib/ghostswap/cold,size=64G or block:/dev/nvme1n1p3, or an NBD server's export, nbd:nbd://192.0.2.7/cold
    #[arg(long = "tier", value_name = "SPEC", value_parser = tier)]
    pub tiers: Vec<TierConfig>,
    /// Seconds without a sign of life after which a worker is killed and replaced (0: never)
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u16).range(0..=3600))]
    pub watchdog: u16,
    /// Seconds of refused writes after which the kernel's OOM killer is called to make room in a full
    /// store (0: never, and the machine may stand still)
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=3600))]
    pub oom_after: u16,
    /// How to hear of freed swap slots
    #[arg(long, value_name = "HOW", value_enum, default_value = "auto")]
    pub slot_free: Wish,
    /// Stay in the foreground and log to stderr
    #[arg(long)]
    pub foreground: bool,
    /// Swap to the device: by windows, opened and closed as needed (the default), or the whole as one area
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "windows")]
    pub swapon: Option<SwapMode>,
    /// Priority of the first window or of the whole as a swap area; each next window's is lower
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i16).range(0..))]
    pub priority: i16,
    /// If the device is served already, replace its daemon by this program instead
    #[arg(long, requires = "id")]
    pub or_upgrade: bool,
}

/// How to swap to a new device.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum SwapMode {
    /// Windows.
    Windows,
    /// One area.
    Whole,
}

/// `swapon`.
#[derive(Args)]
pub struct SwapOnArgs {
    /// Number of the device
    pub id: u32,
    /// Open one more window, of this size, instead of having windows kept
    #[arg(long, value_name = "SIZE", value_parser = window_bytes, conflicts_with = "whole")]
    pub window: Option<u64>,
    /// As one area
    #[arg(long)]
    pub whole: bool,
}

/// `swapoff`.
#[derive(Args)]
pub struct SwapOffArgs {
    /// Number of the device
    pub id: u32,
    /// Only this window, as in /dev/ublkb0pN [default: all]
    #[arg(long, value_name = "N")]
    pub window: Option<u32>,
    /// Bring back at most this much a second, as in 64M [default: as fast as it goes]
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
}

/// `status`.
#[derive(Args)]
pub struct Status {
    /// Number of the device [default: all]
    pub id: Option<u32>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `del`.
#[derive(Args)]
pub struct Del {
    /// Number of the device
    pub id: u32,
    /// Remove it even while it is in use as swap: whatever is swapped out there is lost
    #[arg(long)]
    pub force: bool,
}

/// `stop`.
#[derive(Args)]
pub struct Stop {
    /// Number of the device
    pub id: u32,
    /// Do nothing unless systemd is stopping this unit for good
    #[arg(long)]
    pub unit: Option<String>,
}

/// `recompress`.
#[derive(Args)]
pub struct Recompress {
    /// Number of the device
    pub id: u32,
}

/// `writeback`.
#[derive(Args)]
pub struct WriteBack {
    /// Number of the device
    pub id: u32,
    /// Only what was written so long ago, as in 10m
    #[arg(long, value_name = "AGE", value_parser = parse_time, default_value = "0")]
    pub idle: u32,
}

/// `tier`.
#[derive(Subcommand)]
pub enum Tier {
    /// What each tier may hold and holds
    List {
        /// Number of the device
        id: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Change settings of a tier while the device is in use
    #[command(after_help = SETTABLE)]
    Set {
        /// Number of the device
        id: u32,
        /// Its name in `tier list` and what to set, in the words of --tier, as in ram limit=4G,high=90%,low=80%
        #[arg(value_name = "NAME KEY=VALUE", required = true)]
        words: Vec<String>,
    },
    /// Add a tier below memory, in which the device's pages may be kept from then on
    Add {
        /// Number of the device
        id: u32,
        /// As in file:/var/lib/ghostswap/cold,size=64G, block:/dev/nvme1n1p3 or nbd:nbd://192.0.2.7/cold
        #[arg(value_name = "SPEC", value_parser = below)]
        spec: TierConfig,
        /// Above this one, by its name in `tier list` [default: below all others]
        #[arg(long, value_name = "NAME")]
        before: Option<String>,
    },
    /// Empty a tier below memory and do without it from then on; ended halfway, it stays in use
    Remove {
        /// Number of the device
        id: u32,
        /// Its name in `tier list`, if there are several below memory
        name: Option<String>,
    },
    /// Empty a tier below memory into memory, as far as that has room, or other tiers, and use it no more
    Drain {
        /// Number of the device
        id: u32,
        /// Its name in `tier list`, if there are several below memory
        name: Option<String>,
        /// Use it again
        #[arg(long)]
        stop: bool,
    },
}

/// `resize`.
#[derive(Args)]
pub struct Resize {
    /// Number of the device
    pub id: u32,
    /// Its new size; a swap area on it keeps its own
    #[arg(value_parser = volume_bytes)]
    pub size: u64,
}

/// `upgrade`.
#[derive(Args)]
pub struct Upgrade {
    /// Number of the device
    pub id: u32,
    /// Another ghostswap-ublk to replace it by [default: this one]
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,
}

/// `doctor`.
#[derive(Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn volume_bytes(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes == 0 {
        return Err("a device needs a size above 0".into());
    }
    if bytes > MAX_VOLUME_BYTES {
        return Err("at most 16T".into());
    }
    if bytes % 4096 != 0 {
        return Err("the size must be a multiple of 4096".into());
    }
    Ok(bytes)
}

fn window_bytes(text: &str) -> Result<u64, String> {
    match volume_bytes(text)? {
        bytes if bytes >= 4 << 20 => Ok(bytes),
        _ => Err("a window needs at least 4M".into()),
    }
}

fn rate(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("at least 1".into()),
        bytes => Ok(bytes),
    }
}

/// What `tier set` is to set.
pub fn settings(words: &[String]) -> Result<TierSettings, String> {
    words.join(",").parse()
}

fn tier(text: &str) -> Result<TierConfig, String> {
    text.parse()
}

/// What `tier add` can add.
fn below(text: &str) -> Result<TierConfig, String> {
    match text.parse()? {
        TierConfig::Ram(_) => Err("only a tier below memory can be added: file:, block:, nbd: or s3:".into()),
        tier => Ok(tier),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_are_a_word_or_several() {
        for line in ["ram,limit=1G,high=90%", "ram limit=1G,high=90%", "ram limit=1G high=90%"] {
            let words: Vec<&str> = "ghostswap-ublk tier set 0".split(' ').chain(line.split(' ')).collect();
            let Command::Tier(Tier::Set { id: 0, words }) = Cli::try_parse_from(words).unwrap().command else {
                panic!("{line}")
            };
            assert_eq!(settings(&words).unwrap().to_string(), "ram,limit=1G,high=90%");
        }
        assert!(settings(&["disk".into(), "size=1T".into()]).is_err());
        assert!(Cli::try_parse_from(["ghostswap-ublk", "tier", "set", "0"]).is_err());
    }

    #[test]
    fn only_what_lies_below_can_be_added() {
        assert!(below("block:/dev/x").is_ok() && below("file:/x,size=1G").is_ok());
        assert!(below("ram,limit=1G").is_err() && below("file:/x").is_err());
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(volume_bytes("16T"), Ok(16 << 40));
        for bad in ["0", "17T", "4097", "x"] {
            assert!(volume_bytes(bad).is_err(), "{bad}");
        }
    }
}
