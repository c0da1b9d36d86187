//! Tags of functions.

use serde_json::json;

use super::{FUNCTIONS, daemon};

const ARN: &str = "arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Af";

#[tokio::test(flavor = "multi_thread")]
async fn tags_come_and_go_without_a_new_revision() {
    let (_dir, d) = daemon().await;
    let created = d.create("f", json!({"Tags": {"a": "1"}, "Publish": true})).await;
    assert_eq!(created.status, 201);
    let before = d.get(&format!("{FUNCTIONS}/f/configuration")).await.json();
    let path = format!("/2017-03-31/tags/{ARN}");
    let body = json!({"Tags": {"b": "zwei = 2", "c d": "", "a": "one"}});
    assert_eq!(d.send("POST", &path, &body).await.status, 204);
    let tags = json!({"a": "one", "b": "zwei = 2", "c d": ""});
    assert_eq!(d.get(&path).await.json(), json!({ "Tags": tags }));
    for name in ["f", "f:1"] {
        assert_eq!(d.get(&format!("{FUNCTIONS}/{name}")).await.json()["Tags"], tags, "{name}");
    }
    let untag = format!("{path}?tagKeys=b&tagKeys=c%20d&tagKeys=unknown");
    assert_eq!(d.call("DELETE", &untag, &[], b"").await.status, 204);
    assert_eq!(d.get(&path).await.json(), json!({"Tags": {"a": "one"}}));
    let after = d.get(&format!("{FUNCTIONS}/f/configuration")).await.json();
    assert_eq!(after, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_tags_are_refused() {
    let (_dir, d) = daemon().await;
    d.create("f", json!({"Tags": {"a": "1"}})).await;
    let (validation, invalid) = ("ValidationException", "InvalidParameterValueException");
    let many =
        |n: usize| (0..n).map(|i| (format!("k{i}"), json!("v"))).collect::<serde_json::Map<_, _>>();
    for (tags, exception, words) in [
        (json!(null), validation, "'tags'"),
        (json!({"": "x"}), validation, "between 1 and 128"),
        (json!({"k": "x".repeat(257)}), validation, "at most 256"),
        (json!({"k": "<"}), validation, "pattern"),
        (json!({"aws:x": "y"}), invalid, "reserved"),
        (json!(many(51)), invalid, "51 of at most 50"),
        (json!({"k": 1}), "SerializationException", "wrong type"),
    ] {
        let body = json!({ "Tags": tags });
        let answer = d.send("POST", &format!("/2017-03-31/tags/{ARN}"), &body).await;
        let text = answer.expect(400, exception);
        assert!(text.contains(words), "{tags}: {text}");
        if !tags.is_null() {
            d.create("g", body).await.expect(400, exception);
        }
    }
    let path = format!("/2017-03-31/tags/{ARN}");
    let together = d.send("POST", &path, &json!({"Tags": many(50)})).await;
    assert!(together.expect(400, invalid).contains("51 of at most 50"));
    d.call("DELETE", &path, &[], b"").await.expect(400, validation);
    for (arn, status, exception) in [
        (format!("{ARN}%3A1"), 400, invalid),
        (
            ARN.replace("%3Af", "%3Ag").replace("%3Agunction", "%3Afunction"),
            404,
            "ResourceNotFoundException",
        ),
        ("f".into(), 400, validation),
        ("arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Alayer%3Af".into(), 400, validation),
    ] {
        d.get(&format!("/2017-03-31/tags/{arn}")).await.expect(status, exception);
    }
    assert_eq!(d.get(&path).await.json(), json!({"Tags": {"a": "1"}}));
}
