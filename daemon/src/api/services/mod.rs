//! Other AWS services on the same port, as far as a function's life touches them.
//!
//! A request names its service and operation in one of three protocols ([`wire`]). [`call`] is the
//! table: to add a service, give it a module with a function like `call`, one arm a operation, and an
//! arm here. Whatever is not in the table answers UnknownOperationException.

mod kms;
mod logs;
mod monitoring;
mod sts;
mod wire;

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{Response, StatusCode, request::Parts},
};
use serde_json::Value;

use self::wire::Call;
use super::{App, RequestInfo, error::ApiError, gate::Session, read_body, recorded::Called};
use crate::{
    backend::Backend,
    inside::{self, FromFunction},
};

/// Most bytes of a request.
const MAX_REQUEST: usize = 1 << 20;

/// An error of a service, by the name of its shape in the service's model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceError {
    /// Name of the exception.
    pub name: &'static str,
    /// What went wrong.
    pub message: String,
    /// 400, but for what the daemon is at fault for.
    pub status: StatusCode,
}

impl ServiceError {
    /// The caller's fault.
    pub fn new(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, message: message.into(), status: StatusCode::BAD_REQUEST }
    }

    /// The daemon's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self { name: "InternalFailure", message: message.into(), status }
    }

    /// Firn has no such operation.
    pub fn unknown(service: &str, operation: &str) -> Self {
        let cut = |text: &str| text.chars().take(100).collect::<String>();
        let message =
            format!("Firn does not know the operation {}.{}.", cut(service), cut(operation));
        Self::new("UnknownOperationException", message)
    }
}

/// A refusal in the words of a service.
impl From<ApiError> for ServiceError {
    fn from(error: ApiError) -> Self {
        Self { name: error.name(), status: error.status(), message: error.to_string() }
    }
}

/// Does what a request asks for: the table of services. A service is known by the prefix of its
/// `X-Amz-Target`, or by the `Version` of its query protocol.
async fn call<B: Backend>(
    app: &Arc<App<B>>,
    session: &Session,
    service: &str,
    operation: &str,
    input: Value,
) -> Result<Value, ServiceError> {
    match service {
        // These know what each operation is on.
        "TrentService" => kms::call(app, session, operation, input).await,
        "2011-06-15" => sts::call(app, session, operation, &input),
        // On all that the service has: neither has anything finer here.
        "Logs_20140328" => {
            session.may(&format!("logs:{operation}"), "*")?;
            logs::call(app, operation, input).await
        }
        "GraniteServiceVersion20100801" | "2010-08-01" => {
            session.may(&format!("cloudwatch:{operation}"), "*")?;
            monitoring::call(app, service, operation, input).await
        }
        _ => Err(ServiceError::unknown(service, operation)),
    }
}

/// What policies and the audit trail call a service.
fn prefix(service: &str) -> Option<&'static str> {
    match service {
        "Logs_20140328" => Some("logs"),
        "GraniteServiceVersion20100801" | "2010-08-01" => Some("cloudwatch"),
        "TrentService" => Some("kms"),
        "2011-06-15" => Some("sts"),
        _ => None,
    }
}

/// Whether a request of a function's may pass: where nobody is asked who they are, little is left to functions.
fn open_to_functions<B: Backend>(app: &App<B>, called: Option<&Called>) -> bool {
    app.callers.identity.is_some()
        || called.is_some_and(|called| matches!(called.service, "kms" | "sts"))
}

/// What the gate has against a request, as the service would say it.
pub fn refuse(parts: &Parts, refusal: &ApiError) -> Response<Body> {
    let id = parts.extensions.get::<RequestInfo>().map(|info| info.id.clone()).unwrap_or_default();
    let protocol = wire::Protocol::of(&parts.headers, parts.uri.path());
    protocol.write("", "", &id, Err(refusal.clone().into()))
}

/// Any request of another service.
pub async fn serve<B: Backend>(State(app): State<Arc<App<B>>>, request: Request) -> Response<Body> {
    let session = Session::of(&request);
    let (parts, body) = request.into_parts();
    let id = parts.extensions.get::<RequestInfo>().map(|info| info.id.clone()).unwrap_or_default();
    let protocol = wire::Protocol::of(&parts.headers, parts.uri.path());
    let body = read_body(&parts.headers, body, MAX_REQUEST, |_| ApiError::RequestEntityTooLarge {
        limit: MAX_REQUEST,
        operation: "named",
    });
    let from_function = parts.extensions.get::<FromFunction>().is_some();
    let mut called = None;
    let (service, operation, result) = match body.await {
        Err(error) => (String::new(), String::new(), Err(error.into())),
        Ok(body) => match protocol.read(&parts.headers, parts.uri.path(), &body) {
            Err(error) => (String::new(), String::new(), Err(error)),
            Ok(Call { service, operation, input }) => {
                called = prefix(&service)
                    .map(|service| Called { service, operation: operation.clone() });
                let result = match session {
                    Ok(_) if from_function && !open_to_functions(&app, called.as_ref()) => {
                        Err(ApiError::AccessDenied(inside::DEVELOPMENT.into()).into())
                    }
                    Ok(session) => call(&app, &session, &service, &operation, input).await,
                    Err(refusal) => Err(refusal.into()),
                };
                (service, operation, result)
            }
        },
    };
    let mut response = protocol.write(&service, &operation, &id, result);
    if let Some(called) = called {
        response.extensions_mut().insert(called);
    }
    response
}
