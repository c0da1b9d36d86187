//! Resource policies: who may invoke a function, by which of its qualifiers.

use serde_json::{Value, json};

use super::{Daemon, FUNCTIONS, daemon, limits, start};

const POLICY: &str = "/2015-03-31/functions/f/policy";
const ARN: &str = "arn:aws:lambda:us-east-1:000000000000:function:f";

/// A daemon with the function `f`, its version 1, and `prod`, which leads there.
async fn with_alias() -> (tempfile::TempDir, Daemon) {
    let (dir, d) = daemon().await;
    d.create("f", json!({"Publish": true})).await;
    let alias = json!({"Name": "prod", "FunctionVersion": "1"});
    let answer = d.send("POST", &format!("{FUNCTIONS}/f/aliases"), &alias).await;
    assert_eq!(answer.status, 201);
    (dir, d)
}

fn permission(sid: &str, changes: Value) -> Value {
    let mut body = json!({
        "StatementId": sid, "Action": "lambda:InvokeFunction", "Principal": "s3.amazonaws.com",
    });
    for (key, value) in changes.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn add(d: &Daemon, path: &str, sid: &str, changes: Value) -> String {
    let answer = d.send("POST", path, &permission(sid, changes)).await;
    assert_eq!(answer.status, 201, "{}", answer.json());
    answer.json()["Statement"].as_str().unwrap().to_owned()
}

/// The statements of a policy, and its revision.
async fn policy(d: &Daemon, path: &str) -> (Vec<Value>, String) {
    let answer = d.get(path).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
    let json = answer.json();
    let policy: Value = serde_json::from_str(json["Policy"].as_str().unwrap()).unwrap();
    assert_eq!((&policy["Version"], &policy["Id"]), (&json!("2012-10-17"), &json!("default")));
    let revision = json["RevisionId"].as_str().unwrap().to_owned();
    (policy["Statement"].as_array().unwrap().clone(), revision)
}

#[tokio::test(flavor = "multi_thread")]
async fn permissions_come_and_go() {
    let (dir, d) = with_alias().await;
    let gone = d.get(POLICY).await.expect(404, "ResourceNotFoundException");
    assert!(gone.contains("The resource you requested does not exist."), "{gone}");
    let changes = json!({
        "SourceArn": "arn:aws:s3:::bucket", "SourceAccount": "000000000000",
    });
    let statement = add(&d, POLICY, "s3", changes).await;
    let expected = r#"{"Sid":"s3","Effect":"Allow","Principal":{"Service":"s3.amazonaws.com"},
        "Action":"lambda:InvokeFunction",
        "Resource":"arn:aws:lambda:us-east-1:000000000000:function:f",
        "Condition":{"ArnLike":{"AWS:SourceArn":"arn:aws:s3:::bucket"},
        "StringEquals":{"AWS:SourceAccount":"000000000000"}}}"#;
    assert_eq!(statement, expected.split_whitespace().collect::<String>());
    let (_, first) = policy(&d, POLICY).await;
    let twice = d.send("POST", POLICY, &permission("s3", json!({}))).await;
    assert!(twice.expect(409, "ResourceConflictException").contains("(s3)"));
    let stale = permission("url", json!({"RevisionId": "no"}));
    let stale = d.send("POST", POLICY, &stale).await.expect(412, "PreconditionFailedException");
    assert!(stale.contains("GetPolicy"), "{stale}");
    let url = json!({"Action": "lambda:InvokeFunctionUrl", "Principal": "*",
        "FunctionUrlAuthType": "NONE", "RevisionId": first, "InvokedViaFunctionUrl": true,
        "PrincipalOrgID": "o-0123456789", "EventSourceToken": "a.b-c"});
    add(&d, POLICY, "url", url).await;
    let (statements, second) = policy(&d, POLICY).await;
    assert_ne!(first, second);
    assert_eq!(statements.len(), 2);
    assert_eq!(
        statements[1],
        json!({"Sid": "url", "Effect": "Allow", "Principal": "*", "Resource": ARN,
            "Action": "lambda:InvokeFunctionUrl", "Condition": {
                "Bool": {"lambda:InvokedViaFunctionUrl": "true"},
                "StringEquals": {"aws:PrincipalOrgID": "o-0123456789",
                    "lambda:EventSourceToken": "a.b-c", "lambda:FunctionUrlAuthType": "NONE"}}})
    );

    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    assert_eq!(policy(&d, POLICY).await, (statements, second.clone()));
    let delete = async |path: String| d.call("DELETE", &path, &[], b"").await;
    let stale = delete(format!("{POLICY}/s3?RevisionId={first}")).await;
    stale.expect(412, "PreconditionFailedException");
    assert_eq!(delete(format!("{POLICY}/s3?RevisionId={second}")).await.status, 204);
    let gone = delete(format!("{POLICY}/s3")).await.expect(404, "ResourceNotFoundException");
    assert!(gone.contains("Statement s3 is not found in resource policy."), "{gone}");
    assert_eq!(delete(format!("{POLICY}/url")).await.status, 204);
    d.get(POLICY).await.expect(404, "ResourceNotFoundException");
    let gone = delete(format!("{POLICY}/url")).await.expect(404, "ResourceNotFoundException");
    assert!(gone.contains("No policy is associated"), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_qualifier_has_a_policy_that_goes_with_it() {
    let (_dir, d) = with_alias().await;
    let qualified = |qualifier: &str| format!("{POLICY}?Qualifier={qualifier}");
    for qualifier in ["1", "prod"] {
        let statement = add(&d, &qualified(qualifier), "s", json!({})).await;
        let resource = format!(r#""Resource":"{ARN}:{qualifier}""#);
        assert!(statement.contains(&resource), "{statement}");
        assert_eq!(policy(&d, &qualified(qualifier)).await.0.len(), 1);
    }
    d.get(POLICY).await.expect(404, "ResourceNotFoundException");
    for (qualifier, status, exception) in [
        ("2", 404, "ResourceNotFoundException"),
        ("dev", 404, "ResourceNotFoundException"),
        ("$LATEST", 400, "InvalidParameterValueException"),
    ] {
        let answer = d.send("POST", &qualified(qualifier), &permission("s", json!({}))).await;
        answer.expect(status, exception);
    }
    // Each goes, and is not found again under the same name.
    let alias = format!("{FUNCTIONS}/f/aliases");
    assert_eq!(d.call("DELETE", &format!("{alias}/prod"), &[], b"").await.status, 204);
    d.send("POST", &alias, &json!({"Name": "prod", "FunctionVersion": "$LATEST"})).await;
    d.get(&qualified("prod")).await.expect(404, "ResourceNotFoundException");
    let version = format!("{FUNCTIONS}/f?Qualifier=1");
    assert_eq!(d.call("DELETE", &version, &[], b"").await.status, 204);
    d.get(&qualified("1")).await.expect(404, "ResourceNotFoundException");
    add(&d, POLICY, "s", json!({})).await;
    assert_eq!(d.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await.status, 204);
    d.create("f", json!({})).await;
    d.get(POLICY).await.expect(404, "ResourceNotFoundException");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_permissions_are_refused() {
    let (_dir, d) = with_alias().await;
    let (validation, invalid) = ("ValidationException", "InvalidParameterValueException");
    for (changes, exception, words) in [
        (json!({"StatementId": null}), validation, "'statementId'"),
        (json!({"StatementId": "a b"}), validation, "'statementId'"),
        (json!({"StatementId": "a".repeat(101)}), validation, "equal to 100"),
        (json!({"Action": null}), validation, "'action'"),
        (json!({"Action": "s3:GetObject"}), validation, "'action'"),
        (json!({"Action": "lambda:"}), validation, "'action'"),
        (json!({"Principal": null}), validation, "'principal'"),
        (json!({"Principal": "a b"}), validation, "'principal'"),
        (json!({"Principal": "nobody"}), invalid, "principal was invalid"),
        (json!({"SourceArn": "bucket"}), validation, "'sourceArn'"),
        (json!({"SourceAccount": "1"}), validation, "'sourceAccount'"),
        (json!({"EventSourceToken": "a/b"}), validation, "'eventSourceToken'"),
        (json!({"PrincipalOrgID": "o-1"}), validation, "'principalOrgID'"),
        (json!({"FunctionUrlAuthType": "SOME"}), validation, "[NONE, AWS_IAM]"),
        (json!({"FunctionUrlAuthType": "NONE"}), invalid, "InvokeFunctionUrl"),
        (json!({"Principal": 1}), "SerializationException", "wrong type"),
    ] {
        let answer = d.send("POST", POLICY, &permission("s", changes.clone())).await;
        let text = answer.expect(400, exception);
        assert!(text.contains(words), "{changes}: {text}");
    }
    d.get(POLICY).await.expect(404, "ResourceNotFoundException");
    let bad = d.call("DELETE", &format!("{POLICY}/a%20b"), &[], b"").await;
    bad.expect(400, validation);
    for path in ["/2015-03-31/functions/g/policy", "/2015-03-31/functions/g/policy/s"] {
        let method = if path.ends_with("/s") { "DELETE" } else { "GET" };
        d.call(method, path, &[], b"").await.expect(404, "ResourceNotFoundException");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_has_a_longest_length() {
    let (_dir, d) = with_alias().await;
    let long = format!("arn:aws:s3:::{}", "b".repeat(4000));
    for sid in ["1", "2", "3", "4"] {
        add(&d, POLICY, sid, json!({"SourceArn": long})).await;
    }
    let full = d.send("POST", POLICY, &permission("5", json!({"SourceArn": long}))).await;
    let full = full.expect(400, "PolicyLengthExceededException");
    assert!(full.contains("bigger than the limit (20480)"), "{full}");
    assert_eq!(policy(&d, POLICY).await.0.len(), 4);
}
