//! AWS Signature Version 4: what a request claims, and whether its signature bears that out.
//!
//! Follows *Signature Version 4 for API requests*: the form with an `Authorization` header and the one with
//! a query string (presigned URLs). The canonical request is made from what has arrived, byte by byte, and
//! never from what a handler understood of it; a path is taken as it is, so one with dot segments never
//! verifies. Pure: the caller brings the clock and the secret.

use std::fmt::Write;

use axum::http::{HeaderMap, HeaderName, Uri, header, request::Parts};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime, PrimitiveDateTime, macros::format_description};

/// The one algorithm.
const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// How far a request's clock may be off.
const SKEW: Duration = Duration::minutes(5);

/// Longest time for which a URL may be presigned, in seconds.
const LONGEST: u32 = 604_800;

/// Most headers that a signature may name.
const MAX_HEADERS: usize = 64;

/// Why a request is not from whom it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// It is not signed.
    #[error("Missing Authentication Token")]
    Missing,
    /// Something that belongs to a signature is not there, or malformed.
    #[error("{0}")]
    Incomplete(String),
    /// The signature is not that of this request, or not now, or not for this service.
    #[error("{0}")]
    Invalid(String),
    /// Nobody has that key.
    #[error("The security token included in the request is invalid.")]
    Unrecognized,
    /// The credentials were temporary.
    #[error("The security token included in the request is expired")]
    Expired,
}

impl AuthError {
    /// The exception that AWS has for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Missing => "MissingAuthenticationTokenException",
            Self::Incomplete(_) => "IncompleteSignatureException",
            Self::Invalid(_) => "InvalidSignatureException",
            Self::Unrecognized => "UnrecognizedClientException",
            Self::Expired => "ExpiredTokenException",
        }
    }

    fn mismatch() -> Self {
        Self::Invalid(
            "The request signature we calculated does not match the signature you provided. Check \
             your AWS Secret Access Key and signing method. Consult the service documentation for \
             details."
                .into(),
        )
    }
}

/// What the signature says of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Payload {
    /// Nothing.
    Unsigned,
    /// This hash, named in the request.
    Named([u8; 32]),
    /// Its hash, which is not named.
    Body,
}

/// What a request says of who signed it and how.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Access key id.
    pub key_id: String,
    /// What comes with temporary credentials.
    pub token: Option<String>,
    date: String,
    region: String,
    service: String,
    time: OffsetDateTime,
    /// `time` as it was spelled.
    stamp: String,
    /// Seconds for which a presigned URL is good.
    expires: Option<u32>,
    signature: [u8; 32],
    payload: Payload,
    /// The canonical request up to the hash of the body.
    canonical: String,
}

/// What either form says, before it is understood.
struct Said<'a> {
    credential: &'a str,
    signed_headers: &'a str,
    signature: &'a str,
}

impl Claim {
    /// Reads the claim of a request.
    ///
    /// # Errors
    /// [`AuthError::Missing`] or [`AuthError::Incomplete`].
    pub fn read(parts: &Parts) -> Result<Self, AuthError> {
        let query = pairs(&parts.uri)?;
        match one_header(&parts.headers, &header::AUTHORIZATION)? {
            Some(authorization) => Self::of_header(parts, &query, authorization),
            None if query.iter().any(|(name, _)| name == "X-Amz-Algorithm") => {
                Self::of_query(parts, query)
            }
            None => Err(AuthError::Missing),
        }
    }

