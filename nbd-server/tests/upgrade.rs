//! A server replaced by the program that lies at its path: its pages, exports, sockets and process stay. And a worker
//! that hangs.
//!
//! The other build is the one that GHOSTSWAP_NBD_NEXT names (`scripts/build-next`); without it, this one once more.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{is_running, kill, pgrep, run, write_file, Raw, Server};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const THIS: &str = env!("CARGO_BIN_EXE_ghostswap-nbd");

fn next() -> PathBuf {
    std::env::var_os("GHOSTSWAP_NBD_NEXT").map_or_else(|| THIS.into(), PathBuf::from)
}

fn content(page: u64, version: u64) -> Vec<u8> {
    let mut state = page << 20 | version << 1 | 1;
    let mut bytes = vec![version as u8; PAGE];
    bytes[..PAGE / 2].chunks_exact_mut(8).for_each(|word| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
    });
    bytes
}

/// What `install` does: another file in its place. Written by another process: a program cannot be called while one that
/// was forked from this just now has it open to be written.
fn install(program: &Path, at: &Path) {
    let beside = at.with_extension("new");
    run(Command::new("cp").args([program, &beside]));
    std::fs::rename(beside, at).unwrap();
}

fn inode(path: impl AsRef<Path>) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

fn assert_refused(output: &Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains(why), "{why}: {output:?}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// A server started from a program that can be replaced.
struct Installed {
    server: Server,
    program: PathBuf,
}

impl Installed {
    fn start(name: &str, arguments: &[&str]) -> Installed {
        let directory = Server::directory(name);
        std::fs::create_dir_all(&directory).unwrap();
        let (program, control) = (directory.join("ghostswap-nbd"), directory.join("control"));
        install(Path::new(THIS), &program);
        let arguments = [&["--control", control.to_str().unwrap()], arguments].concat();
        Installed { server: Server::start_program(&program, name, &arguments), program }
    }

    fn control(&self) -> String {
        self.server.directory.join("control").display().to_string()
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        Command::new(THIS).args(arguments).args(["--control", &self.control()]).output().unwrap()
    }

    fn does(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refuses_to_upgrade(&self, why: &str) {
        assert_refused(&self.ask(&["upgrade"]), why);
    }

    fn status(&self) -> serde_json::Value {
        let mut stream = UnixStream::connect(self.control()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        writeln!(stream, r#"{{"cmd":"status"}}"#).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn client(&self, export: &[u8]) -> Raw {
        let mut client = self.server.connect();
        client.enter(export);
        client
    }

    fn all_processes(&self) -> Vec<u32> {
        let children = pgrep(&["-P", &self.server.child.id().to_string()]);
        let children = String::from_utf8(children.stdout).unwrap();
        std::iter::once(self.server.child.id()).chain(children.lines().map(|pid| pid.parse().unwrap())).collect()
    }
}

/// Writes and reads again on an export until told to stop, and connects again when it must: all that was acknowledged
/// is there. The longest that it had to wait for an answer.
fn load(server: &Server, export: &[u8], stop: &AtomicBool) -> Duration {
    let mut versions = vec![0u64; 500];
    let mut state = 1u64;
    let (mut longest, mut since) = (Duration::ZERO, Instant::now());
    let mut client: Option<Raw> = None;
    while !stop.load(Ordering::Relaxed) {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let page = (state >> 33) as usize % versions.len();
        let offset = (page * PAGE) as u64;
        let done = client.as_mut().map(|client| -> std::io::Result<()> {
            if state >> 40 & 1 == 0 {
                let reply = client.try_request(1, offset, PAGE as u32, &content(page as u64, versions[page] + 1))?;
                assert_eq!(reply, 0);
                versions[page] += 1;
                return Ok(());
            }
            assert_eq!(client.try_request(0, offset, PAGE as u32, b"")?, 0);
            let mut got = vec![0; PAGE];
            client.0.read_exact(&mut got)?;
            let is = |version| got == if version == 0 { vec![0; PAGE] } else { content(page as u64, version) };
            // One in flight when the connection broke may have been done.
            if is(versions[page] + 1) {
                versions[page] += 1;
            }
            assert!(is(versions[page]), "page {page}, version {}", versions[page]);
            Ok(())
        });
        match done {
            Some(Ok(())) => {
                longest = longest.max(since.elapsed());
                since = Instant::now();
            }
            Some(Err(_)) | None => client = server.try_enter(export),
        }
        assert!(since.elapsed() < Duration::from_secs(30), "nobody serves");
    }
    longest
}

#[test]
fn twenty_upgrades_under_load_lose_nothing() {
    let exports = ["--export", "a,size=64M", "--export", "b,size=64M", "--tier", "ram,limit=64M"];
    let installed = Installed::start("upgrades", &exports);
    let supervisor = installed.server.child.id();
    let programs = [next(), PathBuf::from(THIS)];
    let stop = AtomicBool::new(false);
    let mut broken_for_us = Vec::new();
    let longest = std::thread::scope(|scope| {
        let loads = [b"a", b"b"].map(|export| scope.spawn(|| load(&installed.server, export, &stop)));
        for (number, program) in (1..=20).zip(programs.iter().cycle()) {
            std::thread::sleep(Duration::from_millis(number % 5 * 300));
            let worker = installed.server.worker();
            install(program, &installed.program);
            let said = installed.does(&["upgrade"]);
            assert!(said.contains(" replaced by "), "{said}");
            let status = installed.status();
            assert_eq!((&status["upgrades"], &status["upgrade_error"]), (&number.into(), &serde_json::Value::Null));
            broken_for_us.push(status["last_take_over_us"].as_u64().unwrap());
            // The same process, another program; and so is the worker's.
            assert_ne!(installed.server.worker(), worker);
            for process in [supervisor, installed.server.worker()] {
                assert_eq!(inode(format!("/proc/{process}/exe")), inode(&installed.program), "upgrade {number}");
            }
            assert_eq!(std::fs::read_to_string(format!("/proc/{supervisor}/comm")).unwrap(), "ghostswap-nbd\n");
        }
        stop.store(true, Ordering::Relaxed);
        loads.into_iter().map(|load| load.join().unwrap()).max().unwrap()
    });
    broken_for_us.sort_unstable();
    println!("nobody served for {broken_for_us:?} us; longest for a client: {longest:?}");
    installed.server.end();
}

#[test]
fn exports_of_run_time_and_quotas_survive_an_upgrade() {
    let installed = Installed::start("kept", &["--export", "a,size=1M", "--export", "gone,size=1M"]);
    installed.does(&["exports", "add", "late,size=8M,quota=64K"]);
    installed.does(&["exports", "add", "swap-*,size=8M,linger=1h"]);
    installed.does(&["exports", "remove", "gone"]);
    let mut made = installed.client(b"swap-1");
    made.write_page(3, &content(3, 1));
    installed.client(b"a").write_page(0, &content(0, 1));
    let list = |installed: &Installed| -> Vec<serde_json::Value> {
        let all: serde_json::Value = serde_json::from_str(&installed.does(&["exports", "list", "--json"])).unwrap();
        let identifying = ["name", "size_bytes", "quota_bytes", "linger_seconds", "identity", "made_after_template"];
        let exports = all["exports"].as_array().unwrap().iter();
        exports.map(|export| identifying.iter().map(|key| export[key].clone()).collect()).collect()
    };
    let before = list(&installed);
    installed.does(&["upgrade"]);
    assert_eq!(list(&installed), before);
    assert!(before.len() == 4 && !before.iter().any(|export| export[0] == "gone"), "{before:?}");
    assert!(installed.client(b"swap-1").read_page(3) == content(3, 1));
    assert!(installed.client(b"a").read_page(0) == content(0, 1));
    let mut late = installed.client(b"late");
    let full = (0..2000).find(|page| {
        late.request(0, 1, page * PAGE as u64, PAGE as u32, &content(*page, 1));
        late.errno() == 28
    });
    assert!(full.is_some_and(|page| (20..60).contains(&page)), "the quota is forgotten: {full:?}");
    installed.server.end();
}

#[test]
fn what_cannot_take_over_is_refused_and_the_old_program_serves_on() {
    let installed = Installed::start("refused", &["--export", "a,size=1M"]);
    let mut client = installed.client(b"a");
    client.write_page(7, &content(7, 1));
    let worker = installed.server.worker();
    let mut still_serves = || {
        assert!(client.read_page(7) == content(7, 1), "the connection was not even broken");
        assert_eq!(installed.server.worker(), worker);
    };
    let script = |text: &str| {
        let path = installed.server.directory.join("broken");
        write_file(&path, text.as_bytes(), 0o755);
        install(&path, &installed.program);
    };
    std::fs::remove_file(&installed.program).unwrap();
    installed.refuses_to_upgrade("cannot open");
    write_file(&installed.program, b"not a program", 0o644);
    installed.refuses_to_upgrade("cannot be called: cannot start a worker: Permission denied");
    script("not a program");
    installed.refuses_to_upgrade("cannot be called: cannot start a worker: Exec format error");
    // Half of one.
    let mut half = std::fs::read(THIS).unwrap();
    half.truncate(64 << 10);
    write_file(&installed.server.directory.join("half"), &half, 0o755);
    install(&installed.server.directory.join("half"), &installed.program);
    installed.refuses_to_upgrade("");
    still_serves();
    // Programs that end, or wait for something else.
    install(Path::new("/bin/false"), &installed.program);
    installed.refuses_to_upgrade("the new program: ended with status 1");
    install(Path::new("/bin/cat"), &installed.program);
    installed.refuses_to_upgrade("the new program");
    still_serves();
    assert_eq!(installed.status()["upgrades"], 0);

    // An arena of a version that the new program does not know: as it lies in the supervisor's file.
    install(&next(), &installed.program);
    let arena = arena_of(installed.server.child.id());
    let mut version = [0; 8];
    arena.read_exact_at(&mut version, 8).unwrap();
    arena.write_all_at(&99u64.to_le_bytes(), 8).unwrap();
    installed.refuses_to_upgrade("its format is version 99");
    arena.write_all_at(&version, 8).unwrap();
    still_serves();
    installed.does(&["upgrade"]);
    assert!(installed.client(b"a").read_page(7) == content(7, 1));
    installed.server.end();
}

#[test]
fn a_call_that_fails_changes_nothing() {
    let installed = Installed::start("uncalled", &["--export", "a,size=1M"]);
    installed.client(b"a").write_page(7, &content(7, 1));
    let supervisor = installed.server.child.id();
    let children = || std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).unwrap();
    // As soon as its worker runs, and some milliseconds before that is ready, a program may not be called any more.
    // On a busy machine that comes too late, and is tried again.
    let comes_in_time = || {
        let (mut client, worker) = (installed.client(b"a"), installed.server.worker());
        install(&next(), &installed.program);
        let new = inode(&installed.program);
        let runs_it = |pid: &str| std::fs::metadata(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ino() == new);
        let output = std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| installed.ask(&["upgrade"]));
            while !children().split_whitespace().any(runs_it) && !upgrade.is_finished() {}
            let may_not = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            std::fs::set_permissions(&installed.program, may_not).unwrap();
            upgrade.join().unwrap()
        });
        if output.status.success() {
            return false;
        }
        assert_refused(&output, "cannot call");
        assert!(client.read_page(7) == content(7, 1), "the connection was not even broken");
        assert_eq!(installed.server.worker(), worker);
        true
    };
    assert!((0..50).any(|_| comes_in_time()), "each was called before it could be kept from it");
    // It goes on as before: those who die are followed.
    for _ in 0..3 {
        let worker = installed.server.worker();
        kill("KILL", worker);
        assert_ne!(installed.server.next_worker(worker), worker);
        assert!(installed.client(b"a").read_page(7) == content(7, 1));
    }
    install(&next(), &installed.program);
    installed.does(&["upgrade"]);
    installed.server.end();
}

