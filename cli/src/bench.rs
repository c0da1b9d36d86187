//! `firn bench`: what a start costs, phase by phase.
//!
//! Each iteration boots a function, thaws it and calls it warm, one after the other, so that
//! whatever else the host is doing meets all three alike. A sample is from the call into the
//! library to its answer; phases lie between. Output is one JSON object: raw samples, medians, and
//! what was measured. Under an instruction-counted clock the samples repeat exactly.

use std::{collections::BTreeMap, io::Write, path::Path, path::PathBuf, time::Instant};

use anyhow::{Context, bail};
use firn::{
    Disk, FunctionSpec, Host, HostConfig, Instance, Invocation, InvokeReport, LogSink, Phases,
    ShellClass, SnapshotMeta, control::Phase, guest::Outcome,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Installation directory.
    #[arg(long)]
    artifacts: PathBuf,
    /// Directory for what the run keeps meanwhile; removed afterwards.
    #[arg(long, default_value = "/tmp/firn-bench")]
    state: PathBuf,
    /// Runtime whose image is measured.
    #[arg(long, default_value = "python3.11")]
    runtime: String,
    /// Memory of the function in MB.
    #[arg(long, default_value_t = 128)]
    memory: u32,
    /// Rounds of boot, thaw and warm.
    #[arg(long, default_value_t = 5)]
    iterations: u32,
    /// Warm calls a round.
    #[arg(long, default_value_t = 3)]
    warm: u32,
    /// Multiplies all time limits: 1 on real hardware, 20 or more under an emulator.
    #[arg(long, default_value_t = 1)]
    patience: u32,
}

/// A function that does nothing: what is measured is everything else.
const CODE: &str = "def lambda_handler(event, context):\n    return event\n";

/// Runs the bench and prints its JSON.
///
/// # Errors
/// Anything that keeps a sample from being taken.
pub async fn run(options: Options) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.state)
        .with_context(|| format!("cannot make {}", options.state.display()))?;
    let result = measure(&options).await;
    std::fs::remove_dir_all(&options.state).context("cannot remove the bench's state")?;
    println!("{}", result?);
    Ok(())
}

async fn measure(options: &Options) -> anyhow::Result<Value> {
    let mut config = HostConfig::new(options.artifacts.clone(), options.state.clone());
    config.patience = options.patience;
    config.shells = 1;
    // What is measured is work, not how long a quota makes it wait.
    config.cpu_limits = false;
    let host = Host::open(config).await?;
    let result = samples(&host, options).await;
    host.shutdown().await;
    let (samples, counters, working_set) = result?;
    let medians: BTreeMap<&String, f64> =
        samples.iter().map(|(name, values)| (name, median(values))).collect();
    Ok(json!({
        "bench": "starts",
        "runtime": options.runtime,
        "memory_mb": options.memory,
        "iterations": options.iterations,
        "unit": "microseconds unless a name says otherwise",
        "median": medians,
        "counters": counters,
        "working_set": working_set,
        "samples": samples,
    }))
}

type Samples = BTreeMap<String, Vec<f64>>;

async fn samples(host: &Host, options: &Options) -> anyhow::Result<(Samples, Value, String)> {
    let image = host.image(&options.runtime)?;
    let class = ShellClass::for_memory(options.memory);
    let code = code_disk(&options.state).await?;
    let log = sink();
    let spec = |snapshot: bool| FunctionSpec {
        environment: environment(options, snapshot),
        memory_mb: options.memory,
        init_timeout: std::time::Duration::from_secs(10),
        code: Some(code.clone()),
        log: log.clone(),
    };

    // Base and function snapshot, as a deployment would make them.
    let mut base = host.boot(&image, class).await?;
    base.pause().await?;
    let base = base.snapshot(&options.state.join("base"), SnapshotMeta::default()).await?;
    let base = base.make_resident(host, None, None).await?;
    let (mut function, _) = host.thaw(&base, None, Some(log.clone())).await?;
    let report = function.load(&spec(true), true).await?;
    if let Some(error) = report.error {
        bail!("the function does not initialise: {error:?}");
    }
    let function =
        function.snapshot(&options.state.join("function"), SnapshotMeta::default()).await?;
    let resident = function.make_resident(host, Some(&base), Some(&code)).await?;

    // The first clones are watched, later ones go by what these touched.
    for round in 0..2 {
        let (mut watched, _) =
            host.thaw(&resident, Some(&invocation(round)), Some(log.clone())).await?;
        watched.pause().await?;
        watched.retire().await;
    }
    let mut samples = Samples::new();
    let mut counters = json!({});
    for round in 0..options.iterations {
        host.prepare(class).await?;
        let started = Instant::now();
        let mut booted = host.boot(&image, class).await?;
        let ready = started.elapsed();
        let loaded = booted.load(&spec(false), false).await?;
        let report = booted.invoke(&invocation(round)).await?;
        push(&mut samples, "boot_to_first_response", micros(started.elapsed()));
        push(&mut samples, "boot.to_ready", micros(ready));
        let stats = booted.stats().await?;
        if let Some(ready) = booted.booted() {
            // Ticks since kernel entry, where the guest's counter starts.
            let us = ready.init_tsc as f64 * 1000.0 / f64::from(stats.tsc_khz.max(1));
            push(&mut samples, "boot.kernel_entry_to_init", us);
        }
        phases(&mut samples, "boot", booted.start_phases());
        phases(&mut samples, "boot.load", &loaded.phases);
        check(&report)?;
        if round + 1 == options.iterations {
            counters["boot"] = counted(&mut booted).await?;
        }
        booted.retire().await;

        host.prepare(class).await?;
        let started = Instant::now();
        let (mut thawed, report) =
            host.thaw(&resident, Some(&invocation(round)), Some(log.clone())).await?;
        push(&mut samples, "thaw_to_first_response", micros(started.elapsed()));
        let report = report.context("the first invocation got no answer")?;
        check(&report)?;
        phases(&mut samples, "thaw", &report.phases);
        if let Some(renewed) = &report.renewed {
            push(&mut samples, "thaw.guest_renew", renewed.renew_us as f64);
            push(&mut samples, "thaw.guest_hooks", renewed.hooks_us as f64);
        }
        push(&mut samples, "thaw.handler", report.duration_us as f64);
        // Only now: the VMM answers a thaw before its vCPU thread has got that far.
        let stamps = thawed.stats().await?.stamps;
        if let (Some(from), Some(to)) = (stamps.get(Phase::Received), stamps.get(Phase::Entered)) {
            push(&mut samples, "thaw.message_to_entry", to.saturating_sub(from) as f64 / 1000.0);
        }

        for _ in 0..options.warm {
            let started = Instant::now();
            let report = thawed.invoke(&invocation(round)).await?;
            push(&mut samples, "warm_round_trip", micros(started.elapsed()));
            check(&report)?;
        }
        thawed.pause().await?;
        let started = Instant::now();
        check(&thawed.invoke(&invocation(round)).await?)?;
        push(&mut samples, "paused_round_trip", micros(started.elapsed()));
        push(&mut samples, "vmm_anonymous_kib", vmm_anonymous_kib(&thawed, class)?);
        if round + 1 == options.iterations {
            counters["thaw"] = counted(&mut thawed).await?;
        }
        thawed.retire().await;
    }
    Ok((samples, counters, format!("{:?}", resident.working_set())))
}

