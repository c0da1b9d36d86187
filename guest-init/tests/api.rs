//! The Runtime API as a socket sees it: the test is the runtime.

mod guest;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use firn_proto::guest::{Begin, Chunk, FromGuest, FunctionError, MAX_PAYLOAD, Outcome, ToGuest};
use guest::{Client, error, invocation, reported, started};

#[test]
fn an_event_has_all_headers_and_empty_ones_are_left_out() {
    let (mut guest, _, mut client) = started();
    guest.send(&invocation("r1", 5000, "[1]"));
    let (head, body) = client.answer();
    assert_eq!(body, "[1]");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    for field in [
        "Content-Type: application/json\r\n",
        "Lambda-Runtime-Aws-Request-Id: r1\r\n",
        "Lambda-Runtime-Invoked-Function-Arn: arn:aws:lambda:us-east-1:000000000000:function:hello\r\n",
        "Lambda-Runtime-Trace-Id: Root=",
        "Lambda-Runtime-Client-Context: {\"client\": {\"app_title\": \"Bäckerei\"}",
        "Lambda-Runtime-Cognito-Identity: {",
        "Lambda-Runtime-Deadline-Ms: 1",
    ] {
        assert!(head.contains(field), "{field:?} in {head:?}");
    }
    assert_eq!(client.call("POST", "invocation/r1/response", "", "[2]").0, 202);
    guest.done("r1");

    let ToGuest::Invoke(mut plain) = invocation("r2", 5000, "{}") else { panic!() };
    plain.trace_id = String::new();
    plain.client_context = String::new();
    plain.cognito_identity = String::new();
    guest.send(&ToGuest::Invoke(plain));
    client.send("GET", "invocation/next", "", "");
    let (head, _) = client.answer();
    for name in ["Trace-Id", "Client-Context", "Cognito"] {
        assert!(!head.contains(name), "{head}");
    }
}

#[test]
fn mistakes_are_named_and_cost_nothing() {
    let (mut guest, address, mut client) = started();
    let mut other = Client::connect(&address);
    let document = |kind: &str| format!("\"errorType\":\"{kind}\"");
    for (method, path, status, kind) in [
        ("GET", "nothing", 404, "NotFound"),
        ("POST", "invocation/next", 405, "MethodNotAllowed"),
        ("GET", "invocation/next", 403, "InvalidStateTransition"),
        ("GET", "restore/next", 403, "InvalidStateTransition"),
        ("POST", "restore/error", 403, "InvalidStateTransition"),
        ("POST", "init/error", 403, "InvalidStateTransition"),
        ("POST", "invocation/r1/response", 400, "InvalidRequestID"),
        ("POST", "invocation/r1/error", 400, "InvalidRequestID"),
    ] {
        let (found, body) = other.call(method, path, "", "{}");
        assert_eq!(found, status, "{method} {path}");
        assert!(body.contains(&document(kind)) && body.contains("\"errorMessage\":\""), "{body}");
    }
    guest.send(&invocation("r1", 5000, "{}"));
    client.answer();
    let mode = "Lambda-Runtime-Function-Response-Mode: buffered\r\n";
    let (status, body) = client.call("POST", "invocation/r1/response", mode, "{}");
    assert!(status == 400 && body.contains("InvalidFunctionResponseMode"), "{body}");
    assert_eq!(client.call("GET", "invocation/next", "", "").0, 403);
    // Any connection may answer.
    let (status, body) = other.call("POST", "invocation/r1/response", "", "{}");
    assert_eq!((status, body.trim()), (202, "{\"status\":\"OK\"}"));
    assert_eq!(client.call("POST", "invocation/r1/response", "", "{}").0, 403);
    guest.done("r1");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let (mut guest, _, mut client) = started();
    guest.send(&invocation("r1", 5000, "1"));
    client.answer();
    client.send("POST", "invocation/r1/response", "", "10");
    client.send("GET", "invocation/next", "", "");
    client.send("GET", "invocation/next", "", "");
    assert!(client.answer().0.contains(" 202 "));
    guest.done("r1");
    guest.send(&invocation("r2", 5000, "2"));
    assert_eq!(client.answer().1, "2");
    assert!(client.answer().0.contains(" 403 "));
}

/// The head of a streamed response to the event `id`.
fn streaming(id: &str) -> String {
    format!(
        "POST /2018-06-01/runtime/invocation/{id}/response HTTP/1.1\r\n\
         Lambda-Runtime-Function-Response-Mode: streaming\r\n\
         Transfer-Encoding: chunked\r\nContent-Type: text/x\r\n\
         Trailer: Lambda-Runtime-Function-Error-Type\r\n\r\n"
    )
}

