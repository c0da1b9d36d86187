//! Traces: what the parts of an invocation took, as OpenTelemetry spans for a collector.
//!
//! ```text
//! NAME (the service)                              request id's own span
//! ├─ Dwell Time, Attempt #1 …                     of an event; what follows is below each attempt
//! ├─ Overhead                                     until there is an instance, or room for one
//! ├─ Init | Thaw                                  where it had to be started
//! └─ Invocation                                   in the function: its parent for what it calls
//!    └─ NAME (a segment)                        what the function's X-Ray SDK sends
//! ```
//!
//! Rules that hold here:
//! - Without a collector nothing happens: headers pass as they came.
//! - A traced invocation costs its caller one hand-over. Spans are made by the exporter, from what the daemon
//!   measures anyway and what the function has sent, and the wall clock is not read for them before.
//! - What waits for the collector is bounded. What does not fit is dropped and counted.

mod context;
mod document;
pub mod export;
mod sampler;
pub mod segments;
mod spans;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderValue};
use bytes::Bytes;
use firn::Invocation;

pub use self::context::HEADER;
use self::{
    context::{Context, LONGEST, SpanId, TraceId},
    export::{Collector, Counts, Exporter},
    sampler::Sampler,
};
use crate::{
    api::names::Place,
    attachments::draw,
    function::{Function, now_ms},
    report::Status,
    scheduler::{Refusal, Served, StartKind, Trace},
};

/// Traces invocations, if it has a collector to send them to.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<Arc<Tracer>>);

#[derive(Debug)]
struct Tracer {
    sampler: Sampler,
    exporter: Exporter,
}

/// Who has a function invoked, as `faas.trigger`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// A request to its URL.
    Http,
    /// Lambda's API, or an event in the queue.
    Other,
}

/// What is invoked, and how it is known.
#[derive(Debug, Clone)]
pub struct Invoked {
    /// The version that serves.
    pub function: Arc<Function>,
    /// The name that it was called by.
    pub arn: String,
    /// Id of the request.
    pub request_id: String,
}

impl Invoked {
    fn of(function: &Arc<Function>, invocation: &Invocation) -> Self {
        Self {
            function: function.clone(),
            arn: invocation.function_arn.clone(),
            request_id: invocation.request_id.clone(),
        }
    }
}

/// An invocation that is traced.
#[derive(Debug)]
pub struct Traced {
    tracer: Arc<Tracer>,
    invoked: Invoked,
    trigger: Trigger,
    trace: TraceId,
    /// The span of who called.
    parent: Option<SpanId>,
    /// The service's span.
    service: SpanId,
    /// The span of the function itself.
    invocation: SpanId,
    received: Instant,
    attempt: Option<Attempt>,
    served: OnceLock<Server>,
}

/// One delivery of an event.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    /// From 1 on.
    number: u32,
    accepted_ms: i64,
    span: SpanId,
}

/// Who has served an invocation.
#[derive(Debug)]
struct Server {
    instance: String,
    /// Time that a new runtime took because the last one had ended, in microseconds; 0: none.
    restart_us: u64,
}

/// How an invocation has ended.
#[derive(Debug)]
enum End {
    Served {
        kind: StartKind,
        error: Option<&'static str>,
        duration_us: u64,
        trace: Trace,
        /// X-Ray segment documents that the function sent.
        documents: Vec<Bytes>,
    },
    Refused(Fault),
}

/// Why an invocation was not served: name and status code of the API's error, and a text that no secret is
/// in, for it is Firn's own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    name: &'static str,
    status: u16,
    text: String,
}

/// KiB that one record counts: an invocation's phases and its spans.
const RECORD_KIB: u32 = 4;

/// What spans are made of.
#[derive(Debug)]
enum Record {
    Invocation {
        traced: Arc<Traced>,
        at: Instant,
        end: End,
    },
    /// An event has left the queue.
    Event {
        invoked: Invoked,
        trace: TraceId,
        parent: Option<SpanId>,
        accepted_ms: i64,
        ended_ms: i64,
        attempts: u32,
        error: Option<&'static str>,
    },
}

