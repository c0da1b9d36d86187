//! Virtio 1.2: what all devices share.
//!
//! - [`mmio`]: the register file of the modern MMIO transport (§4.2) around one device.
//! - [`queue`]: split virtqueues (§2.7): walking what the driver made available, giving it back.
//! - [`chain`]: one descriptor chain as an I/O vector over guest memory.
//!
//! Kicks are handled inline, on the vCPU thread that wrote `QueueNotify`, and to the end: between
//! two notifications no chain is half done. That is why a queue's position is a single number in
//! saved state, and why neither `VIRTIO_F_EVENT_IDX` nor indirect descriptors are offered: there
//! is no kick left to suppress, and every chain fits the ring. A driver's wish for no interrupt
//! (`VIRTQ_AVAIL_F_NO_INTERRUPT`) is honoured.
//!
//! # What happens to a guest that breaks the rules
//!
//! | what it did | what it gets |
//! |---|---|
//! | odd width, unknown or read-only register, kick of a queue that is not ready | ignored; reads give 0 |
//! | feature not offered, status bits out of order | `FEATURES_OK`/`DRIVER_OK` does not stick |
//! | a ring or a chain that no driver makes (address outside memory, index jump, loop…) | [`DeviceError`]: the device stops with `DEVICE_NEEDS_RESET`, the VMM ends the guest |
//! | a well-formed request that asks for nonsense | the device's own answer: `IOERR`, RST |

pub mod chain;
pub mod mmio;
#[cfg(test)]
pub(crate) mod mock;
pub mod queue;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use serde::{Serialize, de::DeserializeOwned};

use self::queue::Queues;
use crate::handover::Lapics;

/// An interrupt line.
pub trait Interrupt: Send + Sync {
    /// Pulses the line. Called with the device's lock held.
    fn raise(&self, lapics: Lapics);
}

/// Whether a vCPU thread that works for a device is wanted back: work that can wait for a resume then
/// stays in its queue. All devices of a microVM share one.
#[derive(Debug, Clone, Default)]
pub struct Halt {
    set: Arc<AtomicBool>,
    /// Looks until it is set.
    #[cfg(test)]
    left: Arc<std::sync::atomic::AtomicUsize>,
}

impl Halt {
    /// Wants the threads back, or no longer.
    pub fn set(&self, halt: bool) {
        self.set.store(halt, Ordering::Relaxed);
    }

    /// Whether they are wanted back.
    pub fn is_set(&self) -> bool {
        #[cfg(test)]
        if self.left.load(Ordering::Relaxed) > 0 && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.set(true);
        }
        self.set.load(Ordering::Relaxed)
    }

    /// Sets it when it is looked at for the `looks`th time from now.
    #[cfg(test)]
    pub(crate) fn set_at(&self, looks: usize) {
        self.left.store(looks, Ordering::Relaxed);
    }
}

/// A device behind a transport.
///
/// Save, restore and reset are the same three verbs on each of them; a device never raises an
/// interrupt or touches a register itself.
pub trait Device: Send {
    /// Device ID (§5).
    const ID: u32;
    /// Largest size of each queue, each a power of two of at most [`chain::MAX_SEGMENTS`].
    const QUEUES: &'static [u16];
    /// Version of [`Self::State`].
    const VERSION: u16;
    /// What a snapshot keeps of this device.
    type State: Clone + std::fmt::Debug + Serialize + DeserializeOwned;

    /// Device-specific feature bits (0 to 23).
    fn features(&self) -> u64;
    /// Reads device configuration space. `data` is zeroed; bytes past the end stay so.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// The driver kicked `queue`, which is one of [`Self::QUEUES`] and ready.
    ///
    /// # Errors
    /// [`DeviceError`] if the driver broke the rules of the ring.
    fn notify(&mut self, queue: usize, queues: &mut Queues) -> Result<(), DeviceError>;
    /// The driver reset the device.
    fn reset(&mut self);
    /// What a snapshot has to keep.
    fn save(&self) -> Self::State;
    /// Goes to a saved state, from any state. An error leaves the device as it was.
    ///
    /// # Errors
    /// [`RestoreError`] if the state, which is not trusted, can't be one of this device.
    fn restore(&mut self, state: &Self::State) -> Result<(), RestoreError>;
}

/// Copies what `offset` and `data.len()` select out of a configuration structure.
pub(crate) fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    if let Some(rest) = config.get(offset..) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}

