//! Lambda's HTTP API: routes, bodies, and what all responses have in common.
//!
//! With identities, [`gate`] lets a request through to its handler that is signed and allowed. Without, in
//! development mode, everybody who reaches the port may do everything: it is on loopback then.

mod aliases;
mod concurrency;
pub mod error;
mod event_config;
mod eventstream;
mod firn_api;
mod functions;
pub mod gate;
mod invoke;
mod invoke_stream;
mod layers;
pub mod names;
mod operations;
mod pages;
mod permissions;
mod recorded;
mod response_stream;
mod routes;
mod s3;
mod services;
pub mod shapes;
mod tags;
mod url_config;
pub mod urls;
pub mod validate;
mod versions;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    num::NonZeroU64,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{FromRequestParts, Path, Query, Request},
    http::{HeaderMap, HeaderValue, Response, StatusCode, header, request::Parts},
    middleware::Next,
    response::IntoResponse,
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::Serialize;
use tokio::sync::Semaphore;

pub use self::routes::router;
use self::{
    error::{ApiError, Fault},
    gate::Callers,
    names::{Place, Reference},
    urls::Urls,
};
use crate::{
    attachments::{self, Alias},
    aws::Aws,
    backend::Backend,
    code::CodeStore,
    events::Events,
    function::{Function, Version},
    logs::Logs,
    metrics::Metrics,
    scheduler::Scheduler,
    store::Store,
    traces::Traces,
};

/// Most bytes of a request that carries code.
pub const MAX_UPLOAD: usize = 70_167_211;

/// Most bytes of an event.
pub const MAX_EVENT: usize = 6_291_456;

/// Most bytes of an event that is invoked asynchronously; 256 KB until October 2025.
pub const MAX_ASYNC_EVENT: usize = 1_048_576;

/// Most bytes of an event of the older operation InvokeAsync.
pub const MAX_INVOKE_ARGS: usize = 262_144;

/// Uploads that are handled at once: each may occupy several times its size.
const UPLOADS: usize = 4;

/// KiB of events that may be in memory at once; further requests wait.
const EVENT_KIB: usize = 1 << 20;

/// Time without a byte after which a body is given up.
const STALL: Duration = Duration::from_secs(30);

/// Time that a whole body may take.
const BODY: Duration = Duration::from_secs(300);

/// What is said of a body that did not end.
const BROKEN: &str = "The request body broke off.";

/// Bytes of an oversized body that are read and dropped so that the client gets to see the error.
const DRAIN: usize = 256 << 20;

/// What the API is told when it starts.
#[derive(Debug)]
pub struct Settings {
    /// The limit that GetAccountSettings shows.
    pub concurrency: u32,
    /// Most bytes a second of a streamed response, after its first ones.
    pub stream_rate: Option<NonZeroU64>,
    /// What functions' URLs look like.
    pub urls: Urls,
}

/// All that requests need.
#[derive(Debug)]
pub struct App<B: Backend> {
    /// Functions.
    pub store: Arc<Store>,
    /// Their code.
    pub code: CodeStore,
    /// Their logs.
    pub logs: Logs,
    /// What is counted.
    pub metrics: Metrics,
    /// Traces invocations.
    pub traces: Traces,
    /// Who runs them.
    pub scheduler: Arc<Scheduler<B>>,
    /// What is invoked asynchronously.
    pub events: Arc<Events<B>>,
    /// Where their code may lie.
    pub aws: Arc<Aws>,
    /// What runs them.
    pub backend: B,
    /// What ARNs say.
    pub place: Place,
    /// Who may call, and what they have called.
    pub callers: Callers,
    /// What it was told.
    pub settings: Settings,
    announcing: Mutex<()>,
    uploads: Semaphore,
    room: Arc<Semaphore>,
}

