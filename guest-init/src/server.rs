//! The Runtime API's connections: HTTP/1.1 with keep-alive on loopback.
//!
//! One request of a connection is answered before the next is looked at (pipelined ones wait), and
//! a connection that does not take its answers is not read. A server lives as long as one runtime:
//! whatever an ended runtime left behind, accepted or not, ends with it.

use std::{
    borrow::Cow,
    io::{self, Read},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
};

use firn_proto::guest::{HttpReply, MAX_PAYLOAD};
use rustix::{
    io::ioctl_fionbio,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};

use crate::{
    http::{self, Fields, Found, Parser, Request},
    outbox::Outbox,
    runtime_api::streams,
};

/// Most connections at a time. A runtime needs one; its hooks and extensions a few more.
const MAX_CONNECTIONS: usize = 64;

/// Names a connection; never used twice by one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    status: u16,
    fields: Vec<(Cow<'static, str>, String)>,
    body: Vec<u8>,
}

impl Reply {
    /// Any answer.
    pub fn new<'a>(
        status: u16,
        fields: impl IntoIterator<Item = (&'static str, &'a str)>,
        body: Vec<u8>,
    ) -> Self {
        let fields = fields.into_iter().map(|(name, value)| (name.into(), value.to_owned()));
        Self { status, fields: fields.collect(), body }
    }

    /// What the host says.
    pub fn passed_on(HttpReply { status, fields, body }: HttpReply) -> Self {
        let fields = fields.into_iter().map(|(name, value)| (name.into(), value)).collect();
        Self { status, fields, body }
    }

    /// 202, as every accepted `POST` gets.
    pub fn accepted() -> Self {
        Self::json(202, b"{\"status\":\"OK\"}\n".to_vec())
    }

    /// 200 without a body.
    pub fn ok() -> Self {
        Self::new(200, [], Vec::new())
    }

    /// The API's error document. `kind` and `message` are ours: printable.
    pub fn error(status: u16, kind: &str, message: &str) -> Self {
        let message: String = message
            .chars()
            .map(|c| if c == '"' || c == '\\' || c.is_control() { '\'' } else { c })
            .collect();
        let body = format!("{{\"errorMessage\":\"{message}\",\"errorType\":\"{kind}\"}}\n");
        Self::json(status, body.into_bytes())
    }

    /// Its status.
    pub fn status(&self) -> u16 {
        self.status
    }

    fn json(status: u16, body: Vec<u8>) -> Self {
        Self::new(status, [("Content-Type", "application/json")], body)
    }
}

/// What has come in on a connection.
#[derive(Debug)]
pub enum Incoming {
    /// A request, whole.
    Request(Request),
    /// The head of a response that is streamed; its pieces follow.
    Head(Request),
    /// More of it, as much as was read at once.
    Piece {
        /// The bytes.
        bytes: Vec<u8>,
        /// Its trailers, if that was all of it; the connection waits for an answer then.
        end: Option<Fields>,
    },
}

/// How far a request is whose body is streamed.
#[derive(Debug)]
enum Streaming {
    /// Its pieces are given away.
    Passed,
    /// Its pieces are thrown away; this is the answer to it.
    Refused(Reply),
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    stream: TcpStream,
    parser: Parser,
    /// Bytes that arrived behind the request that is being answered.
    unread: Vec<u8>,
    out: Outbox,
    /// The request whose body is being streamed.
    streaming: Option<Streaming>,
    /// A request waits for its answer.
    waiting: bool,
    /// No more requests: close when `out` is empty.
    closing: bool,
    /// The request that waits was the client's last.
    last: bool,
}

impl Connection {
    /// Its name.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// What to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether to read it: no request waits, and its answers have been taken.
    pub fn wants_input(&self) -> bool {
        !self.waiting && !self.closing && self.out.is_empty() && self.unread.is_empty()
    }

