//! Asynchronous invocation: events that are accepted now and delivered later, at least once.
//!
//! An event is on the disk ([`queue`]) before its caller hears that it was accepted, and stays there
//! until what became of it is on the disk, too. So a daemon that is killed at any moment delivers it
//! after the next start, at worst again.
//!
//! Each function with events has a *lane*, a task that takes them up in the order in which they are due
//! and hands them to the scheduler like any caller. Rules that hold here:
//! - Errors of the function are retried twice, after one and two minutes; throttling and failures of
//!   Firn with exponential back-off until the event is too old. All attempts have the same request id.
//! - Deliveries take at most half of the invocations that the daemon runs at once, and one function at
//!   most half of these: neither synchronous callers nor other functions starve.
//! - In memory are the events in delivery and a page of each lane's ids; never the queue.
//! - Events of a deleted function are dropped, also if another one takes its name.

pub mod clock;
pub mod queue;
mod sealed;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use firn::Invocation;
use tokio::{
    sync::{Notify, Semaphore},
    task::AbortHandle,
};

use self::{
    clock::Clock,
    queue::{Entry, Fate, Queue, QueueError},
    sealed::{Event, Head},
};
use crate::{
    api::names::Reference,
    backend::Backend,
    function::{Function, Version},
    scheduler::{Refusal, Request, Scheduler, Served, Trace},
    store::Store,
};

/// Retries after an error of the function.
const RETRIES: u32 = 2;

/// How long an event may wait.
const MAX_AGE: Duration = Duration::from_secs(6 * 3600);

/// First and longest pause of a lane whose events are refused.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// Ids in a page beyond those in delivery.
const PAGE: usize = 64;

/// Time between attempts to write down what became of an event.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// What bounds asynchronous invocation.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Deliveries at once.
    pub slots: usize,
    /// Bytes of events in the queue.
    pub bytes: u64,
    /// Time between the first attempt and the second; twice that between the second and the third.
    pub retry: Duration,
}

/// Accepts and delivers events.
#[derive(Debug)]
pub struct Events<B: Backend> {
    queue: Queue,
    store: Arc<Store>,
    scheduler: Arc<Scheduler<B>>,
    clock: Clock,
    bounds: Bounds,
    slots: Arc<Semaphore>,
    lanes: Mutex<HashMap<String, (Arc<Lane>, AbortHandle)>>,
    stopping: AtomicBool,
}

/// Delivers the events of one function.
#[derive(Debug)]
struct Lane {
    function: String,
    /// There is something new, or something has changed its time.
    wake: Notify,
    /// Deliveries at once.
    share: Arc<Semaphore>,
    state: Mutex<LaneState>,
}

#[derive(Debug, Default)]
struct LaneState {
    /// Events in delivery.
    leased: HashSet<i64>,
    /// What is due next, by id and time.
    page: VecDeque<(i64, i64)>,
    /// The last pause; zero after an attempt that was not refused.
    pause: Duration,
    /// End of the pause.
    paused_until: i64,
}

impl Lane {
    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a pause, or joins the one that has begun, and gives its end.
    fn pause(&self, now: i64) -> i64 {
        let mut state = self.state();
        if state.paused_until <= now {
            state.pause = (state.pause * 2).clamp(BACK_OFF.0, BACK_OFF.1);
            state.paused_until = now.saturating_add(ms(state.pause));
        }
        state.paused_until
    }
}

/// What a lane does next.
enum Step {
    Deliver(i64),
    /// Until this time, or for ever, or until something changes.
    Wait(Option<i64>),
}

