//! Shells: jailed VMMs that have done everything which does not depend on what will run.

use std::{ffi::CString, fmt::Display, io, os::fd::AsFd, sync::Arc, time::Duration};

use firn_proto::control::{self, DiskKind, FromVmm, MAX_VCPUS, ShellConfig, Stamps, ToVmm};

use crate::{
    ShellClass, VmmExit,
    cgroup::Limits,
    channel::{Control, name as message_name},
    host::Inner,
    launch,
    process::Process,
    vm::{Trouble, Vm, unexpected},
};

/// Block devices of every microVM: root file system, code, `/tmp`.
pub(crate) const DISKS: [DiskKind; 3] =
    [DiskKind::ReadOnly, DiskKind::ReadOnly, DiskKind::CopyOnWrite];

/// Slot of the code disk.
pub(crate) const CODE_SLOT: u8 = 1;

/// Memory that a VMM may have beside its guest's: its own (a few MiB), page tables, KVM's
/// shadow structures, socket buffers, and page cache of `/tmp`, which can be reclaimed.
const ALLOWANCE: u64 = 64 << 20;

/// One part in so many of its guest's memory comes to that: page tables of the process and of the guest,
/// and what KVM notes of each page, 8 bytes of 4,096 each.
const TABLES: u64 = 64;

/// Largest guest memory that a VMM makes.
const MAX_MEMORY_MIB: u32 = 10_240;

/// Threads of a VMM that are not vCPUs, with room for the kernel's own (KVM makes some in the
/// VMM's group).
const THREADS: u64 = 8;

/// Descriptors of a VMM: the plan's, KVM's (VM, and two a vCPU), those of one message twice over.
const DESCRIPTORS: u64 = 128;

/// Bytes that a VMM may lock.
const LOCKED: u64 = 64 << 10;

/// Time until a shell stands.
const READY: Duration = Duration::from_secs(10);

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The host is shutting down.
    #[error("the host is shutting down")]
    Closed,
    /// More microVMs at once than users to run them as.
    #[error("all {limit} user ids for microVMs are taken")]
    NoUid {
        /// How many there are.
        limit: usize,
    },
    /// The class is impossible.
    #[error("no microVM can have {vcpus} vCPUs and {memory_mib} MiB of memory")]
    Class {
        /// Asked for.
        vcpus: u8,
        /// Asked for.
        memory_mib: u32,
    },
    /// The process could not be made.
    #[error("{step}: {source}")]
    Spawn {
        /// What was being done.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The jailer or the VMM ended before the shell stood.
    #[error("the shell ended: {exit}")]
    Died {
        /// How; the detail names the jailer's step.
        exit: VmmExit,
    },
    /// The VMM refused to build the microVM.
    #[error("the VMM refused: {message}")]
    Refused {
        /// Class of the failure.
        kind: control::FailureKind,
        /// Its words.
        message: String,
    },
    /// It took too long.
    #[error("the shell was not ready within {after:?}")]
    TimedOut {
        /// How long it was given.
        after: Duration,
    },
    /// The VMM broke its protocol.
    #[error("protocol violation: {0}")]
    Protocol(String),
}

impl From<Trouble> for ShellError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Died(exit) => Self::Died { exit },
            Trouble::TimedOut { after, .. } => Self::TimedOut { after },
            Trouble::Refused(failure) => {
                Self::Refused { kind: failure.kind, message: failure.message }
            }
            Trouble::Protocol(message) | Trouble::Request(message) => Self::Protocol(message),
            Trouble::Io(source) => Self::Spawn { step: "talk to the VMM", source },
        }
    }
}

/// A jailed VMM with a microVM of one class that waits for what to run. Dropping it kills it.
#[derive(Debug)]
pub struct Shell {
    pub(crate) vm: Vm,
    pub(crate) stamps: Stamps,
}

impl Shell {
    /// What it was built for.
    pub fn class(&self) -> ShellClass {
        self.vm.class
    }

    /// Process id of its VMM.
    pub fn pid(&self) -> u32 {
        self.vm.process.pid()
    }

    /// Moments of its making in nanoseconds of `CLOCK_MONOTONIC`.
    pub fn stamps(&self) -> &Stamps {
        &self.stamps
    }

    /// Whether its process was running at the moment of the question.
    pub fn is_alive(&self) -> bool {
        self.vm.process.is_alive()
    }
}

