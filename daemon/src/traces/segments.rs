//! What a function says of itself in a trace: X-Ray segment documents as spans below its invocation.
//!
//! Attributes have the names of OpenTelemetry's semantic conventions; what they have no name for has that of the
//! OpenTelemetry collector's `awsxray` receiver, `aws.xray.…`.
//!
//! All bytes come from a guest. A document is as it must be, or it is dropped without a word. None may make the
//! daemon panic, recurse without end or hold much more than the document, reach into another trace, above its
//! invocation or beyond its time, or take the place of a span that was there before.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, ArrayValue, KeyValue, any_value::Value},
    trace::v1::{Span, Status, span::SpanKind, status::StatusCode},
};
use serde_json::value::RawValue;

use super::{
    context::{SpanId, TraceId},
    document::{self, Aws, Exception, Http, Maybe, Request, Response, Scalar, Segment, Sql},
    spans::{Times, attribute, boolean, number, span, text},
};

/// Most spans of one invocation.
const MOST_SPANS: usize = 500;

/// Most levels of subsegments below a document's own segment.
const DEEPEST: usize = 32;

/// Most annotations of a segment, and most namespaces of its metadata, and most tables.
const MOST: usize = 50;

/// Longest name of a span in characters.
const LONGEST_NAME: usize = 200;

/// Longest other string in characters, but for metadata.
const LONGEST_TEXT: usize = 1000;

/// Most metadata of a segment, in bytes of JSON.
const LONGEST_METADATA: usize = 16 * 1024;

/// What keys of annotations can't begin with: these attributes have a meaning.
const OWN: &str = "aws.xray.";

/// Spans of what a function has sent during one invocation, in the order in which it came. `within` are the times
/// of the invocation's own span, in nanoseconds since the epoch.
pub(super) fn spans(
    documents: &[Bytes],
    trace: TraceId,
    invocation: SpanId,
    within: Times,
) -> Vec<Span> {
    let (spans, ids) = (Vec::new(), HashSet::from([invocation]));
    let mut tree = Tree { trace, invocation, within, spans, ids };
    for document in documents {
        if tree.is_full() {
            break;
        }
        // Nobody is there to hear what was wrong with it.
        let _ = tree.document(document);
    }
    let Tree { mut spans, ids, .. } = tree;
    for span in &mut spans {
        // Subsegments can come before what they are below, so only now is it known what does not come.
        let parent = span.parent_span_id.as_slice().try_into().map(SpanId);
        if !parent.is_ok_and(|parent| ids.contains(&parent)) {
            span.parent_span_id = invocation.0.to_vec();
        }
    }
    spans
}

struct Tree {
    trace: TraceId,
    invocation: SpanId,
    within: Times,
    spans: Vec<Span>,
    /// Those of `spans` and the invocation.
    ids: HashSet<SpanId>,
}

impl Tree {
    fn document(&mut self, document: &[u8]) -> Option<()> {
        let segment = document::read(document)?;
        if TraceId::parse(segment.trace_id?)? != self.trace {
            return None;
        }
        let parent = segment.parent_id.map_or(Some(self.invocation), SpanId::parse)?;
        self.segment(segment, parent, 0)
    }

    fn segment(&mut self, mut segment: Segment<'_>, parent: SpanId, depth: usize) -> Option<()> {
        let id = SpanId::parse(segment.id)?;
        let (from, to) = (ns(segment.start_time)?, ns(segment.end_time)?);
        // What is in progress comes again when it is over.
        if segment.in_progress.0 == Some(true) || id == parent || !self.ids.insert(id) {
            return None;
        }
        // Not `clamp`, which wants its bounds in order.
        let within = |ns: u64| ns.min(self.within.1).max(self.within.0);
        let times = (within(from), within(to).max(within(from)));
        let below = segment.subsegments.0.take().unwrap_or_default();
        let span = span(self.trace, id, Some(parent), cut(&segment.name, LONGEST_NAME), times);
        self.spans.push(filled(span, segment));
        for json in below.into_iter().filter(|_| depth < DEEPEST) {
            if self.is_full() {
                break;
            }
            if let Ok(segment) = serde_json::from_str(json.get()) {
                let _ = self.segment(segment, id, depth + 1);
            }
        }
        Some(())
    }

    fn is_full(&self) -> bool {
        self.spans.len() >= MOST_SPANS
    }
}