    fn of_header(
        parts: &Parts,
        query: &[(String, String)],
        authorization: &str,
    ) -> Result<Self, AuthError> {
        let incomplete = |what: String| Err(AuthError::Incomplete(what));
        let Some(rest) = authorization.strip_prefix(ALGORITHM).filter(|r| r.starts_with(' '))
        else {
            return incomplete(format!("Authorization header requires the algorithm {ALGORITHM}."));
        };
        let mut found = [None; 3];
        const NAMES: [&str; 3] = ["Credential", "SignedHeaders", "Signature"];
        for part in rest.split(',') {
            let known = part.trim().split_once('=').and_then(|(name, value)| {
                Some((NAMES.iter().position(|known| *known == name)?, value))
            });
            match known {
                Some((at, value)) if found[at].is_none() => found[at] = Some(value),
                _ => {
                    return incomplete(
                        "Authorization header has a parameter that is unknown, malformed, or there \
                         twice."
                            .into(),
                    );
                }
            }
        }
        let missing = NAMES.iter().zip(&found).filter(|(_, value)| value.is_none());
        let missing: Vec<String> = missing
            .map(|(name, _)| format!("Authorization header requires '{name}' parameter."))
            .collect();
        let [Some(credential), Some(signed_headers), Some(signature)] = found else {
            return incomplete(missing.join(" "));
        };
        let headers = &parts.headers;
        let Some(stamp) = one_header(headers, &HeaderName::from_static("x-amz-date"))? else {
            return incomplete(
                "Authorization header requires existence of a 'X-Amz-Date' header.".into(),
            );
        };
        let token = one_header(headers, &HeaderName::from_static("x-amz-security-token"))?;
        let said = Said { credential, signed_headers, signature };
        let hash = one_header(headers, &HeaderName::from_static("x-amz-content-sha256"))?;
        Self::new(parts, query, said, stamp, token.map(str::to_owned), None, hash)
    }

    fn of_query(parts: &Parts, mut query: Vec<(String, String)>) -> Result<Self, AuthError> {
        let take = |query: &mut Vec<(String, String)>, name: &str| {
            let mut values = query.iter().filter(|(known, _)| known == name);
            match (values.next(), values.next()) {
                (value, None) => Ok(value.map(|(_, value)| value.clone())),
                _ => Err(AuthError::Incomplete(format!(
                    "AWS query-string parameter '{name}' is there twice."
                ))),
            }
        };
        let need = |value: Option<String>, name: &str| {
            value.ok_or_else(|| {
                AuthError::Incomplete(format!("AWS query-string parameters must include '{name}'."))
            })
        };
        let mut get = |name: &str| take(&mut query, name);
        if get("X-Amz-Algorithm")?.as_deref() != Some(ALGORITHM) {
            return Err(AuthError::Incomplete(format!("X-Amz-Algorithm must be {ALGORITHM}.")));
        }
        let credential = need(get("X-Amz-Credential")?, "X-Amz-Credential")?;
        let signed_headers = need(get("X-Amz-SignedHeaders")?, "X-Amz-SignedHeaders")?;
        let signature = need(get("X-Amz-Signature")?, "X-Amz-Signature")?;
        let stamp = need(get("X-Amz-Date")?, "X-Amz-Date")?;
        let expires = need(get("X-Amz-Expires")?, "X-Amz-Expires")?;
        let expires = expires.parse().ok().filter(|seconds| (1..=LONGEST).contains(seconds));
        let expires = expires.ok_or_else(|| {
            AuthError::Incomplete(format!("X-Amz-Expires must be between 1 and {LONGEST} seconds."))
        })?;
        let token = get("X-Amz-Security-Token")?;
        let hash = get("X-Amz-Content-SHA256")?;
        query.retain(|(name, _)| name != "X-Amz-Signature");
        let said = Said {
            credential: &credential,
            signed_headers: &signed_headers,
            signature: &signature,
        };
        Self::new(parts, &query, said, &stamp, token, Some(expires), hash.as_deref())
    }

