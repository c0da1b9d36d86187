//! The bytes behind a block device.
//!
//! ```text
//!  copy-on-write:   delta    ██  █        private, what was written since the medium was put in
//!                   frozen   █ ███        immutable, what was written before the snapshot
//!                   backing  ██████████   immutable
//! ```
//!
//! Blocks are 4 KiB. A read takes each block from the highest layer that has it, a write goes to
//! the delta; a block that is written in part is filled from below first. Two bitmaps say which
//! blocks the upper layers have. The delta is as durable as the instance: it dies with it.
//!
//! A medium never trusts a bitmap out of a snapshot for more than which layer to ask, and never
//! reads or writes past its capacity.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    ops::Range,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use firn_pages::bitmap::Bitmap;
use firn_proto::control::{DiskKind, DiskSource};

use crate::{
    hold,
    virtio::{Halt, RestoreError, chain::Buffers},
};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;

/// Bytes of a sector, the unit of virtio's addresses.
pub const SECTOR: u64 = 512;

/// Bytes of a request that are moved without a look at whether the guest is to stop: whole blocks. A disk
/// of 64 KiB/s moves them in a second.
const SLICE: u64 = 64 << 10;

/// Largest medium in bytes: what bounds the bitmaps (2 MiB each).
pub const MAX_BYTES: u64 = 64 << 30;

/// Where a block device's bytes come from. Capacity is the backing's length in whole sectors.
#[derive(Debug)]
pub enum Medium {
    /// No medium: capacity 0.
    Empty,
    /// A read-only file.
    ReadOnly {
        /// The file.
        file: File,
    },
    /// Writes go to a private delta.
    CopyOnWrite {
        /// Immutable file below.
        backing: File,
        /// Immutable delta of the snapshot that is being thawed; [`super::block::Block`]'s saved
        /// state says which blocks it has.
        frozen: Option<File>,
        /// Empty file that this device alone writes.
        delta: File,
    },
}

/// A medium that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MediumError {
    /// Descriptors are missing.
    #[error("{wanted:?} needs {} descriptors, {found} came", wanted.descriptors())]
    Descriptors {
        /// What was asked for.
        wanted: DiskSource,
        /// Descriptors that there were.
        found: usize,
    },
    /// A medium for another kind of device.
    #[error("a {kind:?} block device takes no {found} medium")]
    Kind {
        /// The device's kind.
        kind: DiskKind,
        /// The medium's kind.
        found: &'static str,
    },
    /// The medium is too large.
    #[error("the medium has {found} bytes, the limit is {MAX_BYTES}")]
    TooLarge {
        /// Its length in bytes.
        found: u64,
    },
    /// The file's length can't be learned.
    #[error("cannot read the length of a medium: {0}")]
    Length(io::Error),
}

impl Medium {
    /// Takes what `source` needs out of `descriptors`.
    ///
    /// # Errors
    /// [`MediumError::Descriptors`] if there are too few.
    pub fn from_source(
        source: DiskSource,
        descriptors: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Self, MediumError> {
        let mut found = 0;
        let mut next = || {
            let descriptor = descriptors.next();
            let missing = MediumError::Descriptors { wanted: source, found };
            found += 1;
            descriptor.map(File::from).ok_or(missing)
        };
        // Fields are evaluated in the order in which they are written: the order on the wire.
        Ok(match source {
            DiskSource::Empty => Self::Empty,
            DiskSource::ReadOnly => Self::ReadOnly { file: next()? },
            DiskSource::CopyOnWrite => {
                Self::CopyOnWrite { backing: next()?, frozen: None, delta: next()? }
            }
            DiskSource::CopyOnWriteThawed => {
                Self::CopyOnWrite { backing: next()?, frozen: Some(next()?), delta: next()? }
            }
        })
    }
}

/// A medium in use.
#[derive(Debug)]
pub(super) struct Disk {
    layers: Layers,
    sectors: u64,
}

#[derive(Debug)]
enum Layers {
    Empty,
    ReadOnly(File),
    CopyOnWrite(CopyOnWrite),
}

#[derive(Debug)]
struct CopyOnWrite {
    backing: File,
    frozen: Option<File>,
    frozen_blocks: Bitmap,
    delta: File,
    delta_blocks: Bitmap,
}

/// How far a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It is done.
    Done,
    /// It has to be done again, from its beginning.
    Halted,
}

/// Does the work for a range of bytes slice by slice, and looks between them whether it is to halt: a
/// vCPU thread that works on a slow disk is then back in the time that one slice takes.
fn in_slices(
    range: Range<u64>,
    halt: &Halt,
    mut work: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<Progress> {
    let mut at = range.start;
    while at < range.end {
        if halt.is_set() {
            return Ok(Progress::Halted);
        }
        let next = ((at / SLICE + 1) * SLICE).min(range.end);
        hold::slice();
        work(at..next)?;
        at = next;
    }
    Ok(Progress::Done)
}

/// Which layer has a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    Backing,
    Frozen,
    Delta,
}

