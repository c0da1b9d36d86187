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
//! - What becomes of an event goes to a destination that is a function as another event, in the commit in
//!   which it leaves the queue; after sixteen destinations that ends, for it is a loop.
//! - What goes to queues and topics is [sent](outward) by lanes that take no invocation's place, and that end
//!   when they have nothing left.
//! - Events of a deleted function are dropped, also if another one takes its name.

pub mod clock;
mod outward;
pub mod queue;
mod record;
mod sealed;
pub mod settings;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use firn::{Invocation, keys::KeyError};
use futures_util::FutureExt;
use tokio::{
    sync::{Notify, Semaphore},
    task::AbortHandle,
};

use self::{
    clock::Clock,
    outward::Message,
    queue::{Entry, Fate, Found, New, Queue, QueueError, Setting},
    record::{Condition, Ended},
    sealed::{Event, Head},
    settings::{Known, Settings},
};
use crate::{
    api::{
        MAX_EVENT,
        names::{Place, Reference},
    },
    attachments::{self, Alias},
    aws::{Aws, Recipient},
    backend::Backend,
    function::{Function, Version},
    metrics::{self, Metric},
    outcome::Answer,
    scheduler::{Refusal, Request, Scheduler, Served, Trace},
    store::Store,
    traces::{Invoked, Traces},
};

/// Retries after an error of the function, unless they are set.
const RETRIES: u32 = 2;

/// How long an event may wait, unless that is set.
const MAX_AGE: Duration = Duration::from_secs(6 * 3600);

/// Destinations that one event may come through after another, as in Lambda.
const HOPS: u32 = 16;

/// First and longest pause of a lane whose events are refused.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// Messages to queues and topics that are on their way at once, and those of one function to one target.
const SENDING: (usize, usize) = (32, 8);

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
    traces: Traces,
    place: Place,
    known: RwLock<Known>,
    /// Held by who changes settings.
    changing: tokio::sync::Mutex<()>,
    clock: Clock,
    bounds: Bounds,
    slots: Arc<Semaphore>,
    aws: Arc<Aws>,
    /// For messages to queues and topics.
    sending: Arc<Semaphore>,
    lanes: Mutex<HashMap<String, (Arc<Lane>, AbortHandle)>>,
    stopping: AtomicBool,
}

/// Delivers the events of one function, or what it sends to one target.
#[derive(Debug)]
struct Lane {
    /// As [`New::function`] has it.
    name: String,
    /// Those that it shares with other lanes.
    slots: Arc<Semaphore>,
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
    /// Delivers what is in `queue`, where `found` is, and what will come, to functions of `place`.
    ///
    /// # Errors
    /// [`QueueError::Seal`]: settings were altered.
    pub fn start(
        (queue, found): (Queue, Found),
        store: Arc<Store>,
        scheduler: Arc<Scheduler<B>>,
        place: Place,
        clock: Clock,
        aws: Arc<Aws>,
        bounds: Bounds,
    ) -> Result<Arc<Self>, QueueError> {
        let mut known = BTreeMap::new();
        for setting in found.settings {
            let function = store.get(&setting.function, Version::Latest);
            // Others are of a function that was deleted just before the daemon ended.
            if let Some(function) = function.filter(|f| f.envelope.id() == setting.owner) {
                let settings = Settings::open(&function, &setting)?;
                known.insert((setting.function, setting.qualifier), (setting.owner, settings));
            }
        }
        let events = Arc::new(Self {
            queue,
            store,
            traces: scheduler.traces().clone(),
            scheduler,
            place,
            known: RwLock::new(known),
            changing: tokio::sync::Mutex::default(),
            clock,
            bounds,
            slots: Arc::new(Semaphore::new(bounds.slots)),
            aws,
            sending: Arc::new(Semaphore::new(SENDING.0)),
            lanes: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        for lane in found.lanes {
            events.wake(&lane);
        }
        Ok(events)
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
        let resource = metrics::resource(&function_arn).to_owned();
        let event = Event { head: Head { function_arn, trace_id, hops: 0 }, payload };
        let event = event.seal(function, request_id, self.clock.now());
        self.queue.add(event.map_err(QueueError::from)?).await?;
        self.count(&function.name, &resource, Metric::AsyncEventsReceived, 1.0);
        self.wake(&function.name);
        Ok(())
    }

    /// What is set for events of a function that was called by `qualifier`.
    pub fn settings(&self, function: &Function, qualifier: &str) -> Option<Settings> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let (owner, settings) = known.get(&(function.name.clone(), qualifier.to_owned()))?;
        (*owner == function.envelope.id()).then(|| settings.clone())
    }

    /// All that is set for events of a function, by qualifier.
    pub fn all_settings(&self, function: &Function) -> Vec<(String, Settings)> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let all = known.range((function.name.clone(), String::new())..);
        let id = function.envelope.id();
        all.take_while(|((name, _), _)| *name == function.name)
            .filter(|(_, (owner, _))| *owner == id)
            .map(|((_, qualifier), (_, settings))| (qualifier.clone(), settings.clone()))
            .collect()
    }

