//! From control request to first guest instruction, on this host's `/dev/kvm`, with a guest whose
//! first instruction after the thaw is a port write. A shell stands ready; the process is not
//! jailed (the jail is built before a shell stands, and seccomp is on).
//!
//! `cargo bench -p firn-vmm --bench tiny_thaw [-- ITERATIONS]` prints one JSON line of medians and
//! percentiles in microseconds. "received" is the VMM's stamp of the message, "exit" that of the
//! first return of `KVM_RUN`, so both ends lie on one clock and the wake-up of the VMM is shown
//! apart.

#[path = "../tests/common/mod.rs"]
mod common;

use std::{os::fd::AsFd, os::unix::net::UnixStream, time::Duration};

use common::{Vmm, config, elf, empty, kvm, memfd};
use firn_proto::control::{FromVmm, MemoryPlan, Phase, Stamps, ToVmm};

/// `l: out %al,$0x80; jmp l`
const OUT_FOR_EVER: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];

fn main() {
    let iterations = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(200);
    let Some(kvm) = kvm() else { return };
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
    println!(
        "{{\"bench\":\"tiny_thaw\",\"iterations\":{iterations},{}}}",
        common::quantiles(names, &samples)
    );
}

fn stamp(stamps: &Stamps, phase: Phase) -> u64 {
    stamps.get(phase).unwrap_or_else(|| panic!("no stamp of {phase:?}"))
}

fn now_ns() -> u64 {
    firn_vmm::stats::monotonic_ns()
}
