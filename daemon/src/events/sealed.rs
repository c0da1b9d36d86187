//! An event as it lies in the queue: sealed with its function's key, and bound to its row.

use bytes::Bytes;
use firn::keys::KeyError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::queue::New;
use crate::function::Function;

/// An event and what its function learns with it.
pub struct Event {
    /// Says how it came.
    pub head: Head,
    /// What the function gets.
    pub payload: Bytes,
}

/// What comes with an event.
#[derive(Serialize, Deserialize)]
pub struct Head {
    /// Name that the function was called by.
    pub function_arn: String,
    /// Trace header.
    pub trace_id: String,
    /// Destinations that it came through, one after the other.
    pub hops: u32,
}

impl Event {
    /// Seals it for `function`.
    ///
    /// # Errors
    /// [`KeyError::Random`] or [`KeyError::TooLong`].
    pub fn seal(
        &self,
        function: &Function,
        request_id: String,
        accepted_ms: i64,
    ) -> Result<New, KeyError> {
        let lane = function.name.clone();
        seal(function, lane, request_id, accepted_ms, &self.head, &self.payload)
    }

    /// Opens what [`Event::seal`] made for the same function.
    ///
    /// # Errors
    /// [`KeyError::Altered`].
    pub fn open(function: &Function, event: &New) -> Result<Self, KeyError> {
        let (head, payload) = open(function, event)?;
        Ok(Self { head, payload })
    }
}

/// Seals a row of `lane` with the key of `function`.
///
/// # Errors
/// [`KeyError::Random`] or [`KeyError::TooLong`].
pub fn seal(
    function: &Function,
    lane: String,
    request_id: String,
    accepted_ms: i64,
    head: &impl Serialize,
    payload: &[u8],
) -> Result<New, KeyError> {
    // JSON on one line, then the payload as it is.
    let mut plain = serde_json::to_vec(head).unwrap_or_default();
    plain.push(b'\n');
    plain.extend_from_slice(payload);
    let owner = function.envelope.id();
    let mut row = New { function: lane, owner, request_id, accepted_ms, sealed: Vec::new() };
    let time = accepted_ms.to_le_bytes();
    row.sealed = function.envelope.events.seal(&context(&row, &time), &plain)?;
    Ok(row)
}

/// Opens what [`seal`] made with the key of the same function.
///
/// # Errors
/// [`KeyError::Altered`].
pub fn open<T: DeserializeOwned>(function: &Function, row: &New) -> Result<(T, Bytes), KeyError> {
    let altered = || KeyError::Altered { what: "the event" };
    let time = row.accepted_ms.to_le_bytes();
    let plain = function.envelope.events.open(&context(row, &time), &row.sealed);
    let plain = plain.map_err(|_| altered())?;
    let end = plain.iter().position(|byte| *byte == b'\n').ok_or_else(altered)?;
    let head = serde_json::from_slice(&plain[..end]).map_err(|_| altered())?;
    Ok((head, Bytes::copy_from_slice(&plain[end + 1..])))
}

fn context<'a>(event: &'a New, time: &'a [u8; 8]) -> [&'a [u8]; 4] {
    [b"firnd event", event.function.as_bytes(), event.request_id.as_bytes(), time]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::tests::example;

    #[test]
    fn events_open_for_their_function_and_row_alone() {
        let head = Head { function_arn: "arn:\n".into(), trace_id: "Root=1".into(), hops: 3 };
        let payload = Bytes::from_static(b"{\n\"planted\": 1}");
        let function = example("f");
        let event = Event { head, payload }.seal(&function, "r".into(), 7).unwrap();
        assert!(!event.sealed.windows(7).any(|w| w == b"planted" || w == b"Root=1,"));
        let opened = Event::open(&function, &event).unwrap();
        assert_eq!(&opened.payload[..], b"{\n\"planted\": 1}");
        assert_eq!((opened.head.function_arn.as_str(), opened.head.hops), ("arn:\n", 3));
        type Change = fn(&mut New);
        let changes: [Change; 4] = [
            |e| e.function = "g".into(),
            |e| e.request_id = "s".into(),
            |e| e.accepted_ms = 8,
            |e| e.sealed[30] ^= 1,
        ];
        for change in changes {
            let mut other = New {
                function: event.function.clone(),
                owner: event.owner.clone(),
                request_id: event.request_id.clone(),
                accepted_ms: event.accepted_ms,
                sealed: event.sealed.clone(),
            };
            change(&mut other);
            assert!(matches!(Event::open(&function, &other), Err(KeyError::Altered { .. })));
        }
    }
}
