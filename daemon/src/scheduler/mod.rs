//! Finds an instance for each request: a warm one, else one thawed from the function's snapshot,
//! else one that is booted.
//!
//! Rules that hold here:
//! - An instance serves one request at a time, and only the version of a function and the
//!   fingerprint that it was made for.
//! - With [`Isolation::PerInvocation`], an instance that has served is taken back to its snapshot
//!   before it waits for the next request, or retired if it was booted.
//! - A request that has begun runs to its end even if its caller goes away.
//! - Work that the caller need not wait for (pausing, retiring) happens after the answer.
//! - Provisioned instances are thawed before requests come, and neither idle time nor others' need
//!   takes them.
//! - Nothing grows without a limit: requests in flight, by account and by function; instances by host
//!   memory; idle time.

mod admission;
mod concurrency;
mod pool;
mod provision;
mod serving;
mod trace;

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use firn::{Invocation, ShellClass};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

pub use self::{admission::Reserve, concurrency::InFlight, trace::Trace};
use self::{
    admission::{Admission, Admitted},
    concurrency::{Concurrency, Shares},
    pool::{Pools, Take},
    provision::Provision,
};
use crate::{
    backend::{Backend, Machine},
    function::{Function, Version, now_ms},
    metrics::{Metrics, Target, Took},
    outcome::Answer,
    prepare::Preparer,
    traces::{Traced, Traces},
    workshop::{Output, Workshop},
};

/// What one request may find of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Isolation {
    /// Instances stay warm, as Lambda's do: what a function keeps, its next request finds.
    Warm,
    /// Each request finds an instance as its snapshot was.
    PerInvocation,
}

/// What bounds the scheduler.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Requests in flight at once.
    pub concurrency: u32,
    /// How long an instance waits for work.
    pub idle: Duration,
    /// How long it keeps memory only to be fast.
    pub reclaim: Duration,
    /// What instances leave alone.
    pub reserve: Reserve,
    /// What one request may find of those before it.
    pub isolation: Isolation,
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
    /// It was there, and had been taken back to the function's snapshot.
    Reset,
}

impl StartKind {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Thaw => "thaw",
            Self::Warm => "warm",
            Self::Reset => "reset",
        }
    }
}

impl FromStr for StartKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Boot, Self::Thaw, Self::Warm, Self::Reset]
            .into_iter()
            .find(|k| k.word() == text)
            .ok_or(())
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
    /// Who is told of it if it is traced.
    pub traced: Option<Arc<Traced>>,
    /// What its event takes of the memory for events.
    pub room: Option<Room>,
}

/// A share of the memory for events, given back when the last holder is gone.
pub type Room = Arc<OwnedSemaphorePermit>;

/// A request that was served.
pub struct Served {
    /// How its instance came to be.
    pub kind: StartKind,
    /// What the caller gets.
    pub answer: Answer,
    /// The last bytes of its log.
    pub tail: Vec<u8>,
    /// What it took.
    pub took: Took,
    /// When what happened.
    pub trace: Trace,
    /// X-Ray segment documents that the function sent, in the order in which they came.
    pub segments: Vec<Bytes>,
}

impl fmt::Debug for Served {
    /// Without what the function said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, answer, .. } = self;
        f.debug_struct("Served").field("kind", kind).field("answer", answer).finish_non_exhaustive()
    }
}

/// What holds a request back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The concurrency, or the memory, that all functions share.
    Account,
    /// The concurrency that is reserved for the function.
    Function,
}

impl Limit {
    /// Lambda's `ThrottleReason`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Account => "ConcurrentInvocationLimitExceeded",
            Self::Function => "ReservedFunctionConcurrentInvocationLimitExceeded",
        }
    }
}

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A limit is reached.
    #[error("too many requests at once")]
    Throttled(Limit),
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
    /// Of which version.
    pub version: Version,
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
    /// The id that it is listed under: its first, whatever resets make of it.
    listed_as: String,
    start: StartKind,
    output: Output,
    /// The qualified name of what it serves.
    function: String,
    fingerprint: String,
    /// It has given back what it can.
    lean: bool,
}

