//! A tier behind real NBD servers (nbdkit): what goes there comes back, whatever happens on the way.

#![allow(unsafe_code, reason = "a child that is killed")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ledger;
mod nbdkit;
mod on_disk;

use ghostswap::config::{with_tier, TierConfig, TierSettings};
use ghostswap::{create_arena, Error, Standby, Store, StoreConfig, Tls};
use nbdkit::Nbdkit;
use on_disk::{check, content, wait_for, write, Dir, PAGE, PAGES};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

fn configured(tier: &str, ram: &str) -> StoreConfig {
    let tiers = vec![ram.parse().unwrap(), tier.parse().unwrap()];
    StoreConfig { tiers, tls: Some(Tls::new()), ..StoreConfig::default() }
}

/// 64 MiB of a server's below 8 MiB of memory, with little patience.
fn config(server: &Nbdkit, options: &str) -> StoreConfig {
    configured(&format!("nbd:{},size=64M,timeout=2s{options}", server.uri()), "ram,limit=8M")
}

/// A server on a file, which does not go with it, and filters.
fn on_file(dir: &Dir, more: &[&str]) -> Nbdkit {
    let file = dir.tier();
    std::fs::File::create(&file).unwrap().set_len(80 << 20).unwrap();
    let plugin = ["file", file.to_str().unwrap()];
    let (filters, parameters): (Vec<&str>, Vec<&str>) = more.iter().partition(|part| part.starts_with("--"));
    Nbdkit::start(file.parent().unwrap(), &[&filters[..], &plugin, &parameters].concat())
}

fn beside(dir: &Dir, name: &str) -> String {
    dir.tier().with_file_name(name).to_str().unwrap().to_owned()
}

#[test]
fn more_than_memory_holds_comes_back() {
    // As servers differ: many connections or one, structured replies or simple ones, little at once.
    for (filters, options) in [
        (&[][..], ""),
        (&[], ",connections=4,encrypt=off"),
        (&["--no-sr"], ",connections=1"),
        (&["--filter=multi-conn", "multi-conn-mode=disable"], ""),
        (
            &[
                "--filter=blocksize-policy",
                "blocksize-minimum=4K",
                "blocksize-preferred=4K",
                "blocksize-maximum=64K",
                "blocksize-error-policy=error",
            ],
            "",
        ),
    ] {
        let dir = Dir::new("nbd");
        let server = on_file(&dir, filters);
        let store = Store::open(config(&server, options)).unwrap();
        let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
        write(&mut lane, 0..PAGES, 1);
        let stats = store.stats();
        let disk = stats.disk.clone().unwrap();
        assert!(stats.held_bytes <= 8 << 20 && disk.live_bytes > 12 << 20, "{stats}");
        assert_eq!(disk.path, server.uri());
        check(&mut lane, 0..PAGES, 1);
        check(&mut lane, (0..PAGES).step_by(7), 1);
        write(&mut lane, 0..PAGES, 2);
        check(&mut lane, 0..PAGES, 2);
        // All of it dies, and the server hears of that.
        let blocks = || std::fs::metadata(dir.tier()).unwrap().blocks();
        assert!(blocks() * 512 > 12 << 20, "{filters:?}");
        lane.discard(0, 1 << 40).unwrap();
        drop(lane);
        wait_for("giving the export back", || store.stats().disk.unwrap().used_bytes == 0);
        wait_for("trimming", || blocks() * 512 < 2 << 20);
        let disk = store.stats().disk.unwrap();
        assert_eq!((disk.write_errors, disk.read_errors, disk.corrupt, disk.late_bytes), (0, 0, 0, 0), "{disk:?}");
        store.audit().unwrap();
    }
}

