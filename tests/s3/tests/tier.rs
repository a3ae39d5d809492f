//! A tier on a real S3 server (s3s-fs): what goes there comes back, whatever happens on the way.

#![allow(unsafe_code, reason = "a child that is killed")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../ledger/mod.rs"]
mod ledger;
#[path = "../../on_disk/mod.rs"]
mod on_disk;
mod server;

use ghostswap::{create_arena, Error, Store, StoreConfig, S3};
use on_disk::{check, content, wait_for, write, Dir, PAGE};
use server::Server;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// About twice what memory holds. A page that is read from below is a request, each some milliseconds.
const PAGES: u64 = 6000;

/// Not a test: what the server's process is.
#[test]
fn the_server() {
    server::serve_if_called();
}

fn configured(tier: &str) -> StoreConfig {
    let tiers = vec!["ram,limit=8M".parse().unwrap(), tier.parse().unwrap()];
    StoreConfig { tiers, s3: Some(S3::new()), ..StoreConfig::default() }
}

/// 64 MiB of a bucket's below 8 MiB of memory. Where a test waits for the time-out it says a short one: a busy machine
/// lets a server be away for seconds.
fn config(server: &Server, options: &str) -> StoreConfig {
    configured(&server.tier("/node1", &format!(",credentials={}{options}", at(server).join("credentials").display())))
}

