//! Where what comes out of an instance goes: output to whoever keeps logs, and what the function asks of
//! services to whoever has them.

use std::{fmt, pin::Pin, sync::Arc};

use firn_proto::guest::{self, Ask, HttpReply};
use tokio::sync::mpsc;

/// A piece of a function's output.
#[derive(Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Where it came from.
    pub stream: guest::Stream,
    /// At most [`guest::MAX_LOG`] bytes, not necessarily UTF-8, without the line's end.
    pub line: Vec<u8>,
    /// The line goes on in the next piece of the same stream.
    pub partial: bool,
}

impl fmt::Debug for LogLine {
    /// Without the line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream, line, partial } = self;
        f.debug_struct("LogLine")
            .field("stream", stream)
            .field("bytes", &line.len())
            .field("partial", partial)
            .finish()
    }
}

/// Where output goes. The channel is bounded on purpose: a function that prints faster than its
/// reader takes is slowed down, so whoever calls [`Instance::load`](crate::Instance::load) or
/// [`Instance::invoke`](crate::Instance::invoke) must drain the receiver in another task at the
/// same time. Every line that came before an answer is in the channel when the call returns; once
/// the receiver is gone, lines are dropped.
pub type LogSink = mpsc::Sender<LogLine>;

/// Services that a function can reach: its credentials, and whatever speaks HTTP.
///
/// The guest is hostile: what it asks is within the limits of [`guest`], and nothing else is known of it.
pub trait Services: fmt::Debug + Send + Sync {
    /// Finds out what the function asks for. Dropped where the invocation ends, or the instance. An answer
    /// over [`guest::MAX_CALL`] or [`guest::MAX_CALL_HEAD`] is as good as none.
    fn call(&self, ask: Ask) -> Pin<Box<dyn Future<Output = HttpReply> + Send>>;
}

/// Where what comes out of an instance goes.
#[derive(Debug, Clone, Default)]
pub struct Outlets {
    /// Its output; `None`: nowhere.
    pub log: Option<LogSink>,
    /// What it asks; `None`: it has no services.
    pub services: Option<Arc<dyn Services>>,
}

impl From<LogSink> for Outlets {
    fn from(log: LogSink) -> Self {
        Self { log: Some(log), services: None }
    }
}
