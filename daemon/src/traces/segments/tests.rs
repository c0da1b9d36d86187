use proptest::{collection::vec, prelude::*, sample::Index};
use serde_json::json;

use super::*;

const HEADER: &str = r#"{"format": "json", "version": 1}"#;
const TRACE: &str = "1-58406520-a006649127e371903a2de979";
const INVOCATION: SpanId = SpanId([0xff; 8]);

/// As aws-xray-sdk-python sends it: a function's own code, a call of DynamoDB below it, and an exception.
const SENT: &str = r###"{"format": "json", "version": 1}
{"id": "a1a1a1a1a1a1a1a1", "name": "## handler", "start_time": 1500000000.25,
 "parent_id": "ffffffffffffffff", "in_progress": false, "http": {"request":
 {"method": "GET", "url": "https://example.com/a?b=c", "client_ip": "192.0.2.7", "user_agent": "curl"},
 "response": {"status": 503, "content_length": "312"}},
 "annotations": {"customer": "ac\u00e9", "ratio": 0.5, "count": -3, "paid": true, "list": [1]},
 "metadata": {"default": {"cart": [1, {"x": null}]}, "mine": {"k": "v"}},
 "cause": {"working_directory": "/var/task", "exceptions": [{"id": "0123456789abcdef",
 "message": "no such cart", "type": "KeyError", "remote": false,
 "stack": [{"path": "app.py", "line": 7, "label": "handler"}]}]},
 "subsegments": [{"id": "b2b2b2b2b2b2b2b2", "name": "dynamodb", "start_time": 1500000000.3,
 "parent_id": "a1a1a1a1a1a1a1a1", "in_progress": false, "http": {"response": {"status": 200}},
 "aws": {"operation": "GetItem", "region": "eu-west-1", "request_id": "R1", "table_name": "carts",
 "retries": 2}, "trace_id": "1-58406520-a006649127e371903a2de979", "type": "subsegment",
 "namespace": "aws", "end_time": 1500000000.5, "subsegments": [{"id": "c3c3c3c3c3c3c3c3",
 "name": "query", "start_time": 1500000000.31, "end_time": 1500000000.32, "namespace": "remote",
 "sql": {"database_type": "PostgreSQL", "sanitized_query": "SELECT ?"}}]}],
 "trace_id": "1-58406520-a006649127e371903a2de979", "type": "subsegment", "namespace": "local",
 "fault": true, "end_time": 1500000001}"###;

/// The second in which it is.
const WITHIN: Times = (1_500_000_000_000_000_000, 1_500_000_001_000_000_000);

fn read(documents: &[String]) -> Vec<Span> {
    let documents: Vec<_> = documents.iter().cloned().map(Bytes::from).collect();
    spans(&documents, TraceId::parse(TRACE).unwrap(), INVOCATION, WITHIN)
}

fn segment(id: u64) -> serde_json::Value {
    json!({ "id": format!("{id:016x}"), "name": "n", "trace_id": TRACE,
        "start_time": 1_500_000_000, "end_time": 1_500_000_000.5 })
}

fn document(segment: &serde_json::Value) -> String {
    format!("{HEADER}\n{segment}")
}

/// What becomes of a segment that has more to say.
fn with(more: serde_json::Value) -> Option<Span> {
    let mut segment = segment(1);
    for (key, value) in more.as_object().unwrap() {
        segment[key] = value.clone();
    }
    read(&[document(&segment)]).pop()
}

fn attributes(span: &Span) -> serde_json::Value {
    let plain = |value: &AnyValue| match value.value.clone().unwrap() {
        Value::StringValue(text) => json!(text),
        Value::IntValue(number) => json!(number),
        Value::DoubleValue(number) => json!(number),
        Value::BoolValue(truth) => json!(truth),
        other => panic!("{other:?}"),
    };
    let value = |value: &AnyValue| match &value.value {
        Some(Value::ArrayValue(list)) => list.values.iter().map(plain).collect(),
        _ => plain(value),
    };
    let pair = |a: &KeyValue| (a.key.clone(), value(a.value.as_ref().unwrap()));
    span.attributes.iter().map(pair).collect()
}

