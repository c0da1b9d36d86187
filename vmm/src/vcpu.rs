//! The vCPU threads. Each owns its vCPU: after the shell is built, every ioctl on it is made here.
//!
//! A thread waits for a [`Command`], carries it out and answers with a [`Reply`]. While the guest
//! runs, the device thread gets it back by [`Vcpu::stop`]: it sets `immediate_exit` in the shared
//! `kvm_run` page and sends a signal, so that the request is seen whether the thread is inside
//! `KVM_RUN` or on its way there. `KVM_RUN` then first completes pending port and MMIO I/O, and
//! only after that returns `EINTR`: a vCPU that has answered [`Reply::Stopped`] is drained.

use std::{
    os::unix::thread::JoinHandleExt,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use firn_proto::control::{Exit, ExitReason, Phase};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    arch::{
        boot, describe,
        tsc::Frequency,
        vcpu_state::{self, VcpuState, VcpuStateError},
    },
    descriptors::{BELL, place},
    handover::{Asked, Gate, Lapics, Slot, Wish},
    hold,
    machine::{Machine, PortEffect},
    memory::Memory,
    seccomp,
    snapshot::SavedVm,
    stats::{Clock, ExitCounters, ExitKind},
};

/// What a vCPU thread is told to do.
pub enum Command {
    /// Set the TSC offset and, if given, the registers of the boot protocol; stay stopped.
    Boot {
        /// Kernel entry point; `None`: an application processor, which waits for its SIPI.
        entry: Option<u64>,
        /// Guest TSC minus host TSC in ticks.
        tsc_offset: i64,
    },
    /// Restore this vCPU's part of a snapshot, meet the others, and run if the plan says so.
    Thaw(Arc<ThawPlan>),
    /// Run until stopped.
    Run(Lapics),
    /// Read the state.
    Save,
    /// Say where the guest stands.
    Describe,
}

/// What a vCPU thread answers.
pub enum Reply {
    /// Done; the vCPU is stopped and drained.
    Stopped,
    /// The state.
    Saved(Box<VcpuState>),
    /// Where the guest stands, for people.
    Described(String),
    /// The command failed.
    Failed(VcpuStateError),
    /// The guest is over.
    Ended(Exit),
}

/// How much of a vCPU's state a [`ThawPlan`] restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it, to a vCPU that has never run.
    Thaw,
    /// All of it, to a vCPU that has run: also what no snapshot keeps because it is always the
    /// same before the first run.
    Reset,
    /// What goes on while a vCPU does not run: TSC and timer.
    Clocks,
}

/// A thaw as the vCPU threads see it. If it resumes, the last one to have restored its vCPU puts
/// the first message into the receive queue (its interrupt needs every LAPIC in place) and opens
/// the gate; so between the device thread and `KVM_RUN` lies one hand-over, however many vCPUs
/// there are. The device thread waits at the gate, too: before it is open it could only lose
/// interrupts.
pub struct ThawPlan {
    saved: Arc<SavedVm>,
    clock: TscPlan,
    part: Part,
    resume: bool,
    gate: Gate,
}

/// How TSCs go on.
#[derive(Debug, Clone, Copy)]
pub struct TscPlan {
    /// At which frequency.
    pub frequency: Frequency,
    /// The host's TSC, in ticks, at the moment from which they do.
    pub at: u64,
}

impl TscPlan {
    /// Guest TSC minus host TSC, scaled, of one vCPU of a snapshot.
    pub fn offset(self, saved: &SavedVm, vcpu: usize) -> i64 {
        saved.guest_tsc(vcpu).wrapping_sub(self.frequency.scale(self.at)) as i64
    }
}

impl ThawPlan {
    /// A plan for all vCPUs.
    pub fn new(saved: Arc<SavedVm>, clock: TscPlan, part: Part, resume: bool) -> Self {
        let gate = Gate::new(saved.vcpus.len());
        Self { saved, clock, part, resume, gate }
    }

    /// Waits until all vCPUs are restored and about to run; `None` if one of them could not be.
    pub fn restored(&self) -> Option<Lapics> {
        self.gate.wait()
    }
}

/// What all vCPU threads share.
pub struct Shared {
    /// The devices.
    pub machine: Arc<Machine>,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// Phase stamps.
    pub clock: Arc<Clock>,
    /// Exit counters.
    pub exits: Arc<ExitCounters>,
    /// The MSRs that make up a vCPU's state, with their power-on values.
    pub listed_msrs: Vec<(u32, u64)>,
    /// MSRs that a guest can write and no snapshot keeps, with their power-on values.
    pub unlisted_msrs: Vec<(u32, u64)>,
    /// Rung when a vCPU ends by itself.
    pub bell: rustix::fd::OwnedFd,
    /// Interrupts that were raised again.
    pub raised_again: AtomicU64,
}

