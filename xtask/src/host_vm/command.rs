//! `cargo xtask host-vm`: the host VM as a tool of its own.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use firn_host_vm_agent::{Exec, Stream};

use super::client::Client;
use super::sequence::{self, Ended, Limited};
use super::{Cpu, HostVm, Options, Series, measure};
use crate::artifacts;

/// Boot the dev host VM, run a command in it, end it.
///
/// The command's output and exit code are passed through. Programs of Firn are in its PATH, files
/// named by --file where they were put. Without a command the VM boots, says how long it took and
/// ends.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Whose virtualization it has. With intel it needs a command, has one CPU and no network, and takes 40 s to boot.
    #[arg(long, value_enum, value_name = "VENDOR", default_value_t)]
    cpu: Cpu,

    /// Another CPU model than the one that tests run on: QEMU's, or with intel Bochs'. To thaw on one what
    /// another has saved.
    #[arg(long, value_name = "MODEL", conflicts_with = "at")]
    cpu_model: Option<String>,

    /// Open a shell instead of running a command.
    #[arg(long, conflicts_with_all = ["icount", "command"])]
    shell: bool,

    /// Measurement mode: virtual time, one instruction is one nanosecond; the same run gives the
    /// same bytes. Output appears when the command has ended.
    #[arg(long)]
    icount: bool,

    /// Seed of everything random in measurement mode.
    #[arg(long, default_value_t = 1, requires = "icount")]
    seed: u32,

    /// Use the running host VM whose agent listens there, instead of booting one.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "icount")]
    at: Option<SocketAddr>,

    /// Mount cgroup v2 without `favordynmods`, as most distributions do: creating a VM then waits
    /// for RCU.
    #[arg(long, conflicts_with = "at")]
    plain_cgroups: bool,

    /// Linux that the host VM runs.
    #[arg(long, value_enum, value_name = "SERIES", default_value_t, conflicts_with = "at")]
    kernel: Series,

    /// Memory of the host VM.
    #[arg(long, value_name = "MiB", default_value_t = 2048)]
    memory: u32,

    /// Artifacts directory to appear as /firn; built unless given. `none` leaves it out.
    #[arg(long, value_name = "DIR")]
    artifacts: Option<PathBuf>,

    /// Copy a file into the VM: HERE or HERE:THERE; THERE is /root/<name> otherwise.
    #[arg(long, value_name = "HERE[:THERE]")]
    file: Vec<String>,

    /// After the command, copy a file out of the VM: THERE:HERE.
    #[arg(long, value_name = "THERE:HERE", conflicts_with_all = ["icount", "shell"])]
    get: Vec<String>,

    /// The first word of the command is a program of this machine: copy it in and run it. Makes
    /// this usable as a cargo runner.
    #[arg(long)]
    here: bool,

    /// Load a further kernel module.
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,

    /// Set a variable for the command.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// Limit for a command in measurement mode, and with --cpu intel.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    limit: u64,

    /// The command and its arguments.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs it; the result is the exit code for this process.
