//! The way of one request through a warm, a thawed or a booted instance, and what its end means for
//! the caller, the log and the instance.

use std::{
    fmt::Display,
    sync::Arc,
    time::{Duration, Instant},
};

use firn::{Disk, InstanceError, Invocation, InvokeReport, RENEWAL, ShellClass, StartError, guest};

use super::{Isolation, Refusal, Request, Scheduler, Served, StartKind, Trace, Worker};
use crate::{
    backend::{Backend, Machine},
    function::Function,
    metrics::Took,
    outcome::Answer,
    report::{self, Report},
    workshop::Output,
};

impl<B: Backend> Scheduler<B> {
    /// Finds or starts an instance and has it serve.
    pub(super) async fn serve(self: &Arc<Self>, mut request: Request) -> Result<Served, Refusal> {
        let key = request.function.qualified_name();
        let fingerprint = request.function.fingerprint(&self.workshop.place).to_owned();
        // What instances that wait are: as they were left, or as their snapshot was.
        let waiting = match self.limits.isolation {
            Isolation::Warm => StartKind::Warm,
            Isolation::PerInvocation => StartKind::Reset,
        };
        if request.force.is_none_or(|force| force == waiting) {
            while let Some(worker) = self.take(&key, &fingerprint).await {
                if let Some(served) = self.serve_waiting(worker, &mut request, waiting).await? {
                    return Ok(served);
                }
            }
            if request.force.is_some() {
                return Err(Refusal::Impossible(format!(
                    "X-Firn-Start: {} is impossible: no instance of this function is idle",
                    waiting.word()
                )));
            }
        } else if let Some(force @ (StartKind::Warm | StartKind::Reset)) = request.force {
            return Err(Refusal::Impossible(format!(
                "X-Firn-Start: {} is impossible: with this daemon's --isolation, instances that \
                 have served are {}",
                force.word(),
                if waiting == StartKind::Warm { "kept warm" } else { "reset" }
            )));
        }
        let class = ShellClass::for_memory(request.function.config.memory_mb);
        let _starting = self.admit(class).await?;
        request.trace.mark("scheduled");
        if request.force != Some(StartKind::Boot) {
            let snapshot = self.preparer.resident(&key, &fingerprint);
            if let Some(snapshot) = snapshot {
                match self.serve_thawed(&snapshot, &mut request, &fingerprint).await? {
                    Some(served) => return Ok(served),
                    None if request.force.is_none() => {}
                    None => {
                        return Err(Refusal::Failed("the snapshot could not be thawed".into()));
                    }
                }
            } else if request.force.is_some() {
                let status = self.preparer.status(&key, &fingerprint);
                return Err(Refusal::Impossible(format!(
                    "X-Firn-Start: thaw is impossible: the state of this function's snapshot is \
                     {:?}",
                    status.word()
                )));
            }
        }
        self.serve_booted(request).await
    }

    /// `None`: this instance could not be restored, and the function has not run.
    async fn serve_waiting(
        self: &Arc<Self>,
        mut worker: Worker<B::Machine>,
        request: &mut Request,
        kind: StartKind,
    ) -> Result<Option<Served>, Refusal> {
        request.trace.mark("scheduled");
        self.note(&worker.listed_as, |listed| {
            listed.state = "busy";
            listed.invocations += 1;
        });
        // What it printed after its last answer belongs before this one.
        worker.output.drain().await;
        worker.output.stream.begin_tail();
        worker.output.stream.service(&start_line(request)).await;
        let begun = Instant::now();
        let result = worker.output.during(worker.machine.invoke(&request.invocation)).await;
        match &result {
            Ok(report) => request.trace.add("invoke", begun, &report.phases),
            Err(error) if error.has_not_run() => {
                let function = &worker.function;
                tracing::error!(function, %error, "an instance can't be restored");
                self.workshop.metrics.not_restored();
                self.retire(worker);
                return Ok(None);
            }
            Err(_) => {}
        }
        let request = request.take();
        self.conclude(worker, request, kind, result, 0, begun).await.map(Some)
    }

    /// `None`: this snapshot does not thaw here, and the function has not run.
    async fn serve_thawed(
        self: &Arc<Self>,
        snapshot: &B::Resident,
        request: &mut Request,
        fingerprint: &str,
    ) -> Result<Option<Served>, Refusal> {
        let (function, invocation) = (&request.function, &request.invocation);
        let (mut output, outlets) = self.workshop.output(function);
        output.stream.service(&start_line(request)).await;
        let begun = Instant::now();
        let thaw = self.workshop.backend.thaw(snapshot, Some(invocation), outlets);
        match output.during(thaw).await {
            Ok((machine, Some(report))) => {
                let mut request = request.take();
                request.trace.add("thaw", begun, &report.phases);
                let worker = self.register(
                    machine,
                    output,
                    StartKind::Thaw,
                    &request.function,
                    fingerprint,
                    1,
                );
                let served =
                    self.conclude(worker, request, StartKind::Thaw, Ok(report), 0, begun).await?;
                Ok(Some(served))
            }
            Ok((machine, None)) => {
                machine.retire().await;
                Err(Refusal::Failed("the thawed instance did not answer its first event".into()))
            }
            Err(error) if error.has_not_run() => {
                let key = function.qualified_name();
                tracing::error!(function = key, %error, "a snapshot can't be thawed");
                self.workshop.metrics.not_restored();
                self.preparer.discredit(&key, fingerprint, error.to_string());
                Ok(None)
            }
            Err(StartError::Died { exit }) => {
                let id = &invocation.request_id;
                let answer = Answer::machine_died(id, &exit.to_string());
                Ok(Some(ended(output, request, answer, begun).await))
            }
            // Thawed and renewed, but silent long after the function's own limit.
            Err(StartError::TimedOut { waiting_for: "Done", .. }) => {
                let answer = timed_out(function, &invocation.request_id);
                Ok(Some(ended(output, request, answer, begun).await))
            }
            Err(error) => Err(Refusal::Failed(error.to_string())),
        }
    }

