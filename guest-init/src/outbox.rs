//! Bytes that wait for a descriptor to take them.

use std::{
    collections::VecDeque,
    io::{self, Write},
};

/// Small buffers are joined up to this size: fewer system calls, and a million short lines that
/// wait cost their bytes and no more.
const JOIN: usize = 16 * 1024;

/// A queue of buffers, written in order. A buffer is freed as soon as it has been written, and a
/// large one is never copied.
#[derive(Debug, Default)]
pub struct Outbox {
    buffers: VecDeque<Vec<u8>>,
    /// Bytes of the first buffer that have been written.
    written: usize,
    queued: usize,
}

impl Outbox {
    /// Appends a buffer.
    pub fn push(&mut self, buffer: Vec<u8>) {
        self.queued += buffer.len();
        match self.buffers.back_mut() {
            Some(last) if last.len() + buffer.len() <= JOIN => last.extend_from_slice(&buffer),
            _ if buffer.is_empty() => {}
            _ => self.buffers.push_back(buffer),
        }
    }

    /// Bytes that wait.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queued == 0
    }

    /// Writes until nothing waits or `to` would block.
    ///
    /// # Errors
    /// Any but `WouldBlock` and `Interrupted`.
    pub fn write_to(&mut self, mut to: impl Write) -> io::Result<()> {
        while let Some(buffer) = self.buffers.front() {
            match to.write(&buffer[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.written += count;
                    self.queued -= count;
                    if self.written == buffer.len() {
                        self.buffers.pop_front();
                        self.written = 0;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes a few bytes, then would block once, and so on.
    struct Trickle(Vec<u8>, usize, bool);

    impl Write for Trickle {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            self.2 = !self.2;
            if self.2 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let count = buffer.len().min(self.1);
            self.0.extend_from_slice(&buffer[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn everything_arrives_in_order(
            buffers in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..JOIN), 0..10),
            step in 100..20_000_usize,
        ) {
            let mut outbox = Outbox::default();
            let mut trickle = Trickle(Vec::new(), step, false);
            for buffer in &buffers {
                outbox.push(buffer.clone());
                outbox.write_to(&mut trickle).unwrap();
            }
            while !outbox.is_empty() {
                outbox.write_to(&mut trickle).unwrap();
            }
            prop_assert_eq!(trickle.0, buffers.concat());
            prop_assert_eq!(outbox.queued(), 0);
        }
    }
}
