//! KMS keys, through the API of KMS.

use super::{identity::*, *};

const KEY: &str = "arn:aws:kms:us-east-1:000000000000:key";

impl Daemon {
    #[track_caller]
    fn kms(&self, operation: &str, input: Value) -> impl Future<Output = Value> {
        let target = format!("TrentService.{operation}");
        async move {
            let answer = self.service(&target, &input).await;
            assert_eq!(answer.status, 200, "{target}: {}", answer.json());
            answer.json()
        }
    }

    /// The exception, and what it says.
    async fn kms_refuses(&self, operation: &str, input: Value) -> (String, String) {
        let answer = self.service(&format!("TrentService.{operation}"), &input).await;
        assert_eq!(answer.status, 400, "{operation} {input}: {}", answer.json());
        assert!(answer.header("x-amzn-query-error").is_none());
        let said = |member: &str| answer.json()[member].as_str().unwrap().to_owned();
        (said("__type"), said("message"))
    }

    async fn kms_as(&self, who: (&str, &str), operation: &str, input: Value) -> Answer {
        let target = format!("TrentService.{operation}");
        let headers =
            [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target.as_str())];
        let body = input.to_string().into_bytes();
        self.signed_with(who, "POST", "/", &headers, &body, &body).await
    }

    async fn new_key(&self) -> String {
        let key = self.kms("CreateKey", json!({"Description": "d"})).await;
        key["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned()
    }
}

fn base64(text: &str) -> String {
    STANDARD.encode(text)
}

#[tokio::test]
async fn what_is_encrypted_is_decrypted_in_its_context_only() {
    let (dir, d) = daemon().await;
    let id = d.new_key().await;
    let context = json!({"FunctionName": "f"});
    let plain = json!({"KeyId": id, "Plaintext": base64("secret"), "EncryptionContext": context});
    let sealed = d.kms("Encrypt", plain).await;
    assert_eq!(sealed["KeyId"], format!("{KEY}/{id}"));
    assert_eq!(sealed["EncryptionAlgorithm"], "SYMMETRIC_DEFAULT");
    let blob = &sealed["CiphertextBlob"];
    let with = |context: Value| json!({"CiphertextBlob": blob, "EncryptionContext": context});
    for refused in [json!({}), json!({"FunctionName": "g"}), json!({"functionName": "f"})] {
        let (name, _) = d.kms_refuses("Decrypt", with(refused)).await;
        assert_eq!(name, "InvalidCiphertextException");
    }
    // After a restart, too.
    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    let opened = d.kms("Decrypt", with(context.clone())).await;
    assert_eq!(opened["Plaintext"], base64("secret"));
    assert_eq!(opened["KeyId"], format!("{KEY}/{id}"));
    let other = d.new_key().await;
    let mut expecting = with(context.clone());
    expecting["KeyId"] = other.as_str().into();
    assert_eq!(d.kms_refuses("Decrypt", expecting.clone()).await.0, "IncorrectKeyException");
    expecting["KeyId"] = format!("{KEY}/{id}").into();
    d.kms("Decrypt", expecting).await;
    let again = json!({"CiphertextBlob": blob, "SourceEncryptionContext": context,
        "DestinationKeyId": other});
    let again = d.kms("ReEncrypt", again).await;
    assert_eq!(again["SourceKeyId"], format!("{KEY}/{id}"));
    let opened = d.kms("Decrypt", json!({"CiphertextBlob": again["CiphertextBlob"]})).await;
    assert_eq!(
        (&opened["Plaintext"], &opened["KeyId"]),
        (&base64("secret").into(), &again["KeyId"])
    );
    for (spec, length) in
        [(json!({"KeySpec": "AES_256"}), 32), (json!({"NumberOfBytes": 1024}), 1024)]
    {
        let mut input = spec;
        input["KeyId"] = id.as_str().into();
        let data = d.kms("GenerateDataKey", input.clone()).await;
        let opened = d.kms("Decrypt", json!({"CiphertextBlob": data["CiphertextBlob"]})).await;
        assert_eq!(opened["Plaintext"], data["Plaintext"]);
        assert_eq!(STANDARD.decode(data["Plaintext"].as_str().unwrap()).unwrap().len(), length);
        let blind = d.kms("GenerateDataKeyWithoutPlaintext", input).await;
        assert!(blind.get("Plaintext").is_none() && blind["CiphertextBlob"].is_string());
    }
    let random = d.kms("GenerateRandom", json!({"NumberOfBytes": 5})).await;
    assert_eq!(random["Plaintext"].as_str().unwrap().len(), 8);
}

