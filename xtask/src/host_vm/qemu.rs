//! QEMU's command line, its process, and the console that it prints.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use firn_host_vm_agent::{FAILED_MARK, READY_MARK};

use super::{OUTSIDE, Options, emulator, root::Initrd};

/// Lines of the console that are kept for error messages.
const CONSOLE_LINES: usize = 60;

/// How time passes, and how one talks to the machine.
pub enum Mode<'a> {
    /// Real time.
    Interactive {
        /// Ports of the host VM (keys) that are forwarded from ports of this machine.
        forward: &'a BTreeMap<u16, u16>,
        /// Port of this machine that is reached at [`OUTSIDE`].
        outside: Option<u16>,
    },
    /// Virtual time, no network; the agent's events go to a file.
    Measure { seed: u32, output: &'a Path },
}

/// A QEMU process; dropping it kills it.
pub struct Qemu {
    child: Child,
    console: Console,
    marks: Receiver<Mark>,
}

/// What the console said so far, its last lines.
#[derive(Debug, Clone, Default)]
struct Console(Arc<Mutex<VecDeque<String>>>);

enum Mark {
    Ready,
    Failed(String),
}

impl Qemu {
    /// Starts QEMU. It is killed when the calling *thread* ends: call this from one that lives as
    /// long as the process.
    pub fn start(initrd: &Initrd, options: &Options, mode: &Mode) -> Result<Self> {
        let mut command = emulator::command()?;
        command.args(arguments(initrd, options, mode)?);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C is for this process, which then ends QEMU.
        command.process_group(0);
        crate::step::die_with_us(&mut command);
        let mut child = command.spawn().context("cannot run QEMU")?;
        let console = Console::default();
        let (sender, marks) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            let console = console.clone();
            thread::spawn(move || console.read(BufReader::new(stdout), &sender));
        }
        if let Some(stderr) = child.stderr.take() {
            // QEMU's own complaints belong beside what the machine printed.
            let (console, nobody) = (console.clone(), mpsc::channel().0);
            thread::spawn(move || console.read(BufReader::new(stderr), &nobody));
        }
        Ok(Self { child, console, marks })
    }

    /// Waits for the agent's mark on the console.
    pub fn wait_until_ready(&mut self, limit: Duration) -> Result<()> {
        let problem = match self.marks.recv_timeout(limit) {
            Ok(Mark::Ready) => return Ok(()),
            Ok(Mark::Failed(reason)) => format!("could not set itself up ({reason})"),
            Err(RecvTimeoutError::Timeout) => format!("was not ready after {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => "ended before it was ready".to_owned(),
        };
        bail!("the host VM {problem}; the end of its console:\n{}", self.console)
    }

    /// Waits until the machine has powered off.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                if status.success() {
                    return Ok(());
                }
                bail!("QEMU failed ({status}):\n{}", self.console);
            }
            if Instant::now() > end {
                bail!("the host VM still ran after {} s", limit.as_secs());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it runs, and the end of its console.
    pub fn describe(&mut self) -> String {
        let state = match self.child.try_wait() {
            Ok(None) => "runs".to_owned(),
            Ok(Some(status)) => format!("ended ({status})"),
            Err(error) => error.to_string(),
        };
        format!("QEMU {state}; the end of the host VM's console:\n{}", self.console)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Console {
    fn read(&self, from: impl BufRead, marks: &mpsc::Sender<Mark>) {
        for line in from.split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if line.contains(READY_MARK) {
                let _ = marks.send(Mark::Ready);
            } else if let Some((_, reason)) = line.split_once(FAILED_MARK) {
                let _ = marks.send(Mark::Failed(reason.to_owned()));
            }
            let mut lines = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if lines.len() == CONSOLE_LINES {
                lines.pop_front();
            }
            lines.push_back(line);
        }
    }
}

impl fmt::Display for Console {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let lines = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        lines.iter().try_for_each(|line| writeln!(f, "  | {line}"))
    }
}

