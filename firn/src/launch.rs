//! Starts one `firn-jailer` as PID 1 of a new PID namespace and inside its control group, with
//! descriptors by a fixed plan.
//!
//! The jailer becomes the VMM, so the process that is made here is the VMM's from its first to its
//! last moment, and its pidfd comes with the clone: there is no window in which its pid could be
//! someone else's, and no helper process in between.
//!
//! `clone3` has no wrapper in libc, and needs one: `CLONE_VM | CLONE_VFORK` shares memory with the
//! child until it executes, as `posix_spawn` does (no page table is copied, however large the
//! process that embeds this crate), so the child must not return through frames of its parent's
//! stack. [`clone3`] gives it a stack and a function that never returns. (`posix_spawn` itself can
//! neither make namespaces, nor return the pidfd, nor start in a control group.)
//!
//! `CLONE_INTO_CGROUP` starts the child in its group. Moving it there later by `cgroup.procs` takes
//! the lock that stops all forks and exits of the machine, and without `favordynmods` waits for an
//! RCU grace period.

use std::{
    arch::asm,
    ffi::{CStr, CString, c_void},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Descriptors are first copied to numbers from here on, clear of the plan's.
const CLEAR: RawFd = 64;

/// Bytes of stack for the child: a few frames of libc wrappers.
const STACK: usize = 64 * 1024;

/// Bytes below it that can't be touched: a multiple of any page size.
const GUARD: usize = 64 * 1024;

/// A stack that faults where it ends.
struct Stack(*mut c_void);

impl Stack {
    fn new() -> io::Result<Self> {
        let (any, flags) = (ptr::null_mut(), MapFlags::PRIVATE | MapFlags::STACK);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let stack = Self(unsafe { mmap_anonymous(any, GUARD + STACK, access, flags)? });
        // SAFETY: the range is the lower part of this mapping, which nothing uses yet.
        unsafe { mprotect(stack.0, GUARD, MprotectFlags::empty())? };
        Ok(stack)
    }

    /// Where its `STACK` bytes start.
    fn start(&self) -> *mut c_void {
        // SAFETY: within the mapping.
        unsafe { self.0.byte_add(GUARD) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and the child that used it has left it.
        let _ = unsafe { munmap(self.0, GUARD + STACK) };
    }
}

/// Of linux/sched.h. (libc's constant of this name is an `int`, in which the flag has no room.)
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What the child writes to be root in its user namespace, and there alone: this user is the only one
/// that exists in it. Groups that this user is in besides can't be dropped without privilege.
struct Identity([(&'static CStr, CString); 3]);

impl Identity {
    fn new() -> io::Result<Self> {
        let map = |id: u32| CString::new(format!("0 {id} 1")).map_err(io::Error::from);
        Ok(Self([
            // The kernel wants this before it takes a group.
            (c"/proc/self/setgroups", c"deny".to_owned()),
            (c"/proc/self/uid_map", map(rustix::process::geteuid().as_raw())?),
            (c"/proc/self/gid_map", map(rustix::process::getegid().as_raw())?),
        ]))
    }
}

/// What the child needs; all of it made before the clone, because the child must not allocate.
struct Child {
    identity: Option<Identity>,
    executable: RawFd,
    arguments: Vec<*const libc::c_char>,
    environment: [*const libc::c_char; 1],
    descriptors: Vec<RawFd>,
    /// The last thing that it does in this memory: it is about to execute.
    executes: bool,
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

/// Starts `executable` in a new PID namespace and in the control group of version 2 whose directory
/// `cgroup` is, with `arguments` (the first is its name), no environment, all signals blocked, and
/// `descriptors[n]` as descriptor n. All other descriptors of this process must be close-on-exec.
///
/// A process that is not root starts it in a new user namespace, too, as root of that. It must be
/// dumpable itself, or the kernel lets nothing be written that makes it so.
pub(crate) fn launch(
    executable: BorrowedFd<'_>,
    arguments: &[CString],
    descriptors: &[BorrowedFd<'_>],
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Launched> {
    let clear = |fd: &BorrowedFd<'_>| -> io::Result<OwnedFd> {
        Ok(rustix::io::fcntl_dupfd_cloexec(fd, CLEAR)?)
    };
    let executable = clear(&executable)?;
    let copies: Vec<OwnedFd> = descriptors.iter().map(clear).collect::<io::Result<_>>()?;
    let mut child = Child {
        identity: if is_rootless() { Some(Identity::new()?) } else { None },
        executable: executable.as_raw_fd(),
        arguments: arguments.iter().map(|a| a.as_ptr()).chain([ptr::null()]).collect(),
        environment: [ptr::null()],
        descriptors: copies.iter().map(AsRawFd::as_raw_fd).collect(),
        executes: false,
        error: 0,
    };
    let stack = Stack::new()?;
    let mut pidfd: libc::c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_NEWPID | libc::CLONE_PIDFD;
    let mut clone = libc::clone_args {
        flags: flags as u64,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.start() as u64,
        stack_size: STACK as u64,
        // SAFETY: it consists of numbers, for which zero is "none".
        ..unsafe { std::mem::zeroed() }
    };
    if child.identity.is_some() {
        clone.flags |= libc::CLONE_NEWUSER as u64;
    }
    if let Some(cgroup) = cgroup {
        clone.flags |= CLONE_INTO_CGROUP;
        clone.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: CLONE_VFORK suspends this thread until the child has executed or ended, so `child`,
    // `stack` and `pidfd` outlive every use. `run` calls only async-signal-safe functions, on its
    // own stack, with its own copy of the descriptor table (no CLONE_FILES), and all signals are
    // blocked meanwhile, so that no handler runs in the child on shared memory.
    let made = unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        let mut old = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&mut all);
        let masked = libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        if masked != 0 {
            return Err(io::Error::from_raw_os_error(masked));
        }
        let made = clone3(&clone, run, (&raw mut child).cast());
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, ptr::null_mut());
        made
    };
    let pid = made?;
    // SAFETY: clone3 succeeded, so the kernel has stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: the child wrote through the pointer that it was given; volatile reads keep the
    // compiler from assuming the initial values.
    let (failed, executes) = unsafe {
        (ptr::read_volatile(&raw const child.error), ptr::read_volatile(&raw const child.executes))
    };
    if failed == 0 && executes {
        return Ok(Launched { pid, pidfd });
    }
    // It has ended already; don't leave it a zombie.
    let end = crate::process::wait(&pidfd);
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    let signal = end.ok().and_then(|end| end.signal).unwrap_or_default();
    Err(io::Error::other(format!("the process was killed by signal {signal} before it executed")))
}

/// Whether this process has to do without root's rights.
pub(crate) fn is_rootless() -> bool {
    !rustix::process::geteuid().is_root()
}

/// Clones by `clone3`. The child runs `run(argument)` on the stack that `arguments` name.
///
/// # Safety
/// `arguments` must name a stack that is aligned to 16 bytes, large enough for `run`, and used by
/// nothing else until the child has executed another program or ended. All that `run` does must be
/// allowed in such a child; with `CLONE_VM` that is what is allowed in a signal handler.
unsafe fn clone3(
    arguments: &libc::clone_args,
    run: extern "C" fn(*mut c_void) -> !,
    argument: *mut c_void,
) -> io::Result<u32> {
    let result: isize;
    // SAFETY: in the parent this is an ordinary system call, which clobbers rax, rcx, r11, and
    // memory behind `arguments`' pointers. The child starts behind it with the same registers but
    // an empty stack of its own, to which `call` aligns as the ABI wants, and never comes out of
    // `run`: nothing of this frame is touched by it. rbp is cleared to end the chain of frames; the
    // child has its own copy of all registers.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {argument}",
            "call {run}",
            "ud2",
            "2:",
            argument = in(reg) argument,
            run = in(reg) run,
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") arguments,
            in("rsi") size_of::<libc::clone_args>(),
            // Not `lateout`: the two pointers are read after the system call.
            out("rcx") _,
            out("r11") _,
        );
    }
    match u32::try_from(result) {
        Ok(pid) => Ok(pid),
        // The kernel's errors are -4095 to -1.
        Err(_) => Err(io::Error::from_raw_os_error(-result as i32)),
    }
}

/// The child until exec.
extern "C" fn run(child: *mut c_void) -> ! {
    // SAFETY: `launch` passes a pointer to its `Child` and is suspended while this runs. Only
    // async-signal-safe functions are called and nothing is allocated.
    unsafe {
        let child = child.cast::<Child>();
        if become_jailer(child).is_none() {
            ptr::write_volatile(&raw mut (*child).error, *libc::__errno_location());
        }
        libc::_exit(127)
    }
}

/// Returns only if something failed; `errno` says what.
///
/// # Safety
/// The caller is the child, and what `child` points to is there.
unsafe fn become_jailer(shared: *mut Child) -> Option<std::convert::Infallible> {
    // SAFETY: arrays and strings end with null and outlive the calls.
    unsafe {
        let child = &*shared;
        for (path, text) in child.identity.iter().flat_map(|identity| &identity.0) {
            let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            let length = text.as_bytes().len();
            // Closed by exec, or with the process.
            if file < 0 || libc::write(file, text.as_ptr().cast(), length) != length as isize {
                return None;
            }
        }
        for (number, copy) in child.descriptors.iter().enumerate() {
            // The copies are all at CLEAR and above, so no target is a later source, and the new
            // number is not close-on-exec.
            if libc::dup2(*copy, number as RawFd) < 0 {
                return None;
            }
        }
        ptr::write_volatile(&raw mut (*shared).executes, true);
        let nothing: &CStr = c"";
        libc::syscall(
            libc::SYS_execveat,
            child.executable,
            nothing.as_ptr(),
            child.arguments.as_ptr(),
            child.environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Read,
        os::fd::AsFd,
        path::{Path, PathBuf},
    };

    use super::*;

    fn strings(words: &[&str]) -> Vec<CString> {
        words.iter().map(|w| CString::new(*w).unwrap()).collect()
    }

    fn is_root() -> bool {
        let root = rustix::process::getuid().is_root();
        if !root {
            eprintln!("skipped: needs root");
        }
        root
    }

    /// What a shell script prints that is launched.
    fn print(script: &str, cgroup: Option<BorrowedFd<'_>>) -> String {
        let shell = File::open("/bin/sh").unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut output, pipe) = io::pipe().unwrap();
        let launched = launch(
            shell.as_fd(),
            &strings(&["sh", "-c", script]),
            &[null.as_fd(), pipe.as_fd(), null.as_fd(), null.as_fd()],
            cgroup,
        )
        .unwrap();
        drop(pipe);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        let end = crate::process::wait(&launched.pidfd).unwrap();
        assert!(end.code.is_some(), "{end:?}");
        text
    }

    #[test]
    fn the_child_is_pid_1_and_has_the_plans_descriptors() {
        if !is_root() {
            return;
        }
        let script =
            "echo $$; for n in 0 1 2 3 4 5 6 7 8 9; do { true >&$n; } 2>/dev/null && echo $n; done";
        assert_eq!(print(script, None), "1\n0\n1\n2\n3\n");
    }

    #[test]
    fn the_child_starts_in_its_control_group() {
        let Some(group) = Group::new("launch") else { return };
        let dir = File::open(&group.0).unwrap();
        // The shell is a process before it has done anything; it reads what it was made with.
        let groups = print("while read line; do echo $line; done < /proc/self/cgroup", {
            Some(dir.as_fd())
        });
        let name = group.0.file_name().unwrap().to_str().unwrap();
        assert!(groups.lines().any(|line| line == format!("0::/{name}")), "{groups}");
    }

    /// A control group of its own, removed in the end.
    struct Group(PathBuf);

    impl Group {
        fn new(purpose: &str) -> Option<Self> {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
            let Some(mount) = mount.filter(|_| is_root()) else {
                eprintln!("skipped: no control groups of version 2");
                return None;
            };
            let name = format!("firn-{purpose}-{}", std::process::id());
            let group = Self(Path::new(mount.split(' ').nth(4).unwrap()).join(name));
            std::fs::create_dir(&group.0).unwrap();
            Some(group)
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            std::fs::remove_dir(&self.0).unwrap();
        }
    }

    /// In a group that is frozen it does nothing until it is killed.
    #[test]
    fn who_is_killed_before_it_executes_was_not_launched() {
        let Some(group) = Group::new("killed") else { return };
        let freeze = group.0.join("cgroup.freeze");
        if !freeze.exists() {
            eprintln!("skipped: groups of this kernel can't be frozen");
            return;
        }
        std::fs::write(freeze, "1").unwrap();
        let dir = File::open(&group.0).unwrap();
        let error = std::thread::scope(|scope| {
            let launched = scope.spawn(|| {
                let shell = File::open("/bin/sh").unwrap();
                launch(shell.as_fd(), &strings(&["sh"]), &[], Some(dir.as_fd())).map(|_| ())
            });
            let procs = group.0.join("cgroup.procs");
            let pid = loop {
                let text = std::fs::read_to_string(&procs).unwrap();
                if let Some(pid) = text.lines().next() {
                    break pid.parse().unwrap();
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            };
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            launched.join().unwrap().unwrap_err()
        });
        assert!(error.to_string().contains("killed by signal 9"), "{error}");
    }

    #[test]
    fn a_stack_has_an_end() {
        let stack = Stack::new().unwrap();
        let start = format!("{:x}-{:x} ---p", stack.0 as usize, stack.start() as usize);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.lines().any(|line| line.starts_with(&start)), "{start} in\n{maps}");
    }

    #[test]
    fn what_can_not_be_executed_is_an_error_and_no_zombie() {
        if !is_root() {
            return;
        }
        let file = File::open("/proc/self/status").unwrap();
        let error = launch(file.as_fd(), &strings(&["jailer"]), &[], None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let no_group = Some(file.as_fd());
        let error = launch(file.as_fd(), &strings(&["jailer"]), &[], no_group).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{error}");
    }
}