#[test]
fn random_pages_are_what_they_were_last() {
    let dir = Dir::new("nbd-model");
    let server = Nbdkit::start(dir.tier().parent().unwrap(), &["memory", "80M"]);
    let store = Store::open(config(&server, ",size=64M")).unwrap();
    let volume = store.create_volume(1 << 30).unwrap();
    std::thread::scope(|scope| {
        for base in [0, 100_000] {
            let mut lane = volume.lane().unwrap();
            scope.spawn(move || {
                let mut model = std::collections::BTreeMap::new();
                let mut rng = ledger::Rng(base + 7);
                let mut got = vec![0; PAGE];
                for salt in 0..30_000 {
                    let page = base + rng.below(5000);
                    match rng.below(10) {
                        0..=4 => {
                            lane.write(page * PAGE as u64, &content(page, salt)).unwrap();
                            model.insert(page, salt);
                        }
                        5 => {
                            lane.discard(page * PAGE as u64, PAGE as u64).unwrap();
                            model.remove(&page);
                        }
                        _ => {
                            lane.read(page * PAGE as u64, &mut got).unwrap();
                            let want = model.get(&page).map_or_else(|| vec![0; PAGE], |salt| content(page, *salt));
                            assert!(got == want, "page {page} at {salt}");
                        }
                    }
                }
                for (page, salt) in model {
                    check(&mut lane, page..page + 1, salt);
                }
            });
        }
    });
    assert!(store.stats().disk.unwrap().fetches > 1000);
    store.audit().unwrap();
}

#[test]
fn errors_of_a_server_are_tried_again_and_then_told() {
    let dir = Dir::new("nbd-errors");
    let (reads, writes) = (beside(&dir, "no-reads"), beside(&dir, "no-writes"));
    let (read_file, write_file) = (format!("error-pread-file={reads}"), format!("error-pwrite-file={writes}"));
    let errors = ["--filter=error", "error-pread-rate=100%", "error-pwrite-rate=100%", "error-pwrite=ENOSPC"];
    let server = on_file(&dir, &[&errors[..], &[&read_file, &write_file]].concat());
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES / 2, 1);
    // It takes nothing more: what is written stays in memory while that has room.
    std::fs::write(&writes, "").unwrap();
    let mut pages = PAGES / 2;
    let full = loop {
        match lane.write(pages * PAGE as u64, &content(pages, 1)) {
            Ok(()) => pages += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, Error::NoSpace), "{full}");
    let disk = store.stats().disk.unwrap();
    assert!(disk.failing && disk.write_errors > 0 && disk.late_bytes == 0, "{disk:?}");
    check(&mut lane, 0..pages, 1);
    std::fs::remove_file(&writes).unwrap();
    wait_for("trying again", || !store.stats().disk.unwrap().failing);
    write(&mut lane, pages..pages + 2000, 1);
    check(&mut lane, 0..pages + 2000, 1);
    // Reads fail for a while: they are tried again. For long: it is told whose page that is.
    std::fs::write(&reads, "").unwrap();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        std::fs::remove_file(&reads).unwrap();
        reads
    });
    check(&mut lane, 0..100, 1);
    let reads = ends.join().unwrap();
    assert!(store.stats().disk.unwrap().read_errors > 0);
    std::fs::write(&reads, "").unwrap();
    let mut got = vec![0; PAGE];
    let failed = (0..PAGES).find(|page| match lane.read(page * PAGE as u64, &mut got) {
        Ok(()) => false,
        Err(Error::Unreadable { page: named, .. }) => u64::from(named) == *page,
        Err(e) => panic!("page {page}: {e}"),
    });
    std::fs::remove_file(&reads).unwrap();
    check(&mut lane, failed.unwrap()..pages, 1);
    drop(lane);
    store.audit().unwrap();
}

/// A tier that failed while nothing was to go there is tried with a block of a free extent.
#[test]
fn a_tier_that_failed_is_probed_until_it_is_well() {
    let dir = Dir::new("nbd-probe");
    let mut server = on_file(&dir, &[]);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..100, 1);
    server.kill();
    wait_for("noticing", || store.stats().disk.unwrap().failing);
    server.start_again();
    wait_for("taking it back", || !store.stats().disk.unwrap().failing);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
}

