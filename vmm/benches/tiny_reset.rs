//! What a reset costs on this host's `/dev/kvm`, with a guest of 128 MiB that has written a given
//! number of pages since its thaw.
//!
//! `cargo bench -p firn-vmm --bench tiny_reset [-- ITERATIONS]` prints one JSON line a number of
//! pages, with percentiles in microseconds, each from the VMM's receipt of the request: vCPUs
//! `stopped`, pages found and put back (`mapped`), devices, disks and interrupt controllers set
//! (`devices_set`), registers and MSRs set (`vcpu_set`: the whole reset). `answered` is what the
//! host waits for, wake-ups included; `resumed` is from a byte on the invoke stream to the guest's
//! first exit afterwards.

#[path = "../tests/common/assembler.rs"]
mod assembler;
#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    fs::File,
    io::Write,
    os::{
        fd::AsFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    time::Duration,
};

use assembler::Code;
use common::{Vmm, config, elf, empty, from_now, kvm, sealed};
use firn_proto::control::{FromVmm, MemoryPlan, Phase, ShellConfig, Stamps, ToVmm};
use firn_vmm::stats::monotonic_ns;

const FLAG: u32 = 0x1f_0000;
const PAGES: [u32; 5] = [1, 10, 100, 1000, 4000];

fn main() {
    let iterations = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(200);
    let Some(kvm) = kvm() else { return };
    for pages in PAGES {
        measure(&kvm, pages, iterations);
    }
}

fn shell(kvm: &File) -> Vmm {
    Vmm::shell(kvm, &ShellConfig { memory_mib: 128, ..config(1, false) })
}

fn measure(kvm: &File, pages: u32, iterations: usize) {
    // `out %al,$0x80; jmp` behind the writes: the exit that is waited for.
    let mut code = Code::default();
    code.wait_for(FLAG).dirty(0x20_0000, pages);
    code.0.extend([0xe6, 0x80, 0xeb, 0xfc]);
    let vmm = shell(kvm);
    let (answer, _stream) = vmm.boot(&elf(&code.0));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
    let (memory, state) = vmm.save(None, &[]);
    memory.write_all_at(&[1], FLAG.into()).unwrap();
    // What the guest writes is in the snapshot, too: copies, not zeroes, go back.
    for page in 0..pages {
        memory.write_all_at(&[7; 4096], u64::from(0x20_0000 + page * 4096)).unwrap();
    }

    let vmm = shell(kvm);
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
    let answer = vmm.request(&message, &[sealed(&memory), state.as_fd(), theirs.as_fd()]);
    assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
    let pagemap = vmm.pagemap();
    let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
    first_exit(&vmm);
    let mut samples: Vec<[f64; 6]> = Vec::new();
    for round in 0..iterations + 3 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sent = monotonic_ns();
        let answer = vmm.request(&ToVmm::Reset, &[theirs.as_fd(), pagemap.as_fd()]);
        let answered = monotonic_ns();
        let FromVmm::Reset(report) = answer else { panic!("{answer:?}") };
        assert!(report.pages >= u64::from(pages), "{report:?}");
        stream = ours;
        let at = |phase| report.stamps.get(phase).unwrap();
        let received = at(Phase::Received);
        let written = monotonic_ns();
        stream.write_all(&from_now(b"x")).unwrap();
        let exit = first_exit(&vmm).get(Phase::FirstExit).unwrap();
        // The first ones map the snapshot for reading.
        if round >= 3 {
            samples.push([
                us(received, at(Phase::Stopped)),
                us(received, at(Phase::Mapped)),
                us(received, at(Phase::DevicesSet)),
                us(received, at(Phase::VcpuSet)),
                us(sent, answered),
                us(written, exit),
            ]);
        }
    }
    drop(stream);
    let names = ["stopped", "mapped", "devices_set", "vcpu_set", "answered", "resumed"];
    println!(
        "{{\"bench\":\"tiny_reset\",\"pages\":{pages},\"iterations\":{iterations},{}}}",
        common::quantiles(names, &samples)
    );
}

/// Waits until the guest has exited since its last entry, and a little longer: a question would
/// take the processor from what it asks about.
fn first_exit(vmm: &Vmm) -> Stamps {
    loop {
        std::thread::sleep(Duration::from_millis(5));
        match vmm.request(&ToVmm::Stats, &[]) {
            FromVmm::Stats(stats) if stats.stamps.get(Phase::FirstExit).is_some() => {
                return stats.stamps;
            }
            FromVmm::Stats(_) => {}
            other => panic!("{other:?}"),
        }
    }
}