#[tokio::test]
async fn limits_and_what_there_is_not_are_named() {
    let (_dir, d) = daemon().await;
    let id = d.new_key().await;
    let nobody = "11111111-2222-3333-4444-555555555555";
    let encrypt = |changes: Value| {
        let mut input = json!({"KeyId": id, "Plaintext": base64("x")});
        input.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        input
    };
    let long = STANDARD.encode(vec![0; 4097]);
    let blob = STANDARD.encode([&[1][..], &uuid::Uuid::new_v4().into_bytes(), &[0; 60]].concat());
    let tagged = json!([{"TagKey": "a", "TagValue": "b"}]);
    for (operation, input, name, words) in [
        ("Encrypt", encrypt(json!({"Plaintext": ""})), "ValidationException", "equal to 1"),
        ("Encrypt", encrypt(json!({"Plaintext": long})), "ValidationException", "equal to 4096"),
        ("Encrypt", encrypt(json!({"Plaintext": "?"})), "SerializationException", "Base64"),
        ("Encrypt", json!({"KeyId": id}), "SerializationException", "Plaintext"),
        ("Encrypt", encrypt(json!({"KeyId": nobody})), "NotFoundException", "does not exist"),
        ("Encrypt", encrypt(json!({"KeyId": "k"})), "NotFoundException", "Invalid keyId k"),
        ("Encrypt", encrypt(json!({"KeyId": ""})), "ValidationException", "keyId"),
        (
            "Encrypt",
            encrypt(json!({"KeyId": "alias/a"})),
            "NotFoundException",
            "alias/a is not found",
        ),
        (
            "Encrypt",
            encrypt(json!({"KeyId": format!("arn:aws:kms:eu-west-1:000000000000:key/{id}")})),
            "NotFoundException",
            "Invalid keyId arn",
        ),
        (
            "Encrypt",
            encrypt(json!({"EncryptionContext": {"a": "x".repeat(8192)}})),
            "ValidationException",
            "8193 bytes",
        ),
        (
            "Encrypt",
            encrypt(json!({"EncryptionAlgorithm": "RSAES_OAEP_SHA_256"})),
            "InvalidKeyUsageException",
            "symmetric",
        ),
        ("Encrypt", encrypt(json!({"EncryptionAlgorithm": "X"})), "ValidationException", "enum"),
        ("Encrypt", encrypt(json!({"GrantTokens": ["x"]})), "InvalidGrantTokenException", "grants"),
        ("Encrypt", encrypt(json!({"DryRun": true})), "DryRunOperationException", "would have"),
        ("Decrypt", json!({"CiphertextBlob": base64("x")}), "InvalidCiphertextException", ""),
        ("Decrypt", json!({"CiphertextBlob": blob}), "AccessDeniedException", "does not exist"),
        (
            "Decrypt",
            json!({"CiphertextBlob": STANDARD.encode(vec![1; 6145])}),
            "ValidationException",
            "6144",
        ),
        ("GenerateDataKey", json!({"KeyId": id}), "ValidationException", "either"),
        ("GenerateDataKey", json!({"KeyId": id, "KeySpec": "A"}), "ValidationException", "AES_128"),
        (
            "GenerateDataKey",
            json!({"KeyId": id, "NumberOfBytes": 1025}),
            "ValidationException",
            "1024",
        ),
        ("GenerateRandom", json!({"NumberOfBytes": 0}), "ValidationException", "1024"),
        ("CreateKey", json!({"KeySpec": "RSA_2048"}), "UnsupportedOperationException", "symmetric"),
        ("CreateKey", json!({"Policy": "{}"}), "UnsupportedOperationException", "policies"),
        ("CreateKey", json!({"Tags": tagged}), "UnsupportedOperationException", "tags"),
        ("CreateKey", json!({"Description": "x".repeat(8193)}), "ValidationException", "8192"),
        (
            "ScheduleKeyDeletion",
            json!({"KeyId": id, "PendingWindowInDays": 6}),
            "ValidationException",
            "7",
        ),
        ("CancelKeyDeletion", json!({"KeyId": id}), "KMSInvalidStateException", "not pending"),
        ("ListKeys", json!({"Limit": 1001}), "ValidationException", "1000"),
        ("ListKeys", json!({"Marker": "x"}), "InvalidMarkerException", "marker"),
        ("ListAliases", json!({"KeyId": nobody}), "NotFoundException", "Invalid keyId"),
        ("PutKeyPolicy", json!({"KeyId": id}), "UnknownOperationException", "PutKeyPolicy"),
        ("Sign", json!({}), "UnknownOperationException", "Sign"),
    ] {
        let (found, message) = d.kms_refuses(operation, input.clone()).await;
        assert_eq!(found, name, "{operation} {input}: {message}");
        assert!(message.contains(words), "{operation} {input}: {message}");
    }
}

