//! The guest protocol: host ↔ `firn-init`, over one vsock stream.
//!
//! ```text
//!  guest connects ─▶ Ready
//!  host ─▶ Load ─▶ guest starts the runtime ─▶ Log* Loaded
//!  host ─▶ Freeze ─▶ guest freezes the runtime's cgroup ─▶ Frozen   (the host may snapshot now)
//!  host ─▶ Renew  ─▶ guest renews clock, entropy, identity; runs restore hooks ─▶ Log* Renewed
//!  host ─▶ Invoke ─▶ Log* Done                      (a response as a whole)
//!                 ─▶ Log* Begin (Log | Chunk)* Done  (a response as it is made)
//!
//!  within Load, Renew and Invoke, at any time:
//!                 guest ─▶ Call ─▶ host ─▶ Answer      (what the function asks of the host's services)
//!                 guest ─▶ Segment                     (within Invoke)
//! ```
//!
//! A guest answers an order only when none of its calls is open: nothing is on its way to it then, and it can
//! be paused or saved. Calls that would last longer it ends with [`FromGuest::Abandon`].
//!
//! A frame is a little-endian `u32` length of what follows, at most [`MAX_FRAME`], then the
//! message. The stream survives a snapshot: a thawed guest continues where its snapshot was taken,
//! which is always between two frames.

use std::{fmt, num::NonZeroU32};

use serde::{Deserialize, Serialize};

use crate::CodecError;

/// Version of this protocol; the first field of [`Ready`].
pub const VERSION: u16 = 4;

/// Largest event or response in bytes that the Lambda API allows (6 MiB plus the room that the
/// Runtime API grants a response).
pub const MAX_PAYLOAD: usize = 6_291_556;

/// Most bytes of a response that is streamed (Lambda: 200 MB).
pub const MAX_STREAM: u64 = 200 << 20;

/// Most bytes of one [`Chunk`].
pub const MAX_CHUNK: usize = 64 * 1024;

/// Longest `Content-Type` in bytes that is passed on.
pub const MAX_CONTENT_TYPE: usize = 1024;

/// Most calls that are open at a time.
pub const MAX_CALLS: usize = 8;

/// Longest body of a call or of its answer in bytes.
pub const MAX_CALL: usize = 1 << 20;

/// Most bytes of a call's target and fields together, and of an answer's fields.
pub const MAX_CALL_HEAD: usize = 32 * 1024;

/// Longest trace segment in bytes: a datagram.
pub const MAX_SEGMENT: usize = 64 * 1024;

/// Most bytes of the segments of one invocation.
pub const MAX_SEGMENTS: usize = 256 * 1024;

/// Longest message in bytes without its length prefix: a payload and its head.
pub const MAX_FRAME: usize = MAX_PAYLOAD + 64 * 1024;

/// Longest piece of one log line in bytes; longer lines arrive in several pieces.
pub const MAX_LOG: usize = 16 * 1024;

/// Bytes of entropy in [`Renew`].
pub const ENTROPY_BYTES: usize = 64;

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ToGuest {
    /// Mount the code disk and start the function's runtime. Answer: [`FromGuest::Loaded`].
    Load(Load),
    /// Stop the runtime where it stands and become quiet. Answer: [`FromGuest::Frozen`].
    Freeze,
    /// First message after every thaw. Answer: [`FromGuest::Renewed`].
    Renew(Renew),
    /// Handle one event. Answer: [`FromGuest::Done`].
    Invoke(Invoke),
    /// Power off. No answer.
    Shutdown,
    /// What became of a [`FromGuest::Call`]. No answer.
    Answer(Answer),
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FromGuest {
    /// The guest is up and has no function yet.
    Ready(Ready),
    /// The runtime waits for its first event, or failed to.
    Loaded(Loaded),
    /// The runtime's cgroup is frozen and no frame is half written.
    Frozen,
    /// Clock, entropy and identity are new and the restore hooks have run.
    Renewed(Renewed),
    /// A piece of the runtime's output.
    Log(Log),
    /// The event has been handled, one way or another.
    Done(Done),
    /// The runtime has begun to stream its response. At most once before a [`FromGuest::Done`].
    Begin(Begin),
    /// The next bytes of the response that has begun.
    Chunk(Chunk),
    /// The function asks something of the host's services. Answer: [`ToGuest::Answer`].
    Call(Call),
    /// The guest waits no longer for what its open calls find out: each is answered now.
    Abandon,
    /// A segment document that the function has sent to its tracer.
    Segment(Segment),
}

/// What the guest says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// [`VERSION`] of the guest.
    pub version: u16,
    /// The guest's TSC at the first instruction of `firn-init`'s `main`.
    pub init_tsc: u64,
    /// The guest's TSC when this message was made.
    pub ready_tsc: u64,
}

