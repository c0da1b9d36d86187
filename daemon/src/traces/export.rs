//! Sends spans to a collector: OTLP over HTTP, binary protobuf (OTLP 1.x, "OTLP/HTTP").
//!
//! Never in anybody's way: what is recorded waits in a queue of bounded memory, one task makes spans of it and
//! sends them in batches, one request at a time. A collector that is away is asked again for a while, as the
//! specification has it; what comes meanwhile and does not fit is dropped and counted.

use std::{
    env, fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::InstrumentationScope,
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans},
};
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};

use super::{
    RECORD_KIB, Record,
    spans::{self, text},
};
use crate::{
    api::names::Place,
    client::{self, Http},
};

/// KiB that may wait for the collector, those on their way included.
const QUEUE_KIB: usize = 16 * 1024;

/// Records in one request.
const BATCH: usize = 128;

/// KiB of records in one request, unless one alone has more: collectors take no endless ones.
const BATCH_KIB: usize = BATCH * RECORD_KIB as usize;

/// Time that a record waits for others.
const LINGER: Duration = Duration::from_secs(1);

/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Attempts at one batch.
const ATTEMPTS: u32 = 5;

/// The first pause between two; each further one is twice as long.
const PAUSE: Duration = Duration::from_secs(1);

/// Longest pause that a collector can ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Most bytes of an answer.
const ANSWER: usize = 64 * 1024;

