//! What every request passes before its handler acts: who is it from, and may they?
//!
//! A signature is over the whole request, its body included, and most clients don't name the body's hash in
//! the head. So the body is hashed as its handler reads it, and the last thing that the handler reads is
//! the verdict: it gets the end of the body, or the refusal. Handlers with a body read it before they do
//! anything else; for the others the gate does.

use std::{
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context as Task, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{Method, Response, header, request::Parts},
    middleware::Next,
    response::IntoResponse,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    App, BROKEN,
    error::ApiError,
    layers,
    names::Reference,
    operations::{INVOKE_URL, Kind, On, Operation},
    read_body,
    recorded::{Draft, MAX_BODY},
    services,
};
use crate::{
    attachments::UrlAuth,
    audit::{Audit, Unwritten},
    backend::Backend,
    identity::{
        Credentials, Identity, Principal,
        policy::{self, Caller, Context, Decision, Policy},
        role_id,
        sessions::Sessions,
        sigv4::{AuthError, Claim},
    },
    serve::Peer,
    store::Store,
};

/// Most bytes of a body that nobody reads.
const UNREAD: usize = 64 << 10;

/// How long a link to code is good for.
const LINK: Duration = Duration::from_secs(600);

/// Services for which requests to `/` may be signed.
const SERVICES: [&str; 6] = ["kms", "lambda", "logs", "monitoring", "sts", "xray"];

/// Who may call, and what they have called.
#[derive(Debug)]
pub struct Callers {
    /// None: development mode, in which everybody may do everything.
    pub identity: Option<Arc<Identity>>,
    /// Temporary credentials.
    pub sessions: Sessions,
    /// The audit trail.
    pub audit: Arc<Audit>,
}

impl Callers {
    fn find(
        &self,
        identity: &Identity,
        claim: &Claim,
        now: OffsetDateTime,
    ) -> Result<Credentials, AuthError> {
        identity.find(&self.sessions, &claim.key_id, claim.token.as_deref(), now)
    }
}

/// What a gate needs to know.
pub struct Gate<B: Backend> {
    app: Arc<App<B>>,
    operation: &'static Operation,
}

impl<B: Backend> Clone for Gate<B> {
    fn clone(&self) -> Self {
        Self { app: self.app.clone(), operation: self.operation }
    }
}

impl<B: Backend> Gate<B> {
    /// The gate before one operation.
    pub fn new(app: &Arc<App<B>>, operation: &'static Operation) -> Self {
        Self { app: app.clone(), operation }
    }
}

/// What is known of who sent a request; every handler can have it as an extension.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    /// None: development mode, in which everything is allowed.
    identity: Option<Arc<Identity>>,
    store: Arc<Store>,
    context: Context,
    /// The id of the access key that the request names, whosoever it is.
    claimed: OnceLock<String>,
    principal: OnceLock<Arc<Principal>>,
    /// What the request is on.
    resource: OnceLock<String>,
}

impl Session {
    /// Of a request of which nothing is known yet.
    pub fn new<B: Backend>(app: &App<B>, parts: &Parts) -> Self {
        let unused = || (OnceLock::new(), OnceLock::new(), OnceLock::new());
        let (store, (claimed, principal, resource)) = (app.store.clone(), unused());
        let Some(identity) = app.callers.identity.clone() else {
            let context = Context::default();
            let identity = None;
            return Self(Arc::new(Inner {
                identity,
                store,
                context,
                claimed,
                principal,
                resource,
            }));
        };
        let mut context = Context::default();
        let now = OffsetDateTime::now_utc();
        context.set("aws:CurrentTime", now.format(&Rfc3339).unwrap_or_default());
        context.set("aws:EpochTime", now.unix_timestamp().to_string());
        context.set("aws:SecureTransport", "false");
        context.set("aws:RequestedRegion", &app.place.region);
        if let Some(address) = source(parts) {
            context.set("aws:SourceIp", address.to_string());
        }
        let agent = parts.headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
        if let Some(agent) = agent {
            context.set("aws:UserAgent", agent);
        }
        let identity = Some(identity);
        Self(Arc::new(Inner { identity, store, context, claimed, principal, resource }))
    }

