//! Invoke, InvokeAsync.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use firn::Invocation;
use serde::{Deserialize, Serialize};

use super::{
    App, MAX_ASYNC_EVENT, MAX_EVENT, MAX_INVOKE_ARGS, RequestInfo, Target, announced,
    error::ApiError, gate::Session, json, names::Reference, no_content, read_body,
};
use crate::{
    backend::Backend,
    events::queue::QueueError,
    function::{Function, Version},
    scheduler::{self, Refusal, Room, Served, StartKind, Trace},
    traces::{self, Trigger},
};

/// Longest client context in bytes, as it is sent.
const MAX_CLIENT_CONTEXT: usize = 3583;

/// Longest Cognito identity in bytes, as it is sent: twice what Cognito's own can be.
const MAX_COGNITO_IDENTITY: usize = 256;

const INVOCATION_TYPE: &str = "x-amz-invocation-type";
const LOG_TYPE: &str = "x-amz-log-type";
const CLIENT_CONTEXT: &str = "x-amz-client-context";
const COGNITO_IDENTITY: &str = "x-firn-cognito-identity";
const START: &str = "x-firn-start";

impl From<QueueError> for ApiError {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Full { function, bytes } => {
                tracing::warn!(function, bytes, "the queue of events is full");
                Self::TooManyRequests { reason: "CallerRateLimitExceeded", retry_after: 1 }
            }
            other => Self::Service(other.to_string()),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Throttled(limit) => {
                Self::TooManyRequests { reason: limit.reason(), retry_after: 1 }
            }
            Refusal::Impossible(message) => Self::ResourceConflict(message),
            Refusal::Failed(message) => Self::Service(message),
        }
    }
}

/// Invoke.
pub async fn invoke<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let call = Call::read(&app, request, 0).await?;
    let function = app.route(&reference)?;
    let wishes = Wishes::read(&call.headers, &["RequestResponse", "Event", "DryRun"])?;
    match wishes.kind {
        "DryRun" => return Ok(no_content()),
        "Event" if wishes.force.is_some() => {
            return Err(ApiError::InvalidParameterValue(
                "X-Firn-Start goes with the invocation type RequestResponse only.".into(),
            ));
        }
        // As in Lambda, the function does not get the client context then.
        "Event" => {
            let Call { headers, id, payload, .. } = call;
            return accept(&app, &function, &reference, &headers, id, payload).await;
        }
        _ => {}
    }
    let (version, tail) = (function.version, wishes.tail);
    let request = call.request(&app, function, reference.arn(&app.place), wishes)?;
    let trace_id = request.invocation.trace_id.clone();
    let served = app.scheduler.invoke(request).await?;
    Ok(respond(served, version, tail, &trace_id))
}

/// A request that invokes, with its body.
pub struct Call {
    id: String,
    /// Its headers.
    pub headers: HeaderMap,
    trace: Trace,
    payload: Bytes,
    session: Session,
    /// This is what bounds the memory for events.
    room: Room,
}

impl Call {
    /// Takes a request in, when there is room for its event and `more` KiB.
    ///
    /// # Errors
    /// Those of a body that is too long or does not arrive.
    pub async fn read<B: Backend>(
        app: &App<B>,
        request: Request,
        more: usize,
    ) -> Result<Self, ApiError> {
        let session = Session::of(&request)?;
        let (parts, body) = request.into_parts();
        let headers = parts.headers;
        let info = parts.extensions.get::<RequestInfo>().cloned();
        let RequestInfo { id, received } =
            info.ok_or_else(|| ApiError::Service("the request has no id".into()))?;
        let mut trace = Trace::new(received);
        let asynchronous = headers.get(INVOCATION_TYPE).is_some_and(|kind| kind == "Event");
        let (limit, too_large): (_, fn(_) -> _) = match asynchronous {
            true => (MAX_ASYNC_EVENT, |size| too_large(size, "Event", MAX_ASYNC_EVENT)),
            false => (MAX_EVENT, |size| too_large(size, "RequestResponse", MAX_EVENT)),
        };
        let size = announced(&headers).unwrap_or(limit).min(limit);
        let kib = size / 1024 + 1 + more;
        let room = app.room.clone().acquire_many_owned(kib as u32).await;
        let room = Arc::new(room.map_err(|error| ApiError::Service(error.to_string()))?);
        let payload = read_body(&headers, body, limit, too_large).await?;
        trace.mark("body");
        Ok(Self { id, headers, trace, payload, session, room })
    }

