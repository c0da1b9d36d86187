//! The Lambda Runtime API, version 2018-06-01: its routes, and what a runtime may ask when.
//!
//! ```text
//!            init/error              restore/error
//!      ┌──────────────▶ Failed ◀──────────────┐
//!      │                                      │
//!   Starting ──restore/next──▶ AtRestore ─▶ Restoring        (only if initialised for a snapshot)
//!      │                                      │
//!      └───────────invocation/next────────────┤
//!                                             ▼
//!              ┌────invocation/next────────▶ Idle ──event──▶ Busy
//!           Between ◀──────────response, error─────────────────┤
//!              ▲                                               │ a response that is streamed
//!              ├──────────its end────────────────── Streaming ◀┘
//!              └──error, invocation/next──── Broken ◀──┘ its connection is lost
//! ```
//!
//! This module decides and remembers; it does no I/O. The runtime is the function's own code:
//! whatever it asks, the answer is one of those here, and the state stays one of those here.

use base64::Engine as _;
use firn_proto::guest::{FunctionError, Invoke, MAX_CONTENT_TYPE, Outcome};

use crate::{
    http::{Body, Fields, Request},
    server::{ConnectionId, Reply},
};

/// Most bytes of a response that is not streamed.
const MAX_PAYLOAD: u64 = firn_proto::guest::MAX_PAYLOAD as u64;

const ROOT: &str = "/2018-06-01/runtime/";

const MODE: &str = "lambda-runtime-function-response-mode";

/// Longest error type that is passed on.
const MAX_ERROR_TYPE: usize = 256;

/// Where a runtime stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Initialises.
    Starting,
    /// Waits in `restore/next` to be snapshotted and thawed.
    AtRestore(ConnectionId),
    /// Runs its restore hooks.
    Restoring,
    /// Waits in `invocation/next`.
    Idle(ConnectionId),
    /// Has an event.
    Busy {
        /// Of the event.
        request_id: String,
    },
    /// Streams its response.
    Streaming {
        /// Of the event.
        request_id: String,
        /// Where the response comes from.
        connection: ConnectionId,
    },
    /// Has lost the connection that it streamed its response on.
    Broken {
        /// Of the event.
        request_id: String,
    },
    /// Has answered, or lost its connection while it waited, and will ask for the next event.
    Between {
        /// Of the event that it answered.
        last: Option<String>,
    },
    /// Has said that it failed, and will end.
    Failed(FunctionError),
}

/// What a request means to the rest of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The runtime now waits for an event; the connection gets its answer later.
    AsksForEvent,
    /// The runtime now waits to be restored; the connection gets its answer later.
    AsksForRestore,
    /// The runtime has answered the event that it had.
    Answered(Outcome),
    /// The runtime gave up.
    Failed,
}

/// The API's side of one runtime.
#[derive(Debug)]
pub struct RuntimeApi {
    state: State,
    restores: bool,
}

/// Whether the body of a request with this head is to be passed on as it comes.
pub fn streams(head: &Request) -> bool {
    head.path.ends_with("/response")
        && head.headers.get(MODE).is_some_and(|mode| mode.eq_ignore_ascii_case("streaming"))
}