#[test]
fn a_slow_server_is_not_a_full_one() {
    let dir = Dir::new("nbd-slow");
    let server = on_file(&dir, &["--filter=delay", "wdelay=300ms", "rdelay=5ms"]);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..6000, 1);
    check(&mut lane, (0..6000).step_by(50), 1);
    assert_eq!(store.stats().refused_writes, 0);
    assert!(!store.stats().disk.unwrap().failing);
}

#[test]
fn damage_is_found_and_is_one_pages_own() {
    for options in ["", ",encrypt=off"] {
        let dir = Dir::new("nbd-damage");
        let server = on_file(&dir, &[]);
        let store = Store::open(config(&server, options)).unwrap();
        let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
        write(&mut lane, 0..PAGES, 1);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(dir.tier()).unwrap();
        let mut byte = [0];
        for at in (8192 + 100..20 << 20).step_by(1 << 20) {
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
        let (mut damaged, mut buf) = (0, vec![0; PAGE]);
        for page in 0..PAGES {
            match lane.read(page * PAGE as u64, &mut buf) {
                Ok(()) => assert!(buf == content(page, 1), "page {page}"),
                Err(Error::Corrupt { page: named, .. }) if u64::from(named) == page => damaged += 1,
                Err(e) => panic!("page {page}: {e}"),
            }
        }
        assert!((10..200).contains(&damaged), "{damaged} pages damaged");
        assert_eq!(store.stats().disk.unwrap().corrupt, damaged);
    }
}

#[test]
fn a_server_that_dies_and_is_there_again_loses_nothing() {
    let dir = Dir::new("nbd-killed");
    let mut server = on_file(&dir, &["--filter=delay", "wdelay=20ms"]);
    let store = Store::open(config(&server, ",timeout=20s")).unwrap();
    let volume = store.create_volume(1 << 30).unwrap();
    let mut lanes = [volume.lane().unwrap(), volume.lane().unwrap()];
    write(&mut lanes[0], 0..PAGES, 1);
    std::thread::scope(|scope| {
        let [reader, writer] = &mut lanes;
        let reads = scope.spawn(move || (0..3).for_each(|_| check(reader, (0..PAGES).step_by(3), 1)));
        let writes = scope.spawn(move || write(writer, 100_000..100_000 + PAGES, 5));
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(300));
            server.kill();
            std::thread::sleep(Duration::from_millis(400));
            server.start_again();
        }
        reads.join().unwrap();
        writes.join().unwrap();
    });
    check(&mut lanes[1], 0..PAGES, 1);
    check(&mut lanes[0], 100_000..100_000 + PAGES, 5);
    let stats = store.stats();
    assert_eq!(stats.refused_writes, 0, "{stats}");
    drop(lanes);
    store.audit().unwrap();
}

#[test]
fn a_server_that_comes_back_empty_has_lost_its_pages_and_no_others() {
    let dir = Dir::new("nbd-empty");
    let mut server = on_file(&dir, &[]);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    server.kill();
    let file = std::fs::OpenOptions::new().write(true).open(dir.tier()).unwrap();
    file.set_len(0).unwrap();
    file.set_len(80 << 20).unwrap();
    server.start_again();
    let begun = Instant::now();
    let (mut lost, mut got) = (0, vec![0; PAGE]);
    // Each takes a second of trying.
    for page in (0..PAGES).rev().step_by(PAGES as usize / 12) {
        match lane.read(page * PAGE as u64, &mut got) {
            Ok(()) => assert!(got == content(page, 1), "page {page}"),
            Err(Error::Unreadable { page: named, .. }) => {
                assert_eq!(u64::from(named), page);
                lost += 1;
            }
            Err(e) => panic!("page {page}: {e}"),
        }
    }
    assert!((5..=12).contains(&lost), "{lost} lost");
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    wait_for("noticing", || store.stats().disk.unwrap().failing);
    // Nothing of ours is written over what is not.
    let mut head = vec![1; 1 << 20];
    std::fs::File::open(dir.tier()).unwrap().read_exact_at(&mut head, 0).unwrap();
    assert!(head.iter().all(|b| *b == 0));
    // What is in memory is served, and what is dropped makes room.
    lane.discard(0, 1 << 30).unwrap();
    write(&mut lane, 0..1000, 2);
    check(&mut lane, 0..1000, 2);
}

