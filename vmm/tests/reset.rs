//! Reset against guests of a few instructions on whatever `/dev/kvm` is there: nothing of what a
//! guest did can be observed by what runs after a reset.

#[path = "common/assembler.rs"]
mod assembler;
mod common;

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    time::Duration,
};

use assembler::{Code, REGISTERS};
use common::{Vmm, config, elf, empty, from_now, kvm, sealed};
use firn_proto::control::{FailureKind, FromVmm, MemoryPlan, Phase, ResetReport, ToVmm};

/// While this byte is 0 the guest idles: the state that is saved.
const FLAG: u32 = 0x1f_0000;
/// Where the guest puts its registers before it uses them.
const REGISTER_AREA: u32 = 0x1f_1000;
const XMM_AREA: u32 = 0x1f_2000;
/// What XMM registers are loaded from.
const XMM_SECRETS: u32 = 0x1f_3000;
/// Where KVM itself writes, if told to: kvmclock.
const CLOCK_AREA: u32 = 0x1f_4000;
const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;

/// Ordinary pages: low, in the middle, last.
const PAGES: [u32; 5] = [0x5_0000, 0x20_0000, 0x20_1000, 0x7f_f000, 0xff_f000];

/// MSRs and something that may be written to them.
const MSRS: [(u32, u64); 14] = [
    // STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, FS_BASE
    (0xc000_0081, 0x0023_0010_1234_5678),
    (0xc000_0082, 0xffff_8000_1234_5678),
    (0xc000_0083, 0xffff_8000_8765_4321),
    (0xc000_0084, 0x4_7700),
    (0xc000_0102, 0x7f00_1234_5678),
    (0xc000_0100, 0x7f00_8765_4321),
    // SYSENTER_CS, _ESP, _EIP
    (0x174, 0x10),
    (0x175, 0xffff_8000_0000_1750),
    (0x176, 0xffff_8000_0000_1760),
    // PAT; a variable memory type range; its mask
    (0x277, 0x0606_0606_0606_0606),
    (0x200, 0x1_0000_0006),
    (0x201, 0x1_0000_0000),
    // ADDR and MISC of machine-check bank 0
    (0x402, 0x4020_1234_5678),
    (0x403, 0x4030_1234_5678),
];

const LAPIC: u64 = 0xfee0_0000;
/// Device registers that read as they were written: task priority and timer (LVT, initial count,
/// divider) of the LAPIC, status of the vsock device.
const DEVICE_REGISTERS: [(u64, u32); 5] = [
    (LAPIC + 0x80, 0x20),
    (LAPIC + 0x320, 0x40),
    (LAPIC + 0x3e0, 0xb),
    (LAPIC + 0x380, 500_000),
    (0xd000_0070, 1),
];
/// Pending interrupts 0x40 to 0x5f, of which the timer's is one.
const PENDING: u64 = LAPIC + 0x220;
/// Redirection entry of pin 3, by index and data register.
const IOAPIC: (u64, u64) = (0xfec0_0000, 0xfec0_0010);
/// Mask of the first PIC; scratch register of the serial port.
const PORTS: [u16; 2] = [0x21, 0x3ff];

/// Prints all that the guest can see of its machine. The first thing it does is put its registers
/// away, from `area` on.
fn observe(code: &mut Code, area: u32) -> usize {
    let before = code.0.len();
    for (slot, register) in (0..).zip(REGISTERS) {
        code.store(register, area + slot * 8);
    }
    code.delay(3000);
    let mut printed = 0;
    let mut print = |code: &mut Code| {
        code.print();
        printed += 8;
    };
    for slot in 0..REGISTERS.len() as u32 {
        print(code.load(area + slot * 8));
    }
    for page in PAGES {
        print(code.load(page + 8));
    }
    print(code.load(CLOCK_AREA + 24));
    for xmm in 0..4 {
        code.store_xmm(xmm, XMM_AREA);
        print(code.load(XMM_AREA));
        print(code.load(XMM_AREA + 8));
    }
    for register in 0..4 {
        print(code.load_debug(register));
    }
    print(code.load_debug(7));
    print(code.load_cr2());
    for (index, _) in MSRS {
        print(code.load_msr(index));
    }
    print(code.load_msr(0x4b56_4d01));
    for (address, _) in DEVICE_REGISTERS {
        print(code.load_device(address));
    }
    print(code.load_device(PENDING));
    code.set_device(IOAPIC.0, 0x16);
    print(code.load_device(IOAPIC.1));
    for port in PORTS {
        print(code.load_port(port));
    }
    assert!(code.0.len() > before);
    printed
}

