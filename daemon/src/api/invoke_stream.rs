//! InvokeWithResponseStream.

use std::{io, sync::Arc};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Response, header},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use super::{
    App, Target,
    error::ApiError,
    eventstream::{self, event},
    invoke::{Call, Wishes},
    no_content,
    response_stream::{self, Framing, Invoked, ROOM_KIB},
};
use crate::{
    backend::Backend,
    scheduler::{Refusal, Served},
};

/// Most bytes of an error document in the last event.
const MAX_DETAILS: usize = 256 * 1024;

/// InvokeWithResponseStream.
pub async fn invoke<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let call = Call::read(&app, request, ROOM_KIB).await?;
    let function = app.route(&reference)?;
    let wishes = Wishes::read(&call.headers, &["RequestResponse", "DryRun"])?;
    if wishes.kind == "DryRun" {
        return Ok(no_content());
    }
    let (version, tail) = (function.version, wishes.tail);
    let request = call.request(&app, function, reference.arn(&app.place), wishes)?;
    let trace_id = request.invocation.trace_id.clone();
    let invoked = response_stream::invoke(&app.scheduler, request, app.settings.stream_rate).await;
    let mut framing = Events { tail };
    let (body, kind) = match invoked? {
        Invoked::Begun { rest, .. } => (rest.body(Bytes::new(), framing), None),
        Invoked::Served(mut served) => {
            let whole = std::mem::take(&mut served.answer.payload);
            let kind = served.kind;
            let mut events = Vec::new();
            if served.answer.function_error.is_some() {
                served.answer.payload = whole;
            } else if !whole.is_empty() {
                events.extend_from_slice(&framing.chunk(whole));
            }
            events.extend_from_slice(&framing.complete(Ok(served)));
            (Body::from(events), Some(kind))
        }
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(eventstream::CONTENT_TYPE));
    let made = [
        ("x-amz-executed-version", Some(version.to_string())),
        ("x-amzn-trace-id", Some(trace_id)),
        ("x-firn-start-kind", kind.map(|kind| kind.word().to_owned())),
    ];
    for (name, value) in made {
        if let Some(value) = value.and_then(|v| HeaderValue::try_from(v).ok()) {
            headers.insert(name, value);
        }
    }
    Ok(response)
}

/// PayloadChunk and InvokeComplete.
struct Events {
    /// The end of the log was asked for.
    tail: bool,
}

impl Framing for Events {
    fn chunk(&mut self, bytes: Bytes) -> Bytes {
        event("PayloadChunk", "application/octet-stream", &bytes)
    }

    fn end(self, result: Result<Served, Refusal>) -> io::Result<Option<Bytes>> {
        Ok(Some(self.complete(result)))
    }
}

impl Events {
    fn complete(&self, result: Result<Served, Refusal>) -> Bytes {
        let mut complete = json!({});
        match result {
            Ok(served) => {
                if served.answer.function_error.is_some() {
                    let document = &served.answer.payload;
                    complete["ErrorCode"] = error_code(document).into();
                    let kept = &document[..document.len().min(MAX_DETAILS)];
                    complete["ErrorDetails"] = String::from_utf8_lossy(kept).into();
                }
                if self.tail {
                    complete["LogResult"] = STANDARD.encode(&served.tail).into();
                }
            }
            // The response had begun: its status can't say this any more.
            Err(refusal) => {
                let error = ApiError::from(refusal);
                complete["ErrorCode"] = "ServiceException".into();
                complete["ErrorDetails"] = error.to_string().into();
                tracing::error!(%error, "an invocation failed behind the head of its response");
            }
        }
        event("InvokeComplete", "application/json", complete.to_string().as_bytes())
    }
}

/// What an error document calls its error.
fn error_code(document: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Document {
        #[serde(rename = "errorType")]
        kind: String,
    }
    match serde_json::from_slice(document) {
        Ok(Document { kind }) if !kind.is_empty() && kind.len() <= 256 => kind,
        _ => "Unhandled".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_codes_are_error_types() {
        assert_eq!(
            error_code(br#"{"errorMessage": [[]], "errorType": "ValueError"}"#),
            "ValueError"
        );
        let deep = "[".repeat(100_000);
        for other in ["", "{}", "[1]", r#"{"errorType": 7}"#, r#"{"errorType": ""}"#, &deep] {
            assert_eq!(error_code(other.as_bytes()), "Unhandled", "{other:.20}");
        }
    }
}
