//! The command line, parsed by hand: `--name value` pairs, each required, each once, each value a
//! number within its range. There are no paths: all files come as descriptors. The caller is firn;
//! strictness here catches its mistakes, not an attacker.

use std::fmt;

/// Lowest user and group id for a VMM: what distributions hand to people and services is below.
pub const MIN_ID: u64 = 65_537;

/// Most control group hierarchies: memory, cpu and pids each on its own.
pub const MAX_CGROUPS: u64 = 8;

/// What the cage is built from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// User id of the VMM.
    pub uid: u32,
    /// Group id of the VMM.
    pub gid: u32,
    /// Most descriptors that the VMM may have.
    pub nofile: u64,
    /// Longest file in bytes that the VMM may make.
    pub fsize: u64,
    /// Bytes that the VMM may lock in memory.
    pub memlock: u64,
    /// Number of `cgroup.procs` descriptors of version 1, from descriptor 6 on.
    pub cgroups: u32,
}

/// A command line that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArgumentError {
    /// No argument of that name.
    Unknown(String),
    /// A name without a value.
    NoValue(&'static str),
    /// Given more than once.
    Twice(&'static str),
    /// Not given.
    Missing(&'static str),
    /// Not a decimal number within its range.
    Number { name: &'static str, value: String, min: u64, max: u64 },
}

impl fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => write!(f, "unknown argument {name:?}"),
            Self::NoValue(name) => write!(f, "{name} needs a value"),
            Self::Twice(name) => write!(f, "{name} is given twice"),
            Self::Missing(name) => write!(f, "{name} is missing"),
            Self::Number { name, value, min, max } => {
                write!(f, "{name} must be a number from {min} to {max}, not {value:?}")
            }
        }
    }
}

/// Names of the numbers, with what is allowed.
const NUMBERS: [(&str, u64, u64); 6] = [
    // -1 means "leave as it is" to the kernel, so the highest id is no id.
    ("--uid", MIN_ID, u32::MAX as u64 - 1),
    ("--gid", MIN_ID, u32::MAX as u64 - 1),
    ("--nofile", 16, 4096),
    ("--fsize", 1 << 20, 1 << 40),
    ("--memlock", 0, 1 << 40),
    ("--cgroups", 0, MAX_CGROUPS),
];

/// Parses the arguments after the program's name.
pub fn parse(arguments: &[Vec<u8>]) -> Result<Plan, ArgumentError> {
    let mut numbers = [None; NUMBERS.len()];
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        let Some(index) = NUMBERS.iter().position(|n| n.0.as_bytes() == name) else {
            return Err(ArgumentError::Unknown(String::from_utf8_lossy(name).into_owned()));
        };
        let (name, min, max) = NUMBERS[index];
        let value = rest.next().ok_or(ArgumentError::NoValue(name))?;
        if numbers[index].replace(number(name, value, min, max)?).is_some() {
            return Err(ArgumentError::Twice(name));
        }
    }
    let get = |index: usize| numbers[index].ok_or(ArgumentError::Missing(NUMBERS[index].0));
    Ok(Plan {
        uid: get(0)? as u32,
        gid: get(1)? as u32,
        nofile: get(2)?,
        fsize: get(3)?,
        memlock: get(4)?,
        cgroups: get(5)? as u32,
    })
}

/// Digits only: `u64::from_str` would also take a plus sign.
fn number(name: &'static str, value: &[u8], min: u64, max: u64) -> Result<u64, ArgumentError> {
    let text = String::from_utf8_lossy(value);
    value
        .iter()
        .all(u8::is_ascii_digit)
        .then(|| text.parse::<u64>().ok())
        .flatten()
        .filter(|n| (min..=max).contains(n))
        .ok_or_else(|| ArgumentError::Number { name, value: text.into_owned(), min, max })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "--uid 70000 --gid 70001 --nofile 256 --fsize 1073741824 --memlock 65536 \
                        --cgroups 3";

    fn words(line: &str) -> Vec<Vec<u8>> {
        line.split_whitespace().map(|w| w.as_bytes().to_vec()).collect()
    }

    #[test]
    fn a_whole_command_line_is_understood() {
        let plan = parse(&words(GOOD)).unwrap();
        assert_eq!((plan.uid, plan.gid, plan.nofile, plan.cgroups), (70000, 70001, 256, 3));
    }

    #[test]
    fn each_mistake_has_its_error() {
        let parse = |line: &str| parse(&words(line)).unwrap_err();
        assert_eq!(parse("--bogus 1"), ArgumentError::Unknown("--bogus".into()));
        assert_eq!(parse("--uid"), ArgumentError::NoValue("--uid"));
        assert_eq!(parse("--uid 70000 --uid 70000"), ArgumentError::Twice("--uid"));
        assert_eq!(parse("--uid 70000"), ArgumentError::Missing("--gid"));
        for bad in ["0", "1000", "-1", "+70000", "4294967295", "18446744073709551616", "x", "7e4"] {
            assert!(
                matches!(parse(&format!("--uid {bad}")), ArgumentError::Number { .. }),
                "{bad}"
            );
        }
        assert_eq!(parse(&format!("{GOOD} stray")), ArgumentError::Unknown("stray".into()));
    }

    proptest! {
        #[test]
        fn no_argument_makes_it_panic_or_hands_out_a_system_id(
            arguments in proptest::collection::vec(
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..12),
                    "(--uid|--gid|--nofile|--fsize|--memlock|--cgroups|/x|[0-9]{1,8})"
                        .prop_map(String::into_bytes),
                ],
                0..20,
            )
        ) {
            if let Ok(plan) = parse(&arguments) {
                prop_assert!(u64::from(plan.uid) >= MIN_ID && u64::from(plan.gid) >= MIN_ID);
            }
        }
    }
}
