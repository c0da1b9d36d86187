//! The loop: one order of the host's at a time, one runtime, one deadline.
//!
//! ```text
//!  host ── frame ──▶ Task ─────────────────────────▶ answer ──▶ host
//!                     ▲ ends when the runtime asks, answers or ends, or when time is up
//!  runtime ── request, exit
//! ```
//!
//! Invariants: an order is begun only when no task is open, so orders are handled as they came; a task
//! is closed exactly once, by its answer, which says nothing before the last of its calls was answered;
//! the pipes are emptied before the answer, so output belongs to the task that it was printed in; while
//! the guest is frozen nothing but the host's next frame is looked at.

mod answers;
mod orders;
mod runtime_events;
mod services;
mod task;
mod wait;

use std::time::Instant;

use firn_proto::guest::{self, FromGuest, Load, Ready, ToGuest};

use self::task::Task;
use crate::{
    calls::Calls,
    host::{Host, HostError},
    place::{Place, PlaceError},
    runtime::Runtime,
    signals::{SignalError, Signals},
    tsc,
};

/// Why the guest ends.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The host told it to.
    #[error("shut down by the host")]
    Shutdown,
    /// The invoke connection is of no more use.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest can't control the function any more.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// No signals.
    #[error(transparent)]
    Signals(#[from] SignalError),
    /// The kernel refused to wait.
    #[error("poll: {0}")]
    Poll(rustix::io::Errno),
    /// The host sent what makes no sense now.
    #[error("{0} while frozen: a thawed guest must be renewed first")]
    Frozen(&'static str),
    /// The host sent more orders ahead than it may.
    #[error("a third order before the first was done")]
    Crowded,
}

/// Everything that PID 1 knows.
#[derive(Debug)]
pub struct Agent {
    place: Place,
    host: Host,
    signals: Signals,
    load: Option<Load>,
    runtime: Option<Runtime>,
    task: Option<Task>,
    /// The answer to the last order, which waits for the last of its calls.
    ending: Option<FromGuest>,
    /// An order that came while answers to calls were waited for.
    ahead: Option<ToGuest>,
    calls: Calls,
    frozen: bool,
    /// When a runtime that reported its failure is killed.
    farewell: Option<Instant>,
    scratch: Box<[u8]>,
}

impl Agent {
    /// A guest that has no function yet.
    ///
    /// # Errors
    /// [`AgentError::Signals`].
    pub fn new(place: Place, host: Host) -> Result<Self, AgentError> {
        Ok(Self {
            place,
            host,
            signals: Signals::new()?,
            load: None,
            runtime: None,
            task: None,
            ending: None,
            ahead: None,
            calls: Calls::default(),
            frozen: false,
            farewell: None,
            scratch: vec![0; 64 * 1024].into_boxed_slice(),
        })
    }

    /// Says [`Ready`] and serves the host until there is a reason to end. Nothing of the function
    /// runs any more on return.
    pub fn run(mut self, init_tsc: u64) -> AgentError {
        let ready = Ready { version: guest::VERSION, init_tsc, ready_tsc: tsc() };
        let end = match self.host.send(&FromGuest::Ready(ready)) {
            Ok(()) => loop {
                if let Err(end) = self.turn() {
                    break end;
                }
            },
            Err(error) => error.into(),
        };
        if let Some(runtime) = self.runtime.take() {
            // The guest ends either way.
            let _ = self.place.kill(runtime.pid);
        }
        end
    }

    fn turn(&mut self) -> Result<(), AgentError> {
        self.pass_calls_on()?;
        self.host.flush()?;
        if self.is_free()
            && let Some(order) = self.ahead.take()
        {
            return self.begin(order);
        }
        if self.listens() {
            match self.host.receive() {
                Ok(Some(ToGuest::Answer(answer))) => return self.answered(answer),
                Ok(Some(order)) if self.is_free() => return self.begin(order),
                Ok(Some(order)) => match self.ahead.replace(order) {
                    None => return Ok(()),
                    Some(_) => return Err(AgentError::Crowded),
                },
                Ok(None) => {}
                // A frozen guest owes no answer, so nothing is lost with the connection.
                Err(lost) if self.frozen => self.host.replace(lost)?,
                Err(error) => return Err(error.into()),
            }
        }
        if !self.frozen {
            let now = Instant::now();
            if self.farewell.is_some_and(|end| now >= end) {
                return self.stop_runtime("killed after it reported its failure");
            }
            if let Some(task) = &self.task
                && now >= task.deadline()
            {
                let limit_ms = task.limit_ms();
                return self.time_out(limit_ms);
            }
        }
        for (source, events) in self.wait()? {
            self.serve(source, events)?;
        }
        while let Some((connection, incoming)) =
            self.runtime.as_mut().and_then(|runtime| runtime.server.incoming())
        {
            self.incoming(connection, incoming)?;
        }
        if self.signals.take() {
            self.reap()?;
        }
        Ok(())
    }

    /// Whether the next order may be begun.
    fn is_free(&self) -> bool {
        self.task.is_none() && self.ending.is_none()
    }

    /// Whether there is something to read from the host for.
    fn listens(&self) -> bool {
        self.task.is_none() || self.calls.are_open()
    }
}
