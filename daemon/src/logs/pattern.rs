//! CloudWatch's filter patterns, as far as they find text and members of JSON events.
//!
//! | pattern | events |
//! |---|---|
//! | `a "b c" -d` | with `a` and `b c`, without `d` |
//! | `?a ?b` | with `a` or `b` |
//! | `{ $.level = "ERROR" && $.took > 5 }` | that are JSON objects with such members |
//!
//! Terms are found anywhere in an event, upper and lower case apart. Regular expressions (`%…%`) and
//! patterns of columns (`[a, b]`) are refused by name.

use serde_json::Value;

/// Most conditions of a pattern.
const CONDITIONS: usize = 64;

/// Why a pattern can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Invalid filter pattern: {0}")]
pub struct PatternError(String);

/// A pattern.
#[derive(Debug, Clone, PartialEq)]
pub enum Pattern {
    /// Text: all of `all`, one of `any` if there are some, none of `none`.
    Terms {
        /// Without a sign.
        all: Vec<String>,
        /// With `?`.
        any: Vec<String>,
        /// With `-`.
        none: Vec<String>,
    },
    /// JSON: all conditions, or any.
    Members {
        /// Joined by `&&`, not `||`.
        all: bool,
        /// At least one.
        conditions: Vec<Condition>,
    },
}

/// A condition on a member of a JSON event.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    path: Vec<Step>,
    comparison: Comparison,
    operand: Operand,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Member(String),
    Index(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    /// Pieces between `*`.
    Text(Vec<String>),
    Number(f64),
}

impl Pattern {
    /// Reads a pattern; an empty one matches everything.
    ///
    /// # Errors
    /// Says what is wrong, or not supported.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let text = text.trim();
        if let Some(inside) = text.strip_prefix('{') {
            let inside = inside.strip_suffix('}').ok_or_else(|| wrong("} is missing"))?;
            return members(inside);
        }
        if text.starts_with('[') {
            return Err(wrong("patterns of columns, [a, b], are not supported"));
        }
        let (mut all, mut any, mut none) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = text;
        while !rest.is_empty() {
            let (list, term) = match rest.as_bytes()[0] {
                b'?' => (&mut any, &rest[1..]),
                b'-' => (&mut none, &rest[1..]),
                _ => (&mut all, rest),
            };
            let (term, after) = word(term)?;
            if term.starts_with('%') {
                return Err(wrong("regular expressions, %…%, are not supported"));
            }
            if term.is_empty() {
                return Err(wrong("a term is empty"));
            }
            list.push(term);
            rest = after.trim_start();
        }
        if all.len() + any.len() + none.len() > CONDITIONS {
            return Err(wrong("too many terms"));
        }
        Ok(Self::Terms { all, any, none })
    }

    /// Whether it fits an event.
    pub fn fits(&self, message: &str) -> bool {
        let has = |term: &String| message.contains(term.as_str());
        match self {
            Self::Terms { all, any, none } => {
                all.iter().all(has)
                    && (any.is_empty() || any.iter().any(has))
                    && !none.iter().any(has)
            }
            Self::Members { all, conditions } => {
                if !message.trim_start().starts_with('{') {
                    return false;
                }
                let Ok(event) = serde_json::from_str::<Value>(message) else { return false };
                match all {
                    true => conditions.iter().all(|condition| condition.holds(&event)),
                    false => conditions.iter().any(|condition| condition.holds(&event)),
                }
            }
        }
    }
}

fn wrong(what: &str) -> PatternError {
    PatternError(what.to_owned())
}

/// A word, or what is in quotes, and what follows it.
fn word(text: &str) -> Result<(String, &str), PatternError> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        return Ok((text[..end].to_owned(), &text[end..]));
    };
    let (mut term, mut escaped) = (String::new(), false);
    for (at, c) in quoted.char_indices() {
        match c {
            '"' if !escaped => return Ok((term, &quoted[at + 1..])),
            '\\' if !escaped => escaped = true,
            c => {
                term.push(c);
                escaped = false;
            }
        }
    }
    Err(wrong("a quote is not closed"))
}

