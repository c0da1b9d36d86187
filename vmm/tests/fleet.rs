//! Snapshots that go from host to host: a fleet's CPU, and a TSC that ticks otherwise.
//!
//! One host stands in for two by a snapshot that says another frequency. For two real ones,
//! `FIRN_SNAPSHOT_OUT` names a directory where snapshots of both templates are left, and `FIRN_SNAPSHOT_IN`
//! one from which they are taken.

mod common;

use std::{
    fs::File,
    io::{Read, Seek},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use common::{Vmm, config, elf, empty, kvm, memfd, sealed};
use firn_proto::control::{CpuTemplate, FailureKind, FromVmm, MemoryPlan, ShellConfig, ToVmm};
use firn_vmm::snapshot::SavedVm;

/// Says what its TSC reads, for ever: 0xff, then seven bits each of TSC >> 20, the lowest first.
const SAYS_TSC: &[u8] = &[
    0x0f, 0x31, // l: rdtsc
    0x0f, 0xac, 0xd0, 20, // shrd $20,%edx,%eax
    0x89, 0xc1, // mov %eax,%ecx
    0xba, 0xf8, 3, 0, 0, // mov $0x3f8,%edx
    0xb0, 0xff, 0xee, // mov $0xff,%al; out %al,(%dx)
    0xbb, 4, 0, 0, 0, // mov $4,%ebx
    0x89, 0xc8, 0x24, 0x7f, 0xee, // n: mov %ecx,%eax; and $0x7f,%al; out %al,(%dx)
    0xc1, 0xe9, 7, // shr $7,%ecx
    0xff, 0xcb, 0x75, 0xf4, // dec %ebx; jnz n
    0xeb, 0xdd, // jmp l
];

/// The next TSC >> 20 that begins after now.
fn said(serial: &mut impl Read) -> u64 {
    let mut byte = [0];
    while byte[0] != 0xff {
        serial.read_exact(&mut byte).unwrap();
    }
    let mut bits = [0; 4];
    serial.read_exact(&mut bits).unwrap();
    bits.iter().rev().fold(0, |tsc, seven| tsc << 7 | u64::from(*seven))
}

fn shell(kvm: &File, template: CpuTemplate) -> Result<Vmm, String> {
    let config = ShellConfig { cpu_template: template, ..config(1, true) };
    let vmm = Vmm::spawn(kvm);
    match vmm.request(&ToVmm::Build(config), &[]) {
        FromVmm::Ready(_) => Ok(vmm),
        FromVmm::Failed(failure) => Err(failure.message),
        other => panic!("{other:?}"),
    }
}

/// A snapshot of a guest that has said its TSC: memory, state, and what it said last.
fn snapshot(mut vmm: Vmm) -> (File, Vec<u8>, u64) {
    let mut serial = vmm.stderr.take().unwrap();
    let (answer, _stream) = vmm.boot(&elf(SAYS_TSC));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    let last = said(&mut serial);
    assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
    let (memory, mut state) = vmm.save(None, &[]);
    let mut bytes = Vec::new();
    state.rewind().unwrap();
    state.read_to_end(&mut bytes).unwrap();
    (memory, bytes, last)
}

fn thaw(vmm: &Vmm, memory: &File, state: &[u8]) -> (FromVmm, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
    let state = memfd(state);
    (vmm.request(&message, &[sealed(memory), state.as_fd(), theirs.as_fd()]), ours)
}

/// A guest says that its TSC goes on from `last` at `khz`.
fn expect_frequency(mut vmm: Vmm, last: u64, khz: u64) {
    let mut serial = vmm.stderr.take().unwrap();
    let (first, began) = (said(&mut serial), Instant::now());
    let second = |ticks: u64| (ticks << 20) as f64 / (khz * 1000) as f64;
    assert!(first >= last && second(first - last) < 10.0, "from {last} to {first}");
    let mut now = first;
    while began.elapsed() < Duration::from_millis(500) {
        now = said(&mut serial);
    }
    let (passed, by_host) = (second(now - first), began.elapsed().as_secs_f64());
    // What it said may have waited in the pipe, by as much at the begin as at the end.
    assert!(
        (passed - by_host).abs() < 0.1,
        "{passed} s by the guest's TSC, {by_host} s by the host"
    );
}

#[test]
fn a_fleets_snapshots_thaw_by_their_template_only() {
    let Some(kvm) = kvm() else { return };
    for template in [CpuTemplate::X86_64V2, CpuTemplate::X86_64V3] {
        let vmm = match shell(&kvm, template) {
            Ok(vmm) => vmm,
            Err(message) => {
                let named = format!("CPU template {template}: this host has no ");
                assert!(message.starts_with(&named), "{message}");
                eprintln!("skipped: {message}");
                continue;
            }
        };
        let (memory, state, last) = snapshot(vmm);
        let saved = SavedVm::decode(&state).unwrap();
        let khz = u64::from(saved.tsc.khz);
        if let Some(directory) = std::env::var_os("FIRN_SNAPSHOT_OUT") {
            keep(Path::new(&directory), template, &memory, &state);
        }
        let (answer, _stream) = thaw(&shell(&kvm, CpuTemplate::Host).unwrap(), &memory, &state);
        let FromVmm::Failed(failure) = answer else { panic!("{answer:?}") };
        assert_eq!(failure.kind, FailureKind::SnapshotCpu);
        let says = format!("the CPU template is {template} in the snapshot, host on this host");
        assert_eq!(failure.message, says);

        let vmm = shell(&kvm, template).unwrap();
        let (answer, _stream) = thaw(&vmm, &memory, &state);
        assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
        expect_frequency(vmm, last, khz);
    }
}

/// Where KVM can, the guest's TSC ticks as it did; where it can't, the thaw is refused by name.
#[test]
fn a_tsc_of_another_host_is_scaled_or_refused() {
    let Some(kvm) = kvm() else { return };
    let (memory, state, last) = snapshot(shell(&kvm, CpuTemplate::Host).unwrap());
    let mut saved = SavedVm::decode(&state).unwrap();
    let khz = saved.tsc.khz / 2;
    saved.tsc.khz = khz;
    let vmm = shell(&kvm, CpuTemplate::Host).unwrap();
    let (answer, _stream) = thaw(&vmm, &memory, &saved.encode().unwrap());
    match answer {
        FromVmm::Thawed(_) => {
            eprintln!("scaled to {khz} kHz");
            expect_frequency(vmm, last, u64::from(khz));
        }
        FromVmm::Failed(failure) => {
            let expected = std::env::var_os("FIRN_EXPECT_TSC_SCALING").is_some();
            assert!(!expected, "this CPU scales TSCs: {failure:?}");
            assert_eq!(failure.kind, FailureKind::SnapshotCpu, "{failure:?}");
            assert!(failure.message.contains("no KVM_CAP_TSC_CONTROL"), "{}", failure.message);
            eprintln!("refused: {}", failure.message);
        }
        other => panic!("{other:?}"),
    }
}

/// What compares lists of MSRs would take hours for the longest that fit into a state.
#[test]
fn more_msrs_than_any_vcpu_has_are_refused() {
    let Some(kvm) = kvm() else { return };
    let (_, state, _) = snapshot(shell(&kvm, CpuTemplate::Host).unwrap());
    let mut saved = SavedVm::decode(&state).unwrap();
    saved.power_on_msrs = vec![(0, 0); 1025];
    let error = SavedVm::decode(&saved.encode().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "VM state is corrupt: 1025 MSRs exceed 1024");
}

/// Leaves a snapshot for another host: its pages that are not zero, and its state.
fn keep(directory: &Path, template: CpuTemplate, memory: &File, state: &[u8]) {
    let mut contents = Vec::new();
    let mut memory = memory;
    memory.rewind().unwrap();
    memory.read_to_end(&mut contents).unwrap();
    std::fs::write(directory.join(format!("{template}.memory")), contents).unwrap();
    std::fs::write(directory.join(format!("{template}.state")), state).unwrap();
}

#[test]
fn a_snapshot_of_another_host_of_the_fleet_thaws() {
    let (Some(kvm), Some(directory)) = (kvm(), std::env::var_os("FIRN_SNAPSHOT_IN")) else {
        eprintln!("skipped: FIRN_SNAPSHOT_IN is not set");
        return;
    };
    for template in [CpuTemplate::X86_64V2, CpuTemplate::X86_64V3] {
        let read = |what| {
            let path = Path::new(&directory).join(format!("{template}.{what}"));
            std::fs::read(path).unwrap()
        };
        let (memory, state) = (memfd(&read("memory")), read("state"));
        let saved = SavedVm::decode(&state).unwrap();
        let vmm = shell(&kvm, template).unwrap();
        let (answer, _stream) = thaw(&vmm, &memory, &state);
        assert!(matches!(answer, FromVmm::Thawed(_)), "{template}: {answer:?}");
        expect_frequency(vmm, saved.guest_tsc(0) >> 20, u64::from(saved.tsc.khz));
        eprintln!("{template}: thawed");
    }
}
