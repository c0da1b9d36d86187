//! What the fuzz targets share: a guest that drives virtio devices by a script.

pub mod block;
pub mod guest;
pub mod rng;
pub mod script;
pub mod vsock;