/// Where spans go.
#[derive(Clone)]
pub struct Collector {
    url: Uri,
    /// Secrets may lie here: not printed.
    headers: HeaderMap,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Collector {
    /// The one at `endpoint`, or else the one that OpenTelemetry's own environment variables name, with the
    /// headers that they name.
    ///
    /// # Errors
    /// Says in plain words what is wrong with which.
    pub fn find(endpoint: Option<&str>) -> Result<Option<Self>, String> {
        Self::find_in(endpoint, |name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn find_in(
        endpoint: Option<&str>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, String> {
        let exact = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        let base = "OTEL_EXPORTER_OTLP_ENDPOINT";
        let (name, text) = match (endpoint, variable(exact), variable(base)) {
            (Some(given), ..) => ("--otlp-endpoint", given.to_owned()),
            (None, Some(text), _) => (exact, text),
            (None, None, Some(text)) => (base, format!("{}/v1/traces", text.trim_end_matches('/'))),
            (None, None, None) => return Ok(None),
        };
        let url = endpoint_url(&text).ok_or_else(|| {
            format!(
                "{name} {text:?} is no URL of a collector; one looks like http://127.0.0.1:4318"
            )
        })?;
        let name = "OTEL_EXPORTER_OTLP_TRACES_HEADERS";
        let all = "OTEL_EXPORTER_OTLP_HEADERS";
        let (name, headers) = match (variable(name), variable(all)) {
            (Some(text), _) => (name, text),
            (None, text) => (all, text.unwrap_or_default()),
        };
        // Without the text: it may hold a secret.
        let headers = parse_headers(&headers)
            .ok_or_else(|| format!("{name} must be NAME=VALUE,NAME=VALUE"))?;
        Ok(Some(Self { url, headers }))
    }
}

/// A URL, with the path that collectors have unless it has one.
fn endpoint_url(text: &str) -> Option<Uri> {
    let url: Uri = text.parse().ok()?;
    let authority = url.authority()?;
    let fits = matches!(url.scheme_str(), Some("http" | "https"))
        && !authority.host().is_empty()
        && !authority.as_str().contains('@');
    let path = match url.path_and_query()?.as_str() {
        "/" => "/v1/traces",
        path => path,
    };
    let built = Uri::builder().scheme(url.scheme()?.clone()).authority(authority.clone());
    built.path_and_query(path).build().ok().filter(|_| fits)
}

/// As in W3C Baggage: values may be percent-encoded.
fn parse_headers(text: &str) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=')?;
        let name = HeaderName::try_from(name.trim()).ok()?;
        let value: Vec<u8> = percent_encoding::percent_decode_str(value.trim()).collect();
        let mut value = HeaderValue::try_from(value).ok()?;
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Some(headers)
}

/// What has become of traced invocations so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// The collector has them.
    pub exported: u64,
    /// There was no room for them.
    pub overflowed: u64,
    /// The collector did not take them.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    exported: AtomicU64,
    overflowed: AtomicU64,
    refused: AtomicU64,
}

/// What is queued.
enum Order {
    Record(Record, OwnedSemaphorePermit),
    Flush(oneshot::Sender<()>),
}

/// Hands records to the task that sends them.
#[derive(Debug)]
pub struct Exporter {
    orders: mpsc::UnboundedSender<Order>,
    /// What bounds `orders`.
    room: Arc<Semaphore>,
    counters: Arc<Counters>,
}

impl Exporter {
    /// Must be called within a tokio runtime. The task ends when the exporter is dropped.
    pub fn start(collector: Collector, place: Place) -> Self {
        let (orders, queue) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(QUEUE_KIB));
        let counters = Arc::new(Counters::default());
        let sender = Sender {
            client: client::http(),
            collector,
            resource: resource(&place),
            place,
            counters: counters.clone(),
        };
        tokio::spawn(sender.run(queue));
        Self { orders, room, counters }
    }

    /// Takes a record, or counts it as dropped. Does not wait.
    pub(super) fn take(&self, record: Record) {
        let room = self.room.clone().try_acquire_many_owned(record.kib());
        let queued = room.is_ok_and(|room| self.orders.send(Order::Record(record, room)).is_ok());
        if !queued {
            self.counters.overflowed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns when everything that was taken before is with the collector, or lost.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.orders.send(Order::Flush(done)).is_ok() {
            // An error means that the task is gone, and all with it.
            let _ = wait.await;
        }
    }

    /// What has become of records so far.
    pub fn counts(&self) -> Counts {
        let Counters { exported, overflowed, refused } = &*self.counters;
        Counts {
            exported: exported.load(Ordering::Relaxed),
            overflowed: overflowed.load(Ordering::Relaxed),
            refused: refused.load(Ordering::Relaxed),
        }
    }
}

fn resource(place: &Place) -> Resource {
    let attributes = vec![
        text("service.name", "firnd"),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("cloud.region", &place.region),
        text("cloud.account.id", &place.account),
    ];
    Resource { attributes, ..Resource::default() }
}

/// The task.
struct Sender {
    client: Http,
    collector: Collector,
    resource: Resource,
    place: Place,
    counters: Arc<Counters>,
}

/// What an attempt has come to.
enum Attempt {
    Taken,
    /// In vain; the same again is.
    Refused(String),
    /// Maybe later, after this time if the collector says so.
    Later(String, Option<Duration>),
}

impl Sender {
    async fn run(self, mut queue: mpsc::UnboundedReceiver<Order>) {
        // With its records a batch gives its room back.
        let (mut records, mut orders) = (Vec::new(), Vec::new());
        while queue.recv_many(&mut orders, BATCH).await > 0 {
            let end = Instant::now() + LINGER;
            let mut flushed = None;
            loop {
                for order in orders.drain(..) {
                    match order {
                        Order::Record(record, room) => records.push((record, room)),
                        Order::Flush(done) => flushed = Some(done),
                    }
                }
                if flushed.is_some() || records.len() >= BATCH {
                    break;
                }
                let more = queue.recv_many(&mut orders, BATCH - records.len());
                if !matches!(tokio::time::timeout_at(end, more).await, Ok(1..)) {
                    break;
                }
            }
            while !records.is_empty() {
                let batch: Vec<_> = records.drain(..fitting(&records)).collect();
                self.export(&batch).await;
            }
            // Whoever waits for it has nothing more to hear.
            flushed.map(|done| done.send(()));
        }
    }

    async fn export(&self, records: &[(Record, OwnedSemaphorePermit)]) {
        let spans = records.iter().flat_map(|(record, _)| spans::of(record, &self.place)).collect();
        let scope =
            InstrumentationScope { name: "firnd".into(), ..InstrumentationScope::default() };
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans,
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        };
        let body = Bytes::from(request.encode_to_vec());
        let count = records.len() as u64;
        let mut pause = PAUSE;
        for attempt in 1.. {
            match self.send(body.clone()).await {
                Attempt::Taken => {
                    self.counters.exported.fetch_add(count, Ordering::Relaxed);
                    return;
                }
                Attempt::Later(reason, after) if attempt < ATTEMPTS => {
                    tracing::debug!(reason, "the collector of traces is asked again");
                    tokio::time::sleep(after.unwrap_or(pause)).await;
                    pause *= 2;
                }
                Attempt::Later(reason, _) | Attempt::Refused(reason) => {
                    tracing::warn!(count, reason, "the collector does not take traces");
                    self.counters.refused.fetch_add(count, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    async fn send(&self, body: Bytes) -> Attempt {
        let mut request = Request::post(&self.collector.url)
            .header(header::USER_AGENT, concat!("firnd/", env!("CARGO_PKG_VERSION")))
            .header(header::CONTENT_TYPE, "application/x-protobuf");
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.collector.headers.clone());
        }
        let request = match request.body(Full::new(body)) {
            Ok(request) => request,
            Err(error) => return Attempt::Refused(error.to_string()),
        };
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| {
                let source = std::error::Error::source(&error);
                source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
            })?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER).collect().await.map_err(|e| e.to_string())?;
            Ok::<_, String>(Response::from_parts(head, body.to_bytes()))
        };
        match tokio::time::timeout(TIMEOUT, exchange).await {
            Err(_) => Attempt::Later(format!("no answer within {} s", TIMEOUT.as_secs()), None),
            Ok(Err(reason)) => Attempt::Later(reason, None),
            Ok(Ok(response)) => judge(&response),
        }
    }
}

/// How many of the records go into one request.
fn fitting(records: &[(Record, OwnedSemaphorePermit)]) -> usize {
    let mut kib = 0;
    let fits = |(_, room): &&(Record, OwnedSemaphorePermit)| {
        kib += room.num_permits();
        kib <= BATCH_KIB
    };
    records.iter().take_while(fits).count().max(1)
}

/// What an answer means (OTLP/HTTP Response).
fn judge(response: &Response<Bytes>) -> Attempt {
    let status = response.status();
    if status.is_success() {
        let partial = ExportTraceServiceResponse::decode(response.body().as_ref());
        if let Some(partial) = partial.ok().and_then(|answer| answer.partial_success)
            && partial.rejected_spans > 0
        {
            let (count, reason) = (partial.rejected_spans, partial.error_message);
            tracing::warn!(count, reason, "the collector has rejected spans");
        }
        return Attempt::Taken;
    }
    let said =
        String::from_utf8_lossy(&response.body()[..response.body().len().min(200)]).into_owned();
    let reason = format!("{status} {}", said.escape_debug());
    match status {
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => {
            let after = response.headers().get(header::RETRY_AFTER);
            let after = after.and_then(|value| value.to_str().ok()?.parse().ok());
            let after = after.map(|seconds| Duration::from_secs(seconds).min(LONGEST_PAUSE));
            Attempt::Later(reason, after)
        }
        _ => Attempt::Refused(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        function::Function,
        traces::{Invoked, context::TraceId},
    };

    fn find(
        endpoint: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Option<Collector>, String> {
        let variable = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        Collector::find_in(endpoint, variable)
    }

    #[test]
    fn collectors_are_found_where_the_specification_says() {
        assert!(find(None, &[]).unwrap().is_none());
        let both = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://base:4318/in/"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://exact/x"),
        ];
        for (endpoint, variables, url) in [
            (Some("http://127.0.0.1:4318"), &both[..], "http://127.0.0.1:4318/v1/traces"),
            (Some("https://c.example/own?k=v"), &[], "https://c.example/own?k=v"),
            (None, &both[..1], "http://base:4318/in/v1/traces"),
            (None, &both, "https://exact/x"),
        ] {
            let found = find(endpoint, variables).unwrap().unwrap();
            assert_eq!(found.url.to_string(), url);
        }
        for bad in ["127.0.0.1:4318", "ftp://x/", "http:///x", "http://user:secret@x/", "x y"] {
            let error = find(Some(bad), &[]).unwrap_err();
            assert!(error.contains("--otlp-endpoint"), "{error}");
        }
    }

    #[test]
    fn headers_come_from_the_environment_and_do_not_print() {
        let name = "OTEL_EXPORTER_OTLP_HEADERS";
        let found =
            find(Some("http://x"), &[(name, "api-key=planted, b = x%20y,")]).unwrap().unwrap();
        assert_eq!(found.headers["api-key"], "planted");
        assert_eq!(found.headers["b"], "x y");
        assert!(!format!("{found:?} {:?}", found.headers).contains("planted"));
        for bad in ["planted", "a b=planted", "a=planted%00"] {
            let error = find(Some("http://x"), &[(name, bad)]).unwrap_err();
            assert!(error.contains(name) && !error.contains("planted"), "{error}");
        }
    }

    fn event(function: &Arc<Function>) -> Record {
        let request_id = uuid::Uuid::new_v4().to_string();
        let invoked = Invoked { function: function.clone(), arn: String::new(), request_id };
        let (trace, parent) = (TraceId([1; 16]), None);
        let (accepted_ms, ended_ms, attempts, error) = (1, 2, 1, None);
        Record::Event { invoked, trace, parent, accepted_ms, ended_ms, attempts, error }
    }

    #[test]
    fn requests_are_bounded_unless_one_record_has_more() {
        let function = Arc::new(crate::function::tests::example("f"));
        let room = Arc::new(Semaphore::new(QUEUE_KIB));
        let record = |kib| (event(&function), room.clone().try_acquire_many_owned(kib).unwrap());
        for (kib, fit) in [
            (vec![RECORD_KIB; BATCH], BATCH),
            (vec![256, 256, 4], 2),
            (vec![300, 300, 4], 1),
            (vec![600, 4], 1),
        ] {
            let records: Vec<_> = kib.into_iter().map(record).collect();
            assert_eq!(fitting(&records), fit);
        }
    }

    #[tokio::test]
    async fn a_collector_that_hangs_takes_no_memory_and_no_time() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let place = Place { region: "us-east-1".into(), account: "0".into() };
        let exporter = Exporter::start(find(Some(&url), &[]).unwrap().unwrap(), place);
        let function = Arc::new(crate::function::tests::example("f"));
        let began = Instant::now();
        let fit = QUEUE_KIB as u64 / u64::from(RECORD_KIB);
        for _ in 0..fit + 100 {
            exporter.take(event(&function));
        }
        assert!(began.elapsed() < Duration::from_secs(2));
        assert_eq!(exporter.counts(), Counts { overflowed: 100, ..Counts::default() });
        let flushed = tokio::time::timeout(Duration::from_millis(50), exporter.flush()).await;
        assert!(flushed.is_err(), "nobody has taken them");
    }

    #[test]
    fn answers_mean_what_the_specification_says() {
        let answer = |status: u16, after: Option<&str>| {
            let mut response = Response::builder().status(status);
            if let Some(after) = after {
                response = response.header(header::RETRY_AFTER, after);
            }
            judge(&response.body(Bytes::from_static(b"\xff?")).unwrap())
        };
        assert!(matches!(answer(200, None), Attempt::Taken));
        for refused in [400, 401, 404, 500, 302] {
            assert!(matches!(answer(refused, Some("1")), Attempt::Refused(_)), "{refused}");
        }
        for later in [429, 502, 503, 504] {
            assert!(matches!(answer(later, None), Attempt::Later(_, None)), "{later}");
        }
        let Attempt::Later(_, after) = answer(503, Some("7")) else { panic!() };
        assert_eq!(after, Some(Duration::from_secs(7)));
        let Attempt::Later(_, after) = answer(429, Some("99999999999")) else { panic!() };
        assert_eq!(after, Some(LONGEST_PAUSE));
    }
}
