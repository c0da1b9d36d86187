//! Finds an instance for each request: a warm one, else one thawed from the function's snapshot,
//! else one that is booted.
//!
//! Rules that hold here:
//! - An instance serves one request at a time, and only the function and fingerprint that it was
//!   made for.
//! - A request that has begun runs to its end even if its caller goes away.
//! - Work that the caller need not wait for (pausing, retiring, writing logs) happens after the
//!   answer.
//! - Nothing grows without a limit: requests in flight, instances by host memory, idle time.

mod admission;
mod pool;
mod trace;

use std::{
    collections::BTreeMap,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use firn::{InstanceError, Invocation, InvokeReport, ShellClass, StartError, guest};
use serde::Serialize;
use tokio::sync::Semaphore;

pub use self::trace::Trace;
use self::{
    admission::Admission,
    pool::{Pools, Take},
};
use crate::{
    backend::{Backend, Machine},
    function::{Function, now_ms},
    outcome::Answer,
    prepare::Preparer,
    report::{self, Report},
    workshop::{Output, Workshop},
};

/// What bounds the scheduler.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests in flight at once.
    pub concurrency: usize,
    /// How long an instance waits for work.
    pub idle: Duration,
    /// Host memory in MiB that instances leave alone.
    pub reserve_mib: u64,
}

/// How an instance came to serve a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StartKind {
    /// Booted, then initialised.
    Boot,
    /// Thawed from the function's snapshot.
    Thaw,
    /// It was there.
    Warm,
}

impl StartKind {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Thaw => "thaw",
            Self::Warm => "warm",
        }
    }
}

impl FromStr for StartKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Boot, Self::Thaw, Self::Warm].into_iter().find(|k| k.word() == text).ok_or(())
    }
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What to run.
    pub function: Arc<Function>,
    /// The event.
    pub invocation: Invocation,
    /// Start this way or not at all.
    pub force: Option<StartKind>,
    /// When what happened.
    pub trace: Trace,
}

/// A request that was served.
#[derive(Debug)]
pub struct Served {
    /// How its instance came to be.
    pub kind: StartKind,
    /// What the caller gets.
    pub answer: Answer,
    /// The last bytes of its log.
    pub tail: Vec<u8>,
    /// When what happened.
    pub trace: Trace,
}

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A limit is reached.
    #[error("too many requests at once")]
    Throttled,
    /// The forced kind of start is not possible now.
    #[error("{0}")]
    Impossible(String),
    /// Firn failed.
    #[error("{0}")]
    Failed(String),
}

/// A live instance as listed.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Listed {
    /// Whose it is.
    pub function_name: String,
    /// Process id of its VMM.
    pub pid: u32,
    /// How it came to be.
    pub start: StartKind,
    /// Milliseconds since the epoch.
    pub started_ms: i64,
    /// `busy` or `idle`.
    pub state: &'static str,
    /// Requests that it was given.
    pub invocations: u64,
}

/// An instance and what belongs to it.
#[derive(Debug)]
struct Worker<M> {
    machine: M,
    output: Output,
    function: String,
    fingerprint: String,
}

/// Schedules all requests of a host.
#[derive(Debug)]
pub struct Scheduler<B: Backend> {
    workshop: Workshop<B>,
    preparer: Arc<Preparer<B>>,
    pools: Pools<Worker<B::Machine>>,
    limits: Limits,
    permits: Arc<Semaphore>,
    admission: Admission,
    instances: Mutex<BTreeMap<String, Listed>>,
}

impl<B: Backend> Scheduler<B> {
    /// A scheduler, with its housekeeping running until it is dropped.
    pub fn start(workshop: Workshop<B>, preparer: Arc<Preparer<B>>, limits: Limits) -> Arc<Self> {
        let scheduler = Arc::new(Self {
            workshop,
            preparer,
            pools: Pools::default(),
            limits,
            permits: Arc::new(Semaphore::new(limits.concurrency)),
            admission: Admission::new(limits.reserve_mib),
            instances: Mutex::default(),
        });
        let weak = Arc::downgrade(&scheduler);
        tokio::spawn(async move {
            // Often enough that short idle times in tests hold, rarely enough to cost nothing.
            let step = (limits.idle / 10).clamp(Duration::from_millis(50), Duration::from_secs(1));
            loop {
                tokio::time::sleep(step).await;
                let Some(scheduler) = weak.upgrade() else { return };
                scheduler.admission.refresh();
                let unfit = |worker: &Worker<B::Machine>| !worker.machine.is_alive();
                for worker in scheduler.pools.expire(scheduler.limits.idle, unfit) {
                    scheduler.retire(worker);
                }
            }
        });
        scheduler
    }