impl<B: Backend> App<B> {
    /// Puts the parts together, and has the scheduler run what is in the store.
    pub fn new(
        workshop: crate::workshop::Workshop<B>,
        scheduler: Arc<Scheduler<B>>,
        events: Arc<Events<B>>,
        aws: Arc<Aws>,
        callers: Callers,
        settings: Settings,
    ) -> Arc<Self> {
        let app = Self {
            store: workshop.store,
            code: workshop.code,
            logs: workshop.logs,
            metrics: workshop.metrics,
            traces: workshop.traces,
            scheduler,
            events,
            aws,
            backend: workshop.backend,
            place: workshop.place,
            callers,
            settings,
            announcing: Mutex::new(()),
            uploads: Semaphore::new(UPLOADS),
            room: Arc::new(Semaphore::new(EVENT_KIB)),
        };
        app.store.all().iter().for_each(|function| app.announce(function, None));
        Arc::new(app)
    }

    /// Has the scheduler run what the store says of a version that was changed, and was
    /// `before`. Changes are committed one after the other but come here in any order: each brings the
    /// last one.
    fn announce(&self, changed: &Arc<Function>, before: Option<&Function>) {
        let _turn = self.announcing.lock().unwrap_or_else(PoisonError::into_inner);
        match self.store.get(&changed.name, changed.version) {
            Some(now) => self.scheduler.deployed(&now, before),
            None => [Some(&**changed), before]
                .into_iter()
                .flatten()
                .for_each(|gone| self.scheduler.removed(gone)),
        }
        self.keep(&changed.name);
    }

    /// The same for the concurrency that is kept for a function.
    fn announce_concurrency(&self, name: &str) {
        let _turn = self.announcing.lock().unwrap_or_else(PoisonError::into_inner);
        self.keep(name);
    }

    fn keep(&self, name: &str) {
        let attachments = self.store.attachments(name).unwrap_or_default();
        let shares = attachments.all_shares().into_iter();
        let provisioned: Vec<_> = shares
            .filter_map(|(version, share)| Some((self.store.get(name, version)?, share)))
            .collect();
        self.scheduler.keep(name, attachments.reserved, &provisioned);
    }

    /// The version of a function that a reference means: `$LATEST` where it does not say.
    ///
    /// # Errors
    /// [`ApiError::ResourceNotFound`] with the ARN as the caller meant it.
    fn find(&self, reference: &Reference) -> Result<Arc<Function>, ApiError> {
        self.resolve(reference, |alias| alias.version)
    }

    /// The version that is to serve an invocation: an alias may share them out among two.
    ///
    /// # Errors
    /// [`ApiError::ResourceNotFound`] with the ARN as the caller meant it.
    fn route(&self, reference: &Reference) -> Result<Arc<Function>, ApiError> {
        self.resolve(reference, |alias| alias.choose(attachments::draw()))
    }

    fn resolve(
        &self,
        reference: &Reference,
        choose: impl FnOnce(&Alias) -> Version,
    ) -> Result<Arc<Function>, ApiError> {
        let qualifier = reference.qualifier.as_deref().unwrap_or("$LATEST");
        Some(reference)
            .filter(|reference| reference.reaches(&self.place))
            .and_then(|reference| self.store.resolve(&reference.name, qualifier, choose))
            .ok_or_else(|| self.missing(reference))
    }

    fn missing(&self, reference: &Reference) -> ApiError {
        ApiError::ResourceNotFound(format!("Function not found: {}", reference.arn(&self.place)))
    }
}

/// What a request is known by.
#[derive(Debug, Clone)]
struct RequestInfo {
    id: String,
    received: Instant,
}

/// Gives each request an id and a time, and each response the id.
async fn common(mut request: Request, next: Next) -> Response<Body> {
    let info = RequestInfo { id: uuid::Uuid::new_v4().to_string(), received: Instant::now() };
    let id = HeaderValue::from_str(&info.id).ok();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.extensions_mut().insert(info.clone());
    let mut response = match foreign_origin(request.headers()) {
        None => next.run(request).await,
        Some(refusal) => refusal.into_response(),
    };
    response
        .headers_mut()
        .extend(id.map(|id| (header::HeaderName::from_static("x-amzn-requestid"), id)));
    let status = response.status();
    let us = info.received.elapsed().as_micros() as u64;
    // Paths name functions; headers and bodies may hold secrets and are never logged.
    if let Some(Fault(fault)) = response.extensions().get() {
        tracing::error!(%method, path, id = info.id, us, fault, "a request failed");
    } else {
        tracing::debug!(%method, path, status = status.as_u16(), id = info.id, us, "request");
    }
    response
}

