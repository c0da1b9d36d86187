//! The bytes of a saved VM: everything but guest memory and disk contents.
//!
//! ```text
//! 0   "FIRN-VM\0"          magic
//! 8   u32 little-endian    VERSION
//! 12  u32 little-endian    length of the body
//! 16  body                 `SavedVm` in postcard
//! ```
//!
//! Whoever keeps snapshots (the `firn` library) authenticates these bytes; this module only makes
//! sure that any bytes at all are decoded or refused, never believed.

use firn_proto::control::{DiskKind, FailureKind};
use serde::{Deserialize, Serialize};

use crate::{
    arch::{cpuid::Signature, vcpu_state::VcpuState, vm_state::VmState},
    machine::MachineState,
    memory::PAGE,
};

/// Version of the format. A change of any saved struct changes it.
pub const VERSION: u32 = 1;

/// Longest body in bytes.
pub const MAX_BODY: usize = 8 << 20;

const MAGIC: [u8; 8] = *b"FIRN-VM\0";
const HEADER: usize = 16;

/// A VM, saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVm {
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The CPU that the guest saw.
    pub signature: Signature,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
    /// The host's TSC at the save, in ticks.
    pub host_tsc: u64,
    /// The shell's block devices.
    pub disks: Vec<DiskKind>,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// All vCPUs in order.
    pub vcpus: Vec<VcpuState>,
    /// All devices.
    pub machine: MachineState,
}

/// Bytes are no saved VM that this build could restore.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Too short, or longer than it says.
    #[error("VM state has {found} bytes, its header says {expected}")]
    Length {
        /// Bytes there.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// Does not start as a saved VM does.
    #[error("not a VM state: it starts with {0:02x?}")]
    Magic([u8; 8]),
    /// Made by another version of Firn.
    #[error("VM state has format version {found}, this build reads {VERSION}")]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// The body does not decode.
    #[error("VM state is corrupt: {0}")]
    Corrupt(String),
}

impl DecodeError {
    /// How the control protocol calls it.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Version { .. } => FailureKind::SnapshotVersion,
            _ => FailureKind::SnapshotCorrupt,
        }
    }
}

impl SavedVm {
    /// The bytes.
    ///
    /// # Errors
    /// [`DecodeError::Length`] if they exceed what `decode` would take.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        let mut bytes = vec![0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let mut bytes = postcard::to_extend(self, bytes)
            .map_err(|error| DecodeError::Corrupt(error.to_string()))?;
        let body = bytes.len() - HEADER;
        if body > MAX_BODY {
            return Err(DecodeError::Length { found: body, expected: MAX_BODY });
        }
        bytes[12..16].copy_from_slice(&(body as u32).to_le_bytes());
        Ok(bytes)
    }

    /// Reads the bytes back.
    ///
    /// # Errors
    /// Any [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let too_short = DecodeError::Length { found: bytes.len(), expected: HEADER };
        let (header, body) = bytes.split_at_checked(HEADER).ok_or(too_short)?;
        let word = |at: usize| {
            let word = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_le_bytes(word)
        };
        if header[..8] != MAGIC {
            let mut found = [0; 8];
            found.copy_from_slice(&header[..8]);
            return Err(DecodeError::Magic(found));
        }
        if word(8) != VERSION {
            return Err(DecodeError::Version { found: word(8) });
        }
        let length = word(12) as usize;
        if length > MAX_BODY || length != body.len() {
            let expected = HEADER.saturating_add(length);
            return Err(DecodeError::Length { found: bytes.len(), expected });
        }
        match postcard::take_from_bytes(body) {
            Ok((saved, [])) => Ok(saved),
            Ok((_, rest)) => Err(DecodeError::Corrupt(format!("{} bytes follow", rest.len()))),
            Err(error) => Err(DecodeError::Corrupt(error.to_string())),
        }
    }
}

/// Which pages of guest memory a snapshot's memory file holds: one bit a page, least significant
/// bit first.
#[derive(Debug)]
pub struct PageBitmap(Vec<u8>);

impl PageBitmap {
    /// No page of `memory_bytes` bytes.
    pub fn empty(memory_bytes: u64) -> Self {
        Self(vec![0; memory_bytes.div_ceil(PAGE).div_ceil(8) as usize])
    }

    fn set(&mut self, page: usize) {
        self.0[page / 8] |= 1 << (page % 8);
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Writes guest memory as a sparse linear file: without `base` all pages that are not zero, with
/// it all pages that differ from it. Returns the pages written.
///
/// # Errors
/// I/O; a full disk is one.
pub fn write_memory(
    contents: &[u8],
    base: Option<&[u8]>,
    out: &std::fs::File,
) -> std::io::Result<(u64, PageBitmap)> {
    use std::os::unix::fs::FileExt;
    const PAGE_BYTES: usize = PAGE as usize;
    out.set_len(contents.len() as u64)?;
    let mut bitmap = PageBitmap::empty(contents.len() as u64);
    let mut pages = 0;
    let zero = [0u8; PAGE_BYTES];
    let differs = |page: usize, bytes: &[u8]| {
        let same_as = base.and_then(|base| base.get(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
        bytes != same_as.unwrap_or(&zero)
    };
    // Runs of written pages become one write each.
    let mut run: Option<usize> = None;
    let total = contents.len() / PAGE_BYTES;
    for page in 0..=total {
        let written =
            page < total && differs(page, &contents[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]);
        match (written, run) {
            (true, None) => run = Some(page),
            (false, Some(start)) => {
                let range = start * PAGE_BYTES..page * PAGE_BYTES;
                out.write_all_at(&contents[range.clone()], range.start as u64)?;
                run = None;
            }
            _ => {}
        }
        if written {
            bitmap.set(page);
            pages += 1;
        }
    }
    Ok((pages, bitmap))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    fn memfd() -> std::fs::File {
        rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
    }

    #[test]
    fn foreign_short_and_future_bytes_are_named() {
        assert!(matches!(SavedVm::decode(b"FIRN"), Err(DecodeError::Length { .. })));
        assert!(matches!(SavedVm::decode(&[0; 64]), Err(DecodeError::Magic(_))));
        let mut future = [0; 16];
        future[..8].copy_from_slice(&MAGIC);
        future[8] = VERSION as u8 + 1;
        assert_eq!(
            SavedVm::decode(&future).unwrap_err(),
            DecodeError::Version { found: VERSION + 1 }
        );
        future[8] = VERSION as u8;
        future[12] = 9;
        assert!(matches!(SavedVm::decode(&future), Err(DecodeError::Length { .. })));
    }

    #[test]
    fn only_pages_that_differ_are_written() {
        let page = PAGE as usize;
        let mut contents = vec![0u8; page * 20];
        contents[page * 3] = 1;
        contents[page * 4 + 7] = 2;
        contents[page * 19] = 3;
        let out = memfd();
        let (pages, bitmap) = write_memory(&contents, None, &out).unwrap();
        assert_eq!(pages, 3);
        assert_eq!(bitmap.as_bytes(), [0b11000, 0, 0b1000]);
        let mut back = vec![9u8; contents.len()];
        out.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, contents);

        let base = contents.clone();
        contents[page * 4 + 7] = 0;
        let (pages, bitmap) = write_memory(&contents, Some(&base), &memfd()).unwrap();
        assert_eq!((pages, bitmap.as_bytes()), (1, &[0b10000, 0, 0][..]));
    }

    proptest! {
        #[test]
        fn any_body_decodes_or_fails(body in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut bytes = vec![0; HEADER];
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            bytes[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&body);
            prop_assert!(SavedVm::decode(&bytes).is_err());
        }
    }
}
