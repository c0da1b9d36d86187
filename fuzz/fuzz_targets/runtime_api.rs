//! The Runtime API's states: whatever a runtime asks, in whatever order and on how many
//! connections, an event is answered at most once and only while it is out; and what is for the host's services is
//! within the limits that the host holds it to.

#![no_main]

use arbitrary::Arbitrary;
use firn_init::{
    calls,
    http::{Found, Parser, Request},
    runtime_api::{Event, RuntimeApi, State},
    server::ConnectionId,
};
use firn_proto::guest::{Ask, MAX_CALL, MAX_CALL_HEAD};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Step<'a> {
    Call {
        connection: u8,
        call: Call,
        id: Id,
        fields: Fields<'a>,
        body: &'a [u8],
    },
    Raw {
        connection: u8,
        bytes: &'a [u8],
    },
    /// The head of a response that is streamed, its end, or that it was too long.
    Begin {
        connection: u8,
        call: Call,
        id: Id,
    },
    End,
    Cut(u64),
    HandOut(Id),
    Release,
    Close(u8),
}

#[derive(Debug, Arbitrary)]
enum Call {
    Next,
    Response,
    Error,
    InitError,
    RestoreNext,
    RestoreError,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Id {
    A,
    B,
    Empty,
}

#[derive(Debug, Arbitrary)]
enum Fields<'a> {
    None,
    ErrorType(&'a str),
    Mode(&'a str),
    ContentType(&'a str),
    Chunked { trailer_type: &'a str, trailer_body: &'a str },
}

impl Id {
    fn text(self) -> &'static str {
        match self {
            Self::A => "8476a536-e9f4-11e8-9739-2dfe598c3fcd",
            Self::B => "b",
            Self::Empty => "",
        }
    }
}

const LIMIT: usize = 256;

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (restores, steps) = input;
    let mut api = RuntimeApi::new(restores);
    // Whether an event is out and unanswered.
    let mut out = false;
    let streams = |state: &State| matches!(state, State::Streaming { .. });
    for step in steps {
        let (connection, bytes) = match step {
            Step::HandOut(id) => {
                let idle = matches!(api.state(), State::Idle(_));
                assert_eq!(api.hand_out(id.text()).is_some(), idle);
                out |= idle;
                continue;
            }
            Step::Begin { connection, call, id } => {
                let Some(head) = request(&text(&call, id, &Fields::None, b"")) else { continue };
                let before = api.state().clone();
                match api.begin(ConnectionId(connection.into()), &head) {
                    Ok(_) => assert!(out && matches!(before, State::Busy { .. })),
                    Err(_) => assert_eq!(*api.state(), before),
                }
                continue;
            }
            // Said of the connection that streams only.
            Step::End | Step::Cut(_) if !streams(api.state()) => continue,
            Step::End => {
                api.end(&Default::default());
                assert!(std::mem::take(&mut out), "answered twice");
                continue;
            }
            Step::Cut(size) => {
                api.cut(size);
                assert!(std::mem::take(&mut out), "answered twice");
                continue;
            }
            Step::Release => {
                let waits = matches!(api.state(), State::AtRestore(_));
                assert_eq!(api.release().is_some(), waits);
                continue;
            }
            Step::Close(connection) => {
                api.closed(ConnectionId(connection.into()));
                continue;
            }
            Step::Raw { connection, bytes } => (connection, bytes.to_vec()),
            Step::Call { connection, call, id, fields, body } => {
                (connection, text(&call, id, &fields, body))
            }
        };
        let Some(request) = request(&bytes) else { continue };
        if calls::is_call(&request.path) {
            check_call(request);
            continue;
        }
        let before = api.state().clone();
        let (reply, event) = api.handle(ConnectionId(connection.into()), request);
        let waits = matches!(event, Some(Event::AsksForEvent | Event::AsksForRestore));
        assert_eq!(reply.is_none(), waits);
        match event {
            None => assert_eq!(*api.state(), before),
            Some(Event::Answered(_)) => assert!(std::mem::take(&mut out), "answered twice"),
            Some(Event::AsksForRestore) => assert!(restores),
            // After half a response: the guest's word is the answer.
            Some(Event::AsksForEvent) if matches!(before, State::Broken { .. }) => out = false,
            Some(Event::AsksForEvent | Event::Failed) => {}
        }
        let has_event = |state: &State| {
            matches!(state, State::Busy { .. } | State::Streaming { .. } | State::Broken { .. })
        };
        assert_eq!(has_event(api.state()), out);
    }
});

fn check_call(request: Request) {
    let token = request.headers.get("authorization") == Some("token");
    match calls::judge(request, "token") {
        Ok(Ask::Credentials) => assert!(token),
        Ok(Ask::Request(call)) => {
            assert!(call.head_bytes() <= MAX_CALL_HEAD && call.body.len() <= MAX_CALL);
            let hop = |(name, _): &(String, String)| name.eq_ignore_ascii_case("connection");
            assert!(!call.fields.iter().any(hop));
        }
        Ok(_) => unreachable!("a guest asks for nothing else"),
        Err(reply) => assert!(reply.status() >= 400),
    }
}

fn request(mut bytes: &[u8]) -> Option<Request> {
    match Parser::new(LIMIT, |_| false).push(&mut bytes) {
        Ok(Found::Request(request)) => Some(*request),
        _ => None,
    }
}

fn text(call: &Call, id: Id, fields: &Fields, body: &[u8]) -> Vec<u8> {
    let id = id.text();
    let (method, path) = match call {
        Call::Next => ("GET", "invocation/next".to_owned()),
        Call::Response => ("POST", format!("invocation/{id}/response")),
        Call::Error => ("POST", format!("invocation/{id}/error")),
        Call::InitError => ("POST", "init/error".to_owned()),
        Call::RestoreNext => ("GET", "restore/next".to_owned()),
        Call::RestoreError => ("POST", "restore/error".to_owned()),
    };
    let field = match fields {
        Fields::ErrorType(text) => format!("Lambda-Runtime-Function-Error-Type: {text}\r\n"),
        Fields::Mode(text) => format!("Lambda-Runtime-Function-Response-Mode: {text}\r\n"),
        Fields::ContentType(text) => format!("Content-Type: {text}\r\n"),
        Fields::None | Fields::Chunked { .. } => String::new(),
    };
    let mut bytes = format!("{method} /2018-06-01/runtime/{path} HTTP/1.1\r\n{field}").into_bytes();
    if let Fields::Chunked { trailer_type, trailer_body } = fields {
        bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
        if !body.is_empty() {
            bytes.extend_from_slice(format!("{:x}\r\n", body.len()).as_bytes());
            bytes.extend_from_slice(body);
            bytes.extend_from_slice(b"\r\n");
        }
        let trailers = format!(
            "0\r\nLambda-Runtime-Function-Error-Type: {trailer_type}\r\n\
             Lambda-Runtime-Function-Error-Body: {trailer_body}\r\n\r\n"
        );
        bytes.extend_from_slice(trailers.as_bytes());
    } else {
        bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        bytes.extend_from_slice(body);
    }
    bytes
}
