//! InvokeWithResponseStream: what reaches the client, when, and what becomes of a slow one.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Answer, Daemon, daemon};
use crate::api::eventstream;

const PATH: &str = "/2021-11-15/functions/f/response-streaming-invocations";

/// Undoes the chunked transfer coding. Panics if its end is missing.
pub fn whole(answer: &Answer) -> Vec<u8> {
    if answer.header("transfer-encoding").is_none() {
        return answer.body.clone();
    }
    let (mut rest, mut body) = (&answer.body[..], Vec::new());
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        rest = &rest[end + 2..];
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

/// The payload that was streamed, in its pieces, and the last event.
fn events(answer: &Answer) -> (Vec<String>, Value) {
    let mut events = eventstream::read(&whole(answer));
    let (kind, content_type, last) = events.pop().unwrap();
    assert_eq!((kind.as_str(), content_type.as_str()), ("InvokeComplete", "application/json"));
    let chunks = events.into_iter().map(|(kind, content_type, payload)| {
        assert_eq!(kind, "PayloadChunk");
        assert_eq!(content_type, "application/octet-stream");
        String::from_utf8(payload).unwrap()
    });
    (chunks.collect(), serde_json::from_slice(&last).unwrap())
}

async fn stream(d: &Daemon, headers: &[(&str, &str)], event: Value) -> Answer {
    d.call("POST", PATH, headers, event.to_string().as_bytes()).await
}

/// Sends the request and leaves the answer unread.
async fn send(d: &Daemon, event: Value) -> TcpStream {
    let mut client = TcpStream::connect(d.address).await.unwrap();
    let (event, address) = (event.to_string(), d.address);
    let length = event.len();
    let request = format!(
        "POST {PATH} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n\r\n{event}"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    client
}

fn streamed(d: &Daemon) -> usize {
    d.fake.streamed.load(Ordering::SeqCst)
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_and_how_it_ended() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let event = json!({"do": "stream", "chunks": ["he", "llo"]});
    for kind in ["thaw", "warm", "boot"] {
        let headers = [("X-Amz-Log-Type", "Tail"), ("X-Firn-Start", kind)];
        let answer = stream(&d, &headers, event.clone()).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), Some("application/vnd.amazon.eventstream"));
        assert_eq!(answer.header("x-amz-executed-version"), Some("$LATEST"));
        assert!(answer.header("x-amzn-trace-id").is_some());
        let (chunks, complete) = events(&answer);
        assert_eq!(chunks, ["he", "llo"]);
        let log = STANDARD.decode(complete["LogResult"].as_str().unwrap()).unwrap();
        assert!(String::from_utf8(log).unwrap().contains("REPORT RequestId: "), "{kind}");
        assert!(complete.get("ErrorCode").is_none() && complete.get("ErrorDetails").is_none());
    }

    // A response that is not streamed is one chunk, and an empty one none.
    let answer = stream(&d, &[], json!({"a": 1})).await;
    assert_eq!(answer.header("x-firn-start-kind"), Some("warm"));
    assert_eq!(events(&answer), (vec![r#"{"a":1}"#.to_owned()], json!({})));
    let empty = stream(&d, &[], json!({"do": "stream", "chunks": []})).await;
    assert_eq!(events(&empty), (vec![], json!({})));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_has_its_code_before_and_behind_the_first_chunk() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    for (what, code, words) in [
        ("raise", "ValueError", "oops"),
        ("exit", "Runtime.ExitError", "exit status 1"),
        ("timeout", "Sandbox.Timedout", "timed out after 3.00 seconds"),
        ("large", "Function.ResponseSizeTooLarge", "7000000 bytes"),
        ("die", "Runtime.ExitError", "killed by the test"),
    ] {
        // On a warm instance, then on a thawed one where that was the end of it.
        for event in
            [json!({"do": what}), json!({"do": "stream", "chunks": ["some"], "then": what})]
        {
            let begun = event["do"] == "stream";
            let answer = stream(&d, &[], event).await;
            assert_eq!(answer.status, 200);
            let (chunks, complete) = events(&answer);
            assert_eq!(chunks, if begun { vec!["some"] } else { vec![] }, "{what}");
            assert_eq!(complete["ErrorCode"], code);
            let details = complete["ErrorDetails"].as_str().unwrap();
            assert!(details.contains(words), "{details}");
            assert!(complete.get("LogResult").is_none());
        }
    }
    d.fake.broken.store(true, Ordering::SeqCst);
    let broken = stream(&d, &[("X-Firn-Start", "boot")], json!({})).await;
    broken.expect(500, "ServiceException");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_refused_by_status() {
    let (_dir, d) = daemon().await;
    stream(&d, &[], json!({})).await.expect(404, "ResourceNotFoundException");
    d.create("f", json!({})).await;
    let invocation = |kind| [("X-Amz-Invocation-Type", kind)];
    assert_eq!(stream(&d, &invocation("DryRun"), json!({})).await.status, 204);
    let event = stream(&d, &invocation("Event"), json!({})).await;
    let message = event.expect(400, "ValidationException");
    assert!(message.contains("[RequestResponse, DryRun]"), "{message}");
    let bad = d.call("POST", PATH, &[], b"{not json").await;
    bad.expect(400, "InvalidRequestContentException");
    let large = d.call("POST", PATH, &[], &vec![b' '; 6_291_457]).await;
    large.expect(413, "RequestTooLargeException");
    let cold = stream(&d, &[("X-Firn-Start", "reset")], json!({})).await;
    cold.expect(409, "ResourceConflictException");

    let mut busy = Vec::new();
    for _ in 0..8 {
        let mut client = send(&d, json!({"do": "stream", "chunks": ["x"], "ms": 10_000})).await;
        client.read_exact(&mut [0; 10]).await.unwrap();
        busy.push(client);
    }
    stream(&d, &[], json!({})).await.expect(429, "TooManyRequestsException");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_bytes_arrive_before_the_function_ends() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let event = json!({"do": "stream", "chunks": ["first", "second"], "ms": 2000});
    let mut client = send(&d, event).await;
    let mut text = Vec::new();
    while !text.windows(5).any(|w| w == b"first") {
        assert_ne!(client.read_buf(&mut text).await.unwrap(), 0);
    }
    assert_eq!(streamed(&d), 0, "the function still runs");
    assert!(!text.windows(6).any(|w| w == b"second"));
    while !text.ends_with(b"0\r\n\r\n") {
        assert_ne!(client.read_buf(&mut text).await.unwrap(), 0);
    }
    assert!(text.windows(6).any(|w| w == b"second"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_holds_the_function_up_and_one_that_leaves_does_not() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    // Far more than sockets and buffers hold.
    let long = json!({"do": "stream", "chunks": ["x".repeat(65_536)], "times": 1000});
    let mut client = send(&d, long.clone()).await;
    let mut head = [0; 100];
    client.read_exact(&mut head).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(streamed(&d), 0, "it waits for the client");
    assert_eq!(d.count(|c| &c.paused), 0, "so does all that comes behind the response");
    let mut rest = Vec::new();
    while !rest.ends_with(b"0\r\n\r\n") {
        assert_ne!(client.read_buf(&mut rest).await.unwrap(), 0);
    }
    assert!(rest.len() > 65_536_000);
    assert_eq!(streamed(&d), 1);

    let mut client = send(&d, long).await;
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(streamed(&d), 1);
    drop(client);
    until("it runs to its end", || streamed(&d) == 2).await;
    until("its instance is idle", || d.count(|c| &c.paused) == 2).await;
    let next = d.invoke("f", &[("X-Firn-Start", "warm")], &json!({})).await;
    assert_eq!(next.status, 200);
}
