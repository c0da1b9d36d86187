//! Starting an instance: by booting an image, or by thawing a snapshot.
//!
//! ```text
//!  thaw:  claim shell ─▶ Renew, Invoke into the socketpair ─▶ Thaw + descriptors ─▶ shell
//!         ◀─ Thawed (stamps)   ◀─ Renewed (identity repeated?)   ◀─ Done
//! ```
//!
//! The thaw path opens no file by name, parses no text, and allocates little: everything that it
//! hands over was opened when the host opened, the snapshot was made resident, or the shell was
//! spawned.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use firn_proto::{
    control::{DiskSource, Failure, FailureKind, FromVmm, MemoryPlan, ToVmm},
    guest::{self, FromGuest},
};

use crate::{
    Host, Image, Instance, Invocation, InvokeReport, Outlets, ResidentSnapshot, ShellClass,
    ShellError, SnapshotError, VmmExit,
    channel::name as message_name,
    host::Inner,
    instance::{self, Origin, Watched},
    memfile,
    phases::Stopwatch,
    reset::{self, RENEW, new_identity},
    snapshot::Use,
    stream::Stream,
    vm::{Trouble, Vm, diagnosed, unexpected},
};

/// Time from the boot request until the guest's init is ready.
const BOOT: Duration = Duration::from_secs(20);

/// How long a first event keeps the pool from being refilled beside it.
const REFILL: Duration = Duration::from_millis(20);

/// Kernel command line without devices. No serial ports are probed and a panic resets at once,
/// which ends the VMM.
const CMDLINE: &str = "quiet panic=-1 rcupdate.rcu_expedited=1";

/// Why an instance did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There was no shell to start it in.
    #[error(transparent)]
    Shell(#[from] ShellError),
    /// The snapshot does not fit this machine: it was made on a CPU that this one can't stand in
    /// for.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The VMM refused the kernel or the snapshot.
    #[error("the VMM refused: {message}")]
    Refused {
        /// Class of the failure: `BadKernel`, `SnapshotShape`…
        kind: FailureKind,
        /// Its words.
        message: String,
    },
    /// It ended before it was ready.
    #[error("the microVM ended while it started: {exit}")]
    Died {
        /// How.
        exit: VmmExit,
    },
    /// It took too long.
    #[error("no {waiting_for} within {after:?}{}", diagnosed(diagnosis))]
    TimedOut {
        /// What it should have said.
        waiting_for: &'static str,
        /// How long it was given.
        after: Duration,
        /// Where its vCPUs, interrupts and queues stood then, if its VMM could tell.
        diagnosis: Option<String>,
    },
    /// The guest speaks another version of the protocol.
    #[error("the guest speaks protocol version {found}, this host {supported}")]
    GuestVersion {
        /// The guest's.
        found: u16,
        /// Ours.
        supported: u16,
    },
    /// A thawed guest did not repeat its new identity: it must never serve.
    #[error("the thawed guest calls itself {found:?}, not {expected:?}")]
    NotRenewed {
        /// The identity that it was given.
        expected: String,
        /// What it said.
        found: String,
    },
    /// The guest or the VMM broke its protocol.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The first invocation can't be sent.
    #[error("{0}")]
    Request(String),
    /// The host's own kernel refused.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl StartError {
    /// The VMM refused the snapshot before any vCPU had entered the guest: whoever gives the event
    /// that came with it to another instance does not do it twice.
    pub fn has_not_run(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Snapshot(_))
    }

    fn from_trouble(trouble: Trouble, waiting_for: &'static str) -> Self {
        match trouble {
            Trouble::Died(exit) => Self::Died { exit },
            Trouble::TimedOut { after, diagnosis } => {
                Self::TimedOut { waiting_for, after, diagnosis }
            }
            Trouble::Refused(Failure { kind: FailureKind::SnapshotCpu, message }) => {
                Self::Snapshot(SnapshotError::Cpu { difference: message })
            }
            Trouble::Refused(Failure { kind, message }) => Self::Refused { kind, message },
            Trouble::Protocol(message) => Self::Protocol(message),
            Trouble::Request(message) => Self::Request(message),
            Trouble::Io(source) => Self::Io { operation: waiting_for, source },
        }
    }
}

