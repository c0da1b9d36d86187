//! Booting: loads an ELF `vmlinux` or a `bzImage` and makes the machine that the 64-bit Linux boot
//! protocol asks for (Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL"): long mode, flat
//! segments, identity-mapped low memory, `RSI` at `boot_params`.

use std::{
    fs::File,
    io::{Cursor, Read, Seek, SeekFrom},
    ops::Range,
};

use firn_pages::{PAGE, REGION, mapping::Sealed};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::{
    BzImage, Elf, KernelLoader, KernelLoaderResult,
    bootparam::{boot_e820_entry, boot_params},
};
use vm_memory::{ByteValued, Bytes, GuestAddress, ReadVolatile};

use super::mptable;
use crate::memory::{HIGH_RAM_START, Memory};

/// Where `boot_params` go.
pub const ZERO_PAGE: u64 = 0x7000;
const GDT: u64 = 0x500;
const IDT: u64 = 0x520;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
/// Longest command line in bytes, terminator included (`COMMAND_LINE_SIZE` of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
const BASE_MEMORY_END: u64 = mptable::ADDRESS;
const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Where the reset flag of the BIOS data area lies.
const RESET_FLAG: u64 = 0x472;
/// Reset flag: warm reset. See [`cmdline`].
const RESET_WARM: u16 = 0x1234;

/// A kernel can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is neither ELF nor bzImage.
    #[error("not a kernel: starts with {found:02x?}, neither an ELF nor a bzImage header")]
    NotAKernel {
        /// First bytes of the file.
        found: Vec<u8>,
    },
    /// The file says that it is a kernel but can't be loaded.
    #[error("cannot load the {format} kernel: {reason}")]
    Load {
        /// `ELF` or `bzImage`.
        format: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Kernel and initramfs don't fit into guest memory.
    #[error(
        "initramfs of {bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and the end of low memory at {low_end:#x}"
    )]
    InitramfsTooLarge {
        /// Its length.
        bytes: u64,
        /// First free guest address.
        kernel_end: u64,
        /// End of low RAM.
        low_end: u64,
    },
    /// The command line is too long or holds a NUL.
    #[error("kernel command line of {0} bytes: at most 2047 without NUL")]
    Cmdline(usize),
    /// Reading a file failed.
    #[error("cannot read the {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Writing boot structures failed (guest memory is too small).
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Appends what this machine needs to a kernel command line.
///
/// `reboot=k` makes the guest leave through the keyboard controller's reset line, one port write
/// that the VMM sees. `panic_warm` makes a panicking kernel, and only it, set the BIOS reset flag
/// to *warm* first: so the VMM tells a panic from an orderly reset without any console.
pub fn cmdline(base: &str, devices: usize) -> Result<String, BootError> {
    let mut line = format!("{base} reboot=k,panic_warm");
    for index in 0..devices as u64 {
        let address = super::MMIO_BASE + index * super::MMIO_SIZE;
        let irq = u64::from(super::FIRST_IRQ) + index;
        line.push_str(&format!(" virtio_mmio.device=4K@{address:#x}:{irq}"));
    }
    if line.len() >= CMDLINE_MAX || line.contains('\0') {
        return Err(BootError::Cmdline(line.len()));
    }
    Ok(line)
}

/// Whether the guest that has just asked for a reset panicked.
pub fn panicked(memory: &Memory) -> bool {
    memory.guest().read_obj::<u16>(GuestAddress(RESET_FLAG)).is_ok_and(|flag| flag == RESET_WARM)
}

/// Regions of 2 MiB, by number, that every boot writes, those that are sure first: boot parameters,
/// the kernel (at 16 MiB, as long as its file of `kernel_bytes`), and below the end of low RAM the
/// initramfs and what Linux allocates first (measured: its map of pages, per-CPU data, hash tables).
/// They don't overlap.
pub fn written_first(low_bytes: u64, kernel_bytes: u64) -> [Range<u64>; 3] {
    const KERNEL: u64 = 0x100_0000 / REGION;
    const AT_THE_TOP: u64 = 3;
    let end = low_bytes / REGION;
    let kernel_end = KERNEL.saturating_add(kernel_bytes.div_ceil(REGION)).min(end);
    let top = end.saturating_sub(AT_THE_TOP).max(kernel_end).max(1);
    [0..1, KERNEL..kernel_end, top..end]
}