enum Route<'a> {
    Next,
    Response(&'a str),
    Error(&'a str),
    InitError,
    RestoreNext,
    RestoreError,
}

impl RuntimeApi {
    /// `restores`: the runtime is initialised for a snapshot.
    pub fn new(restores: bool) -> Self {
        Self { state: State::Starting, restores }
    }

    /// Where the runtime stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Judges one request. Without a reply the connection waits.
    pub fn handle(
        &mut self,
        from: ConnectionId,
        request: Request,
    ) -> (Option<Reply>, Option<Event>) {
        let path = request.path.clone();
        let route = match route(&request.method, &path) {
            Ok(route) => route,
            Err(reply) => return (Some(reply), None),
        };
        match route {
            Route::Next => match self.state {
                State::Starting
                | State::Restoring
                | State::Between { .. }
                | State::Broken { .. } => {
                    self.state = State::Idle(from);
                    (None, Some(Event::AsksForEvent))
                }
                _ => (Some(self.forbidden("invocation/next")), None),
            },
            Route::RestoreNext => match self.state {
                State::Starting if self.restores => {
                    self.state = State::AtRestore(from);
                    (None, Some(Event::AsksForRestore))
                }
                _ => (Some(self.forbidden("restore/next")), None),
            },
            Route::InitError => self.failed(request, "init/error", State::Starting),
            Route::RestoreError => self.failed(request, "restore/error", State::Restoring),
            Route::Response(id) => match self.check_id(id) {
                Err(reply) => (Some(reply), None),
                Ok(()) => self.response(request),
            },
            Route::Error(id) => match self.check_id(id) {
                Err(reply) if !self.broke(id) => (Some(reply), None),
                _ => {
                    let (outcome, reply) = match reported(request) {
                        Ok(error) => (Outcome::Error(error), Reply::accepted()),
                        Err(size) => too_large(size, MAX_PAYLOAD),
                    };
                    self.answered(outcome, reply)
                }
            },
        }
    }

    /// Judges the head of a response that is to be streamed: its content type, or the answer for
    /// when the rest has been thrown away.
    ///
    /// # Errors
    /// That answer.
    pub fn begin(&mut self, from: ConnectionId, head: &Request) -> Result<String, Reply> {
        match route(&head.method, &head.path)? {
            Route::Response(id) => self.check_id(id)?,
            _ => return Err(Reply::error(400, "InvalidRequest", "Only responses are streamed")),
        }
        let request_id = self.take_id().unwrap_or_default();
        self.state = State::Streaming { request_id, connection: from };
        Ok(content_type(head))
    }

    /// The streamed response has ended, with these trailers.
    pub fn end(&mut self, trailers: &Fields) -> (Reply, Outcome) {
        self.state = State::Between { last: self.take_id() };
        let outcome = match streamed_error(trailers) {
            Some(error) => Outcome::Error(error),
            None => Outcome::Streamed,
        };
        (Reply::accepted(), outcome)
    }

    /// The streamed response has grown to `size` bytes, over the limit.
    pub fn cut(&mut self, size: u64) -> (Reply, Outcome) {
        self.state = State::Between { last: self.take_id() };
        let (outcome, reply) = too_large(size, firn_proto::guest::MAX_STREAM);
        (reply, outcome)
    }

    /// Gives an idle runtime its event: the connection to answer on.
    pub fn hand_out(&mut self, request_id: &str) -> Option<ConnectionId> {
        let State::Idle(connection) = self.state else { return None };
        self.state = State::Busy { request_id: request_id.to_owned() };
        Some(connection)
    }

    /// Lets a runtime that waits to be restored go on: the connection to answer on.
    pub fn release(&mut self) -> Option<ConnectionId> {
        let State::AtRestore(connection) = self.state else { return None };
        self.state = State::Restoring;
        Some(connection)
    }

    /// A connection is gone; if the runtime waited on it, it does no more.
    pub fn closed(&mut self, connection: ConnectionId) {
        match self.state {
            State::Idle(waiting) if waiting == connection => {
                self.state = State::Between { last: None };
            }
            State::AtRestore(waiting) if waiting == connection => self.state = State::Starting,
            State::Streaming { connection: streaming, .. } if streaming == connection => {
                self.state = State::Broken { request_id: self.take_id().unwrap_or_default() };
            }
            _ => {}
        }
    }

    fn response(&mut self, request: Request) -> (Option<Reply>, Option<Event>) {
        match request.headers.get(MODE) {
            None => {}
            Some(mode) if mode.eq_ignore_ascii_case("streaming") => {}
            Some(mode) => {
                let message = format!("Response mode must be streaming or absent, not {mode:?}");
                return (Some(Reply::error(400, "InvalidFunctionResponseMode", &message)), None);
            }
        }
        let content_type = content_type(&request);
        let (outcome, reply) = match (streamed_error(&request.trailers), request.body) {
            (Some(error), _) => (Outcome::Error(error), Reply::accepted()),
            (None, Body::TooLarge { size }) => too_large(size, MAX_PAYLOAD),
            (None, Body::Whole(payload)) => {
                (Outcome::Response { payload, content_type }, Reply::accepted())
            }
        };
        self.answered(outcome, reply)
    }

    fn answered(&mut self, outcome: Outcome, reply: Reply) -> (Option<Reply>, Option<Event>) {
        self.state = State::Between { last: self.take_id() };
        (Some(reply), Some(Event::Answered(outcome)))
    }

    /// Takes the id of the event that the runtime has out of the state, which is about to change.
    fn take_id(&mut self) -> Option<String> {
        match &mut self.state {
            State::Busy { request_id }
            | State::Streaming { request_id, .. }
            | State::Broken { request_id } => Some(std::mem::take(request_id)),
            _ => None,
        }
    }

    fn broke(&self, id: &str) -> bool {
        matches!(&self.state, State::Broken { request_id } if request_id == id)
    }

    fn failed(
        &mut self,
        request: Request,
        call: &str,
        in_state: State,
    ) -> (Option<Reply>, Option<Event>) {
        if self.state != in_state {
            return (Some(self.forbidden(call)), None);
        }
        match reported(request) {
            Ok(error) => {
                self.state = State::Failed(error);
                (Some(Reply::accepted()), Some(Event::Failed))
            }
            Err(size) => (Some(too_large(size, MAX_PAYLOAD).1), None),
        }
    }

    fn check_id(&self, id: &str) -> Result<(), Reply> {
        match &self.state {
            State::Busy { request_id } if request_id == id => Ok(()),
            State::Between { last: Some(last) }
            | State::Streaming { request_id: last, .. }
            | State::Broken { request_id: last }
                if last == id =>
            {
                Err(self.forbidden("a second answer"))
            }
            _ => Err(Reply::error(400, "InvalidRequestID", "Invalid request ID")),
        }
    }

    fn forbidden(&self, call: &str) -> Reply {
        let state = match self.state {
            State::Starting if !self.restores => "it initialises, and not for a snapshot",
            State::Starting => "it initialises",
            State::AtRestore(_) => "it already waits for its restore",
            State::Restoring => "it runs its restore hooks",
            State::Idle(_) => "it already waits for an event",
            State::Busy { .. } => "it has an event to answer",
            State::Streaming { .. } => "it streams its response",
            State::Broken { .. } => "the stream of its response broke off",
            State::Between { .. } => "it has no event",
            State::Failed(_) => "it reported that it failed",
        };
        let message = format!("State transition is not allowed: {call} while {state}");
        Reply::error(403, "InvalidStateTransition", &message)
    }
}

fn route<'a>(method: &str, path: &'a str) -> Result<Route<'a>, Reply> {
    let unknown = || Reply::error(404, "NotFound", "No such path in the Runtime API");
    let rest = path.strip_prefix(ROOT).ok_or_else(unknown)?;
    let (wanted, route) = match rest {
        "invocation/next" => ("GET", Route::Next),
        "init/error" => ("POST", Route::InitError),
        "restore/next" => ("GET", Route::RestoreNext),
        "restore/error" => ("POST", Route::RestoreError),
        rest => {
            let rest = rest.strip_prefix("invocation/").ok_or_else(unknown)?;
            match rest.split_once('/').ok_or_else(unknown)? {
                ("", _) => return Err(unknown()),
                (id, "response") => ("POST", Route::Response(id)),
                (id, "error") => ("POST", Route::Error(id)),
                _ => return Err(unknown()),
            }
        }
    };
    if method == wanted {
        Ok(route)
    } else {
        Err(Reply::error(405, "MethodNotAllowed", &format!("Use {wanted} for this path")))
    }
}