    /// Of a request that has passed its gate.
    ///
    /// # Errors
    /// It has not: the daemon's fault.
    pub fn of(request: &Request) -> Result<Self, ApiError> {
        let session = request.extensions().get::<Self>().cloned();
        session.ok_or_else(|| ApiError::Service("the request has passed no gate".into()))
    }

    /// Whether the caller may do `action` on `resource`.
    ///
    /// # Errors
    /// [`ApiError::AccessDenied`].
    pub fn may(&self, action: &str, resource: &str) -> Result<(), ApiError> {
        self.may_with(action, resource, |_| ())
    }

    /// The same, where more is known of the request than its head says.
    ///
    /// # Errors
    /// [`ApiError::AccessDenied`].
    pub fn may_with(
        &self,
        action: &str,
        resource: &str,
        describe: impl FnOnce(&mut Context),
    ) -> Result<(), ApiError> {
        if resource.starts_with("arn:") {
            let _ = self.0.resource.set(resource.to_owned());
        }
        let mut context = self.0.context.clone();
        if action.starts_with("lambda:") && resource.split(':').nth(5) != Some("layer") {
            context.set("lambda:FunctionArn", resource);
        }
        describe(&mut context);
        self.may_in(action, resource, context)
    }

    /// Whether the caller may act in a role.
    ///
    /// # Errors
    /// [`ApiError::AccessDenied`]
    pub fn may_assume(
        &self,
        role: &str,
        describe: impl FnOnce(&mut Context),
    ) -> Result<(), ApiError> {
        const ACTION: &str = "sts:AssumeRole";
        let _ = self.0.resource.set(role.to_owned());
        let Some(identity) = &self.0.identity else { return Ok(()) };
        let principal = self.known(ACTION)?;
        let mut context = self.0.context.clone();
        describe(&mut context);
        principal.describe(&mut context);
        let caller = &principal.caller;
        let request = policy::Request { caller, action: ACTION, resource: role, context: &context };
        let own = policy::evaluate(&*principal.policies, &request);
        match identity.may_assume(role, caller, &context, own) {
            true => Ok(()),
            false => Err(ApiError::AccessDenied(format!(
                "User: {} is not authorized to perform: {ACTION} on resource: {role}",
                principal.arn
            ))),
        }
    }

    /// Whether the caller may give a function this role, and the role may be a function's.
    ///
    /// # Errors
    /// [`ApiError::AccessDenied`]; [`ApiError::InvalidParameterValue`] if Lambda can't assume it.
    pub fn pass_role(&self, role: &str) -> Result<(), ApiError> {
        const LAMBDA: &str = "lambda.amazonaws.com";
        let Some(identity) = &self.0.identity else { return Ok(()) };
        let mut context = self.0.context.clone();
        context.set("iam:PassedToService", LAMBDA);
        self.may_in("iam:PassRole", role, context)?;
        match identity.trusts(role, LAMBDA) {
            true => Ok(()),
            false => Err(ApiError::InvalidParameterValue(
                "The role defined for the function cannot be assumed by Lambda.".into(),
            )),
        }
    }

    /// Whether a function with this role may do `action` on `resource`, as far as that can be told now.
    ///
    /// # Errors
    /// [`ApiError::InvalidParameterValue`].
    pub fn role_may(&self, role: &str, action: &str, resource: &str) -> Result<(), ApiError> {
        let Some(identity) = &self.0.identity else { return Ok(()) };
        let (caller, decision) = identity.role_may(role, action, resource);
        let context = &Context::default();
        let request = policy::Request { caller: &caller, action, resource, context };
        let allowed = match decision {
            Decision::Allowed => true,
            Decision::Denied => false,
            Decision::Unmentioned => {
                let own = self.resource_policy(resource)?;
                own.is_some_and(|policy| policy.decide(&request) == Decision::Allowed)
            }
        };
        let (_, name) = action.split_once(':').unwrap_or_default();
        match allowed {
            true => Ok(()),
            false => Err(ApiError::InvalidParameterValue(format!(
                "The function's execution role does not have permissions to call {name} on {resource}"
            ))),
        }
    }