#[test]
fn a_server_that_hangs_is_waited_for_and_then_is_gone() {
    let dir = Dir::new("nbd-hangs");
    let server = on_file(&dir, &[]);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    // For less than the time-out: reads wait.
    server.signal("STOP");
    let (mut got, begun) = (vec![0; PAGE], Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1200));
            server.signal("CONT");
        });
        lane.read(0, &mut got).unwrap();
    });
    assert!(got == content(0, 1) && begun.elapsed() > Duration::from_secs(1));
    // For longer: they fail.
    server.signal("STOP");
    let begun = Instant::now();
    let read = lane.read(37 * PAGE as u64, &mut got);
    let found = (server.states(), store.stats());
    assert!(matches!(read, Err(Error::Unreadable { .. })), "{read:?}, its threads are {}: {}", found.0, found.1);
    assert!((2..15).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    wait_for("noticing", || store.stats().disk.unwrap().failing);
    assert!(lane.read(37 * PAGE as u64, &mut got).is_err());
    server.signal("CONT");
    wait_for("taking it back", || !store.stats().disk.unwrap().failing);
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
}

#[test]
fn another_store_finds_what_went_there_and_where_nothing_may_go_yet() {
    let dir = Dir::new("nbd-again");
    let mut server = on_file(&dir, &["--filter=delay", "wdelay=700ms"]);
    let arena = create_arena(false).unwrap();
    let config = config(&server, "");
    // It is killed while writes are on their way.
    let child = ledger::fork(|| {
        let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
        let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
        write(&mut lane, 0..4000, 1);
        std::mem::forget((lane, store));
        0
    });
    assert!(matches!(ledger::wait(child), ledger::End::Exit(0)));
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    let late = store.stats().disk.unwrap().late_bytes;
    assert!(late > 0, "its last writes had no answer");
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    check(&mut lane, 0..4000, 1);
    write(&mut lane, 0..4000, 2);
    check(&mut lane, 0..4000, 2);
    assert!(store.stats().disk.unwrap().late_bytes >= late, "that is so for minutes");
    drop(lane);
    store.audit().unwrap();
    drop(store);
    // While the server is away a store goes on with what is in memory.
    server.kill();
    let begun = Instant::now();
    let store = Store::open_arena(config.clone(), arena.try_clone().unwrap()).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    write(&mut lane, 5000..5100, 3);
    check(&mut lane, 5000..5100, 3);
    server.start_again();
    check(&mut lane, 0..4000, 2);
}

