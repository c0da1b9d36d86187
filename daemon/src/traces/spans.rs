//! What the daemon knows of an invocation, as OpenTelemetry spans.
//!
//! Names of attributes are those of OpenTelemetry's semantic conventions (FaaS, cloud, AWS Lambda, HTTP); what
//! they have no name for begins with `firn.`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{
        Span, Status,
        span::{Event, SpanKind},
        status::StatusCode,
    },
};

use super::{
    Attempt, End, Invoked, Record, Traced, Trigger,
    context::{SpanId, TraceId},
    segments,
};
use crate::{
    api::names::Place,
    scheduler::{StartKind, Trace},
};

/// From and to. Of spans: in nanoseconds since the epoch.
pub(super) type Times = (u64, u64);

/// Spans of a record.
pub(super) fn of(record: &Record, place: &Place) -> Vec<Span> {
    match record {
        Record::Invocation { traced, at, end } => of_invocation(traced, *at, end, place),
        Record::Event { invoked, trace, parent, accepted_ms, ended_ms, attempts, error } => {
            let id = SpanId::of_request(&invoked.request_id);
            let times = (ns_of_ms(*accepted_ms), ns_of_ms(*ended_ms));
            let span = span(*trace, id, *parent, &invoked.function.name, times);
            let mut span = of_service(span, invoked, Trigger::Other, place);
            span.attributes.push(number("firn.attempts", u64::from(*attempts)));
            fail(&mut span, *error);
            vec![span]
        }
    }
}

fn of_invocation(traced: &Traced, at: Instant, end: &End, place: &Place) -> Vec<Span> {
    let Traced { invoked, trace, trigger, attempt, received, service, .. } = traced;
    if attempt.is_some() && matches!(end, End::Refused(_)) {
        // The event goes on waiting: it is part of its dwell time, as it is none of its attempts.
        return Vec::new();
    }
    let clock = Clock::new(*received);
    let until = micros(at.saturating_duration_since(*received));
    let all = clock.both((0, until));
    let mut spans = Vec::with_capacity(5);
    let mut whole = match attempt {
        None => {
            let span = span(*trace, *service, traced.parent, &invoked.function.name, all);
            of_service(span, invoked, *trigger, place)
        }
        Some(Attempt { number, accepted_ms, span: id }) => {
            if *number == 1 {
                let accepted = ns_of_ms(*accepted_ms);
                let times = (accepted, all.0.max(accepted));
                spans.push(span(*trace, SpanId::new(), Some(*service), "Dwell Time", times));
            }
            span(*trace, *id, Some(*service), &format!("Attempt #{number}"), all)
        }
    };
    let server = traced.served.get();
    whole.attributes.extend(server.map(|server| text("faas.instance", &server.instance)));
    let (kind, error, duration_us, moments, documents) = match end {
        End::Served { kind, error, duration_us, trace, documents } => {
            (*kind, *error, *duration_us, trace, documents)
        }
        End::Refused(fault) => {
            whole.attributes.push(number("http.response.status_code", fault.status.into()));
            fail(&mut whole, Some(fault.name));
            let code = StatusCode::Error.into();
            whole.status = Some(Status { code, message: fault.text.clone() });
            return vec![whole];
        }
    };
    // What the caller of a URL gets is the function's own affair.
    let answers = attempt.is_none() && *trigger == Trigger::Other;
    whole.attributes.extend(answers.then(|| number("http.response.status_code", 200)));
    fail(&mut whole, error);
    let above = SpanId(whole.span_id.as_slice().try_into().unwrap_or_default());
    spans.push(whole);
    let below = |id, name, times| span(*trace, id, Some(above), name, clock.both(times));
    let restart_us = server.map_or(0, |server| server.restart_us);
    let parts = Parts::of(kind, moments, duration_us, restart_us, until);
    spans.push(below(SpanId::new(), "Overhead", parts.overhead));
    if let Some(times) = parts.start {
        let name = if kind == StartKind::Boot { "Init" } else { "Thaw" };
        let mut start = below(SpanId::new(), name, times);
        start.attributes.push(text("firn.start", kind.word()));
        start.events = events(moments, times.1, &clock);
        spans.push(start);
    }
    if let Some(times) = parts.restart {
        let mut start = below(SpanId::new(), "Init", times);
        start.attributes.push(text("firn.start", "restart"));
        spans.push(start);
    }
    let mut run = below(traced.invocation, "Invocation", parts.invocation);
    run.attributes.push(text("faas.invocation_id", &invoked.request_id));
    run.attributes
        .push(boolean("faas.coldstart", matches!(kind, StartKind::Boot | StartKind::Thaw)));
    fail(&mut run, error);
    let within = (run.start_time_unix_nano, run.end_time_unix_nano);
    spans.push(run);
    let told = segments::spans(documents, *trace, traced.invocation, within);
    // The function can tell the service's span from its request's id.
    spans.extend(told.into_iter().filter(|span| span.span_id != service.0));
    spans
}