/// What function to run and how.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Whole environment of the runtime but what the guest alone knows
    /// (`AWS_LAMBDA_RUNTIME_API`).
    pub environment: Vec<(String, String)>,
    /// `memory.max` of the runtime's cgroup in bytes.
    pub memory_bytes: u64,
    /// Time that initialisation may take in milliseconds.
    pub init_timeout_ms: u64,
    /// A snapshot follows: `Loaded` means that the runtime asked for `/runtime/restore/next` (or
    /// for its first event, where it has no restore hooks).
    pub snapshot: bool,
    /// Whether the code disk holds anything to mount on `/var/task` and `/opt`.
    pub code: bool,
    /// Variables that hold the URL of the host's services, unless `environment` has them. None: there are no
    /// services, and no credentials.
    pub endpoints: Vec<String>,
}

/// How initialisation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// From start of the runtime to its first request for work, in microseconds.
    pub init_us: u64,
    /// `None`: ready. Otherwise what the first invocation will answer with if nothing changes.
    pub error: Option<FunctionError>,
}

/// What a thawed guest needs to become someone else.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// Wall-clock time in nanoseconds since the epoch when the message was made.
    pub wall_clock_ns: u64,
    /// The guest's TSC at that time, so that it knows how long ago it was. `None`: the host does not
    /// know it, and no time has passed.
    pub tsc: Option<GuestTsc>,
    /// Fresh entropy from the host's `getrandom`, [`ENTROPY_BYTES`] long.
    #[serde(with = "serde_bytes")]
    pub entropy: Vec<u8>,
    /// Identity of the instance, unique for ever.
    pub instance_id: String,
    /// Time that the restore hooks may take in milliseconds.
    pub hook_timeout_ms: u64,
}

/// A reading of a guest's TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestTsc {
    /// Ticks.
    pub ticks: u64,
    /// Its frequency in kHz; never 0.
    pub khz: NonZeroU32,
}

/// Acknowledges a [`Renew`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// The `instance_id` that was received: an instance that does not repeat it never serves.
    pub instance_id: String,
    /// Clock and entropy, in microseconds.
    pub renew_us: u64,
    /// Unfreezing and restore hooks until the runtime asked for work, in microseconds.
    pub hooks_us: u64,
    /// Set where a restore hook failed or the runtime ended.
    pub error: Option<FunctionError>,
}

/// One event.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoke {
    /// `Lambda-Runtime-Aws-Request-Id`.
    pub request_id: String,
    /// `Lambda-Runtime-Invoked-Function-Arn`.
    pub function_arn: String,
    /// `Lambda-Runtime-Trace-Id`; empty: none.
    pub trace_id: String,
    /// `Lambda-Runtime-Client-Context` (JSON); empty: none.
    pub client_context: String,
    /// `Lambda-Runtime-Cognito-Identity` (JSON); empty: none.
    pub cognito_identity: String,
    /// `Lambda-Runtime-Deadline-Ms`: milliseconds since the epoch.
    pub deadline_ms: u64,
    /// What the guest enforces: time from this message in milliseconds, at most 900,000.
    pub timeout_ms: u64,
    /// The event.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

/// Where output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// The runtime's standard output.
    Stdout,
    /// The runtime's standard error.
    Stderr,
    /// `firn-init` itself.
    Init,
}

/// A piece of output.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// Where it came from.
    pub stream: Stream,
    /// At most [`MAX_LOG`] bytes; a whole line without its end unless `partial`.
    #[serde(with = "serde_bytes")]
    pub line: Vec<u8>,
    /// The line goes on in the next piece of this stream.
    pub partial: bool,
}

/// The head of a streamed response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// `Content-Type` of the response as the runtime gave it, at most [`MAX_CONTENT_TYPE`] bytes.
    pub content_type: String,
}

/// A piece of a streamed response.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// At most [`MAX_CHUNK`] bytes; all chunks of a response together at most [`MAX_STREAM`].
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

/// What the function asks of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Names it until it is answered.
    pub id: u64,
    /// What it asks for.
    pub ask: Ask,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Ask {
    /// Credentials of the function's role, as AWS's SDKs want them of a container's provider.
    Credentials,
    /// A request to a service.
    Request(HttpRequest),
}

