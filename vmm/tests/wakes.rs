//! No wake-up is lost, whichever of two threads comes first: what the host sends before, while and
//! after a guest is thawed, reset or resumed reaches it, and so does a change of a disk.
//!
//! The guest ([`driver`]) waits for interrupts. Threads are held back in turn (`firn_vmm::hold`), on
//! all CPUs and on one. The ordinary run shares the rounds
//! among all of these, the nightly one has them in each.

#[path = "common/assembler.rs"]
mod assembler;
mod common;
#[path = "common/driver.rs"]
mod driver;

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use common::{Vmm, config, elf, empty, from_now, kvm, memfd, sealed};
use driver::{BYTES, CHANGED, INTERRUPTS, UP};
use firn_proto::control::{
    DiskKind, DiskSource, ExitReason, FailureKind, FromVmm, MemoryPlan, ShellConfig, ToVmm,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longer than any of this takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the threads of a VMM race.
#[derive(Debug, Clone, Copy)]
struct Race {
    vcpus: u8,
    /// Value of `FIRN_HOLD`. Whoever names a thread to hold also has nothing raised again.
    hold: &'static str,
    /// All threads on one CPU.
    pinned: bool,
}

/// Calls `test` with all races, and how many rounds of `all` each of them gets.
fn races(all: usize, test: impl Fn(Race, usize)) {
    // Nothing that is lost is made good again: then the guest says nothing, and the test fails.
    let holds = ["again=0", "again=0,vcpu0=2000", "again=0,device=2000"];
    let races = [1, 4].into_iter().flat_map(|vcpus| {
        let pinned = [false, true].into_iter();
        pinned.flat_map(move |pinned| holds.map(|hold| Race { vcpus, hold, pinned }))
    });
    let last = Race { vcpus: 4, hold: "again=0,vcpu3=2000", pinned: false };
    let races: Vec<_> = races.chain([last]).collect();
    let rounds = firn_nightly::rounds(all.div_ceil(races.len()), all);
    for race in races {
        test(race, rounds);
    }
}

struct Guest {
    vmm: Vmm,
    stream: UnixStream,
    /// Nothing has been sent on the stream of a thaw or reset.
    begins: bool,
}

struct Snapshot {
    memory: File,
    state: File,
}

impl Race {
    fn config(self) -> ShellConfig {
        ShellConfig { disks: vec![DiskKind::ReadOnly], ..config(self.vcpus, true) }
    }

    fn shell(self, kvm: &File) -> Vmm {
        let pinned = self.pinned;
        let prepare = move || {
            if !pinned {
                return Ok(());
            }
            let mut one = rustix::thread::CpuSet::new();
            one.set(rustix::thread::sched_getcpu());
            Ok(rustix::thread::sched_setaffinity(None, &one)?)
        };
        let environment = ("FIRN_HOLD", self.hold);
        Vmm::spawn_in(kvm, &common::program(), Some(environment), prepare).build(&self.config())
    }

    /// A guest that waits.
    fn snapshot(self, kvm: &File) -> Snapshot {
        let vmm = self.shell(kvm);
        let kernel = elf(&driver::guest(None));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let message = ToVmm::Boot { cmdline: String::new(), initramfs: false, disks: empty(1) };
        let answer = vmm.request(&message, &[kernel.as_fd(), theirs.as_fd()]);
        assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
        let mut guest = Guest { vmm, stream: ours, begins: false };
        // The answer to its request for a connection has come as an interrupt, too.
        guest.says(&[UP, BYTES], "boot");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
        let (memory, state) = guest.vmm.save(None, &[]);
        Snapshot { memory, state }
    }

    /// `before` is in the stream when the guest is thawed.
    fn thaw(self, kvm: &File, snapshot: &Snapshot, resume: bool, before: &[u8]) -> Guest {
        let vmm = self.shell(kvm);
        let (mut stream, theirs) = UnixStream::pair().unwrap();
        if !before.is_empty() {
            stream.write_all(&from_now(before)).unwrap();
        }
        let message = ToVmm::Thaw { disks: empty(1), resume, plan: MemoryPlan::default() };
        let descriptors = [sealed(&snapshot.memory), snapshot.state.as_fd(), theirs.as_fd()];
        let answer = vmm.request(&message, &descriptors);
        assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
        Guest { vmm, stream, begins: before.is_empty() }
    }
}

impl Guest {
    /// Waits for an interrupt of each of these kinds, in any order.
    fn says(&mut self, kinds: &[u8], when: &str) {
        let stderr = self.vmm.stderr.as_mut().unwrap();
        let mut missing = kinds.to_vec();
        while !missing.is_empty() {
            let mut ready = [PollFd::new(&*stderr, PollFlags::IN)];
            let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            let count = poll(&mut ready, Some(&limit)).unwrap();
            assert_ne!(
                count,
                0,
                "{when}: no interrupt for {:?}",
                missing.escape_ascii().to_string()
            );
            let mut byte = [0; 256];
            let count = stderr.read(&mut byte).unwrap();
            if count == 0 {
                panic!("{when}: the VMM ended: {:?}", self.vmm.receive());
            }
            missing.retain(|kind| !byte[..count].contains(kind));
        }
    }

    fn send(&mut self) {
        match std::mem::take(&mut self.begins) {
            true => self.stream.write_all(&from_now(b"x")).unwrap(),
            false => self.stream.write_all(b"x").unwrap(),
        }
    }

    fn attach(&self) {
        let medium = memfd(&[0; 4096]);
        let attach = ToVmm::Attach { slot: 0, source: DiskSource::ReadOnly };
        assert_eq!(self.vmm.request(&attach, &[medium.as_fd()]), FromVmm::Done);
    }
}

#[test]
fn no_thaw_is_lost() {
    let Some(kvm) = kvm() else { return };
    races(1000, |race, rounds| {
        let snapshot = race.snapshot(&kvm);
        for round in 0..rounds {
            let when = format!("{race:?}, round {round}");
            // Bytes that are there before, and bytes that come as soon as the answer is there.
            let mut guest = match round % 2 {
                0 => race.thaw(&kvm, &snapshot, true, b"x"),
                _ => race.thaw(&kvm, &snapshot, true, b""),
            };
            if round % 2 == 1 {
                guest.send();
            }
            guest.says(&[BYTES], &when);
        }
    });
}

#[test]
fn no_thaw_that_waits_is_lost() {
    let Some(kvm) = kvm() else { return };
    races(200, |race, rounds| {
        let snapshot = race.snapshot(&kvm);
        for round in 0..rounds {
            let when = format!("{race:?}, round {round}");
            let mut guest = race.thaw(&kvm, &snapshot, false, b"");
            match round % 3 {
                0 => guest.send(),
                1 => {
                    guest.send();
                    assert_eq!(guest.vmm.request(&ToVmm::Resume, &[]), FromVmm::Done);
                }
                _ => {
                    assert_eq!(guest.vmm.request(&ToVmm::Resume, &[]), FromVmm::Done);
                    guest.send();
                }
            }
            guest.says(&[BYTES], &when);
        }
    });
}

#[test]
fn no_disk_that_is_attached_is_missed() {
    let Some(kvm) = kvm() else { return };
    races(200, |race, rounds| {
        let snapshot = race.snapshot(&kvm);
        for round in 0..rounds {
            let when = format!("{race:?}, round {round}");
            // Behind the thaw's answer; while the thawed guest waits, and its clocks stand.
            let mut guest = race.thaw(&kvm, &snapshot, round % 2 == 0, b"");
            guest.attach();
            guest.send();
            guest.says(&[BYTES, CHANGED], &when);
        }
    });
}

#[test]
fn no_reset_is_lost() {
    let Some(kvm) = kvm() else { return };
    races(1000, |race, rounds| {
        let snapshot = race.snapshot(&kvm);
        let mut guest = race.thaw(&kvm, &snapshot, true, b"x");
        guest.says(&[BYTES], "thaw");
        for round in 0..rounds {
            let when = format!("{race:?}, round {round}");
            let pagemap = guest.vmm.pagemap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            (guest.stream, guest.begins) = (ours, true);
            // Bytes that are there before the reset, that come behind it, and that come late.
            if round % 3 == 0 {
                guest.send();
            }
            let answer = guest.vmm.request(&ToVmm::Reset, &[theirs.as_fd(), pagemap.as_fd()]);
            assert!(matches!(answer, FromVmm::Reset(_)), "{when}: {answer:?}");
            if round % 3 == 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
            if round % 3 != 0 {
                guest.send();
            }
            guest.says(&[BYTES], &when);
        }
    });
}

#[test]
fn no_resume_is_lost() {
    let Some(kvm) = kvm() else { return };
    races(1000, |race, rounds| {
        let snapshot = race.snapshot(&kvm);
        let mut lives = Vec::new();
        for round in 0..rounds {
            let when = format!("{race:?}, round {round}");
            if round % (INTERRUPTS / 2) == 0 {
                let mut guest = race.thaw(&kvm, &snapshot, true, b"x");
                guest.says(&[BYTES], "thaw");
                lives.push(guest);
            }
            let guest = lives.last_mut().unwrap();
            // Bytes before the pause, which the guest may have got when it stopped; behind it, which
            // resume it; and behind the order to go on.
            if round % 3 == 0 {
                guest.send();
            }
            assert_eq!(guest.vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
            if round % 3 == 1 {
                guest.send();
            }
            if round % 3 == 0 || round % 2 == 0 {
                assert_eq!(guest.vmm.request(&ToVmm::Resume, &[]), FromVmm::Done);
            }
            if round % 3 == 2 {
                guest.send();
            }
            guest.says(&[BYTES], &when);
        }
    });
}

/// A restore that KVM refuses is an answer, not a guest that does not answer: nothing has run then.
#[test]
fn a_restore_that_is_refused_is_named() {
    let Some(kvm) = kvm() else { return };
    for vcpus in [1, 4] {
        let race = Race { vcpus, hold: "", pinned: false };
        let snapshot = race.snapshot(&kvm);
        let refusing = |which: &'static str| Race { hold: which, ..race };
        // Each vCPU is restored by the thaw, by the reset, and by the run behind it.
        let vmm = refusing("refuse=1").shell(&kvm);
        let begun = Instant::now();
        let (_stream, theirs) = UnixStream::pair().unwrap();
        let message = ToVmm::Thaw { disks: empty(1), resume: true, plan: MemoryPlan::default() };
        let descriptors = [sealed(&snapshot.memory), snapshot.state.as_fd(), theirs.as_fd()];
        let answer = vmm.request(&message, &descriptors);
        let FromVmm::Failed(failure) = answer else { panic!("{answer:?}") };
        assert_eq!(failure.kind, FailureKind::Kvm, "{failure:?}");
        assert!(failure.message.contains("vCPU"), "{failure:?}");
        assert!(failure.message.contains("SET_REGS: Invalid argument"), "{failure:?}");
        assert!(begun.elapsed() < PATIENCE / 4, "{:?}", begun.elapsed());

        let hold = if vcpus == 1 { "refuse=3" } else { "refuse=9" };
        let mut guest = refusing(hold).thaw(&kvm, &snapshot, true, b"x");
        guest.says(&[BYTES], "thaw");
        let pagemap = guest.vmm.pagemap();
        let (stream, theirs) = UnixStream::pair().unwrap();
        (guest.stream, guest.begins) = (stream, true);
        let answer = guest.vmm.request(&ToVmm::Reset, &[theirs.as_fd(), pagemap.as_fd()]);
        assert!(matches!(answer, FromVmm::Reset(_)), "{answer:?}");
        guest.send();
        let answer = guest.vmm.receive();
        let FromVmm::Exited(exit) = answer else { panic!("{answer:?}") };
        assert_eq!(exit.reason, ExitReason::NotRestored, "{exit:?}");
        assert!(exit.detail.contains("SET_REGS: Invalid argument"), "{exit:?}");
    }
}

/// An interrupt that was lost all the same, here in a LAPIC that is off, is raised again, and counted.
/// The diagnosis says where the guest stands.
#[test]
fn what_a_guest_did_not_hear_is_said_again() {
    let Some(kvm) = kvm() else { return };
    let race = Race { vcpus: 1, hold: "", pinned: false };
    let vmm = race.shell(&kvm);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Boot { cmdline: String::new(), initramfs: false, disks: empty(1) };
    // So long that it is deaf when the answer to its request is there, and short of the last look.
    let kernel = elf(&driver::guest(Some(40_000)));
    let answer = vmm.request(&message, &[kernel.as_fd(), theirs.as_fd()]);
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    let mut guest = Guest { vmm, stream: ours, begins: false };
    let text = loop {
        let answer = guest.vmm.request(&ToVmm::Diagnose, &[]);
        let FromVmm::Diagnosis(text) = answer else { panic!("{answer:?}") };
        // Its driver is up.
        if text.contains("status 0xf") {
            break text;
        }
    };
    for part in ["vCPU 0: RIP 0x10", "IF 0", "not halted", "LAPIC", "pin 5: vector 0x40", "size 8"]
    {
        assert!(text.contains(part), "no {part} in {text}");
    }
    guest.says(&[UP, BYTES], "lost");
    let FromVmm::Stats(stats) = guest.vmm.request(&ToVmm::Stats, &[]) else { panic!("no stats") };
    assert!((1..=8).contains(&stats.interrupts_raised_again), "{stats:?}");
    // It goes on as if nothing had happened.
    guest.send();
    guest.says(&[BYTES], "after it");
}

/// A guest that never acknowledges is reminded for a while, and then left alone.
#[test]
fn a_guest_that_does_not_want_to_hear_is_left_alone() {
    let Some(kvm) = kvm() else { return };
    let race = Race { vcpus: 1, hold: "", pinned: false };
    let vmm = race.shell(&kvm);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Boot { cmdline: String::new(), initramfs: false, disks: empty(1) };
    let kernel = elf(&driver::guest(Some(u32::MAX)));
    let answer = vmm.request(&message, &[kernel.as_fd(), theirs.as_fd()]);
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    let again = || match vmm.request(&ToVmm::Stats, &[]) {
        FromVmm::Stats(stats) => stats.interrupts_raised_again,
        other => panic!("{other:?}"),
    };
    let begun = Instant::now();
    while again() == 0 {
        assert!(begun.elapsed() < PATIENCE, "never raised again");
        std::thread::sleep(Duration::from_millis(10));
    }
    // 5 + 10 + … + 640 ms of CPU time, which may be long in coming.
    while again() < 8 {
        assert!(begun.elapsed() < PATIENCE, "raised again {} times", again());
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(again(), 8);
}
