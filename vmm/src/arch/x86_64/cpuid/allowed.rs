//! What a guest may see of its CPU: every leaf and every bit, with its reason. All else is zero, and a
//! leaf that is not here is not there.
//!
//! KVM offers what the host's CPU has and KVM can keep apart. That is more than functions need, grows with
//! each version of KVM, and holds state that a snapshot or a reset would have to know of. A new bit is
//! added here once it is known how its state is saved and goes back (docs/cpu-state.md).
//!
//! Sources: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

/// The registers that CPUID answers in, as indices.
pub(super) const EAX: usize = 0;
pub(super) const EBX: usize = 1;
pub(super) const ECX: usize = 2;
pub(super) const EDX: usize = 3;

/// Bits of a register of a leaf.
pub(super) struct Row {
    /// EAX on entry.
    function: u32,
    /// ECX on entry; `None`: whatever it is.
    index: Option<u32>,
    register: usize,
    bits: u32,
    /// Whether Firn says what they are, whatever KVM offers.
    made: bool,
    /// Why a guest sees them.
    why: &'static str,
}

const ALL: u32 = u32::MAX;

/// The bits from `low` to `high`.
const fn field(low: u32, high: u32) -> u32 {
    (u32::MAX >> (31 - high)) & (u32::MAX << low)
}

/// The bits of these numbers.
const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut bits = 0;
    let mut n = 0;
    while n < N {
        bits |= 1 << numbers[n];
        n += 1;
    }
    bits
}

const fn row(function: u32, register: usize, bits: u32, why: &'static str) -> Row {
    Row { function, index: None, register, bits, made: false, why }
}

const fn sub(function: u32, index: u32, register: usize, bits: u32, why: &'static str) -> Row {
    Row { function, index: Some(index), register, bits, made: false, why }
}

const fn made(row: Row) -> Row {
    Row { made: true, ..row }
}

