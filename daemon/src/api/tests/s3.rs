//! Code that lies in a bucket.

use serde_json::{Value, json};

use super::{
    Daemon, FUNCTIONS, daemon,
    identity::{ADMIN, CAROL, guarded},
};

const INVALID: &str = "InvalidParameterValueException";

fn code(changes: Value) -> Value {
    let mut code = json!({"S3Bucket": "bucket", "S3Key": "code.zip"});
    for (key, value) in changes.as_object().unwrap() {
        code[key] = value.clone();
    }
    code
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_and_layers_are_made_of_objects() {
    let (_dir, d) = daemon().await;
    d.aws.put("bucket", "code.zip", b"PK1");
    d.aws.put("bucket", "code.zip?versionId=v2", b"PK22");
    let created = d.create("f", json!({"Code": code(json!({}))})).await;
    assert_eq!((created.status, &created.json()["CodeSize"]), (201, &json!(3)));
    assert_eq!(d.invoke("f", &[], &json!({})).await.status, 200);
    let update = code(json!({"S3ObjectVersion": "v2"}));
    let updated = d.send("PUT", &format!("{FUNCTIONS}/f/code"), &update).await;
    assert_eq!((updated.status, &updated.json()["CodeSize"]), (200, &json!(4)));
    let layer = json!({"Content": code(json!({}))});
    let layer = d.send("POST", "/2018-10-31/layers/l/versions", &layer).await;
    assert_eq!((layer.status, &layer.json()["Content"]["CodeSize"]), (201, &json!(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_s3_does_not_give_is_told_in_lambdas_words() {
    let (dir, d) = daemon().await;
    for key in ["code.zip", "denied", "elsewhere", "down", "cut"] {
        d.aws.put("bucket", key, b"PK1");
    }
    d.aws.put("bucket", "text", b"hello");
    // Larger than what a request may carry, and looked at all the same.
    d.aws.put("bucket", "large", &vec![0; 52_428_801]);
    let validation = "ValidationException";
    for (changes, status, exception, words) in [
        (
            json!({"S3Key": "none"}),
            400,
            INVALID,
            "Error occurred while GetObject. S3 Error Code: NoSuchKey. S3 Error Message: The specified \
             key does not exist.",
        ),
        (json!({"S3Bucket": "none"}), 400, INVALID, "S3 Error Code: NoSuchBucket."),
        (
            json!({"S3Key": "denied"}),
            403,
            "AccessDeniedException",
            "permission to GetObject for bucket/denied. S3 Error Code: AccessDenied. S3 Error Message: \
             Access Denied",
        ),
        (json!({"S3Key": "elsewhere"}), 400, INVALID, "S3 Error Code: PermanentRedirect."),
        (json!({"S3Key": "down"}), 500, "ServiceException", "SlowDown"),
        (json!({"S3Key": "cut"}), 500, "ServiceException", "can't be reached"),
        (json!({"S3Key": "text"}), 400, INVALID, "Could not unzip uploaded file."),
        (json!({"S3Key": "large"}), 400, INVALID, "Could not unzip uploaded file."),
        (json!({"S3Key": "../other/code.zip"}), 400, INVALID, "'..'"),
        (json!({"S3Key": ""}), 400, validation, "length between 1 and 1024"),
        (json!({"S3Key": "x".repeat(1025)}), 400, validation, "'s3Key'"),
        (json!({"S3Bucket": "x"}), 400, validation, "3 to 63 characters"),
        (json!({"S3Bucket": "a/b"}), 400, validation, "'s3Bucket'"),
        (json!({"S3Bucket": "..."}), 400, validation, "'s3Bucket'"),
        (json!({"S3ObjectVersion": ""}), 400, validation, "'s3ObjectVersion'"),
        (json!({"S3Key": null}), 400, INVALID, "both S3Bucket and S3Key"),
        (json!({"ZipFile": "UEs="}), 400, INVALID, "when providing a ZipFile"),
        (json!({"SourceKMSKeyArn": "arn:x"}), 400, INVALID, "SourceKMSKeyArn"),
    ] {
        let answer = d.create("f", json!({"Code": code(changes.clone())})).await;
        let body = answer.expect(status, exception);
        assert!(body.contains(words), "{changes}: {body}");
    }
    assert_eq!(std::fs::read_dir(dir.path().join("code")).unwrap().count(), 0);
    assert_eq!(d.get(FUNCTIONS).await.json()["Functions"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_read_an_object_makes_a_function_of_it() {
    let (_dir, d) = guarded().await;
    d.aws.put("bucket", "carol/code.zip", b"PK1");
    d.aws.put("bucket", "code.zip", b"PK1");
    let create = async |who, changes: Value| {
        let body = json!({
            "FunctionName": "f", "Runtime": "python3.11", "Handler": "a.b",
            "Role": "arn:aws:iam::000000000000:role/r", "Code": code(changes),
        });
        d.signed(who, "POST", FUNCTIONS, body.to_string().as_bytes()).await
    };
    let denied = create(CAROL, json!({})).await.expect(403, "AccessDeniedException");
    let words =
        "is not authorized to perform: s3:GetObject on resource: arn:aws:s3:::bucket/code.zip";
    assert!(denied.contains(words), "{denied}");
    let hers = json!({"S3Key": "carol/code.zip"});
    let version = json!({"S3Key": "carol/code.zip", "S3ObjectVersion": "v"});
    let denied = create(CAROL, version).await.expect(403, "AccessDeniedException");
    assert!(denied.contains("s3:GetObjectVersion"), "{denied}");
    assert_eq!(create(CAROL, hers).await.status, 201);
    let update = |who| {
        let body = code(json!({})).to_string().into_bytes();
        let d: &Daemon = &d;
        async move { d.signed(who, "PUT", &format!("{FUNCTIONS}/f/code"), &body).await }
    };
    update(CAROL).await.expect(403, "AccessDeniedException");
    assert_eq!(update(ADMIN).await.status, 200);
}