/// The arena as a process has it open: the file that begins as one does.
fn arena_of(process: u32) -> std::fs::File {
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().filter_map(|entry| {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.unwrap().path()).ok()?;
        let mut magic = [0; 8];
        (file.metadata().ok()?.is_file() && file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"GHOSTSWP")
            .then_some(file)
    });
    open.last().unwrap()
}

#[test]
fn a_program_that_gives_up_after_all_calls_the_old_one_back() {
    let installed = Installed::start("back", &["--export", "a,size=16M"]);
    let (supervisor, old) = (installed.server.child.id(), inode(&installed.program));
    installed.client(b"a").write_page(7, &content(7, 1));
    // A client that takes no replies: the old worker waits for it, and the new one for that, a second at most.
    let mut rude = installed.client(b"a");
    (0..64).for_each(|_| rude.request(0, 0, 0, 1 << 20, b""));
    let arena = arena_of(supervisor);
    let mut version = [0; 8];
    arena.read_exact_at(&mut version, 8).unwrap();
    install(&next(), &installed.program);
    let called = || inode(format!("/proc/{supervisor}/exe"));
    let await_program = |which: u64| {
        let end = Instant::now() + Duration::from_secs(30);
        while called() != which {
            assert!(Instant::now() < end, "the other program is not called");
        }
    };
    let said = std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| installed.ask(&["upgrade"]));
        await_program(inode(&installed.program));
        // After it was looked at, the arena becomes one that nobody knows.
        arena.write_all_at(&99u64.to_le_bytes(), 8).unwrap();
        await_program(old);
        arena.write_all_at(&version, 8).unwrap();
        upgrade.join().unwrap()
    });
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.code() == Some(1) && text.contains("the new program gave up: "), "{said:?}");
    assert!(text.contains("its format is version 99") && text.lines().count() == 1, "{text}");
    assert!(installed.client(b"a").read_page(7) == content(7, 1));
    assert_eq!((called(), &installed.status()["upgrades"]), (old, &0.into()));
    // The next time it goes well.
    installed.does(&["upgrade"]);
    assert_eq!(called(), inode(&installed.program));
    assert!(installed.client(b"a").read_page(7) == content(7, 1));
    installed.server.end();
}