/// Again, with what a store of this process had: another test's child may have its sockets for a moment yet.
fn open_again(config: StoreConfig) -> Store {
    let begun = Instant::now();
    loop {
        match Store::open(config.clone()) {
            Err(e) if e.to_string().contains("of this machine") && begun.elapsed() < Duration::from_secs(20) => {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => return other.unwrap(),
        }
    }
}

fn at(server: &Server) -> PathBuf {
    server.bucket().parent().unwrap().parent().unwrap().to_owned()
}

fn start(dir: &Dir) -> Server {
    Server::start(dir.tier().parent().unwrap())
}

#[test]
fn more_than_memory_holds_comes_back_and_what_dies_is_deleted() {
    for options in ["", ",connections=1,encrypt=off"] {
        let dir = Dir::new("s3");
        let server = start(&dir);
        let store = Store::open(config(&server, options)).unwrap();
        let mut lane = store.create_volume(1 << 40).unwrap().lane().unwrap();
        write(&mut lane, 0..PAGES, 1);
        let stats = store.stats();
        let disk = stats.disk.clone().unwrap();
        assert!(stats.held_bytes <= 8 << 20 && disk.live_bytes > 5 << 20, "{stats}");
        assert_eq!(disk.path, "s3:pages/node1");
        check(&mut lane, 0..PAGES, 1);
        write(&mut lane, 0..PAGES, 2);
        check(&mut lane, (0..PAGES).step_by(3), 2);
        // As many objects as there are segments below, and no others; all of it dies, and they go.
        assert!(server.objects("node1").iter().map(|(_, bytes)| bytes).sum::<u64>() > 5 << 20);
        lane.discard(0, 1 << 40).unwrap();
        drop(lane);
        wait_for("giving extents back", || store.stats().disk.unwrap().used_bytes == 0);
        wait_for("deleting", || server.objects("node1").is_empty());
        let disk = store.stats().disk.unwrap();
        assert_eq!((disk.write_errors, disk.read_errors, disk.corrupt, disk.late_bytes), (0, 0, 0, 0), "{disk:?}");
        store.audit().unwrap();
    }
}

#[test]
fn random_pages_are_what_they_were_last() {
    let dir = Dir::new("s3-model");
    let server = start(&dir);
    let store = Store::open(config(&server, "")).unwrap();
    let volume = store.create_volume(1 << 30).unwrap();
    std::thread::scope(|scope| {
        for base in [0, 100_000] {
            let mut lane = volume.lane().unwrap();
            scope.spawn(move || {
                let mut model = std::collections::BTreeMap::new();
                let mut rng = ledger::Rng(base + 7);
                let mut got = vec![0; PAGE];
                for salt in 0..8_000 {
                    let page = base + rng.below(2500);
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
    assert!(store.stats().disk.unwrap().fetches > 200);
    store.audit().unwrap();
}

#[test]
fn errors_of_a_server_are_tried_again_and_then_told() {
    let dir = Dir::new("s3-errors");
    let server = start(&dir);
    let store = Store::open(config(&server, ",timeout=2s")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES / 2, 1);
    // It takes nothing more: what is written stays in memory while that has room.
    server.fail("PUT", Some(503));
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
    server.fail("PUT", None);
    wait_for("trying again", || !store.stats().disk.unwrap().failing);
    write(&mut lane, pages..pages + 2000, 1);
    check(&mut lane, 0..pages + 2000, 1);
    // Reads fail for less than the time-out: nobody hears of that. For longer: it is told whose page that is.
    server.fail("GET", Some(500));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            server.fail("GET", None);
        });
        check(&mut lane, 0..100, 1);
    });
    assert_eq!(store.stats().disk.unwrap().read_errors, 0);
    server.fail("GET", Some(500));
    let mut got = vec![0; PAGE];
    let failed = (0..PAGES).find(|page| match lane.read(page * PAGE as u64, &mut got) {
        Ok(()) => false,
        Err(Error::Unreadable { page: named, .. }) => u64::from(named) == *page,
        Err(e) => panic!("page {page}: {e}"),
    });
    server.fail("GET", None);
    check(&mut lane, failed.unwrap()..pages, 1);
    drop(lane);
    store.audit().unwrap();
}

/// An error after which a server in front of the server may yet have it done: the extent is left alone.
#[test]
fn a_write_that_may_be_done_later_keeps_its_place() {
    let dir = Dir::new("s3-late");
    let server = start(&dir);
    let store = Store::open(config(&server, ",timeout=2s")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..2000, 1);
    server.fail("PUT", Some(504));
    while lane.write(0, &content(0, 1)).is_ok() && store.stats().disk.unwrap().late_bytes == 0 {
        write(&mut lane, 0..100, 1);
    }
    let late = store.stats().disk.unwrap().late_bytes;
    assert!(late > 0);
    server.fail("PUT", None);
    wait_for("trying again", || !store.stats().disk.unwrap().failing);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, (0..PAGES).step_by(3), 2);
    assert!(store.stats().disk.unwrap().late_bytes >= late, "that is so for minutes");
}

#[test]
fn a_slow_server_is_not_a_full_one() {
    let dir = Dir::new("s3-slow");
    let server = start(&dir);
    server.delay("PUT", 300);
    server.delay("GET", 5);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..5000, 1);
    check(&mut lane, (0..5000).step_by(50), 1);
    assert_eq!(store.stats().refused_writes, 0);
    assert!(!store.stats().disk.unwrap().failing);
}

#[test]
fn damage_is_found_and_is_one_pages_own() {
    for options in ["", ",encrypt=off"] {
        let dir = Dir::new("s3-damage");
        let server = start(&dir);
        let store = Store::open(config(&server, options)).unwrap();
        let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
        write(&mut lane, 0..PAGES, 1);
        let objects = server.objects("node1");
        let (mut byte, mut spoilt) = ([0], 0);
        for (path, bytes) in objects.iter().step_by(8) {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
            file.read_exact_at(&mut byte, bytes / 2 + 100).unwrap();
            file.write_all_at(&[byte[0] ^ 1], bytes / 2 + 100).unwrap();
            spoilt += 1;
        }
        // And one is shorter than it was, one is gone.
        let cut = std::fs::OpenOptions::new().write(true).open(&objects[1].0).unwrap();
        cut.set_len(objects[1].1 / 2).unwrap();
        std::fs::remove_file(&objects[2].0).unwrap();
        let (mut damaged, mut gone, mut buf) = (0, 0, vec![0; PAGE]);
        for page in 0..PAGES {
            // Each that cannot be read takes a second of trying.
            if gone >= 6 && damaged >= spoilt / 2 {
                break;
            }
            match lane.read(page * PAGE as u64, &mut buf) {
                Ok(()) => assert!(buf == content(page, 1), "page {page}"),
                Err(Error::Corrupt { page: named, .. }) if u64::from(named) == page => damaged += 1,
                Err(Error::Unreadable { page: named, .. }) if u64::from(named) == page => gone += 1,
                Err(e) => panic!("page {page}: {e}"),
            }
        }
        assert!(damaged > 0 && gone > 0, "{damaged} pages damaged, {gone} gone, {spoilt} objects spoilt");
        assert_eq!(store.stats().disk.unwrap().corrupt, damaged);
    }
}

#[test]
fn a_server_that_dies_and_is_there_again_loses_nothing() {
    let dir = Dir::new("s3-killed");
    let mut server = start(&dir);
    server.delay("PUT", 20);
    let store = Store::open(config(&server, ",timeout=20s")).unwrap();
    let volume = store.create_volume(1 << 30).unwrap();
    let mut lanes = [volume.lane().unwrap(), volume.lane().unwrap()];
    write(&mut lanes[0], 0..PAGES, 1);
    std::thread::scope(|scope| {
        let [reader, writer] = &mut lanes;
        let reads = scope.spawn(move || (0..3).for_each(|_| check(reader, (0..PAGES).step_by(9), 1)));
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
    check(&mut lanes[1], (0..PAGES).step_by(3), 1);
    check(&mut lanes[0], (100_000..100_000 + PAGES).step_by(3), 5);
    let stats = store.stats();
    assert_eq!(stats.refused_writes, 0, "{stats}");
    drop(lanes);
    store.audit().unwrap();
}

#[test]
fn a_bucket_that_comes_back_empty_has_lost_its_pages_and_no_others() {
    let dir = Dir::new("s3-empty");
    let mut server = start(&dir);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    server.kill();
    std::fs::remove_dir_all(server.bucket()).unwrap();
    std::fs::create_dir(server.bucket()).unwrap();
    server.start_again();
    let (mut lost, mut got) = (0, vec![0; PAGE]);
    // Of those written first, which lie below. Each takes a second of trying.
    for page in (0..PAGES / 3).step_by(PAGES as usize / 18) {
        match lane.read(page * PAGE as u64, &mut got) {
            Ok(()) => assert!(got == content(page, 1), "page {page}"),
            Err(Error::Unreadable { page: named, .. }) => {
                assert_eq!(u64::from(named), page);
                lost += 1;
            }
            Err(e) => panic!("page {page}: {e}"),
        }
    }
    assert!((3..=6).contains(&lost), "{lost} lost");
    // Nothing of ours is put where another's might be: the header is asked for first.
    for salt in 2..8 {
        let _ = (0..1000).try_for_each(|page| lane.write(page * PAGE as u64, &content(page, salt)));
    }
    wait_for("noticing", || store.stats().disk.unwrap().failing);
    // What is in memory is served, and what is dropped makes room.
    lane.discard(0, 1 << 30).unwrap();
    write(&mut lane, 0..1000, 9);
    check(&mut lane, 0..1000, 9);
    assert!(server.objects("").is_empty());
}

#[test]
fn a_server_that_hangs_is_waited_for_and_then_is_gone() {
    let dir = Dir::new("s3-hangs");
    let server = start(&dir);
    let store = Store::open(config(&server, ",timeout=2s")).unwrap();
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
    // For longer: they fail, and what is in memory is served.
    server.signal("STOP");
    let begun = Instant::now();
    let read = lane.read(37 * PAGE as u64, &mut got);
    assert!(matches!(read, Err(Error::Unreadable { .. })), "{read:?}: {}", store.stats());
    assert!((2..15).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    wait_for("noticing", || store.stats().disk.unwrap().failing);
    write(&mut lane, 50_000..50_010, 3);
    check(&mut lane, 50_000..50_010, 3);
    server.signal("CONT");
    wait_for("taking it back", || !store.stats().disk.unwrap().failing);
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, (0..PAGES).step_by(3), 2);
}

#[test]
fn keys_that_end_are_followed_by_others() {
    let dir = Dir::new("s3-keys");
    let server = start(&dir);
    let store = Store::open(config(&server, ",timeout=20s")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    // The server refuses them from now on; and takes them again when the file was written anew.
    server.fail("GET", Some(403));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            let (key, secret) = Server::own_keys();
            server.keys("credentials", key, secret);
            server.fail("GET", None);
        });
        check(&mut lane, 0..100, 1);
    });
    check(&mut lane, 0..PAGES, 1);
    assert_eq!(store.stats().disk.unwrap().read_errors, 0);
}

