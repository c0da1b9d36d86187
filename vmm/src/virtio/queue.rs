//! Split virtqueues (virtio 1.2 §2.7) of one device.
//!
//! `virtio-queue` checks a queue's shape and writes its used ring; chains are walked here, because
//! its iterator ends in silence where a driver breaks the rules, and a monitor wants to know.
//!
//! Each value is read from guest memory once. Work is bounded: [`Queues::available`] reads the
//! driver's index once per notification and never yields more than the queue size.

use std::{
    num::Wrapping,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueState, QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress};

use super::{DeviceError, chain::Chain};
use crate::memory::GuestMemory;

/// What a snapshot keeps of a queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    /// `Some` if ready: the position in both rings, which is one because no chain is ever half
    /// done between two notifications.
    next: Option<u16>,
}

#[cfg(test)]
impl RingState {
    pub(super) fn set_size(&mut self, size: u32) {
        self.size = size;
    }

    pub(super) fn set_addresses(&mut self, d: Option<u64>, a: Option<u64>, u: Option<u64>) {
        self.descriptors = d.unwrap_or(self.descriptors);
        self.available = a.unwrap_or(self.available);
        self.used = u.unwrap_or(self.used);
    }
}

/// A queue as the driver sets it up, and as the device uses it once it is ready.
#[derive(Debug)]
pub(super) struct Ring {
    max: u16,
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// `Some` while ready.
    queue: Option<Queue>,
    /// Chains were given back since the last interrupt.
    returned: bool,
}

impl Ring {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: u32::from(max),
            descriptors: 0,
            available: 0,
            used: 0,
            queue: None,
            returned: false,
        }
    }

    pub(super) fn max(&self) -> u16 {
        self.max
    }

    pub(super) fn is_ready(&self) -> bool {
        self.queue.is_some()
    }

    pub(super) fn disable(&mut self) {
        self.queue = None;
        self.returned = false;
    }

    /// Checks the set-up and starts at position `next`. Driver and snapshot both come this way.
    pub(super) fn enable(
        &mut self,
        index: usize,
        next: u16,
        memory: &GuestMemory,
    ) -> Result<(), DeviceError> {
        let size = u16::try_from(self.size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= self.max)
            .ok_or(DeviceError::QueueSize { queue: index, size: self.size, max: self.max })?;
        let state = QueueState {
            max_size: self.max,
            next_avail: next,
            next_used: next,
            event_idx_enabled: false,
            size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        match Queue::try_from(state) {
            Ok(queue) if queue.is_valid(memory) => {
                self.queue = Some(queue);
                Ok(())
            }
            _ => Err(DeviceError::QueueAddress {
                queue: index,
                size,
                descriptors: self.descriptors,
                available: self.available,
                used: self.used,
            }),
        }
    }

    fn save(&self) -> RingState {
        RingState {
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            // Differs from `next_avail` only in a device that stopped in the middle of a chain.
            next: self.queue.as_ref().map(QueueT::next_used),
        }
    }
}

/// All queues of one device.
#[derive(Debug)]
pub struct Queues {
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
}

impl Queues {
    pub(super) fn new(memory: Arc<GuestMemory>, sizes: &[u16]) -> Self {
        Self { memory, rings: sizes.iter().map(|&max| Ring::new(max)).collect() }
    }

    pub(super) fn ring(&mut self, index: usize) -> Option<&mut Ring> {
        self.rings.get_mut(index)
    }

    pub(super) fn enable(&mut self, index: usize) -> Result<(), DeviceError> {
        match self.rings.get_mut(index) {
            Some(ring) => ring.enable(index, 0, &self.memory),
            None => Ok(()),
        }
    }

    pub(super) fn any_ready(&self) -> bool {
        self.rings.iter().any(Ring::is_ready)
    }

    pub(super) fn reset(&mut self) {
        for ring in &mut self.rings {
            *ring = Ring::new(ring.max);
        }
    }

    pub(super) fn save(&self) -> Vec<RingState> {
        self.rings.iter().map(Ring::save).collect()
    }

    /// Queues as `states` describes them, over the same memory. Guest memory is not touched.
    pub(super) fn restored(&self, states: &[RingState]) -> Result<Self, DeviceError> {
        let mut rings = Vec::with_capacity(self.rings.len());
        for (index, (ring, state)) in self.rings.iter().zip(states).enumerate() {
            let mut ring = Ring {
                size: state.size,
                descriptors: state.descriptors,
                available: state.available,
                used: state.used,
                ..Ring::new(ring.max)
            };
            if let Some(next) = state.next {
                ring.enable(index, next, &self.memory)?;
            }
            rings.push(ring);
        }
        Ok(Self { memory: self.memory.clone(), rings })
    }

