//! The API over real connections, with a backend that needs no KVM.

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

use super::{App, router};
use crate::{
    api::names::Place,
    code::CodeStore,
    fake::{Counters, Fake},
    logs::{Bounds, Logs},
    prepare::Preparer,
    scheduler::{Limits, Scheduler},
    serve,
    store::Store,
    workshop::Workshop,
};

const FUNCTIONS: &str = "/2015-03-31/functions";

/// A daemon in this process.
struct Daemon {
    address: SocketAddr,
    fake: Arc<Counters>,
    scheduler: Arc<Scheduler<Fake>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
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
    Limits { concurrency: 8, idle: Duration::from_secs(300), reserve_mib: 0 }
}

/// Starts a daemon on the state in `dir`.
async fn start(dir: &std::path::Path, limits: Limits, port: u16) -> Daemon {
    let fake = Fake::default();
    let store = Arc::new(Store::open(&dir.join("store.sqlite")).unwrap());
    let functions = store.all();
    let workshop = Workshop {
        backend: fake.clone(),
        place: Place { region: "us-east-1".into(), account: "000000000000".into() },
        code: CodeStore::open(dir.join("code"), |sha| store.uses_code(sha)).unwrap(),
        logs: Logs::open(dir.join("logs"), Bounds::default()).unwrap(),
        patience: 1,
    };
    let preparer = Preparer::open(workshop.clone(), dir.join("snapshots"), &functions).unwrap();
    let scheduler = Scheduler::start(workshop.clone(), preparer, limits);
    for function in &functions {
        scheduler.deployed(function, None);
    }
    let app = App::new(store, workshop, scheduler.clone(), limits.concurrency);
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let until = async move { drop(stopped.await) };
    tokio::spawn(serve::serve(listener, router(app), until, Duration::from_secs(5)));
    Daemon { address, fake: fake.0, scheduler, stop: Some(stop) }
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
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        Answer { status, headers, body: answer[end + 4..].to_vec() }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_function_lives_through_all_operations() {
    let (_dir, d) = daemon().await;
    let created = d.create("hello", json!({"Tags": {"team": "x"}})).await;
    assert_eq!(created.status, 201);
    let created = created.json();
    assert_eq!(created["FunctionArn"], "arn:aws:lambda:us-east-1:000000000000:function:hello");
    assert_eq!((&created["State"], &created["Version"]), (&json!("Active"), &json!("$LATEST")));

    let got = d.get(&format!("{FUNCTIONS}/hello")).await.json();
    assert_eq!(got["Configuration"]["CodeSha256"], created["CodeSha256"]);
    assert_eq!(got["Tags"]["team"], "x");
    let location = got["Code"]["Location"].as_str().unwrap();
    let path = location.strip_prefix(&format!("http://{}", d.address)).unwrap();
    assert_eq!(d.get(path).await.body, b"PK1");

    let arn = "arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Ahello";
    let path = format!("{FUNCTIONS}/{arn}/configuration?Qualifier=%24LATEST");
    let got = d.get(&path).await.json();
    assert_eq!(got["FunctionArn"], format!("{}:$LATEST", created["FunctionArn"].as_str().unwrap()));

    let path = format!("{FUNCTIONS}/hello/configuration");
    let changes = json!({"Timeout": 9, "RevisionId": created["RevisionId"]});
    let updated = d.send("PUT", &path, &changes).await;
    assert_eq!(updated.status, 200);
    let updated = updated.json();
    assert_eq!((&updated["Timeout"], &updated["MemorySize"]), (&json!(9), &json!(128)));
    assert_ne!(updated["RevisionId"], created["RevisionId"]);
    d.send("PUT", &path, &changes).await.expect(412, "PreconditionFailedException");

    let path = format!("{FUNCTIONS}/hello/code");
    let dry = d.send("PUT", &path, &json!({"ZipFile": zip("2"), "DryRun": true})).await.json();
    assert_ne!(dry["CodeSha256"], created["CodeSha256"]);
    let still = d.get(&format!("{FUNCTIONS}/hello/configuration")).await.json();
    assert_eq!(still["CodeSha256"], created["CodeSha256"]);
    let updated = d.send("PUT", &path, &json!({"ZipFile": zip("2")})).await.json();
    assert_eq!(updated["CodeSha256"], dry["CodeSha256"]);

    let path = format!("{FUNCTIONS}/hello");
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    let gone = d.get(&path).await.expect(404, "ResourceNotFoundException");
    assert_eq!(
        gone,
        r#"{"Message":"Function not found: arn:aws:lambda:us-east-1:000000000000:function:hello","Type":"User"}"#
    );
    d.call("DELETE", &path, &[], b"").await.expect(404, "ResourceNotFoundException");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    let (_dir, d) = daemon().await;
    for i in 0..5 {
        assert_eq!(d.create(&format!("f{i}"), json!({})).await.status, 201);
    }
    let mut names = Vec::new();
    let mut path = format!("{FUNCTIONS}/?MaxItems=2");
    loop {
        let page = d.get(&path).await.json();
        let functions = page["Functions"].as_array().unwrap();
        assert!(functions.len() <= 2);
        names.extend(functions.iter().map(|f| f["FunctionName"].as_str().unwrap().to_owned()));
        let Some(marker) = page["NextMarker"].as_str() else { break };
        path = format!("{FUNCTIONS}?MaxItems=2&Marker={marker}");
    }
    assert_eq!(names, ["f0", "f1", "f2", "f3", "f4"]);
    d.get(&format!("{FUNCTIONS}?Marker=%21")).await.expect(400, "InvalidParameterValueException");
    d.get(&format!("{FUNCTIONS}?MaxItems=0")).await.expect(400, "ValidationException");
    let settings = d.get("/2016-08-19/account-settings/").await.json();
    assert_eq!(settings["AccountUsage"]["FunctionCount"], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_and_leaves_nothing() {
    let (dir, d) = daemon().await;
    let invalid = "InvalidParameterValueException";
    for (changes, exception, words) in [
        (json!({"MemorySize": 1}), "ValidationException", "'memorySize'"),
        (json!({"MemorySize": "x"}), "SerializationException", "wrong type"),
        (json!({"FunctionName": "a b"}), "ValidationException", "'functionName'"),
        (json!({"FunctionName": null}), "ValidationException", "Value 'null' at 'functionName'"),
        (json!({"FunctionName": "x:1"}), invalid, "without a qualifier"),
        (json!({"Runtime": "cobol"}), invalid, "[python3.11]"),
        (json!({"Code": {}}), invalid, "Please provide a source for function code."),
        (json!({"Code": {"ZipFile": "%"}}), "SerializationException", "base64"),
        (json!({"Code": {"ZipFile": "aGVsbG8="}}), invalid, "Could not unzip uploaded file"),
        (json!({"Code": {"S3Bucket": "b", "S3Key": "k"}}), invalid, "S3Bucket"),
        (json!({"Code": {"ImageUri": "i"}, "PackageType": "Image"}), invalid, "Image"),
    ] {
        let body = d.create("bad", changes.clone()).await.expect(400, exception);
        assert!(body.contains(words), "{changes}: {body}");
    }
    d.call("POST", FUNCTIONS, &[], b"{").await.expect(400, "SerializationException");
    let mut big = b"PK".to_vec();
    big.resize(52_428_801, 0);
    let big = d.create("bad", json!({"Code": {"ZipFile": STANDARD.encode(big)}})).await;
    let body = big.expect(400, invalid);
    assert!(body.contains("Zipped size must be smaller than 52428800 bytes"), "{body}");
    let huge = vec![b' '; 70_167_212];
    let body = d.call("POST", FUNCTIONS, &[], &huge).await;
    let body = body.expect(413, "RequestEntityTooLargeException");
    assert!(body.contains("70167211"), "{body}");

    assert!(d.get(FUNCTIONS).await.json()["Functions"].as_array().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("code")).unwrap().count(), 0);
    assert_eq!(d.create("good", json!({})).await.status, 201);
    let twice = d.create("good", json!({})).await.expect(409, "ResourceConflictException");
    assert!(twice.contains("Function already exist: good"), "{twice}");
    assert_eq!(std::fs::read_dir(dir.path().join("code")).unwrap().count(), 2);
    d.get("/2015-03-31/nothing").await.expect(404, "UnknownOperationException");
    let wrong = d.call("PATCH", FUNCTIONS, &[], b"").await;
    wrong.expect(405, "UnknownOperationException");
}

#[tokio::test(flavor = "multi_thread")]
async fn invocations_answer_as_lambda_does() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let event = json!({"key": "value"});
    let ok = d.invoke("f", &[("X-Amz-Log-Type", "Tail")], &event).await;
    assert_eq!((ok.status, ok.json()), (200, event.clone()));
    assert_eq!(ok.header("x-amz-executed-version"), Some("$LATEST"));
    assert_eq!(ok.header("x-amz-function-error"), None);
    assert_eq!(ok.header("x-firn-start-kind"), Some("thaw"));
    assert!(ok.header("x-firn-phases").unwrap().contains("\"thaw.done\":"));
    let id = ok.header("x-amzn-requestid").unwrap().to_owned();
    let tail = STANDARD.decode(ok.header("x-amz-log-result").unwrap()).unwrap();
    let tail = String::from_utf8(tail).unwrap();
    let lines: Vec<&str> = tail.lines().collect();
    assert_eq!(lines[0], format!("START RequestId: {id} Version: $LATEST"));
    assert_eq!(lines[1..3], ["hello from the function", &format!("END RequestId: {id}")]);
    assert_eq!(
        lines[3],
        format!(
            "REPORT RequestId: {id}\tDuration: 1.50 ms\tBilled Duration: 2 ms\t\
             Memory Size: 128 MB\tMax Memory Used: 30 MB\tRestore Duration: 0.70 ms\t\
             Billed Restore Duration: 1 ms\t"
        )
    );

    let raised = d.invoke("f", &[], &json!({"do": "raise"})).await;
    assert_eq!((raised.status, raised.header("x-amz-function-error")), (200, Some("Unhandled")));
    assert_eq!(raised.json()["errorType"], "ValueError");
    let exited = d.invoke("f", &[], &json!({"do": "exit"})).await;
    assert_eq!(exited.json()["errorType"], "Runtime.ExitError");
    assert_eq!(exited.header("x-firn-start-kind"), Some("warm"), "a crash spares the instance");
    let late = d.invoke("f", &[], &json!({"do": "timeout"})).await.json();
    assert!(late["errorMessage"].as_str().unwrap().ends_with("timed out after 3.00 seconds"));
    let flood = d.invoke("f", &[("X-Amz-Log-Type", "Tail")], &json!({"do": "flood"})).await;
    assert_eq!(flood.status, 200);
    let tail = STANDARD.decode(flood.header("x-amz-log-result").unwrap()).unwrap();
    assert!(tail.len() == 4096 && String::from_utf8_lossy(&tail).contains("REPORT RequestId"));

    assert_eq!(d.invoke("f", &[("X-Amz-Invocation-Type", "DryRun")], &event).await.status, 204);
    let event_type = d.invoke("f", &[("X-Amz-Invocation-Type", "Event")], &event).await;
    let body = event_type.expect(400, "InvalidParameterValueException");
    assert!(body.contains("Event"), "{body}");
    let odd = d.invoke("f", &[("X-Amz-Invocation-Type", "Odd")], &event).await;
    odd.expect(400, "ValidationException");
    let path = format!("{FUNCTIONS}/f/invocations");
    let bad = d.call("POST", &path, &[], b"{not json").await;
    bad.expect(400, "InvalidRequestContentException");
    let large = d.call("POST", &path, &[], &vec![b' '; 6_291_457]).await;
    let body = large.expect(413, "RequestTooLargeException");
    assert!(body.contains("6291457 byte payload") && body.contains("6291456"), "{body}");
    let most = format!("\"{}\"", "x".repeat(6_291_454));
    let most = d.call("POST", &path, &[], most.as_bytes()).await;
    assert_eq!((most.status, most.body.len()), (200, 6_291_456));
    let unknown = d.invoke("g", &[], &event).await.expect(404, "ResourceNotFoundException");
    assert!(unknown.contains("function:g"), "{unknown}");
    let version = d.invoke("f:7", &[], &event).await.expect(404, "ResourceNotFoundException");
    assert!(version.contains("function:f:7"), "{version}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_start_can_be_forced() {
    let (_dir, d) = daemon().await;
    *d.fake.slow_load.lock().unwrap() = Duration::from_millis(300);
    d.create("f", json!({})).await;
    let start = |kind| [("X-Firn-Start", kind)];
    let kinds = ["warm", "thaw"];
    for kind in kinds {
        let refused = d.invoke("f", &start(kind), &json!(1)).await;
        let body = refused.expect(409, "ResourceConflictException");
        assert!(body.contains(kind), "{body}");
    }
    let early = d.invoke("f", &[], &json!(1)).await;
    assert_eq!(early.header("x-firn-start-kind"), Some("boot"), "no snapshot yet");
    d.snapshot_is("f", "ready").await;
    for kind in ["thaw", "boot", "warm"] {
        let answer = d.invoke("f", &start(kind), &json!(1)).await;
        assert_eq!((answer.status, answer.header("x-firn-start-kind")), (200, Some(kind)));
    }
    d.invoke("f", &start("tepid"), &json!(1)).await.expect(400, "InvalidParameterValueException");
    let environments = d.fake.environments.lock().unwrap().clone();
    let kinds: Vec<&str> = environments
        .iter()
        .flatten()
        .filter(|(key, _)| key == "AWS_LAMBDA_INITIALIZATION_TYPE")
        .map(|(_, value)| value.as_str())
        .collect();
    assert!(kinds.contains(&"snap-start") && kinds.contains(&"on-demand"), "{kinds:?}");
    let listed = d.get("/firn/v1/instances").await.json();
    assert_eq!(listed["Instances"].as_object().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_invocations_run_in_instances_of_their_own_up_to_the_limit() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let sleep = json!({"do": "sleep", "ms": 300});
    let calls: Vec<_> = (0..9).map(|_| d.invoke("f", &[], &sleep)).collect();
    let mut instances = std::collections::HashSet::new();
    let mut throttled = 0;
    for answer in join_all(calls).await {
        match answer.status {
            200 => assert!(instances.insert(answer.body), "two at once in one instance"),
            429 => {
                assert_eq!(answer.header("retry-after"), Some("1"));
                assert_eq!(answer.json()["Reason"], "ConcurrentInvocationLimitExceeded");
                answer.expect(429, "TooManyRequestsException");
                throttled += 1;
            }
            other => panic!("status {other}"),
        }
    }
    assert_eq!((instances.len(), throttled), (8, 1));
    for _ in 0..20 {
        let again = d.invoke("f", &[], &json!(1)).await;
        assert_eq!(again.header("x-firn-start-kind"), Some("warm"));
    }
    assert_eq!(d.count(|c| &c.thaws), 9, "one base thaw, eight for requests");
    assert!(d.count(|c| &c.paused) >= 8);
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

#[tokio::test(flavor = "multi_thread")]
async fn idle_instances_retire_and_updates_replace_them() {
    let dir = tempfile::tempdir().unwrap();
    let idle = Duration::from_millis(150);
    let d = start(dir.path(), Limits { idle, ..limits() }, 0).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.invoke("f", &[], &json!(1)).await;
    assert_eq!(d.count(|c| &c.alive), 1);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(d.count(|c| &c.alive), 0, "idle for too long");

    d.invoke("f", &[], &json!(1)).await;
    let path = format!("{FUNCTIONS}/f/configuration");
    d.send("PUT", &path, &json!({"Description": "new"})).await;
    let warm = d.invoke("f", &[("X-Firn-Start", "warm")], &json!(1)).await;
    assert_eq!(warm.status, 200, "a description changes no instance");
    d.send("PUT", &path, &json!({"MemorySize": 256})).await;
    let stale = d.invoke("f", &[("X-Firn-Start", "warm")], &json!(1)).await;
    stale.expect(409, "ResourceConflictException");
    d.snapshot_is("f", "ready").await;
    let fresh = d.invoke("f", &[], &json!(1)).await;
    assert_eq!(fresh.header("x-firn-start-kind"), Some("thaw"));
    let functions: Vec<_> = std::fs::read_dir(dir.path().join("snapshots"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("fn-"))
        .collect();
    assert_eq!(functions.len(), 1, "the old snapshot is gone: {functions:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_hurt_one_invocation() {
    let (_dir, d) = daemon().await;
    d.fake.disk_full.store(true, Ordering::SeqCst);
    d.create("f", json!({})).await;
    let failed = d.snapshot_is("f", "failed").await;
    assert!(failed["reason"].as_str().unwrap().contains("memory"), "{failed}");
    let booted = d.invoke("f", &[], &json!(1)).await;
    assert_eq!((booted.status, booted.header("x-firn-start-kind")), (200, Some("boot")));

    let died = d.invoke("f", &[("X-Amz-Log-Type", "Tail")], &json!({"do": "die"})).await;
    assert_eq!((died.status, died.header("x-amz-function-error")), (200, Some("Unhandled")));
    assert_eq!(died.json()["errorType"], "Runtime.ExitError");
    let id = died.header("x-amzn-requestid").unwrap();
    assert!(died.json()["errorMessage"].as_str().unwrap().starts_with(&format!("RequestId: {id}")));
    let after = d.invoke("f", &[], &json!(1)).await;
    assert_eq!((after.status, after.header("x-firn-start-kind")), (200, Some("boot")));

    d.fake.broken.store(true, Ordering::SeqCst);
    let broken = d.invoke("f", &[("X-Firn-Start", "boot")], &json!(1)).await;
    let body = broken.expect(500, "ServiceException");
    assert!(body.contains("no more processes"), "{body}");
    d.fake.broken.store(false, Ordering::SeqCst);
    assert_eq!(d.invoke("f", &[("X-Firn-Start", "boot")], &json!(1)).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_fails_to_initialise_gets_no_snapshot() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({"Environment": {"Variables": {"BROKEN": "1"}}})).await;
    let failed = d.snapshot_is("f", "failed").await;
    assert!(failed["reason"].as_str().unwrap().contains("exit status 1"), "{failed}");
    let booted = d.invoke("f", &[], &json!(1)).await;
    assert_eq!(booted.header("x-firn-start-kind"), Some("boot"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_functions_and_snapshots_and_ends_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let mut d = start(dir.path(), limits(), 0).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.stop.take().unwrap().send(()).unwrap();
    d.scheduler.close(Duration::from_secs(1)).await;
    let refused = d.scheduler.instances();
    drop((d, refused));
    let d = start(dir.path(), limits(), 0).await;
    d.snapshot_is("f", "ready").await;
    assert_eq!((d.count(|c| &c.boots), d.count(|c| &c.thaws)), (0, 0), "all reused from disk");
    assert_eq!(d.invoke("f", &[], &json!(7)).await.json(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_does_not_break_its_instance() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let event = json!({"do": "sleep", "ms": 200});
    let hung_up = tokio::time::timeout(Duration::from_millis(50), d.invoke("f", &[], &event)).await;
    assert!(hung_up.is_err());
    tokio::time::sleep(Duration::from_millis(300)).await;
    let next = d.invoke("f", &[], &json!(1)).await;
    assert_eq!(next.header("x-firn-start-kind"), Some("warm"));
}

/// For trying real clients by hand: `FIRND_FAKE_PORT=9001 cargo test -p firnd -- --ignored fake`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "serves until killed"]
async fn serve_the_fake_backend() {
    let port = std::env::var("FIRND_FAKE_PORT").ok().and_then(|p| p.parse().ok()).unwrap_or(0);
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), limits(), port).await;
    eprintln!("ready on http://{}", daemon.address);
    tokio::time::sleep(Duration::from_secs(300)).await;
}
