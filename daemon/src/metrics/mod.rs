//! What is counted: Lambda's metrics by minute, what functions use by day, and what Prometheus reads.
//!
//! A request costs two short turns under one lock. A thread of its own takes what has come together,
//! each second, into [`store`]; no request waits for a disk. Everything is bounded: between two such
//! turns by what was invoked, in the store by time and rows, for Prometheus by [`FUNCTIONS`].
//!
//! IteratorAge is not here: nothing reads streams yet.

mod distribution;
pub mod prometheus;
pub mod store;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use time::{Date, OffsetDateTime, macros::format_description};

pub use self::distribution::Distribution;
use self::{prometheus::Totals, store::Store};
use crate::{
    function::{Function, now_ms},
    report::Report,
    scheduler::{InFlight, Refusal, Served, StartKind},
};

/// Functions that Prometheus sees by name; what others do is counted under no name.
pub const FUNCTIONS: usize = 1000;

/// Time between two turns of the thread.
const TURN: Duration = Duration::from_secs(1);

/// Time between two looks at what is too old.
const PRUNE: Duration = Duration::from_secs(3600);

/// A metric of Lambda. Their numbers are on the disk: none changes, new ones come last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub enum Metric {
    /// Events that were run, with or without an error.
    Invocations,
    /// Those that ended with an error of the function.
    Errors,
    /// Requests that a limit refused.
    Throttles,
    /// Milliseconds of the function.
    Duration,
    /// In flight as each invocation begins, itself included.
    ConcurrentExecutions,
    /// The same, of functions for which nothing is kept.
    UnreservedConcurrentExecutions,
    /// What could not be sent to a queue of dead letters.
    DeadLetterErrors,
    /// What could not be sent to a destination.
    DestinationDeliveryFailures,
    /// Events that were queued.
    AsyncEventsReceived,
    /// Milliseconds from queueing to an attempt.
    AsyncEventAge,
    /// Events that were given up.
    AsyncEventsDropped,
    /// Invocations on provisioned concurrency.
    ProvisionedConcurrencyInvocations,
    /// Invocations of versions that have some, beyond it.
    ProvisionedConcurrencySpilloverInvocations,
    /// The part of a version's that is in use, from 0 to 1.
    ProvisionedConcurrencyUtilization,
    /// In flight on provisioned concurrency.
    ProvisionedConcurrentExecutions,
}

impl Metric {
    /// All of them, by number.
    pub const ALL: [Self; 15] = [
        Self::Invocations,
        Self::Errors,
        Self::Throttles,
        Self::Duration,
        Self::ConcurrentExecutions,
        Self::UnreservedConcurrentExecutions,
        Self::DeadLetterErrors,
        Self::DestinationDeliveryFailures,
        Self::AsyncEventsReceived,
        Self::AsyncEventAge,
        Self::AsyncEventsDropped,
        Self::ProvisionedConcurrencyInvocations,
        Self::ProvisionedConcurrencySpilloverInvocations,
        Self::ProvisionedConcurrencyUtilization,
        Self::ProvisionedConcurrentExecutions,
    ];

    /// As CloudWatch spells it.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// As CloudWatch spells it.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Duration | Self::AsyncEventAge => "Milliseconds",
            Self::ProvisionedConcurrencyUtilization => "None",
            _ => "Count",
        }
    }
}

/// Whose metrics: empty where a dimension is not there. Without a function, the account's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Series {
    /// `FunctionName`
    pub function: String,
    /// `Resource`: the name with the version or alias by which it was called, if there was one.
    pub resource: String,
    /// `ExecutedVersion`, for aliases.
    pub version: String,
}

/// The metrics of one series in one minute.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Row(Vec<(u8, Distribution)>);

impl Row {
    fn add(&mut self, metric: Metric, value: f64) {
        self.of(metric as u8).add(value);
    }

    fn merge(&mut self, other: &Self) {
        for (metric, values) in &other.0 {
            self.of(*metric).merge(values);
        }
    }

    fn of(&mut self, metric: u8) -> &mut Distribution {
        let at = self.0.iter().position(|(m, _)| *m == metric).unwrap_or_else(|| {
            self.0.push((metric, Distribution::default()));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }

    fn take(self, metric: Metric) -> Option<Distribution> {
        self.0.into_iter().find(|(m, _)| *m == metric as u8).map(|(_, values)| values)
    }

    /// A bit for each metric.
    fn metrics(&self) -> i64 {
        self.0.iter().fold(0, |bits, (metric, _)| bits | 1 << metric)
    }

    fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Nothing, if it does not read.
    fn decode(data: &[u8]) -> Self {
        let row = postcard::from_bytes::<Self>(data).unwrap_or_default();
        let known = row.0.iter().all(|(metric, _)| usize::from(*metric) < Metric::ALL.len());
        if known { row } else { Self::default() }
    }
}

/// A function and a day, counted from the epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Day {
    /// In UTC.
    pub day: i64,
    /// The function.
    pub function: String,
}

impl Day {
    /// A day as [`Self::date`] spells it.
    pub fn parse(text: &str) -> Option<i64> {
        let format = format_description!("[year]-[month]-[day]");
        let date = Date::parse(text, format).ok()?;
        Some(date.midnight().assume_utc().unix_timestamp() / 86_400)
    }

