//! What a function asks of the host's services and tells its tracer: the test is the function and the host.

mod guest;

use std::{net::UdpSocket, thread, time::Duration};

use firn_proto::guest::{
    Answer, Ask, Call, FromGuest, MAX_CALL, MAX_CALLS, MAX_SEGMENTS, Outcome, ToGuest,
};
use guest::{BOOTSTRAP, Client, Function, Guest, invocation, renew, started};

const ANSWERED: (&str, &str, &str) = ("POST", "invocation/r1/response", "{}");

/// The function answers its event.
fn respond(client: &mut Client) {
    let (method, path, body) = ANSWERED;
    assert_eq!(client.call(method, path, "", body).0, 202);
}

#[test]
fn a_call_reaches_the_host_and_its_answer_the_function() {
    let (mut guest, address, mut client) = started();
    assert_eq!(guest.variable("AWS_ENDPOINT_URL_KMS"), format!("http://{address}"));
    let mut other = Client::connect(&address);
    // Before there is an order that it could belong to.
    other.send("POST", "/?x=y", "X-Amz-Target: t\r\n", "{}");
    thread::sleep(Duration::from_millis(50));
    guest.send(&invocation("r1", 5000, "[1]"));
    client.answer();
    let Call { id, ask: Ask::Request(request) } = guest.call() else { panic!() };
    assert_eq!((&*request.method, &*request.target, &*request.body), ("POST", "/?x=y", &b"{}"[..]));
    let field = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(request.fields, [field("Host", "h"), field("X-Amz-Target", "t")]);
    guest.reply(id, 418, "tea");
    let (head, body) = other.answer();
    assert!(head.starts_with("HTTP/1.1 418 ") && head.contains("X-Its: own\r\n"), "{head}");
    assert_eq!(body, "tea");
    // The same connection again, and one that is too long.
    other.send("GET", "/", "", "");
    let call = guest.call();
    guest.reply(call.id, 200, "");
    assert_eq!(other.answer().1, "");
    assert_eq!(other.call("POST", "/", "", &"x".repeat(MAX_CALL + 1)).0, 413);
    respond(&mut client);
    guest.done("r1");
}

#[test]
fn a_call_for_credentials_needs_the_token() {
    let (mut guest, address, mut client) = started();
    guest.send(&invocation("r1", 5000, "{}"));
    client.answer();
    let uri = guest.variable("AWS_CONTAINER_CREDENTIALS_FULL_URI");
    let path = uri.strip_prefix(&format!("http://{address}")).unwrap().to_owned();
    let mut other = Client::connect(&address);
    assert_eq!(other.call("GET", &path, "Authorization: guess\r\n", "").0, 403);
    let token = guest.variable("AWS_CONTAINER_AUTHORIZATION_TOKEN");
    other.send("GET", &path, &format!("Authorization: {token}\r\n"), "");
    let call = guest.call();
    assert_eq!(call.ask, Ask::Credentials);
    guest.reply(call.id, 200, "secret");
    assert_eq!(other.answer().1, "secret");
    respond(&mut client);
    guest.done("r1");
}

#[test]
fn an_event_ends_after_its_calls_and_none_comes_behind_it() {
    let (mut guest, address, mut client) = started();
    guest.send(&invocation("r1", 5000, "{}"));
    client.answer();
    let mut others: Vec<Client> = (0..=MAX_CALLS).map(|_| Client::connect(&address)).collect();
    for other in &mut others {
        other.send("GET", "/", "", "");
    }
    let mut open: Vec<u64> = (0..MAX_CALLS).map(|_| guest.call().id).collect();
    // There is room for another one when one is answered.
    guest.reply(open.remove(0), 200, "");
    open.push(guest.call().id);
    client.send(ANSWERED.0, ANSWERED.1, "", ANSWERED.2);
    assert_eq!(guest.answer(), FromGuest::Abandon);
    // One that was asked for too late waits for the next event.
    let mut late = Client::connect(&address);
    late.send("GET", "/late", "", "");
    // The host may have sent the next order before it knew.
    guest.send(&invocation("r2", 5000, "{}"));
    for id in open {
        guest.send(&ToGuest::Answer(Answer { id, reply: None }));
    }
    guest.done("r1");
    client.answer();
    client.send("GET", "invocation/next", "", "");
    let Call { id, ask: Ask::Request(request) } = guest.call() else { panic!() };
    assert_eq!(request.target, "/late");
    guest.reply(id, 200, "at last");
    assert_eq!(late.answer().1, "at last");
    let statuses: Vec<String> = others.iter_mut().map(|o| o.answer().0[9..12].to_owned()).collect();
    assert_eq!(statuses.iter().filter(|status| *status == "503").count(), MAX_CALLS);
    client.answer();
    assert_eq!(client.call("POST", "invocation/r2/response", "", "{}").0, 202);
    guest.done("r2");
}

