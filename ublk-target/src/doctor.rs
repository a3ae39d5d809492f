//! `doctor`: whether this machine can swap to a ghostswap device, check by check.
//!
//! It looks at the machine as it is and at what its caller may do, since the daemon inherits both;
//! it changes nothing that outlives it. `machine` holds the checks of kernel and settings,
//! `caller` those of the process, `feed` that of the slot-free feed. A check is a pure function of texts, or of files below a root
//! that tests can replace. Checks that have to ask the driver are left out while it is not there.
//!
//! `fail` is for what keeps a device from being made or lets its daemon deadlock, `warn` for what
//! costs memory, speed or a feature.

mod caller;
mod feed;
mod machine;

use crate::{control, protect, slotfree};
use anyhow::{bail, Result};
use libublk::ctrl::UblkCtrl;
use serde::Serialize;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug, PartialEq, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do, unless all is well.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Check { name, verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Check { name, verdict: Verdict::Warn, found: found.into(), advice: Some(advice.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Check { name, verdict: Verdict::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        write!(f, "{verdict:<4}  {}: {}", self.name, self.found)?;
        self.advice.iter().try_for_each(|advice| write!(f, "; {advice}"))
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    checks: Vec<Check>,
}

/// The files of a machine: those below `/`, or samples below another root.
struct Machine {
    root: PathBuf,
}

impl Machine {
    /// A file's text without the space around it; `None` if it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().into())
    }

    fn has(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }
}

/// Examines this machine, prints the report, and errs when a check failed.
pub fn run(as_json: bool) -> Result<()> {
    let report = Report { checks: examine(&Machine { root: "/".into() }) };
    let failed = report.checks.iter().filter(|check| check.verdict == Verdict::Fail).count();
    let mut out = std::io::stdout().lock();
    if as_json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        report.checks.iter().try_for_each(|check| writeln!(out, "{check}"))?;
    }
    match failed {
        0 => Ok(()),
        1 => bail!("1 check failed"),
        n => bail!("{n} checks failed"),
    }
}

fn examine(here: &Machine) -> Vec<Check> {
    let text = |path| here.text(path).unwrap_or_default();
    let release = text("proc/sys/kernel/osrelease");
    let driver = machine::driver(here, &release);
    let features = (driver.verdict == Verdict::Ok).then(UblkCtrl::get_features);
    let caps = caller::effective_caps(&text("proc/self/status"));

    let mut checks = vec![machine::kernel(&release, features.flatten()), driver];
    checks.extend(features.map(machine::features).unwrap_or_default());
    checks.extend(features.flatten().map(|features| machine::death(&release, features)));
    checks.extend([
        caller::capabilities(caps),
        caller::locked_memory(&text("proc/self/limits"), caps.unwrap_or(0)),
        caller::io_flusher(protect::can_become_flusher()),
        caller::real_time(protect::can_be_first_in_line()),
        caller::oom_score(protect::can_avoid_oom_kill()),
        caller::cgroup(here),
        machine::zswap(here.text("sys/module/zswap/parameters/enabled").as_deref()),
        machine::zram(&text("proc/swaps")),
    ]);
    let function = slotfree::find().map(|target| target.name).map_err(|e| format!("{e:#}"));
    let (lockdown, kprobes) = (text("sys/kernel/security/lockdown"), here.has(slotfree::KPROBE_TYPE));
    let function = function.as_ref().map(|name| *name).map_err(String::as_str);
    checks.push(feed::slot_free(function, &lockdown, caps.unwrap_or(0), kprobes));
    checks.extend(machine::schedulers(here, &control::known_ids()));
    checks.extend([
        machine::page_cluster(&text("proc/sys/vm/page-cluster")),
        machine::swappiness(&text("proc/sys/vm/swappiness")),
        machine::hibernation(&text("sys/power/state"), &text("sys/power/resume"), &text("proc/cmdline")),
    ]);
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A tree of sample files that goes away with the value.
    pub(super) struct Samples(pub Machine);

    impl Samples {
        pub(super) fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("ghostswap-doctor-{}-{name}", std::process::id()));
            let samples = Samples(Machine { root });
            std::fs::create_dir_all(&samples.0.root).unwrap();
            for (path, text) in files {
                let path = samples.0.root.join(path);
                std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).unwrap();
                std::fs::write(path, text).unwrap();
            }
            samples
        }
    }

    impl Drop for Samples {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0.root);
        }
    }

    #[test]
    fn checks_are_printed_as_documented() {
        assert_eq!(Check::ok("zram", "none").to_string(), "ok    zram: none");
        let fail = Check::fail("driver", "missing", "load it");
        assert_eq!(fail.to_string(), "fail  driver: missing; load it");
        assert_eq!(
            serde_json::to_string(&Report { checks: vec![fail] }).unwrap(),
            r#"{"checks":[{"name":"driver","verdict":"fail","found":"missing","advice":"load it"}]}"#
        );
    }

    #[test]
    fn every_check_of_this_machine_is_one_line() {
        for check in examine(&Machine { root: "/".into() }) {
            assert_eq!(check.to_string().lines().count(), 1, "{check}");
            assert_eq!(check.advice.is_none(), check.verdict == Verdict::Ok, "{check}");
        }
    }

    #[test]
    fn a_machine_without_files_does_not_panic() {
        let nothing = Samples::new("nothing", &[]);
        let driver = examine(&nothing.0).into_iter().find(|check| check.name == "driver").unwrap();
        assert_eq!(driver.verdict, Verdict::Fail);
    }
}
