//! With identities: who is let through, and who is not.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Answer, Daemon, FUNCTIONS, daemon, limits, routes, start, zip};
use crate::identity::sigv4::tests::sign;

pub const ADMIN: (&str, &str) = ("AKIDADMIN00000000000", "a-secret-of-the-admin");
pub const BOB: (&str, &str) = ("AKIDBOB0000000000000", "a-secret-of-bob-himself");
pub const CAROL: (&str, &str) = ("AKIDCAROL00000000000", "a-secret-of-carol");
const PLACE: &str = "arn:aws:lambda:us-east-1:000000000000:function";

pub fn document() -> Value {
    let user = |(id, secret): (&str, &str), statements: Value| {
        json!({"keys": [{"id": id, "secret": secret}],
            "policies": [{"Version": "2012-10-17", "Statement": statements}]})
    };
    let trust = |service: &str| {
        json!({"trust": {"Version": "2012-10-17", "Statement": {"Effect": "Allow",
            "Principal": {"Service": service}, "Action": "sts:AssumeRole"}}})
    };
    json!({
        "users": {
            "admin": user(ADMIN, json!({"Effect": "Allow", "Action": "*", "Resource": "*"})),
            "bob": user(BOB, json!([
                {"Effect": "Allow", "Action": ["lambda:GetFunction", "lambda:InvokeFunction",
                    "lambda:UpdateFunctionConfiguration"],
                    "Resource": format!("{PLACE}:${{aws:username}}-*")},
                {"Effect": "Allow", "Action": "lambda:CreateFunction", "Resource": "*"},
                {"Effect": "Deny", "Action": "lambda:*", "Resource": format!("{PLACE}:bob-secret")},
            ])),
            "carol": user(CAROL, json!([
                {"Effect": "Allow", "Action": ["lambda:*", "iam:PassRole"], "Resource": "*"},
                {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::bucket/carol/*"},
            ])),
        },
        "roles": {"r": trust("lambda.amazonaws.com"), "s": trust("s3.amazonaws.com"), "sender": {
            "trust": trust("lambda.amazonaws.com")["trust"],
            "policies": [{"Version": "2012-10-17", "Statement": [
                {"Effect": "Allow", "Action": "lambda:InvokeFunction",
                    "Resource": format!("{PLACE}:bob-*")},
                {"Effect": "Allow", "Action": "sqs:SendMessage",
                    "Resource": "arn:aws:sqs:us-east-1:000000000000:dead"},
            ]}],
        }},
    })
}

pub async fn guarded() -> (tempfile::TempDir, Daemon) {
    guarded_by(&document()).await
}

pub async fn guarded_by(document: &Value) -> (tempfile::TempDir, Daemon) {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("identity.json");
    std::fs::write(&path, document.to_string()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let daemon = start(dir.path(), limits(), 0).await;
    (dir, daemon)
}

impl Daemon {
    pub async fn signed(&self, who: (&str, &str), method: &str, path: &str, body: &[u8]) -> Answer {
        self.signed_with(who, method, path, &[], body, body).await
    }

    /// Signs one body and sends another.
    pub async fn signed_with(
        &self,
        who: (&str, &str),
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        signed: &[u8],
        sent: &[u8],
    ) -> Answer {
        let host = self.address.to_string();
        let mut all = vec![("host", host.as_str())];
        all.extend(headers);
        let headers = sign(method, path, &all, signed, who);
        let headers: Vec<_> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        self.call(method, path, &headers, sent).await
    }
}

pub fn function(name: &str, role: &str) -> Vec<u8> {
    let role = format!("arn:aws:iam::000000000000:role/{role}");
    json!({"FunctionName": name, "Runtime": "python3.11", "Handler": "a.b", "Role": role,
        "Publish": true, "Code": {"ZipFile": zip("1")}})
    .to_string()
    .into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_known_gets_nothing() {
    let (_dir, d) = guarded().await;
    let path = FUNCTIONS;
    d.get(path).await.expect(403, "MissingAuthenticationTokenException");
    d.call("GET", path, &[("authorization", "Bearer x")], b"")
        .await
        .expect(403, "IncompleteSignatureException");
    let nobody = ("AKIDNOBODY0000000000", ADMIN.1);
    d.signed(nobody, "GET", path, b"").await.expect(403, "UnrecognizedClientException");
    let wrong = d.signed((ADMIN.0, "wrong"), "GET", path, b"").await;
    let wrong = wrong.expect(403, "InvalidSignatureException");
    assert!(wrong.contains(r#""message":"The request signature we calculated"#), "{wrong}");
    let body = function("f", "r");
    // What was signed is not what was sent.
    let altered = d.signed_with(ADMIN, "POST", path, &[], &body, &function("g", "r")).await;
    altered.expect(403, "InvalidSignatureException");
    let named = crate::identity::sigv4::hex(&Sha256::digest(&body));
    let named = [("x-amz-content-sha256", named.as_str())];
    let altered = d.signed_with(ADMIN, "POST", path, &named, &body, &function("g", "r")).await;
    altered.expect(403, "InvalidSignatureException");
    assert_eq!(d.signed(ADMIN, "GET", path, b"").await.json()["Functions"], json!([]));
    assert_eq!(d.signed_with(ADMIN, "POST", path, &named, &body, &body).await.status, 201);
    let listed = d.signed(ADMIN, "GET", path, b"").await.json();
    assert_eq!(listed["Functions"].as_array().unwrap().len(), 1);
    assert_eq!(d.get("/firn/v1/health").await.status, 200);
    d.get("/firn/v1/instances").await.expect(403, "MissingAuthenticationTokenException");
    assert_eq!(d.signed(ADMIN, "GET", "/firn/v1/instances", b"").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_has_its_gate() {
    let (_dir, d) = guarded().await;
    d.signed(ADMIN, "POST", FUNCTIONS, &function("f", "r")).await;
    let configuration = format!("{FUNCTIONS}/f/configuration");
    let before = d.signed(ADMIN, "GET", &configuration, b"").await.json();
    let filled = [
        ("{name}", "f"),
        ("{alias}", "a"),
        ("{sid}", "s"),
        ("{arn}", "arn:aws:lambda:us-east-1:000000000000:function:f"),
        ("{layer}", "l"),
        ("{version}", "1"),
        ("{service}", "GraniteServiceVersion20100801"),
        ("{operation}", "ListMetrics"),
    ];
    for path in routes::paths(&d.app).into_iter().filter(|path| *path != "/firn/v1/health") {
        let path =
            filled.iter().fold(path.to_owned(), |path, (part, with)| path.replace(part, with));
        assert!(!path.contains('{'), "{path}");
        let mut gates = 0;
        for method in ["GET", "POST", "PUT", "DELETE"] {
            let body: &[u8] = match method {
                // An empty map in CBOR.
                "POST" if path.starts_with("/service/") => b"\xa0",
                "POST" | "PUT" => b"{}",
                _ => b"",
            };
            let unsigned = d.call(method, &path, &[], body).await;
            if matches!(unsigned.status, 404 | 405) {
                continue;
            }
            gates += 1;
            // Other services have their own words for it.
            let found = (unsigned.status, unsigned.header("x-amzn-errortype"));
            let missing = Some("MissingAuthenticationTokenException");
            assert_eq!(found, (403, missing), "{method} {path}");
            // What the signer of these tests writes in another way.
            if path.contains(':') {
                continue;
            }
            let target = [("x-amz-target", "Logs_20140328.DescribeLogGroups")];
            for (who, exception) in
                [((BOB.0, "wrong"), "InvalidSignatureException"), (BOB, "AccessDeniedException")]
            {
                let create = function("bob-secret", "r");
                let body = if path == FUNCTIONS && method == "POST" { &create } else { body };
                let answer = d.signed_with(who, method, &path, &target, body, body).await;
                let text = String::from_utf8_lossy(&answer.body).into_owned();
                let found = answer.header("x-amzn-errortype");
                assert_eq!(
                    (answer.status, found),
                    (403, Some(exception)),
                    "{method} {path} {text}"
                );
                assert!(
                    exception != "AccessDeniedException"
                        || text.contains("user/bob is not authorized"),
                    "{text}"
                );
            }
        }
        assert!(gates > 0, "{path}");
    }
    let after = d.signed(ADMIN, "GET", &configuration, b"").await.json();
    assert_eq!(before, after);
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_decide() {
    let (_dir, d) = guarded().await;
    for name in ["bob-1", "bob-secret", "other"] {
        let made = d.signed(ADMIN, "POST", FUNCTIONS, &function(name, "r")).await;
        assert_eq!(made.status, 201, "{}", made.json());
    }
    let invoke = async |name: &str| {
        d.signed(BOB, "POST", &format!("{FUNCTIONS}/{name}/invocations"), b"1").await
    };
    for name in ["bob-1", "bob-1:1"] {
        assert_eq!(invoke(name).await.status, 200, "{name}");
    }
    let denied = invoke("other").await.expect(403, "AccessDeniedException");
    assert_eq!(
        serde_json::from_str::<Value>(&denied).unwrap()["Message"],
        format!(
            "User: arn:aws:iam::000000000000:user/bob is not authorized to perform: \
             lambda:InvokeFunction on resource: {PLACE}:other because no identity-based policy allows \
             the lambda:InvokeFunction action"
        )
    );
    let denied = invoke("bob-secret").await.expect(403, "AccessDeniedException");
    assert!(denied.contains("with an explicit deny in an identity-based policy"), "{denied}");

    // What the function's own policy allows, by the qualifier that it was allowed for.
    let bob = "arn:aws:iam::000000000000:user/bob";
    let permission =
        json!({"StatementId": "s", "Action": "lambda:InvokeFunction", "Principal": bob})
            .to_string();
    for name in ["other:1", "bob-secret"] {
        let path = format!("{FUNCTIONS}/{name}/policy");
        let added = d.signed(ADMIN, "POST", &path, permission.as_bytes()).await;
        assert_eq!(added.status, 201, "{}", added.json());
    }
    assert_eq!(invoke("other:1").await.status, 200);
    for name in ["other", "other:$LATEST", "bob-secret"] {
        invoke(name).await.expect(403, "AccessDeniedException");
    }
    // An account that is allowed allows nobody by itself.
    let account = json!({"StatementId": "t", "Action": "lambda:InvokeFunction",
        "Principal": "000000000000"});
    d.signed(ADMIN, "POST", &format!("{FUNCTIONS}/other/policy"), account.to_string().as_bytes())
        .await;
    invoke("other").await.expect(403, "AccessDeniedException");
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_must_be_passed_and_be_lambdas() {
    let (_dir, d) = guarded().await;
    let refused = d.signed(BOB, "POST", FUNCTIONS, &function("x", "r")).await;
    let refused = refused.expect(403, "AccessDeniedException");
    let words =
        "not authorized to perform: iam:PassRole on resource: arn:aws:iam::000000000000:role/r";
    assert!(refused.contains(words), "{refused}");
    for role in ["s", "nobody"] {
        let refused = d.signed(ADMIN, "POST", FUNCTIONS, &function("x", role)).await;
        let refused = refused.expect(400, "InvalidParameterValueException");
        assert!(refused.contains("cannot be assumed by Lambda"), "{refused}");
    }
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function("x", "r")).await.status, 201);
    let change = json!({"Role": "arn:aws:iam::000000000000:role/s"}).to_string();
    let path = format!("{FUNCTIONS}/x/configuration");
    let refused = d.signed(ADMIN, "PUT", &path, change.as_bytes()).await;
    refused.expect(400, "InvalidParameterValueException");
}

#[tokio::test(flavor = "multi_thread")]
async fn destinations_are_what_the_functions_role_may_invoke() {
    let (_dir, d) = guarded().await;
    for (name, role) in [("f", "r"), ("g", "sender"), ("bob-1", "r"), ("other", "r")] {
        assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function(name, role)).await.status, 201);
    }
    let set = async |name: &str, to: &str| {
        let body =
            json!({"DestinationConfig": {"OnFailure": {"Destination": format!("{PLACE}:{to}")}}});
        let path = format!("/2019-09-25/functions/{name}/event-invoke-config");
        d.signed(ADMIN, "PUT", &path, body.to_string().as_bytes()).await
    };
    assert_eq!(set("g", "bob-1").await.status, 200);
    for (name, to) in [("f", "bob-1"), ("g", "other")] {
        let refused = set(name, to).await.expect(400, "InvalidParameterValueException");
        assert!(refused.contains("does not have permissions to call InvokeFunction"), "{refused}");
    }
    let permission = json!({"StatementId": "s", "Action": "lambda:InvokeFunction",
        "Principal": "arn:aws:iam::000000000000:role/sender"});
    let path = format!("{FUNCTIONS}/other/policy");
    d.signed(ADMIN, "POST", &path, permission.to_string().as_bytes()).await;
    assert_eq!(set("g", "other").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn links_to_code_carry_a_proof() {
    let (_dir, d) = guarded().await;
    d.signed(ADMIN, "POST", FUNCTIONS, &function("bob-1", "r")).await;
    let got = d.signed(BOB, "GET", &format!("{FUNCTIONS}/bob-1"), b"").await.json();
    let location = got["Code"]["Location"].as_str().unwrap();
    let path = location.split_once(&d.address.to_string()).unwrap().1;
    assert_eq!(d.get(path).await.body, b"PK1");
    for altered in [
        path.replace("bob-1", "other"),
        path.replace("expires=1", "expires=2"),
        path.rsplit_once('&').unwrap().0.to_owned(),
    ] {
        d.get(&altered).await.expect(403, "MissingAuthenticationTokenException");
    }
    let plain = "/firn/v1/functions/bob-1/code";
    d.signed(BOB, "GET", plain, b"").await.expect(403, "AccessDeniedException");
    assert_eq!(d.signed(ADMIN, "GET", plain, b"").await.body, b"PK1");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_leaves_a_record() {
    let (dir, d) = guarded().await;
    let mut create: Value = serde_json::from_slice(&function("bob-1", "r")).unwrap();
    create["Environment"] = json!({"Variables": {"TOKEN": "planted"}});
    let body = create.to_string().into_bytes();
    let agent = [("user-agent", "Boto3/1.0")];
    let created = d.signed_with(ADMIN, "POST", FUNCTIONS, &agent, &body, &body).await;
    // On the disk before the answer.
    let lines = std::fs::read_to_string(dir.path().join("audit/current.jsonl")).unwrap();
    assert!(lines.contains("CreateFunction20150331"), "{lines}");
    d.signed(BOB, "DELETE", &format!("{FUNCTIONS}/bob-1?Qualifier=1"), b"").await;
    let wrong = (BOB.0, "wrong");
    let path = "/2017-10-31/functions/bob-1/concurrency";
    d.signed(wrong, "PUT", path, br#"{"ReservedConcurrentExecutions": 1}"#).await;
    let invoke = format!("{FUNCTIONS}/bob-1/invocations");
    assert_eq!(d.signed(BOB, "POST", &invoke, br#""planted""#).await.status, 200);
    let target = [("x-amz-target", "Logs_20140328.DescribeLogGroups")];
    d.signed_with(BOB, "POST", "/", &target, b"{}", b"{}").await;
    d.get("/firn/v1/health").await;
    d.get("/firn/v1/instances").await;
    d.app.callers.audit.close().await;
    let (records, _) = crate::audit::tests::records(&dir.path().join("audit"));
    let text = json!(records).to_string();
    assert!(!text.contains("planted") && !text.contains("secret-of"), "{text}");
    let names: Vec<_> = records.iter().map(|r| r["eventName"].as_str().unwrap()).collect();
    let expected = [
        "CreateFunction20150331",
        "DeleteFunction20150331",
        "PutFunctionConcurrency20171031",
        "DescribeLogGroups",
        "ListInstances",
    ];
    assert_eq!(names, expected);
    let [create, delete, stranger, logs, unsigned] = &records[..] else { panic!() };
    assert_eq!(create["userIdentity"]["arn"], "arn:aws:iam::000000000000:user/admin");
    assert_eq!(create["userIdentity"]["accessKeyId"], ADMIN.0);
    assert_eq!(create["userIdentity"]["type"], "IAMUser");
    assert_eq!(create["requestID"], created.header("x-amzn-requestid").unwrap());
    assert_eq!(create["requestParameters"]["functionName"], "bob-1");
    assert_eq!(create["responseElements"]["functionArn"], format!("{PLACE}:bob-1:1"));
    let expected = json!({"eventVersion": "1.11", "eventSource": "lambda.amazonaws.com",
        "awsRegion": "us-east-1", "sourceIPAddress": "127.0.0.1", "userAgent": "Boto3/1.0",
        "readOnly": false, "eventType": "AwsApiCall", "managementEvent": true,
        "eventCategory": "Management", "recipientAccountId": "000000000000"});
    for (member, value) in expected.as_object().unwrap() {
        assert_eq!(&create[member], value, "{member}");
    }
    assert!(create.get("errorCode").is_none());
    let at = create["eventTime"].as_str().unwrap();
    assert!(at.len() == 20 && at.ends_with('Z'), "{at}");
    assert_eq!(
        (&delete["errorCode"], &delete["responseElements"]),
        (&json!("AccessDenied"), &Value::Null)
    );
    let message = delete["errorMessage"].as_str().unwrap();
    assert!(message.contains("user/bob is not authorized to perform: lambda:DeleteFunction"));
    let parameters = json!({"functionName": "bob-1", "qualifier": "1"});
    assert_eq!(delete["requestParameters"], parameters);
    assert_eq!(delete["resources"][0]["ARN"], format!("{PLACE}:bob-1:1"));
    // Of who is not known only the claim is recorded, as such.
    assert_eq!(stranger["userIdentity"], json!({"type": "Unknown"}));
    assert_eq!(stranger["additionalEventData"]["claimedAccessKeyId"], BOB.0);
    assert_eq!(stranger["errorCode"], "InvalidSignatureException");
    assert_eq!(stranger["requestParameters"], Value::Null);
    assert_eq!(
        (&logs["eventSource"], &logs["readOnly"]),
        (&json!("logs.amazonaws.com"), &json!(true))
    );
    assert_eq!(logs["errorCode"], "AccessDenied");
    assert_eq!(unsigned["errorCode"], "MissingAuthenticationTokenException");
    let ids: std::collections::BTreeSet<_> =
        records.iter().map(|r| r["eventID"].as_str()).collect();
    assert_eq!(ids.len(), records.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_leaves_a_record_of_what_was_done() {
    use tokio::io::AsyncWriteExt;
    let (dir, d) = daemon().await;
    d.create("f", json!({"Publish": true})).await;
    for n in 0..50 {
        let body = format!(r#"{{"Name":"a{n}","FunctionVersion":"1"}}"#);
        let head = "POST /2015-03-31/functions/f/aliases HTTP/1.1\r\nHost: h\r\n";
        let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
        let mut stream = tokio::net::TcpStream::connect(d.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        // At another point of the call each time.
        tokio::time::sleep(std::time::Duration::from_micros(n * 40)).await;
    }
    let recorded = || {
        let lines = std::fs::read_to_string(dir.path().join("audit/current.jsonl")).unwrap();
        lines.lines().filter(|line| line.contains("CreateAlias20150331")).count()
    };
    let made = || d.app.store.attachments("f").unwrap().aliases.len();
    let settled = async || {
        for _ in 0..400 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            if made() > 0 && made() == recorded() {
                return true;
            }
        }
        false
    };
    assert!(settled().await, "{} made, {} recorded", made(), recorded());
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_that_can_not_be_enforced_are_refused() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    let body = json!({"StatementId": "s", "Action": "lambda:InvokeFunction",
        "Principal": "arn:aws:iam::000000000000:user/*"});
    let refused = d.send("POST", &format!("{FUNCTIONS}/f/policy"), &body).await;
    let refused = refused.expect(400, "InvalidParameterValueException");
    assert!(refused.contains("no principal"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_a_gateway_speaks_for_is_not_everybodys_to_say() {
    let (_dir, d) = guarded().await;
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function("bob-f", "r")).await.status, 201);
    let identity = r#"{"cognitoIdentityId":"a","cognitoIdentityPoolId":"b"}"#;
    let headers = [("x-firn-cognito-identity", identity)];
    let paths = [
        format!("{FUNCTIONS}/bob-f/invocations"),
        "/2021-11-15/functions/bob-f/response-streaming-invocations".to_owned(),
    ];
    for path in &paths {
        assert_eq!(d.signed(BOB, "POST", path, b"{}").await.status, 200);
        let refused = d.signed_with(BOB, "POST", path, &headers, b"{}", b"{}").await;
        let refused = refused.expect(403, "AccessDeniedException");
        assert!(refused.contains("firn:AssertCognitoIdentity"), "{refused}");
        assert_eq!(d.signed_with(ADMIN, "POST", path, &headers, b"{}", b"{}").await.status, 200);
    }
}