#[test]
fn a_kill_during_an_upgrade_leaves_somebody_who_serves() {
    for (round, delay_ms) in [0, 5, 10, 15, 20, 25, 30, 40, 50, 70, 90, 120].into_iter().enumerate() {
        let mut installed = Installed::start(&format!("killed-{round}"), &["--export", "a,size=1M"]);
        installed.client(b"a").write_page(7, &content(7, 1));
        let supervisor = installed.server.child.id();
        let (victim, upgrade) = std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| installed.ask(&["upgrade"]));
            std::thread::sleep(Duration::from_millis(delay_ms));
            let all = installed.all_processes();
            // One of them: the supervisor, who serves, who gets ready.
            let victim = all[round % 3 % all.len()];
            kill("KILL", victim);
            (victim, upgrade.join().unwrap())
        });
        let begun = Instant::now();
        let page = loop {
            if let Some(mut client) = installed.server.try_enter(b"a") {
                if client.try_request(0, 7 * PAGE as u64, PAGE as u32, b"").is_ok_and(|errno| errno == 0) {
                    break client.take(PAGE);
                }
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "round {round}: nobody serves; {upgrade:?}");
        };
        assert!(page == content(7, 1), "round {round}");
        if victim != supervisor {
            installed.does(&["upgrade"]);
            assert!(installed.client(b"a").read_page(7) == content(7, 1));
            installed.server.end();
        } else {
            // The worker has no supervisor any more, and ends when it is told.
            installed.server.child.wait().unwrap();
            let orphans = installed.server.processes_named("nbd-worker");
            assert_eq!(orphans.len(), 1, "round {round}: {orphans:?}");
            kill("TERM", orphans[0]);
            let end = Instant::now() + Duration::from_secs(20);
            while is_running(orphans[0]) {
                assert!(Instant::now() < end, "it does not end");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

#[test]
fn a_worker_that_hangs_is_replaced_within_the_stated_time() {
    let installed = Installed::start("hangs", &["--export", "a,size=64M", "--export", "b,size=64M", "--watchdog", "3"]);
    let stop = AtomicBool::new(false);
    for (export, has_standby) in [(b"a", false), (b"b", true)] {
        if has_standby {
            installed.server.await_standby();
        }
        stop.store(false, Ordering::Relaxed);
        let worker = installed.server.worker();
        let longest = std::thread::scope(|scope| {
            let load = scope.spawn(|| load(&installed.server, export, &stop));
            std::thread::sleep(Duration::from_millis(300));
            let begun = Instant::now();
            kill("STOP", worker);
            while is_running(worker) {
                assert!(begun.elapsed() < Duration::from_secs(8), "it is left as it is");
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(begun.elapsed() >= Duration::from_millis(2400), "killed after {:?}", begun.elapsed());
            assert_ne!(installed.server.next_worker(worker), worker);
            std::thread::sleep(Duration::from_secs(1));
            stop.store(true, Ordering::Relaxed);
            load.join().unwrap()
        });
        println!(
            "a client waited for {longest:?}, of them {} us for the take-over",
            installed.status()["last_take_over_us"]
        );
        assert!(longest < Duration::from_secs(8), "{longest:?}");
    }
    // One that stands by and hangs is replaced as well.
    let (standby, end) = (installed.server.await_standby(), Instant::now() + Duration::from_secs(20));
    kill("STOP", standby);
    while installed.server.standby().is_none_or(|next| next == standby) {
        assert!(Instant::now() < end, "it is not replaced");
        std::thread::sleep(Duration::from_millis(20));
    }
    run(Command::new("nbdinfo").args(["--size", &installed.server.uri("a")]));
    installed.server.end();
}
