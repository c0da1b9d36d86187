//! AddLayerVersionPermission, RemoveLayerVersionPermission, GetLayerVersionPolicy.
//!
//! All layers are of this daemon's one account, so of permissions only those for everybody let anybody in.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{Response, StatusCode},
};
use serde_json::{Value, json};

use super::{
    super::{
        App, Parameters, blocking,
        error::ApiError,
        functions::{body, parse},
        json,
        names::is_name,
        no_content,
        shapes::AddLayerVersionPermission,
        validate::{self, Violations},
    },
    VersionArn, find,
};
use crate::{
    backend::Backend,
    layers::{Permission, Record},
    store::Store,
};

/// Longest policy in bytes.
const POLICY: usize = 20_480;

/// AddLayerVersionPermission.
pub async fn add<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path((layer, version)): Path<(String, String)>,
    query: Parameters,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "AddLayerVersionPermission").await?;
    let layer = find(&app, &layer, &version)?;
    let work = app.clone();
    let output = blocking(move || {
        let input: AddLayerVersionPermission = parse(&body)?;
        let (id, permission) = permission(input)?;
        let arn = format!("{}:{}", work.place.layer_arn(&layer.name), layer.version);
        let statement = statement(&arn, &id, &permission).to_string();
        work.store.change_layer(&layer.name, layer.version, |record| {
            check_revision(record, &query)?;
            if record.permissions.contains_key(&id) {
                return Err(ApiError::ResourceConflict(format!(
                    "The statement id ({id}) provided already exists. Please provide a new \
                     statement id, or remove the existing statement."
                )));
            }
            record.permissions.insert(id, permission);
            let length = document(&arn, record).len();
            if length > POLICY {
                return Err(ApiError::PolicyLengthExceeded { length, limit: POLICY });
            }
            record.revision = uuid::Uuid::new_v4().to_string();
            Ok(json!({"Statement": statement, "RevisionId": record.revision}))
        })
    })
    .await?;
    json(StatusCode::CREATED, &output)
}

/// RemoveLayerVersionPermission.
pub async fn remove<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path((layer, version, id)): Path<(String, String, String)>,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    let layer = find(&app, &layer, &version)?;
    let work = app.clone();
    blocking(move || {
        work.store.change_layer(&layer.name, layer.version, |record| {
            check_revision(record, &query)?;
            if record.permissions.remove(&id).is_none() {
                return Err(ApiError::ResourceNotFound(format!(
                    "Statement {} is not found in resource policy.",
                    id.chars().take(100).collect::<String>()
                )));
            }
            record.revision = uuid::Uuid::new_v4().to_string();
            Ok(())
        })
    })
    .await?;
    Ok(no_content())
}

/// GetLayerVersionPolicy.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path((layer, version)): Path<(String, String)>,
) -> Result<Response<Body>, ApiError> {
    let layer = find(&app, &layer, &version)?;
    if layer.record.permissions.is_empty() {
        return Err(ApiError::ResourceNotFound(
            "No policy is associated with the given resource.".into(),
        ));
    }
    let arn = format!("{}:{}", app.place.layer_arn(&layer.name), layer.version);
    let policy = document(&arn, &layer.record);
    json(StatusCode::OK, &json!({"Policy": policy, "RevisionId": layer.record.revision}))
}

/// The policy of the layer version with this ARN, if it is there and has one.
pub fn of(store: &Store, arn: &str, version: &VersionArn<'_>) -> Option<String> {
    let layer = store.layer(version.name, version.version?)?;
    let record = &layer.record;
    (!record.deleted && !record.permissions.is_empty()).then(|| document(arn, record))
}

fn check_revision(record: &Record, query: &Parameters) -> Result<(), ApiError> {
    match query.0.get("RevisionId").filter(|revision| !revision.is_empty()) {
        Some(revision) if *revision != record.revision => {
            Err(ApiError::PreconditionFailed { read: "GetLayerVersionPolicy" })
        }
        _ => Ok(()),
    }
}

fn permission(input: AddLayerVersionPermission) -> Result<(String, Permission), ApiError> {
    let mut found = Violations::default();
    let required = |found: &mut Violations, member: &str, value: Option<String>| {
        if value.is_none() {
            found.add(member, "null", "Member must not be null");
        }
        value.unwrap_or_default()
    };
    let AddLayerVersionPermission { statement_id, action, principal, organization_id } = input;
    let id = statement_id.as_deref();
    found.pattern("statementId", id, |id| is_name(id) && id.len() <= 100, "([a-zA-Z0-9-_]+)");
    let get = "lambda:GetLayerVersion";
    found.pattern("action", action.as_deref(), |action| action == "lambda:GetLayerVersion", get);
    let principals = "\\d{12}|\\*|arn:(aws[a-zA-Z-]*):iam::\\d{12}:root";
    found.pattern("principal", principal.as_deref(), is_principal, principals);
    let organization = organization_id.as_deref();
    found.pattern("organizationId", organization, validate::is_organization, "o-[a-z0-9]{10,32}");
    let id = required(&mut found, "statementId", statement_id);
    required(&mut found, "action", action);
    let principal = required(&mut found, "principal", principal);
    found.check()?;
    if organization_id.is_some() && principal != "*" {
        return Err(ApiError::InvalidParameterValue(
            "If you specify an organization ID, the principal must be '*'.".into(),
        ));
    }
    Ok((id, Permission { principal, organization: organization_id }))
}

fn is_principal(text: &str) -> bool {
    let account = |text: &str| text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
    let root = || {
        let rest = text.strip_prefix("arn:aws")?;
        let (partition, rest) = rest.split_once(':')?;
        let id = rest.strip_prefix("iam::")?.strip_suffix(":root")?;
        let known = partition.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-');
        (known && account(id)).then_some(())
    };
    text == "*" || account(text) || root().is_some()
}

fn statement(arn: &str, id: &str, permission: &Permission) -> Value {
    let Permission { principal, organization } = permission;
    let principal = match principal.as_str() {
        "*" => json!("*"),
        arn if arn.starts_with("arn:") => json!({ "AWS": arn }),
        account => json!({ "AWS": format!("arn:aws:iam::{account}:root") }),
    };
    let mut statement = json!({
        "Sid": id,
        "Effect": "Allow",
        "Principal": principal,
        "Action": "lambda:GetLayerVersion",
        "Resource": arn,
    });
    if let Some(organization) = organization {
        statement["Condition"] = json!({"StringEquals": {"aws:PrincipalOrgID": organization}});
    }
    statement
}

/// The policy as a JSON document.
fn document(arn: &str, record: &Record) -> String {
    let statements: Vec<Value> =
        record.permissions.iter().map(|(id, one)| statement(arn, id, one)).collect();
    json!({"Version": "2012-10-17", "Id": "default", "Statement": statements}).to_string()
}
