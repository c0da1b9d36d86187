//! `/metrics`: what was counted since the daemon started, and what is now, as text for Prometheus.

use std::{collections::BTreeMap, fmt, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

use super::{FUNCTIONS, Took, Usage};
use crate::{scheduler::StartKind, traces};

/// Upper bounds of the buckets for times, in seconds; the last one has no bound.
const BOUNDS: [f64; 20] = [
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.003,
    0.004,
    0.005,
    0.0075,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    5.0,
    30.0,
    120.0,
    900.0,
    f64::MAX,
];

/// What the text is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A histogram of times.
#[derive(Debug, Clone, Default, PartialEq)]
struct Times {
    sum: f64,
    count: u64,
    buckets: [u64; BOUNDS.len()],
}

impl Times {
    fn add(&mut self, seconds: f64) {
        self.sum += seconds;
        self.count += 1;
        let at = BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[at.min(BOUNDS.len() - 1)] += 1;
    }
}

/// One function since the start.
#[derive(Debug, Clone, Default, PartialEq)]
struct OfFunction {
    errors: u64,
    throttles: u64,
    usage: Usage,
    duration_s: f64,
}

/// Everything since the start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Totals {
    /// The empty name has what those do that are too many.
    functions: BTreeMap<String, OfFunction>,
    failures: u64,
    not_restored: u64,
    durations: Times,
    thaws: Times,
    /// From request to function, by kind of start.
    starts: BTreeMap<&'static str, Times>,
}

impl Totals {
    fn function(&mut self, name: &str) -> &mut OfFunction {
        let known = self.functions.contains_key(name);
        let name = if known || self.functions.len() < FUNCTIONS { name } else { "" };
        if !self.functions.contains_key(name) {
            self.functions.insert(name.to_owned(), OfFunction::default());
        }
        // Just put there if it was not.
        self.functions.entry(name.to_owned()).or_default()
    }

    pub(super) fn ended(
        &mut self,
        name: &str,
        kind: StartKind,
        took: &Took,
        usage: Usage,
        error: bool,
        elapsed: Duration,
    ) {
        let seconds = took.duration_us as f64 / 1e6;
        let function = self.function(name);
        function.usage.add(usage);
        function.errors += u64::from(error);
        function.duration_s += seconds;
        self.durations.add(seconds);
        let start = (elapsed.as_secs_f64() - seconds).max(0.0);
        self.starts.entry(kind.word()).or_default().add(start);
        if let Some(us) = took.restore_us.filter(|_| kind == StartKind::Thaw) {
            self.thaws.add(us as f64 / 1e6);
        }
    }

    pub(super) fn throttled(&mut self, name: &str) {
        self.function(name).throttles += 1;
    }

    pub(super) fn not_restored(&mut self) {
        self.not_restored += 1;
    }

    pub(super) fn failed(&mut self) {
        self.failures += 1;
    }

    pub(super) fn forget(&mut self, name: &str) {
        self.functions.remove(name);
    }
}

/// What is now.
#[derive(Debug, Clone, Default)]
pub struct Now {
    /// Instances by state.
    pub instances: BTreeMap<&'static str, u64>,
    /// Events that wait, and their bytes.
    pub events: (u64, u64),
    /// Interrupts that guests had not acknowledged, and that were raised again.
    pub interrupts_raised_again: u64,
    /// Traced invocations, if there is a collector.
    pub traces: Option<traces::export::Counts>,
}

/// The text.
pub fn text(totals: Totals, now: Now) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape { totals, now }));
    let mut text = String::new();
    // Into memory: it can't fail.
    let _ = text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Scrape {
    totals: Totals,
    now: Now,
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Self { totals, now } = self;
        type Value = fn(&OfFunction) -> f64;
        let of_functions: [(&str, &str, Value); 6] = [
            ("firn_invocations", "Invocations", |f| f.usage.requests as f64),
            ("firn_errors", "Invocations that ended with an error of the function", |f| {
                f.errors as f64
            }),
            ("firn_throttles", "Requests that a limit refused", |f| f.throttles as f64),
            ("firn_duration_seconds", "Time in functions", |f| f.duration_s),
            ("firn_billed_seconds", "Time billed", |f| f.usage.billed_ms as f64 / 1e3),
            ("firn_billed_gigabyte_seconds", "Memory times time billed", |f| {
                f.usage.mb_ms as f64 / 1024.0 / 1e3
            }),
        ];
        for (name, help, value) in of_functions {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (function, total) in &totals.functions {
                metric
                    .encode_family(&[("function", function.as_str())])?
                    .encode_counter::<NoLabelSet, _, f64>(&value(total), None)?;
            }
        }
        let name = "firn_failures";
        let help = "Requests that Firn itself failed to serve";
        encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&totals.failures, None)?;
        let name = "firn_restores_refused";
        let help = "Snapshots and instances that KVM or the VMM would not restore; others served";
        encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&totals.not_restored, None)?;
        let name = "firn_interrupts_raised_again";
        let help = "Interrupts that guests had not acknowledged though they ran";
        encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&now.interrupts_raised_again, None)?;
        let histograms = [
            ("firn_invocation_duration_seconds", "Time in functions", &totals.durations),
            ("firn_thaw_seconds", "From thaw to readiness", &totals.thaws),
        ];
        for (name, help, times) in histograms {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            histogram(metric, times)?;
        }
        let help = "From request to answer but for the function's own time, by kind of start";
        let mut metric =
            encoder.encode_descriptor("firn_start_seconds", help, None, MetricType::Histogram)?;
        for (kind, times) in &totals.starts {
            histogram(metric.encode_family(&[("start", *kind)])?, times)?;
        }
        let help = "Live instances by state";
        let mut metric =
            encoder.encode_descriptor("firn_instances", help, None, MetricType::Gauge)?;
        for (state, count) in &now.instances {
            metric.encode_family(&[("state", *state)])?.encode_gauge(count)?;
        }
        let gauges = [
            ("firn_queued_events", "Asynchronous events that wait", now.events.0),
            ("firn_queued_event_bytes", "Their bytes", now.events.1),
        ];
        for (name, help, value) in gauges {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)?;
        }
        if let Some(counts) = now.traces {
            let help = "Traced invocations by what has become of their spans";
            let mut metric =
                encoder.encode_descriptor("firn_traces", help, None, MetricType::Counter)?;
            let outcomes = [
                ("exported", counts.exported),
                ("overflowed", counts.overflowed),
                ("refused", counts.refused),
            ];
            for (outcome, count) in outcomes {
                metric
                    .encode_family(&[("outcome", outcome)])?
                    .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
            }
        }
        Ok(())
    }
}

fn histogram(mut metric: MetricEncoder<'_>, times: &Times) -> fmt::Result {
    let buckets: Vec<(f64, u64)> = BOUNDS.into_iter().zip(times.buckets).collect();
    metric.encode_histogram::<NoLabelSet>(times.sum, times.count, &buckets, None)
}