/// Loads kernel, initramfs, command line, MP table and boot parameters for a machine of `devices`
/// virtio devices; returns the entry point.
///
/// # Errors
/// Any [`BootError`].
pub fn load(
    memory: &Memory,
    kernel: &mut File,
    initramfs: Option<&mut File>,
    cmdline: &str,
    vcpus: u8,
    devices: usize,
) -> Result<u64, BootError> {
    let guest = memory.guest().as_ref();
    let (loaded, entry) = load_kernel(memory, kernel)?;
    let low_end = memory.regions()[0].bytes;

    let mut params = boot_params::default();
    if let Some(header) = loaded.setup_header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = 0xaa55;
        params.hdr.header = 0x5372_6448;
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some(file) = initramfs {
        let (address, bytes) = load_initramfs(memory, file, loaded.kernel_end, low_end)?;
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }
    for (index, (start, end)) in e820(memory).into_iter().enumerate() {
        params.e820_table[index] =
            boot_e820_entry { addr: start, size: end - start, r#type: 1 /* RAM */ };
        params.e820_entries = index as u8 + 1;
    }

    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    if line.len() > CMDLINE_MAX {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    guest.write_slice(&line, GuestAddress(CMDLINE))?;
    guest.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))?;
    guest.write_obj(0u16, GuestAddress(RESET_FLAG))?;
    mptable::write(guest, vcpus, devices)?;
    write_page_tables(memory)?;
    write_gdt(memory)?;
    Ok(entry)
}

/// A sealed file is copied straight from its pages, any other one is read.
fn load_kernel(memory: &Memory, kernel: &mut File) -> Result<(KernelLoaderResult, u64), BootError> {
    match Sealed::map(&*kernel) {
        Ok(content) => load_image(memory, &mut Cursor::new(&*content)),
        Err(_) => load_image(memory, kernel),
    }
}

fn load_image<F>(memory: &Memory, kernel: &mut F) -> Result<(KernelLoaderResult, u64), BootError>
where
    F: Read + ReadVolatile + Seek,
{
    let read_error = |source| BootError::Read { what: "kernel", source };
    let mut head = Vec::new();
    kernel.rewind().map_err(read_error)?;
    kernel.by_ref().take(0x206).read_to_end(&mut head).map_err(read_error)?;
    kernel.rewind().map_err(read_error)?;
    let guest = memory.guest().as_ref();
    if head.starts_with(b"\x7fELF") {
        let loaded = Elf::load(guest, None, kernel, Some(GuestAddress(HIGH_MEMORY_START)))
            .map_err(|e| BootError::Load { format: "ELF", reason: e.to_string() })?;
        let entry = loaded.kernel_load.0;
        Ok((loaded, entry))
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        let loaded = BzImage::load(guest, None, kernel, Some(GuestAddress(HIGH_MEMORY_START)))
            .map_err(|e| BootError::Load { format: "bzImage", reason: e.to_string() })?;
        // "The kernel is entered at load address + 0x200" (64-bit boot protocol).
        let entry = loaded.kernel_load.0 + 0x200;
        // The image unpacks itself within init_size bytes of where it is told to run: keep the
        // initramfs out of there.
        let header = loaded.setup_header.unwrap_or_default();
        let runs_at = header.pref_address.max(loaded.kernel_load.0);
        let mut loaded = loaded;
        loaded.kernel_end =
            loaded.kernel_end.max(runs_at.saturating_add(u64::from(header.init_size)));
        Ok((loaded, entry))
    } else {
        head.truncate(8);
        Err(BootError::NotAKernel { found: head })
    }
}

/// Puts the initramfs at the top of low RAM, page aligned.
fn load_initramfs(
    memory: &Memory,
    file: &mut File,
    kernel_end: u64,
    low_end: u64,
) -> Result<(u64, u64), BootError> {
    let read_error = |source| BootError::Read { what: "initramfs", source };
    let bytes = file.seek(SeekFrom::End(0)).map_err(read_error)?;
    file.rewind().map_err(read_error)?;
    let too_large = BootError::InitramfsTooLarge { bytes, kernel_end, low_end };
    let Some(address) = low_end.checked_sub(bytes).map(|top| top & !(PAGE - 1)) else {
        return Err(too_large);
    };
    if address < kernel_end {
        return Err(too_large);
    }
    match Sealed::map(&*file) {
        Ok(content) if content.len() as u64 == bytes => {
            memory.guest().write_slice(&content, GuestAddress(address))?;
        }
        _ => memory
            .guest()
            .read_exact_volatile_from(GuestAddress(address), file, bytes as usize)
            .map_err(|e| read_error(std::io::Error::other(e)))?,
    }
    Ok((address, bytes))
}

/// RAM as `(start, end)`: base memory below the MP table, then all from 1 MiB.
fn e820(memory: &Memory) -> Vec<(u64, u64)> {
    let mut map = vec![(0, BASE_MEMORY_END), (HIGH_MEMORY_START, memory.regions()[0].bytes)];
    if let Some(high) = memory.regions().get(1) {
        map.push((HIGH_RAM_START, HIGH_RAM_START + high.bytes));
    }
    map
}

/// 4 GiB identity mapped by 2 MiB pages: all that a kernel, its parameters and a decompressor may
/// touch before they make their own tables.
fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let guest = memory.guest().as_ref();
    guest.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    // Each access to guest memory looks its region up: one for all of a table's entries.
    let mut table = [0u8; PAGE as usize];
    for gib in 0..4u64 {
        let directory = PAGE_DIRECTORIES + gib * PAGE;
        guest.write_obj(directory | PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
        for (entry, bytes) in (0u64..).zip(table.chunks_exact_mut(8)) {
            let page = (gib << 30) | (entry << 21) | PRESENT_WRITABLE | LARGE;
            bytes.copy_from_slice(&page.to_le_bytes());
        }
        guest.write_slice(&table, GuestAddress(directory))?;
    }
    Ok(())
}

