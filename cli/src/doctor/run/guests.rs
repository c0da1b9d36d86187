//! Guests of the gate: a host of its own, and a function in microVMs of any size.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use firn::{
    Disk, FunctionSpec, Host, HostConfig, Image, Instance, Invocation, InvokeReport, Outlets,
    ResidentSnapshot, ShellClass, SnapshotMeta, guest::Outcome,
};
use serde_json::Value;

/// The longest that the function may take for an event, before patience.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The longest that its initialisation may take, before patience.
const INIT: Duration = Duration::from_secs(10);

/// What failed, in words for people.
pub type Failure = String;

/// Names what was tried.
pub fn at<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> Failure {
    move |error| format!("{what}: {error}")
}

/// The host, and what runs on it.
pub struct Guests {
    host: Host,
    image: Image,
    code: Disk,
    patience: u32,
    /// Where snapshots are written.
    directory: tempfile::TempDir,
}

/// A function whose clones can be thawed.
pub struct Frozen {
    resident: ResidentSnapshot,
}

/// A guest that runs.
pub struct Guest {
    instance: Instance,
    patience: u32,
}

/// What a control group is charged with, in bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Charge {
    /// The most that it was charged with; what it is charged with now where the kernel keeps no peak.
    pub bytes: u64,
    /// What it may be charged with.
    pub limit: u64,
}

/// What an event brought, and how long it took.
pub struct Answer {
    /// The response.
    pub value: Value,
    /// From the request to the response.
    pub took: Duration,
}

impl Guests {
    /// Opens the installation.
    pub async fn open(artifacts: &Path, patience: u32) -> Result<Self, Failure> {
        let directory = tempfile::Builder::new().prefix("firn-doctor-").tempdir();
        let directory = directory.map_err(at("make a directory"))?;
        let mut config = HostConfig::new(artifacts, directory.path().join("state"));
        std::fs::create_dir(&config.state).map_err(at("make a directory"))?;
        config.patience = patience;
        // What is looked at is work, not how long a quota makes it wait.
        config.cpu_limits = false;
        let host = Host::open(config).await.map_err(at("open the installation"))?;
        let runtimes = host.images();
        let python = runtimes.iter().find(|name| name.starts_with("python"));
        let python = python.ok_or("the installation has no image of Python")?;
        let image = host.image(python).map_err(at("open the image"))?;
        let code = tokio::task::spawn_blocking(|| {
            let archive = firn_bench::functions::zip(include_str!("function.py"))
                .map_err(at("make an archive"))?;
            let built = firn::code::build_disk(&archive, &[]).map_err(at("make a code disk"))?;
            Ok::<_, Failure>(built.disk)
        });
        let code = code.await.map_err(at("make a code disk"))??;
        Ok(Self { host, image, code, patience, directory })
    }

    /// What multiplies time limits.
    pub fn patience(&self) -> u32 {
        self.patience
    }

    /// Ends everything.
    pub async fn close(self) {
        self.host.shutdown().await;
    }

    fn spec(&self, memory_mb: u32, initialization: &str) -> FunctionSpec {
        let environment = [
            ("_HANDLER", "lambda_function.lambda_handler"),
            ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", &memory_mb.to_string()),
            ("AWS_LAMBDA_INITIALIZATION_TYPE", initialization),
        ];
        FunctionSpec {
            environment: environment.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
            memory_mb,
            init_timeout: INIT * self.patience,
            code: Some(self.code.clone()),
            endpoints: Vec::new(),
            outlets: Outlets::default(),
        }
    }

    /// Boots a guest and loads the function.
    pub async fn boot(&self, class: ShellClass) -> Result<Guest, Failure> {
        let booted = self.host.boot(&self.image, class).await;
        let mut instance = booted.map_err(at("boot"))?;
        let spec = self.spec(class.memory_mib, "on-demand");
        loaded(instance.load(&spec, false).await)?;
        Ok(Guest { instance, patience: self.patience })
    }

    /// Freezes the function, as a scheduler does: over a base snapshot.
    pub async fn freeze(&self, name: &str, class: ShellClass) -> Result<Frozen, Failure> {
        let path = |what: &str| self.directory.path().join(format!("{name}-{what}"));
        let booted = self.host.boot(&self.image, class).await.map_err(at("boot"))?;
        let base = booted.snapshot(&path("base"), SnapshotMeta::default()).await;
        let base = base.map_err(at("save the base"))?;
        let base = base.make_resident(&self.host, None, None).await;
        let base = base.map_err(at("make the base resident"))?;
        let thawed = self.host.thaw(&base, None, Outlets::default()).await;
        let (mut instance, _) = thawed.map_err(at("thaw the base"))?;
        loaded(instance.load(&self.spec(class.memory_mib, "snap-start"), true).await)?;
        let saved = instance.snapshot(&path("function"), SnapshotMeta::default()).await;
        let saved = saved.map_err(at("save the function"))?;
        let resident = saved.make_resident(&self.host, Some(&base), Some(&self.code)).await;
        Ok(Frozen { resident: resident.map_err(at("make the function resident"))? })
    }

