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

use std::time::{Duration, Instant};

use firn_proto::guest::{
    self, Answer, Begin, Chunk, Done, FromGuest, FunctionError, Invoke, Load, Loaded, Outcome,
    Ready, Renew, Renewed, Segment, ToGuest,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, WaitStatus},
};

use crate::{
    calls::{self, Calls},
    host::{Host, HostError},
    http::{Fields, Request},
    output::Output,
    place::{Place, PlaceError, reap},
    runtime::{Runtime, describe},
    runtime_api::{Event, State, event_reply, truncated},
    server::{ConnectionId, Incoming, Reply},
    signals::{SignalError, Signals},
    tsc,
};

/// Neither pipes nor streamed responses are read while more than this waits for the host.
const OUTPUT_LIMIT: usize = 256 * 1024;

/// Longest limit that the host may set: Lambda's 15 minutes.
const MAX_TIMEOUT_MS: u64 = 900_000;

/// How long a runtime that reported its failure may take to end.
const FAREWELL: Duration = Duration::from_secs(1);

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

/// What the host waits for.
#[derive(Debug)]
enum Task {
    Load { deadline: Instant, limit_ms: u64 },
    Renew { deadline: Instant, limit_ms: u64, since: Instant, message: Box<Renew>, renew_us: u64 },
    Invoke(Box<Invocation>),
}

#[derive(Debug)]
struct Invocation {
    invoke: Invoke,
    read_tsc: u64,
    deadline: Instant,
    limit_ms: u64,
    /// When a new runtime was started for it.
    init: Option<Instant>,
    init_us: u64,
    handed_out: Option<Instant>,
    /// Bytes of the response that have been streamed.
    streamed: u64,
}

impl Task {
    fn deadline(&self) -> Instant {
        match self {
            Self::Load { deadline, .. } | Self::Renew { deadline, .. } => *deadline,
            Self::Invoke(invocation) => invocation.deadline,
        }
    }

    fn limit_ms(&self) -> u64 {
        match self {
            Self::Load { limit_ms, .. } | Self::Renew { limit_ms, .. } => *limit_ms,
            Self::Invoke(invocation) => invocation.limit_ms,
        }
    }
}

/// What a polled descriptor is.
#[derive(Debug, Clone, Copy)]
enum Source {
    Host,
    Signals,
    Pressure,
    Listener,
    Connection(ConnectionId),
    Output(usize),
    Tracer,
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