#[test]
fn what_was_drained_is_in_memory_and_its_objects_are_gone() {
    let dir = Dir::new("s3-drain");
    let server = start(&dir);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    assert!(!server.objects("node1").is_empty());
    lane.discard(1000 * PAGE as u64, (PAGES - 1000) * PAGE as u64).unwrap();
    store.drain_disk(true).unwrap();
    wait_for("draining", || store.stats().disk.unwrap().used_bytes == 0);
    wait_for("deleting", || server.objects("node1").is_empty());
    check(&mut lane, 0..1000, 1);
    store.drain_disk(false).unwrap();
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, (0..PAGES).step_by(3), 2);
}

#[test]
fn another_store_finds_what_went_there_and_where_nothing_may_go_yet() {
    let dir = Dir::new("s3-again");
    let mut server = start(&dir);
    server.delay("PUT", 700);
    let arena = create_arena(false).unwrap();
    let config = config(&server, "");
    // It is killed while objects are on their way.
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
    assert!(late > 0, "its last objects had no answer");
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

#[test]
fn a_store_after_it_deletes_what_it_left_and_a_second_one_beside_it_is_refused() {
    let dir = Dir::new("s3-after");
    let server = start(&dir);
    let store = Store::open(config(&server, "")).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    let child = ledger::fork(|| {
        let refused = Store::open(config(&server, "")).err().unwrap().to_string();
        i32::from(!refused.contains("another store of this machine"))
    });
    assert!(matches!(ledger::wait(child), ledger::End::Exit(0)));
    check(&mut lane, 0..PAGES, 1);
    drop((lane, store));
    // A store takes nothing with it.
    let left = server.objects("node1");
    assert!(left.len() > 20, "{}", left.len());
    // What is no object of a store's stays.
    let letter = server.bucket().join("node1/0123456789abcdef0123456789abcdef/letter");
    std::fs::create_dir_all(letter.parent().unwrap()).unwrap();
    std::fs::write(&letter, "dear all").unwrap();
    let store = open_again(config(&server, ""));
    wait_for("deleting", || server.objects("node1").iter().all(|(path, _)| !left.iter().any(|(old, _)| old == path)));
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, (0..PAGES).step_by(3), 2);
    assert_eq!(std::fs::read(&letter).unwrap(), b"dear all");
}

