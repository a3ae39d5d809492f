//! Exports that come and go while others are served, and outlive the worker that made them.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{run, Raw, Server};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

impl Server {
    fn control(&self) -> String {
        self.directory.join("control").display().to_string()
    }

    fn exports(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"));
        command.arg("exports").args(arguments).args(["--control", &self.control()]).output().unwrap()
    }

    /// Name, size and connections of each.
    fn list(&self) -> Vec<(String, String)> {
        let output = self.exports(&["list"]);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines.map(|words| (words[0].to_owned(), words[5].to_owned())).collect()
    }

    fn names(&self) -> Vec<String> {
        self.list().into_iter().map(|(name, _)| name).collect()
    }

    fn refuses(&self, arguments: &[&str], code: i32, why: &str) {
        let output = self.exports(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && said.contains(why), "{arguments:?}: {output:?}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }

    fn does(&self, arguments: &[&str]) {
        let output = self.exports(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }

    fn client(&self, export: &[u8]) -> Raw {
        let mut client = self.connect();
        client.enter(export);
        client
    }

    fn start_with_control(name: &str, arguments: &[&str]) -> Server {
        let control = std::env::temp_dir().join(format!("ghostswap-nbd-{name}-{}/control", std::process::id()));
        Server::start(name, &[&["--control", control.to_str().unwrap()], arguments].concat())
    }

    fn kill_worker(&self) {
        let worker = self.worker();
        run(Command::new("kill").args(["-s", "KILL", &worker.to_string()]));
        let end = Instant::now() + Duration::from_secs(20);
        while self.worker() == worker {
            assert!(Instant::now() < end, "nobody takes over");
        }
    }
}

fn write(client: &mut Raw, byte: u8) {
    client.request(0, 1, 8192, 4096, &[[byte; 2048], [byte ^ 0x55; 2048]].concat());
    assert_eq!(client.errno(), 0);
}

fn reads(client: &mut Raw, byte: u8) -> bool {
    client.request(0, 0, 8192, 4096, b"");
    assert_eq!(client.errno(), 0);
    let got = client.take(4096);
    got[..2048] == [byte; 2048]
}

fn leave(mut client: Raw) {
    client.request(0, 2, 0, 0, b"");
    assert!(client.is_hung_up_on());
}

#[test]
fn an_export_whose_requests_were_shared_can_be_removed() {
    let server = Server::start_with_control("shared", &["--export", "a,size=16M", "--export", "b,size=1M"]);
    let mut state = 1u32;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24 & 0x1f) as u8
    })
    .take(128 << 10)
    .collect();
    for turn in 0..3 {
        let mut client = server.client(b"a");
        for n in 0..128 {
            client.request(0, 1, n << 17, 128 << 10, &content);
            assert_eq!(client.errno(), 0);
        }
        for n in 0..128 {
            client.request(0, 0, n << 17, 128 << 10, b"");
            assert_eq!(client.errno(), 0);
            assert!(client.take(128 << 10) == content, "{turn}, {n}");
        }
        server.refuses(&["remove", "a"], 1, "has clients");
        if turn == 1 {
            drop(client);
        } else {
            leave(client);
        }
        let end = Instant::now() + Duration::from_secs(10);
        while !server.exports(&["remove", "a"]).status.success() {
            assert!(Instant::now() < end, "its client has left");
        }
        server.does(&["add", "a,size=16M"]);
        let mut client = server.client(b"a");
        assert!(reads(&mut client, 0));
        leave(client);
    }
}

#[test]
fn exports_are_added_and_removed_while_others_are_served() {
    let server = Server::start_with_control("exports", &["--export", "a,size=1M"]);
    let mut first = server.client(b"a");
    write(&mut first, 1);
    server.does(&["add", "b,size=16M,linger=1h"]);
    server.refuses(&["add", "b"], 1, "two exports are named 'b'");
    server.refuses(&["add", "c,colour=red"], 2, "unknown export option");
    server.refuses(&["remove", "x"], 1, "no export 'x'");
    let mut second = server.client(b"b");
    write(&mut second, 2);
    server.refuses(&["remove", "b"], 1, "has clients");
    let count = |n: &str| server.list().iter().filter(|(_, connections)| connections == n).count();
    assert_eq!((server.names(), count("1")), (vec!["a".to_owned(), "b".to_owned()], 2));
    // The next worker has them too, with what they hold.
    server.kill_worker();
    let (mut first, mut second) = (server.client(b"a"), server.client(b"b"));
    assert!(reads(&mut first, 1) && reads(&mut second, 2));
    leave(second);
    let end = Instant::now() + Duration::from_secs(10);
    while !server.exports(&["remove", "b"]).status.success() {
        assert!(Instant::now() < end, "its client has left");
    }
    assert_eq!(server.names(), ["a"]);
    // Its volume is used again, and nothing of what it held is seen.
    server.does(&["add", "c,size=32M"]);
    let mut third = server.client(b"c");
    assert!(reads(&mut third, 0) && reads(&mut first, 1));
    write(&mut third, 3);
    server.kill_worker();
    assert_eq!(server.names(), ["a", "c"]);
    assert!(reads(&mut server.client(b"c"), 3) && reads(&mut server.client(b"a"), 1));
    let info = run(Command::new("nbdinfo").args(["--size", &server.uri("c")]));
    assert_eq!(info.trim(), (32 << 20).to_string());
    server.end();
}

