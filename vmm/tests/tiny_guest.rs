//! The VMM against guests of a few instructions on whatever `/dev/kvm` is there: how guests end,
//! and that save and thaw lose nothing.

mod common;

use std::{
    io::Read,
    os::{fd::AsFd, unix::fs::MetadataExt, unix::net::UnixStream},
};

use common::{Vmm, config, elf, empty, kvm, memfd, sealed};
use firn_proto::control::{ExitReason, FailureKind, FromVmm, MemoryPlan, Phase, ToVmm};

/// `mov $0xfe,%al; out %al,$0x64; hlt`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];

/// Runs `code` and returns how it ended, with the exit code and standard error.
fn run(code: &[u8]) -> Option<(ExitReason, i32, String)> {
    let kvm = kvm()?;
    let vmm = Vmm::shell(&kvm, &config(1, true));
    let (answer, _stream) = vmm.boot(&elf(code));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    let FromVmm::Exited(exit) = vmm.receive() else { panic!("no exit") };
    let (status, said) = vmm.wait();
    assert_eq!(status.code(), Some(exit.reason.code()), "{exit:?} {said}");
    Some((exit.reason, exit.reason.code(), format!("{}\n{said}", exit.detail)))
}

#[test]
fn reset_line_is_an_orderly_shutdown() {
    let Some((reason, code, _)) = run(RESET) else { return };
    assert_eq!((reason, code), (ExitReason::GuestShutdown, 0));
}

#[test]
fn reset_with_the_warm_flag_is_a_panic() {
    // movw $0x1234,0x472
    let mut code = vec![0x66, 0xc7, 0x04, 0x25, 0x72, 0x04, 0, 0, 0x34, 0x12];
    code.extend_from_slice(RESET);
    let Some((reason, code, _)) = run(&code) else { return };
    assert_eq!((reason, code), (ExitReason::GuestPanic, 10));
}