/// Refuses what a web page from elsewhere sends. In development mode nothing is authenticated, and a
/// browser on this machine reaches loopback for any page that it shows.
fn foreign_origin(headers: &HeaderMap) -> Option<ApiError> {
    let origin = headers.get(header::ORIGIN)?.to_str().unwrap_or_default();
    let host = origin.split_once("://").map_or("", |(_, rest)| rest);
    let host = match host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => host,
    };
    let local = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
    (!local).then(|| {
        ApiError::AccessDenied(
            "Requests of web pages that do not come from this machine are refused.".into(),
        )
    })
}

async fn no_operation(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let path: String = path.chars().take(200).collect();
    ApiError::UnknownOperation(format!("Firn does not know the operation {method} {path}."))
}

async fn no_method(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let path: String = path.chars().take(200).collect();
    ApiError::MethodNotAllowed(format!("Firn does not know the operation {method} {path}."))
}

/// Parameters of the query.
struct Parameters(HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::from_request_parts(parts, state).await;
        query.map(|Query(query)| Self(query)).map_err(|e| {
            ApiError::InvalidParameterValue(format!("The query string is malformed: {e}"))
        })
    }
}

/// The function that the path and the `Qualifier` parameter name.
struct Target(Reference);

impl<S: Send + Sync> FromRequestParts<S> for Target {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(path) = Path::<HashMap<String, String>>::from_request_parts(parts, state)
            .await
            .map_err(|e| ApiError::InvalidParameterValue(format!("The path is malformed: {e}")))?;
        let name = path.get("name").map(String::as_str).unwrap_or_default();
        let Parameters(query) = Parameters::from_request_parts(parts, state).await?;
        Ok(Self(Reference::parse(name, query.get("Qualifier").map(String::as_str))?))
    }
}

/// A JSON response.
fn json(status: StatusCode, body: &impl Serialize) -> Result<Response<Body>, ApiError> {
    let body = serde_json::to_vec(body)
        .map_err(|e| ApiError::Service(format!("The response could not be encoded: {e}")))?;
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let value = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    Ok(response)
}

/// A response that says nothing but that it is done.
fn no_content() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// Runs what blocks where blocking is allowed.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let task = tokio::task::spawn_blocking(work).await;
    task.map_err(|e| ApiError::Service(format!("internal error: {e}")))?
}

/// Length of the body as its head says.
fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads a body of at most `limit` bytes. `too_large` makes the error for a longer one, from its
/// length where that is known.
async fn read_body(
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
    too_large: impl FnOnce(Option<usize>) -> ApiError,
) -> Result<Bytes, ApiError> {
    let announced = announced(headers);
    let mut bytes = BytesMut::with_capacity(announced.unwrap_or(0).min(limit).min(1 << 20));
    let mut dropped = 0;
    let read = async {
        loop {
            let frame = match tokio::time::timeout(STALL, body.frame()).await {
                Err(_) => {
                    let seconds = STALL.as_secs();
                    return Err(ApiError::RequestTimeout(format!(
                        "The request body stalled for {seconds} seconds."
                    )));
                }
                Ok(None) => return Ok(()),
                Ok(Some(Err(error))) => {
                    // The gate's refusal, or what happened to the connection.
                    return Err(match error.into_inner().downcast::<ApiError>() {
                        Ok(refusal) => *refusal,
                        Err(_) => ApiError::RequestTimeout(BROKEN.into()),
                    });
                }
                Ok(Some(Ok(frame))) => frame,
            };
            let Some(data) = frame.data_ref() else { continue };
            if dropped > 0
                || announced.is_some_and(|n| n > limit)
                || bytes.len() + data.len() > limit
            {
                dropped += data.len();
                bytes = BytesMut::new();
                if dropped > DRAIN {
                    return Ok(());
                }
            } else {
                bytes.extend_from_slice(data);
            }
        }
    };
    match tokio::time::timeout(BODY, read).await {
        Ok(result) => result?,
        Err(_) => {
            let seconds = BODY.as_secs();
            return Err(ApiError::RequestTimeout(format!(
                "The request body took longer than {seconds} seconds."
            )));
        }
    }
    if dropped > 0 { Err(too_large(announced)) } else { Ok(bytes.freeze()) }
}
