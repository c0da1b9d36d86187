//! Aliases, and invocations through them.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Daemon, FUNCTIONS, daemon, limits, start};

/// A daemon with the function `f`, which has versions 1 and 2.
async fn with_versions() -> (tempfile::TempDir, Daemon) {
    let (dir, d) = daemon().await;
    d.create("f", json!({"Publish": true})).await;
    d.send("PUT", &format!("{FUNCTIONS}/f/configuration"), &json!({"Timeout": 9})).await;
    assert_eq!(d.send("POST", &format!("{FUNCTIONS}/f/versions"), &json!({})).await.status, 201);
    (dir, d)
}

const ALIASES: &str = "/2015-03-31/functions/f/aliases";

async fn create(d: &Daemon, body: Value) -> Value {
    let answer = d.send("POST", ALIASES, &body).await;
    assert_eq!(answer.status, 201, "{}", answer.json());
    answer.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_lives_through_all_operations() {
    let (dir, d) = with_versions().await;
    let made = create(&d, json!({"Name": "prod", "FunctionVersion": "1"})).await;
    let arn = "arn:aws:lambda:us-east-1:000000000000:function:f:prod";
    let revision = made["RevisionId"].clone();
    assert_eq!(
        made,
        json!({"AliasArn": arn, "Name": "prod", "FunctionVersion": "1", "Description": "",
            "RevisionId": revision})
    );
    let path = format!("{ALIASES}/prod");
    assert_eq!(d.get(&path).await.json(), made);
    let got = d.get(&format!("{FUNCTIONS}/f/configuration?Qualifier=prod")).await.json();
    assert_eq!((&got["FunctionArn"], &got["Version"]), (&json!(arn), &json!("1")));
    let answer = d.invoke("f:prod", &[], &json!(1)).await;
    assert_eq!((answer.status, answer.header("x-amz-executed-version")), (200, Some("1")));

    let change = json!({"FunctionVersion": "2", "Description": "new", "RevisionId": revision});
    let updated = d.send("PUT", &path, &change).await.json();
    assert_eq!(
        (&updated["FunctionVersion"], &updated["Description"]),
        (&json!("2"), &json!("new"))
    );
    let stale = d.send("PUT", &path, &change).await.expect(412, "PreconditionFailedException");
    assert!(stale.contains("GetAlias"), "{stale}");
    let answer = d.invoke("f:prod", &[], &json!(1)).await;
    assert_eq!(answer.header("x-amz-executed-version"), Some("2"));
    let used = d.call("DELETE", &format!("{FUNCTIONS}/f:2"), &[], b"").await;
    assert!(used.expect(409, "ResourceConflictException").contains("prod"));
    let alias = d.call("DELETE", &format!("{FUNCTIONS}/f:prod"), &[], b"").await;
    assert!(alias.expect(400, "InvalidParameterValueException").contains("DeleteAlias"));

    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    assert_eq!(d.get(&path).await.json(), updated);
    for _ in 0..2 {
        assert_eq!(d.call("DELETE", &path, &[], b"").await.status, 204);
    }
    let gone = d.get(&path).await.expect(404, "ResourceNotFoundException");
    assert!(gone.contains(&format!("Alias not found: {arn}")), "{gone}");
    d.invoke("f:prod", &[], &json!(1)).await.expect(404, "ResourceNotFoundException");
    assert_eq!(d.call("DELETE", &format!("{FUNCTIONS}/f:2"), &[], b"").await.status, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_shares_out_invocations() {
    let (_dir, d) = with_versions().await;
    let weights = |weight: f64| json!({"AdditionalVersionWeights": {"2": weight}});
    let body = json!({"Name": "a", "FunctionVersion": "1", "RoutingConfig": weights(0.5)});
    assert_eq!(create(&d, body).await["RoutingConfig"], weights(0.5));
    let served = async |times| {
        let mut versions = BTreeSet::new();
        for _ in 0..times {
            let answer = d.invoke("f:a", &[], &json!(1)).await;
            versions.insert(answer.header("x-amz-executed-version").unwrap().to_owned());
        }
        versions.into_iter().collect::<Vec<_>>().join(" ")
    };
    // Sixty equal draws have a chance of 2^-59.
    assert_eq!(served(60).await, "1 2");
    let update = async |body: Value| d.send("PUT", &format!("{ALIASES}/a"), &body).await;
    for (weight, versions) in [(0.0, "1"), (1.0, "2")] {
        update(json!({"RoutingConfig": weights(weight)})).await;
        assert_eq!(served(10).await, versions);
    }
    let kept = update(json!({"Description": "x"})).await.json();
    assert_eq!(kept["RoutingConfig"], weights(1.0), "what is not named stays");
    let used = d.call("DELETE", &format!("{FUNCTIONS}/f:2"), &[], b"").await;
    used.expect(409, "ResourceConflictException");
    let bad = update(json!({"FunctionVersion": "2"})).await;
    assert!(bad.expect(400, "InvalidParameterValueException").contains("already included"));
    let cleared = update(json!({"RoutingConfig": {}})).await.json();
    assert_eq!(cleared["RoutingConfig"], Value::Null);
    assert_eq!(served(10).await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_aliases_are_refused_and_leave_nothing() {
    let (_dir, d) = with_versions().await;
    create(&d, json!({"Name": "there", "FunctionVersion": "$LATEST"})).await;
    let (validation, invalid) = ("ValidationException", "InvalidParameterValueException");
    let weights = |w: Value| json!({"AdditionalVersionWeights": w});
    for (changes, status, exception, words) in [
        (json!({"Name": null}), 400, validation, "Value 'null' at 'name'"),
        (json!({"Name": "7"}), 400, validation, "'name'"),
        (json!({"Name": "a b"}), 400, validation, "'name'"),
        (json!({"Name": "x".repeat(129)}), 400, validation, "'name'"),
        (json!({"Name": "there"}), 409, "ResourceConflictException", "f:there"),
        (json!({"FunctionVersion": null}), 400, validation, "'functionVersion'"),
        (json!({"FunctionVersion": "x"}), 400, validation, "'functionVersion'"),
        (json!({"FunctionVersion": "3"}), 404, "ResourceNotFoundException", "function:f:3"),
        (json!({"FunctionVersion": "01"}), 404, "ResourceNotFoundException", "function:f:01"),
        (json!({"Description": "x".repeat(257)}), 400, validation, "'description'"),
        (json!({"RoutingConfig": weights(json!({"2": 1.1}))}), 400, validation, "1.1"),
        (json!({"RoutingConfig": weights(json!({"2": -0.1}))}), 400, validation, "-0.1"),
        (json!({"RoutingConfig": weights(json!({"$LATEST": 0.1}))}), 400, validation, "[0-9]+"),
        (
            json!({"RoutingConfig": weights(json!({"2": 0.1, "1": 0.1}))}),
            400,
            invalid,
            "greater than 1",
        ),
        (json!({"RoutingConfig": weights(json!({"1": 0.1}))}), 400, invalid, "already included"),
        (
            json!({"RoutingConfig": weights(json!({"3": 0.1}))}),
            404,
            "ResourceNotFoundException",
            "function:f:3",
        ),
        (
            json!({"FunctionVersion": "$LATEST", "RoutingConfig": weights(json!({"1": 0.1}))}),
            400,
            invalid,
            "$LATEST is not supported",
        ),
        (json!({"RoutingConfig": 7}), 400, "SerializationException", "wrong type"),
    ] {
        let mut body = json!({"Name": "bad", "FunctionVersion": "1"});
        for (key, value) in changes.as_object().unwrap() {
            body[key] = value.clone();
        }
        let text = d.send("POST", ALIASES, &body).await.expect(status, exception);
        assert!(text.contains(words), "{changes}: {text}");
    }
    let body = json!({"Name": "x", "FunctionVersion": "1"});
    for (name, status, exception) in
        [("g", 404, "ResourceNotFoundException"), ("f:1", 400, invalid)]
    {
        let path = format!("{FUNCTIONS}/{name}/aliases");
        d.send("POST", &path, &body).await.expect(status, exception);
        d.get(&path).await.expect(status, exception);
    }
    d.get(&format!("{ALIASES}/7")).await.expect(400, validation);
    let path = format!("{ALIASES}/nowhere");
    d.send("PUT", &path, &json!({})).await.expect(404, "ResourceNotFoundException");
    let listed = d.get(ALIASES).await.json();
    assert_eq!(listed["Aliases"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn aliases_are_listed_in_pages_and_by_version() {
    let (_dir, d) = with_versions().await;
    for (name, version) in [("e", "1"), ("b", "2"), ("d", "1"), ("c", "$LATEST")] {
        create(&d, json!({"Name": name, "FunctionVersion": version})).await;
    }
    let routing = json!({"AdditionalVersionWeights": {"1": 0.1}});
    create(&d, json!({"Name": "a", "FunctionVersion": "2", "RoutingConfig": routing})).await;
    let all = async |filter: &str| {
        let (mut names, mut marker) = (String::new(), String::new());
        loop {
            let page = d.get(&format!("{ALIASES}?MaxItems=2{filter}{marker}")).await.json();
            for alias in page["Aliases"].as_array().unwrap() {
                names += alias["Name"].as_str().unwrap();
            }
            let Some(next) = page["NextMarker"].as_str() else { return names };
            marker = format!("&Marker={next}");
        }
    };
    assert_eq!(all("").await, "abcde");
    assert_eq!(all("&FunctionVersion=1").await, "ade");
    assert_eq!(all("&FunctionVersion=%24LATEST").await, "c");
    assert_eq!(all("&FunctionVersion=7").await, "");
    assert_eq!(all("&FunctionVersion=01").await, "");
    d.get(&format!("{ALIASES}?FunctionVersion=x")).await.expect(400, "ValidationException");
}
