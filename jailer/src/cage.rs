//! The cage, step by step. The order matters: what needs privilege comes first, what takes it away
//! last, and the files that the steps need are gone before the VMM's first instruction.
//!
//! What holds when [`enter`] has become the VMM:
//! - mount, network, IPC, UTS and cgroup namespaces of its own (and the PID namespace that it was
//!   cloned into); the root is an empty, read-only tmpfs; the old root is detached;
//! - a user and group that nothing else on the machine has, no supplementary groups; or, where firn is
//!   not root, a user namespace in which nobody else exists;
//! - no capability in any set, none that could come back (bounding set empty, secure bits locked,
//!   `no_new_privs`);
//! - under Landlock, where the kernel has it: no file system, no TCP port, no signal and no abstract
//!   socket of anyone else, whatever else should fail;
//! - a core-scheduling cookie of its own, where the kernel has that: no other microVM runs on the same
//!   core at the same time;
//! - no descriptor but 0 to 4, no environment, no arguments, its own session.
//!
//! Seccomp is not installed here: the VMM installs a filter for each of its threads, which
//! `no_new_privs` permits it without privilege.

use std::{
    convert::Infallible,
    ffi::CStr,
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use firn_proto::control::{CONTROL_FD, KVM_FD};
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        UnmountFlags,
    },
    process::{DumpableBehavior, Resource, Rlimit},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, CoreSchedulingScope, Gid, Uid,
        UnshareFlags, create_core_scheduling_cookie,
    },
};

use crate::args::{Plan, User};

/// Descriptor number of the VMM's executable.
const EXECUTABLE_FD: RawFd = 5;

/// Descriptor number of the first `cgroup.procs`.
const CGROUP_FD: RawFd = 6;

/// One step; its position makes its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Arguments,
    Descriptors,
    User,
    Signals,
    Session,
    CoreScheduling,
    Limits,
    Cgroups,
    Namespaces,
    HostName,
    PrivateMounts,
    EmptyRoot,
    PivotRoot,
    DetachOldRoot,
    CloseDescriptors,
    BoundingSet,
    SecureBits,
    Groups,
    GroupId,
    UserId,
    Capabilities,
    NoNewPrivileges,
    Dumpable,
    Landlock,
    Exec,
}

impl Step {
    /// The exit code when this step fails: 40 and above, which the VMM does not use.
    pub fn code(self) -> u8 {
        40 + self as u8
    }

    fn name(self) -> &'static str {
        match self {
            Self::Arguments => "arguments",
            Self::Descriptors => "check inherited descriptors",
            Self::User => "be the only user",
            Self::Signals => "reset signals",
            Self::Session => "start a session",
            Self::CoreScheduling => "get a core-scheduling cookie",
            Self::Limits => "set resource limits",
            Self::Cgroups => "join control groups",
            Self::Namespaces => "make namespaces",
            Self::HostName => "set the host name",
            Self::PrivateMounts => "make mounts private",
            Self::EmptyRoot => "mount the empty root",
            Self::PivotRoot => "pivot into the empty root",
            Self::DetachOldRoot => "detach the old root",
            Self::CloseDescriptors => "close descriptors",
            Self::BoundingSet => "empty the capability bounding set",
            Self::SecureBits => "lock secure bits",
            Self::Groups => "drop supplementary groups",
            Self::GroupId => "change group",
            Self::UserId => "change user",
            Self::Capabilities => "drop capabilities",
            Self::NoNewPrivileges => "set no_new_privs",
            Self::Dumpable => "forbid core dumps and ptrace",
            Self::Landlock => "enter a Landlock domain",
            Self::Exec => "execute the VMM",
        }
    }
}

/// A step that failed.
#[derive(Debug)]
pub struct CageError {
    /// Which.
    pub step: Step,
    detail: String,
    source: io::Error,
}

impl fmt::Display for CageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "can't {}", self.step.name())?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        write!(f, ": {}", self.source)
    }
}

/// Names the step of an error.
trait At<T> {
    fn at(self, step: Step) -> Result<T, CageError>;
    fn at_detail(self, step: Step, detail: impl FnOnce() -> String) -> Result<T, CageError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, CageError> {
        self.at_detail(step, String::new)
    }