/// The list. Not in it, among others: performance counters (0xA, PDCM, PEBS, LBR; their state survives a
/// reset), power and MONITOR/MWAIT (5, 6), SGX (0x12), processor trace (0x14), resource control (0xF,
/// 0x10), AMX (8 KiB of state a vCPU), protection keys and 57-bit addresses (the guest's kernel has
/// neither), shadow stacks and branch tracking (state in MSRs and XSS), TSX (deprecated, and a way to
/// leak), memory encryption, nested virtualisation, and whatever tells one CPU of the host from another.
pub(super) const ROWS: &[Row] = &[
    // ---- Basic leaves.
    made(row(0, EAX, ALL, "highest leaf")),
    row(0, EBX, ALL, "vendor"),
    row(0, ECX, ALL, "vendor"),
    row(0, EDX, ALL, "vendor"),
    row(1, EAX, field(0, 13) | field(16, 27), "family, model, stepping: kernels choose by them"),
    row(1, EBX, field(8, 15), "size that CLFLUSH works on"),
    made(row(1, EBX, field(16, 31), "number of this vCPU, and how many there are")),
    row(1, ECX, bits([0, 9, 19, 20]), "SSE3, SSSE3, SSE4.1, SSE4.2"),
    row(1, ECX, bits([1, 25]), "PCLMULQDQ, AES: TLS"),
    row(1, ECX, bits([12, 22, 23, 29]), "FMA, MOVBE, POPCNT, F16C"),
    row(1, ECX, bits([13]), "CMPXCHG16B: x86-64-v2"),
    row(1, ECX, bits([17]), "PCID: cheap address spaces in the guest's kernel"),
    row(1, ECX, bits([21, 24]), "x2APIC, TSC deadline: the timer of every guest"),
    row(1, ECX, bits([26, 27, 28]), "XSAVE, OSXSAVE, AVX; the components are in leaf 0xD"),
    row(1, ECX, bits([30]), "RDRAND"),
    row(1, ECX, bits([31]), "a hypervisor is there"),
    row(
        1,
        EDX,
        field(0, 6) | bits([8, 9, 11, 13, 15, 16, 17, 19]),
        "what every x86-64 kernel needs",
    ),
    row(1, EDX, bits([7, 14, 12]), "machine check and MTRR registers, which KVM keeps"),
    row(1, EDX, bits([23, 24, 25, 26]), "MMX, FXSAVE, SSE, SSE2: the ABI"),
    row(1, EDX, bits([27]), "self-snoop: memory types may be changed without flushing"),
    made(row(1, EDX, bits([28]), "more than one vCPU")),
    row(2, EAX, ALL, "caches, for libraries that tile"),
    row(2, EBX, ALL, "caches"),
    row(2, ECX, ALL, "caches"),
    row(2, EDX, ALL, "caches"),
    row(4, EAX, field(0, 9), "caches"),
    made(row(4, EAX, field(14, 31), "caches: who shares them")),
    row(4, EBX, ALL, "caches: line, partitions, ways"),
    row(4, ECX, ALL, "caches: sets"),
    row(4, EDX, field(0, 2), "caches: inclusive or not"),
    row(6, EAX, bits([2]), "the APIC's timer always runs"),
    made(sub(7, 0, EAX, ALL, "highest sub-leaf")),
    sub(7, 0, EBX, bits([0]), "FSGSBASE: switching tasks"),
    sub(7, 0, EBX, bits([1]), "TSC_ADJUST: an MSR that goes back"),
    sub(7, 0, EBX, bits([3, 5, 8, 19]), "BMI1, AVX2, BMI2, ADX"),
    sub(7, 0, EBX, bits([6, 13]), "how the FPU keeps pointers"),
    sub(7, 0, EBX, bits([7, 20]), "SMEP, SMAP"),
    sub(7, 0, EBX, bits([9]), "fast string copies: libc and kernel"),
    sub(7, 0, EBX, bits([10]), "INVPCID"),
    sub(7, 0, EBX, bits([16, 17, 21, 26, 27, 28, 30, 31]), "AVX-512"),
    sub(7, 0, EBX, bits([18, 29]), "RDSEED, SHA"),
    sub(7, 0, EBX, bits([23, 24]), "CLFLUSHOPT, CLWB"),
    sub(7, 0, ECX, bits([1, 6, 11, 12, 14]), "AVX-512: VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ"),
    sub(7, 0, ECX, bits([2]), "UMIP: descriptor tables are the kernel's"),
    sub(7, 0, ECX, bits([8, 9, 10]), "GFNI, VAES, VPCLMULQDQ: TLS"),
    sub(7, 0, ECX, bits([22]), "RDPID: which vCPU, without a system call"),
    sub(7, 0, ECX, bits([25, 27, 28]), "CLDEMOTE, MOVDIRI, MOVDIR64B"),
    sub(7, 0, EDX, bits([2, 3, 8, 23]), "AVX-512: 4VNNIW, 4FMAPS, VP2INTERSECT, FP16"),
    sub(7, 0, EDX, bits([4]), "fast short string copies"),
    sub(
        7,
        0,
        EDX,
        bits([10, 26, 27, 28, 29, 31]),
        "mitigations: VERW, IBRS and IBPB, STIBP, L1D flush, ARCH_CAPABILITIES, SSBD",
    ),
    sub(7, 0, EDX, bits([14]), "SERIALIZE"),
    sub(7, 1, EAX, bits([0, 1, 2]), "SHA512, SM3, SM4"),
    sub(7, 1, EAX, bits([4, 5, 7, 23]), "AVX-VNNI, BF16, CMPCCXADD, AVX-IFMA"),
    sub(7, 1, EAX, bits([10, 11, 12]), "fast string instructions of short and no length"),
    sub(7, 1, EDX, bits([4, 5, 10, 14]), "AVX-VNNI-INT8, NE-CONVERT, VNNI-INT16, PREFETCHI"),
    sub(
        7,
        2,
        EDX,
        bits([0, 1, 2, 3, 4, 5]),
        "mitigations: what SPEC_CTRL can, and what needs none",
    ),
    made(row(0xb, EAX, ALL, "topology")),
    made(row(0xb, EBX, ALL, "topology")),
    made(row(0xb, ECX, ALL, "topology")),
    made(row(0xb, EDX, ALL, "topology")),
    sub(0xd, 0, EAX, XCR0, "components of XSAVE that a snapshot has"),
    made(sub(0xd, 0, EBX, ALL, "size of what is enabled: KVM fills it in for each vCPU")),
    made(sub(0xd, 0, ECX, ALL, "size of what can be enabled")),
    sub(
        0xd,
        1,
        EAX,
        bits([0, 1, 2, 3]),
        "XSAVEOPT, XSAVEC, XGETBV, XSAVES (of no supervisor state)",
    ),
    sub(0xd, 2, EAX, ALL, "AVX: size"),
    sub(0xd, 2, EBX, ALL, "AVX: place"),
    sub(0xd, 2, ECX, field(0, 1), "AVX: alignment"),
    sub(0xd, 5, EAX, ALL, "AVX-512 masks: size"),
    sub(0xd, 5, EBX, ALL, "AVX-512 masks: place"),
    sub(0xd, 5, ECX, field(0, 1), "AVX-512 masks: alignment"),
    sub(0xd, 6, EAX, ALL, "upper halves of ZMM0 to 15: size"),
    sub(0xd, 6, EBX, ALL, "upper halves of ZMM0 to 15: place"),
    sub(0xd, 6, ECX, field(0, 1), "upper halves of ZMM0 to 15: alignment"),
    sub(0xd, 7, EAX, ALL, "ZMM16 to 31: size"),
    sub(0xd, 7, EBX, ALL, "ZMM16 to 31: place"),
    sub(0xd, 7, ECX, field(0, 1), "ZMM16 to 31: alignment"),
    made(row(0x1f, EAX, ALL, "topology")),
    made(row(0x1f, EBX, ALL, "topology")),
    made(row(0x1f, ECX, ALL, "topology")),
    made(row(0x1f, EDX, ALL, "topology")),
    // ---- KVM's own leaves.
    made(row(0x4000_0000, EAX, ALL, "highest leaf of KVM's")),
    row(0x4000_0000, EBX, ALL, "KVM's name"),
    row(0x4000_0000, ECX, ALL, "KVM's name"),
    row(0x4000_0000, EDX, ALL, "KVM's name"),
    row(0x4000_0001, EAX, bits([0, 3, 24]), "kvmclock: time that goes on from a snapshot"),
    row(0x4000_0001, EAX, bits([1]), "no delays after port writes"),
    row(0x4000_0001, EAX, bits([5]), "steal time: a throttled guest knows that it was"),
    row(0x4000_0001, EAX, bits([6]), "end of interrupt without an exit"),
    row(0x4000_0001, EAX, bits([7, 9, 11, 13]), "vCPUs that wait for a vCPU that does not run"),
    row(0x4000_0001, EAX, bits([12]), "the guest may have KVM not poll for it"),
    // No asynchronous page faults (4, 10, 14): one that is on its way is in no snapshot, and its task
    // would wait for ever.
    // ---- Extended leaves.
    made(row(0x8000_0000, EAX, ALL, "highest leaf")),
    row(0x8000_0000, EBX, ALL, "vendor"),
    row(0x8000_0000, ECX, ALL, "vendor"),
    row(0x8000_0000, EDX, ALL, "vendor"),
    row(0x8000_0001, EAX, ALL, "AMD: family, model, stepping"),
    row(0x8000_0001, ECX, bits([0, 5, 8]), "LAHF, LZCNT, PREFETCHW"),
    row(0x8000_0001, ECX, bits([1, 22]), "AMD: how topology is told"),
    row(
        0x8000_0001,
        ECX,
        bits([4, 6, 7, 11, 16, 21]),
        "AMD: CR8, SSE4A, misaligned SSE, XOP, FMA4, TBM",
    ),
    row(0x8000_0001, ECX, bits([9]), "AMD: which errata need no work-around; its MSRs go back"),
    row(0x8000_0001, EDX, field(0, 9) | field(12, 17) | field(23, 24), "AMD: as leaf 1"),
    row(0x8000_0001, EDX, bits([11, 20, 29]), "SYSCALL, NX, long mode"),
    row(0x8000_0001, EDX, bits([22, 25, 30, 31]), "AMD: extensions to MMX and FXSAVE, 3DNow"),
    row(0x8000_0001, EDX, bits([26, 27]), "pages of 1 GiB, RDTSCP"),
    row(0x8000_0002, EAX, ALL, "name, for people"),
    row(0x8000_0002, EBX, ALL, "name"),
    row(0x8000_0002, ECX, ALL, "name"),
    row(0x8000_0002, EDX, ALL, "name"),
    row(0x8000_0003, EAX, ALL, "name"),
    row(0x8000_0003, EBX, ALL, "name"),
    row(0x8000_0003, ECX, ALL, "name"),
    row(0x8000_0003, EDX, ALL, "name"),
    row(0x8000_0004, EAX, ALL, "name"),
    row(0x8000_0004, EBX, ALL, "name"),
    row(0x8000_0004, ECX, ALL, "name"),
    row(0x8000_0004, EDX, ALL, "name"),
    row(0x8000_0005, EAX, ALL, "AMD: TLB"),
    row(0x8000_0005, EBX, ALL, "AMD: TLB"),
    row(0x8000_0005, ECX, ALL, "AMD: L1 caches"),
    row(0x8000_0005, EDX, ALL, "AMD: L1 caches"),
    row(0x8000_0006, EAX, ALL, "AMD: TLB"),
    row(0x8000_0006, EBX, ALL, "AMD: TLB"),
    row(0x8000_0006, ECX, ALL, "L2 cache"),
    row(0x8000_0006, EDX, ALL, "AMD: L3 cache"),
    row(0x8000_0007, EDX, bits([8]), "the TSC's frequency is constant"),
    row(0x8000_0008, EAX, field(0, 23), "widths of addresses"),
    row(0x8000_0008, EBX, bits([0, 2, 9]), "AMD: CLZERO, XSAVE of error pointers, WBNOINVD"),
    row(
        0x8000_0008,
        EBX,
        bits([12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30]),
        "AMD: mitigations: IBPB, IBRS, STIBP, SSBD, PSFD, and what needs none",
    ),
    made(row(0x8000_0008, ECX, field(0, 7) | field(12, 15), "topology")),
    row(0x8000_0019, EAX, ALL, "AMD: TLB for pages of 1 GiB"),
    row(0x8000_0019, EBX, ALL, "AMD: TLB for pages of 1 GiB"),
    row(0x8000_001a, EAX, field(0, 2), "AMD: widths of the FPU"),
    row(0x8000_001d, EAX, field(0, 9), "AMD: caches"),
    made(row(0x8000_001d, EAX, field(14, 25), "AMD: caches: who shares them")),
    row(0x8000_001d, EBX, ALL, "AMD: caches: line, partitions, ways"),
    row(0x8000_001d, ECX, ALL, "AMD: caches: sets"),
    row(0x8000_001d, EDX, field(0, 1), "AMD: caches: inclusive or not"),
    made(row(0x8000_001e, EAX, ALL, "AMD: topology")),
    made(row(0x8000_001e, EBX, ALL, "AMD: topology")),
    made(row(0x8000_001e, ECX, ALL, "AMD: topology")),
    row(
        0x8000_0021,
        EAX,
        bits([0, 1, 2, 6]),
        "AMD: LFENCE serialises, null selectors clear their base",
    ),
    row(0x8000_0021, EAX, bits([10, 11]), "AMD: fast short string instructions"),
    row(
        0x8000_0021,
        EAX,
        bits([5, 8, 27, 28, 29, 30]),
        "AMD: mitigations: VERW, automatic IBRS, SBPB, SRSO",
    ),
    row(0x8000_0021, ECX, bits([1, 2]), "AMD: TSA needs no mitigation"),
    made(row(0x8000_0026, EAX, ALL, "AMD: topology")),
    made(row(0x8000_0026, EBX, ALL, "AMD: topology")),
    made(row(0x8000_0026, ECX, ALL, "AMD: topology")),
    made(row(0x8000_0026, EDX, ALL, "AMD: topology")),
];