    fn may_in(&self, action: &str, resource: &str, mut context: Context) -> Result<(), ApiError> {
        if self.0.identity.is_none() {
            return Ok(());
        }
        let principal = self.known(action)?;
        principal.describe(&mut context);
        let request =
            policy::Request { caller: &principal.caller, action, resource, context: &context };
        let mut why = match policy::evaluate(&*principal.policies, &request) {
            Decision::Allowed => return Ok(()),
            Decision::Denied => "with an explicit deny in an identity-based policy".to_owned(),
            Decision::Unmentioned => {
                format!("because no identity-based policy allows the {action} action")
            }
        };
        // AddPermission makes statements that allow, so these can't deny what was allowed above.
        if why.starts_with("because") {
            match self.resource_policy(resource)?.map(|policy| policy.decide(&request)) {
                Some(Decision::Allowed) => return Ok(()),
                Some(Decision::Denied) => {
                    why = "with an explicit deny in a resource-based policy".into();
                }
                _ => {}
            }
        }
        Err(ApiError::AccessDenied(format!(
            "User: {} is not authorized to perform: {action} on resource: {resource} {why}",
            principal.arn
        )))
    }

    fn known(&self, action: &str) -> Result<&Principal, ApiError> {
        self.principal().ok_or_else(|| {
            ApiError::Service(format!("{action} was asked for before it was known by whom"))
        })
    }

    /// The policy of a function by the qualifier that its ARN ends with, or of a layer version.
    fn resource_policy(&self, arn: &str) -> Result<Option<Policy>, ApiError> {
        if !arn.starts_with("arn:aws:lambda:") {
            return Ok(None);
        }
        let document = match layers::version_arn(arn) {
            Some(version) => layers::policy::of(&self.0.store, arn, &version),
            None => {
                let Ok(reference) = Reference::parse(arn, None) else { return Ok(None) };
                let attachments = self.0.store.attachments(&reference.name).unwrap_or_default();
                let qualifier = reference.qualifier.unwrap_or_default();
                attachments.policies.get(&qualifier).map(|policy| policy.document())
            }
        };
        let Some(document) = document else { return Ok(None) };
        let policy = Policy::parse(&document, policy::Kind::Resource);
        policy.map(Some).map_err(|e| ApiError::Service(format!("the policy of {arn}: {e}")))
    }

    /// Who it was, once that is proven.
    pub fn principal(&self) -> Option<&Principal> {
        self.0.principal.get().map(|principal| &**principal)
    }

    /// A link that leads to what `path` says for some minutes, whoever follows it.
    pub fn link(&self, path: &str) -> String {
        let Some(identity) = &self.0.identity else { return path.to_owned() };
        let end = OffsetDateTime::now_utc().unix_timestamp() + LINK.as_secs() as i64;
        let path = format!("{path}&expires={end}");
        let proof = identity.seal(&path);
        format!("{path}&proof={proof}")
    }

    /// `userIdentity` of a CloudTrail record.
    pub fn identity(&self) -> Value {
        match self.0.principal.get() {
            None => json!({ "type": "Unknown" }),
            Some(principal) => {
                let mut identity = json!({
                    "type": if principal.user.is_some() { "IAMUser" } else { "AssumedRole" },
                    "principalId": principal.id,
                    "arn": principal.arn,
                    "accountId": principal.caller.account,
                    "accessKeyId": self.0.claimed.get(),
                    "userName": principal.user,
                });
                if let Some(assumed) = &principal.session {
                    let issuer = json!({
                        "type": "Role",
                        "principalId": role_id(&assumed.role),
                        "arn": assumed.role,
                        "accountId": principal.caller.account,
                    });
                    identity["sessionContext"] = json!({ "sessionIssuer": issuer });
                }
                identity
            }
        }
    }

    /// The id of the access key that the request names, unless it is proven.
    pub fn claimed(&self) -> Option<&str> {
        let claimed = self.0.claimed.get().filter(|_| self.0.principal.get().is_none());
        claimed.map(String::as_str)
    }

    /// Whether it is a stranger's: who can send requests without end must not choose what they leave behind.
    pub fn strange(&self) -> bool {
        self.0.identity.is_some() && self.0.principal.get().is_none()
    }

    /// The ARN of what the request is on, if that is known.
    pub fn resource(&self) -> Option<&str> {
        self.0.resource.get().map(String::as_str)
    }
}