    /// Replaces what is set for events of a function by what `change` makes of it; `None`: nothing.
    ///
    /// # Errors
    /// What `change` says, or any [`QueueError`]; then nothing has changed.
    pub async fn set<E: From<QueueError>>(
        &self,
        function: &Function,
        qualifier: &str,
        change: impl FnOnce(Option<Settings>) -> Result<Option<Settings>, E>,
    ) -> Result<Option<Settings>, E> {
        let _changing = self.changing.lock().await;
        let new = change(self.settings(function, qualifier))?
            .map(|settings| Settings { modified_ms: self.clock.now(), ..settings });
        let setting = match &new {
            Some(settings) => settings.seal(function, qualifier).map_err(QueueError::from)?,
            None => Setting {
                function: function.name.clone(),
                owner: function.envelope.id(),
                qualifier: qualifier.to_owned(),
                sealed: None,
            },
        };
        self.queue.set(setting).await?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let key = (function.name.clone(), qualifier.to_owned());
        match &new {
            Some(settings) => known.insert(key, (function.envelope.id(), settings.clone())),
            None => known.remove(&key),
        };
        Ok(new)
    }

    /// Drops the settings of a version or alias that was deleted.
    pub async fn unset(&self, function: &Function, qualifier: &str) {
        if let Err(error) = self.set(function, qualifier, |_| Ok::<_, QueueError>(None)).await {
            tracing::warn!(function = function.name, qualifier, %error, "settings remain");
        }
    }

    /// Drops the settings of a deleted version, or all settings and events of a deleted function.
    /// Deliveries that have begun end as they end.
    pub async fn removed(&self, function: &Function) {
        if function.version != Version::Latest {
            self.unset(function, &function.version.to_string()).await;
            return;
        }
        {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            let id = function.envelope.id();
            known.retain(|(name, _), (owner, _)| *name != function.name || *owner != id);
        }
        self.lanes().retain(|lane, (_, task)| {
            let its = outward::function(lane) == function.name;
            if its {
                task.abort();
            }
            !its
        });
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
        let all = async {
            let _ = self.slots.acquire_many(self.bounds.slots as u32).await;
            let _ = self.sending.acquire_many(SENDING.0 as u32).await;
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!(
                "deliveries of events are cut off; they are repeated after the next start"
            );
        }
    }

    /// What has a task, in order.
    #[cfg(test)]
    pub fn lane_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.lanes().keys().cloned().collect();
        names.sort();
        names
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<String, (Arc<Lane>, AbortHandle)>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be something to deliver in that lane.
    fn wake(self: &Arc<Self>, name: &str) {
        let mut lanes = self.lanes();
        if self.stopping() {
            return;
        }
        if let Some((lane, _)) = lanes.get(name) {
            return lane.wake.notify_one();
        }
        let (slots, share) = match outward::is_outward(name) {
            true => (&self.sending, SENDING.1),
            false => (&self.slots, (self.bounds.slots / 2).max(1)),
        };
        let lane = Arc::new(Lane {
            name: name.to_owned(),
            slots: slots.clone(),
            wake: Notify::new(),
            share: Arc::new(Semaphore::new(share)),
            state: Mutex::default(),
        });
        let task = tokio::spawn(self.clone().run(lane.clone())).abort_handle();
        lanes.insert(name.to_owned(), (lane, task));
    }

