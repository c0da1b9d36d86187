//! `firn-vmm`: one process, one microVM.
//!
//! The process is born in a cage (`firn-jailer`) with two descriptors, a control socket and
//! `/dev/kvm`; everything else arrives over the socket (`firn_proto::control`). It knows nothing of
//! Lambda, HTTP or files' names, trusts its own process only, and treats every byte from the guest
//! and from a snapshot as hostile.
//!
//! | module | job |
//! |---|---|
//! | [`memory`] | guest memory: layout, reservation, mapping of a snapshot |
//! | [`arch`] | all that is x86_64: boot, CPUID, MP table, vCPU and VM state |
//! | [`virtio`], [`devices`] | the MMIO transport and what hangs behind it |
//! | [`machine`] | the fixed plan of devices and the dispatch of exits to them |
//! | [`vcpu`] | the vCPU threads |
//! | `handover` | what device thread and vCPU threads hand over |
//! | [`vm`] | shell, boot, thaw, pause, save: what the control messages do |
//! | [`plan`] | what a thaw copies before the guest runs |
//! | [`snapshot`] | the bytes of a saved VM |
//! | [`control`] | the control socket and the device thread's event loop |
//! | [`descriptors`] | the plan of descriptor numbers |
//! | [`seccomp`] | what each thread may ask of the kernel |
//! | [`hold`] | in debug builds: holds a thread back, for tests of races |
//! | [`stats`] | phase stamps, exit counters and KVM's statistics |

pub mod arch;
pub mod console;
pub mod control;
pub mod descriptors;
pub mod devices;
mod handover;
pub mod hold;
pub mod machine;
pub mod memory;
pub mod plan;
pub mod seccomp;
pub mod snapshot;
pub mod stats;
pub mod vcpu;
pub mod virtio;
pub mod vm;

pub use handover::Lapics;

/// What [`handover`] is made of; its proof has another.
mod sync {
    pub use std::sync::{Condvar, Mutex, PoisonError, atomic};
}
