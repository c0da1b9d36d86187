//! A running `firnd` for the demo and the tests, in either lane, and the check that it leaves
//! nothing behind.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use firn_host_vm_agent::Exec;
use rustix::process::{Pid, Signal, kill_process};

use crate::host_vm::client::Client;
use crate::host_vm::{self, HostVm};
use crate::lane::Site;
use crate::{scratch, step};

/// Directories of daemons that this process started are told apart by a number.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// What the daemon prints when it serves.
const READY: &str = "firnd: ready on";

/// Longest time until it does; the emulated rig takes seconds.
const START_LIMIT: Duration = Duration::from_secs(120);

/// Longest time to stop in order.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Lines of its log that are kept for error messages.
const LOG_LINES: usize = 80;

/// Port of the daemon inside the host VM, and in either lane that of one that tests start beside it.
pub const PORTS: [u16; 2] = firn_host_vm_agent::DAEMON_PORTS;

/// Where the host VM keeps the number of the process to stop.
const PID_FILE: &str = "/run/daemon.pid";

/// Names everything of Firn that is alive, one a line. `$1` is a directory to leave out: this
/// program's own.
const INVENTORY: &str = r#"
for comm in /proc/[0-9]*/comm; do
  read -r name < "$comm" 2>/dev/null || continue
  case $name in firn*) echo "process ${comm%/comm} $name" ;; esac