    /// Waits until something happens or time is up: what happened.
    fn wait(&self) -> Result<Vec<(Source, PollFlags)>, AgentError> {
        let mut sources = Vec::with_capacity(8);
        let mut fds = Vec::with_capacity(8);
        let mut add = |source, fd| {
            sources.push(source);
            fds.push(fd);
        };
        // A host that goes away is noticed at any time, its next frame only when it is its turn.
        let mut flags = PollFlags::RDHUP;
        flags.set(PollFlags::IN, self.listens());
        flags.set(PollFlags::OUT, self.host.queued() > 0);
        add(Source::Host, PollFd::from_borrowed_fd(self.host.fd(), flags));
        let mut end = None;
        if !self.frozen {
            end = self.task.as_ref().map(Task::deadline);
            if let Some(farewell) = self.farewell {
                end = Some(end.map_or(farewell, |end| end.min(farewell)));
            }
            let fd = PollFd::from_borrowed_fd(self.signals.fd(), PollFlags::IN);
            add(Source::Signals, fd);
            if let Some(fd) = self.place.pressure() {
                add(Source::Pressure, PollFd::from_borrowed_fd(fd, PollFlags::PRI));
            }
            if let Some(runtime) = &self.runtime {
                let fd = PollFd::from_borrowed_fd(runtime.server.fd(), PollFlags::IN);
                add(Source::Listener, fd);
                // Here back-pressure reaches the function: nobody reads its pipes and its response.
                let room = self.host.queued() < OUTPUT_LIMIT;
                for connection in runtime.server.connections() {
                    if connection.feeds_host() && !room {
                        continue;
                    }
                    let mut flags = PollFlags::RDHUP;
                    flags.set(PollFlags::IN, connection.wants_input());
                    flags.set(PollFlags::OUT, connection.has_output());
                    let fd = PollFd::from_borrowed_fd(connection.fd(), flags);
                    add(Source::Connection(connection.id()), fd);
                }
                if room {
                    if let Some(fd) = runtime.tracer.fd() {
                        add(Source::Tracer, PollFd::from_borrowed_fd(fd, PollFlags::IN));
                    }
                    for (index, fd) in runtime.outputs.iter().map(Output::fd).enumerate() {
                        if let Some(fd) = fd {
                            let fd = PollFd::from_borrowed_fd(fd, PollFlags::IN);
                            add(Source::Output(index), fd);
                        }
                    }
                }
            }
        }
        let timeout = end.map(|end| {
            let left = end.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(AgentError::Poll(error)),
        }
        let happened = fds.iter().map(PollFd::revents);
        Ok(sources.into_iter().zip(happened).filter(|(_, events)| !events.is_empty()).collect())
    }

    fn serve(&mut self, source: Source, events: PollFlags) -> Result<(), AgentError> {
        let gone = events.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR);
        match (source, &mut self.runtime) {
            // Without a task the next read finds the end, behind what was sent before it.
            (Source::Host, _) if gone && self.task.is_some() => {
                return Err(HostError::Closed.into());
            }
            (Source::Listener, Some(runtime)) => runtime.server.accept(&mut self.scratch),
            (Source::Connection(id), Some(runtime)) => {
                let alive = runtime.server.serve(id, &mut self.scratch, gone);
                if !alive {
                    runtime.api.closed(id);
                    self.calls.closed(id);
                }
            }
            (Source::Tracer, _) => self.pass_segments_on()?,
            (Source::Output(index), Some(runtime)) => {
                let mut sent = Ok(());
                if let Some(output) = runtime.outputs.get_mut(index) {
                    output.read(&mut self.scratch, |log| {
                        if sent.is_ok() {
                            sent = self.host.send(&FromGuest::Log(log));
                        }
                    });
                }
                sent?;
            }
            (Source::Signals, _) => self.signals.read(),
            // Its end is then reaped as any other.
            (Source::Pressure, Some(_)) if events.contains(PollFlags::PRI) => {
                self.place.kill_if_starved()?;
            }
            _ => {}
        }
        Ok(())
    }

    // ---- The host's orders -----------------------------------------------------------------

    fn begin(&mut self, frame: ToGuest) -> Result<(), AgentError> {
        match frame {
            ToGuest::Shutdown => Err(AgentError::Shutdown),
            ToGuest::Load(_) if self.frozen => Err(AgentError::Frozen("Load")),
            ToGuest::Invoke(_) if self.frozen => Err(AgentError::Frozen("Invoke")),
            ToGuest::Load(load) => self.begin_load(load),
            ToGuest::Freeze => self.freeze(),
            ToGuest::Renew(renew) => self.begin_renew(renew),
            ToGuest::Invoke(invoke) => self.begin_invoke(invoke),
            // `ToGuest` may grow; a host that speaks a newer version than Ready's is at fault.
            _ => Err(AgentError::Host(HostError::Codec(firn_proto::CodecError::Malformed(
                "a message of a later version".to_owned(),
            )))),
        }
    }

    fn begin_load(&mut self, load: Load) -> Result<(), AgentError> {
        let refused = if self.load.is_some() {
            Some("this guest already has a function".to_owned())
        } else {
            self.place.prepare(load.code, load.memory_bytes).err().map(|error| error.to_string())
        };
        if let Some(message) = refused {
            let error = Some(FunctionError::InvalidEntrypoint { message });
            return self.answer(&FromGuest::Loaded(Loaded { init_us: 0, error }));
        }
        let limit_ms = load.init_timeout_ms.min(MAX_TIMEOUT_MS);
        let deadline = Instant::now() + Duration::from_millis(limit_ms);
        self.load = Some(load);
        self.task = Some(Task::Load { deadline, limit_ms });
        self.start_runtime()
    }

    fn freeze(&mut self) -> Result<(), AgentError> {
        self.place.freeze(self.runtime.as_ref().map(|runtime| runtime.pid))?;
        self.drain()?;
        self.frozen = true;
        self.answer(&FromGuest::Frozen)
    }

