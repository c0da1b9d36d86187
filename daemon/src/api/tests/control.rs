//! Creating, reading, changing and deleting functions.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;

use super::{FUNCTIONS, daemon, zip};

#[tokio::test(flavor = "multi_thread")]
async fn a_function_lives_through_all_operations() {
    let (_dir, d) = daemon().await;
    let created = d.create("hello", json!({"Tags": {"team": "x"}})).await;
    assert_eq!(created.status, 201);
    let created = created.json();
    assert_eq!(created["FunctionArn"], "arn:aws:lambda:us-east-1:000000000000:function:hello");
    assert_eq!((&created["State"], &created["Version"]), (&json!("Active"), &json!("$LATEST")));

    let got = d.get(&format!("{FUNCTIONS}/hello")).await.json();
    assert_eq!(got["Configuration"]["CodeSha256"], created["CodeSha256"]);
    assert_eq!(got["Tags"]["team"], "x");
    let location = got["Code"]["Location"].as_str().unwrap();
    let path = location.strip_prefix(&format!("http://{}", d.address)).unwrap();
    assert_eq!(d.get(path).await.body, b"PK1");

    let arn = "arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Ahello";
    let path = format!("{FUNCTIONS}/{arn}/configuration?Qualifier=%24LATEST");
    let got = d.get(&path).await.json();
    assert_eq!(got["FunctionArn"], format!("{}:$LATEST", created["FunctionArn"].as_str().unwrap()));

    let path = format!("{FUNCTIONS}/hello/configuration");
    let changes = json!({"Timeout": 9, "RevisionId": created["RevisionId"]});
    let updated = d.send("PUT", &path, &changes).await;
    assert_eq!(updated.status, 200);
    let updated = updated.json();
    assert_eq!((&updated["Timeout"], &updated["MemorySize"]), (&json!(9), &json!(128)));
    assert_ne!(updated["RevisionId"], created["RevisionId"]);
    d.send("PUT", &path, &changes).await.expect(412, "PreconditionFailedException");

    let path = format!("{FUNCTIONS}/hello/code");
    let dry = d.send("PUT", &path, &json!({"ZipFile": zip("2"), "DryRun": true})).await.json();
    assert_ne!(dry["CodeSha256"], created["CodeSha256"]);
    let still = d.get(&format!("{FUNCTIONS}/hello/configuration")).await.json();
    assert_eq!(still["CodeSha256"], created["CodeSha256"]);
    let updated = d.send("PUT", &path, &json!({"ZipFile": zip("2")})).await.json();
    assert_eq!(updated["CodeSha256"], dry["CodeSha256"]);

    let path = format!("{FUNCTIONS}/hello");
    assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    let gone = d.get(&path).await.expect(404, "ResourceNotFoundException");
    assert_eq!(
        gone,
        r#"{"Message":"Function not found: arn:aws:lambda:us-east-1:000000000000:function:hello","Type":"User"}"#
    );
    d.call("DELETE", &path, &[], b"").await.expect(404, "ResourceNotFoundException");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    let (_dir, d) = daemon().await;
    for i in 0..5 {
        assert_eq!(d.create(&format!("f{i}"), json!({})).await.status, 201);
    }
    let mut names = Vec::new();
    let mut path = format!("{FUNCTIONS}/?MaxItems=2");
    loop {
        let page = d.get(&path).await.json();
        let functions = page["Functions"].as_array().unwrap();
        assert!(functions.len() <= 2);
        names.extend(functions.iter().map(|f| f["FunctionName"].as_str().unwrap().to_owned()));
        let Some(marker) = page["NextMarker"].as_str() else { break };
        path = format!("{FUNCTIONS}?MaxItems=2&Marker={marker}");
    }
    assert_eq!(names, ["f0", "f1", "f2", "f3", "f4"]);
    d.get(&format!("{FUNCTIONS}?Marker=%21")).await.expect(400, "InvalidParameterValueException");
    d.get(&format!("{FUNCTIONS}?MaxItems=0")).await.expect(400, "ValidationException");
    let settings = d.get("/2016-08-19/account-settings/").await.json();
    assert_eq!(settings["AccountUsage"]["FunctionCount"], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_and_leaves_nothing() {
    let (dir, d) = daemon().await;
    let invalid = "InvalidParameterValueException";
    for (changes, exception, words) in [
        (json!({"MemorySize": 1}), "ValidationException", "'memorySize'"),
        (json!({"MemorySize": "x"}), "SerializationException", "wrong type"),
        (json!({"FunctionName": "a b"}), "ValidationException", "'functionName'"),
        (json!({"FunctionName": null}), "ValidationException", "Value 'null' at 'functionName'"),
        (json!({"FunctionName": "x:1"}), invalid, "without a qualifier"),
        (json!({"Runtime": "cobol"}), invalid, "[python3.11]"),
        (json!({"Code": {}}), invalid, "Please provide a source for function code."),
        (json!({"Code": {"ZipFile": "%"}}), "SerializationException", "base64"),
        (json!({"Code": {"ZipFile": "aGVsbG8="}}), invalid, "Could not unzip uploaded file"),
        (json!({"Code": {"ImageUri": "i"}, "PackageType": "Image"}), invalid, "Image"),
    ] {
        let body = d.create("bad", changes.clone()).await.expect(400, exception);
        assert!(body.contains(words), "{changes}: {body}");
    }
    d.call("POST", FUNCTIONS, &[], b"{").await.expect(400, "SerializationException");
    let mut big = b"PK".to_vec();
    big.resize(52_428_801, 0);
    let big = d.create("bad", json!({"Code": {"ZipFile": STANDARD.encode(big)}})).await;
    let body = big.expect(400, invalid);
    assert!(body.contains("Zipped size must be smaller than 52428800 bytes"), "{body}");
    let huge = vec![b' '; 70_167_212];
    let body = d.call("POST", FUNCTIONS, &[], &huge).await;
    let body = body.expect(413, "RequestEntityTooLargeException");
    assert!(body.contains("70167211"), "{body}");

    assert!(d.get(FUNCTIONS).await.json()["Functions"].as_array().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("code")).unwrap().count(), 0);
    assert_eq!(d.create("good", json!({})).await.status, 201);
    let twice = d.create("good", json!({})).await.expect(409, "ResourceConflictException");
    assert!(twice.contains("Function already exist: good"), "{twice}");
    assert_eq!(std::fs::read_dir(dir.path().join("code")).unwrap().count(), 2);
    d.get("/2015-03-31/nothing").await.expect(404, "UnknownOperationException");
    let wrong = d.call("PATCH", FUNCTIONS, &[], b"").await;
    wrong.expect(405, "UnknownOperationException");
}

#[tokio::test(flavor = "multi_thread")]
async fn web_pages_from_elsewhere_are_refused() {
    let (_dir, d) = daemon().await;
    for (origin, status) in [
        ("https://example.com", 403),
        ("http://localhost.example.com:80", 403),
        ("null", 403),
        ("http://localhost:9000", 200),
        ("http://127.0.0.1", 200),
        ("http://[::1]:9000", 200),
    ] {
        let answer = d.call("GET", FUNCTIONS, &[("Origin", origin)], b"").await;
        assert_eq!(answer.status, status, "{origin}");
    }
}
