//! What the host VM runs by itself when it has no network.

use std::fs;
use std::io;
use std::process::Stdio;
use std::sync::mpsc::{self, Sender};
use std::thread;

use firn_host_vm_agent::{Event, Exec, JOB_PATH, Job, READY_MARK, Stream, receive, send};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::command::{self, Started};
use crate::parallel::Parallel;

/// The job of this machine, if it has one.
pub fn find() -> io::Result<Option<Job>> {
    match fs::read(JOB_PATH) {
        Ok(bytes) => receive(&mut &bytes[..]),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs it.
pub fn run(job: &Job) -> io::Result<()> {
    match job {
        Job::Measure(exec) => measure(exec),
        Job::Sequence(execs) => run_sequence(execs),
    }
}

/// Nothing of the agent runs while the command does, so output is spooled to memory and sent when
/// the command has ended.
fn measure(exec: &Exec) -> io::Result<()> {
    let mut port = fs::OpenOptions::new().write(true).open("/dev/ttyS1")?;
    let mut raw = rustix::termios::tcgetattr(&port)?;
    raw.make_raw();
    rustix::termios::tcsetattr(&port, rustix::termios::OptionalActions::Now, &raw)?;
    println!("{READY_MARK}");
    let spool = |name: &str| {
        fs::OpenOptions::new().read(true).write(true).create_new(true).open(format!("/run/{name}"))
    };
    let (stdout, stderr) = (spool("stdout")?, spool("stderr")?);
    let mut command = command::command(exec);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    match command.status() {
        Ok(status) => {
            for (stream, name) in [(Stream::Stdout, "stdout"), (Stream::Stderr, "stderr")] {
                command::copy_out(fs::File::open(format!("/run/{name}"))?, stream, &mut |event| {
                    send(&mut port, event)
                })?;
            }
            send(&mut port, &Event::Exited(command::code(status)))?;
        }
        Err(error) => send(&mut port, &Event::Failed(command::cannot_run(exec, &error)))?,
    }
    rustix::termios::tcdrain(&port)?;
    Ok(())
}

/// One thread has the port, so messages never mix.
fn run_sequence(execs: &[Exec]) -> io::Result<()> {
    let (events, received) = mpsc::channel();
    let writer = thread::spawn(move || -> io::Result<()> {
        let mut port = Parallel::open()?;
        received.into_iter().try_for_each(|event| send(&mut port, &event))
    });
    // Where the writer has failed, its own error says more than this one.
    let _ = events.send(Event::Ready);
    for exec in execs {
        let ended = run_one(exec, &events)
            .unwrap_or_else(|error| Event::Failed(command::cannot_run(exec, &error)));
        let _ = events.send(ended);
    }
    drop(events);
    writer.join().map_err(|_| io::Error::other("the thread of the parallel port panicked"))?
}

/// Runs a command and ends what it leaves behind, which could disturb the next one.
fn run_one(exec: &Exec, events: &Sender<Event>) -> io::Result<Event> {
    let Started { mut child, input, outputs, .. } = command::start_with_pipes(exec)?;
    drop(input);
    let (finished, all_finished) = mpsc::channel::<()>();
    for (stream, output) in outputs {
        let (events, finished) = (events.clone(), finished.clone());
        thread::spawn(move || {
            let _ = command::copy_out(output, stream, &mut |event| {
                events.send(event.clone()).map_err(io::Error::other)
            });
            drop(finished);
        });
    }
    drop(finished);
    let group = Pid::from_child(&child);
    let status = child.wait()?;
    let _ = kill_process_group(group, Signal::KILL);
    // An error means that all output is sent; a timeout that a process of another group holds a pipe.
    let _ = all_finished.recv_timeout(command::DRAIN);
    Ok(Event::Exited(command::code(status)))
}
