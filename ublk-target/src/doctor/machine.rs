//! Checks of the kernel, its driver and its settings, whoever asks.

use super::{Check, Machine};
use crate::device::CONTROL_NODE;
use libublk::sys;

pub fn kernel(release: &str, features: Option<u64>) -> Check {
    const NAME: &str = "kernel";
    const NEWER: &str = "boot Linux 6.5 or later";
    let has_user_copy = features.is_some_and(|features| features & u64::from(sys::UBLK_F_USER_COPY) != 0);
    match version(release) {
        None => Check::warn(NAME, format!("not known: '{release}'"), NEWER),
        Some(v) if v < (6, 0) && !has_user_copy => Check::fail(NAME, format!("{release} is older than ublk"), NEWER),
        Some(v) if v < (6, 5) && !has_user_copy => {
            Check::fail(NAME, format!("{release} is older than ublk's user copy"), NEWER)
        }
        Some((..=6, _)) => Check::warn(
            NAME,
            format!("{release}: before 7.0 a swap area of the full 16T costs the kernel up to 12.7 GB of memory"),
            "swap to it by windows, as --swapon does; as one area (--swapon=whole) take a smaller --size: 64G costs 49 MB",
        ),
        Some(_) => Check::ok(NAME, release),
    }
}

/// The first two numbers of a release such as `6.12.95+deb12-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether the driver is there and may be opened.
pub fn driver(machine: &Machine, release: &str) -> Check {
    const NAME: &str = "driver";
    let node = CONTROL_NODE.trim_start_matches('/');
    if machine.has(node) {
        return match std::fs::OpenOptions::new().read(true).write(true).open(machine.root.join(node)) {
            Ok(_) => Check::ok(NAME, format!("ublk driver at {CONTROL_NODE}")),
            Err(e) => Check::fail(NAME, format!("ublk driver: cannot open {CONTROL_NODE}: {e}"), "run it as root"),
        };
    }
    let found = |why: &str| format!("no ublk driver: {CONTROL_NODE} is missing, {why}");
    let modules = machine.text(&format!("lib/modules/{release}/modules.dep")).unwrap_or_default();
    if machine.has("sys/module/ublk_drv") {
        Check::fail(NAME, found("though ublk_drv is loaded"), "mount a devtmpfs on /dev, or make the node")
    } else if has_module(&modules, "ublk_drv") {
        Check::fail(NAME, found("ublk_drv is not loaded"), "run `modprobe ublk_drv` as root")
    } else {
        Check::fail(
            NAME,
            found(&format!("and there is no module ublk_drv for {release}")),
            "boot a kernel with CONFIG_BLK_DEV_UBLK, or install the rest of its modules (Ubuntu: linux-modules-extra)",
        )
    }
}

/// Whether modules.dep has a line such as `kernel/drivers/block/ublk_drv.ko.xz: …`.
fn has_module(modules_dep: &str, name: &str) -> bool {
    let files = modules_dep.lines().filter_map(|line| line.split(':').next()?.rsplit('/').next());
    files.into_iter().any(|file| file.strip_prefix(name).is_some_and(|rest| rest.starts_with(".ko")))
}

/// `features` is the driver's answer to GET_FEATURES, if it gave one.
pub fn features(features: Option<u64>) -> Vec<Check> {
    let Some(features) = features else {
        let found = "the driver does not tell its features";
        return vec![Check::fail("user-copy", found, "run it as root, on Linux 6.5 or later with io_uring allowed")];
    };
    let has = |flag: u32| features & u64::from(flag) != 0;
    let mut checks = vec![match has(sys::UBLK_F_USER_COPY) {
        true => Check::ok("user-copy", "the driver has it"),
        false => Check::fail("user-copy", "the driver lacks it", "boot Linux 6.5 or later"),
    }];
    let lost = [
        ("user-recovery", sys::UBLK_F_USER_RECOVERY, "no device can outlive its daemon", "6.1"),
        ("recovery-reissue", sys::UBLK_F_USER_RECOVERY_REISSUE, "a recovery would fail what was in flight", "6.1"),
        ("update-size", sys::UBLK_F_UPDATE_SIZE, "no live device can grow", "6.16"),
    ];
    checks.extend(lost.map(|(name, flag, loss, since)| match has(flag) {
        true => Check::ok(name, "the driver has it"),
        false => {
            Check::warn(name, format!("the driver lacks it: {loss}"), format!("boot Linux {since} or later for it"))
        }
    }));
    checks
}