/// The device thread's handle of one vCPU thread.
pub struct Vcpu {
    command: Arc<Slot<Command>>,
    reply: Arc<Slot<Reply>>,
    wish: Arc<Wish>,
    immediate_exit: ImmediateExit,
    thread: JoinHandle<()>,
}

/// `kvm_run.immediate_exit` of a vCPU, in the page that it shares with KVM.
#[derive(Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointee is one byte in a mapping that lives as long as the vCPU's descriptor, which
// its thread holds until the process ends (threads are never joined), and it is accessed only as an
// atomic by user space; KVM reads it once per KVM_RUN.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self((&raw mut vcpu.get_kvm_run().immediate_exit).cast())
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: see the `Send` implementation; alignment of a byte is trivial.
        unsafe { &*self.0 }
    }
}

/// Installs the handler of the signal that gets a vCPU out of `KVM_RUN`. It does nothing: that
/// the signal interrupts is its whole effect.
///
/// # Errors
/// The kernel's.
pub fn install_kick_handler() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all-zero is a valid `sigaction` (no flags: no SA_RESTART, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    // SAFETY: `action` is initialised and alive; the handler is async-signal-safe, being empty.
    let result = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
    crate::stats::ioctl_error(result).map(drop)
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

impl Vcpu {
    /// Starts the thread of vCPU `id`; it waits for its first command.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(id: u8, mut fd: VcpuFd, shared: Arc<Shared>) -> std::io::Result<Self> {
        let (command, reply) = (Arc::new(Slot::new()), Arc::new(Slot::new()));
        let wish = Arc::new(Wish::new());
        let immediate_exit = ImmediateExit::of(&mut fd);
        let mut worker = Worker {
            id,
            fd,
            shared,
            command: command.clone(),
            reply: reply.clone(),
            wish: wish.clone(),
            immediate_exit,
            entered: false,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(256 << 10)
            .spawn(move || worker.serve())?;
        Ok(Self { command, reply, wish, immediate_exit, thread })
    }

    /// Gives a command. The thread must be idle.
    pub fn tell(&self, command: Command) {
        self.command.put(command);
    }

    /// Makes a running vCPU stop; its answer follows.
    pub fn stop(&self) {
        self.ask(Asked::STOP);
    }

    /// Makes a running vCPU that is halted, and so not woken by an interrupt that it should have
    /// got, raise again what drivers have not acknowledged. There is no answer.
    pub fn look(&self) {
        self.ask(Asked::LOOK);
    }

    fn ask(&self, what: Asked) {
        self.wish.ask(what, self.immediate_exit.byte());
        // SAFETY: the thread has not been joined or detached, so its id is valid; the handler is
        // installed before any vCPU is started.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), kick_signal()) };
    }

    /// CPU time that the thread has used: it stands while the vCPU is halted, paused or throttled.
    pub fn cpu_time(&self) -> Duration {
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the thread has not been joined or detached, so its id is valid; both results are
        // written to places that live as long as the calls.
        let failed = unsafe {
            libc::pthread_getcpuclockid(self.thread.as_pthread_t(), &mut clock) != 0
                || libc::clock_gettime(clock, &mut time) != 0
        };
        if failed { Duration::ZERO } else { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) }
    }

    /// Waits for the answer to the last command.
    pub fn reply(&self) -> Reply {
        self.reply.wait()
    }

    /// The answer, if there already is one.
    pub fn poll(&self) -> Option<Reply> {
        self.reply.take()
    }
}

struct Worker {
    id: u8,
    fd: VcpuFd,
    shared: Arc<Shared>,
    command: Arc<Slot<Command>>,
    reply: Arc<Slot<Reply>>,
    wish: Arc<Wish>,
    immediate_exit: ImmediateExit,
    entered: bool,
}