#[test]
fn what_an_sdk_sends_becomes_spans() {
    let spans = read(&[SENT.into()]);
    let [handler, call, query] = &spans[..] else { panic!("{spans:?}") };
    for (span, name, id, parent, kind) in [
        (handler, "## handler", 0xa1, 0xff, SpanKind::Internal),
        (call, "dynamodb", 0xb2, 0xa1, SpanKind::Client),
        (query, "query", 0xc3, 0xb2, SpanKind::Client),
    ] {
        assert_eq!((span.name.as_str(), span.kind()), (name, kind));
        assert_eq!((&span.span_id[..], &span.parent_span_id[..]), (&[id; 8][..], &[parent; 8][..]));
        assert_eq!(span.trace_id, TraceId::parse(TRACE).unwrap().0);
    }
    assert_eq!(
        attributes(handler),
        json!({
            "http.request.method": "GET", "url.full": "https://example.com/a?b=c",
            "client.address": "192.0.2.7", "user_agent.original": "curl",
            "http.response.status_code": 503, "http.response.body.size": 312,
            "error.type": "KeyError",
            "customer": "acé", "ratio": 0.5, "count": -3, "paid": true,
            "aws.xray.annotations": ["count", "customer", "paid", "ratio"],
            "aws.xray.metadata.default": r#"{"cart": [1, {"x": null}]}"#,
            "aws.xray.metadata.mine": r#"{"k": "v"}"#,
        })
    );
    let code = StatusCode::Error.into();
    assert_eq!(handler.status, Some(Status { code, message: "no such cart".into() }));
    assert_eq!(
        attributes(call),
        json!({
            "http.response.status_code": 200, "rpc.system": "aws-api", "rpc.method": "GetItem",
            "cloud.region": "eu-west-1", "aws.request_id": "R1", "aws.xray.retries": 2,
            "aws.dynamodb.table_names": ["carts"],
        })
    );
    assert_eq!(call.status, None);
    assert_eq!(
        attributes(query),
        json!({ "db.system.name": "PostgreSQL", "db.query.text": "SELECT ?" })
    );
    assert_eq!(
        (handler.start_time_unix_nano, handler.end_time_unix_nano),
        (WITHIN.0 + 250_000_000, WITHIN.1)
    );
}

#[test]
fn what_is_no_document_is_dropped_and_nothing_else() {
    let good = segment(1).to_string();
    for bad in [
        good.clone(),
        format!("\n{good}"),
        format!("{HEADER}{good}"),
        format!("{HEADER}\n"),
        format!("{HEADER}\n[]"),
        format!("{HEADER}\n{good}{good}"),
        format!("{{\"format\":\"json\",\"version\":2}}\n{good}"),
        format!("{{\"format\":\"xml\",\"version\":1}}\n{good}"),
        format!("{HEADER}\n{}{good}", " ".repeat(document::LONGEST)),
    ] {
        assert_eq!(read(&[bad.clone(), document(&segment(2))]).len(), 1, "{bad}");
    }
    for (key, bad) in [
        ("id", json!("0000000000000000")),
        ("id", json!(INVOCATION.to_string())),
        ("id", json!("123")),
        ("id", json!(7)),
        ("parent_id", json!("0000000000000000")),
        ("parent_id", json!("0000000000000001")),
        ("parent_id", json!("x")),
        ("trace_id", json!("1-11111111-222222222222222222222222")),
        ("trace_id", json!(null)),
        ("name", json!(null)),
        ("start_time", json!(-1)),
        ("start_time", json!(1e300)),
        ("start_time", json!("1500000000")),
        ("end_time", json!(null)),
        ("in_progress", json!(true)),
    ] {
        assert_eq!(with(json!({ key: bad })), None, "{key}: {bad}");
    }
    assert_eq!(read(&[document(&segment(1)).replace("1500000000,", "1e999,")]), []);
    let spaced = format!("{{ \"version\" : 1,\"format\":\"json\" }}\n{good}\n");
    assert_eq!(read(&[spaced]).len(), 1);
}

#[test]
fn one_that_is_nested_falls_with_what_is_below_it() {
    let mut outer = segment(1);
    let mut open = segment(2);
    open["in_progress"] = json!(true);
    open["subsegments"] = json!([segment(3)]);
    // An id is taken once.
    outer["subsegments"] = json!([open, 7, {}, segment(1), segment(4), segment(4)]);
    let spans = read(&[document(&outer), document(&segment(4))]);
    let ids: Vec<_> = spans.iter().map(|span| span.span_id[7]).collect();
    assert_eq!(ids, [1, 4]);
}

#[test]
fn all_are_below_the_invocation() {
    let (mut first, second) = (segment(1), segment(2));
    first["parent_id"] = json!("0000000000000002");
    let mut lost = segment(3);
    lost["parent_id"] = json!("0000000000000009");
    let spans = read(&[document(&first), document(&second), document(&lost)]);
    let parents: Vec<_> = spans.iter().map(|span| span.parent_span_id[7]).collect();
    assert_eq!(parents, [2, 0xff, 0xff]);
}

