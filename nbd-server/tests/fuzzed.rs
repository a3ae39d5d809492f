//! What the targets in fuzz/ try for hours with a fuzzer's eye for new branches, here for seconds at random,
//! with nothing but stable Rust: the same entry functions, input that is mostly right and wrong in places.
//!
//! `GHOSTSWAP_FUZZ_SECONDS` is how long for each (2); `GHOSTSWAP_FUZZ_SEED` repeats one input, whose seed a
//! failing test tells.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

#[path = "common/replies.rs"]
mod replies;

use ghostswap::{Store, StoreConfig, TierConfig};
use ghostswap_nbd::conversation::{from_handshake, from_requests, offer};
use ghostswap_nbd::export::ExportConfig;
use ghostswap_nbd::handshake::Offer;
use ghostswap_nbd::proto::Form;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// Sizes and places: those that matter, and their neighbours.
    fn number(&mut self, volume: u64) -> u64 {
        let edge = self.of(&[0, 512, 4096, 256 << 10, volume, 32 << 20, 1 << 31, 1 << 32, 1 << 63, u64::MAX]);
        match self.below(8) {
            0 => edge,
            1 => edge.wrapping_add(512),
            2 => edge.wrapping_sub(512),
            3 => edge.wrapping_add(self.below(3)).wrapping_sub(1),
            4 => self.next(),
            _ => self.below(volume / 512) * 512 % volume,
        }
    }
}

fn make_offer() -> (Store, Offer) {
    let tier: TierConfig = "ram,limit=64M,codec=lz4".parse().unwrap();
    let store = Store::open(StoreConfig { tiers: vec![tier], ..StoreConfig::default() }).unwrap();
    let offer = offer(&store, &["a,size=1M", "long-name,size=2M,ro", "theirs,size=1M,client=x"]).unwrap();
    (store, offer)
}

/// Tries inputs until time is over; a failure tells the seed of its input.
fn for_a_while(name: &str, mut attempt: impl FnMut(&mut Random)) {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let only = variable("GHOSTSWAP_FUZZ_SEED");
    let first = only.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    let end = Instant::now() + Duration::from_secs(variable("GHOSTSWAP_FUZZ_SECONDS").unwrap_or(2));
    let mut tried = 0;
    for seed in first.. {
        if tried > 0 && (only.is_some() || Instant::now() > end) {
            break;
        }
        tried += 1;
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| attempt(&mut Random(seed)))) {
            eprintln!("repeat with GHOSTSWAP_FUZZ_SEED={seed} cargo test -p ghostswap-nbd --test fuzzed {name}");
            std::panic::resume_unwind(panic);
        }
    }
    println!("{name}: {tried} inputs from seed {first}");
}

