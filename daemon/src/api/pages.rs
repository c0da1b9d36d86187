//! Lists in pages: `MaxItems` and `Marker` of the query, `NextMarker` of the answer.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use super::{Parameters, error::ApiError};

/// Items in one page, at most.
const PAGE: usize = 50;

/// What part of a list a caller wants.
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    /// At most so many items.
    pub limit: usize,
    /// The last item of the page before.
    pub after: Option<String>,
}

impl Page {
    /// As the query says.
    ///
    /// # Errors
    /// A Lambda error that names the parameter.
    pub fn of(Parameters(query): &Parameters) -> Result<Self, ApiError> {
        let limit = match query.get("MaxItems") {
            None => PAGE,
            Some(text) => match text.parse() {
                Ok(n @ 1..=10_000) => PAGE.min(n),
                _ => {
                    let range = "Member must have value between 1 and 10000";
                    return Err(ApiError::validation("maxItems", text, range.into()));
                }
            },
        };
        let after = match query.get("Marker").filter(|marker| !marker.is_empty()) {
            None => None,
            Some(marker) => {
                let text = URL_SAFE_NO_PAD.decode(marker).ok();
                Some(text.and_then(|b| String::from_utf8(b).ok()).ok_or_else(invalid)?)
            }
        };
        Ok(Self { limit, after })
    }

    /// `NextMarker` after a page that ends with `last`, if there are more.
    pub fn next(last: Option<String>, more: bool) -> Option<String> {
        last.filter(|_| more).map(|last| URL_SAFE_NO_PAD.encode(last))
    }
}

/// The error for a marker that none of ours is.
pub fn invalid() -> ApiError {
    ApiError::InvalidParameterValue("Invalid pagination token".into())
}
