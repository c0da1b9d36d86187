//! KVM's binary statistics, which are trusted for nothing but their numbers.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let counters = firn_vmm::stats::parse(bytes);
    assert!(counters.len() <= 1024);
});
