//! What people write on command lines: exports and tiers.
#![no_main]

use ghostswap::TierConfig;
use ghostswap_nbd::export::ExportConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = text.parse::<ExportConfig>() {
        assert!(!config.name.is_empty() && config.clients.iter().all(|name| !name.is_empty()));
    }
    let _ = text.parse::<TierConfig>();
});