    /// Whether a lane that has found nothing to do is to end, and is forgotten then: a function may have had
    /// any number of targets. Nobody can wake it meanwhile, for that takes the lock.
    fn ends(&self, lane: &Lane) -> bool {
        let mut lanes = self.lanes();
        if !outward::is_outward(&lane.name) || !lane.state().leased.is_empty() {
            return false;
        }
        if lane.wake.notified().now_or_never().is_some() {
            // For the lane, which is about to wait for it.
            lane.wake.notify_one();
            return false;
        }
        lanes.remove(&lane.name);
        true
    }

    /// A lane's task. It waits where it may be aborted: deliveries are tasks of their own.
    async fn run(self: Arc<Self>, lane: Arc<Lane>) {
        loop {
            // Lanes queue for slots in turn, so each gets the next one but for those before it.
            let (Ok(share), Ok(slot)) = (
                lane.share.clone().acquire_owned().await,
                lane.slots.clone().acquire_owned().await,
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
                Ok(Step::Wait(None)) if self.ends(&lane) => return,
                Ok(Step::Wait(until)) => {
                    drop((share, slot));
                    tokio::select! {
                        () = lane.wake.notified() => {}
                        () = self.clock.until(until.unwrap_or(i64::MAX)) => {}
                    }
                }
                Err(error) => {
                    drop((share, slot));
                    tracing::error!(function = lane.name, %error, "events can't be read");
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
        let mut page = self.queue.page(&lane.name, leased.len() + PAGE).await?;
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
                tracing::error!(function = lane.name, %error, "an event can't be read");
                lane.pause(self.clock.now());
                return;
            }
        };
        let fate = match outward::is_outward(&lane.name) {
            true => self.send(lane, &entry).await,
            false => self.attempt(lane, &entry).await,
        };
        let Some(fate) = fate else { return };
        while let Err(error) = self.queue.settle(id, fate.clone()).await {
            // It has run; to try again costs less than to run it again.
            let request_id = entry.event.request_id.as_str();
            let function = lane.name.as_str();
            tracing::error!(function, request_id, %error, "what became of an event can't be written");
            if self.stopping() {
                return;
            }
            tokio::time::sleep(WRITE_AGAIN).await;
        }
        if let Fate::Done(next) = &fate {
            next.iter().for_each(|next| self.wake(&next.function));
        }
    }

    fn count(&self, function: &str, resource: &str, metric: Metric, value: f64) {
        self.scheduler.metrics().observe(function, resource, metric, value);
    }

    /// What an event of `function` leads to that has left the queue: what its destination hears, and its
    /// dead-letter target.
    fn follow(
        &self,
        function: &Function,
        settings: &Settings,
        head: &Head,
        ended: &Ended<'_>,
    ) -> Vec<New> {
        let (destination, dead_letter) = match ended.condition {
            Condition::Success => (settings.on_success.as_deref(), None),
            _ => (settings.on_failure.as_deref(), function.config.dead_letter.as_deref()),
        };
        let (now, resource) = (self.clock.now(), metrics::resource(&head.function_arn));
        let mut next = Vec::new();
        for (target, failure) in [
            (dead_letter, Metric::DeadLetterErrors),
            (destination, Metric::DestinationDeliveryFailures),
        ] {
            let Some(target) = target else { continue };
            let sealed = match (failure, Recipient::parse(target)) {
                (Metric::DeadLetterErrors, _) => {
                    Some(Message::dead_letter(target, resource, ended).seal(function, now))
                }
                (_, Some(to)) => {
                    Some(Message::record(&to, resource, ended, now).seal(function, now))
                }
                (_, None) => self.call(target, head, ended, now),
            };
            match sealed {
                Some(Ok(new)) => next.push(new),
                Some(Err(error)) => {
                    let request_id = ended.request_id;
                    tracing::error!(target, request_id, %error, "lost");
                    self.count(&function.name, resource, failure, 1.0);
                }
                None => self.count(&function.name, resource, failure, 1.0),
            }
        }
        next
    }

    /// The event in which the function `destination` hears of another one, if it can.
    fn call(
        &self,
        destination: &str,
        head: &Head,
        ended: &Ended<'_>,
        now: i64,
    ) -> Option<Result<New, KeyError>> {
        let request_id = ended.request_id;
        if head.hops >= HOPS {
            tracing::warn!(destination, request_id, "destinations lead in a circle: stopped");
            return None;
        }
        let named = Reference::parse(destination, None).ok();
        let Some(function) = named.and_then(|r| self.store.get(&r.name, Version::Latest)) else {
            tracing::error!(destination, request_id, "a destination does not exist");
            return None;
        };
        let head = Head {
            function_arn: destination.to_owned(),
            trace_id: self.traces.follow(&head.trace_id, request_id),
            hops: head.hops + 1,
        };
        let event = Event { head, payload: ended.record(now, MAX_EVENT) };
        Some(event.seal(&function, uuid::Uuid::new_v4().to_string(), now))
    }

    /// Sends a message to a queue or topic, and says what becomes of it; `None`: it stays as it is, for the
    /// next start.
    async fn send(&self, lane: &Lane, entry: &Entry) -> Option<Fate> {
        let Entry { event: row, attempts } = entry;
        let name = outward::function(&lane.name);
        let latest = self.store.get(name, Version::Latest);
        let Some(function) = latest.filter(|f| f.envelope.id() == row.owner) else {
            tracing::warn!(function = name, "dropped a message of a deleted function");
            return Some(Fate::Done(Vec::new()));
        };
        let message = match Message::open(&function, row) {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(function = name, %error, "dropped a message");
                return Some(Fate::Done(Vec::new()));
            }
        };
        let outward::Head { target, resource, failure, .. } = &message.head;
        let error = match Recipient::parse(target) {
            None => format!("{target} is no queue or topic"),
            Some(to) => match message.send(&self.aws, &to).await {
                Ok(()) => {
                    lane.state().pause = Duration::ZERO;
                    return Some(Fate::Done(Vec::new()));
                }
                Err(_) if self.stopping() => return None,
                Err(error) => {
                    let now = self.clock.now();
                    let deadline = row.accepted_ms.saturating_add(ms(MAX_AGE));
                    if now < deadline && !outward::is_hopeless(&error) {
                        tracing::warn!(function = name, target, %error, "a message has to wait");
                        let due_ms = lane.pause(now).min(deadline);
                        return Some(Fate::Again { due_ms, attempts: attempts.saturating_add(1) });
                    }
                    error.to_string()
                }
            },
        };
        tracing::error!(function = name, target, ?failure, error, "a message is given up");
        self.count(name, resource, *failure, 1.0);
        Some(Fate::Done(Vec::new()))
    }

