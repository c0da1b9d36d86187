//! PutFunctionConcurrency, GetFunctionConcurrency, DeleteFunctionConcurrency,
//! PutProvisionedConcurrencyConfig, GetProvisionedConcurrencyConfig,
//! DeleteProvisionedConcurrencyConfig, ListProvisionedConcurrencyConfigs.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{Response, StatusCode},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App, Parameters, Target, blocking,
    error::ApiError,
    functions::{body, parse, refuse_qualifier},
    json,
    names::Reference,
    no_content,
    pages::Page,
};
use crate::{
    attachments::{Attachments, Provisioned},
    backend::Backend,
    function::{Version, iso8601, now_ms},
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PutFunctionConcurrency {
    reserved_concurrent_executions: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PutProvisionedConcurrencyConfig {
    provisioned_concurrent_executions: Option<i64>,
}

/// What is left, at the least, for functions for which nothing is kept: 100, as in Lambda, or a tenth of
/// a small limit.
fn least_unreserved(limit: u32) -> u32 {
    limit.div_ceil(10).min(100)
}

/// PutFunctionConcurrency.
pub async fn put_reserved<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "PutFunctionConcurrency").await?;
    app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let (work, name) = (app.clone(), reference.name.clone());
    let reserved = blocking(move || {
        let input: PutFunctionConcurrency = parse(&body)?;
        let member = "reservedConcurrentExecutions";
        let reserved = count(member, input.reserved_concurrent_executions, 0)?;
        work.store.attach(&name, |_, attachments| {
            let provisioned = attachments.provisioned();
            if reserved < provisioned {
                return Err(ApiError::InvalidParameterValue(format!(
                    "ReservedConcurrentExecutions  {reserved} should not be lower than function's \
                     total provisioned concurrency [{provisioned}]."
                )));
            }
            room(&work, &name, reserved, "ReservedConcurrentExecutions")?;
            attachments.reserved = Some(reserved);
            Ok(reserved)
        })
    })
    .await?;
    tracing::info!(function = reference.name, reserved, "concurrency reserved");
    app.announce_concurrency(&reference.name);
    json(StatusCode::OK, &json!({ "ReservedConcurrentExecutions": reserved }))
}

/// GetFunctionConcurrency.
pub async fn get_reserved<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let reserved = app.store.attachments(&reference.name).and_then(|a| a.reserved);
    let shape = reserved.map_or(json!({}), |n| json!({ "ReservedConcurrentExecutions": n }));
    json(StatusCode::OK, &shape)
}

/// DeleteFunctionConcurrency. What is not there is as good as deleted.
pub async fn delete_reserved<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let (work, name) = (app.clone(), reference.name.clone());
    blocking(move || {
        work.store.attach(&name, |_, attachments| {
            // What is provisioned is no longer a part of it.
            room(&work, &name, attachments.provisioned(), "ConcurrentExecutions")?;
            attachments.reserved = None;
            Ok::<_, ApiError>(())
        })
    })
    .await?;
    app.announce_concurrency(&reference.name);
    Ok(no_content())
}

/// PutProvisionedConcurrencyConfig.
pub async fn put_provisioned<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "PutProvisionedConcurrencyConfig").await?;
    let qualifier = qualifier(&reference)?.to_owned();
    app.find(&reference)?;
    let (work, name, own) = (app.clone(), reference.name.clone(), qualifier.clone());
    let requested = blocking(move || {
        let input: PutProvisionedConcurrencyConfig = parse(&body)?;
        let member = "provisionedConcurrentExecutions";
        let requested = count(member, input.provisioned_concurrent_executions, 1)?;
        work.store.attach(&name, |_, attachments| {
            check_target(attachments, &own)?;
            let provisioned = Provisioned { requested, modified_ms: now_ms() };
            attachments.provisioned.insert(own, provisioned);
            let all = attachments.provisioned();
            match attachments.reserved {
                Some(reserved) if all > reserved => Err(ApiError::InvalidParameterValue(
                    "Requested Provisioned Concurrency should not be greater than the \
                     reservedConcurrentExecution for function"
                        .into(),
                )),
                Some(_) => Ok(requested),
                None => {
                    room(&work, &name, all, "ConcurrentExecutions")?;
                    Ok(requested)
                }
            }
        })
    })
    .await?;
    tracing::info!(function = reference.name, qualifier, requested, "concurrency provisioned");
    app.announce_concurrency(&reference.name);
    json(StatusCode::ACCEPTED, &shape(&app, &reference.name, &qualifier)?)
}

/// GetProvisionedConcurrencyConfig and ListProvisionedConcurrencyConfigs, which a parameter tells apart.
pub async fn get_provisioned<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    if query.0.get("List").is_some_and(|list| list == "ALL") {
        return list(&app, &reference, &query);
    }
    let qualifier = qualifier(&reference)?;
    app.find(&reference)?;
    json(StatusCode::OK, &shape(&app, &reference.name, qualifier)?)
}

/// DeleteProvisionedConcurrencyConfig. Instances stay until they have been idle for long enough.
pub async fn delete_provisioned<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let qualifier = qualifier(&reference)?.to_owned();
    app.find(&reference)?;
    let (work, name) = (app.clone(), reference.name.clone());
    blocking(move || {
        work.store.attach(&name, |_, attachments| {
            attachments.provisioned.remove(&qualifier);
            Ok::<_, ApiError>(())
        })
    })
    .await?;
    app.announce_concurrency(&reference.name);
    Ok(no_content())
}

