//! A client's bytes from the first one on: options in any order, and what follows.
#![no_main]

#[path = "../../nbd-server/tests/common/replies.rs"]
#[allow(dead_code)]
mod replies;

use ghostswap::{Store, StoreConfig};
use ghostswap_nbd::conversation::{from_handshake, offer};
use ghostswap_nbd::handshake::Offer;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static OFFER: LazyLock<(Store, Offer)> = LazyLock::new(|| {
    let tiers = vec!["ram,limit=64M,codec=lz4".parse().expect("a tier")];
    let store = Store::open(StoreConfig { tiers, ..StoreConfig::default() }).expect("a store");
    let offer = offer(&store, &["a,size=1M", "long-name,size=2M,ro", "theirs,size=1M,client=x"]).expect("exports");
    (store, offer)
});

fuzz_target!(|input: &[u8]| {
    replies::check_handshake(&from_handshake(&OFFER.1, input).bytes);
});