    /// Has an event run, and says what becomes of it; `None`: it stays as it is, for the next start.
    async fn attempt(&self, lane: &Lane, entry: &Entry) -> Option<Fate> {
        let Entry { event: row, attempts } = entry;
        let (name, request_id) = (row.function.as_str(), row.request_id.as_str());
        let latest = self.store.get(name, Version::Latest);
        let Some(latest) = latest.filter(|f| f.envelope.id() == row.owner) else {
            tracing::warn!(function = name, request_id, "dropped an event of a deleted function");
            return Some(Fate::Done(Vec::new()));
        };
        let event = match Event::open(&latest, row) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(function = name, request_id, %error, "dropped an event");
                return Some(Fate::Done(Vec::new()));
            }
        };
        let called = Reference::parse(&event.head.function_arn, None).ok();
        let qualifier = called.and_then(|called| called.qualifier).unwrap_or("$LATEST".into());
        let choose = |alias: &Alias| alias.choose(attachments::draw());
        let Some(function) = self.store.resolve(name, &qualifier, choose) else {
            tracing::warn!(function = name, qualifier, request_id, "dropped an event: deleted");
            return Some(Fate::Done(Vec::new()));
        };
        let settings = self.settings(&latest, &qualifier).unwrap_or_default();
        let resource = metrics::resource(&event.head.function_arn);
        let ended = |condition, attempts, answer: Option<&Answer>| {
            let ended = Ended {
                request_id,
                function_arn: format!("{}:{qualifier}", self.place.arn(name)),
                condition,
                attempts,
                payload: &event.payload,
                answer: answer.map(|answer| (answer, function.version)),
            };
            if condition != Condition::Success {
                self.count(name, resource, Metric::AsyncEventsDropped, 1.0);
            }
            let invoked = || Invoked {
                function: function.clone(),
                arn: event.head.function_arn.clone(),
                request_id: request_id.to_owned(),
            };
            let error = (condition != Condition::Success).then(|| condition.word());
            let times = (row.accepted_ms, self.clock.now());
            self.traces.left_the_queue(&event.head.trace_id, invoked, times, attempts, error);
            Some(Fate::Done(self.follow(&function, &settings, &event.head, &ended)))
        };
        let age = settings.max_age_s.map_or(MAX_AGE, |s| Duration::from_secs(s.into()));
        let deadline = row.accepted_ms.saturating_add(ms(age));
        if self.clock.now() >= deadline {
            tracing::warn!(function = name, request_id, attempts, "an event is too old");
            return ended(Condition::EventAgeExceeded, *attempts, None);
        }
        if self.store.attachments(name).is_some_and(|a| a.reserved == Some(0)) {
            tracing::warn!(function = name, request_id, "an event of a function that may not run");
            return ended(Condition::ZeroReservedConcurrency, *attempts, None);
        }
        let mut invocation = Invocation {
            request_id: request_id.to_owned(),
            function_arn: event.head.function_arn.clone(),
            trace_id: event.head.trace_id.clone(),
            client_context: String::new(),
            cognito_identity: String::new(),
            timeout: function.timeout(),
            payload: event.payload.clone(),
            response: None,
        };
        let waited = self.clock.now().saturating_sub(row.accepted_ms).max(0);
        self.count(name, resource, Metric::AsyncEventAge, waited as f64);
        let trace = Trace::default();
        let (number, accepted_ms) = (attempts + 1, row.accepted_ms);
        let traced = self.traces.attempt(&function, &mut invocation, number, accepted_ms);
        let (function, force, room) = (function.clone(), None, None);
        let request = Request { function, invocation, force, trace, traced, room };
        let result = self.scheduler.invoke(request).await;
        let later = |due: i64| due.min(deadline);
        match result {
            Ok(Served { answer, .. }) if answer.function_error.is_none() => {
                lane.state().pause = Duration::ZERO;
                ended(Condition::Success, attempts + 1, Some(&answer))
            }
            // What fails while the daemon stops may have failed because of that.
            _ if self.stopping() => None,
            Ok(Served { answer, .. }) => {
                lane.state().pause = Duration::ZERO;
                let attempts = attempts + 1;
                if attempts > settings.retries.unwrap_or(RETRIES) {
                    tracing::warn!(function = name, request_id, attempts, "an event has failed");
                    return ended(Condition::RetriesExhausted, attempts, Some(&answer));
                }
                let due_ms = self.clock.now().saturating_add(ms(self.bounds.retry * attempts));
                Some(Fate::Again { due_ms: later(due_ms), attempts })
            }
            Err(refusal) => {
                if !matches!(refusal, Refusal::Throttled(_)) {
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
