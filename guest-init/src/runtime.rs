//! One run of the function's runtime: its process, its output, its side of the Runtime API.

use std::{
    collections::BTreeMap,
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

use firn_proto::guest::{Load, Stream};
use rustix::{
    io::ioctl_fionbio,
    process::{Pid, WaitStatus},
};

use crate::{
    calls::CREDENTIALS,
    confine::{Filters, confine},
    output::Output,
    place::Place,
    runtime_api::RuntimeApi,
    server::Server,
    tracer::Tracer,
};

/// Where a bootstrap may be, first come first served: the image's, or the function's own.
const BOOTSTRAPS: [&str; 3] = ["/var/runtime/bootstrap", "/var/task/bootstrap", "/opt/bootstrap"];

/// What the runtime finds in its environment unless the host says otherwise.
const DEFAULTS: [(&str, &str); 5] = [
    // Code that is traced runs without a trace, too.
    ("AWS_XRAY_CONTEXT_MISSING", "LOG_ERROR"),
    ("LANG", "C.UTF-8"),
    ("LD_LIBRARY_PATH", "/var/runtime:/var/runtime/lib:/var/task:/var/task/lib:/opt/lib"),
    ("PATH", "/usr/local/bin:/usr/bin:/bin:/opt/bin"),
    ("TZ", ":UTC"),
];

const INITIALIZATION_TYPE: &str = "AWS_LAMBDA_INITIALIZATION_TYPE";

/// Why there is no runtime.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No bootstrap anywhere.
    #[error("Couldn't find valid bootstrap(s): [{}]", BOOTSTRAPS.join(" "))]
    NoBootstrap,
    /// The bootstrap could not be executed.
    #[error("fork/exec {path}: {source}", path = path.display())]
    Exec {
        /// The bootstrap.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The Runtime API or the pipes could not be set up.
    #[error("set up the Runtime API: {0}")]
    Api(#[from] io::Error),
    /// No seccomp filter.
    #[error("seccomp filter: {0}")]
    Filter(#[from] seccompiler::Error),
}

/// A running runtime.
#[derive(Debug)]
pub struct Runtime {
    /// Of its first process.
    pub pid: Pid,
    /// When it was started.
    pub started: Instant,
    /// Its connections.
    pub server: Server,
    /// Where it stands.
    pub api: RuntimeApi,
    /// What it prints.
    pub outputs: [Output; 2],
    /// Where it sends segments.
    pub tracer: Tracer,
    /// Who knows this gets the role's credentials; `None`: there are none, and no services.
    pub token: Option<String>,
}

impl Runtime {
    /// Starts the function's runtime.
    ///
    /// # Errors
    /// Any [`StartError`].
    pub fn start(place: &Place, load: &Load) -> Result<Self, StartError> {
        let path = BOOTSTRAPS
            .iter()
            .map(|path| place.path(path))
            .find(|path| path.exists())
            .ok_or(StartError::NoBootstrap)?;
        let filters = Filters::compile()?;
        let server = Server::listen(place.api())?;
        let tracer = Tracer::bind(place.tracer())?;
        let token = if load.endpoints.is_empty() { None } else { Some(token()?) };
        let own = Own {
            api: server.address()?.to_string(),
            tracer: tracer.address()?.to_string(),
            token: token.as_deref(),
        };
        let environment = environment(place, load, &own);
        let cgroup =
            place.machine().map(|machine| machine.cgroup.procs().try_clone()).transpose()?;

        let started = Instant::now();
        let mut command = Command::new(&path);
        command
            .env_clear()
            .envs(environment)
            .current_dir(place.path("/var/task"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: `confine` is made for the time between fork and exec.
        unsafe { command.pre_exec(move || confine(&filters, cgroup.as_ref())) };
        let mut child = command.spawn().map_err(|source| StartError::Exec { path, source })?;

        let output = |stream, pipe: Option<std::os::fd::OwnedFd>| -> io::Result<Output> {
            let pipe = pipe.ok_or(io::ErrorKind::NotFound)?;
            ioctl_fionbio(&pipe, true)?;
            Ok(Output::new(stream, pipe))
        };
        let outputs = [
            output(Stream::Stdout, child.stdout.take().map(Into::into))?,
            output(Stream::Stderr, child.stderr.take().map(Into::into))?,
        ];
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let snap_start = load
            .environment
            .iter()
            .any(|(name, value)| name == INITIALIZATION_TYPE && value == "snap-start");
        let api = RuntimeApi::new(load.snapshot || snap_start);
        Ok(Self { pid, started, server, api, outputs, tracer, token })
    }
}

/// What the guest alone knows of the environment.
struct Own<'a> {
    /// Address of the Runtime API and of the host's services.
    api: String,
    /// Address that takes segments.
    tracer: String,
    /// See [`Runtime::token`].
    token: Option<&'a str>,
}

/// 128 random bits.
fn token() -> io::Result<String> {
    let mut bytes = [0; 16];
    rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
    })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn environment(place: &Place, load: &Load, own: &Own<'_>) -> BTreeMap<String, String> {
    let mut environment: BTreeMap<String, String> =
        DEFAULTS.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let services = format!("http://{}", own.api);
    environment.extend(load.endpoints.iter().map(|name| (name.clone(), services.clone())));
    for (name, path) in [("LAMBDA_TASK_ROOT", "/var/task"), ("LAMBDA_RUNTIME_DIR", "/var/runtime")]
    {
        environment.insert(name.to_owned(), place.path(path).to_string_lossy().into_owned());
    }
    environment.extend(load.environment.iter().cloned());
    let mut set = |name: &str, value: &str| environment.insert(name.to_owned(), value.to_owned());
    set("AWS_LAMBDA_RUNTIME_API", &own.api);
    set("AWS_XRAY_DAEMON_ADDRESS", &own.tracer);
    if let Some(token) = own.token {
        set("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{services}{CREDENTIALS}"));
        set("AWS_CONTAINER_AUTHORIZATION_TOKEN", token);
    }
    environment
}

/// How a process ended, in the words of Lambda's `Runtime.ExitError`.
pub fn describe(status: WaitStatus) -> String {
    if let Some(code) = status.exit_status() {
        return format!("exit status {code}");
    }
    let raw = std::process::ExitStatus::from_raw(status.as_raw());
    match raw.signal() {
        Some(signal) => match signal_name(signal) {
            Some(name) => format!("signal: {name}"),
            None => format!("signal: signal {signal}"),
        },
        None => "exit status unknown".to_owned(),
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        libc::SIGSYS => "bad system call",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(environment: &[(&str, &str)]) -> Load {
        Load {
            environment: environment.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect(),
            memory_bytes: 0,
            init_timeout_ms: 0,
            snapshot: false,
            code: false,
            endpoints: vec!["AWS_ENDPOINT_URL_KMS".into(), "AWS_ENDPOINT_URL_STS".into()],
        }
    }

    #[test]
    fn the_host_overrides_defaults_but_not_the_api() {
        let place = Place::directory("/x".into());
        let mut load = load(&[
            ("TZ", "Asia/Tokyo"),
            ("AWS_LAMBDA_RUNTIME_API", "evil"),
            ("AWS_ENDPOINT_URL_STS", "https://elsewhere"),
            ("A", "b"),
        ]);
        let own = |token| Own { api: "127.0.0.1:1".into(), tracer: "127.0.0.1:2".into(), token };
        let environment = environment(&place, &load, &own(Some("token")));
        assert_eq!(environment["TZ"], "Asia/Tokyo");
        assert_eq!(environment["AWS_LAMBDA_RUNTIME_API"], "127.0.0.1:1");
        assert_eq!(environment["LAMBDA_TASK_ROOT"], "/x/var/task");
        assert_eq!(environment["A"], "b");
        assert_eq!(environment["AWS_XRAY_DAEMON_ADDRESS"], "127.0.0.1:2");
        assert_eq!(environment["AWS_XRAY_CONTEXT_MISSING"], "LOG_ERROR");
        assert_eq!(environment["AWS_ENDPOINT_URL_KMS"], "http://127.0.0.1:1");
        assert_eq!(environment["AWS_ENDPOINT_URL_STS"], "https://elsewhere");
        assert_eq!(environment["AWS_CONTAINER_AUTHORIZATION_TOKEN"], "token");
        let uri = "http://127.0.0.1:1/2021-04-23/credentials";
        assert_eq!(environment["AWS_CONTAINER_CREDENTIALS_FULL_URI"], uri);
        load.endpoints.clear();
        let without = super::environment(&place, &load, &own(None));
        assert!(!without.keys().any(|name| name.starts_with("AWS_CONTAINER")));
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(token().unwrap(), token().unwrap());
        assert_eq!(token().unwrap().len(), 32);
    }

    #[test]
    fn no_bootstrap_is_named() {
        let root = tempfile::tempdir().unwrap();
        let error = Runtime::start(&Place::directory(root.path().into()), &load(&[])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Couldn't find valid bootstrap(s): \
             [/var/runtime/bootstrap /var/task/bootstrap /opt/bootstrap]"
        );
    }
}
