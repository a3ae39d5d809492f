//! What clients hear of a page that the store cannot give back: which one, and that the rest is well.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

#[path = "common/replies.rs"]
#[allow(dead_code)]
mod replies;

use ghostswap::{Store, StoreConfig};
use ghostswap_nbd::conversation::{from_requests, offer};
use ghostswap_nbd::proto::Form;
use std::fs::File;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// In the second slice of a request that reads all, and not at its start.
const DAMAGED: u64 = 100;

fn noise(page: u64) -> Vec<u8> {
    let mut state = page + 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state ^ state >> 29).to_le_bytes()
    });
    words.collect()
}

/// Overwrites the record of a page whose content is stored as it is: its header says whose it is.
fn damage(store: &Store, content: &[u8]) {
    let arena = File::from(store.arena_fd().try_clone_to_owned().unwrap());
    let len = arena.metadata().unwrap().len();
    let mut chunk = vec![0; 1 << 20];
    for at in (0..len).step_by(chunk.len() - PAGE) {
        let read = arena.read_at(&mut chunk, at).unwrap();
        if let Some(found) = chunk[..read].windows(32).position(|window| window == &content[..32]) {
            return arena.write_all_at(&[0xff; 64], at + found as u64 - 32).unwrap();
        }
    }
    panic!("the page is not in the arena");
}

fn request(form: Form, command: u8, offset: u64, len: u64, data: &[u8]) -> Vec<u8> {
    let extended = form == Form::Extended;
    let magic = if extended { 0x21e4_1c71u32 } else { 0x2560_9513 };
    let len = if extended { len.to_be_bytes().to_vec() } else { (len as u32).to_be_bytes().to_vec() };
    [&magic.to_be_bytes(), &[0, 0, 0, command][..], &[7; 8], &offset.to_be_bytes(), &len, data].concat()
}

#[test]
fn a_damaged_page_is_told_by_its_place() {
    let tiers = vec!["ram,limit=64M,codec=lz4".parse().unwrap()];
    let store = Store::open(StoreConfig { tiers, ..StoreConfig::default() }).unwrap();
    let offer = offer(&store, &["a,size=1M"]).unwrap();
    let image = (0..256).flat_map(noise).collect::<Vec<_>>();
    let said = from_requests(&offer, Form::Simple, &request(Form::Simple, 1, 0, 1 << 20, &image));
    assert_eq!(said.bytes[4..8], [0; 4]);
    damage(&store, &noise(DAMAGED));
    let place = DAMAGED * PAGE as u64;

    for (form, head) in [(Form::Structured, 20), (Form::Extended, 32)] {
        let two = [request(form, 0, 0, 1 << 20, b""), request(form, 0, place + 4096, 4096, b"")].concat();
        let said = from_requests(&offer, form, &two).bytes;
        replies::check_chunks(&said, form == Form::Extended);
        // The slice before it, then the error with its place, then the next request's data.
        assert!(said[head + 8..][..256 << 10] == image[..256 << 10]);
        let error = &said[head + 8 + (256 << 10)..];
        assert_eq!(error[..8][4..], [0, 1, 0x80, 2], "{form:?}: the last chunk, ERROR_OFFSET");
        let payload = &error[head..][..14];
        assert_eq!(payload, [&5u32.to_be_bytes()[..], &[0; 2], &place.to_be_bytes()].concat());
        assert!(error[head + 14 + head + 8..] == image[place as usize + 4096..][..4096]);
        // From within the page on, the place is where the request begins.
        let said = from_requests(&offer, form, &request(form, 0, place + 512, 512, b"")).bytes;
        assert_eq!(said[head + 6..], (place + 512).to_be_bytes());
    }
    // A simple reply has its error in front, or there is none; what can be read still is.
    let small = [request(Form::Simple, 0, place, 4096, b""), request(Form::Simple, 0, 0, 4096, b"")].concat();
    let said = from_requests(&offer, Form::Simple, &small);
    assert_eq!(said.bytes[4..8], 5u32.to_be_bytes());
    assert!(said.end.is_ok() && said.bytes[16 + 16..] == image[..4096]);
    let said = from_requests(&offer, Form::Simple, &request(Form::Simple, 0, 0, 1 << 20, b""));
    assert!(said.end.is_err() && said.bytes.len() < 16 + (1 << 20), "it can only be hung up on");
    // Written anew, it is well again.
    let anew = [request(Form::Simple, 1, place, 4096, &noise(7)), request(Form::Simple, 0, place, 4096, b"")].concat();
    assert!(from_requests(&offer, Form::Simple, &anew).bytes[32..] == noise(7));
}
