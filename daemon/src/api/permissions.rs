//! AddPermission, RemovePermission, GetPolicy: who besides the account's own users may invoke a function.
//!
//! Each qualifier that can be called by has a policy of its own: the function without one, a version, an
//! alias.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{Response, StatusCode},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    App, Parameters, Target, blocking,
    error::ApiError,
    functions::{body, parse},
    json,
    names::Reference,
    no_content,
    shapes::AddPermission,
    validate,
};
use crate::{
    attachments::{MAX_POLICY, Policy, Statement},
    backend::Backend,
    identity::policy,
};

/// AddPermission.
pub async fn add<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "AddPermission").await?;
    app.find(&reference)?;
    if reference.qualifier.as_deref() == Some("$LATEST") {
        return Err(ApiError::InvalidParameterValue(
            "We currently do not support adding policies for $LATEST.".into(),
        ));
    }
    let work = app.clone();
    let document = blocking(move || {
        let input: AddPermission = parse(&body)?;
        validate::add_permission(&input)?;
        let arn = reference.arn(&work.place);
        let document = statement(&input, &arn)?;
        enforceable(&document)?;
        let sid = input.statement_id.unwrap_or_default();
        work.store.attach(&reference.name, |versions, attachments| {
            // The version or alias may have gone meanwhile.
            let exists = match reference.qualifier.as_deref() {
                None => true,
                Some(qualifier) => match qualifier.parse() {
                    Ok(version) => versions.contains_key(&version),
                    Err(()) => attachments.aliases.contains_key(qualifier),
                },
            };
            if !exists {
                return Err(work.missing(&reference));
            }
            let policy = attachments.policies.entry(key(&reference).into()).or_default();
            check_revision(policy, input.revision_id.as_deref())?;
            if policy.statements.iter().any(|statement| statement.sid == sid) {
                return Err(ApiError::ResourceConflict(format!(
                    "The statement id ({sid}) provided already exists. Please provide a new statement \
                     id, or remove the existing statement."
                )));
            }
            policy.statements.push(Statement { sid, document: document.clone() });
            policy.revision = uuid::Uuid::new_v4().to_string();
            let length = policy.document().len();
            if length > MAX_POLICY {
                return Err(ApiError::PolicyLengthExceeded { length, limit: MAX_POLICY });
            }
            Ok(())
        })?;
        tracing::info!(function = %reference, "permission added");
        Ok(document)
    })
    .await?;
    json(StatusCode::CREATED, &json!({ "Statement": document }))
}

/// RemovePermission.
pub async fn remove<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Path((_, sid)): Path<(String, String)>,
    Parameters(query): Parameters,
) -> Result<Response<Body>, ApiError> {
    validate::statement_id(&sid)?;
    app.find(&reference)?;
    let work = app.clone();
    blocking(move || {
        work.store.attach(&reference.name, |_, attachments| {
            let gone = |text: String| Err(ApiError::ResourceNotFound(text));
            let Some(policy) = attachments.policies.get_mut(key(&reference)) else {
                return gone("No policy is associated with the given resource.".into());
            };
            let Some(at) = policy.statements.iter().position(|statement| statement.sid == sid)
            else {
                return gone(format!("Statement {sid} is not found in resource policy."));
            };
            check_revision(policy, query.get("RevisionId").map(String::as_str))?;
            policy.statements.remove(at);
            policy.revision = uuid::Uuid::new_v4().to_string();
            if policy.statements.is_empty() {
                attachments.policies.remove(key(&reference));
            }
            Ok(())
        })?;
        tracing::info!(function = %reference, "permission removed");
        Ok(())
    })
    .await?;
    Ok(no_content())
}

/// GetPolicy.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    app.find(&reference)?;
    let attachments = app.store.attachments(&reference.name).unwrap_or_default();
    let policy = attachments.policies.get(key(&reference)).ok_or_else(|| {
        ApiError::ResourceNotFound("The resource you requested does not exist.".into())
    })?;
    json(StatusCode::OK, &json!({"Policy": policy.document(), "RevisionId": policy.revision}))
}

