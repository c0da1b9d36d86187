//! The command line, and what must hold before the daemon starts.

use std::{
    fs::{self, File},
    net::SocketAddr,
    num::NonZeroU64,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use firn::{Numa, control::CpuTemplate, keys::KeyService};
use rustix::fs::{FlockOperation, flock};

use crate::{
    api::{
        names::{Place, is_region},
        urls::Urls,
    },
    audit::{self, delivery::Bucket},
    aws::{AccessKey, Aws, Endpoint},
    events::Bounds,
    scheduler::{Isolation, Limits, Reserve},
    traces::export::Collector,
};

/// Runs functions the way AWS Lambda does, each in its own microVM.
///
/// Serves Lambda's HTTP API. With --identity, requests must be signed and allowed. Without, firnd is in
/// development mode: it listens on loopback only, signatures are not checked, and whoever reaches the port
/// may do everything.
#[derive(Debug, Clone, Parser)]
#[command(name = "firnd", version)]
pub struct Options {
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:9000", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// Allow addresses other than loopback. Needs --identity: nobody may call unknown from elsewhere.
    #[arg(long, requires = "identity")]
    pub listen_anywhere: bool,
    /// File with users, their access keys and policies, and roles, as JSON that only this user can read.
    /// Read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub identity: Option<PathBuf>,
    /// Where functions, code, snapshots and logs are kept.
    #[arg(long, default_value = "/var/lib/firn", value_name = "DIR")]
    pub state: PathBuf,
    /// File with the master key that protects functions and snapshots, 32 bytes that only this user can
    /// read; made if there is none. Without it they are lost. Default: master.key in the state directory;
    /// better elsewhere, so that copies of that directory tell nothing.
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Encrypt snapshots on disk, too. Functions' code and environments always are.
    #[arg(long)]
    pub encrypt_snapshots: bool,
    /// The installation: bin/, kernel/, images/.
    #[arg(long, default_value = "/usr/lib/firn", value_name = "DIR")]
    pub artifacts: PathBuf,
    /// Region that ARNs and functions see.
    #[arg(long, default_value = "us-east-1")]
    pub region: String,
    /// Account that ARNs see, twelve digits.
    #[arg(long, default_value = "000000000000")]
    pub account: String,
    /// Where S3, SQS and SNS are, for code that lies in buckets and for what becomes of asynchronous events, if
    /// not at AWS; requests are signed with the access key in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. May
    /// be given several times, with a service (s3=, sqs=, sns=) and for all others without.
    #[arg(long, value_name = "[SERVICE=]URL")]
    pub aws_endpoint: Vec<Endpoint>,
    /// Record invocations in the audit trail, too, not only what is done to functions.
    #[arg(long)]
    pub audit_data_events: bool,
    /// Bucket that files of the audit trail are delivered to, as CloudTrail does. At AWS, or at --aws-endpoint.
    #[arg(long, value_name = "BUCKET[/PREFIX]")]
    pub audit_bucket: Option<Bucket>,
    /// Most MiB of compressed files of the audit trail; the oldest are removed.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub audit_space: u32,
    /// Send traces of sampled invocations to this collector, over OTLP/HTTP; the path is /v1/traces unless
    /// there is one. Default: what the environment's OTEL_EXPORTER_OTLP_ENDPOINT says; without it nothing is
    /// traced. OTEL_EXPORTER_OTLP_HEADERS is sent along.
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Invocations at once.
    #[arg(long, default_value_t = 1000, value_name = "COUNT")]
    pub concurrency: u32,
    /// Deliveries of asynchronous events at once; never more than half of --concurrency.
    #[arg(long, default_value_t = 100, value_name = "COUNT")]
    pub event_concurrency: u32,
    /// Most MiB of events that wait to be delivered; one function has half of it at most.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub event_queue: u64,
    /// Seconds between an asynchronous event's first attempt and its second; twice as many lie between
    /// the second and the third.
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    pub event_retry_delay: f64,
    /// Most MiB a second of a streamed response, after its first 6 MiB; 0: no limit. A function's time
    /// goes on while its response waits.
    #[arg(long, default_value_t = 2.0, value_name = "MIB")]
    pub stream_rate: f64,
    /// Domain of functions' URLs, http://<id>.lambda-url.<region>.localhost:<port>/ for `localhost`, which
    /// lead to this daemon as they are; https://<id>.lambda-url.<region>.<domain>/ for any other, for a
    /// proxy that passes hosts on as they are.
    #[arg(long, default_value = "localhost", value_name = "DOMAIN")]
    pub url_domain: String,
    /// What a request may find of those before it. warm: what its instance kept, as in Lambda.
    /// per-invocation: nothing; instances are taken back to their function's snapshot after each
    /// response, before they wait for the next request.
    #[arg(long, value_enum, default_value_t = Isolation::Warm)]
    pub isolation: Isolation,
    /// Seconds after which an idle instance is retired.
    #[arg(long, default_value_t = 300.0, value_name = "SECONDS")]
    pub idle_timeout: f64,
    /// Seconds after which an idle instance gives back memory that it holds only to be fast.
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub reclaim_after: f64,
    /// Host memory that instances leave alone, in MiB.
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    pub memory_reserve: u64,
    /// Free space, in MiB, on the file system of the state directory below which there are no new
    /// instances and idle ones end. Each instance's /tmp may grow to its full size there.
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    pub disk_reserve: u64,
    /// Shells kept ready for each size class in use.
    #[arg(long, default_value_t = 2, value_name = "COUNT")]
    pub shells: usize,
    /// Most huge pages of 2 MiB that each of these shells keeps zeroed for what a thaw copies ahead.
    #[arg(long, default_value_t = 24, value_name = "COUNT")]
    pub spare_pages: u16,
    /// Copy a region of 2 MiB ahead if that saves so many page faults for each 512 pages copied; over
    /// 512: never. The lower, the faster a thaw, and the more memory until an instance is idle.
    #[arg(long, default_value_t = 21, value_name = "FAULTS")]
    pub dense_pages: u32,
    /// What CPU functions see: `host`, this machine's; or `x86-64-v2`, `x86-64-v3`, what each machine
    /// of a fleet has, so that a snapshot of one is thawed on another.
    #[arg(long, default_value = "host", value_name = "TEMPLATE")]
    pub cpu_template: CpuTemplate,
    /// Where the memory of snapshots lies on machines with several NUMA nodes: `local`, on the node where
    /// the daemon reads them; or `interleave`, on all nodes in turns.
    #[arg(long, default_value_t, value_name = "POLICY")]
    pub numa: Numa,
    /// Seconds that invocations in flight get when the daemon is told to stop.
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub stop_timeout: f64,
    /// Multiplies the time limits for boot, thaw and initialisation, for slow machines.
    #[arg(long, default_value_t = 1, value_name = "FACTOR")]
    pub patience: u32,
    /// Don't limit CPU time in proportion to a function's memory.
    #[arg(long)]
    pub no_cpu_limits: bool,
    /// Most bytes a second that each microVM may read from the disk of the state directory, and as many
    /// that it may write; at least 65536. Without it each may use what others leave, in proportion to
    /// its memory where they compete.
    #[arg(long, value_name = "BYTES")]
    pub io_bytes_per_second: Option<u64>,
    /// Run although the host has no control groups to limit microVMs with.
    #[arg(long)]
    pub allow_no_cgroups: bool,
    /// Give every guest a serial console; its output is logged at debug level.
    #[arg(long)]
    pub serial: bool,
    /// What to log, such as `info` or `firnd=debug`.
    #[arg(long, default_value = "info", value_name = "FILTER")]
    pub log: String,
}

impl Options {
    /// Checks what the command line alone can be wrong about.
    ///
    /// # Errors
    /// Names the flag and what it takes.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.listen_anywhere || self.listen.ip().is_loopback(),
            "--listen {} is not a loopback address: add --listen-anywhere, and --identity FILE with those \
             who may call",
            self.listen
        );
        ensure!(
            is_region(&self.region),
            "--region {:?} is no region; one looks like us-east-1",
            self.region
        );
        ensure!(
            self.account.len() == 12 && self.account.bytes().all(|b| b.is_ascii_digit()),
            "--account {:?} must be twelve digits",
            self.account
        );
        ensure!(
            (1..=100_000).contains(&self.concurrency),
            "--concurrency {} must be between 1 and 100000",
            self.concurrency
        );
        ensure!(
            (1..=100_000).contains(&self.event_concurrency),
            "--event-concurrency {} must be between 1 and 100000",
            self.event_concurrency
        );
        ensure!(
            (4..=1 << 30).contains(&self.event_queue),
            "--event-queue {} must be between 4 and 1073741824 MiB",
            self.event_queue
        );
        ensure!(
            (0.0..=3600.0).contains(&self.event_retry_delay),
            "--event-retry-delay {} must be between 0 and 3600 seconds",
            self.event_retry_delay
        );
        ensure!(
            self.stream_rate == 0.0 || (0.001..=1e6).contains(&self.stream_rate),
            "--stream-rate {} must be 0 or between 0.001 and 1000000 MiB a second",
            self.stream_rate
        );
        let label = |label: &str| {
            let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
            (1..=63).contains(&label.len()) && label.bytes().all(fits)
        };
        // Lambda's model gives a URL a hundred characters.
        ensure!(
            self.url_domain.len() <= 24 && self.url_domain.split('.').all(label),
            "--url-domain {:?} must be a domain of at most 24 characters, such as fn.example.org",
            self.url_domain
        );
        ensure!(
            (0.0..=86_400.0).contains(&self.idle_timeout),
            "--idle-timeout {} must be between 0 and 86400 seconds",
            self.idle_timeout
        );
        ensure!(
            (0.0..=86_400.0).contains(&self.reclaim_after),
            "--reclaim-after {} must be between 0 and 86400 seconds",
            self.reclaim_after
        );
        ensure!(
            self.spare_pages <= firn::control::MAX_SPARES,
            "--spare-pages {} must be between 0 and {}",
            self.spare_pages,
            firn::control::MAX_SPARES
        );
        ensure!(
            (0.0..=900.0).contains(&self.stop_timeout),
            "--stop-timeout {} must be between 0 and 900 seconds",
            self.stop_timeout
        );
        ensure!(
            (1..=1000).contains(&self.patience),
            "--patience {} must be between 1 and 1000",
            self.patience
        );
        self.collector()?;
        Ok(())
    }

    /// What ARNs say.
    pub fn place(&self) -> Place {
        Place { region: self.region.clone(), account: self.account.clone() }
    }

    /// Who sends requests to AWS, or where they go instead.
    pub fn aws(&self) -> Aws {
        Aws::new(self.aws_endpoint.clone(), self.region.clone(), AccessKey::from_environment())
    }

    /// What bounds the scheduler.
    pub fn limits(&self) -> Limits {
        Limits {
            concurrency: self.concurrency,
            idle: Duration::from_secs_f64(self.idle_timeout),
            reclaim: Duration::from_secs_f64(self.reclaim_after),
            reserve: Reserve {
                memory_mib: self.memory_reserve,
                disk_mib: self.disk_reserve,
                dir: self.state.clone(),
            },
            isolation: self.isolation,
        }
    }

    /// Most bytes a second of a streamed response.
    pub fn stream_rate(&self) -> Option<NonZeroU64> {
        NonZeroU64::new((self.stream_rate * f64::from(1 << 20)) as u64)
    }

    /// What functions' URLs look like.
    pub fn urls(&self, port: u16) -> Urls {
        Urls::new(&self.region, &self.url_domain, port)
    }

    /// What bounds asynchronous invocation.
    pub fn events(&self) -> Bounds {
        Bounds {
            slots: self.event_concurrency.min(self.concurrency / 2).max(1) as usize,
            bytes: self.event_queue << 20,
            retry: Duration::from_secs_f64(self.event_retry_delay),
        }
    }

    /// What bounds the audit trail.
    pub fn audit(&self) -> audit::Bounds {
        let (space, data_events) = (u64::from(self.audit_space) << 20, self.audit_data_events);
        audit::Bounds { space, data_events, ..audit::Bounds::default() }
    }

    /// Where traces go.
    ///
    /// # Errors
    /// Names the flag or variable that is wrong.
    pub fn collector(&self) -> anyhow::Result<Option<Collector>> {
        Collector::find(self.otlp_endpoint.as_deref()).map_err(anyhow::Error::msg)
    }

    /// Where the master key lies.
    pub fn key_file(&self) -> PathBuf {
        self.key_file.clone().unwrap_or_else(|| self.state.join("master.key"))
    }

    /// What the library is opened with.
    pub fn host(&self, keys: Arc<dyn KeyService>) -> firn::HostConfig {
        let mut config = firn::HostConfig::new(&self.artifacts, &self.state);
        config.keys = Some(keys);
        config.encrypt_snapshots = self.encrypt_snapshots;
        config.shells = self.shells;
        config.spare_pages = self.spare_pages;
        config.dense_pages = self.dense_pages;
        config.cpu_template = self.cpu_template;
        config.numa = self.numa;
        config.serial = self.serial;
        config.patience = self.patience;
        config.cpu_limits = !self.no_cpu_limits;
        config.io_bytes_per_second = self.io_bytes_per_second;
        config.allow_no_cgroups = self.allow_no_cgroups;
        match self.isolation {
            Isolation::Warm => config,
            Isolation::PerInvocation => config.for_resets(),
        }
    }
}

