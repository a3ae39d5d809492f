//! Requests in each of the three forms; the first byte chooses.
#![no_main]

#[path = "../../nbd-server/tests/common/replies.rs"]
#[allow(dead_code)]
mod replies;

use ghostswap::{Store, StoreConfig};
use ghostswap_nbd::conversation::{from_requests, offer};
use ghostswap_nbd::handshake::Offer;
use ghostswap_nbd::proto::Form;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static OFFER: LazyLock<(Store, Offer)> = LazyLock::new(|| {
    let tiers = vec!["ram,limit=64M,codec=lz4".parse().expect("a tier")];
    let store = Store::open(StoreConfig { tiers, ..StoreConfig::default() }).expect("a store");
    let offer = offer(&store, &["a,size=1M"]).expect("an export");
    (store, offer)
});

fuzz_target!(|input: &[u8]| {
    let Some((first, requests)) = input.split_first() else { return };
    let form = [Form::Simple, Form::Structured, Form::Extended][usize::from(first % 3)];
    let said = from_requests(&OFFER.1, form, requests);
    if form != Form::Simple {
        replies::check_chunks(&said.bytes, form == Form::Extended);
    }
});
