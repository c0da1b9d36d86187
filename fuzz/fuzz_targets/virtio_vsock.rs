//! The socket device behind its registers: hostile drivers, hostile snapshots, and hosts that come
//! and go.

#![no_main]

use firn_fuzz::{
    guest,
    script::{self, Driver, Step},
    vsock::{Extra, Host},
};
use firn_vmm::devices::vsock::Vsock;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step<Extra>>| {
    let memory = guest::memory();
    let mut driver = Driver::new(Vsock::new(memory.clone()), memory);
    let mut host = Host::new(&mut driver);
    script::follow(&mut driver, &mut host, steps);
});