fn members(text: &str) -> Result<Pattern, PatternError> {
    let (mut conditions, mut joined) = (Vec::new(), None);
    let mut rest = text.trim();
    loop {
        let (condition, after) = condition(rest)?;
        conditions.push(condition);
        rest = after.trim_start();
        if rest.is_empty() {
            break;
        }
        let all = rest.starts_with("&&");
        if !all && !rest.starts_with("||") {
            return Err(wrong("conditions are joined by && or ||"));
        }
        if *joined.get_or_insert(all) != all {
            return Err(wrong("&& and || in one pattern are not supported"));
        }
        if conditions.len() >= CONDITIONS {
            return Err(wrong("too many conditions"));
        }
        rest = rest[2..].trim_start();
    }
    Ok(Pattern::Members { all: joined.unwrap_or(true), conditions })
}

fn condition(text: &str) -> Result<(Condition, &str), PatternError> {
    let operator = text.find(['=', '!', '<', '>']);
    let operator = operator.ok_or_else(|| {
        wrong("a condition is $.member, one of = != < <= > >=, and a text or a number")
    })?;
    let path = path(text[..operator].trim())?;
    let rest = &text[operator..];
    let (comparison, length) = match rest.as_bytes() {
        [b'!', b'=', ..] => (Comparison::Unequal, 2),
        [b'<', b'=', ..] => (Comparison::LessOrEqual, 2),
        [b'>', b'=', ..] => (Comparison::GreaterOrEqual, 2),
        [b'=', ..] => (Comparison::Equal, 1),
        [b'<', ..] => (Comparison::Less, 1),
        [b'>', ..] => (Comparison::Greater, 1),
        _ => return Err(wrong("an operator is not one of = != < <= > >=")),
    };
    let rest = rest[length..].trim_start();
    let quoted = rest.starts_with('"');
    let (value, after) = match quoted {
        true => word(rest)?,
        false => {
            let end = rest.find(|c: char| c.is_whitespace() || matches!(c, '&' | '|'));
            let (value, after) = rest.split_at(end.unwrap_or(rest.len()));
            (value.to_owned(), after)
        }
    };
    if value.is_empty() && !quoted {
        return Err(wrong("a condition has no value"));
    }
    let number = value.parse::<f64>().ok().filter(|number| !quoted && number.is_finite());
    let operand = match number {
        Some(number) => Operand::Number(number),
        None => Operand::Text(value.split('*').map(str::to_owned).collect()),
    };
    let ordered = !matches!(comparison, Comparison::Equal | Comparison::Unequal);
    if ordered && number.is_none() {
        return Err(wrong("< and > compare with numbers"));
    }
    Ok((Condition { path, comparison, operand }, after))
}

/// `$.a.b[0]`
fn path(text: &str) -> Result<Vec<Step>, PatternError> {
    let members = text.strip_prefix("$.").ok_or_else(|| wrong("a member begins with $."))?;
    let mut path = Vec::new();
    for part in members.split('.') {
        let (name, mut indices) = part.split_at(part.find('[').unwrap_or(part.len()));
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || matches!(c, '(' | '"')) {
            return Err(wrong("a member's name is empty or has blanks"));
        }
        path.push(Step::Member(name.to_owned()));
        while let Some(rest) = indices.strip_prefix('[') {
            let index = rest.split_once(']').and_then(|(n, after)| Some((n.parse().ok()?, after)));
            let (index, after) = index.ok_or_else(|| wrong("an index is no number"))?;
            path.push(Step::Index(index));
            indices = after;
        }
        if !indices.is_empty() {
            return Err(wrong("something follows an index"));
        }
    }
    Ok(path)
}

impl Condition {
    fn holds(&self, event: &Value) -> bool {
        let found = self.path.iter().try_fold(event, |value, step| match step {
            Step::Member(name) => value.get(name),
            Step::Index(index) => value.get(index),
        });
        let Some(found) = found else { return false };
        match &self.operand {
            Operand::Number(number) => {
                let Some(value) = found.as_f64() else { return false };
                match self.comparison {
                    Comparison::Equal => value == *number,
                    Comparison::Unequal => value != *number,
                    Comparison::Less => value < *number,
                    Comparison::LessOrEqual => value <= *number,
                    Comparison::Greater => value > *number,
                    Comparison::GreaterOrEqual => value >= *number,
                }
            }
            Operand::Text(pieces) => {
                let text = match found {
                    Value::String(text) => text.clone(),
                    Value::Bool(_) | Value::Number(_) => found.to_string(),
                    _ => return false,
                };
                spells(&text, pieces) == (self.comparison == Comparison::Equal)
            }
        }
    }
}

