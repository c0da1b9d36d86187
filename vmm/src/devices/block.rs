//! Block devices (virtio 1.2 §5.2): read-only, or copy-on-write, with a medium that can be
//! replaced while the guest runs.
//!
//! Requests are served inline and straight between file and guest memory. A write is as durable
//! when it is answered as it will ever be (the delta dies with the instance), which makes this a
//! write-through device: `VIRTIO_BLK_F_FLUSH` is not offered, so the guest's file system spares
//! its cache flushes, each an exit. A flush that comes anyway succeeds.
//!
//! Sectors have 512 bytes, and copies are made in blocks of 4 KiB; the topology says so, so that
//! file systems align. One request moves at most [`MAX_REQUEST`] bytes, in slices between which it is
//! seen whether the vCPU thread is to stop; what is not answered then stays in the queue.

use std::sync::Arc;

use firn_proto::control::DiskKind;
use serde::{Deserialize, Serialize};
use virtio_bindings::{
    bindings::virtio_blk::{
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_ID_BYTES,
        VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
};

use super::medium::{BLOCK, Disk, Progress, SECTOR};
pub use super::medium::{Medium, MediumError};
use crate::{
    handover::Lapics,
    memory::GuestMemory,
    virtio::{
        Device, DeviceError, Halt, RestoreError, chain::Buffers, chain::Chain, mmio::VirtioMmio,
        queue::Queues, read_config_bytes,
    },
};

/// Most bytes that one request moves (Linux's own limit is 1.25 MiB); larger ones get `IOERR`.
pub const MAX_REQUEST: usize = 16 << 20;

/// Two pages of guest memory hold the rings of this size.
const QUEUE_SIZE: u16 = 128;
/// Header and status take a descriptor each.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A block device.
pub struct Block {
    kind: DiskKind,
    id: [u8; ID_BYTES],
    disk: Disk,
    chain: Chain,
    halt: Halt,
}

/// What a snapshot keeps of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    sectors: u64,
    /// The blocks that the saved delta has, least significant bit first, without the zeroes at the
    /// end.
    written: Vec<u8>,
}

