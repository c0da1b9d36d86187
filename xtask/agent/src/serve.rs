//! Runs commands and moves files for the client, several at once, one thread a connection.

use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use firn_host_vm_agent::{
    AGENT_PORT, CHUNK, DAEMON_PORTS, Event, Exec, Input, JOB_PATH, READY_MARK, Request, Stream,
    receive, send,
};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::Winsize;

/// The machine's own address.
const ADDRESS: &str = "10.0.2.15";

/// How long output may still come from processes that outlive the command.
const DRAIN: Duration = Duration::from_millis(500);

/// Where programs without a slash are looked up.
const PATH: &str = "/firn/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// Serves until the client powers the machine off, or runs the one job and returns.
pub fn run() -> io::Result<()> {
    match fs::read(JOB_PATH) {
        Ok(bytes) => return run_job(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    for port in DAEMON_PORTS {
        let outside = TcpListener::bind((ADDRESS, port))?;
        thread::spawn(move || {
            for client in outside.incoming().flatten() {
                thread::spawn(move || forward(&client, port));
            }
        });
    }
    let listener = TcpListener::bind(("0.0.0.0", AGENT_PORT))?;
    println!("{READY_MARK}");
    for connection in listener.incoming() {
        let connection = connection?;
        thread::spawn(move || {
            if let Err(error) = answer(connection) {
                println!("host-vm-agent: {error}");
            }
        });
    }
    Ok(())
}

/// Carries a connection on to the daemon at that port, until both have said all that they want to say.
fn forward(client: &TcpStream, port: u16) -> io::Result<()> {
    let daemon = &TcpStream::connect(("127.0.0.1", port))?;
    client.set_nodelay(true)?;
    daemon.set_nodelay(true)?;
    let carry = |mut from: &TcpStream, mut to: &TcpStream| {
        let carried = io::copy(&mut from, &mut to);
        // Of one that broke, the other side shall not wait for more.
        let _ = to.shutdown(if carried.is_ok() { Shutdown::Write } else { Shutdown::Both });
    };
    thread::scope(|scope| {
        scope.spawn(|| carry(client, daemon));
        carry(daemon, client);
    });
    Ok(())
}

/// Measurement mode: nothing of the agent runs while the command does, so output is spooled to
/// memory and sent when the command has ended.
fn run_job(bytes: &[u8]) -> io::Result<()> {
    let exec: Exec = receive(&mut &bytes[..])?.ok_or_else(|| io::Error::other("empty job"))?;
    let mut port = fs::OpenOptions::new().write(true).open("/dev/ttyS1")?;
    let mut raw = rustix::termios::tcgetattr(&port)?;
    raw.make_raw();
    rustix::termios::tcsetattr(&port, rustix::termios::OptionalActions::Now, &raw)?;
    println!("{READY_MARK}");
    let spool = |name: &str| {
        fs::OpenOptions::new().read(true).write(true).create_new(true).open(format!("/run/{name}"))
    };
    let (stdout, stderr) = (spool("stdout")?, spool("stderr")?);
    let mut command = command(&exec);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    match command.status() {
        Ok(status) => {
            for (stream, name) in [(Stream::Stdout, "stdout"), (Stream::Stderr, "stderr")] {
                copy_out(fs::File::open(format!("/run/{name}"))?, stream, &mut |event| {
                    send(&mut port, event)
                })?;
            }
            send(&mut port, &Event::Exited(code(status)))?;
        }
        Err(error) => send(&mut port, &Event::Failed(cannot_run(&exec, &error)))?,
    }
    rustix::termios::tcdrain(&port)?;
    Ok(())
}

fn answer(connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(CHUNK, connection.try_clone()?);
    let mut writer = connection;
    let result = match receive(&mut reader)? {
        None => return Ok(()),
        Some(Request::Exec(exec)) => run_command(&exec, reader, &writer),
        Some(Request::Put { path, mode, size }) => put(&path, mode, size, &mut reader)
            .and_then(|()| send(&mut writer, &Event::Done))
            .map_err(|error| format!("{path}: {error}")),
        Some(Request::Get { path }) => {
            get(&path, &mut writer).map_err(|error| format!("{path}: {error}"))
        }
        Some(Request::PowerOff) => std::process::exit(0),
    };
    match result {
        Ok(()) => Ok(()),
        Err(message) => send(&mut writer, &Event::Failed(message)),
    }
}

fn put(path: &str, mode: u32, size: u64, reader: &mut impl Read) -> io::Result<()> {
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent)?;
    }
    // Remove first: a program that runs can't be written to.
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    if io::copy(&mut reader.take(size), &mut file)? != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

fn get(path: &str, writer: &mut impl Write) -> io::Result<()> {
    let file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    send(writer, &Event::File(size))?;
    io::copy(&mut file.take(size), writer).map(drop)
}

fn command(exec: &Exec) -> Command {
    let mut command = Command::new(exec.argv.first().map_or("", String::as_str));
    command.args(exec.argv.get(1..).unwrap_or_default());
    command.env_clear().envs([("PATH", PATH), ("HOME", "/root"), ("TERM", "linux")]);
    command.envs(exec.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(if exec.cwd.is_empty() { "/" } else { &exec.cwd });
    command
}

fn run_command(
    exec: &Exec,
    reader: BufReader<TcpStream>,
    writer: &TcpStream,
) -> Result<(), String> {
    let started = match exec.terminal {
        Some(size) => start_with_terminal(exec, size),
        None => start_with_pipes(exec),
    };
    let Started { mut child, input, outputs, terminal } =
        started.map_err(|error| cannot_run(exec, &error))?;
    // Each command leads its own process group, whose number is its own.
    let group = Pid::from_child(&child);
    let shared = writer.try_clone().map(|w| Arc::new(Mutex::new(w)));
    let shared = shared.map_err(|error| error.to_string())?;

    let (finished, all_finished) = mpsc::channel::<()>();
    for (stream, output) in outputs {
        let (shared, finished) = (shared.clone(), finished.clone());
        thread::spawn(move || {
            let _ = copy_out(output, stream, &mut |event| {
                send(&mut *shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner()), event)
            });
            drop(finished);
        });
    }
    drop(finished);
    thread::spawn(move || {
        feed(reader, input, terminal);
        // The client is gone. When the command has already ended, so has its group, or the group
        // is what it left running, which nobody can reach any more.
        let _ = kill_process_group(group, Signal::KILL);
    });

    let status = child.wait().map_err(|error| error.to_string())?;
    // An error here means that all output is sent; a timeout that a process which the command left
    // behind holds the pipe open.
    let _ = all_finished.recv_timeout(DRAIN);
    let mut writer = shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    send(&mut *writer, &Event::Exited(code(status))).map_err(|error| error.to_string())
}

struct Started {
    child: Child,
    input: Option<fs::File>,
    outputs: Vec<(Stream, fs::File)>,
    terminal: Option<fs::File>,
}

fn start_with_pipes(exec: &Exec) -> io::Result<Started> {
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

fn start_with_terminal(exec: &Exec, (rows, columns): (u16, u16)) -> io::Result<Started> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    resize(&master, rows, columns);
    let path = ptsname(&master, Vec::new())?;
    let slave = rustix::fs::open(
        path.as_c_str(),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let mut command = command(exec);
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: the closure runs between fork and exec and makes two system calls only, both
    // async-signal-safe: it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    let child = command.spawn()?;
    // `command` still holds the slave's descriptors; with them open the master never ends.
    drop(command);
    let master = fs::File::from(master);
    Ok(Started {
        child,
        input: Some(master.try_clone()?),
        outputs: vec![(Stream::Stdout, master.try_clone()?)],
        terminal: Some(master),
    })
}

fn resize(terminal: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}

/// Passes the client's messages on until the connection ends.
fn feed(mut reader: BufReader<TcpStream>, mut input: Option<fs::File>, terminal: Option<fs::File>) {
    while let Ok(Some(message)) = receive(&mut reader) {
        match (message, &mut input, &terminal) {
            // A command that closed its input is no reason to stop listening.
            (Input::Data(bytes), Some(file), _) => drop(file.write_all(&bytes)),
            // Ctrl-D: a terminal has no other end of input.
            (Input::End, Some(file), Some(_)) => drop(file.write_all(&[4])),
            (Input::End, ..) => input = None,
            (Input::Resize(rows, columns), _, Some(terminal)) => resize(terminal, rows, columns),
            (Input::Data(_) | Input::Resize(..), ..) => {}
        }
    }
}

fn copy_out(
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

fn cannot_run(exec: &Exec, error: &io::Error) -> String {
    format!("cannot run {}: {error}", exec.argv.join(" "))
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