#[test]
fn a_server_as_cephs_gateway_is_begun_again_and_held_up_by_no_late_acknowledgement() {
    let dir = Dir::new("s3-ceph");
    let server = start(&dir);
    server.be_as_ceph();
    drop(Store::open(config(&server, "")).unwrap());
    let store = open_again(config(&server, ""));
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    check(&mut lane, (0..PAGES).step_by(20), 1);
    let (mut got, fetches) = (vec![0; PAGE], store.stats().disk.unwrap().fetches);
    // Of those written first, which lie below.
    let mut times: Vec<_> = (0..PAGES / 4)
        .step_by(15)
        .map(|page| {
            let begun = Instant::now();
            lane.read(page * PAGE as u64, &mut got).unwrap();
            begun.elapsed()
        })
        .collect();
    assert!(store.stats().disk.unwrap().fetches >= fetches + times.len() as u64 / 2);
    // Linux holds an acknowledgement back for 40 ms at least. A busy machine holds up most reads as well, not all.
    times.sort();
    assert!(times[times.len() / 10] < Duration::from_millis(30), "{times:?}");
}

/// An authority, and a server's certificate for localhost.
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
    openssl(&format!("req {key} -subj /CN=server -keyout server-key.pem -out server.csr"));
    openssl(
        "x509 -req -in server.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile names \
         -out server-cert.pem",
    );
}