/// `(Runtime|Function)\.[A-Z][a-zA-Z]+`, else empty.
fn error_type(given: Option<&str>) -> String {
    let given = given.unwrap_or_default().trim();
    let name = given.strip_prefix("Runtime.").or_else(|| given.strip_prefix("Function."));
    let fits = |name: &str| {
        name.len() > 1
            && name.starts_with(|c: char| c.is_ascii_uppercase())
            && name.bytes().all(|b| b.is_ascii_alphabetic())
    };
    match name {
        Some(name) if given.len() <= MAX_ERROR_TYPE && fits(name) => given.to_owned(),
        _ => String::new(),
    }
}

/// An error as the runtime posted it, or its size if that is over the limit.
fn reported(request: Request) -> Result<FunctionError, u64> {
    let error_type = error_type(request.headers.get("lambda-runtime-function-error-type"));
    match request.body {
        Body::Whole(payload) => Ok(FunctionError::Reported { error_type, payload }),
        Body::TooLarge { size } => Err(size),
    }
}

/// An error that a streaming runtime found after it had begun to answer. Its body is base64 in
/// AWS's own runtimes; one that is not is passed on as it is.
fn streamed_error(trailers: &Fields) -> Option<FunctionError> {
    let given = trailers.get("lambda-runtime-function-error-type")?;
    let body = trailers.get("lambda-runtime-function-error-body").unwrap_or_default();
    let payload = base64::engine::general_purpose::STANDARD
        .decode(body.trim())
        .unwrap_or_else(|_| body.as_bytes().to_vec());
    Some(FunctionError::Reported { error_type: error_type(Some(given)), payload })
}