#[test]
fn a_streamed_response_is_passed_on_as_it_comes() {
    let (mut guest, _, mut client) = started();
    guest.send(&invocation("r1", 5000, "{}"));
    client.answer();
    client.stream.write_all(streaming("r1").as_bytes()).unwrap();
    let begin = Begin { content_type: "text/x".to_owned() };
    assert_eq!(guest.answer(), FromGuest::Begin(begin));
    for text in ["abc", "de"] {
        client.stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).unwrap();
        let chunk = Chunk { payload: text.into() };
        assert_eq!(guest.answer(), FromGuest::Chunk(chunk), "before the next is written");
    }
    client.stream.write_all(b"0\r\n\r\n").unwrap();
    assert!(client.answer().0.contains(" 202 "));
    assert_eq!(guest.done("r1").outcome, Outcome::Streamed);

    // All at once, and an error behind it.
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r2", 5000, "{}"));
    client.answer();
    let tail = "3\r\nabc\r\n0\r\nLambda-Runtime-Function-Error-Type: Function.Torn\r\n\
                Lambda-Runtime-Function-Error-Body: eyJhIjoxfQ==\r\n\r\n";
    client.stream.write_all((streaming("r2") + tail).as_bytes()).unwrap();
    assert!(client.answer().0.contains(" 202 "));
    let torn = FunctionError::Reported {
        error_type: "Function.Torn".to_owned(),
        payload: b"{\"a\":1}".to_vec(),
    };
    let (content_type, bytes, done) = guest.streamed("r2");
    assert_eq!((content_type.as_str(), &bytes[..]), ("text/x", &b"abc"[..]));
    assert_eq!(*error(&done), torn);

    // Nothing at all is a response, too.
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r3", 5000, "{}"));
    client.answer();
    client.stream.write_all((streaming("r3") + "0\r\n\r\n").as_bytes()).unwrap();
    assert!(client.answer().0.contains(" 202 "));
    let (_, bytes, done) = guest.streamed("r3");
    assert_eq!((bytes, done.outcome), (Vec::new(), Outcome::Streamed));
}

#[test]
fn a_stream_that_breaks_off_is_no_response() {
    let (mut guest, address, mut client) = started();
    guest.send(&invocation("r1", 30_000, "{}"));
    client.answer();
    // The runtime goes on as if nothing had happened.
    let mut other = Client::connect(&address);
    other.stream.write_all((streaming("r1") + "3\r\nabc\r\n").as_bytes()).unwrap();
    assert!(matches!(guest.answer(), FromGuest::Begin(_)));
    assert!(matches!(guest.answer(), FromGuest::Chunk(_)));
    assert_eq!(client.call("GET", "invocation/next", "", "").0, 403, "it still streams");
    drop(other);
    loop {
        let mut other = Client::connect(&address);
        if other.call("POST", "invocation/r1/response", "", "").1.contains("broke off") {
            break;
        }
    }
    client.send("GET", "invocation/next", "", "");
    let done = guest.done("r1");
    assert_eq!(reported(error(&done)).0, "Runtime.TruncatedResponse");

    // It says why.
    guest.send(&invocation("r2", 30_000, "{}"));
    client.answer();
    let mut other = Client::connect(&address);
    let bad = streaming("r2") + "3\r\nabc\r\nnonsense\r\n";
    other.stream.write_all(bad.as_bytes()).unwrap();
    assert!(other.answer().0.contains(" 400 "));
    assert!(matches!(guest.answer(), FromGuest::Begin(_)));
    let (status, _) = client.call("POST", "invocation/r2/error", "", "{\"why\": 1}");
    assert_eq!(status, 202);
    let payload = b"{\"why\": 1}".to_vec();
    let why = FunctionError::Reported { error_type: String::new(), payload };
    assert_eq!(*error(&guest.done("r2")), why);
}

#[test]
fn the_end_of_a_stream_comes_before_what_was_asked_behind_it() {
    let (mut guest, address, mut client) = started();
    for (end, whole) in [("0\r\n\r\n", true), ("", false), ("4", false)] {
        guest.send(&invocation("r1", 30_000, "{}"));
        client.answer();
        guest.while_stopped(|| {
            let mut other = Client::connect(&address);
            let text = streaming("r1") + "3\r\nabc\r\n" + end;
            other.stream.write_all(text.as_bytes()).unwrap();
            drop(other);
            client.send("GET", "invocation/next", "", "");
        });
        let (_, bytes, done) = guest.streamed("r1");
        assert_eq!(bytes, b"abc");
        match whole {
            true => assert_eq!(done.outcome, Outcome::Streamed),
            false => assert_eq!(reported(error(&done)).0, "Runtime.TruncatedResponse"),
        }
    }
}

#[test]
fn a_stream_that_is_not_wanted_is_thrown_away_and_then_refused() {
    let (mut guest, address, mut client) = started();
    guest.send(&invocation("r1", 30_000, "{}"));
    client.answer();
    let mut other = Client::connect(&address);
    assert_eq!(other.call("GET", "nothing", "", "").0, 404, "it is known before the next");
    other.stream.write_all((streaming("r7") + "3\r\nabc\r\n").as_bytes()).unwrap();
    // The event is answered meanwhile, and what comes later is still nobody's answer.
    assert_eq!(client.call("POST", "invocation/r1/response", "", "{}").0, 202);
    guest.done("r1");
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r7", 30_000, "{}"));
    client.answer();
    other.stream.write_all(b"3\r\nabc\r\n0\r\n\r\n").unwrap();
    assert!(other.answer().0.contains(" 400 "));
    assert_eq!(other.call("POST", "invocation/r7/response", "", "{}").0, 202);
    assert_eq!(
        guest.done("r7").outcome,
        Outcome::Response { payload: b"{}".to_vec(), content_type: String::new() }
    );
}