impl Record {
    /// What it counts while it waits.
    fn kib(&self) -> u32 {
        let documents = match self {
            Self::Invocation { end: End::Served { documents, .. }, .. } => documents.as_slice(),
            Self::Invocation { end: End::Refused(_), .. } | Self::Event { .. } => &[],
        };
        let bytes: usize = documents.iter().map(Bytes::len).sum();
        RECORD_KIB + u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX - RECORD_KIB)
    }
}

impl Traces {
    /// Sends traces to a collector from now on.
    pub fn start(collector: Collector, place: Place) -> Self {
        let exporter = Exporter::start(collector, place);
        Self(Some(Arc::new(Tracer { sampler: Sampler::default(), exporter })))
    }

    /// Gives an invocation that was received with these headers its trace header, which its caller learns,
    /// too. The result is for those that are traced.
    pub fn open(
        &self,
        headers: &HeaderMap,
        received: Instant,
        trigger: Trigger,
        function: &Arc<Function>,
        invocation: &mut Invocation,
    ) -> Option<Arc<Traced>> {
        let Some(tracer) = &self.0 else {
            invocation.trace_id = passed_on(headers);
            return None;
        };
        let context = tracer.decided(headers, function);
        if context.sampled != Some(true) {
            let parent = context.parent.unwrap_or_else(SpanId::new);
            invocation.trace_id = context.header(Some(parent));
            return None;
        }
        let invoked = Invoked::of(function, invocation);
        let traced = tracer.traced(&context, invoked, received, trigger);
        invocation.trace_id = context.header(Some(traced.invocation));
        Some(Arc::new(traced))
    }

    /// Of an event for `function`: the trace header to keep with it.
    pub fn accept(&self, headers: &HeaderMap, function: &Function) -> String {
        let Some(tracer) = &self.0 else { return passed_on(headers) };
        let context = tracer.decided(headers, function);
        context.header(context.parent)
    }

    /// Gives an attempt to deliver an event, whose trace header is that of the event, its own. The result is
    /// for those that are traced.
    pub fn attempt(
        &self,
        function: &Arc<Function>,
        invocation: &mut Invocation,
        number: u32,
        accepted_ms: i64,
    ) -> Option<Arc<Traced>> {
        let tracer = self.0.as_ref()?;
        let context = sampled(&invocation.trace_id)?;
        let invoked = Invoked::of(function, invocation);
        let mut traced = tracer.traced(&context, invoked, Instant::now(), Trigger::Other);
        traced.attempt = Some(Attempt { number, accepted_ms, span: SpanId::new() });
        invocation.trace_id = context.header(Some(traced.invocation));
        Some(Arc::new(traced))
    }

    /// The event that was kept with `header` has left the queue after `attempts`; `error` says why it has
    /// failed.
    pub fn left_the_queue(
        &self,
        header: &str,
        invoked: impl FnOnce() -> Invoked,
        (accepted_ms, ended_ms): (i64, i64),
        attempts: u32,
        error: Option<&'static str>,
    ) {
        let (Some(tracer), Some(context)) = (&self.0, sampled(header)) else { return };
        let Context { trace, parent, .. } = context;
        let invoked = invoked();
        tracer.exporter.take(Record::Event {
            invoked,
            trace,
            parent,
            accepted_ms,
            ended_ms,
            attempts,
            error,
        });
    }

    /// The header for the event in which a destination hears of the one that was kept with `header`.
    pub fn follow(&self, header: &str, request_id: &str) -> String {
        match (&self.0, sampled(header)) {
            (Some(_), Some(context)) => context.header(Some(SpanId::of_request(request_id))),
            _ => header.to_owned(),
        }
    }

    /// What has become of traces so far, if there is a collector.
    pub fn counts(&self) -> Option<Counts> {
        self.0.as_ref().map(|tracer| tracer.exporter.counts())
    }

