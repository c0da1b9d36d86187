//! `Condition` of a statement: operators over what is known of a request.

use std::net::IpAddr;

use ipnet::IpNet;
use time::{
    Date, OffsetDateTime, PrimitiveDateTime, UtcOffset, format_description::well_known::Rfc3339,
    macros::format_description,
};

use super::{
    pattern::Pattern,
    policy::{Context, PolicyError},
};

/// One operator over one key.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    /// In lower case.
    key: String,
    test: Test,
    /// `StringNotEquals` and the like: holds where none of the values fits.
    negated: bool,
    /// `…IfExists`: holds where the request says nothing of the key.
    if_exists: bool,
    quantifier: Quantifier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantifier {
    /// Of the one value that the request has.
    Single,
    /// `ForAnyValue:`
    Any,
    /// `ForAllValues:`
    All,
}

/// What one value of the request is held against.
#[derive(Debug, Clone, PartialEq)]
enum Test {
    /// With regard to case or not.
    Text(Vec<Pattern>, bool),
    Arn(Vec<ArnPattern>),
    Number(Order, Vec<f64>),
    Date(Order, Vec<OffsetDateTime>),
    Bool(Vec<bool>),
    Address(Vec<IpNet>),
    /// Whether the key is to be absent.
    Null(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Order {
    fn holds<T: PartialOrd>(self, left: &T, right: &T) -> bool {
        match self {
            Self::Equal => left == right,
            Self::Less => left < right,
            Self::LessOrEqual => left <= right,
            Self::Greater => left > right,
            Self::GreaterOrEqual => left >= right,
        }
    }
}

/// An ARN with wildcards, none of which reaches over one of its first five colons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArnPattern(Vec<Pattern>);

impl ArnPattern {
    /// Parses an ARN of six parts, or `*`.
    ///
    /// # Errors
    /// [`PolicyError::Arn`] or [`PolicyError::Variable`].
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let pattern = Pattern::parse(text, true)?;
        if pattern.is_any() {
            return Ok(Self(vec![pattern]));
        }
        let parts = pattern.split(6);
        let starts = text.starts_with("arn:") || text.starts_with("*:");
        match starts && parts.len() == 6 {
            true => Ok(Self(parts)),
            false => Err(PolicyError::Arn(text.chars().take(100).collect())),
        }
    }

    /// Whether `arn` fits.
    pub fn matches(&self, arn: &str, context: &Context) -> bool {
        if let [any] = &self.0[..] {
            return any.matches(arn, context);
        }
        let parts: Vec<&str> = arn.splitn(6, ':').collect();
        parts.len() == self.0.len()
            && self.0.iter().zip(parts).all(|(pattern, part)| pattern.matches(part, context))
    }
}

impl Condition {
    /// Parses an operator over a key with its values.
    ///
    /// # Errors
    /// Names the operator or the value that it can't have.
    pub fn parse(operator: &str, key: &str, values: &[String]) -> Result<Self, PolicyError> {
        let (quantifier, name) = match operator.split_once(':') {
            None => (Quantifier::Single, operator),
            Some(("ForAnyValue", name)) => (Quantifier::Any, name),
            Some(("ForAllValues", name)) => (Quantifier::All, name),
            Some(_) => return Err(PolicyError::Operator(operator.into())),
        };
        let (name, if_exists) = match name.strip_suffix("IfExists") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let known_key = key.split_once(':').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty());
        if !known_key || key.len() > 256 {
            return Err(PolicyError::Key(key.chars().take(100).collect()));
        }
        if values.is_empty() {
            return Err(PolicyError::Empty("a condition's list of values"));
        }
        let bad = |value: &str| PolicyError::Value {
            operator: operator.to_owned(),
            value: value.chars().take(100).collect(),
        };
        let texts = |wildcards: bool| -> Result<Vec<Pattern>, PolicyError> {
            values.iter().map(|value| Pattern::parse(value, wildcards)).collect()
        };
        let arns = || values.iter().map(|v| ArnPattern::parse(v)).collect::<Result<Vec<_>, _>>();
        let numbers = || {
            let finite = |v: &String| v.parse().ok().filter(|n: &f64| n.is_finite());
            values.iter().map(|v| finite(v).ok_or_else(|| bad(v))).collect::<Result<Vec<_>, _>>()
        };
        let dates =
            || values.iter().map(|v| date(v).ok_or_else(|| bad(v))).collect::<Result<Vec<_>, _>>();
        let nets =
            || values.iter().map(|v| net(v).ok_or_else(|| bad(v))).collect::<Result<Vec<_>, _>>();
        let truths =
            || values.iter().map(|v| truth(v).ok_or_else(|| bad(v))).collect::<Result<Vec<_>, _>>();
        use Order::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual};
        let (test, negated) = match name {
            "StringEquals" => (Test::Text(texts(false)?, true), false),
            "StringNotEquals" => (Test::Text(texts(false)?, true), true),
            "StringEqualsIgnoreCase" => (Test::Text(texts(false)?, false), false),
            "StringNotEqualsIgnoreCase" => (Test::Text(texts(false)?, false), true),
            "StringLike" => (Test::Text(texts(true)?, true), false),
            "StringNotLike" => (Test::Text(texts(true)?, true), true),
            // Lambda and IAM take these two for one another.
            "ArnEquals" | "ArnLike" => (Test::Arn(arns()?), false),
            "ArnNotEquals" | "ArnNotLike" => (Test::Arn(arns()?), true),
            "NumericEquals" => (Test::Number(Equal, numbers()?), false),
            "NumericNotEquals" => (Test::Number(Equal, numbers()?), true),
            "NumericLessThan" => (Test::Number(Less, numbers()?), false),
            "NumericLessThanEquals" => (Test::Number(LessOrEqual, numbers()?), false),
            "NumericGreaterThan" => (Test::Number(Greater, numbers()?), false),
            "NumericGreaterThanEquals" => (Test::Number(GreaterOrEqual, numbers()?), false),
            "DateEquals" => (Test::Date(Equal, dates()?), false),
            "DateNotEquals" => (Test::Date(Equal, dates()?), true),
            "DateLessThan" => (Test::Date(Less, dates()?), false),
            "DateLessThanEquals" => (Test::Date(LessOrEqual, dates()?), false),
            "DateGreaterThan" => (Test::Date(Greater, dates()?), false),
            "DateGreaterThanEquals" => (Test::Date(GreaterOrEqual, dates()?), false),
            "Bool" => (Test::Bool(truths()?), false),
            "IpAddress" => (Test::Address(nets()?), false),
            "NotIpAddress" => (Test::Address(nets()?), true),
            "Null" if !if_exists && quantifier == Quantifier::Single => match truths()?[..] {
                [absent] => (Test::Null(absent), false),
                _ => return Err(bad(&values[1])),
            },
            _ => return Err(PolicyError::Operator(operator.chars().take(100).collect())),
        };
        Ok(Self { key: key.to_ascii_lowercase(), test, negated, if_exists, quantifier })
    }

    /// Whether it holds for a request.
    pub fn holds(&self, context: &Context) -> bool {
        let values = context.get(&self.key);
        if let Test::Null(absent) = self.test {
            return values.is_empty() == absent;
        }
        if values.is_empty() {
            return self.if_exists
                || match self.quantifier {
                    Quantifier::Single => self.negated,
                    Quantifier::Any => false,
                    Quantifier::All => true,
                };
        }
        let holds = |value: &String| self.test.fits(value, context) != self.negated;
        match self.quantifier {
            Quantifier::Any => values.iter().any(holds),
            // Of several values where one is meant, an Allow must not choose the one that suits it, nor a
            // Deny with a negated operator the one that does not.
            Quantifier::Single | Quantifier::All => values.iter().all(holds),
        }
    }
}

