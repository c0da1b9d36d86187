//! A running microVM and what can be done with it.

use std::{
    fmt,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use firn_pages::PAGE;
use firn_proto::{
    control::{self, DiskSource, FromVmm, ToVmm},
    guest::{self, Done, FromGuest, Invoke, Load, Outcome, ToGuest},
};
use tokio::time::Instant;

use crate::{
    Disk, Image, Outlets, Phases, ResidentSnapshot, ResponseSink,
    channel::name as message_name,
    host::Inner,
    phases::Stopwatch,
    response::Streamed,
    shell::CODE_SLOT,
    snapshot::{self, Sample},
    stream::Stream,
    vm::{Trouble, Vm, diagnosed, unexpected},
};

/// What a guest gets beyond a function's own time limit to say that it has passed.
const GRACE: Duration = Duration::from_secs(2);

/// Time that a new runtime may take to start when the last one has ended, on top.
const RESTART: Duration = Duration::from_secs(10);

/// Longest time limit of a function.
const MAX_TIMEOUT: Duration = Duration::from_secs(900);

/// What to run in an instance.
#[derive(Clone)]
pub struct FunctionSpec {
    /// Whole environment of the runtime but `AWS_LAMBDA_RUNTIME_API`, which the guest adds.
    pub environment: Vec<(String, String)>,
    /// Memory of the function in MB, enforced in the guest; CPU time is in proportion to it.
    pub memory_mb: u32,
    /// Time that initialisation may take.
    pub init_timeout: Duration,
    /// The function's code; `None`: the image itself is the function.
    pub code: Option<Disk>,
    /// Variables that are to hold the URL of the services, unless the environment has them. None: the
    /// function has no services, and no credentials.
    pub endpoints: Vec<String>,
    /// Where its output goes, and what it asks of services.
    pub outlets: Outlets,
}

impl fmt::Debug for FunctionSpec {
    /// Without the environment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { environment, memory_mb, init_timeout, code, .. } = self;
        f.debug_struct("FunctionSpec")
            .field("variables", &environment.len())
            .field("memory_mb", memory_mb)
            .field("init_timeout", init_timeout)
            .field("code", code)
            .finish_non_exhaustive()
    }
}

/// One event for a function.
#[derive(Clone, Default)]
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
    /// Where the response goes if the function streams it. `None`: it is gathered, and is in the
    /// outcome like any other, with the same limit.
    pub response: Option<ResponseSink>,
}

