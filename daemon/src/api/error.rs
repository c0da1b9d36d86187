//! Errors as Lambda's API shapes them: status code, `x-amzn-ErrorType`, and a JSON body whose
//! message field is spelled `Message` or `message` as the service model says for each exception.
//!
//! Function errors are not here: a function that fails is an invocation that succeeded
//! (see [`crate::outcome`]).

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use serde_json::json;

use crate::identity::sigv4::AuthError;

/// Header that names the exception.
pub const ERROR_TYPE: &str = "x-amzn-errortype";

/// One exception of Lambda's API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// A member breaks its constraint.
    #[error("{0}")]
    Validation(String),
    /// The body is no JSON, or a member has the wrong type.
    #[error("{0}")]
    Serialization(String),
    /// A parameter is well formed and still unacceptable.
    #[error("{0}")]
    InvalidParameterValue(String),
    /// The event, or the client context, is not JSON.
    #[error("{0}")]
    InvalidRequestContent(String),
    /// The request is not from whom it says.
    #[error("{0}")]
    Unauthenticated(AuthError),
    /// The request comes from where it may not, or asks for what its caller may not do.
    #[error("{0}")]
    AccessDenied(String),
    /// No such function or version.
    #[error("{0}")]
    ResourceNotFound(String),
    /// Nothing is provisioned there.
    #[error("No Provisioned Concurrency Config found for this function")]
    ProvisionedConcurrencyConfigNotFound,
    /// The function exists already, or is not in the state that was asked for.
    #[error("{0}")]
    ResourceConflict(String),
    /// `RevisionId` is not the latest.
    #[error(
        "The Revision Id provided does not match the latest Revision Id. Call the {read} API to \
         retrieve the latest Revision Id"
    )]
    PreconditionFailed {
        /// The operation that tells it.
        read: &'static str,
    },
    /// A resource policy would get too long.
    #[error("The final policy size ({length}) is bigger than the limit ({limit}).")]
    PolicyLengthExceeded {
        /// Its length in bytes.
        length: usize,
        /// Most bytes.
        limit: usize,
    },
    /// The event is over the limit.
    #[error("{0}")]
    RequestTooLarge(String),
    /// The request body is over the limit.
    #[error("Request must be smaller than {limit} bytes for the {operation} operation")]
    RequestEntityTooLarge {
        /// Most bytes.
        limit: usize,
        /// The operation's name.
        operation: &'static str,
    },
    /// The body did not arrive in time or broke off.
    #[error("{0}")]
    RequestTimeout(String),
    /// Too many invocations at once.
    #[error("Rate Exceeded.")]
    TooManyRequests {
        /// Which limit it was, as a `ThrottleReason`.
        reason: &'static str,
        /// Seconds after which another attempt makes sense.
        retry_after: u32,
    },
    /// Firn has no such operation.
    #[error("{0}")]
    UnknownOperation(String),
    /// The path exists, the method does not.
    #[error("{0}")]
    MethodNotAllowed(String),
    /// The daemon, not the caller, is at fault.
    #[error("{0}")]
    Service(String),
}

/// What went wrong in the daemon, for its log; an extension of the response.
#[derive(Debug, Clone)]
pub struct Fault(pub String);

/// How the body spells the message's key.
enum Spelling {
    /// `{"Type": …, "Message": …}`
    Upper,
    /// `{"Type": …, "message": …}`
    Lower,
    /// `{"message": …}`: errors of the front end, which have no `Type`.
    Bare,
}

impl ApiError {
    /// A failed constraint of one member, in Lambda's words.
    pub fn validation(member: &str, value: &str, constraint: String) -> Self {
        Self::Validation(format!(
            "1 validation error detected: {}",
            violation(member, value, &constraint)
        ))
    }