/// What an invocation consists of, in microseconds since it was received.
#[derive(Debug, PartialEq)]
struct Parts {
    /// Until it had an instance, or room for one.
    overhead: Times,
    /// Until an instance was ready that was started for it.
    start: Option<Times>,
    /// The start of a new runtime in an instance whose last one had ended.
    restart: Option<Times>,
    /// In the function.
    invocation: Times,
}

impl Parts {
    /// `until` is the time of the answer.
    fn of(kind: StartKind, moments: &Trace, duration_us: u64, restart_us: u64, until: u64) -> Self {
        let at = |first, phase| {
            let mut moments = moments.moments();
            moments.find_map(|(f, p, at)| (f == first && p == phase).then_some(at.min(until)))
        };
        let (serving, ready) = match kind {
            StartKind::Boot => ("invoke", at("load", Some("loaded"))),
            StartKind::Thaw => ("thaw", at("thaw", Some("renewed"))),
            StartKind::Reset => ("invoke", at("invoke", Some("renewed"))),
            StartKind::Warm => ("invoke", None),
        };
        let scheduled = at("scheduled", None).unwrap_or(0);
        let ready = ready.map(|ready| ready.max(scheduled));
        let earliest = ready.unwrap_or(scheduled);
        // An instance that died under it has no more to say.
        let done = at(serving, Some("done")).unwrap_or(until).max(earliest);
        let begun = done.saturating_sub(duration_us).max(earliest);
        Self {
            overhead: (0, scheduled),
            start: ready.map(|ready| (scheduled, ready)),
            restart: (restart_us > 0)
                .then(|| (begun.saturating_sub(restart_us).max(earliest), begun)),
            invocation: (begun, done),
        }
    }
}

/// The wall clock at a moment of a request's own, which all of its spans share.
struct Clock {
    /// When it was received, in nanoseconds since the epoch.
    received_ns: u64,
}