/// Gives a span all but its place and its times.
fn filled(mut span: Span, segment: Segment<'_>) -> Span {
    if matches!(segment.namespace.0.as_deref(), Some("aws" | "remote")) {
        span.kind = SpanKind::Client.into();
    }
    let attributes = &mut span.attributes;
    known(
        attributes,
        segment.http.0.unwrap_or_default(),
        segment.aws.0.unwrap_or_default(),
        segment.sql.0.unwrap_or_default(),
    );
    if [segment.error, segment.fault, segment.throttle].iter().any(|flag| flag.0 == Some(true)) {
        let exceptions = segment.cause.0.unwrap_or_default().exceptions.0;
        let first = exceptions.into_iter().flatten().next().and_then(|first| first.0);
        let Exception { message, r#type: kind } = first.unwrap_or_default();
        let kind = kind.0.map(|kind| text("error.type", cut(&kind, LONGEST_TEXT)));
        attributes.extend(kind);
        let message = cut(&message.0.unwrap_or_default(), LONGEST_TEXT).to_owned();
        span.status = Some(Status { code: StatusCode::Error.into(), message });
    }
    annotate(attributes, segment.annotations.0.unwrap_or_default());
    let metadata = segment.metadata.filter(|json| json.get().len() <= LONGEST_METADATA);
    let metadata = metadata.map(|json| serde_json::from_str(json.get()));
    let metadata: BTreeMap<String, &RawValue> = metadata.and_then(Result::ok).unwrap_or_default();
    for (namespace, json) in metadata.into_iter().take(MOST) {
        let key = format!("{OWN}metadata.{}", cut(&namespace, LONGEST_TEXT));
        add(attributes, text(&key, json.get()));
    }
    span
}

/// What conventions have names for.
fn known(attributes: &mut Vec<KeyValue>, http: Http, aws: Aws, sql: Sql) {
    let Request { method, url, client_ip, user_agent } = http.request.0.unwrap_or_default();
    let Response { status, content_length } = http.response.0.unwrap_or_default();
    let system = Maybe(aws.operation.0.as_ref().map(|_| "aws-api".to_owned()));
    let texts = [
        ("http.request.method", method),
        ("url.full", url),
        ("client.address", client_ip),
        ("user_agent.original", user_agent),
        ("rpc.system", system),
        ("rpc.method", aws.operation),
        ("cloud.region", aws.region),
        ("aws.request_id", aws.request_id),
        ("aws.extended_request_id", aws.id_2),
        ("aws.sqs.queue.url", aws.queue_url),
        ("db.system.name", sql.database_type),
        ("db.query.text", sql.sanitized_query),
    ];
    let texts = texts.into_iter().filter_map(|(key, value)| Some((key, value.0?)));
    attributes.extend(texts.map(|(key, value)| text(key, cut(&value, LONGEST_TEXT))));
    let numbers = [
        ("http.response.status_code", status),
        ("http.response.body.size", content_length),
        ("aws.xray.retries", aws.retries),
    ];
    let numbers = numbers.into_iter().filter_map(|(key, value)| Some((key, value.0?.count()?)));
    attributes.extend(numbers.map(|(key, value)| number(key, value)));
    let tables = aws.table_names.0.into_iter().flatten().filter_map(|name| name.0);
    let tables: Vec<_> = aws.table_name.0.into_iter().chain(tables).take(MOST).collect();
    if !tables.is_empty() {
        attributes.push(list("aws.dynamodb.table_names", &tables));
    }
}

/// Each annotation, and which attributes are annotations.
fn annotate(attributes: &mut Vec<KeyValue>, annotations: BTreeMap<String, Maybe<Scalar>>) {
    let mut keys = Vec::new();
    let annotations = annotations.into_iter().filter_map(|(key, value)| Some((key, value.0?)));
    for (key, value) in annotations.take(MOST) {
        let key = cut(&key, LONGEST_TEXT);
        if !key.is_empty() && !key.starts_with(OWN) && add(attributes, scalar(key, value)) {
            keys.push(key.to_owned());
        }
    }
    if !keys.is_empty() {
        attributes.push(list("aws.xray.annotations", &keys));
    }
}

/// Keys of attributes must be different; whether this one is.
fn add(attributes: &mut Vec<KeyValue>, attribute: KeyValue) -> bool {
    let new = attributes.iter().all(|other| other.key != attribute.key);
    attributes.extend(new.then_some(attribute));
    new
}

fn scalar(key: &str, value: Scalar) -> KeyValue {
    match value {
        Scalar::Boolean(value) => boolean(key, value),
        Scalar::Integer(value) => attribute(key, Value::IntValue(value)),
        Scalar::Number(value) => attribute(key, Value::DoubleValue(value)),
        Scalar::Text(value) => text(key, cut(&value, LONGEST_TEXT)),
    }
}

fn list(key: &str, values: &[String]) -> KeyValue {
    let value = |value: &String| Value::StringValue(cut(value, LONGEST_TEXT).to_owned());
    let values = values.iter().map(|text| AnyValue { value: Some(value(text)) }).collect();
    attribute(key, Value::ArrayValue(ArrayValue { values }))
}

/// The first characters of a text.
fn cut(text: &str, most: usize) -> &str {
    text.char_indices().nth(most).map_or(text, |(end, _)| &text[..end])
}

/// Seconds as nanoseconds, unless it is no time.
fn ns(seconds: f64) -> Option<u64> {
    let time = Duration::try_from_secs_f64(seconds).ok()?;
    Some(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// Reads documents and checks what holds for the spans of any. For tests and the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub fn check(documents: &[Bytes], within: (u64, u64)) {
    let trace = TraceId::parse("1-58406520-a006649127e371903a2de979").unwrap_or(TraceId([1; 16]));
    let invocation = SpanId([7; 8]);
    let spans = spans(documents, trace, invocation, within);
    assert!(spans.len() <= MOST_SPANS);
    let own = HashSet::from([invocation.0.to_vec()]);
    let ids: HashSet<_> = spans.iter().map(|span| span.span_id.clone()).collect();
    assert!(ids.len() == spans.len() && ids.is_disjoint(&own) && !ids.contains(&vec![0; 8]));
    for span in &spans {
        let (from, to) = (span.start_time_unix_nano, span.end_time_unix_nano);
        assert!(within.0 <= from && from <= to && to <= within.1);
        assert_eq!(span.trace_id, trace.0);
        assert!(span.parent_span_id != span.span_id);
        assert!(ids.union(&own).any(|id| *id == span.parent_span_id));
        assert!(span.name.chars().count() <= LONGEST_NAME);
        let keys: HashSet<_> = span.attributes.iter().map(|attribute| &attribute.key).collect();
        assert!(keys.len() == span.attributes.len() && keys.len() <= 20 + 2 * MOST);
        for KeyValue { key, value, .. } in &span.attributes {
            if let Some(Value::StringValue(value)) = value.as_ref().and_then(|v| v.value.as_ref()) {
                let most = if key.starts_with(OWN) { LONGEST_METADATA } else { LONGEST_TEXT };
                assert!(value.chars().count() <= most, "{key}");
            }
        }
    }
}

#[cfg(test)]
mod tests;
