//! x86_64: guest-physical layout, boot, CPUID, and the state of a VM and its vCPUs.
//!
//! ```text
//! 0x0000_0472  reset flag: a panicking kernel leaves 0x1234 here (see `cmdline`)
//! 0x0000_0500  GDT, IDT
//! 0x0000_7000  boot_params ("zero page")
//! 0x0000_9000  PML4, PDPT, 4 page directories: 4 GiB identity mapped by 2 MiB pages
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  MP table (top KiB of base memory, where Linux looks for it)
//! 0x0010_0000  bzImage; 0x0100_0000 vmlinux
//!    …         initramfs at the top of low RAM
//! 0xd000_0000  virtio-mmio devices, 4 KiB each
//! 0xfec0_0000  IOAPIC; 0xfee0_0000 LAPIC
//! 0xfffb_c000  identity-map page and TSS of KVM on Intel
//! ```

pub mod boot;
pub mod confine;
pub mod cpuid;
pub mod describe;
pub mod inventory;
pub mod mptable;
pub mod msrs;
pub mod tsc;
pub mod vcpu_state;
pub mod vm_state;

/// First byte of the MMIO window of device 0.
pub const MMIO_BASE: u64 = 0xd000_0000;

/// Bytes of one device's MMIO window.
pub const MMIO_SIZE: u64 = 0x1000;

/// Interrupt line (IOAPIC pin) of device 0; the following devices take the following lines.
pub const FIRST_IRQ: u32 = 5;

/// Number of IOAPIC pins.
pub const IOAPIC_PINS: u32 = 24;

/// Where KVM on Intel keeps the page tables of a vCPU in real mode.
pub const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Where KVM on Intel keeps the TSS of a vCPU in real mode (three pages).
pub const TSS_ADDRESS: usize = 0xfffb_d000;
