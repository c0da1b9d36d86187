//! PublishLayerVersion, GetLayerVersion, GetLayerVersionByArn, ListLayers, ListLayerVersions,
//! DeleteLayerVersion; and what functions may have as layers.

pub mod policy;

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
};
use serde_json::{Value, json};

use super::{
    App, Parameters, blocking,
    error::ApiError,
    functions::{body, code_error, not_stored, parse, uploaded},
    gate::Session,
    json,
    names::{Place, is_name},
    no_content,
    pages::{self, Page},
    shapes::PublishLayerVersion,
    validate::Violations,
};
use crate::{
    backend::Backend,
    code::Pending,
    function::{Layer, iso8601, now_ms},
    layers::{LayerVersion, Record},
    store::StoreError,
};

/// Most layers of a function.
const LAYERS: usize = 5;
/// Longest name or ARN.
const NAME: usize = 140;
/// Longest license in characters.
const LICENSE: usize = 512;
/// Longest description in characters.
const DESCRIPTION: usize = 256;
/// Most runtimes that a layer fits.
const RUNTIMES: usize = 15;
/// Longest name of a runtime here; the model lists them.
const RUNTIME: usize = 64;

/// The pattern that messages quote.
pub const VERSION_ARN: &str =
    "arn:[a-zA-Z0-9-]+:lambda:[a-zA-Z0-9-]+:\\d{12}:layer:[a-zA-Z0-9-_]+:[0-9]+";
const LAYER_NAME: &str =
    "(arn:[a-zA-Z0-9-]+:lambda:[a-zA-Z0-9-]+:\\d{12}:layer:[a-zA-Z0-9-_]+)|[a-zA-Z0-9-_]+";

/// The ARN of what a path means, for policies.
///
/// # Errors
/// It is no name of a layer.
pub fn arn(place: &Place, layer: &str, version: Option<&str>) -> Result<String, ApiError> {
    layer_name(place, layer)?;
    let layer = if is_name(layer) { place.layer_arn(layer) } else { layer.to_owned() };
    // As the handler reads it: `007` is version 7.
    let version =
        version.map(|text| text.parse::<i64>().map_or(text.to_owned(), |n| n.to_string()));
    Ok(version.map_or(layer.clone(), |version| format!("{layer}:{version}")))
}

/// The layers that a function is to have.
///
/// # Errors
/// Says what is wrong with them, in Lambda's words.
pub fn resolve<B: Backend>(
    app: &App<B>,
    session: &Session,
    arns: &[String],
) -> Result<Vec<Layer>, ApiError> {
    let refuse = |why: String| Err(ApiError::InvalidParameterValue(why));
    if arns.len() > LAYERS {
        return refuse(format!("Cannot reference more than {LAYERS} layers."));
    }
    let mut layers: Vec<Layer> = Vec::new();
    for arn in arns {
        let Some(VersionArn { region, account, name, version }) = version_arn(arn) else {
            let pattern = format!("Member must satisfy regular expression pattern: {VERSION_ARN}");
            return Err(ApiError::validation("layers", arn, pattern));
        };
        let Place { region: here, account: own } = &app.place;
        if region != here {
            return refuse(format!(
                "Layers are not in the same region as the function. Layers are expected to be in \
                 region {here}."
            ));
        }
        let found = version.filter(|_| account == own).and_then(|v| app.store.layer(name, v));
        let Some(found) = found.filter(|layer| !layer.record.deleted) else {
            return refuse(format!("Layer version {arn} does not exist."));
        };
        if let Some(other) = layers.iter().find(|layer| layer.name == name) {
            let other = format!("{}:{}", app.place.layer_arn(name), other.version);
            return refuse(format!(
                "Two different versions of the same layer are not allowed to be referenced in the \
                 same function. {other} and {arn} are versions of the same layer."
            ));
        }
        session.may("lambda:GetLayerVersion", arn)?;
        layers.push(found.reference());
    }
    Ok(layers)
}

/// Removes layers that were deleted and that no function has any more.
pub fn remove_unused<B: Backend>(app: &App<B>) {
    match app.store.sweep_layers() {
        Ok(gone) => gone.iter().for_each(|layer| app.code.remove_archive(&layer.record.code)),
        // The next start tries again.
        Err(error) => tracing::warn!(%error, "deleted layers remain"),
    }
}