    /// Waits until the collector has what was recorded, for at most `patience`.
    pub async fn close(&self, patience: Duration) {
        let Some(tracer) = &self.0 else { return };
        if tokio::time::timeout(patience, tracer.exporter.flush()).await.is_err() {
            tracing::warn!("the last traces are lost: the collector does not take them");
        }
    }
}

impl Tracer {
    /// What headers say, with a decision about sampling.
    fn decided(&self, headers: &HeaderMap, function: &Function) -> Context {
        let mut context = Context::of(headers);
        if context.sampled.is_none() {
            let active = function.config.tracing == "Active";
            let sampled = active && self.sampler.decide(&function.name, now_ms() / 1000, draw());
            context.sampled = Some(sampled);
        }
        context
    }

    fn traced(
        self: &Arc<Self>,
        context: &Context,
        invoked: Invoked,
        received: Instant,
        trigger: Trigger,
    ) -> Traced {
        Traced {
            tracer: self.clone(),
            service: SpanId::of_request(&invoked.request_id),
            invoked,
            trigger,
            trace: context.trace,
            parent: context.parent,
            invocation: SpanId::new(),
            received,
            attempt: None,
            served: OnceLock::new(),
        }
    }
}

impl Traced {
    /// An instance is done with it; `restart_us` is what a new runtime took to start in between.
    pub fn served_by(&self, instance: &str, restart_us: u64) {
        // Once: an invocation has one instance.
        let _ = self.served.set(Server { instance: instance.to_owned(), restart_us });
    }

    /// It was refused.
    pub fn refused(self: Arc<Self>, refusal: &Refusal) {
        self.end(End::Refused(refusal.into()));
    }

    /// It is over.
    pub fn concluded(self: Arc<Self>, result: &Result<Served, Refusal>) {
        self.end(match result {
            Ok(Served { kind, answer, took, trace, segments, .. }) => End::Served {
                kind: *kind,
                error: answer.function_error.map(|unhandled| match answer.status {
                    Status::Fine => unhandled,
                    Status::Timeout => "Sandbox.Timedout",
                    Status::Error(kind) => kind,
                }),
                duration_us: took.duration_us,
                trace: trace.clone(),
                documents: segments.clone(),
            },
            Err(refusal) => End::Refused(refusal.into()),
        });
    }

    fn end(self: Arc<Self>, end: End) {
        let tracer = self.tracer.clone();
        tracer.exporter.take(Record::Invocation { traced: self, at: Instant::now(), end });
    }
}

impl From<&Refusal> for Fault {
    fn from(refusal: &Refusal) -> Self {
        let (name, status) = match refusal {
            Refusal::Throttled(_) => ("TooManyRequestsException", 429),
            Refusal::Impossible(_) => ("ResourceConflictException", 409),
            Refusal::Failed(_) => ("ServiceException", 500),
        };
        Self { name, status, text: refusal.to_string() }
    }
}

impl Trigger {
    fn word(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Other => "other",
        }
    }
}

/// The context of an event that is traced.
fn sampled(header: &str) -> Option<Context> {
    Context::parse(header).filter(|context| context.sampled == Some(true))
}

/// The caller's trace header as it is, or a new one that is not sampled.
fn passed_on(headers: &HeaderMap) -> String {
    let own = headers.get(HEADER).map(HeaderValue::to_str).and_then(Result::ok);
    if let Some(own) = own.filter(|own| !own.is_empty() && own.len() <= LONGEST) {
        return own.to_owned();
    }
    Context::begin().header(Some(SpanId::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_collector_headers_pass_or_are_made() {
        let mut headers = HeaderMap::new();
        let made = passed_on(&headers);
        assert!(made.starts_with("Root=1-") && made.ends_with(";Sampled=0"), "{made}");
        let made = Context::parse(&made).unwrap();
        assert_eq!((made.sampled, made.parent.is_some()), (Some(false), true));
        headers.insert(HEADER, HeaderValue::from_static("Root=1-2-3"));
        assert_eq!(passed_on(&headers), "Root=1-2-3");
    }
}
