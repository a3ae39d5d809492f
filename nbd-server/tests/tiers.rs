//! A tier below memory that is added and removed while clients write and read, through workers' deaths, an upgrade and
//! what cannot be one.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{kill, Raw, Server};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// More than memory holds, and half of that.
const PAGES: u64 = 7000;
const KEPT: u64 = 2500;
/// Of adding and removing a tier; as many as `GHOSTSWAP_TIER_CYCLES` says, if it does.
const CYCLES: u64 = 6;
const SETTINGS: u64 = 20;

fn noise(page: u64, version: u64) -> Vec<u8> {
    let mut state = page << 20 | version << 1 | 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state ^ state >> 29).to_le_bytes()
    });
    words.collect()
}

struct Tiered {
    server: Server,
    control: String,
}

impl Tiered {
    fn start(name: &str) -> Tiered {
        let directory = Server::directory(name);
        std::fs::create_dir_all(&directory).unwrap();
        let control = directory.join("control").display().to_string();
        let arguments = ["--export", "a,size=64M", "--export", "b,size=64M", "--tier", "ram,limit=24M,codec=lz4"];
        let server = Server::start(name, &[&["--control", &control], &arguments[..]].concat());
        Tiered { server, control }
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_ghostswap-nbd");
        Command::new(program).args(arguments).args(["--control", &self.control]).output().unwrap()
    }