/// Up to Linux 6.14 the driver notices a daemon's death in two places, one of which goes on after the
/// device is free for the next (`claim.rs`). A vendor may have put the newer driver into an older
/// kernel; that shows by what came with the release after.
pub fn death(release: &str, features: u64) -> Check {
    const NAME: &str = "death";
    let newer = features & u64::from(sys::UBLK_F_QUIESCE) != 0 || version(release).is_some_and(|v| v >= (6, 15));
    match newer {
        true => Check::ok(NAME, "the driver is clear about a daemon's death"),
        false => Check::warn(
            NAME,
            format!("{release}: before 6.15 a daemon's death, or an upgrade, under load can crash the kernel (seen on 6.12)"),
            "boot Linux 6.15 or later; else upgrade and restart while little is swapped",
        ),
    }
}

/// `enabled` is zswap's parameter, `None` where it is not built in.
pub fn zswap(enabled: Option<&str>) -> Check {
    const NAME: &str = "zswap";
    match enabled {
        None => Check::ok(NAME, "not in this kernel"),
        Some("Y" | "1") => Check::warn(
            NAME,
            "on: pages are compressed twice, and held here first",
            "echo 0 > /sys/module/zswap/parameters/enabled, and zswap.enabled=0 on the kernel's command line",
        ),
        Some(_) => Check::ok(NAME, "off"),
    }
}

/// An active swap area.
#[derive(Debug, PartialEq)]
struct Area<'a> {
    path: &'a str,
    priority: i32,
}

/// The areas of /proc/swaps.
fn swap_areas(swaps: &str) -> Vec<Area<'_>> {
    let areas = swaps.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        Some(Area { path: fields.next()?, priority: fields.nth(3)?.parse().ok()? })
    });
    areas.collect()
}

/// zram next to a device: the kernel fills the area of the highest priority before any other.
pub fn zram(swaps: &str) -> Check {
    const NAME: &str = "zram";
    let (zrams, others): (Vec<_>, Vec<_>) =
        swap_areas(swaps).into_iter().partition(|area| area.path.starts_with("/dev/zram"));
    let device = others.iter().filter(|area| area.path.starts_with("/dev/ublkb")).max_by_key(|area| area.priority);
    let places: Vec<String> = zrams.iter().map(|zram| place(zram, device)).collect();
    let Some(highest) = zrams.iter().map(|zram| zram.priority).max() else {
        return Check::ok(NAME, "no swap on zram");
    };
    let paths: Vec<&str> = zrams.iter().map(|zram| zram.path).collect();
    let order = match highest {
        0..=32766 if device.is_none_or(|device| device.priority <= highest) => {
            format!(", or give the device a priority above {highest} with --priority")
        }
        _ => ": one compressed store is enough".into(),
    };
    Check::warn(NAME, places.join(", "), format!("swapoff {}{order}", paths.join(" ")))
}

fn place(zram: &Area, device: Option<&Area>) -> String {
    let (path, priority) = (zram.path, zram.priority);
    let Some(Area { path: device, priority: other }) = device else {
        return format!("{path} is swap of priority {priority}: it is filled before a device added without a priority");
    };
    let how = match priority.cmp(other) {
        std::cmp::Ordering::Greater => "sits in front of",
        std::cmp::Ordering::Equal => "takes turns with",
        std::cmp::Ordering::Less => "sits behind",
    };
    format!("{path} of priority {priority} {how} {device} of {other}")
}

/// The I/O scheduler of every device that is live; `ids` are those that were ever added.
pub fn schedulers(machine: &Machine, ids: &[u32]) -> Vec<Check> {
    const NAME: &str = "scheduler";
    let of = |id: &u32| machine.text(&format!("sys/block/ublkb{id}/queue/scheduler")).map(|text| scheduler(*id, &text));
    let checks: Vec<Check> = ids.iter().filter_map(of).collect();
    match checks.is_empty() {
        true => vec![Check::ok(NAME, "no device is live")],
        false => checks,
    }
}

/// `choices` is a line such as `[none] mq-deadline`.
fn scheduler(id: u32, choices: &str) -> Check {
    let chosen = choices.split_ascii_whitespace().find_map(|c| c.strip_prefix('[')?.strip_suffix(']'));
    match chosen.unwrap_or(choices) {
        "none" => Check::ok("scheduler", format!("none on ublkb{id}")),
        other => Check::warn(
            "scheduler",
            format!("{other} on ublkb{id}: it holds requests back for a disk that is not there"),
            format!("echo none > /sys/block/ublkb{id}/queue/scheduler, or add the device with two queues"),
        ),
    }
}

