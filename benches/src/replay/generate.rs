//! `firn bench generate`: a synthetic trace. Its functions are of three kinds, as real ones are:
//! called at random (Poisson), by timers (periodic, with a little jitter), and in bursts. Rates lie
//! evenly on a logarithmic scale, durations are log-normal, within a function and between them.

use rand::{Rng, RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp, LogNormal};

use super::trace::{MAX_DURATION, Row, Trace, write};
use crate::error::{Error, Result};

/// What to generate.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of functions.
    #[arg(long, default_value_t = 20)]
    functions: usize,

    /// Length in seconds.
    #[arg(long, default_value_t = 3600.0)]
    seconds: f64,

    /// The same seed gives the same trace.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Mean time between calls of the busiest functions, in seconds.
    #[arg(long, default_value_t = 10.0)]
    shortest_interval: f64,

    /// Mean time between calls of the idlest functions, in seconds.
    #[arg(long, default_value_t = 1800.0)]
    longest_interval: f64,

    /// Share of periodic functions.
    #[arg(long, default_value_t = 0.3)]
    periodic: f64,

    /// Share of bursty functions; the rest is called at random.
    #[arg(long, default_value_t = 0.2)]
    bursty: f64,

    /// Mean number of calls in a burst.
    #[arg(long, default_value_t = 8.0)]
    burst: f64,

    /// Median duration over all functions, in seconds.
    #[arg(long, default_value_t = 0.3)]
    duration: f64,

    /// Spread of the functions' medians: standard deviation of their logarithm.
    #[arg(long, default_value_t = 1.0)]
    spread: f64,
}

/// Spread of the durations of one function.
const OWN_SPREAD: f64 = 0.4;

/// Mean time between calls within a burst, in seconds.
const WITHIN_BURST: f64 = 0.1;

/// Jitter of timers, as a share of their interval.
const JITTER: f64 = 0.01;

/// Functions of one application.
const PER_APP: usize = 3;

/// Prints a trace.
///
/// # Errors
/// [`Error::Usage`] for values that make none.
pub fn run(options: &Options) -> Result<()> {
    print!("{}", write(&generate(options)?));
    Ok(())
}

/// Makes a trace.
///
/// # Errors
/// [`Error::Usage`] for values that make none.
pub fn generate(options: &Options) -> Result<Trace> {
    options.check()?;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(options.seed);
    let mut trace = Trace::default();
    let medians = log_normal(options.duration, options.spread)?;
    for function in 0..options.functions {
        let (app, name) = (format!("app {}", function / PER_APP), format!("function {function}"));
        trace.functions.push((id(options.seed, &app), id(options.seed, &name)));
        let (short, long) = (options.shortest_interval.ln(), options.longest_interval.ln());
        let interval = (short + random.random::<f64>() * (long - short)).exp();
        let median = medians.sample(&mut random).min(MAX_DURATION);
        let durations = log_normal(median, OWN_SPREAD)?;
        let kind: f64 = random.random();
        let starts = if kind < options.periodic {
            periodic(&mut random, interval, options.seconds)
        } else if kind < options.periodic + options.bursty {
            bursts(&mut random, interval, options)?
        } else {
            poisson(&mut random, interval, options.seconds)?
        };
        trace.rows.extend(starts.into_iter().map(|start| Row {
            function,
            start,
            duration: durations.sample(&mut random).min(MAX_DURATION),
        }));
    }
    trace.rows.sort_by(|a, b| a.start.total_cmp(&b.start));
    Ok(trace)
}

impl Options {
    fn check(&self) -> Result<()> {
        let positive = [
            ("--seconds", self.seconds, 86_400_000.0),
            ("--shortest-interval", self.shortest_interval, 1e7),
            ("--longest-interval", self.longest_interval, 1e7),
            ("--burst", self.burst, 1e4),
            ("--duration", self.duration, MAX_DURATION),
        ];
        for (name, value, most) in positive {
            // Written so that NaN is refused too.
            if !(value > 0.0 && value <= most) {
                return Err(Error::Usage(format!("{name} {value} is not within 0 to {most}")));
            }
        }
        if self.shortest_interval > self.longest_interval {
            return Err(Error::Usage("--shortest-interval is over --longest-interval".into()));
        }
        let shares = [self.periodic, self.bursty, self.periodic + self.bursty];
        if !shares.iter().all(|share| (0.0..=1.0).contains(share)) {
            return Err(Error::Usage("--periodic and --bursty are shares of 1 together".into()));
        }
        if !(0.0..=5.0).contains(&self.spread) {
            return Err(Error::Usage(format!("--spread {} is not within 0 to 5", self.spread)));
        }
        Ok(())
    }
}

