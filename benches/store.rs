//! The store against the bare codec on the same captured pages, side by side in one run; two
//! threads against one; metadata and density under random overwrite at the limit; density and cost of
//! compressing again; zstd with a dictionary that the store trained from one half of the pages against zstd without, on the
//! other half.
//!
//! `cargo bench --bench store`. Figures are medians of the rounds, in CPU-neutral wall time of one
//! machine: read the ratios. The bare codec is C lz4 through the calls that the store uses, or
//! zstd with a kept context, page after page into and out of one buffer that holds them all.

use ghostswap::{Store, StoreConfig};
use std::time::Instant;

const PAGE: usize = 4096;
const ROUNDS: usize = 7;

fn corpus() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/pages.bin.zst");
    zstd::decode_all(std::fs::File::open(path).expect("the corpus is in the tree")).expect("the corpus is zstd")
}

/// Pages that the codec gets to see: same-filled ones never do.
fn real_pages(corpus: &[u8]) -> Vec<u8> {
    corpus.chunks_exact(PAGE).filter(|p| p[8..] != p[..PAGE - 8]).flatten().copied().collect()
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn time(pages: usize, body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_nanos() as f64 / pages as f64
}

enum Bare {
    Lz4(Vec<u8>),
    Zstd(zstd::bulk::Compressor<'static>, zstd::bulk::Decompressor<'static>),
}

extern "C" {
    fn LZ4_initStream(buffer: *mut std::ffi::c_void, size: usize) -> *mut std::ffi::c_void;
    fn LZ4_sizeofState() -> std::ffi::c_int;
    fn LZ4_compress_fast_extState_fastReset(
        state: *mut std::ffi::c_void,
        src: *const std::ffi::c_char,
        dst: *mut std::ffi::c_char,
        src_len: std::ffi::c_int,
        dst_cap: std::ffi::c_int,
        acceleration: std::ffi::c_int,
    ) -> std::ffi::c_int;
    fn LZ4_decompress_safe(
        src: *const std::ffi::c_char,
        dst: *mut std::ffi::c_char,
        len: std::ffi::c_int,
        cap: std::ffi::c_int,
    ) -> std::ffi::c_int;
}

#[allow(unsafe_code, reason = "the C library's interface")]
impl Bare {
    fn new(codec: &str) -> Bare {
        if codec == "lz4" {
            // SAFETY: the buffer has the size the library asks for.
            unsafe {
                let mut state = vec![0u8; LZ4_sizeofState() as usize];
                LZ4_initStream(state.as_mut_ptr().cast(), state.len());
                return Bare::Lz4(state);
            }
        }
        Bare::Zstd(
            zstd::bulk::Compressor::new(1).expect("level 1"),
            zstd::bulk::Decompressor::new().expect("a context"),
        )
    }

    /// Compressed length; 0 if it does not fit.
    fn compress(&mut self, src: &[u8], dst: &mut [u8]) -> usize {
        match self {
            // SAFETY: lengths are those of the slices.
            Bare::Lz4(state) => unsafe {
                LZ4_compress_fast_extState_fastReset(
                    state.as_mut_ptr().cast(),
                    src.as_ptr().cast(),
                    dst.as_mut_ptr().cast(),
                    src.len() as i32,
                    dst.len() as i32,
                    1,
                ) as usize
            },
            Bare::Zstd(c, _) => c.compress_to_buffer(src, dst).unwrap_or(0),
        }
    }

    fn decompress(&mut self, src: &[u8], dst: &mut [u8]) {
        match self {
            // SAFETY: lengths are those of the slices.
            Bare::Lz4(_) => unsafe {
                LZ4_decompress_safe(src.as_ptr().cast(), dst.as_mut_ptr().cast(), src.len() as i32, dst.len() as i32);
            },
            Bare::Zstd(_, d) => {
                d.decompress_to_buffer(src, dst).expect("it was compressed");
            }
        }
    }
}

fn store(limit: &str, codec: &str) -> Store {
    let tier = format!("ram,limit={limit},codec={codec}").parse().expect("a tier");
    Store::open(StoreConfig { tiers: vec![tier], ..StoreConfig::default() }).expect("a store")
}

/// ns/page of writing and reading through the store and through the bare codec, in turn.
fn against_codec(codec: &str, plain: &[u8]) {
    let pages = plain.len() / PAGE;
    let store = store("512M", codec);
    let volume = store.create_volume(1 << 40).expect("a volume");
    let mut lane = volume.lane().expect("a lane");
    let mut bare = Bare::new(codec);
    let mut packed = vec![1u8; plain.len() + PAGE];
    let mut spans = vec![(0usize, 0usize); pages];
    let mut out = vec![1u8; PAGE];
    let (mut bw, mut br, mut sw, mut sr) = (vec![], vec![], vec![], vec![]);
    // The first round warms up: first touch of memory is not what is measured.
    for round in 0..=ROUNDS {
        let w = time(pages, || {
            let mut at = 0;
            for (i, p) in plain.chunks_exact(PAGE).enumerate() {
                let n = bare.compress(p, &mut packed[at..at + PAGE - 256]);
                spans[i] = (at, n);
                at += n;
            }
        });
        let r = time(pages, || {
            spans.iter().filter(|s| s.1 > 0).for_each(|&(at, n)| bare.decompress(&packed[at..at + n], &mut out))
        });
        let ow = time(pages, || {
            plain.chunks_exact(PAGE).enumerate().for_each(|(i, p)| lane.write((i * PAGE) as u64, p).expect("room"));
        });
        let or = time(pages, || (0..pages).for_each(|i| lane.read((i * PAGE) as u64, &mut out).expect("there")));
        if round > 0 {
            bw.push(w);
            br.push(r);
            sw.push(ow);
            sr.push(or);
        }
    }
    let (bw, br, sw, sr) = (median(bw), median(br), median(sw), median(sr));
    println!(
        "{codec:8} write {sw:6.0} ns/page, codec alone {bw:6.0}: {:.3}    read {sr:6.0}, codec alone {br:6.0}: {:.3}",
        sw / bw,
        sr / br
    );
}

/// How much faster two threads do `work` than one, each with a state of its own, in turn.
fn speed_up<T: Send>(pages: usize, states: &mut [T; 2], work: impl Fn(&mut T, u64) + Sync) -> f64 {
    let (mut one, mut two) = (vec![], vec![]);
    for round in 0..=ROUNDS {
        let t1 = time(pages, || work(&mut states[0], 0));
        let t2 = time(2 * pages, || {
            std::thread::scope(|s| {
                for (k, state) in states.iter_mut().enumerate() {
                    let work = &work;
                    s.spawn(move || work(state, k as u64));
                }
            });
        });
        if round > 0 {
            one.push(t1);
            two.push(t2);
        }
    }
    median(one) / median(two)
}

/// Two threads overwriting through the store, and two threads with nothing but the codec: what
/// the machine has to give.
fn two_threads(codec: &str, plain: &[u8]) {
    let pages = plain.len() / PAGE;
    let store = store("512M", codec);
    let volume = store.create_volume(1 << 40).expect("a volume");
    let mut lanes = [volume.lane().expect("a lane"), volume.lane().expect("a lane")];
    let stored = speed_up(pages, &mut lanes, |lane, k| {
        let base = k << 30;
        plain.chunks_exact(PAGE).enumerate().for_each(|(i, p)| lane.write(base + (i * PAGE) as u64, p).expect("room"));
    });
    let mut bare = [(Bare::new(codec), vec![1u8; PAGE]), (Bare::new(codec), vec![1u8; PAGE])];
    let alone = speed_up(pages, &mut bare, |(bare, out), _| {
        plain.chunks_exact(PAGE).for_each(|p| {
            bare.compress(p, &mut out[..PAGE - 256]);
        });
    });
    println!("{codec:8} two threads write {stored:.2} times what one does; codec alone {alone:.2}");
}

/// Random overwrite with as much live as the limit holds at 1.10 held / live.
fn overwrite_at_limit(plain: &[u8]) {
    let limit = 128u64 << 20;
    let store = store("128M", "lz4");
    let volume = store.create_volume(1 << 40).expect("a volume");
    let mut lane = volume.lane().expect("a lane");
    let pages = plain.len() / PAGE;
    let mut n = 0u64;
    while store.stats().live_bytes + store.stats().map_bytes < limit * 100 / 109 {
        for _ in 0..256 {
            let k = n as usize % pages;
            lane.write(n * PAGE as u64, &plain[k * PAGE..][..PAGE]).expect("room");
            n += 1;
        }
    }
    let mut x = 88_172_645_463_325_252u64;
    let mut rates = vec![];
    for round in 0..=4 {
        let t = time(n as usize, || {
            for _ in 0..n {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                let k = x as usize % pages;
                lane.write((x >> 20) % n * PAGE as u64, &plain[k * PAGE..][..PAGE]).expect("room");
            }
        });
        if round > 0 {
            rates.push(t);
        }
    }
    let s = store.stats();
    println!(
        "overwrite at the limit: {n} pages, held / live {:.3}, {:.0} ns/page, {} segments cleaned, {} refused, metadata {:.2} bytes per stored page",
        s.held_bytes as f64 / s.live_bytes as f64,
        median(rates),
        s.cleaned_segments,
        s.refused_writes,
        s.metadata_per_page()
    );
}

/// CPU time of the whole process, in seconds.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc is there");
    let after_name = stat.rsplit(')').next().unwrap_or("");
    // Fields 14 and 15 of proc(5), in ticks of 1/100 s.
    let ticks = after_name.split_ascii_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum::<f64>();
    ticks / 100.0
}

