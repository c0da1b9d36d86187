//! IAM's policy language: what a policy document says of a request. Pure: no clock, no files.
//!
//! Follows the *IAM JSON policy elements reference*. What it does not know (an element, an operator, a kind
//! of principal, an older version of the language) is refused when a policy is read: a statement that is
//! understood by half would allow or deny something else than it says.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{
    condition::{ArnPattern, Condition},
    pattern::Pattern,
};

/// Longest policy document in bytes: Lambda's limit for resource policies, and more than IAM allows.
pub const MAX_DOCUMENT: usize = 20_480;

/// Why a document is no policy that can be enforced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// No JSON, an unknown or missing element, or one of the wrong type.
    #[error("{0}")]
    Syntax(String),
    /// Over [`MAX_DOCUMENT`].
    #[error("the policy is {0} bytes long; at most {MAX_DOCUMENT} are allowed")]
    TooLong(usize),
    /// Another version of the language.
    #[error("Version must be \"2012-10-17\", not {0:?}")]
    Version(String),
    /// Two of a kind, or none, or one that does not belong into this kind of policy.
    #[error("{0}")]
    Elements(&'static str),
    /// An action without a service.
    #[error("{0:?} is no action: one looks like lambda:InvokeFunction, or is *")]
    Action(String),
    /// Not six parts.
    #[error("{0:?} is no ARN: one has six parts, such as arn:aws:lambda:*:*:function:f, or is *")]
    Arn(String),
    /// A principal that nobody can be.
    #[error("{0:?} is no principal: name an account, the ARN of a user or role, a service, or *")]
    Principal(String),
    /// `${…}` that is no variable.
    #[error("{0:?} has a malformed policy variable")]
    Variable(String),
    /// An operator that does not exist.
    #[error("{0:?} is no condition operator")]
    Operator(String),
    /// A condition key without a prefix.
    #[error("{0:?} is no condition key: one looks like aws:SourceIp")]
    Key(String),
    /// A value that the operator can't be applied to.
    #[error("{value:?} is no value for {operator}")]
    Value {
        /// The operator.
        operator: String,
        /// The value.
        value: String,
    },
    /// A list without members.
    #[error("{0} is empty")]
    Empty(&'static str),
}

/// To what a policy belongs, which decides what elements it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A user or role: whose it is goes without saying.
    Identity,
    /// A resource: says who.
    Resource,
    /// A role: says who may assume it.
    Trust,
}

/// What is known of a request, for conditions and variables.
#[derive(Debug, Clone, Default)]
pub struct Context(BTreeMap<String, Vec<String>>);

impl Context {
    /// Says something of the request. Keys are without regard to case.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.set_all(key, vec![value.into()]);
    }

    /// The same of what may have several values.
    pub fn set_all(&mut self, key: &str, values: Vec<String>) {
        self.0.insert(key.to_ascii_lowercase(), values);
    }

    /// The values of a key that is in lower case; none: the request says nothing of it.
    pub(super) fn get(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }
}

/// Who asks, in all forms in which a policy may name them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// The account, if it is one's user or role.
    pub account: Option<String>,
    /// ARNs: a user's own, or a session's and its role's.
    pub arns: Vec<String>,
    /// Such as `s3.amazonaws.com`.
    pub service: Option<String>,
}

/// What a request wants.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Who.
    pub caller: &'a Caller,
    /// Such as `lambda:InvokeFunction`.
    pub action: &'a str,
    /// An ARN, or `*` where the action is on none.
    pub resource: &'a str,
    /// What else is known.
    pub context: &'a Context,
}

/// What policies say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// A statement denies it, whatever others say.
    Denied,
    /// A statement allows it.
    Allowed,
    /// Nothing speaks of it, so it is not allowed.
    Unmentioned,
}

/// What several policies say together: a denial wins, and one that allows suffices.
pub fn evaluate<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    request: &Request<'_>,
) -> Decision {
    let mut decision = Decision::Unmentioned;
    for policy in policies {
        match policy.decide(request) {
            Decision::Denied => return Decision::Denied,
            Decision::Allowed => decision = Decision::Allowed,
            Decision::Unmentioned => {}
        }
    }
    decision
}

