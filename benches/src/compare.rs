//! `firn bench compare`: what changed between two results files, by how much, and whether it may
//! be chance.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::{
    error::{Result, io_at},
    report::{columns, number},
    stats::{self, Interval},
    summary::{Key, Results, Series},
};

/// Significant is what chance alone shows less often than this, over all tests of a comparison.
const LEVEL: f64 = 0.05;

/// What to compare.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Results before.
    before: PathBuf,

    /// Results after.
    after: PathBuf,

    /// Show every figure and phase, not only totals and what changed.
    #[arg(long)]
    all: bool,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is to be thought of a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Not a digit differs.
    Same,
    /// Too unlikely to be chance.
    Significant,
    /// It may be chance.
    NotSignificant,
    /// Too few independent samples for any test, but all of one are below all of the other.
    Apart,
    /// Too few for any test, and their ranges overlap.
    TooFew,
}

/// One figure, before and after.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// Which.
    #[serde(flatten)]
    pub key: Key,
    /// Median before.
    pub before: f64,
    /// Median after.
    pub after: f64,
    /// After over before; absent where before is 0.
    pub ratio: Option<f64>,
    /// Bootstrap interval of the ratio.
    pub ratio_interval: Option<[f64; 2]>,
    /// Mann-Whitney, corrected by Holm over the comparison; absent where there are too few.
    pub p: Option<f64>,
    /// What is to be thought of it.
    pub verdict: Verdict,
}

/// Compares, and prints.
///
/// # Errors
/// Whatever is wrong with the files.
pub fn run(options: &Options) -> Result<()> {
    let before = Results::read(std::slice::from_ref(&options.before))?;
    let after = Results::read(std::slice::from_ref(&options.after))?;
    let changes = changes(&before, &after);
    if options.json {
        let text = serde_json::to_string_pretty(&changes);
        println!("{}", text.map_err(|e| io_at("print")(e.into()))?);
        return Ok(());
    }
    for line in manifest_changes(&before, &after) {
        println!("{line}");
    }
    println!("{}", table(&changes, options.all));
    Ok(())
}

/// Compares every series that both have.
pub fn changes(before: &Results, after: &Results) -> Vec<Change> {
    let pairs: Vec<(&Key, &Series, &Series)> = before
        .series
        .iter()
        .filter_map(|(key, series)| Some((key, series, after.series.get(key)?)))
        .collect();
    let tested: Vec<Option<f64>> = pairs.iter().map(|(_, a, b)| p_of(a, b)).collect();
    let mut corrected =
        stats::holm(&tested.iter().copied().flatten().collect::<Vec<_>>()).into_iter();
    pairs
        .into_iter()
        .zip(tested)
        .map(|((key, a, b), p)| {
            let p = p.and_then(|_| corrected.next());
            change(key, a, b, p)
        })
        .collect()
}

/// Fewest independent samples a side with which the test can find anything: of all orders of 4
/// and 4, the two extreme ones have p = 0.029.
const FEWEST: usize = 4;

fn p_of(a: &Series, b: &Series) -> Option<f64> {
    let (a, b) = (a.independent(), b.independent());
    if a.len() < FEWEST || b.len() < FEWEST { None } else { stats::mann_whitney(&a, &b) }
}

fn change(key: &Key, a: &Series, b: &Series, p: Option<f64>) -> Change {
    let median = |series: &Series| stats::median(&series.values()).unwrap_or(f64::NAN);
    let (before, after) = (median(a), median(b));
    let (first, second) = (a.independent(), b.independent());
    let range = |values: &[f64]| {
        values.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)))
    };
    let (of_a, of_b) = (range(&first), range(&second));
    let verdict = match p {
        _ if stats::sorted(&a.values()) == stats::sorted(&b.values()) => Verdict::Same,
        Some(p) if p < LEVEL => Verdict::Significant,
        Some(_) => Verdict::NotSignificant,
        // One sample is a range only where it would repeat.
        None if first.len().min(second.len()) < 2 && a.seeds().is_none() => Verdict::TooFew,
        None if of_a.1 < of_b.0 || of_b.1 < of_a.0 => Verdict::Apart,
        None => Verdict::TooFew,
    };
    let interval = p.and_then(|_| stats::ratio_interval(&first, &second));
    Change {
        key: key.clone(),
        before,
        after,
        ratio: (before != 0.0).then(|| after / before),
        ratio_interval: interval.map(|Interval { low, high }| [low, high]),
        p,
        verdict,
    }
}

