//! What the caller gets for each way in which an invocation can end: Lambda's function errors.
//!
//! All of these are HTTP 200; `X-Amz-Function-Error` says that the payload is an error document.

use std::fmt;

use bytes::Bytes;
use firn_proto::guest::{FunctionError, MAX_PAYLOAD, Outcome};
use serde_json::json;
use time::{OffsetDateTime, macros::format_description};

use crate::report::Status;

/// An invocation's result as the caller sees it.
#[derive(Clone)]
pub struct Answer {
    /// The response, or the error document.
    pub payload: Bytes,
    /// Value of `X-Amz-Function-Error`.
    pub function_error: Option<&'static str>,
    /// What the service adds to the function's log.
    pub log: Option<String>,
    /// How the REPORT line ends.
    pub status: Status,
}

impl fmt::Debug for Answer {
    /// Without what the function said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { payload, function_error, status, .. } = self;
        f.debug_struct("Answer")
            .field("payload_bytes", &payload.len())
            .field("function_error", function_error)
            .field("status", status)
            .finish_non_exhaustive()
    }
}

impl Answer {
    /// The answer for `outcome` of request `request_id`.
    pub fn of(outcome: Outcome, request_id: &str) -> Self {
        match outcome {
            Outcome::Response { payload, .. } => Self {
                payload: payload.into(),
                function_error: None,
                log: None,
                status: Status::Fine,
            },
            Outcome::Error(error) => Self::error(error, request_id),
            // The caller has had it.
            Outcome::Streamed => Self {
                payload: Bytes::new(),
                function_error: None,
                log: None,
                status: Status::Fine,
            },
        }
    }

    /// The microVM ended under the invocation.
    pub fn machine_died(request_id: &str, detail: &str) -> Self {
        Self::exit_error(request_id, &format!("The microVM ended unexpectedly ({detail})"))
    }

    fn error(error: FunctionError, request_id: &str) -> Self {
        match error {
            FunctionError::Reported { error_type, payload } if payload.is_empty() => {
                let document = json!({"errorType": error_type, "errorMessage": ""});
                Self::unhandled(document, None, Status::Fine)
            }
            FunctionError::Reported { payload, .. } => Self {
                payload: payload.into(),
                function_error: Some("Unhandled"),
                log: None,
                status: Status::Fine,
            },
            FunctionError::Exited { status } => {
                let message = format!("Runtime exited with error: {status}");
                Self::exit_error(request_id, &message)
            }
            FunctionError::TimedOut { limit_ms } => {
                let limit = format!("{}.{:02}", limit_ms / 1000, limit_ms % 1000 / 10);
                let message =
                    format!("{} {request_id} Task timed out after {limit} seconds", iso_now());
                let document = json!({"errorType": "Sandbox.Timedout", "errorMessage": message});
                Self::unhandled(document, Some(format!("{message}\n")), Status::Timeout)
            }
            FunctionError::ResponseTooLarge { size } => {
                let message = format!(
                    "Response payload size ({size} bytes) exceeded maximum allowed payload size \
                     ({MAX_PAYLOAD} bytes)."
                );
                let kind = "Function.ResponseSizeTooLarge";
                let log = format!("{message}\n{kind}");
                let document = json!({"errorType": kind, "errorMessage": message});
                Self::unhandled(document, Some(log), Status::Error(kind))
            }
            FunctionError::InvalidEntrypoint { message } => {
                let kind = "Runtime.InvalidEntrypoint";
                let message = format!("RequestId: {request_id} Error: {message}");
                let log = format!("{message}\n{kind}");
                let document = json!({"errorType": kind, "errorMessage": message});
                Self::unhandled(document, Some(log), Status::Error(kind))
            }
        }
    }

    fn exit_error(request_id: &str, what: &str) -> Self {
        let kind = "Runtime.ExitError";
        let message = format!("RequestId: {request_id} Error: {what}");
        let log = format!("{message}\n{kind}");
        let document = json!({"errorType": kind, "errorMessage": message});
        Self::unhandled(document, Some(log), Status::Error(kind))
    }

    fn unhandled(document: serde_json::Value, log: Option<String>, status: Status) -> Self {
        Self {
            payload: document.to_string().into(),
            function_error: Some("Unhandled"),
            log,
            status,
        }
    }
}

fn iso_now() -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::now_utc().format(format).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(error: FunctionError) -> serde_json::Value {
        let answer = Answer::of(Outcome::Error(error), "id-1");
        assert_eq!(answer.function_error, Some("Unhandled"));
        serde_json::from_slice(&answer.payload).unwrap()
    }

    #[test]
    fn responses_and_posted_errors_pass_through() {
        let response =
            Outcome::Response { payload: b"\"hi\"".to_vec(), content_type: String::new() };
        let answer = Answer::of(response, "id-1");
        assert_eq!((&answer.payload[..], answer.function_error), (&b"\"hi\""[..], None));
        let posted = FunctionError::Reported {
            error_type: "Function.X".into(),
            payload: br#"{"errorMessage":"own"}"#.to_vec(),
        };
        assert_eq!(document(posted), json!({"errorMessage": "own"}));
    }

    #[test]
    fn a_crash_names_its_exit_status() {
        let crash = document(FunctionError::Exited { status: "exit status 1".into() });
        assert_eq!(crash["errorType"], "Runtime.ExitError");
        assert_eq!(
            crash["errorMessage"],
            "RequestId: id-1 Error: Runtime exited with error: exit status 1"
        );
    }

    #[test]
    fn a_timeout_names_its_limit() {
        let late = document(FunctionError::TimedOut { limit_ms: 3000 });
        let message = late["errorMessage"].as_str().unwrap();
        assert!(message.ends_with("Z id-1 Task timed out after 3.00 seconds"), "{message}");
    }

    #[test]
    fn an_oversized_response_names_both_sizes() {
        let large = document(FunctionError::ResponseTooLarge { size: 7_000_000 });
        assert_eq!(large["errorType"], "Function.ResponseSizeTooLarge");
        let message = large["errorMessage"].as_str().unwrap();
        assert!(message.contains("7000000") && message.contains("6291556"), "{message}");
    }
}
