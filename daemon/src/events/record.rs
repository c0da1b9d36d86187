//! What a destination hears: Lambda's invocation record, version 1.0.

use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;
use time::{OffsetDateTime, macros::format_description};

use crate::{function::Version, outcome::Answer};

/// Why an event has left the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Condition {
    /// The function has answered.
    Success,
    /// All attempts ended with errors of the function.
    RetriesExhausted,
    /// It waited for too long.
    EventAgeExceeded,
    /// The function's reserved concurrency is 0: it is not to run.
    ZeroReservedConcurrency,
}

impl Condition {
    /// One word, as in the record.
    pub fn word(self) -> &'static str {
        match self {
            Self::Success => "Success",
            Self::RetriesExhausted => "RetriesExhausted",
            Self::EventAgeExceeded => "EventAgeExceeded",
            Self::ZeroReservedConcurrency => "ZeroReservedConcurrency",
        }
    }
}

/// An event and what became of it.
pub struct Ended<'a> {
    /// Id of all attempts.
    pub request_id: &'a str,
    /// Name that the function was called by, with its qualifier.
    pub function_arn: String,
    /// Why it has left the queue.
    pub condition: Condition,
    /// Attempts that have ended.
    pub attempts: u32,
    /// The event, JSON.
    pub payload: &'a Bytes,
    /// What the last attempt brought, if it was one that ended it.
    pub answer: Option<(&'a Answer, Version)>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Record<'a> {
    version: &'static str,
    timestamp: String,
    request_context: RequestContext<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_payload: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_context: Option<ResponseContext>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_payload: Option<&'a RawValue>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RequestContext<'a> {
    request_id: &'a str,
    function_arn: &'a str,
    condition: Condition,
    approximate_invoke_count: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResponseContext {
    status_code: u16,
    executed_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_error: Option<&'static str>,
}

impl Ended<'_> {
    /// The record, written at `now` milliseconds since the epoch. Where it is longer than `limit` bytes the
    /// response is left out, then the request.
    pub fn record(&self, now: i64, limit: usize) -> Bytes {
        let request = serde_json::from_slice::<&RawValue>(self.payload).ok();
        let answer = self.answer.map(|(answer, _)| &answer.payload);
        // What a function answers need not be JSON; a string can hold it all the same.
        let text = answer.filter(|a| serde_json::from_slice::<&RawValue>(a).is_err());
        let text = text.and_then(|a| serde_json::to_string(&String::from_utf8_lossy(a)).ok());
        let response = text.as_deref().map(str::as_bytes).or(answer.map(|a| &a[..]));
        let response = response.and_then(|r| serde_json::from_slice::<&RawValue>(r).ok());
        let mut record = Record {
            version: "1.0",
            timestamp: iso(now),
            request_context: RequestContext {
                request_id: self.request_id,
                function_arn: &self.function_arn,
                condition: self.condition,
                approximate_invoke_count: self.attempts,
            },
            request_payload: request,
            response_context: self.answer.map(|(answer, version)| ResponseContext {
                status_code: 200,
                executed_version: version.to_string(),
                function_error: answer.function_error,
            }),
            response_payload: response,
        };
        let write = |record: &Record<'_>| serde_json::to_vec(record).unwrap_or_default();
        let mut bytes = write(&record);
        if bytes.len() > limit {
            record.response_payload = None;
            bytes = write(&record);
        }
        if bytes.len() > limit {
            record.request_payload = None;
            bytes = write(&record);
        }
        bytes.into()
    }
}

fn iso(ms: i64) -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok();
    at.and_then(|at| at.format(format).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use firn::guest::Outcome;
    use serde_json::{Value, json};

    use super::*;
    use crate::api::MAX_EVENT;

    fn record(payload: &[u8], answer: Option<Vec<u8>>) -> Value {
        let answer = answer.map(|payload| {
            Answer::of(Outcome::Response { payload, content_type: String::new() }, "r")
        });
        let ended = Ended {
            request_id: "r",
            function_arn: "arn:f:$LATEST".into(),
            condition: Condition::Success,
            attempts: 1,
            payload: &Bytes::copy_from_slice(payload),
            answer: answer.as_ref().map(|answer| (answer, Version::Published(7))),
        };
        let bytes = ended.record(1_767_225_600_123, MAX_EVENT);
        assert!(bytes.len() <= MAX_EVENT);
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn records_are_lambdas() {
        let expected = json!({
            "version": "1.0",
            "timestamp": "2026-01-01T00:00:00.123Z",
            "requestContext": {
                "requestId": "r",
                "functionArn": "arn:f:$LATEST",
                "condition": "Success",
                "approximateInvokeCount": 1,
            },
            "requestPayload": {"a": [1]},
            "responseContext": {"statusCode": 200, "executedVersion": "7"},
            "responsePayload": "\"not\u{fffd}json",
        });
        assert_eq!(record(b"{\"a\": [1]}", Some(b"\"not\xffjson".to_vec())), expected);
        let unheard = record(b"1", None);
        assert_eq!((unheard.get("responseContext"), unheard.get("responsePayload")), (None, None));
    }

    #[test]
    fn long_records_lose_payloads_and_not_the_rest() {
        let long = |bytes: usize| format!("\"{}\"", "x".repeat(bytes)).into_bytes();
        let both = record(&long(1_000_000), Some(long(6_000_000)));
        assert!(both.get("requestPayload").is_some() && both.get("responsePayload").is_none());
        assert_eq!(both["responseContext"]["statusCode"], 200);
        let none = record(&long(MAX_EVENT - 2), None);
        assert!(none.get("requestPayload").is_none());
        assert_eq!(none["requestContext"]["requestId"], "r");
    }
}
