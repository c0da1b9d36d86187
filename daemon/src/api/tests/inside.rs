//! What functions ask of the daemon: credentials of their roles, and requests that are signed with them.

use firn::guest::Ask;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{identity::*, *};
use crate::{
    envelope::Envelope,
    function::{Function, Version},
    identity::sigv4::tests::sign,
};

/// A role's temporary credentials.
#[derive(Debug, Clone, PartialEq)]
struct Credentials {
    key: (String, String),
    token: String,
    role: String,
}

impl Daemon {
    /// What a function's services answer: the status and the body.
    async fn asks(
        &self,
        function: &str,
        headers: &[(&str, &str)],
        ask: Value,
    ) -> (u64, Value, String) {
        let mut event = ask;
        event["do"] = "ask".into();
        let path = format!("{FUNCTIONS}/{function}/invocations");
        let event = event.to_string().into_bytes();
        let answer = match self.app.callers.identity {
            None => self.call("POST", &path, headers, &event).await,
            Some(_) => self.signed_with(ADMIN, "POST", &path, headers, &event, &event).await,
        };
        assert_eq!(answer.status, 200, "{}", answer.json());
        let reply = answer.json();
        let body = reply["body"].as_str().unwrap().to_owned();
        (reply["status"].as_u64().unwrap(), reply["fields"].clone(), body)
    }

    async fn credentials(&self, function: &str) -> Credentials {
        let (status, _, body) = self.asks(function, &[], json!({"what": "credentials"})).await;
        assert_eq!(status, 200);
        let body: Value = serde_json::from_str(&body).unwrap();
        let text = |name: &str| body[name].as_str().unwrap().to_owned();
        let end = OffsetDateTime::parse(&text("Expiration"), &Rfc3339).unwrap();
        let left = (end - OffsetDateTime::now_utc()).whole_seconds();
        assert!((3500..=3600).contains(&left), "{left}");
        let key = (text("AccessKeyId"), text("SecretAccessKey"));
        Credentials { key, token: text("Token"), role: text("RoleArn") }
    }

    /// What a request of the function's is answered, signed with its credentials.
    async fn signs(
        &self,
        function: &str,
        with: &Credentials,
        (method, target): (&str, &str),
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u64, String) {
        let mut headers = headers.to_vec();
        let length = body.len().to_string();
        let token = ("x-amz-security-token", with.token.as_str());
        headers.extend([("host", "127.0.0.1:9001"), token, ("content-length", &length)]);
        let key = (with.key.0.as_str(), with.key.1.as_str());
        let fields = sign(method, target, &headers, body.as_bytes(), key);
        // As a guest passes it on.
        let fields = fields.into_iter().filter(|(name, _)| name != "content-length");
        let host = ("host".to_owned(), "127.0.0.1:9001".to_owned());
        let fields: Vec<_> = fields.chain([host]).collect();
        let ask = json!({"method": method, "target": target, "fields": fields, "payload": body});
        let (status, _, body) = self.asks(function, &[], ask).await;
        (status, body)
    }
}

fn role(name: &str) -> String {
    format!("arn:aws:iam::000000000000:role/{name}")
}

const IDENTITY: [(&str, &str); 1] = [("content-type", "application/x-www-form-urlencoded")];
const WHO: &str = "Action=GetCallerIdentity&Version=2011-06-15";

