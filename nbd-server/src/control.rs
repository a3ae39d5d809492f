//! The control socket (`--control PATH`, mode 0600): exports listed, added and removed while others are served. One
//! request and one answer for each connection, each a line of JSON:
//!
//! | request | answer |
//! |---|---|
//! | `{"cmd":"list"}` | `{"ok":true,"exports":[…]}` |
//! | `{"cmd":"add","spec":"a,size=64G"}` | `{"ok":true}`; the spec is what `--export` takes |
//! | `{"cmd":"remove","name":"a"}` | `{"ok":true}` once nothing of it is stored any more |
//!
//! A refusal is `{"ok":false,"error":"one line"}`.

use crate::export::{ExportConfig, Exports};
use crate::listen::Listener;
use anyhow::{bail, Context, Result};
use ghostswap::config::format_size;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longest request.
const LINE_BYTES: u64 = 16 << 10;
/// A client is cut off after that; what it asked for is done all the same.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// Removing an export drops all that it holds.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub enum Request {
    List,
    Add { spec: String },
    Remove { name: String },
}

fn carry_out(exports: &Exports, line: &str) -> Value {
    let done = match serde_json::from_str(line) {
        Ok(Request::List) => return json!({"ok": true, "exports": exports.describe()}),
        Ok(Request::Add { spec }) => {
            spec.parse::<ExportConfig>().and_then(|config| exports.add(&config).map_err(|e| e.to_string()))
        }
        Ok(Request::Remove { name }) => exports.remove(&name),
        Err(e) => Err(format!("bad request: {e}")),
    };
    match done {
        Ok(()) => json!({"ok": true}),
        Err(why) => json!({"ok": false, "error": why}),
    }
}

fn serve_one(listener: &Listener, exports: &Exports) -> std::io::Result<()> {
    let (mut client, _) = listener.socket.accept()?;
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new(Read::take(&client, LINE_BYTES)).read_line(&mut line)?;
    writeln!(client, "{}", carry_out(exports, &line))
}

/// Asks the server that listens at `path`.
fn ask(path: &Path, request: &Request) -> Result<Value> {
    let place = || format!("no server listens at {}", path.display());
    let mut stream = UnixStream::connect(path).with_context(place)?;
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    writeln!(stream, "{}", serde_json::to_string(request)?).context("no answer from the server")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("no answer from the server")?;
    let answer: Value = serde_json::from_str(&line).context("no answer from the server")?;
    match &answer["error"] {
        Value::String(why) => bail!("{why}"),
        _ => Ok(answer),
    }
}

/// Has an export added or removed.
pub fn change(path: &Path, request: &Request) -> Result<()> {
    ask(path, request).map(drop)
}

/// What there is, to be printed.
pub fn list(path: &Path, as_json: bool) -> Result<String> {
    let answer = ask(path, &Request::List)?;
    let exports = answer["exports"].as_array().cloned().unwrap_or_default();
    if as_json {
        return Ok(json!({ "exports": exports }).to_string());
    }
    let mut lines = vec![format!("{:<24}{:>12}{:>12}{:>13}  OPTIONS", "EXPORT", "SIZE", "HELD", "CONNECTIONS")];
    for export in exports {
        let clients: Vec<&str> = export["clients"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let options = [
            (export["read_only"] == true).then(|| "ro".to_owned()),
            export["quota_bytes"].as_u64().map(|quota| format!("quota={}", format_size(quota))),
            (!clients.is_empty()).then(|| format!("client={}", clients.join(":"))),
            export["linger_seconds"].as_u64().map(|seconds| format!("linger={seconds}s")),
        ];
        let options: Vec<String> = options.into_iter().flatten().collect();
        lines.push(format!(
            "{:<24}{:>12}{:>12}{:>13}  {}",
            // A client may have chosen it.
            export["name"].as_str().unwrap_or("?").escape_debug().to_string(),
            format_size(export["size_bytes"].as_u64().unwrap_or(0)),
            export["held_bytes"].as_u64().map_or_else(|| "-".into(), format_size),
            export["connections"].as_u64().map_or_else(|| "-".into(), |n| n.to_string()),
            options.join(",")
        ));
    }
    Ok(lines.join("\n"))
}

/// Serves clients for as long as the process lives.
pub fn serve(listener: &Listener, exports: &Exports) {
    loop {
        // A client that hangs up early has its reasons; one that cannot be accepted must not have us spin.
        if serve_one(listener, exports).is_err() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
