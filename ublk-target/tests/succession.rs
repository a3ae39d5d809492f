//! A program that cannot go on where another left off: it calls that one back, and says why.
//!
//! The old program is a script here, open as descriptor 0, and there is nothing to go on with. What the
//! real ones do with a device is `scripts/vm/guest/succession.sh`.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

/// What the script prints when the program is called with this letter.
fn called_back_with(letter: &str) -> std::io::Result<String> {
    let script = std::env::temp_dir().join(format!("ghostswap-old-program-{}-{}", std::process::id(), letter.len()));
    std::fs::write(&script, "#!/bin/sh\necho \"$* / $GHOSTSWAP_HANDOVER_RETURNED / $GHOSTSWAP_HANDOVER\"\n")?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    let output = Command::new(env!("CARGO_BIN_EXE_ghostswap-ublk"))
        .args(["add", "--size", "1G"])
        .env("GHOSTSWAP_HANDOVER", letter)
        .stdin(Stdio::from(File::open(&script)?))
        .output()?;
    std::fs::remove_file(&script)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_letter_of_an_unknown_version_is_given_back() {
    let letter = r#"{"version":999,"program":0}"#;
    let said = called_back_with(letter).unwrap();
    assert_eq!(said, format!("add --size 1G / version 999 is unknown to the program that was called / {letter}\n"));
}

#[test]
fn a_letter_that_cannot_be_gone_on_with_is_given_back() {
    let formats = Command::new(env!("CARGO_BIN_EXE_ghostswap-ublk")).arg("formats").output().unwrap();
    let formats: serde_json::Value = serde_json::from_slice(&formats.stdout).unwrap();
    // Descriptors that are not open.
    let letter = serde_json::json!({
        "version": formats["handover_version"], "occasion": "Upgrade", "program": 0, "arena": 990,
        "board": [991, 992, 993, 994, 995], "feed": null, "worker": [1, 996], "standbys": [], "agent": null,
        "device": [3, "/dev/ublkb3"], "recoverable": true,
    });
    let said = called_back_with(&letter.to_string()).unwrap();
    let mut parts = said.trim_end().splitn(3, " / ");
    assert_eq!(parts.next(), Some("add --size 1G"));
    assert!(parts.next().is_some_and(|why| !why.is_empty()), "{said}");
    let back: serde_json::Value = serde_json::from_str(parts.next().unwrap()).unwrap();
    assert_eq!(back, letter, "it comes back as it was");
}
