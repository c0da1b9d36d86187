//! Every architectural state that KVM has for a guest, and what becomes of it over a snapshot and a
//! reset. Tests hold it against the KVM that they run on, and `docs/cpu-state.md` against it: what KVM
//! learns is written down here before a guest gets it.

use std::ops::RangeInclusive;

/// How a state is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// In a vCPU's state: saved, and written at each thaw and reset.
    Saved,
    /// Not saved, since a vCPU that has never run has the right value; a reset puts that back.
    PowerOn,
    /// In another part of the state.
    Within(&'static str),
    /// It tells guests what the CPU can: in the snapshot's CPU signature, or a constant of KVM's.
    Feature,
    /// Guests have none: the reason.
    Hidden(&'static str),
}

impl How {
    fn words(self) -> String {
        match self {
            Self::Saved => "saved; goes back".into(),
            Self::PowerOn => "goes back to its power-on value".into(),
            Self::Within(part) => format!("in {part}"),
            Self::Feature => "what the CPU can; guests only read it".into(),
            Self::Hidden(reason) => format!("not for guests: {reason}"),
        }
    }
}

use How::{Feature, Hidden, PowerOn, Saved, Within};

/// Model-specific registers (SDM vol. 4; AMD APM vol. 2, appendix A; Linux msr-index.h and
/// Documentation/virt/kvm/x86/msr.rst).
pub const MSRS: &[(RangeInclusive<u32>, &str, How)] = &[
    (0x10..=0x10, "TSC", Within("the TSC's offset")),
    (0x11..=0x12, "kvmclock, by its old numbers", Saved),
    (0x1b..=0x1b, "APIC base", Within("SREGS")),
    (0x34..=0x34, "SMI_COUNT", Hidden("no system-management mode is entered")),
    (0x3a..=0x3a, "FEATURE_CONTROL", Saved),
    (0x3b..=0x3b, "TSC_ADJUST", Saved),
    (0x48..=0x48, "SPEC_CTRL", Saved),
    (0x49..=0x49, "PRED_CMD", Hidden("a command, not a state")),
    (0x8b..=0x8b, "microcode's revision", Feature),
    (0x8c..=0x8f, "SGX launch key", Hidden("no SGX_LC in CPUID")),
    (0x9e..=0x9e, "SMBASE", Hidden("no system-management mode is entered")),
    (
        0xc1..=0xc8,
        "performance counters",
        Hidden("no PMU; where KVM has one all the same: power-on"),
    ),
    (0xce..=0xce, "PLATFORM_INFO", Feature),
    (0xcf..=0xcf, "CORE_CAPABILITIES", Hidden("no bit in CPUID")),
    (0xe1..=0xe1, "UMWAIT_CONTROL", Hidden("no WAITPKG in CPUID")),
    (0xfe..=0xfe, "MTRRCAP", Feature),
    (0x10a..=0x10a, "ARCH_CAPABILITIES", Feature),
    (0x10b..=0x10b, "FLUSH_CMD", Hidden("a command, not a state")),
    (0x122..=0x122, "TSX_CTRL", Hidden("no TSX in CPUID")),
    (0x140..=0x140, "MISC_FEATURES_ENABLES", Saved),
    (0x174..=0x176, "SYSENTER", Saved),
    (0x179..=0x17b, "machine check: capabilities, status, control", PowerOn),
    (0x186..=0x18d, "event selectors", Hidden("no PMU; where KVM has one all the same: power-on")),
    (0x198..=0x198, "PERF_STATUS", Feature),
    (0x1a0..=0x1a0, "MISC_ENABLE", Saved),
    (0x1c4..=0x1c5, "XFD", Hidden("no AMX in CPUID")),
    (0x1d9..=0x1de, "debug control, last branch", PowerOn),
    (0x1fc..=0x1fc, "POWER_CTL", Hidden("no MONITOR in CPUID")),
    (0x200..=0x26f, "MTRRs", PowerOn),
    (0x277..=0x277, "PAT", Saved),
    (0x280..=0x29f, "machine check: CTL2 of banks", PowerOn),
    (0x2ff..=0x2ff, "MTRRdefType", Saved),
    (0x309..=0x30c, "fixed counters", Hidden("no PMU")),
    (0x345..=0x345, "PERF_CAPABILITIES", Hidden("no PDCM in CPUID")),
    (0x38d..=0x390, "control of counters", Hidden("no PMU")),
    (0x3f1..=0x3f2, "PEBS", Hidden("no PMU")),
    (0x400..=0x47f, "machine check: banks", PowerOn),
    (0x480..=0x493, "VMX capabilities", Hidden("no VMX in CPUID")),
    (0x4c1..=0x4c8, "performance counters", Hidden("no PMU")),
    (0x4d0..=0x4d0, "MCG_EXT_CTL", Hidden("no local machine check")),
    (0x560..=0x587, "processor trace", Hidden("no PT in CPUID")),
    (0x600..=0x600, "DS area", Hidden("no PMU")),
    (0x6a0..=0x6a8, "control-flow enforcement", Hidden("no SHSTK, no IBT in CPUID")),
    (0x6e0..=0x6e0, "TSC_DEADLINE", Saved),
    (0x800..=0x8ff, "x2APIC", Within("LAPIC")),
    (0xd90..=0xd90, "BNDCFGS", Hidden("no MPX in CPUID")),
    (0xda0..=0xda0, "XSS", Hidden("no supervisor components in CPUID")),
    (0x1200..=0x121f, "last branch records", Hidden("no LBR in CPUID")),
    (0x14ce..=0x14cf, "last branch records", Hidden("no LBR in CPUID")),
    (0x4000_0000..=0x4000_01ff, "Hyper-V's", Hidden("no Hyper-V leaves in CPUID")),
    (0x4b56_4d00..=0x4b56_4d01, "kvmclock", Saved),
    (0x4b56_4d02..=0x4b56_4d02, "asynchronous page faults", Hidden("no bit in CPUID")),
    (0x4b56_4d03..=0x4b56_4d05, "steal time, end of interrupt, polling", Saved),
    (0x4b56_4d06..=0x4b56_4d07, "asynchronous page faults", Hidden("no bit in CPUID")),
    (0x4b56_4d08..=0x4b56_4d08, "migration control", Hidden("no bit in CPUID")),
    (0xc000_0080..=0xc000_0080, "EFER", Within("SREGS")),
    (0xc000_0081..=0xc000_0084, "SYSCALL", Saved),
    (0xc000_0100..=0xc000_0101, "FS and GS base", Within("SREGS")),
    (0xc000_0102..=0xc000_0103, "KERNEL_GS_BASE, TSC_AUX", Saved),
    (0xc000_0104..=0xc000_0104, "TSC_RATIO", PowerOn),
    (0xc000_0300..=0xc000_0303, "AMD: control of counters", Hidden("no PMU")),
    (
        0xc001_0000..=0xc001_0007,
        "AMD: counters",
        Hidden("no PMU; where KVM has one all the same: power-on"),
    ),
    (0xc001_0010..=0xc001_0010, "AMD: SYSCFG", PowerOn),
    (0xc001_0015..=0xc001_0015, "AMD: HWCR", Saved),
    (0xc001_0016..=0xc001_001f, "AMD: northbridge's configuration and the like", PowerOn),
    (0xc001_0055..=0xc001_0055, "AMD: INT_PENDING", Feature),
    (0xc001_0058..=0xc001_0058, "AMD: MMIO_CONF", Feature),
    (0xc001_0061..=0xc001_0064, "AMD: P-states", Feature),
    (0xc001_0114..=0xc001_0114, "AMD: VM_CR", Hidden("KVM refuses it (KVM_X86_SET_MSR_FILTER)")),
    (0xc001_0117..=0xc001_0117, "AMD: VM_HSAVE_PA", Hidden("no SVM in CPUID")),
    (0xc001_011f..=0xc001_011f, "AMD: VIRT_SPEC_CTRL", Saved),
    (0xc001_0140..=0xc001_0141, "AMD: OS-visible work-arounds", PowerOn),
    (0xc001_0200..=0xc001_020b, "AMD: counters of a core", Hidden("no PMU")),
    (0xc001_1020..=0xc001_102f, "AMD: work-arounds; LFENCE serialises", PowerOn),
];

/// Components of XSAVE by their numbers (SDM vol. 1, 13.1).
pub const COMPONENTS: &[(u32, &str, How)] = &[
    (0, "x87", Within("XSAVE")),
    (1, "SSE", Within("XSAVE")),
    (2, "AVX", Within("XSAVE")),
    (3, "MPX: bounds", Hidden("no MPX in CPUID")),
    (4, "MPX: control", Hidden("no MPX in CPUID")),
    (5, "AVX-512: masks", Within("XSAVE")),
    (6, "AVX-512: upper halves", Within("XSAVE")),
    (7, "AVX-512: ZMM16 to 31", Within("XSAVE")),
    (8, "processor trace", Hidden("no PT in CPUID")),
    (9, "protection keys", Hidden("the guest's kernel has none")),
    (10, "PASID", Hidden("no ENQCMD in CPUID")),
    (11, "shadow stacks of user mode", Hidden("no SHSTK in CPUID")),
    (12, "shadow stacks of kernel mode", Hidden("no SHSTK in CPUID")),
    (13, "hardware duty cycle", Hidden("no HDC in CPUID")),
    (14, "user interrupts", Hidden("no UINTR in CPUID")),
    (15, "last branch records", Hidden("no LBR in CPUID")),
    (16, "hardware P-states", Hidden("no HWP in CPUID")),
    (17, "AMX: configuration", Hidden("8 KiB that only AMX code needs")),
    (18, "AMX: tiles", Hidden("8 KiB that only AMX code needs")),
    (19, "APX: registers 16 to 31", Hidden("not on the list yet")),
];

/// What else a vCPU and a VM have.
const OTHERS: &[(&str, How)] = &[
    ("general registers, RIP, RFLAGS", Within("REGS")),
    ("segments, control registers, EFER, pending interrupt", Within("SREGS")),
    ("debug registers", Within("DEBUGREGS")),
    ("XCR0", Within("XCRS")),
    ("pending exceptions, NMIs, interrupt shadow, triple fault", Within("VCPU_EVENTS")),
    ("halted or running, INIT, SIPI", Within("MP_STATE")),
    ("local APIC", Within("LAPIC")),
    ("page-directory pointers of 32-bit guests", Hidden("KVM reads them from memory again")),
    ("nested guests", Hidden("no VMX, no SVM in CPUID")),
    ("system-management mode", Hidden("nothing raises an SMI")),
    ("interrupt controllers", Within("the VM's state")),
    ("kvmclock", Within("the VM's state")),
    ("programmable interval timer", Hidden("there is none")),
    ("TSC's frequency", Within("the snapshot; a host must have the same")),
];

/// What becomes of an MSR; `None`: it is not known.
pub fn msr(index: u32) -> Option<How> {
    MSRS.iter().find(|(range, ..)| range.contains(&index)).map(|(.., how)| *how)
}

/// The inventory as tables in Markdown.
pub fn tables() -> String {
    let mut text = String::from("### MSRs\n\n| number | what | how |\n|---|---|---|\n");
    for (range, name, how) in MSRS {
        let (first, last) = (range.start(), range.end());
        let numbers = match first == last {
            true => format!("{first:#x}"),
            false => format!("{first:#x}–{last:#x}"),
        };
        text += &format!("| {numbers} | {name} | {} |\n", how.words());
    }
    text += "\n### XSAVE\n\n| component | what | how |\n|---|---|---|\n";
    for (number, name, how) in COMPONENTS {
        text += &format!("| {number} | {name} | {} |\n", how.words());
    }
    text += "\n### The rest\n\n| what | how |\n|---|---|\n";
    for (name, how) in OTHERS {
        text += &format!("| {name} | {} |\n", how.words());
    }
    text
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::arch::{confine, cpuid, msrs, vcpu_state};

    fn kvm() -> Option<Kvm> {
        let kvm = Kvm::new();
        if kvm.is_err() {
            eprintln!("skipped: no /dev/kvm");
        }
        kvm.ok()
    }

    #[test]
    fn ranges_are_in_order_and_apart() {
        assert!(MSRS.windows(2).all(|pair| pair[0].0.end() < pair[1].0.start()));
        assert!(COMPONENTS.iter().enumerate().all(|(at, (number, ..))| at == *number as usize));
    }

    #[test]
    fn all_that_kvm_has_is_in_the_inventory() {
        let Some(kvm) = kvm() else { return };
        let (listed, features) =
            (kvm.get_msr_index_list().unwrap(), kvm.get_msr_feature_index_list().unwrap());
        let all = listed.as_slice().iter().chain(features.as_slice());
        let unknown: Vec<_> = all.filter(|index| msr(**index).is_none()).collect();
        assert!(unknown.is_empty(), "{unknown:x?}");
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let of = |index| {
            let mut leaves = supported.as_slice().iter();
            leaves.find(|leaf| (leaf.function, leaf.index) == (0xd, index)).copied()
        };
        let user = of(0).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
        let system = of(1).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.ecx));
        let known = (1u64 << COMPONENTS.len()) - 1;
        assert_eq!((user | system) & !known, 0, "components {user:#x}, {system:#x}");
        for (number, name, how) in COMPONENTS {
            let seen = cpuid::XCR0 >> number & 1 != 0;
            assert_eq!(seen, matches!(how, Within(_)), "{name}");
        }
    }

    /// What a vCPU's state has, and what a reset puts back, are what the inventory says of them.
    #[test]
    fn what_is_saved_and_put_back_is_what_the_inventory_says() {
        let Some(kvm) = kvm() else { return };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        confine::vm(&kvm, &vm).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let signature =
            cpuid::Signature::of_host(&kvm, firn_proto::control::CpuTemplate::Host).unwrap();
        vcpu.set_cpuid2(&signature.for_vcpu(0, 1).unwrap()).unwrap();
        confine::vcpu(&kvm, &vcpu).unwrap();
        let listed = vcpu_state::msr_list(&kvm, &vcpu).unwrap();
        let saved: Vec<u32> = listed.iter().map(|&(index, _)| index).collect();
        let beyond = msrs::beyond(&vcpu, &listed).unwrap();
        let mut wrong = Vec::new();
        for index in &saved {
            // Saved without need does no harm.
            if msr(*index).is_none() {
                wrong.push(format!("{index:#x} is saved, and unknown"));
            }
        }
        for (index, _) in &beyond {
            match msr(*index) {
                Some(PowerOn | Saved | Hidden(_) | Feature) => {}
                how => wrong.push(format!("{index:#x} goes back, and is {how:?}")),
            }
        }
        for (range, name, how) in MSRS {
            let kept = |index: &u32| {
                saved.contains(index) || beyond.iter().any(|(other, _)| other == index)
            };
            let listed = kvm.get_msr_index_list().unwrap();
            let there = listed.as_slice().iter().filter(|index| range.contains(index));
            if *how == Saved && !there.clone().all(kept) {
                wrong.push(format!("{name} is neither saved nor goes back"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// `FIRN_WRITE_DOCS=1` writes the page's tables anew.
    #[test]
    fn the_page_has_the_tables() {
        const MARKS: [&str; 2] = ["<!-- tables -->\n", "<!-- end of tables -->\n"];
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cpu-state.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (head, rest) = page.split_once(MARKS[0]).unwrap();
        let (found, tail) = rest.split_once(MARKS[1]).unwrap();
        let (table, fleets) = (cpuid::table(), cpuid::fleets());
        let tables =
            format!("\n{}\n### CPUID\n\n{table}\n### CPUs of fleets\n\n{fleets}\n", tables());
        if std::env::var_os("FIRN_WRITE_DOCS").is_some() {
            let page = [head, MARKS[0], &tables, MARKS[1], tail].concat();
            std::fs::write(path, page).unwrap();
            return;
        }
        assert!(found == tables, "docs/cpu-state.md is not up to date: FIRN_WRITE_DOCS=1");
    }
}
