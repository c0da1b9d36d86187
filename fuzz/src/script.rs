//! A driver that follows a script: now by the rules, now against them.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use arbitrary::Arbitrary;
use firn_vmm::{
    Lapics,
    memory::GuestMemory,
    virtio::{
        Device, DeviceError, Interrupt,
        mmio::{VirtioMmio, VirtioMmioState},
    },
};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{self, Address, Length, RING, RINGS};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 0x40;

/// Longest script that is followed: bounds the time of one run.
const MAX_STEPS: usize = 200;

/// One thing that a guest, or whoever has its snapshot, does.
#[derive(Debug, Arbitrary)]
pub enum Step<E> {
    /// Writes a register.
    Set { register: u8, value: Value },
    /// Writes anything anywhere in the window.
    Write { offset: u16, bytes: Vec<u8> },
    /// Reads anything anywhere in the window.
    Read { offset: u64, len: u8 },
    /// Writes guest memory.
    Poke { at: Address, bytes: Vec<u8> },
    /// Writes a descriptor, any one.
    Descriptor { queue: u8, index: u8, at: Address, len: Length, flags: u8, next: u8 },
    /// Makes a chain available by the rules of rings.
    Chain { queue: u8, buffers: Vec<Buffer> },
    /// Sets the available index.
    Index { queue: u8, index: u16 },
    /// Notifies.
    Kick { queue: u8 },
    /// Resets the device and brings it up by the rules.
    Up,
    /// Saves and restores, with these bytes of the state changed.
    Restore { edits: Vec<(u16, u8)> },
    /// Saves and restores state that nobody has touched.
    Thaw,
    /// What only this kind of device knows.
    Extra(E),
}

/// A value of a register.
#[derive(Debug, Arbitrary)]
pub enum Value {
    /// Any.
    Any(u32),
    /// A small one.
    Small(u8),
    /// An address.
    Address(Address),
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Buffer {
    /// Where.
    pub at: Address,
    /// How long.
    pub len: Length,
    /// Whether the device may write it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer of `len` bytes at `at`.
    pub fn new(at: u64, len: u32, writable: bool) -> Self {
        Self { at: Address(at), len: Length(len), writable }
    }
}

/// What a kind of device adds.
pub trait Subject: Device {
    /// Its own steps.
    type Extra: Debug + for<'a> Arbitrary<'a>;
    /// What it needs on the host's side.
    type Host;

    /// Takes one of its own steps.
    ///
    /// # Errors
    /// The device's.
    fn extra(
        driver: &mut Driver<Self>,
        host: &mut Self::Host,
        step: Self::Extra,
    ) -> Result<(), DeviceError>
    where
        Self: Sized;

    /// Saves and restores by the rules, which must succeed.
    fn thaw(driver: &mut Driver<Self>, host: &mut Self::Host)
    where
        Self: Sized;
}

#[derive(Default)]
struct Line(AtomicUsize);

impl Interrupt for Line {
    fn raise(&self, _: Lapics) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Position {
    free: u16,
    next: u16,
}

/// A device and what drives it.
pub struct Driver<D: Device> {
    /// The device.
    pub device: VirtioMmio<D>,
    /// Its guest's memory.
    pub memory: Arc<GuestMemory>,
    positions: Vec<Position>,
}

impl<D: Device> Driver<D> {
    /// Drives `device`.
    pub fn new(device: D, memory: Arc<GuestMemory>) -> Self {
        let device = VirtioMmio::new(device, memory.clone(), Arc::new(Line::default()));
        let positions = vec![Position::default(); D::QUEUES.len()];
        Self { device, memory, positions }
    }

    fn get(&mut self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, register: u64, value: u32) -> Result<(), DeviceError> {
        self.device.write(register, &value.to_le_bytes(), Lapics::of_power_on())
    }

    /// Notifies `queue`.
    ///
    /// # Errors
    /// The device's.
    pub fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.set(0x50, queue as u32)
    }

    /// Brings the device up by the rules.
    pub fn up(&mut self) {
        let steps = [(STATUS, 0), (STATUS, 3), (0x14, 0), (0x24, 0)];
        self.must_all(&steps);
        let low = self.get(0x10);
        self.must(0x20, low);
        self.must_all(&[(0x14, 1), (0x24, 1)]);
        let high = self.get(0x10);
        self.must(0x20, high);
        self.must(STATUS, 11);
        for (queue, &size) in D::QUEUES.iter().enumerate() {
            let base = rings(queue);
            // The last run of this driver may have left anything here.
            guest::poke(&self.memory, base, &[0; RING as usize]);
            let steps = [
                (0x30, queue as u32),
                (0x38, size.into()),
                (0x80, base as u32),
                (0x84, 0),
                (0x90, base as u32 + 0x1000),
                (0x94, 0),
                (0xa0, base as u32 + 0x2000),
                (0xa4, 0),
                (0x44, 1),
            ];
            self.must_all(&steps);
        }
        self.must(STATUS, 15);
        assert_eq!(self.get(STATUS), 15, "a driver that keeps to the rules");
        self.positions.fill(Position::default());
    }

