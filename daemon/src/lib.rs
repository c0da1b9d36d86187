//! `firnd`: an HTTP API compatible with AWS Lambda's on top of the [`firn`] library.
//!
//! Thin by intent: HTTP in ([`api`]), [`firn`] out ([`scheduler`], [`prepare`]), state in a store
//! ([`store`], [`code`], [`logs`]). It never reads guest memory. What comes from a guest it parses as
//! `firn-proto`'s messages, and of what these carry only trace segments ([`traces`]) and requests to its own API
//! ([`inside`]), as it does everybody's.

mod api;
mod attachments;
mod audit;
mod aws;
mod backend;
mod client;
mod code;
mod config;
mod envelope;
mod events;
#[cfg(test)]
mod fake;
mod function;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod identity;
mod inside;
mod kms;
mod layers;
mod logs;
mod metrics;
mod outcome;
mod prepare;
mod report;
mod scheduler;
mod serve;
mod store;
mod traces;
mod workshop;

use std::{io, io::Write, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use clap::Parser;
use firn::{
    control::CpuTemplate,
    keys::{KeyService, LocalKeyFile},
};
use rustix::{
    fs::Mode,
    process::{DumpableBehavior, Resource, Rlimit},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tracing_subscriber::EnvFilter;

use crate::{
    backend::Backend,
    config::Options,
    inside::{Gateway, Inside},
    workshop::Workshop,
};

/// Time that what became of the last deliveries of events gets to be written down, and again that the last audit
/// file gets to be delivered.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// Time that the collector gets to take the last traces.
const LAST_TRACES: Duration = Duration::from_secs(2);

/// Runs the daemon as its command line says.
pub fn main() -> ExitCode {
    let options = Options::parse();
    match start(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("firnd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(options: Options) -> anyhow::Result<()> {
    options.check()?;
    harden().context("can't keep this process's memory out of core dumps")?;
    let filter = EnvFilter::try_new(&options.log)
        .with_context(|| format!("--log {:?} is no filter; try `info`", options.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
    firn::raise_descriptor_limit().context("can't raise the limit of open descriptors")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("can't start the threads of the daemon")?;
    runtime.block_on(run(options))
}

/// Keys, code and environments lie in this process's memory: no core dump of it is written, and nobody
/// without the right to trace everything can look into it, if it is root's.
///
/// What is private is made so by name; the rest must be readable by users of Firn's own (`mkfs.erofs`, VMMs),
/// whatever the umask of whoever started the daemon.
fn harden() -> io::Result<()> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none)?;
    // An ordinary user's process may not touch its own files in /proc then, which jails need.
    if rustix::process::geteuid().is_root() {
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    Ok(())
}

async fn run(options: Options) -> anyhow::Result<()> {
    // First, so that a signal during start-up is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let _lock = config::lock_state(&options.state)?;
    let listener = TcpListener::bind(options.listen).await.map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "something else listens there: stop it, or name another \
                                         port with --listen"
            }
            io::ErrorKind::PermissionDenied => {
                "ports below 1024 need privileges: name another \
                                                port with --listen"
            }
            io::ErrorKind::AddrNotAvailable => {
                "this machine has no such address: name another \
                                                with --listen"
            }
            _ => "name another address with --listen",
        };
        anyhow::anyhow!("can't listen on {}: {error}; {hint}", options.listen)
    })?;
    let identity = match &options.identity {
        Some(path) => {
            let identity = Arc::new(identity::Identity::open(path, options.place())?);
            reload_on_hangup(identity.clone())?;
            Some(identity)
        }
        None => {
            tracing::warn!(
                "development mode: without --identity nobody is asked who they are, and everybody who \
                 reaches the port may do everything"
            );
            None
        }
    };
    let keys = LocalKeyFile::open_or_create(&options.key_file()).context("no master key")?;
    let keys: Arc<dyn KeyService> = Arc::new(keys);
    let host = firn::Host::open(options.host(keys.clone())).await.map_err(|error| {
        let hint = match &error {
            firn::OpenError::Artifact { .. }
            | firn::OpenError::NoImages { .. }
            | firn::OpenError::Image { .. } => {
                "\nname a complete installation with --artifacts, or build one with \
                 `cargo xtask artifacts`"
            }
            firn::OpenError::NoKvm | firn::OpenError::KvmPermission | firn::OpenError::Kvm(_) => {
                "\n`firn doctor` says what this machine lacks"
            }
            firn::OpenError::Cgroup(_) => {
                "\nto try Firn out without limits on memory and CPU, add --allow-no-cgroups"
            }
            _ => "",
        };
        anyhow::anyhow!("{error}{hint}")
    })?;
    let result = match gives_cpu(&host, options.cpu_template).await {
        Ok(()) => daemon(&options, keys, identity, host.clone(), listener, stop).await,
        Err(error) => Err(error),
    };
    // Also when start-up failed half way: nothing may stay behind.
    host.shutdown().await;
    result
}

/// Memory of the smallest functions.
const LEAST_MEMORY_MB: u32 = 128;

/// Tries to make a microVM of a fleet's CPU: without one no function would run.
async fn gives_cpu(host: &firn::Host, template: CpuTemplate) -> anyhow::Result<()> {
    if template == CpuTemplate::Host {
        return Ok(());
    }
    let smallest = firn::ShellClass::for_memory(LEAST_MEMORY_MB);
    host.stock(smallest, 1).await.with_context(|| format!("--cpu-template {template}"))
}

/// Has SIGHUP read the identity file again.
fn reload_on_hangup(identity: Arc<identity::Identity>) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let identity = identity.clone();
            match tokio::task::spawn_blocking(move || identity.reload()).await {
                Ok(Ok(())) => tracing::info!("the identity file was read again"),
                Ok(Err(error)) => tracing::error!(%error, "what was read before stays in force"),
                Err(error) => tracing::error!(%error, "the identity file was not read again"),
            }
        }
    });
    Ok(())
}

