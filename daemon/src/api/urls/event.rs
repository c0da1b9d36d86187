//! The event that a function gets for a request to its URL: payload format 2.0.

use std::collections::BTreeMap;

use axum::{
    extract::Query,
    http::{HeaderMap, HeaderValue, header, request::Parts},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use time::{OffsetDateTime, macros::format_description};

use super::HOP_BY_HOP;
use crate::{api::gate, identity::Principal};

/// A request, and what is known of it.
pub struct Event<'a> {
    /// Id of the URL.
    pub url_id: &'a str,
    /// Host name of the URL.
    pub domain: &'a str,
    /// Id of the request.
    pub request_id: &'a str,
    /// Trace header for the function.
    pub trace_id: &'a str,
    /// Who signed it.
    pub caller: Option<&'a Principal>,
    /// Head of the request.
    pub parts: &'a Parts,
    /// Its body.
    pub body: &'a [u8],
}

impl Event<'_> {
    /// As the function gets it.
    pub fn json(&self) -> Vec<u8> {
        let Self { url_id, domain, request_id, parts, body, .. } = self;
        let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
        let source = gate::source(parts).map(|address| address.to_string()).unwrap_or_default();
        let now = OffsetDateTime::now_utc();
        let format =
            format_description!("[day]/[month repr:short]/[year]:[hour]:[minute]:[second] +0000");
        let headers = self.headers(&source);
        let mut event = json!({
            "version": "2.0",
            "routeKey": "$default",
            "rawPath": path,
            "rawQueryString": query,
            "requestContext": {
                "accountId": "anonymous",
                "apiId": url_id,
                "domainName": domain,
                "domainPrefix": url_id,
                "http": {
                    "method": parts.method.as_str(),
                    "path": path,
                    "protocol": format!("{:?}", parts.version),
                    "sourceIp": source,
                    "userAgent": headers.get("user-agent"),
                },
                "requestId": request_id,
                "routeKey": "$default",
                "stage": "$default",
                "time": now.format(format).unwrap_or_default(),
                "timeEpoch": (now.unix_timestamp_nanos() / 1_000_000) as i64,
            },
            "headers": headers,
            "isBase64Encoded": false,
        });
        if let Some(caller) = self.caller {
            let account = caller.caller.account.as_deref();
            event["requestContext"]["accountId"] = account.into();
            event["requestContext"]["authorizer"] = json!({"iam": {
                "accountId": account,
                "callerId": caller.id,
                "cognitoIdentity": null,
                "principalOrgId": null,
                "userArn": caller.arn,
                "userId": caller.id,
            }});
        }
        let cookies: Vec<String> = values(&parts.headers, &header::COOKIE)
            .iter()
            .flat_map(|line| line.split(';').map(|cookie| cookie.trim().to_owned()))
            .filter(|cookie| !cookie.is_empty())
            .collect();
        if !cookies.is_empty() {
            event["cookies"] = cookies.into();
        }
        if let Ok(Query(pairs)) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            && !pairs.is_empty()
        {
            event["queryStringParameters"] = json!(joined(pairs));
        }
        if !body.is_empty() {
            match text(&parts.headers, body) {
                Some(text) => event["body"] = text.into(),
                None => {
                    event["body"] = STANDARD.encode(body).into();
                    event["isBase64Encoded"] = Value::Bool(true);
                }
            }
        }
        event.to_string().into_bytes()
    }

    /// Names in small letters, values of one name joined, and what Lambda's own front adds.
    fn headers(&self, source: &str) -> BTreeMap<String, String> {
        let parts = self.parts;
        let name = |name: &header::HeaderName| name.as_str().to_owned();
        let mut headers: BTreeMap<_, _> = parts
            .headers
            .keys()
            .filter(|key| !HOP_BY_HOP.contains(&key.as_str()))
            .map(|key| (name(key), values(&parts.headers, key).join(",")))
            .collect();
        headers.insert("x-amzn-trace-id".into(), self.trace_id.into());
        headers.entry("host".into()).or_insert_with(|| self.domain.into());
        let forwarded = headers.entry("x-forwarded-for".into()).or_default();
        if !forwarded.is_empty() {
            forwarded.push_str(", ");
        }
        forwarded.push_str(source);
        headers
    }
}

fn values(headers: &HeaderMap, name: &header::HeaderName) -> Vec<String> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.get_all(name).iter().map(text).collect()
}

fn joined(pairs: Vec<(String, String)>) -> BTreeMap<String, String> {
    let mut joined = BTreeMap::<String, String>::new();
    for (name, value) in pairs {
        match joined.get_mut(&name) {
            Some(values) => {
                values.push(',');
                values.push_str(&value);
            }
            None => drop(joined.insert(name, value)),
        }
    }
    joined
}

