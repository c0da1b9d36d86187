//! S3, SQS and SNS on loopback, as far as tests need them. They check every signature by themselves.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{Response, StatusCode, request::Parts},
};
use bytes::Bytes;
use hmac::{Hmac, Mac};
use http_body_util::BodyExt;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{AccessKey, Aws, Endpoint};
use crate::identity::sigv4::hex;

/// The key that everything must be signed with.
pub fn key() -> AccessKey {
    AccessKey { id: "AKIDFAKE".into(), secret: "of a fake".into(), token: Some("t".into()) }
}

/// The services.
pub struct Fake {
    address: SocketAddr,
    state: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By bucket and key.
    objects: Mutex<BTreeMap<String, Bytes>>,
    messages: Mutex<Vec<Message>>,
    /// Status and error that queues, topics and buckets answer, by their names.
    failing: Mutex<BTreeMap<String, (u16, String)>>,
    refused: AtomicUsize,
}

/// What a queue or topic was given.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its ARN.
    pub to: String,
    /// What it says.
    pub body: String,
    /// Kind and value by name.
    pub attributes: Value,
}

impl Fake {
    /// Starts them on a port of their own, for as long as the runtime is there.
    pub async fn start() -> Self {
        let state = Arc::new(Inner::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state }
    }

    /// Where they are.
    pub fn endpoint(&self) -> Endpoint {
        format!("http://{}", self.address).parse().unwrap()
    }

    /// Who asks them.
    pub fn aws(&self) -> Aws {
        Aws::new(vec![self.endpoint()], "us-east-1".into(), Some(key()))
    }

    /// Puts an object into a bucket, and makes that.
    pub fn put(&self, bucket: &str, key: &str, content: &[u8]) {
        let content = Bytes::copy_from_slice(content);
        self.state.objects.lock().unwrap().insert(format!("{bucket}/{key}"), content);
    }

    /// Objects whose names begin so, bucket first, without the bucket's.
    pub fn objects(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let objects = self.state.objects.lock().unwrap();
        let found = objects.iter().filter(|(name, _)| name.starts_with(prefix));
        let key = |name: &str| name.split_once('/').unwrap().1.to_owned();
        found.map(|(name, content)| (key(name), content.to_vec())).collect()
    }

    /// What a queue or topic was given since it was last asked.
    pub fn take(&self, arn: &str) -> Vec<Message> {
        let mut messages = self.state.messages.lock().unwrap();
        let (taken, left) = messages.drain(..).partition(|message| message.to == arn);
        *messages = left;
        taken
    }

    /// Has a queue, topic or bucket refuse what it is asked; with the status 200 no longer.
    pub fn fail(&self, name: &str, status: u16, code: &str) {
        self.state.failing.lock().unwrap().insert(name.into(), (status, code.into()));
    }

    /// Requests that were refused because of their signature.
    pub fn refused(&self) -> usize {
        self.state.refused.load(Ordering::SeqCst)
    }
}

async fn answer(State(state): State<Arc<Inner>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    if signature(&parts, &body).is_none_or(|(said, right)| said != right) {
        state.refused.fetch_add(1, Ordering::SeqCst);
        return s3_error(
            StatusCode::FORBIDDEN,
            "SignatureDoesNotMatch",
            "Your signature is wrong.",
        );
    }
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    match header("content-type") {
        Some("application/x-amz-json-1.0") => sqs(&state, &parts, &body),
        Some("application/x-www-form-urlencoded") => sns(&state, &parts, &body),
        _ => s3(&state, &parts, body),
    }
}