    /// A function is new or has changed.
    pub fn deployed(&self, function: &Arc<Function>, before: Option<&Function>) {
        let place = &self.workshop.place;
        let fingerprint = function.fingerprint(place);
        for worker in self.pools.switch(&function.name, &fingerprint) {
            self.retire(worker);
        }
        if let Some(old) = before.map(|f| f.fingerprint(place)).filter(|old| *old != fingerprint) {
            self.preparer.forget(&function.name, &old);
        }
        self.preparer.ensure(function.clone());
    }

    /// A function is gone.
    pub fn removed(&self, function: &Function) {
        for worker in self.pools.remove(&function.name) {
            self.retire(worker);
        }
        self.preparer.forget(&function.name, &function.fingerprint(&self.workshop.place));
    }

    /// Where the snapshot of a function stands.
    pub fn snapshot(&self, function: &Function) -> crate::prepare::Status {
        self.preparer.status(&function.name, &function.fingerprint(&self.workshop.place))
    }

    /// All live instances by id.
    pub fn instances(&self) -> BTreeMap<String, Listed> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes no more requests, gives those in flight `patience`, and kills what is left.
    pub async fn close(&self, patience: Duration) {
        let all = self.limits.concurrency as u32;
        if tokio::time::timeout(patience, self.permits.acquire_many(all)).await.is_err() {
            tracing::warn!("invocations in flight are cut off");
        }
        self.permits.close();
        drop(self.pools.drain());
        self.workshop.backend.shutdown().await;
        self.workshop.logs.flush().await;
    }