/// Changes all that [`observe`] prints.
fn plant(code: &mut Code) {
    for page in PAGES {
        code.load_immediate(0, SECRET).store(0, page + 8);
    }
    for xmm in 0..4 {
        code.load_immediate(0, SECRET ^ u64::from(xmm)).store(0, XMM_SECRETS);
        code.store(0, XMM_SECRETS + 8).load_xmm(xmm, XMM_SECRETS);
    }
    for register in 0..4 {
        code.set_debug(register, 0x1000 + u64::from(register));
    }
    // A length and a condition, but no breakpoint.
    code.set_debug(7, 0xf_0400).set_cr2(SECRET >> 16);
    for (index, value) in MSRS {
        code.set_msr(index, value);
    }
    code.set_msr(0x4b56_4d01, u64::from(CLOCK_AREA) | 1);
    // The LAPIC on, or its timer stays silent.
    code.set_device(LAPIC + 0xf0, 0x1ff);
    for (address, value) in DEVICE_REGISTERS {
        code.set_device(address, value);
    }
    code.set_device(IOAPIC.0, 0x16).set_device(IOAPIC.1, 0x1_0077);
    code.set_port(PORTS[0], 0x5a).set_port(PORTS[1], 0xa5);
    for register in REGISTERS {
        code.load_immediate(register, SECRET ^ u64::from(register) << 56);
    }
}

/// A snapshot of a guest that, once thawed, observes, plants, observes again and stops. Returns
/// memory, state, and the length of one observation in bytes.
fn snapshot(kvm: &File) -> (File, File, usize) {
    let mut code = Code::default();
    code.enable_sse().wait_for(FLAG);
    let printed = observe(&mut code, REGISTER_AREA);
    plant(&mut code);
    let again = observe(&mut code, REGISTER_AREA + 0x200);
    assert_eq!(printed, again);
    // And once more, so that registers end with secrets in them.
    plant(&mut code);
    code.halt();
    let vmm = Vmm::shell(kvm, &config(1, true));
    let (answer, _stream) = vmm.boot(&elf(&code.0));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
    let (memory, state) = vmm.save(None, &[]);
    memory.write_all_at(&[1], FLAG.into()).unwrap();
    (memory, state, printed)
}

fn thaw(kvm: &File, memory: &File, state: &File) -> (Vmm, UnixStream) {
    let vmm = Vmm::shell(kvm, &config(1, true));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
    let answer = vmm.request(&message, &[sealed(memory), state.as_fd(), theirs.as_fd()]);
    assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
    (vmm, ours)
}

fn try_reset(vmm: &Vmm) -> (FromVmm, UnixStream) {
    let pagemap = vmm.pagemap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    (vmm.request(&ToVmm::Reset, &[theirs.as_fd(), pagemap.as_fd()]), ours)
}

fn reset(vmm: &Vmm) -> (ResetReport, UnixStream) {
    match try_reset(vmm) {
        (FromVmm::Reset(report), ours) => (report, ours),
        (other, _) => panic!("{other:?}"),
    }
}

fn observation(vmm: &mut Vmm, length: usize) -> Vec<u64> {
    let mut bytes = vec![0; length];
    vmm.stderr.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect()
}

#[test]
fn a_reset_that_makes_no_sense_is_refused_and_changes_nothing() {
    let Some(kvm) = kvm() else { return };
    let refused = |vmm: &Vmm, about: &str| match try_reset(vmm).0 {
        FromVmm::Failed(failure) => {
            assert_eq!(failure.kind, FailureKind::BadRequest);
            assert!(failure.message.contains(about), "{}", failure.message);
        }
        other => panic!("{other:?}"),
    };
    let vmm = Vmm::shell(&kvm, &config(1, true));
    refused(&vmm, "only a thawed microVM");
    let mut endless = Code::default();
    let (answer, _stream) = vmm.boot(&elf(&endless.halt().0));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    refused(&vmm, "only a thawed microVM");

    let (memory, state, length) = snapshot(&kvm);
    let (mut vmm, _stream) = thaw(&kvm, &memory, &state);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let strange = File::open("/proc/self/pagemap").unwrap();
    let answer = vmm.request(&ToVmm::Reset, &[theirs.as_fd(), strange.as_fd()]);
    let FromVmm::Failed(failure) = answer else { panic!("{answer:?}") };
    assert!(failure.message.contains("not this process's"), "{}", failure.message);
    let answer = vmm.request(&ToVmm::Reset, &[theirs.as_fd()]);
    assert!(matches!(answer, FromVmm::Failed(_)), "{answer:?}");
    // It went on all the while.
    assert_ne!(observation(&mut vmm, length), observation(&mut vmm, length));
}