fn with_kms() -> Value {
    let mut document = document();
    let statements = json!([
        {"Effect": "Allow", "Action": ["kms:Encrypt", "kms:Decrypt"], "Resource": "*",
            "Condition": {"StringEquals": {
                "kms:EncryptionContext:LambdaFunctionName": "bob-f",
                "lambda:SourceFunctionArn": "arn:aws:lambda:us-east-1:000000000000:function:bob-f",
            }}},
        {"Effect": "Allow", "Action": "lambda:InvokeFunction",
            "Resource": "arn:aws:lambda:us-east-1:000000000000:function:bob-*"},
    ]);
    document["roles"]["sender"]["policies"] =
        json!([{"Version": "2012-10-17", "Statement": statements}]);
    document
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_acts_in_its_role_and_in_no_other() {
    let (dir, d) = guarded_by(&with_kms()).await;
    let create = function("bob-f", "sender");
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &create).await.status, 201);
    let with = d.credentials("bob-f").await;
    assert_eq!(with.role, role("sender"));
    assert_ne!(d.credentials("bob-f").await.key, with.key, "new ones each time");
    let (status, who) = d.signs("bob-f", &with, ("POST", "/"), &IDENTITY, WHO).await;
    assert_eq!(status, 200, "{who}");
    assert!(who.contains("arn:aws:sts::000000000000:assumed-role/sender/bob-f"), "{who}");

    // KMS, as far as the role's policies go.
    let headers = [
        ("content-type", "application/x-amz-json-1.1"),
        ("x-amz-target", "TrentService.CreateKey"),
    ];
    let key = d.signed_with(ADMIN, "POST", "/", &headers, b"{}", b"{}").await.json();
    let key = key["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned();
    let kms = async |operation: &str, input: Value| {
        let target = format!("TrentService.{operation}");
        let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", &*target)];
        let (status, body) =
            d.signs("bob-f", &with, ("POST", "/"), &headers, &input.to_string()).await;
        (status, serde_json::from_str::<Value>(&body).unwrap())
    };
    let context = json!({"LambdaFunctionName": "bob-f"});
    let plain =
        json!({"KeyId": key, "Plaintext": STANDARD.encode("secret"), "EncryptionContext": context});
    let (status, sealed) = kms("Encrypt", plain).await;
    assert_eq!(status, 200, "{sealed}");
    let open = |context: Value| {
        kms(
            "Decrypt",
            json!({"CiphertextBlob": sealed["CiphertextBlob"], "EncryptionContext": context}),
        )
    };
    assert_eq!(open(context.clone()).await.1["Plaintext"], STANDARD.encode("secret"));
    let (status, refused) = open(json!({"LambdaFunctionName": "other"})).await;
    assert_eq!((status, &refused["__type"]), (400, &json!("AccessDeniedException")), "{refused}");
    assert_eq!(kms("CreateKey", json!({})).await.0, 400);

    // Lambda: another function, but none that the role may not invoke.
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function("bob-g", "r")).await.status, 201);
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function("carol-h", "r")).await.status, 201);
    for (name, status) in [("bob-g", 200), ("carol-h", 403)] {
        let target = format!("{FUNCTIONS}/{name}/invocations");
        let (found, body) = d.signs("bob-f", &with, ("POST", &target), &[], "{\"a\": 1}").await;
        assert_eq!(found, status, "{body}");
        assert!(status == 403 || body == "{\"a\": 1}", "{body}");
    }
    let stolen = Credentials { token: d.credentials("bob-f").await.token, ..with.clone() };
    assert_eq!(d.signs("bob-f", &stolen, ("POST", "/"), &IDENTITY, WHO).await.0, 403);
    let unsigned = json!({"method": "POST", "target": "/", "fields": IDENTITY, "payload": WHO});
    assert_eq!(d.asks("bob-f", &[], unsigned).await.0, 403);

    // Another role takes effect without another instance.
    let update = json!({"Role": role("r")}).to_string().into_bytes();
    let path = format!("{FUNCTIONS}/bob-f/configuration");
    assert_eq!(d.signed(ADMIN, "PUT", &path, &update).await.status, 200);
    assert_eq!(d.credentials("bob-f").await.role, role("r"));
    // What was given before is good to its end, unless the role is taken away.
    assert_eq!(d.signs("bob-f", &with, ("POST", "/"), &IDENTITY, WHO).await.0, 200);
    let mut without = with_kms();
    without["roles"].as_object_mut().unwrap().remove("sender");
    std::fs::write(dir.path().join("identity.json"), without.to_string()).unwrap();
    d.app.callers.identity.as_ref().unwrap().reload().unwrap();
    assert_eq!(d.signs("bob-f", &with, ("POST", "/"), &IDENTITY, WHO).await.0, 403);

    // The audit trail says which role it was, and not what was sent.
    d.app.callers.audit.close().await;
    let (records, _) = crate::audit::tests::records(&dir.path().join("audit"));
    let decrypt = records.iter().find(|r| r["eventName"] == "Decrypt").unwrap();
    let arn = "arn:aws:sts::000000000000:assumed-role/sender/bob-f";
    assert_eq!(decrypt["userIdentity"]["arn"], arn);
    assert_eq!(decrypt["sourceIPAddress"], Value::Null);
    assert!(!json!(records).to_string().contains(with.key.1.as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_of_a_deleted_function_gets_no_role_of_the_next_one_of_its_name() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({"Role": role("new")})).await;
    let next = d.app.store.get("f", Version::Latest).unwrap();
    // Keys tell functions apart; those of these tests are all the same but for the number.
    let mut deleted = Function::clone(&next);
    deleted.config.role = role("old");
    deleted.envelope = Envelope::generate(&TestKeys(2)).unwrap();
    let inside = Inside::default();
    inside.open(&d.gateway);
    for (function, expected) in [(&deleted, "old"), (&*next, "new")] {
        let reply = inside.services(function).call(Ask::Credentials).await;
        let body: Value = serde_json::from_slice(&reply.body).unwrap();
        assert_eq!(body["RoleArn"], role(expected));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_development_mode_functions_reach_their_keys_and_nothing_else() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({})).await;
    let with = d.credentials("f").await;
    let (status, who) = d.signs("f", &with, ("POST", "/"), &IDENTITY, WHO).await;
    assert!(status == 200 && who.contains("arn:aws:iam::000000000000:root"), "{who}");
    let target = |target: &'static str| {
        [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target)]
    };
    let (status, key) =
        d.signs("f", &with, ("POST", "/"), &target("TrentService.CreateKey"), "{}").await;
    assert!(status == 200 && key.contains("KeyId"), "{key}");
    let refused = "In development mode";
    for (name, method, path, headers) in [
        ("logs", "POST", "/", target("Logs_20140328.DescribeLogGroups")),
        ("unknown", "POST", "/", target("Unknown.Operation")),
        ("a list", "GET", FUNCTIONS, target("x")),
        ("a deletion", "DELETE", "/2015-03-31/functions/f", target("x")),
        ("metrics", "GET", "/metrics", target("x")),
        ("CBOR", "POST", "/service/TrentService/operation/ListKeys", target("x")),
    ] {
        let (status, body) = d.signs("f", &with, (method, path), &headers, "").await;
        assert!(status == 403 || status == 400, "{name}: {status}");
        assert!(body.contains(refused), "{name}: {body}");
    }
    // Nor by a function's URL.
    let url = json!({"AuthType": "NONE"}).to_string().into_bytes();
    let made = d.call("POST", "/2021-10-31/functions/f/url", &[], &url).await.json();
    let host = made["FunctionUrl"].as_str().unwrap();
    let host = host.trim_start_matches("http://").trim_end_matches('/');
    let ask = json!({"method": "POST", "target": "/", "fields": [["host", host]], "payload": ""});
    let (status, _, body) = d.asks("f", &[], ask).await;
    assert!(status >= 400 && !body.contains("hello"), "{status} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_or_too_large_an_answer_is_said() {
    let (_dir, d) = guarded().await;
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function("f", "r")).await.status, 201);
    for (method, target, field) in [
        ("PO ST", "/", "host"),
        ("GET", "http://elsewhere/", "host"),
        ("GET", "", "host"),
        ("GET", "/ ", "host"),
        ("GET", "/", "ho st"),
    ] {
        let ask =
            json!({"method": method, "target": target, "fields": [[field, "x"]], "payload": ""});
        assert_eq!(d.asks("f", &[], ask).await.0, 400, "{method} {target} {field}");
    }
    let ask = json!({"method": "GET", "target": "/", "fields": [["host", "a\nb"]], "payload": ""});
    assert_eq!(d.asks("f", &[], ask).await.0, 400);
    // Lengths that a guest claims are not believed; what delimits messages is not passed on.
    let ask = json!({"method": "GET", "target": "/firn/v1/health",
        "fields": [["content-length", "7"], ["transfer-encoding", "chunked"]], "payload": ""});
    let (status, fields, _) = d.asks("f", &[], ask).await;
    assert_eq!(status, 200);
    assert!(!fields.to_string().contains("content-length"), "{fields}");

    let mut large = document();
    large["roles"]["r"]["policies"] = json!([{"Version": "2012-10-17",
        "Statement": {"Effect": "Allow", "Action": "lambda:InvokeFunction", "Resource": "*"}}]);
    let (_dir, d) = guarded_by(&large).await;
    for name in ["f", "g"] {
        assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function(name, "r")).await.status, 201);
    }
    let with = d.credentials("f").await;
    let event = json!({"do": "say", "what": "x".repeat(1 << 20)}).to_string();
    let target = format!("{FUNCTIONS}/g/invocations");
    let (status, body) = d.signs("f", &with, ("POST", &target), &[], &event).await;
    assert!(status == 502 && body.contains("1048576 bytes"), "{status} {body}");
}
