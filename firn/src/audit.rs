//! Which system call a VMM was killed for. A filter's verdict reaches the parent as a signal only; the
//! call stands in an audit record, which the kernel writes to its log where no audit daemon takes it
//! away. What can't be read, or was left out because records come too fast, stays unknown.

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Read},
    os::unix::fs::OpenOptionsExt,
    thread,
    time::Duration,
};

/// The kernel writes records from a thread of its own: how often, and at which interval, to look for
/// one that may still come.
const LOOKS: u32 = 5;
const INTERVAL: Duration = Duration::from_millis(20);

/// Most records of the log that are read in one look, and the longest of them (`CONSOLE_EXT_LOG_MAX`).
const RECORDS: usize = 1 << 17;
const RECORD_BYTES: usize = 8192;

/// The system call for which the process `pid`, which has ended, was killed by its filter: its name,
/// or its number if it has none here. Blocks for up to [`LOOKS`] times [`INTERVAL`].
pub(crate) fn refused_call(pid: u32) -> Option<String> {
    for look in 0..LOOKS {
        if look > 0 {
            thread::sleep(INTERVAL);
        }
        if let Some(number) = look_for(pid).ok()? {
            let name = syscalls::Sysno::new(number as usize).map(|call| call.name().to_owned());
            return Some(name.unwrap_or_else(|| number.to_string()));
        }
    }
    None
}

/// The call of the log's last record of `pid`: numbers of processes are used again.
fn look_for(pid: u32) -> std::io::Result<Option<u32>> {
    let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut bytes = vec![0; RECORD_BYTES];
    let mut found = None;
    // Each read gets one record.
    for _ in 0..RECORDS {
        match log.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => {
                found = refused(&String::from_utf8_lossy(&bytes[..count]), pid).or(found);
            }
            // The record was overwritten; the next read gets the oldest that is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The call in a record of the log, if it says that a filter has killed `pid` for an x86-64 call.
fn refused(record: &str, pid: u32) -> Option<u32> {
    let (_, record) = record.split_once(";audit: type=1326 ")?;
    let field = |name: &str| record.split_whitespace().find_map(|word| word.strip_prefix(name));
    let is = |name: &str, value: &str| field(name) == Some(value);
    if is("pid=", &pid.to_string()) && is("sig=", "31") && is("arch=", "c000003e") {
        return field("syscall=")?.parse().ok();
    }
    None
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::{CommandExt, ExitStatusExt},
        process::Command,
    };

    use super::*;

    const RECORD: &str = "5,4711,45985318546,-;audit: type=1326 audit(1795466959.899:1086): \
        auid=4294967295 uid=1900000003 gid=1900000003 ses=4294967295 pid=27496 comm=\"firn-vmm\" \
        exe=\"/memfd:firn-vmm\" sig=31 arch=c000003e syscall=41 compat=0 ip=0x7f5ad00f1b07 \
        code=0x80000000\n";

    #[test]
    fn records_are_read_as_the_kernel_writes_them() {
        assert_eq!(refused(RECORD, 27496), Some(41));
        assert_eq!(refused(RECORD, 2749), None);
        assert_eq!(refused(RECORD, 496), None);
        assert_eq!(refused(&RECORD.replace("sig=31", "sig=0"), 27496), None, "only logged");
        assert_eq!(refused(&RECORD.replace("c000003e", "40000003"), 27496), None, "i386's numbers");
        assert_eq!(refused(&RECORD.replace("type=1326", "type=1325"), 27496), None);
        assert_eq!(refused(&RECORD.replace(";audit", ";user: audit"), 27496), None);
        for length in 0..RECORD.find(" compat").unwrap_or_default() - 2 {
            assert_eq!(refused(&RECORD[..length], 27496), None, "{length}");
        }
    }

    /// Kills a process by a filter, and finds what for.
    #[test]
    fn the_call_that_killed_a_process_is_found() {
        if let Err(error) = std::fs::File::open("/dev/kmsg") {
            eprintln!("skipped: /dev/kmsg: {error}");
            return;
        }
        // The kernel lets ten records through in five seconds, and other tests kill, too.
        for _ in 0..8 {
            let mut command = Command::new("true");
            // SAFETY: prctl is async-signal-safe, and the filter outlives the calls.
            unsafe { command.pre_exec(refuse_to_end) };
            let mut child = command.spawn().unwrap();
            assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGSYS));
            if let Some(call) = refused_call(child.id()) {
                assert_eq!(call, "exit_group");
                return;
            }
            thread::sleep(Duration::from_secs(1));
        }
        eprintln!("skipped: the kernel's log has no records of filters");
    }

    /// Makes `exit_group` deadly for this process.
    fn refuse_to_end() -> std::io::Result<()> {
        let statement = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let mut filter = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_exit_group as u32),
            statement(libc::BPF_RET, 0, libc::SECCOMP_RET_KILL_PROCESS),
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
}
