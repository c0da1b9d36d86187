//! CreateFunction, GetFunction, GetFunctionConfiguration, ListFunctions, UpdateFunctionCode,
//! UpdateFunctionConfiguration, DeleteFunction, GetAccountSettings.
//!
//! Order of a change: check everything, write the code, commit the record, tell the scheduler.
//! What fails before the commit leaves nothing behind; what follows it can't fail.

use std::{io, sync::Arc};

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Response, StatusCode, header},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use firn::{
    Disk,
    code::{CodeError, MAX_UNZIPPED},
};
use serde_json::{Value, json};

use super::{
    App, MAX_UPLOAD, Parameters, Target, blocking,
    error::ApiError,
    gate::Session,
    json, layers, names, no_content,
    pages::{self, Page},
    read_body, s3,
    shapes::{
        CodeUpload, CreateFunction, FunctionConfiguration, UpdateFunctionCode,
        UpdateFunctionConfiguration,
    },
    validate, versions,
};
use crate::{
    aws::Recipient,
    backend::Backend,
    code::Pending,
    function::{Config, Function, Layer, Memo, Version, now_ms},
    store::{Published, StoreError, Updated, check_revision},
    workshop,
};

/// Largest archive in a request, in bytes.
const MAX_ZIPPED: usize = 52_428_800;

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Exists(_) | StoreError::Aliased { .. } => {
                Self::ResourceConflict(error.to_string())
            }
            StoreError::Revision { .. } => {
                Self::PreconditionFailed { read: "GetFunction/GetFunctionConfiguration" }
            }
            StoreError::UnknownLayer { .. } => Self::ResourceNotFound(error.to_string()),
            StoreError::Unknown(name) => {
                Self::ResourceNotFound(format!("Function not found: {name}"))
            }
            other => Self::Service(other.to_string()),
        }
    }
}

/// CreateFunction.
pub async fn create<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Extension(session): Extension<Session>,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let _turn = app.uploads.acquire().await;
    let body = body(request, "CreateFunction").await?;
    let work = app.clone();
    let (function, version) = blocking(move || {
        let input: CreateFunction = parse(&body)?;
        validate::publish_to(input.publish_to.as_deref())?;
        let name = input.function_name.as_deref().ok_or_else(|| {
            ApiError::validation("functionName", "null", "Member must not be null".into())
        })?;
        let reference = names::Reference::parse(name, None)?;
        if reference.qualifier.is_some() || !reference.reaches(&work.place) {
            return Err(ApiError::InvalidParameterValue(format!(
                "A function can only be created under its own name or ARN in {} of account {}, \
                 without a qualifier; not as {name}",
                work.place.region, work.place.account
            )));
        }
        session.may("lambda:CreateFunction", &reference.arn(&work.place))?;
        if let Some(role) = &input.settings.role {
            session.pass_role(role)?;
        }
        let name = reference.name;
        let tags = input.settings.tags.clone().unwrap_or_default();
        let layers = input.settings.layers.clone().unwrap_or_default();
        let mut config = validate::create(input.settings, &work.backend.runtimes())?;
        config.layers = layers::resolve(&work, &session, &layers)?;
        check_dead_letter(&work, &session, &config)?;
        if work.store.get(&name, Version::Latest).is_some() {
            return Err(StoreError::Exists(name).into());
        }
        let envelope = work.store.envelope()?;
        let zip = uploaded(&work, &session, input.code.unwrap_or_default())?;
        let disk = build_disk(&work, &zip, &config.layers)?;
        let mut pending = Pending::default();
        let code = work.code.put(&name, &envelope, &zip, &mut pending).map_err(not_stored)?;
        let function = Function {
            name,
            version: Version::Latest,
            config,
            code,
            tags,
            last_modified_ms: now_ms(),
            revision: uuid::Uuid::new_v4().to_string(),
            envelope,
            memo: Memo::default(),
        };
        work.code.put_disk(&function, &disk, &mut pending).map_err(not_stored)?;
        let created = work.store.create(function, input.publish)?;
        pending.keep();
        Ok(created)
    })
    .await?;
    tracing::info!(function = function.name, "function created");
    app.announce(&function, None);
    match version {
        Some(version) => {
            versions::answer(&app, StatusCode::CREATED, &Published { version, new: true })
        }
        None => json(StatusCode::CREATED, &FunctionConfiguration::of(&function, &app.place, None)),
    }
}