/// The parts of a layer version's ARN.
#[derive(Debug, PartialEq, Eq)]
pub struct VersionArn<'a> {
    region: &'a str,
    account: &'a str,
    name: &'a str,
    /// `None`: larger than any that is given.
    version: Option<u32>,
}

/// Takes the ARN of a layer version apart, if it is one.
pub fn version_arn(text: &str) -> Option<VersionArn<'_>> {
    let (layer, version) = text.rsplit_once(':')?;
    let digits = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit());
    let (region, account, name) = layer_arn(layer)?;
    (digits && text.len() <= NAME).then(|| VersionArn {
        region,
        account,
        name,
        version: version.parse().ok(),
    })
}

/// Region, account and name in the ARN of a layer.
fn layer_arn(text: &str) -> Option<(&str, &str, &str)> {
    let parts: Vec<&str> = text.split(':').collect();
    let ["arn", partition, "lambda", region, account, "layer", name] = parts[..] else {
        return None;
    };
    let word = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let twelve = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
    (word(partition) && word(region) && twelve && is_name(name)).then_some((region, account, name))
}

/// The name of the layer that a path means; none where it can't be of here.
fn layer_name<'a>(place: &Place, text: &'a str) -> Result<Option<&'a str>, ApiError> {
    let mut found = Violations::default();
    found.length("layerName", Some(text), NAME);
    let fits = |text: &str| is_name(text) || layer_arn(text).is_some();
    found.pattern("layerName", Some(text), fits, LAYER_NAME);
    found.check()?;
    Ok(match layer_arn(text) {
        None => Some(text),
        Some((region, account, name)) => {
            (region == place.region && account == place.account).then_some(name)
        }
    })
}

/// The version that a path means.
fn find<B: Backend>(
    app: &App<B>,
    layer: &str,
    version: &str,
) -> Result<Arc<LayerVersion>, ApiError> {
    let number: i64 = version.parse().map_err(|_| {
        let constraint = "Member must be a number";
        ApiError::validation("versionNumber", version, constraint.into())
    })?;
    if number < 1 {
        return Err(ApiError::InvalidParameterValue("Layer Version Cannot be less than 1.".into()));
    }
    let name = layer_name(&app.place, layer)?;
    let found = name.zip(u32::try_from(number).ok());
    let found = found.and_then(|(name, number)| app.store.layer(name, number));
    found.filter(|layer| !layer.record.deleted).ok_or_else(|| missing(&app.place, layer, version))
}

fn missing(place: &Place, layer: &str, version: &str) -> ApiError {
    let arn = if is_name(layer) { place.layer_arn(layer) } else { layer.to_owned() };
    ApiError::ResourceNotFound(format!("Layer version {arn}:{version} does not exist."))
}

/// PublishLayerVersion.
pub async fn publish<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path(layer): Path<String>,
    Extension(session): Extension<Session>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let _turn = app.uploads.acquire().await;
    let body = body(request, "PublishLayerVersion").await?;
    let work = app.clone();
    let asking = session.clone();
    let layer = blocking(move || {
        let input: PublishLayerVersion = parse(&body)?;
        check(&input)?;
        let Some(name) = layer_name(&work.place, &layer)? else {
            return Err(ApiError::InvalidParameterValue(format!(
                "A layer can only be published under its own name or ARN in {} of account {}; not \
                 as {layer}",
                work.place.region, work.place.account
            )));
        };
        let zip = uploaded(&work, &asking, input.content.unwrap_or_default())?;
        // Built for nothing but to know that it can be.
        work.backend.build_disk(&zip, &[]).map_err(code_error)?;
        let envelope = work.store.envelope()?;
        let mut pending = Pending::default();
        let owner = LayerVersion::owner(name);
        let code = work.code.put(&owner, &envelope, &zip, &mut pending).map_err(not_stored)?;
        let record = Record {
            code,
            description: input.description.unwrap_or_default(),
            license: input.license_info,
            runtimes: input.compatible_runtimes,
            architectures: input.compatible_architectures,
            created_ms: now_ms(),
            deleted: false,
            permissions: BTreeMap::new(),
            revision: uuid::Uuid::new_v4().to_string(),
        };
        let published = work.store.publish_layer(name, record, envelope)?;
        pending.keep();
        Ok(published)
    })
    .await?;
    tracing::info!(layer = layer.name, version = layer.version, "layer published");
    json(StatusCode::CREATED, &full(&app.place, &layer, &session, &headers))
}

