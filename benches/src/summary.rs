//! What a results file says: samples by who, what, with which function, and which figure.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use crate::{
    error::{Result, io_with},
    record::{self, Manifest, Record, Sample},
    stats,
};

/// What a series of samples is of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Key {
    /// Who.
    pub subject: String,
    /// What.
    pub scenario: String,
    /// With which function; empty where none matters.
    pub function: String,
    /// Name of the figure; `@<phase>` is the time from request to that moment, in microseconds.
    pub figure: String,
}

/// Samples of one figure.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    /// All values, each with the seed if time was virtual.
    values: Vec<(Option<u64>, f64)>,
}

/// All runs of one or more files.
#[derive(Debug, Default)]
pub struct Results {
    /// Their manifests.
    pub manifests: Vec<Manifest>,
    /// Their samples, in order.
    pub samples: Vec<Sample>,
    /// The figures.
    pub series: BTreeMap<Key, Series>,
}

impl Series {
    /// Every value.
    pub fn values(&self) -> Vec<f64> {
        self.values.iter().map(|(_, value)| *value).collect()
    }

    /// Number of seeds; `None` where time is real.
    pub fn seeds(&self) -> Option<usize> {
        self.values.first()?.0?;
        Some(self.independent().len())
    }

    /// Values that can be taken for independent of each other: all of them where time is real; in
    /// virtual time a run repeats exactly, so only seeds are, each by its median.
    pub fn independent(&self) -> Vec<f64> {
        let mut by_seed: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        let mut independent = Vec::new();
        for &(seed, value) in &self.values {
            match seed {
                Some(seed) => by_seed.entry(seed).or_default().push(value),
                None => independent.push(value),
            }
        }
        independent.extend(by_seed.values().filter_map(|values| stats::median(values)));
        independent
    }
}

/// A series in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Of what.
    #[serde(flatten)]
    pub key: Key,
    /// Number of samples.
    pub samples: usize,
    /// Number of seeds; absent where time is real.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seeds: Option<usize>,
    /// The smallest.
    pub min: f64,
    /// The median.
    pub p50: f64,
    /// Ends of the interval of the median; absent where there are too few samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_interval: Option<[f64; 2]>,
    /// How that interval was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_by: Option<&'static str>,
    /// Quantiles; absent where there are too few samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p90: Option<f64>,
    /// See [`Row::p90`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99: Option<f64>,
    /// See [`Row::p90`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p999: Option<f64>,
    /// The largest.
    pub max: f64,
}

impl Results {
    /// Reads files.
    ///
    /// # Errors
    /// What [`record::parse`] says.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut results = Self::default();
        for file in files {
            let text = std::fs::read_to_string(file).map_err(io_with(file))?;
            results.add(record::parse(&file.display().to_string(), &text)?);
        }
        Ok(results)
    }

    /// Adds the records of one file.
    pub fn add(&mut self, records: Vec<Record>) {
        let mut seed = None;
        for record in records {
            match record {
                Record::Manifest(manifest) => {
                    // Runs without a named seed are at least runs of their own.
                    let number = manifest.seed.unwrap_or(self.manifests.len() as u64);
                    seed = manifest.virtual_time.then_some(number);
                    self.manifests.push(*manifest);
                }
                Record::Sample(sample) => self.add_sample(seed, sample),
            }
        }
    }

    fn add_sample(&mut self, seed: Option<u64>, sample: Sample) {
        let mut put = |figure: String, value: f64| {
            let key = Key {
                subject: sample.subject.clone(),
                scenario: sample.scenario.clone(),
                function: sample.function.clone(),
                figure,
            };
            self.series.entry(key).or_default().values.push((seed, value));
        };
        for (name, value) in &sample.figures {
            put(name.clone(), *value);
        }
        for (name, value) in &sample.phases {
            put(format!("@{name}"), *value);
        }
        self.samples.push(sample);
    }

    /// Every series in numbers.
    pub fn rows(&self) -> Vec<Row> {
        self.series.iter().filter_map(|(key, series)| row(key, series)).collect()
    }

    /// Samples of one scenario by subject, in order of first appearance.
    pub fn by_subject(&self, scenario: &str, function: &str) -> Vec<(&str, Vec<&Sample>)> {
        let mut subjects: Vec<(&str, Vec<&Sample>)> = Vec::new();
        for sample in &self.samples {
            if sample.scenario != scenario || sample.function != function {
                continue;
            }
            match subjects.iter_mut().find(|(subject, _)| *subject == sample.subject) {
                Some((_, samples)) => samples.push(sample),
                None => subjects.push((&sample.subject, vec![sample])),
            }
        }
        subjects
    }

    /// Scenarios with their functions, in order of first appearance.
    pub fn scenarios(&self) -> Vec<(&str, &str)> {
        let mut found: Vec<(&str, &str)> = Vec::new();
        for sample in &self.samples {
            let pair = (sample.scenario.as_str(), sample.function.as_str());
            if !found.contains(&pair) {
                found.push(pair);
            }
        }
        found
    }
}