#[test]
fn through_tls_to_whom_the_certificate_names() {
    let dir = Dir::new("s3-tls");
    let at = dir.tier().parent().unwrap().to_owned();
    certificates(&at);
    let mut server = start(&dir);
    let file = |name: &str| at.join(name).display().to_string();
    let keys = format!("size=64M,timeout=5s,credentials={}", file("credentials"));
    let tier = |host: &str, more: &str| format!("s3:pages/a/b,endpoint=https://{host}:{},{keys}{more}", server.port());
    let (good, elsewhere) = (tier("localhost", &format!(",ca={}", file("ca-cert.pem"))), tier("127.0.0.1", ""));
    let others = tier("localhost", &format!(",ca={}", file("other-cert.pem")));
    let plain = good.replace("https:", "http:").replace(&format!(",ca={}", file("ca-cert.pem")), "");
    let store = Store::open(configured(&good)).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    write(&mut lane, 0..PAGES, 1);
    server.kill();
    server.start_again();
    check(&mut lane, 0..PAGES, 1);
    write(&mut lane, 0..PAGES, 2);
    check(&mut lane, (0..PAGES).step_by(3), 2);
    drop((lane, store));
    let refused = |tier: &str, why: &str| {
        let told = Store::open(configured(tier)).err().unwrap().to_string();
        assert!(told.contains(why) && !told.contains('\n'), "{told}");
    };
    refused(&others, "certificate");
    // The system's authorities do not know this one.
    refused(&elsewhere, "certificate");
    // A server that speaks nothing else.
    refused(&plain, "https://");
    // And one that does not speak it: nothing goes there in the clear.
    server.kill();
    std::fs::remove_file(at.join("server-cert.pem")).unwrap();
    server.start_again();
    assert!(Store::open(configured(&good)).is_err());
}

#[test]
fn what_cannot_be_a_tier_is_refused_in_a_line() {
    let dir = Dir::new("s3-refused");
    let mut server = start(&dir);
    let keys = |path: PathBuf| format!(",credentials={}", path.display());
    let own = keys(at(&server).join("credentials"));
    let refused = |tier: &str, what: &str| {
        let begun = Instant::now();
        let why = Store::open(configured(tier)).err().unwrap().to_string();
        assert!(!why.contains('\n') && why.contains("s3:") && why.contains(what), "{tier}: {why}");
        assert!(!why.contains("wrong") && !why.contains(Server::own_keys().1), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(12), "{:?}: {why}", begun.elapsed());
    };
    let wrong = keys(server.keys("wrong-secret", Server::own_keys().0, "wrong"));
    refused(&server.tier("/a", &wrong), "403");
    refused(&server.tier("/a", &keys(server.keys("wrong-key", "wrong", "wrong"))), "HTTP");
    refused(&server.tier("/a", ""), "AWS_ACCESS_KEY_ID");
    refused(&server.tier("/a", ",credentials=/nowhere/keys"), "No such file");
    let open = server.keys("open", "x", "wrong");
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    refused(&server.tier("/a", &keys(open)), "chmod 600");
    refused(&server.tier("/a", &own).replace("s3:pages", "s3:no-such-bucket"), "no such bucket");
    // A prefix that holds something else, or that another machine's store has.
    std::fs::create_dir_all(server.bucket().join("photos/2026")).unwrap();
    std::fs::write(server.bucket().join("photos/2026/cat"), "cat").unwrap();
    refused(&server.tier("/photos", &own), "something else");
    refused(&server.tier("", &own), "something else");
    std::fs::create_dir(server.bucket().join("letters")).unwrap();
    std::fs::write(server.bucket().join("letters/ghostswap"), "dear all").unwrap();
    refused(&server.tier("/letters", &own), "something else");
    drop(Store::open(configured(&server.tier("/n", &own))).unwrap());
    let header = server.bucket().join("n/ghostswap");
    let mut head = std::fs::read(&header).unwrap();
    head[40] ^= 1;
    let name = head[49..49 + usize::from(head[48])].to_vec();
    std::fs::write(&header, head).unwrap();
    // Whichever is told first: another test's child may have its socket for a moment yet.
    std::thread::sleep(Duration::from_millis(500));
    refused(&server.tier("/n", &own), &format!("on another machine, {}", String::from_utf8(name).unwrap()));
    std::fs::remove_file(&header).unwrap();
    drop(open_again(configured(&server.tier("/n", &own))));
    // Keys from the environment, in a process of its own.
    let tier = server.tier("/env", "");
    let child = ledger::fork(|| {
        let (key, secret) = Server::own_keys();
        std::env::set_var("AWS_ACCESS_KEY_ID", key);
        std::env::set_var("AWS_SECRET_ACCESS_KEY", secret);
        i32::from(Store::open(configured(&tier)).is_err())
    });
    assert!(matches!(ledger::wait(child), ledger::End::Exit(0)));
    // A program that was built without, and a server that is not there.
    let without = StoreConfig { s3: None, ..configured(&server.tier("/a", &own)) };
    assert!(Store::open(without).err().unwrap().to_string().contains("--features s3"));
    let tier = server.tier("/a", &own);
    server.kill();
    refused(&tier, "refused");
}