    /// Ends a guest, and waits until its memory is free.
    pub async fn end(&self, guest: Guest) {
        self.host.end(guest.instance).await;
    }

    /// Thaws a clone with its first event.
    pub async fn thaw(&self, frozen: &Frozen, event: Value) -> Result<(Guest, Answer), Failure> {
        let class = frozen.resident.class();
        // What is looked at is the thaw, not the making of what it needs.
        self.host.stock(class, 1).await.map_err(at("make a shell"))?;
        let invocation = invocation(&event, self.patience);
        let begun = Instant::now();
        let thawed = self.host.thaw(&frozen.resident, Some(&invocation), Outlets::default()).await;
        let (instance, report) = thawed.map_err(at("thaw"))?;
        let answer = answer(report.ok_or("a thaw without an answer")?, begun)?;
        Ok((Guest { instance, patience: self.patience }, answer))
    }
}

impl Guest {
    /// Has the function answer.
    pub async fn ask(&mut self, event: Value) -> Result<Answer, Failure> {
        let invocation = invocation(&event, self.patience);
        let begun = Instant::now();
        let report = self.instance.invoke(&invocation).await.map_err(at("invoke"))?;
        answer(report, begun)
    }

    /// Has it do what must end it. Whether it answered all the same, else its error.
    pub async fn overrun(&mut self, event: Value) -> Result<bool, Failure> {
        let report = self.instance.invoke(&invocation(&event, self.patience)).await;
        Ok(!matches!(report.map_err(at("invoke"))?.outcome, Outcome::Error(_)))
    }

    /// Takes it back to its snapshot: how long that took.
    pub async fn reset(&mut self) -> Result<Duration, Failure> {
        Ok(self.instance.reset().await.map_err(at("reset"))?.duration)
    }

    /// The guest's TSC frequency in kHz.
    pub async fn tsc_khz(&mut self) -> Result<u32, Failure> {
        Ok(self.instance.stats().await.map_err(at("ask its VMM"))?.tsc_khz)
    }

    /// What its control group is charged with.
    ///
    /// # Errors
    /// Why the kernel does not tell.
    pub fn charge(&self) -> Result<Charge, String> {
        let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", self.instance.pid()));
        let groups = groups.map_err(at("its control group"))?;
        let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let group = group.ok_or("this kernel has no control groups of version 2")?;
        charge(&Path::new("/sys/fs/cgroup").join(group.trim_start_matches('/')))
    }
}

/// Reads what a control group of version 2 is charged with.
fn charge(group: &Path) -> Result<Charge, String> {
    let read = |name: &str| -> Option<u64> {
        std::fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
    };
    let limit = read("memory.max").ok_or("its control group has no memory.max with a limit")?;
    // Linux before 5.19 has no peak.
    let bytes = read("memory.peak").or_else(|| read("memory.current"));
    let bytes = bytes.ok_or("its control group has neither memory.peak nor memory.current")?;
    Ok(Charge { bytes, limit })
}

fn loaded(report: Result<firn::LoadReport, firn::InstanceError>) -> Result<(), Failure> {
    match report.map_err(at("load"))?.error {
        None => Ok(()),
        Some(error) => Err(format!("the function did not initialise: {error:?}")),
    }
}

fn invocation(event: &Value, patience: u32) -> Invocation {
    Invocation {
        request_id: "8476a536-e9f4-11e8-9739-2dfe598c3fcd".into(),
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:doctor".into(),
        timeout: TIMEOUT * patience,
        payload: event.to_string().into(),
        ..Default::default()
    }
}

fn answer(report: InvokeReport, begun: Instant) -> Result<Answer, Failure> {
    let took = begun.elapsed();
    match &report.outcome {
        Outcome::Response { payload, .. } => {
            let value = serde_json::from_slice(payload).map_err(at("the function's answer"))?;
            Ok(Answer { value, took })
        }
        other => Err(format!("the function failed: {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_is_the_peak_or_else_what_is_charged_now() {
        let group = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(group.path().join(name), text).unwrap();
        let error = || charge(group.path()).unwrap_err();
        assert!(error().contains("memory.max"), "{}", error());
        write("memory.max", "max\n");
        assert!(error().contains("memory.max"), "{}", error());
        write("memory.max", "300\n");
        assert!(error().contains("memory.peak"), "{}", error());
        write("memory.current", "100\n");
        assert_eq!(charge(group.path()), Ok(Charge { bytes: 100, limit: 300 }));
        write("memory.peak", "200\n");
        assert_eq!(charge(group.path()), Ok(Charge { bytes: 200, limit: 300 }));
    }
}
