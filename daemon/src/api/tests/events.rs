//! Asynchronous invocation: acceptance, attempts, back-off, restarts, limits.

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use serde_json::{Value, json};

use super::{Daemon, FUNCTIONS, daemon, join_all, limits, start};
use crate::scheduler::Limits;

const EVENT: (&str, &str) = ("X-Amz-Invocation-Type", "Event");

/// One invocation as the fake has written it down.
pub(super) struct Ran {
    pub(super) id: String,
    pub(super) arn: String,
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
pub(super) async fn ran(dir: &Path, count: usize) -> Vec<Ran> {
    for _ in 0..12_000 {
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
    pub(super) async fn queued(&self) -> u64 {
        self.get("/firn/v1/events").await.json()["Events"].as_u64().unwrap()
    }

    pub(super) async fn queue_is(&self, events: u64) {
        for _ in 0..12_000 {
            if self.queued().await == events {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} events are queued, not {events}", self.queued().await);
    }

    pub(super) async fn submit(&self, name: &str, event: &Value) -> String {
        let accepted = self.invoke(name, &[EVENT], event).await;
        assert_eq!((accepted.status, &accepted.body[..]), (202, &b""[..]));
        accepted.header("x-amzn-requestid").unwrap().to_owned()
    }
}

/// Time in which what should not happen would.
pub(super) async fn a_while() {
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

#[tokio::test(flavor = "multi_thread")]
async fn events_reach_a_version_through_its_alias_which_takes_its_settings_along() {
    let dir = tempfile::tempdir().unwrap();
    let d = start(dir.path(), limits(), 0).await;
    d.create("f", json!({"Publish": true})).await;
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let made = json!({"Name": "a", "FunctionVersion": "1"});
    assert_eq!(d.send("POST", &aliases, &made).await.status, 201);
    d.submit("f:a", &json!(1)).await;
    let ran = ran(dir.path(), 1).await;
    assert_eq!((&ran[0].arn, &ran[0].event), (&format!("{}:a", arn("f")), &json!(1)));

    let settings = format!("{}?Qualifier=a", config("f"));
    assert_eq!(d.send("PUT", &settings, &json!({"MaximumRetryAttempts": 0})).await.status, 200);
    assert_eq!(d.call("DELETE", &format!("{aliases}/a"), &[], b"").await.status, 204);
    assert_eq!(d.send("POST", &aliases, &made).await.status, 201);
    d.get(&settings).await.expect(404, "ResourceNotFoundException");
}

pub(super) fn config(name: &str) -> String {
    format!("/2019-09-25/functions/{name}/event-invoke-config")
}

pub(super) fn arn(name: &str) -> String {
    format!("arn:aws:lambda:us-east-1:000000000000:function:{name}")
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_put_updated_listed_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let mut d = start(dir.path(), limits(), 0).await;
    for name in ["f", "g"] {
        d.create(name, json!({})).await;
    }
    let path = config("f");
    let none = d.get(&path).await.expect(404, "ResourceNotFoundException");
    assert!(none.contains("function:f:$LATEST doesn't have an EventInvokeConfig"), "{none}");
    d.send("POST", &path, &json!({"MaximumRetryAttempts": 1}))
        .await
        .expect(404, "ResourceNotFoundException");
    let put = json!({
        "MaximumRetryAttempts": 1,
        "DestinationConfig": {"OnFailure": {"Destination": arn("g")}},
    });
    let set = d.send("PUT", &path, &put).await;
    assert_eq!(set.status, 200);
    let set = set.json();
    assert_eq!(set["FunctionArn"], format!("{}:$LATEST", arn("f")));
    assert_eq!(
        (&set["MaximumRetryAttempts"], set.get("MaximumEventAgeInSeconds")),
        (&json!(1), None)
    );
    let destinations = json!({"OnSuccess": {}, "OnFailure": {"Destination": arn("g")}});
    assert_eq!(set["DestinationConfig"], destinations);
    assert!(set["LastModified"].as_f64().unwrap() > 1.7e9);
    let update = json!({
        "MaximumEventAgeInSeconds": 60,
        "DestinationConfig": {"OnSuccess": {"Destination": arn("g")}, "OnFailure": {"Destination": ""}},
    });
    let updated = d.send("POST", &path, &update).await.json();
    assert_eq!(
        (&updated["MaximumRetryAttempts"], &updated["MaximumEventAgeInSeconds"]),
        (&json!(1), &json!(60))
    );
    let destinations = json!({"OnSuccess": {"Destination": arn("g")}, "OnFailure": {}});
    assert_eq!(updated["DestinationConfig"], destinations);
    let published = d.send("POST", &format!("{FUNCTIONS}/f/versions"), &json!({})).await;
    assert_eq!(published.status, 201);
    let first = format!("{path}?Qualifier=1");
    assert_eq!(d.send("PUT", &first, &json!({"MaximumRetryAttempts": 0})).await.status, 200);

    d.events.stop();
    d.stop.take().unwrap().send(()).unwrap();
    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    assert_eq!(d.get(&path).await.json(), updated);
    let listed = d.get(&format!("{path}/list?MaxItems=1")).await.json();
    assert_eq!(listed["FunctionEventInvokeConfigs"], json!([updated]));
    let next = listed["NextMarker"].as_str().unwrap();
    let listed = d.get(&format!("{path}/list?Marker={next}")).await.json();
    assert_eq!(listed["FunctionEventInvokeConfigs"][0]["FunctionArn"], format!("{}:1", arn("f")));
    assert_eq!(listed["NextMarker"], Value::Null);
    d.call("DELETE", &format!("{FUNCTIONS}/f?Qualifier=1"), &[], b"").await;
    let listed = d.get(&format!("{path}/list")).await.json();
    assert_eq!(listed["FunctionEventInvokeConfigs"].as_array().unwrap().len(), 1);
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    d.call("DELETE", &path, &[], b"").await.expect(404, "ResourceNotFoundException");
    assert_eq!(d.send("PUT", &path, &put).await.status, 200);
    d.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await;
    d.create("f", json!({})).await;
    d.get(&path).await.expect(404, "ResourceNotFoundException");

    let destination = |arn: &str| json!({"DestinationConfig": {"OnFailure": {"Destination": arn}}});
    let invalid = "InvalidParameterValueException";
    for (input, exception, words) in [
        (json!({}), invalid, "at least one of"),
        (json!({"MaximumRetryAttempts": 3}), "ValidationException", "less than or equal to 2"),
        (json!({"MaximumEventAgeInSeconds": 59}), "ValidationException", "equal to 60"),
        (json!({"MaximumRetryAttempts": "x"}), "SerializationException", "wrong type"),
        (destination("x"), "ValidationException", "onFailure"),
        (destination("arn:aws:s3:::bucket"), invalid, "does not support"),
        (destination("arn:aws:sqs:us-east-1:000000000000:q.fifo"), invalid, "is FIFO"),
        (destination(&arn("f")), invalid, "itself"),
        (destination(&arn("h")), invalid, "no such function"),
        (destination(&arn("g").replace("us-east", "eu-west")), invalid, "no such function"),
    ] {
        let body = d.send("PUT", &path, &input).await.expect(400, exception);
        assert!(body.contains(words), "{input}: {body}");
    }
    d.get(&path).await.expect(404, "ResourceNotFoundException");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_bound_attempts_and_age_and_destinations_hear_of_the_end() {
    let (dir, d) = daemon().await;
    for name in ["f", "good", "bad"] {
        d.create(name, json!({})).await;
        d.snapshot_is(name, "ready").await;
    }
    let settings = json!({
        "MaximumRetryAttempts": 1,
        "MaximumEventAgeInSeconds": 90,
        "DestinationConfig": {
            "OnSuccess": {"Destination": arn("good")}, "OnFailure": {"Destination": arn("bad")},
        },
    });
    assert_eq!(d.send("PUT", &config("f"), &settings).await.status, 200);
    let id = d.submit("f", &json!({"n": 1})).await;
    let heard = &ran(dir.path(), 2).await[1];
    assert_eq!(heard.arn, arn("good"));
    assert_ne!(heard.id, id);
    let context = json!({
        "requestId": id, "functionArn": format!("{}:$LATEST", arn("f")),
        "condition": "Success", "approximateInvokeCount": 1,
    });
    assert_eq!(heard.event["requestContext"], context);
    assert_eq!(heard.event["requestPayload"], json!({"n": 1}));
    assert_eq!(heard.event["responsePayload"], json!({"n": 1}));
    assert_eq!(
        heard.event["responseContext"],
        json!({"statusCode": 200, "executedVersion": "$LATEST"})
    );

    d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 3).await;
    a_while().await;
    d.clock.advance(Duration::from_secs(60));
    let heard = &ran(dir.path(), 5).await[4];
    assert_eq!(heard.arn, arn("bad"));
    assert_eq!(heard.event["requestContext"]["condition"], "RetriesExhausted");
    assert_eq!(heard.event["requestContext"]["approximateInvokeCount"], 2);
    assert_eq!(heard.event["responseContext"]["functionError"], "Unhandled");
    assert_eq!(heard.event["responsePayload"]["errorType"], "ValueError");

    d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 6).await;
    a_while().await;
    d.clock.advance(Duration::from_secs(91));
    let heard = &ran(dir.path(), 7).await[6];
    assert_eq!(heard.event["requestContext"]["condition"], "EventAgeExceeded");
    assert_eq!(heard.event.get("responsePayload"), None);
    d.queue_is(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destinations_in_a_circle_end() {
    let (dir, d) = daemon().await;
    for (name, next) in [("f", "g"), ("g", "f")] {
        d.create(name, json!({})).await;
        d.create(next, json!({})).await;
        let settings = json!({"DestinationConfig": {"OnSuccess": {"Destination": arn(next)}}});
        assert_eq!(d.send("PUT", &config(name), &settings).await.status, 200);
    }
    d.submit("f", &json!(1)).await;
    ran(dir.path(), 17).await;
    d.queue_is(0).await;
    assert_eq!(ledger(dir.path()).len(), 17);
}