/// The body, if its type says that it is text, and it is.
fn text<'a>(headers: &HeaderMap, body: &'a [u8]) -> Option<&'a str> {
    if headers.contains_key(header::CONTENT_ENCODING) {
        return None;
    }
    let kind = headers.get(header::CONTENT_TYPE)?.to_str().ok()?.to_ascii_lowercase();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let named = matches!(
        kind,
        "application/json" | "application/javascript" | "application/xml" | "application/graphql"
    );
    let says = named
        || kind.starts_with("text/")
        || (kind.starts_with("application/")
            && (kind.ends_with("+json") || kind.ends_with("+xml")));
    if says { std::str::from_utf8(body).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn event(request: axum::http::request::Builder, body: &[u8]) -> Value {
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        parts.extensions.insert(crate::serve::Peer("192.0.2.7:1".parse().unwrap()));
        let event = Event {
            url_id: "u",
            domain: "u.lambda-url.us-east-1.localhost",
            request_id: "r",
            trace_id: "Root=1",
            caller: None,
            parts: &parts,
            body,
        };
        serde_json::from_slice(&event.json()).unwrap()
    }

    #[test]
    fn a_request_is_told_in_format_2_0() {
        let request = Request::post("/a/b%20c?x=1&y=%C3%BC&x=2&z")
            .header("Host", "u.lambda-url.us-east-1.localhost:9000")
            .header("Cookie", "a=1; b=2")
            .header("Cookie", "c=3")
            .header("X-Two", "1")
            .header("X-Two", "2")
            .header("User-Agent", "curl")
            .header("Connection", "keep-alive")
            .header("X-Forwarded-For", "198.51.100.1")
            .header("Content-Type", "application/json; charset=utf-8");
        let event = event(request, b"{\"k\": 1}");
        for (pointer, value) in [
            ("/version", json!("2.0")),
            ("/routeKey", json!("$default")),
            ("/rawPath", json!("/a/b%20c")),
            ("/rawQueryString", json!("x=1&y=%C3%BC&x=2&z")),
            ("/cookies", json!(["a=1", "b=2", "c=3"])),
            ("/headers/x-two", json!("1,2")),
            ("/headers/host", json!("u.lambda-url.us-east-1.localhost:9000")),
            ("/headers/x-amzn-trace-id", json!("Root=1")),
            ("/headers/x-forwarded-for", json!("198.51.100.1, 192.0.2.7")),
            ("/queryStringParameters", json!({"x": "1,2", "y": "ü", "z": ""})),
            ("/requestContext/apiId", json!("u")),
            ("/requestContext/accountId", json!("anonymous")),
            ("/requestContext/domainName", json!("u.lambda-url.us-east-1.localhost")),
            ("/requestContext/stage", json!("$default")),
            ("/requestContext/requestId", json!("r")),
            ("/requestContext/http/method", json!("POST")),
            ("/requestContext/http/protocol", json!("HTTP/1.1")),
            ("/requestContext/http/sourceIp", json!("192.0.2.7")),
            ("/requestContext/http/userAgent", json!("curl")),
            ("/body", json!("{\"k\": 1}")),
            ("/isBase64Encoded", json!(false)),
        ] {
            assert_eq!(event.pointer(pointer), Some(&value), "{pointer}");
        }
        assert!(event["headers"].get("connection").is_none());
        let time = event["requestContext"]["time"].as_str().unwrap();
        assert!(time.ends_with(" +0000") && time.len() == 26, "{time}");
        assert!(event["requestContext"]["timeEpoch"].as_i64().unwrap() > 1_700_000_000_000);
    }

    #[test]
    fn what_is_not_there_is_left_out_and_what_is_no_text_encoded() {
        let plain = event(Request::get("/"), b"");
        for member in ["cookies", "queryStringParameters", "body"] {
            assert!(plain.get(member).is_none(), "{member}");
        }
        assert_eq!(plain["rawQueryString"], "");
        let kind = |kind| Request::put("/").header("Content-Type", kind);
        for (request, body, encoded) in [
            (kind("text/plain"), &b"hi"[..], false),
            (kind("application/problem+json"), b"{}", false),
            (kind("text/plain"), b"\xff", true),
            (kind("image/png"), b"hi", true),
            (kind("text/plain").header("Content-Encoding", "gzip"), b"hi", true),
            (Request::put("/"), b"hi", true),
        ] {
            let event = event(request, body);
            assert_eq!(event["isBase64Encoded"], encoded, "{body:?}");
            let text = event["body"].as_str().unwrap();
            match encoded {
                true => assert_eq!(STANDARD.decode(text).unwrap(), body),
                false => assert_eq!(text.as_bytes(), body),
            }
        }
    }
}
