//! CreateFunctionUrlConfig, GetFunctionUrlConfig, UpdateFunctionUrlConfig, DeleteFunctionUrlConfig,
//! ListFunctionUrlConfigs.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Response, StatusCode},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App, Parameters, Target, blocking,
    error::ApiError,
    functions::{body, parse},
    json,
    names::{Reference, is_alias},
    no_content,
    pages::Page,
};
use crate::{
    attachments::{Attachments, Cors, InvokeMode, Url, UrlAuth},
    backend::Backend,
    function::{iso8601, now_ms},
};

/// Items of a list in [`Cors`].
const LIST: usize = 100;
/// Longest header name in [`Cors`].
const HEADER: usize = 1024;
/// Longest origin.
const ORIGIN: usize = 253;
/// What a page may be allowed to do.
const METHODS: [&str; 7] = ["GET", "PUT", "HEAD", "POST", "PATCH", "DELETE", "*"];
/// Methods in [`Cors`].
const METHOD_LIST: usize = 6;
/// Longest `MaxAge` in seconds.
const MAX_AGE: i64 = 86_400;

/// What is to be set.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Input {
    auth_type: Option<String>,
    cors: Option<Cors>,
    invoke_mode: Option<String>,
}

impl Input {
    fn auth(&self) -> Result<Option<UrlAuth>, ApiError> {
        let values = [("NONE", UrlAuth::None), ("AWS_IAM", UrlAuth::AwsIam)];
        one_of("authType", self.auth_type.as_deref(), &values)
    }

    fn mode(&self) -> Result<Option<InvokeMode>, ApiError> {
        let values =
            [("BUFFERED", InvokeMode::Buffered), ("RESPONSE_STREAM", InvokeMode::ResponseStream)];
        one_of("invokeMode", self.invoke_mode.as_deref(), &values)
    }

    /// One without members takes back what was set.
    fn cors(&self) -> Result<Option<Cors>, ApiError> {
        let Some(cors) = &self.cors else { return Ok(None) };
        check_cors(cors)?;
        Ok(Some(cors.clone()).filter(|cors| *cors != Cors::default()))
    }
}

/// CreateFunctionUrlConfig.
pub async fn create<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "CreateFunctionUrlConfig").await?;
    let key = key(&app, &reference)?;
    let work = app.clone();
    let answer = blocking(move || {
        let input: Input = parse(&body)?;
        let (auth, mode, cors) = (input.auth()?, input.mode()?, input.cors()?);
        let auth = auth.ok_or_else(|| {
            ApiError::validation("authType", "null", "Member must not be null".into())
        })?;
        let arn = arn(&work, &reference.name, &key);
        work.store.attach(&reference.name, |_, attachments| {
            check_key(&work, &reference, attachments, &key)?;
            if attachments.urls.contains_key(&key) {
                return Err(ApiError::ResourceConflict(format!(
                    "Failed to create function url config for [functionArn = {arn}]. Error message:  \
                     FunctionUrlConfig exists for this Lambda function"
                )));
            }
            let now = now_ms();
            let mode = mode.unwrap_or_default();
            let id = uuid::Uuid::new_v4().simple().to_string();
            let url = Url { id, auth, cors, mode, created_ms: now, modified_ms: now };
            let answer = shape(&work, &arn, &url);
            attachments.urls.insert(key, url);
            Ok(answer)
        })
    })
    .await?;
    json(StatusCode::CREATED, &answer)
}

/// GetFunctionUrlConfig.
pub async fn get<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let key = key(&app, &reference)?;
    let attachments = app.store.attachments(&reference.name).unwrap_or_default();
    let url = attachments.urls.get(&key).ok_or_else(missing)?;
    json(StatusCode::OK, &shape(&app, &arn(&app, &reference.name, &key), url))
}

/// UpdateFunctionUrlConfig.
pub async fn update<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body = body(request, "UpdateFunctionUrlConfig").await?;
    let key = key(&app, &reference)?;
    let work = app.clone();
    let answer = blocking(move || {
        let input: Input = parse(&body)?;
        let (auth, mode, cors) = (input.auth()?, input.mode()?, input.cors()?);
        let arn = arn(&work, &reference.name, &key);
        work.store.attach(&reference.name, |_, attachments| {
            let url = attachments.urls.get_mut(&key).ok_or_else(missing)?;
            url.auth = auth.unwrap_or(url.auth);
            url.mode = mode.unwrap_or(url.mode);
            if input.cors.is_some() {
                url.cors = cors;
            }
            url.modified_ms = now_ms();
            Ok(shape(&work, &arn, url))
        })
    })
    .await?;
    json(StatusCode::OK, &answer)
}

/// DeleteFunctionUrlConfig.
pub async fn delete<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
) -> Result<Response<Body>, ApiError> {
    let key = key(&app, &reference)?;
    blocking(move || {
        app.store.attach(&reference.name, |_, attachments| {
            attachments.urls.remove(&key).map(drop).ok_or_else(missing)
        })
    })
    .await?;
    Ok(no_content())
}

