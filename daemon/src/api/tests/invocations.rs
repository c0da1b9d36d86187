//! Invoking functions: answers, kinds of start, concurrency, failures.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{FUNCTIONS, daemon, join_all, limits, start, start_within};
use crate::{
    scheduler::{Limits, Reserve},
    serve::Bounds,
};

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

#[tokio::test(flavor = "multi_thread")]
async fn there_are_no_new_instances_on_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let reserve = Reserve { disk_mib: u64::MAX, ..limits().reserve };
    let d = start(dir.path(), Limits { reserve, ..limits() }, 0).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.invoke("f", &[], &json!(1)).await.expect(429, "TooManyRequestsException");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_instances_give_memory_back_once() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { reclaim: Duration::from_millis(100), ..limits() };
    let d = start(dir.path(), limits, 0).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.invoke("f", &[], &json!(1)).await;
    let end = Instant::now() + Duration::from_secs(10);
    while d.count(|c| &c.reclaimed) == 0 {
        assert!(Instant::now() < end, "an idle instance keeps its memory");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(d.count(|c| &c.reclaimed), 1);
    let again = d.invoke("f", &[], &json!(1)).await;
    assert_eq!(again.header("x-firn-start-kind"), Some("warm"));
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

/// What could not be thawed has not run: the event goes to an instance that is booted.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_can_not_be_restored_is_booted_instead() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.fake.refuses.store(true, Ordering::SeqCst);
    let booted = d.invoke("f", &[], &json!(7)).await;
    assert_eq!((booted.status, booted.header("x-firn-start-kind")), (200, Some("boot")));
    assert_eq!(booted.json(), json!(7));
    let failed = d.snapshot_is("f", "failed").await;
    assert!(failed["reason"].as_str().unwrap().contains("MSR 0x1"), "{failed}");
    let metrics = String::from_utf8(d.get("/metrics").await.body).unwrap();
    assert!(metrics.contains("\nfirn_restores_refused_total 1\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_dies_under_the_first_event_after_a_thaw_looks_like_a_crash() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let tail = ("X-Amz-Log-Type", "Tail");
    let died = d.invoke("f", &[("X-Firn-Start", "thaw"), tail], &json!({"do": "die"})).await;
    assert_eq!((died.status, died.header("x-amz-function-error")), (200, Some("Unhandled")));
    assert_eq!(died.json()["errorType"], "Runtime.ExitError");
    let log = STANDARD.decode(died.header("x-amz-log-result").unwrap()).unwrap();
    let log = String::from_utf8(log).unwrap();
    assert!(log.starts_with("START RequestId") && log.contains("\tStatus: error\t"), "{log}");
    let after = d.invoke("f", &[], &json!(1)).await;
    assert_eq!((after.status, after.header("x-firn-start-kind")), (200, Some("thaw")));
    assert_eq!(d.count(|c| &c.alive), 1);
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

#[tokio::test(flavor = "multi_thread")]
async fn events_of_unknown_length_are_bounded_too() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    let head = format!(
        "POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Transfer-Encoding: chunked\r\n\r\n"
    );
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, " ".repeat(1 << 20));
    for (chunks, status) in [(2, "200"), (7, "413")] {
        let mut stream = TcpStream::connect(d.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..chunks {
            stream.write_all(chunk.as_bytes()).await.unwrap();
        }
        stream.write_all(b"1\r\n1\r\n0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{}", &answer[..200]);
        let named = answer.contains("Request must be smaller than 6291456 bytes");
        assert_eq!(named, status == "413");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_keep_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        connections: 64,
        head: Duration::from_secs(60),
        head_in_a_crowd: Duration::from_millis(300),
    };
    let d = start_within(dir.path(), limits(), 0, bounds).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    // Three times as many as there may be: some say nothing, the others half a head.
    let mut flood = Vec::new();
    for index in 0..192 {
        let mut stream = TcpStream::connect(d.address).await.unwrap();
        let path = format!("{FUNCTIONS}/f/invocations");
        let said = match index % 3 {
            0 => String::new(),
            1 => "POST / HTTP/1.1\r\nHos".into(),
            _ => format!("POST {path} HTTP/1.1\r\nHost: h\r\nX-Nothing: "),
        };
        stream.write_all(said.as_bytes()).await.unwrap();
        flood.push(stream);
    }
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(d.invoke("f", &[], &json!(1)).await.status, 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    drop(flood);
}
