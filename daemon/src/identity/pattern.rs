//! Texts with wildcards and policy variables, as they stand in policies: `*` is any run of characters, `?`
//! is one, `${aws:username}` is what the request says. What a variable stands for is taken literally: a
//! user whose name is `*` is no wildcard.

use super::policy::{Context, PolicyError};

/// One piece of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Char(char),
    /// `?`
    One,
    /// `*`
    Any,
    /// `${key}` or `${key, 'default'}`; the key in lower case.
    Variable {
        key: String,
        default: Option<String>,
    },
}

/// A text with wildcards and variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    pieces: Vec<Piece>,
    variables: bool,
}

impl Pattern {
    /// Parses a text in which `*` and `?` are wildcards if `wildcards`, and `${…}` are variables.
    ///
    /// # Errors
    /// [`PolicyError::Variable`].
    pub fn parse(text: &str, wildcards: bool) -> Result<Self, PolicyError> {
        let bad = || PolicyError::Variable(text.chars().take(100).collect());
        let (mut pieces, mut rest) = (Vec::new(), text);
        while let Some(c) = rest.chars().next() {
            if let Some(after) = rest.strip_prefix("${") {
                let (inside, after) = after.split_once('}').ok_or_else(bad)?;
                rest = after;
                pieces.push(match inside {
                    "*" => Piece::Char('*'),
                    "?" => Piece::Char('?'),
                    "$" => Piece::Char('$'),
                    _ => variable(inside).ok_or_else(bad)?,
                });
                continue;
            }
            rest = &rest[c.len_utf8()..];
            match c {
                // A second star says nothing more.
                '*' if wildcards && pieces.last() == Some(&Piece::Any) => {}
                '*' if wildcards => pieces.push(Piece::Any),
                '?' if wildcards => pieces.push(Piece::One),
                c => pieces.push(Piece::Char(c)),
            }
        }
        let variables = pieces.iter().any(|piece| matches!(piece, Piece::Variable { .. }));
        Ok(Self { pieces, variables })
    }

    /// Whether the whole of `text` fits. A pattern with a variable that the request says nothing of fits
    /// nothing.
    pub fn matches(&self, text: &str, context: &Context) -> bool {
        if !self.variables {
            return fits(&self.pieces, text, |a, b| a == b);
        }
        self.resolve(context).is_some_and(|pieces| fits(&pieces, text, |a, b| a == b))
    }

    /// The same without regard to case.
    pub fn matches_any_case(&self, text: &str, context: &Context) -> bool {
        let same = |a: char, b: char| a == b || a.to_lowercase().eq(b.to_lowercase());
        self.resolve(context).is_some_and(|pieces| fits(&pieces, text, same))
    }

    /// The pieces between the first colons, at most so many; the last one has all that follows.
    pub fn split(self, most: usize) -> Vec<Self> {
        let mut parts = vec![Vec::new()];
        for piece in self.pieces {
            let count = parts.len();
            match piece {
                Piece::Char(':') if count < most => parts.push(Vec::new()),
                piece => parts[count - 1].push(piece),
            }
        }
        let variables =
            |pieces: &[Piece]| pieces.iter().any(|p| matches!(p, Piece::Variable { .. }));
        parts.into_iter().map(|pieces| Self { variables: variables(&pieces), pieces }).collect()
    }

    /// Whether it is `*` alone.
    pub fn is_any(&self) -> bool {
        self.pieces == [Piece::Any]
    }

    fn resolve(&self, context: &Context) -> Option<Vec<Piece>> {
        let mut resolved = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let Piece::Variable { key, default } = piece else {
                resolved.push(piece.clone());
                continue;
            };
            // Of several values none is the one that is meant.
            let value = match context.get(key) {
                [value] => value,
                [] => default.as_ref()?,
                _ => return None,
            };
            resolved.extend(value.chars().map(Piece::Char));
        }
        Some(resolved)
    }
}

