//! The control socket (`--control PATH`, mode 0600): exports listed, added and removed while others are served. One
//! request and one answer for each connection, each a line of JSON:
//!
//! | request | answer |
//! |---|---|
//! | `{"cmd":"list"}` | `{"ok":true,"exports":[…]}` |
//! | `{"cmd":"add","spec":"a,size=64G"}` | `{"ok":true}`; the spec is what `--export` takes |
//! | `{"cmd":"remove","name":"a"}` | `{"ok":true}` once nothing of it is stored any more |
//! | `{"cmd":"status"}` | `{"ok":true,"version":"0.1.0","upgrades":0,…}`: what happened since the server was started; `alone`: nobody supervises |
//! | `{"cmd":"tiers"}` | `{"ok":true,"tiers":[…],"disk":{…},"disks":[…]}`: what each holds, and all below memory together |
//! | `{"cmd":"empty","empty":true}` | `{"ok":true}`: the tier below is being drained, unless what lies there does not fit elsewhere; false: it is used again; of several with `"name":"nbd"` |
//! | `{"cmd":"addtier","spec":"block:/dev/x"}`, `{"cmd":"removetier"}` | as `upgrade`; the first below all others, or with `"before":"nbd"` not; of several to remove with `"name"` |
//! | `{"cmd":"settier","spec":"ram,limit=4G"}` | `{"ok":true}` once it holds; if the store has to be opened anew for it (`codec` and others), as `upgrade` |
//! | `{"cmd":"upgrade"}` | none, if the upgrade begins: the connection ends with this worker, and the next one's status tells the rest |
//!
//! A refusal is `{"ok":false,"error":"one line"}`.

use crate::export::{ExportConfig, Exports};
use crate::listen::Listener;
use crate::supervise::Desk;
use crate::{tiers, VERSION};
use anyhow::{anyhow, bail, Context, Result};
use ghostswap::config::{format_size, with_tier, without_tier, TierConfig, TierSettings};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use socket2::Socket;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest request.
const LINE_BYTES: u64 = 16 << 10;
/// A client is cut off after that; what it asked for is done all the same.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// Removing an export drops all that it holds.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// A new program has to get ready before it is known whether there is an upgrade.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(120);
/// How often to ask how an upgrade went.
const ASK_EVERY: Duration = Duration::from_millis(10);
/// A worker of other tiers has to get ready before it is known whether they can be had.
const TIERS_PATIENCE: Duration = Duration::from_secs(180);
/// While a tier is being emptied: how often to look, to ask anew whether all will fit, to tell how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const ASK_ANEW_EVERY: Duration = Duration::from_secs(2);
const TELL_EVERY: Duration = Duration::from_secs(2);

