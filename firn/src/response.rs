//! A streamed response on its way from the guest to whoever asked for it.
//!
//! The guest is hostile and the taker may be slow: one chunk is held here at a time, chunks and their
//! sum are bounded, and the taker has no longer than the function itself. When it has had that long,
//! or is gone, what is left of the response is thrown away, and the function runs to its end.

use std::fmt;

use bytes::Bytes;
use firn_proto::guest::{
    Begin, Chunk, FunctionError, MAX_CHUNK, MAX_CONTENT_TYPE, MAX_PAYLOAD, MAX_STREAM, Outcome,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use crate::Invocation;

/// A part of a streamed response.
#[derive(Clone, PartialEq, Eq)]
pub enum ResponsePart {
    /// The function has begun to answer. The first part, and there is one only.
    Begin {
        /// `Content-Type` as the runtime gave it, at most [`MAX_CONTENT_TYPE`] bytes of anything.
        content_type: String,
    },
    /// The next bytes, at most [`MAX_CHUNK`].
    Chunk(Bytes),
}

impl fmt::Debug for ResponsePart {
    /// Without what the function said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin { content_type } => {
                f.debug_struct("Begin").field("content_type", content_type).finish()
            }
            Self::Chunk(bytes) => f.debug_struct("Chunk").field("bytes", &bytes.len()).finish(),
        }
    }
}

/// Where a streamed response goes while it is made. The channel is bounded on purpose: a taker that
/// is slower than the function slows the function down. All parts are in the channel when the
/// invocation returns; once the receiver is gone, they are dropped.
pub type ResponseSink = mpsc::Sender<ResponsePart>;

/// A response that has begun.
#[derive(Debug)]
pub(crate) struct Streamed<'a> {
    /// `None`: nobody takes it any more.
    sink: Option<&'a ResponseSink>,
    /// When the taker's time is up.
    until: Instant,
    /// It was, before everything had been taken.
    late: bool,
    limit_ms: u64,
    bytes: u64,
    /// The response as a whole, where nobody wants it as it comes.
    whole: Option<(String, Vec<u8>)>,
}

impl<'a> Streamed<'a> {
    /// The response to `invocation` has begun; it may be taken until then.
    pub(crate) async fn begin(
        begin: Begin,
        invocation: &'a Invocation,
        until: Instant,
    ) -> Result<Self, String> {
        let Begin { content_type } = begin;
        if content_type.len() > MAX_CONTENT_TYPE {
            let size = content_type.len();
            return Err(format!("content type of {size} bytes exceeds {MAX_CONTENT_TYPE}"));
        }
        let mut streamed = Self {
            sink: invocation.response.as_ref(),
            until,
            late: false,
            limit_ms: invocation.timeout.as_millis() as u64,
            bytes: 0,
            whole: None,
        };
        match invocation.response {
            Some(_) => streamed.pass_on(ResponsePart::Begin { content_type }).await,
            None => streamed.whole = Some((content_type, Vec::new())),
        }
        Ok(streamed)
    }

    /// Takes the next chunk.
    pub(crate) async fn push(&mut self, chunk: Chunk) -> Result<(), String> {
        let Chunk { payload } = chunk;
        self.bytes += payload.len() as u64;
        if payload.len() > MAX_CHUNK || self.bytes > MAX_STREAM {
            let (size, bytes) = (payload.len(), self.bytes);
            return Err(format!("chunk of {size} bytes, {bytes} in all, exceeds a limit"));
        }
        match &mut self.whole {
            Some((_, whole)) if self.bytes <= MAX_PAYLOAD as u64 => {
                whole.extend_from_slice(&payload);
            }
            Some((_, whole)) => *whole = Vec::new(),
            None => self.pass_on(ResponsePart::Chunk(payload.into())).await,
        }
        Ok(())
    }