    fn must(&mut self, register: u64, value: u32) {
        self.set(register, value).expect("a driver that keeps to the rules");
    }

    fn must_all(&mut self, steps: &[(u64, u32)]) {
        for &(register, value) in steps {
            self.must(register, value);
        }
    }

    /// Writes one descriptor.
    fn descriptor(&self, queue: usize, index: u16, buffer: (u64, u32, u16, u16)) {
        let (at, len, flags, next) = buffer;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        guest::poke(&self.memory, rings(queue) + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain available.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) {
        let size = D::QUEUES[queue];
        let Position { free: head, next } = self.positions[queue];
        for (i, buffer) in buffers.iter().take(size.into()).enumerate() {
            let index = (head + i as u16) % size;
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = more | if buffer.writable { WRITE } else { 0 };
            let next = (index + 1) % size;
            self.descriptor(queue, index, (buffer.at.0, buffer.len.0, flags, next));
        }
        let slot = rings(queue) + 0x1004 + 2 * u64::from(next % size);
        guest::poke(&self.memory, slot, &head.to_le_bytes());
        let next = next.wrapping_add(1);
        self.positions[queue] = Position { free: (head + buffers.len() as u16) % size, next };
        self.index(queue, next);
    }

    fn index(&mut self, queue: usize, index: u16) {
        self.positions[queue].next = index;
        guest::poke(&self.memory, rings(queue) + 0x1002, &index.to_le_bytes());
    }

    /// The device's state as a snapshot has it.
    pub fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(&self.device.save()).expect("any state can be written")
    }

    /// Restores a state; whether the device took it. One that it refuses changes nothing.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let Ok(state) = postcard::from_bytes::<VirtioMmioState<D::State>>(bytes) else {
            return false;
        };
        let before = self.save();
        if self.device.restore(&state).is_err() {
            assert_eq!(self.save(), before);
            return false;
        }
        // What it took is a state that it can be in: one to save and to come back to.
        let state = self.device.save();
        self.device.restore(&state).expect("a state that was just saved");
        true
    }
}

fn rings(queue: usize) -> u64 {
    RINGS + RING * queue as u64
}

/// Follows a script to its end.
pub fn follow<D: Subject>(driver: &mut Driver<D>, host: &mut D::Host, steps: Vec<Step<D::Extra>>) {
    let queues = D::QUEUES.len();
    for step in steps.into_iter().take(MAX_STEPS) {
        let result = match step {
            Step::Set { register, value } => {
                let value = match value {
                    Value::Any(value) => value,
                    Value::Small(value) => value.into(),
                    Value::Address(address) => address.0 as u32,
                };
                driver.set(u64::from(register & !3), value)
            }
            Step::Write { offset, bytes } => {
                let len = bytes.len().min(8);
                driver.device.write(offset.into(), &bytes[..len], Lapics::of_power_on())
            }
            Step::Read { offset, len } => {
                let mut data = [0xff; 16];
                let len = usize::from(len) % 17;
                driver.device.read(offset, &mut data[..len]);
                assert_eq!(data[len..], [0xff; 16][len..]);
                Ok(())
            }
            Step::Poke { at, bytes } => {
                guest::poke(&driver.memory, at.0, &bytes);
                Ok(())
            }
            Step::Descriptor { queue, index, at, len, flags, next } => {
                let queue = usize::from(queue) % queues;
                let buffer = (at.0, len.0, flags.into(), next.into());
                driver.descriptor(queue, index.into(), buffer);
                Ok(())
            }
            Step::Chain { queue, buffers } => {
                driver.offer(usize::from(queue) % queues, &buffers);
                Ok(())
            }
            Step::Index { queue, index } => {
                driver.index(usize::from(queue) % queues, index);
                Ok(())
            }
            Step::Kick { queue } => driver.kick(usize::from(queue) % (queues + 1)),
            Step::Up => {
                driver.up();
                Ok(())
            }
            Step::Restore { edits } => {
                let mut bytes = driver.save();
                for (at, value) in edits {
                    let at = usize::from(at) % bytes.len();
                    bytes[at] = value;
                }
                driver.restore(&bytes);
                Ok(())
            }
            Step::Thaw => {
                D::thaw(driver, host);
                Ok(())
            }
            Step::Extra(extra) => D::extra(driver, host, extra),
        };
        if result.is_err() {
            stopped(driver);
        }
    }
}

/// After a violation the device says so, and does nothing more until it is reset.
fn stopped<D: Device>(driver: &mut Driver<D>) {
    assert_eq!(driver.get(STATUS) & NEEDS_RESET, NEEDS_RESET);
    let used = |driver: &Driver<D>, queue| {
        driver.memory.read_obj::<u16>(GuestAddress(rings(queue) + 0x2002)).expect("rings")
    };
    for queue in 0..D::QUEUES.len() {
        let before = used(driver, queue);
        driver.kick(queue).expect("a device that has stopped ignores kicks");
        assert_eq!(used(driver, queue), before);
    }
}