impl Worker {
    fn serve(&mut self) -> ! {
        if let Err(error) = seccomp::confine(seccomp::Thread::Vcpu(self.id)) {
            let detail = format!("seccomp of vCPU {}: {error}", self.id);
            self.end(Exit { reason: ExitReason::VmmError, detail });
        }
        loop {
            let reply = match self.command.wait() {
                Command::Boot { entry, tsc_offset } => self.boot(entry, tsc_offset),
                Command::Thaw(plan) => self.thaw(&plan),
                Command::Run(lapics) => {
                    vcpu_state::mark_paused(&self.fd);
                    self.run(lapics)
                }
                Command::Describe => Reply::Described(describe::vcpu(&self.fd, self.id)),
                Command::Save => match VcpuState::save(&self.fd, &self.shared.listed_msrs) {
                    Ok(state) => Reply::Saved(Box::new(state)),
                    Err(error) => Reply::Failed(error),
                },
            };
            if let Reply::Ended(exit) = reply {
                self.end(exit);
            }
            self.reply.put(reply);
        }
    }

    /// Says that the guest is over, and rings the device thread's bell. The process ends soon.
    fn end(&self, exit: Exit) -> ! {
        self.reply.put(Reply::Ended(exit));
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
        // To end itself a thread needs system calls that its filter does not allow, and nothing
        // joins it.
        loop {
            std::thread::park();
        }
    }

    fn boot(&mut self, entry: Option<u64>, tsc_offset: i64) -> Reply {
        let kvm = |what| move |source| VcpuStateError::Kvm { what, source };
        let result = vcpu_state::set_tsc_offset(&self.fd, tsc_offset).and_then(|()| {
            vcpu_state::enable_xsave(&self.fd).map_err(kvm("SET_XCRS"))?;
            let Some(entry) = entry else { return Ok(()) };
            let sregs = self.fd.get_sregs().map_err(kvm("GET_SREGS"))?;
            self.fd.set_sregs(&boot::entry_sregs(sregs)).map_err(kvm("SET_SREGS"))?;
            self.fd.set_regs(&boot::entry_regs(entry)).map_err(kvm("SET_REGS"))
        });
        match result {
            Ok(()) => Reply::Stopped,
            Err(error) => Reply::Failed(error),
        }
    }

    fn thaw(&mut self, plan: &ThawPlan) -> Reply {
        let Some(state) = plan.saved.vcpus.get(usize::from(self.id)) else {
            return Reply::Stopped;
        };
        hold::back(seccomp::Thread::Vcpu(self.id));
        let tsc_offset = plan.clock.offset(&plan.saved, usize::from(self.id));
        let result = match plan.part {
            _ if hold::refuses_restore() => Err(VcpuStateError::refused()),
            Part::Thaw => vcpu_state::set_frequency(&self.fd, plan.clock.frequency)
                .and_then(|()| state.restore(&self.fd, tsc_offset)),
            Part::Reset => vcpu_state::accept_pending(&self.fd)
                .and_then(|()| vcpu_state::set_msrs(&self.fd, &self.shared.unlisted_msrs))
                .and_then(|()| state.restore(&self.fd, tsc_offset)),
            Part::Clocks => state.restore_clocks(&self.fd, tsc_offset),
        };
        if let Err(error) = result {
            plan.gate.break_down();
            return Reply::Failed(error);
        }
        self.entered = false;
        let lapics = match plan.gate.arrive() {
            Some(last) => {
                self.shared.clock.stamp(Phase::VcpuSet);
                if plan.resume
                    && let Err(error) = self.shared.machine.wake(last.lapics())
                {
                    return Reply::Ended(violation(error));
                }
                Some(last.open())
            }
            // Without a resume nobody passes, and the bytes wait in the stream, where they resume the
            // guest later.
            None if plan.resume => plan.gate.wait(),
            None => None,
        };
        match lapics {
            Some(lapics) if plan.resume => self.run(lapics),
            _ => Reply::Stopped,
        }
    }