impl Clock {
    fn new(received: Instant) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let received = now.saturating_sub(received.elapsed());
        Self { received_ns: u64::try_from(received.as_nanos()).unwrap_or(u64::MAX) }
    }

    fn ns(&self, us: u64) -> u64 {
        self.received_ns.saturating_add(us.saturating_mul(1000))
    }

    fn both(&self, (from, to): Times) -> Times {
        (self.ns(from), self.ns(to))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn ns_of_ms(ms: i64) -> u64 {
    u64::try_from(ms).unwrap_or(0).saturating_mul(1_000_000)
}

pub(super) fn span(
    trace: TraceId,
    id: SpanId,
    parent: Option<SpanId>,
    name: &str,
    (from, to): Times,
) -> Span {
    Span {
        trace_id: trace.0.to_vec(),
        span_id: id.0.to_vec(),
        parent_span_id: parent.map_or_else(Vec::new, |parent| parent.0.to_vec()),
        name: name.to_owned(),
        kind: SpanKind::Internal.into(),
        start_time_unix_nano: from,
        end_time_unix_nano: to,
        // W3C's flag for a sampled trace.
        flags: 1,
        ..Span::default()
    }
}

/// A span that stands for the service as a whole.
fn of_service(span: Span, invoked: &Invoked, trigger: Trigger, place: &Place) -> Span {
    let Invoked { function, arn, request_id } = invoked;
    let attributes = vec![
        text("faas.invoked_name", &function.name),
        text("faas.version", &function.version.to_string()),
        text("faas.trigger", trigger.word()),
        text("cloud.resource_id", &place.arn(&function.name)),
        text("aws.lambda.invoked_arn", arn),
        text("aws.request_id", request_id),
    ];
    Span { kind: SpanKind::Server.into(), attributes, ..span }
}

fn fail(span: &mut Span, error: Option<&'static str>) {
    let Some(error) = error else { return };
    span.attributes.push(text("error.type", error));
    span.status = Some(Status { code: StatusCode::Error.into(), message: String::new() });
}

/// The phases of an instance's start.
fn events(moments: &Trace, until: u64, clock: &Clock) -> Vec<Event> {
    let moments = moments.moments().filter(|(_, phase, at)| phase.is_some() && *at <= until);
    let event = |(first, phase, at): (&str, Option<&str>, u64)| Event {
        time_unix_nano: clock.ns(at),
        name: format!("{first} {}", phase.unwrap_or_default()),
        ..Event::default()
    };
    moments.map(event).collect()
}

/// An attribute.
pub fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

pub(super) fn number(key: &str, value: u64) -> KeyValue {
    attribute(key, Value::IntValue(value.try_into().unwrap_or(i64::MAX)))
}

pub(super) fn boolean(key: &str, value: bool) -> KeyValue {
    attribute(key, Value::BoolValue(value))
}

pub(super) fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::http::{HeaderMap, HeaderValue};
    use bytes::Bytes;
    use firn::{Invocation, Phases};

    use super::*;
    use crate::traces::{HEADER, Traces, export::Collector};

    fn moments(operations: &[(&'static str, &[(&'static str, u64)])]) -> Trace {
        let received = Instant::now() - Duration::from_micros(100);
        let mut trace = Trace::new(received);
        trace.mark("scheduled");
        for (operation, phases) in operations {
            let phases = phases.iter().map(|(name, us)| (*name, Duration::from_micros(*us)));
            trace.add(operation, received, &Phases(phases.collect()));
        }
        trace
    }

    #[test]
    fn parts_follow_each_other_whatever_the_start() {
        let warm = [("invoke", &[("sent", 900_000), ("done", 950_000)][..])];
        let thawed = [("thaw", &[("renewed", 700_000), ("done", 900_000)][..])];
        let booted = [
            ("boot", &[("ready", 400_000)][..]),
            ("load", &[("loaded", 800_000)][..]),
            ("invoke", &[("done", 900_000)][..]),
        ];
        let cases = [
            (StartKind::Warm, moments(&warm), None, 950_000),
            (StartKind::Thaw, moments(&thawed), Some(700_000), 900_000),
            (StartKind::Boot, moments(&booted), Some(800_000), 900_000),
        ];
        for (kind, moments, ready, done) in cases {
            let parts = Parts::of(kind, &moments, 50_000, 0, 1_000_000);
            assert_eq!(parts.invocation, (done - 50_000, done), "{kind:?}");
            assert_eq!(parts.start.map(|start| start.1), ready, "{kind:?}");
            assert_eq!((parts.overhead.0, parts.restart), (0, None));
            if let Some(start) = parts.start {
                assert_eq!(start.0, parts.overhead.1);
            }
        }
    }

    #[test]
    fn what_a_guest_says_stays_within_what_the_host_has_seen() {
        let thawed = moments(&[("thaw", &[("renewed", 700_000), ("done", 900_000)])]);
        let parts = Parts::of(StartKind::Thaw, &thawed, u64::MAX, u64::MAX, 1_000_000);
        assert_eq!(parts.invocation, (700_000, 900_000));
        assert_eq!(parts.restart, Some((700_000, 700_000)));
        let died = moments(&[]);
        let parts = Parts::of(StartKind::Warm, &died, 400_000, 100_000, 1_000_000);
        assert_eq!(
            (parts.invocation, parts.restart),
            ((600_000, 1_000_000), Some((500_000, 600_000)))
        );
    }

    #[tokio::test]
    async fn what_a_function_sends_is_below_its_invocation_and_counts() {
        let root = "1-58406520-a006649127e371903a2de979";
        let place = Place { region: "us-east-1".into(), account: "0".into() };
        let nobody = Collector::find(Some("http://127.0.0.1:1")).unwrap().unwrap();
        let traces = Traces::start(nobody, place.clone());
        let header = HeaderValue::try_from(format!("Root={root};Sampled=1")).unwrap();
        let function = Arc::new(crate::function::tests::example("f"));
        let request_id = uuid::Uuid::new_v4().to_string();
        let mut invocation = Invocation { request_id, ..Invocation::default() };
        let headers = HeaderMap::from_iter([(HEADER, header)]);
        let received = Instant::now();
        let traced = traces.open(&headers, received, Trigger::Other, &function, &mut invocation);
        let traced = traced.unwrap();
        // The service's id is no secret, for it is made of the request's.
        let ids = [SpanId([1; 8]), SpanId::of_request(&invocation.request_id), traced.invocation];
        let document = |id: SpanId| {
            let segment = serde_json::json!({
                "id": id.to_string(), "name": "own", "trace_id": root, "start_time": 0, "end_time": 9e9,
                "metadata": { "default": "x".repeat(1000) },
            });
            Bytes::from(format!("{{\"format\": \"json\", \"version\": 1}}\n{segment}"))
        };
        let end = End::Served {
            kind: StartKind::Warm,
            error: None,
            duration_us: 5,
            trace: Trace::new(received),
            documents: ids.map(document).to_vec(),
        };
        let record = Record::Invocation { traced: traced.clone(), at: Instant::now(), end };
        assert_eq!(record.kib(), 4 + 4);
        let spans = of(&record, &place);
        let names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["f", "Overhead", "Invocation", "own"]);
        let [.., run, own] = &spans[..] else { panic!() };
        assert_eq!((&own.parent_span_id, &own.trace_id), (&run.span_id, &run.trace_id));
        assert_eq!(
            (own.start_time_unix_nano, own.end_time_unix_nano),
            (run.start_time_unix_nano, run.end_time_unix_nano)
        );
    }
}
