//! `ghostswap-ublk`: a ghostswap store as a block device of the kernel's ublk driver, to swap to.
//!
//! This front end translates and decides nothing: `queue` turns block requests into the store's
//! calls, `device` and `claim` speak to the driver. Its processes: the command (`daemon`), the
//! `supervise`r that keeps what is stored, the `worker` that serves and the one that stands by, the
//! `agent` that answers `control` messages, keeps the swap `windows`, writes the `log` and is the supervisor's
//! `heir`; they share the `board`. `slotfree` hears of freed swap slots. `protect` keeps
//! them out of their own swap, `doctor` looks at the machine, `notify`, `unit` and `kept` get along with systemd.
//!
//! Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage.

mod agent;
mod board;
mod claim;
mod cli;
mod control;
#[cfg(feature = "crash-points")]
mod crash;
mod daemon;
mod device;
mod doctor;
mod handover;
mod heir;
mod kept;
mod log;
mod notify;
mod progress;
mod protect;
mod queue;
mod shortage;
mod signals;
mod slotfree;
mod supervise;
mod tiers;
mod unit;
mod windows;
mod worker;

use anyhow::{anyhow, bail, Context, Result};
use cli::{Cli, Command, SwapMode};
use control::{Request, SwapOn};
use daemon::Role;
use ghostswap::config::format_size;
use serde_json::{json, Value};
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::given() {
        Ok(cli) => cli,
        Err(e) => return wrong_usage(&e),
    };
    let done = match cli.command {
        Command::Add(add) => run_add(&add),
        Command::List => list(),
        Command::Status(wanted) => status(wanted.id, wanted.json),
        Command::Del(del) => remove(del.id, del.force),
        Command::Stop(stop) => unit::stop(stop.id, stop.unit.as_deref()),
        Command::Swapon(how) => windows::swap_on(how.id, wanted(&how)),
        Command::Swapoff(what) => windows::swap_off(what.id, what.window, what.rate),
        Command::Recompress(which) => carry_out(which.id, &Request::Recompress),
        Command::Writeback(which) => tiers::write_back(which.id, which.idle),
        Command::Tier(tier) => tiers::run(tier),
        Command::Resize(resize) => carry_out(resize.id, &Request::Resize { bytes: resize.size }),
        Command::Upgrade(upgrade) => run_upgrade(upgrade.id, upgrade.program),
        Command::Formats => {
            println!("{}", handover::formats());
            Ok(())
        }
        Command::Doctor(doctor) => doctor::run(doctor.json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ghostswap-ublk: {}", format!("{e:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// Help and version go out whole; a mistake gets one line and exit code 2.
fn wrong_usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() || e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        e.exit();
    }
    let text = e.to_string();
    let line = text.lines().next().unwrap_or_default();
    eprintln!("ghostswap-ublk: {} (see --help)", line.strip_prefix("error: ").unwrap_or(line));
    ExitCode::from(2)
}

fn run_add(add: &cli::Add) -> Result<()> {
    if let Some(letter) = handover::take_letter()? {
        return supervise::resume(add, &letter);
    }
    if add.or_upgrade && unit::take_in(add)? {
        return Ok(());
    }
    if let Some(letter) = add.id.map(kept::find).transpose()?.flatten() {
        return Err(letter.send(handover::OWN_PROGRAM));
    }
    match daemon::split(add.foreground)? {
        Role::Daemon(pipe) => supervise::run(add, pipe),
        Role::Waiter(pipe) => {
            let path = match daemon::wait_live(pipe) {
                // The daemon in the foreground says itself what went wrong.
                Err(_) if add.foreground => std::process::exit(1),
                told => told?,
            };
            println!("{}", path.display());
            let mut done = Ok(());
            if let (Some(how), Some(id)) = (add.swapon, device::id_of(&path)) {
                let what = if how == SwapMode::Whole { SwapOn::Whole } else { SwapOn::Windows };
                done = windows::swap_on(id, what).with_context(|| format!("{} is live but not swap", path.display()));
            }
            if add.foreground && done.is_err() {
                unit::take_down(&path);
            }
            done
        }
    }
}

fn wanted(how: &cli::SwapOnArgs) -> SwapOn {
    match (how.whole, how.window) {
        (true, _) => SwapOn::Whole,
        (false, Some(bytes)) => SwapOn::Window(bytes),
        (false, None) => SwapOn::Windows,
    }
}

/// The device's answer to `status`: its JSON form and the report for people.
pub(crate) fn describe(id: u32) -> Result<Option<(Value, String)>> {
    let Some(answer) = control::ask(id, &Request::Status)? else { return Ok(None) };
    match (answer.device, answer.report) {
        (Some(device), Some(report)) => Ok(Some((device, report))),
        _ => Err(anyhow!("ublkb{id}: {}", answer.error.unwrap_or_else(|| "no status".into()))),
    }
}

fn list() -> Result<()> {
    for id in control::known_ids() {
        match describe(id) {
            Ok(Some((device, _))) => println!("{}", headline(&device)),
            Ok(None) => println!("/dev/ublkb{id}  no daemon (remove it with: ghostswap-ublk del {id})"),
            Err(e) => println!("/dev/ublkb{id}  {e:#}"),
        }
    }
    Ok(())
}

fn headline(device: &Value) -> String {
    let number = |key: &str| device[key].as_u64().unwrap_or(0);
    format!(
        "{}  {}  pid {}  {} queues of {}",
        device["path"].as_str().unwrap_or("?"),
        format_size(number("size_bytes")),
        number("pid"),
        number("queues"),
        number("depth")
    )
}

fn status(id: Option<u32>, as_json: bool) -> Result<()> {
    let ids = id.map_or_else(control::known_ids, |id| vec![id]);
    let mut devices = Vec::new();
    for each in ids {
        match describe(each)? {
            Some(described) => devices.push(described),
            None if id.is_some() => bail!("no such device: ublkb{each}"),
            None => eprintln!("ghostswap-ublk: ublkb{each} has no daemon"),
        }
    }
    if as_json {
        let devices: Vec<Value> = devices.into_iter().map(|(device, _)| device).collect();
        println!("{}", json!({ "devices": devices }));
    } else if devices.is_empty() {
        println!("no devices");
    } else {
        for (device, report) in devices {
            println!("{}\n{}", headline(&device), report.trim_end());
        }
    }
    Ok(())
}

/// Has the daemon of a device do something of which there is nothing to tell.
pub(crate) fn carry_out(id: u32, request: &Request) -> Result<()> {
    match control::ask(id, request)? {
        Some(answer) if answer.ok => Ok(()),
        Some(answer) => bail!("{}", answer.error.unwrap_or_else(|| "the daemon refused".into())),
        None => bail!("no such device: ublkb{id}"),
    }
}

/// Has the daemon of a device replaced, by this program or another, while the device is in use.
fn run_upgrade(id: u32, program: Option<PathBuf>) -> Result<()> {
    let ask = || describe(id)?.map(|(device, _)| device).ok_or_else(|| anyhow!("no such device: ublkb{id}"));
    let upgrades = |device: &Value| device["upgrades"].as_u64().unwrap_or(0);
    let before = ask()?;
    let program = match program {
        Some(path) => path.canonicalize().with_context(|| format!("no program {}", path.display()))?,
        None => std::env::current_exe().context("cannot find this program's own path")?,
    };
    handover::check(&before, &handover::formats_of(&program)?)?;
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let order = since_1970.as_nanos() as u64 | 1;
    match control::ask(id, &Request::Upgrade { program, order })? {
        Some(answer) if !answer.ok => bail!("{}", answer.error.unwrap_or_else(|| "the daemon refused".into())),
        _ => {}
    }
    for _ in 0..600 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        // Between an old agent's end and the next one's beginning nobody listens.
        let Ok(now) = ask() else { continue };
        if upgrades(&now) > upgrades(&before) {
            let word = |device: &Value| device["version"].as_str().unwrap_or("?").to_owned();
            println!("/dev/ublkb{id}: {} replaced by {}", word(&before), word(&now));
            return Ok(());
        }
        match now["upgrade_error"].as_str() {
            Some("") | None => {}
            Some(why) => bail!("ublkb{id} was not upgraded and serves on: {why}"),
        }
    }
    bail!("ublkb{id}: no news of the upgrade after 60 s; see ghostswap-ublk status")
}

