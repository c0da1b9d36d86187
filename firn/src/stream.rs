//! The host's end of the invoke connection of one instance: frames of [`guest`] both ways.
//!
//! The guest is hostile: a frame's length is checked before its bytes are waited for, the buffer
//! grows with the bytes that arrive and not with what a length claims, and output is passed on
//! with backpressure.

use std::{
    fmt, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
};

use bytes::{Buf, BytesMut};
use firn_proto::guest::{self, FromGuest, ToGuest};
use rustix::net::SendFlags;
use tokio::net::UnixStream;

use crate::{LogLine, LogSink, phases};

/// Bytes that one read may take.
const READ: usize = 256 * 1024;

/// What went wrong on the connection.
#[derive(Debug)]
pub(crate) enum StreamError {
    /// The guest broke the protocol.
    Protocol(String),
    /// The host's kernel refused.
    Io(io::Error),
}

/// The host's end.
pub(crate) struct Stream {
    socket: UnixStream,
    received: BytesMut,
    unsent: BytesMut,
    /// A piece of output that waits for room in the log.
    line: Option<LogLine>,
    log: Option<LogSink>,
    first_byte_ns: Option<u64>,
}

impl fmt::Debug for Stream {
    /// Without what is on its way.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("socket", &self.socket)
            .field("received_bytes", &self.received.len())
            .field("unsent_bytes", &self.unsent.len())
            .finish_non_exhaustive()
    }
}

