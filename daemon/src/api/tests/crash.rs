//! A daemon that is killed hundreds of times while events come in: every one that got its 202 runs.
//!
//! `SIGKILL` loses what is in the process and nothing that the kernel has. What a loss of power does is
//! up to `synchronous=FULL` and the disk.

use std::{
    collections::{BTreeSet, HashMap},
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
};

use super::{
    FUNCTIONS,
    events::{arn, config, ledger},
    limits, start, zip,
};

const DIR: &str = "FIRND_CRASH_TEST";
const READY: &str = "ready on ";

/// The daemon that the test kills. Its clock runs a hundred times as fast, so that minutes between
/// attempts don't take any.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of the crash test"]
async fn the_daemon_that_is_killed() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let daemon = start(Path::new(&dir), limits(), 0).await;
    println!("\n{READY}{}", daemon.address);
    for _ in 0..60_000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        daemon.clock.advance(Duration::from_millis(500));
    }
}

/// That daemon in a process of its own, which does not outlive the test.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Victim {
    fn spawn(dir: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = "api::tests::crash::the_daemon_that_is_killed";
        command.args(["--exact", name, "--ignored", "--nocapture"]).env(DIR, dir);
        Self(command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap())
    }

    /// Where it listens; blocks until it does.
    fn address(&mut self) -> SocketAddr {
        let mut lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|line| Some(line.unwrap().strip_prefix(READY)?.to_owned()));
        ready.expect("the daemon has started").parse().unwrap()
    }
}

/// Status and body; `None`: it broke off.
async fn call(address: SocketAddr, head: &str, body: &str) -> Option<(u16, Value)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!(
        "{head}\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, serde_json::from_str(body).unwrap_or_default()))
}

fn random(below: u64) -> u64 {
    (uuid::Uuid::new_v4().as_u128() % u128::from(below)) as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn no_accepted_event_is_lost_however_often_the_daemon_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut victim = Victim::spawn(dir.path());
    let address = victim.address();
    for name in ["f", "told"] {
        let function = json!({
            "FunctionName": name, "Runtime": "python3.11", "Handler": "a.b",
            "Role": "arn:aws:iam::000000000000:role/r", "Code": {"ZipFile": zip("1")},
        });
        let create = format!("POST {FUNCTIONS} HTTP/1.1");
        assert_eq!(call(address, &create, &function.to_string()).await.unwrap().0, 201);
    }
    let told = json!({"DestinationConfig": {"OnFailure": {"Destination": arn("told")}}});
    let put = format!("PUT {} HTTP/1.1", config("f"));
    assert_eq!(call(address, &put, &told.to_string()).await.unwrap().0, 200);

    let target = watch::Sender::new(Some(address));
    let (counter, accepted) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(BTreeSet::new())));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (counter, accepted) = (counter.clone(), accepted.clone());
            let target = target.subscribe();
            tokio::spawn(async move {
                let head = format!(
                    "POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nX-Amz-Invocation-Type: Event"
                );
                loop {
                    let Some(address) = *target.borrow() else { return };
                    let n = counter.fetch_add(1, Ordering::SeqCst);
                    // Some fail each time, and so have to run three times.
                    let what = if n.is_multiple_of(4) { "raise" } else { "echo" };
                    let event = json!({"do": what, "n": n}).to_string();
                    if let Some((202, _)) = call(address, &head, &event).await {
                        accepted.lock().unwrap().insert(n);
                    }
                    tokio::time::sleep(Duration::from_millis(1 + random(4))).await;
                }
            })
        })
        .collect();
    let kills = firn_nightly::rounds(30, 250);
    for kill in 0..kills {
        if kill % 5 == 4 {
            // In the middle of its start, when it takes up what was left.
            tokio::time::sleep(Duration::from_micros(random(40_000))).await;
        } else {
            if kill > 0 {
                let address = tokio::task::block_in_place(|| victim.address());
                target.send_replace(Some(address));
            }
            tokio::time::sleep(Duration::from_micros(random(150_000))).await;
        }
        drop(victim);
        victim = Victim::spawn(dir.path());
    }
    let address = tokio::task::block_in_place(|| victim.address());
    target.send_replace(None);
    for caller in callers {
        caller.await.unwrap();
    }
    let mut left = u64::MAX;
    for _ in 0..6000 {
        let (_, usage) = call(address, "GET /firn/v1/events HTTP/1.1", "").await.unwrap();
        left = usage["Events"].as_u64().unwrap();
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(left, 0, "events are left in the queue");

    let mut runs: HashMap<u64, Vec<String>> = HashMap::new();
    let mut told: HashMap<u64, BTreeSet<String>> = HashMap::new();
    for ran in ledger(dir.path()) {
        if ran.arn == arn("told") {
            let n = ran.event["requestPayload"]["n"].as_u64().unwrap();
            told.entry(n).or_default().insert(ran.id);
            continue;
        }
        runs.entry(ran.event["n"].as_u64().unwrap()).or_default().push(ran.id);
    }
    let accepted = accepted.lock().unwrap();
    let (mut repeated, mut total) = (0, 0);
    for n in accepted.iter() {
        let ids = runs.get(n).unwrap_or_else(|| panic!("event {n} was accepted and is lost"));
        assert!(ids.iter().all(|id| *id == ids[0]), "event {n} has several ids");
        let least = if n.is_multiple_of(4) { 3 } else { 1 };
        assert!(ids.len() >= least, "event {n} has run {} of {least} times", ids.len());
        // Its destination hears of each that failed, as one event.
        let records = told.get(n).map_or(0, BTreeSet::len);
        assert_eq!(records, usize::from(n.is_multiple_of(4)), "records of event {n}");
        repeated += usize::from(ids.len() > least);
        total += ids.len();
    }
    let (sent, accepted) = (counter.load(Ordering::SeqCst), accepted.len());
    println!("{kills} kills, {sent} sent, {accepted} accepted, {total} runs, {repeated} repeated");
    assert!(accepted >= kills, "{accepted} events in {kills} kills say little");
    assert!(runs.keys().all(|n| *n < sent), "what has run was sent");
}