/// A policy that was read and understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy(Vec<Statement>);

#[derive(Debug, Clone, PartialEq)]
struct Statement {
    allow: bool,
    /// Missing in policies of users and roles.
    principal: Option<Choice<Principal>>,
    action: Choice<Pattern>,
    /// Missing in trust policies.
    resource: Option<Choice<ArnPattern>>,
    conditions: Vec<Condition>,
}

/// One of these, or with `Not…` none of them.
#[derive(Debug, Clone, PartialEq)]
struct Choice<T> {
    not: bool,
    of: Vec<T>,
}

impl<T> Choice<T> {
    fn includes(&self, fits: impl Fn(&T) -> bool) -> bool {
        self.of.iter().any(fits) != self.not
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Principal {
    Everybody,
    /// All of an account. Allowing it lets the account's own policies allow; it allows nobody by itself.
    Account(String),
    Arn(String),
    Service(String),
}

impl Policy {
    /// Reads a policy document.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(json: &str, kind: Kind) -> Result<Self, PolicyError> {
        if json.len() > MAX_DOCUMENT {
            return Err(PolicyError::TooLong(json.len()));
        }
        let document: Document =
            serde_json::from_str(json).map_err(|e| PolicyError::Syntax(e.to_string()))?;
        if document.version.as_deref() != Some("2012-10-17") {
            return Err(PolicyError::Version(document.version.unwrap_or_default()));
        }
        let statements = document.statement.0.into_iter().map(|raw| Statement::parse(raw, kind));
        Ok(Self(statements.collect::<Result<_, _>>()?))
    }

    /// Whether it leaves what is asked to the policies of the caller's account, by allowing the account.
    pub fn delegates(&self, request: &Request<'_>) -> bool {
        self.0.iter().any(|statement| statement.allow && statement.matches(request, true))
    }

    /// What this policy alone says.
    pub fn decide(&self, request: &Request<'_>) -> Decision {
        let matching = self.0.iter().filter(|statement| statement.matches(request, false));
        matching.fold(Decision::Unmentioned, |decision, statement| {
            match (decision, statement.allow) {
                (Decision::Denied, _) | (_, false) => Decision::Denied,
                (_, true) => Decision::Allowed,
            }
        })
    }
}

impl Statement {
    fn parse(raw: RawStatement, kind: Kind) -> Result<Self, PolicyError> {
        let principal =
            choice(raw.principal, raw.not_principal, "a list of principals", principals)?;
        let action = |raw: List<String>| raw.0.iter().map(|a| parse_action(a)).collect();
        let action = choice(raw.action, raw.not_action, "a list of actions", action)?;
        let arns = |raw: List<String>| raw.0.iter().map(|arn| ArnPattern::parse(arn)).collect();
        let resource = choice(raw.resource, raw.not_resource, "a list of resources", arns)?;
        let allow = matches!(raw.effect, Effect::Allow);
        let wrong = match (kind, &principal, &resource) {
            (Kind::Identity, Some(_), _) => Some("a policy of a user or role has no Principal"),
            (Kind::Resource | Kind::Trust, None, _) => Some("Principal is missing"),
            (Kind::Identity | Kind::Resource, _, None) => Some("Resource is missing"),
            (Kind::Trust, _, Some(_)) => Some("a trust policy has no Resource"),
            (_, Some(Choice { not: true, .. }), _) if allow => {
                Some("NotPrincipal goes with Effect Deny only")
            }
            _ => None,
        };
        if let Some(wrong) = wrong {
            return Err(PolicyError::Elements(wrong));
        }
        let mut conditions = Vec::new();
        for (operator, keys) in raw.condition.0 {
            for (key, values) in keys.0 {
                let values: Vec<String> = values.0.into_iter().map(Scalar::into_text).collect();
                conditions.push(Condition::parse(&operator, &key, &values)?);
            }
        }
        let action = action.ok_or(PolicyError::Elements("Action is missing"))?;
        Ok(Self { allow, principal, action, resource, conditions })
    }

