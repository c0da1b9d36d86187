//! Commands in the host VM whose KVM is on (emulated) VMX: one after the other, each with a limit.
//!
//! Nothing reaches that machine once it runs. Commands and files are in its initramfs; what they print comes out
//! while they run. A command that runs over its limit ends the machine, and another one runs those that are left.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use firn_host_vm_agent::{Event, Exec, Job, Stream, take};

use super::bochs::{Bochs, Follow};
use super::{Cpu, Options, root};

/// Longest time until the first command starts. It takes 40 s on a machine with nothing else to do.
const BOOT_LIMIT: Duration = Duration::from_secs(400);

/// How often the machine's output is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// A command, and how long it may take.
#[derive(Debug, Clone)]
pub struct Limited {
    pub exec: Exec,
    pub limit: Duration,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this exit code: 128 + the number of the signal that killed it.
    Exited(i32),
    /// At its limit, together with its machine.
    TimedOut,
    /// It could not be started, or its machine ended first: why.
    Failed(String),
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub ended: Ended,
    /// How long it took; its machine's boot is not part of it.
    pub elapsed: Duration,
}

/// Runs all; `output` gets what they print, with the number of the command.
pub fn run(
    options: &Options,
    commands: &[Limited],
    mut output: impl FnMut(usize, Stream, &[u8]),
) -> Result<Vec<Run>> {
    ensure!(options.forward.is_empty() && !options.outside, "this host VM has no network");
    let mut runs: Vec<Run> = Vec::new();
    while runs.len() < commands.len() {
        let mut machine = Machine::start(options, &commands[runs.len()..])?;
        machine.wait_until_ready()?;
        while let Some(command) = commands.get(runs.len()) {
            let (number, started) = (runs.len(), Instant::now());
            let ended =
                machine.run_one(command.limit, |stream, bytes| output(number, stream, bytes))?;
            runs.push(Run { ended, elapsed: started.elapsed() });
            if !machine.goes_on {
                break;
            }
        }
    }
    Ok(runs)
}

/// A machine that runs a sequence of commands.
struct Machine {
    bochs: Bochs,
    printed: Follow,
    bytes: Vec<u8>,
    /// Whether it runs the next command.
    goes_on: bool,
}

impl Machine {
    fn start(options: &Options, commands: &[Limited]) -> Result<Self> {
        let job = Job::Sequence(commands.iter().map(|command| command.exec.clone()).collect());
        let initrd = root::build(options, Cpu::Intel, Some(&job))?;
        let bochs = Bochs::start(&initrd, options)?;
        let printed = Follow::new(bochs.printed());
        Ok(Self { bochs, printed, bytes: Vec::new(), goes_on: true })
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        match self.next(Instant::now() + BOOT_LIMIT)? {
            Next::Event(Event::Ready) => Ok(()),
            Next::Event(other) => bail!("unexpected {other:?} from the host VM"),
            Next::Late => bail!(
                "the host VM was not ready after {} s; {}",
                BOOT_LIMIT.as_secs(),
                self.bochs.describe()
            ),
            Next::Ended(how) => bail!("the host VM ended before it was ready; {how}"),
        }
    }

    /// Waits for the end of the command that runs.
    fn run_one(&mut self, limit: Duration, mut output: impl FnMut(Stream, &[u8])) -> Result<Ended> {
        let end = Instant::now() + limit;
        loop {
            match self.next(end)? {
                Next::Event(Event::Output(stream, bytes)) => output(stream, &bytes),
                Next::Event(Event::Exited(code)) => return Ok(Ended::Exited(code)),
                Next::Event(Event::Failed(why)) => return Ok(Ended::Failed(why)),
                Next::Event(other) => bail!("unexpected {other:?} from the host VM"),
                Next::Late => {
                    self.goes_on = false;
                    return Ok(Ended::TimedOut);
                }
                Next::Ended(how) => {
                    self.goes_on = false;
                    let why = format!("the host VM ended before the command did; {how}");
                    return Ok(Ended::Failed(why));
                }
            }
        }
    }

    /// Waits for the next event, until that moment.
    fn next(&mut self, end: Instant) -> Result<Next> {
        loop {
            // First, or what it printed at last would be missed.
            let ended = self.bochs.ended()?.is_some();
            self.printed.read(&mut self.bytes)?;
            let event = take(&mut self.bytes).context("the host VM prints what is no message")?;
            if let Some(event) = event {
                return Ok(Next::Event(event));
            }
            if ended {
                return Ok(Next::Ended(self.bochs.describe()));
            }
            if Instant::now() > end {
                return Ok(Next::Late);
            }
            std::thread::sleep(INTERVAL);
        }
    }
}

enum Next {
    Event(Event),
    Late,
    Ended(String),
}
