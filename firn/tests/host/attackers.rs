//! A guest whose init was replaced: it holds the invoke stream and says what it likes, whole frames
//! included. It may ruin its own event and its own bill, within limits, and nothing else.

use std::time::{Duration, Instant};

use firn::{
    InstanceError, Invocation,
    guest::{self, Done, FromGuest, FunctionError, Log, Outcome, Ready, Renewed},
};
use proptest::{prelude::*, test_runner::TestRunner};

use crate::{
    install::{Install, eventually},
    life::{answer, boot, event, spec},
};

/// An event in answer to which the guest says exactly this, and nothing more.
pub fn says(bytes: &[u8]) -> Invocation {
    Invocation { payload: [b"say ", bytes].concat().into(), ..event(b"") }
}

pub fn done() -> Done {
    Done {
        request_id: "r-1".into(),
        outcome: Outcome::Response { payload: b"{}".into(), content_type: String::new() },
        duration_us: 1,
        init_us: 0,
        max_memory_bytes: 1,
        tsc: (0, 0),
    }
}

pub fn frame(message: &FromGuest) -> Vec<u8> {
    guest::encode(message).unwrap()
}

fn line(length: usize) -> FromGuest {
    FromGuest::Log(Log { stream: guest::Stream::Stdout, line: vec![b'x'; length], partial: false })
}

pub async fn what_no_init_says_ends_its_guest() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut bystander = boot(&host).await;
    let renewed = Renewed { instance_id: "x".into(), renew_us: 0, hooks_us: 0, error: None };
    let ready = Ready { version: guest::VERSION, init_tsc: 0, ready_tsc: 0 };
    let attacks = [
        ("another's answer", frame(&FromGuest::Done(Done { request_id: "r-2".into(), ..done() }))),
        ("a line that is too long", frame(&line(guest::MAX_LOG + 1))),
        ("a second start", frame(&FromGuest::Ready(ready))),
        ("a renewal that nobody asked for", frame(&FromGuest::Renewed(renewed))),
        ("a freeze that nobody asked for", frame(&FromGuest::Frozen)),
        ("a frame of no bytes", vec![0; 4]),
        ("a frame of 4 GiB", vec![0xff; 8]),
        ("a vector of 2^63 bytes", [&[11, 0, 0, 0, 4, 0][..], &[0xff; 9]].concat()),
    ];
    let mut attacks = attacks.map(|(name, bytes)| (name, says(&bytes))).to_vec();
    attacks.push(("an answer that is too long", event(b"too long")));
    for (name, event) in attacks {
        let mut guest = boot(&host).await;
        match guest.invoke(&event).await {
            Err(InstanceError::Protocol { .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
        eventually("it is killed", || !guest.is_alive()).await;
        assert_eq!(answer(&mut bystander, b"still here").await, "still here", "{name}");
    }
    drop(bystander);
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn an_answer_in_advance_is_nobodys() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut guest = boot(&host).await;
    let twice = [frame(&FromGuest::Done(done())), frame(&FromGuest::Done(done()))].concat();
    guest.invoke(&says(&twice)).await.unwrap();
    let next = Invocation { request_id: "r-2".into(), ..event(b"next") };
    match guest.invoke(&next).await {
        Err(InstanceError::Protocol { message, .. }) => {
            assert!(message.contains("r-1"), "{message}")
        }
        other => panic!("{other:?}"),
    }
    drop(guest);
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn figures_that_lie_stay_within_what_is_possible() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut guest = boot(&host).await;
    let (lies, most) = (u64::MAX, 3_000_000 + 12_000_000);
    let lied = Done {
        duration_us: lies,
        init_us: lies,
        max_memory_bytes: lies,
        tsc: (lies, 0),
        outcome: Outcome::Error(FunctionError::TimedOut { limit_ms: lies }),
        ..done()
    };
    let report = guest.invoke(&says(&frame(&FromGuest::Done(lied)))).await.unwrap();
    assert_eq!((report.duration_us, report.init_us), (most, most), "time-out, grace and restart");

    // What the host knows it does not ask: a load that claims to have taken years took seconds.
    let (mut spec, _lines) = spec(0, "page", None);
    spec.environment.push(("LIES".into(), String::new()));
    let mut guest = boot(&host).await;
    let loaded = guest.load(&spec, false).await.unwrap();
    assert_eq!(loaded.init_us, 12_000_000, "time limit and grace");
    drop(guest);
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn output_without_end_ends_at_the_deadline() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut bystander = boot(&host).await;
    let (spec, mut lines) = spec(0, "page", None);
    let mut guest = boot(&host).await;
    guest.load(&spec, false).await.unwrap();
    drop(spec);
    let reader = tokio::spawn(async move {
        let mut count = 0u64;
        while lines.recv().await.is_some() {
            count += 1;
        }
        count
    });
    let flood = Invocation { timeout: Duration::from_millis(100), ..event(b"flood") };
    let flooded = tokio::spawn(async move {
        let begun = Instant::now();
        let error = guest.invoke(&flood).await.unwrap_err();
        (error, begun.elapsed())
    });
    let mut slowest = Duration::ZERO;
    while !flooded.is_finished() {
        let begun = Instant::now();
        assert_eq!(answer(&mut bystander, b"{}").await, "{}");
        slowest = slowest.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (error, took) = flooded.await.unwrap();
    assert!(matches!(error, InstanceError::Unresponsive { .. }), "{error:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(slowest < Duration::from_secs(3), "a neighbour waited for {slowest:?}");
    let count = reader.await.unwrap();
    assert!(count > 1000, "{count} lines are no flood");
    println!("{count} lines; the slowest answer of a neighbour took {slowest:?}");
    drop(bystander);
    host.shutdown().await;
    install.assert_nothing_left();
}

/// Valid frames with bytes changed, cut and doubled; and noise.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let valid = prop_oneof![
        Just(frame(&FromGuest::Done(done()))),
        Just(frame(&line(40))),
        Just(frame(&FromGuest::Frozen)),
    ];
    let mutated = (proptest::collection::vec(valid, 1..4), any::<[(usize, u8); 3]>(), 1usize..200)
        .prop_map(|(frames, changes, cut)| {
            let mut bytes = frames.concat();
            for (place, value) in changes {
                let length = bytes.len();
                bytes[place % length] = value;
            }
            bytes.truncate(cut);
            bytes
        });
    prop_oneof![mutated, proptest::collection::vec(any::<u8>(), 1..200)]
}

pub async fn noise_from_an_init_ends_nothing_but_its_guest() {
    // Time that jumps: what is cut short is waited for until its deadline.
    let test = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let install = Install::stand_in();
        let host = runtime.block_on(install.open());
        let mut cases = TestRunner::new(ProptestConfig {
            cases: 60,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let outcome = cases.run(&noise(), |bytes| {
            runtime.block_on(async {
                let mut guest = boot(&host).await;
                let event = says(&bytes);
                tokio::time::pause();
                let result = guest.invoke(&event).await;
                tokio::time::resume();
                match result {
                    // It may have hit upon an answer.
                    Ok(_) => {}
                    Err(InstanceError::Protocol { .. } | InstanceError::Unresponsive { .. }) => {
                        eventually("it is killed", || !guest.is_alive()).await;
                    }
                    Err(other) => panic!("{other:?}"),
                }
                Ok(())
            })
        });
        outcome.unwrap();
        runtime.block_on(host.shutdown());
        install.assert_nothing_left();
    };
    tokio::task::spawn_blocking(test).await.unwrap();
}