    fn begin_renew(&mut self, message: Renew) -> Result<(), AgentError> {
        let start = Instant::now();
        self.place.renew(&message)?;
        let renew_us = micros(start);
        let since = Instant::now();
        let limit_ms = message.hook_timeout_ms.min(MAX_TIMEOUT_MS);
        let deadline = since + Duration::from_millis(limit_ms);
        let message = Box::new(message);
        self.task = Some(Task::Renew { deadline, limit_ms, since, message, renew_us });
        // Its answer before it runs: it finds it there instead of going to sleep once more.
        self.release();
        self.place.thaw(self.runtime.as_ref().map(|runtime| runtime.pid))?;
        self.frozen = false;
        match self.runtime.as_ref().map(|runtime| runtime.api.state()) {
            None | Some(State::Idle(_)) => self.close(None),
            Some(_) => Ok(()),
        }
    }

    fn begin_invoke(&mut self, invoke: Invoke) -> Result<(), AgentError> {
        let read_tsc = tsc();
        let limit_ms = invoke.timeout_ms.min(MAX_TIMEOUT_MS);
        self.task = Some(Task::Invoke(Box::new(Invocation {
            invoke,
            read_tsc,
            deadline: Instant::now() + Duration::from_millis(limit_ms),
            limit_ms,
            init: None,
            init_us: 0,
            handed_out: None,
            streamed: 0,
        })));
        self.trace();
        if self.runtime.is_none() {
            return self.start_runtime();
        }
        // Initialised for a snapshot that was never taken.
        self.release();
        self.hand_out();
        Ok(())
    }

    // ---- The runtime's doings --------------------------------------------------------------

    fn incoming(&mut self, from: ConnectionId, incoming: Incoming) -> Result<(), AgentError> {
        match incoming {
            Incoming::Request(request) => self.request(from, request),
            Incoming::Head(head) => {
                let Some(runtime) = &mut self.runtime else { return Ok(()) };
                match runtime.api.begin(from, &head) {
                    Ok(content_type) => {
                        self.host.send(&FromGuest::Begin(Begin { content_type }))?;
                    }
                    Err(reply) => runtime.server.refuse(from, reply),
                }
                Ok(())
            }
            Incoming::Piece { bytes, end } => self.piece(from, bytes, end),
        }
    }

    /// More of the response that is being streamed.
    fn piece(
        &mut self,
        from: ConnectionId,
        payload: Vec<u8>,
        end: Option<Fields>,
    ) -> Result<(), AgentError> {
        let (Some(Task::Invoke(invocation)), Some(runtime)) = (&mut self.task, &mut self.runtime)
        else {
            return Ok(());
        };
        invocation.streamed += payload.len() as u64;
        if invocation.streamed > guest::MAX_STREAM {
            let (reply, outcome) = runtime.api.cut(invocation.streamed);
            match end {
                Some(_) => runtime.server.reply(from, reply),
                None => runtime.server.refuse(from, reply),
            }
            return self.close(Some(outcome));
        }
        if !payload.is_empty() {
            self.host.send(&FromGuest::Chunk(Chunk { payload }))?;
        }
        let Some(trailers) = end else { return Ok(()) };
        let (reply, outcome) = runtime.api.end(&trailers);
        // The host's answer first: somebody waits for it.
        self.close(Some(outcome))?;
        if let Some(runtime) = &mut self.runtime {
            runtime.server.reply(from, reply);
        }
        Ok(())
    }

    fn request(&mut self, from: ConnectionId, request: Request) -> Result<(), AgentError> {
        let Some(runtime) = &mut self.runtime else { return Ok(()) };
        if let Some(token) = runtime.token.as_ref().filter(|_| calls::is_call(&request.path)) {
            match calls::judge(request, token) {
                Ok(ask) => self.calls.park(from, ask),
                Err(reply) => runtime.server.reply(from, reply),
            }
            return Ok(());
        }
        let (reply, event) = runtime.api.handle(from, request);
        // The host's answer first: somebody waits for it.
        match event {
            None => {}
            Some(Event::AsksForEvent) => match &self.task {
                // It had the event already and answered with half a response.
                Some(Task::Invoke(invocation)) if invocation.handed_out.is_some() => {
                    self.fail(truncated())?;
                }
                Some(Task::Invoke(_)) => self.hand_out(),
                Some(Task::Load { .. } | Task::Renew { .. }) => self.close(None)?,
                None => {}
            },
            Some(Event::AsksForRestore) => match &self.task {
                Some(Task::Load { .. }) if self.load.as_ref().is_some_and(|l| l.snapshot) => {
                    self.close(None)?;
                }
                _ => self.release(),
            },
            Some(Event::Answered(outcome)) => self.close(Some(outcome))?,
            Some(Event::Failed) => self.farewell = Some(Instant::now() + FAREWELL),
        }
        if let (Some(reply), Some(runtime)) = (reply, &mut self.runtime) {
            runtime.server.reply(from, reply);
        }
        Ok(())
    }

