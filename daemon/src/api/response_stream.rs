//! An invocation whose response goes to the client while the function makes it.
//!
//! Between the function and the client lies one channel of a few chunks: a client that reads slowly
//! slows the function down, whose own time limit ends that; a client that goes away takes the rest
//! with it, and the function runs to its end unheard.

use std::{future::Future, io, num::NonZeroU64, pin::Pin, sync::Arc, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use firn::{ResponsePart, guest::MAX_CHUNK};
use futures_util::stream;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    backend::Backend,
    scheduler::{Refusal, Request, Room, Scheduler, Served},
};

/// Chunks that may wait for a client.
const CHUNKS: usize = 4;

/// KiB of memory that a streamed response may hold.
pub const ROOM_KIB: usize = CHUNKS * MAX_CHUNK / 1024;

/// Bytes of a response that are passed on as fast as the client takes them, as in Lambda.
const UNPACED: u64 = 6 << 20;

/// An invocation that has begun to answer, or has answered.
pub enum Invoked {
    /// Its response is not streamed, or it failed before it began to stream.
    Served(Served),
    /// Its response has begun.
    Begun {
        /// `Content-Type` as the runtime gave it.
        content_type: String,
        /// The rest.
        rest: Rest,
    },
}

/// The rest of a response that has begun.
pub struct Rest {
    parts: mpsc::Receiver<ResponsePart>,
    served: Pin<Box<dyn Future<Output = Result<Served, Refusal>> + Send>>,
    pace: Pace,
    /// For the parts, which may outlive the invocation.
    room: Option<Room>,
}

/// What messages a streamed response is made of.
pub trait Framing: Send + 'static {
    /// The next bytes.
    fn chunk(&mut self, bytes: Bytes) -> Bytes;
    /// The end; an error breaks the connection off, so that nobody takes half a response for a whole
    /// one.
    ///
    /// # Errors
    /// Says why for the log.
    fn end(self, result: Result<Served, Refusal>) -> io::Result<Option<Bytes>>;
}

/// Invokes; returns when the response begins or everything is over. `rate` is the most bytes a second
/// that go to the client after the first [`UNPACED`].
///
/// # Errors
/// Any [`Refusal`].
pub async fn invoke<B: Backend>(
    scheduler: &Arc<Scheduler<B>>,
    mut request: Request,
    rate: Option<NonZeroU64>,
) -> Result<Invoked, Refusal> {
    let (sink, mut parts) = mpsc::channel(CHUNKS);
    request.invocation.response = Some(sink);
    let room = request.room.clone();
    let scheduler = scheduler.clone();
    let mut served = Box::pin(async move { scheduler.invoke(request).await });
    tokio::select! {
        biased;
        part = parts.recv() => match part {
            Some(ResponsePart::Begin { content_type }) => {
                let rest = Rest { parts, served, pace: Pace::new(rate), room };
                Ok(Invoked::Begun { content_type, rest })
            }
            // The invocation has let go of its end without having begun.
            _ => served.await.map(Invoked::Served),
        },
        result = &mut served => result.map(Invoked::Served),
    }
}

impl Rest {
    /// The next bytes, when it is their time. `None`: that was all.
    pub async fn chunk(&mut self) -> Option<Bytes> {
        loop {
            // Nobody polls the invocation meanwhile: it is a task of its own.
            match self.parts.recv().await? {
                ResponsePart::Begin { .. } => {}
                ResponsePart::Chunk(bytes) => {
                    self.pace.wait_for(bytes.len()).await;
                    return Some(bytes);
                }
            }
        }
    }

    /// How it ended; after the last chunk.
    pub async fn end(self) -> Result<Served, Refusal> {
        let result = self.served.await;
        drop(self.room);
        result
    }

    /// `first`, then the rest, as a body.
    pub fn body(self, first: Bytes, framing: impl Framing) -> Body {
        let begun = (!first.is_empty()).then_some(first);
        Body::from_stream(stream::unfold(Some((begun, self, framing)), async |state| {
            let (first, mut rest, mut framing) = state?;
            let next = match first {
                Some(first) => Some(first),
                None => rest.chunk().await,
            };
            match next {
                Some(bytes) => Some((Ok(framing.chunk(bytes)), Some((None, rest, framing)))),
                None => Some((framing.end(rest.end().await).transpose()?, None)),
            }
        }))
    }
}

/// Keeps a response at its rate.
#[derive(Debug)]
struct Pace {
    unpaced: u64,
    rate: Option<NonZeroU64>,
    /// When what has been passed on has had its time.
    due: Instant,
}

impl Pace {
    fn new(rate: Option<NonZeroU64>) -> Self {
        Self { unpaced: UNPACED, rate, due: Instant::now() }
    }

    /// Returns when `bytes` more may go.
    async fn wait_for(&mut self, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let bytes = bytes as u64;
        let paced = bytes.saturating_sub(self.unpaced);
        self.unpaced = self.unpaced.saturating_sub(bytes);
        if paced > 0 {
            let took = Duration::from_secs_f64(paced as f64 / rate.get() as f64);
            self.due = self.due.max(Instant::now()) + took;
            tokio::time::sleep_until(self.due).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_response_is_slowed_down_after_its_first_bytes_only() {
        let started = Instant::now();
        let mut pace = Pace::new(NonZeroU64::new(1 << 20));
        for _ in 0..UNPACED / MAX_CHUNK as u64 {
            pace.wait_for(MAX_CHUNK).await;
        }
        assert!(started.elapsed() < Duration::from_millis(50));
        for _ in 0..4 {
            pace.wait_for(MAX_CHUNK).await;
        }
        let took = started.elapsed().as_secs_f64();
        assert!((0.25..0.6).contains(&took), "{took} s for 256 KiB at 1 MiB a second");
        let mut pace = Pace::new(None);
        let started = Instant::now();
        pace.wait_for(usize::MAX).await;
        assert!(started.elapsed() < Duration::from_millis(50));
    }
}
