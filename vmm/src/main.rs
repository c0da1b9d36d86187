//! The `firn-vmm` process. It takes no arguments: what it needs it has inherited (the control
//! socket and `/dev/kvm`, see `firn_proto::control`) or will be told.

use std::sync::Arc;

use firn_proto::control::{CONTROL_FD, ExitReason, KVM_FD, Phase};
use firn_vmm::{console::say, control, descriptors, seccomp, stats::Clock};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

fn main() {
    seccomp::tame_allocator();
    #[cfg(debug_assertions)]
    firn_vmm::hold::configure();
    // Exec has set this to whatever the host's `fs.suid_dumpable` says: a guest's memory is nobody's
    // core dump.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        say(format_args!("can't forbid core dumps: {error}"));
        end(ExitReason::VmmError.code());
    }
    let clock = Arc::new(Clock::default());
    clock.stamp(Phase::ProcessStart);
    if std::env::args().nth(1).as_deref() == Some("--version") {
        println!("firn-vmm {}", env!("CARGO_PKG_VERSION"));
        return;
    }
    // A VMM that has lost a thread is no VMM: end at once, whichever thread it was.
    std::panic::set_hook(Box::new(|panic| {
        say(format_args!("{panic}"));
        end(ExitReason::VmmError.code());
    }));
    if let Err(error) = descriptors::limit() {
        say(format_args!("can't limit descriptors: {error}"));
        end(ExitReason::VmmError.code());
    }
    for (descriptor, what) in [(CONTROL_FD, "control socket"), (KVM_FD, "/dev/kvm")] {
        // SAFETY: F_GETFD reads a flag of a descriptor and fails on one that is not open.
        if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } < 0 {
            say(format_args!(
                "descriptor {descriptor} must be the {what}; firn starts this program"
            ));
            end(ExitReason::VmmError.code());
        }
    }
    // SAFETY: both descriptors are open, as just checked, and this is the only code that uses
    // them: nothing else in the process has run yet.
    end(unsafe { control::serve(clock) })
}

/// Ends the process. `std::process::exit` asks the kernel for more than confined threads may.
fn end(code: i32) -> ! {
    // SAFETY: the process ends without any code of ours being run after this.
    unsafe { libc::_exit(code) }
}
