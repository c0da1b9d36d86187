//! STS: who a caller is, and temporary credentials of roles.
//!
//! AssumeRole gives what the role's trust policy lets the caller have. What would narrow a session down
//! (session policies, tags, MFA) is refused and not passed over.

use std::sync::Arc;

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::ServiceError;
use crate::{
    api::{App, error, gate::Session},
    backend::Backend,
    identity::{
        session_arn, session_id,
        sessions::{Assumed, Sessions},
    },
};

/// Seconds that a session lasts if nothing is said of it, and at most: what IAM gives roles for which
/// nobody has set more.
const LASTS: i64 = 3600;

/// The shortest, in seconds.
const SHORTEST: i64 = 900;

/// Parameters of AssumeRole that would narrow a session down.
const UNKNOWN: [&str; 8] = [
    "Policy",
    "PolicyArns",
    "ProvidedContexts",
    "SerialNumber",
    "SourceIdentity",
    "Tags",
    "TokenCode",
    "TransitiveTagKeys",
];

/// Does one operation.
pub fn call<B: Backend>(
    app: &Arc<App<B>>,
    session: &Session,
    operation: &str,
    input: &Value,
) -> Result<Value, ServiceError> {
    let account = &app.place.account;
    match operation {
        // Which needs no leave.
        "GetCallerIdentity" => Ok(match session.principal() {
            Some(caller) => json!({"UserId": caller.id, "Account": account, "Arn": caller.arn}),
            // In development mode nobody is asked: whoever it is may do what the account's root may.
            None => json!({
                "UserId": account, "Account": account, "Arn": format!("arn:aws:iam::{account}:root"),
            }),
        }),
        "AssumeRole" => assume(account, &app.callers.sessions, session, input),
        _ => Err(ServiceError::unknown("sts", operation)),
    }
}

fn invalid(message: impl Into<String>) -> ServiceError {
    ServiceError::new("ValidationException", message)
}

fn assume(
    account: &str,
    sessions: &Sessions,
    session: &Session,
    input: &Value,
) -> Result<Value, ServiceError> {
    if let Some(unknown) = UNKNOWN.iter().find(|name| input.get(name).is_some()) {
        return Err(invalid(format!("Firn's sessions don't have {unknown}.")));
    }
    let text = |name: &str, member: &str, within, also: &[u8]| {
        let Some(given) = input.get(name) else { return Ok(None) };
        let given = given.as_str().unwrap_or_default();
        checked(given, member, within, also).map(Some)
    };
    let needed = |text: Option<_>, member| {
        text.ok_or_else(|| {
            let null = "Member must not be null";
            invalid(format!(
                "1 validation error detected: {}",
                error::violation(member, "null", null)
            ))
        })
    };
    let role = needed(text("RoleArn", "roleArn", (20, 2048), b"_+=,.@-:/")?, "roleArn")?;
    let name = text("RoleSessionName", "roleSessionName", (2, 64), b"_+=,.@-")?;
    let name = needed(name, "roleSessionName")?;
    let external = text("ExternalId", "externalId", (2, 1224), b"_+=,.@:/-")?;
    if !role.starts_with("arn:aws:iam::") {
        return Err(invalid(format!("{role} is invalid")));
    }
    let seconds = match input.get("DurationSeconds") {
        None => LASTS,
        Some(given) => {
            let seconds = given.as_str().and_then(|text| text.parse().ok());
            seconds.filter(|seconds| *seconds >= SHORTEST).ok_or_else(|| {
                invalid(format!("DurationSeconds must be an integer of at least {SHORTEST}."))
            })?
        }
    };
    session.may_assume(role, |context| {
        context.set("sts:RoleSessionName", name);
        if let Some(external) = external {
            context.set("sts:ExternalId", external);
        }
    })?;
    if seconds > LASTS {
        return Err(invalid(
            "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
        ));
    }
    let issued = OffsetDateTime::now_utc().unix_timestamp();
    let expires = issued + seconds;
    let (role, name) = (role.to_owned(), name.to_owned());
    let assumed = Assumed { role, name, issued, expires, function: None };
    let made = sessions.issue(&assumed).map_err(|e| ServiceError::internal(e.to_string()))?;
    Ok(json!({
        "Credentials": {
            "AccessKeyId": made.key_id,
            "SecretAccessKey": made.secret.as_str(),
            "SessionToken": made.token,
            "Expiration": expires,
        },
        "AssumedRoleUser": {
            "AssumedRoleId": session_id(&assumed),
            "Arn": session_arn(account, &assumed),
        },
    }))
}

/// Letters, digits and what is in `also`, as many as may be.
fn checked<'a>(
    text: &'a str,
    member: &str,
    (least, most): (usize, usize),
    also: &[u8],
) -> Result<&'a str, ServiceError> {
    let constraint = match text.len() {
        length if length < least => {
            format!("Member must have length greater than or equal to {least}")
        }
        length if length > most => {
            format!("Member must have length less than or equal to {most}")
        }
        _ if text.bytes().all(|b| b.is_ascii_alphanumeric() || also.contains(&b)) => {
            return Ok(text);
        }
        _ => {
            let also = String::from_utf8_lossy(also);
            format!("Member must have only letters, digits and {also}")
        }
    };
    let violation = error::violation(member, text, &constraint);
    Err(invalid(format!("1 validation error detected: {violation}")))
}