impl Test {
    /// Whether one of the policy's values fits the request's. One that is not of the kind fits none.
    fn fits(&self, value: &str, context: &Context) -> bool {
        match self {
            Self::Text(patterns, true) => patterns.iter().any(|p| p.matches(value, context)),
            Self::Text(patterns, false) => {
                patterns.iter().any(|p| p.matches_any_case(value, context))
            }
            Self::Arn(patterns) => patterns.iter().any(|p| p.matches(value, context)),
            Self::Number(order, numbers) => {
                let value = value.parse::<f64>();
                value.is_ok_and(|value| numbers.iter().any(|n| order.holds(&value, n)))
            }
            Self::Date(order, dates) => {
                date(value).is_some_and(|value| dates.iter().any(|d| order.holds(&value, d)))
            }
            Self::Bool(truths) => truth(value).is_some_and(|value| truths.contains(&value)),
            Self::Address(nets) => {
                let address = value.parse::<IpAddr>().map(|address| address.to_canonical());
                address.is_ok_and(|address| nets.iter().any(|net| net.contains(&address)))
            }
            Self::Null(_) => false,
        }
    }
}

fn truth(text: &str) -> Option<bool> {
    match text {
        _ if text.eq_ignore_ascii_case("true") => Some(true),
        _ if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

/// A net such as `10.0.0.0/8`, or one address.
fn net(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// A point in time in one of the forms that W3C's profile of ISO 8601 has, or in seconds since 1970.
fn date(text: &str) -> Option<OffsetDateTime> {
    if let Ok(seconds) = text.parse::<i64>() {
        return OffsetDateTime::from_unix_timestamp(seconds).ok();
    }
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Some(time.to_offset(UtcOffset::UTC));
    }
    let minutes = format_description!("[year]-[month]-[day]T[hour]:[minute]Z");
    if let Ok(time) = PrimitiveDateTime::parse(text, minutes) {
        return Some(time.assume_utc());
    }
    let day = Date::parse(text, format_description!("[year]-[month]-[day]")).ok()?;
    Some(day.midnight().assume_utc())
}