fn check(input: &PublishLayerVersion<'_>) -> Result<(), ApiError> {
    let mut found = Violations::default();
    if input.content.is_none() {
        found.add("content", "null", "Member must not be null");
    }
    found.length("description", input.description.as_deref(), DESCRIPTION);
    found.length("licenseInfo", input.license_info.as_deref(), LICENSE);
    let too_many = |most: usize| format!("Member must have length less than or equal to {most}");
    if input.compatible_runtimes.len() > RUNTIMES {
        found.add("compatibleRuntimes", "[...]", &too_many(RUNTIMES));
    }
    for runtime in input.compatible_runtimes.iter().take(RUNTIMES) {
        found.pattern("compatibleRuntimes", Some(runtime), is_runtime, "the name of a runtime");
    }
    if input.compatible_architectures.len() > 2 {
        found.add("compatibleArchitectures", "[...]", &too_many(2));
    }
    for architecture in input.compatible_architectures.iter().take(2) {
        found.pattern(
            "compatibleArchitectures",
            Some(architecture),
            is_architecture,
            "x86_64|arm64",
        );
    }
    found.check()
}

/// Which runtimes there are changes with each image, and layers outlive them.
fn is_runtime(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
    !text.is_empty() && text.len() <= RUNTIME && text.bytes().all(letter)
}

fn is_architecture(text: &str) -> bool {
    matches!(text, "x86_64" | "arm64")
}

/// GetLayerVersion.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path((layer, version)): Path<(String, String)>,
    Extension(session): Extension<Session>,
    headers: HeaderMap,
) -> Result<Response<Body>, ApiError> {
    let layer = find(&app, &layer, &version)?;
    json(StatusCode::OK, &full(&app.place, &layer, &session, &headers))
}

/// DeleteLayerVersion. What is not there is deleted already, as Lambda has it.
pub async fn delete<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path((layer, version)): Path<(String, String)>,
) -> Result<Response<Body>, ApiError> {
    let layer = match find(&app, &layer, &version) {
        Err(ApiError::ResourceNotFound(_)) => return Ok(no_content()),
        found => found?,
    };
    let work = app.clone();
    let (name, version) = (layer.name.clone(), layer.version);
    blocking(move || {
        let gone = work.store.change_layer(&layer.name, layer.version, |record| {
            record.deleted = true;
            Ok::<_, StoreError>(())
        });
        match gone {
            Ok(()) | Err(StoreError::UnknownLayer { .. }) => remove_unused(&work),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    })
    .await?;
    tracing::info!(layer = name, version, "layer version deleted");
    Ok(no_content())
}

/// ListLayers, and GetLayerVersionByArn, which has the same path.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    query: Parameters,
    Extension(session): Extension<Session>,
    headers: HeaderMap,
) -> Result<Response<Body>, ApiError> {
    match query.0.get("find").map(String::as_str) {
        None => {}
        Some("LayerVersion") => {
            let arn = query.0.get("Arn").map(String::as_str).unwrap_or_default();
            let Some(VersionArn { .. }) = version_arn(arn) else {
                let pattern =
                    format!("Member must satisfy regular expression pattern: {VERSION_ARN}");
                return Err(ApiError::validation("arn", arn, pattern));
            };
            // Only the query says which one: the gate does not ask.
            let (layer, version) = arn.rsplit_once(':').unwrap_or_default();
            session.may("lambda:GetLayerVersion", &self::arn(&app.place, layer, Some(version))?)?;
            let layer = find(&app, layer, version)?;
            return json(StatusCode::OK, &full(&app.place, &layer, &session, &headers));
        }
        Some(other) => {
            let values = "Member must satisfy enum value set: [LayerVersion]";
            return Err(ApiError::validation("find", other, values.into()));
        }
    }
    let page = Page::of(&query)?;
    let filter = Filter::of(&query)?;
    let after = page.after.as_deref();
    let (layers, more) = app.store.layers(after, page.limit, |layer| filter.fits(layer));
    let next = Page::next(layers.last().map(|last| last.name.clone()), more);
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            json!({
                "LayerName": layer.name,
                "LayerArn": app.place.layer_arn(&layer.name),
                "LatestMatchingVersion": item(&app.place, layer),
            })
        })
        .collect();
    json(StatusCode::OK, &json!({"Layers": layers, "NextMarker": next}))
}