/// Schedules all requests of a host.
#[derive(Debug)]
pub struct Scheduler<B: Backend> {
    workshop: Workshop<B>,
    preparer: Arc<Preparer<B>>,
    pools: Pools<Worker<B::Machine>>,
    limits: Limits,
    concurrency: Arc<Concurrency>,
    provision: Provision,
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
            concurrency: Concurrency::new(limits.concurrency),
            provision: Provision::default(),
            admission: Admission::new(limits.reserve.clone()),
            limits,
            instances: Mutex::default(),
        });
        let weak = Arc::downgrade(&scheduler);
        // Often enough that short idle times in tests hold, rarely enough to cost nothing.
        let step = scheduler.limits.idle / 10;
        let step = step.clamp(Duration::from_millis(50), Duration::from_secs(1));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(step).await;
                let Some(scheduler) = weak.upgrade() else { return };
                scheduler.admission.refresh();
                let floor = |key: &str| scheduler.provision.floor(key);
                if scheduler.admission.disk_is_short()
                    && let Some(worker) = scheduler.pools.evict(floor)
                {
                    scheduler.retire(worker);
                }
                let unfit = |worker: &Worker<B::Machine>| !worker.machine.is_alive();
                for worker in scheduler.pools.expire(scheduler.limits.idle, unfit, floor) {
                    scheduler.retire(worker);
                }
                scheduler.reclaim();
                scheduler.provide();
            }
        });
        scheduler
    }

    /// A version of a function is new, or `$LATEST` has changed.
    pub fn deployed(&self, function: &Arc<Function>, before: Option<&Function>) {
        let place = &self.workshop.place;
        let key = function.qualified_name();
        let fingerprint = function.fingerprint(place);
        for worker in self.pools.switch(&key, fingerprint) {
            self.retire(worker);
        }
        if let Some(old) = before.map(|f| f.fingerprint(place)).filter(|old| *old != fingerprint) {
            self.preparer.forget(&key, old);
        }
        self.preparer.ensure(function.clone());
    }

    /// A version of a function is gone.
    pub fn removed(&self, function: &Function) {
        let key = function.qualified_name();
        for worker in self.pools.remove(&key) {
            self.retire(worker);
        }
        self.preparer.forget(&key, function.fingerprint(&self.workshop.place));
    }

    /// From now on this much concurrency is kept for a function: all in all, or for versions of it, for
    /// which as many instances are thawed ahead.
    pub fn keep(&self, name: &str, reserved: Option<u32>, provisioned: &[(Arc<Function>, u32)]) {
        let shares =
            provisioned.iter().map(|(function, count)| (function.version, *count)).collect();
        self.concurrency.keep(name, Shares { reserved, provisioned: shares });
        self.provision.set(name, provisioned);
    }

    /// What is left of the account's concurrency for functions for which nothing is kept.
    pub fn unreserved(&self) -> u32 {
        self.concurrency.unreserved()
    }

    /// Who counts what happens.
    pub fn metrics(&self) -> &Metrics {
        &self.workshop.metrics
    }

    /// Who traces invocations.
    pub fn traces(&self) -> &Traces {
        &self.workshop.traces
    }

    /// Where the snapshot of a function stands.
    pub fn snapshot(&self, function: &Function) -> crate::prepare::Status {
        self.preparer.status(&function.qualified_name(), function.fingerprint(&self.workshop.place))
    }

    /// Interrupts of microVMs that were raised again since the start.
    pub fn interrupts_raised_again(&self) -> u64 {
        self.workshop.backend.interrupts_raised_again()
    }

    /// All live instances by id.
    pub fn instances(&self) -> BTreeMap<String, Listed> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes no more requests, gives those in flight `patience`, and kills what is left.
    pub async fn close(&self, patience: Duration) {
        self.preparer.close();
        self.provision.clear();
        self.concurrency.close();
        if tokio::time::timeout(patience, self.concurrency.drained()).await.is_err() {
            tracing::warn!("invocations in flight are cut off");
        }
        drop(self.pools.drain());
        self.workshop.backend.shutdown().await;
        self.workshop.logs.flush().await;
    }

    /// Serves a request.
    ///
    /// # Errors
    /// Any [`Refusal`].
    pub async fn invoke(self: &Arc<Self>, request: Request) -> Result<Served, Refusal> {
        let target = Target::new(&request.function, &request.invocation.function_arn);
        let metrics = self.workshop.metrics.clone();
        let version = request.function.version;
        let entered = self.concurrency.enter(&request.function.name, version);
        let traced = request.traced.clone();
        let permit = match entered {
            Ok(permit) => permit,
            Err(refusal) => {
                metrics.refused(&target, &refusal);
                traced.into_iter().for_each(|traced| traced.refused(&refusal));
                return Err(refusal);
            }
        };
        metrics.began(&target, &permit.in_flight(version));
        let scheduler = self.clone();
        // A task of its own: it goes on when the caller hangs up.
        let task = tokio::spawn(async move {
            let _permit = permit;
            let result = scheduler.serve(request).await;
            metrics.concluded(&target, &result);
            traced.into_iter().for_each(|traced| traced.concluded(&result));
            result
        });
        task.await.unwrap_or_else(|error| Err(Refusal::Failed(format!("internal error: {error}"))))
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

    fn give_back(self: &Arc<Self>, mut worker: Worker<B::Machine>) {
        // What was booted has no snapshot to go back to.
        let stays = self.limits.isolation == Isolation::Warm || worker.start == StartKind::Thaw;
        if !stays || !self.pools.returning(&worker.function, &worker.fingerprint) {
            return self.retire(worker);
        }
        let scheduler = self.clone();
        tokio::spawn(async move {
            let (function, fingerprint) = (worker.function.clone(), worker.fingerprint.clone());
            let rested = match scheduler.limits.isolation {
                Isolation::Warm => worker.machine.pause().await,
                Isolation::PerInvocation => worker.machine.reset().await,
            };
            scheduler.note(&worker.listed_as, |listed| listed.state = "idle");
            let (fit, unfit) = match rested {
                Ok(()) => (Some(worker), None),
                Err(error) => {
                    tracing::warn!(function, %error, "an instance can't be paused or reset");
                    (None, Some(worker))
                }
            };
            let fit = fit.map(|worker| (Instant::now(), worker));
            let stale = scheduler.pools.returned(&function, &fingerprint, fit);
            for worker in stale.into_iter().chain(unfit) {
                scheduler.retire(worker);
            }
        });
    }

    /// Has instances that have been idle for a while give memory back, each once.
    fn reclaim(self: &Arc<Self>) {
        let fat = |worker: &Worker<B::Machine>| !worker.lean;
        for (since, mut worker) in self.pools.borrow(self.limits.reclaim, fat) {
            let scheduler = self.clone();
            tokio::spawn(async move {
                let (function, fingerprint) = (worker.function.clone(), worker.fingerprint.clone());
                worker.lean = true;
                let (fit, unfit) = match worker.machine.reclaim().await {
                    Ok(bytes) => {
                        tracing::debug!(function, bytes, "an idle instance gave memory back");
                        (Some((since, worker)), None)
                    }
                    Err(error) => {
                        tracing::warn!(function, %error, "an idle instance is lost");
                        (None, Some(worker))
                    }
                };
                let stale = scheduler.pools.returned(&function, &fingerprint, fit);
                for worker in stale.into_iter().chain(unfit) {
                    scheduler.retire(worker);
                }
            });
        }
    }

    fn register(
        &self,
        machine: B::Machine,
        output: Output,
        start: StartKind,
        function: &Function,
        fingerprint: &str,
        invocations: u64,
    ) -> Worker<B::Machine> {
        let listed = Listed {
            function_name: function.name.clone(),
            version: function.version,
            pid: machine.pid(),
            start,
            started_ms: now_ms(),
            state: if invocations > 0 { "busy" } else { "idle" },
            invocations,
        };
        let function = function.qualified_name();
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        let listed_as = machine.id().to_owned();
        instances.insert(listed_as.clone(), listed);
        let fingerprint = fingerprint.to_owned();
        Worker { machine, listed_as, start, output, function, fingerprint, lean: false }
    }

    fn note(&self, id: &str, change: impl FnOnce(&mut Listed)) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listed) = instances.get_mut(id) {
            change(listed);
        }
    }

    fn retire(&self, worker: Worker<B::Machine>) {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        instances.remove(&worker.listed_as);
        drop(instances);
        tokio::spawn(worker.machine.retire());
    }

    /// Room for one more instance; idle ones of any function make way for it.
    async fn admit(&self, class: ShellClass) -> Result<Admitted<'_>, Refusal> {
        if let Some(admitted) = self.admission.admit(class.memory_mib) {
            return Ok(admitted);
        }
        // Two seconds in all: what is retired gives its memory back within milliseconds.
        for _ in 0..100 {
            self.admission.refresh();
            if let Some(admitted) = self.admission.admit(class.memory_mib) {
                return Ok(admitted);
            }
            let Some(worker) = self.pools.evict(|key| self.provision.floor(key)) else { break };
            self.retire(worker);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tracing::warn!(
            memory_mib = class.memory_mib,
            "no memory or disk space for another instance"
        );
        Err(Refusal::Throttled(Limit::Account))
    }
}