/// A request of HTTP, whole.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpRequest {
    /// `GET`, `POST`…
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Header fields.
    pub fields: Vec<(String, String)>,
    /// At most [`MAX_CALL`] bytes.
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
}

impl HttpRequest {
    /// Bytes that [`MAX_CALL_HEAD`] bounds.
    pub fn head_bytes(&self) -> usize {
        self.method.len() + self.target.len() + head_bytes(&self.fields)
    }
}

/// A response of HTTP, whole.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpReply {
    /// Its status code.
    pub status: u16,
    /// Header fields, without those that say how the body is delimited.
    pub fields: Vec<(String, String)>,
    /// At most [`MAX_CALL`] bytes.
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
}

impl HttpReply {
    /// Bytes that [`MAX_CALL_HEAD`] bounds.
    pub fn head_bytes(&self) -> usize {
        head_bytes(&self.fields)
    }
}

fn head_bytes(fields: &[(String, String)]) -> usize {
    fields.iter().map(|(name, value)| name.len() + value.len()).sum()
}

/// Ends a [`Call`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Of the call.
    pub id: u64,
    /// `None`: it was abandoned, or there is nobody who could answer it.
    pub reply: Option<HttpReply>,
}

/// A datagram to the function's tracer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// At most [`MAX_SEGMENT`] bytes; all of an invocation together at most [`MAX_SEGMENTS`].
    #[serde(with = "serde_bytes")]
    pub document: Vec<u8>,
}

/// How an invocation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The `request_id` of the [`Invoke`].
    pub request_id: String,
    /// The result.
    pub outcome: Outcome,
    /// From handing out the event to the runtime's answer, in microseconds.
    pub duration_us: u64,
    /// Time spent starting a new runtime because the last one had ended, in microseconds; 0: none.
    pub init_us: u64,
    /// Highest memory use of the runtime's cgroup so far in bytes.
    pub max_memory_bytes: u64,
    /// The guest's TSC when it had read the whole `Invoke`, and when it made this message.
    pub tsc: (u64, u64),
}

/// Result of an invocation.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The runtime answered.
    Response {
        /// The answer, at most [`MAX_PAYLOAD`] bytes.
        #[serde(with = "serde_bytes")]
        payload: Vec<u8>,
        /// `Content-Type` of the answer as the runtime gave it.
        content_type: String,
    },
    /// The function failed, by its own word or in the guest's judgement; maybe in the middle of
    /// a streamed response.
    Error(FunctionError),
    /// The streamed response is complete: the chunks were all of it.
    Streamed,
}

/// Why a function has no answer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FunctionError {
    /// The runtime posted an error.
    Reported {
        /// `Lambda-Runtime-Function-Error-Type`, checked against its pattern; empty: none.
        error_type: String,
        /// The error document as posted.
        #[serde(with = "serde_bytes")]
        payload: Vec<u8>,
    },
    /// The runtime ended: `exit status N` or `signal: NAME`.
    Exited {
        /// As in the message of `Runtime.ExitError`.
        status: String,
    },
    /// The deadline passed and the runtime was killed.
    TimedOut {
        /// The limit in milliseconds.
        limit_ms: u64,
    },
    /// The response was longer than [`MAX_PAYLOAD`], or [`MAX_STREAM`] where it was streamed.
    ResponseTooLarge {
        /// Its length in bytes.
        size: u64,
    },
    /// The runtime could not be started at all.
    InvalidEntrypoint {
        /// What was tried and why it failed.
        message: String,
    },
}

/// Stands for what may be a secret where a message is printed: messages end in logs and panics.
struct Hidden(usize);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}>", self.0)
    }
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { environment, memory_bytes, init_timeout_ms, snapshot, code, endpoints } = self;
        f.debug_struct("Load")
            .field("environment", &Hidden(environment.len()))
            .field("memory_bytes", memory_bytes)
            .field("init_timeout_ms", init_timeout_ms)
            .field("snapshot", snapshot)
            .field("code", code)
            .field("endpoints", endpoints)
            .finish()
    }
}

impl fmt::Debug for Renew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wall_clock_ns, tsc, entropy, instance_id, hook_timeout_ms } = self;
        f.debug_struct("Renew")
            .field("wall_clock_ns", wall_clock_ns)
            .field("tsc", tsc)
            .field("entropy", &Hidden(entropy.len()))
            .field("instance_id", instance_id)
            .field("hook_timeout_ms", hook_timeout_ms)
            .finish()
    }
}

