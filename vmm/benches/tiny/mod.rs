//! A tiny guest's snapshot, and what thawing it costs.

use std::{
    fs::File,
    os::{fd::AsFd, unix::net::UnixStream},
    time::Duration,
};

use firn_proto::control::{FromVmm, MemoryPlan, Phase, ToVmm};

use super::common::{Vmm, config, elf, empty};

/// `l: out %al,$0x80; jmp l`
const OUT_FOR_EVER: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];

/// What a thaw's figures are, in their order. "received" is the VMM's stamp of the message, "exit" that
/// of the first return of `KVM_RUN`, so both ends lie on one clock and the wake-up of the VMM is shown
/// apart. "shell" is from the process's start until it stands ready.
pub const NAMES: [&str; 7] =
    ["wake", "mapped", "devices_set", "vcpu_set", "exit", "sent_to_exit", "shell"];

/// A snapshot of a guest whose first instruction after a thaw is a port write.
pub struct Snapshot {
    memory: File,
    state: File,
}

impl Snapshot {
    pub fn take(kvm: &File) -> Self {
        let vmm = Vmm::shell(kvm, &config(1, false));
        let (answer, _stream) = vmm.boot(&elf(OUT_FOR_EVER));
        assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
        let (memory, state) = vmm.save(None, &[]);
        Self { memory, state }
    }

    /// Thaws it into a process that has just been started; the figures in microseconds.
    pub fn thaw(&self, vmm: Vmm) -> [f64; NAMES.len()] {
        let vmm = vmm.build(&config(1, false));
        std::thread::sleep(Duration::from_millis(2));
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
        let sent = firn_vmm::stats::monotonic_ns();
        let descriptors = [self.memory.as_fd(), self.state.as_fd(), theirs.as_fd()];
        let answer = vmm.request(&message, &descriptors);
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
        let at = |phase: Phase| stats.stamps.get(phase).unwrap_or_else(|| panic!("no {phase:?}"));
        let received = at(Phase::Received);
        [
            us(sent, received),
            us(received, at(Phase::Mapped)),
            us(received, at(Phase::DevicesSet)),
            us(received, at(Phase::VcpuSet)),
            us(received, at(Phase::FirstExit)),
            us(sent, at(Phase::FirstExit)),
            us(at(Phase::ProcessStart), at(Phase::ShellReady)),
        ]
    }
}