/// Lets a request through to its handler, if it may.
pub async fn pass<B: Backend>(
    State(gate): State<Gate<B>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let (mut parts, body) = request.into_parts();
    let session = Session::new(&gate.app, &parts);
    parts.extensions.insert(session.clone());
    let operation = gate.operation.meant(parts.uri.query());
    let audit = &gate.app.callers.audit;
    let recorded = match operation.kind {
        Kind::Data => audit.data_events(),
        _ => operation.on != On::Health,
    };
    if !recorded {
        return answer(&gate.app, operation, parts, body, &session, next).await;
    }
    if audit.broken() {
        return ApiError::Service(Unwritten.to_string()).into_response();
    }
    // A task of its own, which no client ends by hanging up: what is begun ends, and is recorded.
    let call = tokio::spawn(async move {
        let Gate { app, .. } = &gate;
        record(app, operation, parts, body, &session, next).await
    });
    call.await.unwrap_or_else(|error| ApiError::Service(error.to_string()).into_response())
}

/// What the handler says, and what the audit trail has of it then.
async fn record<B: Backend>(
    app: &App<B>,
    operation: &'static Operation,
    mut parts: Parts,
    body: Body,
    session: &Session,
    next: Next,
) -> Response<Body> {
    let draft = Draft::new(operation, &mut parts, &app.place).await;
    let kept = Arc::new(Mutex::new(Vec::new()));
    let body = match operation.kind {
        // Of another service only the operation is recorded.
        Kind::Write if operation.on != On::Service => Body::new(Kept { body, kept: kept.clone() }),
        _ => body,
    };
    let response = answer(app, operation, parts, body, session, next).await;
    let kept = std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
    let (record, changes, response) = draft.finish(session, &kept, response).await;
    let done = response.status().is_success();
    match app.callers.audit.add(record.to_string().into_bytes(), changes && done).await {
        Ok(()) => response,
        // It is done; that it could not be recorded must not look like success.
        Err(unwritten) => ApiError::Service(unwritten.to_string()).into_response(),
    }
}

/// What the handler says, if the request gets that far.
async fn answer<B: Backend>(
    app: &App<B>,
    operation: &'static Operation,
    mut parts: Parts,
    body: Body,
    session: &Session,
    next: Next,
) -> Response<Body> {
    let admitted = match &app.callers.identity {
        None => Ok(Admitted::Freely(body)),
        Some(identity) => admit(app, identity, operation, &mut parts, body, session).await,
    };
    match admitted {
        Err(refusal) if operation.on == On::Service => services::refuse(&parts, &refusal),
        Err(refusal) => refusal.into_response(),
        Ok(Admitted::Freely(body)) => next.run(Request::from_parts(parts, body)).await,
        Ok(Admitted::Signed(body)) => {
            let response = next.run(Request::from_parts(parts, body)).await;
            match session.0.principal.get() {
                None if response.status().is_success() => {
                    let fault =
                        format!("{} was answered before it was known to whom", operation.action);
                    ApiError::Service(fault).into_response()
                }
                _ => response,
            }
        }
    }
}

/// Lets a request to a function's URL through that may invoke `function` by it: everybody whom the function's
/// policy allows, or who signs and may. The body that it gives ends with the verdict. In development mode
/// everybody may, but what needs a signature must have one, right or wrong.
///
/// # Errors
/// [`ApiError::AccessDenied`], or what is wrong with the signature.
pub fn pass_url<B: Backend>(
    app: &App<B>,
    session: &Session,
    parts: &mut Parts,
    body: Body,
    auth: UrlAuth,
    function: String,
) -> Result<Body, ApiError> {
    const ACTION: &str = INVOKE_URL.action;
    let _ = session.0.resource.set(function.clone());
    let mut context = session.0.context.clone();
    context.set("lambda:FunctionArn", &function);
    let kind = if auth == UrlAuth::None { "NONE" } else { "AWS_IAM" };
    context.set("lambda:FunctionUrlAuthType", kind);
    let body = match (auth, &app.callers.identity) {
        (UrlAuth::None, None) => body,
        (UrlAuth::None, Some(_)) => {
            let caller = Caller::default();
            let request = policy::Request {
                caller: &caller,
                action: ACTION,
                resource: &function,
                context: &context,
            };
            match session.resource_policy(&function)?.map(|policy| policy.decide(&request)) {
                Some(Decision::Allowed) => body,
                _ => return Err(ApiError::AccessDenied("Forbidden".into())),
            }
        }
        (UrlAuth::AwsIam, None) => {
            Claim::read(parts)?;
            body
        }
        (UrlAuth::AwsIam, Some(identity)) => {
            let now = OffsetDateTime::now_utc();
            let claim = Claim::read(parts)?;
            let _ = session.0.claimed.set(claim.key_id.clone());
            claim.check_scope(now, &app.place.region, &["lambda"])?;
            let credentials = app.callers.find(identity, &claim, now)?;
            let session = session.clone();
            let settle = move |hash: [u8; 32]| {
                claim.verify(&credentials.secret, &hash)?;
                // Settled once: a body ends once.
                let _ = session.0.principal.set(credentials.principal);
                session.may_in(ACTION, &function, context)
            };
            Body::new(Checked { body, hash: Sha256::new(), settle: Some(Box::new(settle)) })
        }
    };
    Ok(body)
}

