//! Reserved and provisioned concurrency, and changes that overtake each other.

use std::{sync::atomic::Ordering, time::Duration};

use serde_json::{Value, json};

use super::{Daemon, FUNCTIONS, daemon, join_all, limits, start, zip};
use crate::{api::error::ApiError, function::Version, scheduler::Limits};

const RESERVED: &str = "/2017-10-31/functions";
const PROVISIONED: &str = "/2019-09-30/functions";
const ACCOUNT: &str = "/2016-08-19/account-settings";

fn sleep(ms: u64) -> Value {
    json!({"do": "sleep", "ms": ms})
}

impl Daemon {
    async fn reserve(&self, name: &str, count: i64) -> super::Answer {
        let input = json!({ "ReservedConcurrentExecutions": count });
        self.send("PUT", &format!("{RESERVED}/{name}/concurrency"), &input).await
    }

    async fn provision(&self, name: &str, qualifier: &str, count: i64) -> super::Answer {
        let path = format!("{PROVISIONED}/{name}/provisioned-concurrency?Qualifier={qualifier}");
        self.send("PUT", &path, &json!({ "ProvisionedConcurrentExecutions": count })).await
    }

    async fn provisioned(&self, name: &str, qualifier: &str) -> super::Answer {
        let path = format!("{PROVISIONED}/{name}/provisioned-concurrency?Qualifier={qualifier}");
        self.get(&path).await
    }

