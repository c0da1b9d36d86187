//! More requests than the daemon may take: `cargo test --release -p firnd load -- --nocapture` prints a
//! table.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{FUNCTIONS, daemon, join_all, limits, zip};
use crate::{
    function::Version,
    scheduler::{self, StartKind, Trace},
};

const STREAMED: &str = "2021-11-15/functions/f/response-streaming-invocations";

/// Answers with status 200 that all clients together wait for.
const SERVED: usize = 200;

/// A daemon that takes longer than this has come to a stand.
const LONGEST: Duration = Duration::from_secs(120);

/// What clients saw.
#[derive(Debug, Default)]
struct Seen {
    /// Answers by status.
    statuses: BTreeMap<u16, usize>,
    /// How long those with status 200 took.
    latencies: Vec<Duration>,
}

impl Seen {
    fn join(all: Vec<Self>) -> Self {
        let mut sum = Self::default();
        for seen in all {
            for (status, count) in seen.statuses {
                *sum.statuses.entry(status).or_default() += count;
            }
            sum.latencies.extend(seen.latencies);
        }
        sum.latencies.sort();
        sum
    }

    fn of(&self, status: u16) -> usize {
        self.statuses.get(&status).copied().unwrap_or_default()
    }

    fn quantile(&self, share: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get((share * last as f64) as usize).copied().unwrap_or_default()
    }
}

/// A client with one connection, which asks again as soon as it has an answer, as long as `goes_on` says
/// of its status. One that is turned away waits as long as `back_off` says.
async fn client(
    address: SocketAddr,
    event: &Value,
    goes_on: impl Fn(u16) -> bool,
    back_off: Duration,
) -> Seen {
    let mut stream = BufReader::new(TcpStream::connect(address).await.unwrap());
    let event = event.to_string();
    let request = format!(
        "POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nHost: {address}\r\nContent-Length: {}\r\n\r\n{event}",
        event.len()
    );
    let mut seen = Seen::default();
    loop {
        let begun = Instant::now();
        stream.write_all(request.as_bytes()).await.unwrap();
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            assert_ne!(stream.read_line(&mut line).await.unwrap(), 0, "the connection has ended");
            let line = line.trim_end().to_lowercase();
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest[..3].parse().unwrap();
            } else if let Some(rest) = line.strip_prefix("content-length: ") {
                length = rest.parse().unwrap();
            } else if line.is_empty() {
                break;
            }
        }
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        *seen.statuses.entry(status).or_default() += 1;
        match status {
            200 => seen.latencies.push(begun.elapsed()),
            _ => tokio::time::sleep(back_off).await,
        }
        if !goes_on(status) {
            return seen;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_daemon_serves_as_many_as_it_may_and_turns_the_rest_away() {
    // Where turning away takes all CPU time there is, those that are served get what is left: how much
    // that is depends on the machine, so none of it is measured by the clock.
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let limit = limits().concurrency as usize;
    let event = json!({"do": "sleep", "ms": 10});
    println!("clients  served/s  p50 ms  p99 ms  turned away");
    for (times, back_off) in [(1, 0), (2, 5), (10, 5), (10, 0)] {
        let (begun, count) = (Instant::now(), AtomicUsize::new(0));
        let back_off = Duration::from_millis(back_off);
        let goes_on = |status| {
            count.fetch_add(usize::from(status == 200), Ordering::Relaxed);
            count.load(Ordering::Relaxed) < SERVED
        };
        let clients = (0..limit * times).map(|_| client(d.address, &event, goes_on, back_off));
        let all = tokio::time::timeout(LONGEST, join_all(clients.collect())).await;
        let seen = Seen::join(all.unwrap_or_else(|_| panic!("{count:?} in {LONGEST:?}")));
        let (served, refused) = (seen.of(200), seen.of(429));
        let all: usize = seen.statuses.values().sum();
        println!(
            "{:>7}  {:>8.0}  {:>6.1}  {:>6.1}  {:>10.1}%",
            limit * times,
            served as f64 / begun.elapsed().as_secs_f64(),
            seen.quantile(0.5).as_secs_f64() * 1e3,
            seen.quantile(0.99).as_secs_f64() * 1e3,
            100.0 * refused as f64 / all as f64,
        );
        assert_eq!(served + refused, all, "{:?}", seen.statuses);
        assert_eq!(refused > 0, times > 1, "{:?}", seen.statuses);
    }
    // Nothing of it stays.
    let answer = d.invoke("f", &[], &json!(1)).await;
    assert_eq!((answer.status, answer.header("x-firn-start-kind")), (200, Some("warm")));
    assert!(d.count(|c| &c.alive) <= limit);
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_under_load_fail_no_call() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let event = json!({"do": "sleep", "ms": 1});
    let (answers, updated) = (AtomicUsize::new(0), AtomicBool::new(false));
    let goes_on = |_| {
        answers.fetch_add(1, Ordering::Relaxed);
        !updated.load(Ordering::Relaxed)
    };
    let clients = (0..4).map(|_| client(d.address, &event, goes_on, Duration::ZERO));
    let updates = async {
        let path = format!("{FUNCTIONS}/f/code");
        let mut count = 0;
        while count < 50 || answers.load(Ordering::Relaxed) < 100 {
            let code = json!({"ZipFile": zip(&count.to_string())});
            assert_eq!(d.send("PUT", &path, &code).await.status, 200);
            count += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        updated.store(true, Ordering::Relaxed);
    };
    let both = async { tokio::join!(join_all(clients.collect()), updates).0 };
    let seen = tokio::time::timeout(LONGEST, both).await;
    let seen = Seen::join(seen.unwrap_or_else(|_| panic!("{answers:?} in {LONGEST:?}")));
    let all: usize = seen.statuses.values().sum();
    assert_eq!(seen.of(200), all, "{:?}", seen.statuses);
    assert_eq!(d.get(&format!("{FUNCTIONS}/f")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_takes_its_room_until_its_function_is_done() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.invoke("f", &[], &json!(1)).await;
    let all = d.app.room.available_permits();
    let event = json!({"do": "sleep", "ms": 600}).to_string();
    for operation in ["2015-03-31/functions/f/invocations", STREAMED] {
        let mut stream = TcpStream::connect(d.address).await.unwrap();
        let head = format!(
            "POST /{operation} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{event}",
            d.address,
            event.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Who asked has gone; the event is in memory all the same.
        drop(stream);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(d.app.room.available_permits() < all, "{operation}");
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(d.app.room.available_permits(), all, "{operation}");
    }
}

/// What the tests above find once in a while: a request that has its function, and an update that takes the
/// function's code away before an instance has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_an_update_overtakes_is_served_by_what_is_new() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let overtaken = d.app.store.get("f", Version::Latest).unwrap();
    let code = json!({"ZipFile": zip("new")});
    assert_eq!(d.send("PUT", &format!("{FUNCTIONS}/f/code"), &code).await.status, 200);
    let request = || scheduler::Request {
        function: overtaken.clone(),
        invocation: firn::Invocation { payload: "1".into(), ..firn::Invocation::default() },
        force: None,
        trace: Trace::new(std::time::Instant::now()),
        traced: None,
        room: None,
    };
    let served = d.scheduler.invoke(request()).await.unwrap();
    assert_eq!((served.kind, &served.answer.payload[..]), (StartKind::Boot, &b"1"[..]));
    // It is an instance of what is new, and stays.
    let answer = d.invoke("f", &[("x-firn-start", "warm")], &json!(1)).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
    // Of a function that is gone there is nothing new.
    assert_eq!(d.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await.status, 204);
    assert!(d.scheduler.invoke(request()).await.is_err());
}
