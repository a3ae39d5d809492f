//! `tier` and `writeback`: the tiers of a device in use. The daemon does the work; here it is asked for and watched.

use crate::cli::Tier;
use crate::control::{Request, TierChange};
use crate::progress::Progress;
use crate::{carry_out, describe, signals};
use anyhow::{anyhow, bail, Result};
use ghostswap::config::format_size;
use serde_json::{json, Value};
use std::os::fd::AsRawFd;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_millis(200);

/// `tier`.
pub fn run(command: Tier) -> Result<()> {
    match command {
        Tier::List { id, json } => list(id, json),
        Tier::Set { id, limit } => carry_out(id, &Request::Tier { what: TierChange::Limit(limit) }),
        Tier::Drain { id, stop: true } => carry_out(id, &Request::Tier { what: TierChange::Drain(false) }),
        Tier::Drain { id, stop: false } => drain(id),
    }
}

fn device(id: u32) -> Result<Value> {
    describe(id)?.map(|(device, _)| device).ok_or_else(|| anyhow!("no such device: ublkb{id}"))
}

fn list(id: u32, as_json: bool) -> Result<()> {
    let device = device(id)?;
    let tiers = device["tiers"].as_array().cloned().unwrap_or_default();
    if as_json {
        println!("{}", json!({ "tiers": tiers }));
        return Ok(());
    }
    println!("{:<6}{:>12}{:>12}{:>12}  {:<14}WHAT", "TIER", "LIMIT", "HELD", "LIVE", "STATE");
    for tier in tiers {
        let text = |key: &str| tier[key].as_str().unwrap_or("?").to_owned();
        let size = |key: &str| format_size(tier[key].as_u64().unwrap_or(0));
        println!(
            "{:<6}{:>12}{:>12}{:>12}  {:<14}{}",
            text("name"),
            size("limit_bytes"),
            size("held_bytes"),
            size("live_bytes"),
            text("state"),
            text("what")
        );
    }
    Ok(())
}

/// Ended by a signal, the tier is in use again.
fn drain(id: u32) -> Result<()> {
    let received = signals::block(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    carry_out(id, &Request::Tier { what: TierChange::Drain(true) })?;
    let what = format!("drain /dev/ublkb{id}");
    let mut shown = Progress::new(&what);
    loop {
        let disk = &device(id)?["stats"]["disk"];
        let bytes = |key: &str| disk[key].as_u64().unwrap_or(0);
        let used = bytes("used_bytes");
        shown.tell(used, used == 0);
        if used == 0 {
            return Ok(());
        }
        if used <= bytes("unreadable_bytes") {
            bail!("{} cannot be read and stay there; all else is in memory", format_size(used));
        }
        let [ended] = signals::poll([received.as_raw_fd()], LOOK_EVERY);
        if ended {
            carry_out(id, &Request::Tier { what: TierChange::Drain(false) })?;
            bail!("stopped: the tier is in use again, with {} in it", format_size(used));
        }
    }
}

/// Returns when all that was old enough has gone down.
pub fn write_back(id: u32, idle_s: u32) -> Result<()> {
    let written = |device: &Value| device["stats"]["disk"]["written_bytes"].as_u64().unwrap_or(0);
    let mut first = device(id)?;
    carry_out(id, &Request::WriteBack { idle_s })?;
    loop {
        let now = device(id)?;
        let disk = &now["stats"]["disk"];
        if now["pid"] != first["pid"] {
            // Another worker took over, and does not know of it.
            first = now;
            carry_out(id, &Request::WriteBack { idle_s })?;
            continue;
        }
        if disk["failing"] == true {
            bail!("the disk tier refuses writes; what did not go there stays in memory");
        }
        if disk["writing_back"] != true {
            println!("{} written", format_size(written(&now).saturating_sub(written(&first))));
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
