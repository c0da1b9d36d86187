//! Talks to the agent in the host VM: commands and files.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use firn_host_vm_agent::{CHUNK, Event, Exec, Input, Request, Stream, receive, send};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::is_done;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Sends requests to one host VM; each has its own connection, so any number may run at once.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    address: SocketAddr,
}

/// What a command printed, and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code, 128 + signal if a signal killed it.
    pub code: i32,
}

/// A command that runs. Dropping it closes the connection, and the agent kills the command and
/// everything in its process group.
pub struct Running {
    connection: BufReader<TcpStream>,
}

impl Client {
    /// A client of the host VM whose agent listens there.
    pub fn new(address: SocketAddr) -> Self {
        Self { address }
    }

    /// Where the agent listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Runs a command with this process's own standard streams and returns its exit code.
    pub fn run(&self, exec: &Exec) -> Result<i32> {
        let mut exec = exec.clone();
        let stdin = io::stdin();
        let raw = if exec.terminal.is_some() && isatty(&stdin) {
            if let Ok(size) = tcgetwinsize(&stdin) {
                exec.terminal = Some((size.ws_row, size.ws_col));
            }
            Some(RawTerminal::enter()?)
        } else {
            exec.terminal = None;
            None
        };
        let running = self.start(&exec)?;
        let input = running.input()?;
        thread::spawn(move || feed(input));
        let code = running.finish(|stream, bytes| match stream {
            Stream::Stdout => write_now(io::stdout().lock(), bytes),
            Stream::Stderr => write_now(io::stderr().lock(), bytes),
        });
        drop(raw);
        code
    }

    /// Runs a command without input and returns what it printed.
    pub fn output(&self, exec: &Exec) -> Result<Output> {
        let mut output = Output::default();
        let running = self.start(exec)?;
        send(&mut running.input()?, &Input::End)?;
        output.code = running.finish(|stream, bytes| {
            match stream {
                Stream::Stdout => output.stdout.extend_from_slice(bytes),
                Stream::Stderr => output.stderr.extend_from_slice(bytes),
            }
            Ok(())
        })?;
        Ok(output)
    }

    /// Starts a command and leaves it running until the returned value is dropped.
    pub fn start(&self, exec: &Exec) -> Result<Running> {
        ensure!(!exec.argv.is_empty(), "there is no command to run");
        let mut connection = self.connect()?;
        send(&mut connection, &Request::Exec(exec.clone()))?;
        Ok(Running { connection: BufReader::with_capacity(CHUNK, connection) })
    }

    /// Copies a file of this machine into the host VM, with its permission bits.
    pub fn put(&self, from: &Path, to: &str) -> Result<()> {
        let context = || format!("cannot copy {} into the host VM", from.display());
        let mut file = File::open(from).with_context(context)?;
        let metadata = file.metadata().with_context(context)?;
        let mode = metadata.permissions().mode() & 0o7777;
        let request = Request::Put { path: to.to_owned(), mode, size: metadata.len() };
        let mut connection = self.connect()?;
        send(&mut connection, &request)?;
        io::copy(&mut file, &mut connection).with_context(context)?;
        is_done(receive(&mut connection)?, &request).with_context(context)
    }

    /// Copies a file out of the host VM.
    pub fn get(&self, from: &str, to: &Path) -> Result<()> {
        let mut connection = self.connect()?;
        send(&mut connection, &Request::Get { path: from.to_owned() })?;
        match receive(&mut connection)? {
            Some(Event::File(size)) => {
                let mut file =
                    File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
                let copied = io::copy(&mut connection.take(size), &mut file)?;
                ensure!(copied == size, "{from} broke off after {copied} of {size} bytes");
                Ok(())
            }
            Some(Event::Failed(message)) => bail!("{message}"),
            other => bail!("unexpected answer {other:?} to the request for {from}"),
        }
    }

    pub(super) fn power_off(&self) -> Result<()> {
        Ok(send(&mut self.connect()?, &Request::PowerOff)?)
    }

    fn connect(&self) -> Result<TcpStream> {
        let connection = TcpStream::connect_timeout(&self.address, CONNECT_LIMIT)
            .context("cannot connect to the host VM")?;
        connection.set_nodelay(true)?;
        Ok(connection)
    }
}

impl Running {
    /// The command's standard input, as a stream for [`Input`] messages.
    fn input(&self) -> Result<TcpStream> {
        Ok(self.connection.get_ref().try_clone()?)
    }

    /// Hands the output over as it comes and returns the exit code.
    pub fn finish(
        mut self,
        mut output: impl FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<i32> {
        loop {
            match receive(&mut self.connection).context("the connection to the host VM broke")? {
                Some(Event::Output(stream, bytes)) => output(stream, &bytes)?,
                Some(Event::Exited(code)) => return Ok(code),
                Some(Event::Failed(message)) => bail!("{message}"),
                None => bail!("the host VM ended while the command ran"),
                Some(other) => bail!("unexpected {other:?} while a command ran"),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The clones of the connection would keep it open.
        let _ = self.connection.get_ref().shutdown(Shutdown::Both);
    }
}

/// Passes standard input on, and the terminal's size when it has changed.
fn feed(mut to: TcpStream) {
    let stdin = io::stdin();
    let size = || tcgetwinsize(&stdin).ok().map(|size| (size.ws_row, size.ws_col));
    let mut last = size();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let message = match stdin.lock().read(&mut buffer) {
            Ok(0) => Input::End,
            Ok(size) => Input::Data(buffer[..size].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let now = size();
        if let (true, Some((rows, columns))) = (now != last, now) {
            last = now;
            if send(&mut to, &Input::Resize(rows, columns)).is_err() {
                return;
            }
        }
        if send(&mut to, &message).is_err() || message == Input::End {
            return;
        }
    }
}

fn write_now(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// The terminal passes every key on until this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