fn environment(options: &Options, snapshot: bool) -> Vec<(String, String)> {
    let initialization = if snapshot { "snap-start" } else { "on-demand" };
    let memory = options.memory.to_string();
    [
        ("_HANDLER", "lambda_function.lambda_handler"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_LAMBDA_FUNCTION_NAME", "bench"),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", &memory),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", initialization),
        ("AWS_LAMBDA_LOG_GROUP_NAME", "/aws/lambda/bench"),
        ("AWS_LAMBDA_LOG_STREAM_NAME", "bench"),
    ]
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .to_vec()
}

async fn code_disk(state: &Path) -> anyhow::Result<Disk> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file("lambda_function.py", zip::write::SimpleFileOptions::default())?;
    archive.write_all(CODE.as_bytes())?;
    let archive = archive.finish()?.into_inner();
    let path = state.join("code.erofs");
    let out = path.clone();
    tokio::task::spawn_blocking(move || firn::code::build_disk(&archive, &out)).await??;
    Ok(Disk::open_read_only(&path)?)
}

/// A sink that reads and forgets.
fn sink() -> LogSink {
    let (sender, mut receiver) = mpsc::channel(64);
    tokio::spawn(async move { while receiver.recv().await.is_some() {} });
    sender
}

fn invocation(round: u32) -> Invocation {
    Invocation {
        request_id: format!("00000000-0000-4000-8000-{round:012}"),
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:bench".into(),
        timeout: std::time::Duration::from_secs(3),
        payload: bytes::Bytes::from_static(b"{\"key\":\"value\"}"),
        ..Default::default()
    }
}

fn check(report: &InvokeReport) -> anyhow::Result<()> {
    match &report.outcome {
        Outcome::Response { .. } => Ok(()),
        Outcome::Error(error) => bail!("the function failed: {error:?}"),
    }
}

fn push(samples: &mut Samples, name: &str, value: f64) {
    samples.entry(name.to_string()).or_default().push(value);
}

fn phases(samples: &mut Samples, prefix: &str, phases: &Phases) {
    for (name, at) in &phases.0 {
        push(samples, &format!("{prefix}@{}", name.replace(' ', "_")), micros(*at));
    }
}

fn micros(duration: std::time::Duration) -> f64 {
    duration.as_nanos() as f64 / 1000.0
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// What an instance's VMM has counted in its whole life.
async fn counted(instance: &mut Instance) -> anyhow::Result<Value> {
    let stats = instance.stats().await?;
    Ok(json!({ "exits": named(&stats.exits), "kvm": named(&stats.kvm) }))
}

fn named(counters: &[(String, u64)]) -> BTreeMap<&str, u64> {
    counters.iter().filter(|(_, n)| *n != 0).map(|(name, n)| (name.as_str(), *n)).collect()
}

/// Anonymous memory of the VMM in KiB, without guest memory: what this instance alone costs beyond
/// its guest's pages. (The program's text is one copy for all VMMs.) The guest's mappings are told
/// by their length: at least half its memory.
fn vmm_anonymous_kib(instance: &Instance, class: ShellClass) -> anyhow::Result<f64> {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", instance.pid()))?;
    let guest = u64::from(class.memory_mib) * 1024 / 2;
    let mut anonymous = 0;
    let mut size = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(Ok(value))) = (words.next(), words.next().map(str::parse::<u64>))
        else {
            continue;
        };
        match key {
            "Size:" => size = value,
            "Anonymous:" if size < guest => anonymous += value,
            _ => {}
        }
    }
    Ok(anonymous as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