/// GetFunction.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Extension(session): Extension<Session>,
    headers: HeaderMap,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    let qualifier = reference.qualifier.as_deref();
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    let (name, sha256) = (function.qualified_name(), &function.code.sha256);
    let link = session.link(&format!("/firn/v1/functions/{name}/code?sha256={sha256}"));
    let mut output = json!({
        "Configuration": FunctionConfiguration::of(&function, &app.place, qualifier),
        "Code": {
            "RepositoryType": "S3",
            "Location": format!("http://{host}{link}"),
        },
    });
    let latest = app.store.get(&function.name, Version::Latest);
    if let Some(latest) = latest.filter(|latest| !latest.tags.is_empty()) {
        output["Tags"] = json!(latest.tags);
    }
    if let Some(reserved) = app.store.attachments(&function.name).and_then(|a| a.reserved) {
        output["Concurrency"] = json!({ "ReservedConcurrentExecutions": reserved });
    }
    json(StatusCode::OK, &output)
}

/// GetFunctionConfiguration.
pub async fn get_configuration<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    let qualifier = reference.qualifier.as_deref();
    json(StatusCode::OK, &FunctionConfiguration::of(&function, &app.place, qualifier))
}

/// ListFunctions.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    let page = Page::of(&query)?;
    let all_versions = match query.0.get("FunctionVersion").map(String::as_str) {
        None => false,
        Some("ALL") => true,
        Some(other) => {
            let values = "Member must satisfy enum value set: [ALL]";
            return Err(ApiError::validation("functionVersion", other, values.into()));
        }
    };
    let place = &app.place;
    let after = page.after.as_deref();
    let (functions, more) = match all_versions {
        false => app.store.list(after, page.limit),
        true => {
            let parse = |text: &str| match text.split_once(':') {
                None => Ok((text.to_owned(), Version::Latest)),
                Some((name, version)) => {
                    version.parse().map(|v| (name.to_owned(), v)).map_err(|()| pages::invalid())
                }
            };
            let after = after.map(parse).transpose()?;
            let after = after.as_ref().map(|(name, version)| (name.as_str(), *version));
            app.store.list_all(after, page.limit)
        }
    };
    let next = Page::next(functions.last().map(|last| last.qualified_name()), more);
    let functions: Vec<_> = functions
        .iter()
        .map(|f| match all_versions {
            false => FunctionConfiguration::of(f, place, None),
            true => FunctionConfiguration::qualified(f, place),
        })
        .collect();
    json(StatusCode::OK, &json!({"Functions": functions, "NextMarker": next}))
}

/// UpdateFunctionCode.
pub async fn update_code<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Extension(session): Extension<Session>,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let _turn = app.uploads.acquire().await;
    let body = body(request, "UpdateFunctionCode").await?;
    let current = app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let work = app.clone();
    let updated = blocking(move || {
        let input: UpdateFunctionCode = parse(&body)?;
        validate::publish_to(input.publish_to.as_deref())?;
        let revision = input.revision_id.as_deref().filter(|r| !r.is_empty());
        check_revision(&current, revision)?;
        for architecture in input.architectures.iter().flatten() {
            if architecture != "x86_64" {
                return Err(ApiError::InvalidParameterValue(format!(
                    "Architecture '{architecture}' is not supported here; use x86_64."
                )));
            }
        }
        let zip = uploaded(&work, &session, input.code)?;
        let disk = build_disk(&work, &zip, &current.config.layers)?;
        let Function { name, envelope, .. } = &*current;
        let mut pending = Pending::default();
        let code = work.code.put(name, envelope, &zip, &mut pending).map_err(not_stored)?;
        let built = Function { code: code.clone(), ..Function::clone(&current) };
        work.code.put_disk(&built, &disk, &mut pending).map_err(not_stored)?;
        let change = |function: &Function| {
            // Another function of the same name by now: its key would not open this code. Or it has
            // other layers: the disk has not.
            if function.envelope != current.envelope || function.disk() != current.disk() {
                return Err(changed_meanwhile(&work, function));
            }
            Ok(Function {
                code: code.clone(),
                last_modified_ms: now_ms(),
                revision: uuid::Uuid::new_v4().to_string(),
                ..function.clone()
            })
        };
        if input.dry_run {
            return Ok(Err(change(&current)?));
        }
        let updated = work.store.update(&current.name, revision, input.publish, change)?;
        pending.keep();
        remove_unused(&work, &updated.old);
        Ok(Ok(updated))
    })
    .await?;
    let Updated { old, new, published } = match updated {
        Ok(updated) => updated,
        // A dry run: as it would be.
        Err(new) => {
            return json(StatusCode::OK, &FunctionConfiguration::of(&new, &app.place, None));
        }
    };
    tracing::info!(function = new.name, "code updated");
    app.announce(&new, Some(&old));
    match published {
        Some(published) => versions::answer(&app, StatusCode::OK, &published),
        None => json(StatusCode::OK, &FunctionConfiguration::of(&new, &app.place, None)),
    }
}