/// Names what was waited for when there is trouble.
fn awaiting(what: &'static str) -> impl Fn(Trouble) -> StartError {
    move |trouble| StartError::from_trouble(trouble, what)
}

fn io_at(operation: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::Io { operation, source }
}

impl Host {
    /// Boots `image` until its init is ready for a function.
    ///
    /// # Errors
    /// Any [`StartError`].
    pub async fn boot(&self, image: &Image, class: ShellClass) -> Result<Instance, StartError> {
        let inner = self.inner();
        let mut watch = Stopwatch::start();
        let (shell, _refill) = inner.claim(class).await?;
        watch.mark("shell");
        let mut vm = shell.vm;
        let (stream, theirs) = Stream::pair().map_err(io_at("make the invoke connection"))?;
        vm.stream = Some(stream);

        // Opened anew, so that VMMs that boot at the same time don't share offsets.
        let artifacts = &inner.artifacts;
        let reopen = |fd: BorrowedFd<'_>| memfile::reopen(fd).map_err(io_at("open boot files"));
        let kernel = reopen(artifacts.kernel.as_fd())?;
        let initramfs = reopen(artifacts.initramfs.as_fd())?;
        let delta =
            vm.delta.take().ok_or_else(|| StartError::Protocol("shell used twice".into()))?;
        let message = ToVmm::Boot {
            cmdline: cmdline(inner, class),
            initramfs: true,
            disks: vec![DiskSource::ReadOnly, DiskSource::Empty, DiskSource::CopyOnWrite],
        };
        let descriptors = [
            kernel.as_fd(),
            initramfs.as_fd(),
            theirs.as_fd(),
            image.0.rootfs.file().as_fd(),
            artifacts.tmp.as_fd(),
            delta.as_fd(),
        ];
        watch.mark("sent");
        match vm.request_within(&message, &descriptors, BOOT).await.map_err(awaiting("Booted"))? {
            FromVmm::Booted(stamps) => watch.stamps(&stamps),
            other => return Err(awaiting("Booted")(unexpected("Booted", message_name(&other)))),
        }
        // The VMM has its own copies; its end must close with it.
        drop(theirs);

        let within = BOOT * inner.config.patience;
        let ready = match vm.frame(within).await.map_err(awaiting("Ready"))? {
            FromGuest::Ready(ready) => ready,
            other => return Err(awaiting("Ready")(vm.violated("Ready", &other))),
        };
        first_byte(&vm, &mut watch);
        watch.mark("ready");
        if ready.version != guest::VERSION {
            let supported = guest::VERSION;
            return Err(StartError::GuestVersion { found: ready.version, supported });
        }
        let id = new_identity().map_err(io_at("make an identity"))?;
        let origin = Origin::Booted { image: image.clone(), ready };
        Ok(Instance::new(inner.clone(), vm, id, origin, watch.finish()))
    }