impl<B: Backend> Events<B> {
    /// Delivers what is in `queue`, where `functions` have events, and what will come.
    pub fn start(
        (queue, functions): (Queue, Vec<String>),
        store: Arc<Store>,
        scheduler: Arc<Scheduler<B>>,
        clock: Clock,
        bounds: Bounds,
    ) -> Arc<Self> {
        let events = Arc::new(Self {
            queue,
            store,
            scheduler,
            clock,
            bounds,
            slots: Arc::new(Semaphore::new(bounds.slots)),
            lanes: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        for function in functions {
            events.wake(&function);
        }
        events
    }

    /// Accepts an event for `function`, called by the name `function_arn`. When this returns, it is on
    /// the disk.
    ///
    /// # Errors
    /// Any [`QueueError`]; the event is not accepted.
    pub async fn accept(
        self: &Arc<Self>,
        function: &Function,
        request_id: String,
        function_arn: String,
        trace_id: String,
        payload: Bytes,
    ) -> Result<(), QueueError> {
        let event = Event { head: Head { function_arn, trace_id, hops: 0 }, payload };
        let event = event.seal(function, request_id, self.clock.now());
        self.queue.add(event.map_err(QueueError::from)?).await?;
        self.wake(&function.name);
        Ok(())
    }

    /// Drops the events of a deleted function. Deliveries that have begun end as they end.
    pub async fn removed(&self, function: &Function) {
        let lane = self.lanes().remove(&function.name);
        if let Some((_, task)) = lane {
            task.abort();
        }
        if let Err(error) = self.queue.forget(&function.name, &function.envelope.id()).await {
            // The next start finds them without their function.
            tracing::warn!(function = function.name, %error, "events of a deleted function remain");
        }
    }

    /// How much is queued.
    ///
    /// # Errors
    /// [`QueueError::Closed`].
    pub async fn usage(&self) -> Result<queue::Usage, QueueError> {
        self.queue.usage().await
    }

    /// Begins no more deliveries; what is queued stays for the next start.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for (_, (_, task)) in self.lanes().drain() {
            task.abort();
        }
    }

    /// Waits until what became of the deliveries that had begun is on the disk, for at most `patience`.
    pub async fn close(&self, patience: Duration) {
        self.stop();
        let all = self.slots.acquire_many(self.bounds.slots as u32);
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!(
                "deliveries of events are cut off; they are repeated after the next start"
            );
        }
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<String, (Arc<Lane>, AbortHandle)>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be something to deliver to that function.
    fn wake(self: &Arc<Self>, function: &str) {
        let mut lanes = self.lanes();
        if self.stopping() {
            return;
        }
        if let Some((lane, _)) = lanes.get(function) {
            return lane.wake.notify_one();
        }
        let lane = Arc::new(Lane {
            function: function.to_owned(),
            wake: Notify::new(),
            share: Arc::new(Semaphore::new((self.bounds.slots / 2).max(1))),
            state: Mutex::default(),
        });
        let task = tokio::spawn(self.clone().run(lane.clone())).abort_handle();
        lanes.insert(function.to_owned(), (lane, task));
    }

    /// A lane's task. It waits where it may be aborted: deliveries are tasks of their own.
    async fn run(self: Arc<Self>, lane: Arc<Lane>) {
        loop {
            // Lanes queue for slots in turn, so each gets the next one but for those before it.
            let (Ok(share), Ok(slot)) = (
                lane.share.clone().acquire_owned().await,
                self.slots.clone().acquire_owned().await,
            ) else {
                return;
            };
            match self.next(&lane).await {
                Ok(Step::Deliver(id)) => {
                    let (events, lane) = (self.clone(), lane.clone());
                    tokio::spawn(async move {
                        events.deliver(&lane, id).await;
                        lane.state().leased.remove(&id);
                        lane.wake.notify_one();
                        drop((share, slot));
                    });
                }
                Ok(Step::Wait(until)) => {
                    drop((share, slot));
                    tokio::select! {
                        () = lane.wake.notified() => {}
                        () = self.clock.until(until.unwrap_or(i64::MAX)) => {}
                    }
                }
                Err(error) => {
                    drop((share, slot));
                    tracing::error!(function = lane.function, %error, "events can't be read");
                    tokio::time::sleep(WRITE_AGAIN).await;
                }
            }
        }
    }

    async fn next(&self, lane: &Lane) -> Result<Step, QueueError> {
        let leased = {
            let mut state = lane.state();
            let now = self.clock.now();
            if state.paused_until > now {
                return Ok(Step::Wait(Some(state.paused_until)));
            }
            if let Some(id) = state.take(now) {
                return Ok(Step::Deliver(id));
            }
            // As of before the page is read: an event that leaves delivery meanwhile may be in the
            // page with its old time, and must be taken for one in delivery.
            state.leased.clone()
        };
        let mut page = self.queue.page(&lane.function, leased.len() + PAGE).await?;
        page.retain(|(id, _)| !leased.contains(id));
        let mut state = lane.state();
        state.page = page.into();
        Ok(match state.take(self.clock.now()) {
            Some(id) => Step::Deliver(id),
            None => Step::Wait(state.page.front().map(|(_, due)| *due)),
        })
    }

