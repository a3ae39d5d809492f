//! Whether a device could hear of freed swap slots here, and which way `--slot-free=auto` would take.

use super::Check;

/// Numbers from linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// `function` is what the kernel's BTF has to hook, or why nothing; `lockdown` the text of
/// /sys/kernel/security/lockdown, empty where there is none. The kernel itself is not asked to load
/// anything: it may refuse for reasons of its own.
pub fn slot_free(function: Result<&str, &str>, lockdown: &str, caps: u64, kprobes: bool) -> Check {
    const NAME: &str = "slot-free";
    let discards =
        |why: &str, advice: &str| Check::warn(NAME, format!("discards only, so dead pages stay longer: {why}"), advice);
    let holds = |cap: u32| caps >> cap & 1 == 1;
    let function = match function {
        Ok(function) => function,
        Err(why) => return discards(why, "boot a kernel with BTF (Debian's 6.12 and 7.3 were tried)"),
    };
    if lockdown.contains("[confidentiality]") {
        return discards("this kernel is locked down", "lockdown=integrity leaves BPF its eyes");
    }
    let may = holds(CAP_SYS_ADMIN) || holds(CAP_BPF) && holds(CAP_PERFMON);
    if !may {
        return discards("without CAP_BPF and CAP_PERFMON", "run it as root with these");
    }
    let fallback = if kprobes { "kprobe" } else { "discard" };
    Check::ok(NAME, format!("bpf on {function}; should the kernel refuse it: {fallback}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    const ROOT: u64 = u64::MAX;
    const NONE: &str = "[none] integrity confidentiality";

    #[test]
    fn tells_what_auto_would_take() {
        let check = slot_free(Ok("f"), NONE, ROOT, true);
        assert_eq!(
            (check.verdict, check.found.as_str()),
            (Verdict::Ok, "bpf on f; should the kernel refuse it: kprobe")
        );
        let check = slot_free(Ok("f"), "", 1 << CAP_BPF | 1 << CAP_PERFMON, false);
        assert_eq!(check.found, "bpf on f; should the kernel refuse it: discard");
    }

    #[test]
    fn warns_where_there_is_none() {
        let locked = "none integrity [confidentiality]";
        for check in [
            slot_free(Err("this kernel describes no types"), NONE, ROOT, true),
            slot_free(Ok("f"), locked, ROOT, true),
            slot_free(Ok("f"), NONE, 1 << CAP_BPF, true),
        ] {
            assert_eq!(check.verdict, Verdict::Warn, "{check}");
            assert!(check.found.starts_with("discards only"), "{check}");
        }
    }
}
