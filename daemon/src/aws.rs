//! Requests to AWS's own services, or to what speaks their protocols: code that lies in a bucket, what becomes of
//! asynchronous events, and the audit trail on its way to a bucket.
//!
//! A few operations, so it is HTTP with the SDK's signer and not the SDK
//! ([decision 15](../../docs/decisions/0015-requests-to-aws.md)). A request goes to the endpoint that the operator
//! has set, or to AWS's own: what callers say gets into its path, query and body alone, encoded. Redirects are not
//! followed. Nothing is repeated here: who asks knows whether to ask again.

#[cfg(test)]
pub mod fake;

use std::{
    env,
    error::Error,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use aws_credential_types::Credentials;
use aws_sigv4::{
    http_request::{
        PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings,
        UriPathNormalizationMode, sign,
    },
    sign::v4::SigningParams,
};
use aws_smithy_runtime_api::client::identity::Identity;
use axum::http::{Request, Response, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    api::names::is_region,
    client::{self, Http},
};

/// Time for the head of a response.
const HEAD: Duration = Duration::from_secs(15);

/// Time without a byte after which a body is given up.
const STALL: Duration = Duration::from_secs(30);

/// Time that a whole body may take.
const BODY: Duration = Duration::from_secs(300);

/// Most bytes of a response that is no object.
const ANSWER: u64 = 64 << 10;

/// Most characters of a service's message that are shown.
const SHOWN: usize = 500;

/// Longest name of a queue or topic.
const NAME: usize = 256;

/// What is encoded in a path or query: all but RFC 3986's unreserved characters.
const RESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A service that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Simple Storage Service.
    S3,
    /// Simple Queue Service.
    Sqs,
    /// Simple Notification Service.
    Sns,
}

impl Service {
    const ALL: [Self; 3] = [Self::S3, Self::Sqs, Self::Sns];

    /// As endpoints and signatures have it.
    fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Sqs => "sqs",
            Self::Sns => "sns",
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_ascii_uppercase())
    }
}

/// Where a service, or each of them, is to be found: `[SERVICE=]http[s]://HOST[:PORT]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `None`: all that have none of their own.
    service: Option<Service>,
    /// Without a slash at its end.
    url: String,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Service::ALL.into_iter().find_map(|service| {
            let url = text.strip_prefix(service.name())?.strip_prefix('=')?;
            Some((Some(service), url))
        });
        let (service, url) = named.unwrap_or((None, text));
        let plain = |url: &Uri| {
            matches!(url.scheme_str(), Some("http" | "https"))
                && url.host().is_some_and(|host| !host.is_empty())
                && url.path() == "/"
                && url.query().is_none()
                && !url.authority().is_some_and(|authority| authority.as_str().contains('@'))
        };
        match url.parse() {
            Ok(parsed) if plain(&parsed) => {
                Ok(Self { service, url: url.trim_end_matches('/').to_owned() })
            }
            _ => Err(format!(
                "{text:?} is no endpoint; one looks like http://127.0.0.1:9000 or \
                 s3=https://storage.example.com"
            )),
        }
    }
}

/// What requests are signed with.
pub struct AccessKey {
    /// Its id.
    pub id: String,
    /// Its secret.
    pub secret: String,
    /// What comes with one that is good for a while only.
    pub token: Option<String>,
}

impl AccessKey {
    /// The one in the environment, in the variables that all of AWS's tools read.
    pub fn from_environment() -> Option<Self> {
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        Some(Self {
            id: variable("AWS_ACCESS_KEY_ID")?,
            secret: variable("AWS_SECRET_ACCESS_KEY")?,
            token: variable("AWS_SESSION_TOKEN"),
        })
    }
}

/// Why a request has not done what it should.
#[derive(Debug, thiserror::Error)]
pub enum AwsError {
    /// There is nothing to sign it with.
    #[error(
        "firnd has no credentials for {0}: start it with AWS_ACCESS_KEY_ID and \
         AWS_SECRET_ACCESS_KEY in its environment"
    )]
    NoCredentials(Service),
    /// No answer, or half of one.
    #[error("{service} can't be reached: {reason}")]
    Unreachable {
        /// Which service.
        service: Service,
        /// Why.
        reason: String,
    },
    /// The service says no.
    #[error("{service} answered {status} {code}: {message}")]
    Refused {
        /// Which service.
        service: Service,
        /// Status code.
        status: StatusCode,
        /// Name of its error.
        code: String,
        /// In its words.
        message: String,
    },
    /// The object is larger than it may be.
    #[error("the object has more than {limit} bytes")]
    TooLarge {
        /// Most bytes.
        limit: u64,
    },
}

