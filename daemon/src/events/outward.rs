//! What is sent elsewhere when an event is done with: records to destinations that are queues and topics, and
//! events to dead-letter targets.
//!
//! Such a message enters the queue of events in the commit in which the event that it is about leaves it, and
//! stays there until its target has accepted it: at least once. Each target of a function has a lane of its
//! own, so that one that can't be reached holds up nothing else.

use bytes::Bytes;
use firn::keys::KeyError;
use serde::{Deserialize, Serialize};

use super::{
    queue::New,
    record::{Condition, Ended},
    sealed,
};
use crate::{
    aws::{Attribute, Aws, AwsError, Recipient, Service},
    function::Function,
    metrics::Metric,
    outcome::Answer,
};

/// Most bytes of an error's message in an attribute.
const MAX_ERROR: usize = 1024;

/// Stands between a function's name and its target in the name of a lane; no function's name has it.
const SEPARATOR: char = '>';

/// What services say of the message itself, which is no better the next time.
const HOPELESS: [&str; 7] = [
    "InvalidAttributeValue",
    "InvalidMessageContents",
    "InvalidParameter",
    "InvalidParameterValue",
    "ParameterValueInvalid",
    "UnsupportedOperation",
    "Validation",
];

/// A message to a queue or topic.
#[derive(Debug)]
pub struct Message {
    /// Says where it goes.
    pub head: Head,
    /// What it says.
    pub payload: Bytes,
}

/// What comes with a message.
#[derive(Debug, Serialize, Deserialize)]
pub struct Head {
    /// ARN of its target.
    pub target: String,
    /// What the event's function was called by, for metrics.
    pub resource: String,
    /// What is counted when it can't be delivered.
    pub failure: Metric,
    /// Its attributes.
    pub attributes: Vec<Attribute>,
}

/// Most bytes of a message to `to`: what its service takes.
pub fn limit(to: &Recipient) -> usize {
    match to.service {
        Service::Sns => 262_144,
        _ => 1_048_576,
    }
}

/// The function whose messages or events a lane has.
pub fn function(lane: &str) -> &str {
    lane.split(SEPARATOR).next().unwrap_or_default()
}

/// Whether a lane has messages to a target, and not events for its function.
pub fn is_outward(lane: &str) -> bool {
    lane.contains(SEPARATOR)
}

/// The range in which the names of all lanes of what a function sends lie.
pub fn lanes(function: &str) -> (String, String) {
    let next = char::from(SEPARATOR as u8 + 1);
    (format!("{function}{SEPARATOR}"), format!("{function}{next}"))
}

impl Message {
    /// The record of an invocation for a destination, written at `now`.
    pub fn record(to: &Recipient, resource: &str, ended: &Ended<'_>, now: i64) -> Self {
        let head = Head {
            target: to.arn.clone(),
            resource: resource.to_owned(),
            failure: Metric::DestinationDeliveryFailures,
            attributes: Vec::new(),
        };
        Self { head, payload: ended.record(now, limit(to)) }
    }

    /// An event that failed, as Lambda sends it: with its request id, and what was wrong.
    pub fn dead_letter(target: &str, resource: &str, ended: &Ended<'_>) -> Self {
        let (code, message) = match (ended.answer, ended.condition) {
            (Some((answer, _)), _) => (200, error_message(answer)),
            (None, Condition::EventAgeExceeded) => {
                (429, "The event was not delivered in time.".into())
            }
            (None, _) => (429, "The function may not run: its reserved concurrency is 0.".into()),
        };
        let attribute = |name: &str, kind: &str, value: String| Attribute {
            name: name.into(),
            kind: kind.into(),
            value,
        };
        let mut attributes = vec![
            attribute("RequestID", "String", ended.request_id.to_owned()),
            attribute("ErrorCode", "Number", code.to_string()),
        ];
        // Neither service takes an empty one.
        if !message.is_empty() {
            attributes.push(attribute("ErrorMessage", "String", message));
        }
        let head = Head {
            target: target.to_owned(),
            resource: resource.to_owned(),
            failure: Metric::DeadLetterErrors,
            attributes,
        };
        Self { head, payload: ended.payload.clone() }
    }

    /// Seals it with the key of the function that it is about.
    ///
    /// # Errors
    /// [`KeyError::Random`] or [`KeyError::TooLong`].
    pub fn seal(&self, function: &Function, now: i64) -> Result<New, KeyError> {
        let lane = format!("{}{SEPARATOR}{}", function.name, self.head.target);
        let id = uuid::Uuid::new_v4().to_string();
        sealed::seal(function, lane, id, now, &self.head, &self.payload)
    }

    /// Opens what [`Message::seal`] made for the same function.
    ///
    /// # Errors
    /// [`KeyError::Altered`].
    pub fn open(function: &Function, row: &New) -> Result<Self, KeyError> {
        let (head, payload) = sealed::open(function, row)?;
        Ok(Self { head, payload })
    }

    /// Sends it. When this returns, its target has accepted it.
    ///
    /// # Errors
    /// Any [`AwsError`].
    pub async fn send(&self, aws: &Aws, to: &Recipient) -> Result<(), AwsError> {
        // Events are JSON, and so UTF-8.
        let text = String::from_utf8_lossy(&self.payload);
        aws.deliver(to, &text, &self.head.attributes).await
    }
}