#[test]
fn an_endless_stream_is_cut_and_costs_no_memory() {
    let (mut guest, _, mut client) = started();
    guest.send(&invocation("r1", 60_000, "{}"));
    client.answer();
    let chunk = [b"100000\r\n", "x".repeat(1 << 20).as_bytes(), b"\r\n"].concat();
    let mut writer = client.stream.try_clone().unwrap();
    let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(streaming("r1").as_bytes()).unwrap();
        for _ in 0..208 {
            writer.write_all(&chunk).unwrap();
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
        writer.write_all(b"0\r\n\r\n").unwrap();
    });
    // Nobody reads: the function has to wait.
    std::thread::sleep(Duration::from_millis(500));
    assert!(sent.load(std::sync::atomic::Ordering::SeqCst) < 32);
    let (_, bytes, done) = guest.streamed("r1");
    assert!((199 << 20..=200 << 20).contains(&bytes.len()), "{}", bytes.len());
    let FunctionError::ResponseTooLarge { size } = *error(&done) else { panic!("{done:?}") };
    assert!((200 << 20..201 << 20).contains(&size), "{size}");
    writing.join().unwrap();
    assert!(client.answer().0.contains(" 413 "));
    let (_, most) = guest.memory();
    assert!(most < MAX_PAYLOAD as u64, "{most} bytes");
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r2", 5000, "2"));
    assert_eq!(client.answer().1, "2");
}

#[test]
fn time_passes_while_nobody_reads() {
    let (mut guest, _, mut client) = started();
    guest.send(&invocation("r1", 500, "{}"));
    client.answer();
    let mut writer = client.stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let chunk = [b"100000\r\n", "x".repeat(1 << 20).as_bytes(), b"\r\n"].concat();
        let _ = writer.write_all(streaming("r1").as_bytes());
        while writer.write_all(&chunk).is_ok() {}
    });
    // The runtime is killed, and its end of the connection with it.
    writing.join().unwrap();
    let (_, bytes, done) = guest.streamed("r1");
    assert!(!bytes.is_empty());
    assert_eq!(*error(&done), FunctionError::TimedOut { limit_ms: 500 });
}

#[test]
fn an_endless_answer_is_counted_not_kept() {
    let (mut guest, _, mut client) = started();
    guest.send(&invocation("r1", 30_000, "{}"));
    client.answer();
    let head = "POST /2018-06-01/runtime/invocation/r1/response HTTP/1.1\r\n\
                Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n";
    client.stream.write_all(head.as_bytes()).unwrap();
    assert!(client.answer().0.contains(" 100 "));
    let chunk = [b"100000\r\n", "x".repeat(1 << 20).as_bytes(), b"\r\n"].concat();
    for _ in 0..64 {
        client.stream.write_all(&chunk).unwrap();
    }
    client.stream.write_all(b"0\r\n\r\n").unwrap();
    assert!(client.answer().0.contains(" 413 "));
    let size = 64 << 20;
    assert_eq!(*error(&guest.done("r1")), FunctionError::ResponseTooLarge { size });
    let (_, most) = guest.memory();
    assert!(most < 3 * MAX_PAYLOAD as u64, "{most} bytes");
    // The connection is as good as before.
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r2", 5000, "2"));
    assert_eq!(client.answer().1, "2");
}

#[test]
fn a_client_that_went_away_gets_no_event() {
    let (mut guest, address, client) = started();
    drop(client);
    let mut client = Client::connect(&address);
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r1", 5000, "1"));
    assert_eq!(client.answer().1, "1");
}

#[test]
fn nonsense_ends_only_its_connection() {
    let (mut guest, address, mut client) = started();
    for text in ["nonsense\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "\0\r\n\r\n"]
    {
        let mut other = Client::connect(&address);
        other.stream.write_all(text.as_bytes()).unwrap();
        let (head, _) = other.answer();
        assert!(head.contains(" 400 ") && head.contains("Connection: close"), "{head}");
        assert_eq!(other.stream.read(&mut [0]).unwrap_or(0), 0);
    }
    // More connections than there is room for.
    let crowd: Vec<_> = (0..200).filter_map(|_| TcpStream::connect(&address).ok()).collect();
    guest.send(&invocation("r1", 5000, "1"));
    assert_eq!(client.answer().1, "1");
    drop(crowd);
    assert_eq!(client.call("POST", "invocation/r1/response", "", "{}").0, 202);
    guest.done("r1");
}
