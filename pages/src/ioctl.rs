//! Numbers of ioctls, each once: what is called and what a filter lets through must be the same.
//!
//! These are the ones that Firn calls itself. `kvm-ioctls` calls the others and keeps their numbers
//! private; only the VMM's filter names them again.

pub use rustix::ioctl::{Opcode, opcode};

/// Type of all of KVM's.
pub const KVMIO: u8 = 0xae;

/// The version of KVM's interface.
pub const KVM_GET_API_VERSION: Opcode = opcode::none(KVMIO, 0x00);

/// A descriptor for the statistics of a VM or vCPU.
pub const KVM_GET_STATS_FD: Opcode = opcode::none(KVMIO, 0xce);

/// `struct kvm_device_attr`: flags and group, attribute, address.
type DeviceAttribute = [u64; 3];

/// Sets an attribute of a vCPU; `kvm-ioctls` has this one and the next two for Arm only.
pub const KVM_SET_DEVICE_ATTR: Opcode = opcode::write::<DeviceAttribute>(KVMIO, 0xe1);

/// Reads an attribute of a vCPU.
pub const KVM_GET_DEVICE_ATTR: Opcode = opcode::write::<DeviceAttribute>(KVMIO, 0xe2);

/// Whether a vCPU has an attribute.
pub const KVM_HAS_DEVICE_ATTR: Opcode = opcode::write::<DeviceAttribute>(KVMIO, 0xe3);

/// Runs of pages of a process, from Linux 6.7 on: [`crate::pagemap`].
pub const PAGEMAP_SCAN: Opcode = opcode::read_write::<crate::pagemap::ScanArgument>(b'f', 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        // Of linux/kvm.h and linux/fs.h.
        assert_eq!(KVM_GET_API_VERSION, 0xae00);
        assert_eq!(KVM_GET_STATS_FD, 0xaece);
        assert_eq!(KVM_SET_DEVICE_ATTR, 0x4018_aee1);
        assert_eq!(KVM_GET_DEVICE_ATTR, 0x4018_aee2);
        assert_eq!(KVM_HAS_DEVICE_ATTR, 0x4018_aee3);
        assert_eq!(PAGEMAP_SCAN, 0xc060_6610);
    }
}
