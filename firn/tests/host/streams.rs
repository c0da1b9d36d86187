//! Streamed responses: whole, in order, and before anything else happens to their instance.

use std::time::Duration;

use firn::{
    Instance, InstanceError, Invocation, InvokeReport, Outlets, ResponsePart,
    guest::{self, Begin, Chunk, Done, FromGuest, FunctionError, Outcome},
};
use tokio::sync::mpsc;

use crate::{
    attackers::{done, frame, says},
    install::{Install, eventually},
    life::{answer, boot, event},
    resets::resident,
};

fn begin() -> Vec<u8> {
    frame(&FromGuest::Begin(Begin { content_type: "a/b".into() }))
}

fn chunk(length: usize) -> Vec<u8> {
    frame(&FromGuest::Chunk(Chunk { payload: vec![b'x'; length] }))
}

fn end(outcome: Outcome) -> Vec<u8> {
    frame(&FromGuest::Done(Done { outcome, ..done() }))
}

/// An event whose response is `count` chunks of 64 KiB, and where it goes.
fn streams(count: usize) -> (Invocation, mpsc::Receiver<ResponsePart>) {
    let mut frames = begin();
    for _ in 0..count {
        frames.extend(chunk(guest::MAX_CHUNK));
    }
    frames.extend(end(Outcome::Streamed));
    let (sink, parts) = mpsc::channel(1);
    (Invocation { response: Some(sink), ..says(&frames) }, parts)
}

/// Takes all parts, the first only after a while: bytes of all chunks.
async fn take(mut parts: mpsc::Receiver<ResponsePart>) -> usize {
    tokio::time::sleep(Duration::from_millis(50)).await;
    let content_type = "a/b".to_owned();
    assert_eq!(parts.recv().await, Some(ResponsePart::Begin { content_type }));
    let mut bytes = 0;
    while let Some(ResponsePart::Chunk(chunk)) = parts.recv().await {
        bytes += chunk.len();
    }
    bytes
}

async fn whole(instance: &mut Instance) -> InvokeReport {
    let (event, parts) = streams(40);
    let taker = tokio::spawn(take(parts));
    let report = instance.invoke(&event).await.unwrap();
    assert_eq!(report.outcome, Outcome::Streamed);
    drop(event);
    assert_eq!(taker.await.unwrap(), 40 * guest::MAX_CHUNK);
    report
}

pub async fn booted_thawed_warm_and_reset_instances_stream() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut booted = boot(&host).await;
    whole(&mut booted).await;
    whole(&mut booted).await;
    let snapshot = resident(&host, &install).await;
    let (event, parts) = streams(40);
    let taker = tokio::spawn(take(parts));
    let (mut thawed, report) =
        host.thaw(&snapshot, Some(&event), Outlets::default()).await.unwrap();
    let report = report.unwrap();
    assert_eq!(report.outcome, Outcome::Streamed);
    assert!(report.phases.get("done").unwrap() >= Duration::from_millis(50), "the taker was slow");
    drop(event);
    assert_eq!(taker.await.unwrap(), 40 * guest::MAX_CHUNK);
    thawed.reset().await.unwrap();
    assert!(whole(&mut thawed).await.renewed.is_some());

    // Nobody wants it as it comes: it is one response, if it is short enough.
    let (event, _) = streams(3);
    let report = thawed.invoke(&Invocation { response: None, ..event }).await.unwrap();
    let payload = vec![b'x'; 3 * guest::MAX_CHUNK];
    assert_eq!(report.outcome, Outcome::Response { payload, content_type: "a/b".into() });

    // Nobody is there any more.
    let (event, parts) = streams(40);
    drop(parts);
    assert_eq!(thawed.invoke(&event).await.unwrap().outcome, Outcome::Streamed);
    assert_eq!(answer(&mut thawed, b"next").await, "next");
    drop((booted, thawed));
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_taker_that_stops_has_the_functions_time() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut instance = boot(&host).await;
    let (event, mut parts) = streams(40);
    let event = Invocation { timeout: Duration::from_millis(100), ..event };
    // Longer than the function's time, and shorter than a guest has that says nothing.
    let report = instance.invoke(&event).await.unwrap();
    let late = FunctionError::TimedOut { limit_ms: 100 };
    assert_eq!(report.outcome, Outcome::Error(late));
    assert!(matches!(parts.recv().await, Some(ResponsePart::Begin { .. })));
    assert_eq!(answer(&mut instance, b"next").await, "next");
    drop(instance);
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn what_is_no_stream_ends_its_guest() {
    let install = Install::stand_in();
    let host = install.open().await;
    let long = Begin { content_type: "x".repeat(guest::MAX_CONTENT_TYPE + 1) };
    for (name, bytes) in [
        ("a chunk of nothing", chunk(1)),
        ("the end of nothing", end(Outcome::Streamed)),
        ("two beginnings", [begin(), begin()].concat()),
        ("a chunk that is too long", [begin(), chunk(guest::MAX_CHUNK + 1)].concat()),
        ("a type that is too long", frame(&FromGuest::Begin(long))),
        ("a second response", [begin(), chunk(1), frame(&FromGuest::Done(done()))].concat()),
        ("a stream without end", Vec::new()),
    ] {
        let mut guest = boot(&host).await;
        let event = if bytes.is_empty() { event(b"stream") } else { says(&bytes) };
        let event = Invocation { timeout: Duration::from_secs(60), ..event };
        match guest.invoke(&event).await {
            Err(InstanceError::Protocol { .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
        eventually("it is killed", || !guest.is_alive()).await;
    }
    host.shutdown().await;
    install.assert_nothing_left();
}
