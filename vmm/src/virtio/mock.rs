//! A driver for tests: negotiates, lays out rings in guest memory, and can lie.
//!
//! Memory is 1 MiB: each queue has 16 KiB from 64 KiB on, [`DATA`] and above is for buffers.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use vm_memory::{Bytes, GuestAddress};

use super::{Device, DeviceError, Interrupt, mmio::VirtioMmio};
use crate::{handover::Lapics, memory::GuestMemory};

pub(crate) const MEMORY: usize = 1 << 20;
pub(crate) const DATA: u64 = 0x40000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

const RINGS: u64 = 0x10000;
const RING: u64 = 0x4000;

pub(crate) fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap())
}

/// A file without a name that holds `bytes`.
pub(crate) fn file(bytes: &[u8]) -> File {
    let file: File =
        rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
    file.write_all_at(bytes, 0).unwrap();
    file
}

#[derive(Default)]
pub(crate) struct Line(AtomicUsize);

impl Line {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Interrupt for Line {
    fn raise(&self, _: Lapics) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Addresses of one queue's parts, and the driver's side of it.
#[derive(Clone, Default)]
pub(crate) struct Queue {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    free: u16,
    next: u16,
    seen: u16,
}

/// Driver and device. Cloning the driver's half is what a snapshot does to a guest.
pub(crate) struct Mock<D: Device> {
    pub(crate) device: VirtioMmio<D>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) line: Arc<Line>,
    pub(crate) queues: Vec<Queue>,
}

impl<D: Device> Mock<D> {
    /// A device at power-on.
    pub(crate) fn cold(memory: Arc<GuestMemory>, device: D) -> Self {
        let line = Arc::new(Line::default());
        let device = VirtioMmio::new(device, memory.clone(), line.clone());
        let queues = (0..D::QUEUES.len() as u64)
            .map(|i| {
                let base = RINGS + RING * i;
                Queue {
                    size: D::QUEUES[i as usize],
                    descriptors: base,
                    available: base + 0x1000,
                    used: base + 0x2000,
                    ..Queue::default()
                }
            })
            .collect();
        Self { device, memory, line, queues }
    }

    /// A device with its driver up.
    pub(crate) fn up(memory: Arc<GuestMemory>, device: D) -> Self {
        let mut mock = Self::cold(memory, device);
        mock.negotiate();
        for index in 0..mock.queues.len() {
            mock.set_up(index).unwrap();
        }
        mock.set(0x70, 15).unwrap();
        assert_eq!(mock.get(0x70), 15);
        mock
    }

    /// The same guest, thawed in other memory behind another device: what a clone is.
    pub(crate) fn thaw(&self, device: impl FnOnce(Arc<GuestMemory>) -> D) -> Self {
        let memory = memory();
        memory.write_slice(&self.read_vec(0, MEMORY), GuestAddress(0)).unwrap();
        let bytes = postcard::to_allocvec(&self.device.save()).unwrap();
        let mut clone = Self::cold(memory.clone(), device(memory));
        clone.device.restore(&postcard::from_bytes(&bytes).unwrap()).unwrap();
        clone.queues = self.queues.clone();
        clone
    }

    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&mut self, offset: u64, value: u32) -> Result<(), DeviceError> {
        self.device.write(offset, &value.to_le_bytes(), Lapics::of_power_on())
    }

    /// Takes all features that are offered.
    pub(crate) fn negotiate(&mut self) {
        self.set(0x70, 0).unwrap();
        self.set(0x70, 3).unwrap();
        for half in 0..2 {
            self.set(0x14, half).unwrap();
            let features = self.get(0x10);
            self.set(0x24, half).unwrap();
            self.set(0x20, features).unwrap();
        }
        self.set(0x70, 11).unwrap();
        assert_eq!(self.get(0x70), 11);
    }

    /// Sets one queue up and ready.
    pub(crate) fn set_up(&mut self, index: usize) -> Result<(), DeviceError> {
        let queue = self.queues[index].clone();
        self.set(0x30, index as u32)?;
        self.set(0x38, queue.size.into())?;
        for (offset, address) in
            [(0x80, queue.descriptors), (0x90, queue.available), (0xa0, queue.used)]
        {
            self.set(offset, address as u32)?;
            self.set(offset + 4, (address >> 32) as u32)?;
        }
        self.set(0x44, 1)
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16, raw: (u64, u32, u16, u16)) {
        let at = GuestAddress(self.queues[queue].descriptors + 16 * u64::from(index));
        let bytes = [
            &raw.0.to_le_bytes()[..],
            &raw.1.to_le_bytes(),
            &raw.2.to_le_bytes(),
            &raw.3.to_le_bytes(),
        ]
        .concat();
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes the chain that starts at `head` available.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = GuestAddress(q.available + 4 + 2 * u64::from(q.next % q.size));
        self.memory.write_obj(head, slot).unwrap();
        q.next = q.next.wrapping_add(1);
        self.memory.write_obj(q.next, GuestAddress(q.available + 2)).unwrap();
    }

    /// Adds a chain of `(address, length, writable)` and returns its head.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let size = self.queues[queue].size;
        let head = self.queues[queue].free;
        for (i, &(address, len, writable)) in buffers.iter().enumerate() {
            let index = (head + i as u16) % size;
            let last = i + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if writable { WRITE } else { 0 };
            self.descriptor(queue, index, (address, len, flags, (index + 1) % size));
        }
        self.queues[queue].free = (head + buffers.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    pub(crate) fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.set(0x50, queue as u32)
    }

    /// What came back since the last call: `(head, length)`.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let q = &mut self.queues[queue];
        let index: u16 = self.memory.read_obj(GuestAddress(q.used + 2)).unwrap();
        let mut elements = Vec::new();
        while q.seen != index {
            let at = GuestAddress(q.used + 4 + 8 * u64::from(q.seen % q.size));
            let [head, len]: [u32; 2] = self.memory.read_obj(at).unwrap();
            elements.push((head, len));
            q.seen = q.seen.wrapping_add(1);
        }
        elements
    }

    pub(crate) fn read_vec(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn write_all(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }
}
