//! The host's end of a guest that runs `firn-init` under another monitor than Firn's: frames of the
//! guest protocol over whatever stream that monitor offers.

use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use firn::guest::{self, ENTROPY_BYTES, FromGuest, Invoke, Load, Outcome, Renew, ToGuest};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::{
    error::{Error, Result, io_at, of},
    functions::Function,
};

/// Time that restore hooks may take, as under Firn.
const HOOKS: Duration = Duration::from_secs(10);

/// One guest's stream.
#[derive(Debug)]
pub struct Frames {
    subject: &'static str,
    stream: UnixStream,
    limit: Duration,
}

impl Frames {
    /// `limit` is how long any one frame may take.
    pub fn new(subject: &'static str, stream: UnixStream, limit: Duration) -> Self {
        Self { subject, stream, limit }
    }

    /// Sends messages in one write.
    ///
    /// # Errors
    /// [`Error::Io`] if the guest is gone.
    pub async fn send(&mut self, messages: &[ToGuest]) -> Result<()> {
        let mut bytes = Vec::new();
        for message in messages {
            bytes.extend(guest::encode(message).map_err(of(self.subject, "encode a frame"))?);
        }
        self.stream.write_all(&bytes).await.map_err(io_at("send to the guest"))
    }

    /// The next message that is no output of the function.
    ///
    /// # Errors
    /// [`Error::Io`] if the guest is gone or too slow, [`Error::Subject`] if it breaks the protocol.
    pub async fn receive(&mut self) -> Result<FromGuest> {
        let next = tokio::time::timeout(self.limit, async {
            loop {
                let mut prefix = [0; 4];
                self.stream.read_exact(&mut prefix).await?;
                let length = guest::frame_length(prefix).map_err(io::Error::other)?;
                let mut message = vec![0; length];
                self.stream.read_exact(&mut message).await?;
                match guest::decode_from_guest(&message).map_err(io::Error::other)? {
                    FromGuest::Log(_) => {}
                    message => return Ok(message),
                }
            }
        });
        next.await.unwrap_or(Err(io::ErrorKind::TimedOut.into())).map_err(io_at("hear the guest"))
    }

    /// Waits for the answer to an event.
    ///
    /// # Errors
    /// [`Error::Function`] for any but a response; else as [`Frames::receive`].
    pub async fn done(&mut self, request_id: &str) -> Result<guest::Done> {
        match self.receive().await? {
            FromGuest::Done(done) if done.request_id == request_id => match done.outcome {
                Outcome::Response { .. } | Outcome::Streamed => Ok(done),
                Outcome::Error(error) => self.wrong(&error),
            },
            other => self.wrong(&other),
        }
    }

    /// The error for an answer that should have been another.
    ///
    /// # Errors
    /// Always.
    pub fn wrong<T>(&self, answer: &dyn std::fmt::Debug) -> Result<T> {
        Err(Error::Function { subject: self.subject, answer: format!("{answer:?}") })
    }
}

/// The order to load `function`.
pub fn load(function: &Function, for_snapshot: bool, init_timeout: Duration) -> ToGuest {
    let mut environment = function.environment.clone();
    let initialization = if for_snapshot { "snap-start" } else { "on-demand" };
    environment.push(("AWS_LAMBDA_INITIALIZATION_TYPE".into(), initialization.into()));
    ToGuest::Load(Load {
        environment,
        memory_bytes: u64::from(function.memory_mb) << 20,
        init_timeout_ms: init_timeout.as_millis() as u64,
        snapshot: for_snapshot,
        code: true,
        endpoints: Vec::new(),
    })
}

/// The order to become `instance_id`.
///
/// # Errors
/// [`Error::Io`] if the kernel has no entropy to give.
pub fn renew(instance_id: String) -> Result<ToGuest> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    let got = rustix::rand::getrandom(&mut *entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| io_at("read entropy")(e.into()))?;
    // Up to 256 bytes come whole.
    entropy.truncate(got);
    Ok(ToGuest::Renew(Renew {
        wall_clock_ns: wall_clock().as_nanos() as u64,
        // Other monitors don't tell a guest's TSC.
        tsc: None,
        entropy,
        instance_id,
        hook_timeout_ms: HOOKS.as_millis() as u64,
    }))
}

/// One event.
pub fn invoke(request_id: String, event: &[u8], timeout: Duration) -> ToGuest {
    ToGuest::Invoke(Invoke {
        request_id,
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:bench".into(),
        trace_id: String::new(),
        client_context: String::new(),
        cognito_identity: String::new(),
        deadline_ms: (wall_clock() + timeout).as_millis() as u64,
        timeout_ms: timeout.as_millis() as u64,
        payload: event.to_vec(),
    })
}

fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