    /// As ISO 8601 spells it.
    fn date(&self) -> String {
        let at = OffsetDateTime::from_unix_timestamp(self.day.saturating_mul(86_400));
        at.map(|at| at.date().to_string()).unwrap_or_default()
    }
}

/// What a function has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Invocations.
    pub requests: u64,
    /// Milliseconds billed.
    pub billed_ms: u64,
    /// Megabytes times milliseconds billed.
    pub mb_ms: u64,
}

impl Usage {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.billed_ms += other.billed_ms;
        self.mb_ms += other.mb_ms;
    }
}

/// What an invocation took, as its REPORT line says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Took {
    /// Of the function, in microseconds.
    pub duration_us: u64,
    /// Of a thaw, in microseconds.
    pub restore_us: Option<u64>,
    /// Milliseconds to bill.
    pub billed_ms: u64,
    /// Memory in MB.
    pub memory_mb: u32,
}

impl From<&Report<'_>> for Took {
    fn from(report: &Report<'_>) -> Self {
        Self {
            duration_us: report.duration_us,
            restore_us: report.restore_us.map(|(all, _)| all),
            billed_ms: report.billed_ms(),
            memory_mb: report.memory_mb,
        }
    }
}

/// Who is invoked, and by which name.
#[derive(Debug, Clone)]
pub struct Target {
    function: Arc<Function>,
    /// The name, with the version or alias by which it was called.
    resource: String,
    minute: i64,
    since: Instant,
}

impl Target {
    /// An invocation of `function`, called by the name `arn`, that begins now.
    pub fn new(function: &Arc<Function>, arn: &str) -> Self {
        let resource = resource(arn).to_owned();
        Self { function: function.clone(), resource, minute: minute(), since: Instant::now() }
    }

    /// The account, the function, the name by which it was called, and for an alias the version.
    fn series(&self, also_account: bool) -> impl Iterator<Item = Series> {
        let function = self.function.name.clone();
        let version = self.function.version.to_string();
        let called = self.resource.rsplit_once(':').map(|(_, qualifier)| qualifier);
        let alias = called.is_some_and(|qualifier| qualifier != version);
        let resource = self.resource.clone();
        let of = |resource: &str, version: &str| Series {
            function: function.clone(),
            resource: resource.to_owned(),
            version: version.to_owned(),
        };
        [
            also_account.then(Series::default),
            Some(of("", "")),
            Some(of(&resource, "")),
            alias.then(|| of(&resource, &version)),
        ]
        .into_iter()
        .flatten()
    }
}

/// A function's name, with the version or alias by which it was called: the end of its ARN.
pub fn resource(arn: &str) -> &str {
    arn.rsplit_once(":function:").map_or(arn, |(_, resource)| resource)
}

fn minute() -> i64 {
    now_ms() / 60_000
}

#[derive(Debug, Default)]
struct Pending {
    rows: HashMap<(Series, i64), Row>,
    days: HashMap<Day, Usage>,
    totals: Totals,
}

enum Order {
    /// Brings what has come together to the disk, and says when it is there.
    Flush(tokio::sync::oneshot::Sender<()>),
}

/// Counts. Cheap to clone; the thread ends with the last clone, after a last turn.
#[derive(Debug, Clone)]
pub struct Metrics {
    pending: Arc<Mutex<Pending>>,
    orders: mpsc::SyncSender<Order>,
    /// For those who read.
    store: Arc<Mutex<Store>>,
}

impl Metrics {
    /// Opens the store at `path` and starts the thread.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let writing = Store::open(path)?;
        let store = Arc::new(Mutex::new(Store::open(path)?));
        let pending = Arc::new(Mutex::new(Pending::default()));
        let (orders, taken) = mpsc::sync_channel(64);
        let shared = pending.clone();
        let work = move || write(&shared, writing, &taken);
        thread::Builder::new().name("metrics".into()).spawn(work)?;
        Ok(Self { pending, orders, store })
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An invocation was let in, as one of so many.
    pub fn began(&self, target: &Target, in_flight: &InFlight) {
        let mut pending = self.lock();
        let mut add = |series: Series, metric, value: f64| {
            pending.rows.entry((series, target.minute)).or_default().add(metric, value);
        };
        let account = f64::from(in_flight.account);
        add(Series::default(), Metric::ConcurrentExecutions, account);
        let unreserved = f64::from(in_flight.unreserved);
        add(Series::default(), Metric::UnreservedConcurrentExecutions, unreserved);
        let mut of_function = target.series(false);
        if let Some(series) = of_function.next() {
            add(series, Metric::ConcurrentExecutions, f64::from(in_flight.function));
        }
        let Some((running, share)) = in_flight.provisioned else { return };
        for series in target.series(false) {
            let metric = match in_flight.on_provisioned {
                true => Metric::ProvisionedConcurrencyInvocations,
                false => Metric::ProvisionedConcurrencySpilloverInvocations,
            };
            add(series.clone(), metric, 1.0);
            let running = f64::from(running);
            add(series.clone(), Metric::ProvisionedConcurrentExecutions, running);
            let utilization = running / f64::from(share.max(1));
            add(series, Metric::ProvisionedConcurrencyUtilization, utilization);
        }
    }