/// Flips, cuts and doubles here and there.
fn damage(random: &mut Random, input: &mut Vec<u8>) {
    for _ in 0..random.below(4) {
        if input.is_empty() {
            return;
        }
        let at = random.below(input.len() as u64) as usize;
        match random.below(4) {
            0 => input[at] = random.next() as u8,
            1 => input[at] ^= 1 << random.below(8),
            2 => input.truncate(at),
            _ => {
                let piece = input[at..].iter().take(40).copied().collect::<Vec<_>>();
                input.splice(at..at, piece);
            }
        }
    }
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

fn option(random: &mut Random) -> Vec<u8> {
    let option = random.of(&[1, 2, 3, 5, 6, 6, 7, 7, 8, 9, 10, 10, 11, 12, u32::MAX]);
    let name: &[u8] = random.of(&[&b"a"[..], b"", b"long-name", b"theirs", b"none", &[0xff; 5000]]);
    let mut data = match option {
        1 => name.to_vec(),
        6 | 7 => {
            let asked = random.below(5) as u16;
            let list = (0..asked).flat_map(|_| (random.below(5) as u16).to_be_bytes()).collect::<Vec<_>>();
            [&string(name), &asked.to_be_bytes()[..], &list].concat()
        }
        9 | 10 => {
            let queries = random.below(4) as u32;
            let list = (0..queries).flat_map(|_| {
                string(random.of(&[&b"base:allocation"[..], b"base:", b"ghostswap:kind", b":", b"", b"x:y"]))
            });
            let list = list.collect::<Vec<_>>();
            [&string(name), &queries.to_be_bytes()[..], &list].concat()
        }
        _ if random.one_in(8) => vec![7; random.of(&[1, 100, 65536, 65537, 200_000])],
        _ => Vec::new(),
    };
    if random.one_in(10) {
        damage(random, &mut data);
    }
    let len = if random.one_in(30) { random.next() as u32 } else { data.len() as u32 };
    [&b"IHAVEOPT"[..], &option.to_be_bytes(), &len.to_be_bytes(), &data].concat()
}

fn request(random: &mut Random, extended: bool, volume: u64) -> Vec<u8> {
    let command = random.of(&[0u16, 0, 1, 1, 1, 3, 4, 5, 6, 7, 7, 8, u16::MAX]);
    let flags = if random.one_in(3) { 1u16 << random.below(7) } else { 0 };
    let flags = flags | if extended && command == 1 { 32 } else { 0 };
    let (offset, len) = (random.number(volume), random.number(volume));
    let magic = if extended { 0x21e4_1c71u32 } else { 0x2560_9513 };
    let mut bytes = [&magic.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
    bytes.extend_from_slice(&random.next().to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    if extended {
        bytes.extend_from_slice(&len.to_be_bytes());
    } else {
        bytes.extend_from_slice(&(len as u32).to_be_bytes());
    }
    let payload = if extended { len } else { u64::from(len as u32) };
    if (command == 1 || extended && flags & 32 != 0) && payload <= 1 << 20 && !random.one_in(20) {
        bytes.extend((0..payload).map(|at| (at >> 12) as u8));
    }
    bytes
}

#[test]
fn handshakes() {
    let (_store, offer) = make_offer();
    for_a_while("handshakes", |random| {
        let mut input = random.of(&[0u32, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]).to_be_bytes().to_vec();
        (0..random.below(12)).for_each(|_| input.extend(option(random)));
        (0..random.below(3)).for_each(|_| input.extend(request(random, random.0 % 2 == 0, 1 << 20)));
        if random.one_in(3) {
            damage(random, &mut input);
        }
        replies::check_handshake(&from_handshake(&offer, &input).bytes);
    });
}

fn requests(name: &str, form: Form) {
    let (_store, offer) = make_offer();
    let extended = form == Form::Extended;
    for_a_while(name, |random| {
        let mut input = Vec::new();
        (0..random.below(20)).for_each(|_| input.extend(request(random, extended, 1 << 20)));
        if random.one_in(4) {
            damage(random, &mut input);
        }
        let said = from_requests(&offer, form, &input);
        // Data after a simple reply has no mark of its own.
        if form != Form::Simple {
            replies::check_chunks(&said.bytes, extended);
        }
    });
}

#[test]
fn simple_requests() {
    requests("simple_requests", Form::Simple);
}

#[test]
fn structured_requests() {
    requests("structured_requests", Form::Structured);
}

#[test]
fn extended_requests() {
    requests("extended_requests", Form::Extended);
}

#[test]
fn config_strings() {
    let parts = [
        "a",
        "ram",
        ",",
        "=",
        ":",
        "size",
        "limit",
        "client",
        "codec",
        "lz4",
        "zstd",
        "group",
        "idle",
        "ro",
        "16T",
        "50%",
        "64K",
        "10m",
        "-1",
        "0",
        "99999999999999999999",
        "%",
        "é",
        " ",
        "\0",
        "18446744073709551615",
        "1e9",
        ".5",
    ];
    for_a_while("config_strings", |random| {
        let text = (0..random.below(12)).map(|_| random.of(&parts)).collect::<String>();
        if let Ok(config) = text.parse::<ExportConfig>() {
            assert!(!config.name.is_empty() && config.clients.iter().all(|name| !name.is_empty()), "{text:?}");
        }
        // What is no tier ends in an error, not in a panic; what is one may still be refused.
        let _ = text.parse::<TierConfig>();
    });
}

#[test]
fn certificates() {
    // No certificate at all, and lengths that lie, in the shape of DER.
    for_a_while("certificates", |random| {
        let mut input = vec![0x30, 0x82, 1, 0, 0x30, 0x81, 200, 0xa0, 3, 2, 1, 2, 2, 1, 1, 0x30, 10, 6, 8];
        input.extend(
            (0..random.below(300)).map(|_| random.of(&[0x30u8, 0x31, 0x06, 0x03, 0x55, 0x04, 0x0c, 2, 0x80, 0xff])),
        );
        damage(random, &mut input);
        let _ = ghostswap_nbd::tls::names_in(&input);
    });
}