async fn daemon<B: Backend>(
    options: &Options,
    keys: Arc<dyn KeyService>,
    identity: Option<Arc<identity::Identity>>,
    backend: B,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let state = &options.state;
    let store = store::Store::open(&state.join("store.sqlite"), keys)?;
    let store = Arc::new(store);
    let functions = store.all();
    let dir = |name| config::private_dir(state.join(name));
    // What was deleted just before the last daemon ended.
    store.sweep_layers()?;
    let code = code::CodeStore::open(
        dir("code")?,
        |blob| store.uses_code(blob) || store.is_layer(blob),
        |disk| store.uses_disk(disk),
    )
    .context("can't use the directory of code")?;
    let traces = match options.collector()? {
        Some(collector) => traces::Traces::start(collector, options.place()),
        None => traces::Traces::default(),
    };
    let workshop = Workshop {
        backend,
        place: options.place(),
        store: store.clone(),
        code,
        logs: logs::Logs::open(dir("logs")?, logs::Bounds::default())
            .context("can't use the directory of logs")?,
        metrics: metrics::Metrics::open(&state.join("metrics.sqlite"))?,
        traces: traces.clone(),
        inside: Inside::default(),
        patience: options.patience,
    };
    let preparer = prepare::Preparer::open(workshop.clone(), dir("snapshots")?, &functions)
        .context("can't use the directory of snapshots")?;
    let scheduler = scheduler::Scheduler::start(workshop.clone(), preparer, options.limits());
    let aws = Arc::new(options.aws());
    let trail = dir("audit")?;
    let delivery = options.audit_bucket.clone().map(|bucket| {
        aws.ready(aws::Service::S3).map_err(io::Error::other)?;
        audit::delivery::Delivery::start(trail.join("pending"), bucket, aws.clone())
    });
    let delivery = delivery.transpose().context("can't deliver the audit trail")?;
    let audit = audit::Audit::open(trail, options.place(), options.audit(), delivery)
        .context("can't use the directory of the audit trail")?;
    let audit = Arc::new(audit);
    let bounds = options.events();
    let queue = events::queue::Queue::open(&state.join("events.sqlite"), bounds.bytes)?;
    let clock = events::clock::Clock::default();
    let events = events::Events::start(
        queue,
        store.clone(),
        scheduler.clone(),
        options.place(),
        clock,
        aws.clone(),
        bounds,
    )?;
    let address = listener.local_addr().context("the listener has no address")?;
    let settings = api::Settings {
        concurrency: options.concurrency,
        stream_rate: options.stream_rate(),
        urls: options.urls(address.port()),
    };
    let sessions = identity::sessions::Sessions::new(&store.own_key("sessions")?);
    let callers = api::gate::Callers { identity, sessions: sessions.clone(), audit: audit.clone() };
    let guarded = callers.identity.is_some();
    let inside = workshop.inside.clone();
    let app = api::App::new(workshop, scheduler.clone(), events.clone(), aws, callers, settings);
    let routes = api::router(app);
    let gateway = Gateway::new(routes.clone(), store, sessions, options.place(), guarded);
    inside.open(&gateway);
    // Whoever started the daemon may not be listening; that is no reason to stop.
    let _ = writeln!(io::stdout(), "firnd: ready on http://{address}");
    let patience = Duration::from_secs_f64(options.stop_timeout);
    let stop = async {
        stop.await;
        events.stop();
    };
    serve::serve(listener, routes, stop, patience, serve::Bounds::default()).await;
    tracing::info!("stopping");
    scheduler.close(patience).await;
    events.close(LAST_WRITES).await;
    scheduler.metrics().flush().await;
    traces.close(LAST_TRACES).await;
    audit.close().await;
    audit.delivered(LAST_WRITES).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_core_dump_is_written_and_files_are_as_their_modes_say() {
        use rustix::{fs::Mode, process::umask};
        umask(Mode::from_raw_mode(0o077));
        super::harden().unwrap();
        assert_eq!(umask(Mode::from_raw_mode(0o022)), Mode::from_raw_mode(0o022));
        let limits = rustix::process::getrlimit(rustix::process::Resource::Core);
        assert_eq!((limits.current, limits.maximum), (Some(0), Some(0)));
        let dumpable = rustix::process::dumpable_behavior().unwrap();
        let hidden = dumpable == rustix::process::DumpableBehavior::NotDumpable;
        assert!(hidden || !rustix::process::geteuid().is_root());
    }
}
