//! What the audit trail says of a request: CloudTrail's record of an API call.
//!
//! Parameters and answers are recorded by a list of members that may be: code, environments, events and
//! whatever a later operation takes stay out until somebody puts them on the list.

use axum::{
    body::Body,
    extract::{FromRequestParts, RawPathParams},
    http::{Response, header, request::Parts},
};
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, macros::format_description};

use super::{
    RequestInfo,
    error::{ApiError, ERROR_TYPE},
    gate::{Session, source},
    names::Place,
    operations::{Kind, On, Operation},
};

/// Longest text of a caller that is recorded.
const MAX_TEXT: usize = 1024;

/// Most bytes of a request or an answer that are looked at.
pub const MAX_BODY: usize = 64 << 10;

/// Parameters of a query that are recorded.
const QUERY: [&str; 10] = [
    "Qualifier",
    "FunctionVersion",
    "MaxItems",
    "Marker",
    "RevisionId",
    "tagKeys",
    "List",
    "Arn",
    "CompatibleRuntime",
    "CompatibleArchitecture",
];

/// Members of requests and answers that are recorded.
const MEMBERS: [&str; 67] = [
    "Action",
    "AdditionalVersionWeights",
    "AliasArn",
    "ApplyOn",
    "Architectures",
    "CodeSha256",
    "CodeSize",
    "CompatibleArchitectures",
    "CompatibleRuntimes",
    "Content",
    "CreatedDate",
    "DeadLetterConfig",
    "Description",
    "Destination",
    "DestinationConfig",
    "DryRun",
    "EphemeralStorage",
    "FunctionArn",
    "FunctionName",
    "FunctionUrlAuthType",
    "FunctionVersion",
    "Handler",
    "InvokedViaFunctionUrl",
    "KMSKeyArn",
    "LastModified",
    "LastUpdateStatus",
    "LayerArn",
    "LayerVersionArn",
    "Layers",
    "LicenseInfo",
    "LogFormat",
    "LogGroup",
    "LoggingConfig",
    "MaximumEventAgeInSeconds",
    "MaximumRetryAttempts",
    "MemorySize",
    "Mode",
    "Name",
    "OnFailure",
    "OnSuccess",
    "OptimizationStatus",
    "OrganizationId",
    "PackageType",
    "Principal",
    "PrincipalOrgID",
    "ProvisionedConcurrentExecutions",
    "Publish",
    "RequestedProvisionedConcurrentExecutions",
    "ReservedConcurrentExecutions",
    "RevisionId",
    "Role",
    "RoutingConfig",
    "Runtime",
    "S3Bucket",
    "S3Key",
    "S3ObjectVersion",
    "Size",
    "SnapStart",
    "SourceAccount",
    "SourceArn",
    "State",
    "Statement",
    "StatementId",
    "Status",
    "Timeout",
    "TracingConfig",
    "Version",
];

/// An operation of another service, as an extension of its answer.
#[derive(Debug, Clone)]
pub struct Called {
    /// Such as `logs`.
    pub service: &'static str,
    /// Its name.
    pub operation: String,
}

/// A record of which the end is not known yet.
pub struct Draft {
    operation: &'static Operation,
    record: Value,
}

impl Draft {
    /// What the head of a request says.
    pub async fn new(operation: &'static Operation, parts: &mut Parts, place: &Place) -> Self {
        let parameters = match operation.on {
            // Its path and query are the function's.
            On::Url => Value::Null,
            _ => parameters(parts).await,
        };
        let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
        let id = parts.extensions.get::<RequestInfo>().map(|info| info.id.clone());
        let agent = parts.headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
        let (source_of, _) = operation.action.split_once(':').unwrap_or_default();
        let record = json!({
            "eventVersion": "1.11",
            "eventTime": OffsetDateTime::now_utc().format(format).unwrap_or_default(),
            "eventSource": event_source(source_of),
            "eventName": operation.event,
            "awsRegion": place.region,
            "sourceIPAddress": source(parts).map(|address| address.to_string()),
            "userAgent": agent.map(cut),
            "requestParameters": parameters,
            "responseElements": null,
            "requestID": id,
            "eventID": uuid::Uuid::new_v4().to_string(),
            "readOnly": operation.kind == Kind::Read,
            "eventType": "AwsApiCall",
            "managementEvent": operation.kind != Kind::Data,
            "eventCategory": if operation.kind == Kind::Data { "Data" } else { "Management" },
            "recipientAccountId": place.account,
        });
        Self { operation, record }
    }

    /// Who it was, and on what.
    fn attribute(&mut self, session: &Session) {
        let record = &mut self.record;
        record["userIdentity"] = session.identity();
        if let Some(key_id) = session.claimed() {
            record["additionalEventData"] = json!({ "claimedAccessKeyId": key_id });
        }
        if session.strange() {
            record["requestParameters"] = Value::Null;
        }
        if let Some(arn) = session.resource() {
            let account = record["recipientAccountId"].clone();
            let mut parts = arn.split(':').skip(2);
            let kind = match (parts.next(), parts.nth(2)) {
                (Some("kms"), _) => "AWS::KMS::Key",
                (Some("iam"), _) => "AWS::IAM::Role",
                (_, Some("layer")) => "AWS::Lambda::LayerVersion",
                _ => "AWS::Lambda::Function",
            };
            record["resources"] = json!([{"ARN": arn, "accountId": account, "type": kind}]);
        }
    }

    /// What went wrong.
    fn fail(&mut self, error: &str, message: Option<&str>) {
        // As CloudTrail has it.
        let denied = error == "AccessDeniedException";
        self.record["errorCode"] = if denied { "AccessDenied" } else { error }.into();
        self.record["errorMessage"] = message.map(cut).into();
    }