    /// Serves a request.
    ///
    /// # Errors
    /// Any [`Refusal`].
    pub async fn invoke(self: &Arc<Self>, request: Request) -> Result<Served, Refusal> {
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            return Err(if self.permits.is_closed() {
                Refusal::Failed("firnd is shutting down".into())
            } else {
                Refusal::Throttled
            });
        };
        let scheduler = self.clone();
        // A task of its own: it goes on when the caller hangs up.
        let task = tokio::spawn(async move {
            let _permit = permit;
            scheduler.serve(request).await
        });
        task.await.unwrap_or_else(|error| Err(Refusal::Failed(format!("internal error: {error}"))))
    }

    async fn serve(self: Arc<Self>, mut request: Request) -> Result<Served, Refusal> {
        let fingerprint = request.function.fingerprint(&self.workshop.place);
        if matches!(request.force, None | Some(StartKind::Warm)) {
            if let Some(worker) = self.take(&request.function.name, &fingerprint).await {
                return self.serve_warm(worker, request).await;
            }
            if request.force.is_some() {
                return Err(Refusal::Impossible(
                    "X-Firn-Start: warm is impossible: no instance of this function is idle".into(),
                ));
            }
        }
        let class = ShellClass::for_memory(request.function.config.memory_mb);
        self.admit(class).await?;
        request.trace.mark("scheduled");
        if request.force != Some(StartKind::Boot) {
            let snapshot = self.preparer.resident(&request.function.name, &fingerprint);
            if let Some(snapshot) = snapshot {
                match self.serve_thawed(&snapshot, &mut request, &fingerprint).await? {
                    Some(served) => return Ok(served),
                    None if request.force.is_none() => {}
                    None => {
                        return Err(Refusal::Failed("the snapshot could not be thawed".into()));
                    }
                }
            } else if request.force.is_some() {
                let status = self.preparer.status(&request.function.name, &fingerprint);
                return Err(Refusal::Impossible(format!(
                    "X-Firn-Start: thaw is impossible: the state of this function's snapshot is \
                     {:?}",
                    status.word()
                )));
            }
        }
        self.serve_booted(class, request, fingerprint).await
    }

    async fn take(&self, function: &str, fingerprint: &str) -> Option<Worker<B::Machine>> {
        loop {
            let worker = match self.pools.take(function, fingerprint) {
                Take::Ready(worker) => worker,
                Take::Soon(soon) => soon.await.ok()?,
                Take::Nothing => return None,
            };
            if worker.machine.is_alive() {
                return Some(worker);
            }
            self.retire(worker);
        }
    }

    async fn serve_warm(
        self: Arc<Self>,
        mut worker: Worker<B::Machine>,
        mut request: Request,
    ) -> Result<Served, Refusal> {
        request.trace.mark("scheduled");
        self.note(worker.machine.id(), |listed| {
            listed.state = "busy";
            listed.invocations += 1;
        });
        // What it printed after its last answer belongs before this one.
        worker.output.drain().await;
        worker.output.stream.begin_tail();
        worker.output.stream.service(&report::start(&request.invocation.request_id)).await;
        let begun = Instant::now();
        let result = worker.output.during(worker.machine.invoke(&request.invocation)).await;
        if let Ok(report) = &result {
            request.trace.add("invoke", begun, &report.phases);
        }
        self.conclude(worker, request, StartKind::Warm, result, 0, begun).await
    }

    /// `None`: this snapshot does not thaw here, and the function has not run.
    async fn serve_thawed(
        self: &Arc<Self>,
        snapshot: &B::Resident,
        request: &mut Request,
        fingerprint: &str,
    ) -> Result<Option<Served>, Refusal> {
        let (function, invocation) = (&request.function, &request.invocation);
        let (mut output, sink) = self.workshop.output(function);
        output.stream.service(&report::start(&invocation.request_id)).await;
        let begun = Instant::now();
        let thaw = self.workshop.backend.thaw(snapshot, Some(invocation), Some(sink));
        match output.during(thaw).await {
            Ok((machine, Some(report))) => {
                let mut request = std::mem::replace(request, Request::empty(function));
                request.trace.add("thaw", begun, &report.phases);
                let worker = self.register(machine, output, StartKind::Thaw, &request, fingerprint);
                let served =
                    self.conclude(worker, request, StartKind::Thaw, Ok(report), 0, begun).await?;
                Ok(Some(served))
            }
            Ok((machine, None)) => {
                machine.retire().await;
                Err(Refusal::Failed("the thawed instance did not answer its first event".into()))
            }
            Err(StartError::Refused { message, .. }) => {
                tracing::error!(function = function.name, message, "a snapshot can't be thawed");
                self.preparer.discredit(&function.name, fingerprint, message);
                Ok(None)
            }
            Err(StartError::Died { exit }) => {
                let id = &invocation.request_id;
                let answer = Answer::machine_died(id, &exit.to_string());
                let elapsed = begun.elapsed();
                let tail = write_end(&mut output, request, &answer, None, 0, elapsed).await;
                let trace = std::mem::take(&mut request.trace);
                Ok(Some(Served { kind: StartKind::Thaw, answer, tail, trace }))
            }
            Err(error) => Err(Refusal::Failed(error.to_string())),
        }
    }

    async fn serve_booted(
        self: Arc<Self>,
        class: ShellClass,
        mut request: Request,
        fingerprint: String,
    ) -> Result<Served, Refusal> {
        let failed = |error: &dyn std::fmt::Display| Refusal::Failed(error.to_string());
        let function = request.function.clone();
        let code = self.workshop.disk(&function).await.map_err(Refusal::Failed)?;
        let begun = Instant::now();
        let boot = self.workshop.backend.boot(&function.config.runtime, class).await;
        let machine = boot.map_err(|e| failed(&e))?;
        request.trace.add("boot", begun, machine.start_phases());
        let (output, sink) = self.workshop.output(&function);
        let mut worker = self.register(machine, output, StartKind::Boot, &request, &fingerprint);
        let spec = self.workshop.spec(&function, code, "on-demand", &worker.output, sink);
        let begun = Instant::now();
        let loaded = match worker.output.during(worker.machine.load(&spec, false)).await {
            Ok(loaded) => loaded,
            Err(error) => {
                worker.output.stream.flush().await;
                let served = self.conclude(worker, request, StartKind::Boot, Err(error), 0, begun);
                return served.await;
            }
        };
        request.trace.add("load", begun, &loaded.phases);
        // A function that failed to initialise is invoked all the same: as in Lambda, the
        // invocation repeats the initialisation and answers with what that says.
        let init_us = if loaded.error.is_none() { loaded.init_us } else { 0 };
        worker.output.stream.service(&report::start(&request.invocation.request_id)).await;
        let begun = Instant::now();
        let result = worker.output.during(worker.machine.invoke(&request.invocation)).await;
        if let Ok(report) = &result {
            request.trace.add("invoke", begun, &report.phases);
        }
        self.conclude(worker, request, StartKind::Boot, result, init_us, begun).await
    }

    /// Turns what an instance said into what the caller gets, and sends the instance back.
    async fn conclude(
        self: &Arc<Self>,
        mut worker: Worker<B::Machine>,
        request: Request,
        kind: StartKind,
        result: Result<InvokeReport, InstanceError>,
        init_us: u64,
        begun: Instant,
    ) -> Result<Served, Refusal> {
        let id = &request.invocation.request_id;
        let (answer, report) = match result {
            Ok(mut report) => {
                let outcome = std::mem::replace(
                    &mut report.outcome,
                    guest::Outcome::Response { payload: Vec::new(), content_type: String::new() },
                );
                (Answer::of(outcome, id), Some(report))
            }
            Err(InstanceError::Died { exit }) => {
                (Answer::machine_died(id, &exit.to_string()), None)
            }
            Err(InstanceError::Protocol { message, .. }) => {
                (Answer::machine_died(id, &message), None)
            }
            Err(InstanceError::Unresponsive { .. }) => {
                let limit_ms = request.function.timeout().as_millis() as u64;
                let error = guest::FunctionError::TimedOut { limit_ms };
                (Answer::of(guest::Outcome::Error(error), id), None)
            }
            Err(error) => {
                self.retire(worker);
                return Err(Refusal::Failed(error.to_string()));
            }
        };
        let output = &mut worker.output;
        let elapsed = begun.elapsed();
        let tail = write_end(output, &request, &answer, report.as_ref(), init_us, elapsed).await;
        if report.is_some() {
            self.give_back(worker);
        } else {
            tracing::warn!(function = worker.function, "an instance ended under an invocation");
            self.retire(worker);
        }
        Ok(Served { kind, answer, tail, trace: request.trace })
    }

    fn give_back(self: &Arc<Self>, mut worker: Worker<B::Machine>) {
        if !self.pools.returning(&worker.function, &worker.fingerprint) {
            return self.retire(worker);
        }
        let scheduler = self.clone();
        tokio::spawn(async move {
            let (function, fingerprint) = (worker.function.clone(), worker.fingerprint.clone());
            let paused = worker.machine.pause().await;
            scheduler.note(worker.machine.id(), |listed| listed.state = "idle");
            let (fit, unfit) = match paused {
                Ok(()) => (Some(worker), None),
                Err(error) => {
                    tracing::warn!(function, %error, "an instance can't be paused");
                    (None, Some(worker))
                }
            };
            let stale = scheduler.pools.returned(&function, &fingerprint, fit);
            for worker in stale.into_iter().chain(unfit) {
                scheduler.retire(worker);
            }
        });
    }

    fn register(
        &self,
        machine: B::Machine,
        output: Output,
        start: StartKind,
        request: &Request,
        fingerprint: &str,
    ) -> Worker<B::Machine> {
        let function = request.function.name.clone();
        let listed = Listed {
            function_name: function.clone(),
            pid: machine.pid(),
            start,
            started_ms: now_ms(),
            state: "busy",
            invocations: 1,
        };
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        instances.insert(machine.id().to_owned(), listed);
        Worker { machine, output, function, fingerprint: fingerprint.to_owned() }
    }

    fn note(&self, id: &str, change: impl FnOnce(&mut Listed)) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listed) = instances.get_mut(id) {
            change(listed);
        }
    }

    fn retire(&self, worker: Worker<B::Machine>) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        instances.remove(worker.machine.id());
        drop(instances);
        tokio::spawn(worker.machine.retire());
    }

    /// Room for one more instance; idle ones of any function make way for it.
    async fn admit(&self, class: ShellClass) -> Result<(), Refusal> {
        // Two seconds in all: what is retired gives its memory back within milliseconds.
        for _ in 0..100 {
            if self.admission.admit(class.memory_mib) {
                return Ok(());
            }
            let Some(worker) = self.pools.evict() else { break };
            self.retire(worker);
            tokio::time::sleep(Duration::from_millis(20)).await;
            self.admission.refresh();
        }
        tracing::warn!(memory_mib = class.memory_mib, "no memory for another instance");
        Err(Refusal::Throttled)
    }
}

