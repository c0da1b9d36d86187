//! PutFunctionEventInvokeConfig, UpdateFunctionEventInvokeConfig, GetFunctionEventInvokeConfig,
//! DeleteFunctionEventInvokeConfig, ListFunctionEventInvokeConfigs.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{Response, StatusCode},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App, Parameters, Target, error::ApiError, functions, gate::Session, json, names::Reference,
    pages::Page,
};
use crate::{aws::Recipient, backend::Backend, events::settings::Settings, function::Function};

/// Retries.
const RETRIES: (i64, i64) = (0, 2);
/// Age in seconds.
const AGE: (i64, i64) = (60, 21_600);
/// Longest destination in bytes.
const DESTINATION: usize = 350;
/// The pattern that messages quote.
const PATTERN: &str = "$|kafka://([^.]([a-zA-Z0-9\\-_.]{0,248}))|\
    arn:(aws[a-zA-Z0-9-]*):([a-zA-Z0-9\\-])+:((eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\\d{1})?\
    :(\\d{12})?:(.*)";

/// What is to be set.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Input {
    maximum_retry_attempts: Option<i64>,
    maximum_event_age_in_seconds: Option<i64>,
    destination_config: Option<DestinationConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DestinationConfig {
    on_success: Option<Destination>,
    on_failure: Option<Destination>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Destination {
    destination: Option<String>,
}

/// PutFunctionEventInvokeConfig.
pub async fn put<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    change(&app, &reference, request, "PutFunctionEventInvokeConfig", |_| Ok(Settings::default()))
        .await
}

/// UpdateFunctionEventInvokeConfig.
pub async fn update<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    change(&app, &reference, request, "UpdateFunctionEventInvokeConfig", |old| {
        old.ok_or_else(|| missing(&app, &reference))
    })
    .await
}

/// GetFunctionEventInvokeConfig.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    let qualifier = qualifier(&reference);
    let settings = app.events.settings(&function, qualifier);
    let settings = settings.ok_or_else(|| missing(&app, &reference))?;
    json(StatusCode::OK, &output(&app, &function, qualifier, &settings))
}

/// DeleteFunctionEventInvokeConfig.
pub async fn delete<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    let gone = |old: Option<Settings>| match old {
        Some(_) => Ok(None),
        None => Err(missing(&app, &reference)),
    };
    app.events.set(&function, qualifier(&reference), gone).await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

/// ListFunctionEventInvokeConfigs.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    let Page { limit, after } = Page::of(&query)?;
    let function = app.find(&reference)?;
    let mut all = app.events.all_settings(&function);
    all.retain(|(qualifier, _)| after.as_ref().is_none_or(|after| qualifier > after));
    let more = all.len() > limit;
    all.truncate(limit);
    let next = Page::next(all.last().map(|(qualifier, _)| qualifier.clone()), more);
    let configs: Vec<_> =
        all.iter().map(|(qualifier, s)| output(&app, &function, qualifier, s)).collect();
    json(StatusCode::OK, &json!({"FunctionEventInvokeConfigs": configs, "NextMarker": next}))
}

async fn change<B: Backend>(
    app: &App<B>,
    reference: &Reference,
    request: Request,
    operation: &'static str,
    from: impl FnOnce(Option<Settings>) -> Result<Settings, ApiError>,
) -> Result<Response<Body>, ApiError> {
    let session = Session::of(&request)?;
    let body = functions::body(request, operation).await?;
    let function = app.find(reference)?;
    let input = functions::parse::<Input>(&body)?;
    check(app, &session, &function, &input)?;
    let qualifier = qualifier(reference);
    let apply = |old| {
        let mut settings = from(old)?;
        // In range: `check` has seen them.
        settings.retries = input.maximum_retry_attempts.map(|n| n as u32).or(settings.retries);
        let age = input.maximum_event_age_in_seconds.map(|n| n as u32);
        settings.max_age_s = age.or(settings.max_age_s);
        let DestinationConfig { on_success, on_failure } =
            input.destination_config.unwrap_or_default();
        // One that is empty takes back what was set.
        let named = |d: Destination| d.destination.filter(|arn| !arn.is_empty());
        settings.on_success = on_success.map_or(settings.on_success, named);
        settings.on_failure = on_failure.map_or(settings.on_failure, named);
        Ok::<_, ApiError>(Some(settings))
    };
    let settings = app.events.set(&function, qualifier, apply).await?.unwrap_or_default();
    tracing::info!(function = function.name, qualifier, "settings for events changed");
    json(StatusCode::OK, &output(app, &function, qualifier, &settings))
}