#[test]
fn a_call_that_nobody_waits_for_any_more_disturbs_nobody() {
    let (mut guest, address, mut client) = started();
    guest.send(&invocation("r1", 200, "{}"));
    client.answer();
    let mut other = Client::connect(&address);
    other.send("GET", "/", "", "");
    let call = guest.call();
    // The runtime is killed with its connections; another one is started for the next event.
    assert_eq!(guest.answer(), FromGuest::Abandon);
    // An answer that was on its way already.
    guest.reply(call.id, 200, "");
    assert!(matches!(guest.done("r1").outcome, Outcome::Error(_)));
    std::fs::remove_file(guest.task().join("env")).unwrap();
    guest.send(&invocation("r2", 5000, "{}"));
    let mut client = Client::connect(&guest.variable("AWS_LAMBDA_RUNTIME_API"));
    client.send("GET", "invocation/next", "", "");
    client.answer();
    guest.send(&ToGuest::Answer(Answer { id: call.id, reply: None }));
    assert_eq!(client.call("POST", "invocation/r2/response", "", "{}").0, 202);
    guest.done("r2");
}

#[test]
fn restore_hooks_and_initialisation_may_call_while_an_event_waits() {
    let mut guest = Guest::with_bootstrap(BOOTSTRAP);
    let function = Function { handler: "", code: "", init_timeout_ms: 30_000, snapshot: true };
    guest.send_load(&function);
    let address = guest.variable("AWS_LAMBDA_RUNTIME_API");
    let mut other = Client::connect(&address);
    other.send("GET", "/init", "", "");
    let call = guest.call();
    guest.reply(call.id, 200, "");
    other.answer();
    let mut client = Client::connect(&address);
    client.send("GET", "restore/next", "", "");
    assert_eq!(guest.loaded().error, None);
    // Parked over a snapshot.
    other.send("GET", "/hook", "", "");
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    guest.send(&renew());
    guest.send(&invocation("r1", 5000, "{}"));
    client.answer();
    let call = guest.call();
    guest.reply(call.id, 200, "hook");
    assert_eq!(other.answer().1, "hook");
    client.send("GET", "invocation/next", "", "");
    assert_eq!(guest.renewed().error, None);
    client.answer();
    respond(&mut client);
    guest.done("r1");
}

#[test]
fn segments_of_traced_events_come_before_the_answer() {
    let (mut guest, _, mut client) = started();
    let tracer = UdpSocket::bind("127.0.0.1:0").unwrap();
    tracer.connect(guest.variable("AWS_XRAY_DAEMON_ADDRESS")).unwrap();
    tracer.send(b"before").unwrap();
    guest.send(&invocation("r1", 5000, "{}"));
    client.answer();
    tracer.send(b"one").unwrap();
    let segment = |guest: &mut Guest| match guest.answer() {
        FromGuest::Segment(segment) => segment.document,
        other => panic!("{other:?}"),
    };
    assert_eq!(segment(&mut guest), b"one");
    let mut bytes = 3;
    guest.while_stopped(|| {
        tracer.send(b"two").unwrap();
        client.send(ANSWERED.0, ANSWERED.1, "", ANSWERED.2);
    });
    bytes += segment(&mut guest).len();
    assert_eq!(bytes, 6);
    guest.done("r1");
    client.answer();
    client.send("GET", "invocation/next", "", "");
    let ToGuest::Invoke(mut plain) = invocation("r2", 5000, "{}") else { panic!() };
    plain.trace_id = "Root=1-2-3;Sampled=0".into();
    guest.send(&ToGuest::Invoke(plain));
    client.answer();
    tracer.send(b"unsampled").unwrap();
    assert_eq!(client.call("POST", "invocation/r2/response", "", "{}").0, 202);
    guest.done("r2");
    client.send("GET", "invocation/next", "", "");
    guest.send(&invocation("r3", 5000, "{}"));
    client.answer();
    // A flood ends at the limit.
    let mut bytes = 0;
    for _ in 0..8 {
        tracer.send(&[b'x'; 50_000]).unwrap();
        if bytes + 50_000 <= MAX_SEGMENTS {
            bytes += segment(&mut guest).len();
        }
    }
    assert_eq!(bytes, 250_000);
    assert_eq!(client.call("POST", "invocation/r3/response", "", "{}").0, 202);
    guest.done("r3");
}