    async fn provisioned_is(&self, name: &str, qualifier: &str, status: &str) -> Value {
        let mut last = Value::Null;
        for _ in 0..400 {
            last = self.provisioned(name, qualifier).await.json();
            if last["Status"] == status {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the provisioned concurrency of {name}:{qualifier} is not {status}: {last}");
    }

    async fn publish(&self, name: &str) -> String {
        let path = format!("{FUNCTIONS}/{name}/versions");
        let published = self.send("POST", &path, &json!({})).await.json();
        published["Version"].as_str().unwrap().to_owned()
    }

    async fn unreserved(&self) -> Value {
        self.get(ACCOUNT).await.json()["AccountLimit"]["UnreservedConcurrentExecutions"].clone()
    }
}

/// Housekeeping that does not keep tests waiting.
fn brisk() -> Limits {
    Limits { idle: Duration::from_millis(500), ..limits() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_change_counts_in_whatever_order_changes_are_announced() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let change = |text: &str| {
        let updated = d.app.store.update("f", None, false, |function| {
            let mut new = function.clone();
            new.config.environment.insert("CHANGE".into(), text.into());
            Ok::<_, ApiError>(new)
        });
        updated.unwrap()
    };
    let (first, second) = (change("1"), change("2"));
    d.app.announce(&second.new, Some(&second.old));
    d.app.announce(&first.new, Some(&first.old));
    d.snapshot_is("f", "ready").await;
    assert_eq!(d.invoke("f", &[("X-Firn-Start", "thaw")], &json!(1)).await.status, 200);
    assert_eq!(d.invoke("f", &[("X-Firn-Start", "warm")], &json!(1)).await.status, 200);
    // The same for a change that the end of the function has overtaken.
    let third = change("3");
    let gone = d.app.store.delete("f").unwrap();
    d.app.announce(&gone[0], Some(&gone[0]));
    d.app.announce(&third.new, Some(&third.old));
    assert!(d.app.store.get("f", Version::Latest).is_none());
    let resident = |f: &crate::function::Function| d.scheduler.snapshot(f).word();
    assert_eq!((resident(&third.old), resident(&third.new)), ("none", "none"));
}

#[tokio::test(flavor = "multi_thread")]
async fn reserved_concurrency_caps_and_guarantees() {
    let (dir, d) = daemon().await;
    d.create("own", json!({})).await;
    d.create("other", json!({})).await;
    let path = format!("{PROVISIONED}/own/concurrency");
    assert_eq!(d.get(&path).await.json(), json!({}));
    let answer = d.reserve("own", 2).await;
    assert_eq!((answer.status, &answer.json()["ReservedConcurrentExecutions"]), (200, &json!(2)));
    assert_eq!(d.get(&path).await.json(), json!({"ReservedConcurrentExecutions": 2}));
    let got = d.get(&format!("{FUNCTIONS}/own")).await.json();
    assert_eq!(got["Concurrency"]["ReservedConcurrentExecutions"], 2);
    assert_eq!(d.unreserved().await, 6);

    // Over a restart, too.
    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    let event = sleep(400);
    let count = |answers: &[super::Answer], status| {
        answers.iter().filter(|answer| answer.status == status).count()
    };
    let (own, other) = tokio::join!(
        join_all((0..4).map(|_| d.invoke("own", &[], &event)).collect()),
        join_all((0..10).map(|_| d.invoke("other", &[], &event)).collect()),
    );
    assert_eq!((count(&own, 200), count(&own, 429)), (2, 2));
    assert_eq!((count(&other, 200), count(&other, 429)), (6, 4));
    let reason = |answers: Vec<super::Answer>| {
        let refused = answers.into_iter().find(|answer| answer.status == 429).unwrap();
        assert_eq!(refused.header("retry-after"), Some("1"));
        let reason = refused.json()["Reason"].clone();
        refused.expect(429, "TooManyRequestsException");
        reason
    };
    assert_eq!(reason(own), "ReservedFunctionConcurrentInvocationLimitExceeded");
    assert_eq!(reason(other), "ConcurrentInvocationLimitExceeded");

    d.reserve("own", 0).await;
    d.invoke("own", &[], &json!(1)).await.expect(429, "TooManyRequestsException");
    let path = format!("{RESERVED}/own/concurrency");
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    assert_eq!(d.invoke("own", &[], &json!(1)).await.status, 200);
    assert_eq!(d.unreserved().await, 8);

    let invalid = "InvalidParameterValueException";
    let body = d.reserve("own", 8).await.expect(400, invalid);
    assert!(body.contains("below its minimum value of [1]"), "{body}");
    d.reserve("own", 5).await;
    d.reserve("other", 3).await.expect(400, invalid);
    d.reserve("own", -1).await.expect(400, "ValidationException");
    d.reserve("none", 1).await.expect(404, "ResourceNotFoundException");
    d.reserve("own:1", 1).await.expect(404, "ResourceNotFoundException");
    let path = format!("{RESERVED}/own/concurrency");
    d.send("PUT", &path, &json!({})).await.expect(400, "ValidationException");
    // What a function had reserved goes with it.
    d.call("DELETE", &format!("{FUNCTIONS}/own"), &[], b"").await;
    assert_eq!(d.unreserved().await, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn provisioned_instances_are_there_before_requests_and_stay() {
    let dir = tempfile::tempdir().unwrap();
    let d = start(dir.path(), brisk(), 0).await;
    d.create("f", json!({})).await;
    let version = d.publish("f").await;
    let answer = d.provision("f", &version, 3).await;
    assert_eq!(answer.status, 202);
    let answer = answer.json();
    assert_eq!(answer["RequestedProvisionedConcurrentExecutions"], 3);
    assert!(answer["LastModified"].as_str().unwrap().ends_with("+0000"));
    let ready = d.provisioned_is("f", &version, "READY").await;
    assert_eq!(ready["AllocatedProvisionedConcurrentExecutions"], 3);
    assert_eq!(d.unreserved().await, 5);
    assert_eq!(d.count(|c| &c.alive), 3);

    // Nobody waits for a start, and instances outlive the idle time.
    let event = sleep(100);
    let name = format!("f:{version}");
    let answers = join_all((0..3).map(|_| d.invoke(&name, &[], &event)).collect()).await;
    for answer in answers {
        assert_eq!((answer.status, answer.header("x-firn-start-kind")), (200, Some("warm")));
    }
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(d.count(|c| &c.alive), 3);
    // One that dies is replaced.
    let died = d.invoke(&name, &[], &json!({"do": "die"})).await;
    assert_eq!(died.header("x-amz-function-error"), Some("Unhandled"));
    d.provisioned_is("f", &version, "READY").await;
    for _ in 0..100 {
        if d.count(|c| &c.alive) == 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(d.count(|c| &c.alive), 3);

    drop(d);
    let d = start(dir.path(), brisk(), 0).await;
    d.provisioned_is("f", &version, "READY").await;
    // Others can't take it, and it takes what is left when it needs more.
    let long = sleep(400);
    d.create("g", json!({})).await;
    let (f, g) = tokio::join!(
        join_all((0..3).map(|_| d.invoke(&name, &[], &long)).collect()),
        join_all((0..7).map(|_| d.invoke("g", &[], &long)).collect()),
    );
    assert!(f.iter().all(|answer| answer.status == 200));
    assert_eq!(g.iter().filter(|answer| answer.status == 200).count(), 5);

    let path = format!("{PROVISIONED}/f/provisioned-concurrency?Qualifier={version}");
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    d.get(&path).await.expect(404, "ProvisionedConcurrencyConfigNotFoundException");
    assert_eq!(d.unreserved().await, 8);
    for _ in 0..200 {
        if d.count(|c| &c.alive) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("instances that nobody wants stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn provisioned_concurrency_follows_its_alias() {
    let dir = tempfile::tempdir().unwrap();
    let d = start(dir.path(), brisk(), 0).await;
    d.create("f", json!({})).await;
    let one = d.publish("f").await;
    d.send("PUT", &format!("{FUNCTIONS}/f/code"), &json!({"ZipFile": zip("2")})).await;
    let two = d.publish("f").await;
    let alias = json!({"Name": "prod", "FunctionVersion": one});
    assert_eq!(d.send("POST", &format!("{FUNCTIONS}/f/aliases"), &alias).await.status, 201);
    d.provision("f", "prod", 4).await;
    d.provisioned_is("f", "prod", "READY").await;
    let conflict = "ResourceConflictException";
    let body = d.provision("f", &one, 1).await.expect(409, conflict);
    assert!(body.contains("pointed to by a Provisioned Concurrency alias"), "{body}");

    let weights = json!({"RoutingConfig": {"AdditionalVersionWeights": {two.clone(): 0.25}}});
    assert_eq!(d.send("PUT", &format!("{FUNCTIONS}/f/aliases/prod"), &weights).await.status, 200);
    d.provisioned_is("f", "prod", "READY").await;
    let of = |version: &str| {
        let version = version.parse::<Version>().unwrap();
        let function = d.app.store.get("f", version).unwrap();
        d.scheduler.provisioned(&function).map(|p| p.allocated)
    };
    assert_eq!((of(&one), of(&two)), (Some(3), Some(1)));
    let moved = json!({"FunctionVersion": two, "RoutingConfig": {}});
    assert_eq!(d.send("PUT", &format!("{FUNCTIONS}/f/aliases/prod"), &moved).await.status, 200);
    d.provisioned_is("f", "prod", "READY").await;
    assert_eq!((of(&one), of(&two)), (None, Some(4)));

    let latest = json!({"FunctionVersion": "$LATEST"});
    let path = format!("{FUNCTIONS}/f/aliases/prod");
    d.send("PUT", &path, &latest).await.expect(400, "InvalidParameterValueException");
    let list = d.get(&format!("{PROVISIONED}/f/provisioned-concurrency?List=ALL")).await.json();
    let configs = list["ProvisionedConcurrencyConfigs"].as_array().unwrap();
    assert_eq!(configs.len(), 1);
    let arn = configs[0]["FunctionArn"].as_str().unwrap();
    assert_eq!(arn, "arn:aws:lambda:us-east-1:000000000000:function:f:prod");
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    assert_eq!(d.unreserved().await, 8);
    d.provision("f", &two, 2).await;
    assert_eq!(d.unreserved().await, 6);
    let path = format!("{FUNCTIONS}/f?Qualifier={two}");
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    assert_eq!(d.unreserved().await, 8, "it goes with its version");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_provisioned_is_refused_or_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let d = start(dir.path(), brisk(), 0).await;
    d.create("f", json!({})).await;
    let version = d.publish("f").await;
    let invalid = "InvalidParameterValueException";
    let body = d.provision("f", "$LATEST", 1).await.expect(400, invalid);
    assert!(body.contains("cannot be applied to unpublished"), "{body}");
    d.provision("f", "none", 1).await.expect(404, "ResourceNotFoundException");
    d.provision("f", &version, 0).await.expect(400, "ValidationException");
    d.provision("f", &version, 8).await.expect(400, invalid);
    let path = format!("{PROVISIONED}/f/provisioned-concurrency");
    d.get(&path).await.expect(400, "ValidationException");
    d.provisioned("f", &version).await.expect(404, "ProvisionedConcurrencyConfigNotFoundException");
    d.reserve("f", 2).await;
    let body = d.provision("f", &version, 3).await.expect(400, invalid);
    assert!(body.contains("reservedConcurrentExecution"), "{body}");
    d.provisioned("f", &version).await.expect(404, "ProvisionedConcurrencyConfigNotFoundException");
    assert_eq!(d.provision("f", &version, 2).await.status, 202);
    let body = d.reserve("f", 1).await.expect(400, invalid);
    assert!(body.contains("total provisioned concurrency [2]"), "{body}");
    assert_eq!(d.unreserved().await, 6, "what is provisioned is part of what is reserved");

    d.create("bad", json!({"Environment": {"Variables": {"BROKEN": "1"}}})).await;
    let version = d.publish("bad").await;
    assert_eq!(d.provision("bad", &version, 1).await.status, 202);
    let failed = d.provisioned_is("bad", &version, "FAILED").await;
    assert!(failed["StatusReason"].as_str().unwrap().contains("fails to initialise"), "{failed}");

    d.fake.broken.store(true, Ordering::SeqCst);
    d.create("g", json!({})).await;
    let version = d.publish("g").await;
    assert_eq!(d.provision("g", &version, 1).await.status, 202);
    d.provisioned_is("g", &version, "FAILED").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_function_that_may_not_run_fail_at_once() {
    let (dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.create("sink", json!({})).await;
    d.reserve("f", 0).await;
    let sink = "arn:aws:lambda:us-east-1:000000000000:function:sink";
    let settings = json!({"DestinationConfig": {"OnFailure": {"Destination": sink}}});
    let path = "/2019-09-25/functions/f/event-invoke-config";
    assert_eq!(d.send("PUT", path, &settings).await.status, 200);
    let event = [("X-Amz-Invocation-Type", "Event")];
    assert_eq!(d.invoke("f", &event, &json!(1)).await.status, 202);
    for _ in 0..200 {
        let ledger = std::fs::read_to_string(dir.path().join("ledger")).unwrap();
        if ledger.contains("\"ZeroReservedConcurrency\"") {
            assert_eq!(ledger.lines().count(), 1, "f has not run: {ledger}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the destination has heard nothing");
}
