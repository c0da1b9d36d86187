//! Hostile guests of a few instructions against the devices, on whatever `/dev/kvm` is there. A guest
//! may end itself in any way it likes: the VMM says how, with one of its own exit codes. It never
//! panics, never fails by itself, and never grows beyond its bounds.

#[path = "common/assembler.rs"]
mod assembler;
mod common;

use std::{fs, io::Read, os::fd::AsFd, os::unix::net::UnixStream, time::Duration};

use assembler::Code;
use common::{ENTRY, Vmm, config_with_disks, elf, kvm, memfd};
use firn_proto::control::{DiskKind, DiskSource, ExitReason, FromVmm, ToVmm};

const VSOCK: u64 = 0xd000_0000;
const RNG: u64 = 0xd000_1000;
const BLOCK: u64 = 0xd000_2000;
const DEVICES: [u64; 3] = [VSOCK, RNG, BLOCK];

// Registers of a virtio device over MMIO (VIRTIO 1.2, 4.2.2).
const FEATURES: u64 = 0x20;
const FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const DESC: u64 = 0x80;
const AVAIL: u64 = 0x90;
const USED: u64 = 0xa0;

/// Where the parts of a queue lie: behind the code, in the same image.
const DESC_AT: u64 = ENTRY + 0x4000;
const AVAIL_AT: u64 = ENTRY + 0x5000;
const USED_AT: u64 = ENTRY + 0x6000;
const BUFFER_AT: u64 = ENTRY + 0x7000;
const SIZE: u32 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

/// A guest's code and what lies behind it.
struct Attack {
    code: Code,
    data: Vec<(u64, Vec<u8>)>,
}

impl Attack {
    fn new() -> Self {
        Self { code: Code::default(), data: Vec::new() }
    }

    /// A driver that has set up queue `queue` of `device` as a well-behaved one does.
    fn driver(device: u64, queue: u32) -> Self {
        let mut attack = Self::new();
        let code = &mut attack.code;
        code.set_device(device + STATUS, 1).set_device(device + STATUS, 3);
        // VIRTIO_F_VERSION_1 and nothing else.
        code.set_device(device + FEATURES_SEL, 1).set_device(device + FEATURES, 1);
        code.set_device(device + STATUS, 0xb);
        code.set_device(device + QUEUE_SEL, queue).set_device(device + QUEUE_NUM, SIZE);
        for (register, address) in [(DESC, DESC_AT), (AVAIL, AVAIL_AT), (USED, USED_AT)] {
            code.set_device(device + register, address as u32);
            code.set_device(device + register + 4, 0);
        }
        code.set_device(device + QUEUE_READY, 1).set_device(device + STATUS, 0xf);
        attack
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        self.data.push((at, bytes.to_vec()));
        self
    }

