//! What Lambda's API has no words for, under `/firn/v1`: readiness, snapshots, instances, the queue of events, code.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Response, StatusCode, header},
};
use serde_json::json;

use super::{App, Parameters, Target, blocking, error::ApiError, json};
use crate::{
    backend::Backend,
    metrics::{Day, prometheus, prometheus::Now},
    prepare::Status,
};

/// Days of functions in a page of metering.
const METERED: usize = 1000;

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

/// What Prometheus reads.
pub async fn metrics<B: Backend>(
    State(app): State<Arc<App<B>>>,
) -> Result<Response<Body>, ApiError> {
    let mut now = Now::default();
    for listed in app.scheduler.instances().into_values() {
        *now.instances.entry(listed.state).or_default() += 1;
    }
    let usage = app.events.usage().await?;
    now.events = (usage.events, usage.bytes);
    now.interrupts_raised_again = app.scheduler.interrupts_raised_again();
    now.traces = app.traces.counts();
    let mut response = Response::new(Body::from(prometheus::text(app.metrics.totals(), now)));
    let value = HeaderValue::from_static(prometheus::CONTENT_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    Ok(response)
}

/// What functions have used, day by day: of all or of one (`FunctionName`), from a day (`From`) to a day
/// (`To`), page by page (`Marker`).
pub async fn metering<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Parameters(query): Parameters,
) -> Result<Response<Body>, ApiError> {
    let invalid = |name: &str| {
        ApiError::InvalidParameterValue(format!("{name} is no day; one looks like 2026-11-24."))
    };
    let day = |name: &str| {
        query.get(name).map(|text| Day::parse(text).ok_or_else(|| invalid(name))).transpose()
    };
    let (from, to) = (day("From")?, day("To")?.unwrap_or(i64::MAX));
    let after = match query.get("Marker") {
        None => Day { day: from.unwrap_or(0), function: String::new() },
        Some(marker) => marker
            .split_once(' ')
            .and_then(|(day, function)| {
                Some(Day { day: Day::parse(day)?, function: function.to_owned() })
            })
            .ok_or_else(|| ApiError::InvalidParameterValue("The Marker is invalid.".into()))?,
    };
    let function = query.get("FunctionName").cloned();
    let days = app.metrics.read(move |store| store.days(function.as_deref(), &after, to, METERED));
    let days = days.await.map_err(ApiError::Service)?;
    let last = days.last().filter(|_| days.len() == METERED);
    let marker = last.map(|last| format!("{} {}", last.day, last.function_name));
    let mut body = json!({ "Days": days });
    if let Some(marker) = marker {
        body["NextMarker"] = marker.into();
    }
    json(StatusCode::OK, &body)
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
