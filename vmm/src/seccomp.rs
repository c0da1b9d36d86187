//! What each thread may ask of the kernel, and with which arguments. Everything else kills the
//! process.
//!
//! | thread | from when | what it does then |
//! |---|---|---|
//! | device (main) | the shell stands | control socket, epoll, thaw and save, vsock |
//! | vCPU | its first instruction | KVM_RUN, device work of its exits, vCPU state |
//!
//! Neither opens, connects, executes, clones, makes memory executable, or signals anything but this
//! process's own threads; and each works on those of the plan's descriptors only that are its business
//! ([`crate::descriptors`]). A vCPU thread, which acts on what the guest says, has the shorter table: it
//! allocates by `brk` alone ([`tame_allocator`]) and never ends, but waits for the process to.
//!
//! A build with debug assertions, as tests are, says which call it was before it dies, and can keep
//! a record of the entries that are used ([`trap`]).

mod program;
pub mod table;
#[cfg(debug_assertions)]
pub mod trap;

/// Which thread is about to be confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// The main thread.
    Device,
    /// The thread of the vCPU with this id.
    Vcpu(u8),
}

/// A filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
#[error("seccomp: {0}")]
pub struct SeccompError(String);

/// Makes all threads of this process allocate from one heap that grows by `brk`, so that vCPU threads
/// need no other memory call. To be called before there is a second thread.
pub fn tame_allocator() {
    /// The largest that glibc takes: half of a heap's 64 MiB.
    const NEVER: libc::c_int = 32 << 20;
    // SAFETY: these set parameters of the allocator; a refused one would leave the default, and a
    // vCPU thread that went by it would be killed, not unconfined.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, NEVER);
    }
}

/// Confines the calling thread for good.
///
/// # Errors
/// [`SeccompError`] if the kernel takes no filter.
pub fn confine(thread: Thread) -> Result<(), SeccompError> {
    #[cfg(debug_assertions)]
    let answers = trap::answers(thread).map_err(|error| SeccompError(error.to_string()))?;
    #[cfg(not(debug_assertions))]
    let answers = program::Answers::KILL;
    let program = program::program(table::entries(thread), thread, std::process::id(), answers);
    seccompiler::apply_filter(&program).map_err(|error| SeccompError(error.to_string()))
}
