//! What seccomp filters cost a thaw, on this host's `/dev/kvm`: the thaws of `tiny_thaw` by VMMs with
//! their filters and without, in turns, so that whatever else the machine does meets both alike.
//!
//! `cargo bench -p firn-vmm --bench filters [-- ITERATIONS [PROGRAM]...]` prints a JSON line for each kind
//! of VMM: as built, without filters, and further programs (such as an older build).
//!
//! `… -- run COMMAND` runs a command in which no filter has an effect, such as `firn bench run`.

#[path = "../tests/common/mod.rs"]
mod common;
mod tiny;

use std::{os::unix::process::CommandExt, process::Command};

use common::{Vmm, kvm};
use tiny::{NAMES, Snapshot};

fn main() {
    // Cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if arguments.first().is_some_and(|argument| argument == "run") {
        refuse_filters().unwrap();
        panic!("{}", Command::new(&arguments[1]).args(&arguments[2..]).exec());
    }
    let iterations = arguments.first().map_or(200, |count| count.parse().unwrap());
    let Some(kvm) = kvm() else { return };
    let mut kinds = vec!["filtered", "unfiltered"];
    kinds.extend(arguments.iter().skip(1).map(String::as_str));

    let snapshot = Snapshot::take(&kvm);
    let mut samples: Vec<Vec<[f64; NAMES.len()]>> = vec![Vec::new(); kinds.len()];
    for iteration in 0..iterations {
        for turn in 0..kinds.len() {
            // Who comes after whom makes a difference, too.
            let which = (iteration + turn) % kinds.len();
            let vmm = match kinds[which] {
                "filtered" => Vmm::spawn(&kvm),
                "unfiltered" => Vmm::spawn_program(&kvm, &common::program(), refuse_filters),
                program => Vmm::spawn_program(&kvm, program, || Ok(())),
            };
            samples[which].push(snapshot.thaw(vmm));
        }
    }
    for (kind, samples) in kinds.iter().zip(&samples) {
        println!(
            "{{\"bench\":\"filters\",\"vmm\":\"{kind}\",\"iterations\":{iterations},{}}}",
            common::quantiles(NAMES, samples)
        );
    }
}

/// Makes filters that this process, or what it executes, will install do nothing: the VMM has no
/// such switch. What is left is that the kernel looks up one bit for each system call.
fn refuse_filters() -> std::io::Result<()> {
    let statement = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_seccomp as u32),
        // "Success".
        statement(libc::BPF_RET, 0, libc::SECCOMP_RET_ERRNO),
        statement(libc::BPF_RET, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which is alive.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
    };
    if refused { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
