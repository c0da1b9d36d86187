//! The API over real connections, with a backend that needs no KVM.

mod aliases;
mod concurrency;
mod control;
mod crash;
mod events;
mod identity;
mod inside;
mod invocations;
mod isolation;
mod kms;
mod layers;
mod load;
mod logs;
mod metrics;
mod outward;
mod permissions;
mod s3;
mod services;
mod streaming;
mod sts;
mod tags;
mod traces;
mod urls;
mod versions;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{App, Settings, gate::Callers, router, routes};
use crate::{
    api::{names::Place, urls::Urls},
    audit::{self, Audit},
    aws,
    code::CodeStore,
    envelope::tests::TestKeys,
    events::{self as queueing, Events, clock::Clock, queue::Queue},
    fake::{Counters, Fake},
    identity::{Identity, sessions::Sessions},
    inside::{Gateway, Inside},
    logs::{Bounds, Logs},
    prepare::Preparer,
    scheduler::{Isolation, Limits, Reserve, Scheduler},
    serve,
    store::Store,
    traces::{Traces, export::Collector},
    workshop::Workshop,
};

const FUNCTIONS: &str = "/2015-03-31/functions";

/// A daemon in this process.
struct Daemon {
    address: SocketAddr,
    fake: Arc<Counters>,
    aws: aws::fake::Fake,
    app: Arc<App<Fake>>,
    /// Functions reach it as long as it is held.
    gateway: Arc<Gateway>,
    scheduler: Arc<Scheduler<Fake>>,
    events: Arc<Events<Fake>>,
    clock: Clock,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn parse(answer: &[u8]) -> Self {
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        Self { status, headers, body: answer[end + 4..].to_vec() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    #[track_caller]
    fn expect(self, status: u16, exception: &str) -> String {
        let body = String::from_utf8_lossy(&self.body).into_owned();
        assert_eq!(
            (self.status, self.header("x-amzn-errortype")),
            (status, Some(exception)),
            "{body}"
        );
        assert_eq!(self.header("content-type"), Some("application/json"));
        body
    }
}

fn limits() -> Limits {
    Limits {
        concurrency: 8,
        idle: Duration::from_secs(300),
        reclaim: Duration::from_secs(300),
        reserve: Reserve { memory_mib: 0, disk_mib: 0, dir: std::env::temp_dir() },
        isolation: Isolation::Warm,
    }
}

/// Starts a daemon on the state in `dir`.
async fn start(dir: &std::path::Path, limits: Limits, port: u16) -> Daemon {
    start_within(dir, limits, port, serve::Bounds::default()).await
}

async fn start_within(
    dir: &std::path::Path,
    limits: Limits,
    port: u16,
    bounds: serve::Bounds,
) -> Daemon {
    let fake = Fake::default();
    let ledger = std::fs::File::options().create(true).append(true).open(dir.join("ledger"));
    *fake.0.ledger.lock().unwrap() = Some(ledger.unwrap());
    let store = Arc::new(Store::open(&dir.join("store.sqlite"), Arc::new(TestKeys(1))).unwrap());
    let functions = store.all();
    // With such a file it says where traces go.
    let collector = std::fs::read_to_string(dir.join("collector")).ok();
    let place = Place { region: "us-east-1".into(), account: "000000000000".into() };
    let traces = match Collector::find(collector.as_deref()).unwrap() {
        Some(collector) => Traces::start(collector, place.clone()),
        None => Traces::default(),
    };
    let workshop = Workshop {
        backend: fake.clone(),
        place,
        store: store.clone(),
        code: CodeStore::open(
            dir.join("code"),
            |blob| store.uses_code(blob) || store.is_layer(blob),
            |disk| store.uses_disk(disk),
        )
        .unwrap(),
        logs: Logs::open(dir.join("logs"), Bounds::default()).unwrap(),
        metrics: crate::metrics::Metrics::open(&dir.join("metrics.sqlite")).unwrap(),
        traces,
        inside: Inside::default(),
        patience: 1,
    };
    let preparer = Preparer::open(workshop.clone(), dir.join("snapshots"), &functions).unwrap();
    let concurrency = limits.concurrency;
    let scheduler = Scheduler::start(workshop.clone(), preparer, limits);
    let clock = Clock::default();
    let event_bounds = queueing::Bounds {
        slots: (concurrency as usize / 2).max(1),
        bytes: 64 << 20,
        retry: Duration::from_secs(60),
    };
    let services = aws::fake::Fake::start().await;
    let aws = Arc::new(services.aws());
    let queue = Queue::open(&dir.join("events.sqlite"), event_bounds.bytes).unwrap();
    let events = Events::start(
        queue,
        store.clone(),
        scheduler.clone(),
        workshop.place.clone(),
        clock.clone(),
        aws.clone(),
        event_bounds,
    )
    .unwrap();
    let audit = dir.join("audit");
    std::fs::create_dir_all(&audit).unwrap();
    // With such a file invocations are recorded.
    let data_events = dir.join("data-events").exists();
    let bounds_of_audit = audit::Bounds { data_events, ..audit::Bounds::default() };
    let audit = Audit::open(audit, workshop.place.clone(), bounds_of_audit, None).unwrap();
    let audit = Arc::new(audit);
    // With such a file requests must be signed.
    let identity = dir.join("identity.json");
    let identity = identity
        .exists()
        .then(|| Arc::new(Identity::open(&identity, workshop.place.clone()).unwrap()));
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let urls = Urls::new("us-east-1", "localhost", address.port());
    let sessions = Sessions::new(&store.own_key("sessions").unwrap());
    let guarded = identity.is_some();
    let callers = Callers { identity, sessions: sessions.clone(), audit };
    let (inside, place) = (workshop.inside.clone(), workshop.place.clone());
    let settings = Settings { concurrency, stream_rate: None, urls };
    let app = App::new(workshop, scheduler.clone(), events.clone(), aws, callers, settings);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let until = async move { drop(stopped.await) };
    let routes = router(app.clone());
    let gateway = Gateway::new(routes.clone(), store, sessions, place, guarded);
    inside.open(&gateway);
    tokio::spawn(serve::serve(listener, routes, until, Duration::from_secs(5), bounds));
    let (fake, aws) = (fake.0, services);
    Daemon { address, fake, aws, app, gateway, scheduler, events, clock, stop: Some(stop) }
}

impl Daemon {
    async fn call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n",
            self.address,
            body.len()
        );
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        Answer::parse(&answer)
    }