    fn new(
        parts: &Parts,
        query: &[(String, String)],
        said: Said<'_>,
        stamp: &str,
        token: Option<String>,
        expires: Option<u32>,
        hash: Option<&str>,
    ) -> Result<Self, AuthError> {
        let incomplete = |what: &str| AuthError::Incomplete(what.into());
        let scope: Vec<&str> = said.credential.split('/').collect();
        let [key_id, date, region, service, terminator] = scope[..] else {
            return Err(incomplete("Credential must have exactly 5 slash-delimited elements."));
        };
        if terminator != "aws4_request" {
            return Err(AuthError::Invalid(
                "Credential should be scoped with a valid terminator: 'aws4_request'.".into(),
            ));
        }
        let word = |text: &str| {
            (1..=128).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        if ![key_id, region, service].into_iter().all(word) {
            return Err(incomplete("Credential is malformed."));
        }
        let format = format_description!("[year][month][day]T[hour][minute][second]Z");
        let time = PrimitiveDateTime::parse(stamp, format);
        let time = time.map_err(|_| {
            incomplete("Date must be in ISO-8601 'basic format', such as 20260102T030405Z.")
        })?;
        if !stamp.starts_with(date) || date.len() != 8 {
            return Err(AuthError::Invalid(format!(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from \
                 HTTP: '{date}' != '{}', from '{stamp}'.",
                stamp.get(..8).unwrap_or_default()
            )));
        }
        let signature =
            unhex(said.signature).ok_or_else(|| incomplete("Signature is malformed."))?;
        let payload = match hash {
            None => Payload::Body,
            Some("UNSIGNED-PAYLOAD") => Payload::Unsigned,
            Some(hash) => Payload::Named(unhex(hash).ok_or_else(|| {
                incomplete(
                    "x-amz-content-sha256 must be UNSIGNED-PAYLOAD or a SHA-256 in hexadecimal.",
                )
            })?),
        };
        let canonical = canonical(parts, query, said.signed_headers)?;
        Ok(Self {
            key_id: key_id.into(),
            token,
            date: date.into(),
            region: region.into(),
            service: service.into(),
            time: time.assume_utc(),
            stamp: stamp.into(),
            expires,
            signature,
            payload,
            canonical,
        })
    }

    /// Checks that the signature is for now, for this region and for one of these services.
    ///
    /// # Errors
    /// [`AuthError::Invalid`].
    pub fn check_scope(
        &self,
        now: OffsetDateTime,
        region: &str,
        services: &[&str],
    ) -> Result<(), AuthError> {
        let invalid = |text: String| Err(AuthError::Invalid(text));
        if self.region != region {
            return invalid(format!("Credential should be scoped to a valid region: '{region}'."));
        }
        if !services.contains(&self.service.as_str()) {
            let services = services.join("', '");
            return invalid(format!(
                "Credential should be scoped to correct service: '{services}'."
            ));
        }
        let (earliest, latest) = (now - SKEW, now + SKEW);
        if self.time > latest {
            return invalid(format!(
                "Signature not yet current: {} is still later than {} ({} + 5 min.)",
                self.stamp,
                spell(latest),
                spell(now)
            ));
        }
        match self.expires {
            None if self.time < earliest => invalid(format!(
                "Signature expired: {} is now earlier than {} ({} - 5 min.)",
                self.stamp,
                spell(earliest),
                spell(now)
            )),
            Some(seconds) if self.time + Duration::seconds(seconds.into()) < now => {
                invalid("Signature expired: the URL was presigned for a time that is over.".into())
            }
            _ => Ok(()),
        }
    }

    /// Whether the request was signed with `secret`, and its body has the hash that was signed. Takes the
    /// same time for every wrong signature.
    ///
    /// # Errors
    /// [`AuthError::Invalid`].
    pub fn verify(&self, secret: &str, body: &[u8; 32]) -> Result<(), AuthError> {
        if matches!(self.payload, Payload::Named(named) if named != *body) {
            return Err(AuthError::mismatch());
        }
        self.mac(secret, body).verify_slice(&self.signature).map_err(|_| AuthError::mismatch())
    }

    fn mac(&self, secret: &str, body: &[u8; 32]) -> Hmac<Sha256> {
        let mut hash = Sha256::new();
        hash.update(&self.canonical);
        match self.payload {
            Payload::Unsigned => hash.update("UNSIGNED-PAYLOAD"),
            Payload::Named(_) | Payload::Body => hash.update(hex(body)),
        }
        let Self { date, region, service, stamp, .. } = self;
        let key = [date.as_str(), region, service, "aws4_request"].into_iter().fold(
            zeroize::Zeroizing::new(format!("AWS4{secret}").into_bytes()),
            |key, text| {
                let mut mac = keyed(&key);
                mac.update(text.as_bytes());
                zeroize::Zeroizing::new(mac.finalize().into_bytes().to_vec())
            },
        );
        let mut mac = keyed(&key);
        let scope = format!("{date}/{region}/{service}/aws4_request");
        let hash = hex(&hash.finalize());
        mac.update(format!("{ALGORITHM}\n{stamp}\n{scope}\n{hash}").as_bytes());
        mac
    }
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    // A key of HMAC may have any length.
    Hmac::new_from_slice(key).unwrap_or_else(|_| unreachable!("HMAC takes every key"))
}

/// The canonical request but for its last line, which is the hash of the body.
fn canonical(
    parts: &Parts,
    query: &[(String, String)],
    signed_headers: &str,
) -> Result<String, AuthError> {
    let names: Vec<&str> = signed_headers.split(';').collect();
    let ordered = names.windows(2).all(|pair| pair[0] < pair[1]);
    if !ordered || names.len() > MAX_HEADERS {
        return Err(AuthError::Incomplete(
            "SignedHeaders must be sorted, without duplicates, and at most 64.".into(),
        ));
    }
    // What is not signed could have been altered on the way.
    let unsigned = parts.headers.keys().map(HeaderName::as_str).find(|name| {
        (name.starts_with("x-amz-") || *name == "host") && names.binary_search(name).is_err()
    });
    if let Some(name) = unsigned {
        return Err(AuthError::Incomplete(format!(
            "'{name}' must be a 'SignedHeader' in the AWS Authorization."
        )));
    }
    let mut text = format!("{}\n", parts.method);
    // Encoded a second time: services but S3 sign the path as it is sent, not what it stands for.
    encode(parts.uri.path(), true, &mut text);
    text.push('\n');
    let mut encoded: Vec<(String, String)> = query
        .iter()
        .map(|(name, value)| {
            let (mut n, mut v) = (String::new(), String::new());
            encode(name, false, &mut n);
            encode(value, false, &mut v);
            (n, v)
        })
        .collect();
    encoded.sort();
    for (at, (name, value)) in encoded.iter().enumerate() {
        let _ = write!(text, "{}{name}={value}", if at == 0 { "" } else { "&" });
    }
    text.push('\n');
    for name in &names {
        let mut values = parts.headers.get_all(*name).into_iter().peekable();
        if values.peek().is_none() {
            return Err(AuthError::Incomplete(format!(
                "The signed header '{}' is not in the request.",
                name.chars().take(100).collect::<String>()
            )));
        }
        let _ = write!(text, "{name}:");
        for (at, value) in values.enumerate() {
            let value = std::str::from_utf8(value.as_bytes()).map_err(|_| {
                AuthError::Incomplete(format!("The signed header '{name}' is not UTF-8."))
            })?;
            let words: Vec<&str> = value.split(' ').filter(|word| !word.is_empty()).collect();
            let _ = write!(text, "{}{}", if at == 0 { "" } else { "," }, words.join(" "));
        }
        text.push('\n');
    }
    let _ = write!(text, "\n{signed_headers}\n");
    Ok(text)
}

/// Names and values of the query, decoded.
fn pairs(uri: &Uri) -> Result<Vec<(String, String)>, AuthError> {
    let query = uri.query().unwrap_or_default();
    let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Some((decode(name)?, decode(value)?))
    });
    let bad = || AuthError::Incomplete("The query string is malformed.".into());
    pairs.collect::<Option<_>>().ok_or_else(bad)
}