    /// The whole record of a request whose answer is the function's own, unless the daemon refused it.
    pub fn refused_or_done(mut self, session: &Session, refused: Option<&ApiError>) -> Value {
        self.attribute(session);
        if let Some(error) = refused {
            self.fail(error.name(), Some(&error.to_string()));
        }
        self.record
    }

    /// The whole record, and whether something may have been changed, from what became of it; with the
    /// answer, which is as it was.
    pub async fn finish(
        mut self,
        session: &Session,
        body: &[u8],
        response: Response<Body>,
    ) -> (Value, bool, Response<Body>) {
        self.attribute(session);
        let record = &mut self.record;
        if !session.strange()
            && let Some(parameters) = listed(body)
        {
            match record["requestParameters"].as_object_mut() {
                Some(known) => known.extend(parameters),
                None => record["requestParameters"] = parameters.into(),
            }
        }
        let mut changes = self.operation.kind == Kind::Write;
        if let Some(Called { service, operation }) = response.extensions().get() {
            // As CloudTrail has it: what gives something, and keeps nothing, reads.
            const READS: [&str; 11] = [
                "Assume",
                "Decrypt",
                "Describe",
                "Encrypt",
                "Filter",
                "Generate",
                "Get",
                "List",
                "ReEncrypt",
                "Start",
                "Stop",
            ];
            changes = !READS.iter().any(|verb| operation.starts_with(verb));
            record["eventSource"] = event_source(service).into();
            record["eventName"] = cut(operation).into();
            record["readOnly"] = (!changes).into();
        }
        let error = response.headers().get(ERROR_TYPE).and_then(|name| name.to_str().ok());
        let error = error.map(str::to_owned);
        let answers = self.operation.kind == Kind::Write && self.operation.on != On::Service;
        let looked_at = error.is_some() || answers;
        if !looked_at {
            return (self.record, changes, response);
        }
        // What fails and what changes answers in a few lines of JSON that are in memory already.
        let (parts, body) = response.into_parts();
        let body =
            body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        match error {
            Some(error) => {
                let document: Value = serde_json::from_slice(&body).unwrap_or_default();
                let message = document["Message"].as_str().or(document["message"].as_str());
                self.fail(&error, message);
            }
            None => record["responseElements"] = listed(&body).into(),
        }
        (self.record, changes, Response::from_parts(parts, Body::from(body)))
    }
}

fn event_source(service: &str) -> String {
    match service {
        "firn" => "firn".into(),
        "cloudwatch" => "monitoring.amazonaws.com".into(),
        "" => "unknown".into(),
        service => format!("{service}.amazonaws.com"),
    }
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

/// What path and query say.
async fn parameters(parts: &mut Parts) -> Value {
    let mut found = Map::new();
    if let Ok(path) = RawPathParams::from_request_parts(parts, &()).await {
        for (name, value) in &path {
            let name = match name {
                "name" => "functionName",
                "alias" => "name",
                "sid" => "statementId",
                "layer" => "layerName",
                "version" => "versionNumber",
                "arn" => "resource",
                other => other,
            };
            found.insert(name.into(), cut(value).into());
        }
    }
    let query = parts.uri.query().unwrap_or_default();
    for (name, value) in
        serde_urlencoded::from_str::<Vec<(String, String)>>(query).unwrap_or_default()
    {
        if QUERY.contains(&name.as_str()) {
            found.insert(camel(&name), cut(&value).into());
        }
    }
    if found.is_empty() { Value::Null } else { found.into() }
}

/// Those members of a JSON object that are recorded.
fn listed(body: &[u8]) -> Option<Map<String, Value>> {
    let object = serde_json::from_slice::<Map<String, Value>>(body).ok()?;
    let listed: Map<_, _> = object.into_iter().filter_map(keep).collect();
    (!listed.is_empty()).then_some(listed)
}

fn keep((name, value): (String, Value)) -> Option<(String, Value)> {
    if name == "Tags" {
        // Names and values are the caller's.
        return Some(("tags".into(), value));
    }
    let weights = name == "AdditionalVersionWeights";
    let value = match value {
        _ if !MEMBERS.contains(&name.as_str()) => return None,
        Value::Object(object) if !weights => {
            Value::Object(object.into_iter().filter_map(keep).collect())
        }
        Value::String(text) => cut(&text).into(),
        other => other,
    };
    Some((camel(&name), value))
}

/// `FunctionName` as CloudTrail spells it: `functionName`.
fn camel(name: &str) -> String {
    let capitals = name.bytes().take_while(u8::is_ascii_uppercase).count();
    let lower = if capitals > 1 { capitals - 1 } else { capitals };
    name[..lower].to_ascii_lowercase() + &name[lower..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_listed_is_recorded() {
        let body = json!({
            "FunctionName": "f", "Timeout": 3, "Code": {"ZipFile": "planted"},
            "Environment": {"Variables": {"A": "planted"}}, "ZipFile": "planted", "Unknown": "planted",
            "KMSKeyArn": "k", "DestinationConfig": {"OnFailure": {"Destination": "d", "Other": "planted"}},
            "Tags": {"Team": "t"}, "RoutingConfig": {"AdditionalVersionWeights": {"2": 0.5}},
        });
        let listed = listed(body.to_string().as_bytes()).unwrap();
        assert_eq!(
            Value::Object(listed),
            json!({"functionName": "f", "timeout": 3, "kmsKeyArn": "k", "tags": {"Team": "t"},
                "destinationConfig": {"onFailure": {"destination": "d"}},
                "routingConfig": {"additionalVersionWeights": {"2": 0.5}}})
        );
        assert!(super::listed(b"[1]").is_none() && super::listed(b"x").is_none());
        assert!(MEMBERS.is_sorted(), "so that one finds one's way");
    }
}