/// What a response means whose connection was lost before its end, to a runtime that goes on.
pub fn truncated() -> FunctionError {
    let payload = br#"{"errorType":"Runtime.TruncatedResponse","errorMessage":"The streamed response broke off before its end"}"#;
    let error_type = "Runtime.TruncatedResponse".to_owned();
    FunctionError::Reported { error_type, payload: payload.to_vec() }
}

/// `Content-Type` of a response; empty if there is none, or too much of it.
fn content_type(response: &Request) -> String {
    let given = response.headers.get("content-type").unwrap_or_default();
    if given.len() > MAX_CONTENT_TYPE { String::new() } else { given.to_owned() }
}

fn too_large(size: u64, limit: u64) -> (Outcome, Reply) {
    let message = format!(
        "Exceeded maximum allowed payload size ({limit} bytes): the response has {size} bytes"
    );
    (
        Outcome::Error(FunctionError::ResponseTooLarge { size }),
        Reply::error(413, "RequestEntityTooLarge", &message),
    )
}

/// The answer to `invocation/next`; takes the payload out of `invoke`.
pub fn event_reply(invoke: &mut Invoke) -> Reply {
    let payload = std::mem::take(&mut invoke.payload);
    let deadline = invoke.deadline_ms.to_string();
    let fields = [
        ("Content-Type", "application/json"),
        ("Lambda-Runtime-Aws-Request-Id", invoke.request_id.as_str()),
        ("Lambda-Runtime-Deadline-Ms", deadline.as_str()),
        ("Lambda-Runtime-Invoked-Function-Arn", invoke.function_arn.as_str()),
        ("Lambda-Runtime-Trace-Id", invoke.trace_id.as_str()),
        ("Lambda-Runtime-Client-Context", invoke.client_context.as_str()),
        ("Lambda-Runtime-Cognito-Identity", invoke.cognito_identity.as_str()),
    ];
    Reply::new(200, fields.into_iter().filter(|(_, value)| !value.is_empty()), payload)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http::{Found, Parser};

    fn request(text: &str) -> Request {
        match Parser::new(50, |_| false).push(&mut text.as_bytes()).unwrap() {
            Found::Request(request) => *request,
            other => panic!("{other:?} in {text:?}"),
        }
    }

    fn call(api: &mut RuntimeApi, method: &str, path: &str) -> (u16, Option<Event>) {
        post(api, method, path, "", "{}")
    }

    fn post(
        api: &mut RuntimeApi,
        method: &str,
        path: &str,
        fields: &str,
        body: &str,
    ) -> (u16, Option<Event>) {
        let text = format!(
            "{method} {ROOT}{path} HTTP/1.1\r\n{fields}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let (reply, event) = api.handle(ConnectionId(1), request(&text));
        (reply.map_or(0, |reply| reply.status()), event)
    }

    fn busy() -> RuntimeApi {
        let mut api = RuntimeApi::new(false);
        assert_eq!(call(&mut api, "GET", "invocation/next"), (0, Some(Event::AsksForEvent)));
        assert_eq!(api.hand_out("r1"), Some(ConnectionId(1)));
        api
    }

    #[test]
    fn an_event_is_answered_once() {
        let mut api = busy();
        assert_eq!(call(&mut api, "POST", "invocation/r2/response").0, 400);
        assert_eq!(call(&mut api, "GET", "invocation/next").0, 403);
        let (status, event) =
            post(&mut api, "POST", "invocation/r1/response", "Content-Type: a/b\r\n", "[1]");
        assert_eq!(status, 202);
        let outcome =
            Outcome::Response { payload: b"[1]".to_vec(), content_type: "a/b".to_owned() };
        assert_eq!(event, Some(Event::Answered(outcome)));
        assert_eq!(call(&mut api, "POST", "invocation/r1/response"), (403, None));
        assert_eq!(call(&mut api, "POST", "invocation/r1/error"), (403, None));
        assert_eq!(call(&mut api, "POST", "init/error"), (403, None));
        assert_eq!(call(&mut api, "GET", "invocation/next").0, 0);
        assert_eq!(call(&mut api, "POST", "invocation/r1/response"), (400, None));
        assert_eq!(api.hand_out("r2"), Some(ConnectionId(1)));
    }

    #[test]
    fn error_types_are_checked() {
        for (given, kept) in [
            ("Runtime.ExitError", "Runtime.ExitError"),
            ("Function.Foo", "Function.Foo"),
            ("Function.foo", ""),
            ("Function.F", ""),
            ("Function.F1", ""),
            ("Other.Foo", ""),
            ("Runtime.", ""),
        ] {
            let fields = format!("Lambda-Runtime-Function-Error-Type: {given}\r\n");
            let event = post(&mut busy(), "POST", "invocation/r1/error", &fields, "{}").1;
            let error =
                FunctionError::Reported { error_type: kept.to_owned(), payload: b"{}".to_vec() };
            assert_eq!(event, Some(Event::Answered(Outcome::Error(error))), "{given}");
        }
    }

    #[test]
    fn long_answers_end_the_event() {
        let long = "x".repeat(51);
        let (status, event) = post(&mut busy(), "POST", "invocation/r1/response", "", &long);
        let error = Outcome::Error(FunctionError::ResponseTooLarge { size: 51 });
        assert_eq!((status, event), (413, Some(Event::Answered(error))));
    }

    #[test]
    fn response_modes() {
        let mode = |mode: &str| format!("Lambda-Runtime-Function-Response-Mode: {mode}\r\n");
        let mut api = busy();
        let path = "invocation/r1/response";
        assert_eq!(post(&mut api, "POST", path, &mode("buffered"), ""), (400, None));
        assert_eq!(post(&mut api, "POST", path, &mode("streaming"), "").0, 202);
    }

    #[test]
    fn an_error_in_the_trailers_wins() {
        let text = format!(
            "POST {ROOT}invocation/r1/response HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
             2\r\nhi\r\n0\r\nLambda-Runtime-Function-Error-Type: Function.Oops\r\n\
             Lambda-Runtime-Function-Error-Body: e30=\r\n\r\n"
        );
        let (_, event) = busy().handle(ConnectionId(1), request(&text));
        let error =
            FunctionError::Reported { error_type: "Function.Oops".into(), payload: b"{}".to_vec() };
        assert_eq!(event, Some(Event::Answered(Outcome::Error(error))));
    }

    fn streaming() -> RuntimeApi {
        let mut api = busy();
        let head =
            format!("POST {ROOT}invocation/r1/response HTTP/1.1\r\nContent-Type: a/b\r\n\r\n");
        assert_eq!(api.begin(ConnectionId(2), &request(&head)), Ok("a/b".to_owned()));
        api
    }

    #[test]
    fn a_streamed_response_is_the_only_one() {
        let mut api = streaming();
        for path in ["invocation/r1/response", "invocation/r1/error"] {
            assert_eq!(call(&mut api, "POST", path), (403, None), "{path}");
        }
        assert_eq!(call(&mut api, "GET", "invocation/next").0, 403);
        let head = request(&format!("POST {ROOT}invocation/r1/response HTTP/1.1\r\n\r\n"));
        assert_eq!(api.begin(ConnectionId(3), &head).unwrap_err().status(), 403);
        api.closed(ConnectionId(1));
        assert!(matches!(api.state(), State::Streaming { .. }), "another connection's end");
        let (reply, outcome) = api.end(&Fields::default());
        assert_eq!((reply.status(), outcome), (202, Outcome::Streamed));
        assert_eq!(api.begin(ConnectionId(3), &head).unwrap_err().status(), 403);
        assert_eq!(call(&mut api, "GET", "invocation/next").0, 0);
        assert_eq!(api.begin(ConnectionId(3), &head).unwrap_err().status(), 400);
    }

    #[test]
    fn only_responses_begin() {
        for (path, status) in
            [("invocation/r2/response", 400), ("invocation/r1/error", 400), ("x/response", 404)]
        {
            let head = request(&format!("POST {ROOT}{path} HTTP/1.1\r\n\r\n"));
            let mut api = busy();
            assert_eq!(api.begin(ConnectionId(2), &head).unwrap_err().status(), status, "{path}");
            assert!(matches!(api.state(), State::Busy { .. }));
        }
    }

    #[test]
    fn after_a_stream_that_broke_the_runtime_may_say_why_or_go_on() {
        let mut api = streaming();
        api.closed(ConnectionId(2));
        assert_eq!(call(&mut api, "POST", "invocation/r1/response"), (403, None));
        assert_eq!(call(&mut api, "POST", "invocation/r2/error").0, 400);
        let (status, event) = call(&mut api, "POST", "invocation/r1/error");
        assert_eq!(status, 202);
        assert!(matches!(event, Some(Event::Answered(Outcome::Error(_)))));

        let mut api = streaming();
        api.closed(ConnectionId(2));
        assert_eq!(call(&mut api, "GET", "invocation/next"), (0, Some(Event::AsksForEvent)));
    }

    #[test]
    fn a_stream_over_the_limit_is_answered_once() {
        let mut api = streaming();
        let (reply, outcome) = api.cut(7);
        assert_eq!(reply.status(), 413);
        assert_eq!(outcome, Outcome::Error(FunctionError::ResponseTooLarge { size: 7 }));
        assert_eq!(call(&mut api, "POST", "invocation/r1/response"), (403, None));
    }

    #[test]
    fn paths_and_methods() {
        let mut api = RuntimeApi::new(false);
        for path in ["x", "invocation/", "invocation//error", "invocation/a/b", "invocation/a/b/c"]
        {
            assert_eq!(call(&mut api, "GET", path), (404, None), "{path}");
        }
        for path in ["invocation/next", "restore/next"] {
            assert_eq!(call(&mut api, "POST", path), (405, None), "{path}");
        }
        for path in ["invocation/r/response", "invocation/r/error", "init/error", "restore/error"] {
            assert_eq!(call(&mut api, "GET", path), (405, None), "{path}");
        }
        let (reply, _) = api.handle(ConnectionId(1), request("GET /other HTTP/1.1\r\n\r\n"));
        assert_eq!(reply.unwrap().status(), 404);
    }

    #[test]
    fn restoring() {
        let mut api = RuntimeApi::new(false);
        assert_eq!(call(&mut api, "GET", "restore/next"), (403, None));
        let mut api = RuntimeApi::new(true);
        assert_eq!(call(&mut api, "POST", "restore/error"), (403, None));
        assert_eq!(call(&mut api, "GET", "restore/next"), (0, Some(Event::AsksForRestore)));
        assert_eq!(call(&mut api, "GET", "invocation/next"), (403, None));
        assert_eq!(api.release(), Some(ConnectionId(1)));
        assert_eq!(call(&mut api, "POST", "restore/error"), (202, Some(Event::Failed)));
        assert_eq!(call(&mut api, "GET", "invocation/next"), (403, None));
    }

    #[test]
    fn a_lost_connection_waits_no_more() {
        let mut api = RuntimeApi::new(true);
        call(&mut api, "GET", "restore/next");
        api.closed(ConnectionId(2));
        assert_eq!(*api.state(), State::AtRestore(ConnectionId(1)));
        api.closed(ConnectionId(1));
        assert_eq!(call(&mut api, "GET", "invocation/next").0, 0);
        api.closed(ConnectionId(1));
        assert_eq!(api.hand_out("r"), None);
        assert_eq!(call(&mut api, "GET", "invocation/next").0, 0);
    }

    proptest! {
        /// Whatever a runtime asks in whatever order: a connection waits if and only if the state
        /// says so, and an event is answered at most once.
        #[test]
        fn any_order(calls in proptest::collection::vec((0..8_u8, 0..3_u64), 0..60)) {
            let mut api = RuntimeApi::new(true);
            let mut open = 0;
            for (which, connection) in calls {
                let path = match which {
                    0 => "GET", _ => "POST",
                };
                let (method, path) = match which {
                    0 => (path, "invocation/next"),
                    1 => ("GET", "restore/next"),
                    2 => (path, "init/error"),
                    3 => (path, "restore/error"),
                    4 => (path, "invocation/r/response"),
                    5 => (path, "invocation/r/error"),
                    6 => { open += u32::from(api.hand_out("r").is_some()); continue }
                    _ => { api.release(); continue }
                };
                let text = format!("{method} {ROOT}{path} HTTP/1.1\r\n\r\n");
                let (reply, event) = api.handle(ConnectionId(connection), request(&text));
                let waits = matches!(event, Some(Event::AsksForEvent | Event::AsksForRestore));
                prop_assert_eq!(reply.is_none(), waits);
                if let Some(Event::Answered(_)) = event {
                    prop_assert_eq!(open, 1);
                    open = 0;
                }
            }
        }
    }
}
