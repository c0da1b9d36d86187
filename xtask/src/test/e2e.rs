//! `tests/e2e`: one pytest here, whose workers each have a daemon of their own in the lane.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use super::results;
use crate::clients::Clients;
use crate::daemon::{self, Daemon, Settings};
use crate::lane::{self, Lane, Site};
use crate::step::Outcome;
use crate::{cargo, demo, step};

/// What came of it.
pub struct Run {
    /// What pytest printed.
    pub outcome: Outcome,
    /// For each daemon, whether it stopped in order and left nothing behind.
    pub left_behind: Vec<Result<()>>,
}

/// How many daemons the tests use in a lane, each in such a machine: as many as were asked for, else one for each CPU.
pub fn sites(lane: Lane, machine: lane::Machine, asked: Option<usize>) -> usize {
    match lane {
        // They would find each other's processes.
        Lane::Native => 1,
        Lane::HostVm => asked.unwrap_or_else(|| lane::host_vms(machine)).max(1),
    }
}

/// Runs all tests, or what is in `more`, which goes to pytest; a worker for each site.
pub fn end_to_end(
    sites: Vec<Site>,
    artifacts: &Path,
    clients: &Clients,
    more: &[String],
    environment: &[(&str, &str)],
) -> Result<Run> {
    let settings = Settings { restart: true, ..Settings::default() };
    let runners = sites.iter().map(Site::runner).collect::<Result<Vec<_>>>()?;
    let start = |site| Daemon::start(site, artifacts, &settings);
    let daemons = sites.into_iter().map(start).collect::<Result<Vec<_>>>()?;
    let places = runners.iter().zip(&daemons).map(|(runner, daemon)| place(daemon, runner));
    let mut pytest = pytest(clients, places.collect());
    pytest.envs(environment.iter().copied()).args(more);
    let counts = |line: &str| results::pytest(line).is_some();
    let outcome = step::watch("end-to-end tests", &mut pytest, counts, 0)?;
    let left_behind = daemons.into_iter().map(Daemon::stop).collect();
    Ok(Run { outcome, left_behind })
}

/// What a worker has in its environment.
fn place(daemon: &Daemon, runner: &[String]) -> Value {
    json!({
        "FIRN_ENDPOINT": daemon.endpoint(),
        "FIRN_RUNNER": json!(runner).to_string(),
        "FIRN_LOG": daemon.log_file(),
        "FIRN_SECOND_PORT": daemon::PORTS[1].to_string(),
        "FIRN_SECOND_ENDPOINT": daemon.second_endpoint(),
        "FIRN_AWS_PORT": daemon.outside().port.to_string(),
        "FIRN_AWS_ENDPOINT": format!("http://{}", daemon.outside().from_daemons),
    })
}

/// pytest in `tests/e2e`; its worker of number n reads its environment in the nth of `places`.
fn pytest(clients: &Clients, places: Vec<Value>) -> Command {
    let mut pytest = Command::new(clients.python.join("bin/python"));
    pytest.args(["-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]);
    pytest.args(["--durations=0", "-n", &places.len().to_string()]);
    // A file's tests share fixtures: workers keep to files until one has nothing left, and takes from the others.
    // A worker that dies is not replaced, for its successor would have no daemon.
    pytest.args(["--dist", "worksteal", "--max-worker-restart", "0"]);
    pytest.current_dir(cargo::workspace().join(super::choice::END_TO_END));
    pytest.envs(demo::CREDENTIALS).env("PYTHONDONTWRITEBYTECODE", "1");
    pytest.env("PYTHONUNBUFFERED", "1");
    pytest.env("FIRN_PLACES", Value::Array(places).to_string());
    pytest.env("FIRN_CLIENTS", &clients.commands);
    pytest
}
