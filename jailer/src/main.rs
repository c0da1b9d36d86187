//! `firn-jailer`: builds the cage that one VMM runs in, drops every privilege, and becomes the
//! VMM. It is started by the `firn` library, which has cloned it into a PID namespace of its own,
//! so that the one process that firn waits for is jailer first and VMM afterwards, and is PID 1 in
//! its namespace all the time. No parent of it lingers.
//!
//! Descriptors are inherited by a fixed plan and checked before anything is done:
//!
//! ```text
//!  0, 1   /dev/null                      kept
//!  2      standard error                 kept
//!  3      control socket (SEQPACKET)     kept: firn_proto::control::CONTROL_FD
//!  4      /dev/kvm                       kept: firn_proto::control::KVM_FD
//!  5      the VMM's executable           closed by exec
//!  6…     cgroup.procs, one a hierarchy  closed once joined (version 1; in version 2 we are there)
//! ```
//!
//! A step that fails ends the process with the step's own exit code and one line on standard
//! error. There is no way on after a failure: a VMM never starts in half a cage.
//!
//! The death of the host process is not watched here: `PR_SET_PDEATHSIG` is lost when the user
//! changes and fires when the *thread* that cloned us ends. The VMM ends when its control socket
//! closes; firn kills by pidfd, and a later life of firn by control group.

mod args;
mod cage;

use std::{env, os::unix::ffi::OsStringExt, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<Vec<u8>> = env::args_os().skip(1).map(OsStringExt::into_vec).collect();
    if arguments == [b"--version"] {
        println!("firn-jailer {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let plan = match args::parse(&arguments) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("firn-jailer: {error}");
            return ExitCode::from(cage::Step::Arguments.code());
        }
    };
    // Returns only if something went wrong.
    let error = match cage::enter(&plan) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("firn-jailer: {error}");
    ExitCode::from(error.step.code())
}
