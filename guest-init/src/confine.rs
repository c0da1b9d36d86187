//! What a runtime's process gives up between fork and exec.
//!
//! The guest holds one function, so this is no tenant boundary (the VM is); it keeps the function
//! away from PID 1, from the mounts and from what the next invocation must find unchanged, as
//! Lambda does: unprivileged user, no capabilities, no way to gain any, no ptrace.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
};

use rustix::{
    process::{Resource, Rlimit, setrlimit, setsid},
    thread::{Gid, Uid, set_thread_gid, set_thread_groups, set_thread_uid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// User and group of the function, as in the image's `/etc/passwd`.
pub const FUNCTION_ID: u32 = 993;

/// Most open files, as in Lambda.
const MAX_FILES: u64 = 1024;

/// System calls that fail with EPERM: looking into other processes, changing mounts and
/// namespaces, kernel facilities that no function needs.
const FORBIDDEN: &[libc::c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_quotactl,
    libc::SYS_acct,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// System calls that fail with ENOSYS, so that their users fall back to older ones: `clone3` has
/// its flags in memory, where no filter sees them, and a ring's operations pass every filter by.
const UNKNOWN: &[libc::c_long] = &[libc::SYS_clone3, libc::SYS_io_uring_setup];

/// Compiled filters, made before fork.
#[derive(Debug)]
pub struct Filters {
    forbidden: BpfProgram,
    unknown: BpfProgram,
}

impl Filters {
    /// Compiles the filters.
    ///
    /// # Errors
    /// A rule set that is no filter, which a test excludes.
    pub fn compile() -> Result<Self, seccompiler::Error> {
        let mut forbidden = all(FORBIDDEN);
        // New user namespaces would give capabilities over the kernel's mount and network code.
        let flag = libc::CLONE_NEWUSER as u64;
        forbidden
            .insert(libc::SYS_clone, vec![first_argument(SeccompCmpOp::MaskedEq(flag), flag)?]);
        // The way to the host is PID 1's alone.
        let vsock = libc::AF_VSOCK as u64;
        forbidden.insert(libc::SYS_socket, vec![first_argument(SeccompCmpOp::Eq, vsock)?]);
        Ok(Self {
            forbidden: program(forbidden, libc::EPERM)?,
            unknown: program(all(UNKNOWN), libc::ENOSYS)?,
        })
    }
}

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

/// These calls, whatever their arguments.
fn all(calls: &[libc::c_long]) -> Rules {
    calls.iter().map(|&call| (call, Vec::new())).collect()
}

fn first_argument(compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::Error> {
    // The kernel reads 32 bits of either argument that is looked at here.
    let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, compare, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn program(rules: Rules, errno: i32) -> Result<BpfProgram, seccompiler::Error> {
    let refuse = SeccompAction::Errno(errno as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Confines the calling process for good. Runs between fork and exec: async-signal-safe, no
/// allocation.
///
/// `cgroup` is the `cgroup.procs` to move into and means a guest of our own, where the user is
/// changed too.
///
/// # Errors
/// The step that the kernel refused.
pub fn confine(filters: &Filters, cgroup: Option<&File>) -> io::Result<()> {
    setsid()?;
    forget_signals()?;
    set_limit(Resource::Nofile, MAX_FILES)?;
    set_limit(Resource::Core, 0)?;
    if let Some(mut procs) = cgroup {
        procs.write_all(b"0")?;
        drop_bounding_set()?;
        set_thread_groups(&[])?;
        // From root to an ordinary user: the kernel clears all capability sets.
        set_thread_gid(Gid::from_raw(FUNCTION_ID))?;
        set_thread_uid(Uid::from_raw(FUNCTION_ID))?;
    }
    // Sets no_new_privs too.
    let filtered = |program| apply_filter(program).map_err(|_| io::Error::last_os_error());
    filtered(&filters.unknown)?;
    filtered(&filters.forbidden)
}

/// Undoes what [`crate::signals`] did: exec would pass it on.
fn forget_signals() -> io::Result<()> {
    // SAFETY: an all-zero signal set is valid memory for `sigemptyset` to initialise, and outlives
    // the calls; SIG_DFL is a valid disposition.
    let result = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_limit(resource: Resource, value: u64) -> io::Result<()> {
    Ok(setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?)
}

fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and no pointer.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let error = io::Error::last_os_error();
            // The first number that this kernel doesn't know ends the list.
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::{CommandExt as _, ExitStatusExt as _},
        process::Command,
    };

    use super::*;

    fn run(script: &str) -> std::process::Output {
        let filters = Filters::compile().unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        // SAFETY: `confine` is made for this place.
        unsafe { command.pre_exec(move || confine(&filters, None)) };
        command.output().unwrap()
    }

    #[test]
    fn ordinary_programs_run_with_limits() {
        let output = run("ulimit -n; ulimit -c; (echo sub)");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1024\n0\nsub\n");
    }

    #[test]
    fn mounts_and_namespaces_are_out_of_reach() {
        let output = run("unshare -U true || mount -t tmpfs none /mnt || echo refused");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "refused\n");
        let signals = run("grep -E '^SigBlk:' /proc/self/status; kill -PIPE $$");
        assert_eq!(String::from_utf8_lossy(&signals.stdout), "SigBlk:\t0000000000000000\n");
        assert_eq!(signals.status.signal(), Some(libc::SIGPIPE));
        let status = run("grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t\\n'");
        assert_eq!(String::from_utf8_lossy(&status.stdout), "NoNewPrivs:1Seccomp:2");
    }
}
