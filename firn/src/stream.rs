//! The host's end of the invoke connection of one instance: frames of [`guest`] both ways.
//!
//! The guest is hostile: a frame's length is checked before its bytes are waited for, the buffer
//! grows with the bytes that arrive and not with what a length claims, and output is passed on
//! with backpressure. What the function asks of services is bounded in number and size, and none of it
//! outlives the order that it was asked within.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
};

use bytes::{Buf, Bytes, BytesMut};
use firn_proto::guest::{self, Answer, Ask, Call, FromGuest, HttpReply, ToGuest};
use rustix::net::SendFlags;
use tokio::{
    net::UnixStream,
    task::{self, JoinSet},
};

use crate::{LogLine, Outlets, phases};

/// Bytes that one read may take.
const READ: usize = 256 * 1024;

/// Most bytes that wait for a guest that goes on to ask: one that keeps to the protocol has read all answers but
/// those of its open calls, and may have an order ahead of it.
const UNREAD: usize =
    guest::MAX_CALLS * (guest::MAX_CALL + guest::MAX_CALL_HEAD) + 2 * guest::MAX_FRAME;

/// Most segments of one invocation: short ones must not cost more than long ones.
const SEGMENTS: usize = 1024;

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
    outlets: Outlets,
    /// What is being found out for the function.
    calls: JoinSet<HttpReply>,
    /// The ids of these calls, and whose work they are.
    open: BTreeMap<u64, task::Id>,
    /// Segments of the invocation, and their bytes.
    segments: (Vec<Bytes>, usize),
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
            outlets: Outlets::default(),
            calls: JoinSet::new(),
            open: BTreeMap::new(),
            segments: (Vec::new(), 0),
            first_byte_ns: None,
        };
        Ok((stream, theirs.into()))
    }

    pub(crate) fn set_outlets(&mut self, outlets: Outlets) {
        self.outlets = outlets;
    }

    /// Ends this end; its output would have gone there.
    pub(crate) fn into_outlets(self) -> Outlets {
        self.outlets
    }

    /// The segments that have come since the last time.
    pub(crate) fn take_segments(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.segments).0
    }

    /// Queues a message, and sends at once as much as the socket takes. The rest goes out while
    /// [`Stream::next`] waits.
    pub(crate) fn queue(&mut self, message: &ToGuest) -> Result<(), StreamError> {
        self.queue_behind(&[], message)
    }

    /// The same with bytes for the VMM before it, in one piece.
    pub(crate) fn queue_behind(
        &mut self,
        first: &[u8],
        message: &ToGuest,
    ) -> Result<(), StreamError> {
        let mut frame = guest::encode(message).map_err(|e| StreamError::Protocol(e.to_string()))?;
        frame.splice(0..0, first.iter().copied());
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

    /// The next message that is neither output nor a call; output goes to the log on the way, and calls are
    /// answered. `None`: the connection is closed. Cancel-safe.
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
                Some(FromGuest::Call(call)) => self.begin_call(call)?,
                Some(FromGuest::Abandon) => self.abandon_calls()?,
                Some(FromGuest::Segment(segment)) => self.keep(segment)?,
                Some(message) => {
                    let goes_on = matches!(message, FromGuest::Begin(_) | FromGuest::Chunk(_));
                    if !goes_on && !self.open.is_empty() {
                        let open = self.open.len();
                        let message =
                            format!("an order is done while {open} of its calls are open");
                        return Err(StreamError::Protocol(message));
                    }
                    return Ok(Some(message));
                }
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
        if let Some(log) = &self.outlets.log
            && let Ok(room) = log.reserve().await
            && let Some(line) = self.line.take()
        {
            room.send(line);
        }
        // Nobody listens.
        self.line = None;
    }

    fn begin_call(&mut self, Call { id, ask }: Call) -> Result<(), StreamError> {
        let (head, body) = match &ask {
            Ask::Request(request) => (request.head_bytes(), request.body.len()),
            _ => (0, 0),
        };
        let within = |what: &str, size: usize, limit: usize| match size > limit {
            true => {
                Err(StreamError::Protocol(format!("{what} of {size} exceeds the limit of {limit}")))
            }
            false => Ok(()),
        };
        within("an unread backlog", self.unsent.len(), UNREAD)?;
        within("a number of calls", self.open.len() + 1, guest::MAX_CALLS)?;
        within("a call's head", head, guest::MAX_CALL_HEAD)?;
        within("a call's body", body, guest::MAX_CALL)?;
        if self.open.contains_key(&id) {
            return Err(StreamError::Protocol(format!("call {id} is open already")));
        }
        match &self.outlets.services {
            Some(services) => {
                self.open.insert(id, self.calls.spawn(services.call(ask)).id());
                Ok(())
            }
            None => self.queue(&ToGuest::Answer(Answer { id, reply: None })),
        }
    }

    /// Ends what is being found out: the guest waits for it no longer, but for word that it ended.
    fn abandon_calls(&mut self) -> Result<(), StreamError> {
        self.calls = JoinSet::new();
        for id in std::mem::take(&mut self.open).into_keys() {
            self.queue(&ToGuest::Answer(Answer { id, reply: None }))?;
        }
        Ok(())
    }

    fn answer(
        &mut self,
        ended: Result<(task::Id, HttpReply), task::JoinError>,
    ) -> Result<(), StreamError> {
        // One that panicked has been reported by its thread.
        let (task, reply) = match ended {
            Ok((task, reply)) => (task, Some(reply)),
            Err(error) => (error.id(), None),
        };
        let Some((&id, _)) = self.open.iter().find(|(_, found)| **found == task) else {
            return Ok(());
        };
        self.open.remove(&id);
        let reply = reply.filter(|reply| {
            reply.head_bytes() <= guest::MAX_CALL_HEAD && reply.body.len() <= guest::MAX_CALL
        });
        self.queue(&ToGuest::Answer(Answer { id, reply }))
    }

    /// Keeps a segment; what is over the limit of an invocation is dropped.
    fn keep(&mut self, segment: guest::Segment) -> Result<(), StreamError> {
        let size = segment.document.len();
        if size > guest::MAX_SEGMENT {
            let limit = guest::MAX_SEGMENT;
            let message = format!("segment of {size} bytes exceeds the limit of {limit}");
            return Err(StreamError::Protocol(message));
        }
        let (segments, bytes) = &mut self.segments;
        if *bytes + size <= guest::MAX_SEGMENTS && segments.len() < SEGMENTS {
            *bytes += size;
            segments.push(segment.document.into());
        }
        Ok(())
    }

    /// Reads or writes something, or answers a call; false at the end of the connection.
    async fn progress(&mut self) -> Result<bool, StreamError> {
        let result = tokio::select! {
            biased;
            Some(ended) = self.calls.join_next_with_id() => {
                self.answer(ended)?;
                return Ok(true);
            }
            // Before what is read: a guest that never stops to print must get its answers, too.
            ready = self.socket.writable(), if !self.unsent.is_empty() => match ready {
                Ok(()) => self.socket.try_write(&self.unsent).inspect(|count| {
                    self.unsent.advance(*count);
                }),
                Err(error) => Err(error),
            },
            ready = self.socket.readable() => match ready {
                Ok(()) => {
                    self.received.reserve(READ.min(8192.max(self.received.len())));
                    self.socket.try_read_buf(&mut self.received)
                }
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
    use std::{
        io::{Read, Write},
        pin::Pin,
        sync::Arc,
    };

    use firn_proto::guest::{Done, HttpRequest, Log, Outcome};
    use tokio::sync::mpsc;

    use super::*;
    use crate::Services;

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
        stream.set_outlets(Outlets { log: Some(sink), services: None });
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

    /// Repeats what it is asked, in its own time; `wait` is for ever, and `panic` one.
    #[derive(Debug)]
    struct Echo;

    impl Services for Echo {
        fn call(&self, ask: Ask) -> Pin<Box<dyn Future<Output = HttpReply> + Send>> {
            Box::pin(async move {
                let Ask::Request(request) = ask else { panic!("credentials") };
                match &request.body[..] {
                    b"wait" => std::future::pending().await,
                    b"panic" => panic!("as asked"),
                    b"long" => HttpReply {
                        status: 200,
                        fields: Vec::new(),
                        body: vec![0; guest::MAX_CALL + 1],
                    },
                    _ => HttpReply { status: 200, fields: request.fields, body: request.body },
                }
            })
        }
    }

    fn call(id: u64, body: &[u8]) -> FromGuest {
        let (method, target) = ("POST".into(), "/".into());
        let request = HttpRequest { method, target, fields: Vec::new(), body: body.to_vec() };
        FromGuest::Call(Call { id, ask: Ask::Request(request) })
    }

    fn served() -> (Stream, StdStream) {
        let (mut stream, theirs) = Stream::pair().unwrap();
        stream.set_outlets(Outlets { log: None, services: Some(Arc::new(Echo)) });
        (stream, StdStream::from(theirs))
    }

    /// What comes next to the guest: an answer's id, and its body.
    fn told(guest: &mut StdStream) -> (u64, Option<Vec<u8>>) {
        let mut prefix = [0; 4];
        guest.read_exact(&mut prefix).unwrap();
        let mut message = vec![0; guest::frame_length(prefix).unwrap()];
        guest.read_exact(&mut message).unwrap();
        match guest::decode_to_guest(&message).unwrap() {
            ToGuest::Answer(Answer { id, reply }) => (id, reply.map(|reply| reply.body)),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn calls_are_answered_while_an_answer_is_waited_for() {
        let (mut stream, mut guest) = served();
        let function = std::thread::spawn(move || {
            for (id, body) in [(7, "wait"), (8, "a"), (9, "panic"), (10, "long")] {
                guest.write_all(&frame(&call(id, body.as_bytes()))).unwrap();
            }
            let mut all = [told(&mut guest), told(&mut guest), told(&mut guest)];
            all.sort();
            assert_eq!(all, [(8, Some(b"a".to_vec())), (9, None), (10, None)]);
            guest.write_all(&frame(&FromGuest::Abandon)).unwrap();
            assert_eq!(told(&mut guest), (7, None));
            guest.write_all(&frame(&done(Vec::new()))).unwrap();
            guest
        });
        assert_eq!(stream.next().await.unwrap(), Some(done(Vec::new())));
        assert!(stream.is_quiet());
        let mut guest = function.join().unwrap();
        // Without services there is an answer, too.
        stream.set_outlets(Outlets::default());
        guest.write_all(&frame(&call(1, b"a"))).unwrap();
        guest.write_all(&frame(&done(Vec::new()))).unwrap();
        stream.next().await.unwrap();
        assert_eq!(told(&mut guest), (1, None));
    }

    #[tokio::test]
    async fn calls_outside_the_protocol_are_violations() {
        let head = |length: usize| HttpRequest {
            method: "GET".into(),
            target: "x".repeat(length),
            fields: Vec::new(),
            body: Vec::new(),
        };
        let head = FromGuest::Call(Call { id: 1, ask: Ask::Request(head(guest::MAX_CALL_HEAD)) });
        let crowd: Vec<FromGuest> =
            (0..=guest::MAX_CALLS as u64).map(|id| call(id, b"wait")).collect();
        let document = vec![0; guest::MAX_SEGMENT + 1];
        for (messages, why) in [
            (vec![call(1, b"wait"), done(Vec::new())], "while 1 of its calls"),
            (vec![call(1, b"wait"), FromGuest::Frozen], "while 1 of its calls"),
            (vec![call(1, b"wait"), call(1, b"wait")], "open already"),
            (vec![call(1, &[0; guest::MAX_CALL + 1])], "body of 1048577 exceeds"),
            (vec![head], "head of 32771 exceeds"),
            (crowd, "number of calls of 9 exceeds"),
            (vec![FromGuest::Segment(guest::Segment { document })], "segment of 65537 bytes"),
        ] {
            let (mut stream, mut guest) = served();
            let writer = std::thread::spawn(move || {
                for message in messages {
                    guest.write_all(&frame(&message)).unwrap();
                }
                guest
            });
            let found = stream.next().await;
            let Err(StreamError::Protocol(found)) = found else { panic!("{why}: {found:?}") };
            assert!(found.contains(why), "{found}");
            drop(writer.join());
        }
    }

    #[tokio::test]
    async fn answers_that_a_guest_does_not_read_are_bounded() {
        let (mut stream, mut guest) = served();
        let writer = std::thread::spawn(move || {
            // Each is answered, for there is time enough between them; no answer is read.
            for id in 0..64 {
                if guest.write_all(&frame(&call(id, &[b'x'; guest::MAX_CALL]))).is_err() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        let found = stream.next().await;
        let Err(StreamError::Protocol(found)) = found else { panic!("{found:?}") };
        assert!(found.contains("unread"), "{found}");
        drop(stream);
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn segments_are_kept_up_to_the_limit() {
        let (mut stream, mut guest) = served();
        std::thread::spawn(move || {
            for _ in 0..6 {
                let document = vec![b'x'; 60_000];
                guest.write_all(&frame(&FromGuest::Segment(guest::Segment { document }))).unwrap();
            }
            for _ in 0..2 * SEGMENTS {
                let document = Vec::new();
                guest.write_all(&frame(&FromGuest::Segment(guest::Segment { document }))).unwrap();
            }
            guest.write_all(&frame(&done(Vec::new()))).unwrap();
        });
        assert_eq!(stream.next().await.unwrap(), Some(done(Vec::new())));
        let segments = stream.take_segments();
        assert_eq!(segments.len(), SEGMENTS);
        assert_eq!(segments.iter().map(Bytes::len).sum::<usize>(), 240_000);
        assert!(stream.take_segments().is_empty());
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