fn check<B: Backend>(
    app: &App<B>,
    session: &Session,
    function: &Function,
    input: &Input,
) -> Result<(), ApiError> {
    let range = |member, value: Option<i64>, (least, most)| {
        let (bound, limit) = match value {
            Some(value) if value < least => ("greater", least),
            Some(value) if value > most => ("less", most),
            _ => return Ok(()),
        };
        let shown = value.unwrap_or_default().to_string();
        let constraint = format!("Member must have value {bound} than or equal to {limit}");
        Err(ApiError::validation(member, &shown, constraint))
    };
    let Input { maximum_retry_attempts, maximum_event_age_in_seconds, destination_config } = input;
    range("maximumRetryAttempts", *maximum_retry_attempts, RETRIES)?;
    range("maximumEventAgeInSeconds", *maximum_event_age_in_seconds, AGE)?;
    if maximum_retry_attempts.is_none()
        && maximum_event_age_in_seconds.is_none()
        && destination_config.is_none()
    {
        return Err(ApiError::InvalidParameterValue(
            "You must specify at least one of error handling or destination setting.".into(),
        ));
    }
    let Some(DestinationConfig { on_success, on_failure }) = destination_config else {
        return Ok(());
    };
    for (member, destination) in [("onSuccess", on_success), ("onFailure", on_failure)] {
        let arn = destination.as_ref().and_then(|d| d.destination.as_deref()).unwrap_or_default();
        if !arn.is_empty() {
            check_destination(app, session, function, member, arn)?;
        }
    }
    Ok(())
}

fn check_destination<B: Backend>(
    app: &App<B>,
    session: &Session,
    function: &Function,
    member: &str,
    arn: &str,
) -> Result<(), ApiError> {
    let member = format!("destinationConfig.{member}.destination");
    if arn.len() > DESTINATION {
        let constraint = format!("Member must have length less than or equal to {DESTINATION}");
        return Err(ApiError::validation(&member, arn, constraint));
    }
    if !arn.starts_with("arn:aws") && !arn.starts_with("kafka://") {
        let constraint = format!("Member must satisfy regular expression pattern: {PATTERN}");
        return Err(ApiError::validation(&member, arn, constraint));
    }
    let refuse = |why: String| Err(ApiError::InvalidParameterValue(why));
    if let Some(target) = Recipient::parse(arn) {
        if target.is_fifo() {
            return refuse(format!("The destination {arn} is FIFO, which is not supported."));
        }
        session.role_may(&function.config.role, target.action(), arn)?;
        return app.aws.ready(target.service).or_else(|error| refuse(error.to_string()));
    }
    if arn.split(':').nth(2) != Some("lambda") {
        return refuse(format!(
            "Firn does not support this kind of destination yet: {arn}. Use the ARN of a function, of \
             an SQS queue or of an SNS topic."
        ));
    }
    let found = Reference::parse(arn, None).and_then(|reference| app.find(&reference));
    match found {
        Ok(found) if found.name == function.name => {
            refuse("You can't specify the function as a destination for itself.".into())
        }
        Ok(_) => session.role_may(&function.config.role, "lambda:InvokeFunction", arn),
        Err(_) => {
            refuse(format!("The destination ARN {arn} is invalid: there is no such function."))
        }
    }
}

fn qualifier(reference: &Reference) -> &str {
    reference.qualifier.as_deref().unwrap_or("$LATEST")
}

fn missing<B: Backend>(app: &App<B>, reference: &Reference) -> ApiError {
    ApiError::ResourceNotFound(format!(
        "The function {}:{} doesn't have an EventInvokeConfig",
        app.place.arn(&reference.name),
        qualifier(reference)
    ))
}

fn output<B: Backend>(
    app: &App<B>,
    function: &Function,
    qualifier: &str,
    settings: &Settings,
) -> Value {
    let destination = |arn: &Option<String>| match arn {
        Some(arn) => json!({ "Destination": arn }),
        None => json!({}),
    };
    let mut output = json!({
        "FunctionArn": format!("{}:{qualifier}", app.place.arn(&function.name)),
        // The model's timestamps are seconds.
        "LastModified": settings.modified_ms as f64 / 1000.0,
        "DestinationConfig": {
            "OnSuccess": destination(&settings.on_success),
            "OnFailure": destination(&settings.on_failure),
        },
    });
    if let Some(retries) = settings.retries {
        output["MaximumRetryAttempts"] = retries.into();
    }
    if let Some(seconds) = settings.max_age_s {
        output["MaximumEventAgeInSeconds"] = seconds.into();
    }
    output
}
