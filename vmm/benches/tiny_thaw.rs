//! From control request to first guest instruction, on this host's `/dev/kvm`, with a guest whose
//! first instruction after the thaw is a port write. A shell stands ready; the process is not
//! jailed (the jail is built before a shell stands, and seccomp is on).
//!
//! `cargo bench -p firn-vmm --bench tiny_thaw [-- ITERATIONS [FIRECRACKER]]` prints one JSON line of medians and
//! percentiles in microseconds; `tiny/mod.rs` says of what. With a Firecracker it is measured in turns: a
//! tiny guest, too, of as much memory, its snapshot in the page cache; from the request for a process
//! ("fresh") and from the request to load ("load") to the first byte on its serial port.

#[path = "../tests/common/mod.rs"]
mod common;
mod peer;
mod tiny;

use std::path::Path;

use common::{Vmm, config, kvm};
use tiny::{NAMES, Snapshot};

fn main() {
    // Cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let iterations = arguments.first().map_or(200, |count| count.parse().unwrap());
    let Some(kvm) = kvm() else { return };
    let memory_mib = config(1, false).memory_mib;
    let peer = arguments.get(1).map(|path| peer::Firecracker::new(Path::new(path), memory_mib));
    let mut peers: Vec<[f64; 2]> = Vec::new();
    let snapshot = Snapshot::take(&kvm);
    let mut samples = Vec::new();
    for _ in 0..iterations {
        if let Some(peer) = &peer {
            let (fresh, load) = peer.thaw();
            peers.push([fresh, load]);
        }
        samples.push(snapshot.thaw(Vmm::spawn(&kvm)));
    }
    let mut figures = common::quantiles(NAMES, &samples);
    if !peers.is_empty() {
        let names = ["firecracker_fresh", "firecracker_load"];
        figures = format!("{figures},{}", common::quantiles(names, &peers));
    }
    println!("{{\"bench\":\"tiny_thaw\",\"iterations\":{iterations},{figures}}}");
}
