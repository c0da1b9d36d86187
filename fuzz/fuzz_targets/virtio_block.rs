//! The block device behind its registers: hostile drivers, hostile snapshots, and media that
//! change. Whatever happens, the immutable backing stays as it is.

#![no_main]

use firn_fuzz::{
    block::{self, Extra},
    guest,
    script::{self, Step},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, Vec<Step<Extra>>)| {
    let (read_only, steps) = input;
    let (mut driver, mut host) = block::driver(read_only, guest::memory());
    script::follow(&mut driver, &mut host, steps);
    block::check_backing();
});