    /// Thaws a snapshot into a shell and renews its identity. With `first`, the event rides along
    /// and its result is returned too. What comes out of restore hooks and the first event goes to
    /// `outlets`, as what comes later does.
    ///
    /// # Errors
    /// Any [`StartError`]. A function that fails is no error: see [`InvokeReport::outcome`] and
    /// [`Instance::renewed`].
    pub async fn thaw(
        &self,
        snapshot: &ResidentSnapshot,
        first: Option<&Invocation>,
        outlets: Outlets,
    ) -> Result<(Instance, Option<InvokeReport>), StartError> {
        let inner = self.inner();
        let mut watch = Stopwatch::start();
        let (shell, refill) = inner.claim(snapshot.class()).await?;
        watch.mark("shell");
        let mut vm = shell.vm;
        let (stream, theirs) = Stream::pair().map_err(io_at("make the invoke connection"))?;
        let stream = vm.stream.insert(stream);
        stream.set_outlets(outlets);

        let invoke = first.map(instance::invoke_message).transpose();
        let invoke = invoke.map_err(StartError::Request)?;
        let (id, moment, renew) =
            reset::renewal(snapshot.tsc()).map_err(io_at("make an identity"))?;
        vm.renew(moment, &renew).await.map_err(awaiting("Thawed"))?;
        if let Some(invoke) = &invoke {
            vm.queue(invoke).await.map_err(awaiting("Thawed"))?;
        }

        let delta =
            vm.delta.take().ok_or_else(|| StartError::Protocol("shell used twice".into()))?;
        let tmp = &inner.artifacts.tmp;
        let code = snapshot.code();
        let code_source = if code.is_some() { DiskSource::ReadOnly } else { DiskSource::Empty };
        let Use { plan, watch: watched, regions } = snapshot.next_use(first.is_some());
        let watch_clone = watched.then(|| Watched::new(snapshot));
        // A thaw to be loaded copies nothing, and says nothing of what those that do need.
        if !watched && (first.is_some() || regions > 0) {
            inner.copies(snapshot.class(), regions);
        }
        let message = ToVmm::Thaw {
            disks: vec![DiskSource::ReadOnly, code_source, DiskSource::CopyOnWriteThawed],
            resume: true,
            plan: MemoryPlan::clone(&plan),
        };
        let mut descriptors = Vec::with_capacity(8);
        descriptors.extend([snapshot.memory(), snapshot.state(), theirs.as_fd()]);
        descriptors.push(snapshot.image().0.rootfs.file().as_fd());
        descriptors.extend(code.map(|disk| disk.file().as_fd()));
        descriptors.extend([tmp.as_fd(), snapshot.delta(), delta.as_fd()]);
        watch.mark("sent");
        match vm.request_within(&message, &descriptors, RENEW).await.map_err(awaiting("Thawed"))? {
            FromVmm::Thawed(stamps) => watch.stamps(&stamps),
            other => return Err(awaiting("Thawed")(unexpected("Thawed", message_name(&other)))),
        }
        drop(theirs);

        let renewed = reset::await_renewed(&mut vm).await.map_err(awaiting("Renewed"))?;
        first_byte(&vm, &mut watch);
        watch.mark("renewed");
        if renewed.instance_id != id {
            return Err(StartError::NotRenewed { expected: id, found: renewed.instance_id });
        }

        let mut report = None;
        if let Some(first) = first {
            // From here on the function works. The thaw itself had all the CPU time there is: it
            // is our overhead, not the function's.
            if inner.config.cpu_limits {
                let limited = vm.limit_cpu(snapshot.function_memory_mb()).await;
                limited.map_err(awaiting("limit CPU time"))?;
            }
            let done = {
                let mut done = std::pin::pin!(instance::await_done(&mut vm, first));
                match tokio::time::timeout(REFILL, done.as_mut()).await {
                    Ok(done) => done,
                    // It works for longer: others may need a shell meanwhile.
                    Err(_) => {
                        drop(refill);
                        done.await
                    }
                }
            };
            let done = done.map_err(awaiting("Done"))?;
            watch.mark("done");
            let (renewed, phases) = (Some(renewed.clone()), watch.phases());
            report = Some(instance::report(&mut vm, done, renewed, phases));
        }
        let origin = Origin::Thawed { snapshot: snapshot.clone() };
        let mut instance = Instance::new(inner.clone(), vm, id, origin, watch.finish());
        instance.set_renewed(renewed);
        instance.watched = watch_clone;
        Ok((instance, report))
    }
}

fn first_byte(vm: &Vm, watch: &mut Stopwatch) {
    if let Some(ns) = vm.stream.as_ref().and_then(Stream::first_byte_ns) {
        watch.at("first byte", ns);
    }
}

fn cmdline(inner: &Arc<Inner>, class: ShellClass) -> String {
    let mut cmdline = CMDLINE.to_owned();
    cmdline.push_str(match inner.config.serial {
        true => " console=ttyS0",
        false => " 8250.nr_uarts=0",
    });
    if class.vcpus == 1 {
        cmdline.push_str(" noreplace-smp");
    }
    cmdline
}
