//! Doors for the fuzzer (`fuzz/`) to parsers of what callers and functions send. They exist only with the feature
//! `fuzzing`, which nothing else may turn on.

use bytes::Bytes;

use crate::{
    api::{
        names::{Place, Reference},
        shapes::{CreateFunction, UpdateFunctionCode, UpdateFunctionConfiguration},
        validate,
    },
    identity::{
        policy::{Caller, Context, Decision, Kind, Policy, Request},
        sigv4::Claim,
    },
    traces::segments,
};

/// Parses how a caller names a function, with the `Qualifier` parameter. What it gives is a name that the
/// pattern allows, and its ARN means the same.
pub fn name(text: &str, qualifier: Option<&str>) {
    let Ok(reference) = Reference::parse(text, qualifier) else { return };
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    assert!(!reference.name.is_empty() && reference.name.chars().all(allowed));
    let place = Place { region: "us-east-1".into(), account: "000000000000".into() };
    let arn = reference.arn(&place);
    if let Ok(again) = Reference::parse(&arn, None) {
        assert_eq!((&again.name, &again.qualifier), (&reference.name, &reference.qualifier));
        assert_eq!(again.arn(&place), arn);
    }
}

/// Reads a request body as each operation that takes one, and checks it as CreateFunction does. What is
/// accepted is within Lambda's limits.
pub fn body(body: &[u8]) {
    let _ = serde_json::from_slice::<UpdateFunctionConfiguration>(body);
    let _ = serde_json::from_slice::<UpdateFunctionCode>(body);
    let Ok(create) = serde_json::from_slice::<CreateFunction>(body) else { return };
    let Ok(config) = validate::create(create.settings, &["python3.11".to_owned()]) else { return };
    assert!((128..=10_240).contains(&config.memory_mb) && (1..=900).contains(&config.timeout_s));
    let environment = config.environment.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
    assert!(environment <= 4096);
}

/// Reads a policy as each kind that there is, and asks it. One that allows what is asked of it denies nothing
/// of that.
pub fn policy(text: &str) {
    let mut context = Context::default();
    context.set("aws:username", "*");
    context.set("aws:SourceIp", "::1");
    let caller = Caller { account: Some("111122223333".into()), ..Caller::default() };
    let request = Request {
        caller: &caller,
        action: "lambda:InvokeFunction",
        resource: "arn:aws:lambda:us-east-1:111122223333:function:f",
        context: &context,
    };
    for kind in [Kind::Identity, Kind::Resource, Kind::Trust] {
        if let Ok(policy) = Policy::parse(text, kind) {
            let denied = policy.decide(&request) == Decision::Denied;
            assert!(!denied || text.contains("Deny"));
        }
    }
}

/// Reads who a request claims to be from. No claim is borne out by a key that did not sign it.
pub fn signature(authorization: Option<&str>, target: &str, date: &str) {
    let mut request = axum::http::Request::builder().uri(target).header("x-amz-date", date);
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    let Ok(request) = request.body(()) else { return };
    if let Ok(claim) = Claim::read(&request.into_parts().0) {
        assert!(claim.verify("a key that signed nothing", &[0; 32]).is_err());
    }
}

/// Reads what a function sends to an X-Ray daemon. Its spans are those of its own trace, below its invocation,
/// within its time, and bounded in all that they hold.
pub fn segments(document: &[u8]) {
    segments::check(&[Bytes::copy_from_slice(document)], (1 << 60, 1 << 61));
}