/// A text that goes with a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute {
    /// Its name.
    pub name: String,
    /// `String` or `Number`.
    pub kind: String,
    /// Its value.
    pub value: String,
}

/// A queue or topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipient {
    /// What takes messages for it.
    pub service: Service,
    /// What it is called by.
    pub arn: String,
    region: String,
    account: String,
    name: String,
}

impl Recipient {
    /// Takes an ARN apart, if it is one of a queue or topic.
    pub fn parse(arn: &str) -> Option<Self> {
        let parts: Vec<&str> = arn.split(':').collect();
        // Other partitions have other hosts, and none of Firn's functions.
        let ["arn", "aws", service, region, account, name] = parts[..] else { return None };
        let service = match service {
            "sqs" => Service::Sqs,
            "sns" => Service::Sns,
            _ => return None,
        };
        let plain = is_region(region)
            && account.len() == 12
            && account.bytes().all(|b| b.is_ascii_digit())
            && (1..=NAME).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        plain.then(|| Self {
            service,
            arn: arn.to_owned(),
            region: region.to_owned(),
            account: account.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Whether it keeps messages in order, which takes what such messages don't have.
    pub fn is_fifo(&self) -> bool {
        self.name.ends_with(".fifo")
    }

    /// What a role must be allowed on it to send messages.
    pub fn action(&self) -> &'static str {
        match self.service {
            Service::Sns => "sns:Publish",
            _ => "sqs:SendMessage",
        }
    }
}

/// Sends requests.
#[derive(Debug)]
pub struct Aws {
    client: Http,
    endpoints: Vec<Endpoint>,
    /// Does not print its secret.
    identity: Option<Identity>,
    region: String,
}

/// What a request asks for.
struct Ask<'a> {
    service: Service,
    region: &'a str,
    method: &'static str,
    path_and_query: String,
    headers: &'a [(&'static str, &'static str)],
    body: Bytes,
}

impl Aws {
    /// Requests to `endpoints`, or to AWS's own, from `region` where a request does not say. Certificates are
    /// checked against those that the system trusts.
    pub fn new(endpoints: Vec<Endpoint>, region: String, key: Option<AccessKey>) -> Self {
        let identity = key.map(|AccessKey { id, secret, token }| {
            Credentials::new(id, secret, token, None, "firnd").into()
        });
        Self { client: client::http(), endpoints, identity, region }
    }

    /// An object of at most `limit` bytes.
    ///
    /// # Errors
    /// Any [`AwsError`].
    pub async fn get_object(
        &self,
        bucket: &str,
        key: &str,
        version: Option<&str>,
        limit: u64,
    ) -> Result<Vec<u8>, AwsError> {
        let mut path_and_query = object_path(bucket, key);
        if let Some(version) = version {
            path_and_query += &format!("?versionId={}", encode(version));
        }
        let service = Service::S3;
        let ask = Ask {
            service,
            region: &self.region,
            method: "GET",
            path_and_query,
            headers: &[],
            body: Bytes::new(),
        };
        body(service, self.send(ask).await?, limit).await
    }

    /// Puts an object of gzip-compressed JSON into a bucket. When this returns, it is there.
    ///
    /// # Errors
    /// Any [`AwsError`].
    pub async fn put_object(
        &self,
        bucket: &str,
        key: &str,
        content: Bytes,
    ) -> Result<(), AwsError> {
        let service = Service::S3;
        let ask = Ask {
            service,
            region: &self.region,
            method: "PUT",
            path_and_query: object_path(bucket, key),
            headers: &[("content-type", "application/json"), ("content-encoding", "gzip")],
            body: content,
        };
        body(service, self.send(ask).await?, ANSWER).await.map(drop)
    }

    /// Whether requests can be signed.
    ///
    /// # Errors
    /// [`AwsError::NoCredentials`].
    pub fn ready(&self, service: Service) -> Result<(), AwsError> {
        self.identity.as_ref().map(drop).ok_or(AwsError::NoCredentials(service))
    }

    /// Gives a message to a queue, or publishes it on a topic. When this returns, it was accepted.
    ///
    /// # Errors
    /// Any [`AwsError`].
    pub async fn deliver(
        &self,
        to: &Recipient,
        message: &str,
        attributes: &[Attribute],
    ) -> Result<(), AwsError> {
        let (headers, body): (&[_], String) = match to.service {
            Service::Sns => (
                &[("content-type", "application/x-www-form-urlencoded")],
                publication(to, message, attributes),
            ),
            _ => (
                &[
                    ("content-type", "application/x-amz-json-1.0"),
                    ("x-amz-target", "AmazonSQS.SendMessage"),
                ],
                self.submission(to, message, attributes),
            ),
        };
        let ask = Ask {
            service: to.service,
            region: &to.region,
            method: "POST",
            path_and_query: "/".into(),
            headers,
            body: body.into(),
        };
        self::body(to.service, self.send(ask).await?, ANSWER).await.map(drop)
    }