    /// `whole`: one that allows an account means everybody in it.
    fn matches(&self, request: &Request<'_>, whole: bool) -> bool {
        let Request { caller, action, resource, context } = request;
        let principal = |choice: &Choice<Principal>| {
            choice.includes(|principal| principal.is(caller, whole || !self.allow))
        };
        self.principal.as_ref().is_none_or(principal)
            && self.action.includes(|pattern| pattern.matches_any_case(action, context))
            && self
                .resource
                .as_ref()
                .is_none_or(|choice| choice.includes(|arn| arn.matches(resource, context)))
            && self.conditions.iter().all(|condition| condition.holds(context))
    }
}

impl Principal {
    fn is(&self, caller: &Caller, whole: bool) -> bool {
        match self {
            Self::Everybody => true,
            Self::Account(account) => whole && caller.account.as_ref() == Some(account),
            Self::Arn(arn) => caller.arns.contains(arn),
            Self::Service(service) => caller.service.as_ref() == Some(service),
        }
    }
}

/// `Element` or `NotElement`, not both.
fn choice<T, R>(
    yes: Option<R>,
    no: Option<R>,
    what: &'static str,
    parse: impl FnOnce(R) -> Result<Vec<T>, PolicyError>,
) -> Result<Option<Choice<T>>, PolicyError> {
    let (raw, not) = match (yes, no) {
        (None, None) => return Ok(None),
        (Some(raw), None) => (raw, false),
        (None, Some(raw)) => (raw, true),
        (Some(_), Some(_)) => {
            return Err(PolicyError::Elements("a statement has an element and its Not… form"));
        }
    };
    let of = parse(raw)?;
    if of.is_empty() { Err(PolicyError::Empty(what)) } else { Ok(Some(Choice { not, of })) }
}

fn parse_action(text: &str) -> Result<Pattern, PolicyError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-*?".contains(&b);
    let well_formed = text == "*"
        || text.split_once(':').is_some_and(|(service, name)| {
            !service.is_empty()
                && !name.is_empty()
                && service.bytes().chain(name.bytes()).all(allowed)
        });
    match well_formed {
        true => Pattern::parse(text, true),
        false => Err(PolicyError::Action(text.chars().take(100).collect())),
    }
}

fn principals(raw: RawPrincipal) -> Result<Vec<Principal>, PolicyError> {
    let bad = |text: &str| PolicyError::Principal(text.chars().take(100).collect());
    let kinds = match raw {
        RawPrincipal::Text(text) if text == "*" => return Ok(vec![Principal::Everybody]),
        RawPrincipal::Text(text) => return Err(bad(&text)),
        RawPrincipal::Kinds(kinds) => kinds.0,
    };
    let mut principals = Vec::new();
    for (kind, names) in kinds {
        for name in names.0 {
            principals.push(match &*kind {
                "AWS" => account_principal(&name).ok_or_else(|| bad(&name))?,
                "Service" if name.contains('.') && !name.contains(['*', '?', '$']) => {
                    Principal::Service(name)
                }
                "Service" => return Err(bad(&name)),
                _ => return Err(bad(&kind)),
            });
        }
    }
    Ok(principals)
}

fn account_principal(name: &str) -> Option<Principal> {
    let is_account = |text: &str| text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
    if name == "*" {
        return Some(Principal::Everybody);
    }
    if is_account(name) {
        return Some(Principal::Account(name.to_owned()));
    }
    // Neither parts of it nor variables: whom that would mean is decided by who may make names.
    if name.contains(['*', '?', '$']) {
        return None;
    }
    let parts: Vec<&str> = name.splitn(6, ':').collect();
    let ["arn", _, "iam" | "sts", "", account, resource] = parts[..] else { return None };
    match resource {
        _ if !is_account(account) || resource.is_empty() => None,
        "root" => Some(Principal::Account(account.to_owned())),
        _ => Some(Principal::Arn(name.to_owned())),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Document {
    version: Option<String>,
    #[serde(rename = "Id")]
    _id: Option<String>,
    statement: List<RawStatement>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct RawStatement {
    #[serde(rename = "Sid")]
    _sid: Option<String>,
    effect: Effect,
    principal: Option<RawPrincipal>,
    not_principal: Option<RawPrincipal>,
    action: Option<List<String>>,
    not_action: Option<List<String>>,
    resource: Option<List<String>>,
    not_resource: Option<List<String>>,
    #[serde(default)]
    condition: Entries<Entries<List<Scalar>>>,
}

#[derive(Deserialize)]
enum Effect {
    Allow,
    Deny,
}

enum RawPrincipal {
    Text(String),
    Kinds(Entries<List<String>>),
}

impl<'de> Deserialize<'de> for RawPrincipal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let principal = match raw.get().starts_with('"') {
            true => serde_json::from_str(raw.get()).map(Self::Text),
            false => serde_json::from_str(raw.get()).map(Self::Kinds),
        };
        principal.map_err(D::Error::custom)
    }
}

/// A value of a condition: what JSON says without quotes is taken as its text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Bool(bool),
    Number(serde_json::Number),
}