    fn does(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refuses(&self, code: i32, arguments: &[&str], why: &str) {
        let output = self.ask(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && said.contains(why), "{why}: {output:?}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }

    /// Of the tier below; None: there is none.
    fn live_below(&self) -> Option<u64> {
        let all: serde_json::Value = serde_json::from_str(&self.does(&["tier", "list", "--json"])).unwrap();
        let disk = all["tiers"].as_array().unwrap().iter().find(|tier| tier["name"] == "disk");
        disk.map(|tier| tier["live_bytes"].as_u64().unwrap())
    }

    fn client(&self) -> Raw {
        self.server.try_enter(b"a").unwrap_or_else(|| self.server.enter_when_a_lane_is_free())
    }

    fn compare(&self, pages: u64, version: u64) {
        let mut client = self.server.connect();
        client.enter(b"a");
        (0..pages).for_each(|page| assert!(client.read_page(page) == noise(page, version), "page {page}"));
    }
}

/// Writes and reads again on the other export until told to stop, and connects again when it must.
fn load(server: &Server, stop: &AtomicBool) {
    let (mut versions, mut turn) = (vec![0u64; 300], 0);
    let mut client: Option<Raw> = None;
    let mut since = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let page = turn * 7 % versions.len();
        let (offset, next) = (page as u64 * PAGE, versions[page] + 1);
        let done = client.as_mut().map(|client| -> std::io::Result<()> {
            if turn % 2 == 0 {
                assert_eq!(client.try_request(1, offset, PAGE as u32, &noise(page as u64, next))?, 0);
                versions[page] = next;
                return Ok(());
            }
            assert_eq!(client.try_request(0, offset, PAGE as u32, b"")?, 0);
            let mut got = vec![0; PAGE as usize];
            client.0.read_exact(&mut got)?;
            // One in flight when the connection broke may have been done.
            if got == noise(page as u64, next) {
                versions[page] = next;
            }
            let is = versions[page] == 0 && got.iter().all(|byte| *byte == 0);
            assert!(is || got == noise(page as u64, versions[page]), "page {page}, version {}", versions[page]);
            Ok(())
        });
        match done {
            Some(Ok(())) => since = Instant::now(),
            Some(Err(_)) | None => client = server.try_enter(b"b"),
        }
        assert!(since.elapsed() < Duration::from_secs(30), "nobody serves");
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Ends the load, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_tier_comes_and_goes_under_load() {
    let cycles = std::env::var("GHOSTSWAP_TIER_CYCLES").map_or(CYCLES, |n| n.parse().unwrap());
    let tiered = Tiered::start("tiers");
    let disk = |n: u64| format!("file:{}/cold{},size=64M,prealloc=off", tiered.server.directory.display(), n % 2);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| load(&tiered.server, &stop));
        let stopping = Stop(&stop);
        for n in 0..cycles {
            tiered.does(&["tier", "add", &disk(n)]);
            assert_eq!(tiered.live_below(), Some(0));
            tiered.refuses(1, &["tier", "add", &disk(n)], "two tiers");
            let mut client = tiered.client();
            (0..PAGES).for_each(|page| client.write_page(page, &noise(page, n)));
            assert!(tiered.live_below().unwrap() > 2 << 20, "{:?}", tiered.live_below());
            tiered.refuses(1, &["tier", "remove"], "does not fit");
            match n % CYCLES {
                1 => {
                    let worker = tiered.server.worker();
                    kill("KILL", worker);
                    tiered.server.next_worker(worker);
                }
                2 => drop(tiered.does(&["upgrade"])),
                _ => {}
            }
            assert!(tiered.live_below().is_some(), "cycle {n}");
            tiered.compare(PAGES, n);
            let mut client = tiered.client();
            client.request(0, 4, KEPT * PAGE, ((PAGES - KEPT) * PAGE) as u32, b"");
            assert_eq!(client.errno(), 0);
            drop(client);
            if n % CYCLES == 3 {
                // In the middle of it, as it may be.
                let removing = scope.spawn(|| tiered.ask(&["tier", "remove"]));
                std::thread::sleep(Duration::from_millis(300));
                let worker = tiered.server.worker();
                kill("KILL", worker);
                tiered.server.next_worker(worker);
                drop(removing.join().unwrap());
            }
            if tiered.live_below().is_some() {
                // What was trimmed is free a moment later.
                let begun = Instant::now();
                while !tiered.ask(&["tier", "remove"]).status.success() {
                    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", tiered.ask(&["tier", "remove"]));
                }
            }
            assert_eq!(tiered.live_below(), None, "cycle {n}");
            tiered.compare(KEPT, n);
        }
        drop(stopping);
        loading.join().unwrap();
    });
    tiered.server.end();
}

/// One is added above another that is full, and takes over from it what memory has no room for.
#[test]
fn several_tiers_come_and_go_by_their_names() {
    let tiered = Tiered::start("several");
    let file =
        |name: &str| format!("file:{}/{name},size=64M,prealloc=off,name={name}", tiered.server.directory.display());
    let names = || -> Vec<String> {
        let all: serde_json::Value = serde_json::from_str(&tiered.does(&["tier", "list", "--json"])).unwrap();
        all["tiers"].as_array().unwrap().iter().map(|tier| tier["name"].as_str().unwrap().to_owned()).collect()
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| load(&tiered.server, &stop));
        let stopping = Stop(&stop);
        tiered.does(&["tier", "add", &file("first")]);
        let mut client = tiered.client();
        (0..PAGES).for_each(|page| client.write_page(page, &noise(page, 1)));
        drop(client);
        tiered.refuses(1, &["tier", "add", &file("above"), "--before", "nbd"], "no tier called nbd");
        tiered.does(&["tier", "add", &file("above"), "--before", "first"]);
        assert_eq!(names(), ["ram", "above", "first"]);
        tiered.compare(PAGES, 1);
        tiered.refuses(1, &["tier", "remove"], "say which");
        tiered.refuses(1, &["tier", "set", "first,timeout=5s"], "of a file tier");
        tiered.does(&["tier", "remove", "first"]);
        assert_eq!(names(), ["ram", "above"]);
        let worker = tiered.server.worker();
        kill("KILL", worker);
        tiered.server.next_worker(worker);
        tiered.compare(PAGES, 1);
        tiered.refuses(1, &["tier", "remove", "above"], "does not fit");
        tiered.does(&["tier", "add", &file("first")]);
        drop(tiered.does(&["upgrade"]));
        assert_eq!(names(), ["ram", "above", "first"]);
        tiered.does(&["tier", "remove", "above"]);
        assert_eq!(names(), ["ram", "first"]);
        tiered.compare(PAGES, 1);
        drop(stopping);
        loading.join().unwrap();
    });
    tiered.server.end();
}

