//! Function URLs: HTTP requests to a host name of a function's own, answered by the function.
//!
//! `<id>.lambda-url.<region>.<domain>` on the port of the API; requests to any other host are the API's.
//! What a function sees is Lambda's payload format 2.0 ([`event`]), what its answer means is in
//! [`answer`], and who may call from web pages in [`cors`].

mod answer;
mod cors;
mod event;

use std::{io, sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Response, StatusCode, header, request::Parts},
    middleware::Next,
    response::IntoResponse,
};
use bytes::Bytes;
use firn::Invocation;

use super::{
    App, MAX_EVENT, RequestInfo, announced,
    error::{ApiError, ERROR_TYPE},
    gate::{self, Session},
    operations::INVOKE_URL,
    read_body,
    recorded::Draft,
    response_stream::{self, Framing, Invoked, ROOM_KIB},
};
use crate::{
    attachments::{self, InvokeMode, Url},
    audit::Unwritten,
    backend::Backend,
    scheduler::{self, Refusal, Served, Trace},
    traces::Trigger,
};

/// Header fields that concern one connection only (RFC 9110 §7.6.1): neither functions nor their callers see
/// those of the other.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What URLs look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urls {
    /// What stands before the id.
    scheme: &'static str,
    /// What comes behind it in a host name: `.lambda-url.<region>.<domain>`.
    suffix: String,
    /// What comes behind that in a URL.
    port: String,
}

impl Urls {
    /// URLs below `domain`. Below `localhost` they lead straight to `port` of this machine; below any
    /// other, to whatever stands in front of it and speaks TLS.
    pub fn new(region: &str, domain: &str, port: u16) -> Self {
        let suffix = format!(".lambda-url.{region}.{domain}").to_ascii_lowercase();
        match domain {
            "localhost" => Self { scheme: "http", suffix, port: format!(":{port}") },
            _ => Self { scheme: "https", suffix, port: String::new() },
        }
    }

    /// The URL with this id.
    pub fn url(&self, id: &str) -> String {
        let Self { scheme, suffix, port } = self;
        format!("{scheme}://{id}{suffix}{port}/")
    }

    /// The id in what a request calls its host.
    fn id(&self, authority: &str) -> Option<String> {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => authority,
        };
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        host.strip_suffix(&self.suffix).map(str::to_owned)
    }
}

/// Hands requests to functions' hosts to these, and all others on.
pub async fn by_host<B: Backend>(
    State(app): State<Arc<App<B>>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let named = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let named = request.uri().authority().map(|a| a.as_str()).or(named);
    let Some(id) = named.and_then(|host| app.settings.urls.id(host)) else {
        return next.run(request).await;
    };
    let received = Instant::now();
    let request_id = uuid::Uuid::new_v4().to_string();
    let call = {
        let (app, id, request_id) = (app.clone(), id.clone(), request_id.clone());
        async move { serve(&app, &id, &request_id, received, request).await }
    };
    let mut response = match app.callers.audit.data_events() {
        // A task of its own, which no client ends by hanging up: what is begun ends, and is recorded.
        true => match tokio::spawn(call).await {
            Ok(response) => response,
            Err(error) => ApiError::Service(error.to_string()).into_response(),
        },
        false => call.await,
    };
    if let Ok(value) = HeaderValue::try_from(&request_id) {
        response.headers_mut().insert("x-amzn-requestid", value);
    }
    let (status, us) = (response.status().as_u16(), received.elapsed().as_micros() as u64);
    tracing::debug!(url = id, id = request_id, status, us, "request to a function's URL");
    response
}

async fn serve<B: Backend>(
    app: &Arc<App<B>>,
    id: &str,
    request_id: &str,
    received: Instant,
    request: Request,
) -> Response<Body> {
    let (mut parts, body) = request.into_parts();
    let found = app.store.url(id).and_then(|(name, qualifier)| {
        let url =
            app.store.attachments(&name)?.urls.get(&qualifier).filter(|u| u.id == id).cloned();
        Some((name, qualifier, url?))
    });
    let Some((name, qualifier, url)) = found else { return forbidden() };
    if let Some(cors) = &url.cors
        && let Some(answer) = cors::preflight(cors, &parts)
    {
        return answer;
    }
    let call = Call { id, request_id, received, name, qualifier, url: &url };
    let answer = match call.recorded(app, &mut parts, body).await {
        Err(ApiError::AccessDenied(_)) => forbidden(),
        answer => answer.unwrap_or_else(IntoResponse::into_response),
    };
    match &url.cors {
        Some(cors) => cors::allow(cors, &parts, answer),
        None => answer,
    }
}

/// One request to a URL.
struct Call<'a> {
    id: &'a str,
    request_id: &'a str,
    received: Instant,
    name: String,
    qualifier: String,
    url: &'a Url,
}

