//! The ways in which a caller may name a function: `name`, a partial ARN
//! (`123456789012:function:name`), a full ARN, each with or without `:qualifier`.
//!
//! Follows the pattern of `NamespacedFunctionName` in Lambda's service model, read as a regular
//! expression engine reads it: an optional prefix is taken wherever it fits.

use std::fmt;

use super::error::ApiError;

/// Longest text that names a function, ARN or not.
const MAX_LENGTH: usize = 140;

/// Longest bare function name.
const MAX_NAME: usize = 64;

/// The pattern that messages quote.
const PATTERN: &str = "(arn:(aws[a-zA-Z-]*)?:lambda:)?([a-z]{2}(-gov)?-[a-z]+-\\d{1}:)?(\\d{12}:)?\
    (function:)?([a-zA-Z0-9-_]+)(:(\\$LATEST|[a-zA-Z0-9-_]+))?";

/// Where functions of this daemon live: what its ARNs say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Region, such as `us-east-1`.
    pub region: String,
    /// Twelve digits.
    pub account: String,
}

impl Place {
    /// The ARN of a function without a qualifier.
    pub fn arn(&self, name: &str) -> String {
        format!("arn:aws:lambda:{}:{}:function:{name}", self.region, self.account)
    }

    /// The ARN of a layer without a version.
    pub fn layer_arn(&self, name: &str) -> String {
        format!("arn:aws:lambda:{}:{}:layer:{name}", self.region, self.account)
    }
}

/// A parsed reference to a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Region, where the reference has one.
    pub region: Option<String>,
    /// Account, where the reference has one.
    pub account: Option<String>,
    /// The bare name.
    pub name: String,
    /// Version or alias, from the reference or the `Qualifier` parameter.
    pub qualifier: Option<String>,
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.qualifier.as_ref().map_or(Ok(()), |q| write!(f, ":{q}"))
    }
}

impl Reference {
    /// Parses a reference and joins it with the `Qualifier` parameter.
    ///
    /// # Errors
    /// A Lambda validation error that quotes the offending value, or says that the two qualifiers
    /// differ.
    pub fn parse(text: &str, qualifier: Option<&str>) -> Result<Self, ApiError> {
        if text.len() > MAX_LENGTH {
            return Err(ApiError::validation(
                "functionName",
                text,
                format!("Member must have length less than or equal to {MAX_LENGTH}"),
            ));
        }
        let mut reference = parse(text).ok_or_else(|| {
            ApiError::validation(
                "functionName",
                text,
                format!("Member must satisfy regular expression pattern: {PATTERN}"),
            )
        })?;
        if reference.name.len() > MAX_NAME {
            return Err(ApiError::validation(
                "functionName",
                &reference.name,
                format!("Member must have length less than or equal to {MAX_NAME}"),
            ));
        }
        let Some(qualifier) = qualifier else { return Ok(reference) };
        if qualifier.is_empty() || qualifier.len() > 128 || !is_qualifier(qualifier) {
            return Err(ApiError::validation(
                "qualifier",
                qualifier,
                "Member must satisfy regular expression pattern: \\$LATEST|[a-zA-Z0-9-_$]+".into(),
            ));
        }
        match &reference.qualifier {
            Some(own) if own != qualifier => Err(ApiError::InvalidParameterValue(
                "The derived qualifier from the function name does not match the specified \
                 qualifier."
                    .into(),
            )),
            _ => {
                reference.qualifier = Some(qualifier.to_owned());
                Ok(reference)
            }
        }
    }

    /// The ARN that an error message names, as the caller meant it.
    pub fn arn(&self, place: &Place) -> String {
        let place = Place {
            region: self.region.clone().unwrap_or_else(|| place.region.clone()),
            account: self.account.clone().unwrap_or_else(|| place.account.clone()),
        };
        let arn = place.arn(&self.name);
        match &self.qualifier {
            Some(qualifier) => format!("{arn}:{qualifier}"),
            None => arn,
        }
    }

    /// Whether the function can live in `place`.
    pub fn reaches(&self, place: &Place) -> bool {
        self.region.as_ref().is_none_or(|r| *r == place.region)
            && self.account.as_ref().is_none_or(|a| *a == place.account)
    }
}

fn parse(text: &str) -> Option<Reference> {
    let mut rest = text;
    if let Some(after) = rest.strip_prefix("arn:") {
        let (partition, after) = after.split_once(':')?;
        let known = partition.is_empty()
            || partition
                .strip_prefix("aws")
                .is_some_and(|p| p.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-'));
        if !known {
            return None;
        }
        rest = after.strip_prefix("lambda:")?;
    }
    let region = take(&mut rest, is_region);
    let account = take(&mut rest, |part| part.len() == 12 && is_digits(part));
    let _ = take(&mut rest, |part| part == "function");
    let (name, qualifier) = match rest.split_once(':') {
        Some((name, qualifier)) => (name, Some(qualifier)),
        None => (rest, None),
    };
    let well_formed = is_name(name) && qualifier.is_none_or(|q| q == "$LATEST" || is_name(q));
    well_formed.then(|| Reference {
        region,
        account,
        name: name.to_owned(),
        qualifier: qualifier.map(str::to_owned),
    })
}

/// Takes the part before the next colon if it fits.
fn take(rest: &mut &str, fits: impl Fn(&str) -> bool) -> Option<String> {
    let (part, after) = rest.split_once(':')?;
    if !fits(part) {
        return None;
    }
    *rest = after;
    Some(part.to_owned())
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Whether `text` consists of the letters that names have.
pub fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Whether `text` can be an alias: a name that is not all digits.
pub fn is_alias(text: &str) -> bool {
    text.len() <= 128 && is_name(text) && !is_digits(text)
}

fn is_qualifier(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'$'))
}

