//! What functions ask of the daemon from inside their guests: their role's credentials, and requests to the same
//! API that serves everybody else.
//!
//! ```text
//! function ─▶ firn-init, on loopback ─▶ frames of the invoke connection ─▶ Gateway ─▶ the API's routes
//! ```
//!
//! A guest is on no network; this is its one way to the daemon, and it leads no further. With `--identity` a
//! request passes the same gate as one from outside, and the role's policies decide. In development mode nobody
//! is asked who they are, so there functions reach KMS and STS alone: none must be able to delete another.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, OnceLock, Weak},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header},
};
use firn::{
    Services,
    guest::{Ask, HttpReply, HttpRequest, MAX_CALL},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    api::names::Place,
    function::{Function, Version},
    identity::sessions::{Assumed, Sessions},
    store::Store,
};

/// Seconds that credentials of a function last. SDKs ask for others some minutes before their end.
const LASTS: i64 = 3600;

/// Variables from which AWS's SDKs take the endpoints of what is served here.
const ENDPOINTS: [&str; 5] = [
    "AWS_ENDPOINT_URL_CLOUDWATCH",
    "AWS_ENDPOINT_URL_CLOUDWATCH_LOGS",
    "AWS_ENDPOINT_URL_KMS",
    "AWS_ENDPOINT_URL_LAMBDA",
    "AWS_ENDPOINT_URL_STS",
];

/// Fields that say how a connection delimits and keeps messages, and nothing where there is none.
const HOP_BY_HOP: [HeaderName; 5] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// Why a function is refused what it asks in development mode.
pub const DEVELOPMENT: &str = "In development mode functions reach KMS and STS only.";

/// A request of a function's: an extension.
#[derive(Debug, Clone, Copy)]
pub struct FromFunction;

/// The API, as functions reach it.
pub struct Gateway {
    routes: TowerToHyperService<Router>,
    store: Arc<Store>,
    sessions: Sessions,
    place: Place,
    /// Whether requests are signed, and their signers asked for.
    guarded: bool,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("guarded", &self.guarded).finish_non_exhaustive()
    }
}

/// The way to a [`Gateway`], for who makes instances. Until it is open, and when the daemon ends, it leads
/// nowhere.
#[derive(Debug, Clone, Default)]
pub struct Inside(Arc<OnceLock<Weak<Gateway>>>);

impl Inside {
    /// From now on there is an answer, for as long as somebody holds the gateway.
    pub fn open(&self, gateway: &Arc<Gateway>) {
        // It is opened once.
        let _ = self.0.set(Arc::downgrade(gateway));
    }

    /// What an instance of this function asks.
    pub fn services(&self, function: &Function) -> Arc<dyn Services> {
        let Function { name, version, config, envelope, .. } = function;
        let (name, owner, role) = (name.clone(), envelope.id(), config.role.clone());
        Arc::new(Instance { inside: self.clone(), name, version: *version, owner, role })
    }

    /// Variables that hold the URL of the services in functions' environments.
    pub fn endpoints() -> Vec<String> {
        ENDPOINTS.map(str::to_owned).into()
    }
}

/// Whose instance asks.
#[derive(Debug)]
struct Instance {
    inside: Inside,
    name: String,
    version: Version,
    /// Tells the function from others of the same name, before it and after.
    owner: String,
    /// ARN of the role that the function had when the instance was made.
    role: String,
}

impl Services for Instance {
    fn call(&self, ask: Ask) -> Pin<Box<dyn Future<Output = HttpReply> + Send>> {
        let Some(gateway) = self.inside.0.get().and_then(Weak::upgrade) else {
            return Box::pin(async {
                refusal(StatusCode::SERVICE_UNAVAILABLE, "The daemon ends.")
            });
        };
        if let Ask::Request(request) = ask {
            return Box::pin(async move { gateway.serve(request).await });
        }
        let reply = match ask {
            Ask::Credentials => gateway.credentials(self),
            _ => refusal(StatusCode::NOT_IMPLEMENTED, "This daemon does not know that."),
        };
        Box::pin(async { reply })
    }
}