/// UpdateFunctionConfiguration.
pub async fn update_configuration<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    Extension(session): Extension<Session>,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let _turn = app.uploads.acquire().await;
    let body = body(request, "UpdateFunctionConfiguration").await?;
    let current = app.find(&reference)?;
    refuse_qualifier(&reference)?;
    let work = app.clone();
    let Updated { old, new, .. } = blocking(move || {
        let input: UpdateFunctionConfiguration = parse(&body)?;
        if let Some(role) = &input.settings.role {
            session.pass_role(role)?;
        }
        let revision = input.revision_id.as_deref().filter(|r| !r.is_empty());
        check_revision(&current, revision)?;
        let runtimes = work.backend.runtimes();
        // Refused before a disk is built.
        let config = validate::update(&current.config, input.settings.clone(), &runtimes)?;
        if input.settings.dead_letter_config.is_some() || input.settings.role.is_some() {
            check_dead_letter(&work, &session, &config)?;
        }
        let mut pending = Pending::default();
        let layers = match &input.settings.layers {
            None => None,
            Some(layers) => Some(layers::resolve(&work, &session, layers)?),
        };
        if let Some(layers) = layers.as_ref().filter(|new| **new != current.config.layers) {
            let config = Config { layers: layers.clone(), ..current.config.clone() };
            let built = Function { config, ..Function::clone(&current) };
            let zip = work.code.zip(&current).map_err(|e| ApiError::Service(e.to_string()))?;
            let disk = build_disk(&work, &zip, layers)?;
            work.code.put_disk(&built, &disk, &mut pending).map_err(not_stored)?;
        }
        let change = |function: &Function| {
            let mut config = validate::update(&function.config, input.settings, &runtimes)?;
            if let Some(layers) = layers {
                // The disk is of the code that there was.
                if function.envelope != current.envelope || function.disk() != current.disk() {
                    return Err(changed_meanwhile(&work, function));
                }
                config.layers = layers;
            }
            Ok(Function {
                config,
                last_modified_ms: now_ms(),
                revision: uuid::Uuid::new_v4().to_string(),
                ..function.clone()
            })
        };
        let updated = work.store.update(&current.name, revision, false, change)?;
        pending.keep();
        remove_unused(&work, &updated.old);
        Ok(updated)
    })
    .await?;
    tracing::info!(function = new.name, "configuration updated");
    app.announce(&new, Some(&old));
    json(StatusCode::OK, &FunctionConfiguration::of(&new, &app.place, None))
}

/// DeleteFunction: of a whole function, or of one version.
pub async fn delete<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let function = app.find(&reference)?;
    if reference.qualifier.as_deref() == Some("$LATEST") {
        return Err(ApiError::InvalidParameterValue(
            "$LATEST version cannot be deleted without deleting the function.".into(),
        ));
    }
    if reference.qualifier.as_deref().is_some_and(names::is_alias) {
        return Err(ApiError::InvalidParameterValue(
            "Deletion of aliases is not currently supported by this operation. Use DeleteAlias."
                .into(),
        ));
    }
    let work = app.clone();
    let gone = blocking(move || {
        let gone = match function.version {
            Version::Latest => work.store.delete(&function.name)?,
            Version::Published(number) => vec![work.store.delete_version(&function.name, number)?],
        };
        gone.iter().for_each(|version| remove_unused(&work, version));
        Ok(gone)
    })
    .await?;
    for version in &gone {
        tracing::info!(function = version.qualified_name(), "deleted");
        app.announce(version, Some(version));
    }
    if let Some(first) = gone.first() {
        app.events.removed(first).await;
    }
    if let Some(latest) = gone.first().filter(|f| f.version == Version::Latest) {
        app.logs.remove(&latest.name).await;
        app.metrics.forget(&latest.name);
    }
    Ok(no_content())
}