/// Whether `text` is `pieces` with anything between them.
fn spells(text: &str, pieces: &[String]) -> bool {
    let [first, middle @ .., last] = pieces else {
        return pieces.first().is_some_and(|p| p == text);
    };
    let Some(mut rest) = text.strip_prefix(first.as_str()) else { return false };
    for piece in middle {
        let Some(at) = rest.find(piece.as_str()) else { return false };
        rest = &rest[at + piece.len()..];
    }
    rest.ends_with(last.as_str())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn fits(pattern: &str, message: &str) -> bool {
        Pattern::parse(pattern).unwrap().fits(message)
    }

    #[test]
    fn terms_are_found_left_out_and_chosen_among() {
        assert!(fits("", "anything") && fits("  ", ""));
        assert!(fits("ERROR", "[ERROR] x") && !fits("error", "[ERROR] x"));
        assert!(fits("a b", "b then a") && !fits("a b", "a"));
        assert!(fits("\"a b\"", "xa bx") && !fits("\"a b\"", "b a"));
        assert!(fits("a -b", "a") && !fits("a -b", "a b") && !fits("a -\"b c\"", "a b c"));
        assert!(fits("?a ?b", "b") && !fits("?a ?b", "c") && fits("?\"a b\" ?c", "a b"));
        assert!(fits(r#""say \"hi\"""#, r#"they say "hi" again"#));
    }

    #[test]
    fn members_are_compared() {
        let event = r#"{"level":"ERROR","took":7.5,"ok":true,"a":{"b":[{"c":"deep"}]},"n":null}"#;
        for (pattern, expected) in [
            (r#"{ $.level = "ERROR" }"#, true),
            (r#"{$.level="ERR*"}"#, true),
            (r#"{ $.level = "*RR*" }"#, true),
            (r#"{ $.level = "*X*" }"#, false),
            (r#"{ $.level != "INFO" }"#, true),
            ("{ $.level = ERROR }", true),
            ("{ $.took > 7 }", true),
            ("{ $.took <= 7.4 }", false),
            ("{ $.took > 7 && $.level = ERROR }", true),
            ("{ $.took > 8 && $.level = ERROR }", false),
            ("{ $.took > 8 || $.level = ERROR }", true),
            ("{ $.ok = true }", true),
            (r#"{ $.a.b[0].c = "deep" }"#, true),
            ("{ $.a.b[1].c = deep }", false),
            ("{ $.none != x }", false),
            ("{ $.n = null }", false),
            ("{ $.level > 1 }", false),
        ] {
            assert_eq!(fits(pattern, event), expected, "{pattern}");
        }
        assert!(!fits("{ $.a = 1 }", "plain text") && !fits("{ $.a = 1 }", "{\"a\": 1"));
    }

    #[test]
    fn what_is_not_supported_says_so() {
        for pattern in [
            "\"open",
            "-",
            "a ?",
            "%re%",
            "[a, b]",
            "{",
            "{}",
            "{ $.a }",
            "{ a = 1 }",
            "{ $. = 1 }",
            "{ $.a = }",
            "{ $.a < x }",
            "{ $.a = 1 && $.b = 1 || $.c = 1 }",
            "{ $.a[x] = 1 }",
            "{ $.a = 1 $.b = 2 }",
            "{ ($.a = 1) }",
            "{ $.a ! 1 }",
        ] {
            assert!(Pattern::parse(pattern).is_err(), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn no_pattern_panics(pattern in "[{}$.a\\[\\]0\"?%*&|=<>! -]{0,40}", message in ".{0,40}") {
            if let Ok(pattern) = Pattern::parse(&pattern) {
                pattern.fits(&message);
                pattern.fits(&format!("{{\"a\": \"{message}\"}}"));
            }
        }
    }
}
