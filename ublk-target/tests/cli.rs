//! The command line as users meet it: exit codes and messages that need no ublk driver.

use std::process::{Command, Output};

fn ghostswap(args: &[&str]) -> Output {
    let dir = std::env::temp_dir().join(format!("ghostswap-cli-{}", std::process::id()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ghostswap-ublk"));
    command.args(args).env("GHOSTSWAP_RUN_DIR", dir).output().expect("the binary runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn has_driver() -> bool {
    std::path::Path::new("/dev/ublk-control").exists()
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &["add", "--size", "0"][..],
        &["add", "--size", "17T"],
        &["add", "--size", "4097"],
        &["add", "--size", "lots"],
        &["add", "--tier", "tape"],
        &["add", "--tier", "ram,limit=0%"],
        &["add", "--tier", "ram,codec=gzip"],
        &["add", "--queues", "0"],
        &["add", "--depth", "0"],
        &["del"],
        &["del", "x"],
        &["stop"],
        &["add", "--or-upgrade"],
        &["doctor", "0"],
        &["tier"],
        &["tier", "list"],
        &["tier", "set", "0", "disk,limit=1G"],
        &["tier", "set", "0", "ram,codec=gzip"],
        &["tier", "set", "0", "ram", "idle=5m"],
        &["tier", "set", "0", "disk", "size=1G"],
        &["tier", "set", "0", "ram"],
        &["writeback", "0", "--idle", "ever"],
        &["frob"],
        &[],
    ] {
        let output = ghostswap(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn bad_values_are_explained() {
    for (args, says) in [
        (["add", "--size", "17T"], "at most 16T"),
        (["add", "--size", "4097"], "multiple of 4096"),
        (["add", "--tier", "tape"], "unknown tier 'tape'"),
    ] {
        let said = stderr(&ghostswap(&args));
        assert!(said.contains(says), "{args:?}: {said}");
    }
}

#[test]
fn missing_driver_is_one_line() {
    if has_driver() {
        return;
    }
    for args in [&["add"][..], &["add", "--foreground"]] {
        let output = ghostswap(args);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(said.contains("modprobe ublk_drv"), "{args:?}: {said}");
    }
}

#[test]
fn unknown_device_is_one_line() {
    for args in [
        &["del", "987654"][..],
        &["del", "987654", "--force"],
        &["stop", "987654"],
        &["status", "987654"],
        &["writeback", "987654"],
        &["tier", "list", "987654"],
        &["tier", "set", "987654", "ram,limit=1G"],
        &["tier", "drain", "987654"],
    ] {
        let output = ghostswap(args);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(said.contains("no such device"), "{args:?}: {said}");
    }
}

#[test]
fn without_devices_lists_are_empty() {
    let list = ghostswap(&["list"]);
    assert_eq!((list.status.code(), list.stdout.len()), (Some(0), 0));
    let status = ghostswap(&["status", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(json, serde_json::json!({ "devices": [] }));
}

#[test]
fn doctor_names_the_missing_driver_once() {
    if has_driver() {
        return;
    }
    let output = ghostswap(&["doctor"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    let report = String::from_utf8_lossy(&output.stdout);
    let naming = report.lines().filter(|line| line.starts_with("fail  ") && line.contains("ublk driver")).count();
    assert_eq!(naming, 1, "{report}");
}

#[test]
fn doctor_prints_json_that_agrees_with_its_exit_code() {
    let output = ghostswap(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = json["checks"].as_array().expect("checks");
    assert!(checks.len() > 10, "{json}");
    for check in checks {
        let verdict = check["verdict"].as_str().expect("verdict");
        assert!(["ok", "warn", "fail"].contains(&verdict), "{check}");
        assert!(check["name"].is_string() && check["found"].is_string(), "{check}");
        assert_eq!(check["advice"].is_null(), verdict == "ok", "{check}");
    }
    let failed = checks.iter().any(|check| check["verdict"] == "fail");
    assert_eq!(output.status.code(), Some(i32::from(failed)));
}
