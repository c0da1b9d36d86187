//! CreateAlias, GetAlias, UpdateAlias, DeleteAlias, ListAliases.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{Response, StatusCode},
};
use serde_json::{Value, json};

use super::{
    App, Parameters, Target, blocking, concurrency,
    error::ApiError,
    functions::{body, parse, refuse_qualifier},
    json,
    names::{Reference, is_alias},
    no_content,
    pages::Page,
    shapes::{CreateAlias, RoutingConfig, UpdateAlias},
    validate,
};
use crate::{attachments::Alias, backend::Backend, function::Version, store::Versions};

/// CreateAlias.
pub async fn create<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "CreateAlias").await?;
    app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let work = app.clone();
    let answer = blocking(move || {
        let input: CreateAlias = parse(&body)?;
        validate::create_alias(&input)?;
        let name = input.name.unwrap_or_default();
        let arn = named(&reference, &name).arn(&work.place);
        work.store.attach(&reference.name, |versions, attachments| {
            if attachments.aliases.contains_key(&name) {
                return Err(ApiError::ResourceConflict(format!("Alias already exists: {arn}")));
            }
            let candidates = Candidates { app: &work, reference: &reference, versions };
            let alias = Alias {
                version: candidates.version(&input.function_version.unwrap_or_default())?,
                additional: candidates.additional(input.routing_config)?,
                description: input.description.unwrap_or_default(),
                revision: uuid::Uuid::new_v4().to_string(),
            };
            candidates.check(&alias)?;
            let answer = shape(&arn, &name, &alias);
            attachments.aliases.insert(name, alias);
            Ok(answer)
        })
    })
    .await?;
    json(StatusCode::CREATED, &answer)
}

/// GetAlias.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Path((_, name)): Path<(String, String)>,
) -> Result<Response<Body>, ApiError> {
    check_name(&name)?;
    app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let reference = named(&reference, &name);
    let attachments = app.store.attachments(&reference.name).unwrap_or_default();
    let alias = attachments.aliases.get(&name).ok_or_else(|| missing(&app, &reference))?;
    json(StatusCode::OK, &shape(&reference.arn(&app.place), &name, alias))
}

/// UpdateAlias.
pub async fn update<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Path((_, name)): Path<(String, String)>,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "UpdateAlias").await?;
    check_name(&name)?;
    let function = app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let work = app.clone();
    let answer = blocking(move || {
        let input: UpdateAlias = parse(&body)?;
        validate::update_alias(&input)?;
        let own = named(&reference, &name);
        work.store.attach(&reference.name, |versions, attachments| {
            let Some(alias) = attachments.aliases.get_mut(&name) else {
                return Err(missing(&work, &own));
            };
            let revision = input.revision_id.filter(|r| !r.is_empty());
            if revision.is_some_and(|revision| revision != alias.revision) {
                return Err(ApiError::PreconditionFailed { read: "GetAlias" });
            }
            let candidates = Candidates { app: &work, reference: &reference, versions };
            if let Some(version) = &input.function_version {
                alias.version = candidates.version(version)?;
            }
            if input.routing_config.is_some() {
                alias.additional = candidates.additional(input.routing_config)?;
            }
            alias.description = input.description.unwrap_or(std::mem::take(&mut alias.description));
            candidates.check(alias)?;
            alias.revision = uuid::Uuid::new_v4().to_string();
            let answer = shape(&own.arn(&work.place), &name, alias);
            if attachments.provisioned.contains_key(&name) {
                concurrency::check_target(attachments, &name)?;
            }
            Ok(answer)
        })
    })
    .await?;
    // Where it leads, its provisioned concurrency follows.
    app.announce_concurrency(&function.name);
    json(StatusCode::OK, &answer)
}

/// DeleteAlias. One that is not there is as good as deleted.
pub async fn delete<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Path((_, name)): Path<(String, String)>,
) -> Result<Response<Body>, ApiError> {
    check_name(&name)?;
    let function = app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let (work, alias) = (app.clone(), name.clone());
    blocking(move || {
        work.store.attach(&reference.name, |_, attachments| {
            attachments.forget(&alias);
            Ok::<_, ApiError>(())
        })
    })
    .await?;
    app.announce_concurrency(&function.name);
    app.events.unset(&function, &name).await;
    Ok(no_content())
}

