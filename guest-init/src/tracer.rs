//! Where the function's X-Ray SDK sends its segments: UDP on loopback, as X-Ray's daemon takes them.
//!
//! Segments of an invocation that is traced go to the host as they are, within limits; all others are thrown
//! away. The host reads them, not the guest.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
};

use firn_proto::guest::{MAX_SEGMENT, MAX_SEGMENTS};

/// The socket.
#[derive(Debug)]
pub struct Tracer {
    socket: UdpSocket,
    /// Bytes that the open invocation may still send; `None`: it is not traced.
    left: Option<usize>,
}

impl Tracer {
    /// Takes segments there.
    ///
    /// # Errors
    /// Whatever the kernel refuses.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, left: None })
    }

    /// Where it takes them.
    ///
    /// # Errors
    /// Whatever the kernel refuses.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What to poll, while segments are wanted.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.left.map(|_| self.socket.as_fd())
    }

    /// An invocation with this trace header begins. What was sent before belongs to none.
    pub fn begin(&mut self, trace_id: &str, scratch: &mut [u8]) {
        self.left = None;
        if trace_id.split(';').any(|field| field.trim() == "Sampled=1") {
            // At most what the socket holds: a flood goes on for ever.
            for _ in 0..1024 {
                if self.socket.recv(scratch).is_err() {
                    break;
                }
            }
            self.left = Some(MAX_SEGMENTS);
        }
    }

    /// The invocation has ended.
    pub fn end(&mut self) {
        self.left = None;
    }

    /// The next segment of the open invocation.
    pub fn next(&mut self, scratch: &mut [u8]) -> Option<Vec<u8>> {
        let left = self.left.as_mut()?;
        loop {
            let count = self.socket.recv(scratch).ok()?;
            // A later, shorter one may still fit.
            if count <= MAX_SEGMENT && count <= *left {
                *left -= count;
                return Some(scratch[..count].to_vec());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "Root=1-2-3;Parent=4;Sampled=1";

    fn pair() -> (Tracer, UdpSocket) {
        let tracer = Tracer::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(tracer.address().unwrap()).unwrap();
        (tracer, client)
    }

    #[test]
    fn segments_count_for_the_invocation_that_they_were_sent_in() {
        let (mut tracer, client) = pair();
        let mut scratch = vec![0; 1 << 16];
        assert!(tracer.fd().is_none());
        client.send(b"before").unwrap();
        tracer.begin(SAMPLED, &mut scratch);
        assert_eq!(tracer.next(&mut scratch), None);
        client.send(b"one").unwrap();
        client.send(b"two").unwrap();
        assert!(tracer.fd().is_some());
        assert_eq!(tracer.next(&mut scratch).unwrap(), b"one");
        assert_eq!(tracer.next(&mut scratch).unwrap(), b"two");
        tracer.end();
        client.send(b"after").unwrap();
        assert_eq!(tracer.next(&mut scratch), None);
        tracer.begin("Root=1-2-3;Sampled=0", &mut scratch);
        assert_eq!(tracer.next(&mut scratch), None);
    }

    #[test]
    fn segments_of_an_invocation_are_bounded() {
        let (mut tracer, client) = pair();
        let mut scratch = vec![0; 1 << 16];
        tracer.begin(SAMPLED, &mut scratch);
        let mut bytes = 0;
        for _ in 0..10 {
            client.send(&[b'x'; 60_000]).unwrap();
            bytes += tracer.next(&mut scratch).map_or(0, |document| document.len());
        }
        assert_eq!(bytes, 240_000);
        client.send(b"short").unwrap();
        assert_eq!(tracer.next(&mut scratch).unwrap(), b"short");
    }
}