/// The state directory, held by this process alone for as long as the value lives.
#[derive(Debug)]
pub struct StateLock(#[expect(dead_code, reason = "closing it gives up the lock")] File);

/// Makes a directory that only this user can look into: code, snapshots and logs may hold secrets.
///
/// # Errors
/// Names the directory.
pub fn private_dir(path: PathBuf) -> anyhow::Result<PathBuf> {
    let make = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        // Also if it was there before.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))
    };
    make().with_context(|| format!("can't make or use the directory {}", path.display()))?;
    Ok(path)
}

/// Makes the state directory if needed and takes it for this process.
///
/// # Errors
/// Says what to do.
pub fn lock_state(state: &Path) -> anyhow::Result<StateLock> {
    fs::create_dir_all(state).with_context(|| {
        format!("can't make the state directory {}: name another with --state", state.display())
    })?;
    let path = state.join("firnd.lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path).with_context(
        || {
            format!(
                "can't write in the state directory {}: give it to this user, or name another \
                 with --state",
                state.display()
            )
        },
    )?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(StateLock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!(
            "another firnd uses the state directory {}: stop it, or name another with --state",
            state.display()
        ),
        Err(error) => Err(error).with_context(|| format!("can't lock {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(arguments: &[&str]) -> Result<(), String> {
        let all = std::iter::once(&"firnd").chain(arguments);
        let options = Options::try_parse_from(all).map_err(|e| e.to_string())?;
        options.check().map_err(|e| e.to_string())
    }

    #[test]
    fn only_loopback_unless_told_otherwise() {
        assert!(check(&[]).is_ok());
        assert!(check(&["--listen", "[::1]:0"]).is_ok());
        let error = check(&["--listen", "0.0.0.0:9000"]).unwrap_err();
        assert!(error.contains("--listen-anywhere"), "{error}");
        let anywhere = ["--listen", "0.0.0.0:9000", "--listen-anywhere"];
        let error = check(&anywhere).unwrap_err();
        assert!(error.contains("--identity"), "{error}");
        assert!(check(&[&anywhere[..], &["--identity", "FILE"]].concat()).is_ok());
    }

    #[test]
    fn bad_flags_are_named() {
        for (flag, value) in [
            ("--region", "mars"),
            ("--account", "12"),
            ("--audit-bucket", "x/../y"),
            ("--aws-endpoint", "sqs.example.com"),
            ("--concurrency", "0"),
            ("--event-concurrency", "0"),
            ("--event-queue", "3"),
            ("--event-retry-delay", "-1"),
            ("--idle-timeout", "-1"),
            ("--idle-timeout", "NaN"),
            ("--reclaim-after", "-1"),
            ("--spare-pages", "513"),
            ("--stop-timeout", "1e9"),
            ("--patience", "0"),
            ("--listen", "nowhere"),
            ("--isolation", "none"),
            ("--otlp-endpoint", "nowhere"),
        ] {
            let error = check(&[&format!("{flag}={value}")]).expect_err(value);
            assert!(error.contains(flag), "{flag}: {error}");
        }
    }

    #[test]
    fn directories_with_secrets_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("code");
        for _ in 0..2 {
            let path = private_dir(path.clone()).unwrap();
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    #[test]
    fn a_state_directory_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("new/state");
        let lock = lock_state(&state).unwrap();
        let error = lock_state(&state).unwrap_err().to_string();
        assert!(error.contains("another firnd") && error.contains("--state"), "{error}");
        drop(lock);
        lock_state(&state).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let error = lock_state(&dir.path().join("file")).unwrap_err().to_string();
        assert!(error.contains("--state"), "{error}");
    }
}