    /// Whether reading it would tell something now.
    fn is_ready(&self) -> bool {
        let told = || match self.stream.peek(&mut [0]) {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        self.wants_input() && told()
    }

    /// Whether what it sends goes to the host as it comes.
    pub fn feeds_host(&self) -> bool {
        matches!(self.streaming, Some(Streaming::Passed))
    }

    /// Whether answers wait to be written.
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    fn send(&mut self, reply: Reply, close: bool) {
        let fields: Vec<(&str, &str)> =
            reply.fields.iter().map(|(name, value)| (&**name, value.as_str())).collect();
        self.out.push(http::reply_head(reply.status, &fields, reply.body.len(), close));
        self.out.push(reply.body);
        self.waiting = false;
        self.closing = close;
    }

    /// Parses what has been read, up to what is worth telling.
    fn parse(&mut self) -> Option<Incoming> {
        let unread = std::mem::take(&mut self.unread);
        let mut rest = unread.as_slice();
        let mut bytes = Vec::new();
        let incoming = loop {
            match self.parser.push(&mut rest) {
                Ok(Found::Nothing) => break None,
                Ok(Found::ExpectsContinue) => self.out.push(http::CONTINUE.to_vec()),
                Ok(Found::Request(request)) => {
                    self.waiting = true;
                    self.last = request.close;
                    break Some(Incoming::Request(*request));
                }
                Ok(Found::Head(request)) => {
                    self.streaming = Some(Streaming::Passed);
                    self.last = request.close;
                    break Some(Incoming::Head(*request));
                }
                Ok(Found::Piece(piece)) => {
                    if self.feeds_host() {
                        bytes.extend_from_slice(piece);
                    }
                }
                Ok(Found::End(trailers)) => match self.streaming.take() {
                    Some(Streaming::Refused(reply)) => {
                        self.send(reply, self.last);
                        if self.closing {
                            break None;
                        }
                    }
                    _ => {
                        self.waiting = true;
                        let bytes = std::mem::take(&mut bytes);
                        break Some(Incoming::Piece { bytes, end: Some(trailers) });
                    }
                },
                Err(error) => {
                    let reply = Reply::error(error.status(), "BadRequest", &error.to_string());
                    self.send(reply, true);
                    return None;
                }
            }
        };
        self.unread = rest.to_vec();
        match incoming {
            None if !bytes.is_empty() => Some(Incoming::Piece { bytes, end: None }),
            other => other,
        }
    }
}

/// The listener and its connections.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    connections: Vec<Connection>,
    next: u64,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// Whatever the kernel refuses.
    pub fn listen(address: SocketAddr) -> io::Result<Self> {
        // By hand because of the backlog and because the last server's connections may still be
        // in TIME_WAIT.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &address)?;
        listen(&socket, MAX_CONNECTIONS as i32)?;
        Ok(Self { listener: socket.into(), connections: Vec::new(), next: 0 })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Whatever the kernel refuses.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The listener, to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The connections, to poll.
    pub fn connections(&self) -> &[Connection] {
        &self.connections
    }

    /// Takes what has connected, and what it has said. Over the limit a connection is closed at once.
    pub fn accept(&mut self, scratch: &mut [u8]) {
        while let Ok((stream, _)) = self.listener.accept() {
            let ready = ioctl_fionbio(&stream, true).is_ok() && stream.set_nodelay(true).is_ok();
            if !ready || self.connections.len() >= MAX_CONNECTIONS {
                continue;
            }
            self.next += 1;
            self.connections.push(Connection {
                id: ConnectionId(self.next),
                stream,
                parser: Parser::new(MAX_PAYLOAD, streams),
                unread: Vec::new(),
                out: Outbox::default(),
                streaming: None,
                waiting: false,
                closing: false,
                last: false,
            });
            self.serve(ConnectionId(self.next), scratch, false);
        }
    }

    /// Writes and reads once. False if the connection is gone.
    pub fn serve(&mut self, id: ConnectionId, scratch: &mut [u8], hung_up: bool) -> bool {
        let Some(index) = self.connections.iter().position(|c| c.id == id) else { return true };
        let connection = &mut self.connections[index];
        let mut alive = connection.out.write_to(&connection.stream).is_ok();
        if alive && connection.closing && connection.out.is_empty() {
            alive = false;
        }
        if alive && connection.wants_input() {
            match connection.stream.read(scratch) {
                Ok(0) => alive = false,
                Ok(count) => connection.unread.extend_from_slice(&scratch[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => alive = false,
            }
        } else if hung_up {
            // Nobody is there to read the answer; and what poll reports again and again must end.
            alive = false;
        }
        if !alive {
            self.connections.swap_remove(index);
        }
        alive
    }

    /// Removes a connection whose client has gone away. True if it had.
    pub fn lost(&mut self, id: ConnectionId) -> bool {
        let Some(index) = self.connections.iter().position(|c| c.id == id) else { return true };
        let lost = match self.connections[index].stream.peek(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        if lost {
            self.connections.swap_remove(index);
        }
        lost
    }

    /// Whether a connection could be read now, or its end. Only of use when no writer is left.
    pub fn has_input(&self) -> bool {
        self.connections.iter().any(Connection::is_ready)
    }

    /// The next request that has arrived whole on any connection, or more of one that is streamed.
    ///
    /// A runtime need not wait until its response was taken before it asks for the next event on
    /// another connection: what is being streamed comes first, and what asks (`GET`) last.
    pub fn incoming(&mut self) -> Option<(ConnectionId, Incoming)> {
        if let Some(streaming) = self.connections.iter_mut().find(|c| c.feeds_host()) {
            if !streaming.unread.is_empty()
                && let Some(more) = streaming.parse()
            {
                return Some((streaming.id, more));
            }
            if streaming.is_ready() {
                return None;
            }
        }
        [false, true].into_iter().find_map(|asks| {
            self.connections
                .iter_mut()
                .filter(|c| !c.waiting && !c.closing && !c.unread.is_empty())
                .filter(|c| c.unread.starts_with(b"GET ") == asks)
                .find_map(|connection| Some((connection.id, connection.parse()?)))
        })
    }

    /// The rest of the request that is being streamed on a connection is thrown away, and then
    /// answered so.
    pub fn refuse(&mut self, id: ConnectionId, reply: Reply) {
        if let Some(connection) = self.connections.iter_mut().find(|c| c.id == id) {
            connection.streaming = Some(Streaming::Refused(reply));
        }
    }

    /// Answers the request that waits on a connection.
    pub fn reply(&mut self, id: ConnectionId, reply: Reply) {
        let Some(index) = self.connections.iter().position(|c| c.id == id) else { return };
        let connection = &mut self.connections[index];
        let close = connection.last;
        connection.send(reply, close);
        let failed = connection.out.write_to(&connection.stream).is_err();
        if failed || (close && connection.out.is_empty()) {
            self.connections.swap_remove(index);
        }
    }
}
