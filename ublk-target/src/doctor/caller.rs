//! Checks of the process that would become the daemon: what it may do and what holds it back.

use super::{Check, Machine};
use ghostswap::config::format_size;

/// Numbers from linux/capability.h.
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_NICE: u32 = 23;
const CAP_SYS_RESOURCE: u32 = 24;

/// The limits that a daemon inherits from its cgroup and every ancestor.
const CGROUP_LIMITS: [&str; 3] = ["memory.max", "memory.high", "memory.swap.max"];

/// The effective capabilities of /proc/self/status, a bit each.
pub fn effective_caps(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

fn holds(caps: u64, cap: u32) -> bool {
    caps >> cap & 1 == 1
}

pub fn capabilities(caps: Option<u64>) -> Check {
    const NAME: &str = "capabilities";
    let Some(caps) = caps else {
        return Check::warn(NAME, "not known: no CapEff in /proc/self/status", "mount /proc");
    };
    let wanted = [
        ("CAP_SYS_ADMIN", CAP_SYS_ADMIN, true),
        ("CAP_SYS_RESOURCE", CAP_SYS_RESOURCE, true),
        ("CAP_IPC_LOCK", CAP_IPC_LOCK, false),
        ("CAP_SYS_NICE", CAP_SYS_NICE, false),
    ];
    let missing: Vec<_> = wanted.iter().filter(|(_, cap, _)| !holds(caps, *cap)).collect();
    let names: Vec<_> = missing.iter().map(|(name, ..)| *name).collect();
    let found = format!("without {}", names.join(", "));
    let advice = "run it as root with these (a container may have dropped them)";
    match missing.iter().any(|(_, _, needed)| *needed) {
        _ if missing.is_empty() => Check::ok(NAME, "all four that it wants"),
        true => Check::fail(NAME, found, advice),
        false => Check::warn(NAME, found, advice),
    }
}

/// `limits` is /proc/self/limits. The daemon raises its soft limit by itself where it may.
pub fn locked_memory(limits: &str, caps: u64) -> Check {
    const NAME: &str = "locked-memory";
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let mut fields = line.unwrap_or_default().split_ascii_whitespace();
    let (soft, hard) = (fields.next().unwrap_or("not known"), fields.next().unwrap_or("not known"));
    let shown = |limit: &str| limit.parse().map_or_else(|_| limit.to_string(), format_size);
    if soft == "unlimited" || hard == "unlimited" {
        Check::ok(NAME, "unlimited")
    } else if holds(caps, CAP_SYS_RESOURCE) || holds(caps, CAP_IPC_LOCK) {
        Check::ok(NAME, format!("limit {}, which the caller's capabilities lift", shown(hard)))
    } else {
        Check::fail(
            NAME,
            format!("limit {}: the daemon could be swapped out to itself", shown(hard)),
            "run it as root, or set LimitMEMLOCK=infinity in its unit",
        )
    }
}

pub fn io_flusher(can: bool) -> Check {
    const NAME: &str = "io-flusher";
    match can {
        true => Check::ok(NAME, "a thread can become one"),
        false => Check::fail(
            NAME,
            "no thread can become one: the daemon could wait for its own device",
            "run it with CAP_SYS_RESOURCE, on Linux 5.6 or later",
        ),
    }
}

pub fn real_time(can: bool) -> Check {
    const NAME: &str = "real-time";
    match can {
        true => Check::ok(NAME, "a thread can be scheduled so"),
        false => Check::warn(
            NAME,
            "no thread can be scheduled so: when memory is short, who takes over from a dead worker waits like any other, \
             and with it the machine",
            "run it with CAP_SYS_NICE and in no container; on a kernel with RT_GROUP_SCHED from the topmost cpu cgroup",
        ),
    }
}

pub fn oom_score(can_lower: bool) -> Check {
    const NAME: &str = "oom-score";
    match can_lower {
        true => Check::ok(NAME, "can be lowered to -1000"),
        false => Check::fail(
            NAME,
            "cannot be lowered: the daemon could be killed when memory is short",
            "run it with CAP_SYS_RESOURCE, or set OOMScoreAdjust=-1000 in its unit",
        ),
    }
}

pub fn cgroup(machine: &Machine) -> Check {
    const NAME: &str = "cgroup";
    const UNSEEN: &str = "look for memory limits by hand, and add the device where there are none";
    let membership = machine.text("proc/self/cgroup").unwrap_or_default();
    if let Some(path) = memory_v1(&membership) {
        return Check::warn(NAME, format!("memory is accounted by cgroup v1, at {path}"), UNSEEN);
    }
    let Some(path) = own_v2(&membership) else { return Check::ok(NAME, "in none") };
    let mounts = machine.text("proc/self/mountinfo").unwrap_or_default();
    let dirs = match v2_mount(&mounts) {
        Some((root, mount)) => directories(path, root, mount),
        None if path == "/" => return Check::ok(NAME, "in the topmost one; cgroup2 is not mounted"),
        None => None,
    };
    let Some(dirs) = dirs else { return Check::warn(NAME, format!("{path} cannot be seen from here"), UNSEEN) };
    let limits = limits(machine, &dirs);
    if limits.is_empty() {
        return Check::ok(NAME, format!("no memory limit on {path} nor above it"));
    }
    Check::warn(
        NAME,
        format!("the daemon would inherit {}", limits.join(", ")),
        "set these to max, or add the device from a service or shell outside that cgroup",
    )
}

/// The cgroup of a v1 memory controller, by the lines `id:controllers:path` of /proc/self/cgroup.
fn memory_v1(membership: &str) -> Option<&str> {
    membership.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|c| c == "memory").then_some(path)
    })
}

