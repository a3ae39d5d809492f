//! The control socket of a device: `/run/ghostswap/ublkN.sock`, mode 0600. One request and one
//! answer for each connection, each a line of JSON:
//!
//! | request | answer |
//! |---|---|
//! | `{"cmd":"status"}` | `{"ok":true,"device":{…,"stats":{…}},"report":"…"}` |
//! | `{"cmd":"stop","force":false}` | `{"ok":true}` once the device is going away |
//! | `{"cmd":"resize","bytes":8192}` | `{"ok":true}` once the device has that size |
//! | `{"cmd":"swapon","what":"windows"}` | `{"ok":true}` once it is swapped to; also `"whole"`, `{"window":BYTES}` |
//! | `{"cmd":"swapoff"}` | `{"ok":true}`: the daemon opens and closes no more windows |
//! | `{"cmd":"recompress"}` | `{"ok":true}`: all that is not cold yet will be compressed again |
//! | `{"cmd":"writeback","idle_s":600}` | `{"ok":true}`: what is so old goes to the disk tier; status tells when it is over |
//! | `{"cmd":"tier","what":{"drain":true}}` | `{"ok":true}`: the only disk tier is to be empty; also `"empty"`: unless it does not fit, `{"limit":"4G"}` |
//! | `{"cmd":"tier","what":{"drainone":{"name":"nbd","drain":true}}}` | the same of one of several; also `{"emptyone":{"name":"nbd"}}` |
//! | `{"cmd":"tier","what":{"set":{"spec":"ram,limit=4G,codec=lz4","order":7}}}` | `{"ok":true}` once what the worker does itself is done; of the rest the supervisor was told, and status tells |
//! | `{"cmd":"tier","what":{"add":{"spec":"block:/dev/x","order":7}}}` | `{"ok":true}` once the supervisor was told; status tells the rest; below all others, or with `"before":"nbd"` not; also `{"remove":{"order":8}}`, of several with `"name"` |
//! | `{"cmd":"upgrade","program":"/path","order":7}` | `{"ok":true}` once the supervisor was told; status tells the rest |
//!
//! A refusal is `{"ok":false,"error":"one line"}`. The agent serves it; a client that sends nothing
//! is cut off after a second.

use crate::device;
use anyhow::{anyhow, bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest request line.
const LINE_BYTES: u64 = 4096;
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);
/// Stopping a device waits for its requests.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long a device without an agent may be waiting for its next: the worker waits a while before it
/// starts a supervisor, which starts the agent.
const AGENT_PATIENCE: Duration = Duration::from_secs(10);

/// A request.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub enum Request {
    /// Describe the device and its store.
    Status,
    /// Stop and remove the device.
    Stop {
        /// Even while it is in use as swap.
        #[serde(default)]
        force: bool,
    },
    /// Make the device larger.
    Resize {
        /// Its new size in bytes.
        bytes: u64,
    },
    /// Have the kernel swap to the device.
    SwapOn {
        /// How.
        what: SwapOn,
    },
    /// Leave the device's swap areas alone from now on: they are being swapped off.
    SwapOff {},
    /// Compress again, now, all that the second tier would come to in time.
    Recompress,
    /// Move to the disk tier what was written so many seconds ago.
    WriteBack {
        /// How many.
        idle_s: u32,
    },
    /// Change a tier.
    Tier {
        /// How.
        what: TierChange,
    },
    /// Replace supervisor and worker by this program's.
    Upgrade {
        /// Its path.
        program: PathBuf,
        /// A number of the client's own: the answer may be lost with the agent that is replaced, and the
        /// same order given once more is carried out once. 0: every time.
        #[serde(default)]
        order: u64,
    },
}

/// How a device is to be swapped to.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum SwapOn {
    /// By windows that are opened and closed as needed.
    Windows,
    /// By one more window, of so many bytes.
    Window(u64),
    /// As one area.
    Whole,
}

/// What can be changed of tiers.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum TierChange {
    /// How much memory may be held, as `--tier` has it.
    Limit(String),
    /// Settings of one.
    Set {
        /// As [`ghostswap::config::TierSettings`] has it.
        spec: String,
        /// As that of an upgrade.
        order: u64,
    },
    /// Whether the only disk tier is to be empty.
    Drain(bool),
    /// It is to be empty, unless what lies there does not fit into memory.
    Empty,
    /// Whether that disk tier is to be empty.
    DrainOne {
        /// As `tier list` calls it.
        name: String,
        /// Whether.
        drain: bool,
    },
    /// It is to be empty, unless what lies there does not fit into memory and other disk tiers.
    EmptyOne {
        /// Likewise.
        name: String,
    },
    /// One more, below.
    Add {
        /// As `--tier` has it.
        spec: String,
        /// As that of an upgrade.
        order: u64,
        /// The name of the one above which it is to be. None: it is to be the last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<String>,
    },
    /// One below is to go, empty as it is.
    Remove {
        /// Likewise.
        order: u64,
        /// Its name. None: the only one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
}

/// An answer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Whether the request was carried out.
    pub ok: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The device as `status --json` prints it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Value>,
    /// The store's statistics for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<String>,
}