    fn at_detail(self, step: Step, detail: impl FnOnce() -> String) -> Result<T, CageError> {
        self.map_err(|e| CageError { step, detail: detail(), source: e.into() })
    }
}

/// Builds the cage and becomes the VMM in it.
pub fn enter(plan: &Plan) -> Result<Infallible, CageError> {
    check_descriptors(plan)?;
    check_user(plan)?;
    reset_signals()?;
    rustix::process::setsid().at(Step::Session)?;
    take_a_core_cookie()?;
    set_limits(plan)?;
    join_cgroups(plan)?;
    isolate()?;
    empty_root()?;
    close_descriptors()?;
    drop_privileges(plan)?;
    restrict()?;
    execute()
}

/// Every number of the plan must be open and of the right kind: a hole would be filled by the
/// VMM's own descriptors, and it would talk to the wrong one.
fn check_descriptors(plan: &Plan) -> Result<(), CageError> {
    let first_free = CGROUP_FD + plan.cgroups as RawFd;
    for number in 0..first_free {
        let step = |e| at_descriptor(number, e);
        // SAFETY: the number may be closed, in which case fcntl reports EBADF; it is borrowed for
        // this loop only, in which nothing closes it.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_getfd(fd).map_err(step)?;
        let wrong = match number {
            CONTROL_FD => {
                rustix::net::sockopt::socket_type(fd).map_err(step)?
                    != rustix::net::SocketType::SEQPACKET
            }
            KVM_FD => !is_kind(fd, rustix::fs::FileType::CharacterDevice).map_err(step)?,
            EXECUTABLE_FD => !is_kind(fd, rustix::fs::FileType::RegularFile).map_err(step)?,
            _ => false,
        };
        if wrong {
            return Err(step(Errno::INVAL));
        }
    }
    Ok(())
}

/// The only user of a user namespace is root there. It must not be the machine's root, who would keep
/// that id: in a namespace that was made without privilege nobody may choose groups, and the machine's
/// root may.
fn check_user(plan: &Plan) -> Result<(), CageError> {
    if plan.user != User::Only {
        return Ok(());
    }
    match rustix::thread::set_thread_groups(&[]) {
        Err(Errno::PERM) => Ok(()),
        _ => Err(Errno::INVAL).at_detail(Step::User, || "not alone in a user namespace".into()),
    }
}

fn at_descriptor(number: RawFd, error: Errno) -> CageError {
    CageError {
        step: Step::Descriptors,
        detail: format!("descriptor {number}"),
        source: error.into(),
    }
}

fn is_kind(fd: BorrowedFd<'_>, kind: rustix::fs::FileType) -> Result<bool, Errno> {
    Ok(rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == kind)
}

/// firn clones with all signals blocked; the mask survives exec, so it is opened here. Ignored
/// signals survive exec too; SIGPIPE is the one that Rust programs ignore.
fn reset_signals() -> Result<(), CageError> {
    // SAFETY: the set is initialised by sigemptyset before it is read, and no handler of this
    // program exists that could run.
    let failed = unsafe {
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut none) != 0
            || libc::signal(libc::SIGPIPE, libc::SIG_DFL) == libc::SIG_ERR
            || libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()) != 0
    };
    if failed { Err(io::Error::last_os_error()).at(Step::Signals) } else { Ok(()) }
}

/// Sibling threads of a core, if simultaneous multithreading is on, then run this microVM's threads
/// or nobody else's. Kernels without core scheduling, and machines without siblings, say so.
fn take_a_core_cookie() -> Result<(), CageError> {
    let ourselves = rustix::process::getpid();
    match create_core_scheduling_cookie(ourselves, CoreSchedulingScope::ThreadGroup) {
        Ok(()) | Err(Errno::INVAL | Errno::NODEV) => Ok(()),
        other => other.at(Step::CoreScheduling),
    }
}

