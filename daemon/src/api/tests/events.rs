//! Asynchronous invocation: acceptance, attempts, back-off, restarts, limits.

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use serde_json::{Value, json};

use super::{Daemon, FUNCTIONS, daemon, join_all, limits, start};
use crate::scheduler::Limits;

const EVENT: (&str, &str) = ("X-Amz-Invocation-Type", "Event");

/// One invocation as the fake has written it down.
pub(super) struct Ran {
    pub(super) id: String,
    arn: String,
    pub(super) event: Value,
}

/// What has run so far.
pub(super) fn ledger(dir: &Path) -> Vec<Ran> {
    let text = std::fs::read_to_string(dir.join("ledger")).unwrap();
    let mut ran = Vec::new();
    for line in text.lines() {
        let [id, arn, event] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let event = serde_json::from_str(event).unwrap();
        ran.push(Ran { id: id.into(), arn: arn.into(), event });
    }
    ran
}

/// Waits until so many have run; no more may have.
async fn ran(dir: &Path, count: usize) -> Vec<Ran> {
    for _ in 0..1000 {
        let ran = ledger(dir);
        assert!(ran.len() <= count, "{} have run, not {count}", ran.len());
        if ran.len() == count {
            return ran;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} have run, not {count}", ledger(dir).len());
}

impl Daemon {
    async fn queued(&self) -> u64 {
        self.get("/firn/v1/events").await.json()["Events"].as_u64().unwrap()
    }

    async fn queue_is(&self, events: u64) {
        for _ in 0..1000 {
            if self.queued().await == events {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} events are queued, not {events}", self.queued().await);
    }

    async fn submit(&self, name: &str, event: &Value) -> String {
        let accepted = self.invoke(name, &[EVENT], event).await;
        assert_eq!((accepted.status, &accepted.body[..]), (202, &b""[..]));
        accepted.header("x-amzn-requestid").unwrap().to_owned()
    }
}

/// Time in which what should not happen would.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_accepted_as_lambda_does_and_delivered() {
    let (dir, d) = daemon().await;
    d.create("f", json!({})).await;
    let id = d.submit("f", &json!({"n": 1})).await;
    let arn = "arn:aws:lambda:us-east-1:000000000000:function:f";
    let one = &ran(dir.path(), 1).await[0];
    assert_eq!((&one.id, one.arn.as_str(), &one.event), (&id, arn, &json!({"n": 1})));
    let path = format!("{FUNCTIONS}/f/invocations");
    assert_eq!(d.call("POST", &path, &[EVENT], b"").await.status, 202);
    let old = d.call("POST", "/2014-11-13/functions/f/invoke-async/", &[], b"[2]").await;
    assert_eq!((old.status, old.json()), (202, json!({"Status": 202})));
    let qualified = format!("{path}?Qualifier=%24LATEST");
    assert_eq!(d.call("POST", &qualified, &[EVENT], b"3").await.status, 202);
    let all = ran(dir.path(), 4).await;
    let events: std::collections::HashSet<_> = all.iter().map(|r| r.event.to_string()).collect();
    assert!(["{}", "[2]", "3"].iter().all(|e| events.contains(*e)), "{events:?}");
    assert!(all.iter().any(|r| r.arn == format!("{arn}:$LATEST")));
    d.queue_is(0).await;

    let most = format!("\"{}\"", "x".repeat(1_048_574));
    assert_eq!(d.call("POST", &path, &[EVENT], most.as_bytes()).await.status, 202);
    let large = d.call("POST", &path, &[EVENT], &vec![b' '; 1_048_577]).await;
    let body = large.expect(413, "RequestTooLargeException");
    assert!(body.contains("1048577 byte") && body.contains("limit 1048576"), "{body}");
    let large = d.call("POST", "/2014-11-13/functions/f/invoke-async", &[], &[b' '; 262_145]).await;
    large.expect(413, "RequestTooLargeException");
    let bad = d.call("POST", &path, &[EVENT], b"{").await;
    bad.expect(400, "InvalidRequestContentException");
    d.invoke("g", &[EVENT], &json!(1)).await.expect(404, "ResourceNotFoundException");
    let forced = d.invoke("f", &[EVENT, ("X-Firn-Start", "warm")], &json!(1)).await;
    forced.expect(400, "InvalidParameterValueException");
    ran(dir.path(), 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_retried_after_one_and_two_minutes_under_the_same_id() {
    let (dir, d) = daemon().await;
    d.create("f", json!({})).await;
    let id = d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 1).await;
    for (wait, attempt) in [(60, 2), (120, 3)] {
        a_while().await;
        d.clock.advance(Duration::from_secs(wait - 2));
        a_while().await;
        assert_eq!((ledger(dir.path()).len(), d.queued().await), (attempt - 1, 1));
        d.clock.advance(Duration::from_secs(2));
        ran(dir.path(), attempt).await;
    }
    d.queue_is(0).await;
    assert!(ledger(dir.path()).iter().all(|r| r.id == id));

    d.submit("f", &json!({"do": "stumble"})).await;
    ran(dir.path(), 4).await;
    a_while().await;
    d.clock.advance(Duration::from_secs(60));
    ran(dir.path(), 5).await;
    d.queue_is(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn throttled_events_back_off_and_then_run() {
    let dir = tempfile::tempdir().unwrap();
    let d = start(dir.path(), Limits { concurrency: 1, ..limits() }, 0).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let busy = json!({"do": "sleep", "ms": 1500});
    let (long, _) = tokio::join!(d.invoke("f", &[], &busy), async {
        a_while().await;
        d.submit("f", &json!(1)).await;
        for pause in [1, 2, 4] {
            a_while().await;
            assert_eq!(ledger(dir.path()).len(), 1, "the synchronous one alone");
            d.clock.advance(Duration::from_secs(pause));
        }
    });
    assert_eq!(long.status, 200);
    assert_eq!(d.queued().await, 1);
    a_while().await;
    assert_eq!(ledger(dir.path()).len(), 1, "it has backed off for 8 seconds by now");
    d.clock.advance(Duration::from_secs(8));
    ran(dir.path(), 2).await;
    d.queue_is(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_do_not_outlive_their_age() {
    let (dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 1).await;
    a_while().await;
    d.clock.advance(Duration::from_secs(6 * 3600));
    d.queue_is(0).await;
    assert_eq!(ledger(dir.path()).len(), 1);

    d.fake.broken.store(true, Ordering::SeqCst);
    d.create("g", json!({})).await;
    d.submit("g", &json!(1)).await;
    for _ in 0..100 {
        d.clock.advance(Duration::from_secs(301));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    d.queue_is(0).await;
    assert_eq!(ledger(dir.path()).len(), 1, "g has never run");
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_leave_room_for_callers_and_for_other_functions() {
    let (dir, d) = daemon().await;
    for name in ["f", "g"] {
        d.create(name, json!({})).await;
        d.snapshot_is(name, "ready").await;
    }
    let slow = json!({"do": "sleep", "ms": 400});
    join_all((0..20).map(|_| d.submit("f", &slow)).collect()).await;
    a_while().await;
    assert_eq!(ledger(dir.path()).len(), 2, "half of half of eight");
    for _ in 0..2 {
        d.submit("g", &json!(1)).await;
    }
    a_while().await;
    assert_eq!(ledger(dir.path()).len(), 4);
    assert_eq!(d.invoke("f", &[], &json!(1)).await.status, 200);
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert!(d.queued().await < 18);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_delivers_what_was_queued() {
    let dir = tempfile::tempdir().unwrap();
    let mut d = start(dir.path(), Limits { concurrency: 2, ..limits() }, 0).await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let slow = json!({"do": "sleep", "ms": 500, "planted": "secret"});
    for _ in 0..5 {
        d.submit("f", &slow).await;
    }
    ran(dir.path(), 1).await;
    d.events.stop();
    d.stop.take().unwrap().send(()).unwrap();
    d.scheduler.close(Duration::from_secs(5)).await;
    d.events.close(Duration::from_secs(5)).await;
    assert_eq!(d.events.usage().await.unwrap().events, 4, "the one that had begun is done");
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let path = file.unwrap().path();
        let secret = |bytes: Vec<u8>| bytes.windows(6).any(|w| w == b"secret");
        let clear = path.is_file() && secret(std::fs::read(&path).unwrap());
        assert_eq!(clear, path.ends_with("ledger"), "{}", path.display());
    }
    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    ran(dir.path(), 5).await;
    d.queue_is(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_deleted_functions_are_dropped() {
    let (dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 1).await;
    assert_eq!(d.queued().await, 1);
    d.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await;
    assert_eq!(d.queued().await, 0);
    d.create("f", json!({})).await;
    d.clock.advance(Duration::from_secs(60));
    a_while().await;
    assert_eq!(ledger(dir.path()).len(), 1);
    d.submit("f", &json!(1)).await;
    ran(dir.path(), 2).await;
}