#[test]
fn bytes_of_an_earlier_stream_are_gone() {
    let Some(kvm) = kvm() else { return };
    let (memory, state, length) = snapshot(&kvm);
    let (mut vmm, mut old) = thaw(&kvm, &memory, &state);
    for _ in 0..20 {
        old.write_all(&from_now(b"an event of an earlier request")).unwrap();
        let (_, new) = reset(&vmm);
        // The VMM had the only other end: what was in it went with it.
        let end = old.read(&mut [0; 64]);
        assert!(
            matches!(&end, Ok(0))
                || end.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset),
            "{end:?}"
        );
        old = new;
    }
    let FromVmm::Stats(stats) = vmm.request(&ToVmm::Stats, &[]) else { panic!("no stats") };
    assert!(stats.paused);
    // Bytes on the newest stream resume it, whenever they came.
    old.write_all(&from_now(b"x")).unwrap();
    observation(&mut vmm, length);
}

/// What the first vCPU has sent to the second (INIT, SIPI) and was not yet acted on when the reset
/// came must not start the second vCPU in the next life.
#[test]
fn messages_between_vcpus_do_not_outlive_a_reset() {
    let Some(kvm) = kvm() else { return };
    // Prints M, waits, then wakes the second vCPU, which prints X from 0x8000:0.
    let mut code = Code::default();
    code.wait_for(FLAG).set_port(0x3f8, b'M').delay(2000);
    for message in [0x4500, 0x4680] {
        code.set_device(LAPIC + 0x310, 1 << 24).set_device(LAPIC + 0x300, message);
    }
    code.halt();
    // mov $'X',%al; mov $0x3f8,%dx; out %al,(%dx); l: jmp l
    const SECOND: [u8; 8] = [0xb0, b'X', 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe];

    let vmm = Vmm::shell(&kvm, &config(2, true));
    let (answer, _stream) = vmm.boot(&elf(&code.0));
    assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0));
    let (memory, state) = vmm.save(None, &[]);
    memory.write_all_at(&[1], FLAG.into()).unwrap();
    memory.write_all_at(&SECOND, 0x8_0000).unwrap();

    let mut vmm = Vmm::shell(&kvm, &config(2, true));
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    let message = ToVmm::Thaw { disks: empty(0), resume: true, plan: MemoryPlan::default() };
    let answer = vmm.request(&message, &[sealed(&memory), state.as_fd(), theirs.as_fd()]);
    assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
    let mut output = vmm.stderr.take().unwrap();
    rustix::io::ioctl_fionbio(&output, true).unwrap();
    // All that comes within a while.
    let mut read_for = |time: Duration| {
        let (mut said, end) = (Vec::new(), std::time::Instant::now() + time);
        loop {
            let before = said.len();
            // It would block where there is no more.
            let _ = output.read_to_end(&mut said);
            if said.len() == before {
                if std::time::Instant::now() > end {
                    return String::from_utf8(said).unwrap();
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    };
    assert_eq!(read_for(Duration::from_millis(100)), "MX");
    for round in 0..150 {
        let (_, ours) = reset(&vmm);
        // What the last life said.
        read_for(Duration::ZERO);
        stream = ours;
        stream.write_all(&from_now(b"x")).unwrap();
        // Resets come at all moments of a life; in every tenth it is heard to the end.
        match round % 10 {
            9 => assert_eq!(read_for(Duration::from_millis(100)), "MX", "round {round}"),
            _ => {
                let said = read_for(Duration::from_micros(round * 173 % 6000));
                assert!("MX".starts_with(&said), "round {round}: {said:?}");
            }
        }
    }
    drop(stream);
}

#[test]
fn nothing_that_a_guest_planted_is_found_after_a_reset() {
    let Some(kvm) = kvm() else { return };
    let (memory, state, length) = snapshot(&kvm);
    let (mut vmm, mut stream) = thaw(&kvm, &memory, &state);
    let pristine = observation(&mut vmm, length);
    let planted = observation(&mut vmm, length);
    for (field, (before, after)) in pristine.iter().zip(&planted).enumerate() {
        assert_ne!(before, after, "field {field}: nothing was planted");
    }
    for round in 0..firn_nightly::rounds(50, 500) {
        // Sometimes in the middle of planting, which takes the guest a while.
        if round % 3 == 0 {
            std::thread::sleep(Duration::from_micros(round * 37 % 5000));
        }
        let (report, new_stream) = reset(&vmm);
        stream = new_stream;
        assert!(report.pages >= 5, "{report:?}");
        assert!(report.stamps.get(Phase::Stopped) <= report.stamps.get(Phase::Mapped));
        assert!(report.duration_ns > 0);
        assert_eq!(vmm.request(&ToVmm::Resume, &[]), FromVmm::Done);
        assert_eq!(observation(&mut vmm, length), pristine, "round {round}");
        assert_eq!(observation(&mut vmm, length), planted, "round {round}");
    }
    drop(stream);
}