/// Pages in their order, written one by one, then compressed again in groups.
fn compressed_again(plain: &[u8]) {
    let tiers = ["ram,limit=1G,codec=lz4", "ram,codec=zstd:3,group=64K"].map(|t| t.parse().expect("a tier"));
    let store = Store::open(StoreConfig { tiers: tiers.into(), ..StoreConfig::default() }).expect("a store");
    let volume = store.create_volume(1 << 40).expect("a volume");
    let mut lane = volume.lane().expect("a lane");
    let copies = 64;
    for copy in 0..copies {
        let base = copy * plain.len() as u64;
        plain.chunks_exact(PAGE).enumerate().for_each(|(i, p)| lane.write(base + (i * PAGE) as u64, p).expect("room"));
    }
    drop(lane);
    let pages = (copies as usize * plain.len() / PAGE) as f64;
    let before = store.stats();
    let began = cpu();
    store.recompress();
    let mut last = u64::MAX;
    // Until nothing has changed for a while: then all is done and memory has gone back.
    while store.stats().held_bytes != last {
        last = store.stats().held_bytes;
        std::thread::sleep(std::time::Duration::from_secs(2));
    }
    let (after, took) = (store.stats(), cpu() - began);
    let mut lane = volume.lane().expect("a lane");
    let mut page = vec![0; PAGE];
    let single = time(pages as usize, || {
        (0..pages as u64).for_each(|i| lane.read(i * PAGE as u64, &mut page).expect("it is there"));
    });
    let ratio = |s: &ghostswap::Stats| pages * PAGE as f64 / (s.held_bytes - s.reserve_bytes) as f64;
    println!(
        "compressed again: {pages} pages, data / memory {:.2}, all but the reserve counted; before {:.2}; {:.0} ns/page once, read singly {single:.0} ns/page",
        ratio(&after),
        ratio(&before),
        took / pages * 1e9
    );
}

