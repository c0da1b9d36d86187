//! What hangs behind the virtio transport: [`block`], [`vsock`], [`rng`].
//!
//! A device trusts nobody: what the guest wrote is read once and checked, and work per kick is
//! bounded. It knows nothing of KVM, of registers or of threads.

pub mod block;
pub mod medium;
pub mod rng;
pub mod vsock;