/// ListAliases.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    use std::ops::Bound::{Excluded, Unbounded};
    let page = Page::of(&query)?;
    let version = query.0.get("FunctionVersion").map(|text| {
        validate::version("functionVersion", text)?;
        Ok::<_, ApiError>(text.parse::<Version>().ok())
    });
    let version = version.transpose()?;
    app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let attachments = app.store.attachments(&reference.name).unwrap_or_default();
    let from = page.after.as_deref().map_or(Unbounded, Excluded);
    let mut rest = attachments
        .aliases
        .range::<str, _>((from, Unbounded))
        // A number that no version can have is no alias's either.
        .filter(|(_, alias)| version.is_none_or(|v| v.is_some_and(|v| alias.uses(v))));
    let aliases: Vec<_> = rest.by_ref().take(page.limit).collect();
    let more = rest.next().is_some();
    let next = Page::next(aliases.last().map(|(name, _)| (*name).clone()), more);
    let aliases: Vec<_> = aliases
        .into_iter()
        .map(|(name, alias)| shape(&named(&reference, name).arn(&app.place), name, alias))
        .collect();
    json(StatusCode::OK, &json!({"Aliases": aliases, "NextMarker": next}))
}

/// What an alias may point to.
struct Candidates<'a, B: Backend> {
    app: &'a App<B>,
    reference: &'a Reference,
    versions: &'a Versions,
}

impl<B: Backend> Candidates<'_, B> {
    fn version(&self, text: &str) -> Result<Version, ApiError> {
        let version = text.parse().ok().filter(|version| self.versions.contains_key(version));
        version.ok_or_else(|| self.app.missing(&named(self.reference, text)))
    }

    fn additional(
        &self,
        routing: Option<RoutingConfig>,
    ) -> Result<Option<(Version, f64)>, ApiError> {
        let weights = routing.and_then(|r| r.additional_version_weights).unwrap_or_default();
        if weights.len() > 1 {
            return Err(ApiError::InvalidParameterValue(
                "Number of items in AdditionalVersionWeights cannot be greater than 1".into(),
            ));
        }
        let first = BTreeMap::into_iter(weights).next();
        first.map(|(version, weight)| Ok((self.version(&version)?, weight))).transpose()
    }

    fn check(&self, alias: &Alias) -> Result<(), ApiError> {
        let Some((additional, _)) = alias.additional else { return Ok(()) };
        if alias.version == Version::Latest {
            return Err(ApiError::InvalidParameterValue(
                "$LATEST is not supported for an alias pointing to more than 1 version".into(),
            ));
        }
        if alias.version == additional {
            return Err(ApiError::InvalidParameterValue(format!(
                "Invalid function version {additional}. Function version {additional} is already \
                 included in routing configuration."
            )));
        }
        Ok(())
    }
}

fn named(reference: &Reference, qualifier: &str) -> Reference {
    Reference { qualifier: Some(qualifier.to_owned()), ..reference.clone() }
}

fn missing<B: Backend>(app: &App<B>, reference: &Reference) -> ApiError {
    ApiError::ResourceNotFound(format!("Alias not found: {}", reference.arn(&app.place)))
}

fn check_name(name: &str) -> Result<(), ApiError> {
    match is_alias(name) {
        true => Ok(()),
        false => Err(ApiError::validation("name", name, validate::ALIAS.into())),
    }
}

/// `AliasConfiguration`.
fn shape(arn: &str, name: &str, alias: &Alias) -> Value {
    let mut shape = json!({
        "AliasArn": arn,
        "Name": name,
        "FunctionVersion": alias.version,
        "Description": alias.description,
        "RevisionId": alias.revision,
    });
    if let Some((version, weight)) = alias.additional {
        let weights = BTreeMap::from([(version.to_string(), weight)]);
        shape["RoutingConfig"] = json!({ "AdditionalVersionWeights": weights });
    }
    shape
}