pub fn run(arguments: Arguments) -> Result<i32> {
    if arguments.cpu == Cpu::Intel {
        let alone = !arguments.shell && !arguments.icount && arguments.at.is_none();
        ensure!(
            alone && arguments.get.is_empty(),
            "--cpu intel is a machine without a network: --shell, --icount, --at and --get need another"
        );
        ensure!(!arguments.command.is_empty(), "--cpu intel needs a command");
    }
    let mut options = Options {
        memory_mib: arguments.memory,
        kernel: arguments.kernel,
        cpu_model: arguments.cpu_model,
        modules: arguments.module,
        plain_cgroups: arguments.plain_cgroups,
        artifacts: match arguments.artifacts {
            Some(path) if path.as_os_str() == "none" => None,
            Some(path) => Some(path),
            // The machine of `--at` has what it was booted with.
            None if arguments.at.is_some() => None,
            None => Some(artifacts::build()?),
        },
        ..Options::default()
    };
    for file in &arguments.file {
        options.files.push(split_file(file)?);
    }
    let mut exec = Exec { argv: arguments.command, cwd: "/root".into(), ..Exec::default() };
    if arguments.here {
        let program = exec.argv.first_mut().context("--here needs a command")?;
        let (from, to) = split_file(program)?;
        program.clone_from(&to);
        options.files.push((from, to));
    }
    for variable in &arguments.env {
        let (name, value) =
            variable.split_once('=').with_context(|| format!("--env {variable} has no `=`"))?;
        exec.env.push((name.to_owned(), value.to_owned()));
    }

    let mut wanted = Vec::new();
    for file in &arguments.get {
        wanted.push(file.split_once(':').with_context(|| format!("--get {file} has no `:`"))?);
    }
    if let Some(address) = arguments.at {
        let client = Client::new(address);
        for (from, to) in &options.files {
            client.put(from, to)?;
        }
        return run_and_get(client, &exec, &wanted);
    }
    if arguments.cpu == Cpu::Intel {
        return run_on_vmx(&options, exec, Duration::from_secs(arguments.limit));
    }
    if arguments.icount {
        ensure!(!exec.argv.is_empty(), "--icount needs a command");
        let limit = Duration::from_secs(arguments.limit);
        let measured = measure(&options, arguments.seed, &exec, limit)?;
        io::stdout().write_all(&measured.stdout)?;
        io::stderr().write_all(&measured.stderr)?;
        return Ok(measured.code);
    }
    let mut vm = HostVm::start(&options)?;
    if arguments.shell {
        eprintln!("xtask: host VM up after {:.1} s", vm.boot_time().as_secs_f64());
        exec.argv = vec!["sh".into()];
        exec.env.push(("PS1".into(), "host-vm:\\w# ".into()));
        exec.terminal = Some((24, 80));
    }
    if exec.argv.is_empty() {
        println!("host VM up after {:.1} s", vm.boot_time().as_secs_f64());
        vm.power_off()?;
        return Ok(0);
    }
    run_and_get(vm.client(), &exec, &wanted).with_context(|| vm.describe())
}

/// Passes output on while the command runs.
fn run_on_vmx(options: &Options, exec: Exec, limit: Duration) -> Result<i32> {
    let mut broken = None;
    let output = |_, stream, bytes: &[u8]| {
        let written = match stream {
            Stream::Stdout => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
            Stream::Stderr => io::stderr().write_all(bytes),
        };
        broken = broken.take().or(written.err());
    };
    let runs = sequence::run(options, &[Limited { exec, limit }], output)?;
    if let Some(error) = broken {
        return Err(error).context("cannot pass the command's output on");
    }
    match runs.into_iter().next().map(|run| run.ended) {
        Some(Ended::Exited(code)) => Ok(code),
        Some(Ended::TimedOut) => bail!("the command still ran after {} s", limit.as_secs()),
        Some(Ended::Failed(why)) => bail!("{why}"),
        None => bail!("the command did not run"),
    }
}

fn run_and_get(client: Client, exec: &Exec, wanted: &[(&str, &str)]) -> Result<i32> {
    let code = client.run(exec)?;
    for (from, to) in wanted {
        client.get(from, Path::new(to))?;
    }
    Ok(code)
}

fn split_file(text: &str) -> Result<(PathBuf, String)> {
    let (from, to) = text.split_once(':').unwrap_or((text, ""));
    let from = PathBuf::from(from);
    if !from.is_file() {
        bail!("{} is no file of this machine", from.display());
    }
    if !to.is_empty() {
        ensure!(to.starts_with('/'), "{to} does not start with `/`");
        return Ok((from, to.to_owned()));
    }
    let name = from.file_name().and_then(|name| name.to_str()).context("a name is not UTF-8")?;
    let to = format!("/root/{name}");
    Ok((from, to))
}