done
find /sys/fs/cgroup -type d -name '*firn*' 2>/dev/null | sed 's/^/control group /'
grep -i firn /proc/self/mountinfo | cut -d' ' -f5 | sed 's/^/mount /'
for path in /tmp/*firn* /run/*firn* /dev/shm/*firn*; do
  [ -e "$path" ] && [ "$path" != "$1" ] && echo "file $path"
done
true
"#;

/// Starts it with these flags.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Start it again whenever it dies, as a service manager would: tests kill it.
    pub restart: bool,
    /// Further flags.
    pub flags: Vec<String>,
}

/// A daemon that serves. Dropping it kills it, and the host VM with it.
pub struct Daemon {
    place: Place,
    endpoint: SocketAddr,
    second: SocketAddr,
    outside: Outside,
    log: Log,
    log_file: PathBuf,
    before: BTreeSet<String>,
}

/// Where tests may serve what daemons ask: AWS, as they make it up.
#[derive(Debug, Clone, Copy)]
pub struct Outside {
    /// Port of this machine's 127.0.0.1 to listen on.
    pub port: u16,
    /// The same place, as daemons reach it.
    pub from_daemons: SocketAddrV4,
}

enum Place {
    Native { child: Child, state: PathBuf },
    HostVm { vm: HostVm, ended: Receiver<()> },
}

/// Its last lines, and a file with all of them.
#[derive(Clone)]
struct Log(Arc<Mutex<(VecDeque<String>, File)>>);

impl Daemon {
    /// Starts a daemon and waits until it serves.
    pub fn start(site: Site, artifacts: &Path, settings: &Settings) -> Result<Self> {
        step::say("starting the daemon …");
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let log_file = scratch::directory()?.join(format!("firnd-{number}.log"));
        let log = Log::new(&log_file)?;
        let (ready, is_ready) = mpsc::channel();
        let (second, outside) = match &site {
            Site::Native => {
                let port = free_port()?.port();
                let from_daemons = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
                let second = (Ipv4Addr::LOCALHOST, PORTS[1]).into();
                (Some(second), Some(Outside { port, from_daemons }))
            }
            Site::HostVm(vm) => {
                let outside = |port| Outside { port, from_daemons: host_vm::OUTSIDE };
                (vm.forwarded(PORTS[1]), vm.outside().map(outside))
            }
        };
        let second = second.context("the second daemon's port is not forwarded")?;
        let outside = outside.context("there is no way out of the host VM")?;
        let (place, endpoint, before) = match site {
            Site::Native => start_native(artifacts, settings, &log, ready)?,
            Site::HostVm(vm) => start_in_host_vm(vm, settings, &log, ready)?,
        };
        let daemon = Self { place, endpoint, second, outside, log, log_file, before };
        match is_ready.recv_timeout(START_LIMIT) {
            Ok(()) => Ok(daemon),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "the daemon was not ready after {} s; its log:\n{}",
                    START_LIMIT.as_secs(),
                    daemon.log()
                )
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the daemon ended before it was ready; its log:\n{}", daemon.log())
            }
        }
    }

    /// Where its API is.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.endpoint)
    }

    /// Where the API of a daemon is that listens on the second of [`PORTS`] beside it.
    pub fn second_endpoint(&self) -> String {
        format!("http://{}", self.second)
    }

    /// Where tests serve what daemons ask.
    pub fn outside(&self) -> Outside {
        self.outside
    }

    /// The last lines of its log.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// A file with all lines of its log so far.
    pub fn log_file(&self) -> &Path {
        &self.log_file
    }

    /// Stops it in order, checks that nothing is left of it, ends the host VM.
    pub fn stop(mut self) -> Result<()> {
        let left = match &mut self.place {
            Place::Native { child, state } => {
                terminate(child)?;
                let run = state.join("run");
                let mut left = &inventory_here()? - &self.before;
                left.extend(entries(&run).map(|path| format!("file {path}")));
                left
            }
            Place::HostVm { vm, ended } => {
                let stopped = stop_in_host_vm(&vm.client(), ended, &self.log);
                let there = stopped.with_context(|| vm.describe())?;
                vm.power_off().with_context(|| vm.describe())?;
                &there - &self.before
            }
        };
        if !left.is_empty() {
            let list: Vec<String> = left.into_iter().collect();
            bail!(
                "the daemon stopped but left this behind:\n  {}\nits log:\n{}",
                list.join("\n  "),
                self.log.text()
            );
        }
        Ok(())
    }
}

/// Stops the daemon; returns what of Firn there is then.
fn stop_in_host_vm(client: &Client, ended: &Receiver<()>, log: &Log) -> Result<BTreeSet<String>> {
    client.output(&shell(&format!("kill -TERM $(cat {PID_FILE})")))?;
    if ended.recv_timeout(STOP_LIMIT) == Err(RecvTimeoutError::Timeout) {
        bail!("the daemon did not stop; its log:\n{}", log.text());
    }
    let mut there = inventory(client)?;
    let run = client.output(&shell("ls -A /var/lib/firn/run 2>/dev/null"))?;
    let names = String::from_utf8_lossy(&run.stdout).into_owned();
    there.extend(names.lines().map(|name| format!("file run/{name}")));
    Ok(there)
}

type Started = (Place, SocketAddr, BTreeSet<String>);

fn start_native(
    artifacts: &Path,
    settings: &Settings,
    log: &Log,
    ready: mpsc::Sender<()>,
) -> Result<Started> {
    let before = inventory_here()?;
    let state = scratch::directory()?.join("state");
    let endpoint = free_port()?;
    let mut command = Command::new("sh");
    command.args(["-c", script(settings.restart), "firnd"]);
    command.arg(artifacts.join("bin/firnd")).arg("--artifacts").arg(artifacts);
    command.arg("--state").arg(&state).arg("--listen").arg(endpoint.to_string());
    command.args(&settings.flags);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = step::end_with_us(&mut command).spawn().context("cannot run firnd")?;
    for stream in [
        child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>),
        child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>),
    ] {
        let (log, ready) = (log.clone(), ready.clone());
        if let Some(stream) = stream {
            thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    log.add(&line, &ready);
                }
            });
        }
    }
    Ok((Place::Native { child, state }, endpoint, before))
}

fn start_in_host_vm(
    vm: HostVm,
    settings: &Settings,
    log: &Log,
    ready: mpsc::Sender<()>,
) -> Result<Started> {
    let client = vm.client();
    let before = inventory(&client)?;
    let script = format!("echo $$ > {PID_FILE}; {}", script(settings.restart));
    let mut argv: Vec<String> =
        ["sh", "-c", &script, "firnd", "/firn/bin/firnd"].map(String::from).to_vec();
    // Emulated CPUs are slow: longer limits, and no share of a CPU for small functions, which would make
    // them slower still.
    let flags =
        format!("--artifacts /firn --listen 127.0.0.1:{} --patience 20 --no-cpu-limits", PORTS[0]);
    argv.extend(flags.split(' ').map(String::from));
    argv.extend(settings.flags.iter().cloned());
    let running = client.start(&Exec { argv, ..Exec::default() })?;
    let (end, ended) = mpsc::channel::<()>();
    let log = log.clone();
    thread::spawn(move || {
        let mut rest = Vec::new();
        let _ = running.finish(|_, bytes| {
            rest.extend_from_slice(bytes);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                log.add(&line, &ready);
            }
            Ok(())
        });
        log.add(&rest, &ready);
        drop(end);
    });
    let endpoint = vm.forwarded(PORTS[0]).context("the daemon's port is not forwarded")?;
    Ok((Place::HostVm { vm, ended }, endpoint, before))
}

/// Asking the system and then giving the port to another process can fail if a third takes it in between; who
/// listens there says so then.
fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Runs `"$@"`; with `restart` whenever it has ended, until SIGTERM, which is passed on.
fn script(restart: bool) -> &'static str {
    if restart {
        r#"trap 'kill -TERM $child; wait $child; exit' TERM
           while :; do
             "$@" & child=$!; wait $child
             case $? in 132|134|135|139) dmesg | tail -n 20 ;; esac
             sleep 0.2
           done"#
    } else {
        r#"exec "$@""#
    }
}

fn terminate(child: &mut Child) -> Result<()> {
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
    let end = Instant::now() + STOP_LIMIT;
    while child.try_wait()?.is_none() {
        ensure!(Instant::now() < end, "the daemon did not stop within {} s", STOP_LIMIT.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Place::Native { child, .. } = &mut self.place
            && matches!(child.try_wait(), Ok(None))
        {
            let _ = terminate(child);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Log {
    fn new(file: &Path) -> Result<Self> {
        let file =
            File::create(file).with_context(|| format!("cannot create {}", file.display()))?;
        Ok(Self(Arc::new(Mutex::new((VecDeque::new(), file)))))
    }

    fn add(&self, line: &[u8], ready: &mpsc::Sender<()>) {
        let line = String::from_utf8_lossy(line).trim_end().to_owned();
        if line.starts_with(READY) {
            let _ = ready.send(());
        }
        if line.is_empty() {
            return;
        }
        let mut log = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (lines, file) = &mut *log;
        // Tests show it where they fail; without it they fail all the same.
        let _ = writeln!(file, "{line}");
        if lines.len() == LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    fn text(&self) -> String {
        let log = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        log.0.iter().map(|line| format!("  | {line}\n")).collect()
    }
}

fn shell(script: &str) -> Exec {
    Exec { argv: ["sh", "-c", script].map(String::from).to_vec(), ..Exec::default() }
}

fn inventory(client: &Client) -> Result<BTreeSet<String>> {
    let output = client.output(&shell(INVENTORY))?;
    ensure!(output.code == 0, "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn inventory_here() -> Result<BTreeSet<String>> {
    let own = scratch::directory()?;
    let text = step::output(Command::new("sh").args(["-c", INVENTORY, "inventory"]).arg(own))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn entries(directory: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path().display().to_string()))
}