    // ---- What it asks of the host's services, and tells its tracer -------------------------

    /// Passes calls on, as many as may be, if there is an order that they can belong to.
    fn pass_calls_on(&mut self) -> Result<(), AgentError> {
        while self.task.is_some()
            && let Some(call) = self.calls.pass_on()
        {
            self.host.send(&FromGuest::Call(call))?;
        }
        Ok(())
    }

    /// The host has answered a call.
    fn answered(&mut self, answer: Answer) -> Result<(), AgentError> {
        if let Some((connection, reply)) = self.calls.answered(answer)
            && let Some(runtime) = &mut self.runtime
        {
            runtime.server.reply(connection, reply);
        }
        match self.ending.take_if(|_| !self.calls.are_open()) {
            Some(answer) => self.answer(&answer),
            None => Ok(()),
        }
    }

    /// Takes segments from now on if the open invocation is traced.
    fn trace(&mut self) {
        if let (Some(Task::Invoke(invocation)), Some(runtime)) = (&self.task, &mut self.runtime) {
            runtime.tracer.begin(&invocation.invoke.trace_id, &mut self.scratch);
        }
    }

    fn pass_segments_on(&mut self) -> Result<(), AgentError> {
        if let Some(runtime) = &mut self.runtime {
            while let Some(document) = runtime.tracer.next(&mut self.scratch) {
                self.host.send(&FromGuest::Segment(Segment { document }))?;
            }
        }
        Ok(())
    }

    /// Gives the open invocation to the runtime, if it waits for one.
    fn hand_out(&mut self) {
        let (Some(Task::Invoke(invocation)), Some(runtime)) = (&mut self.task, &mut self.runtime)
        else {
            return;
        };
        // An event that is written to nobody would be lost, and its deadline would pass.
        if let State::Idle(connection) = *runtime.api.state()
            && runtime.server.lost(connection)
        {
            runtime.api.closed(connection);
        }
        if let Some(connection) = runtime.api.hand_out(&invocation.invoke.request_id) {
            if let Some(init) = invocation.init {
                invocation.init_us = micros(init);
            }
            invocation.handed_out = Some(Instant::now());
            runtime.server.reply(connection, event_reply(&mut invocation.invoke));
        }
    }

    /// Lets a runtime that waits to be restored go on.
    fn release(&mut self) {
        if let Some(runtime) = &mut self.runtime
            && let Some(connection) = runtime.api.release()
        {
            runtime.server.reply(connection, Reply::ok());
        }
    }

    fn start_runtime(&mut self) -> Result<(), AgentError> {
        if let Some(Task::Invoke(invocation)) = &mut self.task {
            invocation.init = Some(Instant::now());
        }
        let started = match &self.load {
            Some(load) => Runtime::start(&self.place, load).map_err(|error| error.to_string()),
            None => Err("this guest has no function yet".to_owned()),
        };
        match started {
            Ok(runtime) => {
                self.runtime = Some(runtime);
                self.trace();
                Ok(())
            }
            Err(message) => self.fail(FunctionError::InvalidEntrypoint { message }),
        }
    }

    /// Reaps; if the runtime itself has ended, deals with that.
    fn reap(&mut self) -> Result<(), AgentError> {
        let mut ended: Vec<(Pid, WaitStatus)> = Vec::new();
        reap(|pid, status| ended.push((pid, status)));
        let runtime = self.runtime.as_ref().map(|runtime| runtime.pid);
        match ended.into_iter().find(|(pid, _)| Some(*pid) == runtime) {
            Some((_, status)) => self.runtime_ended(status),
            None => Ok(()),
        }
    }

    fn runtime_ended(&mut self, status: WaitStatus) -> Result<(), AgentError> {
        // What it said before it ended still counts. Its children end first, or there might be no
        // end to what is said.
        if let Some(runtime) = &self.runtime {
            self.place.kill(runtime.pid)?;
        }
        while let Some(runtime) = &mut self.runtime {
            runtime.server.accept(&mut self.scratch);
            let open: Vec<_> = runtime.server.connections().iter().map(|c| c.id()).collect();
            for id in open {
                if !runtime.server.serve(id, &mut self.scratch, false) {
                    runtime.api.closed(id);
                    self.calls.closed(id);
                }
            }
            match runtime.server.incoming() {
                Some((connection, incoming)) => self.incoming(connection, incoming)?,
                None if runtime.server.has_input() => {}
                None => break,
            }
        }
        self.over(FunctionError::Exited { status: describe(status) })
    }

