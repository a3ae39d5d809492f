//! A client's certificate, whatever its bytes: names or none.
#![no_main]

use ghostswap_nbd::tls::names_in;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|certificate: &[u8]| {
    let _ = names_in(certificate);
});
