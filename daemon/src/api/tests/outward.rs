//! What becomes of events, at queues and topics: destinations and dead letters.

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    Daemon, FUNCTIONS, daemon,
    events::{a_while, arn, config, ran},
    identity::{ADMIN, guarded},
    limits, start,
};

const QUEUE: &str = "arn:aws:sqs:us-east-1:000000000000:dead";
const GOOD: &str = "arn:aws:sqs:eu-west-1:000000000000:good";
const TOPIC: &str = "arn:aws:sns:us-east-1:000000000000:bad";

fn destination(when: &str, to: &str) -> Value {
    let mut config = json!({ "MaximumRetryAttempts": 0 });
    config["DestinationConfig"][when]["Destination"] = to.into();
    config
}

impl Daemon {
    /// One whose events go nowhere but to a dead-letter target, after one attempt.
    async fn with_dead_letters(&self, name: &str, target: &str) {
        let made = self.create(name, json!({"DeadLetterConfig": {"TargetArn": target}})).await;
        assert_eq!(made.status, 201, "{}", made.json());
        let set = self.send("PUT", &config(name), &json!({"MaximumRetryAttempts": 0})).await;
        assert_eq!(set.status, 200);
        self.snapshot_is(name, "ready").await;
    }

    async fn failures(&self, metric: &str, function: &str) -> f64 {
        let dimensions = json!([{"Name": "FunctionName", "Value": function}]);
        self.metric(metric, "Sum", dimensions).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_and_topics_hear_of_the_end_and_the_dead_letter_queue_has_the_event() {
    let (dir, d) = daemon().await;
    d.with_dead_letters("f", QUEUE).await;
    for (when, to) in [("OnSuccess", GOOD), ("OnFailure", TOPIC)] {
        let set = d.send("POST", &config("f"), &destination(when, to)).await;
        assert_eq!(
            (set.status, &set.json()["DestinationConfig"][when]["Destination"]),
            (200, &json!(to))
        );
    }
    let id = d.submit("f", &json!({"n": 1})).await;
    ran(dir.path(), 1).await;
    d.queue_is(0).await;
    let [heard] = &d.aws.take(GOOD)[..] else { panic!("not one") };
    let record: Value = serde_json::from_str(&heard.body).unwrap();
    assert_eq!(record["requestContext"]["requestId"], id);
    assert_eq!(record["requestContext"]["condition"], "Success");
    assert_eq!(record["responsePayload"], json!({"n": 1}));
    assert_eq!(heard.attributes, json!({}));
    assert!(d.aws.take(QUEUE).is_empty() && d.aws.take(TOPIC).is_empty());

    let event = json!({"do": "raise", "text": "ü"});
    let id = d.submit("f", &event).await;
    ran(dir.path(), 2).await;
    d.queue_is(0).await;
    let [dead] = &d.aws.take(QUEUE)[..] else { panic!("not one") };
    assert_eq!(dead.body, event.to_string(), "the event, and nothing else");
    let attributes = json!({
        "RequestID": ["String", id], "ErrorCode": ["Number", "200"],
        "ErrorMessage": ["String", "oops"],
    });
    assert_eq!(dead.attributes, attributes);
    let [heard] = &d.aws.take(TOPIC)[..] else { panic!("not one") };
    let record: Value = serde_json::from_str(&heard.body).unwrap();
    assert_eq!(record["requestContext"]["condition"], "RetriesExhausted");
    assert_eq!(record["requestPayload"], event);
    assert!(d.aws.take(GOOD).is_empty());
    assert_eq!(d.aws.refused(), 0);
    // Lanes of targets end; the function's stays.
    a_while().await;
    assert_eq!(d.events.lane_names(), ["f"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_waits_for_its_target_over_restarts_and_holds_up_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mut d = start(dir.path(), limits(), 0).await;
    d.with_dead_letters("f", QUEUE).await;
    assert_eq!(d.send("POST", &config("f"), &destination("OnFailure", TOPIC)).await.status, 200);
    for status in [503, 403] {
        d.aws.fail("dead", status, "Whatever");
        d.submit("f", &json!({"do": "raise", "status": status})).await;
        d.queue_is(if status == 503 { 1 } else { 2 }).await;
    }
    ran(dir.path(), 2).await;
    a_while().await;
    assert_eq!((d.aws.take(QUEUE).len(), d.aws.take(TOPIC).len()), (0, 2));
    d.events.stop();
    d.stop.take().unwrap().send(()).unwrap();
    d.events.close(Duration::from_secs(5)).await;
    drop(d);

    let d = start(dir.path(), limits(), 0).await;
    d.clock.advance(Duration::from_secs(600));
    d.queue_is(0).await;
    assert_eq!(d.aws.take(QUEUE).len(), 2);
    assert_eq!(ran(dir.path(), 2).await.len(), 2, "nothing ran again");
    assert!(d.failures("DeadLetterErrors", "f").await.is_nan());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_delivered_is_counted_and_dropped() {
    let (dir, d) = daemon().await;
    d.with_dead_letters("f", QUEUE).await;
    assert_eq!(d.send("POST", &config("f"), &destination("OnFailure", TOPIC)).await.status, 200);
    // What is said of the message stays true, what is said of the target need not.
    d.aws.fail("dead", 400, "InvalidMessageContents");
    d.aws.fail("bad", 404, "NotFound");
    d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 1).await;
    d.queue_is(1).await;
    assert_eq!(d.failures("DeadLetterErrors", "f").await, 1.0);
    for _ in 0..10 {
        d.clock.advance(Duration::from_secs(300));
        a_while().await;
    }
    assert_eq!(d.queued().await, 1, "it is tried for six hours");
    d.clock.advance(Duration::from_secs(6 * 3600));
    d.queue_is(0).await;
    assert_eq!(d.failures("DestinationDeliveryFailures", "f").await, 1.0);
    assert_eq!((d.aws.take(QUEUE).len(), d.aws.take(TOPIC).len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_deleted_function_are_dropped() {
    let (dir, d) = daemon().await;
    d.with_dead_letters("f", QUEUE).await;
    d.aws.fail("dead", 503, "Whatever");
    d.submit("f", &json!({"do": "raise"})).await;
    ran(dir.path(), 1).await;
    d.queue_is(1).await;
    d.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await;
    d.queue_is(0).await;
    assert!(d.events.lane_names().is_empty());
    d.aws.fail("dead", 200, "");
    d.create("f", json!({})).await;
    d.clock.advance(Duration::from_secs(600));
    a_while().await;
    assert!(d.aws.take(QUEUE).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letter_targets_are_set_shown_and_taken_back() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({"Publish": true})).await;
    let path = format!("{FUNCTIONS}/f/configuration");
    let set = |target: &str| {
        let body = json!({"DeadLetterConfig": {"TargetArn": target}});
        let (d, path) = (&d, &path);
        async move { d.send("PUT", path, &body).await }
    };
    let shown = json!({ "TargetArn": QUEUE });
    assert_eq!(set(QUEUE).await.json()["DeadLetterConfig"], shown);
    let other = d.send("PUT", &path, &json!({"Timeout": 9})).await.json();
    assert_eq!(other["DeadLetterConfig"], shown, "it stays");
    let version = d.send("POST", &format!("{FUNCTIONS}/f/versions"), &json!({})).await.json();
    assert_eq!((&version["Version"], &version["DeadLetterConfig"]), (&json!("2"), &shown));
    assert_eq!(set("").await.json().get("DeadLetterConfig"), None);
    assert_eq!(d.get(&path).await.json().get("DeadLetterConfig"), None);
    let refused = set(&arn("g")).await.expect(400, "InvalidParameterValueException");
    assert!(refused.contains("SQS queue or an SNS topic"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_must_be_allowed_to_send_where_events_go() {
    let (_dir, d) = guarded().await;
    let create = async |name: &str, role: &str, target: &str| {
        let body = json!({
            "FunctionName": name, "Runtime": "python3.11", "Handler": "a.b",
            "Role": format!("arn:aws:iam::000000000000:role/{role}"),
            "Code": {"ZipFile": super::zip("1")}, "DeadLetterConfig": {"TargetArn": target},
        });
        d.signed(ADMIN, "POST", FUNCTIONS, body.to_string().as_bytes()).await
    };
    let invalid = "InvalidParameterValueException";
    for (target, words) in [(QUEUE, "SendMessage on SQS"), (TOPIC, "Publish on SNS")] {
        let refused = create("f", "r", target).await.expect(400, invalid);
        let words =
            format!("The provided execution role does not have permissions to call {words}");
        assert!(refused.contains(&words), "{refused}");
    }
    create("f", "sender", TOPIC).await.expect(400, invalid);
    assert_eq!(create("f", "sender", QUEUE).await.status, 201);
    // A role that may not takes the place of one that may.
    let path = format!("{FUNCTIONS}/f/configuration");
    let update =
        async |change: Value| d.signed(ADMIN, "PUT", &path, change.to_string().as_bytes()).await;
    let other = "arn:aws:iam::000000000000:role/r";
    update(json!({ "Role": other })).await.expect(400, invalid);
    let change = json!({"Role": other, "DeadLetterConfig": {"TargetArn": ""}});
    assert_eq!(update(change).await.status, 200);
    update(json!({"DeadLetterConfig": {"TargetArn": QUEUE}})).await.expect(400, invalid);
    let put = async |name: &str, to: &str| {
        let body = destination("OnFailure", to).to_string();
        d.signed(ADMIN, "PUT", &config(name), body.as_bytes()).await
    };
    let refused = put("f", QUEUE).await.expect(400, invalid);
    assert!(refused.contains(&format!("permissions to call SendMessage on {QUEUE}")), "{refused}");
    assert_eq!(create("g", "sender", QUEUE).await.status, 201);
    assert_eq!(put("g", QUEUE).await.status, 200);
    put("g", TOPIC).await.expect(400, invalid);
}