/// Segment descriptors at the selectors that the boot protocol names: code 0x10, data 0x18.
const GDT_TABLE: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // 64-bit code
    0x00cf_9300_0000_ffff, // data
    0x008f_8b00_0000_ffff, // TSS
];

fn write_gdt(memory: &Memory) -> Result<(), BootError> {
    let guest = memory.guest().as_ref();
    for (index, entry) in GDT_TABLE.iter().enumerate() {
        guest.write_obj(*entry, GuestAddress(GDT + index as u64 * 8))?;
    }
    guest.write_obj(0u64, GuestAddress(IDT))?;
    Ok(())
}

fn segment(index: u16) -> kvm_segment {
    let entry = GDT_TABLE[usize::from(index)];
    let bits = |low: u32, count: u32| ((entry >> low) & ((1 << count) - 1)) as u32;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: bits(40, 4) as u8,
        s: bits(44, 1) as u8,
        dpl: bits(45, 2) as u8,
        present: bits(47, 1) as u8,
        avl: bits(52, 1) as u8,
        l: bits(53, 1) as u8,
        db: bits(54, 1) as u8,
        g: bits(55, 1) as u8,
        unusable: 0,
        padding: 0,
    }
}

/// General registers at the kernel's entry point.
pub fn entry_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rflags: 2,
        rsp: 0x8ff0,
        rbp: 0x8ff0,
        ..Default::default()
    }
}

/// Turns the special registers of a fresh vCPU into those of the boot protocol.
pub fn entry_sregs(mut sregs: kvm_sregs) -> kvm_sregs {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    sregs.cs = segment(2);
    let data = segment(3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(4);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, (GDT_TABLE.len() * 8 - 1) as u16);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 7);
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    sregs
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(contents: &[u8]) -> File {
        let mut file: File =
            rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.write_all(contents).unwrap();
        file
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_its_first_bytes() {
        let memory = Memory::reserve(16).unwrap();
        for contents in [&b""[..], b"#!/bin/sh\n", &[0u8; 4096]] {
            let error = load(&memory, &mut file(contents), None, "", 1, 0).unwrap_err();
            assert!(matches!(error, BootError::NotAKernel { .. }), "{error}");
        }
        let error =
            load(&memory, &mut file(b"\x7fELF but then nothing"), None, "", 1, 0).unwrap_err();
        assert!(matches!(error, BootError::Load { format: "ELF", .. }), "{error}");
    }

    #[test]
    fn cmdline_names_each_device_and_is_bounded() {
        let line = cmdline("quiet", 2).unwrap();
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5"));
        assert!(line.contains("virtio_mmio.device=4K@0xd0001000:6"));
        assert!(matches!(cmdline(&"x".repeat(2048), 0), Err(BootError::Cmdline(_))));
    }

    #[test]
    fn regions_written_first_are_disjoint_and_within_low_memory() {
        const MIB: u64 = 1 << 20;
        assert_eq!(written_first(128 * MIB, 16_246_976), [0..1, 8..16, 61..64]);
        for low in [16, 18, 20, 22, 24, 30, 3072] {
            for kernel in [0, 1, 3 * MIB, 16 * MIB, 10_000 * MIB, u64::MAX] {
                let mut next = 0;
                for range in written_first(low * MIB, kernel) {
                    if range.is_empty() {
                        continue;
                    }
                    assert!(range.start >= next && range.end * 2 <= low, "{low} {kernel}");
                    next = range.end;
                }
            }
        }
    }

    #[test]
    fn four_gib_are_identity_mapped() {
        let memory = Memory::reserve(16).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |at| memory.guest().read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(read(PML4) & !0xfff, PDPT);
        for address in [0, 0x100_0000, 0xfee0_0000u64] {
            let directory = read(PDPT + (address >> 30) * 8) & !0xfff;
            let entry = read(directory + (address >> 21) % 512 * 8);
            assert_eq!((entry & !0xfff, entry & 0xfff), (address & !0x1f_ffff, 0x83));
        }
    }

    #[test]
    fn segments_are_64_bit_code_and_flat_data() {
        assert_eq!((segment(2).l, segment(2).type_, segment(2).selector), (1, 0xb, 0x10));
        assert_eq!((segment(3).l, segment(3).type_, segment(3).selector), (0, 0x3, 0x18));
    }

    #[test]
    fn an_initramfs_that_does_not_fit_is_refused() {
        let memory = Memory::reserve(16).unwrap();
        let mut large = file(b"");
        large.set_len(17 << 20).unwrap();
        let low = memory.regions()[0].bytes;
        assert!(matches!(
            load_initramfs(&memory, &mut large, 0x100_0000, low),
            Err(BootError::InitramfsTooLarge { .. })
        ));
    }
}