impl Block {
    /// A device without a medium. `id` is what the guest sees as its serial number, cut to 20
    /// bytes. What is in its queue when `halt` is set waits for [`VirtioMmio::go_on`].
    pub fn new(memory: Arc<GuestMemory>, kind: DiskKind, id: &str, halt: Halt) -> Self {
        let mut bytes = [0; ID_BYTES];
        let len = id.len().min(ID_BYTES);
        bytes[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self { kind, id: bytes, disk: Disk::empty(), chain: Chain::new(memory), halt }
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    /// Answers the request in `self.chain` and returns how many bytes of it were written; `None`: it
    /// was halted, and has no answer.
    fn serve(&mut self, queue: usize) -> Result<Option<u32>, DeviceError> {
        let head = self.chain.head();
        let short = |found, needed| DeviceError::Short { queue, head, found, needed };
        let (mut readable, mut writable) = self.chain.split();
        // Without room for the status no answer is possible; the header is part of any request.
        let status = writable.take_last().ok_or(short(0, 1))?;
        let mut header = [0; HEADER];
        let found = readable.copy_to(&mut header);
        if found < HEADER {
            return Err(short(found, HEADER));
        }
        let [kind, _, low, high] = words(header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let written = writable.len() as u32 + 1;
        let Self { disk, id, halt, .. } = self;
        let found = request(disk, id, halt, kind, sector, readable, writable);
        Ok(found.map(|found| {
            status.store(found as u8);
            written
        }))
    }
}

/// Serves a request and returns its status; `None`: it was halted.
fn request(
    disk: &mut Disk,
    id: &[u8; ID_BYTES],
    halt: &Halt,
    kind: u32,
    sector: u64,
    mut from_guest: Buffers<'_>,
    mut to_guest: Buffers<'_>,
) -> Option<u32> {
    let sound = match kind {
        VIRTIO_BLK_T_IN => from_guest.is_empty() && to_guest.len() <= MAX_REQUEST,
        VIRTIO_BLK_T_OUT => to_guest.is_empty() && from_guest.len() <= MAX_REQUEST,
        VIRTIO_BLK_T_GET_ID => from_guest.is_empty(),
        VIRTIO_BLK_T_FLUSH => from_guest.is_empty() && to_guest.is_empty(),
        _ => return Some(VIRTIO_BLK_S_UNSUPP),
    };
    let there = disk.sectors() > 0;
    let moved = match kind {
        VIRTIO_BLK_T_IN if sound && there => disk.read(sector, &mut to_guest, halt),
        VIRTIO_BLK_T_OUT if sound && there => disk.write(sector, &mut from_guest, halt),
        VIRTIO_BLK_T_GET_ID if sound && to_guest.copy_from(id) > 0 => Ok(Progress::Done),
        VIRTIO_BLK_T_FLUSH if sound && there => Ok(Progress::Done),
        _ => return Some(VIRTIO_BLK_S_IOERR),
    };
    match moved {
        Ok(Progress::Done) => Some(VIRTIO_BLK_S_OK),
        Ok(Progress::Halted) => None,
        Err(_) => Some(VIRTIO_BLK_S_IOERR),
    }
}

fn words(header: [u8; HEADER]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(header.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

impl Device for Block {
    const ID: u32 = VIRTIO_ID_BLOCK;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const VERSION: u16 = 1;
    type State = BlockState;

    fn features(&self) -> u64 {
        let read_only = match self.kind {
            DiskKind::ReadOnly => 1 << VIRTIO_BLK_F_RO,
            DiskKind::CopyOnWrite => 0,
        };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_TOPOLOGY | read_only
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 32];
        config[0..8].copy_from_slice(&self.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        // Topology: 2^n sectors make a block, the first is aligned, a block is the least to write.
        let per_block = BLOCK / SECTOR;
        config[24] = per_block.trailing_zeros() as u8;
        config[26..28].copy_from_slice(&(per_block as u16).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn notify(&mut self, queue: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        for _ in 0..queues.available(queue)? {
            if self.halt.is_set() {
                break;
            }
            queues.pop(queue, &mut self.chain)?;
            match self.serve(queue)? {
                Some(written) => queues.push(queue, self.chain.head(), written)?,
                None => {
                    queues.unpop(queue, 1);
                    break;
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> BlockState {
        BlockState { sectors: self.disk.sectors(), written: self.disk.written() }
    }

    fn restore(&mut self, state: &BlockState) -> Result<(), RestoreError> {
        self.disk.restore(state.sectors, &state.written)
    }
}

impl VirtioMmio<Block> {
    /// Puts a medium in before the guest runs. Before a thaw, [`VirtioMmio::restore`] must follow:
    /// it says which blocks a frozen layer has.
    ///
    /// # Errors
    /// [`MediumError`]; the old medium stays.
    pub fn install(&mut self, medium: Medium) -> Result<(), MediumError> {
        self.device.disk = Disk::new(self.device.kind, medium)?;
        Ok(())
    }

    /// Replaces the medium under a guest, and tells it (see [`VirtioMmio::config_changed`]).
    ///
    /// # Errors
    /// [`MediumError`]; the old medium stays.
    pub fn replace(&mut self, medium: Medium, lapics: Option<Lapics>) -> Result<(), MediumError> {
        self.install(medium)?;
        self.config_changed(lapics);
        Ok(())
    }

    /// Serves what waits in the queue since the guest was halted, or saved.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest did what no driver may do.
    pub fn go_on(&mut self, lapics: Lapics) -> Result<(), DeviceError> {
        self.drive(lapics, |device, queues| device.notify(0, queues))
    }

    /// Writes all blocks that differ from the backing to `out`, an empty file, each at its own
    /// offset; returns how many they are. [`VirtioMmio::save`] keeps which they are.
    ///
    /// # Errors
    /// Any error of reading the layers or writing `out`.
    pub fn save_delta(&self, out: &std::fs::File) -> std::io::Result<u64> {
        self.device.disk.save_delta(out)
    }
}

#[cfg(test)]
mod tests;