/// An id like the published ones: 64 hexadecimal digits.
fn id(seed: u64, name: &str) -> String {
    blake3::hash(format!("{seed} {name}").as_bytes()).to_hex().to_string()
}

fn log_normal(median: f64, spread: f64) -> Result<LogNormal<f64>> {
    LogNormal::new(median.ln(), spread).map_err(|e| Error::Usage(format!("durations: {e}")))
}

fn exponential(mean: f64) -> Result<Exp<f64>> {
    Exp::new(1.0 / mean).map_err(|e| Error::Usage(format!("intervals: {e}")))
}

fn poisson(random: &mut impl Rng, interval: f64, seconds: f64) -> Result<Vec<f64>> {
    let gaps = exponential(interval)?;
    let mut starts = Vec::new();
    let mut at = gaps.sample(random);
    while at < seconds {
        starts.push(at);
        at += gaps.sample(random);
    }
    Ok(starts)
}

fn periodic(random: &mut impl Rng, interval: f64, seconds: f64) -> Vec<f64> {
    let mut starts = Vec::new();
    let mut at = random.random::<f64>() * interval;
    while at < seconds {
        starts.push((at + random.random::<f64>() * JITTER * interval).min(seconds));
        at += interval;
    }
    starts
}

/// Bursts come at random, so rarely that the mean rate is kept.
fn bursts(random: &mut impl Rng, interval: f64, options: &Options) -> Result<Vec<f64>> {
    let within = exponential(WITHIN_BURST)?;
    let mut starts = Vec::new();
    for burst in poisson(random, interval * options.burst, options.seconds)? {
        let mut at = burst;
        // Geometric: after each call another follows with this chance.
        let another = 1.0 - 1.0 / options.burst.max(1.0);
        while at < options.seconds {
            starts.push(at);
            if random.random::<f64>() >= another {
                break;
            }
            at += within.sample(random);
        }
    }
    Ok(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            functions: 60,
            seconds: 20_000.0,
            seed: 7,
            shortest_interval: 10.0,
            longest_interval: 1000.0,
            periodic: 0.3,
            bursty: 0.2,
            burst: 8.0,
            duration: 0.3,
            spread: 1.0,
        }
    }

    #[test]
    fn a_seed_names_a_trace() {
        let trace = generate(&options()).unwrap();
        assert_eq!(generate(&options()).unwrap(), trace);
        assert_ne!(generate(&Options { seed: 8, ..options() }).unwrap(), trace);
        assert!(trace.rows.iter().all(|row| (0.0..=20_000.0).contains(&row.start)));
        assert!(trace.functions.iter().all(|(app, func)| app.len() == 64 && func.len() == 64));
    }

    /// Mean time between calls.
    fn mean_gap(starts: &[f64]) -> f64 {
        (starts[starts.len() - 1] - starts[0]) / (starts.len() - 1) as f64
    }

    /// Variance over squared mean of the gaps: 1 if Poisson, 0 if periodic, more in bursts.
    fn irregularity(starts: &[f64]) -> f64 {
        let gaps: Vec<f64> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        variance / mean.powi(2)
    }

    #[test]
    fn kinds_have_their_rate_and_their_rhythm() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        let long = Options { seconds: 200_000.0, ..options() };
        let random_calls = poisson(&mut random, 20.0, long.seconds).unwrap();
        let timer = periodic(&mut random, 20.0, long.seconds);
        let burst = bursts(&mut random, 20.0, &long).unwrap();
        for starts in [&random_calls, &timer, &burst] {
            let gap = mean_gap(starts);
            assert!((15.0..25.0).contains(&gap), "{gap}");
        }
        assert!((irregularity(&random_calls) - 1.0).abs() < 0.15);
        assert!(irregularity(&timer) < 0.01);
        assert!(irregularity(&burst) > 4.0);
    }

    #[test]
    fn durations_have_their_median() {
        let one = Options { spread: 0.0, functions: 200, ..options() };
        let trace = generate(&one).unwrap();
        let durations: Vec<f64> = trace.rows.iter().map(|row| row.duration).collect();
        let median = crate::stats::median(&durations).unwrap();
        assert!((median - 0.3).abs() < 0.03, "{median}");
    }

    #[test]
    fn impossible_values_are_refused() {
        for wrong in [
            Options { seconds: 0.0, ..options() },
            Options { duration: f64::NAN, ..options() },
            Options { longest_interval: 1.0, ..options() },
            Options { periodic: 0.9, ..options() },
            Options { spread: -1.0, ..options() },
        ] {
            assert!(generate(&wrong).is_err(), "{wrong:?}");
        }
    }
}