/// Undoes percent-encoding. A plus stays a plus: signers that mean a space write `%20`.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16);
                (digit(rest.next())? * 16 + digit(rest.next())?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

fn encode(text: &str, path: bool, out: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(byte.into());
            }
            b'/' if path => out.push('/'),
            byte => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
}

/// The one value of a header, if it is there.
fn one_header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, AuthError> {
    let mut values = headers.get_all(name).into_iter();
    let bad =
        || AuthError::Incomplete(format!("The header '{name}' is malformed, or there twice."));
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| bad()),
        _ => Err(bad()),
    }
}

fn spell(time: OffsetDateTime) -> String {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    time.format(format).unwrap_or_default()
}

/// In lower case, as SigV4 has it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != 64 || !text.bytes().all(lower) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |b: u8| char::from(b).to_digit(16).unwrap_or_default() as u8;
        *byte = digit(pair[0]) << 4 | digit(pair[1]);
    }
    Some(bytes)
}

#[cfg(test)]
pub mod tests {
    use axum::http::Request;
    use proptest::prelude::*;

    use super::*;

    pub const KEY_ID: &str = "AKIDEXAMPLE000000000";
    pub const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

    /// Requests that botocore has signed for 2026-11-24T00:00:00Z: method and target, headers, an empty
    /// line, the body.
    const VECTORS: [(&str, &str); 11] = [
        ("list", include_str!("vectors/list.txt")),
        ("create", include_str!("vectors/create.txt")),
        ("arn-in-path", include_str!("vectors/arn-in-path.txt")),
        ("latest", include_str!("vectors/latest.txt")),
        ("repeated-keys", include_str!("vectors/repeated-keys.txt")),
        ("invoke-headers", include_str!("vectors/invoke-headers.txt")),
        ("session-token", include_str!("vectors/session-token.txt")),
        ("named-hash", include_str!("vectors/named-hash.txt")),
        ("unsigned-payload", include_str!("vectors/unsigned-payload.txt")),
        ("presigned", include_str!("vectors/presigned.txt")),
        ("presigned-token", include_str!("vectors/presigned-token.txt")),
    ];