impl Disk {
    pub(super) fn empty() -> Self {
        Self { layers: Layers::Empty, sectors: 0 }
    }

    pub(super) fn new(kind: DiskKind, medium: Medium) -> Result<Self, MediumError> {
        Ok(match (medium, kind) {
            (Medium::Empty, _) => Self::empty(),
            (Medium::ReadOnly { file }, DiskKind::ReadOnly) => {
                let sectors = length(&file)? / SECTOR;
                Self { layers: Layers::ReadOnly(file), sectors }
            }
            (Medium::CopyOnWrite { backing, frozen, delta }, DiskKind::CopyOnWrite) => {
                let sectors = length(&backing)? / SECTOR;
                let blocks = blocks(sectors);
                let (frozen_blocks, delta_blocks) = (Bitmap::new(blocks), Bitmap::new(blocks));
                let layers = CopyOnWrite { backing, frozen, frozen_blocks, delta, delta_blocks };
                Self { layers: Layers::CopyOnWrite(layers), sectors }
            }
            (Medium::ReadOnly { .. }, _) => {
                return Err(MediumError::Kind { kind, found: "read-only" });
            }
            (Medium::CopyOnWrite { .. }, _) => {
                return Err(MediumError::Kind { kind, found: "copy-on-write" });
            }
        })
    }