impl Stream {
    /// Both ends: ours, and the one that the VMM gets. Must be called within a tokio runtime.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let stream = Self {
            socket: UnixStream::from_std(ours)?,
            received: BytesMut::new(),
            unsent: BytesMut::new(),
            line: None,
            log: None,
            first_byte_ns: None,
        };
        Ok((stream, theirs.into()))
    }

    pub(crate) fn set_log(&mut self, log: Option<LogSink>) {
        self.log = log;
    }

    /// Ends this end; its output would have gone there.
    pub(crate) fn into_log(self) -> Option<LogSink> {
        self.log
    }

    /// Queues a message, and sends at once as much as the socket takes. The rest goes out while
    /// [`Stream::next`] waits.
    pub(crate) fn queue(&mut self, message: &ToGuest) -> Result<(), StreamError> {
        let frame = guest::encode(message).map_err(|e| StreamError::Protocol(e.to_string()))?;
        let mut rest = &frame[..];
        if self.unsent.is_empty() {
            // Past tokio on purpose: it would want to see an event of the socket first, and what
            // is written here must be readable before the guest is entered.
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            while !rest.is_empty() {
                match rustix::net::send(self.socket.as_fd(), rest, flags) {
                    Ok(count) => rest = &rest[count..],
                    Err(rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::AGAIN) => break,
                    // The other end is gone: reading will tell.
                    Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => return Ok(()),
                    Err(e) => return Err(StreamError::Io(e.into())),
                }
            }
        }
        self.unsent.extend_from_slice(rest);
        Ok(())
    }

    /// Begins a new operation: the next byte counts as its first.
    pub(crate) fn expect_first_byte(&mut self) {
        self.first_byte_ns = None;
    }

    /// When the first byte of the operation came, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(crate) fn first_byte_ns(&self) -> Option<u64> {
        self.first_byte_ns
    }

    /// Nothing is half sent or half received.
    pub(crate) fn is_quiet(&self) -> bool {
        self.received.is_empty() && self.unsent.is_empty() && self.line.is_none()
    }

    /// The next message that is not output; output goes to the log on the way. `None`: the
    /// connection is closed. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<FromGuest>, StreamError> {
        loop {
            self.pass_line_on().await;
            match self.take_frame()? {
                Some(FromGuest::Log(log)) => {
                    let guest::Log { stream, line, partial } = log;
                    if line.len() > guest::MAX_LOG {
                        return Err(StreamError::Protocol(format!(
                            "log line of {} bytes exceeds the limit of {}",
                            line.len(),
                            guest::MAX_LOG
                        )));
                    }
                    self.line = Some(LogLine { stream, line, partial });
                }
                Some(message) => return Ok(Some(message)),
                None => {
                    if !self.progress().await? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    async fn pass_line_on(&mut self) {
        if self.line.is_none() {
            return;
        }
        if let Some(log) = &self.log
            && let Ok(room) = log.reserve().await
            && let Some(line) = self.line.take()
        {
            room.send(line);
        }
        // Nobody listens.
        self.line = None;
    }

    /// Reads or writes something; false at the end of the connection.
    async fn progress(&mut self) -> Result<bool, StreamError> {
        let result = tokio::select! {
            biased;
            ready = self.socket.readable() => match ready {
                Ok(()) => {
                    self.received.reserve(READ.min(8192.max(self.received.len())));
                    self.socket.try_read_buf(&mut self.received)
                }
                Err(error) => Err(error),
            },
            ready = self.socket.writable(), if !self.unsent.is_empty() => match ready {
                Ok(()) => self.socket.try_write(&self.unsent).inspect(|count| {
                    self.unsent.advance(*count);
                }),
                Err(error) => Err(error),
            },
        };
        match result {
            Ok(0) => Ok(false),
            Ok(_) => {
                if self.first_byte_ns.is_none() && !self.received.is_empty() {
                    self.first_byte_ns = Some(phases::now_ns());
                }
                Ok(true)
            }
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(true),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    // What the guest had sent before may still be readable.
                    self.unsent.clear();
                    Ok(e.kind() == io::ErrorKind::BrokenPipe)
                }
                _ => Err(StreamError::Io(e)),
            },
        }
    }

    fn take_frame(&mut self) -> Result<Option<FromGuest>, StreamError> {
        let protocol = |e: firn_proto::CodecError| StreamError::Protocol(e.to_string());
        let Some(prefix) = self.received.first_chunk::<4>() else { return Ok(None) };
        let length = guest::frame_length(*prefix).map_err(protocol)?;
        if self.received.len() - 4 < length {
            return Ok(None);
        }
        self.received.advance(4);
        let message = self.received.split_to(length);
        guest::decode_from_guest(&message).map(Some).map_err(protocol)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use firn_proto::guest::{Done, Log, Outcome};
    use tokio::sync::mpsc;

    use super::*;

    fn frame(message: &FromGuest) -> Vec<u8> {
        guest::encode(message).unwrap()
    }

    fn log(text: &str) -> FromGuest {
        let line = text.as_bytes().to_vec();
        FromGuest::Log(Log { stream: guest::Stream::Stdout, line, partial: false })
    }

    fn done(payload: Vec<u8>) -> FromGuest {
        FromGuest::Done(Done {
            request_id: "r".into(),
            outcome: Outcome::Response { payload, content_type: String::new() },
            duration_us: 1,
            init_us: 0,
            max_memory_bytes: 2,
            tsc: (3, 4),
        })
    }

    #[tokio::test]
    async fn lines_come_before_the_answer_and_backpressure_holds() {
        let (mut stream, theirs) = Stream::pair().unwrap();
        let mut guest = StdStream::from(theirs);
        let (sink, mut lines) = mpsc::channel(1);
        stream.set_log(Some(sink));
        for text in ["a", "b", "c"] {
            guest.write_all(&frame(&log(text))).unwrap();
        }
        guest.write_all(&frame(&done(b"{}".to_vec()))).unwrap();
        // Nobody drains: a full channel stops it, and cancelling loses nothing.
        let wait = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(wait, stream.next()).await.is_err());
        let reader = tokio::spawn(async move {
            let mut texts = Vec::new();
            while let Some(line) = lines.recv().await {
                texts.push(String::from_utf8(line.line).unwrap());
            }
            texts
        });
        assert_eq!(stream.next().await.unwrap(), Some(done(b"{}".to_vec())));
        assert!(stream.is_quiet());
        drop(stream);
        assert_eq!(reader.await.unwrap(), ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn large_messages_pass_both_ways_at_once() {
        let (mut stream, theirs) = Stream::pair().unwrap();
        let invoke = ToGuest::Invoke(guest::Invoke {
            request_id: "r".into(),
            function_arn: String::new(),
            trace_id: String::new(),
            client_context: String::new(),
            cognito_identity: String::new(),
            deadline_ms: 0,
            timeout_ms: 0,
            payload: vec![b'x'; guest::MAX_PAYLOAD],
        });
        let expected = guest::encode(&invoke).unwrap();
        let guest = std::thread::spawn(move || {
            let mut guest = StdStream::from(theirs);
            // Answers before it has read anything.
            let mut writer = guest.try_clone().unwrap();
            let writer = std::thread::spawn(move || {
                writer.write_all(&frame(&done(vec![b'y'; guest::MAX_PAYLOAD]))).unwrap();
            });
            let mut bytes = vec![0; expected.len()];
            guest.read_exact(&mut bytes).unwrap();
            writer.join().unwrap();
            bytes == expected
        });
        stream.queue(&invoke).unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer, done(vec![b'y'; guest::MAX_PAYLOAD]));
        assert_eq!(stream.next().await.unwrap(), None, "the rest goes out until the end");
        assert!(guest.join().unwrap());
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_arrives() {
        let (mut stream, theirs) = Stream::pair().unwrap();
        let mut guest = StdStream::from(theirs);
        guest.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(stream.next().await, Err(StreamError::Protocol(_))));
        let (mut stream, theirs) = Stream::pair().unwrap();
        let mut guest = StdStream::from(theirs);
        guest.write_all(&[1, 0, 0, 0, 0xff]).unwrap();
        assert!(matches!(stream.next().await, Err(StreamError::Protocol(_))));
        let (mut stream, theirs) = Stream::pair().unwrap();
        drop(theirs);
        assert!(matches!(stream.next().await, Ok(None)));
    }
}
