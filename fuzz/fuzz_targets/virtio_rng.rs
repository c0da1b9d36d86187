//! The entropy device behind its registers: hostile drivers and hostile snapshots.

#![no_main]

use firn_fuzz::{
    guest,
    script::{self, Driver, Step},
};
use firn_vmm::devices::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step<()>>| {
    let memory = guest::memory();
    let mut driver = Driver::new(Rng::new(memory.clone()), memory);
    script::follow(&mut driver, &mut (), steps);
});