impl Call<'_> {
    /// Invokes the function, and leaves a record of that if invocations are recorded.
    async fn recorded<B: Backend>(
        &self,
        app: &Arc<App<B>>,
        parts: &mut Parts,
        body: Body,
    ) -> Result<Response<Body>, ApiError> {
        let session = Session::new(app, parts);
        let audit = &app.callers.audit;
        if !audit.data_events() {
            return self.invoke(app, &session, parts, body).await;
        }
        if audit.broken() {
            return Err(ApiError::Service(Unwritten.to_string()));
        }
        let (id, received) = (self.request_id.to_owned(), self.received);
        parts.extensions.insert(RequestInfo { id, received });
        let draft = Draft::new(&INVOKE_URL, parts, &app.place).await;
        let answer = self.invoke(app, &session, parts, body).await;
        let record = draft.refused_or_done(&session, answer.as_ref().err());
        match audit.add(record.to_string().into_bytes(), false).await {
            Ok(()) => answer,
            // It is done; that it could not be recorded must not look like success.
            Err(unwritten) => Err(ApiError::Service(unwritten.to_string())),
        }
    }

    async fn invoke<B: Backend>(
        &self,
        app: &Arc<App<B>>,
        session: &Session,
        parts: &mut Parts,
        body: Body,
    ) -> Result<Response<Body>, ApiError> {
        let Self { id, request_id, received, name, qualifier, url } = self;
        let too_large =
            |_| ApiError::RequestEntityTooLarge { limit: MAX_EVENT, operation: "Invoke" };
        let mut trace = Trace::new(*received);
        let arn = app.place.arn(name);
        let arn = if qualifier == "$LATEST" { arn } else { format!("{arn}:{qualifier}") };
        let body = gate::pass_url(app, session, parts, body, url.auth, arn.clone())?;
        // The body and the event that is made of it, which is a third larger at most.
        let size = announced(&parts.headers).unwrap_or(MAX_EVENT).min(MAX_EVENT);
        let kib = size * 2 / 1024 + 1 + ROOM_KIB;
        let room = app.room.clone().acquire_many_owned(kib as u32).await;
        let room = Arc::new(room.map_err(|error| ApiError::Service(error.to_string()))?);
        let body = read_body(&parts.headers, body, MAX_EVENT, too_large).await?;
        trace.mark("body");
        let function = app
            .store
            .resolve(name, qualifier, |alias| alias.choose(attachments::draw()))
            .ok_or_else(|| ApiError::AccessDenied("Forbidden".into()))?;
        let mut invocation = Invocation {
            request_id: (*request_id).to_owned(),
            function_arn: arn,
            timeout: function.timeout(),
            ..Invocation::default()
        };
        let (headers, http) = (&parts.headers, Trigger::Http);
        let traced = app.traces.open(headers, *received, http, &function, &mut invocation);
        let event = event::Event {
            url_id: id,
            domain: &format!("{id}{}", app.settings.urls.suffix),
            request_id,
            trace_id: &invocation.trace_id,
            caller: session.principal(),
            parts,
            body: &body,
        };
        let payload = Bytes::from(event.json());
        if payload.len() > MAX_EVENT {
            return Err(too_large(None));
        }
        invocation.payload = payload;
        let (force, room) = (None, Some(room));
        let request = scheduler::Request { function, invocation, force, trace, traced, room };
        match url.mode {
            InvokeMode::Buffered => {
                let served = app.scheduler.invoke(request).await?;
                Ok(answer::buffered(&served.answer))
            }
            InvokeMode::ResponseStream => {
                let rate = app.settings.stream_rate;
                Ok(match response_stream::invoke(&app.scheduler, request, rate).await? {
                    Invoked::Served(served) => answer::unstreamed(&served.answer),
                    Invoked::Begun { content_type, rest } => {
                        answer::streamed(&content_type, rest).await
                    }
                })
            }
        }
    }
}

/// What nobody, or not this caller, may call.
fn forbidden() -> Response<Body> {
    let mut response = Response::new(Body::from(r#"{"Message":"Forbidden"}"#));
    *response.status_mut() = StatusCode::FORBIDDEN;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ERROR_TYPE, HeaderValue::from_static("AccessDeniedException"));
    response
}

/// The bytes of a streamed response as they are.
struct Plain;

impl Framing for Plain {
    fn chunk(&mut self, bytes: Bytes) -> Bytes {
        bytes
    }

    fn end(self, result: Result<Served, Refusal>) -> io::Result<Option<Bytes>> {
        match result {
            Ok(served) if served.answer.function_error.is_none() => Ok(None),
            Ok(_) => Err(io::Error::other("the function failed behind the head of its response")),
            Err(refusal) => Err(io::Error::other(refusal)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_name_urls() {
        let urls = Urls::new("eu-west-1", "localhost", 9000);
        let id = "0123456789abcdef0123456789abcdef";
        let url = urls.url(id);
        assert_eq!(url, format!("http://{id}.lambda-url.eu-west-1.localhost:9000/"));
        assert!((40..=100).contains(&url.len()));
        for host in ["a.lambda-url.eu-west-1.localhost", "A.Lambda-URL.eu-west-1.LOCALHOST.:80"] {
            assert_eq!(urls.id(host), Some("a".into()), "{host}");
        }
        for host in ["localhost:9000", "a.lambda-url.eu-west-2.localhost", "[::1]:9000", ""] {
            assert_eq!(urls.id(host), None, "{host}");
        }
        let urls = Urls::new("us-east-1", "fn.example", 9000);
        assert_eq!(urls.url("a"), "https://a.lambda-url.us-east-1.fn.example/");
    }
}