#[tokio::test]
async fn aliases_lead_to_keys_and_keys_have_states() {
    let (_dir, d) = daemon().await;
    let (a, b) = (d.new_key().await, d.new_key().await);
    let alias = |name: &str, key: &str| json!({"AliasName": name, "TargetKeyId": key});
    d.kms("CreateAlias", alias("alias/x", &a)).await;
    d.kms("CreateAlias", alias("alias/y/z", &format!("{KEY}/{a}"))).await;
    for (operation, input, name) in [
        ("CreateAlias", alias("alias/x", &b), "AlreadyExistsException"),
        ("CreateAlias", alias("x", &b), "ValidationException"),
        ("CreateAlias", alias("alias/", &b), "ValidationException"),
        ("CreateAlias", alias("alias/ö", &b), "ValidationException"),
        ("CreateAlias", alias("alias/a:b", &b), "ValidationException"),
        ("CreateAlias", alias("alias/aws/s3", &b), "NotAuthorizedException"),
        ("CreateAlias", alias("alias/w", "alias/x"), "ValidationException"),
        ("UpdateAlias", alias("alias/w", &b), "NotFoundException"),
        ("DeleteAlias", json!({"AliasName": "alias/w"}), "NotFoundException"),
        ("DisableKey", json!({"KeyId": "alias/x"}), "NotFoundException"),
    ] {
        assert_eq!(d.kms_refuses(operation, input.clone()).await.0, name, "{operation} {input}");
    }
    let through = async |name: &str| {
        let input = json!({"KeyId": name, "Plaintext": base64("x")});
        d.kms("Encrypt", input).await["KeyId"].as_str().unwrap().to_owned()
    };
    assert!(through("alias/x").await.ends_with(&a));
    d.kms("UpdateAlias", alias("alias/x", &b)).await;
    assert!(through("arn:aws:kms:us-east-1:000000000000:alias/x").await.ends_with(&b));
    let listed = d.kms("ListAliases", json!({"Limit": 1})).await;
    assert_eq!((&listed["Truncated"], &listed["NextMarker"]), (&true.into(), &"alias/x".into()));
    let listed = d.kms("ListAliases", json!({"Marker": "alias/x"})).await;
    assert_eq!(listed["Aliases"][0]["AliasName"], "alias/y/z");
    assert_eq!(listed["Aliases"][0]["TargetKeyId"], a);
    let listed = d.kms("ListAliases", json!({"KeyId": b})).await;
    assert_eq!(listed["Aliases"].as_array().unwrap().len(), 1);
    d.kms("DeleteAlias", json!({"AliasName": "alias/x"})).await;
    assert_eq!(d.kms("ListAliases", json!({})).await["Aliases"].as_array().unwrap().len(), 1);

    let page = d.kms("ListKeys", json!({"Limit": 1})).await;
    let rest = d.kms("ListKeys", json!({"Marker": page["NextMarker"]})).await;
    let mut listed = [&page["Keys"][0], &rest["Keys"][0]].map(|k| k["KeyId"].as_str().unwrap());
    let mut both = [a.as_str(), &b];
    listed.sort_unstable();
    both.sort_unstable();
    assert_eq!((listed, &rest["Truncated"]), (both, &false.into()));

    let state = async || d.kms("DescribeKey", json!({"KeyId": a})).await["KeyMetadata"].clone();
    let named = json!({"KeyId": a});
    let encrypt = json!({"KeyId": a, "Plaintext": base64("x")});
    let blob = d.kms("Encrypt", encrypt.clone()).await["CiphertextBlob"].clone();
    assert_eq!(
        (&state().await["KeyState"], &state().await["Enabled"]),
        (&"Enabled".into(), &true.into())
    );
    d.kms("DisableKey", named.clone()).await;
    assert_eq!(state().await["KeyState"], "Disabled");
    assert_eq!(d.kms_refuses("Encrypt", encrypt.clone()).await.0, "DisabledException");
    assert_eq!(
        d.kms_refuses("Decrypt", json!({"CiphertextBlob": blob})).await.0,
        "DisabledException"
    );
    d.kms("EnableKey", named.clone()).await;
    d.kms("Encrypt", encrypt.clone()).await;
    let due = d.kms("ScheduleKeyDeletion", json!({"KeyId": a, "PendingWindowInDays": 7})).await;
    let days =
        (due["DeletionDate"].as_f64().unwrap() - crate::function::now_ms() as f64 / 1e3) / 86_400.0;
    assert!((6.9..7.1).contains(&days) && due["KeyState"] == "PendingDeletion", "{due}");
    for (operation, input) in [
        ("Encrypt", encrypt.clone()),
        ("EnableKey", named.clone()),
        ("ScheduleKeyDeletion", named.clone()),
        ("CreateAlias", alias("alias/new", &a)),
    ] {
        assert_eq!(d.kms_refuses(operation, input).await.0, "KMSInvalidStateException");
    }
    d.kms("CancelKeyDeletion", named.clone()).await;
    assert_eq!(state().await["KeyState"], "Disabled");
    d.kms("UpdateKeyDescription", json!({"KeyId": a, "Description": "new"})).await;
    assert_eq!(state().await["Description"], "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_say_who_may_use_which_key_for_what() {
    let mut document = document();
    document["users"]["bob"]["policies"][0]["Statement"] = json!([
        {"Effect": "Allow", "Action": ["kms:Decrypt", "kms:DescribeKey"],
            "Resource": format!("{KEY}/*")},
        {"Effect": "Allow", "Action": "kms:Encrypt", "Resource": "*",
            "Condition": {"StringEquals": {"kms:EncryptionContext:for": "bob"}}},
        {"Effect": "Allow", "Action": "kms:GenerateDataKey", "Resource": "*",
            "Condition": {"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/bob"}}},
        {"Effect": "Allow", "Action": "kms:CreateAlias", "Resource": "arn:aws:kms:*:*:alias/bob*"},
    ]);
    let (dir, d) = guarded_by(&document).await;
    let made = d.kms_as(ADMIN, "CreateKey", json!({})).await.json();
    let id = made["KeyMetadata"]["KeyId"].as_str().unwrap();
    let encrypt = |context: Value| json!({"KeyId": id, "Plaintext": base64("x"), "EncryptionContext": context});
    let sealed = d.kms_as(BOB, "Encrypt", encrypt(json!({"for": "bob"}))).await;
    assert_eq!(sealed.status, 200, "{}", sealed.json());
    let blob = json!({"CiphertextBlob": sealed.json()["CiphertextBlob"],
        "EncryptionContext": {"for": "bob"}});
    assert_eq!(d.kms_as(BOB, "Decrypt", blob).await.status, 200);
    let nobody = "11111111-2222-3333-4444-555555555555";
    let data_key = json!({"KeyId": id, "KeySpec": "AES_128"});
    let alias = json!({"AliasName": "alias/bob", "TargetKeyId": id});
    for (operation, input) in [
        ("Encrypt", encrypt(json!({"for": "eve"}))),
        ("Encrypt", encrypt(json!({}))),
        // Not even whether there is such a key.
        ("Encrypt", json!({"KeyId": nobody, "Plaintext": base64("x")})),
        ("CreateKey", json!({})),
        ("ListKeys", json!({})),
        ("DisableKey", json!({"KeyId": id})),
        ("ScheduleKeyDeletion", json!({"KeyId": id})),
        ("GenerateDataKey", data_key.clone()),
        // An alias is the key's, too.
        ("CreateAlias", alias.clone()),
    ] {
        let refused = d.kms_as(BOB, operation, input.clone()).await;
        assert_eq!(refused.status, 400);
        assert_eq!(refused.json()["__type"], "AccessDeniedException", "{operation} {input}");
    }
    assert_eq!(d.kms_as(ADMIN, "CreateAlias", alias).await.status, 200);
    assert_eq!(d.kms_as(BOB, "GenerateDataKey", data_key).await.status, 200);
    let unsigned = d.service("TrentService.ListKeys", &json!({})).await;
    assert_eq!(unsigned.json()["__type"], "MissingAuthenticationTokenException");
    d.app.callers.audit.close().await;
    let (records, _) = crate::audit::tests::records(&dir.path().join("audit"));
    let found = |name: &str| records.iter().find(|record| record["eventName"] == name).unwrap();
    let record = found("Decrypt");
    assert_eq!(record["eventSource"], "kms.amazonaws.com");
    assert_eq!(
        record["resources"],
        json!([{"ARN": format!("{KEY}/{id}"), "accountId": "000000000000", "type": "AWS::KMS::Key"}])
    );
    assert_eq!(
        (&record["readOnly"], &found("CreateKey")["readOnly"]),
        (&true.into(), &false.into())
    );
    assert!(!json!(records).to_string().contains(&base64("x")));
}