/// No limit on processes or address space: the first counts the whole user and would stop vCPU
/// threads, the second would stop guest memory. Both belong to the control groups.
fn set_limits(plan: &Plan) -> Result<(), CageError> {
    let limits = [
        (Resource::Core, 0),
        (Resource::Nofile, plan.nofile),
        (Resource::Fsize, plan.fsize),
        (Resource::Memlock, plan.memlock),
        (Resource::Msgqueue, 0),
        (Resource::Rtprio, 0),
        (Resource::Nice, 0),
    ];
    for (resource, value) in limits {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        rustix::process::setrlimit(resource, limit)
            .at_detail(Step::Limits, || format!("{resource:?} to {value}"))?;
    }
    Ok(())
}

/// 0 written to `cgroup.procs` moves the writer. The descriptors were opened by firn, whose permission
/// counts. In version 2 this process was started in its group.
fn join_cgroups(plan: &Plan) -> Result<(), CageError> {
    for index in 0..plan.cgroups as RawFd {
        // SAFETY: check_descriptors has seen this number open, and only this loop takes it; it is
        // closed here, so that nothing after this step can move a process.
        let procs = unsafe { OwnedFd::from_raw_fd(CGROUP_FD + index) };
        rustix::io::write(&procs, b"0")
            .at_detail(Step::Cgroups, || format!("hierarchy {index}"))?;
    }
    Ok(())
}

fn isolate() -> Result<(), CageError> {
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        // After the control groups are joined: they become the root of what the VMM could see.
        | UnshareFlags::NEWCGROUP;
    // SAFETY: none of these flags touches the descriptor table, which is what makes unsharing
    // unsafe; there is one thread.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }.at(Step::Namespaces)?;
    rustix::system::sethostname(b"firn").at(Step::HostName)
}

/// The root becomes a file system that is empty and stays so: read-only, and room for its own
/// inode and nothing else. It never has a name that could be taken for something else: it is mounted
/// over the root that we have, the one place that every process can name.
fn empty_root() -> Result<(), CageError> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .at(Step::PrivateMounts)?;
    let root = empty_file_system().at(Step::EmptyRoot)?;
    let nothing = c"";
    let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&root, nothing, CWD, c"/", from).at(Step::EmptyRoot)?;
    rustix::process::fchdir(&root).at(Step::PivotRoot)?;
    // The old root is put on top of the new one and then taken away: no directory for it is
    // needed in a root that can't have one.
    rustix::process::pivot_root(c".", c".").at(Step::PivotRoot)?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).at(Step::DetachOldRoot)?;
    rustix::process::chdir(c"/").at(Step::DetachOldRoot)
}

/// An empty tmpfs that is mounted nowhere yet.
fn empty_file_system() -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let options =
        [(c"source", c"firn-jail"), (c"size", c"4k"), (c"nr_inodes", c"1"), (c"mode", c"0555")];
    for (name, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), name, value)?;
    }
    rustix::mount::fsconfig_set_flag(context.as_fd(), c"ro")?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Whatever firn's process may have leaked goes; the executable goes with exec.
fn close_descriptors() -> Result<(), CageError> {
    // SAFETY: this program owns no descriptor object beyond the plan's numbers; rustix and std
    // hold none open at this point.
    let result = unsafe { libc::syscall(libc::SYS_close_range, CGROUP_FD as u32, u32::MAX, 0u32) };
    if result != 0 {
        return Err(io::Error::last_os_error()).at(Step::CloseDescriptors);
    }
    // SAFETY: check_descriptors has seen this number open and nothing has closed it.
    let executable = unsafe { BorrowedFd::borrow_raw(EXECUTABLE_FD) };
    rustix::io::fcntl_setfd(executable, rustix::io::FdFlags::CLOEXEC).at(Step::CloseDescriptors)
}

