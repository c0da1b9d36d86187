//! The results file: JSON lines. A manifest comes first; the samples after it, up to the next
//! manifest, were measured under it. So files are concatenated as they are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    subject::Trip,
};

/// Version of the format; the first field of [`Manifest`].
pub const VERSION: u32 = 1;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// What was measured, on what.
    Manifest(Box<Manifest>),
    /// One raw sample.
    Sample(Sample),
}

/// What was measured, on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// The rig's name, as it is to be quoted with every figure.
    pub rig: String,
    /// Time is counted in instructions: repeats within a seed are no independent samples.
    pub virtual_time: bool,
    /// Seed of the rig, where it has one.
    pub seed: Option<u64>,
    /// `warm` or `cold`.
    pub page_cache: String,
    /// Whether kernel events were traced, which costs time.
    pub traced: bool,
    /// Arguments of the run.
    pub arguments: Vec<String>,
    /// The host: see `docs/benchmarks.md`.
    pub host: Value,
    /// Each subject's versions and hashes, by name.
    pub subjects: BTreeMap<String, Value>,
    /// blake3 of each function's code disk, by name.
    pub functions: BTreeMap<String, String>,
}

/// One raw sample.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Who.
    pub subject: String,
    /// What.
    pub scenario: String,
    /// With which function; empty where none matters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub function: String,
    /// Round of the run, counted from 0.
    pub round: u32,
    /// When the request came in, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub start_ns: u64,
    /// Moments since then, in microseconds, in order of time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<(String, f64)>,
    /// Figures by name; a name ends in its unit. `total_us` is request in to response out.
    pub figures: BTreeMap<String, f64>,
    /// Exits to user space since the process began, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exits: BTreeMap<String, u64>,
    /// KVM's counters since the process began.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kvm: BTreeMap<String, u64>,
    /// Exits that the kernel saw during the sample, by reason; only with `--trace`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kernel_exits: BTreeMap<String, u64>,
}

impl Sample {
    /// A sample of a trip.
    pub fn new(subject: &str, scenario: &str, function: &str, round: u32, trip: &Trip) -> Self {
        let mut stamps = trip.stamps.clone();
        stamps.sort_by_key(|(_, ns)| *ns);
        let since = |ns: u64| ns.saturating_sub(trip.start_ns) as f64 / 1000.0;
        let mut figures: BTreeMap<String, f64> =
            trip.figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        figures.insert("total_us".into(), trip.total_us());
        Self {
            subject: subject.to_owned(),
            scenario: scenario.to_owned(),
            function: function.to_owned(),
            round,
            start_ns: trip.start_ns,
            phases: stamps.iter().map(|&(name, ns)| (name.to_owned(), since(ns))).collect(),
            figures,
            ..Self::default()
        }
    }
}

/// Reads a results file.
///
/// # Errors
/// [`Error::Results`] with the line that is wrong; also for samples before any manifest, and for
/// figures that are no finite number.
pub fn parse(file: &str, text: &str) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let wrong =
            |reason: String| Error::Results { file: file.to_owned(), line: index + 1, reason };
        if line.trim().is_empty() {
            continue;
        }
        let record: Record = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
        match &record {
            Record::Manifest(manifest) if manifest.version != VERSION => {
                let found = manifest.version;
                return Err(wrong(format!("format version {found}; this program has {VERSION}")));
            }
            Record::Sample(_) if records.is_empty() => {
                return Err(wrong("a sample before any manifest".into()));
            }
            _ => {}
        }
        records.push(record);
    }
    if records.is_empty() {
        let reason = "no records".to_owned();
        return Err(Error::Results { file: file.to_owned(), line: 0, reason });
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A manifest for tests.
    pub(crate) fn manifest() -> Manifest {
        Manifest {
            version: VERSION,
            rig: "test".into(),
            virtual_time: false,
            seed: Some(1),
            page_cache: "warm".into(),
            traced: false,
            arguments: Vec::new(),
            host: Value::Null,
            subjects: BTreeMap::new(),
            functions: BTreeMap::new(),
        }
    }

    fn line(record: &Record) -> String {
        serde_json::to_string(record).unwrap()
    }

    #[test]
    fn a_trip_becomes_a_sample_in_order_of_time() {
        let mut trip = Trip { start_ns: 1_000, end_ns: 9_000, ..Trip::default() };
        trip.stamp("late", Some(5_000));
        trip.stamp("early", Some(2_500));
        trip.stamp("outside", Some(10_000));
        trip.stamp("never", None);
        trip.figures.insert("handler_us", 3.0);
        let sample = Sample::new("firn", "warm", "nothing", 2, &trip);
        assert_eq!(sample.phases, [("early".to_owned(), 1.5), ("late".to_owned(), 4.0)]);
        assert_eq!(sample.figures["total_us"], 8.0);
        assert_eq!(sample.figures["handler_us"], 3.0);
    }

    #[test]
    fn files_are_refused_with_the_line() {
        let good = line(&Record::Manifest(manifest().into()));
        let sample = line(&Record::Sample(Sample::default()));
        assert_eq!(parse("f", &format!("{good}\n\n{sample}\n")).unwrap().len(), 2);
        let message = |text: &str| parse("f", text).unwrap_err().to_string();
        assert!(message(&sample).starts_with("f, line 1: a sample before"));
        assert!(message(&format!("{good}\n{{")).starts_with("f, line 2: "));
        assert!(message("").contains("no records"));
        let old = line(&Record::Manifest(Manifest { version: 0, ..manifest() }.into()));
        assert!(message(&old).contains("format version 0"));
    }

    proptest! {
        #[test]
        fn samples_round_trip(
            names in proptest::collection::vec("[a-z _]{1,12}", 0..6),
            // Eighths, which decimal and binary fractions both hold.
            eighths in proptest::collection::vec(any::<i32>(), 6),
            start_ns: u64,
            round: u32,
        ) {
            let mut sample = Sample { round, start_ns, ..Sample::default() };
            for (name, eighth) in names.iter().zip(eighths) {
                let value = f64::from(eighth) / 8.0;
                sample.phases.push((name.clone(), value));
                sample.figures.insert(name.clone(), value);
                sample.kvm.insert(name.clone(), start_ns);
            }
            let record = Record::Sample(sample);
            let text = format!("{}\n{}", line(&Record::Manifest(manifest().into())), line(&record));
            prop_assert_eq!(&parse("f", &text).unwrap()[1], &record);
        }

        #[test]
        fn any_text_parses_or_fails(text in "\\PC{0,200}") {
            let _ = parse("f", &text);
        }
    }
}