    /// Capacity in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Byte offset of `len` bytes at `sector`, if they are whole sectors within the capacity.
    fn range(&self, sector: u64, len: usize) -> io::Result<u64> {
        let len = len as u64;
        let end = sector.checked_add(len / SECTOR).filter(|end| *end <= self.sectors);
        if len.is_multiple_of(SECTOR) && end.is_some() {
            Ok(sector * SECTOR)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    /// Fills all of `buffers` from `sector` on, unless it is halted.
    pub(super) fn read(
        &self,
        sector: u64,
        buffers: &mut Buffers<'_>,
        halt: &Halt,
    ) -> io::Result<Progress> {
        let len = buffers.len();
        let offset = self.range(sector, len)?;
        in_slices(offset..offset + len as u64, halt, |slice| self.read_slice(slice, buffers))
    }

    fn read_slice(&self, slice: Range<u64>, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let Range { start: mut at, end } = slice;
        match &self.layers {
            Layers::Empty => Ok(()),
            Layers::ReadOnly(file) => buffers.read_exact_at(file, (end - at) as usize, at),
            Layers::CopyOnWrite(layers) => {
                while at < end {
                    let (layer, run) = layers.run(at / BLOCK, end.div_ceil(BLOCK));
                    let stop = (run * BLOCK).min(end);
                    buffers.read_exact_at(layers.file(layer)?, (stop - at) as usize, at)?;
                    at = stop;
                }
                Ok(())
            }
        }
    }

    /// Writes all of `buffers` from `sector` on, unless it is halted: the guest, which waits, then
    /// finds any part of it written until all of it is.
    pub(super) fn write(
        &mut self,
        sector: u64,
        buffers: &mut Buffers<'_>,
        halt: &Halt,
    ) -> io::Result<Progress> {
        let len = buffers.len();
        let offset = self.range(sector, len)?;
        let Layers::CopyOnWrite(layers) = &mut self.layers else {
            return Err(io::ErrorKind::PermissionDenied.into());
        };
        in_slices(offset..offset + len as u64, halt, |slice| layers.write_slice(slice, buffers))
    }

    /// The blocks that differ from the backing, for saved state.
    pub(super) fn written(&self) -> Vec<u8> {
        match &self.layers {
            Layers::CopyOnWrite(layers) => {
                let blocks = layers.frozen_blocks.union(&layers.delta_blocks);
                let mut bytes = blocks.to_bytes();
                // The zeroes at the end are left out.
                bytes.truncate(Bitmap::byte_count(blocks.end()) as usize);
                bytes
            }
            _ => Vec::new(),
        }
    }

    /// Writes the blocks that [`Self::written`] names to `out`, each at its own offset, and
    /// returns how many they are. Blocks of zeroes stay holes.
    pub(super) fn save_delta(&self, out: &File) -> io::Result<u64> {
        let Layers::CopyOnWrite(layers) = &self.layers else { return Ok(0) };
        let blocks = blocks(self.sectors);
        out.set_len(blocks * BLOCK)?;
        let mut buffer = vec![0; 64 * BLOCK as usize];
        let mut saved = 0;
        let mut block = 0;
        while block < blocks {
            let (layer, end) = layers.run(block, blocks.min(block + 64));
            if layer != Layer::Backing {
                let bytes = &mut buffer[..((end - block) * BLOCK) as usize];
                layers.file(layer)?.read_exact_at(bytes, block * BLOCK)?;
                for (index, bytes) in (block..).zip(bytes.chunks_exact(BLOCK as usize)) {
                    if bytes.iter().any(|&byte| byte != 0) {
                        out.write_all_at(bytes, index * BLOCK)?;
                    }
                }
                saved += end - block;
            }
            block = end;
        }
        Ok(saved)
    }

    /// Goes back to the snapshot that `sectors` and `written` come from: the frozen layer has
    /// `written`, the delta has nothing. An error changes nothing.
    pub(super) fn restore(&mut self, sectors: u64, written: &[u8]) -> Result<(), RestoreError> {
        if sectors != self.sectors {
            return Err(RestoreError::Capacity { found: sectors, expected: self.sectors });
        }
        let bitmap = Bitmap::from_bytes(written, blocks(sectors))
            .ok_or(RestoreError::Written("the bitmap is longer than the medium"))?;
        let Layers::CopyOnWrite(layers) = &mut self.layers else {
            return match bitmap.end() {
                0 => Ok(()),
                _ => Err(RestoreError::Written("the medium can't be written")),
            };
        };
        if bitmap.end() > 0 {
            let frozen = layers.frozen.as_ref();
            let frozen = frozen.ok_or(RestoreError::Written("the snapshot's delta is missing"))?;
            let len = length(frozen)
                .map_err(|_| RestoreError::Written("the snapshot's delta can't be used"))?;
            if len < bitmap.end() * BLOCK {
                return Err(RestoreError::Written("the snapshot's delta is too short"));
            }
        }
        if layers.delta_blocks.end() > 0 {
            layers
                .delta
                .set_len(0)
                .map_err(|_| RestoreError::Written("the private delta can't be emptied"))?;
            layers.delta_blocks.clear();
        }
        layers.frozen_blocks = bitmap;
        Ok(())
    }
}

impl CopyOnWrite {
    fn layer(&self, block: u64) -> Layer {
        if self.delta_blocks.contains(block) {
            Layer::Delta
        } else if self.frozen_blocks.contains(block) {
            Layer::Frozen
        } else {
            Layer::Backing
        }
    }

    /// The layer of `block` and the end of the run of blocks, up to `limit`, that it has.
    fn run(&self, block: u64, limit: u64) -> (Layer, u64) {
        let layer = self.layer(block);
        let mut end = block + 1;
        while end < limit && self.layer(end) == layer {
            end += 1;
        }
        (layer, end)
    }

    fn file(&self, layer: Layer) -> io::Result<&File> {
        match layer {
            Layer::Backing => Ok(&self.backing),
            // A frozen block without a frozen file: `restore` lets none through.
            Layer::Frozen => self.frozen.as_ref().ok_or(io::ErrorKind::NotFound.into()),
            Layer::Delta => Ok(&self.delta),
        }
    }

    /// Writes a slice that is not empty.
    fn write_slice(&mut self, slice: Range<u64>, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let Range { start, end } = slice;
        let (first, last) = (start / BLOCK, (end - 1) / BLOCK);
        if !start.is_multiple_of(BLOCK) || end < (first + 1) * BLOCK {
            self.fill(first)?;
        }
        if last != first && !end.is_multiple_of(BLOCK) {
            self.fill(last)?;
        }
        buffers.write_all_at(&self.delta, (end - start) as usize, start)?;
        // Last: until here a failure leaves every block as it was.
        self.delta_blocks.insert(first..last + 1);
        Ok(())
    }

    /// Copies a block that is about to be written in part to the delta.
    fn fill(&self, block: u64) -> io::Result<()> {
        let layer = self.layer(block);
        if layer == Layer::Delta {
            return Ok(());
        }
        let mut bytes = [0; BLOCK as usize];
        let (file, at) = (self.file(layer)?, block * BLOCK);
        let mut done = 0;
        // Vectors of one, as requests use vectors: one system call less for a vCPU thread.
        while done < bytes.len() {
            let rest = &mut [IoSliceMut::new(&mut bytes[done..])];
            // The backing's last block may be short.
            match rustix::io::preadv(file, rest, at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut done = 0;
        while done < bytes.len() {
            let rest = &[IoSlice::new(&bytes[done..])];
            match rustix::io::pwritev(&self.delta, rest, at + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn blocks(sectors: u64) -> u64 {
    (sectors * SECTOR).div_ceil(BLOCK)
}

fn length(file: &File) -> Result<u64, MediumError> {
    let found = rustix::fs::fstat(file).map_err(|e| MediumError::Length(e.into()))?.st_size as u64;
    if found > MAX_BYTES { Err(MediumError::TooLarge { found }) } else { Ok(found) }
}

#[cfg(test)]
mod tests;
