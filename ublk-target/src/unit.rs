//! What a systemd unit asks of the commands (`systemd/ghostswap@.service`).
//!
//! To systemd a restart is a stop and a start. Here the stop does nothing and the start finds a
//! device that is served, upgrades its daemon in place and tells systemd that it is the unit's main
//! process again; so nothing is ever let go of. Which of the two a stop is, is asked of systemd, and
//! whatever is not certainly a stop for good leaves the device served.
//!
//! A stop for good is `swapoff`, then removal. If the pages would not fit into memory, or the kernel
//! refuses, the stop fails, the daemon serves on, and the unit is started again, which only takes
//! note of that.

use crate::cli::{Add, VERSION};
use crate::control::{self, Request};
use crate::device;
use crate::notify::Manager;
use anyhow::{anyhow, bail, Context, Result};
use ghostswap::config::format_size;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Of the machine's memory, what `swapoff` is to leave free: a 32nd.
const LEAVE_FREE: u64 = 32;

/// Takes a device that is served already into the unit, upgraded to this program. False: there is
/// none, it is to be made.
pub fn take_in(add: &Add) -> Result<bool> {
    let Some(id) = add.id.filter(|id| device::kernel_has(*id)) else { return Ok(false) };
    let Some((device, _)) = crate::describe(id)? else { return Ok(false) };
    let worker = device["pid"].as_u64().ok_or_else(|| anyhow!("ublkb{id} does not say who serves it"))?;
    // An older daemon does not say who supervises: the worker's parent does.
    let told = device["supervisor"]["process"].as_u64().map(|pid| pid as u32);
    let supervisor = told.or_else(|| parent(worker)).filter(|pid| *pid > 1).ok_or_else(|| {
        anyhow!("the supervisor of ublkb{id} is gone; process {worker} serves on: ghostswap-ublk stop {id}, then start anew")
    })?;
    let mut manager = Manager::from_env();
    if manager.listens() && of(supervisor, "cgroup")? != of("self", "cgroup")? {
        bail!("ublkb{id} is served by process {supervisor}, which this unit has not started: stop it first");
    }
    if options(&of(supervisor, "cmdline")?) != options(&of("self", "cmdline")?) {
        eprintln!("ghostswap-ublk: ublkb{id} keeps the options it was made with; others come with a stop and a start");
    }
    let status = match crate::run_upgrade(id, None) {
        Ok(()) => format!("/dev/ublkb{id} is served by version {VERSION}"),
        // What matters to the unit is that the device is served, and by whom.
        Err(e) => {
            eprintln!("ghostswap-ublk: {e:#}");
            format!("not upgraded: {e:#}").replace('\n', " ")
        }
    };
    manager.say(&format!("MAINPID={supervisor}\nSTATUS={status}\nREADY=1"));
    while !manager.say_the_rest() {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(true)
}

/// Takes down a device that cannot be swap, so that a unit that fails to start leaves nothing behind.
pub fn take_down(path: &Path) {
    if !Manager::from_env().listens() {
        return;
    }
    if let Some(id) = path.to_str().and_then(|p| p.strip_prefix("/dev/ublkb")?.parse().ok()) {
        let _ = control::ask(id, &Request::Stop { force: false });
    }
}

/// Swaps a device off and removes it. With a unit's name: only if the unit is being stopped for good.
pub fn stop(id: u32, unit: Option<&str>) -> Result<()> {
    let Some(unit) = unit else { return swap_off_and_remove(id) };
    if !device::kernel_has(id) {
        return Ok(());
    }
    match job(unit)?.as_deref() {
        Some("stop") => {}
        other => {
            println!("/dev/ublkb{id} is served on: {unit} is not to stop but to {}", other.unwrap_or("do nothing"));
            return Ok(());
        }
    }
    let done = swap_off_and_remove(id);
    if done.is_err() {
        // So that the unit says what is true, and a later stop finds it. It cancels the stop, which
        // has whoever asked for it hear of the failure; a shutdown cannot be cancelled so.
        let _ = systemctl(&["--no-block", "start", unit]);
    }
    done
}

fn swap_off_and_remove(id: u32) -> Result<()> {
    let path = format!("/dev/ublkb{id}");
    crate::windows::swap_off(id, None, None)?;
    // udev looks at a device that was closed, and would meet one that is going away.
    let _ = Command::new("udevadm").args(["settle", "--timeout=10"]).output();
    println!("removing {path}");
    crate::remove(id, false)
}

/// The kind of the job that systemd has for the unit: `stop`, `restart`.
fn job(unit: &str) -> Result<Option<String>> {
    let jobs = systemctl(&["--no-legend", "--no-pager", "--plain", "--full", "list-jobs"])?;
    Ok(job_of(&jobs, unit))
}

/// Lines of number, unit, kind and state.
fn job_of(jobs: &str, unit: &str) -> Option<String> {
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    jobs.lines().map(words).find(|w| w.get(1).is_some_and(|u| u == unit)).and_then(|w| w.get(2).cloned())
}

fn systemctl(args: &[&str]) -> Result<String> {
    let done = Command::new("systemctl").args(args).stdin(Stdio::null()).output().context("cannot run systemctl")?;
    if !done.status.success() {
        bail!("systemctl failed: {}", String::from_utf8_lossy(&done.stderr).trim().replace('\n', " "));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn of(pid: impl std::fmt::Display, what: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{what}");
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

fn parent(pid: u64) -> Option<u32> {
    let status = of(pid, "status").ok()?;
    status.lines().find_map(|l| l.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// A command line without the program's name.
fn options(cmdline: &str) -> &str {
    cmdline.split_once('\0').map_or("", |(_, rest)| rest)
}

/// Whether what is in these areas fits into memory and the other areas. The kernel would find out
/// too, after it has made everything else stand still for it.
pub fn check_room(swaps: &str, meminfo: &str, areas: &[String]) -> Result<(), String> {
    let (mut used, mut room) = (0, 0);
    for line in swaps.lines().skip(1) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let kib = |i: usize| words.get(i).and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        match areas.iter().any(|a| words.first() == Some(&a.as_str())) {
            true => used += kib(3),
            false => room += kib(2).saturating_sub(kib(3)),
        }
    }
    let memory = |key: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|l| l.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    room += memory("MemAvailable").saturating_sub(memory("MemTotal") / LEAVE_FREE);
    match used <= room {
        true => Ok(()),
        false => Err(format!(
            "{} swapped out would not fit into the {} that are free; end some programs first",
            format_size(used << 10),
            format_size(room << 10)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWAPS: &str = "Filename\tType\tSize\tUsed\tPriority\n\
        /dev/ublkb0p1 partition 4000 1000 -2\n/dev/ublkb0p2 partition 4000 500 -3\n/dev/sda2 partition 900 200 -4\n";

    #[test]
    fn only_what_fits_is_swapped_off() {
        let areas = ["/dev/ublkb0p1", "/dev/ublkb0p2"].map(str::to_owned);
        // 1500 KiB used; 700 free in the other area, and memory less the 32nd that is to stay free.
        let meminfo = |available: u32| format!("MemTotal: 3200 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n");
        assert_eq!(check_room(SWAPS, &meminfo(900), &areas), Ok(()));
        assert!(check_room(SWAPS, &meminfo(899), &areas).unwrap_err().contains("would not fit"));
        assert_eq!(check_room(SWAPS, &meminfo(0), &[]), Ok(()), "nothing is to be swapped off");
    }

    #[test]
    fn a_restart_is_told_from_a_stop() {
        let jobs = "12 ghostswap@1.service stop    waiting\n13 ghostswap@0.service restart running\n";
        assert_eq!(job_of(jobs, "ghostswap@0.service").as_deref(), Some("restart"));
        assert_eq!(job_of(jobs, "ghostswap@1.service").as_deref(), Some("stop"));
        assert_eq!(job_of(jobs, "ghostswap@2.service"), None);
        assert_eq!(job_of("No jobs running.\n", "ghostswap@0.service"), None);
    }

    #[test]
    fn a_programs_name_is_no_option() {
        assert_eq!(options("@ghostswap-ublk\0add\0--id\x000\0"), options("ghostswap-ublk\0add\0--id\x000\0"));
        assert_ne!(options("x\0add\0"), options("x\0add\0--size\x001T\0"));
    }
}