fn sqs(state: &Inner, parts: &Parts, body: &[u8]) -> Response<Body> {
    assert_eq!(parts.headers["x-amz-target"], "AmazonSQS.SendMessage");
    let input: Value = serde_json::from_slice(body).unwrap();
    let url: Vec<&str> = input["QueueUrl"].as_str().unwrap().rsplit('/').collect();
    let attributes = input["MessageAttributes"].as_object().cloned().unwrap_or_default();
    let message = Message {
        to: format!("arn:aws:sqs:{}:{}:{}", region(parts), url[1], url[0]),
        body: input["MessageBody"].as_str().unwrap().into(),
        attributes: attributes
            .into_iter()
            .map(|(name, value)| (name, json!([value["DataType"], value["StringValue"]])))
            .collect(),
    };
    match state.accept(message) {
        Ok(()) => Response::new(Body::from(r#"{"MessageId": "1"}"#)),
        Err((status, code)) => {
            let body = json!({"__type": format!("com.amazonaws.sqs#{code}"), "message": "No."});
            error(status, body.to_string())
        }
    }
}

fn sns(state: &Inner, parts: &Parts, body: &[u8]) -> Response<Body> {
    let form: BTreeMap<String, String> = serde_urlencoded::from_bytes(body).unwrap();
    assert_eq!((form["Action"].as_str(), form["Version"].as_str()), ("Publish", "2010-03-31"));
    assert_eq!(form["TopicArn"].split(':').nth(3), Some(region(parts)));
    let attributes = (1..).map_while(|number| {
        let part = |part: &str| form.get(&format!("MessageAttributes.entry.{number}.{part}"));
        Some((part("Name")?.clone(), json!([part("Value.DataType"), part("Value.StringValue")])))
    });
    let message = Message {
        to: form["TopicArn"].clone(),
        body: form["Message"].clone(),
        attributes: attributes.collect(),
    };
    match state.accept(message) {
        Ok(()) => Response::new(Body::from("<PublishResponse/>")),
        Err((status, code)) => {
            let error_of = format!("<Code>{code}</Code><Message>No.</Message>");
            error(status, format!("<ErrorResponse><Error>{error_of}</Error></ErrorResponse>"))
        }
    }
}

/// The region that a request is signed for.
fn region(parts: &Parts) -> &str {
    parts.headers["authorization"].to_str().unwrap().split('/').nth(2).unwrap()
}

impl Inner {
    fn accept(&self, message: Message) -> Result<(), (u16, String)> {
        let name = message.to.rsplit(':').next().unwrap_or_default();
        match self.failure(name) {
            Some(failure) => Err(failure),
            None => {
                self.messages.lock().unwrap().push(message);
                Ok(())
            }
        }
    }

    fn failure(&self, name: &str) -> Option<(u16, String)> {
        let failing = self.failing.lock().unwrap();
        failing.get(name).filter(|(status, _)| *status != 200).cloned()
    }
}

fn s3(state: &Inner, parts: &Parts, body: Bytes) -> Response<Body> {
    let decode = |text| percent_decode_str(text).decode_utf8().unwrap().into_owned();
    let mut name = decode(&parts.uri.path()[1..]);
    if let Some(query) = parts.uri.query() {
        name += &format!("?{}", decode(query));
    }
    let bucket = name.split('/').next().unwrap_or_default();
    if let Some((status, code)) = state.failure(bucket) {
        return s3_error(StatusCode::from_u16(status).unwrap(), &code, "No.");
    }
    let mut objects = state.objects.lock().unwrap();
    if parts.method == "PUT" {
        assert_eq!(parts.headers["content-encoding"], "gzip");
        objects.insert(name, body);
        return Response::default();
    }
    let Some(content) = objects.get(&name).cloned() else {
        return match objects.keys().any(|known| known.starts_with(&format!("{bucket}/"))) {
            true => {
                s3_error(StatusCode::NOT_FOUND, "NoSuchKey", "The specified key does not exist.")
            }
            false => s3_error(
                StatusCode::NOT_FOUND,
                "NoSuchBucket",
                "The specified bucket does not exist",
            ),
        };
    };
    if name.contains("denied") {
        return s3_error(StatusCode::FORBIDDEN, "AccessDenied", "Access Denied");
    }
    if name.contains("elsewhere") {
        let message = "The bucket is in this region: eu-west-1.";
        return s3_error(StatusCode::MOVED_PERMANENTLY, "PermanentRedirect", message);
    }
    if name.contains("down") {
        return s3_error(StatusCode::SERVICE_UNAVAILABLE, "SlowDown", "Please reduce your rate.");
    }
    let end = if name.ends_with("cut") {
        Err(std::io::Error::other("cut off"))
    } else if name.ends_with("chunked") {
        Ok(Bytes::new())
    } else {
        return Response::new(Body::from(content));
    };
    // In pieces, without saying how many.
    let pieces = futures_util::stream::iter([Ok(content), end]);
    Response::new(Body::from_stream(pieces))
}

fn s3_error(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}\
         </Message><RequestId>1</RequestId></Error>"
    );
    error(status.as_u16(), body)
}

fn error(status: u16, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

/// The signature that a request has, and the one that it should have. Paths count as they were sent, as in S3;
/// those of other services have nothing in them that could be encoded.
fn signature(parts: &Parts, body: &[u8]) -> Option<(String, String)> {
    let header = |name: &str| parts.headers.get(name)?.to_str().ok();
    let authorization = header("authorization")?.strip_prefix("AWS4-HMAC-SHA256 ")?;
    let part = |name: &str| authorization.split(", ").find_map(|part| part.strip_prefix(name));
    let (credential, signed, said) =
        (part("Credential=")?, part("SignedHeaders=")?, part("Signature=")?);
    let (id, scope) = credential.split_once('/')?;
    let hash = hex(&Sha256::digest(body));
    let named = header("x-amz-content-sha256");
    let right = id == key().id
        && header("x-amz-security-token") == key().token.as_deref()
        && named.is_none_or(|named| named == hash)
        && (named.is_some() || !scope.contains("/s3/"))
        && signed.split(';').any(|name| name == "host");
    let mut query: Vec<&str> = parts.uri.query().map_or(Vec::new(), |q| q.split('&').collect());
    query.sort_unstable();
    let mut canonical = format!("{}\n{}\n{}\n", parts.method, parts.uri.path(), query.join("&"));
    for name in signed.split(';') {
        canonical += &format!("{name}:{}\n", header(name)?.trim());
    }
    canonical += &format!("\n{signed}\n{hash}");
    let mac = |key: &[u8], text: &str| {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
        mac.update(text.as_bytes());
        mac.finalize().into_bytes().to_vec()
    };
    let secret = format!("AWS4{}", key().secret).into_bytes();
    let signing = scope.split('/').fold(secret, |key, part| mac(&key, part));
    let (date, canonical) = (header("x-amz-date")?, hex(&Sha256::digest(canonical)));
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{canonical}");
    right.then(|| (said.to_owned(), hex(&mac(&signing, &text))))
}