    async fn deliver(self: &Arc<Self>, lane: &Lane, id: i64) {
        let entry = match self.queue.load(id).await {
            Ok(Some(entry)) => entry,
            // Its function was deleted.
            Ok(None) => return,
            Err(error) => {
                tracing::error!(function = lane.function, %error, "an event can't be read");
                lane.pause(self.clock.now());
                return;
            }
        };
        let Some(fate) = self.attempt(lane, &entry).await else { return };
        while let Err(error) = self.queue.settle(id, fate.clone()).await {
            // It has run; to try again costs less than to run it again.
            let request_id = entry.event.request_id.as_str();
            let function = lane.function.as_str();
            tracing::error!(function, request_id, %error, "what became of an event can't be written");
            if self.stopping() {
                return;
            }
            tokio::time::sleep(WRITE_AGAIN).await;
        }
    }

    /// What the name means now that an event was accepted under.
    fn called(&self, function_arn: &str) -> Option<Arc<Function>> {
        let Reference { name, qualifier, .. } = Reference::parse(function_arn, None).ok()?;
        let version = qualifier.as_deref().map_or(Ok(Version::Latest), str::parse).ok()?;
        self.store.get(&name, version)
    }

    /// Has an event run, and says what becomes of it; `None`: it stays as it is, for the next start.
    async fn attempt(&self, lane: &Lane, entry: &Entry) -> Option<Fate> {
        let Entry { event: row, attempts } = entry;
        let (name, request_id) = (row.function.as_str(), row.request_id.as_str());
        let latest = self.store.get(name, Version::Latest);
        let Some(latest) = latest.filter(|f| f.envelope.id() == row.owner) else {
            tracing::warn!(function = name, request_id, "dropped an event of a deleted function");
            return Some(Fate::Done(None));
        };
        let event = match Event::open(&latest, row) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(function = name, request_id, %error, "dropped an event");
                return Some(Fate::Done(None));
            }
        };
        let Some(function) = self.called(&event.head.function_arn) else {
            tracing::warn!(function = name, request_id, "dropped an event of a deleted version");
            return Some(Fate::Done(None));
        };
        let deadline = row.accepted_ms.saturating_add(ms(MAX_AGE));
        if self.clock.now() >= deadline {
            tracing::warn!(function = name, request_id, attempts, "an event is too old");
            return Some(Fate::Done(None));
        }
        let invocation = Invocation {
            request_id: request_id.to_owned(),
            function_arn: event.head.function_arn,
            trace_id: event.head.trace_id,
            client_context: String::new(),
            cognito_identity: String::new(),
            timeout: function.timeout(),
            payload: event.payload,
        };
        let trace = Trace::new(std::time::Instant::now());
        let request = Request { function, invocation, force: None, trace };
        let result = self.scheduler.invoke(request).await;
        let later = |due: i64| due.min(deadline);
        match result {
            Ok(Served { answer, .. }) if answer.function_error.is_none() => {
                lane.state().pause = Duration::ZERO;
                Some(Fate::Done(None))
            }
            // What fails while the daemon stops may have failed because of that.
            _ if self.stopping() => None,
            Ok(_) => {
                lane.state().pause = Duration::ZERO;
                let attempts = attempts + 1;
                if attempts > RETRIES {
                    tracing::warn!(function = name, request_id, attempts, "an event has failed");
                    return Some(Fate::Done(None));
                }
                let due_ms = self.clock.now().saturating_add(ms(self.bounds.retry * attempts));
                Some(Fate::Again { due_ms: later(due_ms), attempts })
            }
            Err(refusal) => {
                if !matches!(refusal, Refusal::Throttled) {
                    tracing::warn!(function = name, request_id, %refusal, "an event has to wait");
                }
                let due_ms = later(lane.pause(self.clock.now()));
                Some(Fate::Again { due_ms, attempts: *attempts })
            }
        }
    }
}

impl LaneState {
    /// Takes what is due first, if it is due.
    fn take(&mut self, now: i64) -> Option<i64> {
        self.page.front().filter(|(_, due)| *due <= now)?;
        let (id, _) = self.page.pop_front()?;
        self.leased.insert(id);
        Some(id)
    }
}

fn ms(duration: Duration) -> i64 {
    duration.as_millis().try_into().unwrap_or(i64::MAX)
}