    /// The name of the exception.
    pub fn name(&self) -> &'static str {
        self.facts().0
    }

    /// The status code.
    pub fn status(&self) -> StatusCode {
        self.facts().1
    }

    fn facts(&self) -> (&'static str, StatusCode, Spelling) {
        use Spelling::{Bare, Lower, Upper};
        match self {
            Self::Validation(_) => ("ValidationException", StatusCode::BAD_REQUEST, Bare),
            Self::Serialization(_) => ("SerializationException", StatusCode::BAD_REQUEST, Upper),
            Self::InvalidParameterValue(_) => {
                ("InvalidParameterValueException", StatusCode::BAD_REQUEST, Lower)
            }
            Self::InvalidRequestContent(_) => {
                ("InvalidRequestContentException", StatusCode::BAD_REQUEST, Lower)
            }
            Self::Unauthenticated(error) => (error.name(), StatusCode::FORBIDDEN, Bare),
            Self::AccessDenied(_) => ("AccessDeniedException", StatusCode::FORBIDDEN, Upper),
            Self::ResourceNotFound(_) => {
                ("ResourceNotFoundException", StatusCode::NOT_FOUND, Upper)
            }
            Self::ProvisionedConcurrencyConfigNotFound => {
                ("ProvisionedConcurrencyConfigNotFoundException", StatusCode::NOT_FOUND, Lower)
            }
            Self::ResourceConflict(_) => ("ResourceConflictException", StatusCode::CONFLICT, Lower),
            Self::PreconditionFailed { .. } => {
                ("PreconditionFailedException", StatusCode::PRECONDITION_FAILED, Lower)
            }
            Self::PolicyLengthExceeded { .. } => {
                ("PolicyLengthExceededException", StatusCode::BAD_REQUEST, Lower)
            }
            Self::RequestTooLarge(_) => {
                ("RequestTooLargeException", StatusCode::PAYLOAD_TOO_LARGE, Lower)
            }
            Self::RequestEntityTooLarge { .. } => {
                ("RequestEntityTooLargeException", StatusCode::PAYLOAD_TOO_LARGE, Bare)
            }
            Self::RequestTimeout(_) => {
                ("RequestTimeoutException", StatusCode::REQUEST_TIMEOUT, Bare)
            }
            Self::TooManyRequests { .. } => {
                ("TooManyRequestsException", StatusCode::TOO_MANY_REQUESTS, Lower)
            }
            Self::UnknownOperation(_) => {
                ("UnknownOperationException", StatusCode::NOT_FOUND, Upper)
            }
            Self::MethodNotAllowed(_) => {
                ("UnknownOperationException", StatusCode::METHOD_NOT_ALLOWED, Upper)
            }
            Self::Service(_) => ("ServiceException", StatusCode::INTERNAL_SERVER_ERROR, Upper),
        }
    }
}

/// One clause of a validation message.
pub fn violation(member: &str, value: &str, constraint: &str) -> String {
    // A quoted value helps; a quoted megabyte does not.
    let shown: String = value.chars().take(256).collect();
    let dots = if shown.len() < value.len() { "…" } else { "" };
    format!("Value '{shown}{dots}' at '{member}' failed to satisfy constraint: {constraint}")
}

impl IntoResponse for ApiError {
    fn into_response(self) -> axum::response::Response {
        let (name, status, spelling) = self.facts();
        let message = self.to_string();
        let kind = if status.is_server_error() { "Service" } else { "User" };
        let mut body = match spelling {
            Spelling::Upper => json!({"Type": kind, "Message": message}),
            Spelling::Lower => json!({"Type": kind, "message": message}),
            Spelling::Bare => json!({"message": message}),
        };
        let mut retry = None;
        if let Self::TooManyRequests { reason, retry_after } = self {
            body["Reason"] = reason.into();
            retry = Some(HeaderValue::from(retry_after));
        }
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = status;
        if status.is_server_error() {
            response.extensions_mut().insert(Fault(message));
        }
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ERROR_TYPE, HeaderValue::from_static(name));
        if let Some(retry) = retry {
            headers.insert(header::RETRY_AFTER, retry);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn body(error: ApiError) -> (u16, String, serde_json::Value) {
        let response = error.into_response();
        let status = response.status().as_u16();
        let kind = response.headers()[ERROR_TYPE].to_str().unwrap().to_owned();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, serde_json::from_slice(&bytes).unwrap())
    }

    #[tokio::test]
    async fn bodies_are_spelled_as_the_model_says() {
        let (status, kind, body_) = body(ApiError::ResourceNotFound("gone".into())).await;
        assert_eq!((status, kind.as_str()), (404, "ResourceNotFoundException"));
        assert_eq!(body_, json!({"Type": "User", "Message": "gone"}));
        let (_, _, body_) = body(ApiError::ResourceConflict("twice".into())).await;
        assert_eq!(body_, json!({"Type": "User", "message": "twice"}));
        let throttled = ApiError::TooManyRequests {
            reason: "ConcurrentInvocationLimitExceeded",
            retry_after: 1,
        };
        let (status, _, body_) = body(throttled).await;
        assert_eq!(status, 429);
        assert_eq!(body_["Reason"], "ConcurrentInvocationLimitExceeded");
        assert_eq!(body_["message"], "Rate Exceeded.");
    }

    #[test]
    fn long_values_are_cut() {
        let ApiError::Validation(message) =
            ApiError::validation("handler", &"ä".repeat(5000), "no".into())
        else {
            panic!("not a validation error")
        };
        assert!(message.len() < 700 && message.contains('…'));
    }
}
