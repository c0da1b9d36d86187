//! Starts commands, and carries their output.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use firn_host_vm_agent::{CHUNK, Event, Exec, Stream};

/// How long output may still come from processes that outlive the command.
pub const DRAIN: Duration = Duration::from_millis(500);

/// Where programs without a slash are looked up.
const PATH: &str = "/firn/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// A command with the environment that all have.
pub fn command(exec: &Exec) -> Command {
    let mut command = Command::new(exec.argv.first().map_or("", String::as_str));
    command.args(exec.argv.get(1..).unwrap_or_default());
    command.env_clear().envs([("PATH", PATH), ("HOME", "/root"), ("TERM", "linux")]);
    command.envs(exec.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(if exec.cwd.is_empty() { "/" } else { &exec.cwd });
    command
}

/// A command that runs.
pub struct Started {
    pub child: Child,
    pub input: Option<fs::File>,
    pub outputs: Vec<(Stream, fs::File)>,
    pub terminal: Option<fs::File>,
}

/// Starts a command in a process group of its own, without a terminal.
pub fn start_with_pipes(exec: &Exec) -> io::Result<Started> {
    let mut command = command(exec);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let file = |fd: Option<OwnedFd>| fd.map(fs::File::from);
    let input = file(child.stdin.take().map(Into::into));
    let stdout = file(child.stdout.take().map(Into::into));
    let stderr = file(child.stderr.take().map(Into::into));
    let outputs = [(Stream::Stdout, stdout), (Stream::Stderr, stderr)];
    let outputs = outputs.into_iter().filter_map(|(s, file)| file.map(|f| (s, f))).collect();
    Ok(Started { child, input, outputs, terminal: None })
}

/// Passes a stream on until it ends.
pub fn copy_out(
    mut from: impl Read,
    stream: Stream,
    to: &mut impl FnMut(&Event) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(size) => to(&Event::Output(stream, buffer[..size].to_vec()))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What to say of a command that did not start.
pub fn cannot_run(exec: &Exec, error: &io::Error) -> String {
    format!("cannot run {}: {error}", exec.argv.join(" "))
}

/// As shells count: 128 + the number of the signal that killed it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