/// Removes code, disk and layers of what has gone or changed, unless another version has the same.
fn remove_unused<B: Backend>(app: &App<B>, old: &Function) {
    if !app.store.uses_code(&old.code.blob) {
        app.code.remove_archive(&old.code);
    }
    let disk = old.disk();
    if !app.store.uses_disk(&disk) {
        app.code.remove_disk(&disk);
    }
    if !old.config.layers.is_empty() {
        layers::remove_unused(app);
    }
}

/// Refuses a dead-letter target that the function's role may not send to, or nobody can.
fn check_dead_letter<B: Backend>(
    app: &App<B>,
    session: &Session,
    config: &Config,
) -> Result<(), ApiError> {
    let Some(target) = config.dead_letter.as_deref().and_then(Recipient::parse) else {
        return Ok(());
    };
    let action = target.action();
    session.role_may(&config.role, action, &target.arn).map_err(|error| match error {
        ApiError::InvalidParameterValue(_) => ApiError::InvalidParameterValue(format!(
            "The provided execution role does not have permissions to call {} on {}",
            action.split_once(':').unwrap_or_default().1,
            target.service
        )),
        other => other,
    })?;
    app.aws
        .ready(target.service)
        .map_err(|error| ApiError::InvalidParameterValue(error.to_string()))
}

fn changed_meanwhile<B: Backend>(app: &App<B>, function: &Function) -> ApiError {
    ApiError::ResourceConflict(format!(
        "The operation cannot be performed at this time. An update is in progress for resource: {}",
        app.place.arn(&function.name)
    ))
}

/// GetAccountSettings.
pub async fn account_settings<B: Backend>(
    State(app): State<Arc<App<B>>>,
) -> Result<Response<Body>, ApiError> {
    let functions = app.store.all();
    let code_size: u64 = functions.iter().map(|f| f.code.size).sum();
    let code_size = code_size + app.store.layer_bytes();
    let count = functions.iter().filter(|f| f.version == Version::Latest).count();
    let settings: Value = json!({
        "AccountLimit": {
            // 75 GB is Lambda's figure; here the disk is the limit.
            "TotalCodeSize": 80_530_636_800_u64,
            "CodeSizeUnzipped": MAX_UNZIPPED,
            "CodeSizeZipped": MAX_ZIPPED,
            "ConcurrentExecutions": app.settings.concurrency,
            "UnreservedConcurrentExecutions": app.scheduler.unreserved(),
        },
        "AccountUsage": {"TotalCodeSize": code_size, "FunctionCount": count},
    });
    json(StatusCode::OK, &settings)
}

pub(super) async fn body(
    request: Request,
    operation: &'static str,
) -> Result<bytes::Bytes, ApiError> {
    let (parts, body) = request.into_parts();
    let too_large = |_| ApiError::RequestEntityTooLarge { limit: MAX_UPLOAD, operation };
    read_body(&parts.headers, body, MAX_UPLOAD, too_large).await
}

pub(super) fn parse<'a, T: serde::Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    // An absent body means that no member is given.
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| {
        // serde's words name position and expectation; a wrongly typed value itself may be a
        // secret and stays out.
        let (line, column) = (error.line(), error.column());
        let what = match error.classify() {
            serde_json::error::Category::Data => "a member has the wrong type",
            _ => "it is not valid JSON",
        };
        ApiError::Serialization(format!(
            "Could not parse request body into json: {what} (line {line}, column {column})"
        ))
    })
}

pub(super) fn refuse_qualifier(reference: &names::Reference) -> Result<(), ApiError> {
    match &reference.qualifier {
        None => Ok(()),
        Some(qualifier) => Err(ApiError::InvalidParameterValue(format!(
            "This operation is permitted on Lambda functions only. Aliases and versions do not \
             support this operation. Please specify either a function name or an unqualified \
             function ARN (without ':{qualifier}')."
        ))),
    }
}