#[test]
fn a_template_makes_an_export_for_each_client_and_drops_it_when_nobody_comes_again() {
    let server =
        Server::start_with_control("template", &["--export", "a,size=1M", "--export", "swap-*,size=8M,linger=2s"]);
    assert_eq!(server.names(), ["a", "swap-*"]);
    let (mut one, mut two) = (server.client(b"swap-1"), server.client(b"swap-2"));
    write(&mut one, 1);
    write(&mut two, 2);
    assert_eq!(server.names(), ["a", "swap-1", "swap-2", "swap-*"]);
    // A second connection is to the same.
    assert!(reads(&mut server.client(b"swap-1"), 1));
    leave(two);
    // Who comes back in time finds everything.
    let mut two = server.client(b"swap-2");
    assert!(reads(&mut two, 2) && reads(&mut one, 1));
    // So does who lost the worker.
    server.kill_worker();
    let mut two = server.client(b"swap-2");
    assert!(reads(&mut two, 2));
    let end = Instant::now() + Duration::from_secs(20);
    while server.names() != ["a", "swap-2", "swap-*"] {
        assert!(Instant::now() < end, "{:?}", server.names());
        std::thread::sleep(Duration::from_millis(100));
    }
    // Anew, and empty.
    assert!(reads(&mut server.client(b"swap-1"), 0));
    server.does(&["remove", "swap-*"]);
    let mut refused = server.connect();
    refused.greet();
    assert_ne!(refused.option(7, b"\0\0\0\x06swap-7\0\0"), 1);
    assert!(reads(&mut two, 2));
    server.end();
}

#[test]
fn names_that_a_template_covers_cannot_use_up_a_server() {
    let server = Server::start_with_control("many", &["--export", "keep,size=1M", "--export", "t-*,size=1M,linger=20"]);
    let mut kept = server.client(b"keep");
    let mut refused = 0;
    for n in 0..1200 {
        let mut client = server.connect();
        client.greet();
        let name = format!("t-{n}");
        let data = [&(name.len() as u32).to_be_bytes(), name.as_bytes(), &[0, 0]].concat();
        // INFO: nobody goes there.
        refused += u32::from(client.option(6, &data) != 1);
    }
    assert!(refused > 0, "there are not so many volumes");
    write(&mut kept, 9);
    let end = Instant::now() + Duration::from_secs(60);
    while server.names() != ["keep", "t-*"] {
        assert!(Instant::now() < end, "{:?}", server.names());
        std::thread::sleep(Duration::from_millis(100));
    }
    write(&mut server.client(b"t-500"), 5);
    assert!(reads(&mut kept, 9));
    server.end();
}

/// What processes hold together, in KiB. Of what they share, the program and the arena, as much as the one that holds
/// most of it: it is there once.
fn resident_kib(processes: &[u32]) -> u64 {
    let status = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let texts: Vec<String> = processes.iter().map(status).collect();
    let each = |what: &'static str| {
        texts.iter().map(move |text| {
            let line = text.lines().find(|line| line.starts_with(what)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        })
    };
    for what in ["VmRSS:", "RssAnon:", "RssFile:", "RssShmem:"] {
        println!("{what} {:?} KiB in {processes:?}", each(what).collect::<Vec<_>>());
    }
    each("RssAnon:").sum::<u64>() + each("RssFile:").max().unwrap() + each("RssShmem:").max().unwrap()
}