/// Components of XSAVE: x87, SSE, AVX, AVX-512 (SDM vol. 1, 13.1).
pub const XCR0: u32 = 0b1110_0111;

/// What of a leaf goes from KVM to a guest; `None`: no bit of the leaf is for guests.
pub(super) fn mask(function: u32, index: u32) -> Option<[u32; 4]> {
    let mut mask = None;
    let rows = ROWS.iter().filter(|row| row.function == function);
    for row in rows.filter(|row| row.index.is_none_or(|of| of == index)) {
        let mask = mask.get_or_insert([0; 4]);
        if !row.made {
            mask[row.register] |= row.bits;
        }
    }
    mask
}

/// The list as a table in Markdown, a row for each register of a leaf.
pub(super) fn table() -> String {
    let mut text = String::from("| leaf | register | bits | what |\n|---|---|---|---|\n");
    for row in ROWS {
        let index = row.index.map(|index| format!(".{index}")).unwrap_or_default();
        let register = ["EAX", "EBX", "ECX", "EDX"][row.register];
        let made = if row.made { " (made)" } else { "" };
        let bits = ranges(row.bits);
        text +=
            &format!("| {:#x}{index} | {register} | {bits} | {}{made} |\n", row.function, row.why);
    }
    text
}

/// Bits as people write them: `0, 3-5`.
fn ranges(bits: u32) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for bit in (0..u32::BITS).filter(|bit| bits >> bit & 1 != 0) {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == bit => *last = bit,
            _ => ranges.push((bit, bit)),
        }
    }
    let words = ranges.into_iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn fields_and_bits() {
        assert_eq!(field(0, 31), u32::MAX);
        assert_eq!(field(8, 15), 0xff00);
        assert_eq!(field(3, 3), 8);
        assert_eq!(bits([0, 31]), 1 | 1 << 31);
        assert_eq!(ranges(bits([0, 3, 4, 5, 31])), "0, 3-5, 31");
    }

    #[test]
    fn each_bit_is_there_once_with_a_reason_and_in_order() {
        let mut seen: Vec<&Row> = Vec::new();
        for row in ROWS {
            assert!(!row.why.is_empty() && row.bits != 0 && row.register < 4);
            let same = |other: &&&Row| {
                (other.function, other.register) == (row.function, row.register)
                    && (other.index.is_none() || row.index.is_none() || other.index == row.index)
            };
            for other in seen.iter().filter(same) {
                assert_eq!(
                    other.bits & row.bits,
                    0,
                    "{:#x}: {} and {}",
                    row.function,
                    other.why,
                    row.why
                );
            }
            seen.push(row);
        }
        let keys: Vec<_> = ROWS.iter().map(|row| (row.function, row.index, row.register)).collect();
        assert!(keys.is_sorted(), "{keys:x?}");
    }

    /// All that guests may see of a leaf, made or not.
    pub(in crate::arch::x86_64::cpuid) fn visible(function: u32, index: u32) -> [u32; 4] {
        let mut visible = [0; 4];
        for row in ROWS.iter().filter(|row| row.function == function) {
            if row.index.is_none_or(|of| of == index) {
                visible[row.register] |= row.bits;
            }
        }
        visible
    }

    /// Each of them has state that a reset does not know, or is not for guests.
    #[test]
    fn what_guests_must_not_see_is_not_there() {
        let hidden: &[(u32, u32, usize, &[u32])] = &[
            (1, 0, ECX, &[2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18]),
            (1, 0, EDX, &[18, 21, 22, 29, 31]),
            (7, 0, EBX, &[2, 4, 11, 12, 14, 15, 25]),
            (7, 0, ECX, &[3, 4, 5, 7, 13, 16, 23, 24, 29, 30, 31]),
            (7, 0, EDX, &[5, 9, 11, 13, 15, 16, 18, 19, 20, 22, 24, 25, 30]),
            (7, 1, EAX, &[17, 18, 19, 21, 22, 26]),
            (0xd, 0, EAX, &[3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
            (0xd, 1, EAX, &[4]),
            (0xd, 1, ECX, &[8, 11, 12, 15]),
            (0x4000_0001, 0, EAX, &[2, 4, 10, 14, 15, 16, 17]),
            (0x8000_0001, 0, ECX, &[2, 3, 10, 12, 13, 15, 23, 24, 26, 28, 29]),
            (0x8000_0008, 0, EBX, &[1, 4]),
        ];
        for (function, index, register, bits) in hidden {
            let visible = visible(*function, *index);
            for bit in *bits {
                assert_eq!(
                    visible[*register] >> bit & 1,
                    0,
                    "leaf {function:#x}.{index} bit {bit}"
                );
            }
        }
        for function in [
            5,
            9,
            0xa,
            0xf,
            0x10,
            0x12,
            0x14,
            0x15,
            0x16,
            0x18,
            0x19,
            0x1a,
            0x1b,
            0x1c,
            0x1d,
            0x1e,
            0x23,
            0x24,
            0x4000_0002,
            0x4000_0010,
            0x8000_000a,
            0x8000_001b,
            0x8000_001c,
            0x8000_001f,
            0x8000_0020,
            0x8000_0022,
            0xc000_0001,
        ] {
            assert_eq!(mask(function, 0), None, "leaf {function:#x}");
        }
        for index in [3, 4, 8, 9, 10, 11, 12, 14, 15, 17, 18] {
            assert_eq!(mask(0xd, index), None, "component {index}");
        }
    }
}
