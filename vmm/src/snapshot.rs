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
    arch::{cpuid::Signature, tsc::Frequency, vcpu_state::VcpuState, vm_state::VmState},
    machine::MachineState,
};

/// Version of the format. A change of any saved struct changes it.
pub const VERSION: u32 = 2;

/// Longest body in bytes.
pub const MAX_BODY: usize = 8 << 20;

/// Most MSRs of a vCPU. KVM has some four hundred; what compares lists of them takes time.
const MAX_MSRS: usize = 1024;

const MAGIC: [u8; 8] = *b"FIRN-VM\0";
const HEADER: usize = 16;

/// A VM, saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVm {
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The CPU that the guest saw.
    pub signature: Signature,
    /// How the guest's TSC ticked.
    pub tsc: Frequency,
    /// The host's TSC at the save, in ticks.
    pub host_tsc: u64,
    /// The shell's block devices.
    pub disks: Vec<DiskKind>,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// All vCPUs in order.
    pub vcpus: Vec<VcpuState>,
    /// Their MSRs as they are in a vCPU that has never run.
    pub power_on_msrs: Vec<(u32, u64)>,
    /// All devices.
    pub machine: MachineState,
}

impl SavedVm {
    /// What a vCPU's TSC read at the save, and reads at the moment when its clocks go on; the first one's
    /// is the guest's.
    pub fn guest_tsc(&self, vcpu: usize) -> u64 {
        let offset = self.vcpus.get(vcpu).map_or(0, VcpuState::tsc_offset);
        self.tsc.scale(self.host_tsc).wrapping_add_signed(offset)
    }
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
        match postcard::take_from_bytes::<Self>(body) {
            Ok((saved, [])) => saved.check_msrs(),
            Ok((_, rest)) => Err(DecodeError::Corrupt(format!("{} bytes follow", rest.len()))),
            Err(error) => Err(DecodeError::Corrupt(error.to_string())),
        }
    }

    fn check_msrs(self) -> Result<Self, DecodeError> {
        let most = self.vcpus.iter().map(VcpuState::msr_count).max().unwrap_or(0);
        match most.max(self.power_on_msrs.len()) {
            0..=MAX_MSRS => Ok(self),
            many => Err(DecodeError::Corrupt(format!("{many} MSRs exceed {MAX_MSRS}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
