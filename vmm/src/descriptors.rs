//! The plan of descriptor numbers: every descriptor that this process keeps has its place, so that a
//! filter can say on which of them a thread may do what ([`crate::seccomp`]).
//!
//! What the kernel hands out takes the lowest free number. All places but the inherited ones lie above
//! [`RECEIVED`], so that is where descriptors of a message arrive; those that outlive the request are
//! moved to their place at once ([`place`]), the others are closed with it.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use firn_proto::control::{CONTROL_FD, KVM_FD, MAX_DESCRIPTORS, MAX_DISKS, MAX_VCPUS};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Numbers with one meaning.
pub type Numbers = Range<RawFd>;

const fn after(before: &Numbers, count: usize) -> Numbers {
    before.end..before.end + count as RawFd
}

/// Standard error.
pub const STANDARD_ERROR: Numbers = 2..3;
/// The control socket; inherited.
pub const CONTROL: Numbers = CONTROL_FD..CONTROL_FD + 1;
/// Descriptors of the request at hand; the first is that of `/dev/kvm` until the VM is built.
pub const RECEIVED: Numbers = KVM_FD..KVM_FD + MAX_DESCRIPTORS as RawFd;
/// The device thread's epoll descriptor.
pub const EPOLL: Numbers = after(&RECEIVED, 1);
/// The eventfd by which a vCPU thread says that its guest is over.
pub const BELL: Numbers = after(&EPOLL, 1);
/// The VM.
pub const VM: Numbers = after(&BELL, 1);
/// The vCPUs, by id.
pub const VCPUS: Numbers = after(&VM, MAX_VCPUS as usize);
/// KVM's statistics, of the VM and each vCPU.
pub const STATISTICS: Numbers = after(&VCPUS, 1 + MAX_VCPUS as usize);
/// The memory file of the snapshot that was thawed.
pub const MEMORY: Numbers = after(&STATISTICS, 1);
/// The invoke stream; two, since a new one comes before the old one goes.
pub const STREAM: Numbers = after(&MEMORY, 2);
/// Media of block devices: backing, frozen delta and delta of each, and of one that is attached.
pub const DISKS: Numbers = after(&STREAM, 3 * (MAX_DISKS + 1));

/// Moves a descriptor to the lowest free number of its kind, close-on-exec.
///
/// # Errors
/// The kernel's; `EMFILE` if that kind's numbers are taken.
pub fn place(descriptor: impl AsFd, among: &Numbers) -> io::Result<OwnedFd> {
    let placed = rustix::io::fcntl_dupfd_cloexec(&descriptor, among.start)?;
    drop(descriptor);
    match among.contains(&placed.as_raw_fd()) {
        true => Ok(placed),
        false => Err(rustix::io::Errno::MFILE.into()),
    }
}

/// Makes numbers above the plan impossible, for good.
///
/// # Errors
/// The kernel's.
pub fn limit() -> io::Result<()> {
    let end = Some(DISKS.end as u64);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: end, maximum: end })?)
}

#[cfg(test)]
mod tests {
    use std::io::pipe;

    use super::*;

    #[test]
    fn descriptors_move_to_their_kind_or_fail() {
        // Far above what tests that run beside this one have open.
        let among = 700..702;
        let (reader, _writer) = pipe().unwrap();
        let numbers: Vec<_> = (0..3).map(|_| place(reader.try_clone().unwrap(), &among)).collect();
        let found: Vec<_> =
            numbers.iter().map(|n| n.as_ref().map(AsRawFd::as_raw_fd).unwrap_or(-1)).collect();
        assert_eq!(found, [700, 701, -1]);
        let error = numbers.into_iter().nth(2).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
    }
}
