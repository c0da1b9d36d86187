//! Where the memory of a guest, or what an attacker wants to know of the kernel, may turn up:
//! swap, merged pages, the kernel's log and addresses. (No core dump: VMMs forbid theirs.)

use super::{Finding, Severity, read};

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(swap(&read("/proc/swaps")));
    findings.extend(merging(&read("/sys/kernel/mm/ksm/run")));
    findings.extend(kernel_log(&read("/proc/sys/kernel/dmesg_restrict")));
    findings.extend(kernel_addresses(&read("/proc/sys/kernel/kptr_restrict")));
    findings
}

/// `swaps` has a line of headings first.
fn swap(swaps: &str) -> Option<Finding> {
    let id = "host.swap";
    let why = "Guest memory, secrets included, may stay on a disk.";
    // Compressed memory is memory.
    let on_disks = swaps.lines().skip(1).filter(|line| !line.starts_with("/dev/zram")).count();
    match (on_disks, swaps.lines().count()) {
        (_, 0) => None,
        (0, 1) => Some(Finding::new(id, Severity::Ok, "no swap", why)),
        (0, _) => Some(Finding::new(id, Severity::Ok, "swap stays in memory (zram)", why)),
        _ => Some(
            Finding::new(id, Severity::Note, "swap is on", why)
                .fix("For hostile tenants: `swapoff --all`, or an encrypted swap."),
        ),
    }
}

fn merging(run: &str) -> Option<Finding> {
    let id = "host.ksm";
    let why = "How long a write takes tells a guest what others have in memory.";
    match run.trim() {
        "" => None,
        "1" => Some(
            Finding::new(id, Severity::Note, "the kernel merges equal pages (KSM)", why)
                .fix("For hostile tenants: `echo 2 > /sys/kernel/mm/ksm/run`, as root."),
        ),
        _ => Some(Finding::new(id, Severity::Ok, "the kernel merges no equal pages (KSM)", why)),
    }
}

fn kernel_log(restrict: &str) -> Option<Finding> {
    let id = "host.kernel-log";
    let why = "It holds addresses and registers that help whoever attacks the kernel.";
    match restrict.trim() {
        "" => None,
        "0" => Some(
            Finding::new(id, Severity::Note, "every user may read the kernel's log", why)
                .fix("`sysctl kernel.dmesg_restrict=1`, as root."),
        ),
        _ => {
            Some(Finding::new(id, Severity::Ok, "only privileged users read the kernel's log", why))
        }
    }
}

fn kernel_addresses(restrict: &str) -> Option<Finding> {
    let id = "host.kernel-addresses";
    let why = "Whoever knows where things lie in the kernel attacks it more easily.";
    match restrict.trim() {
        "" => None,
        "0" => Some(
            Finding::new(id, Severity::Note, "the kernel does not hide its addresses", why)
                .fix("`sysctl kernel.kptr_restrict=1`, as root."),
        ),
        _ => Some(Finding::new(id, Severity::Ok, "the kernel hides its addresses", why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_on_a_disk_is_told_from_swap_in_memory() {
        const HEAD: &str = "Filename\tType\tSize\tUsed\tPriority\n";
        let severity = |lines: &str| swap(&format!("{HEAD}{lines}")).unwrap().severity;
        assert_eq!(severity(""), Severity::Ok);
        assert_eq!(severity("/dev/zram0 partition 8388604 0 100\n"), Severity::Ok);
        assert_eq!(severity("/dev/dm-1 partition 9 0 -2\n"), Severity::Note);
        assert_eq!(swap(""), None);
    }

    #[test]
    fn pages_are_merged_only_where_the_kernel_says_so() {
        assert_eq!(merging("1\n").unwrap().severity, Severity::Note);
        for off in ["0\n", "2\n"] {
            assert_eq!(merging(off).unwrap().severity, Severity::Ok, "{off}");
        }
        assert_eq!(merging(""), None);
    }

    #[test]
    fn what_the_kernel_tells_of_itself() {
        for check in [kernel_log, kernel_addresses] {
            assert_eq!(check("0\n").unwrap().severity, Severity::Note);
            assert_eq!(check("1\n").unwrap().severity, Severity::Ok);
            assert_eq!(check("2\n").unwrap().severity, Severity::Ok);
            assert_eq!(check(""), None);
        }
    }
}