    /// What the scheduler is to do.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequestContent`] for an event that is no JSON, [`ApiError::AccessDenied`] for a
    /// Cognito identity that is not the caller's to tell.
    pub fn request<B: Backend>(
        self,
        app: &App<B>,
        function: Arc<Function>,
        function_arn: String,
        wishes: Wishes,
    ) -> Result<scheduler::Request, ApiError> {
        let Self { id, headers, trace, payload, session, room } = self;
        if !wishes.cognito_identity.is_empty() {
            session.may("firn:AssertCognitoIdentity", &function_arn)?;
        }
        let mut invocation = Invocation {
            request_id: id,
            function_arn,
            trace_id: String::new(),
            client_context: wishes.client_context,
            cognito_identity: wishes.cognito_identity,
            timeout: function.timeout(),
            payload: checked_event(payload)?,
            response: None,
        };
        let (received, other) = (trace.received(), Trigger::Other);
        let traced = app.traces.open(&headers, received, other, &function, &mut invocation);
        let (force, room) = (wishes.force, Some(room));
        Ok(scheduler::Request { function, invocation, force, trace, traced, room })
    }
}

/// What a caller may ask for in headers.
pub struct Wishes {
    /// The invocation type.
    pub kind: &'static str,
    /// The end of the log with the answer.
    pub tail: bool,
    force: Option<StartKind>,
    client_context: String,
    cognito_identity: String,
}

impl Wishes {
    /// Reads them; the first of the invocation types that an operation has is its default.
    ///
    /// # Errors
    /// Names the header and what it takes.
    pub fn read(headers: &HeaderMap, kinds: &[&'static str]) -> Result<Self, ApiError> {
        let kind = choice(headers, INVOCATION_TYPE, "invocationType", kinds)?;
        let tail = choice(headers, LOG_TYPE, "logType", &["None", "Tail"])? == Some("Tail");
        let force = match headers.get(START).map(HeaderValue::to_str) {
            None => None,
            Some(text) => {
                Some(text.ok().and_then(|t| t.parse::<StartKind>().ok()).ok_or_else(|| {
                    let text = "X-Firn-Start must be one of boot, thaw, warm, reset";
                    ApiError::InvalidParameterValue(text.into())
                })?)
            }
        };
        let kind = kind.or(kinds.first().copied()).unwrap_or_default();
        let client_context = client_context(headers)?;
        let cognito_identity = cognito_identity(headers)?;
        Ok(Self { kind, tail, force, client_context, cognito_identity })
    }
}

/// InvokeAsync, which Invoke with the invocation type `Event` has replaced.
pub async fn invoke_async<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let (parts, body) = request.into_parts();
    let info = parts.extensions.get::<RequestInfo>().cloned();
    let RequestInfo { id, .. } =
        info.ok_or_else(|| ApiError::Service("the request has no id".into()))?;
    let _room = app.room.acquire_many((MAX_INVOKE_ARGS / 1024) as u32).await;
    let too_large = |size| too_large(size, "Event", MAX_INVOKE_ARGS);
    let payload = read_body(&parts.headers, body, MAX_INVOKE_ARGS, too_large).await?;
    let function = app.find(&reference)?;
    accept(&app, &function, &reference, &parts.headers, id, payload).await?;
    json(StatusCode::ACCEPTED, &serde_json::json!({ "Status": 202 }))
}

/// Queues an event; the answer says that it is on the disk.
async fn accept<B: Backend>(
    app: &App<B>,
    function: &Function,
    reference: &Reference,
    headers: &HeaderMap,
    id: String,
    payload: Bytes,
) -> Result<Response<Body>, ApiError> {
    let payload = checked_event(payload)?;
    let trace_id = app.traces.accept(headers, function);
    let trace = HeaderValue::try_from(&trace_id);
    app.events.accept(function, id, reference.arn(&app.place), trace_id, payload).await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    if let Ok(trace) = trace {
        response.headers_mut().insert(traces::HEADER, trace);
    }
    Ok(response)
}

fn respond(served: Served, version: Version, tail: bool, trace_id: &str) -> Response<Body> {
    let Served { kind, answer, tail: log, mut trace, .. } = served;
    trace.mark("responding");
    let mut response = Response::new(Body::from(answer.payload));
    let headers = response.headers_mut();
    let text = HeaderValue::from_static;
    headers.insert(header::CONTENT_TYPE, text("application/json"));
    headers.insert("x-firn-start-kind", text(kind.word()));
    if let Some(error) = answer.function_error {
        headers.insert("x-amz-function-error", text(error));
    }
    let made = [
        (HeaderName::from_static("x-amz-executed-version"), Some(version.to_string())),
        (HeaderName::from_static("x-amz-log-result"), tail.then(|| STANDARD.encode(log))),
        (HeaderName::from_static("x-firn-phases"), serde_json::to_string(&trace).ok()),
        (traces::HEADER, Some(trace_id.to_owned())),
    ];
    for (name, value) in made {
        if let Some(value) = value.and_then(|v| HeaderValue::try_from(v).ok()) {
            headers.insert(name, value);
        }
    }
    response
}

fn too_large(size: Option<usize>, kind: &str, limit: usize) -> ApiError {
    ApiError::RequestTooLarge(match size {
        Some(size) => format!(
            "{size} byte payload is too large for the {kind} invocation type (limit {limit} bytes)"
        ),
        None => format!("Request must be smaller than {limit} bytes for the Invoke operation"),
    })
}