#[test]
fn optional_parts_that_are_wrong_cost_nothing_else() {
    let span = with(json!({
        "error": true, "namespace": 1, "cause": "0123456789abcdef", "annotations": { "a": null, "b": 1 },
        "http": { "request": [], "response": { "status": {}, "content_length": 5 } }, "aws": 7,
        "sql": { "database_type": 1, "sanitized_query": "q" }, "metadata": [], "subsegments": {},
    }));
    let span = span.unwrap();
    assert_eq!(
        attributes(&span),
        json!({ "http.response.body.size": 5, "db.query.text": "q", "b": 1, "aws.xray.annotations": ["b"] })
    );
    let code = StatusCode::Error.into();
    assert_eq!(span.status, Some(Status { code, message: String::new() }));
    // Nor do annotations stand for what others have said.
    let annotations = json!({ "url.full": "forged", "aws.xray.annotations": 1, "": 2 });
    let http = json!({ "request": { "url": "u" } });
    let span = with(json!({ "annotations": annotations, "http": http })).unwrap();
    assert_eq!(attributes(&span), json!({ "url.full": "u" }));
}

#[test]
fn times_are_those_of_the_invocation() {
    let second = WITHIN.0 / 1_000_000_000;
    for (start, end, expected) in [
        (0.0, 1e18, WITHIN),
        (1e10, 1e10, (WITHIN.1, WITHIN.1)),
        (second as f64 + 0.5, 0.0, (WITHIN.0 + 500_000_000, WITHIN.0 + 500_000_000)),
    ] {
        let span = with(json!({ "start_time": start, "end_time": end })).unwrap();
        assert_eq!((span.start_time_unix_nano, span.end_time_unix_nano), expected);
    }
}

#[test]
fn there_is_a_limit_to_everything() {
    let mut deep = segment(100);
    for id in 0..50 {
        let mut above = segment(id + 1);
        above["subsegments"] = json!([deep]);
        deep = above;
    }
    assert_eq!(read(&[document(&deep)]).len(), DEEPEST + 1);
    let mut wide = segment(1);
    wide["subsegments"] = (2..300).map(segment).collect();
    let mut more = segment(1000);
    more["subsegments"] = (1001..1300).map(segment).collect();
    let spans = read(&[document(&wide), document(&more), document(&segment(5000))]);
    assert_eq!(spans.len(), MOST_SPANS);
    let long = "é".repeat(2000);
    let span = with(json!({ "name": long, "annotations": { "k0": long } })).unwrap();
    assert_eq!(span.name.chars().count(), LONGEST_NAME);
    assert_eq!(attributes(&span)["k0"], "é".repeat(LONGEST_TEXT));
    let annotations: serde_json::Map<_, _> =
        (0..100).map(|n| (format!("k{n}"), json!(n))).collect();
    let metadata = json!({ "d": "x".repeat(LONGEST_METADATA) });
    let span = with(json!({ "annotations": annotations, "metadata": metadata })).unwrap();
    assert_eq!(span.attributes.len(), MOST + 1);
    let metadata = json!({ "d": "x".repeat(LONGEST_METADATA - 10) });
    assert_eq!(with(json!({ "metadata": metadata })).unwrap().attributes.len(), 1);
}

#[test]
fn what_nests_without_end_is_not_followed() {
    let deep = "[".repeat(30_000) + &"]".repeat(30_000);
    for key in ["annotations", "aws", "cause", "http", "metadata", "sql", "subsegments", "other"] {
        for value in [deep.clone(), format!("{{\"a\":{deep}}}"), format!("[{deep}]")] {
            let with =
                document(&segment(1)).replace("\"id\"", &format!("\"{key}\":{value},\"id\""));
            let spans = read(&[with]);
            assert_eq!(spans.len(), 1, "{key}");
            assert_eq!(spans[0].attributes, [], "{key}");
        }
    }
}

proptest! {
    #[test]
    fn whatever_comes_stays_within_its_bounds(
        bytes in vec(any::<u8>(), 0..300),
        edits in vec((any::<Index>(), any::<u8>(), 0..3_u8), 0..6),
        (from, to, length) in any::<(Index, Index, Index)>(),
        within in any::<(u64, u64)>(),
    ) {
        let mut edited = SENT.as_bytes().to_vec();
        for (at, byte, how) in edits {
            let at = at.index(edited.len());
            match how {
                0 => edited[at] = byte,
                1 => edited.insert(at, byte),
                _ => drop(edited.remove(at)),
            }
        }
        // A part again, elsewhere.
        let (from, to) = (from.index(edited.len()), to.index(edited.len()));
        let part = edited[from..][..length.index(edited.len() - from)].to_vec();
        let mut moved = edited.clone();
        moved.splice(to..to, part);
        let documents = [bytes, edited, moved, SENT.into()].map(Bytes::from);
        check(&documents, (within.0.min(within.1), within.0.max(within.1)));
    }

    #[test]
    fn any_times_are_clamped(start in any::<f64>(), end in any::<f64>(), within in any::<(u64, u64)>()) {
        let sent = SENT.replace("1500000000.25", &start.to_string());
        let sent = sent.replace("1500000001", &end.to_string());
        check(&[sent.into()], (within.0.min(within.1), within.0.max(within.1)));
    }
}
