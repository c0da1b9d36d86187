//! What the host waits for, and how it is told what came of it.

use std::time::{Duration, Instant};

use firn_proto::guest::{Done, FromGuest, Invoke, Loaded, Outcome, Renew, Renewed};

use crate::tsc;

/// What the host waits for.
#[derive(Debug)]
pub(super) enum Task {
    Load { deadline: Instant, limit_ms: u64 },
    Renew { deadline: Instant, limit_ms: u64, since: Instant, message: Box<Renew>, renew_us: u64 },
    Invoke(Box<Invocation>),
}

#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) invoke: Invoke,
    pub(super) read_tsc: u64,
    pub(super) deadline: Instant,
    pub(super) limit_ms: u64,
    /// When a new runtime was started for it.
    pub(super) init: Option<Instant>,
    pub(super) init_us: u64,
    pub(super) handed_out: Option<Instant>,
    /// Bytes of the response that have been streamed.
    pub(super) streamed: u64,
}

impl Task {
    /// When it is ended.
    pub(super) fn deadline(&self) -> Instant {
        match self {
            Self::Load { deadline, .. } | Self::Renew { deadline, .. } => *deadline,
            Self::Invoke(invocation) => invocation.deadline,
        }
    }

    /// The limit that is told then.
    pub(super) fn limit_ms(&self) -> u64 {
        match self {
            Self::Load { limit_ms, .. } | Self::Renew { limit_ms, .. } => *limit_ms,
            Self::Invoke(invocation) => invocation.limit_ms,
        }
    }

    /// What the host is told of it now: `None` is success where there is nothing to tell.
    pub(super) fn answer(self, outcome: Option<Outcome>, max_memory_bytes: u64) -> FromGuest {
        let error = |outcome| match outcome {
            Some(Outcome::Error(error)) => Some(error),
            _ => None,
        };
        match self {
            Self::Load { deadline, limit_ms } => {
                let started = deadline - Duration::from_millis(limit_ms);
                let loaded = Loaded { init_us: micros(started), error: error(outcome) };
                FromGuest::Loaded(loaded)
            }
            Self::Renew { since, message, renew_us, .. } => FromGuest::Renewed(Renewed {
                instance_id: message.instance_id,
                renew_us,
                hooks_us: micros(since),
                error: error(outcome),
            }),
            Self::Invoke(invocation) => {
                let duration_us = invocation.handed_out.map_or(0, micros);
                let init_us = match (invocation.handed_out, invocation.init) {
                    (None, Some(init)) => micros(init),
                    _ => invocation.init_us,
                };
                let outcome = outcome.unwrap_or(Outcome::Response {
                    payload: Vec::new(),
                    content_type: String::new(),
                });
                FromGuest::Done(Done {
                    request_id: invocation.invoke.request_id,
                    outcome,
                    duration_us,
                    init_us,
                    max_memory_bytes,
                    tsc: (invocation.read_tsc, tsc()),
                })
            }
        }
    }
}

/// Microseconds since then.
pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