#[test]
fn an_exception_without_a_handler_is_a_triple_fault() {
    // xor %eax,%eax; mov %cr3 := 0 (no page tables any more)
    let Some((reason, code, said)) = run(&[0x31, 0xc0, 0x0f, 0x22, 0xd8, 0xf4]) else { return };
    assert_eq!((reason, code), (ExitReason::TripleFault, 11), "{said}");
    assert!(said.contains("RIP"), "{said}");
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named_with_its_bytes() {
    // mov $0xd0000000,%eax; fldt (%rax): an 80-bit load from a device
    let Some((reason, code, said)) = run(&[0xb8, 0, 0, 0, 0xd0, 0xdb, 0x28, 0xf4]) else { return };
    assert_eq!((reason, code), (ExitReason::EmulationFailure, 12), "{said}");
    assert!(said.contains("db 28 f4"), "{said}");
    assert!(said.contains("RIP 0x100005"), "{said}");
}

#[test]
fn what_is_no_kernel_is_refused() {
    let Some(kvm) = kvm() else { return };
    let vmm = Vmm::shell(&kvm, &config(1, false));
    let (answer, _stream) = vmm.boot(&memfd(b"#!/bin/sh\n"));
    let FromVmm::Failed(failure) = answer else { panic!("{answer:?}") };
    assert_eq!(failure.kind, FailureKind::BadKernel);
    assert!(failure.message.contains("not a kernel"), "{}", failure.message);
}

#[test]
fn a_closed_control_socket_ends_the_process() {
    let Some(kvm) = kvm() else { return };
    let vmm = Vmm::shell(&kvm, &config(2, false));
    let FromVmm::Exited(exit) = vmm.request(&ToVmm::Stop, &[]) else { panic!("no exit") };
    assert_eq!(exit.reason, ExitReason::Stopped);
    assert_eq!(vmm.wait().0.code(), Some(0));
}

#[test]
fn requests_out_of_order_are_refused_and_change_nothing() {
    let Some(kvm) = kvm() else { return };
    let vmm = Vmm::shell(&kvm, &config(1, false));
    for message in [ToVmm::Pause, ToVmm::Resume, ToVmm::Save] {
        let FromVmm::Failed(failure) = vmm.request(&message, &[]) else { panic!("{message:?}") };
        assert_eq!(failure.kind, FailureKind::BadRequest, "{failure:?}");
    }
    let (answer, _stream) = vmm.boot(&elf(RESET));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
}

/// Counts 0, 1, 2 … 255, 0 … to the serial port for ever, with some idling in between:
/// `xor %ebx,%ebx; mov $0x3f8,%edx; l: mov %bl,%al; out %al,(%dx); inc %bl; mov $0x40,%ecx;
/// d: loop d; jmp l`
const COUNTER: &[u8] = &[
    0x31, 0xdb, 0xba, 0xf8, 0x03, 0, 0, 0x88, 0xd8, 0xee, 0xfe, 0xc3, 0xb9, 0x40, 0, 0, 0, 0xe2,
    0xfe, 0xeb, 0xf2,
];

/// Reads `n` bytes that continue the count, and returns the next one.
fn follow(from: &mut impl Read, n: usize, next: Option<u8>) -> u8 {
    let mut bytes = vec![0; n];
    from.read_exact(&mut bytes).unwrap();
    let mut expected = next.unwrap_or_else(|| bytes[0]);
    for byte in bytes {
        assert_eq!(byte, expected);
        expected = expected.wrapping_add(1);
    }
    expected
}

fn thaw(
    kvm: &std::fs::File,
    memory: &std::fs::File,
    state: &std::fs::File,
) -> (Vmm, FromVmm, UnixStream) {
    let vmm = Vmm::shell(kvm, &config(1, true));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
    let answer = vmm.request(&message, &[sealed(memory), state.as_fd(), theirs.as_fd()]);
    (vmm, answer, ours)
}

/// Each OUT must be seen exactly once over pause, save, thaw, save and thaw again: whatever I/O a
/// stop interrupted is completed before the state is read.
#[test]
fn a_count_goes_on_without_gap_or_repeat_over_two_generations() {
    let Some(kvm) = kvm() else { return };
    let mut vmm = Vmm::shell(&kvm, &config(1, true));
    let (answer, mut _stream) = vmm.boot(&elf(COUNTER));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    let mut next = follow(vmm.stderr.as_mut().unwrap(), 300, None);
    let mut base = None;
    for generation in 0..2 {
        assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
        let occupied = |file: &std::fs::File| file.metadata().unwrap().blocks();
        let before = base.as_ref().map(occupied);
        let (memory, state) = vmm.save(base.as_ref(), &[]);
        assert_eq!(base.as_ref().map(occupied), before, "the base's holes are filled");
        // The rest of what this generation wrote before it stopped.
        assert!(matches!(vmm.request(&ToVmm::Stop, &[]), FromVmm::Exited(_)));
        let mut rest = Vec::new();
        vmm.stderr.take().unwrap().read_to_end(&mut rest).unwrap();
        next = follow(&mut &rest[..], rest.len(), Some(next));
        let (mut thawed, answer, stream) = thaw(&kvm, &memory, &state);
        let FromVmm::Thawed(stamps) = answer else { panic!("generation {generation}: {answer:?}") };
        assert!(stamps.get(Phase::Received) < stamps.get(Phase::Mapped));
        next = follow(thawed.stderr.as_mut().unwrap(), 300, Some(next));
        (vmm, _stream, base) = (thawed, stream, Some(memory));
    }
}

#[test]
fn pause_and_resume_lose_nothing() {
    let Some(kvm) = kvm() else { return };
    let mut vmm = Vmm::shell(&kvm, &config(1, true));
    let (answer, _stream) = vmm.boot(&elf(COUNTER));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    let mut next = follow(vmm.stderr.as_mut().unwrap(), 10, None);
    for _ in 0..50 {
        assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
        assert_eq!(vmm.request(&ToVmm::Resume, &[]), FromVmm::Done);
        next = follow(vmm.stderr.as_mut().unwrap(), 100, Some(next));
    }
    let FromVmm::Stats(stats) = vmm.request(&ToVmm::Stats, &[]) else { panic!("no stats") };
    assert!(stats.exits.iter().any(|(name, n)| name == "port_out" && *n >= 5000), "{stats:?}");
    assert!(stats.stamps.get(Phase::FirstExit) > stats.stamps.get(Phase::Entered));
}

#[test]
fn snapshots_that_are_not_whole_are_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let vmm = Vmm::shell(&kvm, &config(1, true));
    let (answer, _stream) = vmm.boot(&elf(COUNTER));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
    let (memory, state) = vmm.save(None, &[]);
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut &state).unwrap();
    (&state).read_to_end(&mut bytes).unwrap();

    let refused = |memory: &std::fs::File, state: &[u8]| {
        let (_vmm, answer, _stream) = thaw(&kvm, memory, &memfd(state));
        let FromVmm::Failed(failure) = answer else { panic!("{answer:?}") };
        failure
    };
    assert_eq!(refused(&memory, &bytes[..bytes.len() - 1]).kind, FailureKind::SnapshotCorrupt);
    assert_eq!(refused(&memory, b"").kind, FailureKind::SnapshotCorrupt);
    let mut other = bytes.clone();
    other[8] = 99;
    assert_eq!(refused(&memory, &other).kind, FailureKind::SnapshotVersion);
    let short = memfd(&[0; 4096]);
    let failure = refused(&short, &bytes);
    assert_eq!(failure.kind, FailureKind::SnapshotShape);
    assert!(failure.message.contains("4096"), "{}", failure.message);

    // LSTAR, which is zero, becomes an address that is none. MSRs are pairs of numbers of variable
    // length in a body whose length its header says.
    const LSTAR: [u8; 6] = [0x82, 0x81, 0x80, 0x80, 0x0c, 0];
    let at = bytes.windows(6).position(|window| window == LSTAR).expect("LSTAR is in the state");
    let mut strange = bytes.clone();
    strange.splice(at + 5..at + 6, [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1]);
    let length = strange.len() as u32 - 16;
    strange[12..16].copy_from_slice(&length.to_le_bytes());
    let failure = refused(&memory, &strange);
    assert_eq!(failure.kind, FailureKind::Kvm);
    let says = "vCPU 0: KVM would not set MSR 0xc0000082 to 0x8000000000000000";
    assert_eq!(failure.message, says);

    let two = Vmm::shell(&kvm, &config(2, true));
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
    let whole = memfd(&bytes);
    let answer = two.request(&message, &[memory.as_fd(), whole.as_fd(), theirs.as_fd()]);
    let FromVmm::Failed(failure) = answer else { panic!("{answer:?}") };
    assert!(failure.message.contains("1 vCPUs, this shell has 2"), "{}", failure.message);
}