    /// Runs the guest until it is stopped or over.
    fn run(&mut self, lapics: Lapics) -> Reply {
        if self.id == 0
            && let Err(error) = self.shared.machine.go_on(lapics)
        {
            return Reply::Ended(violation(error));
        }
        if !self.entered {
            self.shared.clock.stamp(Phase::Entered);
        }
        loop {
            let result = self.fd.run();
            if !self.entered {
                self.entered = true;
                self.shared.clock.stamp(Phase::FirstExit);
            }
            let Shared { machine, exits, .. } = &*self.shared;
            match result {
                Ok(VcpuExit::MmioRead(address, data)) => {
                    exits.count(ExitKind::MmioRead);
                    machine.mmio_read(address, data);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    exits.count(ExitKind::MmioWrite);
                    if let Err(error) = machine.mmio_write(address, data, lapics) {
                        return Reply::Ended(violation(error));
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    exits.count(ExitKind::PortIn);
                    machine.port_in(port, data);
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    exits.count(ExitKind::PortOut);
                    if machine.port_out(port, data, lapics) == PortEffect::Reset {
                        return Reply::Ended(self.reset());
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    exits.count(ExitKind::Interrupted);
                    let asked = self.wish.answer(self.immediate_exit.byte());
                    if asked.has(Asked::STOP) {
                        return Reply::Stopped;
                    }
                    if asked.has(Asked::LOOK) && vcpu_state::is_halted(&self.fd) {
                        let again = machine.raise_unacknowledged(lapics);
                        self.shared.raised_again.fetch_add(again, Ordering::Relaxed);
                    }
                }
                // A vCPU that waits for its start-up IPI, or a mapping that is being replaced.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => {
                    let detail = self.registers();
                    return Reply::Ended(Exit { reason: ExitReason::TripleFault, detail });
                }
                Ok(VcpuExit::InternalError) => return Reply::Ended(self.internal_error()),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let detail = format!(
                        "hardware refused to enter the guest: reason {reason:#x} on CPU {cpu}; {}",
                        self.registers()
                    );
                    return Reply::Ended(Exit { reason: ExitReason::KvmInternalError, detail });
                }
                Ok(other) => {
                    exits.count(ExitKind::Other);
                    let detail = format!("unexpected exit {other:?}");
                    return Reply::Ended(Exit { reason: ExitReason::KvmInternalError, detail });
                }
                Err(error) => {
                    let detail = format!("KVM_RUN of vCPU {}: {error}", self.id);
                    return Reply::Ended(Exit { reason: ExitReason::KvmInternalError, detail });
                }
            }
        }
    }

    /// The guest has pulled the reset line: orderly, or after a panic.
    fn reset(&self) -> Exit {
        if boot::panicked(&self.shared.memory) {
            let detail = "the guest's kernel panicked; run it with a serial console to see why";
            return Exit { reason: ExitReason::GuestPanic, detail: detail.into() };
        }
        Exit { reason: ExitReason::GuestShutdown, detail: "reset by the guest".into() }
    }

    /// RIP, RSP, CR0, CR3, as far as they can be had.
    fn registers(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "vCPU {} at RIP {:#x}, RSP {:#x}, RFLAGS {:#x}, CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, CR4 {:#x}",
                self.id,
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4
            ),
            _ => format!("vCPU {} (registers unreadable)", self.id),
        }
    }

    fn internal_error(&mut self) -> Exit {
        const EMULATION: u32 = 1;
        let run = self.fd.get_kvm_run();
        // SAFETY: after KVM_EXIT_INTERNAL_ERROR KVM has filled in this member of the union, and
        // all its fields are plain integers, valid whatever their bits.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let registers = self.registers();
        if suberror == EMULATION {
            let bytes = self.code_at_rip();
            let detail = format!("KVM could not emulate [{bytes}]; {registers}");
            return Exit { reason: ExitReason::EmulationFailure, detail };
        }
        let detail = format!("KVM internal error {suberror}; {registers}");
        Exit { reason: ExitReason::KvmInternalError, detail }
    }

    /// Up to 15 bytes (the longest instruction) from RIP, in hexadecimal.
    fn code_at_rip(&self) -> String {
        use vm_memory::{Bytes, GuestAddress};
        let Ok(regs) = self.fd.get_regs() else { return "RIP unreadable".into() };
        let linear = match self.fd.get_sregs() {
            Ok(sregs) if sregs.efer & (1 << 10) == 0 => sregs.cs.base.wrapping_add(regs.rip),
            _ => regs.rip,
        };
        let physical = match self.fd.translate_gva(linear) {
            Ok(translation) if translation.valid != 0 => translation.physical_address,
            _ => return format!("RIP {linear:#x} is not mapped"),
        };
        let mut code = [0u8; 15];
        let memory = self.shared.memory.guest();
        let found = memory.read(&mut code, GuestAddress(physical)).unwrap_or(0);
        code[..found].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
    }
}

fn violation(error: crate::virtio::DeviceError) -> Exit {
    Exit { reason: ExitReason::DeviceViolation, detail: error.to_string() }
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu").field("thread", &self.thread.thread().name()).finish()
    }
}

/// Makes an eventfd for [`Shared::bell`].
///
/// # Errors
/// The kernel's.
pub fn bell() -> std::io::Result<rustix::fd::OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    place(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, &BELL)
}