    async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, &[], b"").await
    }

    async fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.call(method, path, &[], body.to_string().as_bytes()).await
    }

    async fn create(&self, name: &str, changes: Value) -> Answer {
        let mut body = json!({
            "FunctionName": name, "Runtime": "python3.11", "Handler": "a.b",
            "Role": "arn:aws:iam::000000000000:role/r", "Code": {"ZipFile": zip("1")},
        });
        for (key, value) in changes.as_object().unwrap() {
            body[key] = value.clone();
        }
        self.send("POST", FUNCTIONS, &body).await
    }

    /// Calls another service of AWS.
    async fn service(&self, target: &str, input: &Value) -> Answer {
        let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target)];
        self.call("POST", "/", &headers, input.to_string().as_bytes()).await
    }

    async fn invoke(&self, name: &str, headers: &[(&str, &str)], event: &Value) -> Answer {
        let path = format!("{FUNCTIONS}/{name}/invocations");
        self.call("POST", &path, headers, event.to_string().as_bytes()).await
    }

    async fn snapshot_is(&self, name: &str, state: &str) -> Value {
        let mut last = Value::Null;
        for _ in 0..400 {
            last = self.get(&format!("/firn/v1/functions/{name}/snapshot")).await.json();
            if last["state"] == state {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the snapshot of {name} is not {state}: {last}");
    }

    fn count(&self, counter: fn(&Counters) -> &std::sync::atomic::AtomicUsize) -> usize {
        counter(&self.fake).load(Ordering::SeqCst)
    }
}

fn zip(content: &str) -> String {
    STANDARD.encode(format!("PK{content}"))
}

async fn daemon() -> (tempfile::TempDir, Daemon) {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), limits(), 0).await;
    (dir, daemon)
}

async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut pinned: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = pinned.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, output) in pinned.iter_mut().zip(&mut outputs) {
            if output.is_none()
                && let std::task::Poll::Ready(done) = future.as_mut().poll(context)
            {
                *output = Some(done);
            }
        }
        if outputs.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    outputs.into_iter().flatten().collect()
}

/// For trying real clients by hand: `FIRND_FAKE_PORT=9001 cargo test -p firnd -- --ignored fake`, with
/// `FIRND_FAKE_IDENTITY=FILE` such as must sign.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "serves until killed"]
async fn serve_the_fake_backend() {
    let port = std::env::var("FIRND_FAKE_PORT").ok().and_then(|p| p.parse().ok()).unwrap_or(0);
    let dir = tempfile::tempdir().unwrap();
    if let Ok(file) = std::env::var("FIRND_FAKE_IDENTITY") {
        std::fs::copy(file, dir.path().join("identity.json")).unwrap();
    }
    let daemon = start(dir.path(), limits(), port).await;
    eprintln!("ready on http://{}", daemon.address);
    tokio::time::sleep(Duration::from_secs(300)).await;
}