    /// How many chains the driver has made available on `queue`; 0 if it is not ready.
    ///
    /// # Errors
    /// [`DeviceError::AvailableIndex`] if that is more than the queue holds.
    pub fn available(&self, queue: usize) -> Result<u16, DeviceError> {
        let Some(ring) = self.rings.get(queue).and_then(|ring| ring.queue.as_ref()) else {
            return Ok(0);
        };
        // Acquire: what the driver wrote before the index is read after it.
        let index = ring
            .avail_idx(&*self.memory, Ordering::Acquire)
            .map_err(|e| DeviceError::Ring { queue, detail: e.to_string() })?;
        let count = (index - Wrapping(ring.next_avail())).0;
        if count > ring.size() {
            return Err(DeviceError::AvailableIndex {
                queue,
                index: index.0,
                next: ring.next_avail(),
                size: ring.size(),
            });
        }
        Ok(count)
    }

    /// Takes the next chain, one of those that [`Self::available`] counted.
    ///
    /// # Errors
    /// [`DeviceError`] if it breaks any rule of §2.7.
    pub fn pop(&mut self, queue: usize, chain: &mut Chain) -> Result<(), DeviceError> {
        let memory = &*self.memory;
        let fault = |detail: &dyn ToString| DeviceError::Ring { queue, detail: detail.to_string() };
        let ring = self
            .rings
            .get_mut(queue)
            .and_then(|ring| ring.queue.as_mut())
            .ok_or_else(|| fault(&"not ready"))?;
        let size = ring.size();
        let next = ring.next_avail();
        // Neither sum overflows: `Queue::is_valid` found the whole ring in memory.
        let slot = GuestAddress(ring.avail_ring() + 4 + 2 * u64::from(next % size));
        let head = u16::from_le(memory.read_obj(slot).map_err(|e| fault(&e))?);

        chain.begin(head);
        let mut index = head;
        let mut bytes = 0u32;
        for _ in 0..size {
            if index >= size {
                return Err(DeviceError::DescriptorIndex { queue, index, size });
            }
            let slot = GuestAddress(ring.desc_table() + 16 * u64::from(index));
            let descriptor: Descriptor = memory.read_obj(slot).map_err(|e| fault(&e))?;
            if descriptor.refers_to_indirect_table() {
                return Err(DeviceError::Indirect { queue, index });
            }
            let writable = descriptor.is_write_only();
            if !writable && chain.has_writable() {
                return Err(DeviceError::Order { queue, index });
            }
            let (address, len) = (descriptor.addr(), descriptor.len());
            bytes = bytes.checked_add(len).ok_or(DeviceError::ChainLength { queue, head })?;
            chain.push(address, len, writable).ok_or(DeviceError::Buffer {
                queue,
                address: address.0,
                len,
            })?;
            if !descriptor.has_next() {
                ring.set_next_avail(next.wrapping_add(1));
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(DeviceError::Loop { queue, head })
    }

    /// Size, the driver's position and the device's in each queue, for people: a driver that lies is
    /// shown as it lies.
    pub(super) fn describe(&self) -> String {
        let ring = |ring: &Ring| {
            let Some(queue) = &ring.queue else { return "not ready".to_owned() };
            let memory = &*self.memory;
            let index = |at: Result<Wrapping<u16>, _>| match at {
                Ok(index) => index.0.to_string(),
                Err::<_, virtio_queue::Error>(_) => "unreadable".to_owned(),
            };
            format!(
                "size {}, available {} taken {}, used {} given {}",
                queue.size(),
                index(queue.avail_idx(memory, Ordering::Acquire)),
                queue.next_avail(),
                index(queue.used_idx(memory, Ordering::Acquire)),
                queue.next_used()
            )
        };
        let all: Vec<String> = self.rings.iter().map(ring).collect();
        format!("[{}]", all.join("; "))
    }

    /// Puts the last `count` chains that were popped, and not pushed, back.
    pub fn unpop(&mut self, queue: usize, count: u16) {
        if let Some(ring) = self.rings.get_mut(queue).and_then(|ring| ring.queue.as_mut()) {
            ring.set_next_avail(ring.next_avail().wrapping_sub(count));
        }
    }

    /// Gives the chain that starts at `head` back with `written` bytes in its writable part.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] if guest memory can't be written.
    pub fn push(&mut self, queue: usize, head: u16, written: u32) -> Result<(), DeviceError> {
        let fault = |detail: String| DeviceError::Ring { queue, detail };
        let ring = self.rings.get_mut(queue).ok_or_else(|| fault("no such queue".into()))?;
        let inner = ring.queue.as_mut().ok_or_else(|| fault("not ready".into()))?;
        inner.add_used(&*self.memory, head, written).map_err(|e| fault(e.to_string()))?;
        ring.returned = true;
        Ok(())
    }

    /// Whether the driver wants to be told of chains given back since the last call.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] if guest memory can't be read.
    pub(super) fn take_interrupt(&mut self) -> Result<bool, DeviceError> {
        let mut wanted = false;
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            let Some(inner) = ring.queue.as_ref().filter(|_| ring.returned) else { continue };
            // The driver enables interrupts, then looks at the used index; we write the index,
            // then look at the flag. With a full barrier between, one of us sees the other.
            fence(Ordering::SeqCst);
            let flags: u16 = self
                .memory
                .load(GuestAddress(inner.avail_ring()), Ordering::Relaxed)
                .map_err(|e| DeviceError::Ring { queue, detail: e.to_string() })?;
            wanted |= u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
            ring.returned = false;
        }
        Ok(wanted)
    }
}
