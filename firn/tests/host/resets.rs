//! Reset: what an instance keeps of its requests, and what it is after one.

use std::time::Duration;

use firn::{Host, Instance, InstanceError, Outlets, ResidentSnapshot, control::FailureKind};
use tokio::sync::mpsc;

use crate::{
    install::{Install, eventually},
    life::{answer, boot, event, spec, text},
    snapshots::base,
};

pub async fn resident(host: &Host, install: &Install) -> ResidentSnapshot {
    let snapshot = base(host, &install.path("s")).await;
    snapshot.make_resident(host, None, None).await.unwrap()
}

async fn thawed(host: &Host, install: &Install) -> Instance {
    let snapshot = resident(host, install).await;
    host.thaw(&snapshot, None, Outlets::default()).await.unwrap().0
}

pub async fn a_reset_forgets_and_renews() {
    let install = Install::stand_in();
    let host = install.open().await;
    let snapshot = resident(&host, &install).await;
    let (log, mut lines) = mpsc::channel(64);
    let first = event(b"page");
    let (mut instance, report) = host.thaw(&snapshot, Some(&first), log.into()).await.unwrap();
    assert_eq!(text(&report.unwrap().outcome), "base");
    let mut ids = vec![instance.id().to_owned()];
    for _ in 0..20 {
        assert_eq!(answer(&mut instance, b"write secret").await, "write secret");
        assert_eq!(answer(&mut instance, b"page").await, "secret");
        let report = instance.reset().await.unwrap();
        assert_eq!((report.pages, report.duration), (1, Duration::from_nanos(2)));
        let names: Vec<_> = report.phases.0.iter().map(|p| p.0).collect();
        assert_eq!(names, ["sent", "received", "mapped", "entered", "done"]);
        let report = instance.invoke(&event(b"page")).await.unwrap();
        assert_eq!(text(&report.outcome), "base");
        assert_eq!(report.renewed.as_ref().unwrap().instance_id, instance.id());
        assert_eq!(instance.renewed(), report.renewed.as_ref());
        let names: Vec<_> = report.phases.0.iter().map(|p| p.0).collect();
        assert_eq!(names, ["sent", "first byte", "renewed", "done"]);
        ids.push(instance.id().to_owned());
        // Only the first event after a reset is renewed.
        assert!(instance.invoke(&event(b"x")).await.unwrap().renewed.is_none());
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 21, "each life has its own identity");
    // Output goes where it went before.
    assert_eq!(answer(&mut instance, b"log 1").await, "log 1");
    assert_eq!(lines.recv().await.unwrap().line, b"line 0");
    // Twice in a row, and paused: no harm.
    instance.reset().await.unwrap();
    instance.pause().await.unwrap();
    instance.reset().await.unwrap();
    assert_eq!(answer(&mut instance, b"page").await, "base");
    instance.retire().await;
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn only_what_a_snapshot_holds_is_reset() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut booted = boot(&host).await;
    let mut loaded = thawed(&host, &install).await;
    let (spec, _lines) = spec(0, "function", None);
    loaded.load(&spec, false).await.unwrap();
    for instance in [&mut booted, &mut loaded] {
        match instance.reset().await {
            Err(InstanceError::Refused { kind: FailureKind::BadRequest, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(answer(&mut loaded, b"page").await, "function", "it goes on");
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_reset_guest_that_keeps_its_identity_never_serves() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut instance = thawed(&host, &install).await;
    let before = instance.id().to_owned();
    answer(&mut instance, b"keep identity").await;
    instance.reset().await.unwrap();
    match instance.invoke(&event(b"{}")).await {
        Err(InstanceError::NotRenewed { expected, found }) => {
            assert_ne!(expected, before);
            assert_eq!(found, "old");
        }
        other => panic!("{other:?}"),
    }
    eventually("it is killed", || !instance.is_alive()).await;
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_vmm_that_dies_between_reset_and_invocation_says_how() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut instance = thawed(&host, &install).await;
    instance.reset().await.unwrap();
    let pid = rustix::process::Pid::from_raw(instance.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    match instance.invoke(&event(b"{}")).await {
        Err(InstanceError::Died { exit }) => assert_eq!(exit.signal, Some(9)),
        other => panic!("{other:?}"),
    }
    assert!(matches!(instance.reset().await, Err(InstanceError::Died { .. })));
    host.shutdown().await;
    install.assert_nothing_left();
}