    /// The input of SendMessage.
    fn submission(&self, to: &Recipient, message: &str, attributes: &[Attribute]) -> String {
        let Recipient { region, account, name, .. } = to;
        let url = format!("{}/{account}/{name}", self.endpoint(Service::Sqs, region));
        let attributes: serde_json::Map<_, _> = attributes
            .iter()
            .map(|Attribute { name, kind, value }| {
                (name.clone(), json!({"DataType": kind, "StringValue": value}))
            })
            .collect();
        let mut input = json!({"QueueUrl": url, "MessageBody": message});
        if !attributes.is_empty() {
            input["MessageAttributes"] = attributes.into();
        }
        input.to_string()
    }

    fn endpoint(&self, service: Service, region: &str) -> String {
        // The last one counts, as with any flag.
        let set = |wanted: Option<Service>| {
            self.endpoints.iter().rev().find(|endpoint| endpoint.service == wanted)
        };
        match set(Some(service)).or_else(|| set(None)) {
            Some(endpoint) => endpoint.url.clone(),
            None => format!("https://{}.{region}.amazonaws.com", service.name()),
        }
    }

    /// Sends a signed request; gives a response that is one of success.
    async fn send(&self, ask: Ask<'_>) -> Result<Response<Incoming>, AwsError> {
        let service = ask.service;
        let unreachable = |reason: String| AwsError::Unreachable { service, reason };
        let request = self.sign(ask)?;
        let response = match tokio::time::timeout(HEAD, self.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(unreachable(causes(&error))),
            Err(_) => return Err(unreachable(format!("no answer within {} s", HEAD.as_secs()))),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        // What it says is a help, not a must.
        let said = body(service, response, ANSWER).await.unwrap_or_default();
        let (code, message) = explanation(&String::from_utf8_lossy(&said));
        let code = code.unwrap_or_else(|| status.canonical_reason().unwrap_or("").to_owned());
        Err(AwsError::Refused { service, status, code, message })
    }

    fn sign(&self, ask: Ask<'_>) -> Result<Request<Full<Bytes>>, AwsError> {
        let Ask { service, region, method, path_and_query, headers, body } = ask;
        let identity = self.identity.as_ref().ok_or(AwsError::NoCredentials(service))?;
        let failed = |error: &dyn Error| AwsError::Unreachable { service, reason: causes(error) };
        let url = format!("{}{path_and_query}", self.endpoint(service, region));
        let mut settings = SigningSettings::default();
        if service == Service::S3 {
            // S3 signs paths as they are sent, and wants the body's hash in the head.
            settings.percent_encoding_mode = PercentEncodingMode::Single;
            settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
            settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        }
        let parameters = SigningParams::builder()
            .identity(identity)
            .region(region)
            .name(service.name())
            .time(SystemTime::now())
            .settings(settings)
            .build()
            .map_err(|error| failed(&error))?
            .into();
        let signable =
            SignableRequest::new(method, &url, headers.iter().copied(), SignableBody::Bytes(&body));
        let signable = signable.map_err(|error| failed(&error))?;
        let signed = sign(signable, &parameters).map_err(|error| failed(&error))?;
        let mut request = Request::builder().method(method).uri(&url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request = request.header(header::USER_AGENT, concat!("firnd/", env!("CARGO_PKG_VERSION")));
        let mut request = request.body(Full::new(body)).map_err(|error| failed(&error))?;
        signed.into_parts().0.apply_to_request_http1x(&mut request);
        Ok(request)
    }
}

/// The input of Publish.
fn publication(to: &Recipient, message: &str, attributes: &[Attribute]) -> String {
    let mut form = vec![
        ("Action".to_owned(), "Publish"),
        ("Version".to_owned(), "2010-03-31"),
        ("TopicArn".to_owned(), to.arn.as_str()),
        ("Message".to_owned(), message),
    ];
    for (number, Attribute { name, kind, value }) in (1..).zip(attributes) {
        let entry = format!("MessageAttributes.entry.{number}");
        form.push((format!("{entry}.Name"), name));
        form.push((format!("{entry}.Value.DataType"), kind));
        form.push((format!("{entry}.Value.StringValue"), value));
    }
    serde_urlencoded::to_string(form).unwrap_or_default()
}

/// What can be the name of a bucket.
pub fn is_bucket(text: &str) -> bool {
    (3..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !text.ends_with('.')
}

/// The path of an object, its bucket first.
fn object_path(bucket: &str, key: &str) -> String {
    let key: Vec<String> = key.split('/').map(encode).collect();
    format!("/{}/{}", encode(bucket), key.join("/"))
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, &RESERVED).to_string()
}

/// The whole body, of at most `limit` bytes.
async fn body(
    service: Service,
    response: Response<Incoming>,
    limit: u64,
) -> Result<Vec<u8>, AwsError> {
    let announced = response.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|n| n.to_str().ok()).and_then(|n| n.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(AwsError::TooLarge { limit });
    }
    let unreachable = |reason: String| AwsError::Unreachable { service, reason };
    let mut body = response.into_body();
    let read = async {
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0) as usize);
        loop {
            let frame = tokio::time::timeout(STALL, body.frame()).await;
            let frame = frame
                .map_err(|_| unreachable(format!("nothing came for {} s", STALL.as_secs())))?;
            let Some(frame) = frame else { return Ok(bytes) };
            let frame = frame.map_err(|error| unreachable(causes(&error)))?;
            let Some(data) = frame.data_ref() else { continue };
            if (bytes.len() + data.len()) as u64 > limit {
                return Err(AwsError::TooLarge { limit });
            }
            bytes.extend_from_slice(data);
        }
    };
    let late = |_| unreachable(format!("not done within {} s", BODY.as_secs()));
    tokio::time::timeout(BODY, read).await.map_err(late)?
}