fn row(key: &Key, series: &Series) -> Option<Row> {
    let sorted = stats::sorted(&series.values());
    let independent = stats::sorted(&series.independent());
    let seeds = series.seeds();
    let (interval, interval_by) = match (stats::median_interval(&independent), seeds) {
        (Some(interval), _) => (Some(interval), Some("order statistics")),
        (None, Some(_)) => (stats::mean_interval(&independent), Some("t over seeds")),
        (None, None) => (None, None),
    };
    Some(Row {
        key: key.clone(),
        samples: sorted.len(),
        seeds,
        min: *sorted.first()?,
        p50: stats::quantile(&sorted, 0.5)?,
        p50_interval: interval.map(|interval| [interval.low, interval.high]),
        interval_by: interval.and(interval_by),
        p90: stats::tail(&sorted, 0.9),
        p99: stats::tail(&sorted, 0.99),
        p999: stats::tail(&sorted, 0.999),
        max: *sorted.last()?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Results with samples of `total_us`: virtual time if there are seeds.
    pub(crate) fn results(samples: &[(&str, &str, Option<u64>, f64)]) -> Results {
        let mut results = Results::default();
        for (subject, scenario, seed, total) in samples {
            let manifest = json!({
                "record": "manifest", "version": record::VERSION, "rig": "test <rig>",
                "virtual_time": seed.is_some(), "seed": seed, "page_cache": "warm",
                "traced": false, "arguments": [], "host": {"kernel": "k"},
                "subjects": {}, "functions": {},
            });
            let sample = json!({
                "record": "sample", "subject": subject, "scenario": scenario, "function": "nothing",
                "round": 0, "start_ns": 1, "figures": {"total_us": total},
                "phases": [["entered", total / 4.0], ["answered", total / 2.0]],
            });
            let text = format!("{manifest}\n{sample}");
            results.add(record::parse("test", &text).unwrap());
        }
        results
    }

    fn total(results: &Results) -> Row {
        results.rows().into_iter().find(|row| row.key.figure == "total_us").unwrap()
    }

    #[test]
    fn real_time_has_independent_samples() {
        let samples: Vec<_> = (1..=10).map(|n| ("firn", "thaw", None, f64::from(n))).collect();
        let row = total(&results(&samples));
        assert_eq!((row.samples, row.seeds, row.p50), (10, None, 5.5));
        assert_eq!(row.p50_interval, Some([2.0, 9.0]));
        assert!(row.p90.is_some() && row.p99.is_none());
    }

    #[test]
    fn virtual_time_counts_seeds_only() {
        let mut samples = Vec::new();
        for seed in 1..=3 {
            for repeat in 0..20 {
                samples.push(("firn", "thaw", Some(seed), seed as f64 + f64::from(repeat % 2)));
            }
        }
        let row = total(&results(&samples));
        assert_eq!((row.samples, row.seeds), (60, Some(3)));
        assert_eq!(row.interval_by, Some("t over seeds"));
        let [low, high] = row.p50_interval.unwrap();
        // Medians 1.5, 2.5, 3.5: t(0.975, 2)/√3 on either side of 2.5.
        assert!((low - 0.016).abs() < 0.01 && (high - 4.984).abs() < 0.01, "{low} {high}");
    }

    #[test]
    fn phases_are_figures_too_and_rows_are_json() {
        let results = results(&[("firn", "thaw", None, 8.0)]);
        let rows = results.rows();
        let entered = rows.iter().find(|row| row.key.figure == "@entered").unwrap();
        assert_eq!(entered.p50, 2.0);
        let value: Value = serde_json::to_value(entered).unwrap();
        assert_eq!(value["scenario"], "thaw");
        assert!(value.get("p99").is_none());
        assert_eq!(results.scenarios(), [("thaw", "nothing")]);
    }
}