fn own_v2(membership: &str) -> Option<&str> {
    membership.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Which cgroup the cgroup2 mount shows, and where, by the lines of /proc/self/mountinfo.
fn v2_mount(mountinfo: &str) -> Option<(&str, &str)> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let seen = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ").then_some(seen)
    })
}

/// The directories of a cgroup and its ancestors, its own first, as far as the mount shows them.
fn directories(path: &str, root: &str, mount: &str) -> Option<Vec<String>> {
    let below = path.strip_prefix(root.trim_end_matches('/'))?;
    if !(below.is_empty() || below.starts_with('/')) || below.split('/').any(|part| part == "..") {
        return None;
    }
    let mut dir = format!("{mount}{}", below.trim_end_matches('/'));
    let mut dirs = vec![dir.clone()];
    while dir.len() > mount.len() {
        dir.truncate(dir.rfind('/').unwrap_or(0));
        dirs.push(dir.clone());
    }
    Some(dirs)
}

/// Every limit that is set, with where. A missing file is no limit: the topmost cgroup has none.
fn limits(machine: &Machine, dirs: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for dir in dirs {
        for file in CGROUP_LIMITS {
            let path = format!("{dir}/{file}");
            match machine.text(path.trim_start_matches('/')) {
                Some(limit) if limit != "max" => {
                    found.push(format!("{path} of {}", limit.parse().map_or(limit, format_size)))
                }
                _ => {}
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tests::Samples;
    use super::super::Verdict;
    use super::*;

    const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     
Max open files            20000                20000                files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     ";
    const MOUNTS: &str = "24 30 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
35 25 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate";

    #[test]
    fn reads_capabilities() {
        let status = "Name:\tbash\nCapPrm:\t0000000000000000\nCapEff:\t000001fffeffffff\nCapBnd:\t000001ffffffffff\n";
        let caps = effective_caps(status);
        assert_eq!(caps, Some(0x1ff_feff_ffff));
        let check = capabilities(caps);
        assert_eq!((check.verdict, check.found.as_str()), (Verdict::Fail, "without CAP_SYS_RESOURCE"));
        assert_eq!(effective_caps("Name:\tbash\n"), None);
    }

    #[test]
    fn only_needed_capabilities_fail() {
        let all = 0x1ff_ffff_ffffu64;
        for (caps, verdict) in [
            (Some(all), Verdict::Ok),
            (Some(all & !(1 << CAP_SYS_NICE)), Verdict::Warn),
            (Some(all & !(1 << CAP_SYS_ADMIN)), Verdict::Fail),
            (Some(0), Verdict::Fail),
            (None, Verdict::Warn),
        ] {
            assert_eq!(capabilities(caps).verdict, verdict, "{caps:?}");
        }
    }

    #[test]
    fn locked_memory_needs_a_limit_lifted() {
        assert_eq!(locked_memory(LIMITS, 0).verdict, Verdict::Fail);
        assert!(locked_memory(LIMITS, 0).found.contains("8.0 MiB"), "{}", locked_memory(LIMITS, 0));
        assert_eq!(locked_memory(LIMITS, 1 << CAP_IPC_LOCK).verdict, Verdict::Ok);
        let raised = LIMITS.replace("8388608              bytes", "unlimited            bytes");
        assert_eq!(locked_memory(&raised, 0), Check::ok("locked-memory", "unlimited"));
        assert_eq!(locked_memory("", 0).verdict, Verdict::Fail);
    }

    #[test]
    fn finds_limits_of_all_ancestors() {
        let files = [
            ("proc/self/cgroup", "0::/user.slice/user-1000.slice/user@1000.service\n"),
            ("proc/self/mountinfo", MOUNTS),
            ("sys/fs/cgroup/user.slice/memory.high", "max\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/memory.max", "max\n"),
            ("sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/memory.swap.max", "0\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "4096\n"),
        ];
        let check = cgroup(&Samples::new("cgroup", &files).0);
        assert_eq!(check.verdict, Verdict::Warn);
        assert_eq!(check.found.matches(" of ").count(), 2, "{check}");
        assert!(check.found.contains("/sys/fs/cgroup/user.slice/memory.max of 1.0 GiB"), "{check}");
        assert!(check.found.contains("user@1000.service/memory.swap.max of 0"), "{check}");
    }

    #[test]
    fn cgroups_without_limits_are_fine() {
        let files = [
            ("proc/self/cgroup", "0::/init.scope"),
            ("proc/self/mountinfo", MOUNTS),
            ("sys/fs/cgroup/x/memory.max", "1"),
        ];
        assert_eq!(cgroup(&Samples::new("cgroup-none", &files).0).verdict, Verdict::Ok);
        let unmounted = Samples::new("cgroup-unmounted", &[("proc/self/cgroup", "0::/")]);
        assert_eq!(cgroup(&unmounted.0).verdict, Verdict::Ok);
    }

    #[test]
    fn unseen_cgroups_are_said_to_be() {
        let v1 = Samples::new("cgroup-v1", &[("proc/self/cgroup", "5:devices:/\n4:memory:/batch\n0::/\n")]);
        assert!(cgroup(&v1.0).found.contains("v1, at /batch"));
        let files = [("proc/self/cgroup", "0::/../other"), ("proc/self/mountinfo", MOUNTS)];
        assert_eq!(cgroup(&Samples::new("cgroup-outside", &files).0).verdict, Verdict::Warn);
    }

    #[test]
    fn mounts_may_show_a_part() {
        assert_eq!(v2_mount(MOUNTS), Some(("/", "/sys/fs/cgroup")));
        assert_eq!(v2_mount(""), None);
        let shown = |path, root| directories(path, root, "/m").map(|dirs| dirs.join(" "));
        assert_eq!(shown("/", "/").as_deref(), Some("/m"));
        assert_eq!(shown("/a/b", "/").as_deref(), Some("/m/a/b /m/a /m"));
        assert_eq!(shown("/a/b", "/a").as_deref(), Some("/m/b /m"));
        assert_eq!(shown("/a", "/a").as_deref(), Some("/m"));
        assert_eq!(shown("/ab", "/a"), None);
        assert_eq!(shown("/a", "/b"), None);
    }
}