impl Answer {
    /// It was carried out, and that is all there is to say.
    pub fn done() -> Self {
        Answer { ok: true, ..Answer::default() }
    }

    /// As one line of JSON, without its end.
    pub fn to_line(&self) -> String {
        // Maps with string keys and plain numbers always serialise.
        serde_json::to_string(self).unwrap_or_else(|e| format!(r#"{{"ok":false,"error":"{e}"}}"#))
    }

    /// A refusal.
    pub fn refusal(error: impl Into<String>) -> Self {
        Answer { error: Some(error.into()), ..Answer::default() }
    }
}

/// Where sockets and logs are: `/run/ghostswap`, or `$GHOSTSWAP_RUN_DIR`.
pub fn run_dir() -> PathBuf {
    std::env::var_os("GHOSTSWAP_RUN_DIR").map_or_else(|| PathBuf::from("/run/ghostswap"), PathBuf::from)
}

/// The socket of a device.
pub fn socket_path(id: u32) -> PathBuf {
    run_dir().join(format!("ublk{id}.sock"))
}

/// Devices that have a socket, in order; their daemons may be dead.
pub fn known_ids() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(run_dir()) else { return Vec::new() };
    let id = |name: &str| name.strip_prefix("ublk")?.strip_suffix(".sock")?.parse().ok();
    let mut ids: Vec<u32> = entries.flatten().filter_map(|e| id(e.file_name().to_str()?)).collect();
    ids.sort_unstable();
    ids
}

/// Opens the socket of a new device. A socket that no one listens on is replaced.
pub fn listen(id: u32) -> Result<UnixListener> {
    let path = socket_path(id);
    std::fs::create_dir_all(run_dir()).with_context(|| format!("cannot make {}", run_dir().display()))?;
    if UnixStream::connect(&path).is_ok() {
        bail!("another daemon listens on {}", path.display());
    }
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Sends a request to a device's daemon. `None`: there is no daemon. An agent that is just being
/// replaced is waited for, so a request may be carried out twice: where that matters it has a number.
pub fn ask(id: u32, request: &Request) -> Result<Option<Answer>> {
    let line = format!("{}\n", serde_json::to_string(request)?);
    let began = Instant::now();
    loop {
        let answer = ask_once(id, &line);
        let gone = matches!(&answer, Ok(text) if text.as_deref().is_none_or(str::is_empty));
        if gone && device::kernel_has(id) && began.elapsed() < AGENT_PATIENCE {
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        let Some(text) = answer? else { return Ok(None) };
        let parsed = serde_json::from_str(&text).with_context(|| format!("bad answer from the daemon of ublkb{id}"));
        return parsed.map(Some);
    }
}

/// The answer's line; empty: whoever was to answer is gone.
fn ask_once(id: u32, line: &str) -> Result<Option<String>> {
    let mut stream = match UnixStream::connect(socket_path(id)) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
        Err(e) => return Err(anyhow!("cannot talk to the daemon of ublkb{id}: {e}")),
    };
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    let mut answer = String::new();
    let sent = stream.write_all(line.as_bytes()).and_then(|()| BufReader::new(stream).read_line(&mut answer));
    match sent {
        Err(e) if !matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
            Err(e).with_context(|| format!("no answer from the daemon of ublkb{id}"))
        }
        _ => Ok(Some(answer)),
    }
}

/// Serves the connection that waits, if one does.
pub fn serve_one(listener: &UnixListener, carry_out: impl FnOnce(Request) -> Answer) -> Result<()> {
    let (mut stream, _) = match listener.accept() {
        Ok(accepted) => accepted,
        Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&stream).take(LINE_BYTES)).read_line(&mut line)?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => carry_out(request),
        Err(e) => Answer::refusal(format!("bad request: {e}")),
    };
    stream.write_all(format!("{}\n", answer.to_line()).as_bytes())?;
    Ok(())
}

/// Whether the kernel swaps to the device now, by the lines of /proc/swaps.
pub fn in_use_as_swap(device: &Path) -> bool {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    lists_swap(&swaps, device)
}

/// The device itself or a partition of it.
pub fn lists_swap(swaps: &str, device: &Path) -> bool {
    let Some(device) = device.to_str() else { return false };
    swaps.lines().filter_map(|l| l.split_ascii_whitespace().next()).any(|area| {
        let rest = area.strip_prefix(device);
        rest.is_some_and(|r| r.is_empty() || (r.starts_with('p') && r[1..].bytes().all(|b| b.is_ascii_digit())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_documented() {
        assert_eq!(serde_json::from_str::<Request>(r#"{"cmd":"status"}"#).unwrap(), Request::Status);
        assert_eq!(serde_json::from_str::<Request>(r#"{"cmd":"stop"}"#).unwrap(), Request::Stop { force: false });
    }

    #[test]
    fn finds_device_and_partitions_among_swaps() {
        let swaps = "Filename Type Size\n/dev/ublkb1p2 partition 4\n/dev/ublkb3 partition 4\n";
        for (device, listed) in
            [("/dev/ublkb1", true), ("/dev/ublkb3", true), ("/dev/ublkb", false), ("/dev/ublkb2", false)]
        {
            assert_eq!(lists_swap(swaps, Path::new(device)), listed, "{device}");
        }
    }
}
