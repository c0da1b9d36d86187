//! What a function's answer means as an HTTP response.
//!
//! Buffered: an object with `statusCode` says it all (payload format 2.0); any other JSON is a 200 with
//! this body. Streamed: the bytes as they are, or, with the content type [`INTEGRATION`], behind a prelude
//! of JSON and eight zero bytes. What makes no response is a 502.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{HOP_BY_HOP, Plain};
use crate::{api::response_stream::Rest, outcome::Answer};

/// The content type of a streamed response with a prelude.
const INTEGRATION: &str = "application/vnd.awslambda.http-integration-response";

/// What ends the prelude.
const DELIMITER: [u8; 8] = [0; 8];

/// Most bytes of a prelude, and of the header fields of a response.
const MAX_HEAD: usize = 64 * 1024;

/// Most header fields of a response.
const MAX_FIELDS: usize = 100;

/// A response's head as functions say it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    status_code: Value,
    #[serde(default)]
    headers: Option<Map<String, Value>>,
    #[serde(default)]
    cookies: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Structured {
    #[serde(flatten)]
    head: Head,
    #[serde(default)]
    body: Option<Value>,
    #[serde(default)]
    is_base64_encoded: Option<bool>,
}

/// The response for a whole answer.
pub fn buffered(answer: &Answer) -> Response<Body> {
    if answer.function_error.is_some() {
        return failed();
    }
    let text = &answer.payload;
    match serde_json::from_slice::<Value>(text) {
        Err(_) => failed(),
        Ok(Value::Object(object)) if object.contains_key("statusCode") => {
            structured(Value::Object(object)).unwrap_or_else(failed)
        }
        Ok(_) => plain(text.clone()),
    }
}

/// The response for the answer of a function that does not stream, from a URL that would: what the
/// function said, as it is.
pub fn unstreamed(answer: &Answer) -> Response<Body> {
    match answer.function_error {
        Some(_) => failed(),
        None => plain(answer.payload.clone()),
    }
}

/// The response for an answer that has begun.
pub async fn streamed(content_type: &str, mut rest: Rest) -> Response<Body> {
    let is_integration =
        content_type.split(';').next().is_some_and(|t| t.trim().eq_ignore_ascii_case(INTEGRATION));
    if !is_integration {
        let mut response = Response::new(rest.body(Bytes::new(), Plain));
        let value = HeaderValue::from_str(content_type).ok().filter(|v| !v.is_empty());
        let value = value.unwrap_or(HeaderValue::from_static("application/octet-stream"));
        response.headers_mut().insert(header::CONTENT_TYPE, value);
        return response;
    }
    let mut prelude = BytesMut::new();
    let end = loop {
        let Some(chunk) = rest.chunk().await else { return failed() };
        // The delimiter may lie across two chunks.
        let seen = prelude.len().saturating_sub(DELIMITER.len() - 1);
        prelude.extend_from_slice(&chunk);
        let found = prelude[seen..].windows(DELIMITER.len()).position(|w| w == DELIMITER);
        match found {
            Some(at) if seen + at <= MAX_HEAD => break seen + at,
            None if prelude.len() <= MAX_HEAD => {}
            _ => return failed(),
        }
    };
    let body = prelude.split_off(end + DELIMITER.len()).freeze();
    let head = match prelude[..end].trim_ascii() {
        [] => Some(Response::new(Body::empty())),
        json => serde_json::from_slice::<Prelude>(json).ok().and_then(|p| head(p.into())),
    };
    match head {
        Some(response) => response.map(|_| rest.body(body, Plain)),
        None => failed(),
    }
}

/// A head whose members may all be missing.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Prelude {
    #[serde(default)]
    status_code: Option<Value>,
    #[serde(default)]
    headers: Option<Map<String, Value>>,
    #[serde(default)]
    cookies: Option<Vec<String>>,
}

impl From<Prelude> for Head {
    fn from(Prelude { status_code, headers, cookies }: Prelude) -> Self {
        Self { status_code: status_code.unwrap_or(Value::from(200)), headers, cookies }
    }
}

fn structured(object: Value) -> Option<Response<Body>> {
    let Structured { head: given, body, is_base64_encoded } =
        serde_json::from_value(object).ok()?;
    let body = match body {
        None | Some(Value::Null) => Bytes::new(),
        Some(Value::String(text)) if is_base64_encoded == Some(true) => {
            STANDARD.decode(text).ok()?.into()
        }
        Some(Value::String(text)) => text.into(),
        Some(other) => other.to_string().into(),
    };
    Some(head(given)?.map(|_| Body::from(body)))
}