/// ListLayerVersions.
pub async fn versions<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path(layer): Path<String>,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    let page = Page::of(&query)?;
    let filter = Filter::of(&query)?;
    let before = page.after.map(|text| text.parse::<u32>().map_err(|_| pages::invalid()));
    let before = before.transpose()?;
    let name = layer_name(&app.place, &layer)?;
    let fits = |layer: &LayerVersion| filter.fits(layer);
    let (versions, more) = match name {
        Some(name) => app.store.layer_versions(name, before, page.limit, fits),
        None => (Vec::new(), false),
    };
    let next = Page::next(versions.last().map(|last| last.version.to_string()), more);
    let versions: Vec<_> = versions.iter().map(|layer| item(&app.place, layer)).collect();
    json(StatusCode::OK, &json!({"LayerVersions": versions, "NextMarker": next}))
}

/// What lists of layers are asked for.
struct Filter<'a> {
    runtime: Option<&'a str>,
    architecture: Option<&'a str>,
}

impl<'a> Filter<'a> {
    fn of(query: &'a Parameters) -> Result<Self, ApiError> {
        let member = |name: &str| query.0.get(name).map(String::as_str);
        let (runtime, architecture) =
            (member("CompatibleRuntime"), member("CompatibleArchitecture"));
        let mut found = Violations::default();
        found.pattern("compatibleRuntime", runtime, is_runtime, "the name of a runtime");
        found.pattern("compatibleArchitecture", architecture, is_architecture, "x86_64|arm64");
        found.check()?;
        Ok(Self { runtime, architecture })
    }

    /// A layer that names none is listed for none in particular, as Lambda has it.
    fn fits(&self, layer: &LayerVersion) -> bool {
        let has = |list: &[String], wanted: Option<&str>| {
            wanted.is_none_or(|wanted| list.iter().any(|one| one == wanted))
        };
        has(&layer.record.runtimes, self.runtime)
            && has(&layer.record.architectures, self.architecture)
    }
}

/// `LayerVersionsListItem`.
fn item(place: &Place, layer: &LayerVersion) -> Value {
    let Record { description, license, runtimes, architectures, created_ms, .. } = &layer.record;
    let mut item = json!({
        "LayerVersionArn": format!("{}:{}", place.layer_arn(&layer.name), layer.version),
        "Version": layer.version,
        "Description": description,
        "CreatedDate": iso8601(*created_ms),
    });
    if let Some(license) = license {
        item["LicenseInfo"] = license.as_str().into();
    }
    for (name, list) in
        [("CompatibleRuntimes", runtimes), ("CompatibleArchitectures", architectures)]
    {
        if !list.is_empty() {
            item[name] = json!(list);
        }
    }
    item
}

/// `GetLayerVersionResponse`.
fn full(place: &Place, layer: &LayerVersion, session: &Session, headers: &HeaderMap) -> Value {
    let mut output = item(place, layer);
    let code = &layer.record.code;
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    let path = format!("{}/versions/{}/content", layer.name, layer.version);
    let link = session.link(&format!("/firn/v1/layers/{path}?sha256={}", code.sha256));
    output["LayerArn"] = place.layer_arn(&layer.name).into();
    output["Content"] = json!({
        "Location": format!("http://{host}{link}"),
        "CodeSha256": code.sha256_base64(),
        "CodeSize": code.size,
    });
    output
}

/// A layer as it was uploaded: where `Content.Location` leads.
pub async fn content<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Path((layer, version)): Path<(String, String)>,
) -> Result<Response<Body>, ApiError> {
    let layer = find(&app, &layer, &version)?;
    let code = app.code.clone();
    let zip = blocking(move || layer.archive(&code).map_err(|e| ApiError::Service(e.to_string())));
    let mut response = Response::new(Body::from(zip.await?));
    let value = HeaderValue::from_static("application/zip");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    Ok(response)
}