/// The archive that is uploaded, or lies in a bucket. Blocks.
pub(super) fn uploaded<B: Backend>(
    app: &App<B>,
    session: &Session,
    upload: CodeUpload<'_>,
) -> Result<Vec<u8>, ApiError> {
    let refuse = |message: &str| Err(ApiError::InvalidParameterValue(message.into()));
    if upload.image_uri.is_some() {
        return refuse("Firn does not support ImageUri yet. Use ZipFile, or S3Bucket and S3Key.");
    }
    if upload.source_kms_key_arn.is_some_and(|arn| !arn.is_empty()) {
        return refuse("Firn does not support SourceKMSKeyArn yet. Leave it out or empty.");
    }
    let CodeUpload { zip_file, s3_bucket, s3_key, s3_object_version, .. } = upload;
    let blob = match (zip_file, s3_bucket, s3_key) {
        (Some(blob), None, None) => blob,
        (Some(_), ..) => {
            return refuse(
                "Please do not provide other FunctionCode parameters when providing a ZipFile.",
            );
        }
        (None, Some(bucket), Some(key)) => {
            return s3::object(app, session, &bucket, &key, s3_object_version.as_deref());
        }
        (None, None, None) => return refuse("Please provide a source for function code."),
        (None, ..) => return refuse("Please provide both S3Bucket and S3Key."),
    };
    let zip = STANDARD.decode(blob.0.as_bytes());
    let zip = zip.map_err(|_| ApiError::Serialization("ZipFile is not valid base64".into()))?;
    match zip.len() > MAX_ZIPPED {
        true => Err(ApiError::InvalidParameterValue(format!(
            "Zipped size must be smaller than {MAX_ZIPPED} bytes"
        ))),
        false => Ok(zip),
    }
}

/// Builds the disk of a function's archive and its layers.
fn build_disk<B: Backend>(app: &App<B>, zip: &[u8], layers: &[Layer]) -> Result<Disk, ApiError> {
    // Before they are all in memory: unpacked, they are not smaller.
    let size = zip.len() as u64 + layers.iter().map(|layer| layer.size).sum::<u64>();
    if size > MAX_UNZIPPED {
        return Err(code_error(CodeError::CombinedTooLarge { size, limit: MAX_UNZIPPED }));
    }
    let layers = workshop::layers(&app.store, &app.code, layers)
        .map_err(|error| ApiError::Service(error.to_string()))?;
    Ok(app.backend.build_disk(zip, &layers).map_err(code_error)?.disk)
}

pub(super) fn not_stored(error: io::Error) -> ApiError {
    ApiError::Service(format!("The code could not be stored: {error}"))
}

pub(super) fn code_error(error: CodeError) -> ApiError {
    match error {
        CodeError::UnzippedTooLarge { limit } => ApiError::InvalidParameterValue(format!(
            "Unzipped size must be smaller than {limit} bytes"
        )),
        CodeError::CombinedTooLarge { size, limit } => ApiError::InvalidParameterValue(format!(
            "Function code combined with layers exceeds the maximum allowed size of {limit} bytes. \
             The actual size is {size} bytes."
        )),
        CodeError::Empty => {
            ApiError::InvalidParameterValue("Uploaded file must be a non-empty zip".into())
        }
        error @ (CodeError::TooManyEntries { .. }
        | CodeError::NotAZip { .. }
        | CodeError::Entry { .. }
        | CodeError::Damaged { .. }) => ApiError::InvalidParameterValue(format!(
            "Could not unzip uploaded file. Please check your file, then try to upload again. \
             ({error})"
        )),
        error => ApiError::Service(format!("The code could not be stored: {error}")),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn code_errors_blame_the_right_side() {
        let entry = CodeError::Entry { name: "../x".into(), reason: "leads out of the archive" };
        let error = code_error(entry);
        assert_eq!(error.name(), "InvalidParameterValueException");
        assert!(error.to_string().starts_with("Could not unzip uploaded file."));
        assert!(error.to_string().contains("../x"));
        let large = code_error(CodeError::UnzippedTooLarge { limit: MAX_UNZIPPED });
        assert_eq!(large.to_string(), "Unzipped size must be smaller than 262144000 bytes");
        let ours = code_error(CodeError::Mkfs { reason: "missing".into() });
        assert_eq!(ours.name(), "ServiceException");
    }

    #[test]
    fn parse_errors_do_not_repeat_values() {
        let error = parse::<UpdateFunctionConfiguration>(br#"{"Timeout": "hunter2"}"#);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("wrong type") && !text.contains("hunter2"), "{text}");
        assert!(parse::<UpdateFunctionConfiguration>(b"").is_ok());
    }
}