/// Name and message in a service's error: SQS answers in JSON, the others in XML.
fn explanation(said: &str) -> (Option<String>, String) {
    let short = |text: &str| text.chars().take(SHOWN).collect::<String>();
    if let Ok(json) = serde_json::from_str::<serde_json::Value>(said) {
        let text = |name: &str| json[name].as_str();
        let code = text("__type").map(|code| short(code.rsplit('#').next().unwrap_or_default()));
        return (code, short(text("message").or(text("Message")).unwrap_or_default()));
    }
    let between = |name: &str| {
        let (_, rest) = said.split_once(&format!("<{name}>"))?;
        Some(short(rest.split_once(&format!("</{name}>"))?.0))
    };
    (between("Code"), between("Message").unwrap_or_default())
}

/// An error and what it comes from, in one line.
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{fake::Fake, *};

    #[tokio::test]
    async fn objects_are_fetched_whole_with_requests_that_verify() {
        let fake = Fake::start().await;
        let aws = fake.aws();
        // Whatever S3 allows in keys arrives as it is.
        for key in ["code.zip", "a/b c/ü+&=?#%2F.zip", "a//b", "~-_.'()*!"] {
            fake.put("bucket", key, b"PK1");
            assert_eq!(aws.get_object("bucket", key, None, 3).await.unwrap(), b"PK1", "{key}");
        }
        fake.put("bucket", "code.zip?versionId=a+b/c", b"PK2");
        let old = aws.get_object("bucket", "code.zip", Some("a+b/c"), 9).await;
        assert_eq!(old.unwrap(), b"PK2");
        assert_eq!(fake.refused(), 0, "every signature was right");
    }

    #[tokio::test]
    async fn what_goes_wrong_is_told_apart() {
        let fake = Fake::start().await;
        let aws = fake.aws();
        fake.put("bucket", "large", &[7; 100]);
        let error = aws.get_object("bucket", "large", None, 99).await.unwrap_err();
        assert!(matches!(error, AwsError::TooLarge { limit: 99 }), "{error}");
        // A length that nobody announced.
        fake.put("bucket", "chunked", &[7; 100]);
        let error = aws.get_object("bucket", "chunked", None, 99).await.unwrap_err();
        assert!(matches!(error, AwsError::TooLarge { limit: 99 }), "{error}");
        let error = aws.get_object("bucket", "none", None, 99).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "S3 answered 404 Not Found NoSuchKey: The specified key does not exist."
        );
        fake.put("bucket", "cut", &[7; 100]);
        let error = aws.get_object("bucket", "cut", None, 999).await.unwrap_err();
        assert!(matches!(error, AwsError::Unreachable { .. }), "{error}");
        let wrong = AccessKey { secret: "wrong".into(), ..fake::key() };
        let other = Aws::new(vec![fake.endpoint()], "us-east-1".into(), Some(wrong));
        let error = other.get_object("bucket", "large", None, 999).await.unwrap_err();
        assert!(error.to_string().contains("403 Forbidden SignatureDoesNotMatch"), "{error}");
        let nobody = Aws::new(vec![fake.endpoint()], "us-east-1".into(), None);
        let error = nobody.get_object("bucket", "large", None, 999).await.unwrap_err();
        assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
        let nowhere = vec!["http://127.0.0.1:1".parse().unwrap()];
        let nowhere = Aws::new(nowhere, "us-east-1".into(), Some(fake::key()));
        let error = nowhere.get_object("bucket", "large", None, 999).await.unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
    }

    #[test]
    fn endpoints_are_hosts_and_the_last_one_counts() {
        let parse = |text: &str| text.parse::<Endpoint>();
        for bad in [
            "",
            "127.0.0.1:9000",
            "ftp://x",
            "http://",
            "http://x/y",
            "http://x/?y",
            "http://a@x",
            "ec2=http://x",
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains("looks like"), "{error}");
        }
        let set = |all: &[&str]| {
            let endpoints = all.iter().map(|text| parse(text).unwrap()).collect();
            Aws::new(endpoints, "us-east-1".into(), None).endpoint(Service::S3, "eu-west-1")
        };
        assert_eq!(set(&[]), "https://s3.eu-west-1.amazonaws.com");
        assert_eq!(set(&["http://x", "http://y:1/"]), "http://y:1");
        assert_eq!(set(&["s3=https://x", "http://y"]), "https://x");
    }

    #[tokio::test]
    async fn messages_arrive_with_their_attributes_at_queues_and_topics() {
        let fake = Fake::start().await;
        let aws = fake.aws();
        let attribute = |name: &str, kind: &str, value: &str| Attribute {
            name: name.into(),
            kind: kind.into(),
            value: value.into(),
        };
        let attributes =
            [attribute("ErrorCode", "Number", "200"), attribute("ErrorMessage", "String", "ü&=+%")];
        for arn in ["arn:aws:sqs:eu-west-1:123456789012:q", "arn:aws:sns:eu-west-1:123456789012:t"]
        {
            let to = Recipient::parse(arn).unwrap();
            aws.deliver(&to, "{\"a\": \"ü &=+%\"}", &attributes).await.unwrap();
            aws.deliver(&to, "plain", &[]).await.unwrap();
            let [first, second] = &fake.take(arn)[..] else { panic!("not two") };
            assert_eq!(first.body, "{\"a\": \"ü &=+%\"}");
            assert_eq!(
                first.attributes,
                json!({"ErrorCode": ["Number", "200"],
                "ErrorMessage": ["String", "ü&=+%"]})
            );
            assert_eq!((second.body.as_str(), &second.attributes), ("plain", &json!({})));
        }
        assert_eq!(fake.refused(), 0, "every signature was right");
        fake.fail("q", 400, "QueueDoesNotExist");
        let to = Recipient::parse("arn:aws:sqs:us-east-1:123456789012:q").unwrap();
        let error = aws.deliver(&to, "x", &[]).await.unwrap_err();
        assert_eq!(error.to_string(), "SQS answered 400 Bad Request QueueDoesNotExist: No.");
    }

    #[test]
    fn recipients_are_queues_and_topics_of_aws() {
        for (arn, fifo) in [
            ("arn:aws:sqs:us-east-1:123456789012:q", false),
            ("arn:aws:sns:us-gov-west-1:123456789012:t.fifo", true),
        ] {
            assert_eq!(Recipient::parse(arn).unwrap().is_fifo(), fifo);
        }
        for arn in [
            "arn:aws:lambda:us-east-1:123456789012:function:f",
            "arn:aws-cn:sqs:cn-north-1:123456789012:q",
            "arn:aws:sqs:evil.example/:123456789012:q",
            "arn:aws:sqs:us-east-1:12345678901:q",
            "arn:aws:sqs:us-east-1:123456789012:",
            "arn:aws:sqs:us-east-1:123456789012:a/b",
            "arn:aws:sns:us-east-1:123456789012:t:subscription",
        ] {
            assert_eq!(Recipient::parse(arn), None, "{arn}");
        }
    }

    #[test]
    fn access_keys_do_not_print() {
        let key =
            AccessKey { secret: "planted".into(), token: Some("planted".into()), ..fake::key() };
        let aws = Aws::new(Vec::new(), "us-east-1".into(), Some(key));
        assert!(!format!("{aws:?} {aws:#?}").contains("planted"));
    }
}
