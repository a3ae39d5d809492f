//! `tier` and `writeback`: the tiers of a device in use. The daemon does the work; here it is asked for and watched.

use crate::cli::{self, Tier};
use crate::control::{Request, TierChange};
use crate::progress::Progress;
use crate::{carry_out, describe, signals};
use anyhow::{anyhow, bail, Result};
use ghostswap::config::{format_size, TierSettings};
use serde_json::{json, Value};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often a removal asks anew whether all will fit.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long a look may come to nothing.
const LOOK_PATIENCE: Duration = Duration::from_secs(60);
/// Longer than the supervisor gives the new worker, and a take-over.
const CHANGE_PATIENCE: Duration = Duration::from_secs(180);

/// `tier`.
pub fn run(command: Tier) -> Result<()> {
    match command {
        Tier::List { id, json } => list(id, json),
        Tier::Set { id, words } => set(id, &cli::settings(&words).map_err(|why| anyhow!(why))?),
        Tier::Add { id, spec, before } => {
            let what = |order| TierChange::Add { spec: spec.to_string(), order, before: before.clone() };
            change(id, what).map_err(|e| anyhow!("ublkb{id} serves on as it was: {e:#}"))
        }
        Tier::Remove { id, name } => remove(id, name.as_deref()),
        Tier::Drain { id, name, stop: true } => carry_out(id, &Request::Tier { what: drained(name.as_deref(), false) }),
        Tier::Drain { id, name, stop: false } => drain(id, name.as_deref()),
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
    println!("{:<8}{:>12}{:>12}{:>12}  {:<14}WHAT", "TIER", "LIMIT", "HELD", "LIVE", "STATE");
    for tier in tiers {
        let text = |key: &str| tier[key].as_str().unwrap_or("?").to_owned();
        let size = |key: &str| format_size(tier[key].as_u64().unwrap_or(0));
        println!(
            "{:<8}{:>12}{:>12}{:>12}  {:<14}{}",
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

/// What the worker does itself is done when it is answered; for the rest another takes over.
fn set(id: u32, settings: &TierSettings) -> Result<()> {
    let order = new_order();
    let what = TierChange::Set { spec: settings.to_string(), order };
    carry_out(id, &Request::Tier { what })?;
    match settings.split() {
        (_, None) => Ok(()),
        (None, Some(_)) => await_change(id, order).map_err(|e| anyhow!("ublkb{id} serves on as it was: {e:#}")),
        (Some(now), Some(later)) => {
            await_change(id, order).map_err(|e| anyhow!("{now} holds, {later} does not: {e:#}"))
        }
    }
}

fn new_order() -> u64 {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since_1970.as_nanos() as u64 | 1
}

/// Has the tiers changed, and waits until they are.
fn change(id: u32, what: impl Fn(u64) -> TierChange) -> Result<()> {
    let order = new_order();
    carry_out(id, &Request::Tier { what: what(order) })?;
    await_change(id, order)
}

fn await_change(id: u32, order: u64) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < CHANGE_PATIENCE {
        // Under pressure a look may come to nothing: then the next one.
        if let Ok(device) = device(id) {
            if device["tier_change"]["order"] == order {
                return match device["tier_change"]["error"].as_str() {
                    Some("") | None => Ok(()),
                    Some(why) => bail!("{why}"),
                };
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    bail!("no news of the change after {} s; see ghostswap-ublk tier list {id}", CHANGE_PATIENCE.as_secs())
}

/// Of the tier that is called so, None: the only one.
fn drained(name: Option<&str>, drain: bool) -> TierChange {
    name.map_or(TierChange::Drain(drain), |name| TierChange::DrainOne { name: name.into(), drain })
}

/// What is known of it.
fn disk<'a>(device: &'a Value, id: u32, name: Option<&str>) -> Result<&'a Value> {
    let stats = &device["stats"];
    let disks = stats["disks"].as_array().map_or(&[][..], Vec::as_slice);
    let names = || disks.iter().filter_map(|disk| disk["name"].as_str()).collect::<Vec<_>>().join(", ");
    match (disks, name) {
        // A daemon that knows of one only.
        ([], None | Some("disk")) if stats["disk"].is_object() => Ok(&stats["disk"]),
        ([], _) => bail!("ublkb{id} has no tier below memory"),
        ([only], None | Some("disk")) => Ok(only),
        (_, None) => bail!("ublkb{id} has several tiers below memory, say which: {}", names()),
        (_, Some(name)) => match disks.iter().find(|disk| disk["name"] == name) {
            Some(disk) => Ok(disk),
            None => bail!("ublkb{id} has no tier called {name} below memory: it has {}", names()),
        },
    }
}

/// Drained first. Whatever comes between, the tier is in use again.
fn remove(id: u32, name: Option<&str>) -> Result<()> {
    let there = device(id)?;
    let shown = disk(&there, id, name)?["name"].as_str().unwrap_or("disk");
    let received = signals::block(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    let what = format!("remove {shown} of /dev/ublkb{id}");
    let all = name.map_or(TierChange::Empty, |name| TierChange::EmptyOne { name: name.into() });
    empty(id, name, &what, &all, &received)?;
    let removed = change(id, |order| TierChange::Remove { order, name: name.map(Into::into) });
    removed.map_err(|e| {
        let _ = carry_out(id, &Request::Tier { what: drained(name, false) });
        anyhow!("the tier is empty and stays: {e:#}")
    })
}

/// Ended by a signal, the tier is in use again.
fn drain(id: u32, name: Option<&str>) -> Result<()> {
    let received = signals::block(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    empty(id, name, &format!("drain /dev/ublkb{id}"), &drained(name, true), &received)
}

/// Has the tier drained by `how` and waits until it is empty; `Empty` is asked for again and again, since what comes
/// meanwhile may take the room.
fn empty(id: u32, name: Option<&str>, what: &str, how: &TierChange, received: &OwnedFd) -> Result<()> {
    let is_removal = matches!(how, TierChange::Empty | TierChange::EmptyOne { .. });
    carry_out(id, &Request::Tier { what: how.clone() })?;
    let mut shown = Progress::new(what);
    let (mut asked, mut looked) = (Instant::now(), Instant::now());
    loop {
        let disk = match device(id).and_then(|device| disk(&device, id, name).cloned()) {
            Ok(disk) => disk,
            // Under pressure a look may come to nothing: then the next one.
            Err(_) if looked.elapsed() < LOOK_PATIENCE => {
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            Err(e) => return Err(e),
        };
        looked = Instant::now();
        let bytes = |key: &str| disk[key].as_u64().unwrap_or(0);
        let used = bytes("used_bytes");
        shown.tell(used, used == 0);
        if used == 0 {
            return Ok(());
        }
        if used <= bytes("unreadable_bytes") {
            let left = anyhow!("{} cannot be read and stay there; all else is elsewhere", format_size(used));
            return give_up(id, name, is_removal, left);
        }
        if is_removal && asked.elapsed() >= ASK_EVERY {
            asked = Instant::now();
            if let Err(e) = carry_out(id, &Request::Tier { what: how.clone() }) {
                return give_up(id, name, is_removal, e);
            }
        }
        let [ended] = signals::poll([received.as_raw_fd()], LOOK_EVERY);
        if ended {
            carry_out(id, &Request::Tier { what: drained(name, false) })?;
            bail!("stopped: the tier is in use again, with {} in it", format_size(used));
        }
    }
}

/// What a removal began is taken back; draining by hand goes on until it is told otherwise.
fn give_up(id: u32, name: Option<&str>, is_removal: bool, why: anyhow::Error) -> Result<()> {
    if is_removal {
        carry_out(id, &Request::Tier { what: drained(name, false) })?;
        return Err(anyhow!("the tier is in use again: {why:#}"));
    }
    Err(why)
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
        let disks = now["stats"]["disks"].as_array().map_or(std::slice::from_ref(disk), Vec::as_slice);
        if disks.iter().all(|disk| disk["failing"] == true) {
            bail!("the disk tier refuses writes; what did not go there stays in memory");
        }
        if disk["writing_back"] != true {
            println!("{} written", format_size(written(&now).saturating_sub(written(&first))));
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