fn list<B: Backend>(
    app: &App<B>,
    reference: &Reference,
    query: &Parameters,
) -> Result<Response<Body>, ApiError> {
    use std::ops::Bound::{Excluded, Unbounded};
    let Page { limit, after } = Page::of(query)?;
    app.find(reference)?;
    refuse_qualifier(reference)?;
    let name = &reference.name;
    let attachments = app.store.attachments(name).unwrap_or_default();
    let from = after.as_deref().map_or(Unbounded, Excluded);
    let mut rest = attachments.provisioned.range::<str, _>((from, Unbounded)).map(|(q, _)| q);
    let page: Vec<_> = rest.by_ref().take(limit).collect();
    let next = Page::next(page.last().map(|q| (*q).clone()), rest.next().is_some());
    let mut configs = Vec::with_capacity(page.len());
    for qualifier in page {
        let mut config = shape(app, name, qualifier)?;
        config["FunctionArn"] = format!("{}:{qualifier}", app.place.arn(name)).into();
        configs.push(config);
    }
    json(StatusCode::OK, &json!({"ProvisionedConcurrencyConfigs": configs, "NextMarker": next}))
}

/// The qualifier, which these operations need.
fn qualifier(reference: &Reference) -> Result<&str, ApiError> {
    reference
        .qualifier
        .as_deref()
        .ok_or_else(|| ApiError::validation("qualifier", "null", "Member must not be null".into()))
}

fn count(member: &str, value: Option<i64>, least: u32) -> Result<u32, ApiError> {
    let Some(value) = value else {
        return Err(ApiError::validation(member, "null", "Member must not be null".into()));
    };
    let count = u32::try_from(value).ok().filter(|count| *count >= least);
    count.ok_or_else(|| {
        let range = format!("Member must have value greater than or equal to {least}");
        ApiError::validation(member, &value.to_string(), range)
    })
}

/// Whether the account can keep `kept` for a function. Only within [`crate::store::Store::attach`].
fn room<B: Backend>(app: &App<B>, name: &str, kept: u32, what: &str) -> Result<(), ApiError> {
    let least = least_unreserved(app.settings.concurrency);
    let all = u64::from(app.store.kept_for_others(name)) + u64::from(kept) + u64::from(least);
    match all > u64::from(app.settings.concurrency) && kept > 0 {
        true => Err(ApiError::InvalidParameterValue(format!(
            "Specified {what} for function decreases account's UnreservedConcurrentExecution below \
             its minimum value of [{least}]."
        ))),
        false => Ok(()),
    }
}

/// Whether a version or alias may have provisioned concurrency: never `$LATEST`, and a version of its own
/// or through an alias, not both.
pub(super) fn check_target(attachments: &Attachments, qualifier: &str) -> Result<(), ApiError> {
    let provisioned =
        |version: &Version| attachments.provisioned.contains_key(&version.to_string());
    let (versions, conflict) = match (qualifier.parse(), attachments.aliases.get(qualifier)) {
        (Ok(version), _) => {
            let mut aliases = attachments.aliases.iter().filter(|(_, alias)| alias.uses(version));
            let taken = aliases.any(|(name, _)| attachments.provisioned.contains_key(name));
            let message = "Version is pointed to by a Provisioned Concurrency alias";
            (vec![version], taken.then_some(message))
        }
        (Err(()), Some(alias)) => {
            let second = alias.additional.map(|(version, _)| version);
            let versions: Vec<_> = [alias.version].into_iter().chain(second).collect();
            let message = "Alias can't be used for Provisioned Concurrency configuration on an already \
                           Provisioned version";
            let taken = versions.iter().any(provisioned);
            (versions, taken.then_some(message))
        }
        (Err(()), None) => (Vec::new(), None),
    };
    if versions.contains(&Version::Latest) {
        return Err(ApiError::InvalidParameterValue(
            "Provisioned Concurrency Configs cannot be applied to unpublished function versions."
                .into(),
        ));
    }
    conflict.map_or(Ok(()), |message| Err(ApiError::ResourceConflict(message.into())))
}

/// `GetProvisionedConcurrencyConfigResponse`.
fn shape<B: Backend>(app: &App<B>, name: &str, qualifier: &str) -> Result<Value, ApiError> {
    let attachments = app.store.attachments(name).unwrap_or_default();
    let Some(Provisioned { requested, modified_ms }) = attachments.provisioned.get(qualifier)
    else {
        return Err(ApiError::ProvisionedConcurrencyConfigNotFound);
    };
    let (mut allocated, mut failure) = (0, None);
    for (version, share) in attachments.shares(qualifier) {
        let function = app.store.get(name, version);
        if let Some(found) = function.and_then(|f| app.scheduler.provisioned(&f)) {
            allocated += found.allocated.min(share);
            failure = failure.or(found.failure);
        }
    }
    let status = match failure {
        _ if allocated >= *requested => "READY",
        Some(_) => "FAILED",
        None => "IN_PROGRESS",
    };
    let mut shape = json!({
        "RequestedProvisionedConcurrentExecutions": requested,
        "AvailableProvisionedConcurrentExecutions": allocated,
        "AllocatedProvisionedConcurrentExecutions": allocated,
        "Status": status,
        "LastModified": iso8601(*modified_ms),
    });
    if let Some(reason) = failure.filter(|_| status == "FAILED") {
        shape["StatusReason"] = reason.into();
    }
    Ok(shape)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn something_is_always_left_for_others() {
        assert_eq!([1, 8, 10, 1000, 100_000].map(least_unreserved), [1, 1, 1, 100, 100]);
    }

    #[test]
    fn counts_are_bounded() {
        assert_eq!(count("m", Some(0), 0).unwrap(), 0);
        for (value, least) in [(None, 0), (Some(-1), 0), (Some(0), 1), (Some(1 << 40), 0)] {
            assert_eq!(count("m", value, least).unwrap_err().name(), "ValidationException");
        }
    }
}
