//! TagResource, UntagResource, ListTags. Tags are a whole function's, and change no revision.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, Query, Request, State},
    http::{Response, StatusCode},
};
use serde_json::json;

use super::{
    App, blocking,
    error::ApiError,
    functions::{body, parse},
    json,
    names::Reference,
    no_content,
    shapes::TagResource,
    validate,
};
use crate::{backend::Backend, function::Function};

/// TagResource.
pub async fn tag<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path(resource): Path<String>,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "TagResource").await?;
    let function = find(&app, &resource)?;
    let work = app.clone();
    blocking(move || {
        let TagResource { tags } = parse(&body)?;
        let Some(tags) = tags else {
            let constraint = "Member must not be null";
            return Err(ApiError::validation("tags", "null", constraint.into()));
        };
        validate::tags(&tags)?;
        work.store.update(&function.name, None, false, |old| {
            let mut new = old.clone();
            new.tags.extend(tags);
            // Together with those that there were.
            validate::tags(&new.tags)?;
            Ok::<_, ApiError>(new)
        })
    })
    .await?;
    Ok(no_content())
}

/// UntagResource.
pub async fn untag<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path(resource): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Response<Body>, ApiError> {
    let function = find(&app, &resource)?;
    let keys: Vec<String> =
        query.into_iter().filter(|(name, _)| name == "tagKeys").map(|(_, key)| key).collect();
    if keys.is_empty() {
        return Err(ApiError::validation("tagKeys", "null", "Member must not be null".into()));
    }
    let work = app.clone();
    blocking(move || {
        work.store.update(&function.name, None, false, |old| {
            let mut new = old.clone();
            new.tags.retain(|key, _| !keys.contains(key));
            Ok::<Function, ApiError>(new)
        })
    })
    .await?;
    Ok(no_content())
}

/// ListTags.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path(resource): Path<String>,
) -> Result<Response<Body>, ApiError> {
    let function = find(&app, &resource)?;
    json(StatusCode::OK, &json!({ "Tags": function.tags }))
}

/// The function that an ARN names.
fn find<B: Backend>(app: &App<B>, resource: &str) -> Result<Arc<Function>, ApiError> {
    let is_function =
        resource.starts_with("arn:") && resource.split(':').nth(5) == Some("function");
    if !is_function {
        return Err(ApiError::validation(
            "resource",
            resource,
            "Member must be the ARN of a function; Firn has tags on nothing else".into(),
        ));
    }
    let reference = Reference::parse(resource, None)?;
    if reference.qualifier.is_some() {
        return Err(ApiError::InvalidParameterValue(
            "Tags on function aliases and versions are not supported. Please specify either a \
             function name or an unqualified function ARN."
                .into(),
        ));
    }
    app.find(&reference)
}
