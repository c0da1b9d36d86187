//! PublishVersion, ListVersionsByFunction.
//!
//! A version is a record of its own that never changes, with a snapshot and instances of its own; code is
//! shared with the versions that have the same upload.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{Response, StatusCode},
};
use serde_json::json;

use super::{
    App, Parameters, Target, blocking,
    error::ApiError,
    functions::{body, parse, refuse_qualifier},
    json,
    pages::{self, Page},
    shapes::{FunctionConfiguration, PublishVersion},
    validate,
};
use crate::{
    backend::Backend,
    function::{Function, Version},
    store::Published,
};

/// PublishVersion.
pub async fn publish<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "PublishVersion").await?;
    let function = app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let work = app.clone();
    let published = blocking(move || {
        let input: PublishVersion = parse(&body)?;
        validate::publish(&input)?;
        let revision = input.revision_id.as_deref().filter(|r| !r.is_empty());
        let sha256 = input.code_sha256.as_deref().filter(|sha256| !sha256.is_empty());
        let same_code = |latest: &Function| match sha256 {
            Some(sha256) if sha256 != latest.code.sha256_base64() => {
                Err(ApiError::InvalidParameterValue(format!(
                    "CodeSHA256 ({}) is different from current CodeSHA256 in $LATEST ({}). Please \
                     try again with the CodeSHA256 in $LATEST.",
                    sha256.chars().take(64).collect::<String>(),
                    latest.code.sha256_base64()
                )))
            }
            _ => Ok(()),
        };
        work.store.publish(&function.name, revision, input.description, same_code)
    })
    .await?;
    answer(&app, StatusCode::CREATED, &published)
}

/// Tells the scheduler of a version, and shows it.
pub(super) fn answer<B: Backend>(
    app: &App<B>,
    status: StatusCode,
    Published { version, new }: &Published,
) -> Result<Response<Body>, ApiError> {
    if *new {
        tracing::info!(function = version.qualified_name(), "version published");
        app.announce(version, None);
    }
    json(status, &FunctionConfiguration::qualified(version, &app.place))
}

/// ListVersionsByFunction.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    let page = Page::of(&query)?;
    let function = app.find(&reference)?;
    let after = page.after.map(|text| text.parse::<Version>().map_err(|()| pages::invalid()));
    let (versions, more) = app.store.versions(&function.name, after.transpose()?, page.limit);
    let next = Page::next(versions.last().map(|last| last.version.to_string()), more);
    let versions: Vec<_> =
        versions.iter().map(|v| FunctionConfiguration::qualified(v, &app.place)).collect();
    json(StatusCode::OK, &json!({"Versions": versions, "NextMarker": next}))
}
