//! A file tier against the disk it lies on: how fast pages go down, and what a page costs that is read from there.
//! `scripts/bench/below` runs it beside fio.
//!
//! Pages do not compress, so that each byte written is a byte on disk. Everything is past the page cache.

use ghostswap::{Buffer, Lane, Reads, Store, StoreConfig, Taken};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const BYTES: u64 = 1 << 30;
const READS: usize = 4000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

fn main() {
    let dir = std::env::var_os("BELOW_DIR").unwrap_or_else(|| std::env::temp_dir().into());
    let path = Path::new(&dir).join(format!("ghostswap-below-{}", std::process::id()));
    let tiers = ["ram,limit=1536M".to_owned(), format!("file:{},size={}", path.display(), BYTES + (BYTES >> 3))];
    let tiers = tiers.iter().map(|tier| tier.parse().expect("a good tier")).collect();
    let store = Store::open(StoreConfig { tiers, ..StoreConfig::default() }).expect("the directory can hold the tier");
    let volume = store.create_volume(BYTES).expect("there is no other");
    let mut lane = volume.lane().expect("there is no other");
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut data = vec![0u8; 1 << 20];
    data.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
    let written = || store.stats().disk.expect("there is a disk").written_bytes;
    // Twice: the first time to space that holds zeros.
    for pass in ["write-back", "write-back again"] {
        let before = written();
        for at in (0..BYTES).step_by(data.len()) {
            data[..8].copy_from_slice(&(at + before).to_le_bytes());
            lane.write(at, &data).expect("there is room");
        }
        assert_eq!(before, written(), "memory holds all of it");
        let since = Instant::now();
        store.write_back(0).expect("there is a disk");
        // All but what is in open segments.
        while written() - before < BYTES - (4 << 20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let rate = (written() - before) as f64 / since.elapsed().as_secs_f64() / f64::from(1 << 20);
        println!("{pass}: {rate:.0} MiB/s");
        while store.stats().disk.expect("there is a disk").writing_back {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let mut options = File::options();
    let bare = options.read(true).custom_flags(libc::O_DIRECT).open(&path).expect("the tier's file");
    let blocks = BYTES / PAGE as u64;
    let (mut block, mut page) = (Buffer::new(PAGE), vec![0; PAGE]);
    let (mut bare_us, mut ours_us, mut ring_us) = (Vec::new(), Vec::new(), Vec::new());
    let mut reads = Reads::new(&lane, 1).expect("the kernel has io_uring").expect("there is a disk");
    let us = |since: Instant| since.elapsed().as_secs_f64() * 1e6;
    for _ in 0..READS {
        let at = (1 + random.below(blocks)) * PAGE as u64;
        let since = Instant::now();
        bare.read_exact_at(&mut block, at).expect("a block of the file");
        bare_us.push(us(since));
        let at = random.below((BYTES - (8 << 20)) / PAGE as u64) * PAGE as u64;
        let fetches = store.stats().disk.expect("there is a disk").fetches;
        let since = Instant::now();
        lane.read(at, &mut page).expect("a page that was written");
        let took = us(since);
        if store.stats().disk.expect("there is a disk").fetches > fetches {
            ours_us.push(took);
        }
        let at = random.below((BYTES - (8 << 20)) / PAGE as u64) * PAGE as u64;
        let since = Instant::now();
        if read_by_ring(&mut lane, &mut reads, at, &mut page) {
            ring_us.push(us(since));
        }
    }
    println!(
        "read p50: bare {:.1} us, ours {:.1} us, by a ring {:.1} us, {} reads",
        median(&mut bare_us),
        median(&mut ours_us),
        median(&mut ring_us),
        ours_us.len()
    );
    drop((reads, lane, volume, store));
    std::fs::remove_file(path).expect("the tier's file");
}

/// As a connection does it: the ring hands a file's read to a thread of the kernel's. False: the page was in memory.
#[allow(unsafe_code, reason = "poll")]
fn read_by_ring(lane: &mut Lane, reads: &mut Reads, at: u64, page: &mut [u8]) -> bool {
    let (_, needed) = lane.read_or_fetch(at, page).expect("a page that was written");
    let Some(mut fetch) = needed else { return false };
    loop {
        reads.start(fetch.at(), fetch.bytes()).expect("none is under way");
        let mut ended = loop {
            if let Some(ended) = reads.ended() {
                break ended;
            }
            let mut news = libc::pollfd { fd: reads.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one live entry.
            unsafe { libc::poll(&mut news, 1, -1) };
        };
        ended.result.expect("blocks of the file");
        match lane.take_fetched(&fetch, &mut ended.buffer, at, page).expect("a page that was written") {
            Taken::More(more) => fetch = more,
            Taken::Bytes(_) => return true,
        }
    }
}

fn median(of: &mut [f64]) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}