/// The guest did what no driver may do. The device has stopped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Queue size of 0, not a power of two, or over the device's maximum.
    #[error("queue {queue}: size {size} is not a power of two of at most {max}")]
    QueueSize {
        /// Queue.
        queue: usize,
        /// Size that was set.
        size: u32,
        /// The device's maximum.
        max: u16,
    },
    /// A ring that is misaligned or not in memory.
    #[error(
        "queue {queue}: rings at {descriptors:#x}, {available:#x}, {used:#x} for size {size} are \
         not aligned or not in memory"
    )]
    QueueAddress {
        /// Queue.
        queue: usize,
        /// Size that was set.
        size: u16,
        /// Descriptor table.
        descriptors: u64,
        /// Available ring.
        available: u64,
        /// Used ring.
        used: u64,
    },
    /// More chains were made available than the ring has room for.
    #[error("queue {queue}: available index {index} is over {size} ahead of {next}")]
    AvailableIndex {
        /// Queue.
        queue: usize,
        /// The driver's index.
        index: u16,
        /// The device's position.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// A descriptor index outside the table.
    #[error("queue {queue}: descriptor {index} of a table of {size}")]
    DescriptorIndex {
        /// Queue.
        queue: usize,
        /// Index that was used.
        index: u16,
        /// Queue size.
        size: u16,
    },
    /// A chain longer than the table: it loops.
    #[error("queue {queue}: the chain that starts at {head} loops")]
    Loop {
        /// Queue.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// An indirect descriptor, which was not negotiated.
    #[error("queue {queue}: descriptor {index} is indirect, which was not negotiated")]
    Indirect {
        /// Queue.
        queue: usize,
        /// Descriptor.
        index: u16,
    },
    /// A device-readable descriptor behind a device-writable one.
    #[error("queue {queue}: readable descriptor {index} follows a writable one")]
    Order {
        /// Queue.
        queue: usize,
        /// Descriptor.
        index: u16,
    },
    /// A buffer that is not in memory.
    #[error("queue {queue}: buffer of {len} bytes at {address:#x} is not in memory")]
    Buffer {
        /// Queue.
        queue: usize,
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A chain of over 4 GiB.
    #[error("queue {queue}: the chain that starts at {head} has over 4 GiB")]
    ChainLength {
        /// Queue.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// A ring that can't be accessed, though it was checked.
    #[error("queue {queue}: {detail}")]
    Ring {
        /// Queue.
        queue: usize,
        /// What failed.
        detail: String,
    },
    /// A chain too short for what the device must read from or write to it.
    #[error(
        "queue {queue}: the chain that starts at {head} has {found} bytes, {needed} are needed"
    )]
    Short {
        /// Queue.
        queue: usize,
        /// First descriptor.
        head: u16,
        /// Bytes that are there.
        found: usize,
        /// Bytes that the device needs at least.
        needed: usize,
    },
}

/// A saved state that this device can't take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Another format version.
    #[error("device {device}: state has version {found:?}, this VMM reads {supported:?}")]
    Version {
        /// Virtio device ID.
        device: u32,
        /// Version found (of the transport, then of the device).
        found: (u16, u16),
        /// Versions that are supported.
        supported: (u16, u16),
    },
    /// Features that this device does not offer.
    #[error("device {device}: features {found:#x} were negotiated, {offered:#x} are offered")]
    Features {
        /// Virtio device ID.
        device: u32,
        /// Features found.
        found: u64,
        /// Features offered.
        offered: u64,
    },
    /// Register values that no device can have.
    #[error("device {device}: {register} can't be {found:#x}")]
    Register {
        /// Virtio device ID.
        device: u32,
        /// Register's name.
        register: &'static str,
        /// Value found.
        found: u32,
    },
    /// Another number of queues.
    #[error("device {device}: state has {found} queues, the device has {expected}")]
    QueueCount {
        /// Virtio device ID.
        device: u32,
        /// Queues found.
        found: usize,
        /// Queues of the device.
        expected: usize,
    },
    /// A queue that can't be.
    #[error("device {device}: {source}")]
    Queue {
        /// Virtio device ID.
        device: u32,
        /// What is wrong with it.
        source: DeviceError,
    },
    /// The medium is not the one of the snapshot.
    #[error("block device: snapshot has {found} sectors, the medium has {expected}")]
    Capacity {
        /// Sectors in the state.
        found: u64,
        /// Sectors of the medium.
        expected: u64,
    },
    /// The bitmap of written blocks does not fit the medium.
    #[error("block device: written blocks: {0}")]
    Written(&'static str),
    /// A vsock connection that can't be.
    #[error("vsock device: connection: {0}")]
    Connection(&'static str),
}