fn table(changes: &[Change], all: bool) -> String {
    let head = [
        "subject",
        "scenario",
        "function",
        "figure",
        "before",
        "after",
        "ratio",
        "95 % interval",
        "p",
        "verdict",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    for change in changes {
        let differs = matches!(change.verdict, Verdict::Significant | Verdict::Apart);
        if !(all || differs || change.key.figure == "total_us") {
            continue;
        }
        let key = &change.key;
        let interval = change.ratio_interval.map(|[low, high]| format!("{low:.3} – {high:.3}"));
        lines.push([
            key.subject.clone(),
            key.scenario.clone(),
            key.function.clone(),
            key.figure.clone(),
            number(change.before),
            number(change.after),
            change.ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")),
            interval.unwrap_or_default(),
            change.p.map_or(String::new(), |p| format!("{p:.4}")),
            match change.verdict {
                Verdict::Same => "same",
                Verdict::Significant => "significant",
                Verdict::NotSignificant => "not significant",
                Verdict::Apart => "ranges apart; too few for a test",
                Verdict::TooFew => "too few for a test",
            }
            .to_owned(),
        ]);
    }
    columns(&lines, 4)
}

/// What differs between what was measured: hashes, host, arguments. One line each.
fn manifest_changes(before: &Results, after: &Results) -> Vec<String> {
    let flat = |results: &Results| {
        let mut leaves = BTreeMap::new();
        if let Some(manifest) = results.manifests.first() {
            flatten("", &serde_json::to_value(manifest).unwrap_or_default(), &mut leaves);
        }
        leaves
    };
    let (before, after) = (flat(before), flat(after));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    let none = "–".to_owned();
    let mut lines = Vec::new();
    for name in names {
        let (a, b) = (before.get(name).unwrap_or(&none), after.get(name).unwrap_or(&none));
        if a != b {
            lines.push(format!("{name}: {a} → {b}"));
        }
    }
    lines
}

fn flatten(name: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    let below =
        |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(part, value)| flatten(&below(part), value, into));
        }
        Value::Array(list) if list.iter().all(Value::is_string) => {
            let words: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
            into.insert(name.to_owned(), words.join(" "));
        }
        Value::Array(list) => {
            let parts = list.iter().enumerate();
            parts.for_each(|(index, value)| flatten(&below(&index.to_string()), value, into));
        }
        leaf => {
            into.insert(name.to_owned(), leaf.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::results;

    fn series(scale: f64, count: u32, seeds: bool) -> Results {
        let samples: Vec<_> = (0..count)
            .map(|n| {
                let seed = seeds.then_some(u64::from(n));
                ("firn", "thaw", seed, scale * (100.0 + f64::from(n % 10)))
            })
            .collect();
        results(&samples)
    }

    fn total(before: &Results, after: &Results) -> Change {
        let all = changes(before, after);
        all.into_iter().find(|change| change.key.figure == "total_us").unwrap()
    }

    #[test]
    fn a_shift_is_significant_and_noise_is_not() {
        let (a, b) = (series(1.0, 30, false), series(1.5, 30, false));
        let change = total(&a, &b);
        assert_eq!(change.verdict, Verdict::Significant);
        assert!((change.ratio.unwrap() - 1.5).abs() < 1e-9);
        let [low, high] = change.ratio_interval.unwrap();
        assert!(low <= 1.5 && 1.5 <= high);
        assert_eq!(total(&a, &a).verdict, Verdict::Same);
        let other = total(&a, &series(1.0, 29, false));
        assert_eq!(other.verdict, Verdict::NotSignificant);
    }

    #[test]
    fn a_few_seeds_are_no_test_however_many_samples() {
        let repeated = |scale: f64| {
            let samples: Vec<_> =
                (0..40).map(|n| ("firn", "thaw", Some(1 + n % 2), scale * 10.0)).collect();
            results(&samples)
        };
        let change = total(&repeated(1.0), &repeated(2.0));
        assert_eq!((change.verdict, change.p), (Verdict::Apart, None));
        let (a, b) = (series(1.0, 3, true), series(1.001, 3, true));
        assert_eq!(total(&a, &b).verdict, Verdict::TooFew);
        let (a, b) = (series(1.0, 8, true), series(2.0, 8, true));
        assert_eq!(total(&a, &b).verdict, Verdict::Significant);
    }

    #[test]
    fn what_was_measured_is_compared_too() {
        let (a, mut b) = (series(1.0, 1, false), series(1.0, 1, false));
        b.manifests[0].host = serde_json::json!({"kernel": "other"});
        b.manifests[0].page_cache = "cold".into();
        let lines = manifest_changes(&a, &b);
        assert_eq!(lines, [r#"host.kernel: "k" → "other""#, r#"page_cache: "warm" → "cold""#]);
        let text = table(&changes(&a, &b), false);
        assert!(text.contains("total_us") && !text.contains("@entered"), "{text}");
    }
}
