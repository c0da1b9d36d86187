//! What Lambda's API has no words for, under `/firn/v1`: readiness, snapshots, instances, the queue of events, code.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Response, StatusCode, header},
};
use serde_json::json;

use super::{App, Target, blocking, error::ApiError, json};
use crate::{backend::Backend, prepare::Status};

/// Whether the daemon serves.
pub async fn health<B: Backend>(
    State(app): State<Arc<App<B>>>,
) -> Result<Response<Body>, ApiError> {
    let body = json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "runtimes": app.backend.runtimes(),
    });
    json(StatusCode::OK, &body)
}

/// Where the snapshot of a function stands.
pub async fn snapshot<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    let status = app.scheduler.snapshot(&function);
    let mut body = json!({ "state": status.word() });
    if let Status::Failed(reason) = status {
        body["reason"] = reason.into();
    }
    json(StatusCode::OK, &body)
}

/// All live instances.
pub async fn instances<B: Backend>(
    State(app): State<Arc<App<B>>>,
) -> Result<Response<Body>, ApiError> {
    json(StatusCode::OK, &json!({ "Instances": app.scheduler.instances() }))
}

/// How much is queued for asynchronous invocation.
pub async fn events<B: Backend>(
    State(app): State<Arc<App<B>>>,
) -> Result<Response<Body>, ApiError> {
    json(StatusCode::OK, &app.events.usage().await?)
}

/// A function's code as it was uploaded: where `Code.Location` of GetFunction leads.
pub async fn code<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    let code = app.code.clone();
    let zip = blocking(move || code.zip(&function).map_err(|e| ApiError::Service(e.to_string())));
    let zip = zip.await?;
    let mut response = Response::new(Body::from(zip));
    let value = HeaderValue::from_static("application/zip");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    Ok(response)
}