/// The event, which must be JSON; no event at all means `{}`.
fn checked_event(payload: Bytes) -> Result<Bytes, ApiError> {
    if payload.is_empty() {
        return Ok(Bytes::from_static(b"{}"));
    }
    let invalid = |what: &dyn std::fmt::Display| {
        ApiError::InvalidRequestContent(format!("Could not parse request body into json: {what}"))
    };
    let text = std::str::from_utf8(&payload).map_err(|e| invalid(&e))?;
    // Builds nothing and does not recurse, so neither size nor depth of the event matters.
    serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|e| invalid(&e))?;
    Ok(payload)
}

/// A header that takes one of a few values.
fn choice(
    headers: &HeaderMap,
    header: &str,
    member: &str,
    values: &[&'static str],
) -> Result<Option<&'static str>, ApiError> {
    let Some(value) = headers.get(header) else { return Ok(None) };
    let found = values.iter().find(|v| v.as_bytes() == value.as_bytes());
    found.map(|v| Some(*v)).ok_or_else(|| {
        let shown = String::from_utf8_lossy(value.as_bytes());
        let set = format!("Member must satisfy enum value set: [{}]", values.join(", "));
        ApiError::validation(member, &shown, set)
    })
}

fn client_context(headers: &HeaderMap) -> Result<String, ApiError> {
    let Some(value) = headers.get(CLIENT_CONTEXT) else { return Ok(String::new()) };
    if value.len() > MAX_CLIENT_CONTEXT {
        return Err(ApiError::InvalidRequestContent(format!(
            "Client context must be at most {MAX_CLIENT_CONTEXT} bytes; it is {}",
            value.len()
        )));
    }
    let text = STANDARD.decode(value).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    // Headers can't carry line ends, and the guest hands it on in a header.
    let text = text.filter(|t| serde_json::from_str::<serde_json::Map<_, _>>(t).is_ok());
    text.map(|t| t.replace(['\r', '\n'], " ")).ok_or_else(|| {
        ApiError::InvalidRequestContent(
            "Client context must be a valid Base64-encoded JSON object.".into(),
        )
    })
}

/// Who the caller's caller is, by the word of a gateway: Lambda takes that from credentials that Cognito gave
/// out, which nobody here can check.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CognitoIdentity {
    cognito_identity_id: String,
    cognito_identity_pool_id: String,
}

fn cognito_identity(headers: &HeaderMap) -> Result<String, ApiError> {
    let Some(value) = headers.get(COGNITO_IDENTITY) else { return Ok(String::new()) };
    let identity: Option<CognitoIdentity> = serde_json::from_slice(value.as_bytes()).ok();
    let identity = identity.filter(|_| value.len() <= MAX_COGNITO_IDENTITY);
    identity.and_then(|identity| serde_json::to_string(&identity).ok()).ok_or_else(|| {
        ApiError::InvalidRequestContent(format!(
            "X-Firn-Cognito-Identity must be a JSON object of at most {MAX_COGNITO_IDENTITY} bytes \
             with cognitoIdentityId and cognitoIdentityPoolId."
        ))
    })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn events_are_json_of_any_depth() {
        assert_eq!(&checked_event(Bytes::new()).unwrap()[..], b"{}");
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        assert!(checked_event(Bytes::from(deep)).is_ok());
        for bad in [&b"{"[..], b"{} x", b"\"\xff\"", b"nul", b"'a'"] {
            let error = checked_event(Bytes::copy_from_slice(bad)).unwrap_err();
            assert_eq!(error.name(), "InvalidRequestContentException");
        }
    }

    #[test]
    fn client_contexts_are_decoded_and_bounded() {
        let with = |value: String| {
            let mut headers = HeaderMap::new();
            headers.insert(CLIENT_CONTEXT, HeaderValue::try_from(value).unwrap());
            client_context(&headers)
        };
        assert_eq!(with(STANDARD.encode(r#"{"custom":{}}"#)).unwrap(), r#"{"custom":{}}"#);
        assert!(with("!".into()).is_err());
        assert!(with(STANDARD.encode("[1]")).is_err());
        assert!(with("A".repeat(3584)).is_err());
        assert_eq!(client_context(&HeaderMap::new()).unwrap(), "");
    }

    #[test]
    fn cognito_identities_are_checked_and_bounded() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(COGNITO_IDENTITY, HeaderValue::try_from(value).unwrap());
            cognito_identity(&headers)
        };
        let identity =
            r#"{"cognitoIdentityId":"us-east-1:1","cognitoIdentityPoolId":"us-east-1:2"}"#;
        assert_eq!(with(&identity.replace("\",\"", "\", \"")).unwrap(), identity);
        let long = identity.replace("us-east-1:1", &"x".repeat(256));
        for bad in ["", "{}", "[]", "us-east-1:1", &identity.replace('}', ",\"a\":1}"), &long] {
            let error = with(bad).unwrap_err();
            assert_eq!(error.name(), "InvalidRequestContentException", "{bad}");
        }
        assert_eq!(cognito_identity(&HeaderMap::new()).unwrap(), "");
    }
}