#[derive(Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub enum Request {
    List,
    Add {
        spec: String,
    },
    Remove {
        name: String,
    },
    Status,
    Upgrade,
    Tiers,
    Empty {
        empty: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    AddTier {
        spec: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<String>,
    },
    RemoveTier {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    SetTier {
        spec: String,
    },
}

impl Request {
    /// Carried out by this process's end, or perhaps by it.
    fn ends_worker(&self) -> bool {
        matches!(
            self,
            Request::Upgrade | Request::AddTier { .. } | Request::RemoveTier { .. } | Request::SetTier { .. }
        )
    }
}

fn carry_out(exports: &Exports, desk: &Desk, request: serde_json::Result<Request>) -> Value {
    let done = match request {
        Ok(Request::Status) => {
            let mut status = desk.status();
            status["ok"] = true.into();
            status["version"] = VERSION.into();
            return status;
        }
        Ok(Request::Upgrade) => desk.upgrade().map_err(|e| format!("{e:#}")),
        Ok(Request::Tiers) => {
            let store = exports.store();
            let stats = store.stats();
            return json!({"ok": true, "tiers": store.tiers(), "disk": stats.disk, "disks": stats.disks});
        }
        Ok(Request::Empty { empty: true, name }) => {
            exports.store().empty_tier(name.as_deref()).map_err(|e| e.to_string())
        }
        Ok(Request::Empty { empty: false, name }) => {
            exports.store().drain_tier(name.as_deref(), false).map_err(|e| e.to_string())
        }
        Ok(Request::AddTier { spec, before }) => spec.parse().and_then(|tier| {
            change_tiers(desk, |tiers| with_tier(tiers, tier, before.as_deref())).map_err(|e| format!("{e:#}"))
        }),
        Ok(Request::RemoveTier { name }) => {
            match exports.one_below().filter(|_| exports.store().stats().disks.len() < 2) {
                Some(export) => Err(format!("export '{export}' has tiers=below: remove it first")),
                None => change_tiers(desk, |tiers| without_tier(tiers, name.as_deref())).map_err(|e| format!("{e:#}")),
            }
        }
        Ok(Request::SetTier { spec }) => spec.parse().and_then(|settings| change_settings(exports, desk, &settings)),
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

/// Returns only what keeps it from being done.
fn change_tiers(desk: &Desk, changed: impl FnOnce(&[TierConfig]) -> ghostswap::Result<Vec<TierConfig>>) -> Result<()> {
    desk.change_tiers(&tiers::texts(&changed(desk.tiers())?))
}

/// What the store takes as it comes is done first, when it is known that the tiers may be as they are to be.
fn change_settings(exports: &Exports, desk: &Desk, settings: &TierSettings) -> std::result::Result<(), String> {
    let (now, later) = settings.split();
    later.iter().try_for_each(|later| later.apply(desk.tiers()).map(drop)).map_err(|e| e.to_string())?;
    now.iter().try_for_each(|now| exports.store().set_tier(now)).map_err(|e| e.to_string())?;
    let Some(later) = later else { return Ok(()) };
    change_tiers(desk, |tiers| later.apply(tiers)).map_err(|e| match now {
        None => format!("the server serves on as it was: {e:#}"),
        Some(now) => format!("{now} holds, {later} does not: {e:#}"),
    })
}

fn serve_one(listener: &Listener, exports: &Arc<Exports>, desk: &Desk) -> std::io::Result<()> {
    let (client, _) = listener.socket.accept()?;
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new(Read::take(&client, LINE_BYTES)).read_line(&mut line)?;
    let request = serde_json::from_str::<Request>(&line);
    if !matches!(&request, Ok(request) if request.ends_worker()) {
        return answer(client, &carry_out(exports, desk, request));
    }
    // It takes its time, and others may come meanwhile.
    let (exports, desk) = (exports.clone(), desk.clone());
    let upgrade = move || answer(client, &carry_out(&exports, &desk, request));
    std::thread::Builder::new().name("nbd-upgrade".into()).spawn(upgrade).map(drop)
}

fn answer(mut client: Socket, answer: &Value) -> std::io::Result<()> {
    writeln!(client, "{answer}")
}

/// Asks the server that listens at `path`.
fn ask(path: &Path, request: &Request) -> Result<Value> {
    let place = || format!("no server listens at {}", path.display());
    let stream = UnixStream::connect(path).with_context(place)?;
    let answer = ask_at(stream, request, ANSWER_PATIENCE)?.context("no answer from the server")?;
    checked(answer)
}

/// None: it hung up without an answer.
fn ask_at(mut stream: UnixStream, request: &Request, patience: Duration) -> Result<Option<Value>> {
    stream.set_read_timeout(Some(patience))?;
    writeln!(stream, "{}", serde_json::to_string(request)?).context("no answer from the server")?;
    let mut line = String::new();
    match BufReader::new(stream).read_line(&mut line) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error).context("no answer from the server"),
        Ok(0) => Ok(None),
        Ok(_) => serde_json::from_str(&line).map(Some).context("no answer from the server"),
    }
}

fn checked(answer: Value) -> Result<Value> {
    match &answer["error"] {
        Value::String(why) => bail!("{why}"),
        _ => Ok(answer),
    }
}

/// Has a tier below memory added: above the one that is called so, or below all others.
pub fn add_tier(path: &Path, tier: &TierConfig, before: Option<String>) -> Result<()> {
    change_of_tiers(path, &Request::AddTier { spec: tier.to_string(), before })
        .map_err(|e| anyhow!("the server serves on as it was: {e:#}"))
}

/// Has settings of a tier changed.
pub fn set_tier(path: &Path, settings: &TierSettings) -> Result<()> {
    let request = Request::SetTier { spec: settings.to_string() };
    match settings.split() {
        (_, None) => change(path, &request),
        _ => change_of_tiers(path, &request),
    }
}

/// Has one emptied, the one that is called so or the only one, and removed. When `ended` says so, or anything comes
/// between, it is in use again.
pub fn remove_tier(path: &Path, name: Option<String>, ended: &AtomicBool) -> Result<()> {
    let emptied = |empty| Request::Empty { empty, name: name.clone() };
    let used_again = |why: anyhow::Error| {
        // Why it is not removed is what is to be told.
        let _ = ask(path, &emptied(false));
        Err(anyhow!("the tier is in use again: {why:#}"))
    };
    ask(path, &emptied(true))?;
    let (mut asked, mut told, mut first) = (Instant::now(), Instant::now(), None);
    loop {
        let answer = match ask(path, &Request::Tiers) {
            Ok(answer) => answer,
            Err(_) if asked.elapsed() < ANSWER_PATIENCE => {
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            Err(why) => return used_again(why),
        };
        let disks = answer["disks"].as_array().map_or(&[][..], Vec::as_slice);
        let by_name = name.as_ref().and_then(|name| disks.iter().find(|disk| disk["name"] == name.as_str()));
        // Of one alone that is what all of them are.
        let disk = by_name.unwrap_or(&answer["disk"]);
        let bytes = |key: &str| disk[key].as_u64().unwrap_or(0);
        let used = bytes("used_bytes");
        if used == 0 {
            break;
        }
        let all = *first.get_or_insert(used);
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            // Whoever closed the terminal does not want to know.
            let _ = writeln!(std::io::stderr(), "{} of {} left", format_size(used), format_size(all));
        }
        if ended.load(Ordering::Relaxed) {
            return used_again(anyhow!("stopped with {} in it", format_size(used)));
        }
        if used <= bytes("unreadable_bytes") {
            return used_again(anyhow!("{} cannot be read", format_size(used)));
        }
        if asked.elapsed() >= ASK_ANEW_EVERY {
            asked = Instant::now();
            if let Err(why) = ask(path, &emptied(true)) {
                return used_again(why);
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    change_of_tiers(path, &Request::RemoveTier { name: name.clone() }).or_else(used_again)
}

/// What tiers there are, to be printed.
pub fn list_tiers(path: &Path, as_json: bool) -> Result<String> {
    let answer = ask(path, &Request::Tiers)?;
    let tiers = answer["tiers"].as_array().cloned().unwrap_or_default();
    if as_json {
        return Ok(json!({ "tiers": tiers }).to_string());
    }
    let mut lines = vec![format!("{:<8}{:>12}{:>12}{:>12}  {:<14}WHAT", "TIER", "LIMIT", "HELD", "LIVE", "STATE")];
    for tier in tiers {
        let text = |key: &str| tier[key].as_str().unwrap_or("?").to_owned();
        let size = |key: &str| format_size(tier[key].as_u64().unwrap_or(0));
        let (limit, held, live) = (size("limit_bytes"), size("held_bytes"), size("live_bytes"));
        let (name, state, what) = (text("name"), text("state"), text("what"));
        lines.push(format!("{name:<8}{limit:>12}{held:>12}{live:>12}  {state:<14}{what}"));
    }
    Ok(lines.join("\n"))
}

/// Asks for a change of tiers, and waits until it is done.
fn change_of_tiers(path: &Path, request: &Request) -> Result<()> {
    let changes = |status: &Value| status["tier_changes"].as_u64().unwrap_or(0);
    let before = ask(path, &Request::Status)?;
    let stream = UnixStream::connect(path).with_context(|| format!("no server listens at {}", path.display()))?;
    if let Some(answer) = ask_at(stream, request, TIERS_PATIENCE)? {
        checked(answer)?;
    }
    let begun = Instant::now();
    while begun.elapsed() < ANSWER_PATIENCE {
        // Nobody may be there yet, or somebody who ends.
        let now = UnixStream::connect(path).map_err(Into::into);
        match now.and_then(|stream| ask_at(stream, &Request::Status, ANSWER_PATIENCE)) {
            Ok(Some(now)) if changes(&now) > changes(&before) => return Ok(()),
            Ok(Some(now)) if now["tier_error"].is_string() => bail!("{}", now["tier_error"].as_str().unwrap_or("?")),
            Ok(Some(now)) if now["alone"] == true => {
                bail!("the supervisor died meanwhile; a worker serves without one")
            }
            // One that is so new that it does not know how it came about.
            _ => std::thread::sleep(ASK_EVERY),
        }
    }
    bail!("no news of the change after {ANSWER_PATIENCE:?}; the server's log tells more")
}

/// Has an export added or removed.
pub fn change(path: &Path, request: &Request) -> Result<()> {
    ask(path, request).map(drop)
}

/// Has the server replaced by the program that lies at its path; how that went, to be printed.
pub fn upgrade(path: &Path) -> Result<String> {
    let upgrades = |status: &Value| status["upgrades"].as_u64().unwrap_or(0);
    let before = ask(path, &Request::Status)?;
    let stream = UnixStream::connect(path).with_context(|| format!("no server listens at {}", path.display()))?;
    if let Some(answer) = ask_at(stream, &Request::Upgrade, UPGRADE_PATIENCE)? {
        checked(answer)?;
    }
    let begun = Instant::now();
    while begun.elapsed() < ANSWER_PATIENCE {
        // Nobody may be there yet, or somebody who ends.
        let now = UnixStream::connect(path).map_err(Into::into);
        match now.and_then(|stream| ask_at(stream, &Request::Status, ANSWER_PATIENCE)) {
            Ok(Some(now)) if upgrades(&now) > upgrades(&before) => {
                let version = |status: &Value| status["version"].as_str().unwrap_or("?").to_owned();
                let ms = now["last_take_over_us"].as_u64().unwrap_or(0) as f64 / 1000.0;
                return Ok(format!("{} replaced by {} within {ms:.1} ms", version(&before), version(&now)));
            }
            Ok(Some(now)) if now["upgrade_error"].is_string() => {
                bail!("not upgraded, the old program serves: {}", now["upgrade_error"].as_str().unwrap_or("?"))
            }
            Ok(Some(now)) if now["alone"] == true => {
                bail!("the supervisor died meanwhile; a worker serves without one")
            }
            Ok(Some(now)) if now["upgrades"].is_u64() => bail!("not upgraded: the worker that was asked died first"),
            // One that is so new that it does not know how it came about.
            _ => std::thread::sleep(ASK_EVERY),
        }
    }
    bail!("no news of the upgrade after {ANSWER_PATIENCE:?}; the server's log tells more")
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
            export["tiers"].as_str().filter(|tiers| *tiers != "all").map(|tiers| format!("tiers={tiers}")),
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
pub fn serve(listener: &Listener, exports: &Arc<Exports>, desk: &Desk) {
    loop {
        // A client that hangs up early has its reasons; one that cannot be accepted must not have us spin.
        if serve_one(listener, exports, desk).is_err() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