/// Every second page is stored and a dictionary trained from what is; then the others are written and read, by turns with
/// a store that has none.
fn with_dictionary(codec: &str, dict: &str, plain: &[u8]) {
    let half = |odd: usize| -> Vec<u8> {
        plain.chunks_exact(PAGE).enumerate().filter(|(i, _)| i % 2 == odd).flat_map(|(_, p)| p.to_vec()).collect()
    };
    let (known, fresh) = (half(0), half(1));
    let pages = fresh.len() / PAGE;
    let stores = ["off", dict].map(|dict| store("512M", &format!("{codec},dict={dict}")));
    let volumes = stores.each_ref().map(|store| store.create_volume(1 << 40).expect("a volume"));
    for volume in &volumes {
        // Some segments full: of those that are open nothing is learned.
        let mut lane = volume.lane().expect("a lane");
        for copy in 0..6 {
            let at = |i: usize| (copy * known.len() + i * PAGE) as u64;
            known.chunks_exact(PAGE).enumerate().for_each(|(i, p)| lane.write(at(i), p).expect("room"));
        }
    }
    let began = Instant::now();
    stores[1].train_dictionary();
    let dictionaries = loop {
        let now = stores[1].stats().dictionaries;
        if now.trained + now.refused > 0 {
            break now;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    let trained_ms = began.elapsed().as_millis();
    let mut lanes = volumes.each_ref().map(|volume| volume.lane().expect("a lane"));
    let before = stores.each_ref().map(|store| store.stats().live_bytes);
    let (mut w, mut r) = ([vec![], vec![]], [vec![], vec![]]);
    let mut out = vec![1u8; PAGE];
    let base = 1 << 30;
    for round in 0..=3 * ROUNDS {
        for (which, lane) in lanes.iter_mut().enumerate() {
            let write = time(pages, || {
                let write = |(i, p): (usize, &[u8])| lane.write(base + (i * PAGE) as u64, p).expect("room");
                fresh.chunks_exact(PAGE).enumerate().for_each(write);
            });
            let read = time(pages, || {
                (0..pages).for_each(|i| lane.read(base + (i * PAGE) as u64, &mut out).expect("there"));
            });
            if round > 0 {
                w[which].push(write);
                r[which].push(read);
            }
        }
    }
    let ratio = |i: usize| fresh.len() as f64 / (stores[i].stats().live_bytes - before[i]) as f64;
    let ([w0, w1], [r0, r1]) = (w.map(median), r.map(median));
    println!(
        "{codec:8} dict={dict}: write {w1:.0} ns/page, without {w0:.0}: {:.2} times as fast    read {r1:.0}, without {r0:.0}: {:.2}    data / live {:.3}, without {:.3}    trained: {}, in {trained_ms} ms, {} KiB made ready",
        w0 / w1,
        r0 / r1,
        ratio(1),
        ratio(0),
        dictionaries.trained,
        dictionaries.held_bytes >> 10
    );
}

fn main() {
    let plain = real_pages(&corpus());
    println!("{} captured pages that are not same-filled; medians of {ROUNDS} rounds", plain.len() / PAGE);
    for codec in ["lz4", "zstd:1"] {
        against_codec(codec, &plain);
        two_threads(codec, &plain);
    }
    for (codec, dict) in [("zstd:1", "4K"), ("zstd:1", "16K"), ("zstd:1", "32K"), ("zstd:1", "64K"), ("zstd:3", "32K")]
    {
        with_dictionary(codec, dict, &plain);
    }
    overwrite_at_limit(&plain);
    compressed_again(&plain);
}
