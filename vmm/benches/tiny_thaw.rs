//! From control request to first guest instruction, on this host's `/dev/kvm`, with a guest whose
//! first instruction after the thaw is a port write. A shell stands ready; the process is not
//! jailed (the jail is built before a shell stands, and seccomp is on).
//!
//! `cargo bench -p firn-vmm --bench tiny_thaw [-- ITERATIONS [FIRECRACKER]]` prints one JSON line of medians and
//! percentiles in microseconds. "received" is the VMM's stamp of the message, "exit" that of the
//! first return of `KVM_RUN`, so both ends lie on one clock and the wake-up of the VMM is shown
//! apart. With a Firecracker it is measured in turns: a tiny guest, too, of as much memory, its
//! snapshot in the page cache; from the request for a process ("fresh") and from the request to load
//! ("load") to the first byte on its serial port.

#[path = "../tests/common/mod.rs"]
mod common;
mod peer;

use std::{os::fd::AsFd, os::unix::net::UnixStream, path::Path, time::Duration};

use common::{Vmm, config, elf, empty, kvm, memfd};
use firn_proto::control::{FromVmm, MemoryPlan, Phase, Stamps, ToVmm};

/// `l: out %al,$0x80; jmp l`
const OUT_FOR_EVER: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];

fn main() {
    // Cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let iterations = arguments.first().map_or(200, |count| count.parse().unwrap());
    let Some(kvm) = kvm() else { return };
    let memory_mib = config(1, false).memory_mib;
    let peer = arguments.get(1).map(|path| peer::Firecracker::new(Path::new(path), memory_mib));
    let mut peers: Vec<[f64; 2]> = Vec::new();
    let vmm = Vmm::shell(&kvm, &config(1, false));
    let (answer, _stream) = vmm.boot(&elf(OUT_FOR_EVER));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Done);
    let (memory, state) = (memfd(b""), memfd(b""));
    let answer = vmm.request(&ToVmm::Save { base: false }, &[memory.as_fd(), state.as_fd()]);
    let FromVmm::Saved(report) = answer else { panic!("{answer:?}") };
    state.set_len(report.state_bytes).unwrap();

    let mut samples: Vec<[f64; 6]> = Vec::new();
    for _ in 0..iterations {
        if let Some(peer) = &peer {
            let (fresh, load) = peer.thaw();
            peers.push([fresh, load]);
        }
        let vmm = Vmm::shell(&kvm, &config(1, false));
        std::thread::sleep(Duration::from_millis(2));
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
        let sent = now_ns();
        let answer = vmm.request(&message, &[memory.as_fd(), state.as_fd(), theirs.as_fd()]);
        assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
        // Asked only later: the question would take the processor from what it asks about.
        let stats = loop {
            std::thread::sleep(Duration::from_millis(2));
            match vmm.request(&ToVmm::Stats, &[]) {
                FromVmm::Stats(stats) if stats.stamps.get(Phase::FirstExit).is_some() => {
                    break stats;
                }
                FromVmm::Stats(_) => {}
                other => panic!("{other:?}"),
            }
        };
        let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
        let at = |phase| stamp(&stats.stamps, phase);
        let received = at(Phase::Received);
        samples.push([
            us(sent, received),
            us(received, at(Phase::Mapped)),
            us(received, at(Phase::DevicesSet)),
            us(received, at(Phase::VcpuSet)),
            us(received, at(Phase::FirstExit)),
            us(sent, at(Phase::FirstExit)),
        ]);
    }
    let names = ["wake", "mapped", "devices_set", "vcpu_set", "exit", "sent_to_exit"];
    let mut figures = common::quantiles(names, &samples);
    if !peers.is_empty() {
        let names = ["firecracker_fresh", "firecracker_load"];
        figures = format!("{figures},{}", common::quantiles(names, &peers));
    }
    println!("{{\"bench\":\"tiny_thaw\",\"iterations\":{iterations},{figures}}}");
}

fn stamp(stamps: &Stamps, phase: Phase) -> u64 {
    stamps.get(phase).unwrap_or_else(|| panic!("no stamp of {phase:?}"))
}

fn now_ns() -> u64 {
    firn_vmm::stats::monotonic_ns()
}
