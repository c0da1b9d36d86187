//! Everything that is measured: one file a subject.

pub mod firecracker;
pub mod firn;
pub mod firnd;