/// ListFunctionUrlConfigs.
pub async fn list<B: Backend>(
    State(app): State<Arc<App<B>>>,
    Target(reference): Target,
    query: Parameters,
) -> Result<Response<Body>, ApiError> {
    use std::ops::Bound::{Excluded, Unbounded};
    let page = Page::of(&query)?;
    app.find(&reference)?;
    let attachments = app.store.attachments(&reference.name).unwrap_or_default();
    let from = page.after.as_deref().map_or(Unbounded, Excluded);
    let mut rest = attachments.urls.range::<str, _>((from, Unbounded));
    let urls: Vec<_> = rest.by_ref().take(page.limit).collect();
    let more = rest.next().is_some();
    let next = Page::next(urls.last().map(|(key, _)| (*key).clone()), more);
    let urls: Vec<_> = urls
        .into_iter()
        .map(|(key, url)| shape(&app, &arn(&app, &reference.name, key), url))
        .collect();
    json(StatusCode::OK, &json!({"FunctionUrlConfigs": urls, "NextMarker": next}))
}

/// What the URL invokes: `$LATEST` or an alias.
fn key<B: Backend>(app: &App<B>, reference: &Reference) -> Result<String, ApiError> {
    let key = reference.qualifier.as_deref().unwrap_or("$LATEST");
    if key != "$LATEST" && !is_alias(key) {
        let pattern =
            "Member must satisfy regular expression pattern: ((?!^\\d+$)^[0-9a-zA-Z-_]+$)";
        return Err(ApiError::validation("qualifier", key, pattern.into()));
    }
    app.find(reference)?;
    Ok(key.to_owned())
}

/// The alias may have gone meanwhile.
fn check_key<B: Backend>(
    app: &App<B>,
    reference: &Reference,
    attachments: &Attachments,
    key: &str,
) -> Result<(), ApiError> {
    match key == "$LATEST" || attachments.aliases.contains_key(key) {
        true => Ok(()),
        false => Err(app.missing(reference)),
    }
}

fn missing() -> ApiError {
    ApiError::ResourceNotFound("The resource you requested does not exist.".into())
}

fn arn<B: Backend>(app: &App<B>, name: &str, key: &str) -> String {
    let arn = app.place.arn(name);
    if key == "$LATEST" { arn } else { format!("{arn}:{key}") }
}

fn shape<B: Backend>(app: &App<B>, arn: &str, url: &Url) -> Value {
    let mut shape = json!({
        "FunctionUrl": app.settings.urls.url(&url.id),
        "FunctionArn": arn,
        "AuthType": url.auth,
        "InvokeMode": url.mode,
        "CreationTime": iso8601(url.created_ms),
        "LastModifiedTime": iso8601(url.modified_ms),
    });
    if let Some(cors) = &url.cors {
        shape["Cors"] = json!(cors);
    }
    shape
}

fn one_of<T: Copy>(
    member: &str,
    given: Option<&str>,
    values: &[(&str, T)],
) -> Result<Option<T>, ApiError> {
    let Some(given) = given else { return Ok(None) };
    let found = values.iter().find(|(name, _)| *name == given);
    found.map(|(_, value)| Some(*value)).ok_or_else(|| {
        let names: Vec<&str> = values.iter().map(|(name, _)| *name).collect();
        let set = format!("Member must satisfy enum value set: [{}]", names.join(", "));
        ApiError::validation(member, given, set)
    })
}

fn check_cors(cors: &Cors) -> Result<(), ApiError> {
    let text = |text: &str| HeaderValue::from_str(text).is_ok();
    let name = |name: &str| name == "*" || HeaderName::from_bytes(name.as_bytes()).is_ok();
    items("cors.allowHeaders", &cors.allow_headers, LIST, HEADER, name)?;
    items("cors.exposeHeaders", &cors.expose_headers, LIST, HEADER, name)?;
    items("cors.allowOrigins", &cors.allow_origins, LIST, ORIGIN, |o| !o.is_empty() && text(o))?;
    let method = |method: &str| METHODS.contains(&method);
    items("cors.allowMethods", &cors.allow_methods, METHOD_LIST, 6, method)?;
    match cors.max_age {
        Some(age) if !(0..=MAX_AGE).contains(&age) => {
            let range = format!("Member must have value between 0 and {MAX_AGE}");
            Err(ApiError::validation("cors.maxAge", &age.to_string(), range))
        }
        _ => Ok(()),
    }
}

fn items(
    member: &str,
    list: &Option<Vec<String>>,
    most: usize,
    longest: usize,
    fits: impl Fn(&str) -> bool,
) -> Result<(), ApiError> {
    let list = list.as_deref().unwrap_or_default();
    if list.len() > most {
        let limit = format!("Member must have length less than or equal to {most}");
        return Err(ApiError::validation(member, &list.len().to_string(), limit));
    }
    match list.iter().find(|item| item.len() > longest || !fits(item)) {
        Some(bad) => {
            let what = format!("Member must be valid and at most {longest} characters long");
            Err(ApiError::validation(member, bad, what))
        }
        None => Ok(()),
    }
}
