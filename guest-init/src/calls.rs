//! What the function asks of the host's services, on the port of the Runtime API: every path but those of
//! Lambda's own APIs in the guest.
//!
//! ```text
//!  request ─▶ parked ─── a task is open, and there is room ──▶ open ─▶ Call ─▶ host
//!                                                                │
//!  reply ◀──────────────── Answer, or the end of the task ◀──────┘
//! ```
//!
//! Calls belong to the host's order in which they are passed on: an order is answered when none is open. So a
//! paused guest waits for nothing, a snapshot has no half of a call in it, and a request that comes between two
//! orders is passed on with the next one. This module decides and remembers; it does no I/O.

use std::collections::{BTreeMap, VecDeque};

use firn_proto::guest::{Answer, Ask, Call, HttpRequest, MAX_CALL, MAX_CALL_HEAD, MAX_CALLS};

use crate::{
    http::{Body, Fields, Request},
    server::{ConnectionId, Reply},
};

/// Where AWS's SDKs ask for the role's credentials, as in Lambda where it takes snapshots.
pub const CREDENTIALS: &str = "/2021-04-23/credentials";

/// Beginnings of paths that are answered in the guest, or not at all: the Runtime API, the Extensions API and
/// the Telemetry API.
const OWN: [&str; 3] = ["/2018-06-01/", "/2020-01-01/", "/2022-07-01/"];

/// Fields of a request that concern its connection only.
const HOP_BY_HOP: [&str; 5] =
    ["connection", "content-length", "expect", "keep-alive", "transfer-encoding"];

/// Whether a request with this path is for the host.
pub fn is_call(path: &str) -> bool {
    !OWN.iter().any(|own| path.starts_with(own))
}

