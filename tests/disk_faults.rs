//! A disk tier that refuses writes, and later takes them again; that loses what it held. A process of its
//! own, since what makes the disk refuse (`RLIMIT_FSIZE`) is the process's.

#![allow(unsafe_code, reason = "setrlimit and signal")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ghostswap::{Error, Store, StoreConfig};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;

fn largest_file(bytes: u64) {
    // SAFETY: the kernel reads the struct; SIGXFSZ has no handler of ours.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}

/// Does not compress.
fn content(page: u64) -> Vec<u8> {
    let mut x = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    (0..PAGE / 8).flat_map(|_| next()).collect()
}

#[test]
fn what_a_disk_refuses_stays_in_memory_and_what_it_loses_is_named() {
    let path = std::env::temp_dir().join(format!("ghostswap-faults-{}", std::process::id()));
    let tiers = ["ram,limit=8M".to_string(), format!("file:{},size=64M,prealloc=off", path.display())];
    let config = StoreConfig { tiers: tiers.iter().map(|t| t.parse().unwrap()).collect(), ..StoreConfig::default() };
    let store = Store::open(config).unwrap();
    let mut lane = store.create_volume(1 << 30).unwrap().lane().unwrap();
    // The disk takes the first 16 MiB and refuses the rest: writes are refused once memory is full too.
    largest_file(16 << 20);
    let mut pages = 0;
    let full = loop {
        match lane.write(pages * PAGE, &content(pages)) {
            Ok(()) => pages += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, Error::NoSpace), "{full}");
    let disk = store.stats().disk.unwrap();
    assert!(disk.failing && disk.write_errors > 0 && disk.used_bytes > 12 << 20, "{disk:?}");
    assert!((5000..6200).contains(&pages), "{pages} pages, 22 to 24 MiB");
    let mut got = vec![0; PAGE as usize];
    for page in 0..pages {
        lane.read(page * PAGE, &mut got).unwrap();
        assert!(got == content(page), "page {page}");
    }
    // It takes them again, and is found to.
    largest_file(libc::RLIM_INFINITY);
    let begun = Instant::now();
    while store.stats().disk.unwrap().failing {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is not tried again");
        std::thread::sleep(Duration::from_millis(50));
    }
    for page in pages..pages + 4000 {
        lane.write(page * PAGE, &content(page)).unwrap();
    }
    for page in 0..pages + 4000 {
        lane.read(page * PAGE, &mut got).unwrap();
        assert!(got == content(page), "page {page}");
    }
    // The file is cut off behind its first extents: those pages stay, of the others each is an error, with
    // its name, after a second of trying.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    let lost = (0..pages).rev().find(|page| match lane.read(page * PAGE, &mut got) {
        Ok(()) => {
            assert!(got == content(*page), "page {page}");
            false
        }
        Err(Error::Unreadable { page: named, .. }) => {
            assert_eq!(u64::from(named), *page);
            true
        }
        Err(e) => panic!("page {page}: {e}"),
    });
    assert!(lost.is_some(), "what was cut off can be read");
    assert!(store.stats().disk.unwrap().read_errors >= 6, "it was tried again and again");
    // Written anew it is well.
    let lost = lost.unwrap();
    lane.write(lost * PAGE, &content(lost + 1)).unwrap();
    lane.read(lost * PAGE, &mut got).unwrap();
    assert!(got == content(lost + 1));
    drop(lane);
    store.audit().unwrap();
    std::fs::remove_file(path).unwrap();
}
