//! What the VMM and its guest say on standard error.
//!
//! Whoever starts a VMM makes that a pipe that does not block (`O_NONBLOCK`), as the `firn` library
//! does: what its reader is too slow for is dropped then, and no vCPU waits for it.

use std::{
    fmt,
    io::{self, ErrorKind, Write},
};

/// Says something for people, if somebody can hear it.
pub fn say(what: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "firn-vmm: {what}");
}

/// Where the guest's serial port writes to. What does not fit is dropped; how much that was is said
/// before what comes next.
#[derive(Debug)]
pub struct Console<W> {
    out: W,
    /// Bytes that were dropped and not told of.
    lost: u64,
}

impl<W: Write> Console<W> {
    /// One that writes to `out`.
    pub fn new(out: W) -> Self {
        Self { out, lost: 0 }
    }
}

impl<W: Write> Write for Console<W> {
    /// Takes all of `bytes` or, where `out` would block, drops them.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.lost > 0 {
            let note = format!("\n[{} bytes of output were lost here]\n", self.lost);
            match self.out.write(note.as_bytes()) {
                // A pipe takes so few bytes whole, or none of them.
                Ok(_) => self.lost = 0,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.lost += bytes.len() as u64;
                    return Ok(bytes.len());
                }
                Err(error) => return Err(error),
            }
        }
        match self.out.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.lost += bytes.len() as u64;
                Ok(bytes.len())
            }
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_full_pipe_costs_output_and_no_time() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut console = Console::new(writer);
        let capacity = rustix::pipe::fcntl_getpipe_size(&reader).unwrap();
        for _ in 0..capacity + 100 {
            assert_eq!(console.write(b"x").unwrap(), 1);
        }
        let mut text = vec![0; capacity];
        reader.read_exact(&mut text).unwrap();
        assert!(text.iter().all(|byte| *byte == b'x'));
        console.write_all(b"more").unwrap();
        drop(console);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "\n[100 bytes of output were lost here]\nmore");
    }

    #[test]
    fn other_errors_are_not_hidden() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let error = Console::new(writer).write(b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }
}