    async fn serve_booted(self: &Arc<Self>, mut request: Request) -> Result<Served, Refusal> {
        let failed = |error: &dyn Display| Refusal::Failed(error.to_string());
        let code = self.code(&mut request).await?;
        let function = request.function.clone();
        let class = ShellClass::for_memory(function.config.memory_mb);
        let fingerprint = function.fingerprint(&self.workshop.place).to_owned();
        let begun = Instant::now();
        let boot = self.workshop.backend.boot(&function.config.runtime, class).await;
        let machine = boot.map_err(|e| failed(&e))?;
        request.trace.add("boot", begun, machine.start_phases());
        let (output, outlets) = self.workshop.output(&function);
        let mut worker =
            self.register(machine, output, StartKind::Boot, &function, &fingerprint, 1);
        let spec = self.workshop.spec(&function, code, "on-demand", &worker.output, outlets);
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
        worker.output.stream.service(&start_line(&request)).await;
        let begun = Instant::now();
        let result = worker.output.during(worker.machine.invoke(&request.invocation)).await;
        if let Ok(report) = &result {
            request.trace.add("invoke", begun, &report.phases);
        }
        self.conclude(worker, request, StartKind::Boot, result, init_us, begun).await
    }

    /// The code of the request's function. Where an update has taken it away since the request came, the
    /// function is what it is now: while it changes, either may serve.
    async fn code(&self, request: &mut Request) -> Result<Disk, Refusal> {
        let place = &self.workshop.place;
        loop {
            let function = &request.function;
            let failure = match self.workshop.disk(function).await {
                Ok(code) => return Ok(code),
                Err(failure) => failure,
            };
            match self.workshop.store.get(&function.name, function.version) {
                Some(now) if now.fingerprint(place) != function.fingerprint(place) => {
                    request.function = now;
                }
                _ => return Err(Refusal::Failed(failure)),
            }
        }
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
        let (answer, mut report) = match result {
            Ok(mut report) => {
                let outcome = std::mem::replace(
                    &mut report.outcome,
                    guest::Outcome::Response { payload: Vec::new(), content_type: String::new() },
                );
                (Answer::of(outcome, id), Some(report))
            }
            Err(error) => {
                let function = &worker.function;
                tracing::warn!(function, %error, "an instance ended under an invocation");
                let answer = match error {
                    InstanceError::Died { exit } => Answer::machine_died(id, &exit.to_string()),
                    InstanceError::Protocol { message, .. } => Answer::machine_died(id, &message),
                    // A guest that does not renew itself has not begun with the event: its function
                    // has not had its time.
                    InstanceError::Unresponsive { operation, .. } if operation != RENEWAL => {
                        timed_out(&request.function, id)
                    }
                    error => {
                        self.retire(worker);
                        return Err(Refusal::Failed(error.to_string()));
                    }
                };
                (answer, None)
            }
        };
        let output = &mut worker.output;
        let elapsed = begun.elapsed();
        let (tail, took) =
            write_end(output, &request, &answer, report.as_ref(), init_us, elapsed).await;
        if let Some(traced) = &request.traced {
            traced.served_by(worker.machine.id(), report.as_ref().map_or(0, |r| r.init_us));
        }
        if report.is_some() {
            self.give_back(worker);
        } else {
            self.retire(worker);
        }
        let segments = report.as_mut().map(|r| std::mem::take(&mut r.segments));
        let segments = segments.unwrap_or_default();
        Ok(Served { kind, answer, tail, took, trace: request.trace, segments })
    }
}

impl Request {
    /// The request; what is left in its place has no event.
    fn take(&mut self) -> Self {
        let left = Self {
            function: self.function.clone(),
            invocation: Invocation::default(),
            force: None,
            trace: Trace::default(),
            traced: None,
            room: None,
        };
        std::mem::replace(self, left)
    }
}

fn start_line(request: &Request) -> String {
    report::start(&request.invocation.request_id, request.function.version)
}

/// The answer for an instance that was still silent after the function's time was up.
fn timed_out(function: &Function, request_id: &str) -> Answer {
    let limit_ms = function.timeout().as_millis() as u64;
    let error = guest::FunctionError::TimedOut { limit_ms };
    Answer::of(guest::Outcome::Error(error), request_id)
}

/// The end of a request whose instance ended with it, before there was a worker.
async fn ended(
    mut output: Output,
    request: &mut Request,
    answer: Answer,
    begun: Instant,
) -> Served {
    let (tail, took) = write_end(&mut output, request, &answer, None, 0, begun.elapsed()).await;
    let trace = std::mem::take(&mut request.trace);
    Served { kind: StartKind::Thaw, answer, tail, took, trace, segments: Vec::new() }
}

/// Hands the log with the end of an invocation to its writer, so that whoever has the answer finds it there, and
/// gives the tail and what the invocation took.
async fn write_end(
    output: &mut Output,
    request: &Request,
    answer: &Answer,
    report: Option<&InvokeReport>,
    init_us: u64,
    elapsed: Duration,
) -> (Vec<u8>, Took) {
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
    (tail, Took::from(&line))
}