/// Looks for `pattern` in memory from 2 MiB on. Prints `y` if it is there; else `n`, writes it all over that
/// memory, and begins again.
fn plants_and_looks(pattern: u64) -> Vec<u8> {
    const FROM: u32 = 2 << 20;
    const WORDS: u32 = (14 << 20) / 8;
    let mut code = vec![0x48, 0xb8]; // movabs $pattern,%rax
    code.extend(pattern.to_le_bytes());
    let begin = code.len();
    // mov $FROM,%edi; mov $WORDS,%ecx; repne scas %es:(%rdi),%rax; je found; the same; rep stos
    for work in [&[0xf2u8, 0x48, 0xaf, 0x74, 27][..], &[0xf3, 0x48, 0xab]] {
        code.push(0xbf);
        code.extend(FROM.to_le_bytes());
        code.push(0xb9);
        code.extend(WORDS.to_le_bytes());
        code.extend(work);
    }
    // mov $0x3f8,%edx; mov $'n',%cl; xchg %al,%cl; out %al,%dx; xchg %al,%cl; jmp begin
    code.extend([0xba, 0xf8, 3, 0, 0, 0xb1, b'n', 0x86, 0xc1, 0xee, 0x86, 0xc1, 0xeb]);
    code.push((begin as u8).wrapping_sub(code.len() as u8 + 1));
    // found: mov $0x3f8,%edx; mov $'y',%al; out %al,%dx; l: jmp l
    code.extend([0xba, 0xf8, 3, 0, 0, 0xb0, b'y', 0xee, 0xeb, 0xfe]);
    code
}

#[test]
fn memory_of_a_guest_that_ended_is_never_another_ones() {
    let Some(kvm) = kvm() else { return };
    // Unlike anything else, and not in the code as it is in memory: immediates are not aligned.
    let code = plants_and_looks(0x5ec2_e7a5_0dd5_ba11);
    let shells: Vec<Vmm> = (0..3).map(|_| Vmm::shell(&kvm, &config(1, true))).collect();
    for mut vmm in shells {
        let mut serial = vmm.stderr.take().unwrap();
        let (answer, _stream) = vmm.boot(&elf(&code));
        assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
        let mut found = [0; 2];
        serial.read_exact(&mut found).unwrap();
        assert_eq!(found[0], b'n', "a guest reads what another has left");
        assert_eq!(found[1], b'y', "its own it does find");
        // Ends with its secrets in memory.
        drop(vmm);
    }
}