impl Request {
    /// What is left where a request has been taken out.
    fn empty(function: &Arc<Function>) -> Self {
        Self {
            function: function.clone(),
            invocation: Invocation::default(),
            force: None,
            trace: Trace::default(),
        }
    }
}

/// Writes the end of an invocation into its log and gives the tail.
async fn write_end(
    output: &mut Output,
    request: &Request,
    answer: &Answer,
    report: Option<&InvokeReport>,
    init_us: u64,
    elapsed: Duration,
) -> Vec<u8> {
    let request_id = request.invocation.request_id.as_str();
    let renewed = report.and_then(|r| r.renewed.as_ref());
    let line = Report {
        request_id,
        duration_us: report.map_or(elapsed.as_micros() as u64, |r| r.duration_us),
        memory_mb: request.function.config.memory_mb,
        max_memory_bytes: report.map_or(0, |r| r.max_memory_bytes),
        init_us: init_us + report.map_or(0, |r| r.init_us),
        restore_us: renewed.map(|renewed| {
            let ready = report.and_then(|r| r.phases.get("renewed"));
            let ready =
                ready.map_or(renewed.renew_us + renewed.hooks_us, |at| at.as_micros() as u64);
            (ready, renewed.hooks_us)
        }),
        status: answer.status,
    };
    let stream = &mut output.stream;
    if let Some(text) = &answer.log {
        stream.service(text).await;
    }
    stream.service(&report::end(request_id)).await;
    stream.service(&line.to_string()).await;
    let tail = stream.tail().to_vec();
    stream.flush().await;
    tail
}