/// Spawns a VMM in its jail and builds its microVM.
pub(crate) async fn spawn(inner: &Arc<Inner>, class: ShellClass) -> Result<Shell, ShellError> {
    let ShellClass { vcpus, memory_mib } = class;
    if !(1..=MAX_VCPUS).contains(&vcpus) || !(1..=MAX_MEMORY_MIB).contains(&memory_mib) {
        return Err(ShellError::Class { vcpus, memory_mib });
    }
    let task = {
        let inner = inner.clone();
        tokio::task::spawn_blocking(move || launch_jailer(&inner, class))
    };
    let mut vm = task.await.map_err(|e| ShellError::Spawn {
        step: "start the jailer",
        source: io::Error::other(e),
    })??;
    let config = ShellConfig {
        version: control::VERSION,
        vcpus,
        memory_mib,
        cpu_template: inner.config.cpu_template,
        disks: DISKS.to_vec(),
        serial: inner.config.serial,
        spares: inner.spares(class),
    };
    match vm.request_within(&ToVmm::Build(config), &[], READY).await? {
        FromVmm::Ready(stamps) => Ok(Shell { vm, stamps }),
        other => Err(unexpected("Ready", message_name(&other)).into()),
    }
}

fn launch_jailer(inner: &Arc<Inner>, class: ShellClass) -> Result<Vm, ShellError> {
    let at = |step| move |source: io::Error| ShellError::Spawn { step, source };
    let artifacts = &inner.artifacts;
    let _launching = inner.live.launching(|| inner.is_closed()).ok_or(ShellError::Closed)?;
    let uid = match launch::is_rootless() {
        false => {
            let limit = inner.config.uids.len();
            Some(inner.uids.take().ok_or(ShellError::NoUid { limit })?)
        }
        true => None,
    };
    let name = inner.next_name();
    let delta = inner.state.run.nameless().map_err(at("make a /tmp disk"))?;
    let (control, theirs) = Control::pair().map_err(at("make a control socket"))?;
    let (stderr, their_stderr) = io::pipe().map_err(at("make a pipe"))?;
    // A guest whose output nobody reads in time loses it, and does not wait.
    rustix::io::ioctl_fionbio(&their_stderr, true).map_err(|e| at("make a pipe")(e.into()))?;
    let group = match &inner.cgroups {
        Some(cgroups) => {
            let limits = Limits {
                memory_bytes: memory_limit(inner, class),
                pids: u64::from(class.vcpus) + THREADS,
                io_weight: crate::config::io_weight(class.memory_mib),
            };
            let group = cgroups.create(&name, limits).map_err(at("make a control group"))?;
            Some(Arc::new(group))
        }
        None => None,
    };
    let procs = group.as_ref().map_or(&[][..], |group| group.procs());

    let longest = class.memory_bytes().max(artifacts.tmp_bytes) + (64 << 20);
    let mut arguments = vec![c"firn-jailer".to_owned()];
    let mut argument = |name: &str, value: &dyn Display| -> Result<(), ShellError> {
        for word in [name.to_owned(), value.to_string()] {
            let word = CString::new(word).map_err(|e| at("make arguments")(e.into()))?;
            arguments.push(word);
        }
        Ok(())
    };
    if let Some(uid) = &uid {
        argument("--uid", &uid.id())?;
        argument("--gid", &uid.id())?;
    }
    argument("--nofile", &DESCRIPTORS)?;
    argument("--fsize", &longest)?;
    argument("--memlock", &LOCKED)?;
    argument("--cgroups", &procs.len())?;
    if uid.is_none() {
        arguments.push(c"--only-user".to_owned());
    }

    let null = artifacts.null.as_fd();
    let mut descriptors = vec![
        null,
        null,
        their_stderr.as_fd(),
        theirs.as_fd(),
        artifacts.kvm.as_fd(),
        artifacts.vmm.as_fd(),
    ];
    descriptors.extend(procs.iter().map(AsFd::as_fd));
    let unified = group.as_ref().and_then(|group| group.unified());
    let launched = launch::launch(artifacts.jailer.as_fd(), &arguments, &descriptors, unified)
        .map_err(at("start the jailer"))?;

    // From here on the reaper cleans up, whatever happens.
    let (pid, pidfd) = (launched.pid, Arc::new(launched.pidfd));
    inner.live.add(pid, pidfd.clone());
    let recorded = inner.state.record(pid);
    let process = {
        let (inner, group, number) = (inner.clone(), group.clone(), pid);
        Process::adopt(pid, pidfd, name.clone(), stderr, move || async move {
            let removed = match group {
                Some(group) => group.remove().await,
                None => true,
            };
            // A user whose group would not go may still have a process: never reuse it.
            if let (false, Some(uid)) = (removed, uid) {
                uid.keep();
            }
            inner.state.forget(number);
            inner.live.remove(number);
        })
    };
    let vm = Vm {
        name,
        class,
        process,
        control,
        group,
        delta: Some(delta),
        pagemap: None,
        stream: None,
        patience: inner.config.patience,
    };
    recorded.map_err(at("record the VMM"))?;
    if inner.is_closed() {
        return Err(ShellError::Closed);
    }
    Ok(vm)
}

/// Memory limit of a VMM's group.
pub(crate) fn memory_limit(inner: &Inner, class: ShellClass) -> u64 {
    let tmp = if inner.state.in_memory { inner.artifacts.tmp_bytes } else { 0 };
    class.memory_bytes() + class.memory_bytes() / TABLES + ALLOWANCE + tmp
}
