//! `--isolation per-invocation`: what one request may find of those before it.

use std::{sync::atomic::Ordering, time::Duration};

use serde_json::json;

use super::{Daemon, daemon, limits, start};
use crate::scheduler::{Isolation, Limits};

async fn isolated() -> (tempfile::TempDir, Daemon) {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { isolation: Isolation::PerInvocation, ..limits() };
    let daemon = start(dir.path(), limits, 0).await;
    (dir, daemon)
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_instances_remember_and_reset_ones_do_not() {
    let remember = |what: u32| json!({"do": "remember", "what": what});
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    assert!(d.invoke("f", &[], &remember(1)).await.json().is_null());
    assert_eq!(d.invoke("f", &[], &remember(2)).await.json(), 1);

    let (_dir, d) = isolated().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let first = d.invoke("f", &[], &remember(1)).await;
    assert_eq!(first.header("x-firn-start-kind"), Some("thaw"));
    for round in 0..5 {
        let next = d.invoke("f", &[], &remember(round)).await;
        assert_eq!(next.header("x-firn-start-kind"), Some("reset"));
        assert!(next.json().is_null(), "round {round}");
    }
    // One microVM served them all, and is listed as one.
    assert_eq!(d.fake.thaws.load(Ordering::SeqCst), 2, "one of the base, one of the function");
    let listed = d.get("/firn/v1/instances").await.json();
    let listed: Vec<_> = listed["Instances"].as_object().unwrap().values().cloned().collect();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0]["Invocations"], 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_invocation_leaves_nothing_either() {
    let (_dir, d) = isolated().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.invoke("f", &[], &json!({"do": "remember", "what": 1})).await;
    for action in ["raise", "exit", "timeout"] {
        let failed = d.invoke("f", &[], &json!({"do": action})).await;
        assert!(failed.header("x-amz-function-error").is_some(), "{action}");
        let next = d.invoke("f", &[], &json!({"do": "remember", "what": 2})).await;
        assert_eq!(next.header("x-firn-start-kind"), Some("reset"));
        assert!(next.json().is_null(), "{action}");
    }
}

/// An instance that can't be restored has not run: the event goes to another.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_can_not_be_restored_is_replaced() {
    let (dir, d) = isolated().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let ledger = dir.path().join("ledger");
    d.invoke("f", &[], &json!(1)).await;
    *d.fake.ledger.lock().unwrap() = Some(std::fs::File::create(&ledger).unwrap());
    d.fake.refuses.store(true, Ordering::SeqCst);
    let served = d.invoke("f", &[], &json!(2)).await;
    assert_eq!((served.status, served.header("x-firn-start-kind")), (200, Some("boot")));
    assert_eq!(served.json(), json!(2));
    let ran = std::fs::read_to_string(&ledger).unwrap();
    assert_eq!(ran.lines().count(), 1, "{ran}");
    // The instance that was reset, and the snapshot.
    let metrics = String::from_utf8(d.get("/metrics").await.body).unwrap();
    assert!(metrics.contains("\nfirn_restores_refused_total 2\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_booted_serves_once() {
    let (_dir, d) = isolated().await;
    *d.fake.slow_load.lock().unwrap() = Duration::from_millis(200);
    d.create("f", json!({})).await;
    for _ in 0..2 {
        let early = d.invoke("f", &[("X-Firn-Start", "boot")], &json!(1)).await;
        assert_eq!(early.header("x-firn-start-kind"), Some("boot"));
        let listed = d.get("/firn/v1/instances").await.json();
        assert_eq!(listed["Instances"].as_object().unwrap().len(), 0, "{listed}");
    }
    assert_eq!(d.fake.resets.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_kind_that_there_is_can_be_forced() {
    let refused = async |d: &Daemon, kind, about| {
        let answer = d.invoke("f", &[("X-Firn-Start", kind)], &json!(1)).await;
        let body = answer.expect(409, "ResourceConflictException");
        assert!(body.contains(kind) && body.contains(about), "{body}");
    };
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.invoke("f", &[], &json!(1)).await;
    refused(&d, "reset", "kept warm").await;
    let (_dir, d) = isolated().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    refused(&d, "reset", "no instance").await;
    d.invoke("f", &[], &json!(1)).await;
    refused(&d, "warm", "are reset").await;
    let again = d.invoke("f", &[("X-Firn-Start", "reset")], &json!(1)).await;
    assert_eq!((again.status, again.header("x-firn-start-kind")), (200, Some("reset")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_can_not_be_reset_is_never_used_again() {
    let (_dir, d) = isolated().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    d.fake.stuck.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let answer = d.invoke("f", &[], &json!({"do": "remember", "what": 1})).await;
        assert_eq!(answer.header("x-firn-start-kind"), Some("thaw"));
        assert!(answer.json().is_null());
    }
}