#[test]
fn settings_change_under_load_and_hold() {
    let tiered = Tiered::start("settings");
    let second = format!("file:{}/cold,size=64M,prealloc=off", tiered.server.directory.display());
    tiered.does(&["tier", "add", &second]);
    let what = |name: &str| {
        let all: serde_json::Value = serde_json::from_str(&tiered.does(&["tier", "list", "--json"])).unwrap();
        let tier = all["tiers"].as_array().unwrap().iter().find(|tier| tier["name"] == name).cloned().unwrap();
        (tier["limit_bytes"].as_u64().unwrap() >> 20, tier["what"].as_str().unwrap().to_owned())
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| load(&tiered.server, &stop));
        let stopping = Stop(&stop);
        let mut client = tiered.client();
        (0..PAGES).for_each(|page| client.write_page(page, &noise(page, 0)));
        drop(client);
        // In place: who is connected stays so.
        let worker = tiered.server.worker();
        tiered.does(&["tier", "set", "ram,limit=20M"]);
        tiered.does(&["tier", "set", "ram", "high=60%", "low=40%"]);
        assert_eq!(tiered.server.worker(), worker);
        for n in 0..SETTINGS {
            let codec = ["zstd:1", "lz4"][n as usize % 2];
            let group = ["4", "16", "64"][n as usize % 3];
            let asked = &tiered;
            let set = move || asked.ask(&["tier", "set", "ram", &format!("codec={codec},group={group}K")]);
            if n == 4 {
                // In the middle of it, as it may be; then once more.
                let setting = scope.spawn(set);
                std::thread::sleep(Duration::from_millis(150));
                let worker = tiered.server.worker();
                kill("KILL", worker);
                tiered.server.next_worker(worker);
                drop(setting.join().unwrap());
            }
            let begun = Instant::now();
            let mut output = set();
            while n == 4 && !output.status.success() && begun.elapsed() < Duration::from_secs(30) {
                output = set();
            }
            assert!(output.status.success(), "{output:?}");
            match n {
                2 => {
                    let worker = tiered.server.worker();
                    kill("KILL", worker);
                    tiered.server.next_worker(worker);
                }
                7 => drop(tiered.does(&["upgrade"])),
                _ => {}
            }
            // On by itself where zstd compresses single pages.
            let dict = if codec.starts_with("zstd") && group == "4" { ",dict=32K" } else { "" };
            let held = (20, format!("codec={codec},group={group}K{dict},high=60%,low=40%"));
            assert_eq!(what("ram"), held, "cycle {n}");
            let mut client = tiered.client();
            (n % 5..PAGES).step_by(5).for_each(|page| client.write_page(page, &noise(page, n)));
            (n % 5..PAGES).step_by(5).for_each(|page| assert!(client.read_page(page) == noise(page, n), "page {page}"));
        }
        // Both kinds at once.
        tiered.does(&["tier", "set", "ram,limit=24M,codec=zstd:3,high=auto"]);
        assert_eq!(what("ram"), (24, "codec=zstd:3,group=16K,high=auto,low=40%".into()));
        tiered.does(&["tier", "set", "ram,low=auto"]);
        let mut client = tiered.client();
        for page in 0..PAGES {
            let last = (0..SETTINGS).rev().find(|n| page % 5 == n % 5).unwrap();
            assert!(client.read_page(page) == noise(page, last), "page {page}");
        }
        drop(client);
        let worker = tiered.server.worker();
        for (code, words, why) in [
            (2, "ram,limit=1K", "too small"),
            (2, "ram,high=95%", "from 2% to 93%"),
            (2, "ram,high=50%,low=60%", "must be below"),
            (2, "hot,limit=1G", "cannot be set of hot"),
            (2, "Hot,limit=1G", "tiers are ram, cold"),
            (1, "hot,timeout=5s", "no tier called hot"),
            (2, "ram,idle=5m", "cannot be set of ram"),
            (2, "disk,encrypt=off", "remove the tier"),
            (2, "disk,size=1G", "remove the tier"),
            (2, "ram", "what to set"),
            (1, "ram,limit=1G", "made for"),
            (1, "ram,limit=1G,codec=lz4", "made for"),
            (1, "cold,idle=5m", "no second memory tier"),
            (1, "cold,codec=zstd:5", "no second memory tier"),
            (1, "disk,timeout=5s", "of a file tier"),
        ] {
            tiered.refuses(code, &["tier", "set", words], why);
        }
        assert_eq!(tiered.server.worker(), worker);
        assert_eq!(what("ram"), (24, "codec=zstd:3,group=16K,high=auto,low=auto".into()));
        drop(stopping);
        loading.join().unwrap();
    });
    tiered.server.end();
}

#[test]
fn what_cannot_be_a_tier_is_refused_and_the_worker_serves_on() {
    let tiered = Tiered::start("tierless");
    let letter = tiered.server.directory.join("letter");
    std::fs::write(&letter, "dear all").unwrap();
    let worker = tiered.server.worker();
    let file = |path: &Path| format!("file:{},size=64M", path.display());
    tiered.refuses(1, &["tier", "add", &file(&letter)], "something else");
    tiered.refuses(1, &["tier", "add", &file(Path::new("/nowhere/cold"))], "No such file");
    tiered.refuses(2, &["tier", "add", "ram,limit=1G"], "only a tier below");
    tiered.refuses(2, &["tier", "add", "file:/x"], "wants a size");
    tiered.refuses(1, &["tier", "remove"], "no tier below");
    assert_eq!(std::fs::read(&letter).unwrap(), b"dear all");
    assert_eq!(tiered.server.worker(), worker);
    // An export that must lie below keeps the tier there.
    tiered.does(&["tier", "add", &file(&tiered.server.directory.join("cold"))]);
    tiered.does(&["exports", "add", "c,size=1M,tiers=below"]);
    tiered.refuses(1, &["tier", "remove"], "'c' has tiers=below");
    tiered.does(&["exports", "remove", "c"]);
    tiered.does(&["tier", "remove"]);
    assert_eq!(tiered.live_below(), None);
    tiered.server.end();
}
