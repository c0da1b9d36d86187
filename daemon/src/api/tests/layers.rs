//! Layers: published, listed, permitted, deleted, and what functions have of them.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{
    Answer, Daemon, FUNCTIONS, daemon,
    identity::{ADMIN, BOB, function, guarded},
    limits, start, zip,
};

const LAYERS: &str = "/2018-10-31/layers";
const INVALID: &str = "InvalidParameterValueException";

impl Daemon {
    async fn publish_layer(&self, name: &str, changes: Value) -> Answer {
        let mut body = json!({"Content": {"ZipFile": zip(name)}});
        for (key, value) in changes.as_object().unwrap() {
            body[key] = value.clone();
        }
        self.send("POST", &format!("{LAYERS}/{name}/versions"), &body).await
    }

    async fn delete(&self, path: &str) -> u16 {
        self.call("DELETE", path, &[], b"").await.status
    }

    async fn set_layers(&self, function: &str, layers: &[&str]) -> Answer {
        let path = format!("{FUNCTIONS}/{function}/configuration");
        self.send("PUT", &path, &json!({ "Layers": layers })).await
    }
}

fn arn(name: &str, version: u32) -> String {
    format!("arn:aws:lambda:us-east-1:000000000000:layer:{name}:{version}")
}

fn files(dir: &tempfile::TempDir) -> usize {
    std::fs::read_dir(dir.path().join("code")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_lives_through_all_operations() {
    let (dir, d) = daemon().await;
    let changes = json!({
        "Description": "d", "LicenseInfo": "MIT",
        "CompatibleRuntimes": ["python3.11", "python3.12"],
        "CompatibleArchitectures": ["x86_64"],
    });
    let published = d.publish_layer("l", changes).await;
    assert_eq!(published.status, 201);
    let published = published.json();
    assert_eq!(published["LayerVersionArn"], arn("l", 1));
    assert_eq!(published["LayerArn"], arn("l", 1).strip_suffix(":1").unwrap());
    assert_eq!((&published["Version"], &published["LicenseInfo"]), (&json!(1), &json!("MIT")));
    assert_eq!(published["Content"]["CodeSize"], 3);
    let location = published["Content"]["Location"].as_str().unwrap();
    let path = location.strip_prefix(&format!("http://{}", d.address)).unwrap();
    assert_eq!(d.get(path).await.body, b"PKl");

    let got = d.get(&format!("{LAYERS}/l/versions/1")).await.json();
    assert_eq!(got, published);
    let by_arn = |arn: &str| format!("{LAYERS}?find=LayerVersion&Arn={}", arn.replace(':', "%3A"));
    assert_eq!(d.get(&by_arn(&arn("l", 1))).await.json(), published);
    let by_layer =
        format!("{LAYERS}/{}/versions/1", arn("l", 1).replace(":1", "").replace(':', "%3A"));
    assert_eq!(d.get(&by_layer).await.json(), published);

    assert_eq!(d.publish_layer("l", json!({})).await.json()["Version"], 2);
    assert_eq!(d.delete(&format!("{LAYERS}/l/versions/2")).await, 204);
    assert_eq!(d.delete(&format!("{LAYERS}/l/versions/2")).await, 204);
    d.get(&format!("{LAYERS}/l/versions/2")).await.expect(404, "ResourceNotFoundException");
    assert_eq!(files(&dir), 1);
    assert_eq!(d.publish_layer("l", json!({})).await.json()["Version"], 3, "never given twice");

    for (path, status, exception) in [
        (by_arn("arn:x"), 400, "ValidationException"),
        (by_arn(&arn("l", 9)), 404, "ResourceNotFoundException"),
        (by_arn(&arn("l", 1).replace("us-east-1", "eu-west-1")), 404, "ResourceNotFoundException"),
        (format!("{LAYERS}/l/versions/0"), 400, INVALID),
        (format!("{LAYERS}/l/versions/99999999999"), 404, "ResourceNotFoundException"),
        (format!("{LAYERS}/l/versions/x"), 400, "ValidationException"),
        (format!("{LAYERS}/a%20b/versions/1"), 400, "ValidationException"),
        (format!("{LAYERS}?find=x"), 400, "ValidationException"),
    ] {
        let body = d.get(&path).await.expect(status, exception);
        assert!(status != 404 || body.contains("does not exist."), "{path}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_have_a_layer_is_what_policies_say() {
    let (_dir, d) = guarded().await;
    let send = async |who, method, path: String, body: Value| {
        d.signed(who, method, &path, body.to_string().as_bytes()).await
    };
    let layer = json!({"Content": {"ZipFile": zip("l")}});
    let versions = format!("{LAYERS}/l/versions");
    let refused = send(BOB, "POST", versions.clone(), layer.clone()).await;
    refused.expect(403, "AccessDeniedException");
    assert_eq!(send(ADMIN, "POST", versions.clone(), layer).await.status, 201);
    assert_eq!(d.signed(ADMIN, "POST", FUNCTIONS, &function("bob-1", "r")).await.status, 201);

    let configuration = format!("{FUNCTIONS}/bob-1/configuration");
    let use_it = || send(BOB, "PUT", configuration.clone(), json!({"Layers": [arn("l", 1)]}));
    let one = format!("{versions}/1");
    let get_it = || d.signed(BOB, "GET", &one, b"");
    let allow = async |id: &str, principal: &str, more: Value| {
        let mut body = json!({"StatementId": id, "Action": "lambda:GetLayerVersion",
            "Principal": principal});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = send(ADMIN, "POST", format!("{versions}/1/policy"), body).await;
        assert_eq!(answer.status, 201);
    };
    // Neither an account as such nor an organisation lets a user in.
    allow("account", "000000000000", json!({})).await;
    allow("organisation", "*", json!({"OrganizationId": "o-abcdefghij"})).await;
    for refused in [use_it().await, get_it().await] {
        let why = refused.expect(403, "AccessDeniedException");
        assert!(why.contains("lambda:GetLayerVersion on resource"), "{why}");
    }
    allow("all", "*", json!({})).await;
    let location = get_it().await.json()["Content"]["Location"].as_str().unwrap().to_owned();
    let path = location.split_once("/firn/").unwrap().1;
    assert_eq!(d.get(&format!("/firn/{path}")).await.body, STANDARD.decode(zip("l")).unwrap());
    let path = path.split('&').next().unwrap();
    d.get(&format!("/firn/{path}")).await.expect(403, "MissingAuthenticationTokenException");
    assert_eq!(use_it().await.status, 200);
    let gone = d.signed(ADMIN, "DELETE", &format!("{versions}/1/policy/all"), b"").await;
    assert_eq!(gone.status, 204);
    get_it().await.expect(403, "AccessDeniedException");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_none_are_refused_and_leave_nothing() {
    let (dir, d) = daemon().await;
    for (changes, exception, words) in [
        (json!({"Content": null}), "ValidationException", "'content'"),
        (json!({"Content": {}}), INVALID, "Please provide a source"),
        (json!({"Content": {"ZipFile": "aGVsbG8="}}), INVALID, "Could not unzip uploaded file"),
        (json!({"Description": "x".repeat(257)}), "ValidationException", "'description'"),
        (json!({"LicenseInfo": "x".repeat(513)}), "ValidationException", "'licenseInfo'"),
        (json!({"CompatibleRuntimes": ["A B"]}), "ValidationException", "'compatibleRuntimes'"),
        (
            json!({"CompatibleRuntimes": vec!["python3.11"; 16]}),
            "ValidationException",
            "less than or equal to 15",
        ),
        (json!({"CompatibleArchitectures": ["z80"]}), "ValidationException", "x86_64|arm64"),
    ] {
        let body = d.publish_layer("bad", changes.clone()).await.expect(400, exception);
        assert!(body.contains(words), "{changes}: {body}");
    }
    let long = "x".repeat(141);
    d.publish_layer(&long, json!({})).await.expect(400, "ValidationException");
    let elsewhere = "arn%3Aaws%3Alambda%3Aeu-west-1%3A000000000000%3Alayer%3Al";
    d.publish_layer(elsewhere, json!({})).await.expect(400, INVALID);
    assert_eq!(files(&dir), 0);
    assert_eq!(d.get(LAYERS).await.json()["Layers"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_paged_and_filtered() {
    let (_dir, d) = daemon().await;
    let new = json!({"CompatibleRuntimes": ["python3.12"]});
    d.publish_layer("a", json!({})).await;
    d.publish_layer("b", json!({"CompatibleRuntimes": ["python3.11"]})).await;
    d.publish_layer("b", new.clone()).await;
    d.publish_layer("b", json!({"CompatibleArchitectures": ["arm64"]})).await;
    let page = d.get(&format!("{LAYERS}?MaxItems=1")).await.json();
    assert_eq!(page["Layers"][0]["LayerName"], "a");
    let marker = page["NextMarker"].as_str().unwrap();
    let page = d.get(&format!("{LAYERS}?MaxItems=1&Marker={marker}")).await.json();
    assert_eq!(page["Layers"][0]["LatestMatchingVersion"]["LayerVersionArn"], arn("b", 3));
    assert_eq!(page["NextMarker"], Value::Null);
    let matching = d.get(&format!("{LAYERS}?CompatibleRuntime=python3.11")).await.json();
    assert_eq!(matching["Layers"].as_array().unwrap().len(), 1);
    assert_eq!(matching["Layers"][0]["LatestMatchingVersion"]["Version"], 1);
    let versions = |query: &str| format!("{LAYERS}/b/versions?{query}");
    let page = d.get(&versions("MaxItems=2")).await.json();
    let numbers = |page: &Value| -> Vec<Value> {
        let versions = page["LayerVersions"].as_array().unwrap();
        versions.iter().map(|v| v["Version"].clone()).collect()
    };
    assert_eq!(numbers(&page), [3, 2]);
    let marker = page["NextMarker"].as_str().unwrap();
    assert_eq!(numbers(&d.get(&versions(&format!("Marker={marker}"))).await.json()), [1]);
    let arm = d.get(&versions("CompatibleArchitecture=arm64")).await.json();
    assert_eq!(numbers(&arm), [3]);
    d.get(&versions("CompatibleArchitecture=z80")).await.expect(400, "ValidationException");
    assert_eq!(numbers(&d.get(&format!("{LAYERS}/none/versions")).await.json()), [0; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_have_layers_in_order() {
    let (dir, d) = daemon().await;
    for name in ["one", "two"] {
        d.publish_layer(name, json!({})).await;
    }
    let (one, two) = (arn("one", 1), arn("two", 1));
    let created = d.create("f", json!({"Layers": [one, two]})).await;
    assert_eq!(created.status, 201);
    let layers = json!([{"Arn": one, "CodeSize": 5}, {"Arn": two, "CodeSize": 5}]);
    assert_eq!(created.json()["Layers"], layers);
    d.snapshot_is("f", "ready").await;
    // Two layers, an archive, a disk.
    assert_eq!(files(&dir), 4);

    let updated = d.set_layers("f", &[&two, &one]).await;
    assert_eq!(updated.json()["Layers"][0]["Arn"], two);
    // The same ones in another order are another disk, and the instances are new.
    assert_eq!(files(&dir), 4);
    let thaws = d.count(|c| &c.thaws);
    assert_eq!(d.invoke("f", &[], &json!({})).await.status, 200);
    assert!(d.count(|c| &c.thaws) + d.count(|c| &c.boots) > thaws);
    let path = format!("{FUNCTIONS}/f/configuration");
    let same = d.send("PUT", &path, &json!({"Timeout": 5})).await.json();
    assert_eq!(same["Layers"].as_array().unwrap().len(), 2);
    let code = d.send("PUT", &format!("{FUNCTIONS}/f/code"), &json!({"ZipFile": zip("2")})).await;
    assert_eq!(code.json()["Layers"].as_array().unwrap().len(), 2);
    assert_eq!(files(&dir), 4);
    let none = d.set_layers("f", &[]).await.json();
    assert_eq!((none.get("Layers"), files(&dir)), (None, 4));
    let settings = d.get("/2016-08-19/account-settings/").await.json();
    assert_eq!(settings["AccountUsage"]["TotalCodeSize"], 5 + 5 + 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_cannot_be_had_are_named() {
    let (dir, d) = daemon().await;
    for name in ["a", "a", "b", "c", "d", "e", "huge"] {
        d.publish_layer(name, json!({})).await;
    }
    assert_eq!(d.create("f", json!({})).await.status, 201);
    let before = files(&dir);
    let six: Vec<String> = ["a", "b", "c", "d", "e", "huge"].map(|name| arn(name, 1)).into();
    let elsewhere = arn("a", 1).replace("us-east-1", "eu-west-1");
    let (one, two, huge) = (arn("a", 1), arn("a", 2), arn("huge", 1));
    for (layers, exception, words) in [
        (six, INVALID, "Cannot reference more than 5 layers."),
        (vec![elsewhere], INVALID, "expected to be in region us-east-1."),
        (vec![arn("a", 9)], INVALID, "a:9 does not exist."),
        (vec![one.replace("000000000000", "111111111111")], INVALID, "does not exist."),
        (vec![one.clone(), two], INVALID, "Two different versions of the same layer"),
        (vec!["arn:x".into()], "ValidationException", "'layers'"),
        (
            vec![huge],
            INVALID,
            "Function code combined with layers exceeds the maximum allowed size of 262144000 \
             bytes. The actual size is 280000000 bytes.",
        ),
    ] {
        let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
        let body = d.set_layers("f", &layers).await.expect(400, exception);
        assert!(body.contains(words), "{layers:?}: {body}");
        let body = d.create("g", json!({ "Layers": layers })).await.expect(400, exception);
        assert!(body.contains(words), "{layers:?}: {body}");
    }
    assert_eq!(files(&dir), before);
    assert_eq!(d.set_layers("f", &[&one]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_layer_stays_for_the_functions_that_have_it() {
    let dir = tempfile::tempdir().unwrap();
    let d = start(dir.path(), limits(), 0).await;
    d.publish_layer("l", json!({})).await;
    d.create("f", json!({"Layers": [arn("l", 1)], "Publish": true})).await;
    assert_eq!(d.delete(&format!("{LAYERS}/l/versions/1")).await, 204);
    d.get(&format!("{LAYERS}/l/versions/1")).await.expect(404, "ResourceNotFoundException");
    let body = d.create("g", json!({"Layers": [arn("l", 1)]})).await.expect(400, INVALID);
    assert!(body.contains("does not exist"), "{body}");
    d.scheduler.close(std::time::Duration::ZERO).await;
    drop(d);

    // The disk is built of the archives once more.
    let disk = std::fs::read_dir(dir.path().join("code"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().ends_with(".disk.sealed"));
    std::fs::remove_file(disk.unwrap()).unwrap();
    let d = start(dir.path(), limits(), 0).await;
    assert_eq!(d.invoke("f", &[], &json!({})).await.status, 200);
    d.set_layers("f", &[]).await;
    assert_eq!(d.invoke("f:1", &[], &json!({})).await.status, 200);
    d.snapshot_is("f", "ready").await;
    d.snapshot_is("f:1", "ready").await;
    assert_eq!(files(&dir), 4, "code, two disks, the layer");
    assert_eq!(d.delete(&format!("{FUNCTIONS}/f?Qualifier=1")).await, 204);
    assert_eq!(files(&dir), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn permissions_are_a_policy() {
    let (_dir, d) = daemon().await;
    d.publish_layer("l", json!({})).await;
    let path = format!("{LAYERS}/l/versions/1/policy");
    let get = json!({
        "StatementId": "s", "Action": "lambda:GetLayerVersion", "Principal": "111111111111",
    });
    d.get(&path).await.expect(404, "ResourceNotFoundException");
    let added = d.send("POST", &path, &get).await;
    assert_eq!(added.status, 201);
    let added = added.json();
    let statement: Value = serde_json::from_str(added["Statement"].as_str().unwrap()).unwrap();
    let expected = json!({
        "Sid": "s", "Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::111111111111:root"},
        "Action": "lambda:GetLayerVersion", "Resource": arn("l", 1),
    });
    assert_eq!(statement, expected);
    d.send("POST", &path, &get).await.expect(409, "ResourceConflictException");
    let everybody = json!({
        "StatementId": "t", "Action": "lambda:GetLayerVersion", "Principal": "*",
        "OrganizationId": "o-0123456789",
    });
    let old = format!("{path}?RevisionId=old");
    d.send("POST", &old, &everybody).await.expect(412, "PreconditionFailedException");
    let revision = added["RevisionId"].as_str().unwrap();
    let added = d.send("POST", &format!("{path}?RevisionId={revision}"), &everybody).await;
    assert_eq!(added.status, 201);
    let policy = d.get(&path).await.json();
    let document: Value = serde_json::from_str(policy["Policy"].as_str().unwrap()).unwrap();
    assert_eq!(document["Statement"][0], expected);
    assert_eq!(
        document["Statement"][1]["Condition"]["StringEquals"]["aws:PrincipalOrgID"],
        "o-0123456789"
    );
    for (member, value, exception) in [
        ("Action", json!("lambda:Invoke"), "ValidationException"),
        ("Principal", json!("me"), "ValidationException"),
        ("Principal", json!(null), "ValidationException"),
        ("StatementId", json!("a b"), "ValidationException"),
        ("OrganizationId", json!("x"), "ValidationException"),
        ("OrganizationId", json!("o-0123456789"), INVALID),
    ] {
        let mut body = get.clone();
        body["StatementId"] = "u".into();
        body[member] = value;
        d.send("POST", &path, &body).await.expect(400, exception);
    }
    let gone = d.call("DELETE", &format!("{path}/x"), &[], b"").await;
    gone.expect(404, "ResourceNotFoundException");
    for id in ["s", "t"] {
        assert_eq!(d.delete(&format!("{path}/{id}")).await, 204);
    }
    d.get(&path).await.expect(404, "ResourceNotFoundException");
    // However many, they stay within the limit.
    let mut status = 201;
    for i in 0..200 {
        let mut body = get.clone();
        body["StatementId"] = format!("{i:0100}").into();
        let answer = d.send("POST", &path, &body).await;
        status = answer.status;
        if status != 201 {
            answer.expect(400, "PolicyLengthExceededException");
            break;
        }
    }
    assert_eq!(status, 400);
}