    /// What the caller gets for the guest's word on how the invocation ended.
    pub(crate) fn end(self, outcome: Outcome) -> Result<Outcome, String> {
        match (outcome, self.whole) {
            (Outcome::Streamed, None) if self.late => {
                Ok(Outcome::Error(FunctionError::TimedOut { limit_ms: self.limit_ms }))
            }
            (Outcome::Streamed, None) => Ok(Outcome::Streamed),
            (Outcome::Streamed, Some(_)) if self.bytes > MAX_PAYLOAD as u64 => {
                Ok(Outcome::Error(FunctionError::ResponseTooLarge { size: self.bytes }))
            }
            (Outcome::Streamed, Some((content_type, payload))) => {
                Ok(Outcome::Response { payload, content_type })
            }
            (error @ Outcome::Error(_), _) => Ok(error),
            (Outcome::Response { .. }, _) => Err("a second response".to_owned()),
        }
    }

    async fn pass_on(&mut self, part: ResponsePart) {
        let Some(sink) = self.sink else { return };
        match timeout_at(self.until, sink.send(part)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => self.sink = None,
            Err(_) => {
                self.late = true;
                self.sink = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn invocation(response: Option<ResponseSink>) -> Invocation {
        Invocation { timeout: Duration::from_secs(3), response, ..Default::default() }
    }

    fn begin() -> Begin {
        Begin { content_type: "a/b".into() }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[tokio::test]
    async fn without_a_taker_it_becomes_one_response() {
        let invocation = invocation(None);
        let mut streamed = Streamed::begin(begin(), &invocation, soon()).await.unwrap();
        for text in ["he", "llo"] {
            streamed.push(Chunk { payload: text.into() }).await.unwrap();
        }
        let whole = Outcome::Response { payload: b"hello".to_vec(), content_type: "a/b".into() };
        assert_eq!(streamed.end(Outcome::Streamed), Ok(whole));

        let mut streamed = Streamed::begin(begin(), &invocation, soon()).await.unwrap();
        let mut size = 0;
        while size <= MAX_PAYLOAD as u64 {
            streamed.push(Chunk { payload: vec![b'x'; MAX_CHUNK] }).await.unwrap();
            size += MAX_CHUNK as u64;
        }
        assert_eq!(streamed.whole.as_ref().unwrap().1.capacity(), 0, "nothing is kept");
        let error = FunctionError::ResponseTooLarge { size };
        assert_eq!(streamed.end(Outcome::Streamed), Ok(Outcome::Error(error)));
    }

    #[tokio::test]
    async fn a_slow_taker_has_the_functions_time_and_one_that_is_gone_takes_nothing() {
        let (sink, mut parts) = mpsc::channel(1);
        let waited = invocation(Some(sink));
        let mut streamed = Streamed::begin(begin(), &waited, soon()).await.unwrap();
        let started = Instant::now();
        for _ in 0..3 {
            streamed.push(Chunk { payload: b"x".to_vec() }).await.unwrap();
        }
        assert!(started.elapsed() >= Duration::from_millis(45), "one wait until the time is up");
        let late = FunctionError::TimedOut { limit_ms: 3000 };
        assert_eq!(streamed.end(Outcome::Streamed), Ok(Outcome::Error(late)));
        assert_eq!(parts.recv().await, Some(ResponsePart::Begin { content_type: "a/b".into() }));

        drop(parts);
        let far = Instant::now() + Duration::from_secs(600);
        let mut streamed = Streamed::begin(begin(), &waited, far).await.unwrap();
        streamed.push(Chunk { payload: b"x".to_vec() }).await.unwrap();
        assert_eq!(streamed.end(Outcome::Streamed), Ok(Outcome::Streamed));
    }

    #[tokio::test]
    async fn what_the_guest_may_not_do_is_named() {
        let invocation = invocation(None);
        let long = Begin { content_type: "x".repeat(MAX_CONTENT_TYPE + 1) };
        assert!(Streamed::begin(long, &invocation, soon()).await.is_err());
        let mut streamed = Streamed::begin(begin(), &invocation, soon()).await.unwrap();
        assert!(streamed.push(Chunk { payload: vec![0; MAX_CHUNK + 1] }).await.is_err());
        let mut streamed = Streamed::begin(begin(), &invocation, soon()).await.unwrap();
        streamed.bytes = MAX_STREAM;
        assert!(streamed.push(Chunk { payload: vec![0] }).await.is_err());
        let streamed = Streamed::begin(begin(), &invocation, soon()).await.unwrap();
        let second = Outcome::Response { payload: Vec::new(), content_type: String::new() };
        assert!(streamed.end(second).is_err());
    }
}