fn variable(inside: &str) -> Option<Piece> {
    let (key, default) = match inside.split_once(',') {
        None => (inside, None),
        Some((key, default)) => {
            let default = default.trim().strip_prefix('\'')?.strip_suffix('\'')?;
            (key.trim_end(), Some(default.to_owned()))
        }
    };
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_/.@".contains(&b);
    let (prefix, name) = key.split_once(':')?;
    let well_formed = !prefix.is_empty()
        && !name.is_empty()
        && prefix.bytes().chain(name.bytes().filter(|b| *b != b':')).all(allowed);
    well_formed.then(|| Piece::Variable { key: key.to_ascii_lowercase(), default })
}

/// Glob matching: on a mismatch the last star takes one character more. At worst the product of both
/// lengths.
fn fits(pieces: &[Piece], text: &str, same: impl Fn(char, char) -> bool) -> bool {
    let mut rest = text.chars();
    let mut at = 0;
    // After which star, and what was left of the text there.
    let mut star = None;
    loop {
        let before = rest.clone();
        let matched = match (pieces.get(at), rest.next()) {
            (Some(Piece::Any), _) => {
                rest = before;
                at += 1;
                star = Some((at, rest.clone()));
                continue;
            }
            (None, None) => return true,
            (Some(Piece::One), Some(_)) => true,
            (Some(Piece::Char(a)), Some(b)) => same(*a, b),
            _ => false,
        };
        if matched {
            at += 1;
            continue;
        }
        let Some((after, ref mut left)) = star else { return false };
        if left.next().is_none() {
            return false;
        }
        (at, rest) = (after, left.clone());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, text: &str, context: &Context) -> bool {
        Pattern::parse(pattern, true).unwrap().matches(text, context)
    }

    #[test]
    fn variables_stand_for_what_they_say_literally() {
        let mut context = Context::default();
        context.set("aws:username", "a*");
        for (pattern, text, expected) in [
            ("user/${aws:username}", "user/a*", true),
            ("user/${AWS:UserName}", "user/a*", true),
            ("user/${aws:username}", "user/ab", false),
            ("user/${aws:username}/*", "user/a*/x", true),
            ("${aws:nobody}", "", false),
            ("${aws:nobody}", "${aws:nobody}", false),
            ("${aws:nobody, 'x'}", "x", true),
            ("${*}${?}${$}", "*?$", true),
            ("${*}", "x", false),
            ("$*", "$x", true),
        ] {
            assert_eq!(matches(pattern, text, &context), expected, "{pattern} {text}");
        }
        for bad in ["${", "${aws}", "${}", "${aws:}", "${a b:c}", "${aws:x, y}", "${aws:x,'y}"] {
            assert!(Pattern::parse(bad, true).is_err(), "{bad}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let pattern = "*a".repeat(1000) + "b";
        let text = "a".repeat(10_000);
        let start = std::time::Instant::now();
        assert!(!matches(&pattern, &text, &Context::default()));
        assert!(start.elapsed() < std::time::Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn wildcards_match_as_the_regular_expression_does(
            pattern in "[ab*?:é]{0,10}", text in "[ab:é]{0,12}"
        ) {
            let regex: String = pattern.chars().map(|c| match c {
                '*' => ".*".to_owned(),
                '?' => ".".to_owned(),
                c => regex::escape(&c.to_string()),
            }).collect();
            let regex = regex::Regex::new(&format!("(?s)^{regex}$")).unwrap();
            prop_assert_eq!(matches(&pattern, &text, &Context::default()), regex.is_match(&text));
        }

        #[test]
        fn any_text_parses_or_fails(text in "[\\PC${}:,'*?]{0,60}", other in "\\PC{0,20}") {
            if let Ok(pattern) = Pattern::parse(&text, true) {
                let _ = pattern.matches(&other, &Context::default());
            }
        }

        #[test]
        fn without_wildcards_a_pattern_is_its_text(text in "[a*?:]{0,8}", other in "[a*?:]{0,8}") {
            let pattern = Pattern::parse(&text, false).unwrap();
            prop_assert!(pattern.matches(&text, &Context::default()));
            prop_assert_eq!(pattern.matches(&other, &Context::default()), text == other);
        }
    }
}
