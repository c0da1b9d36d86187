//! A running microVM and what can be done with it.

use std::{fmt, path::Path, time::Duration};

use bytes::Bytes;
use firn_proto::{control, guest};

use crate::{Disk, LogSink, Phases, Snapshot, SnapshotError, SnapshotMeta};

/// What to run in an instance.
#[derive(Debug, Clone)]
pub struct FunctionSpec {
    /// Whole environment of the runtime but `AWS_LAMBDA_RUNTIME_API`, which the guest adds.
    pub environment: Vec<(String, String)>,
    /// Memory of the function in MB, enforced in the guest; CPU time is in proportion to it.
    pub memory_mb: u32,
    /// Time that initialisation may take.
    pub init_timeout: Duration,
    /// The function's code; `None`: the image itself is the function.
    pub code: Option<Disk>,
    /// Where its output goes.
    pub log: LogSink,
}

/// One event for a function.
#[derive(Debug, Clone, Default)]
pub struct Invocation {
    /// Id of the request.
    pub request_id: String,
    /// Name that the function was called by.
    pub function_arn: String,
    /// Trace header; empty: none.
    pub trace_id: String,
    /// Client context (JSON); empty: none.
    pub client_context: String,
    /// Cognito identity (JSON); empty: none.
    pub cognito_identity: String,
    /// Time that the function may take; the guest enforces it.
    pub timeout: Duration,
    /// The event, at most [`guest::MAX_PAYLOAD`] bytes.
    pub payload: Bytes,
}

/// How initialisation went.
#[derive(Debug, Clone)]
pub struct LoadReport {
    /// From start of the runtime to its first request for work, in microseconds.
    pub init_us: u64,
    /// `None`: ready.
    pub error: Option<guest::FunctionError>,
    /// `attached`, `sent`, `loaded`.
    pub phases: Phases,
}

/// How an invocation went.
#[derive(Debug, Clone)]
pub struct InvokeReport {
    /// The result.
    pub outcome: guest::Outcome,
    /// From handing out the event to the runtime's answer, in microseconds, as the guest measured.
    pub duration_us: u64,
    /// Time spent on starting a new runtime because the last one had ended, in microseconds.
    pub init_us: u64,
    /// Highest memory use of the runtime so far.
    pub max_memory_bytes: u64,
    /// The guest's TSC when it had read the event, and when it made its answer.
    pub tsc: (u64, u64),
    /// For the first invocation after a thaw: what the guest said about its renewal.
    pub renewed: Option<guest::Renewed>,
    /// After a thaw: `shell`, `sent`, `received`, `mapped`, `devices set`, `vcpu set`, `entered`,
    /// `first byte`, `renewed`, `done`; otherwise `sent`, `first byte`, `done`.
    pub phases: Phases,
}

/// How a microVM's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmExit {
    /// What the VMM said, if it said anything.
    pub reason: Option<control::ExitReason>,
    /// Its exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that killed it, if one did.
    pub signal: Option<i32>,
    /// What is known beyond that: the VMM's words, or the end of its standard error.
    pub detail: String,
}

impl fmt::Display for VmmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.reason, self.signal, self.code) {
            (Some(reason), ..) => write!(f, "{reason:?}")?,
            (None, Some(signal), _) => write!(f, "killed by signal {signal}")?,
            (None, None, Some(code)) => write!(f, "exit code {code}")?,
            (None, None, None) => write!(f, "unknown end")?,
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

/// Why an instance could not do what it was asked. After any of these it is useless: retire it.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The guest or its VMM ended.
    #[error("the microVM ended: {exit}")]
    Died {
        /// How.
        exit: VmmExit,
    },
    /// It did not answer in time and was killed.
    #[error("no answer to {operation} within {after:?}")]
    Unresponsive {
        /// What it was asked.
        operation: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// The VMM refused.
    #[error("the VMM refused {operation}: {message}")]
    Refused {
        /// What it was asked.
        operation: &'static str,
        /// Class of the failure.
        kind: control::FailureKind,
        /// Its words.
        message: String,
    },
    /// The guest or the VMM broke its protocol; it was killed.
    #[error("protocol violation in {operation}: {message}")]
    Protocol {
        /// What it was asked.
        operation: &'static str,
        /// What was wrong.
        message: String,
    },
    /// What was asked can't be sent: it is too long, for one.
    #[error("{0}")]
    Request(String),
    /// The host's own kernel refused.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// A running microVM. Dropping it kills it.
#[derive(Debug)]
pub struct Instance {
    id: String,
    phases: Phases,
}

impl Instance {
    /// Unique for ever.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Process id of its VMM.
    pub fn pid(&self) -> u32 {
        unimplemented!()
    }

    /// How its start went.
    pub fn start_phases(&self) -> &Phases {
        &self.phases
    }

    /// What the guest said about its renewal, if the instance was thawed.
    pub fn renewed(&self) -> Option<&guest::Renewed> {
        unimplemented!()
    }

    /// Whether its process was running at the moment of the question.
    pub fn is_alive(&self) -> bool {
        unimplemented!()
    }

    /// From now on output goes to `sink`.
    pub fn set_log(&mut self, _sink: LogSink) {
        unimplemented!()
    }

    /// Attaches the code and starts the runtime.
    ///
    /// # Errors
    /// Any [`InstanceError`]. A function that fails to initialise is no error: see
    /// [`LoadReport::error`].
    pub async fn load(
        &mut self,
        _spec: &FunctionSpec,
        _for_snapshot: bool,
    ) -> Result<LoadReport, InstanceError> {
        unimplemented!()
    }

    /// Handles one event. A paused instance resumes by itself.
    ///
    /// # Errors
    /// Any [`InstanceError`]. A function that fails is no error: see [`InvokeReport::outcome`].
    pub async fn invoke(
        &mut self,
        _invocation: &Invocation,
    ) -> Result<InvokeReport, InstanceError> {
        unimplemented!()
    }

    /// Stops the vCPUs until the next event.
    ///
    /// # Errors
    /// Any [`InstanceError`].
    pub async fn pause(&mut self) -> Result<(), InstanceError> {
        unimplemented!()
    }

    /// Freezes the runtime, writes the microVM to the new directory `dir`, and retires it. On any
    /// failure nothing is left at or beside `dir`.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub async fn snapshot(
        self,
        _dir: &Path,
        _meta: SnapshotMeta,
    ) -> Result<Snapshot, SnapshotError> {
        unimplemented!()
    }

    /// The VMM's counters.
    ///
    /// # Errors
    /// Any [`InstanceError`].
    pub async fn stats(&mut self) -> Result<control::Stats, InstanceError> {
        unimplemented!()
    }

    /// Kills the microVM; cleaning up goes on in the background.
    pub async fn retire(self) {
        unimplemented!()
    }
}
