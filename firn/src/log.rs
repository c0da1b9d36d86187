//! Output of a function on its way to whoever keeps logs.

use std::fmt;

use firn_proto::guest;
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