/// `microvm` is QEMU's smallest machine: it boots in three quarters of a q35's time.
fn arguments(initrd: &Initrd, options: &Options, mode: &Mode) -> Result<Vec<String>> {
    // la57, mpx and pku only cost: longer page walks and state that KVM saves. With erms and fsrm kernels
    // copy and clear by `rep movsb`, which TCG does byte by byte: a boot takes 1.5 times as long, and counts
    // twice the instructions.
    let model = options.cpu_model.as_deref().unwrap_or("max");
    let cpu = format!("{model},+svm,+npt,-la57,-mpx,-pku,-erms,-fsrm");
    let mut kernel = "console=ttyS0 panic=-1 quiet reboot=t no_timer_check".to_owned();
    let mut more: Vec<String> = Vec::new();
    match mode {
        Mode::Interactive { forward, outside } => {
            // The guest reads this machine's counter; without its frequency it would calibrate
            // against a timer that the machine does not have, and hang. Reliable: a watchdog that
            // is late under emulation would otherwise replace it by jiffies of 4 ms.
            kernel.push_str(&format!(" tsc=reliable tsc_early_khz={}", tsc_khz()));
            // What dies by a fault is in its log with registers and code.
            kernel.push_str(" print-fatal-signals=1");
            // `restrict`: nothing inside reaches this machine or its network, but for `outside`.
            let mut network = "user,id=net0,restrict=on".to_owned();
            for (guest, host) in *forward {
                network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
            }
            if let Some(port) = outside {
                // A command for each connection; to an address QEMU would connect once, at its start.
                let command = format!("busybox nc 127.0.0.1 {port}");
                network.push_str(&format!(",guestfwd=tcp:{OUTSIDE}-cmd:{command}"));
            }
            more.extend(["-netdev".into(), network]);
            more.extend(["-device".into(), "virtio-net-device,netdev=net0".into()]);
            more.extend(["-global".into(), "virtio-mmio.force-legacy=false".into()]);
            // Two CPUs show races that one hides.
            more.extend(["-accel", "tcg,thread=multi", "-smp"].map(String::from));
            more.push(options.cpus.to_string());
        }
        Mode::Measure { seed, output } => {
            // With a second CPU the kernel never reaches user space.
            more.extend(["-accel", "tcg", "-icount", "shift=0,sleep=off"].map(String::from));
            more.extend(["-smp", "1"].map(String::from));
            more.extend(["-rtc", "base=2026-01-01T00:00:00,clock=vm"].map(String::from));
            more.extend(["-seed".into(), seed.to_string()]);
            let output = output.to_str().context("the temporary directory is not UTF-8")?;
            more.extend(["-chardev".into(), format!("file,id=job,path={output}")]);
            more.extend(["-device", "isa-serial,chardev=job,index=1"].map(String::from));
        }
    }
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
    let mut all: Vec<String> = ["-M", "microvm", "-nodefaults", "-no-user-config", "-no-reboot"]
        .into_iter()
        .chain(["-display", "none", "-serial", "stdio"])
        .map(String::from)
        .collect();
    all.extend(["-cpu".into(), cpu, "-m".into(), options.memory_mib.to_string()]);
    all.extend(["-kernel".into(), path(&initrd.kernel.image)?]);
    all.extend(["-initrd".into(), path(&initrd.path)?, "-append".into(), kernel]);
    all.extend(more);
    Ok(all)
}

/// Frequency of this machine's time stamp counter.
fn tsc_khz() -> u64 {
    let (first, last) = (Reading::best(), {
        thread::sleep(Duration::from_millis(20));
        Reading::best()
    });
    let elapsed = last.clock - first.clock;
    last.ticks.wrapping_sub(first.ticks) * 1_000_000 / elapsed.as_nanos().max(1) as u64
}

/// Clock and counter, read at one moment.
struct Reading {
    clock: Instant,
    ticks: u64,
}

impl Reading {
    /// The closest of some pairs: where other programs run, there may be milliseconds between two
    /// instructions.
    fn best() -> Self {
        let pair = || {
            // SAFETY: reads a counter that every x86-64 CPU has; touches no memory.
            let before = unsafe { std::arch::x86_64::_rdtsc() };
            let clock = Instant::now();
            // SAFETY: as above.
            let after = unsafe { std::arch::x86_64::_rdtsc() };
            (after.wrapping_sub(before), Self { clock, ticks: before })
        };
        let closest = (0..9).map(|_| pair()).min_by_key(|(apart, _)| *apart);
        closest.map_or_else(|| pair().1, |(_, reading)| reading)
    }
}
