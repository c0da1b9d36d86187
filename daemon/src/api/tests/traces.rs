//! Traces, as a collector gets them.

use axum::{Router, http::HeaderMap, routing::post};
use bytes::Bytes;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
    },
    common::v1::any_value::Value as Any,
    trace::v1::{Span, span::SpanKind},
};
use prost::Message;
use std::sync::Mutex;

use super::*;

const ROOT: &str = "1-58406520-a006649127e371903a2de979";
const TRACE: &str = "58406520a006649127e371903a2de979";
const CALLER: &str = "53995c3f42cd8ad8";

/// What listens at the other end.
#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

impl Collector {
    /// Answers with these statuses, then always with 200.
    async fn start(&self, dir: &std::path::Path, answers: &[u16]) {
        let (spans, answers) = (self.0.clone(), Arc::new(Mutex::new(answers.to_vec())));
        let take = async move |headers: HeaderMap, body: Bytes| {
            assert_eq!(headers["content-type"], "application/x-protobuf");
            let mut answers = answers.lock().unwrap();
            let status = if answers.is_empty() { 200 } else { answers.remove(0) };
            let request = ExportTraceServiceRequest::decode(body).unwrap();
            for resource in request.resource_spans.into_iter().filter(|_| status == 200) {
                let about = resource.resource.unwrap().attributes;
                assert!(about.iter().any(|a| a.key == "service.name"), "{about:?}");
                let found = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                spans.lock().unwrap().extend(found);
            }
            let partial_success =
                Some(ExportTracePartialSuccess { rejected_spans: 1, error_message: "x".into() });
            let body = ExportTraceServiceResponse { partial_success }.encode_to_vec();
            (axum::http::StatusCode::from_u16(status).unwrap(), body)
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::fs::write(dir.join("collector"), url).unwrap();
        let router = Router::new().route("/v1/traces", post(take));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    }

    /// All spans that have come, and takes them away.
    async fn spans(&self, daemon: &Daemon) -> Vec<Span> {
        daemon.app.traces.close(Duration::from_secs(20)).await;
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

async fn traced() -> (tempfile::TempDir, Daemon, Collector) {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::default();
    collector.start(dir.path(), &[]).await;
    let daemon = start(dir.path(), limits(), 0).await;
    (dir, daemon, collector)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[track_caller]
fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let names: Vec<_> = spans.iter().map(|span| &span.name).collect();
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found.next().unwrap_or_else(|| panic!("no {name} in {names:?}"));
    assert!(found.next().is_none(), "more than one {name} in {names:?}");
    span
}

#[track_caller]
fn has(span: &Span, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    let found = found.unwrap_or_else(|| panic!("no {key} in {span:?}"));
    match found.value.clone().unwrap().value.unwrap() {
        Any::StringValue(text) => text,
        Any::IntValue(number) => number.to_string(),
        Any::BoolValue(truth) => truth.to_string(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn is_below(spans: &[Span], name: &str, above: &str) {
    let (span, above) = (named(spans, name), named(spans, above));
    assert_eq!((&span.parent_span_id, &span.trace_id), (&above.span_id, &above.trace_id), "{name}");
    assert!(span.start_time_unix_nano >= above.start_time_unix_nano, "{name}");
    assert!(span.end_time_unix_nano <= above.end_time_unix_nano, "{name}");
    assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{name}");
}

fn header(more: &str) -> String {
    format!("Root={ROOT};Parent={CALLER}{more}")
}

#[tokio::test]
async fn an_invocation_is_a_tree_below_its_caller() {
    let (_dir, daemon, collector) = traced().await;
    daemon.create("f", json!({})).await;
    daemon.snapshot_is("f", "ready").await;
    let sampled = header(";Sampled=1");
    for (start, cold) in [("boot", Some("Init")), ("thaw", Some("Thaw")), ("warm", None)] {
        let headers = [("x-amzn-trace-id", sampled.as_str()), ("x-firn-start", start)];
        let answer = daemon.invoke("f", &headers, &json!(1)).await;
        assert_eq!(answer.status, 200, "{:?}", answer.json());
        let spans = collector.spans(&daemon).await;
        assert_eq!(spans.len(), 3 + usize::from(cold.is_some()), "{spans:?}");
        let service = named(&spans, "f");
        assert_eq!(
            (hex(&service.trace_id), hex(&service.parent_span_id)),
            (TRACE.into(), CALLER.into())
        );
        assert_eq!(service.kind(), SpanKind::Server);
        let id = answer.header("x-amzn-requestid").unwrap();
        for (key, value) in [
            ("faas.invoked_name", "f"),
            ("faas.version", "$LATEST"),
            ("faas.trigger", "other"),
            ("cloud.resource_id", "arn:aws:lambda:us-east-1:000000000000:function:f"),
            ("aws.lambda.invoked_arn", "arn:aws:lambda:us-east-1:000000000000:function:f"),
            ("aws.request_id", id),
            ("http.response.status_code", "200"),
        ] {
            assert_eq!(has(service, key), value);
        }
        assert!(!has(service, "faas.instance").is_empty());
        assert_eq!(service.status, None);
        for name in ["Overhead", "Invocation"].into_iter().chain(cold) {
            is_below(&spans, name, "f");
        }
        let invocation = named(&spans, "Invocation");
        assert_eq!(has(invocation, "faas.coldstart"), cold.is_some().to_string());
        // What the function and the caller learn: the function's parent is the span of its own.
        let expected = format!("Root={ROOT};Parent={};Sampled=1", hex(&invocation.span_id));
        assert_eq!(answer.header("x-amzn-trace-id"), Some(expected.as_str()));
        if let Some(cold) = cold.map(|name| named(&spans, name)) {
            assert_eq!(has(cold, "firn.start"), start);
            assert!(cold.end_time_unix_nano <= invocation.start_time_unix_nano);
            // Those of the fake's thaw are made up, and later than its end.
            assert!(!cold.events.is_empty() || start == "thaw");
        }
    }
    let text = String::from_utf8(daemon.get("/metrics").await.body).unwrap();
    assert!(text.contains("firn_traces_total{outcome=\"exported\"} 3\n"), "{text}");
}

#[tokio::test]
async fn who_decides_what_is_sampled() {
    let (_dir, daemon, collector) = traced().await;
    let active = json!({ "TracingConfig": { "Mode": "Active" } });
    let made = daemon.create("active", active).await.json();
    assert_eq!(made["TracingConfig"]["Mode"], "Active");
    daemon.create("passive", json!({})).await;
    for (name, said, expected) in [
        ("active", "", true),
        ("active", ";Sampled=0", false),
        ("active", ";Sampled=1", true),
        ("passive", "", false),
        ("passive", ";Sampled=?", false),
        ("passive", ";Sampled=1", true),
    ] {
        // Another second: the first invocation in each is sampled.
        tokio::time::sleep(Duration::from_millis(1001)).await;
        let answer = daemon.invoke(name, &[("x-amzn-trace-id", &header(said))], &json!(1)).await;
        let told = answer.header("x-amzn-trace-id").unwrap();
        assert!(told.starts_with(&format!("Root={ROOT};Parent=")), "{told}");
        assert!(
            told.ends_with(&format!(";Sampled={}", u8::from(expected))),
            "{name} {said}: {told}"
        );
        assert_eq!(!collector.spans(&daemon).await.is_empty(), expected, "{name} {said}");
    }
    let parent = format!("00-{TRACE}-{CALLER}-01");
    daemon.invoke("passive", &[("traceparent", &parent)], &json!(1)).await;
    let spans = collector.spans(&daemon).await;
    let service = named(&spans, "passive");
    assert_eq!(
        (hex(&service.trace_id), hex(&service.parent_span_id)),
        (TRACE.into(), CALLER.into())
    );
    // Without a collector headers pass as they are.
    let (_dir, daemon) = super::daemon().await;
    daemon.create("f", json!({})).await;
    let answer = daemon.invoke("f", &[("x-amzn-trace-id", "Root=x;Sampled=1")], &json!(1)).await;
    assert_eq!(answer.header("x-amzn-trace-id"), Some("Root=x;Sampled=1"));
    let text = String::from_utf8(daemon.get("/metrics").await.body).unwrap();
    assert!(!text.contains("firn_traces"), "{text}");
}

#[tokio::test]
async fn failures_are_seen_and_say_nothing_of_the_function() {
    let (_dir, daemon, collector) = traced().await;
    daemon.create("f", json!({})).await;
    let sampled = header(";Sampled=1");
    let headers = [("x-amzn-trace-id", sampled.as_str())];
    for (order, error) in [
        ("raise", "Unhandled"),
        ("timeout", "Sandbox.Timedout"),
        ("exit", "Runtime.ExitError"),
        ("die", "Runtime.ExitError"),
    ] {
        daemon.invoke("f", &headers, &json!({ "do": order })).await;
        let spans = collector.spans(&daemon).await;
        for name in ["f", "Invocation"] {
            let span = named(&spans, name);
            assert_eq!(has(span, "error.type"), error);
            assert_eq!(span.status.as_ref().unwrap().code, 2);
        }
        assert!(!format!("{spans:?}").contains("oops"), "{spans:?}");
    }
    let limit = json!({ "ReservedConcurrentExecutions": 0 });
    daemon.send("PUT", "/2017-10-31/functions/f/concurrency", &limit).await;
    assert_eq!(daemon.invoke("f", &headers, &json!(1)).await.status, 429);
    let spans = collector.spans(&daemon).await;
    assert_eq!(spans.len(), 1);
    assert_eq!(has(&spans[0], "error.type"), "TooManyRequestsException");
    assert_eq!(has(&spans[0], "http.response.status_code"), "429");
}

#[tokio::test]
async fn an_event_is_one_span_from_its_acceptance_over_all_attempts() {
    let (dir, daemon, collector) = traced().await;
    daemon.create("f", json!({})).await;
    daemon.create("heard", json!({})).await;
    let path = "/2019-09-25/functions/f/event-invoke-config";
    let heard = "arn:aws:lambda:us-east-1:000000000000:function:heard";
    let settings = json!({
        "MaximumRetryAttempts": 1, "DestinationConfig": { "OnFailure": { "Destination": heard } },
    });
    assert_eq!(daemon.send("PUT", path, &settings).await.status, 200);
    let sampled = header(";Sampled=1");
    let headers = [("x-amzn-trace-id", sampled.as_str()), ("x-amz-invocation-type", "Event")];
    let answer = daemon.invoke("f", &headers, &json!({ "do": "raise" })).await;
    assert_eq!((answer.status, answer.header("x-amzn-trace-id")), (202, Some(sampled.as_str())));
    let mut spans = Vec::new();
    while !spans.iter().any(|span: &Span| span.name == "Attempt #1") {
        tokio::time::sleep(Duration::from_millis(5)).await;
        spans.extend(collector.spans(&daemon).await);
    }
    assert!(!spans.iter().any(|span| span.name == "f"), "it is not over");
    is_below(&spans, "Invocation", "Attempt #1");
    assert_eq!(has(named(&spans, "Attempt #1"), "error.type"), "Unhandled");
    let first = spans;
    // Another daemon goes on with it.
    daemon.events.close(Duration::from_secs(5)).await;
    let Daemon { app, stop, .. } = daemon;
    drop((stop, app));
    let daemon = start(dir.path(), limits(), 0).await;
    daemon.clock.advance(Duration::from_secs(60));
    let mut spans = Vec::new();
    while !spans.iter().any(|span: &Span| span.name == "heard") {
        tokio::time::sleep(Duration::from_millis(5)).await;
        spans.extend(collector.spans(&daemon).await);
    }
    let service = named(&spans, "f");
    assert_eq!(
        (hex(&service.trace_id), hex(&service.parent_span_id)),
        (TRACE.into(), CALLER.into())
    );
    assert_eq!(
        (has(service, "firn.attempts"), has(service, "error.type")),
        ("2".into(), "RetriesExhausted".into())
    );
    for (name, of) in [("Dwell Time", &first), ("Attempt #1", &first), ("Attempt #2", &spans)] {
        // Of the function's own event; the other one has a dwell time, too.
        let span = of.iter().find(|s| s.name == name && s.parent_span_id == service.span_id);
        let span = span.unwrap_or_else(|| panic!("{name} in {of:?}"));
        assert!(span.start_time_unix_nano >= service.start_time_unix_nano, "{name}");
    }
    let heard = named(&spans, "heard");
    assert_eq!((&heard.parent_span_id, &heard.trace_id), (&service.span_id, &service.trace_id));
}

#[tokio::test]
async fn a_collector_that_is_away_is_asked_again_and_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::default();
    collector.start(dir.path(), &[503, 200, 400]).await;
    let daemon = start(dir.path(), limits(), 0).await;
    daemon.create("f", json!({})).await;
    let sampled = header(";Sampled=1");
    for (exported, refused) in [(1, 0), (1, 1)] {
        let began = std::time::Instant::now();
        daemon.invoke("f", &[("x-amzn-trace-id", &sampled)], &json!(1)).await;
        assert!(began.elapsed() < Duration::from_millis(900), "it waited for the collector");
        assert_eq!(!collector.spans(&daemon).await.is_empty(), refused == 0);
        let counts = daemon.app.traces.counts().unwrap();
        assert_eq!((counts.exported, counts.refused, counts.overflowed), (exported, refused, 0));
    }
}

#[tokio::test]
async fn segments_that_a_function_sends_are_below_its_invocation() {
    let (_dir, daemon, collector) = traced().await;
    daemon.create("f", json!({})).await;
    let segment = |trace: &str, id: &str| {
        let segment = json!({"name": "work", "id": id, "trace_id": trace, "type": "subsegment",
            "start_time": 1.0, "end_time": 9e9, "annotations": {"size": 7}});
        format!("{{\"format\": \"json\", \"version\": 1}}\n{segment}")
    };
    let other = "1-58406520-000000000000000000000001";
    let documents = [segment(ROOT, "53995c3f42cd8ad9"), segment(other, "53995c3f42cd8ada")];
    let event = json!({"do": "trace", "documents": documents});
    let sampled = header(";Sampled=1");
    let headers = [("x-amzn-trace-id", sampled.as_str())];
    assert_eq!(daemon.invoke("f", &headers, &event).await.status, 200);
    let spans = collector.spans(&daemon).await;
    is_below(&spans, "work", "Invocation");
    assert_eq!(has(named(&spans, "work"), "size"), "7");
    // What is not sampled is nobody's business.
    let unsampled = header(";Sampled=0");
    daemon.invoke("f", &[("x-amzn-trace-id", unsampled.as_str())], &event).await;
    assert!(collector.spans(&daemon).await.is_empty());
}