/// A response without a body. `None`: no HTTP response can be like this.
fn head(Head { status_code, headers, cookies }: Head) -> Option<Response<Body>> {
    let status = match status_code {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    let status = u16::try_from(status?).ok().filter(|status| (200..=599).contains(status))?;
    let (headers, cookies) = (headers.unwrap_or_default(), cookies.unwrap_or_default());
    let mut fields = HeaderMap::new();
    let mut bytes = 0;
    let texts = headers.into_iter().filter_map(|(name, value)| match value {
        Value::Null => None,
        Value::String(text) => Some((name, text)),
        other => Some((name, other.to_string())),
    });
    for (name, text) in texts.chain(cookies.into_iter().map(|c| ("set-cookie".to_owned(), c))) {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        let value = HeaderValue::from_str(&text).ok()?;
        bytes += name.as_str().len() + text.len();
        if bytes > MAX_HEAD || fields.len() >= MAX_FIELDS {
            return None;
        }
        // HTTP itself says how long the body is.
        if !HOP_BY_HOP.contains(&name.as_str()) && name != header::CONTENT_LENGTH {
            fields.append(name, value);
        }
    }
    if !fields.contains_key(header::CONTENT_TYPE) {
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::from_u16(status).ok()?;
    *response.headers_mut() = fields;
    Some(response)
}

fn plain(body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let value = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

fn failed() -> Response<Body> {
    let mut response = Response::new(Body::from("Internal Server Error"));
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    let value = HeaderValue::from_static("text/plain");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use firn::guest::{FunctionError, Outcome};

    fn answer(payload: &[u8]) -> Answer {
        let payload = payload.to_vec();
        Answer::of(Outcome::Response { payload, content_type: String::new() }, "r")
    }

    async fn text(response: Response<Body>) -> (u16, HeaderMap, String) {
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        (parts.status.as_u16(), parts.headers, String::from_utf8(body).unwrap())
    }

    #[tokio::test]
    async fn any_json_is_a_body() {
        for body in ["\"hi\"", "7", "null", "[1, 2]", "{\"a\": {\"statusCode\": 1}}"] {
            let (status, headers, found) = text(buffered(&answer(body.as_bytes()))).await;
            assert_eq!((status, found.as_str()), (200, body));
            assert_eq!(headers["content-type"], "application/json");
        }
    }

    #[tokio::test]
    async fn a_structured_answer_says_it_all() {
        let said = json!({
            "statusCode": 201, "body": "b", "cookies": ["a=1; Secure", "b=2"],
            "headers": {
                "Content-Type": "text/html", "X-N": 7, "X-B": true, "X-Null": null,
                "Connection": "close", "Transfer-Encoding": "chunked", "Content-Length": "9999",
            },
        });
        let (status, headers, body) = text(buffered(&answer(said.to_string().as_bytes()))).await;
        assert_eq!((status, body.as_str()), (201, "b"));
        assert_eq!(headers["content-type"], "text/html");
        assert_eq!(headers["x-n"], "7");
        assert_eq!(headers["x-b"], "true");
        let cookies: Vec<_> = headers.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1; Secure", "b=2"]);
        assert_eq!(headers.len(), 5, "{headers:?}");
        for (said, expected) in [
            (json!({"statusCode": 200, "body": "aGk=", "isBase64Encoded": true}), "hi"),
            (json!({"statusCode": "200", "body": {"a": 1}}), "{\"a\":1}"),
            (json!({"statusCode": 404}), ""),
        ] {
            assert_eq!(text(buffered(&answer(said.to_string().as_bytes()))).await.2, expected);
        }
    }

    #[tokio::test]
    async fn what_is_no_response_is_a_bad_gateway() {
        let long = "x".repeat(MAX_HEAD);
        let many: Map<_, _> = (0..101).map(|n| (format!("x-{n}"), json!("v"))).collect();
        for said in [
            json!({"statusCode": 99}),
            json!({"statusCode": 600}),
            json!({"statusCode": 101}),
            json!({"statusCode": null}),
            json!({"statusCode": 200.5}),
            json!({"statusCode": 200, "headers": {"a b": "c"}}),
            json!({"statusCode": 200, "headers": {"a": "b\r\nc: d"}}),
            json!({"statusCode": 200, "headers": {"a": long}}),
            json!({"statusCode": 200, "headers": many}),
            json!({"statusCode": 200, "headers": []}),
            json!({"statusCode": 200, "cookies": "a=1"}),
            json!({"statusCode": 200, "body": "!", "isBase64Encoded": true}),
        ] {
            let (status, _, body) = text(buffered(&answer(said.to_string().as_bytes()))).await;
            assert_eq!((status, body.as_str()), (502, "Internal Server Error"), "{said:.80}");
        }
        assert_eq!(text(buffered(&answer(b"no json"))).await.0, 502);
        let error = FunctionError::Exited { status: "exit status 1".into() };
        let error = Answer::of(Outcome::Error(error), "r");
        for response in [buffered(&error), unstreamed(&error)] {
            let (status, _, body) = text(response).await;
            assert_eq!((status, body.as_str()), (502, "Internal Server Error"));
        }
    }

    proptest! {
        #[test]
        fn any_answer_makes_a_response(
            status in any::<i64>(),
            name in "\\PC{0,12}",
            value in "\\PC{0,12}",
            body in "\\PC{0,40}",
            encoded in any::<bool>(),
        ) {
            let said = json!({
                "statusCode": status, "headers": {name: value.clone()}, "cookies": [value],
                "body": body, "isBase64Encoded": encoded,
            });
            let response = buffered(&answer(said.to_string().as_bytes()));
            prop_assert!((200..600).contains(&response.status().as_u16()));
            prop_assert!(!response.headers().contains_key("content-length"));
        }

        #[test]
        fn any_bytes_make_a_response(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = buffered(&answer(&bytes));
        }
    }
}
