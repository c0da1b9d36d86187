//! A tiny guest with a driver: it brings the vsock device up, opens the invoke connection, and prints
//! a character for each interrupt that comes.
//!
//! It takes no interrupts but looks for them in its LAPIC, where one stays once it has come: there are
//! KVMs that can't interrupt a guest kernel whose code they emulate. So each interrupt of the vsock
//! device gets a vector of its own, and [`INTERRUPTS`] is how many of them a life has.
//!
//! ```text
//! 0x21_0000  RX: descriptors, 0x21_1000 available, 0x21_2000 used
//! 0x22_0000  TX: the same; 0x23_0000 the request; 0x24_0000 RX buffers
//! ```

use crate::{assembler::Code, common::ENTRY};

/// What the guest prints once it waits.
pub const UP: u8 = b'.';
/// What it prints for an interrupt of the vsock device: used buffers.
pub const BYTES: u8 = b'b';
/// What it prints for the first interrupt of the first block device: its configuration has changed.
pub const CHANGED: u8 = b'c';

/// Interrupts of the vsock device that the guest takes; it then stands still.
pub const INTERRUPTS: usize = VECTORS.end - VECTORS.start;

/// Vectors of the vsock device, on line 5, and that of the block device, on line 7.
const VECTORS: std::ops::Range<usize> = 0x40..0xe0;
const DISK_VECTOR: usize = 0x31;

const RX: u32 = 0x21_0000;
const TX: u32 = 0x22_0000;
const REQUEST: u32 = 0x23_0000;
const BUFFERS: u32 = 0x24_0000;
/// Buffers that the guest has posted at any time.
const POSTED: u16 = 8;

const VSOCK: u64 = 0xd000_0000;
const DISK: u64 = 0xd000_2000;
const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

/// The guest's code; it drives the first block device, too. With `deaf` its LAPIC is off, and loses
/// what comes, until this long a loop behind its request for the connection is over.
pub fn guest(deaf: Option<u32>) -> Vec<u8> {
    let mut code = Code::default();
    code.load_immediate(BLOCK_SEEN, 0);
    route(&mut code, 7, DISK_VECTOR);
    route(&mut code, 5, VECTORS.start);
    let enable = |code: &mut Code| {
        code.set_device(LAPIC + 0xf0, 0x1ff);
    };
    if deaf.is_none() {
        enable(&mut code);
    }
    negotiate(&mut code, DISK);
    code.set_device(DISK + 0x70, 15);
    connect(&mut code);
    if let Some(loops) = deaf {
        code.delay(loops);
        enable(&mut code);
    }
    code.set_port(0x3f8, UP);
    for vector in VECTORS {
        let again = code.0.len();
        code.load_device(pending(DISK_VECTOR));
        code.if_bit(DISK_VECTOR % 32, |code| {
            code.if_zero(BLOCK_SEEN, |code| {
                code.load_immediate(BLOCK_SEEN, 1);
                acknowledge(code, DISK);
                code.set_port(0x3f8, CHANGED);
            });
        });
        code.load_device(pending(vector)).unless_bit_go_to(vector % 32, again);
        // The next one's vector first: what comes on this one again is not seen.
        if vector + 1 < VECTORS.end {
            route(&mut code, 5, vector + 1);
        }
        acknowledge(&mut code, VSOCK);
        // All buffers that came back are posted again, in their order: available = used + POSTED.
        code.load_half(RX + 0x2002).add_half(POSTED).store_half(RX + 0x1002);
        code.set_port(0x3f8, BYTES);
    }
    code.halt();
    assert!(ENTRY as usize + code.0.len() < RX as usize);
    code.0
}

/// The register that says whether the block device's interrupt was seen.
const BLOCK_SEEN: u8 = 5;

/// The word of the LAPIC's pending interrupts that has `vector`.
fn pending(vector: usize) -> u64 {
    LAPIC + 0x200 + (vector as u64 / 32) * 0x10
}

/// Sends a line of the IOAPIC to a vector of vCPU 0.
fn route(code: &mut Code, line: u32, vector: usize) {
    let entry = 0x10 + 2 * line;
    code.set_device(IOAPIC, entry + 1).set_device(IOAPIC + 0x10, 0);
    code.set_device(IOAPIC, entry).set_device(IOAPIC + 0x10, vector as u32);
}

fn negotiate(code: &mut Code, device: u64) {
    let features = [(0x70, 0), (0x70, 3), (0x24, 0), (0x20, 0), (0x24, 1), (0x20, 1), (0x70, 11)];
    for (register, value) in features {
        code.set_device(device + register, value);
    }
}

/// Sets the queues up and asks for the invoke connection.
fn connect(code: &mut Code) {
    negotiate(code, VSOCK);
    for index in 0..u32::from(POSTED) {
        let at = RX + 16 * index;
        code.set_quad(at, u64::from(BUFFERS + 0x100 * index)).set_quad(at + 8, 0x2_0000_0100);
        // The ring of heads is 0, 1, 2 … for good; two bytes each, from offset 4 on.
        code.half(index as u16).store_half(RX + 0x1004 + 2 * index);
    }
    code.half(POSTED).store_half(RX + 0x1002);
    // From CID 3 to CID 2, port 7 to 1024, no payload, STREAM, REQUEST, all the room there is.
    let request = [3, 2, 7 | 1024 << 32, 1 << 32 | 1 << 48, 0xffff_ffff << 32, 0];
    for (word, at) in request.into_iter().zip((REQUEST..).step_by(8)) {
        code.set_quad(at, word);
    }
    code.set_quad(TX, REQUEST.into()).set_quad(TX + 8, 44);
    code.half(1).store_half(TX + 0x1002);
    for (queue, base) in [(0, RX), (1, TX)] {
        code.set_device(VSOCK + 0x30, queue).set_device(VSOCK + 0x38, POSTED.into());
        for (register, address) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
            code.set_device(VSOCK + register, address).set_device(VSOCK + register + 4, 0);
        }
        code.set_device(VSOCK + 0x44, 1);
    }
    code.set_device(VSOCK + 0x70, 15).set_device(VSOCK + 0x50, 1);
}

fn acknowledge(code: &mut Code, device: u64) {
    code.load_device(device + 0x60).store_device(device + 0x64);
}