#[test]
fn a_thousand_exports_of_16t_cost_an_idle_server_32_mib_at_most() {
    let exports: Vec<String> = (0..1000).map(|n| format!("swap-{n},size=16T")).collect();
    let arguments: Vec<&str> = exports.iter().flat_map(|export| ["--export", export]).collect();
    let server = Server::start_with_control("thousand", &arguments);
    let idle = |server: &Server| resident_kib(&[server.await_standby(), server.worker(), server.child.id()]);
    assert!(idle(&server) <= 32 << 10, "{} KiB", idle(&server));
    // They are exports like any other, those of a second worker too.
    for n in [0, 63, 64, 999] {
        let mut client = server.client(format!("swap-{n}").as_bytes());
        write(&mut client, n as u8);
        leave(client);
    }
    server.kill_worker();
    for n in [0, 63, 64, 999] {
        let mut client = server.client(format!("swap-{n}").as_bytes());
        assert!(reads(&mut client, n as u8), "export {n}");
        leave(client);
    }
    assert_eq!(server.names().len(), 1000);
    assert!(idle(&server) <= 32 << 10, "{} KiB", idle(&server));
    server.end();
}

#[test]
fn an_export_at_its_quota_says_so_and_leaves_others_alone() {
    let exports = ["--export", "a,size=1G,quota=1M", "--export", "b,size=1G", "--tier", "ram,limit=64M"];
    let server = Server::start_with_control("quota", &exports);
    let (mut a, mut b) = (server.client(b"a"), server.client(b"b"));
    let mut x = 1u64;
    let mut noise = || {
        let mut word = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()
        };
        (0..512).flat_map(|_| word()).collect::<Vec<u8>>()
    };
    let mut put = |client: &mut Raw, page: u64| {
        client.request(0, 1, page * 4096, 4096, &noise());
        client.errno()
    };
    let full = (0..1024).find(|page| put(&mut a, *page) != 0).unwrap();
    assert!((240..280).contains(&full), "refused at page {full}");
    assert_eq!(put(&mut a, full), 28, "ENOSPC");
    assert_eq!(put(&mut b, 0), 0);
    let output = server.exports(&["list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let a_now = &list["exports"][0];
    assert_eq!((&a_now["quota_bytes"], &a_now["held"]["stored_pages"]), (&(1 << 20).into(), &full.into()), "{list}");
    assert_eq!(a_now["held"]["memory_bytes"], a_now["held_bytes"]);
    // The next worker minds it as well; and trimming makes room.
    server.kill_worker();
    let mut a = server.client(b"a");
    assert_eq!(put(&mut a, full), 28);
    a.request(0, 4, 0, 16 * 4096, b"");
    assert_eq!(a.errno(), 0);
    assert_eq!(put(&mut a, full), 0);
    server.end();
}

/// One in memory only, one below at once; another worker keeps to it.
#[test]
fn exports_lie_on_the_tiers_that_they_are_given() {
    let file = std::env::temp_dir().join(format!("ghostswap-tiers-{}", std::process::id()));
    let tier = format!("file:{},size=64M,prealloc=off", file.display());
    let server = Server::start_with_control(
        "tiers",
        &["--export", "quick,size=64M,tiers=ram", "--tier", "ram,limit=24M", "--tier", &tier],
    );
    server.refuses(&["add", "x,tiers=disk"], 2, "one of all, ram, below");
    server.does(&["add", "batch,size=64M,tiers=below"]);
    let fill = || {
        for export in [&b"quick"[..], b"batch"] {
            let mut client = server.client(export);
            let mut state = 1u64;
            for page in 0..1500 {
                let noise = (0..512).flat_map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state ^ state >> 29).to_le_bytes()
                });
                client.request(0, 1, page * 4096, 4096, &noise.collect::<Vec<_>>());
                assert_eq!(client.errno(), 0);
            }
        }
    };
    // Bytes of records in memory and below.
    let held = |which: &str| {
        let output = server.exports(&["list", "--json"]);
        let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let export = all["exports"].as_array().unwrap().iter().find(|export| export["name"] == which).unwrap().clone();
        let bytes = |key: &str| export["held"][key].as_u64().unwrap();
        (bytes("memory_bytes"), bytes("disk_bytes"))
    };
    for round in 0..2 {
        fill();
        let end = Instant::now() + Duration::from_secs(20);
        while held("batch").0 > 1 << 20 {
            assert!(Instant::now() < end, "round {round}: what is to lie below stays: {:?}", held("batch"));
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(held("quick") == (1500 * (4096 + 7), 0), "round {round}: {:?}", held("quick"));
        if round == 0 {
            server.kill_worker();
        }
    }
    server.end();
    std::fs::remove_file(file).unwrap();
    let bare = Server::start_with_control("bare", &["--export", "a,size=1M", "--tier", "ram,limit=16M"]);
    bare.refuses(&["add", "x,tiers=below"], 1, "needs a tier below memory");
    bare.end();
}