fn drop_privileges(plan: &Plan) -> Result<(), CageError> {
    // Until the kernel says that there is no such capability: it may know more than our headers.
    for number in 0..64 {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
            1 << number,
        )) {
            Ok(()) => {}
            Err(Errno::INVAL) if number > 0 => break,
            Err(e) => {
                return Err(e).at_detail(Step::BoundingSet, || format!("capability {number}"));
            }
        }
    }
    rustix::thread::clear_ambient_capability_set().at(Step::BoundingSet)?;
    // Root is nobody special from here on, and that can't be undone.
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .at(Step::SecureBits)?;
    if let User::Own { uid, gid } = plan.user {
        rustix::thread::set_thread_groups(&[]).at(Step::Groups)?;
        let id = Gid::from_raw(gid);
        rustix::thread::set_thread_res_gid(id, id, id)
            .at_detail(Step::GroupId, || gid.to_string())?;
        let id = Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(id, id, id)
            .at_detail(Step::UserId, || uid.to_string())?;
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
    .at(Step::Capabilities)?;
    rustix::thread::set_no_new_privs(true).at(Step::NoNewPrivileges)?;
    // Exec sets this again unless the executable is unreadable for its user; firn makes it so.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::Dumpable)
}

/// A domain in which everything that Landlock knows to refuse is refused: the VMM works with what it
/// has inherited. The executable lies in memory, outside of all file systems, so it can be executed.
/// Older kernels know less; one that does not know Landlock at all leaves the other walls.
fn restrict() -> Result<(), CageError> {
    use landlock::{
        ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope,
    };
    const NEWEST: ABI = ABI::V6;
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(|rules| rules.create())
        .and_then(|rules| rules.restrict_self());
    restricted.map(drop).map_err(io::Error::other).at(Step::Landlock)
}

fn execute() -> Result<Infallible, CageError> {
    let arguments: [*const libc::c_char; 2] = [c"firn-vmm".as_ptr(), ptr::null()];
    let environment: [*const libc::c_char; 1] = [ptr::null()];
    let nothing: &CStr = c"";
    // SAFETY: all pointers are to null-terminated arrays and strings that outlive the call. The
    // executable is static, so that exec needs no other file.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            EXECUTABLE_FD.as_raw_fd(),
            nothing.as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(io::Error::last_os_error()).at(Step::Exec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_stay_clear_of_the_vmms() {
        assert_eq!(Step::Arguments.code(), 40);
        assert_eq!(Step::Exec.code(), 64);
    }

    fn landlock_version() -> libc::c_long {
        // SAFETY: LANDLOCK_CREATE_RULESET_VERSION takes no attribute and makes nothing.
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) }
    }

    /// What `attempt` says in a child that is restricted; `None` where the kernel does not know
    /// Landlock.
    fn restricted(attempt: impl Fn() -> i32) -> Option<i32> {
        if landlock_version() < 1 {
            eprintln!("skipped: no Landlock");
            return None;
        }
        // SAFETY: the child makes system calls, allocates a little, and leaves without unwinding;
        // no lock of this process is taken at the time by other tests but the allocator's, which
        // glibc gives to the child unlocked.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = match restrict() {
                Ok(()) => attempt(),
                Err(_) => 255,
            };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        let mut status = 0;
        // SAFETY: `status` is an int that lives; the pid is of our own child.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        Some(libc::WEXITSTATUS(status))
    }

    fn errno() -> i32 {
        io::Error::last_os_error().raw_os_error().unwrap_or_default()
    }

    #[test]
    fn a_restricted_process_opens_nothing() {
        let Some(code) = restricted(|| {
            // SAFETY: a string with an end.
            match unsafe { libc::open(c"/proc/self/status".as_ptr(), libc::O_RDONLY) } {
                -1 => errno(),
                _ => 0,
            }
        }) else {
            return;
        };
        assert_eq!(code, libc::EACCES);
    }

    #[test]
    fn a_restricted_process_signals_nobody_else() {
        if landlock_version() < 6 {
            eprintln!("skipped: this kernel's Landlock does not know signals");
            return;
        }
        // SAFETY: signal 0 only asks.
        let asks = || if unsafe { libc::kill(libc::getppid(), 0) } == 0 { 0 } else { errno() };
        assert_eq!(restricted(asks), Some(libc::EPERM));
    }

    #[test]
    fn an_error_names_its_step() {
        let error =
            Err::<(), _>(Errno::PERM).at_detail(Step::Limits, || "Nofile".into()).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("can't set resource limits (Nofile): "), "{text}");
    }
}