    /// An invocation that began has ended, or was refused after all.
    pub fn concluded(&self, target: &Target, result: &Result<Served, Refusal>) {
        match result {
            Ok(Served { kind, answer, took, .. }) => {
                self.ended(target, *kind, took, answer.function_error.is_some());
            }
            Err(refusal) => self.refused(target, refusal),
        }
    }

    /// The same, in parts.
    pub fn ended(&self, target: &Target, kind: StartKind, took: &Took, error: bool) {
        let Took { duration_us, billed_ms, memory_mb, .. } = *took;
        let usage = Usage { requests: 1, billed_ms, mb_ms: billed_ms * u64::from(memory_mb) };
        let name = &target.function.name;
        let elapsed = target.since.elapsed();
        let mut pending = self.lock();
        for series in target.series(true) {
            let row = pending.rows.entry((series, target.minute)).or_default();
            row.add(Metric::Invocations, 1.0);
            row.add(Metric::Errors, f64::from(u8::from(error)));
            row.add(Metric::Duration, duration_us as f64 / 1000.0);
        }
        let day = Day { day: target.minute / (24 * 60), function: name.clone() };
        pending.days.entry(day).or_default().add(usage);
        pending.totals.ended(name, kind, took, usage, error, elapsed);
    }

    /// An invocation was not served.
    pub fn refused(&self, target: &Target, refusal: &Refusal) {
        if matches!(refusal, Refusal::Throttled(_)) {
            let mut pending = self.lock();
            for series in target.series(true) {
                let row = pending.rows.entry((series, target.minute)).or_default();
                row.add(Metric::Throttles, 1.0);
            }
            pending.totals.throttled(&target.function.name);
        } else if matches!(refusal, Refusal::Failed(_)) {
            self.lock().totals.failed();
        }
    }

    /// A snapshot or an instance could not be restored, and nothing of it has run.
    pub fn not_restored(&self) {
        self.lock().totals.not_restored();
    }

    /// One more value of a metric of a function that was called by the name `resource`.
    pub fn observe(&self, function: &str, resource: &str, metric: Metric, value: f64) {
        let mut pending = self.lock();
        for resource in ["", resource] {
            let series =
                Series { function: function.into(), resource: resource.into(), version: "".into() };
            pending.rows.entry((series, minute())).or_default().add(metric, value);
        }
    }

    /// Forgets what Prometheus sees of a function that was deleted.
    pub fn forget(&self, function: &str) {
        self.lock().totals.forget(function);
    }

    /// What Prometheus sees.
    pub fn totals(&self) -> Totals {
        self.lock().totals.clone()
    }

    /// Waits until everything that was counted before is in the store.
    pub async fn flush(&self) {
        let (done, wait) = tokio::sync::oneshot::channel();
        // Full: someone else waits for the same.
        if self.orders.try_send(Order::Flush(done)).is_ok() {
            let _ = wait.await;
        }
    }

    /// Reads the store, as it is after everything that was counted before.
    ///
    /// # Errors
    /// As SQLite says.
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        self.flush().await;
        let store = self.store.clone();
        let task = tokio::task::spawn_blocking(move || {
            work(&store.lock().unwrap_or_else(PoisonError::into_inner))
        });
        task.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }
}

/// The thread.
fn write(pending: &Mutex<Pending>, mut store: Store, orders: &mpsc::Receiver<Order>) {
    let mut pruned: Option<Instant> = None;
    loop {
        let order = orders.recv_timeout(TURN);
        let (rows, days) = {
            let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
            (std::mem::take(&mut pending.rows), std::mem::take(&mut pending.days))
        };
        if !(rows.is_empty() && days.is_empty())
            && let Err(error) = store.add(&rows, &days)
        {
            tracing::warn!(%error, "metrics of some seconds are lost; what is metered is kept");
            let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
            for (day, usage) in days {
                pending.days.entry(day).or_default().add(usage);
            }
            drop(pending);
            // So that a full disk is not asked without a pause.
            thread::sleep(TURN);
        }
        if pruned.is_none_or(|at| at.elapsed() >= PRUNE) {
            pruned = Some(Instant::now());
            if let Err(error) = store.prune(minute()) {
                tracing::warn!(%error, "old metrics remain");
            }
        }
        match order {
            Ok(Order::Flush(done)) => {
                let _ = done.send(());
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}
