//! AWS's protocols other than Lambda's own: JSON 1.0 and 1.1, Smithy RPC v2 with CBOR, and the old query
//! protocol with its XML. All of them become one JSON value and back.
//!
//! Timestamps are a number of seconds in that value; CBOR tags them and XML spells them out, which both
//! tell by the member's name. Blobs are Base64.

use std::fmt::Write;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use ciborium::Value as Cbor;
use serde_json::{Map, Number, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::ServiceError;
use crate::api::error::{ERROR_TYPE, Fault};

/// CBOR's tag of a time.
const EPOCH: u64 = 1;

/// Deepest nesting in a request; the models of the services need less than ten.
const DEPTH: usize = 32;

/// How a request is spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `POST /` with `X-Amz-Target: SERVICE.OPERATION`; by its content type.
    Json(&'static str),
    /// `POST /service/SERVICE/operation/OPERATION`
    Cbor,
    /// `POST /` with a form that has `Action` and `Version`.
    Query,
}

/// What is to be done.
#[derive(Debug)]
pub struct Call {
    /// Prefix of the target, name in the path, or version of the query protocol.
    pub service: String,
    /// The operation.
    pub operation: String,
    /// An object.
    pub input: Value,
}

fn serialization(message: impl Into<String>) -> ServiceError {
    ServiceError::new("SerializationException", message)
}

impl Protocol {
    /// The protocol of a request.
    pub fn of(headers: &HeaderMap, path: &str) -> Self {
        let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        if path.starts_with("/service/") {
            Self::Cbor
        } else if headers.contains_key("x-amz-target") {
            Self::Json(match kind.starts_with(b"application/x-amz-json-1.0") {
                true => "application/x-amz-json-1.0",
                false => "application/x-amz-json-1.1",
            })
        } else if kind.starts_with(b"application/x-www-form-urlencoded") {
            Self::Query
        } else {
            Self::Json("application/x-amz-json-1.1")
        }
    }

    /// What the request asks for.
    ///
    /// # Errors
    /// UnknownOperationException: nothing that could be in the table. SerializationException: the body
    /// is not of the protocol.
    pub fn read(self, headers: &HeaderMap, path: &str, body: &[u8]) -> Result<Call, ServiceError> {
        let nothing = || ServiceError::unknown("", "");
        let (service, operation, input) = match self {
            Self::Json(_) => {
                let target = headers.get("x-amz-target").and_then(|t| t.to_str().ok());
                let (service, operation) =
                    target.and_then(|t| t.rsplit_once('.')).ok_or_else(nothing)?;
                let input = match body {
                    b"" => json!({}),
                    body => {
                        serde_json::from_slice(body).map_err(|e| serialization(e.to_string()))?
                    }
                };
                (service.to_owned(), operation.to_owned(), input)
            }
            Self::Cbor => {
                let named = path.strip_prefix("/service/").unwrap_or_default();
                let (service, operation) = named.split_once("/operation/").ok_or_else(nothing)?;
                let input = match body {
                    b"" => json!({}),
                    mut body => ciborium::de::from_reader_with_recursion_limit(&mut body, DEPTH)
                        .map_err(|e| serialization(e.to_string()))
                        .and_then(from_cbor)?,
                };
                (service.to_owned(), operation.trim_end_matches('/').to_owned(), input)
            }
            Self::Query => {
                let mut input = from_form(body)?;
                let mut take = |name: &str| match input.as_object_mut()?.remove(name)? {
                    Value::String(text) => Some(text),
                    _ => None,
                };
                let (operation, service) = (take("Action"), take("Version"));
                (service.ok_or_else(nothing)?, operation.ok_or_else(nothing)?, input)
            }
        };
        if !input.is_object() {
            return Err(serialization("The request is no structure."));
        }
        Ok(Call { service, operation, input })
    }

    /// The answer.
    pub fn write(
        self,
        service: &str,
        operation: &str,
        request_id: &str,
        result: Result<Value, ServiceError>,
    ) -> Response<Body> {
        let status = result.as_ref().map_or_else(|error| error.status, |_| StatusCode::OK);
        let error = result.as_ref().err().cloned();
        let document = result.unwrap_or_else(|error| match self {
            Self::Query => Value::Null,
            _ => json!({"__type": error.name, "message": error.message}),
        });
        let (content_type, body) = match self {
            Self::Json(kind) => (kind, document.to_string().into_bytes()),
            Self::Cbor => {
                let mut bytes = Vec::new();
                // Into memory: it can't fail.
                let _ = ciborium::into_writer(&to_cbor(document, false), &mut bytes);
                ("application/cbor", bytes)
            }
            Self::Query => {
                let text = to_xml(service, operation, request_id, &document, error.as_ref());
                ("text/xml", text.into_bytes())
            }
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        if self == Self::Cbor {
            headers.insert("smithy-protocol", HeaderValue::from_static("rpc-v2-cbor"));
        }
        if let Some(error) = error {
            headers.insert(ERROR_TYPE, HeaderValue::from_static(error.name));
            // CloudWatch had the query protocol once; clients know its errors by their codes there.
            if service == "GraniteServiceVersion20100801" {
                let kind = if status.is_server_error() { "Receiver" } else { "Sender" };
                let query = HeaderValue::try_from(format!("{};{kind}", query_code(error.name)));
                let name = header::HeaderName::from_static("x-amzn-query-error");
                headers.extend(query.ok().map(|query| (name, query)));
            }
            if status.is_server_error() {
                response.extensions_mut().insert(Fault(error.message));
            }
        }
        response
    }
}

/// The code of an exception where a service's older protocol has another name for it.
fn query_code(name: &str) -> &str {
    match name {
        "InvalidParameterValueException" => "InvalidParameterValue",
        "InvalidParameterCombinationException" => "InvalidParameterCombination",
        "MissingRequiredParameterException" => "MissingParameter",
        "UnknownOperationException" => "InvalidAction",
        "AccessDeniedException" => "AccessDenied",
        "ValidationException" => "ValidationError",
        "MissingAuthenticationTokenException" => "MissingAuthenticationToken",
        "IncompleteSignatureException" => "IncompleteSignature",
        "InvalidSignatureException" => "SignatureDoesNotMatch",
        "UnrecognizedClientException" => "InvalidClientTokenId",
        "ExpiredTokenException" => "ExpiredToken",
        other => other,
    }
}

/// Members that hold times, alone or in a list.
fn is_time(member: &str) -> bool {
    matches!(member, "Timestamp" | "Timestamps" | "Expiration")
}

fn from_cbor(value: Cbor) -> Result<Value, ServiceError> {
    Ok(match value {
        Cbor::Null => Value::Null,
        Cbor::Bool(bool) => bool.into(),
        Cbor::Integer(number) => {
            let number = i64::try_from(number);
            number.map_err(|_| serialization("An integer has more than 64 bits."))?.into()
        }
        Cbor::Float(number) => Number::from_f64(number)
            .map(Value::Number)
            .ok_or_else(|| serialization("A number is not finite."))?,
        Cbor::Text(text) => text.into(),
        Cbor::Bytes(bytes) => STANDARD.encode(bytes).into(),
        Cbor::Array(items) => {
            Value::Array(items.into_iter().map(from_cbor).collect::<Result<_, _>>()?)
        }
        Cbor::Map(entries) => {
            let mut object = Map::new();
            for (key, value) in entries {
                let key = key.into_text().map_err(|_| serialization("A key is no text."))?;
                object.insert(key, from_cbor(value)?);
            }
            object.into()
        }
        Cbor::Tag(EPOCH, time) => from_cbor(*time)?,
        _ => return Err(serialization("A CBOR item is of an unknown kind.")),
    })
}

fn to_cbor(value: Value, time: bool) -> Cbor {
    match value {
        Value::Null => Cbor::Null,
        Value::Bool(bool) => bool.into(),
        Value::Number(number) if time => {
            Cbor::Tag(EPOCH, Box::new(number.as_f64().unwrap_or_default().into()))
        }
        Value::Number(number) => match number.as_i64() {
            Some(number) => number.into(),
            None => number.as_f64().unwrap_or_default().into(),
        },
        Value::String(text) => text.into(),
        Value::Array(items) => {
            items.into_iter().map(|v| to_cbor(v, time)).collect::<Vec<_>>().into()
        }
        Value::Object(entries) => {
            let entry = |(key, value): (String, Value)| {
                let value = to_cbor(value, is_time(&key));
                (key.into(), value)
            };
            Cbor::Map(entries.into_iter().map(entry).collect())
        }
    }
}

/// A form whose names are paths: `Dimensions.member.1.Name=a` is the member `Name` of the first of the
/// list `Dimensions`. Every leaf is text.
fn from_form(body: &[u8]) -> Result<Value, ServiceError> {
    let fields = serde_urlencoded::from_bytes::<Vec<(String, String)>>(body);
    let fields = fields.map_err(|e| serialization(e.to_string()))?;
    let mut root = Value::Object(Map::new());
    for (name, text) in fields {
        let mut place = &mut root;
        for part in name.split('.').take(DEPTH).filter(|part| *part != "member") {
            let index = part.parse::<usize>().ok();
            if place.is_null() {
                *place = if index.is_some() { json!([]) } else { json!({}) };
            }
            place = match (place, index) {
                // Lists come in order, as every SDK sends them.
                (Value::Array(items), Some(index)) if (1..=items.len() + 1).contains(&index) => {
                    if index > items.len() {
                        items.push(Value::Null);
                    }
                    &mut items[index - 1]
                }
                (Value::Object(members), None) => members.entry(part).or_insert(Value::Null),
                _ => {
                    let name: String = name.chars().take(200).collect();
                    return Err(serialization(format!("The parameter {name} is malformed.")));
                }
            };
        }
        *place = text.into();
    }
    Ok(root)
}

fn to_xml(
    service: &str,
    operation: &str,
    request_id: &str,
    document: &Value,
    error: Option<&ServiceError>,
) -> String {
    let mut xml = String::new();
    if let Some(error) = error {
        let kind = if error.status.is_server_error() { "Receiver" } else { "Sender" };
        xml += &format!("<ErrorResponse><Error><Type>{kind}</Type><Code>");
        escape(&mut xml, query_code(error.name));
        xml += "</Code><Message>";
        escape(&mut xml, &error.message);
        xml += &format!("</Message></Error><RequestId>{request_id}</RequestId></ErrorResponse>");
        return xml;
    }
    // Both are in the table by now, and so are no markup.
    let space = match service {
        "2010-08-01" => "http://monitoring.amazonaws.com/doc/2010-08-01/",
        _ => "https://sts.amazonaws.com/doc/2011-06-15/",
    };
    let _ = write!(xml, "<{operation}Response xmlns=\"{space}\"><{operation}Result>");
    element(&mut xml, document, false);
    let _ = write!(
        xml,
        "</{operation}Result><ResponseMetadata><RequestId>{request_id}</RequestId>\
         </ResponseMetadata></{operation}Response>"
    );
    xml
}

fn element(xml: &mut String, value: &Value, time: bool) {
    match value {
        Value::Null => {}
        Value::String(text) => escape(xml, text),
        Value::Number(number) if time => {
            let at = number.as_f64().unwrap_or_default() as i64;
            let at = OffsetDateTime::from_unix_timestamp(at).ok();
            *xml += &at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
        }
        Value::Bool(_) | Value::Number(_) => *xml += &value.to_string(),
        Value::Array(items) => {
            for item in items {
                *xml += "<member>";
                element(xml, item, time);
                *xml += "</member>";
            }
        }
        Value::Object(members) => {
            for (name, value) in members {
                let _ = write!(xml, "<{name}>");
                match value {
                    // The one map with keys of its own in these services.
                    Value::Object(entries) if name == "ExtendedStatistics" => {
                        for (key, value) in entries {
                            let _ = write!(
                                xml,
                                "<entry><key>{key}</key><value>{value}</value></entry>"
                            );
                        }
                    }
                    _ => element(xml, value, is_time(name)),
                }
                let _ = write!(xml, "</{name}>");
            }
        }
    }
}

fn escape(xml: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => *xml += "&amp;",
            '<' => *xml += "&lt;",
            '>' => *xml += "&gt;",
            // What XML 1.0 has no spelling for.
            c if c.is_control() && !matches!(c, '\n' | '\t') => xml.push('\u{fffd}'),
            c => xml.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let entry = |(name, value): &(&'static str, &str)| {
            (header::HeaderName::from_static(name), HeaderValue::try_from(*value).unwrap())
        };
        list.iter().map(entry).collect()
    }

    fn read(head: &[(&'static str, &str)], path: &str, body: &[u8]) -> Result<Call, ServiceError> {
        let head = headers(head);
        Protocol::of(&head, path).read(&head, path, body)
    }

    #[test]
    fn every_protocol_says_the_same() {
        let input = json!({"Dimensions": [{"Name": "a", "Value": "b c"}], "Period": "60"});
        let json = read(&[("x-amz-target", "S.Op")], "/", input.to_string().as_bytes());
        let mut body = Vec::new();
        ciborium::into_writer(&to_cbor(input.clone(), false), &mut body).unwrap();
        let cbor = read(&[], "/service/S/operation/Op", &body);
        let form = b"Action=Op&Version=S&Dimensions.member.1.Name=a\
                     &Dimensions.member.1.Value=b+c&Period=60";
        let query = read(&[("content-type", "application/x-www-form-urlencoded")], "/", form);
        for call in [json, cbor, query] {
            let call = call.unwrap();
            assert_eq!((call.service.as_str(), call.operation.as_str()), ("S", "Op"));
            assert_eq!(call.input, input);
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let target = [("x-amz-target", "S.Op")];
        for body in [&b"{"[..], b"[]", b"\"x\""] {
            assert_eq!(read(&target, "/", body).unwrap_err().name, "SerializationException");
        }
        assert_eq!(read(&[], "/", b"").unwrap_err().name, "UnknownOperationException");
        let path = "/service/S/operation/Op";
        let mut deep = vec![0x81; 10_000];
        deep.push(0);
        for body in [&deep[..], b"\xff", b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff", b"\xa1\x01\x01"] {
            assert_eq!(read(&[], path, body).unwrap_err().name, "SerializationException");
        }
        let form = [("content-type", "application/x-www-form-urlencoded")];
        for fields in ["a.2=x", "a.member.99999999999=x", "a=x&a.1=y"] {
            let body = format!("Action=Op&Version=S&{fields}");
            let error = read(&form, "/", body.as_bytes()).unwrap_err();
            assert_eq!(error.name, "SerializationException", "{fields}");
        }
    }

    #[tokio::test]
    async fn times_and_errors_are_spelled_as_each_protocol_does() {
        let result = json!({"Timestamps": [1_767_225_600], "Label": "<&>"});
        let text = async |protocol: Protocol, result| {
            let service = match protocol {
                Protocol::Query => "2010-08-01",
                _ => "GraniteServiceVersion20100801",
            };
            let response = protocol.write(service, "Op", "id", result);
            let head = response.headers().clone();
            (head, response.into_body().collect().await.unwrap().to_bytes())
        };
        let (_, xml) = text(Protocol::Query, Ok(result.clone())).await;
        let xml = String::from_utf8(xml.to_vec()).unwrap();
        assert!(xml.contains("<Timestamps><member>2026-01-01T00:00:00Z</member></Timestamps>"));
        assert!(xml.contains("<Label>&lt;&amp;&gt;</Label>"), "{xml}");
        let (head, cbor) = text(Protocol::Cbor, Ok(result)).await;
        assert_eq!(head["smithy-protocol"], "rpc-v2-cbor");
        // Tag 1, then a float.
        assert!(cbor.windows(2).any(|two| two == b"\xc1\xfa" || two == b"\xc1\xfb"), "{cbor:x?}");
        let error = ServiceError::new("InvalidParameterValueException", "no");
        let (head, _) = text(Protocol::Cbor, Err(error.clone())).await;
        assert_eq!(head["x-amzn-query-error"], "InvalidParameterValue;Sender");
        let (_, xml) = text(Protocol::Query, Err(error)).await;
        let xml = String::from_utf8(xml.to_vec()).unwrap();
        assert!(xml.contains("<Code>InvalidParameterValue</Code><Message>no</Message>"), "{xml}");
    }
}
