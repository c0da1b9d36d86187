//! Entropy for the guest (virtio 1.2 §5.4), straight from the host kernel's generator.
//!
//! One request gets at most [`MAX_REQUEST`] bytes, so a kick costs at most the queue's size times
//! that. It keeps nothing: two thawed guests never get the same bytes from here. What the guest
//! asked for before a snapshot it has received before the snapshot, and must not use again after a
//! thaw; `firn-init` reseeds the kernel then.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::{
    memory::GuestMemory,
    virtio::{Device, DeviceError, RestoreError, chain::Chain, queue::Queues},
};

/// Most bytes of one request; a driver that asks for more gets as many.
pub const MAX_REQUEST: usize = 4096;

/// The entropy device.
pub struct Rng {
    chain: Chain,
}

/// What a snapshot keeps of it: nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState;

impl Rng {
    /// A device that writes to `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { chain: Chain::new(memory) }
    }
}

impl Device for Rng {
    const ID: u32 = VIRTIO_ID_RNG;
    // Linux has one request in flight.
    const QUEUES: &'static [u16] = &[8];
    const VERSION: u16 = 1;
    type State = RngState;

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn notify(&mut self, queue: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        for _ in 0..queues.available(queue)? {
            queues.pop(queue, &mut self.chain)?;
            let mut target = self.chain.writable();
            target.truncate(MAX_REQUEST);
            let mut written = 0;
            let mut bytes = [0; 256];
            while !target.is_empty() {
                // Fails only before the host's generator is seeded, and is interrupted only then.
                let Ok(n) = getrandom(&mut bytes, GetRandomFlags::NONBLOCK) else { break };
                written += target.copy_from(&bytes[..n]) as u32;
            }
            queues.push(queue, self.chain.head(), written)?;
        }
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> RngState {
        RngState
    }

    fn restore(&mut self, _state: &RngState) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::mock::{DATA, Mock, memory};

    fn up() -> Mock<Rng> {
        let memory = memory();
        Mock::up(memory.clone(), Rng::new(memory))
    }

    #[test]
    fn fills_what_was_asked_for() {
        let mut mock = up();
        let head = mock.add(0, &[(DATA, 100, true), (DATA + 200, 300, true)]);
        mock.kick(0).unwrap();
        assert_eq!(mock.used(0), [(head.into(), 400)]);
        assert_eq!(mock.line.count(), 1);
        assert_ne!(mock.read_vec(DATA, 100), [0; 100]);
        assert_ne!(mock.read_vec(DATA + 200, 300), [0; 300]);
        assert_eq!(mock.read_vec(DATA + 100, 100), [0; 100]);
    }

    #[test]
    fn a_request_is_bounded() {
        let mut mock = up();
        mock.add(0, &[(DATA, 100_000, true)]);
        mock.kick(0).unwrap();
        assert_eq!(mock.used(0)[0].1 as usize, MAX_REQUEST);
    }

    #[test]
    fn nothing_writable_gets_nothing() {
        let mut mock = up();
        mock.add(0, &[(DATA, 8, false)]);
        mock.kick(0).unwrap();
        assert_eq!(mock.used(0), [(0, 0)]);
    }

    #[test]
    fn every_request_gets_other_bytes_also_after_restore() {
        let mut mock = up();
        let state = mock.device.save();
        mock.add(0, &[(DATA, 32, true)]);
        mock.kick(0).unwrap();
        let first = mock.read_vec(DATA, 32);
        mock.device.restore(&state).unwrap();
        mock.kick(0).unwrap();
        assert_ne!(mock.read_vec(DATA, 32), first);
    }
}