impl Scalar {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Bool(truth) => truth.to_string(),
            Self::Number(number) => number.to_string(),
        }
    }
}

/// One, or a list.
struct List<T>(Vec<T>);

impl<'de, T: DeserializeOwned> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Through a raw value, so that errors name the element instead of "no variant".
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let list = match raw.get().starts_with('[') {
            true => serde_json::from_str(raw.get()),
            false => serde_json::from_str(raw.get()).map(|one| vec![one]),
        };
        list.map(Self).map_err(D::Error::custom)
    }
}

/// An object, none of whose names stands there twice: the second would silently replace the first.
pub(super) struct Entries<T>(pub(super) Vec<(String, T)>);

impl<T> Default for Entries<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Names<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::<(String, T)>::new();
                while let Some((name, value)) = map.next_entry::<String, T>()? {
                    if entries.iter().any(|(other, _)| *other == name) {
                        return Err(A::Error::custom(format!("{name:?} is there twice")));
                    }
                    entries.push((name, value));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Names(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use Decision::{Allowed, Denied, Unmentioned};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const F: &str = "arn:aws:lambda:us-east-1:111122223333:function:f";

    fn policy(statements: &Value) -> Value {
        json!({"Version": "2012-10-17", "Statement": statements})
    }

    fn parse(statements: &Value, kind: Kind) -> Result<Policy, PolicyError> {
        Policy::parse(&policy(statements).to_string(), kind)
    }

    fn bob() -> Caller {
        Caller {
            account: Some("111122223333".into()),
            arns: vec!["arn:aws:iam::111122223333:user/bob".into()],
            service: None,
        }
    }

    fn context() -> Context {
        let mut context = Context::default();
        for (key, value) in [
            ("aws:username", "bob"),
            ("aws:SourceIp", "10.1.2.3"),
            ("aws:CurrentTime", "2026-11-24T00:00:00Z"),
            ("aws:SecureTransport", "false"),
            ("aws:SourceArn", "arn:aws:s3:::bucket"),
            ("test:Size", "10"),
        ] {
            context.set(key, value);
        }
        context
    }

    fn decide(policy: &Policy, action: &str, resource: &str) -> Decision {
        let (caller, context) = (bob(), context());
        policy.decide(&Request { caller: &caller, action, resource, context: &context })
    }

    fn statement(changes: &Value) -> Value {
        let mut statement = json!({
            "Effect": "Allow", "Action": "lambda:InvokeFunction", "Resource": F,
        });
        for (key, value) in changes.as_object().unwrap() {
            statement[key] = value.clone();
            if let Some(positive) = key.strip_prefix("Not") {
                statement.as_object_mut().unwrap().remove(positive);
            }
        }
        statement
    }

    #[test]
    fn what_policies_say() {
        let v1 = format!("{F}:1");
        let v1 = v1.as_str();
        for (changes, action, resource, expected) in [
            (json!({}), "lambda:InvokeFunction", F, Allowed),
            (json!({}), "lambda:DeleteFunction", F, Unmentioned),
            (json!({}), "lambda:InvokeFunction", v1, Unmentioned),
            (json!({"Effect": "Deny"}), "lambda:InvokeFunction", F, Denied),
            (json!({"Action": "LAMBDA:invoke*"}), "lambda:InvokeFunction", F, Allowed),
            (json!({"Action": "lambda:Get?unction"}), "lambda:GetFunction", F, Allowed),
            (json!({"Action": "*"}), "lambda:InvokeFunction", F, Allowed),
            (json!({"Action": ["s3:*", "lambda:*"]}), "lambda:InvokeFunction", F, Allowed),
            (json!({"NotAction": "lambda:Delete*"}), "lambda:InvokeFunction", F, Allowed),
            (json!({"NotAction": "lambda:Delete*"}), "lambda:DeleteAlias", F, Unmentioned),
            (json!({"Resource": "*"}), "lambda:InvokeFunction", "*", Allowed),
            (json!({"Resource": format!("{F}:*")}), "lambda:InvokeFunction", v1, Allowed),
            (json!({"Resource": format!("{F}*")}), "lambda:InvokeFunction", v1, Allowed),
            (json!({"Resource": "arn:*:lambda:*:*:*"}), "lambda:InvokeFunction", v1, Allowed),
            // A star in one part does not reach into the next.
            (json!({"Resource": "arn:aws:*:*:*:f"}), "lambda:InvokeFunction", F, Unmentioned),
            (json!({"NotResource": F}), "lambda:InvokeFunction", F, Unmentioned),
            (json!({"NotResource": F}), "lambda:InvokeFunction", v1, Allowed),
            (
                json!({"Resource": "arn:aws:lambda:*:*:function:${aws:username}-*"}),
                "lambda:InvokeFunction",
                "arn:aws:lambda:us-east-1:111122223333:function:bob-x",
                Allowed,
            ),
            (
                json!({"Resource": "arn:aws:lambda:*:*:function:${aws:nothing}*"}),
                "lambda:InvokeFunction",
                F,
                Unmentioned,
            ),
        ] {
            let found =
                decide(&parse(&statement(&changes), Kind::Identity).unwrap(), action, resource);
            assert_eq!(found, expected, "{changes} {action} {resource}");
        }
    }

    #[test]
    fn what_conditions_say() {
        for (operator, key, value, expected) in [
            ("StringEquals", "aws:username", json!("bob"), true),
            ("StringEquals", "AWS:UserName", json!(["x", "bob"]), true),
            ("StringEquals", "aws:username", json!("b*"), false),
            ("StringEquals", "aws:username", json!("BOB"), false),
            ("StringEquals", "aws:username", json!("${aws:username}"), true),
            ("StringEquals", "aws:nothing", json!("x"), false),
            ("StringEqualsIfExists", "aws:nothing", json!("x"), true),
            ("StringEqualsIfExists", "aws:username", json!("x"), false),
            ("StringNotEquals", "aws:username", json!(["x", "y"]), true),
            ("StringNotEquals", "aws:username", json!(["x", "bob"]), false),
            ("StringNotEquals", "aws:nothing", json!("x"), true),
            ("StringEqualsIgnoreCase", "aws:username", json!("BOB"), true),
            ("StringNotEqualsIgnoreCase", "aws:username", json!("BOB"), false),
            ("StringLike", "aws:username", json!("b?b"), true),
            ("StringLike", "aws:username", json!("B*"), false),
            ("StringNotLike", "aws:username", json!("b*"), false),
            ("ArnLike", "aws:SourceArn", json!("arn:aws:s3:::buck*"), true),
            ("ArnEquals", "aws:SourceArn", json!("arn:*:s3:::bucket"), true),
            ("ArnLike", "aws:SourceArn", json!("arn:aws:*:bucket:*:*"), false),
            ("ArnNotLike", "aws:SourceArn", json!("arn:aws:s3:::other"), true),
            ("ArnNotEquals", "aws:SourceArn", json!("arn:aws:s3:::bucket"), false),
            ("ArnLike", "aws:username", json!("*"), true),
            ("NumericEquals", "test:Size", json!(10), true),
            ("NumericEquals", "test:Size", json!("10.0"), true),
            ("NumericNotEquals", "test:Size", json!("10"), false),
            ("NumericLessThan", "test:Size", json!("10"), false),
            ("NumericLessThanEquals", "test:Size", json!("10"), true),
            ("NumericGreaterThan", "test:Size", json!("9.5"), true),
            ("NumericGreaterThanEquals", "test:Size", json!("11"), false),
            ("NumericEquals", "aws:username", json!("10"), false),
            ("DateLessThan", "aws:CurrentTime", json!("2026-11-24T00:00:01Z"), true),
            ("DateGreaterThan", "aws:CurrentTime", json!("2026-11-24"), false),
            ("DateGreaterThanEquals", "aws:CurrentTime", json!("2026-11-24T00:00Z"), true),
            ("DateEquals", "aws:CurrentTime", json!("2026-11-24T01:00:00+01:00"), true),
            ("DateNotEquals", "aws:CurrentTime", json!("1795478400"), false),
            ("DateLessThanEquals", "aws:CurrentTime", json!(0), false),
            ("Bool", "aws:SecureTransport", json!(false), true),
            ("Bool", "aws:SecureTransport", json!("true"), false),
            ("BoolIfExists", "aws:MultiFactorAuthPresent", json!("false"), true),
            ("IpAddress", "aws:SourceIp", json!("10.0.0.0/8"), true),
            ("IpAddress", "aws:SourceIp", json!(["::1", "10.1.2.3"]), true),
            ("NotIpAddress", "aws:SourceIp", json!("10.1.0.0/16"), false),
            ("IpAddress", "aws:SourceIp", json!("192.0.2.0/24"), false),
            ("Null", "aws:username", json!("true"), false),
            ("Null", "aws:username", json!(false), true),
            ("Null", "aws:nothing", json!(true), true),
            ("ForAnyValue:StringEquals", "aws:username", json!(["x", "bob"]), true),
            ("ForAnyValue:StringEquals", "aws:nothing", json!("x"), false),
            ("ForAllValues:StringEquals", "aws:nothing", json!("x"), true),
            ("ForAllValues:StringLike", "aws:username", json!(["b*"]), true),
        ] {
            let changes = json!({"Condition": {operator: {key: value}}});
            let policy = parse(&statement(&changes), Kind::Identity).unwrap();
            let found = decide(&policy, "lambda:InvokeFunction", F) == Allowed;
            assert_eq!(found, expected, "{changes}");
        }
        // All conditions must hold.
        let both = json!({"Condition": {"StringEquals": {"aws:username": "bob"},
            "Bool": {"aws:SecureTransport": "true"}}});
        let policy = parse(&statement(&both), Kind::Identity).unwrap();
        assert_eq!(decide(&policy, "lambda:InvokeFunction", F), Unmentioned);
    }

    #[test]
    fn several_values_of_one_key() {
        let mut context = Context::default();
        context.0.insert("aws:tagkeys".into(), vec!["a".into(), "b".into()]);
        let holds = |operator: &str, values: &[&str]| {
            let values: Vec<String> = values.iter().map(ToString::to_string).collect();
            Condition::parse(operator, "aws:TagKeys", &values).unwrap().holds(&context)
        };
        assert!(holds("ForAnyValue:StringEquals", &["a", "z"]));
        assert!(!holds("ForAnyValue:StringEquals", &["z"]));
        assert!(!holds("ForAllValues:StringEquals", &["a"]));
        assert!(holds("ForAllValues:StringEquals", &["a", "b", "c"]));
        assert!(holds("ForAnyValue:StringNotEquals", &["a"]));
        assert!(!holds("ForAllValues:StringNotEquals", &["a"]));
        assert!(!holds("StringEquals", &["a"]));
    }

    #[test]
    fn whom_resource_policies_mean() {
        let bob_arn = "arn:aws:iam::111122223333:user/bob";
        let service = Caller { service: Some("s3.amazonaws.com".into()), ..Caller::default() };
        for (effect, principal, bobs, services) in [
            ("Allow", json!({"Principal": "*"}), Allowed, Allowed),
            ("Allow", json!({"Principal": {"AWS": "*"}}), Allowed, Allowed),
            ("Allow", json!({"Principal": {"AWS": bob_arn}}), Allowed, Unmentioned),
            (
                "Allow",
                json!({"Principal": {"AWS": ["444455556666", bob_arn]}}),
                Allowed,
                Unmentioned,
            ),
            ("Allow", json!({"Principal": {"Service": "s3.amazonaws.com"}}), Unmentioned, Allowed),
            // An account that is allowed must still allow its users.
            ("Allow", json!({"Principal": {"AWS": "111122223333"}}), Unmentioned, Unmentioned),
            ("Deny", json!({"Principal": {"AWS": "111122223333"}}), Denied, Unmentioned),
            (
                "Deny",
                json!({"Principal": {"AWS": "arn:aws:iam::111122223333:root"}}),
                Denied,
                Unmentioned,
            ),
            ("Deny", json!({"Principal": {"AWS": "444455556666"}}), Unmentioned, Unmentioned),
            ("Deny", json!({"NotPrincipal": {"AWS": bob_arn}}), Unmentioned, Denied),
        ] {
            let mut changes = principal.clone();
            changes["Effect"] = effect.into();
            let policy = parse(&statement(&changes), Kind::Resource).unwrap();
            let context = context();
            for (caller, expected) in [(&bob(), bobs), (&service, services)] {
                let (action, resource) = ("lambda:InvokeFunction", F);
                let request = Request { caller, action, resource, context: &context };
                assert_eq!(policy.decide(&request), expected, "{effect} {principal} {caller:?}");
            }
        }
        let trust = json!({"Effect": "Allow", "Action": "sts:AssumeRole",
            "Principal": {"Service": "lambda.amazonaws.com"}});
        assert!(parse(&trust, Kind::Trust).is_ok());
        assert!(parse(&trust, Kind::Resource).is_err());
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let syntax = |text: &str| Policy::parse(text, Kind::Identity).unwrap_err().to_string();
        assert!(syntax("{").contains("EOF"));
        assert!(syntax(r#"{"Version":"2012-10-17"}"#).contains("Statement"));
        assert!(syntax(r#"{"Statement":[]}"#).contains("2012-10-17"));
        assert!(syntax(r#"{"Version":"2008-10-17","Statement":[]}"#).contains("2008"));
        assert!(syntax(&" ".repeat(MAX_DOCUMENT + 1)).contains("20481"));
        let twice = r#"{"Version":"2012-10-17","Statement":{"Effect":"Allow","Effect":"Deny",
            "Action":"*","Resource":"*"}}"#;
        assert!(syntax(twice).contains("duplicate"));
        let twice = r#"{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*",
            "Resource":"*","Condition":{"Bool":{"aws:a":"true"},"Bool":{"aws:b":"true"}}}}"#;
        assert!(syntax(twice).contains("twice"));
        for (changes, words) in [
            (json!({"Effect": "allow"}), "allow"),
            (json!({"Foo": 1}), "Foo"),
            (json!({"Action": "InvokeFunction"}), "no action"),
            (json!({"Action": []}), "empty"),
            (json!({"Action": 1}), "invalid type"),
            (json!({"Resource": []}), "empty"),
            (json!({"Resource": "function:f"}), "no ARN"),
            (json!({"Resource": "arn:aws:lambda:*"}), "no ARN"),
            (json!({"Principal": "*"}), "no Principal"),
            (json!({"Condition": {"StringFoo": {"aws:a": "x"}}}), "StringFoo"),
            (json!({"Condition": {"stringequals": {"aws:a": "x"}}}), "stringequals"),
            (json!({"Condition": {"ForSome:StringEquals": {"aws:a": "x"}}}), "ForSome"),
            (json!({"Condition": {"NullIfExists": {"aws:a": "true"}}}), "NullIfExists"),
            (json!({"Condition": {"StringEquals": {"a": "x"}}}), "condition key"),
            (json!({"Condition": {"StringEquals": {"aws:a": []}}}), "empty"),
            (json!({"Condition": {"NumericEquals": {"aws:a": "x"}}}), "NumericEquals"),
            (json!({"Condition": {"NumericEquals": {"aws:a": "inf"}}}), "inf"),
            (json!({"Condition": {"DateEquals": {"aws:a": "today"}}}), "today"),
            (json!({"Condition": {"IpAddress": {"aws:a": "10.0.0.0/33"}}}), "/33"),
            (json!({"Condition": {"Bool": {"aws:a": "yes"}}}), "yes"),
            (json!({"Condition": {"StringLike": {"aws:a": "${x"}}}), "variable"),
        ] {
            let error = parse(&statement(&changes), Kind::Identity).expect_err(words).to_string();
            assert!(error.contains(words), "{changes}: {error}");
        }
        let mut both = statement(&json!({"NotAction": "s3:*"}));
        both["Action"] = "s3:*".into();
        assert!(parse(&both, Kind::Identity).is_err());
        for principal in [
            json!("bob"),
            json!({"AWS": "arn:aws:iam::111122223333:user/*"}),
            json!({"AWS": "arn:aws:iam::111122223333:user/${aws:username}"}),
            json!({"AWS": "arn:aws:s3:::b"}),
            json!({"Service": "*"}),
            json!({"Federated": "x"}),
            json!({"AWS": []}),
        ] {
            let error = parse(&statement(&json!({"Principal": principal})), Kind::Resource);
            assert!(error.is_err(), "{principal}");
        }
        let allow_all_but = statement(&json!({"NotPrincipal": {"AWS": "111122223333"}}));
        assert!(parse(&allow_all_but, Kind::Resource).is_err());
    }

    fn statements() -> impl Strategy<Value = Value> {
        let actions = prop::sample::select(vec![
            "*",
            "lambda:*",
            "lambda:Get*",
            "lambda:InvokeFunction",
            "s3:*",
        ]);
        let resources = prop::sample::select(vec![
            "*",
            F,
            "arn:aws:lambda:*:*:function:g",
            "arn:aws:lambda:*:*:*",
        ]);
        let users = prop::sample::select(vec!["bob", "eve", "b*"]);
        (any::<bool>(), any::<[bool; 3]>(), actions, resources, users).prop_map(
            |(allow, [not_action, not_resource, condition], action, resource, user)| {
                let mut statement = json!({
                    "Effect": if allow { "Allow" } else { "Deny" },
                    if not_action { "NotAction" } else { "Action" }: action,
                    if not_resource { "NotResource" } else { "Resource" }: resource,
                });
                if condition {
                    statement["Condition"]["StringLike"]["aws:username"] = user.into();
                }
                statement
            },
        )
    }

    proptest! {
        #[test]
        fn denials_win_and_allowing_more_denies_nothing(
            statements in prop::collection::vec(statements(), 0..6),
            more in statements(),
            split in 0_usize..6,
        ) {
            let one = |statement: &Value| {
                decide(&parse(statement, Kind::Identity).unwrap(), "lambda:InvokeFunction", F)
            };
            let alone: Vec<Decision> = statements.iter().map(one).collect();
            let expected = match () {
                () if alone.contains(&Denied) => Denied,
                () if alone.contains(&Allowed) => Allowed,
                () => Unmentioned,
            };
            let whole = |list: &[Value]| parse(&json!(list), Kind::Identity).unwrap();
            prop_assert_eq!(decide(&whole(&statements), "lambda:InvokeFunction", F), expected);
            // In one policy or in two, in either order.
            let (left, right) = statements.split_at(split.min(statements.len()));
            let (caller, context) = (bob(), context());
            let request = Request {
                caller: &caller, action: "lambda:InvokeFunction", resource: F, context: &context,
            };
            let (left, right) = (whole(left), whole(right));
            prop_assert_eq!(evaluate([&left, &right], &request), expected);
            prop_assert_eq!(evaluate([&right, &left], &request), expected);
            let mut longer = statements.clone();
            let allows = more["Effect"] == "Allow";
            longer.push(more);
            let after = decide(&whole(&longer), "lambda:InvokeFunction", F);
            prop_assert!(!allows || (after == Denied) == (expected == Denied));
            prop_assert!(!allows || expected != Allowed || after == Allowed);
        }

        #[test]
        fn any_text_is_a_policy_or_refused(text in "[\\PC{}\":,\\[\\]]{0,200}") {
            let _ = Policy::parse(&text, Kind::Resource);
        }
    }
}