impl fmt::Debug for Invocation {
    /// Without the event and what comes with it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request_id, function_arn, timeout, payload, .. } = self;
        f.debug_struct("Invocation")
            .field("request_id", request_id)
            .field("function_arn", function_arn)
            .field("timeout", timeout)
            .field("payload_bytes", &payload.len())
            .finish_non_exhaustive()
    }
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
    /// For the first invocation after a thaw or reset: what the guest said about its renewal.
    pub renewed: Option<guest::Renewed>,
    /// Documents that the function has sent to its X-Ray daemon, as they came: at most
    /// [`guest::MAX_SEGMENTS`] bytes. Only those of invocations whose trace header says `Sampled=1`.
    pub segments: Vec<Bytes>,
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
            (None, Some(libc::SIGSYS), _) => {
                write!(f, "killed for a system call that its filter forbids (SIGSYS)")?;
            }
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
    #[error("no answer to {operation} within {after:?}{}", diagnosed(diagnosis))]
    Unresponsive {
        /// What it was asked.
        operation: &'static str,
        /// How long it was given.
        after: Duration,
        /// Where its vCPUs, interrupts and queues stood then, if its VMM could tell.
        diagnosis: Option<String>,
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
    /// A guest that was reset did not repeat its new identity; it was killed.
    #[error("the reset guest calls itself {found:?}, not {expected:?}")]
    NotRenewed {
        /// The identity that it was given.
        expected: String,
        /// What it said.
        found: String,
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

impl InstanceError {
    /// No vCPU of the guest has run since it was given what it did not do: whoever gives it to
    /// another instance does not do it twice.
    pub fn has_not_run(&self) -> bool {
        matches!(self, Self::Died { exit } if exit.reason == Some(control::ExitReason::NotRestored))
    }

    pub(crate) fn from_trouble(operation: &'static str) -> impl Fn(Trouble) -> Self {
        move |trouble| match trouble {
            Trouble::Died(exit) => Self::Died { exit },
            Trouble::TimedOut { after, diagnosis } => {
                Self::Unresponsive { operation, after, diagnosis }
            }
            Trouble::Refused(failure) => {
                Self::Refused { operation, kind: failure.kind, message: failure.message }
            }
            Trouble::Protocol(message) => Self::Protocol { operation, message },
            Trouble::Request(message) => Self::Request(message),
            Trouble::Io(source) => Self::Io { operation, source },
        }
    }
}

/// Where an instance comes from.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    /// Booted.
    Booted { image: Image, ready: guest::Ready },
    /// Thawed.
    Thawed { snapshot: ResidentSnapshot },
}

impl Origin {
    pub(crate) fn image(&self) -> &Image {
        match self {
            Self::Booted { image, .. } => image,
            Self::Thawed { snapshot } => snapshot.image(),
        }
    }
}

/// A running microVM. Dropping it kills it.
#[derive(Debug)]
pub struct Instance {
    pub(crate) inner: Arc<Inner>,
    pub(crate) vm: Vm,
    id: String,
    pub(crate) origin: Origin,
    /// The disk in the code slot.
    pub(crate) code: Option<Disk>,
    /// Memory of the function in MB; the whole class before one is loaded.
    pub(crate) function_memory_mb: u32,
    renewed: Option<guest::Renewed>,
    phases: Phases,
    /// Something was loaded since the start.
    pub(crate) loaded: bool,
    /// Back at its snapshot: it needs a new identity before the next event.
    pub(crate) fresh: bool,
    /// What it touches is to be noted when it is paused.
    pub(crate) watched: Option<Watched>,
}

/// A clone whose pages are looked at. However it ends, its snapshot learns of it.
#[derive(Debug)]
pub(crate) struct Watched {
    snapshot: ResidentSnapshot,
    sample: Option<Sample>,
}

impl Watched {
    pub(crate) fn new(snapshot: &ResidentSnapshot) -> Self {
        Self { snapshot: snapshot.clone(), sample: None }
    }

    /// Looks at the paused process `pid`, whose guest memory lies at `address`.
    fn look(mut self, pid: u32, address: u64) -> ResidentSnapshot {
        let pages = self.snapshot.class().memory_bytes() / PAGE;
        match snapshot::observe(pid, address, pages) {
            Ok(sample) => self.sample = Some(sample),
            Err(error) => tracing::debug!(%error, pid, "can't see which pages a clone has written"),
        }
        self.snapshot.clone()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.snapshot.watched(self.sample.take());
    }
}

impl Instance {
    pub(crate) fn new(
        inner: Arc<Inner>,
        vm: Vm,
        id: String,
        origin: Origin,
        phases: Phases,
    ) -> Self {
        let (code, function_memory_mb) = match &origin {
            Origin::Booted { .. } => (None, vm.class.memory_mib),
            Origin::Thawed { snapshot } => {
                (snapshot.code().cloned(), snapshot.function_memory_mb())
            }
        };
        Self {
            inner,
            vm,
            id,
            origin,
            code,
            function_memory_mb,
            renewed: None,
            phases,
            loaded: false,
            fresh: false,
            watched: None,
        }
    }

    pub(crate) fn set_renewed(&mut self, renewed: guest::Renewed) {
        self.renewed = Some(renewed);
    }

    pub(crate) fn set_identity(&mut self, id: String) {
        self.id = id;
    }

    /// Unique for ever; another one after a reset, from the next event on.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Process id of its VMM.
    pub fn pid(&self) -> u32 {
        self.vm.process.pid()
    }

    /// How its start went.
    pub fn start_phases(&self) -> &Phases {
        &self.phases
    }

    /// What the guest said first, if the instance was booted: its TSC, which starts at 0 where the
    /// kernel is entered, at the first instruction of its init.
    pub fn booted(&self) -> Option<&guest::Ready> {
        match &self.origin {
            Origin::Booted { ready, .. } => Some(ready),
            Origin::Thawed { .. } => None,
        }
    }

    /// What the guest said about its renewal, if the instance was thawed.
    pub fn renewed(&self) -> Option<&guest::Renewed> {
        self.renewed.as_ref()
    }

    /// Whether its process was running at the moment of the question.
    pub fn is_alive(&self) -> bool {
        self.vm.process.is_alive()
    }

    /// Attaches the code and starts the runtime.
    ///
    /// # Errors
    /// Any [`InstanceError`]. A function that fails to initialise is no error: see
    /// [`LoadReport::error`].
    pub async fn load(
        &mut self,
        spec: &FunctionSpec,
        for_snapshot: bool,
    ) -> Result<LoadReport, InstanceError> {
        let trouble = InstanceError::from_trouble("load");
        let mut watch = Stopwatch::start();
        self.loaded = true;
        self.vm.stream().map_err(&trouble)?.set_outlets(spec.outlets.clone());
        if let Some(code) = &spec.code {
            let attach = ToVmm::Attach { slot: CODE_SLOT, source: DiskSource::ReadOnly };
            self.vm.order(&attach, &[code.file().as_fd()]).await.map_err(&trouble)?;
        }
        self.code = spec.code.clone();
        self.function_memory_mb = spec.memory_mb;
        watch.mark("attached");
        let load = ToGuest::Load(Load {
            environment: spec.environment.clone(),
            memory_bytes: u64::from(spec.memory_mb) << 20,
            init_timeout_ms: spec.init_timeout.as_millis() as u64,
            snapshot: for_snapshot,
            code: spec.code.is_some(),
            endpoints: spec.endpoints.clone(),
        });
        self.vm.queue(&load).await.map_err(&trouble)?;
        watch.mark("sent");
        let within = spec.init_timeout + GRACE * self.vm.patience;
        match self.vm.frame(within).await.map_err(&trouble)? {
            FromGuest::Loaded(loaded) => {
                watch.mark("loaded");
                let phases = watch.finish();
                let init_us = believed(loaded.init_us, within);
                Ok(LoadReport { init_us, error: loaded.error, phases })
            }
            other => Err(trouble(self.vm.violated("Loaded", &other))),
        }
    }

    /// Handles one event. A paused instance resumes by itself. It is done when the response is
    /// complete, streamed or not. Dropping the future before it is
    /// done leaves an instance whose next answer is to the wrong question: retire it.
    ///
    /// # Errors
    /// Any [`InstanceError`]. A function that fails is no error: see [`InvokeReport::outcome`].
    pub async fn invoke(&mut self, invocation: &Invocation) -> Result<InvokeReport, InstanceError> {
        let trouble = InstanceError::from_trouble("invoke");
        let mut watch = Stopwatch::start();
        // Initialisation has all the CPU time there is; from the first event on it is limited.
        if self.inner.config.cpu_limits {
            let limited = self.vm.limit_cpu(self.function_memory_mb).await;
            limited.map_err(InstanceError::from_trouble("limit CPU time"))?;
        }
        if self.fresh {
            return self.invoke_fresh(invocation).await;
        }
        let message = invoke_message(invocation).map_err(InstanceError::Request)?;
        if let Some(stream) = &mut self.vm.stream {
            stream.expect_first_byte();
        }
        self.vm.queue(&message).await.map_err(&trouble)?;
        watch.mark("sent");
        let done = await_done(&mut self.vm, invocation).await.map_err(&trouble)?;
        if let Some(ns) = self.vm.stream.as_ref().and_then(Stream::first_byte_ns) {
            watch.at("first byte", ns);
        }
        watch.mark("done");
        Ok(report(&mut self.vm, done, None, watch.finish()))
    }

    /// Stops the vCPUs until the next event.
    ///
    /// # Errors
    /// Any [`InstanceError`].
    pub async fn pause(&mut self) -> Result<(), InstanceError> {
        let trouble = InstanceError::from_trouble("pause");
        match self.vm.request(&ToVmm::Pause, &[]).await.map_err(&trouble)? {
            FromVmm::Paused(again) => self.inner.raised_again(&self.vm.name, again),
            other => return Err(trouble(unexpected("Paused", message_name(&other)))),
        }
        if let Some(watched) = self.watched.take() {
            let (pid, address) = (self.pid(), self.stats().await?.memory_address);
            let looking = tokio::task::spawn_blocking(move || watched.look(pid, address));
            // What it finds is advice; a panic would have been reported by its own thread.
            if let Ok(snapshot) = looking.await {
                self.inner.copies(self.vm.class, snapshot.working_set().copied_regions);
            }
        }
        Ok(())
    }

    /// Has a paused microVM give back memory that it holds without need, in bytes; its next events
    /// are slower for it. For instances that have been idle for a while.
    ///
    /// # Errors
    /// Any [`InstanceError`].
    pub async fn reclaim(&mut self) -> Result<u64, InstanceError> {
        let trouble = InstanceError::from_trouble("reclaim");
        match self.vm.request(&ToVmm::Reclaim, &[]).await.map_err(&trouble)? {
            FromVmm::Reclaimed(pages) => Ok(pages * PAGE),
            other => Err(trouble(unexpected("Reclaimed", message_name(&other)))),
        }
    }

    /// The VMM's counters.
    ///
    /// # Errors
    /// Any [`InstanceError`].
    pub async fn stats(&mut self) -> Result<control::Stats, InstanceError> {
        let trouble = InstanceError::from_trouble("stats");
        match self.vm.request(&ToVmm::Stats, &[]).await.map_err(&trouble)? {
            FromVmm::Stats(stats) => Ok(stats),
            other => Err(trouble(unexpected("Stats", message_name(&other)))),
        }
    }

    /// Kills the microVM; cleaning up goes on in the background, and [`Host::shutdown`] waits for
    /// it.
    ///
    /// [`Host::shutdown`]: crate::Host::shutdown
    pub async fn retire(self) {
        drop(self);
    }
}

/// Time since the epoch.
pub(crate) fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The message for an event.
pub(crate) fn invoke_message(invocation: &Invocation) -> Result<ToGuest, String> {
    if invocation.payload.len() > guest::MAX_PAYLOAD {
        let (size, limit) = (invocation.payload.len(), guest::MAX_PAYLOAD);
        return Err(format!("event of {size} bytes exceeds the limit of {limit}"));
    }
    if invocation.timeout > MAX_TIMEOUT {
        let (timeout, limit) = (invocation.timeout, MAX_TIMEOUT);
        return Err(format!("timeout of {timeout:?} exceeds the limit of {limit:?}"));
    }
    let Invocation { request_id, function_arn, trace_id, client_context, cognito_identity, .. } =
        invocation.clone();
    Ok(ToGuest::Invoke(Invoke {
        request_id,
        function_arn,
        trace_id,
        client_context,
        cognito_identity,
        deadline_ms: (wall_clock() + invocation.timeout).as_millis() as u64,
        timeout_ms: invocation.timeout.as_millis() as u64,
        payload: invocation.payload.to_vec(),
    }))
}

/// A time that the guest says it took, in microseconds: no more than there was.
pub(crate) fn believed(us: u64, within: Duration) -> u64 {
    us.min(within.as_micros() as u64)
}

/// Waits for the answer to an event that was sent.
pub(crate) async fn await_done(vm: &mut Vm, invocation: &Invocation) -> Result<Done, Trouble> {
    let within = invocation.timeout + (GRACE + RESTART) * vm.patience;
    let now = Instant::now();
    let (end, mut streamed) = (now + within, None);
    let mut done = loop {
        let part = match (vm.frame_until(end, within).await?, &mut streamed) {
            (FromGuest::Done(done), _) => break done,
            (FromGuest::Begin(begin), None) => {
                let until = now + invocation.timeout + GRACE * vm.patience;
                let begun = Streamed::begin(begin, invocation, until).await;
                begun.map(|begun| streamed = Some(begun))
            }
            (FromGuest::Chunk(chunk), Some(streamed)) => streamed.push(chunk).await,
            (other, _) => return Err(vm.violated("Done", &other)),
        };
        part.map_err(|message| vm.kill_for(message))?;
    };
    done.duration_us = believed(done.duration_us, within);
    done.init_us = believed(done.init_us, within);
    if done.request_id != invocation.request_id {
        let (found, expected) = (&done.request_id, &invocation.request_id);
        return Err(vm.kill_for(format!("answer to request {found:?} instead of {expected:?}")));
    }
    match (&done.outcome, streamed) {
        (Outcome::Response { payload, .. }, None) if payload.len() > guest::MAX_PAYLOAD => {
            let (size, limit) = (payload.len(), guest::MAX_PAYLOAD);
            Err(vm.kill_for(format!("answer of {size} bytes exceeds the limit of {limit}")))
        }
        (Outcome::Streamed, None) => Err(vm.kill_for("the end of no stream".to_owned())),
        (_, None) => Ok(done),
        (_, Some(streamed)) => {
            let outcome = streamed.end(done.outcome).map_err(|message| vm.kill_for(message))?;
            Ok(Done { outcome, ..done })
        }
    }
}

pub(crate) fn report(
    vm: &mut Vm,
    done: Done,
    renewed: Option<guest::Renewed>,
    phases: Phases,
) -> InvokeReport {
    let Done { outcome, duration_us, init_us, max_memory_bytes, tsc, .. } = done;
    let segments = vm.stream.as_mut().map(Stream::take_segments).unwrap_or_default();
    InvokeReport { outcome, duration_us, init_us, max_memory_bytes, tsc, renewed, segments, phases }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_says_how() {
        let said = |reason, code, signal, detail: &str| {
            VmmExit { reason, code, signal, detail: detail.into() }.to_string()
        };
        assert!(said(None, None, Some(libc::SIGSYS), "").contains("its filter forbids"));
        assert_eq!(said(None, None, Some(libc::SIGKILL), ""), "killed by signal 9");
        assert_eq!(said(None, Some(44), None, "can't x"), "exit code 44: can't x");
        let reason = Some(control::ExitReason::TripleFault);
        assert_eq!(said(reason, Some(11), None, "RIP"), "TripleFault: RIP");
    }

    #[test]
    fn environments_do_not_print() {
        let spec = FunctionSpec {
            environment: vec![("TOKEN".into(), "planted".into())],
            memory_mb: 128,
            init_timeout: Duration::from_secs(1),
            code: None,
            endpoints: Vec::new(),
            outlets: Outlets::default(),
        };
        let text = format!("{spec:?} {spec:#?}");
        assert!(!text.contains("planted"), "{text}");
    }
}