pub fn page_cluster(text: &str) -> Check {
    const NAME: &str = "page-cluster";
    match text.parse::<u32>() {
        Err(_) => Check::warn(NAME, "not known", "mount /proc"),
        Ok(0) => Check::ok(NAME, "0, pages are read singly"),
        Ok(n) => Check::warn(
            NAME,
            format!("{n}: a fault reads up to {} neighbouring pages", 1u64.checked_shl(n).unwrap_or(u64::MAX)),
            "sysctl vm.page-cluster=0 suits a store in memory, which has no seek to save",
        ),
    }
}

pub fn swappiness(text: &str) -> Check {
    const NAME: &str = "swappiness";
    match text.parse::<u32>() {
        Err(_) => Check::warn(NAME, "not known", "mount /proc"),
        Ok(n @ ..60) => Check::warn(
            NAME,
            format!("{n}: the kernel would rather drop files it has to read again than swap to memory"),
            "sysctl vm.swappiness=100, or up to 200",
        ),
        Ok(n) => Check::ok(NAME, n.to_string()),
    }
}

/// `state` and `resume` are the files of /sys/power, the last may be missing and is then empty.
pub fn hibernation(state: &str, resume: &str, cmdline: &str) -> Check {
    const NAME: &str = "hibernation";
    let words = || cmdline.split_ascii_whitespace();
    let told = words().any(|word| word.strip_prefix("resume=").is_some_and(|device| !device.is_empty()));
    let set = !matches!(resume, "" | "0:0");
    if !state.split_ascii_whitespace().any(|way| way == "disk") || words().any(|word| word == "nohibernate") {
        Check::ok(NAME, "not possible")
    } else if told || set {
        Check::warn(
            NAME,
            "is set up: what is swapped out to a device does not survive it",
            "swapoff the device before hibernating",
        )
    } else {
        Check::ok(NAME, "no device to resume from")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Samples;
    use super::super::Verdict::{self, Fail, Ok, Warn};
    use super::*;

    const USER_COPY: u64 = sys::UBLK_F_USER_COPY as u64;

    #[test]
    fn kernels_are_judged_by_release_and_driver() {
        for (release, features, verdict) in [
            ("7.3.4+deb14-cloud-amd64", Some(USER_COPY), Ok),
            ("10.0.0", Some(USER_COPY), Ok),
            ("6.12.95+deb12-cloud-amd64", Some(USER_COPY), Warn),
            ("6.12.95+deb12-cloud-amd64", None, Warn),
            ("6.1.0-28-amd64", None, Fail),
            ("5.15.0-130-generic", None, Fail),
            // A vendor's backport: what the driver says counts.
            ("5.14.0-503.el9.x86_64", Some(USER_COPY), Warn),
            ("", None, Warn),
            ("weird", None, Warn),
        ] {
            assert_eq!(kernel(release, features).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn missing_driver_is_told_with_its_remedy() {
        let dep = "kernel/drivers/block/ublk_drv.ko.xz:\nkernel/drivers/block/zram/zram.ko.xz: kernel/lib/lz4.ko.xz\n";
        let advice = |name: &str, files: &[(&str, &str)]| {
            let check = driver(&Samples::new(name, files).0, "6.12.95");
            assert_eq!(check.verdict, Fail, "{check}");
            assert!(check.found.contains("ublk driver"), "{check}");
            check.advice.unwrap()
        };
        assert!(advice("unloaded", &[("lib/modules/6.12.95/modules.dep", dep)]).contains("modprobe ublk_drv"));
        assert!(advice("other", &[("lib/modules/6.1.0/modules.dep", dep)]).contains("CONFIG_BLK_DEV_UBLK"));
        assert!(advice("nodeless", &[("sys/module/ublk_drv/refcnt", "0")]).contains("devtmpfs"));
        let there = Samples::new("there", &[("dev/ublk-control", "")]);
        assert_eq!(driver(&there.0, "6.12.95").verdict, Ok);
    }

    #[test]
    fn modules_are_found_by_whole_name() {
        assert!(has_module("kernel/drivers/block/ublk_drv.ko: x.ko\n", "ublk_drv"));
        assert!(!has_module("a/xublk_drv.ko:\na/ublk_drv2.ko:\na/b.ko: a/ublk_drv.ko\n", "ublk_drv"));
    }

    #[test]
    fn only_lacking_user_copy_fails() {
        let verdicts = |bits| features(bits).iter().map(|check| check.verdict).collect::<Vec<Verdict>>();
        assert_eq!(verdicts(Some(u64::MAX)), [Ok; 4]);
        assert_eq!(verdicts(Some(USER_COPY)), [Ok, Warn, Warn, Warn]);
        assert_eq!(verdicts(Some(!USER_COPY)), [Fail, Ok, Ok, Ok]);
        assert_eq!(verdicts(None), [Fail]);
    }

    #[test]
    fn older_drivers_are_warned_of_a_death() {
        let quiesce = u64::from(sys::UBLK_F_QUIESCE);
        for (release, features, verdict) in [
            ("6.12.95+deb12-cloud-amd64", USER_COPY, Warn),
            ("6.14.11", USER_COPY, Warn),
            ("6.15.0", USER_COPY, Ok),
            ("7.3.4", USER_COPY | quiesce, Ok),
            ("5.14.0-503.el9.x86_64", USER_COPY | quiesce, Ok),
            ("", USER_COPY, Warn),
        ] {
            assert_eq!(death(release, features).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn zswap_is_on_or_off() {
        assert_eq!([zswap(None), zswap(Some("N")), zswap(Some("Y"))].map(|check| check.verdict), [Ok, Ok, Warn]);
    }

    #[test]
    fn zram_is_told_with_its_place() {
        let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        let packed = "/dev/zram0                              partition\t1048572\t\t0\t\t100\n";
        let ghost = "/dev/ublkb0                             partition\t17179869180\t12345\t\t-2\n";
        let file = "/swap\\040file                           file\t\t524284\t\t0\t\t-3\n";
        let told = |rest: &str| {
            let check = zram(&format!("{head}{rest}"));
            assert_eq!(check.verdict, Warn);
            let advice = check.advice.unwrap();
            assert!(advice.starts_with("swapoff /dev/zram0"), "{advice}");
            assert_eq!(advice.contains("above 100"), !check.found.contains("behind"), "{advice}");
            check.found
        };
        assert_eq!(zram("").verdict, Ok);
        assert_eq!(zram(&format!("{head}{ghost}{file}")).verdict, Ok);
        assert!(told(packed).contains("before a device added without"), "{}", told(packed));
        let both = format!("{ghost}{packed}{file}");
        assert_eq!(told(&both), "/dev/zram0 of priority 100 sits in front of /dev/ublkb0 of -2");
        assert!(told(&both.replace("-2\n", "200\n")).contains("sits behind /dev/ublkb0 of 200"));
        assert!(told(&both.replace("-2\n", "100\n")).contains("takes turns"));
    }

    #[test]
    fn schedulers_of_live_devices_only() {
        let files = [
            ("sys/block/ublkb0/queue/scheduler", "[none] mq-deadline \n"),
            ("sys/block/ublkb2/queue/scheduler", "none [mq-deadline]\n"),
        ];
        let samples = Samples::new("schedulers", &files);
        let found: Vec<_> = schedulers(&samples.0, &[0, 1, 2]).into_iter().map(|c| (c.verdict, c.found)).collect();
        assert_eq!(found[0], (Ok, "none on ublkb0".into()));
        assert!(found[1].0 == Warn && found[1].1.starts_with("mq-deadline on ublkb2"), "{found:?}");
        assert_eq!(found.len(), 2);
        assert_eq!(schedulers(&samples.0, &[1]), [Check::ok("scheduler", "no device is live")]);
        assert_eq!(scheduler(0, "none").verdict, Ok);
    }

    #[test]
    fn settings_are_judged() {
        assert_eq!(["0", "3", ""].map(|text| page_cluster(text).verdict), [Ok, Warn, Warn]);
        assert!(page_cluster("3").found.contains("up to 8"));
        assert_eq!(["10", "60", "200", ""].map(|text| swappiness(text).verdict), [Warn, Ok, Ok, Warn]);
    }

    #[test]
    fn hibernation_needs_a_way_and_a_place() {
        let told = "BOOT_IMAGE=/vmlinuz root=/dev/sda1 resume=UUID=1-2 quiet";
        for (state, resume, cmdline, verdict) in [
            ("freeze mem disk", "0:0", "quiet", Ok),
            ("freeze mem disk", "259:3", "quiet", Warn),
            ("freeze mem disk", "0:0", told, Warn),
            ("freeze mem", "259:3", told, Ok),
            ("freeze mem disk", "0:0", "nohibernate resume=/dev/sda2", Ok),
            ("", "", "", Ok),
        ] {
            assert_eq!(hibernation(state, resume, cmdline).verdict, verdict, "{state} {resume} {cmdline}");
        }
    }
}
