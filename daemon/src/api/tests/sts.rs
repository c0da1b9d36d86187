//! Temporary credentials: who gets them, and what they are good for.

use super::{identity::*, *};

/// A session's access key and token.
struct Session {
    key: (String, String),
    token: String,
}

fn between<'a>(text: &'a str, name: &str) -> &'a str {
    let (_, rest) =
        text.split_once(&format!("<{name}>")).unwrap_or_else(|| panic!("{name}: {text}"));
    rest.split_once(&format!("</{name}>")).unwrap().0
}

impl Daemon {
    async fn sts(&self, who: (&str, &str), token: &str, fields: &str) -> Answer {
        let mut headers = vec![("content-type", "application/x-www-form-urlencoded")];
        if !token.is_empty() {
            headers.push(("x-amz-security-token", token));
        }
        let body = format!("{fields}&Version=2011-06-15").into_bytes();
        self.signed_with(who, "POST", "/", &headers, &body, &body).await
    }

    async fn assume(&self, who: (&str, &str), role: &str, more: &str) -> Result<Session, String> {
        let role = format!("arn:aws:iam::000000000000:role/{role}");
        let fields = format!("Action=AssumeRole&RoleArn={role}&RoleSessionName=me%40home{more}");
        let answer = self.sts(who, "", &fields).await;
        let text = String::from_utf8(answer.body).unwrap();
        let part = |name| between(&text, name).to_owned();
        match answer.status {
            200 => Ok(Session {
                key: (part("AccessKeyId"), part("SecretAccessKey")),
                token: part("SessionToken"),
            }),
            _ => Err(part("Code")),
        }
    }

    async fn caller(&self, who: (&str, &str), token: &str) -> Result<String, String> {
        let answer = self.sts(who, token, "Action=GetCallerIdentity").await;
        let text = String::from_utf8(answer.body).unwrap();
        match answer.status {
            200 => Ok(between(&text, "Arn").to_owned()),
            _ => Err(between(&text, "Code").to_owned()),
        }
    }
}

