//! `ghostswap-ublk`: a ghostswap store as a block device of the kernel's ublk driver, to swap to.
//!
//! This front end translates and decides nothing: `queue` turns block requests into the store's
//! calls, `control` turns messages into answers. `serve` is a device's life, `protect` what keeps
//! its daemon out of its own swap, `daemon` the processes, `log` records without waiting,
//! `doctor` looks at the machine.
//!
//! Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage.

mod cli;
mod control;
mod daemon;
mod doctor;
mod log;
mod protect;
mod queue;
mod serve;

use anyhow::{anyhow, bail, Context, Result};
use clap::Parser;
use cli::{Cli, Command};
use control::Request;
use daemon::Role;
use ghostswap::config::format_size;
use libublk::ctrl::UblkCtrl;
use serde_json::{json, Value};
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return wrong_usage(&e),
    };
    let done = match cli.command {
        Command::Add(add) => run_add(&add),
        Command::List => list(),
        Command::Status(wanted) => status(wanted.id, wanted.json),
        Command::Del(del) => remove(del.id, del.force),
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
    match daemon::split(add.foreground)? {
        Role::Daemon(pipe) => {
            let mut pipe = Some(pipe);
            let served = serve::run(add, |path| {
                if let Some(mut pipe) = pipe.take() {
                    daemon::tell_live(&mut pipe, path);
                }
                Ok(())
            });
            if let (Err(e), Some(pipe)) = (&served, &mut pipe) {
                daemon::tell_error(pipe, e);
            }
            served
        }
        Role::Waiter(pipe) => {
            let path = match daemon::wait_live(pipe) {
                // The daemon in the foreground says itself what went wrong.
                Err(_) if add.foreground => return Ok(()),
                told => told?,
            };
            println!("{}", path.display());
            if add.swapon {
                daemon::swap_on(&path).with_context(|| format!("{} is live but not swap", path.display()))?;
            }
            Ok(())
        }
    }
}

/// The device's answer to `status`: its JSON form and the report for people.
fn describe(id: u32) -> Result<Option<(Value, String)>> {
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

fn remove(id: u32, force: bool) -> Result<()> {
    let path = PathBuf::from(format!("/dev/ublkb{id}"));
    let shown = path.display();
    if !force && control::in_use_as_swap(&path) {
        bail!("{shown} is in use as swap: swapoff {shown} first");
    }
    let socket = control::socket_path(id);
    let ours = socket.exists();
    match control::ask(id, &Request::Stop { force })? {
        Some(answer) if answer.ok => wait_gone(id),
        Some(answer) => bail!("{}", answer.error.unwrap_or_else(|| "the daemon refused".into())),
        None if !serve::kernel_has(id) => {
            // A daemon that died with its device leaves its socket.
            let _ = std::fs::remove_file(&socket);
            bail!("no such device: ublkb{id}")
        }
        None if !ours && !force => bail!("{shown} is not a ghostswap device (--force removes it all the same)"),
        None => {
            let ctrl = UblkCtrl::new_simple(id as i32).map_err(|e| anyhow!("cannot reach {shown}: {e}"))?;
            let _ = ctrl.kill_dev();
            ctrl.del_dev().map_err(|e| anyhow!("cannot remove {shown}: {e}"))?;
            let _ = std::fs::remove_file(&socket);
            Ok(())
        }
    }
}

/// The daemon answers before it stops; the id is free once the kernel's device is gone.
fn wait_gone(id: u32) -> Result<()> {
    for _ in 0..3000 {
        if !serve::kernel_has(id) && !control::socket_path(id).exists() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    bail!("/dev/ublkb{id} is still there after 30 s: something holds it open")
}