impl fmt::Debug for Invoke {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request_id, function_arn, deadline_ms, timeout_ms, payload, .. } = self;
        f.debug_struct("Invoke")
            .field("request_id", request_id)
            .field("function_arn", function_arn)
            .field("deadline_ms", deadline_ms)
            .field("timeout_ms", timeout_ms)
            .field("payload", &Hidden(payload.len()))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream, line, partial } = self;
        f.debug_struct("Log")
            .field("stream", stream)
            .field("line", &Hidden(line.len()))
            .field("partial", partial)
            .finish()
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").field("payload", &Hidden(self.payload.len())).finish()
    }
}

impl fmt::Debug for HttpRequest {
    /// Without fields, which sign it, and without the body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpRequest")
            .field("method", &self.method)
            .field("target", &Hidden(self.target.len()))
            .field("body", &Hidden(self.body.len()))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for HttpReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpReply")
            .field("status", &self.status)
            .field("body", &Hidden(self.body.len()))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("document", &Hidden(self.document.len())).finish()
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response { payload, content_type } => f
                .debug_struct("Response")
                .field("payload", &Hidden(payload.len()))
                .field("content_type", content_type)
                .finish(),
            Self::Error(error) => f.debug_tuple("Error").field(error).finish(),
            Self::Streamed => f.write_str("Streamed"),
        }
    }
}

impl fmt::Debug for FunctionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reported { error_type, payload } => f
                .debug_struct("Reported")
                .field("error_type", error_type)
                .field("payload", &Hidden(payload.len()))
                .finish(),
            Self::Exited { status } => f.debug_struct("Exited").field("status", status).finish(),
            Self::TimedOut { limit_ms } => {
                f.debug_struct("TimedOut").field("limit_ms", limit_ms).finish()
            }
            Self::ResponseTooLarge { size } => {
                f.debug_struct("ResponseTooLarge").field("size", size).finish()
            }
            Self::InvalidEntrypoint { message } => {
                f.debug_struct("InvalidEntrypoint").field("message", message).finish()
            }
        }
    }
}

/// Encodes one frame, length prefix and all.
///
/// # Errors
/// [`CodecError::TooLong`] over [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let mut frame = crate::encode(message, vec![0; 4], MAX_FRAME)?;
    let length = (frame.len() - 4) as u32;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Checks a frame's length prefix.
///
/// # Errors
/// [`CodecError::TooLong`] over [`MAX_FRAME`].
pub fn frame_length(prefix: [u8; 4]) -> Result<usize, CodecError> {
    let size = u32::from_le_bytes(prefix) as usize;
    if size > MAX_FRAME {
        return Err(CodecError::TooLong { size, limit: MAX_FRAME });
    }
    Ok(size)
}

/// Decodes a frame's message (without its prefix) from the host.
///
/// # Errors
/// Any [`CodecError`].
pub fn decode_to_guest(message: &[u8]) -> Result<ToGuest, CodecError> {
    crate::decode(message, MAX_FRAME)
}