/// Whether `text` looks like a region: `us-east-1`, `us-gov-west-1`, `eusc-de-east-1`.
pub fn is_region(text: &str) -> bool {
    let text = text.strip_prefix("eusc-").unwrap_or(text);
    let parts: Vec<&str> = text.split('-').collect();
    let (country, middle, area, number) = match parts[..] {
        [country, area, number] => (country, "gov", area, number),
        [country, middle, area, number] => (country, middle, area, number),
        _ => return false,
    };
    let lower = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_lowercase());
    let isolated = middle.strip_prefix("iso").is_some_and(|s| s.len() <= 1);
    country.len() == 2
        && lower(country)
        && lower(middle)
        && (middle == "gov" || isolated)
        && lower(area)
        && number.len() == 1
        && is_digits(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place() -> Place {
        Place { region: "us-east-1".into(), account: "000000000000".into() }
    }

    fn name_of(text: &str) -> (String, Option<String>) {
        let reference = Reference::parse(text, None).unwrap();
        (reference.name, reference.qualifier)
    }

    #[test]
    fn every_form_names_the_function() {
        for text in [
            "hello",
            "function:hello",
            "000000000000:hello",
            "000000000000:function:hello",
            "us-east-1:000000000000:function:hello",
            "arn:aws:lambda:us-east-1:000000000000:function:hello",
            "arn:aws-us-gov:lambda:us-gov-west-1:000000000000:function:hello",
        ] {
            assert_eq!(name_of(text), ("hello".into(), None), "{text}");
            let (name, qualifier) = name_of(&format!("{text}:$LATEST"));
            assert_eq!((name.as_str(), qualifier.as_deref()), ("hello", Some("$LATEST")), "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "a b",
            "hello:",
            ":hello",
            "a/b",
            "a:b:c",
            "arn:aws:s3:::bucket",
            "arn:google:lambda:us-east-1:000000000000:function:x",
            "héllo",
        ] {
            assert!(Reference::parse(text, None).is_err(), "{text:?}");
        }
        assert!(Reference::parse(&"x".repeat(65), None).is_err());
        assert!(Reference::parse(&"x".repeat(141), None).is_err());
        assert!(Reference::parse(&"x".repeat(64), None).is_ok());
    }

    #[test]
    fn qualifiers_must_agree() {
        let both = Reference::parse("hello:$LATEST", Some("$LATEST")).unwrap();
        assert_eq!(both.qualifier.as_deref(), Some("$LATEST"));
        assert!(Reference::parse("hello:1", Some("2")).is_err());
        assert!(Reference::parse("hello", Some("a b")).is_err());
    }

    #[test]
    fn another_region_or_account_is_out_of_reach() {
        let far = Reference::parse("arn:aws:lambda:eu-west-1:000000000000:function:x", None);
        let far = far.unwrap();
        assert!(!far.reaches(&place()));
        assert_eq!(far.arn(&place()), "arn:aws:lambda:eu-west-1:000000000000:function:x");
        let other = Reference::parse("111111111111:function:x", None).unwrap();
        assert!(!other.reaches(&place()));
    }

    proptest! {
        #[test]
        fn no_qualifier_is_both_version_and_alias(text in "\\$?[0-9A-Za-z_-]{0,8}") {
            let version = text.parse::<crate::function::Version>().is_ok();
            prop_assert!(!(version && is_alias(&text)));
            let numeral = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let name = !text.is_empty() && !text.starts_with('$');
            prop_assert_eq!(is_alias(&text), name && !numeral);
        }

        #[test]
        fn an_arn_parses_back(name in "[a-zA-Z0-9_-]{1,64}", qualifier in "[a-zA-Z0-9_-]{1,20}") {
            let arn = place().arn(&name);
            let reference = Reference::parse(&arn, Some(&qualifier)).unwrap();
            prop_assert_eq!(&reference.name, &name);
            prop_assert_eq!(reference.arn(&place()), format!("{arn}:{qualifier}"));
        }

        #[test]
        fn any_text_parses_or_fails(text in "\\PC{0,150}") {
            let _ = Reference::parse(&text, None);
            let _ = Reference::parse(&format!("arn:aws:lambda:{text}"), Some(&text));
        }
    }
}
