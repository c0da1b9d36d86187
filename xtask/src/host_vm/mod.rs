//! The dev host VM: a small Linux server under QEMU whose `/dev/kvm` is KVM on (emulated) SVM.
//!
//! It is how Firn runs where KVM is missing or emulates guest kernel code (`firn doctor` tells).
//! QEMU's TCG needs no rights and no hardware support. The machine has two CPUs (one in virtual time),
//! a root file system in memory, and a user network: only forwarded ports lead in, and to one port at
//! most it leads out.
//!
//! ```text
//! this machine:  xtask ──TCP 127.0.0.1:<free>──▶ QEMU ──▶ host-vm-agent (PID 1) ──▶ firnd ──▶ microVM
//! ```
//!
//! [`HostVm`] is the running machine, [`measure`] runs one command in virtual time. A machine of another emulator has
//! KVM on VMX, and runs a [`sequence`] of commands.

mod bochs;
pub mod client;
pub mod command;
mod debian;
mod emulator;
mod kernel;
mod modules;
mod qemu;
mod root;
pub mod sequence;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use firn_host_vm_agent::{AGENT_PORT, Event, Exec, Job, Request};

use crate::scratch;
use client::Client;
pub use kernel::Series;
use qemu::Qemu;

/// Longest time from starting QEMU to the agent's mark; it takes 7 s on a rig with nothing else to do.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Where the host VM has the one port of this machine that it reaches.
pub const OUTSIDE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 100), 4566);

/// Whose virtualization the host VM's CPU has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Cpu {
    /// AMD's SVM, emulated by QEMU.
    #[default]
    Amd,
    /// Intel's VMX, emulated by Bochs.
    Intel,
}

/// What the host VM is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The kernel that it runs.
    pub kernel: Series,
    /// CPUs; in virtual time and with VMX it has one.
    pub cpus: u8,
    /// Its emulator's CPU model; `None`: the one that tests run on.
    pub cpu_model: Option<String>,
    /// An artifacts directory; it appears as `/firn`.
    pub artifacts: Option<PathBuf>,
    /// Further files: here, and where they appear.
    pub files: Vec<(PathBuf, String)>,
    /// Kernel modules to load beside KVM and the network.
    pub modules: Vec<String>,
    /// TCP ports of the host VM that are to be reachable from this machine.
    pub forward: Vec<u16>,
    /// Whether the host VM reaches a port of this machine, [`HostVm::outside`], at [`OUTSIDE`].
    pub outside: bool,
    /// Mount cgroup v2 without `favordynmods`.
    pub plain_cgroups: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 2048,
            kernel: Series::default(),
            cpus: 2,
            cpu_model: None,
            artifacts: None,
            files: Vec::new(),
            modules: Vec::new(),
            forward: Vec::new(),
            outside: false,
            plain_cgroups: false,
        }
    }
}

/// A running host VM. Dropping it kills QEMU; so does the end of this process.
pub struct HostVm {
    qemu: Qemu,
    ports: BTreeMap<u16, u16>,
    outside: Option<u16>,
    boot_time: Duration,
}

impl HostVm {
    /// Boots the host VM and waits until it takes commands.
    pub fn start(options: &Options) -> Result<Self> {
        let started = Instant::now();
        let initrd = root::build(options, Cpu::Amd, None)?;
        let mut forward = options.forward.clone();
        forward.push(AGENT_PORT);
        forward.extend(options.outside.then_some(OUTSIDE.port()));
        let mut ports = free_ports(&forward)?;
        let outside = options.outside.then(|| ports.remove(&OUTSIDE.port())).flatten();
        let mode = qemu::Mode::Interactive { forward: &ports, outside };
        let mut qemu = Qemu::start(&initrd, options, &mode)?;
        qemu.wait_until_ready(BOOT_LIMIT)?;
        // QEMU has read it, and it is large.
        drop(initrd);
        Ok(Self { qemu, ports, outside, boot_time: started.elapsed() })
    }

    /// From the start of the work on its root file system until it took commands.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Where a forwarded port of the host VM is reachable from this machine.
    pub fn forwarded(&self, port: u16) -> Option<SocketAddr> {
        self.ports.get(&port).map(|port| (Ipv4Addr::LOCALHOST, *port).into())
    }

    /// The port of this machine's 127.0.0.1 that the host VM reaches at [`OUTSIDE`]. Nobody listens there yet.
    pub fn outside(&self) -> Option<u16> {
        self.outside
    }

    /// A client for commands and files; clients are independent of each other.
    pub fn client(&self) -> Client {
        let address = (Ipv4Addr::LOCALHOST, self.ports[&AGENT_PORT]).into();
        Client::new(address)
    }

    /// Whether it runs, and the last lines of its console, for error messages.
    pub fn describe(&mut self) -> String {
        self.qemu.describe()
    }

    /// Ends the host VM in order. Dropping it has the same effect, without waiting.
    pub fn power_off(&mut self) -> Result<()> {
        self.client().power_off()?;
        self.qemu.wait(Duration::from_secs(10))
    }
}

/// What a measured command printed, and its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The exit code.
    pub code: i32,
}

/// Boots the host VM in virtual time (one instruction is one nanosecond), runs one command and
/// returns its output. The same options, command and seed give the same bytes, time stamps
/// included: there is no network, and nothing reaches the machine from outside.
pub fn measure(options: &Options, seed: u32, exec: &Exec, limit: Duration) -> Result<Measured> {
    ensure!(options.forward.is_empty(), "ports can't be forwarded in measurement mode");
    let job = Job::Measure(exec.clone());
    let initrd = root::build(options, Cpu::Amd, Some(&job))?;
    let output = scratch::directory()?.join("events");
    let mode = qemu::Mode::Measure { seed, output: &output };
    let mut qemu = Qemu::start(&initrd, options, &mode)?;
    qemu.wait_until_ready(BOOT_LIMIT * 4)?;
    qemu.wait(limit)?;
    let bytes = std::fs::read(&output).context("the host VM gave no output")?;
    let mut bytes = bytes.as_slice();
    let mut measured = Measured { stdout: Vec::new(), stderr: Vec::new(), code: 0 };
    while let Some(event) = firn_host_vm_agent::receive(&mut bytes)? {
        match event {
            Event::Output(firn_host_vm_agent::Stream::Stdout, b) => measured.stdout.extend(b),
            Event::Output(firn_host_vm_agent::Stream::Stderr, b) => measured.stderr.extend(b),
            Event::Exited(code) => return Ok(Measured { code, ..measured }),
            Event::Failed(message) => bail!("{message}"),
            other => bail!("unexpected {other:?} from the host VM"),
        }
    }
    bail!("the host VM ended before the command did; {}", qemu.describe())
}

/// Picks a free port of this machine for each port of the host VM.
fn free_ports(ports: &[u16]) -> Result<BTreeMap<u16, u16>> {
    // All are held until all are picked, or two could be the same.
    let held: Vec<_> = ports
        .iter()
        .map(|port| Ok((*port, TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)))
        .collect::<Result<_>>()
        .context("no free port on 127.0.0.1")?;
    held.iter().map(|(port, socket)| Ok((*port, socket.local_addr()?.port()))).collect()
}

/// Sends a request that has no other answer than done.
fn is_done(event: Option<Event>, request: &Request) -> Result<()> {
    match event {
        Some(Event::Done) => Ok(()),
        Some(Event::Failed(message)) => bail!("{message}"),
        other => bail!("unexpected answer {other:?} to {request:?}"),
    }
}