/// Whether a target that says this would say the same of the message later. Otherwise it is down, has not been
/// made yet, or does not let us in.
pub fn is_hopeless(error: &AwsError) -> bool {
    let AwsError::Refused { status, code, .. } = error else { return false };
    let code = code.strip_suffix("Exception").unwrap_or(code);
    status.as_u16() == 413 || (status.as_u16() == 400 && HOPELESS.contains(&code))
}

/// What a function said that was wrong, as far as it goes into an attribute.
fn error_message(answer: &Answer) -> String {
    let json = serde_json::from_slice::<serde_json::Value>(&answer.payload).unwrap_or_default();
    let message = json["errorMessage"].as_str().unwrap_or_default();
    // Both services take the characters of XML.
    let mut text: String = message
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\t' | '\n' | '\r'))
        .filter(|c| !matches!(c, '\u{fffe}' | '\u{ffff}'))
        .collect();
    let end = (0..=text.len().min(MAX_ERROR)).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or_default());
    text
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use firn::guest::Outcome;

    use super::*;
    use crate::function::{Version, tests::example};

    const QUEUE: &str = "arn:aws:sqs:us-east-1:000000000000:q";

    fn dead_letter(condition: Condition, error: Option<&str>) -> Message {
        let answer = error.map(|message| {
            let payload = serde_json::json!({ "errorMessage": message }).to_string();
            Answer::of(
                Outcome::Response { payload: payload.into(), content_type: String::new() },
                "r",
            )
        });
        let ended = Ended {
            request_id: "r",
            function_arn: "arn:f:$LATEST".into(),
            condition,
            attempts: 3,
            payload: &Bytes::from_static(b"{\"planted\": 1}"),
            answer: answer.as_ref().map(|answer| (answer, Version::Latest)),
        };
        Message::dead_letter(QUEUE, "f", &ended)
    }

    #[test]
    fn dead_letters_say_what_was_wrong() {
        let attributes = |condition, error| -> Vec<(String, String)> {
            let all = dead_letter(condition, error).head.attributes.into_iter();
            all.map(|attribute| (attribute.name, attribute.value)).collect()
        };
        let of = |code: &str, message: &str| -> Vec<(String, String)> {
            [("RequestID", "r"), ("ErrorCode", code), ("ErrorMessage", message)]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into_iter()
                .filter(|(_, value)| !value.is_empty())
                .collect()
        };
        let failed = Condition::RetriesExhausted;
        assert_eq!(attributes(failed, Some("bo\u{0}om\n")), of("200", "boom\n"));
        assert_eq!(attributes(failed, Some("")), of("200", ""));
        let long = format!("x{}", "ü".repeat(1000));
        assert_eq!(attributes(failed, Some(&long)), of("200", &long[..1023]));
        let late = attributes(Condition::EventAgeExceeded, None);
        assert_eq!(late[1].1, "429");
    }

    #[test]
    fn messages_open_for_their_function_and_lane_alone() {
        let function = example("f");
        let row = dead_letter(Condition::RetriesExhausted, Some("x")).seal(&function, 7).unwrap();
        assert!(!row.sealed.windows(7).any(|w| w == b"planted"));
        assert_eq!(row.function, format!("f>{QUEUE}"));
        let opened = Message::open(&function, &row).unwrap();
        assert_eq!(
            (&opened.payload[..], opened.head.target.as_str()),
            (&b"{\"planted\": 1}"[..], QUEUE)
        );
        let moved = New { function: "f".into(), ..row };
        assert!(matches!(Message::open(&function, &moved), Err(KeyError::Altered { .. })));
    }

    #[test]
    fn lanes_are_their_functions() {
        let lane = format!("f>{QUEUE}");
        assert_eq!((function(&lane), function("f")), ("f", "f"));
        assert!(is_outward(&lane) && !is_outward("f"));
        let (first, end) = lanes("f");
        let outside = |name: &str| name < first.as_str() || name >= end.as_str();
        assert!(!outside(&lane) && ["f", "f-2>x", "f_>x", "fa>x", "e>x"].into_iter().all(outside));
    }

    #[test]
    fn what_is_wrong_with_a_message_stays_wrong() {
        let refused = |status: u16, code: &str| AwsError::Refused {
            service: Service::Sqs,
            status: StatusCode::from_u16(status).unwrap(),
            code: code.into(),
            message: String::new(),
        };
        for (status, code) in [
            (400, "InvalidMessageContents"),
            (400, "ValidationException"),
            (413, "RequestEntityTooLarge"),
        ] {
            assert!(is_hopeless(&refused(status, code)), "{code}");
        }
        for (status, code) in [
            (400, "QueueDoesNotExist"),
            (400, "ExpiredToken"),
            (403, "InvalidClientTokenId"),
            (404, "NotFound"),
            (429, "Throttled"),
            (503, "ServiceUnavailable"),
        ] {
            assert!(!is_hopeless(&refused(status, code)), "{code}");
        }
        assert!(!is_hopeless(&AwsError::NoCredentials(Service::Sqs)));
    }
}