/// What a request asks of the host. Who wants credentials must know `token`: a function that can be made to
/// fetch a URL must not give them away.
///
/// # Errors
/// The answer to what is no call.
pub fn judge(request: Request, token: &str) -> Result<Ask, Reply> {
    if request.path == CREDENTIALS {
        return match (&*request.method, request.headers.get("authorization")) {
            ("GET", Some(given)) if given == token => Ok(Ask::Credentials),
            ("GET", _) => Err(Reply::error(403, "AccessDenied", "Wrong authorization token")),
            _ => Err(Reply::error(405, "MethodNotAllowed", "Use GET for this path")),
        };
    }
    let Request { method, path, query, headers, body, .. } = request;
    let target = match query {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    let too_large = |size: u64, limit: usize, what: &str| {
        let message =
            format!("{what} of a request to a service has at most {limit} bytes, not {size}");
        Err(Reply::error(413, "RequestEntityTooLarge", &message))
    };
    let body = match body {
        Body::Whole(body) if body.len() <= MAX_CALL => body,
        Body::Whole(body) => return too_large(body.len() as u64, MAX_CALL, "The body"),
        Body::TooLarge { size } => return too_large(size, MAX_CALL, "The body"),
    };
    let request = HttpRequest { method, target, fields: passed_on(&headers), body };
    match request.head_bytes() {
        size if size > MAX_CALL_HEAD => too_large(size as u64, MAX_CALL_HEAD, "The head"),
        _ => Ok(Ask::Request(request)),
    }
}

fn passed_on(headers: &Fields) -> Vec<(String, String)> {
    let hop = |name: &str| HOP_BY_HOP.iter().any(|hop| name.eq_ignore_ascii_case(hop));
    let fields = headers.iter().filter(|(name, _)| !hop(name));
    fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Which calls wait for what.
#[derive(Debug, Default)]
pub struct Calls {
    parked: VecDeque<(ConnectionId, Ask)>,
    /// By id; `None` where nobody waits for the answer any more.
    open: BTreeMap<u64, Option<ConnectionId>>,
    last: u64,
}

impl Calls {
    /// A connection waits for the answer to this.
    pub fn park(&mut self, connection: ConnectionId, ask: Ask) {
        self.parked.push_back((connection, ask));
    }

    /// The next call to pass on, if one may be.
    pub fn pass_on(&mut self) -> Option<Call> {
        if self.open.len() >= MAX_CALLS {
            return None;
        }
        let (connection, ask) = self.parked.pop_front()?;
        self.last += 1;
        self.open.insert(self.last, Some(connection));
        Some(Call { id: self.last, ask })
    }

    /// Whether the host owes an answer.
    pub fn are_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// The host has answered: what to tell to whom.
    pub fn answered(&mut self, answer: Answer) -> Option<(ConnectionId, Reply)> {
        let connection = self.open.remove(&answer.id)??;
        let reply = match answer.reply {
            Some(reply) => Reply::passed_on(reply),
            None => Reply::error(503, "ServiceUnavailable", "The call was interrupted; try again"),
        };
        Some((connection, reply))
    }

    /// A connection is gone.
    pub fn closed(&mut self, connection: ConnectionId) {
        self.parked.retain(|(waiting, _)| *waiting != connection);
        for waiting in self.open.values_mut().filter(|waiting| **waiting == Some(connection)) {
            *waiting = None;
        }
    }

    /// All connections are gone. The ids of others may be the same.
    pub fn all_closed(&mut self) {
        self.parked.clear();
        self.open.values_mut().for_each(|waiting| *waiting = None);
    }
}

#[cfg(test)]
mod tests {
    use firn_proto::guest::HttpReply;

    use super::*;
    use crate::http::{Found, Parser};

    fn request(text: &str) -> Request {
        let mut parser = Parser::new(2 * MAX_CALL, |_| false);
        match parser.push(&mut text.as_bytes()) {
            Ok(Found::Request(request)) => *request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_passed_on_without_what_is_the_connections() {
        let text = "POST /a/b?c=d&e HTTP/1.1\r\nHost: h\r\nX-Amz-Target: t\r\nConnection: close\r\n\
                    Content-Length: 2\r\n\r\n{}";
        let Ok(Ask::Request(found)) = judge(request(text), "t") else { panic!() };
        assert_eq!(
            (&*found.method, &*found.target, &*found.body),
            ("POST", "/a/b?c=d&e", &b"{}"[..])
        );
        let field = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(found.fields, [field("Host", "h"), field("X-Amz-Target", "t")]);
        for (path, call) in [
            ("/", true),
            (CREDENTIALS, true),
            ("/2015-03-31/functions", true),
            ("/2018-06-01/runtime/x", false),
            ("/2020-01-01/extension/register", false),
            ("/2022-07-01/telemetry", false),
        ] {
            assert_eq!(is_call(path), call, "{path}");
        }
    }

    #[test]
    fn credentials_are_for_those_who_know_the_token() {
        let ask = |method: &str, fields: &str| {
            let text = format!("{method} {CREDENTIALS} HTTP/1.1\r\n{fields}\r\n");
            judge(request(&text), "right").map_err(|reply| reply.status())
        };
        assert_eq!(ask("GET", "Authorization: right\r\n"), Ok(Ask::Credentials));
        assert_eq!(ask("GET", "Authorization: wrong\r\n"), Err(403));
        assert_eq!(ask("GET", ""), Err(403));
        assert_eq!(ask("POST", "Authorization: right\r\n"), Err(405));
    }

    #[test]
    fn what_is_too_large_is_refused_here() {
        let body = |length: usize| {
            let text = format!("POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
            judge(request(&(text + &"x".repeat(length))), "").map(drop)
        };
        assert_eq!(body(MAX_CALL), Ok(()));
        for length in [MAX_CALL + 1, 2 * MAX_CALL + 1] {
            assert_eq!(body(length).unwrap_err().status(), 413);
        }
        let text = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_CALL_HEAD));
        assert_eq!(judge(request(&text), "").unwrap_err().status(), 413);
    }

    #[test]
    fn calls_are_bounded_and_answered_once() {
        let mut calls = Calls::default();
        for connection in 0..10 {
            calls.park(ConnectionId(connection), Ask::Credentials);
        }
        calls.closed(ConnectionId(1));
        let ids: Vec<u64> = std::iter::from_fn(|| calls.pass_on()).map(|call| call.id).collect();
        assert_eq!(ids.len(), MAX_CALLS);
        calls.closed(ConnectionId(2));
        let mut answer = |id, reply| calls.answered(Answer { id, reply });
        let reply = HttpReply { status: 200, fields: Vec::new(), body: b"x".to_vec() };
        let (connection, found) = answer(ids[0], Some(reply)).unwrap();
        assert_eq!((connection, found.status()), (ConnectionId(0), 200));
        assert_eq!(answer(ids[0], None), None);
        assert_eq!(answer(ids[1], None), None, "nobody waits for it");
        assert_eq!(answer(ids[2], None).unwrap().1.status(), 503);
        assert_eq!(calls.pass_on().map(|call| call.id), Some(ids[7] + 1), "there is room again");
        calls.all_closed();
        assert!(calls.are_open() && calls.pass_on().is_none());
        for id in ids {
            assert_eq!(calls.answered(Answer { id, reply: None }), None);
        }
        assert_eq!(calls.answered(Answer { id: 9, reply: None }), None);
        assert!(!calls.are_open());
    }
}
