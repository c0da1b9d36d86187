//! X-Ray segment documents, as X-Ray's SDKs send them to the X-Ray daemon: one in a datagram, a line that names
//! the format, and JSON ("X-Ray segment documents" and "Sending trace data to X-Ray" in X-Ray's developer guide).
//!
//! A guest has written them. What is read here is bounded in length, and no deeper than its types: what nests is
//! left as text. An optional part of another type than it should have is left out, and costs no other.

use std::{borrow::Cow, collections::BTreeMap};

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Longest document in bytes.
pub const LONGEST: usize = 64 * 1024;

/// What comes before the JSON.
#[derive(Deserialize)]
struct Header<'a> {
    format: &'a str,
    version: u64,
}

/// The segment in a datagram, if that is what it holds.
pub fn read(document: &[u8]) -> Option<Segment<'_>> {
    if document.len() > LONGEST {
        return None;
    }
    let (header, json) = std::str::from_utf8(document).ok()?.split_once('\n')?;
    match serde_json::from_str(header).ok()? {
        Header { format: "json", version: 1 } => serde_json::from_str(json).ok(),
        Header { .. } => None,
    }
}

/// A segment or subsegment.
#[derive(Deserialize)]
pub struct Segment<'a> {
    pub id: &'a str,
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// In seconds since the epoch, as the next.
    pub start_time: f64,
    pub end_time: f64,
    /// Subsegments within others need neither this nor the next.
    pub trace_id: Option<&'a str>,
    pub parent_id: Option<&'a str>,
    #[serde(default)]
    pub in_progress: Maybe<bool>,
    #[serde(default)]
    pub namespace: Maybe<String>,
    #[serde(default)]
    pub error: Maybe<bool>,
    #[serde(default)]
    pub fault: Maybe<bool>,
    #[serde(default)]
    pub throttle: Maybe<bool>,
    #[serde(default)]
    pub cause: Maybe<Cause>,
    #[serde(default)]
    pub http: Maybe<Http>,
    #[serde(default)]
    pub aws: Maybe<Aws>,
    #[serde(default)]
    pub sql: Maybe<Sql>,
    #[serde(default)]
    pub annotations: Maybe<BTreeMap<String, Maybe<Scalar>>>,
    pub metadata: Option<&'a RawValue>,
    /// Read one by one, so that nesting is counted here, and one that is none costs no other.
    #[serde(default, borrow)]
    pub subsegments: Maybe<Vec<&'a RawValue>>,
}

/// Why a segment has failed. It can be the id of an exception elsewhere, too, of which nothing is made.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Cause {
    pub exceptions: Maybe<Vec<Maybe<Exception>>>,
}

/// What a segment has failed with.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Exception {
    pub message: Maybe<String>,
    pub r#type: Maybe<String>,
}

/// A request that was made, or taken.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Http {
    pub request: Maybe<Request>,
    pub response: Maybe<Response>,
}

/// What was asked.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Request {
    pub method: Maybe<String>,
    pub url: Maybe<String>,
    pub client_ip: Maybe<String>,
    pub user_agent: Maybe<String>,
}

/// What was answered.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Response {
    pub status: Maybe<Scalar>,
    /// Some SDKs have it as a string.
    pub content_length: Maybe<Scalar>,
}

/// A call of an AWS service.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Aws {
    pub operation: Maybe<String>,
    pub region: Maybe<String>,
    pub request_id: Maybe<String>,
    /// What `x-amz-id-2` said.
    pub id_2: Maybe<String>,
    pub queue_url: Maybe<String>,
    pub table_name: Maybe<String>,
    pub table_names: Maybe<Vec<Maybe<String>>>,
    pub retries: Maybe<Scalar>,
}

/// A query.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Sql {
    pub database_type: Maybe<String>,
    pub sanitized_query: Maybe<String>,
}

/// An optional part. Where it is not of its type, it is as if it were not there.
pub struct Maybe<T>(pub Option<T>);

impl<T> Default for Maybe<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Maybe<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = <&RawValue>::deserialize(deserializer)?;
        Ok(Self(serde_json::from_str(json.get()).ok()))
    }
}

/// What an annotation can be.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    Boolean(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

impl Scalar {
    /// A number that counts something.
    pub fn count(&self) -> Option<u64> {
        match self {
            Self::Integer(value) => (*value).try_into().ok(),
            Self::Text(value) => value.parse().ok(),
            Self::Boolean(_) | Self::Number(_) => None,
        }
    }
}