fn with_roles() -> Value {
    let mut document = document();
    let trust = |statement: Value| {
        json!({"trust": {"Version": "2012-10-17", "Statement": statement},
            "policies": [{"Version": "2012-10-17", "Statement": {"Effect": "Allow",
                "Action": "lambda:ListFunctions", "Resource": "*"}}]})
    };
    let allow = |principal: &str| {
        json!({"Effect": "Allow", "Action": "sts:AssumeRole",
        "Principal": {"AWS": format!("arn:aws:iam::000000000000:{principal}")}})
    };
    document["roles"]["bobs"] = trust(allow("user/bob"));
    document["roles"]["x/everybodys"] = trust(allow("root"));
    let mut partner = allow("user/bob");
    partner["Condition"] = json!({"StringEquals": {"sts:ExternalId": "agreed"}});
    document["roles"]["partners"] = trust(partner);
    document
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_gives_sessions_to_whom_it_trusts() {
    let (dir, d) = guarded_by(&with_roles()).await;
    assert_eq!(d.caller(BOB, "").await.unwrap(), "arn:aws:iam::000000000000:user/bob");
    let session = d.assume(BOB, "bobs", "").await.unwrap();
    let key = (session.key.0.as_str(), session.key.1.as_str());
    let arn = "arn:aws:sts::000000000000:assumed-role/bobs/me@home";
    assert_eq!(d.caller(key, &session.token).await.unwrap(), arn);
    // The role's policies, not those of who assumed it.
    let token = [("x-amz-security-token", session.token.as_str())];
    let list = d.signed_with(key, "GET", FUNCTIONS, &token, b"", b"").await;
    assert_eq!(list.status, 200);
    let path = format!("{FUNCTIONS}/bob-1");
    let refused = d.signed_with(key, "GET", &path, &token, b"", b"").await;
    assert!(refused.expect(403, "AccessDeniedException").contains(arn));

    assert_eq!(d.assume(BOB, "everybodys", "").await.err().unwrap(), "AccessDenied", "by its path");
    assert_eq!(d.assume(BOB, "x/everybodys", "").await.err().unwrap(), "AccessDenied");
    let admins = d.assume(ADMIN, "x/everybodys", "&DurationSeconds=900").await.unwrap();
    assert_ne!(admins.key, session.key);
    assert_eq!(d.assume(ADMIN, "bobs", "").await.err().unwrap(), "AccessDenied");
    assert_eq!(d.assume(BOB, "r", "").await.err().unwrap(), "AccessDenied");
    assert_eq!(d.assume(BOB, "partners", "").await.err().unwrap(), "AccessDenied");
    assert!(d.assume(BOB, "partners", "&ExternalId=agreed").await.is_ok());
    for more in [
        "&DurationSeconds=899",
        "&DurationSeconds=3601",
        "&DurationSeconds=x",
        "&ExternalId=a",
        "&Policy=x",
        "&PolicyArns.member.1.arn=x",
        "&Tags.member.1.Key=x",
        "&SourceIdentity=x",
    ] {
        assert_eq!(d.assume(BOB, "bobs", more).await.err().unwrap(), "ValidationError", "{more}");
    }
    let named =
        d.sts(BOB, "", "Action=AssumeRole&RoleArn=arn:aws:iam::000000000000:role/bobs").await;
    assert!(String::from_utf8(named.body).unwrap().contains("roleSessionName"));

    // A token and a key that don't belong together, and a session whose role is gone.
    let mixed = d.caller(key, &admins.token).await;
    assert_eq!(mixed.unwrap_err(), "InvalidClientTokenId");
    assert_eq!(d.caller(key, "").await.unwrap_err(), "InvalidClientTokenId");
    let wrong = d.caller((key.0, "wrong"), &session.token).await;
    assert_eq!(wrong.unwrap_err(), "SignatureDoesNotMatch");
    std::fs::write(dir.path().join("identity.json"), document().to_string()).unwrap();
    d.app.callers.identity.as_ref().unwrap().reload().unwrap();
    let gone = d.caller(key, &session.token).await;
    assert_eq!(gone.unwrap_err(), "InvalidClientTokenId");
    d.app.callers.audit.close().await;
    let (records, _) = crate::audit::tests::records(&dir.path().join("audit"));
    let listed = records.iter().find(|r| r["eventName"] == "ListFunctions20150331").unwrap();
    assert_eq!(listed["userIdentity"]["type"], "AssumedRole");
    assert_eq!(listed["userIdentity"]["arn"], arn);
    let issuer = &listed["userIdentity"]["sessionContext"]["sessionIssuer"];
    assert_eq!(issuer["arn"], "arn:aws:iam::000000000000:role/bobs");
    let assumed = records.iter().find(|r| r["eventName"] == "AssumeRole").unwrap();
    assert_eq!(assumed["eventSource"], "sts.amazonaws.com");
    let text = json!(records).to_string();
    assert!(!text.contains(&session.token) && !text.contains(key.1));
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_outlive_the_daemon_but_not_their_time() {
    let (dir, d) = guarded_by(&with_roles()).await;
    let session = d.assume(BOB, "bobs", "").await.unwrap();
    let issued = |seconds: i64| {
        let now = crate::function::now_ms() / 1000;
        let made = d.app.callers.sessions.issue(&crate::identity::sessions::Assumed {
            role: "arn:aws:iam::000000000000:role/bobs".into(),
            name: "me".into(),
            issued: now,
            expires: now + seconds,
            function: None,
        });
        made.unwrap()
    };
    let over = issued(0);
    let error = d.caller((&over.key_id, &over.secret), &over.token).await.unwrap_err();
    assert_eq!(error, "ExpiredToken");
    drop(d);
    let d = start(dir.path(), limits(), 0).await;
    let key = (session.key.0.as_str(), session.key.1.as_str());
    assert!(d.caller(key, &session.token).await.is_ok());
}

#[tokio::test]
async fn in_development_mode_everybody_is_root() {
    let (_dir, d) = daemon().await;
    assert_eq!(
        d.caller(("AKIDX000000000000000", "x"), "").await.unwrap(),
        "arn:aws:iam::000000000000:root"
    );
    assert!(d.assume(("AKIDX000000000000000", "x"), "any", "").await.is_ok());
}
