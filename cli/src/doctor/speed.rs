//! Times a loop of guest kernel code: does the CPU run it, or does KVM emulate it?
//!
//! The guest is one page of machine code in 64-bit mode at privilege level 0, as a kernel is:
//!
//! ```text
//! 0x1000  code: mov ecx, n; 1: dec ecx; jnz 1b; hlt
//! 0x2000  page map, one entry ──▶ 0x3000 ──▶ 0x4000, one 2 MiB page at 0
//! ```
//! There is no interrupt controller, so `hlt` ends KVM_RUN.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use firn_pages::ioctl::KVM_HAS_DEVICE_ATTR;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_regs,
    kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Instructions a second below which guest kernel code counts as emulated.
///
/// An emulator that decodes one instruction at a time was measured at 1.1 to 3.2 M/s; QEMU's
/// translated SVM, the slowest KVM that boots Linux well, at over 400 M/s; hardware runs over
/// 1,000 M/s. The threshold lies in the middle, as ratios go, between the first two; at 30 M/s Linux
/// would start in half a second.
pub const EMULATED_BELOW: f64 = 30e6;

const CODE: u64 = 0x1000;
const PAGE_MAP: u64 = 0x2000;
const DIRECTORY_POINTERS: u64 = 0x3000;
const DIRECTORY: u64 = 0x4000;
const MEMORY: usize = 0x5000;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const CR0_PE_PG: u64 = 1 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Turns of the loop, two instructions each: first few, so that the slowest KVM takes 40 ms a run;
/// many if those were quick, so that entering the guest does not count.
const TURNS: [u32; 3] = [20_000, 1_000_000, 20_000_000];

/// Long enough to trust a figure.
const ENOUGH: Duration = Duration::from_millis(5);

/// Why no figure could be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused a step.
    #[error("{0}: {1}")]
    Step(&'static str, kvm_ioctls::Error),
    /// The guest's memory could not be made.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The guest ended otherwise than by `hlt`.
    #[error("KVM_RUN ended with {0}")]
    Exit(String),
}

/// A microVM of five pages.
pub struct Probe {
    vcpu: VcpuFd,
    memory: GuestMemoryMmap,
    // After the vCPU, which belongs to it.
    _vm: VmFd,
}

impl Probe {
    /// Makes the microVM; it has not run yet.
    pub fn new(kvm: &Kvm) -> Result<Self, Error> {
        let step = |name| move |error| Error::Step(name, error);
        let vm = kvm.create_vm().map_err(step("KVM_CREATE_VM"))?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
            .map_err(|error| Error::Memory(error.to_string()))?;
        let host = memory
            .get_host_address(GuestAddress(0))
            .map_err(|error| Error::Memory(error.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a mapping of MEMORY bytes that `memory` owns. It lives in the same
        // value as the VM, is dropped after the vCPU, and nobody runs the VM after that.
        unsafe { vm.set_user_memory_region(region) }.map_err(step("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(step("KVM_CREATE_VCPU"))?;
        // A vCPU that nobody has told what it can do has no 64-bit mode, and some KVMs insist on that.
        let features = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(step("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&features).map_err(step("KVM_SET_CPUID2"))?;
        let probe = Self { vcpu, memory, _vm: vm };
        probe.write_page_tables()?;
        probe.enter_long_mode()?;
        Ok(probe)
    }

    /// Times the loop. The best of three counts: first runs pay for faults and translation, and
    /// any run may be interrupted.
    pub fn instructions_per_second(&mut self) -> Result<f64, Error> {
        let mut speed = 0.0;
        for turns in TURNS {
            let elapsed = self.run(turns)?.min(self.run(turns)?).min(self.run(turns)?);
            speed = 2.0 * f64::from(turns) / elapsed.as_secs_f64();
            if elapsed > ENOUGH {
                break;
            }
        }
        Ok(speed)
    }

    /// Whether the vCPU's time stamp counter can be offset.
    pub fn has_tsc_offset(&self) -> bool {
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET.into(),
            ..Default::default()
        };
        // SAFETY: the descriptor is a vCPU's, and the request reads the one structure that it is
        // given.
        unsafe {
            libc::ioctl(self.vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR.into(), &raw const attribute)
                == 0
        }
    }

    fn run(&mut self, turns: u32) -> Result<Duration, Error> {
        let [a, b, c, d] = turns.to_le_bytes();
        // mov ecx, turns; dec ecx; jnz -4; hlt
        let code = [0xb9, a, b, c, d, 0xff, 0xc9, 0x75, 0xfc, 0xf4];
        self.write(CODE, &code)?;
        let registers = kvm_regs { rip: CODE, rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&registers).map_err(|error| Error::Step("KVM_SET_REGS", error))?;
        let started = Instant::now();
        match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => Ok(started.elapsed()),
            Ok(other) => Err(Error::Exit(format!("{other:?}"))),
            Err(error) => Err(Error::Step("KVM_RUN", error)),
        }
    }

    fn write_page_tables(&self) -> Result<(), Error> {
        self.write(PAGE_MAP, &(DIRECTORY_POINTERS | PRESENT_WRITABLE).to_le_bytes())?;
        self.write(DIRECTORY_POINTERS, &(DIRECTORY | PRESENT_WRITABLE).to_le_bytes())?;
        self.write(DIRECTORY, &(LARGE | PRESENT_WRITABLE).to_le_bytes())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| Error::Memory(error.to_string()))
    }

    fn enter_long_mode(&self) -> Result<(), Error> {
        let step = |name| move |error| Error::Step(name, error);
        let mut special = self.vcpu.get_sregs().map_err(step("KVM_GET_SREGS"))?;
        special.cr0 |= CR0_PE_PG;
        special.cr3 = PAGE_MAP;
        special.cr4 |= CR4_PAE;
        special.efer |= EFER_LME_LMA;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 16,
            type_: 3, // data, writable, accessed
            present: 1,
            dpl: 0,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        // Code, readable, accessed; 64-bit.
        special.cs = kvm_segment { selector: 8, type_: 11, db: 0, l: 1, ..data };
        special.ds = data;
        special.es = data;
        special.fs = data;
        special.gs = data;
        special.ss = data;
        self.vcpu.set_sregs(&special).map_err(step("KVM_SET_SREGS"))
    }
}