    fn descriptors(&mut self, descriptors: &[Descriptor]) -> &mut Self {
        let mut table = Vec::new();
        for &(address, length, flags, next) in descriptors {
            table.extend(address.to_le_bytes());
            table.extend(length.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        self.put(DESC_AT, &table)
    }

    /// Makes `heads` available, and says that `index` are.
    fn available(&mut self, index: u16, heads: &[u16]) -> &mut Self {
        let words = [0, index].into_iter().chain(heads.iter().copied());
        self.put(AVAIL_AT, &words.flat_map(u16::to_le_bytes).collect::<Vec<_>>())
    }

    fn set(&mut self, register: u64, value: u32) -> &mut Self {
        self.code.set_device(register, value);
        self
    }

    fn image(&self, end: impl Fn(&mut Code) -> &mut Code) -> fs::File {
        let mut code = self.code.clone();
        end(&mut code);
        let mut image = code.0;
        assert!(image.len() as u64 <= DESC_AT - ENTRY, "{} bytes of code", image.len());
        image.resize((BUFFER_AT + 0x2000 - ENTRY) as usize, 0);
        for (at, bytes) in &self.data {
            let start = (at - ENTRY) as usize;
            image[start..start + bytes.len()].copy_from_slice(bytes);
        }
        elf(&image)
    }

    fn boot(&self, kvm: &fs::File, end: impl Fn(&mut Code) -> &mut Code) -> (Vmm, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (self.boot_with(kvm, &theirs, end), ours)
    }

    /// Boots it with the VMM's end of a stream.
    fn boot_with(
        &self,
        kvm: &fs::File,
        theirs: &UnixStream,
        end: impl Fn(&mut Code) -> &mut Code,
    ) -> Vmm {
        let vmm = Vmm::shell(kvm, &config_with_disks(&[DiskKind::CopyOnWrite]));
        let (backing, delta) = (memfd(&[7; 64 << 10]), memfd(b""));
        let message = ToVmm::Boot {
            cmdline: String::new(),
            initramfs: false,
            disks: vec![DiskSource::CopyOnWrite],
        };
        let kernel = self.image(end);
        let descriptors = [kernel.as_fd(), theirs.as_fd(), backing.as_fd(), delta.as_fd()];
        let answer = vmm.request(&message, &descriptors);
        assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
        vmm
    }

    /// Runs it; it then pulls the reset line, if the VMM has not ended it before.
    fn run(&self, kvm: &fs::File, name: &str) -> ExitReason {
        let (vmm, _stream) = self.boot(kvm, |code| code.set_port(0x64, 0xfe).halt());
        let FromVmm::Exited(exit) = vmm.receive() else { panic!("{name}: no exit") };
        let (status, said) = vmm.wait();
        assert_eq!(status.code(), Some(exit.reason.code()), "{name}: {exit:?} {said}");
        assert!(!said.contains("panicked"), "{name}: {said}");
        assert!(
            matches!(exit.reason, ExitReason::GuestShutdown | ExitReason::DeviceViolation),
            "{name}: {exit:?} {said}"
        );
        exit.reason
    }
}

/// Reads and writes each of `count` bytes from `address` on, in all widths, with RAX as it is:
/// `movabs $address,%rbx; mov $count,%esi; l: mov %al,(%rbx); mov %ax,(%rbx); mov %eax,(%rbx);
/// mov %rax,(%rbx); mov (%rbx),%cl; mov (%rbx),%cx; mov (%rbx),%ecx; mov (%rbx),%rcx;
/// add $1,%rbx; dec %esi; jnz l`
fn everywhere(code: &mut Code, address: u64, count: u32) {
    code.load_immediate(3, address);
    code.0.push(0xbe);
    code.0.extend(count.to_le_bytes());
    let start = code.0.len();
    code.0.extend([0x88, 0x03, 0x66, 0x89, 0x03, 0x89, 0x03, 0x48, 0x89, 0x03]);
    code.0.extend([0x8a, 0x0b, 0x66, 0x8b, 0x0b, 0x8b, 0x0b, 0x48, 0x8b, 0x0b]);
    code.0.extend([0x48, 0x83, 0xc3, 0x01]);
    code.repeat_from(start);
}

#[test]
fn attack_every_register_takes_reads_and_writes_of_every_width() {
    let Some(kvm) = kvm() else { return };
    for device in DEVICES {
        for pattern in [0, 1, 0x0101_0101_0101_0101, u64::MAX] {
            // From a device without a driver, and from one that is running.
            for mut attack in [Attack::new(), Attack::driver(device, 0)] {
                attack.code.load_immediate(0, pattern);
                // Registers, configuration space, the window's end and over it.
                everywhere(&mut attack.code, device, 0x140);
                everywhere(&mut attack.code, device + 0xff0, 0x20);
                attack.run(&kvm, &format!("device {device:#x}, pattern {pattern:#x}"));
            }
        }
    }
}

#[test]
fn attack_chains_that_no_driver_makes_end_the_guest_at_worst() {
    let Some(kvm) = kvm() else { return };
    let chains: [(&str, &[Descriptor]); 14] = [
        ("loops on itself", &[(BUFFER_AT, 16, NEXT | WRITE, 0)]),
        ("loops over two", &[(BUFFER_AT, 16, NEXT, 1), (BUFFER_AT, 16, NEXT | WRITE, 0)]),
        ("next is outside of the table", &[(BUFFER_AT, 16, NEXT | WRITE, SIZE as u16)]),
        ("next is far outside", &[(BUFFER_AT, 16, NEXT, u16::MAX)]),
        ("buffer behind memory", &[(16 << 20, 16, WRITE, 0)]),
        ("buffer over memory's end", &[((16 << 20) - 8, 16, WRITE, 0)]),
        ("buffer among devices", &[(VSOCK, 0x1000, WRITE, 0)]),
        ("buffer wraps around", &[(u64::MAX - 7, 16, WRITE, 0)]),
        ("buffer of 4 GiB", &[(BUFFER_AT, u32::MAX, WRITE, 0)]),
        ("buffer of nothing", &[(BUFFER_AT, 0, WRITE, 0)]),
        ("indirect, not negotiated", &[(BUFFER_AT, 16, INDIRECT, 0)]),
        ("flags of no meaning", &[(BUFFER_AT, 16, 0xfff8, 0)]),
        ("buffer is the table", &[(DESC_AT, 128, WRITE, 0)]),
        ("buffer is the used ring", &[(USED_AT, 128, NEXT | WRITE, 1), (AVAIL_AT, 64, WRITE, 0)]),
    ];
    for device in DEVICES {
        for queue in [0, 1] {
            for (name, chain) in chains {
                let mut attack = Attack::driver(device, queue);
                attack.descriptors(chain).available(1, &[0]).set(device + NOTIFY, queue);
                attack.run(&kvm, &format!("device {device:#x}, queue {queue}: {name}"));
            }
        }
    }
}

#[test]
fn attack_rings_that_lie_end_the_guest_at_worst() {
    let Some(kvm) = kvm() else { return };
    let good: &[Descriptor] = &[(BUFFER_AT, 16, WRITE, 0)];
    for device in DEVICES {
        let run = |name: &str, attack: &mut Attack| {
            attack.set(device + NOTIFY, 0).set(device + NOTIFY, 1);
            attack.run(&kvm, &format!("device {device:#x}: {name}"))
        };
        let ready = || {
            let mut attack = Attack::driver(device, 0);
            attack.descriptors(good);
            attack
        };
        for (name, index, head) in
            [("index jumps", u16::MAX, 0), ("one too many", 9, 0), ("head outside", 1, 999)]
        {
            run(name, ready().available(index, &[head; 8]));
        }
        for size in [0, 3, 7, 257, 0x8000, u32::MAX] {
            let mut attack = Attack::new();
            attack.descriptors(good).available(1, &[0]);
            attack.code.set_device(device + STATUS, 3).set_device(device + QUEUE_NUM, size);
            attack.code.set_device(device + QUEUE_READY, 1).set_device(device + STATUS, 0xf);
            run(&format!("{size} entries"), &mut attack);
        }
        for (name, register, value) in [
            ("size changed", QUEUE_NUM, 1024),
            ("table moved out of memory", DESC + 4, 0xffff),
            ("table moved to a device", DESC, BLOCK as u32),
            ("available ring moved", AVAIL, 0xfff_fffe),
            ("used ring moved", USED + 4, u32::MAX),
            ("features changed", FEATURES, u32::MAX),
            ("another queue selected", QUEUE_SEL, u32::MAX),
            ("failed", STATUS, 0x80),
        ] {
            let mut attack = ready();
            attack.available(1, &[0]).set(device + register, value);
            run(&format!("{name} after it was activated"), &mut attack);
        }
        // Addresses that are not in memory from the start.
        for register in [DESC, AVAIL, USED] {
            for (low, high) in [(VSOCK as u32, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (1, 0)] {
                let mut attack = Attack::new();
                let code = &mut attack.code;
                code.set_device(device + STATUS, 3).set_device(device + QUEUE_NUM, SIZE);
                for (other, address) in [(DESC, DESC_AT), (AVAIL, AVAIL_AT), (USED, USED_AT)] {
                    code.set_device(device + other, address as u32);
                }
                code.set_device(device + register, low).set_device(device + register + 4, high);
                code.set_device(device + QUEUE_READY, 1).set_device(device + STATUS, 0xf);
                run(&format!("register {register:#x} at {high:#x}{low:08x}"), &mut attack);
            }
        }
        // Kicked before there is anything.
        assert_eq!(run("no driver", &mut Attack::new()), ExitReason::GuestShutdown);
    }
}

#[test]
fn attack_block_requests_past_the_end_and_unaligned_are_answered() {
    let Some(kvm) = kvm() else { return };
    // Type, sector; a medium of 128 sectors.
    for (kind, sector) in
        [(0, 128), (1, 128), (0, 127), (1, u64::MAX), (0, u64::MAX / 512), (4, 0), (8, 0), (99, 0)]
    {
        for length in [0, 1, 511, 512, 513, 0x1000] {
            let mut attack = Attack::driver(BLOCK, 0);
            let mut header = Vec::new();
            header.extend(u32::to_le_bytes(kind));
            header.extend(0u32.to_le_bytes());
            header.extend(u64::to_le_bytes(sector));
            let data = if kind == 0 || kind == 8 { NEXT | WRITE } else { NEXT };
            attack.put(BUFFER_AT, &header).available(1, &[0]);
            attack.descriptors(&[
                (BUFFER_AT, 16, NEXT, 1),
                (BUFFER_AT + 0x100, length, data, 2),
                (BUFFER_AT + 0x1f00, 1, WRITE, 0),
            ]);
            attack.set(BLOCK + NOTIFY, 0);
            let reason = attack.run(&kvm, &format!("type {kind}, sector {sector}, {length} bytes"));
            assert_eq!(reason, ExitReason::GuestShutdown, "an error to answer, not to end for");
        }
    }
}

/// Peak resident memory of a process in KiB, unless it has ended.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

// Operations of vsock packets (VIRTIO 1.2, 5.10.6).
const REQUEST: u16 = 1;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;

/// A vsock packet's header.
fn packet(operation: u16, flags: u32, length: u32) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(3u64.to_le_bytes()); // from the guest
    packet.extend(2u64.to_le_bytes()); // to the host
    packet.extend(1u32.to_le_bytes()); // source port
    packet.extend(1024u32.to_le_bytes());
    packet.extend(length.to_le_bytes());
    packet.extend(1u16.to_le_bytes()); // stream
    packet.extend(operation.to_le_bytes());
    packet.extend(flags.to_le_bytes());
    packet.extend(u32::MAX.to_le_bytes()); // credit beyond belief
    packet.extend(0u32.to_le_bytes()); // nothing taken from the host yet
    packet
}

/// A guest that sends the same vsock packet again and again, with another source port each time, and
/// never stops: 20,000 connection requests, or resets, or data for nobody.
fn flood(operation: u16, flags: u32, length: u32) -> Attack {
    let mut attack = Attack::driver(VSOCK, 1);
    attack.put(BUFFER_AT, &packet(operation, flags, length)).available(0, &[0; 8]);
    attack.descriptors(&[(BUFFER_AT, 44, NEXT, 1), (BUFFER_AT + 0x100, 0x1000, 0, 0)]);
    let code = &mut attack.code;
    // `mov $20000,%esi; l: incl source_port; incw available_index; mov $1,%eax; movabs %eax,notify;
    // dec %esi; jnz l`
    code.0.extend([0xbe]);
    code.0.extend(20_000u32.to_le_bytes());
    let start = code.0.len();
    code.0.extend([0xff, 0x04, 0x25]);
    code.0.extend(((BUFFER_AT + 16) as u32).to_le_bytes());
    code.0.extend([0x66, 0xff, 0x04, 0x25]);
    code.0.extend(((AVAIL_AT + 2) as u32).to_le_bytes());
    code.set_device(VSOCK + NOTIFY, 1).repeat_from(start);
    attack
}

#[test]
fn attack_floods_of_vsock_packets_are_bounded() {
    let Some(kvm) = kvm() else { return };
    for (name, operation, flags, length) in [
        ("connections", REQUEST, 0, 0),
        ("resets", RST, 0, 0),
        ("data for nobody", RW, 0, 0x1000),
        ("length that lies", RW, 0, u32::MAX),
        ("unknown operations", 99, u32::MAX, 0),
    ] {
        // Ends by pulling the reset line or for what it did; and is small at any time meanwhile.
        let (vmm, _stream) = flood(operation, flags, length)
            .boot(&kvm, |code| code.delay(2_000_000).set_port(0x64, 0xfe).halt());
        std::thread::sleep(Duration::from_millis(300));
        let peak = peak_kib(vmm.pid());
        let FromVmm::Exited(exit) = vmm.receive() else { panic!("{name}: no exit") };
        assert!(
            matches!(exit.reason, ExitReason::GuestShutdown | ExitReason::DeviceViolation),
            "{name}: {exit:?}"
        );
        eprintln!("{name}: {:?}, {peak:?} KiB", exit.reason);
        assert!(peak.is_none_or(|kib| kib < 12 << 10), "{name}: {peak:?} KiB");
    }
}

/// A guest that connects, says six times 4 KiB, says that this was all, and does not end the connection.
/// To a host that does not read yet the device thread passes on what its stream has no room for, and
/// then the end, too; otherwise the vCPU thread has done both.
#[test]
fn a_host_hears_all_and_the_end_however_late_it_reads() {
    const SEND: u32 = 2;
    let Some(kvm) = kvm() else { return };
    for room in [1 << 20, 4096] {
        let mut guest = Attack::driver(VSOCK, 1);
        guest.put(BUFFER_AT, &packet(REQUEST, 0, 0));
        guest.put(BUFFER_AT + 0x40, &packet(RW, 0, 0x1000));
        guest.put(BUFFER_AT + 0x80, &packet(SHUTDOWN, SEND, 0));
        guest.put(BUFFER_AT + 0x1000, &[b'x'; 0x1000]);
        guest.descriptors(&[
            (BUFFER_AT, 44, 0, 0),
            (BUFFER_AT + 0x40, 44, NEXT, 2),
            (BUFFER_AT + 0x1000, 0x1000, 0, 0),
            (BUFFER_AT + 0x80, 44, 0, 0),
        ]);
        guest.available(8, &[0, 1, 1, 1, 1, 1, 1, 3]).set(VSOCK + NOTIFY, 1);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, room).unwrap();
        let vmm = guest.boot_with(&kvm, &theirs, |code| code.halt());
        drop(theirs);
        std::thread::sleep(Duration::from_millis(100));
        let mut heard = Vec::new();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        ours.read_to_end(&mut heard).unwrap();
        assert!(heard == [b'x'; 6 * 0x1000], "room for {room}: {} bytes", heard.len());
        let FromVmm::Exited(exit) = vmm.request(&ToVmm::Stop, &[]) else { panic!("no exit") };
        assert_eq!(exit.reason, ExitReason::Stopped);
    }
}

#[test]
fn attack_a_guest_that_resets_its_devices_for_ever_can_be_stopped() {
    let Some(kvm) = kvm() else { return };
    let mut attack = Attack::new();
    let start = attack.code.0.len();
    for device in DEVICES {
        attack.set(device + STATUS, 0xf).set(device + NOTIFY, 0).set(device + STATUS, 0);
    }
    let back = attack.code.0.len() + 2 - start;
    attack.code.0.extend([0xeb, (-(back as i64)) as u8]);
    let (vmm, _stream) = attack.boot(&kvm, |code| code);
    std::thread::sleep(Duration::from_millis(200));
    assert!(matches!(vmm.request(&ToVmm::Pause, &[]), FromVmm::Paused(0)));
    assert!(matches!(vmm.request(&ToVmm::Resume, &[]), FromVmm::Done));
    let FromVmm::Exited(exit) = vmm.request(&ToVmm::Stop, &[]) else { panic!("no exit") };
    assert_eq!(exit.reason, ExitReason::Stopped);
}