    fn now() -> OffsetDateTime {
        time::macros::datetime!(2026-11-24 00:00:00 UTC)
    }

    fn request(text: &str) -> (Parts, [u8; 32]) {
        let (head, body) = text.split_once("\n\n").unwrap();
        let mut lines = head.lines();
        let (method, target) = lines.next().unwrap().split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(target);
        for (name, value) in lines.map(|line| line.split_once(": ").unwrap()) {
            request = request.header(name, value);
        }
        (request.body(()).unwrap().into_parts().0, Sha256::digest(body).into())
    }

    fn verdict(parts: &Parts, hash: &[u8; 32], at: OffsetDateTime) -> Result<Claim, AuthError> {
        let claim = Claim::read(parts)?;
        claim.check_scope(at, "us-east-1", &["lambda"])?;
        claim.verify(SECRET, hash)?;
        Ok(claim)
    }

    /// The headers that sign a request with an empty query for lambda in us-east-1.
    pub fn sign(
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        (key_id, secret): (&str, &str),
    ) -> Vec<(String, String)> {
        let stamp = spell(OffsetDateTime::now_utc());
        let mut all: Vec<(String, String)> =
            headers.iter().map(|(n, v)| (n.to_lowercase(), (*v).to_owned())).collect();
        all.push(("x-amz-date".into(), stamp.clone()));
        let mut names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        let names = names.join(";");
        let scope = format!("{}/us-east-1/lambda/aws4_request", &stamp[..8]);
        let authorization = |signature: &str| {
            format!(
                "{ALGORITHM} Credential={key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
            )
        };
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in &all {
            request = request.header(name, value);
        }
        request = request.header("authorization", authorization(&"0".repeat(64)));
        let claim = Claim::read(&request.body(()).unwrap().into_parts().0).unwrap();
        let mac = claim.mac(secret, &Sha256::digest(body).into()).finalize().into_bytes();
        all.push(("authorization".into(), authorization(&hex(&mac))));
        all.retain(|(name, _)| name != "host");
        all
    }

    #[test]
    fn what_botocore_signs_verifies() {
        for (name, text) in VECTORS {
            let (parts, hash) = request(text);
            let claim = verdict(&parts, &hash, now()).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(claim.key_id, KEY_ID);
            let token = match name {
                "session-token" => Some("FwoGZXIvYXdzEXAMPLE//token=="),
                "presigned-token" => Some("abc/+="),
                _ => None,
            };
            assert_eq!(claim.token.as_deref(), token, "{name}");
            assert_eq!(claim.verify("another", &hash), Err(AuthError::mismatch()), "{name}");
            let other = claim.verify(SECRET, &[7; 32]);
            assert_eq!(other.is_ok(), name == "unsigned-payload", "{name}");
        }
    }