/// A request that may go on.
enum Admitted {
    /// Without a signature.
    Freely(Body),
    /// Once its body has been read, if it has one.
    Signed(Body),
}

async fn admit<B: Backend>(
    app: &App<B>,
    identity: &Arc<Identity>,
    operation: &'static Operation,
    parts: &mut Parts,
    body: Body,
    session: &Session,
) -> Result<Admitted, ApiError> {
    let proven = matches!(operation.on, On::Link | On::LayerLink) && is_proven(identity, parts);
    if operation.on == On::Health || proven {
        return Ok(Admitted::Freely(body));
    }
    let now = OffsetDateTime::now_utc();
    let claim = Claim::read(parts)?;
    let _ = session.0.claimed.set(claim.key_id.clone());
    let services: &[&str] = if operation.action.is_empty() { &SERVICES } else { &["lambda"] };
    claim.check_scope(now, &app.place.region, services)?;
    let credentials = app.callers.find(identity, &claim, now)?;
    let resource = operation.resource(parts, &app.place).await?;
    let session = session.clone();
    let settle = move |hash: [u8; 32]| {
        claim.verify(&credentials.secret, &hash)?;
        // Settled once: a body ends once.
        let _ = session.0.principal.set(credentials.principal);
        resource.map_or(Ok(()), |resource| session.may(operation.action, &resource))
    };
    let body = Body::new(Checked { body, hash: Sha256::new(), settle: Some(Box::new(settle)) });
    if matches!(parts.method, Method::POST | Method::PUT) {
        return Ok(Admitted::Signed(body));
    }
    let too_large = |_| ApiError::RequestTooLarge("This operation takes no body.".into());
    read_body(&parts.headers, body, UNREAD, too_large).await?;
    Ok(Admitted::Signed(Body::empty()))
}

/// Whether a link carries a proof that has not run out.
fn is_proven(identity: &Identity, parts: &Parts) -> bool {
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    let Some((path, proof)) = target.rsplit_once("&proof=") else { return false };
    let end = path.rsplit_once("&expires=").and_then(|(_, end)| end.parse::<i64>().ok());
    identity.proves(proof, path)
        && end.is_some_and(|end| OffsetDateTime::now_utc().unix_timestamp() <= end)
}

/// The address that a request came from.
pub fn source(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<Peer>().map(|peer| peer.0.ip().to_canonical())
}

type Settle = Box<dyn FnOnce([u8; 32]) -> Result<(), ApiError> + Send>;

/// A body that ends with the verdict on its request.
struct Checked {
    body: Body,
    hash: Sha256,
    /// Gone when it is spoken.
    settle: Option<Settle>,
}

impl HttpBody for Checked {
    type Data = Bytes;
    type Error = ApiError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Task<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, ApiError>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(task));
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.hash.update(data);
                }
                Some(Ok(frame))
            }
            Some(Err(_)) => Some(Err(ApiError::RequestTimeout(BROKEN.into()))),
            None => {
                let hash = std::mem::take(&mut self.hash).finalize().into();
                let verdict = self.settle.take().map_or(Ok(()), |settle| settle(hash));
                verdict.err().map(Err)
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.settle.is_none()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// A body of which the beginning is kept for the record.
struct Kept {
    body: Body,
    kept: Arc<Mutex<Vec<u8>>>,
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Task<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(task));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            // One byte more than is looked at: a document that was cut is none.
            let room = (MAX_BODY + 1).saturating_sub(kept.len());
            kept.extend_from_slice(&data[..data.len().min(room)]);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        Self::Unauthenticated(error)
    }
}