impl Gateway {
    /// Of a daemon with these routes.
    pub fn new(
        routes: Router,
        store: Arc<Store>,
        sessions: Sessions,
        place: Place,
        guarded: bool,
    ) -> Arc<Self> {
        let routes = TowerToHyperService::new(routes);
        Arc::new(Self { routes, store, sessions, place, guarded })
    }

    /// Credentials of the function's role, in the form of a container's provider.
    fn credentials(&self, asks: &Instance) -> HttpReply {
        // A role takes effect without a new instance. One of a deleted function may still end its work, in its
        // own role whoever has its name by now.
        let function = self.store.get(&asks.name, asks.version);
        let function = function.filter(|found| found.envelope.id() == asks.owner);
        let role = function.map_or_else(|| asks.role.clone(), |found| found.config.role.clone());
        let issued = OffsetDateTime::now_utc();
        let expires = issued.unix_timestamp() + LASTS;
        let assumed = Assumed {
            role: role.clone(),
            name: asks.name.clone(),
            issued: issued.unix_timestamp(),
            expires,
            function: Some(self.place.arn(&asks.name)),
        };
        let expiration = OffsetDateTime::from_unix_timestamp(expires).ok();
        let expiration = expiration.and_then(|at| at.format(&Rfc3339).ok());
        let (Ok(made), Some(expiration)) = (self.sessions.issue(&assumed), expiration) else {
            return refusal(StatusCode::INTERNAL_SERVER_ERROR, "There are no credentials now.");
        };
        let body = json!({
            "AccessKeyId": made.key_id,
            "SecretAccessKey": made.secret.as_str(),
            "Token": made.token,
            "Expiration": expiration,
            "RoleArn": role,
        });
        reply(StatusCode::OK, &body)
    }

    async fn serve(&self, asked: HttpRequest) -> HttpReply {
        let Some(request) = self.request(asked) else {
            return refusal(StatusCode::BAD_REQUEST, "This is no request.");
        };
        if !self.guarded && request.uri().path() != "/" {
            return refusal(StatusCode::FORBIDDEN, DEVELOPMENT);
        }
        match self.routes.call(request).await {
            Ok(response) => whole(response).await,
            Err(never) => match never {},
        }
    }

    fn request(&self, asked: HttpRequest) -> Option<Request<Body>> {
        let HttpRequest { method, target, fields, body } = asked;
        let uri: Uri = target.parse().ok().filter(|_| target.starts_with('/'))?;
        let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).ok()?);
        for (name, value) in fields {
            let name = HeaderName::try_from(name).ok()?;
            if !HOP_BY_HOP.contains(&name) {
                request = request.header(name, HeaderValue::try_from(value).ok()?);
            }
        }
        // It may be signed.
        request = request.header(header::CONTENT_LENGTH, body.len());
        let mut request = request.uri(uri).extension(FromFunction).body(Body::from(body)).ok()?;
        if !self.guarded {
            // Hosts of functions' URLs are none of its business then.
            let host = HeaderValue::from_static("localhost");
            request.headers_mut().insert(header::HOST, host);
        }
        Some(request)
    }
}

/// A response with its body, if that is not too long.
async fn whole(response: Response<Body>) -> HttpReply {
    let (parts, body) = response.into_parts();
    let body = match Limited::new(body, MAX_CALL).collect().await {
        Ok(body) => body.to_bytes().to_vec(),
        Err(error) if error.is::<LengthLimitError>() => {
            let why = format!("The response has more than {MAX_CALL} bytes.");
            return refusal(StatusCode::BAD_GATEWAY, &why);
        }
        Err(_) => return refusal(StatusCode::BAD_GATEWAY, "The response broke off."),
    };
    let fields = parts.headers.iter().filter(|(name, _)| !HOP_BY_HOP.contains(name));
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let fields = fields.map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
    HttpReply { status: parts.status.as_u16(), fields, body }
}

fn reply(status: StatusCode, body: &serde_json::Value) -> HttpReply {
    let fields = vec![("content-type".to_owned(), "application/json".to_owned())];
    HttpReply { status: status.as_u16(), fields, body: body.to_string().into_bytes() }
}

fn refusal(status: StatusCode, why: &str) -> HttpReply {
    reply(status, &json!({ "message": why }))
}