    #[test]
    fn what_aws_publishes_verifies() {
        // The test suite of Signature Version 4, and the example of its documentation.
        for (target, host, kind, stamp, service, signature) in [
            (
                "/",
                "example.amazonaws.com",
                None,
                "20150830T123600Z",
                "service",
                "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
            ),
            (
                "/?Param2=value2&Param1=value1",
                "example.amazonaws.com",
                None,
                "20150830T123600Z",
                "service",
                "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
            ),
            (
                "/?Action=ListUsers&Version=2010-05-08",
                "iam.amazonaws.com",
                Some("application/x-www-form-urlencoded; charset=utf-8"),
                "20150830T123600Z",
                "iam",
                "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
            ),
        ] {
            let mut request =
                Request::builder().uri(target).header("host", host).header("x-amz-date", stamp);
            let names = match kind {
                None => "host;x-amz-date",
                Some(kind) => {
                    request = request.header("content-type", kind);
                    "content-type;host;x-amz-date"
                }
            };
            let authorization = format!(
                "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/{service}/aws4_request, \
                 SignedHeaders={names}, Signature={signature}"
            );
            let request = request.header("authorization", authorization).body(()).unwrap();
            let claim = Claim::read(&request.into_parts().0).unwrap();
            let at = time::macros::datetime!(2015-08-30 12:40:59 UTC);
            claim.check_scope(at, "us-east-1", &[service]).unwrap();
            let empty = Sha256::digest(b"").into();
            let secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
            assert_eq!(claim.verify(secret, &empty), Ok(()), "{target}");
        }
    }

    #[test]
    fn nothing_that_is_signed_can_change() {
        for (name, text) in VECTORS {
            let (parts, hash) = request(text);
            let changed = |change: &dyn Fn(&mut Parts)| {
                let mut parts = parts.clone();
                change(&mut parts);
                assert!(verdict(&parts, &hash, now()).is_err(), "{name}");
            };
            changed(&|parts| parts.method = "PATCH".parse().unwrap());
            changed(&|parts| parts.uri = format!("/x{}", parts.uri).parse().unwrap());
            let mark = if parts.uri.query().is_some() { '&' } else { '?' };
            changed(&|parts| parts.uri = format!("{}{mark}a=b", parts.uri).parse().unwrap());
            for header in text.lines().skip(1).take_while(|line| !line.is_empty()) {
                let header: HeaderName = header.split(':').next().unwrap().parse().unwrap();
                if header != "user-agent" {
                    changed(&|parts| drop(parts.headers.insert(&header, "x".parse().unwrap())));
                }
            }
            // One that was not signed, although it could do something.
            changed(&|parts| {
                let _ = parts.headers.append("x-amz-log-type", "Tail".parse().unwrap());
            });
            changed(&|parts| {
                let _ = parts.headers.append("host", "x".parse().unwrap());
            });
        }
    }

