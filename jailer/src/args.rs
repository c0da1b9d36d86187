//! The command line, parsed by hand: `--name value` pairs, each required, each once, each value a
//! number within its range; `--only-user` stands for `--uid` and `--gid`. There are no paths: all files
//! come as descriptors. The caller is firn; strictness here catches its mistakes, not an attacker.

use std::fmt;

/// Lowest user and group id for a VMM: what distributions hand to people and services is below.
pub const MIN_ID: u64 = 65_537;

/// Most control group hierarchies: memory, cpu and pids each on its own.
pub const MAX_CGROUPS: u64 = 8;

/// What the cage is built from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Who the VMM is.
    pub user: User,
    /// Most descriptors that the VMM may have.
    pub nofile: u64,
    /// Longest file in bytes that the VMM may make.
    pub fsize: u64,
    /// Bytes that the VMM may lock in memory.
    pub memlock: u64,
    /// Number of `cgroup.procs` descriptors of version 1, from descriptor 6 on.
    pub cgroups: u32,
}

/// Who a VMM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// A user and a group that nothing else on the machine has.
    Own {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// The only user of the user namespace that the jailer was started in: outside of it, the one who
    /// started firn.
    Only,
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
    /// `--only-user` and an id.
    TwoUsers,
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
            Self::TwoUsers => write!(f, "--only-user comes without --uid and --gid"),
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
    let mut only_user = false;
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        if name == b"--only-user" {
            if std::mem::replace(&mut only_user, true) {
                return Err(ArgumentError::Twice("--only-user"));
            }
            continue;
        }
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
    let user = match (only_user, numbers[0], numbers[1]) {
        (true, None, None) => User::Only,
        (true, ..) => return Err(ArgumentError::TwoUsers),
        (false, ..) => User::Own { uid: get(0)? as u32, gid: get(1)? as u32 },
    };
    Ok(Plan { user, nofile: get(2)?, fsize: get(3)?, memlock: get(4)?, cgroups: get(5)? as u32 })
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
        assert_eq!(plan.user, User::Own { uid: 70000, gid: 70001 });
        assert_eq!((plan.nofile, plan.cgroups), (256, 3));
        let only = GOOD.replace("--uid 70000 --gid 70001", "--only-user");
        assert_eq!(parse(&words(&only)).unwrap().user, User::Only);
    }

    #[test]
    fn each_mistake_has_its_error() {
        let parse = |line: &str| parse(&words(line)).unwrap_err();
        assert_eq!(parse("--bogus 1"), ArgumentError::Unknown("--bogus".into()));
        assert_eq!(parse("--uid"), ArgumentError::NoValue("--uid"));
        assert_eq!(parse("--uid 70000 --uid 70000"), ArgumentError::Twice("--uid"));
        assert_eq!(parse("--uid 70000"), ArgumentError::Missing("--gid"));
        assert_eq!(parse("--nofile 16"), ArgumentError::Missing("--uid"));
        assert_eq!(parse("--only-user --only-user"), ArgumentError::Twice("--only-user"));
        assert_eq!(parse("--only-user --gid 70000"), ArgumentError::TwoUsers);
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
        fn what_is_asked_for_is_what_is_done(
            uid in MIN_ID..u64::from(u32::MAX),
            gid in MIN_ID..u64::from(u32::MAX),
            nofile in 16u64..=4096,
            fsize in 1u64 << 20..=1 << 40,
            memlock in 0u64..=1 << 40,
            cgroups in 0..=MAX_CGROUPS,
            order in Just([0, 1, 2, 3, 4, 5]).prop_shuffle(),
        ) {
            let values = [uid, gid, nofile, fsize, memlock, cgroups];
            let line = order.map(|index| format!("{} {}", NUMBERS[index].0, values[index]));
            let user = User::Own { uid: uid as u32, gid: gid as u32 };
            let plan = Plan { user, nofile, fsize, memlock, cgroups: cgroups as u32 };
            prop_assert_eq!(parse(&words(&line.join(" "))), Ok(plan));
            // One step over either end of a range, or one argument less.
            for (index, (name, min, max)) in NUMBERS.into_iter().enumerate() {
                let without = order.iter().filter(|&&i| i != index);
                let rest: Vec<_> =
                    without.map(|&i| format!("{} {}", NUMBERS[i].0, values[i])).collect();
                let rest = rest.join(" ");
                prop_assert_eq!(parse(&words(&rest)), Err(ArgumentError::Missing(name)));
                for bad in min.checked_sub(1).into_iter().chain([max + 1]) {
                    let found = parse(&words(&format!("{rest} {name} {bad}")));
                    prop_assert!(matches!(found, Err(ArgumentError::Number { .. })), "{found:?}");
                }
            }
        }

        #[test]
        fn no_argument_makes_it_panic_or_hands_out_a_system_id(
            arguments in proptest::collection::vec(
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..12),
                    "(--only-user|--uid|--gid|--nofile|--fsize|--memlock|--cgroups|/x|[0-9]{1,8})"
                        .prop_map(String::into_bytes),
                ],
                0..20,
            )
        ) {
            if let Ok(Plan { user: User::Own { uid, gid }, .. }) = parse(&arguments) {
                prop_assert!(u64::from(uid) >= MIN_ID && u64::from(gid) >= MIN_ID);
            }
        }
    }
}