/// Decodes a frame's message (without its prefix) from the guest.
///
/// # Errors
/// Any [`CodecError`].
pub fn decode_from_guest(message: &[u8]) -> Result<FromGuest, CodecError> {
    crate::decode(message, MAX_FRAME)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn invoke(payload: Vec<u8>) -> ToGuest {
        ToGuest::Invoke(Invoke {
            request_id: "8476a536-e9f4-11e8-9739-2dfe598c3fcd".into(),
            function_arn: "arn:aws:lambda:us-east-1:000000000000:function:hello".into(),
            trace_id: String::new(),
            client_context: String::new(),
            cognito_identity: String::new(),
            deadline_ms: 1_542_409_706_888,
            timeout_ms: 3000,
            payload,
        })
    }

    fn request(body: Vec<u8>) -> HttpRequest {
        let fields = vec![("Authorization".into(), "planted".into())];
        HttpRequest { method: "POST".into(), target: "planted".into(), fields, body }
    }

    fn reply(body: Vec<u8>) -> HttpReply {
        HttpReply { status: 200, fields: vec![("A".into(), "planted".into())], body }
    }

    #[test]
    fn what_bounds_heads_is_all_of_them() {
        assert_eq!(request(Vec::new()).head_bytes(), 4 + 7 + 13 + 7);
        assert_eq!(reply(Vec::new()).head_bytes(), 8);
    }

    #[test]
    fn environments_events_and_entropy_do_not_print() {
        let secret = || "planted".to_owned();
        let bytes = || b"planted".to_vec();
        let reported = || FunctionError::Reported { error_type: "E".into(), payload: bytes() };
        let texts = [
            format!(
                "{:?}",
                ToGuest::Load(Load {
                    environment: vec![("KEY".into(), secret())],
                    memory_bytes: 1,
                    init_timeout_ms: 2,
                    snapshot: false,
                    code: true,
                    endpoints: Vec::new(),
                })
            ),
            format!(
                "{:?}",
                ToGuest::Renew(Renew {
                    wall_clock_ns: 1,
                    tsc: None,
                    entropy: bytes(),
                    instance_id: "i".into(),
                    hook_timeout_ms: 2,
                })
            ),
            format!(
                "{:?}",
                ToGuest::Invoke(Invoke {
                    request_id: "r".into(),
                    function_arn: "f".into(),
                    trace_id: "t".into(),
                    client_context: secret(),
                    cognito_identity: secret(),
                    deadline_ms: 1,
                    timeout_ms: 2,
                    payload: bytes(),
                })
            ),
            format!("{:?}", Log { stream: Stream::Stdout, line: bytes(), partial: false }),
            format!("{:?}", FromGuest::Chunk(Chunk { payload: bytes() })),
            format!("{:?}", FromGuest::Segment(Segment { document: bytes() })),
            format!("{:?}", FromGuest::Call(Call { id: 1, ask: Ask::Request(request(bytes())) })),
            format!("{:?}", ToGuest::Answer(Answer { id: 1, reply: Some(reply(bytes())) })),
            format!(
                "{:?}",
                Outcome::Response { payload: bytes(), content_type: "text/plain".into() }
            ),
            format!("{:?}", Outcome::Error(reported())),
            format!("{:?}", FromGuest::Loaded(Loaded { init_us: 1, error: Some(reported()) })),
        ];
        for text in texts {
            // As text or as a list of numbers: 112 is `p`.
            assert!(!text.contains("planted") && !text.contains("112"), "{text}");
            assert!(text.contains("<7>") || text.contains("<1>"), "{text}");
        }
    }

    #[test]
    fn largest_payload_fits_a_frame() {
        let frame = encode(&invoke(vec![b'x'; MAX_PAYLOAD])).unwrap();
        assert_eq!(frame_length(frame[..4].try_into().unwrap()), Ok(frame.len() - 4));
    }

    #[test]
    fn oversized_frames_are_refused_both_ways() {
        assert!(matches!(encode(&invoke(vec![0; MAX_FRAME])), Err(CodecError::TooLong { .. })));
        assert!(matches!(
            frame_length((MAX_FRAME as u32 + 1).to_le_bytes()),
            Err(CodecError::TooLong { .. })
        ));
    }

    #[test]
    fn a_length_that_lies_inside_a_message_is_refused() {
        // Variant 3 is Invoke; its first string claims 2^35 bytes.
        assert!(matches!(
            decode_to_guest(&[3, 0xff, 0xff, 0xff, 0xff, 0x7f]),
            Err(CodecError::Malformed(_))
        ));
    }

    proptest! {
        #[test]
        fn invoke_round_trips(payload in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let message = invoke(payload);
            let frame = encode(&message).unwrap();
            prop_assert_eq!(decode_to_guest(&frame[4..]), Ok(message));
        }

        #[test]
        fn calls_and_answers_round_trip(id: u64, body in proptest::collection::vec(any::<u8>(), 0..4096)) {
            for ask in [Ask::Credentials, Ask::Request(request(body.clone()))] {
                let message = FromGuest::Call(Call { id, ask });
                let frame = encode(&message).unwrap();
                prop_assert_eq!(decode_from_guest(&frame[4..]), Ok(message));
            }
            for reply in [None, Some(reply(body.clone()))] {
                let message = ToGuest::Answer(Answer { id, reply });
                let frame = encode(&message).unwrap();
                prop_assert_eq!(decode_to_guest(&frame[4..]), Ok(message));
            }
        }

        #[test]
        fn streamed_responses_round_trip(
            content_type in ".{0,40}",
            payload in proptest::collection::vec(any::<u8>(), 0..4096),
        ) {
            for message in [
                FromGuest::Begin(Begin { content_type }),
                FromGuest::Chunk(Chunk { payload }),
            ] {
                let frame = encode(&message).unwrap();
                prop_assert_eq!(decode_from_guest(&frame[4..]), Ok(message));
            }
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode_to_guest(&bytes);
            let _ = decode_from_guest(&bytes);
        }
    }
}
