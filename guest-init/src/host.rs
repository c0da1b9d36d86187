//! The invoke connection: frames of [`firn_proto::guest`] on one non-blocking stream.
//!
//! A frame is read only when the last one has been dealt with, so frames that the host sent ahead
//! wait in the socket and are handled in order; and nothing is held here between two frames, which
//! is what lets the connection survive a snapshot.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use firn_proto::{
    CodecError,
    guest::{self, FromGuest, ToGuest},
};

use crate::outbox::Outbox;

/// Why the invoke connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host closed it.
    #[error("the host closed the invoke connection")]
    Closed,
    /// It failed.
    #[error("invoke connection: {0}")]
    Io(#[from] io::Error),
    /// The host and this guest don't speak the same protocol.
    #[error("invoke connection: {0}")]
    Codec(#[from] CodecError),
}

/// Last word of `firn-init`'s arguments, or of the kernel's command line behind `--`: asks for a new
/// connection when the old one is lost while the guest is frozen.
pub const RECONNECT: &str = "--reconnect";

/// Makes a new invoke connection, connected and non-blocking.
pub type Connect = Box<dyn FnMut() -> io::Result<OwnedFd>>;

/// The host's end of everything.
pub struct Host {
    stream: File,
    /// Makes the next connection when this one is lost.
    connect: Option<Connect>,
    out: Outbox,
    prefix: [u8; 4],
    /// Bytes of `prefix`, then of `message`, that have arrived.
    read: usize,
    /// The message that is being read, once its length is known.
    message: Option<Vec<u8>>,
}

impl Host {
    /// `stream` must be connected and non-blocking.
    pub fn new(stream: OwnedFd) -> Self {
        Self {
            stream: stream.into(),
            connect: None,
            out: Outbox::default(),
            prefix: [0; 4],
            read: 0,
            message: None,
        }
    }

    /// For monitors under which connections don't survive a snapshot: [`Host::replace`] connects
    /// anew by `connect`.
    #[must_use]
    pub fn reconnecting(mut self, connect: Connect) -> Self {
        self.connect = Some(connect);
        self
    }

    /// Replaces a connection that was lost for the reason `lost`, where this host can.
    ///
    /// # Errors
    /// `lost` if it can't, or if what was lost is not just the connection; or why there is no new
    /// one.
    pub fn replace(&mut self, lost: HostError) -> Result<(), HostError> {
        match (&mut self.connect, lost) {
            (Some(connect), HostError::Closed | HostError::Io(_)) => {
                self.stream = connect()?.into();
                self.out = Outbox::default();
                self.read = 0;
                self.message = None;
                Ok(())
            }
            (_, lost) => Err(lost),
        }
    }

    /// What to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Bytes that the host has not taken yet.
    pub fn queued(&self) -> usize {
        self.out.queued()
    }

    /// Queues a frame; [`Host::flush`] sends it.
    ///
    /// # Errors
    /// [`HostError::Codec`] for a message over the protocol's limit.
    pub fn send(&mut self, message: &FromGuest) -> Result<(), HostError> {
        self.out.push(guest::encode(message)?);
        Ok(())
    }

    /// Sends what the host takes now.
    ///
    /// # Errors
    /// [`HostError::Io`].
    pub fn flush(&mut self) -> Result<(), HostError> {
        Ok(self.out.write_to(&self.stream)?)
    }

    /// The next frame, if it has arrived whole.
    ///
    /// # Errors
    /// [`HostError::Closed`] at the stream's end, or whatever failed.
    pub fn receive(&mut self) -> Result<Option<ToGuest>, HostError> {
        loop {
            let rest = match &mut self.message {
                None => &mut self.prefix[self.read..],
                Some(message) => &mut message[self.read..],
            };
            if !rest.is_empty() {
                match self.stream.read(rest) {
                    Ok(0) => return Err(HostError::Closed),
                    Ok(count) => self.read += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            self.read = 0;
            match self.message.take() {
                // Zeroed memory of this size comes untouched from the kernel: a length that the
                // host announces costs nothing until its bytes arrive.
                None => self.message = Some(vec![0; guest::frame_length(self.prefix)?]),
                Some(message) => return Ok(Some(guest::decode_to_guest(&message)?)),
            }
        }
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("stream", &self.stream).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    fn pair() -> (UnixStream, Host) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, Host::new(theirs.into()))
    }

    #[test]
    fn frames_in_pieces_and_in_a_row() {
        let (mut peer, mut host) = pair();
        let frame = guest::encode(&ToGuest::Freeze).unwrap();
        assert!(host.receive().unwrap().is_none());
        peer.write_all(&frame[..3]).unwrap();
        assert!(host.receive().unwrap().is_none());
        peer.write_all(&frame[3..]).unwrap();
        peer.write_all(&guest::encode(&ToGuest::Shutdown).unwrap()).unwrap();
        assert_eq!(host.receive().unwrap(), Some(ToGuest::Freeze));
        assert_eq!(host.receive().unwrap(), Some(ToGuest::Shutdown));
        assert!(host.receive().unwrap().is_none());
        drop(peer);
        assert!(matches!(host.receive(), Err(HostError::Closed)));
    }

    #[test]
    fn a_lost_connection_is_replaced_only_where_that_was_asked_for() {
        let (peer, mut host) = pair();
        drop(peer);
        let lost = host.receive().unwrap_err();
        assert!(matches!(host.replace(lost), Err(HostError::Closed)));

        let (mut peer, mut host) = pair();
        let (mut next, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut streams = vec![OwnedFd::from(theirs)];
        host = host
            .reconnecting(Box::new(move || streams.pop().ok_or(io::ErrorKind::NotFound.into())));
        // Half a frame of the old connection must not become the head of the new one's.
        peer.write_all(&[1, 0]).unwrap();
        assert!(host.receive().unwrap().is_none());
        drop(peer);
        let lost = host.receive().unwrap_err();
        host.replace(lost).unwrap();
        next.write_all(&guest::encode(&ToGuest::Freeze).unwrap()).unwrap();
        assert_eq!(host.receive().unwrap(), Some(ToGuest::Freeze));
        // Nobody to connect to; and a host that breaks the protocol gets no second connection.
        assert!(matches!(host.replace(HostError::Closed), Err(HostError::Io(_))));
        let broken = HostError::Codec(CodecError::Trailing(1));
        assert!(matches!(host.replace(broken), Err(HostError::Codec(_))));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_at_once() {
        let (mut peer, mut host) = pair();
        peer.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(host.receive(), Err(HostError::Codec(CodecError::TooLong { .. }))));
    }
}