fn remove(id: u32, force: bool) -> Result<()> {
    let path = PathBuf::from(format!("/dev/ublkb{id}"));
    let shown = path.display();
    if !force && control::in_use_as_swap(&path) {
        bail!("{shown} is in use as swap: ghostswap-ublk swapoff {id} first");
    }
    let socket = control::socket_path(id);
    let ours = socket.exists();
    match control::ask(id, &Request::Stop { force })? {
        Some(answer) if answer.ok => wait_gone(id),
        Some(answer) => bail!("{}", answer.error.unwrap_or_else(|| "the daemon refused".into())),
        None if !device::kernel_has(id) => {
            // A daemon that died with its device leaves its socket.
            let _ = std::fs::remove_file(&socket);
            bail!("no such device: ublkb{id}")
        }
        None if !ours && !force => bail!("{shown} is not a ghostswap device (--force removes it all the same)"),
        None => {
            device::remove(id)?;
            let _ = std::fs::remove_file(&socket);
            Ok(())
        }
    }
}

/// The daemon answers before it stops; the id is free once the kernel's device is gone.
fn wait_gone(id: u32) -> Result<()> {
    for _ in 0..3000 {
        if !device::kernel_has(id) && !control::socket_path(id).exists() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    bail!("/dev/ublkb{id} is still there after 30 s: something holds it open")
}