/// An authority, a server's certificate for localhost, a client's, in a directory as nbdkit wants it.
fn certificates(dir: &Path) {
    let openssl = |arguments: &str| {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for authority in ["ca", "other"] {
        openssl(&format!(
            "req -x509 {key} -days 2 -subj /CN={authority} -addext basicConstraints=critical,CA:TRUE \
             -keyout {authority}-key.pem -out {authority}-cert.pem"
        ));
    }
    std::fs::write(dir.join("names"), "subjectAltName=DNS:localhost").unwrap();
    for who in ["server", "client"] {
        openssl(&format!("req {key} -subj /CN={who} -keyout {who}-key.pem -out {who}.csr"));
        openssl(&format!(
            "x509 -req -in {who}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile names \
             -out {who}-cert.pem"
        ));
    }
}

#[test]
fn through_tls_with_a_certificate_of_ones_own() {
    let dir = Dir::new("nbd-tls");
    let at = dir.tier().parent().unwrap().to_owned();
    certificates(&at);
    let directory = format!("--tls-certificates={}", at.display());
    let mut server = on_file(&dir, &["--tls=require", "--tls-verify-peer", &directory]);
    let file = |name: &str| at.join(name).display().to_string();
    let tier = |uri: &str, more: &str| format!("nbd:nbds+unix://{uri}?socket={},size=64M,timeout=5s{more}", file("s"));
    let given = format!(",ca={},cert={},key={}", file("ca-cert.pem"), file("client-cert.pem"), file("client-key.pem"));
    let store = Store::open(configured(&tier("localhost/", &given), "ram,limit=8M")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    server.kill();
    server.start_again();
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
    drop((lane, store));
    // The names that libnbd has for the same.
    let libnbd =
        format!("nbd:nbds+unix:///?socket={}&tls-hostname=localhost&tls-certificates={}", file("s"), at.display());
    drop(Store::open(configured(&libnbd, "ram,limit=8M")).unwrap());
    let refused = |tier: &str, why: &str| {
        let told = Store::open(configured(tier, "ram,limit=8M")).err().unwrap().to_string();
        assert!(told.contains(why) && !told.contains('\n'), "{told}");
    };
    let others = format!(",ca={}", file("other-cert.pem"));
    refused(&tier("localhost/", &others), "certificate");
    refused(&tier("elsewhere/", &given), "certificate");
    refused(&tier("localhost/", ",ca=/nowhere"), "No such file");
    refused(&format!("nbd:{},size=64M", server.uri()), "TLS");
    // A server that does not speak it: nothing goes there in the clear.
    server.kill();
    server.change(&["memory", "80M"]);
    server.start_again();
    refused(&tier("localhost/", &given), "refuses");
}

#[test]
fn settings_of_a_server_are_tried_before_pages_depend_on_them() {
    let dir = Dir::new("nbd-set");
    let at = dir.tier().parent().unwrap().to_owned();
    certificates(&at);
    let directory = format!("--tls-certificates={}", at.display());
    let mut server = on_file(&dir, &["--tls=require", "--tls-verify-peer", &directory]);
    let file = |name: &str| at.join(name).display().to_string();
    let tier = format!(
        "nbd:nbds+unix://localhost/?socket={},size=64M,timeout=60s,ca={},cert={},key={}",
        file("s"),
        file("ca-cert.pem"),
        file("client-cert.pem"),
        file("client-key.pem")
    );
    let before = configured(&tier, "ram,limit=8M");
    let arena = create_arena(false).unwrap();
    let store = Store::open_arena(before.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    let attempt = |settings: &str| -> Result<Standby, Error> {
        let tiers = settings.parse::<TierSettings>().unwrap().apply(&before.tiers)?;
        let mut standby = Standby::new(StoreConfig { tiers, ..before.clone() }, arena.try_clone().unwrap())?;
        standby.try_tiers(&before.tiers)?;
        Ok(standby)
    };
    let refused = |settings: &str, why: &str| {
        let told = attempt(settings).err().unwrap().to_string();
        assert!(told.contains(why) && !told.contains('\n'), "{told}");
    };
    refused(&format!("disk,ca={}", file("other-cert.pem")), "certificate");
    refused("disk,ca=/nowhere", "No such file");
    refused("disk,credentials=/x", "unknown option");
    server.kill();
    refused("disk,timeout=9s", "socket");
    server.start_again();
    check(&mut lane, 0..PAGES, 1);
    // The same under other names, as after a renewal.
    for name in ["ca-cert", "client-cert", "client-key"] {
        std::fs::copy(at.join(format!("{name}.pem")), at.join(format!("new-{name}.pem"))).unwrap();
    }
    let [ca, cert, key] = ["new-ca-cert.pem", "new-client-cert.pem", "new-client-key.pem"].map(file);
    let standby = attempt(&format!("disk,ca={ca},cert={cert},key={key},connections=3,timeout=9s")).unwrap();
    drop((lane, store));
    let store = standby.open().unwrap();
    let what = store.tiers().pop().unwrap().what;
    assert!(what.contains(&format!("connections=3,timeout=9s,ca={ca}")), "{what}");
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, 0..PAGES, 2);
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn another_tier_is_added_while_a_server_is_away() {
    let dir = Dir::new("nbd-away");
    let mut server = on_file(&dir, &[]);
    let before = config(&server, "");
    let arena = create_arena(false).unwrap();
    let store = Store::open_arena(before.clone(), arena.try_clone().unwrap()).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    server.kill();
    wait_for("noticing", || store.stats().disk.unwrap().failing);
    let attempt = |now: &[TierConfig]| -> Result<Standby, Error> {
        let more = format!("file:{},size=64M,prealloc=off", beside(&dir, "more")).parse().unwrap();
        let tiers = with_tier(&before.tiers, more, None)?;
        let mut standby = Standby::new(StoreConfig { tiers, ..before.clone() }, arena.try_clone().unwrap())?;
        standby.try_tiers(now)?;
        Ok(standby)
    };
    // Where it is not known that it was reached this way before.
    let refused = attempt(&[]).err().unwrap().to_string();
    assert!(refused.contains("nbd"), "{refused}");
    let standby = attempt(&before.tiers).unwrap();
    drop((lane, store));
    let store = standby.open().unwrap();
    let mut lane = store.open_volume(0).unwrap().lane().unwrap();
    // More than memory holds, and no other place for it.
    write(&mut lane, 100_000..100_000 + PAGES, 2);
    check(&mut lane, 100_000..100_000 + PAGES, 2);
    server.start_again();
    check(&mut lane, 0..PAGES, 1);
    drop(lane);
    store.audit().unwrap();
}

#[test]
fn what_cannot_be_a_tier_is_refused_in_a_line() {
    let dir = Dir::new("nbd-refused");
    let nameless = std::thread::spawn(|| Store::open(configured("nbd:nbd://nowhere.invalid/x", "ram,limit=8M")).err());
    let refused = |tier: &str| {
        let why = Store::open(configured(tier, "ram,limit=8M")).err().unwrap().to_string();
        assert!(!why.contains('\n') && why.contains("nbd"), "{why}");
        why
    };
    let path = dir.tier();
    let mut server = on_file(&dir, &[]);
    let uri = server.uri();
    assert!(refused(&format!("nbd:{uri},size=1G")).contains("less than"));
    assert!(refused("nbd:nbd+unix:///x?socket=/nowhere/s").contains("No such file"));
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"dear all", 4096).unwrap();
    assert!(refused(&format!("nbd:{uri}")).contains("something else"));
    for (arguments, why) in [
        (&["--readonly", "memory", "80M"][..], "read-only"),
        (
            &[
                "--filter=blocksize-policy",
                "memory",
                "80M",
                "blocksize-minimum=64K",
                "blocksize-preferred=64K",
                "blocksize-maximum=1M",
            ],
            "blocks of 4096",
        ),
        (
            &[
                "--filter=blocksize-policy",
                "memory",
                "80M",
                "blocksize-minimum=1",
                "blocksize-preferred=4K",
                "blocksize-maximum=4K",
            ],
            "64 KiB",
        ),
        (&["memory", "1M"], "less than 16 MiB"),
    ] {
        server.kill();
        server.change(arguments);
        server.start_again();
        let told = refused(&format!("nbd:{uri}"));
        assert!(told.contains(why), "{arguments:?}: {told}");
    }
    // Nobody has that name, or nobody can be asked.
    let told = nameless.join().unwrap().unwrap().to_string();
    assert!(told.contains("nowhere.invalid") && told.contains("look") && !told.contains('\n'), "{told}");
}
