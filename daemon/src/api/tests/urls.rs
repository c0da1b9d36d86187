//! Function URLs: their configurations, and requests to them.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    Answer, Daemon, FUNCTIONS, daemon,
    identity::{ADMIN, BOB, guarded},
    limits, start,
    streaming::whole,
};
use crate::identity::sigv4::tests::sign;

const URL: &str = "/2021-10-31/functions/f/url";

/// The host of the URL in an answer.
fn host(answer: &Value) -> String {
    let url = answer["FunctionUrl"].as_str().unwrap();
    url.strip_prefix("http://").unwrap().strip_suffix('/').unwrap().to_owned()
}

/// A function, a URL of it with these settings, and its host.
async fn with_url(settings: Value) -> (tempfile::TempDir, Daemon, String) {
    let (dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.snapshot_is("f", "ready").await;
    let created = d.send("POST", URL, &settings).await;
    assert_eq!(created.status, 201, "{}", String::from_utf8_lossy(&created.body));
    let host = host(&created.json());
    (dir, d, host)
}

impl Daemon {
    /// A request to a host.
    async fn request(
        &self,
        host: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let length = body.len();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n"
        );
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        Answer::parse(&answer)
    }
}

/// A text body that makes the fake function do something: its event is what the URL makes of it.
async fn act(d: &Daemon, host: &str, action: &Value) -> Answer {
    // The fake looks for its orders in the body, too.
    let headers = [("Content-Type", "application/json")];
    d.request(host, "POST", "/", &headers, action.to_string().as_bytes()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn configurations_are_made_shown_changed_and_gone() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    d.send("GET", URL, &json!({})).await.expect(404, "ResourceNotFoundException");
    let cors = json!({"AllowOrigins": ["https://a.example"], "MaxAge": 5, "AllowMethods": ["*"]});
    let settings = json!({"AuthType": "NONE", "Cors": cors});
    let created = d.send("POST", URL, &settings).await;
    assert_eq!(created.status, 201);
    let created = created.json();
    let url = created["FunctionUrl"].as_str().unwrap();
    let port = d.address.port();
    assert!(url.ends_with(&format!(".lambda-url.us-east-1.localhost:{port}/")), "{url}");
    assert!((40..=100).contains(&url.len()));
    assert_eq!(created["FunctionArn"], "arn:aws:lambda:us-east-1:000000000000:function:f");
    assert_eq!(
        (&created["AuthType"], &created["InvokeMode"]),
        (&json!("NONE"), &json!("BUFFERED"))
    );
    assert_eq!(created["Cors"], cors);
    let again = d.send("POST", URL, &settings).await;
    let again = again.expect(409, "ResourceConflictException");
    assert!(again.contains("FunctionUrlConfig exists for this Lambda function"), "{again}");
    assert_eq!(d.get(URL).await.json(), created);

    let changed = json!({"AuthType": "AWS_IAM", "InvokeMode": "RESPONSE_STREAM"});
    let changed = d.send("PUT", URL, &changed).await.json();
    assert_eq!((&changed["FunctionUrl"], &changed["Cors"]), (&created["FunctionUrl"], &cors));
    assert_eq!(changed["InvokeMode"], "RESPONSE_STREAM");
    let cleared = d.send("PUT", URL, &json!({"Cors": {}})).await.json();
    assert!(cleared.get("Cors").is_none() && cleared["AuthType"] == "AWS_IAM", "{cleared}");

    // An alias has its own, which goes with it.
    d.send("POST", &format!("{FUNCTIONS}/f/versions"), &json!({})).await;
    let alias = json!({"Name": "live", "FunctionVersion": "1"});
    d.send("POST", &format!("{FUNCTIONS}/f/aliases"), &alias).await;
    let live = format!("{URL}?Qualifier=live");
    let own = d.send("POST", &live, &json!({"AuthType": "NONE"})).await.json();
    assert!(own["FunctionArn"].as_str().unwrap().ends_with(":function:f:live"));
    assert_ne!(own["FunctionUrl"], created["FunctionUrl"]);
    let first = d.get("/2021-10-31/functions/f/urls?MaxItems=1").await.json();
    assert_eq!(first["FunctionUrlConfigs"][0]["FunctionUrl"], created["FunctionUrl"]);
    let marker = first["NextMarker"].as_str().unwrap();
    let second = d.get(&format!("/2021-10-31/functions/f/urls?Marker={marker}")).await.json();
    assert_eq!(second["FunctionUrlConfigs"][0], own);
    assert_eq!(second["NextMarker"], Value::Null);
    d.call("DELETE", &format!("{FUNCTIONS}/f/aliases/live"), &[], b"").await;
    d.get(&live).await.expect(404, "ResourceNotFoundException");
    let answer = d.request(&host(&own), "GET", "/", &[], b"").await;
    assert_eq!((answer.status, answer.json()), (403, json!({"Message": "Forbidden"})));

    assert_eq!(d.call("DELETE", URL, &[], b"").await.status, 204);
    d.call("DELETE", URL, &[], b"").await.expect(404, "ResourceNotFoundException");
    assert_eq!(d.request(&host(&created), "GET", "/", &[], b"").await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_configurations_are_refused_by_name() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    let long = "x".repeat(1025);
    for (settings, member) in [
        (json!({}), "authType"),
        (json!({"AuthType": "ALL"}), "authType"),
        (json!({"AuthType": "NONE", "InvokeMode": "FAST"}), "invokeMode"),
        (json!({"AuthType": "NONE", "Cors": {"MaxAge": 86_401}}), "cors.maxAge"),
        (json!({"AuthType": "NONE", "Cors": {"AllowMethods": ["OPTIONS"]}}), "cors.allowMethods"),
        (json!({"AuthType": "NONE", "Cors": {"AllowHeaders": [long]}}), "cors.allowHeaders"),
        (json!({"AuthType": "NONE", "Cors": {"ExposeHeaders": ["a\r\nb"]}}), "cors.exposeHeaders"),
        (
            json!({"AuthType": "NONE", "Cors": {"AllowOrigins": vec!["a"; 101]}}),
            "cors.allowOrigins",
        ),
        (json!({"AuthType": "NONE", "Cors": {"AllowOrigins": [""]}}), "cors.allowOrigins"),
    ] {
        let refused = d.send("POST", URL, &settings).await.expect(400, "ValidationException");
        assert!(refused.contains(member), "{refused}");
    }
    let version = format!("{URL}?Qualifier=1");
    let none = json!({"AuthType": "NONE"});
    d.send("POST", &version, &none).await.expect(400, "ValidationException");
    let alias = format!("{URL}?Qualifier=nobody");
    d.send("POST", &alias, &none).await.expect(404, "ResourceNotFoundException");
    d.send("PUT", URL, &none).await.expect(404, "ResourceNotFoundException");
    let other = "/2021-10-31/functions/g/url";
    d.send("POST", other, &none).await.expect(404, "ResourceNotFoundException");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_becomes_an_event_and_the_answer_a_response() {
    let (_dir, d, host) = with_url(json!({"AuthType": "NONE"})).await;
    // The fake answers with its event: an object without a status code.
    let headers =
        [("Content-Type", "text/plain"), ("Cookie", "a=1"), ("Origin", "https://x.example")];
    let answer = d.request(&host, "PUT", "/some/path?q=1", &headers, b"hi").await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    assert_eq!(answer.header("access-control-allow-origin"), None);
    let event = answer.json();
    assert_eq!(event["rawPath"], "/some/path");
    assert_eq!(event["body"], "hi");
    assert_eq!(event["cookies"], json!(["a=1"]));
    assert_eq!(event["requestContext"]["http"]["sourceIp"], "127.0.0.1");
    assert_eq!(event["requestContext"]["requestId"], answer.header("x-amzn-requestid").unwrap());
    let id = host.split('.').next().unwrap();
    assert_eq!(event["requestContext"]["apiId"], id);
    assert_eq!(event["headers"]["host"], host.as_str());

    let said = json!({"statusCode": 418, "headers": {"X-A": "b"}, "body": "short and stout"});
    let answer = act(&d, &host, &json!({"do": "say", "what": said})).await;
    assert_eq!((answer.status, answer.header("x-a")), (418, Some("b")));
    assert_eq!(answer.body, b"short and stout");
    for failure in ["raise", "exit", "timeout", "large", "die"] {
        let answer = act(&d, &host, &json!({"do": failure})).await;
        assert_eq!((answer.status, &answer.body[..]), (502, &b"Internal Server Error"[..]));
    }
    let answer = d.request(&host, "POST", "/", &[], &vec![b' '; 6_291_457]).await;
    assert_eq!(answer.status, 413);
    // As an event it would be too long.
    let answer = d.request(&host, "POST", "/", &[], &vec![b' '; 5_000_000]).await;
    assert_eq!(answer.status, 413);
    // Paths of the API mean nothing here, and other hosts are the API's.
    let answer = d.request(&host, "GET", FUNCTIONS, &[], b"").await;
    assert_eq!(answer.json()["rawPath"], FUNCTIONS);
    let unknown = host.replacen(id, "0123456789abcdef0123456789abcdef", 1);
    let answer = d.request(&unknown, "GET", "/", &[], b"").await;
    assert_eq!((answer.status, answer.json()), (403, json!({"Message": "Forbidden"})));
    let answer = d.request("example.org", "GET", FUNCTIONS, &[], b"").await;
    assert!(answer.json()["Functions"].is_array());
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_from_elsewhere_may_what_the_configuration_says() {
    let cors = json!({"AllowOrigins": ["https://a.example"], "AllowMethods": ["GET"]});
    let (_dir, d, host) = with_url(json!({"AuthType": "NONE", "Cors": cors})).await;
    let asks = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "GET")];
    let preflight = d.request(&host, "OPTIONS", "/", &asks, b"").await;
    assert_eq!((preflight.status, preflight.body.len()), (200, 0));
    assert_eq!(preflight.header("access-control-allow-methods"), Some("GET"));
    for (origin, told) in
        [("https://a.example", Some("https://a.example")), ("https://b.example", None)]
    {
        let answer = d.request(&host, "GET", "/", &[("Origin", origin)], b"").await;
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, told));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_development_mode_any_signature_will_do_but_not_none() {
    let (_dir, d, host) = with_url(json!({"AuthType": "AWS_IAM"})).await;
    let answer = d.request(&host, "GET", "/", &[], b"").await;
    assert_eq!(answer.status, 403);
    let signed = sign("GET", "/", &[("host", &host)], b"", ("AKIDNOBODY0000000000", "x"));
    let signed: Vec<_> = signed.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let signed: Vec<_> = signed.into_iter().filter(|(name, _)| *name != "host").collect();
    assert_eq!(d.request(&host, "GET", "/", &signed, b"").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_recorded_where_invocations_are() {
    let (dir, mut d) = guarded().await;
    d.stop.take().unwrap().send(()).unwrap();
    std::fs::write(dir.path().join("data-events"), "").unwrap();
    let d = start(dir.path(), limits(), 0).await;
    let function = super::identity::function("bob-f", "r");
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function).await.status, 201);
    let url = URL.replace("/f/", "/bob-f/");
    let iam = json!({"AuthType": "AWS_IAM"}).to_string().into_bytes();
    let host = host(&d.signed(ADMIN, "POST", &url, &iam).await.json());
    let path = "/planted?Marker=planted";
    let mut ids = Vec::new();
    for (who, status) in
        [(Some(ADMIN), 200), (Some(BOB), 403), (Some((BOB.0, "wrong")), 403), (None, 403)]
    {
        let headers = who.map(|who| sign("POST", path, &[("host", &host)], b"\"planted\"", who));
        let headers = headers.unwrap_or_default();
        let headers = headers.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        let headers: Vec<_> = headers.filter(|(name, _)| *name != "host").collect();
        let answer = d.request(&host, "POST", path, &headers, b"\"planted\"").await;
        assert_eq!(answer.status, status, "{who:?}");
        ids.push(answer.header("x-amzn-requestid").unwrap().to_owned());
    }
    // Who asks a host that is nobody's invokes nothing.
    d.request(&host.replacen(|_| true, "x", 1), "POST", path, &[], b"").await;
    d.app.callers.audit.close().await;
    let (records, _) = crate::audit::tests::records(&dir.path().join("audit"));
    assert!(!json!(records).to_string().contains("planted"), "{records:?}");
    let calls: Vec<_> =
        records.into_iter().filter(|r| r["eventName"] == "InvokeFunctionUrl").collect();
    let said = |name: &str| -> Vec<Value> { calls.iter().map(|r| r[name].clone()).collect() };
    assert_eq!(said("requestID"), ids);
    for call in &calls {
        assert_eq!(
            (&call["eventCategory"], &call["managementEvent"]),
            (&json!("Data"), &json!(false))
        );
        assert_eq!(call["resources"][0]["ARN"], super::events::arn("bob-f"));
    }
    assert_eq!(said("errorCode")[..2], [Value::Null, json!("AccessDenied")]);
    assert_eq!(said("errorCode")[2], "InvalidSignatureException");
    assert_eq!(calls[0]["userIdentity"]["arn"], "arn:aws:iam::000000000000:user/admin");
    assert_eq!(calls[1]["userIdentity"]["arn"], "arn:aws:iam::000000000000:user/bob");
    assert_eq!(calls[2]["userIdentity"], json!({"type": "Unknown"}));
    assert_eq!(calls[2]["additionalEventData"]["claimedAccessKeyId"], BOB.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_identities_policies_say_who_may_call() {
    let (_dir, d) = guarded().await;
    let function = super::identity::function("bob-f", "r");
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function).await.status, 201);
    let url = URL.replace("/f/", "/bob-f/");
    let none = json!({"AuthType": "NONE"}).to_string().into_bytes();
    d.signed(BOB, "POST", &url, &none).await.expect(403, "AccessDeniedException");
    d.call("POST", &url, &[], &none).await.expect(403, "MissingAuthenticationTokenException");
    let created = d.signed(ADMIN, "POST", &url, &none).await;
    assert_eq!(created.status, 201);
    let host = host(&created.json());
    let call = async |who: Option<(&str, &str)>, signed: &[u8], sent: &[u8]| {
        let headers = who.map(|who| sign("POST", "/p", &[("host", &host)], signed, who));
        let headers = headers.unwrap_or_default();
        let headers = headers.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        let headers: Vec<_> = headers.filter(|(name, _)| *name != "host").collect();
        d.request(&host, "POST", "/p", &headers, sent).await
    };
    let forbidden = json!({"Message": "Forbidden"});
    // Without a policy nobody may, not even the function's owner: the URL asks nobody who they are.
    for who in [None, Some(ADMIN)] {
        let answer = call(who, b"", b"").await;
        assert_eq!((answer.status, answer.json()), (403, forbidden.clone()));
    }
    let policy = format!("{FUNCTIONS}/bob-f/policy");
    let permit = |sid: &str, auth: &str, principal: &str| {
        json!({"StatementId": sid, "Action": "lambda:InvokeFunctionUrl", "Principal": principal,
            "FunctionUrlAuthType": auth})
        .to_string()
        .into_bytes()
    };
    let added = d.signed(ADMIN, "POST", &policy, &permit("signed", "AWS_IAM", "*")).await;
    assert_eq!(added.status, 201);
    assert_eq!(call(None, b"", b"").await.status, 403, "that is for the other kind");
    let added = d.signed(ADMIN, "POST", &policy, &permit("all", "NONE", "*")).await;
    assert_eq!(added.status, 201);
    let answer = call(None, b"", b"").await;
    assert_eq!((answer.status, &answer.json()["rawPath"]), (200, &json!("/p")));
    assert_eq!(answer.json()["requestContext"]["accountId"], "anonymous");

    let iam = json!({"AuthType": "AWS_IAM"}).to_string().into_bytes();
    assert_eq!(d.signed(ADMIN, "PUT", &url, &iam).await.status, 200);
    assert_eq!(call(None, b"", b"").await.status, 403);
    assert_eq!(call(Some((BOB.0, "wrong")), b"", b"").await.status, 403);
    assert_eq!(call(Some(BOB), b"signed", b"sent").await.status, 403);
    let answer = call(Some(BOB), b"same", b"same").await;
    assert_eq!(answer.status, 200, "by the function's policy");
    let context = &answer.json()["requestContext"];
    assert_eq!(context["accountId"], "000000000000");
    assert_eq!(context["authorizer"]["iam"]["userArn"], "arn:aws:iam::000000000000:user/bob");
    let removed = d.signed(ADMIN, "DELETE", &format!("{policy}/signed"), b"").await;
    assert_eq!(removed.status, 204);
    let answer = call(Some(BOB), b"", b"").await;
    assert_eq!((answer.status, answer.json()), (403, forbidden));
    assert_eq!(call(Some(ADMIN), b"", b"").await.status, 200, "by a policy of their own");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_their_preludes() {
    let settings = json!({"AuthType": "NONE", "InvokeMode": "RESPONSE_STREAM"});
    let (_dir, d, host) = with_url(settings).await;
    let stream = |kind: &str, chunks: Value, then: &str| json!({"do": "stream", "type": kind, "chunks": chunks, "then": then});
    let plain = act(&d, &host, &stream("text/html", json!(["he", "llo"]), "")).await;
    assert_eq!((plain.status, plain.header("content-type")), (200, Some("text/html")));
    assert_eq!(whole(&plain), b"hello");
    let untyped = act(&d, &host, &stream("", json!([]), "")).await;
    assert_eq!(untyped.header("content-type"), Some("application/octet-stream"));
    assert_eq!(whole(&untyped), b"");

    let integration = "application/vnd.awslambda.http-integration-response";
    let prelude = r#"{"statusCode": 404, "headers": {"X-A": "b", "Content-Type": "a/b"}, "cookies": ["c=d"]}"#;
    let nulls = "\0".repeat(8);
    for chunks in [
        json!([format!("{prelude}{nulls}body")]),
        json!([prelude, "\0\0\0", "\0\0\0\0\0bo", "dy"]),
        json!([&prelude[..20], &prelude[20..], nulls, "body"]),
    ] {
        let answer = act(&d, &host, &stream(integration, chunks, "")).await;
        assert_eq!((answer.status, answer.header("x-a")), (404, Some("b")));
        assert_eq!(answer.header("content-type"), Some("a/b"));
        assert_eq!(answer.header("set-cookie"), Some("c=d"));
        assert_eq!(whole(&answer), b"body");
    }
    let empty = act(&d, &host, &stream(integration, json!([nulls, "body"]), "")).await;
    assert_eq!((empty.status, &whole(&empty)[..]), (200, &b"body"[..]));
    for chunks in [
        json!([prelude]),
        json!([format!("{{{nulls}body")]),
        json!(["x".repeat(65_536), nulls]),
        json!([format!("{{\"statusCode\": 7}}{nulls}")]),
    ] {
        let answer = act(&d, &host, &stream(integration, chunks, "")).await;
        assert_eq!((answer.status, &answer.body[..]), (502, &b"Internal Server Error"[..]));
    }

    // Before the first byte a failure has a status, behind it the response breaks off.
    let early = act(&d, &host, &json!({"do": "exit"})).await;
    assert_eq!(early.status, 502);
    for then in ["raise", "exit", "timeout", "die"] {
        let torn = act(&d, &host, &stream("text/plain", json!(["some"]), then)).await;
        assert_eq!(torn.status, 200);
        let text = String::from_utf8_lossy(&torn.body);
        assert!(text.contains("some") && !text.ends_with("0\r\n\r\n"), "{text}");
    }
    // What is not streamed is what the function said, as it is.
    let said = json!({"statusCode": 418, "body": "b"});
    let answer = act(&d, &host, &json!({"do": "say", "what": said})).await;
    assert_eq!((answer.status, answer.json()), (200, said));
}

#[tokio::test(flavor = "multi_thread")]
async fn urls_outlive_a_restart_and_go_with_their_function() {
    let dir = tempfile::tempdir().unwrap();
    let mut d = start(dir.path(), limits(), 0).await;
    d.create("f", json!({})).await;
    let created = d.send("POST", URL, &json!({"AuthType": "NONE"})).await.json();
    let id = host(&created).split('.').next().unwrap().to_owned();
    drop(d.stop.take());
    d.scheduler.close(Duration::from_secs(1)).await;
    d.events.close(Duration::from_secs(1)).await;
    let d = start(dir.path(), limits(), 0).await;
    let host = format!("{id}.lambda-url.us-east-1.localhost");
    assert_eq!(d.request(&host, "GET", "/", &[], b"").await.status, 200);
    d.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await;
    assert_eq!(d.request(&host, "GET", "/", &[], b"").await.status, 403);
    d.create("f", json!({})).await;
    assert_eq!(d.request(&host, "GET", "/", &[], b"").await.status, 403, "another of this name");
}