    fn time_out(&mut self, limit_ms: u64) -> Result<(), AgentError> {
        self.over(FunctionError::TimedOut { limit_ms })
    }

    fn stop_runtime(&mut self, why: &str) -> Result<(), AgentError> {
        self.over(FunctionError::Exited { status: why.to_owned() })
    }

    /// The runtime has ended or must end, for this reason if it gave none itself.
    fn over(&mut self, reason: FunctionError) -> Result<(), AgentError> {
        self.farewell = None;
        if let Some(runtime) = &self.runtime {
            self.place.kill(runtime.pid)?;
        }
        self.drain()?;
        let Some(runtime) = self.runtime.take() else { return self.fail(reason) };
        let given = match runtime.api.state() {
            State::Failed(error) => Some(error.clone()),
            _ => None,
        };
        // Its listener goes with it: the next runtime's takes the same port.
        drop(runtime);
        self.calls.all_closed();
        let timed_out = matches!(reason, FunctionError::TimedOut { .. });
        match &self.task {
            // It ended before it got the event, and not for its sake: the event is still whole.
            Some(Task::Invoke(invocation))
                if invocation.handed_out.is_none() && invocation.init.is_none() && !timed_out =>
            {
                self.start_runtime()
            }
            _ => self.fail(given.unwrap_or(reason)),
        }
    }

    // ---- Answers ---------------------------------------------------------------------------

    /// Closes the open task as failed.
    fn fail(&mut self, error: FunctionError) -> Result<(), AgentError> {
        self.close(Some(Outcome::Error(error)))
    }

    /// Closes the open task: `None` is success where there is nothing to tell.
    fn close(&mut self, outcome: Option<Outcome>) -> Result<(), AgentError> {
        let Some(task) = self.task.take() else { return Ok(()) };
        self.drain()?;
        if let Some(runtime) = &mut self.runtime {
            runtime.tracer.end();
        }
        let error = |outcome| match outcome {
            Some(Outcome::Error(error)) => Some(error),
            _ => None,
        };
        match task {
            Task::Load { deadline, limit_ms } => {
                let started = deadline - Duration::from_millis(limit_ms);
                let loaded = Loaded { init_us: micros(started), error: error(outcome) };
                self.end(FromGuest::Loaded(loaded))
            }
            Task::Renew { since, message, renew_us, .. } => self.end(FromGuest::Renewed(Renewed {
                instance_id: message.instance_id,
                renew_us,
                hooks_us: micros(since),
                error: error(outcome),
            })),
            Task::Invoke(invocation) => {
                let duration_us = invocation.handed_out.map_or(0, micros);
                let init_us = match (invocation.handed_out, invocation.init) {
                    (None, Some(init)) => micros(init),
                    _ => invocation.init_us,
                };
                let outcome = outcome.unwrap_or(Outcome::Response {
                    payload: Vec::new(),
                    content_type: String::new(),
                });
                self.end(FromGuest::Done(Done {
                    request_id: invocation.invoke.request_id,
                    outcome,
                    duration_us,
                    init_us,
                    max_memory_bytes: self.place.peak_memory(),
                    tsc: (invocation.read_tsc, tsc()),
                }))
            }
        }
    }

    /// Answers the order whose task was closed, or has its calls end first.
    fn end(&mut self, answer: FromGuest) -> Result<(), AgentError> {
        if !self.calls.are_open() {
            return self.answer(&answer);
        }
        self.ending = Some(answer);
        self.answer(&FromGuest::Abandon)
    }

    fn answer(&mut self, answer: &FromGuest) -> Result<(), AgentError> {
        self.host.send(answer)?;
        Ok(self.host.flush()?)
    }

    /// Sends what the runtime has printed and told its tracer so far, to its last byte.
    fn drain(&mut self) -> Result<(), AgentError> {
        self.pass_segments_on()?;
        let mut sent = Ok(());
        if let Some(runtime) = &mut self.runtime {
            for output in &mut runtime.outputs {
                output.drain(&mut self.scratch, |log| {
                    if sent.is_ok() {
                        sent = self.host.send(&FromGuest::Log(log));
                    }
                });
            }
        }
        Ok(sent?)
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