    #[test]
    fn clocks_and_scopes_are_held_to() {
        let at = |name: &str, offset: Duration| {
            let text = VECTORS.iter().find(|(known, _)| *known == name).unwrap().1;
            let (parts, hash) = request(text);
            verdict(&parts, &hash, now() + offset).map(|_| ()).map_err(|e| e.to_string())
        };
        for (name, seconds, good) in [
            ("list", 300, true),
            ("list", 301, false),
            ("list", -300, true),
            ("list", -301, false),
            ("presigned", 60, true),
            ("presigned", 61, false),
            ("presigned", -301, false),
            ("presigned-token", 604_800, true),
            ("presigned-token", 604_801, false),
        ] {
            let found = at(name, Duration::seconds(seconds));
            assert_eq!(found.is_ok(), good, "{name} {seconds}: {found:?}");
        }
        let late = at("list", Duration::minutes(10)).unwrap_err();
        assert_eq!(
            late,
            "Signature expired: 20261124T000000Z is now earlier than 20261124T000500Z \
             (20261124T001000Z - 5 min.)"
        );
        let (parts, _) = request(VECTORS[0].1);
        let claim = Claim::read(&parts).unwrap();
        let error = claim.check_scope(now(), "eu-west-1", &["lambda"]).unwrap_err();
        assert!(error.to_string().contains("valid region"), "{error}");
        let error = claim.check_scope(now(), "us-east-1", &["logs"]).unwrap_err();
        assert!(error.to_string().contains("correct service: 'logs'"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let good = "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE000000000/20261124/us-east-1/lambda/aws4_request, \
                    SignedHeaders=host;x-amz-date, Signature=";
        let good = format!("{good}{}", "0".repeat(64));
        let read = |authorization: Option<&str>, date: Option<&str>| {
            let mut request = Request::builder().uri("/").header("host", "h");
            for (name, value) in [("authorization", authorization), ("x-amz-date", date)] {
                if let Some(value) = value {
                    request = request.header(name, value);
                }
            }
            Claim::read(&request.body(()).unwrap().into_parts().0).map(|_| ())
        };
        let stamp = Some("20261124T000000Z");
        assert_eq!(read(Some(&good), stamp), Ok(()));
        assert_eq!(read(None, stamp), Err(AuthError::Missing));
        for (authorization, date, words) in [
            ("Bearer x".to_owned(), stamp, "requires the algorithm"),
            (good.replace("Signature=", "Sig="), stamp, "unknown"),
            (good.replace("Credential=", "Signature="), stamp, "twice"),
            ("AWS4-HMAC-SHA256 Credential=a/b/c/d/e".into(), stamp, "'Signature' parameter"),
            (good.clone(), None, "X-Amz-Date"),
            (good.clone(), Some("yesterday"), "ISO-8601"),
            (good.clone(), Some("20261125T000000Z"), "does not match YYYYMMDD"),
            (good.replace("/lambda", ""), stamp, "5 slash-delimited"),
            (good.replace("aws4_request", "aws4"), stamp, "valid terminator"),
            (good.replace("host;x-amz-date", "x-amz-date;host"), stamp, "sorted"),
            (good.replace("host;x-amz-date", "host"), stamp, "'x-amz-date' must be"),
            (good.replace("host;", ""), stamp, "'host' must be"),
            (good.replace("host;", "date;host;"), stamp, "'date' is not in"),
            (good.replace("Signature=0", "Signature=g"), stamp, "Signature is malformed"),
        ] {
            let error = read(Some(&authorization), date).expect_err(words).to_string();
            assert!(error.contains(words), "{authorization}: {error}");
        }
        let presigned = VECTORS.iter().find(|(name, _)| *name == "presigned").unwrap().1;
        for (from, to) in [
            ("X-Amz-Expires=60", "X-Amz-Expires=604801"),
            ("X-Amz-Expires=60", "X-Amz-Expires=0"),
            ("&X-Amz-Expires=60", ""),
            ("X-Amz-Date=", "X-Amz-Dat="),
            ("X-Amz-Algorithm=AWS4-HMAC-SHA256", "X-Amz-Algorithm=AWS4"),
            ("X-Amz-Expires=60", "X-Amz-Expires=60&X-Amz-Expires=60"),
            ("Qualifier=1", "Qualifier=%1"),
        ] {
            let (parts, _) = request(&presigned.replace(from, to));
            assert!(matches!(Claim::read(&parts), Err(AuthError::Incomplete(_))), "{to}");
        }
    }

    proptest! {
        #[test]
        fn any_request_is_read_or_refused(
            authorization in "(AWS4-HMAC-SHA256 )?[ -~]{0,120}",
            query in "[!-~&&[^#<>\"`{}]]{0,80}",
            date in "[0-9TZ]{0,18}",
        ) {
            for (authorization, uri) in [
                (Some(&authorization), format!("/?{query}")),
                (None, format!("/?X-Amz-Algorithm=AWS4-HMAC-SHA256&{query}")),
            ] {
                let mut request = Request::builder().uri(uri).header("x-amz-date", &date);
                if let Some(authorization) = authorization {
                    request = request.header("authorization", authorization);
                }
                let Ok(request) = request.body(()) else { continue };
                if let Ok(claim) = Claim::read(&request.into_parts().0) {
                    prop_assert!(claim.verify(SECRET, &[0; 32]).is_err());
                }
            }
        }

        #[test]
        fn decoding_undoes_encoding(text in "\\PC{0,40}") {
            let mut encoded = String::new();
            encode(&text, false, &mut encoded);
            prop_assert_eq!(decode(&encoded), Some(text));
        }
    }
}