/// Whether a statement can be enforced: one that can't would be a promise, and not kept.
fn enforceable(statement: &str) -> Result<(), ApiError> {
    let document = format!(r#"{{"Version":"2012-10-17","Statement":{statement}}}"#);
    policy::Policy::parse(&document, policy::Kind::Resource).map(drop).map_err(|error| {
        ApiError::InvalidParameterValue(format!("The permission can't be enforced: {error}."))
    })
}

/// Under what the policy is kept.
fn key(reference: &Reference) -> &str {
    reference.qualifier.as_deref().unwrap_or_default()
}

fn check_revision(policy: &Policy, expected: Option<&str>) -> Result<(), ApiError> {
    match expected.filter(|revision| !revision.is_empty()) {
        Some(expected) if expected != policy.revision => {
            Err(ApiError::PreconditionFailed { read: "GetPolicy" })
        }
        _ => Ok(()),
    }
}

/// A statement, with its members in Lambda's order.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Document<'a> {
    sid: Option<&'a str>,
    effect: &'static str,
    principal: Value,
    action: &'a str,
    resource: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    condition: BTreeMap<&'static str, BTreeMap<&'static str, &'a str>>,
}

/// The statement of a permission for what `arn` names, as Lambda writes it.
fn statement(input: &AddPermission, arn: &str) -> Result<String, ApiError> {
    let action = input.action.as_deref().unwrap_or_default();
    if input.function_url_auth_type.is_some()
        && !matches!(action, "lambda:InvokeFunctionUrl" | "lambda:*" | "*")
    {
        return Err(ApiError::InvalidParameterValue(
            "FunctionUrlAuthType is only supported for lambda:InvokeFunctionUrl action".into(),
        ));
    }
    let via_url = input.invoked_via_function_url.map(|via| via.to_string());
    let mut condition = BTreeMap::<_, BTreeMap<_, _>>::new();
    for (operator, key, value) in [
        ("StringEquals", "AWS:SourceAccount", &input.source_account),
        ("StringEquals", "aws:PrincipalOrgID", &input.principal_org_id),
        ("StringEquals", "lambda:EventSourceToken", &input.event_source_token),
        ("StringEquals", "lambda:FunctionUrlAuthType", &input.function_url_auth_type),
        ("ArnLike", "AWS:SourceArn", &input.source_arn),
        ("Bool", "lambda:InvokedViaFunctionUrl", &via_url),
    ] {
        if let Some(value) = value {
            condition.entry(operator).or_default().insert(key, value.as_str());
        }
    }
    let document = Document {
        sid: input.statement_id.as_deref(),
        effect: "Allow",
        principal: principal(input.principal.as_deref().unwrap_or_default())?,
        action,
        resource: arn,
        condition,
    };
    serde_json::to_string(&document)
        .map_err(|e| ApiError::Service(format!("The statement could not be encoded: {e}")))
}

/// Whom a permission is for: everybody, an account, a user or role, or a service.
fn principal(text: &str) -> Result<Value, ApiError> {
    let is_account = |text: &str| text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    match parts[..] {
        ["*"] => Ok(json!("*")),
        [account] if is_account(account) => {
            Ok(json!({ "AWS": format!("arn:aws:iam::{account}:root") }))
        }
        [service] if is_service(service) => Ok(json!({ "Service": service })),
        ["arn", partition, "iam" | "sts", "", account, resource]
            if partition.starts_with("aws") && is_account(account) && !resource.is_empty() =>
        {
            Ok(json!({ "AWS": text }))
        }
        _ => Err(ApiError::InvalidParameterValue(
            "The provided principal was invalid. Please check the principal and try again.".into(),
        )),
    }
}

fn is_service(text: &str) -> bool {
    let domain = [".amazonaws.com", ".amazonaws.com.cn", ".amazon.com"];
    let name = domain.iter().find_map(|domain| text.strip_suffix(domain));
    name.is_some_and(|name| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
        !name.is_empty() && name.bytes().all(allowed)
    })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn principals_are_whom_lambda_takes() {
        let account = json!({"AWS": "arn:aws:iam::123456789012:root"});
        let role = "arn:aws:iam::123456789012:role/path/r";
        assert_eq!(principal("*").unwrap(), "*");
        assert_eq!(principal("123456789012").unwrap(), account);
        assert_eq!(principal(role).unwrap(), json!({ "AWS": role }));
        for service in ["s3.amazonaws.com", "alexa-appkit.amazon.com", "a.b.amazonaws.com.cn"] {
            assert_eq!(principal(service).unwrap(), json!({ "Service": service }));
        }
        for text in [
            "",
            "**",
            "12345678901",
            "s3",
            ".amazonaws.com",
            "S3.amazonaws.com",
            "a/b.amazonaws.com",
            "arn:aws:iam::1:root",
            "arn:aws:iam::123456789012:",
            "arn:aws:s3:::bucket",
            "arn:aws:iam:us-east-1:123456789012:root",
        ] {
            assert!(principal(text).is_err(), "{text:?}");
        }
    }
}
