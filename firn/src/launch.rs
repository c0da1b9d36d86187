//! Starts one `firn-jailer` as PID 1 of a new PID namespace, with descriptors by a fixed plan.
//!
//! The jailer becomes the VMM, so the process that is made here is the VMM's from its first to its
//! last moment, and its pidfd comes with the clone: there is no window in which its pid could be
//! someone else's, and no helper process in between.
//!
//! `clone(CLONE_VM | CLONE_VFORK)` shares memory with the child until it executes, as
//! `posix_spawn` does: no page table is copied, however large the process that embeds this crate.
//! (`posix_spawn` itself can neither make the namespace nor return the pidfd.)

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// Descriptors are first copied to numbers from here on, clear of the plan's.
const CLEAR: RawFd = 64;

/// Bytes of stack for the child: a few frames of libc wrappers.
const STACK: usize = 64 * 1024;

/// What the child needs; all of it made before the clone, because the child must not allocate.
struct Child {
    executable: *const libc::c_char,
    arguments: Vec<*const libc::c_char>,
    environment: [*const libc::c_char; 1],
    descriptors: Vec<RawFd>,
    error: libc::c_int,
}

/// A process that was started.
#[derive(Debug)]
pub(crate) struct Launched {
    /// Its process id.
    pub(crate) pid: u32,
    /// Its pidfd.
    pub(crate) pidfd: OwnedFd,
}

/// Starts `executable` in a new PID namespace with `arguments` (the first is its name), no
/// environment, all signals blocked, and `descriptors[n]` as descriptor n. All other descriptors
/// of this process must be close-on-exec.
pub(crate) fn launch(
    executable: &CStr,
    arguments: &[CString],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<Launched> {
    let clear: Vec<OwnedFd> = descriptors
        .iter()
        .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, CLEAR).map_err(io::Error::from))
        .collect::<io::Result<_>>()?;
    let mut child = Child {
        executable: executable.as_ptr(),
        arguments: arguments.iter().map(|a| a.as_ptr()).chain([ptr::null()]).collect(),
        environment: [ptr::null()],
        descriptors: clear.iter().map(AsRawFd::as_raw_fd).collect(),
        error: 0,
    };
    // u128 for the alignment that the ABI wants of a stack.
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let mut pidfd: libc::c_int = -1;
    let flags =
        libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_NEWPID | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: CLONE_VFORK suspends this thread until the child has executed or ended, so `child`,
    // `stack` and `pidfd` outlive every use. `run` calls only async-signal-safe functions, on its
    // own stack, with its own copy of the descriptor table (no CLONE_FILES), and all signals are
    // blocked meanwhile, so that no handler runs in the child on shared memory.
    let pid = unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        let mut old = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&mut all);
        let masked = libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        if masked != 0 {
            return Err(io::Error::from_raw_os_error(masked));
        }
        let top = stack.as_mut_ptr().add(stack.len());
        let pid = libc::clone(
            run,
            top.cast(),
            flags,
            (&raw mut child).cast(),
            &raw mut pidfd,
            ptr::null_mut::<libc::c_void>(),
            ptr::null_mut::<libc::c_void>(),
        );
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, ptr::null_mut());
        if pid < 0 {
            return Err(error);
        }
        pid
    };
    // SAFETY: clone succeeded, so the kernel has stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: the child wrote through the pointer that it was given; a volatile read keeps the
    // compiler from assuming the initial value.
    let failed = unsafe { ptr::read_volatile(&raw const child.error) };
    if failed != 0 {
        // It has ended already; don't leave it a zombie.
        let _ = crate::process::wait(&pidfd);
        return Err(io::Error::from_raw_os_error(failed));
    }
    Ok(Launched { pid: pid as u32, pidfd })
}

/// The child until exec.
extern "C" fn run(child: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `launch` passes a pointer to its `Child` and is suspended while this runs. Only
    // async-signal-safe functions are called and nothing is allocated.
    unsafe {
        let child = child.cast::<Child>();
        let descriptors = &(*child).descriptors;
        for (number, copy) in descriptors.iter().enumerate() {
            // The copies are all at CLEAR and above, so no target is a later source, and the new
            // number is not close-on-exec.
            if libc::dup2(*copy, number as RawFd) < 0 {
                ptr::write_volatile(&raw mut (*child).error, *libc::__errno_location());
                libc::_exit(127);
            }
        }
        libc::execve(
            (*child).executable,
            (*child).arguments.as_ptr(),
            (*child).environment.as_ptr(),
        );
        ptr::write_volatile(&raw mut (*child).error, *libc::__errno_location());
        libc::_exit(127)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use super::*;

    fn strings(words: &[&str]) -> Vec<CString> {
        words.iter().map(|w| CString::new(*w).unwrap()).collect()
    }

    #[test]
    fn the_child_is_pid_1_and_has_the_plans_descriptors() {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut output, pipe) = io::pipe().unwrap();
        let script =
            "echo $$; for n in 0 1 2 3 4 5 6 7 8 9; do { true >&$n; } 2>/dev/null && echo $n; done";
        let launched = launch(
            c"/bin/sh",
            &strings(&["sh", "-c", script]),
            &[null.as_fd(), pipe.as_fd(), null.as_fd(), null.as_fd()],
        )
        .unwrap();
        drop(pipe);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        assert_eq!(text, "1\n0\n1\n2\n3\n");
        let end = crate::process::wait(&launched.pidfd).unwrap();
        assert!(end.code.is_some(), "{end:?}");
    }

    #[test]
    fn a_missing_executable_is_an_error_and_no_zombie() {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let error = launch(c"/nonexistent/jailer", &strings(&["jailer"]), &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
