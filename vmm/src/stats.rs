//! Measuring: phase stamps, exit counters, and KVM's own statistics.
//!
//! KVM's statistics come through descriptors that are opened while the shell is built, before the
//! cage closes (Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`). Reading them is a `pread`.

use std::{
    fs::File,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::atomic::{AtomicU64, Ordering},
};

use firn_pages::ioctl::KVM_GET_STATS_FD;
use firn_proto::control::{Phase, Stamps};

use crate::descriptors::{STATISTICS, place};

/// Longest statistics file that is believed, in bytes.
const MAX_STATS: usize = 1 << 20;

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Turns a libc return value into a result.
pub fn ioctl_error(result: libc::c_int) -> std::io::Result<libc::c_int> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

/// Moments that any thread may take; each phase keeps its first one until [`Clock::restart`].
#[derive(Debug, Default)]
pub struct Clock {
    slots: [AtomicU64; PHASES.len()],
}

/// All phases in the order in which they happen.
const PHASES: [Phase; 11] = [
    Phase::ProcessStart,
    Phase::ShellReady,
    Phase::Received,
    Phase::Stopped,
    Phase::Mapped,
    Phase::Populated,
    Phase::DevicesSet,
    Phase::VcpuSet,
    Phase::Entered,
    Phase::FirstExit,
    Phase::FirstByte,
];

impl Clock {
    /// Takes the stamp of `phase` now, unless it has been taken.
    pub fn stamp(&self, phase: Phase) {
        self.stamp_at(phase, monotonic_ns());
    }

    /// Takes the stamp of `phase` at `ns`, unless it has been taken.
    pub fn stamp_at(&self, phase: Phase, ns: u64) {
        if let Some(index) = PHASES.iter().position(|&p| p == phase) {
            let _ = self.slots[index].compare_exchange(0, ns, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Forgets everything after [`Phase::ShellReady`].
    pub fn restart(&self) {
        for slot in &self.slots[2..] {
            slot.store(0, Ordering::Release);
        }
    }

    /// All stamps taken so far.
    pub fn stamps(&self) -> Stamps {
        let taken = PHASES.iter().zip(&self.slots);
        Stamps(
            taken
                .map(|(&phase, slot)| (phase, slot.load(Ordering::Acquire)))
                .filter(|&(_, ns)| ns != 0)
                .collect(),
        )
    }
}

/// Why `KVM_RUN` came back to user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitKind {
    /// Port read.
    PortIn,
    /// Port write.
    PortOut,
    /// Device register read.
    MmioRead,
    /// Device register write.
    MmioWrite,
    /// A signal: the VMM wants the vCPU back.
    Interrupted,
    /// Anything else.
    Other,
}

/// Counters of [`ExitKind`], shared by all vCPUs.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; 6]);

impl ExitCounters {
    /// Counts one exit.
    pub fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// All counters by name.
    pub fn read(&self) -> Vec<(String, u64)> {
        ["port_in", "port_out", "mmio_read", "mmio_write", "interrupted", "other"]
            .iter()
            .zip(&self.0)
            .map(|(name, count)| (name.to_string(), count.load(Ordering::Relaxed)))
            .collect()
    }
}

/// An open statistics descriptor of a VM or vCPU.
#[derive(Debug)]
pub struct KvmStats {
    prefix: String,
    file: File,
}

impl KvmStats {
    /// Opens the statistics of `kvm_object` (a VM's or vCPU's descriptor); `None` where the kernel
    /// has none.
    pub fn open(kvm_object: &impl AsRawFd, prefix: &str) -> Option<Self> {
        // SAFETY: the request takes no argument and returns a new descriptor or an error; the
        // descriptor that it is made on is open for the duration of the borrow.
        let result = unsafe { libc::ioctl(kvm_object.as_raw_fd(), KVM_GET_STATS_FD.into(), 0) };
        let descriptor = ioctl_error(result).ok()?;
        // SAFETY: KVM has just returned this descriptor to us; nobody else owns it.
        let statistics = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let file = place(statistics, &STATISTICS).ok()?.into();
        Some(Self { prefix: prefix.to_string(), file })
    }

    /// Appends all scalar counters as `prefix.name`.
    pub fn read(&self, into: &mut Vec<(String, u64)>) {
        let mut bytes = vec![0; 64 * 1024];
        let mut length = 0;
        // One read is enough on every kernel so far; the loop is for the next one.
        while length < MAX_STATS {
            match self.file.read_at(&mut bytes[length..], length as u64) {
                Ok(0) | Err(_) => break,
                Ok(n) => length += n,
            }
            if length == bytes.len() {
                bytes.resize(length * 2, 0);
            }
        }
        for (name, value) in parse(&bytes[..length]) {
            into.push((format!("{}.{name}", self.prefix), value));
        }
    }
}

/// Parses a statistics file: header, descriptors, data. Histograms are left out.
pub fn parse(bytes: &[u8]) -> Vec<(String, u64)> {
    const DESCRIPTOR_HEAD: usize = 16;
    let u32_at =
        |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let u64_at =
        |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let mut counters = Vec::new();
    let header = (u32_at(4), u32_at(8), u32_at(16), u32_at(20));
    let (Some(name_size), Some(count), Some(descriptors), Some(data)) = header else {
        return counters;
    };
    let stride = DESCRIPTOR_HEAD + name_size as usize;
    for index in 0..count.min(1024) as usize {
        let at = descriptors as usize + index * stride;
        let (Some(size_exponent), Some(offset)) = (u32_at(at + 4), u32_at(at + 8)) else { break };
        let Some(name) = bytes.get(at + DESCRIPTOR_HEAD..at + stride) else { break };
        let name = name.split(|&b| b == 0).next().unwrap_or_default();
        // `size` (the upper 16 bits) is the number of values; one: a scalar.
        if size_exponent >> 16 != 1 {
            continue;
        }
        if let Some(value) = u64_at(data as usize + offset as usize) {
            counters.push((String::from_utf8_lossy(name).into_owned(), value));
        }
    }
    counters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_keep_their_first_moment_and_their_order() {
        let clock = Clock::default();
        clock.stamp_at(Phase::Entered, 30);
        clock.stamp_at(Phase::ProcessStart, 10);
        clock.stamp_at(Phase::Entered, 99);
        assert_eq!(clock.stamps().0, [(Phase::ProcessStart, 10), (Phase::Entered, 30)]);
        clock.restart();
        assert_eq!(clock.stamps().0, [(Phase::ProcessStart, 10)]);
    }

    #[test]
    fn statistics_parse_and_truncations_are_survived() {
        let mut file = Vec::new();
        for word in [0u32, 8, 1, 24, 24, 48] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0u32.to_le_bytes()); // flags
        file.extend_from_slice(&(1u32 << 16).to_le_bytes()); // exponent, size 1
        file.extend_from_slice(&0u32.to_le_bytes()); // offset
        file.extend_from_slice(&0u32.to_le_bytes()); // bucket size
        file.extend_from_slice(b"exits\0\0\0");
        file.extend_from_slice(&42u64.to_le_bytes());
        assert_eq!(parse(&file), [("exits".to_string(), 42)]);
        for length in 0..file.len() {
            assert!(parse(&file[..length]).is_empty());
        }
    }
}
