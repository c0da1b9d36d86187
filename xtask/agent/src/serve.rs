//! Runs commands and moves files for the client, several at once, one thread a connection.

use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use firn_host_vm_agent::{
    AGENT_PORT, CHUNK, DAEMON_PORTS, Event, Exec, Input, READY_MARK, Request, Stream, receive, send,
};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::Winsize;

use crate::command::{self, Started};

/// The machine's own address.
const ADDRESS: &str = "10.0.2.15";

/// Serves until the client powers the machine off.
pub fn run() -> io::Result<()> {
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

fn run_command(
    exec: &Exec,
    reader: BufReader<TcpStream>,
    writer: &TcpStream,
) -> Result<(), String> {
    let started = match exec.terminal {
        Some(size) => start_with_terminal(exec, size),
        None => command::start_with_pipes(exec),
    };
    let Started { mut child, input, outputs, terminal } =
        started.map_err(|error| command::cannot_run(exec, &error))?;
    // Each command leads its own process group, whose number is its own.
    let group = Pid::from_child(&child);
    let shared = writer.try_clone().map(|w| Arc::new(Mutex::new(w)));
    let shared = shared.map_err(|error| error.to_string())?;

    let (finished, all_finished) = mpsc::channel::<()>();
    for (stream, output) in outputs {
        let (shared, finished) = (shared.clone(), finished.clone());
        thread::spawn(move || {
            let _ = command::copy_out(output, stream, &mut |event| {
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
    let _ = all_finished.recv_timeout(command::DRAIN);
    let mut writer = shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    send(&mut *writer, &Event::Exited(command::code(status))).map_err(|error| error.to_string())
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
    let mut command = command::command(exec);
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
