//! Publishing versions, and what can be done with them.

use base64::{Engine, engine::general_purpose::STANDARD};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Daemon, FUNCTIONS, daemon, limits, start, zip};

async fn publish(d: &Daemon, name: &str, body: Value) -> Value {
    let answer = d.send("POST", &format!("{FUNCTIONS}/{name}/versions"), &body).await;
    assert_eq!(answer.status, 201, "{}", answer.json());
    answer.json()
}

async fn configure(d: &Daemon, name: &str, changes: Value) {
    let path = format!("{FUNCTIONS}/{name}/configuration");
    assert_eq!(d.send("PUT", &path, &changes).await.status, 200);
}

fn environments(d: &Daemon, key: &str) -> Vec<String> {
    let all = d.fake.environments.lock().unwrap();
    all.iter().flatten().filter(|(k, _)| k == key).map(|(_, value)| value.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_stays_as_it_was_published() {
    let (dir, d) = daemon().await;
    let created =
        d.create("f", json!({"Environment": {"Variables": {"STAGE": "one"}}})).await.json();
    let first = publish(&d, "f", json!({"Description": "the first"})).await;
    let arn = "arn:aws:lambda:us-east-1:000000000000:function:f";
    assert_eq!(
        (&first["Version"], &first["FunctionArn"]),
        (&json!("1"), &json!(format!("{arn}:1")))
    );
    assert_eq!(first["Description"], "the first");
    assert_eq!(first["CodeSha256"], created["CodeSha256"]);
    let again = publish(&d, "f", json!({"CodeSha256": created["CodeSha256"]})).await;
    assert_eq!(again, first, "nothing has changed");

    configure(&d, "f", json!({"Environment": {"Variables": {"STAGE": "two"}}})).await;
    let path = format!("{FUNCTIONS}/f/code");
    let second = d.send("PUT", &path, &json!({"ZipFile": zip("2"), "Publish": true})).await.json();
    assert_eq!((&second["Version"], &second["MemorySize"]), (&json!("2"), &json!(128)));
    assert_eq!(d.get(&format!("{FUNCTIONS}/f:1/configuration")).await.json(), first);
    assert_eq!(d.get(&format!("{FUNCTIONS}/f/configuration?Qualifier=2")).await.json(), second);
    let latest = d.get(&format!("{FUNCTIONS}/f")).await.json()["Configuration"].clone();
    assert_eq!((&latest["Version"], &latest["FunctionArn"]), (&json!("$LATEST"), &json!(arn)));

    for (qualifier, code) in [("", &b"PK2"[..]), ("?Qualifier=1", b"PK1"), ("?Qualifier=2", b"PK2")]
    {
        let got = d.get(&format!("{FUNCTIONS}/f{qualifier}")).await.json();
        let location = got["Code"]["Location"].as_str().unwrap();
        let path = location.strip_prefix(&format!("http://{}", d.address)).unwrap();
        assert_eq!(d.get(path).await.body, code, "{qualifier}");
    }
    for path in ["f:1/code", "f:1/configuration"] {
        let path = format!("{FUNCTIONS}/{path}");
        let body = json!({"ZipFile": zip("3"), "Timeout": 9});
        d.send("PUT", &path, &body).await.expect(400, "InvalidParameterValueException");
    }
    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    assert_eq!(d.get(&format!("{FUNCTIONS}/f:1/configuration")).await.json(), first);
    d.snapshot_is("f:1", "ready").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_version_has_instances_of_its_own() {
    let (_dir, d) = daemon().await;
    let created = d.create("f", json!({"Publish": true})).await;
    assert_eq!((created.status, &created.json()["Version"]), (201, &json!("1")));
    for name in ["f", "f:1"] {
        d.snapshot_is(name, "ready").await;
    }
    let remember = |what: &str| json!({"do": "remember", "what": what});
    for (name, version) in [("f", "$LATEST"), ("f:1", "1")] {
        let first = d.invoke(name, &[("X-Amz-Log-Type", "Tail")], &remember(name)).await;
        assert_eq!(first.header("x-firn-start-kind"), Some("thaw"));
        assert_eq!(first.header("x-amz-executed-version"), Some(version));
        let tail = STANDARD.decode(first.header("x-amz-log-result").unwrap()).unwrap();
        let tail = String::from_utf8(tail).unwrap();
        assert!(tail.lines().next().unwrap().ends_with(&format!(" Version: {version}")), "{tail}");
    }
    for name in ["f", "f:1"] {
        let second = d.invoke(name, &[], &remember("")).await;
        assert_eq!(second.header("x-firn-start-kind"), Some("warm"));
        assert_eq!(second.json(), name, "an instance of another version answered");
    }
    let versions = environments(&d, "AWS_LAMBDA_FUNCTION_VERSION");
    assert!(versions.contains(&"1".into()) && versions.contains(&"$LATEST".into()), "{versions:?}");
    let streams = environments(&d, "AWS_LAMBDA_LOG_STREAM_NAME");
    assert!(streams.iter().any(|s| s.contains("/[1]")), "{streams:?}");
    // A change of $LATEST leaves the version's instances and snapshot alone.
    configure(&d, "f", json!({"MemorySize": 256})).await;
    d.snapshot_is("f:1", "ready").await;
    let third = d.invoke("f:1", &[], &remember("")).await;
    assert_eq!(third.header("x-firn-start-kind"), Some("warm"));
    let listed = d.get("/firn/v1/instances").await.json();
    let listed = listed["Instances"].as_object().unwrap();
    assert!(
        listed.values().any(|i| (&i["FunctionName"], &i["Version"]) == (&json!("f"), &json!("1")))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_deleted_alone_and_with_their_function() {
    let (dir, d) = daemon().await;
    // A snapshot that is being prepared may have its hands on a file for a moment.
    let code_files_are = async |expected: usize| {
        let files = || std::fs::read_dir(dir.path().join("code")).unwrap().count();
        for _ in 0..2000 {
            if files() == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} files of code, not {expected}", files());
    };
    d.create("f", json!({"Publish": true})).await;
    let path = format!("{FUNCTIONS}/f/code");
    d.send("PUT", &path, &json!({"ZipFile": zip("2"), "Publish": true})).await;
    configure(&d, "f", json!({"Timeout": 9})).await;
    assert_eq!(publish(&d, "f", json!({})).await["Version"], "3");
    // 2 and 3 share their code.
    code_files_are(4).await;
    let delete =
        async |path: &str| d.call("DELETE", &format!("{FUNCTIONS}/{path}"), &[], b"").await;
    delete("f:$LATEST").await.expect(400, "InvalidParameterValueException");
    assert_eq!(delete("f?Qualifier=1").await.status, 204);
    code_files_are(2).await;
    delete("f:1").await.expect(404, "ResourceNotFoundException");
    assert_eq!(delete("f:3").await.status, 204);
    // 2 and $LATEST still need it.
    code_files_are(2).await;
    d.invoke("f:3", &[], &json!(1)).await.expect(404, "ResourceNotFoundException");
    assert_eq!(d.invoke("f:2", &[], &json!(1)).await.status, 200);
    assert_eq!(publish(&d, "f", json!({})).await["Version"], "4", "3 is not given again");
    assert_eq!(delete("f").await.status, 204);
    code_files_are(0).await;
    d.invoke("f:2", &[], &json!(1)).await.expect(404, "ResourceNotFoundException");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_listed_in_pages() {
    let (_dir, d) = daemon().await;
    d.create("a", json!({})).await;
    d.create("f", json!({"Publish": true})).await;
    for timeout in [4, 5] {
        configure(&d, "f", json!({"Timeout": timeout})).await;
        publish(&d, "f", json!({})).await;
    }
    let all = async |path: &str, items: &str| {
        let (mut found, mut marker) = (Vec::new(), String::new());
        loop {
            let page = d.get(&format!("{FUNCTIONS}{path}MaxItems=2{marker}")).await.json();
            let list = page[items].as_array().unwrap();
            assert!(list.len() <= 2);
            let arn = |f: &Value| f["FunctionArn"].as_str().unwrap().to_owned();
            found.extend(list.iter().map(arn));
            let Some(next) = page["NextMarker"].as_str() else { return found };
            marker = format!("&Marker={next}");
        }
    };
    let versions = all("/f/versions?", "Versions").await;
    let ends: Vec<&str> = versions.iter().map(|v| v.rsplit(':').next().unwrap()).collect();
    assert_eq!(ends, ["$LATEST", "1", "2", "3"]);
    let everything = all("?FunctionVersion=ALL&", "Functions").await;
    let ends: Vec<String> =
        everything.iter().map(|v| v.rsplit(':').take(2).collect::<Vec<_>>().join("/")).collect();
    assert_eq!(ends, ["$LATEST/a", "$LATEST/f", "1/f", "2/f", "3/f"]);
    assert_eq!(all("?", "Functions").await.len(), 2);
    for path in ["/f/versions?Marker=%21", "/f/versions?Marker=eA"] {
        let bad = d.get(&format!("{FUNCTIONS}{path}")).await;
        bad.expect(400, "InvalidParameterValueException");
    }
    let settings = d.get("/2016-08-19/account-settings").await.json();
    assert_eq!(settings["AccountUsage"]["FunctionCount"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_is_guarded() {
    let (_dir, d) = daemon().await;
    let created = d.create("f", json!({})).await.json();
    let invalid = "InvalidParameterValueException";
    for (path, body, status, exception, words) in [
        ("f", json!({"CodeSha256": "AAAA"}), 400, invalid, "AAAA"),
        ("f", json!({"RevisionId": "old"}), 412, "PreconditionFailedException", "Revision Id"),
        ("f", json!({"Description": "x".repeat(257)}), 400, "ValidationException", "'description'"),
        ("f", json!({"PublishTo": "LATEST_PUBLISHED"}), 400, invalid, "PublishTo"),
        ("f", json!({"Description": 1}), 400, "SerializationException", "wrong type"),
        ("f:$LATEST", json!({}), 400, invalid, "unqualified"),
        ("g", json!({}), 404, "ResourceNotFoundException", "function:g"),
        ("f:1", json!({}), 404, "ResourceNotFoundException", "function:f:1"),
    ] {
        let answer = d.send("POST", &format!("{FUNCTIONS}/{path}/versions"), &body).await;
        let text = answer.expect(status, exception);
        assert!(text.contains(words), "{body}: {text}");
    }
    let versions = d.get(&format!("{FUNCTIONS}/f/versions")).await.json();
    assert_eq!(versions["Versions"].as_array().unwrap().len(), 1, "nothing was half done");
    let guard = json!({"RevisionId": created["RevisionId"], "CodeSha256": created["CodeSha256"]});
    assert_eq!(publish(&d, "f", guard).await["Version"], "1");
    for qualifier in ["0", "01", "2", "x", "4294967296"] {
        let answer = d.invoke(&format!("f:{qualifier}"), &[], &json!(1)).await;
        answer.expect(404, "ResourceNotFoundException");
    }
}
