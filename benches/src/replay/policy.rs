//! What stands ready, and what stays.

use std::str::FromStr;

use crate::subject::Origin;

/// A policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Seconds that an idle instance stays; 0: each invocation gets a new one.
    pub keep_warm: f64,
    /// VMM processes kept ready.
    pub shells: usize,
    /// What new instances come from.
    pub start: Origin,
    /// Instances at once; further invocations wait.
    pub max: usize,
    /// An instance is reset after each invocation.
    pub reset: bool,
}

/// Longest time that an instance may stay: a day.
const MAX_KEEP_WARM: f64 = 86_400.0;

impl Policy {
    /// As it is written.
    pub fn name(&self) -> String {
        let Self { keep_warm, shells, start, max, reset } = self;
        let isolation = if *reset { "invocation" } else { "instance" };
        let start = match start {
            Origin::Snapshot => "thaw",
            Origin::Boot => "boot",
        };
        format!(
            "keep-warm={keep_warm},shells={shells},start={start},max={max},isolation={isolation}"
        )
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut policy =
            Self { keep_warm: 600.0, shells: 1, start: Origin::Snapshot, max: 50, reset: false };
        for part in text.split(',') {
            let (name, value) =
                part.split_once('=').ok_or_else(|| format!("{part:?} is not NAME=VALUE"))?;
            let count = |most: usize| match value.parse::<usize>() {
                Ok(count) if count <= most => Ok(count),
                _ => Err(format!("{name}={value}: it must be a whole number up to {most}")),
            };
            match name {
                "keep-warm" => match value.parse::<f64>() {
                    Ok(seconds) if (0.0..=MAX_KEEP_WARM).contains(&seconds) => {
                        policy.keep_warm = seconds;
                    }
                    _ => return Err(format!("{part}: it must be 0 to {MAX_KEEP_WARM} seconds")),
                },
                "shells" => policy.shells = count(1000)?,
                "max" => match count(10_000)? {
                    0 => return Err("max=0: nothing could ever run".into()),
                    count => policy.max = count,
                },
                "start" => match value {
                    "thaw" => policy.start = Origin::Snapshot,
                    "boot" => policy.start = Origin::Boot,
                    _ => return Err(format!("start={value}: it must be thaw or boot")),
                },
                "isolation" => match value {
                    "instance" => policy.reset = false,
                    "invocation" => policy.reset = true,
                    _ => {
                        return Err(format!(
                            "isolation={value}: it must be instance or invocation"
                        ));
                    }
                },
                _ => {
                    return Err(format!(
                        "there is no {name:?}; there are keep-warm, shells, start, max, isolation"
                    ));
                }
            }
        }
        if policy.reset && policy.start == Origin::Boot {
            return Err("isolation=invocation needs start=thaw: there must be a snapshot".into());
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_and_written() {
        let policy: Policy = "keep-warm=60,shells=2,start=boot,max=9".parse().unwrap();
        let expected =
            Policy { keep_warm: 60.0, shells: 2, start: Origin::Boot, max: 9, reset: false };
        assert_eq!(policy, expected);
        assert_eq!(policy.name().parse(), Ok(policy));
        let default: Policy = "keep-warm=0".parse().unwrap();
        assert_eq!((default.keep_warm, default.start), (0.0, Origin::Snapshot));
        let reset: Policy = "isolation=invocation".parse().unwrap();
        assert!(reset.reset);
        assert_eq!(reset.name().parse(), Ok(reset));
    }

    #[test]
    fn wrong_policies_are_refused_by_name() {
        for (text, word) in [
            ("warm=1", "warm"),
            ("keep-warm", "NAME=VALUE"),
            ("keep-warm=-1", "keep-warm=-1"),
            ("keep-warm=NaN", "keep-warm=NaN"),
            ("shells=x", "shells=x"),
            ("max=0", "max=0"),
            ("start=warm", "start=warm"),
            ("isolation=none", "isolation=none"),
            ("isolation=invocation,start=boot", "snapshot"),
        ] {
            assert!(text.parse::<Policy>().unwrap_err().contains(word), "{text}");
        }
    }
}
