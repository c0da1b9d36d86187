//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): how a kernel without ACPI
//! learns of its CPUs, its IOAPIC and where interrupt lines go.

use vm_memory::{Bytes, GuestAddress};

use super::{FIRST_IRQ, IOAPIC_PINS};
use crate::memory::GuestMemory;

/// Where the table goes: the last KiB of base memory, one of the places where an OS must look.
pub const ADDRESS: u64 = 0x9_fc00;

const SPACE: usize = 1024;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

/// Lines that are listed whatever devices there are: the timer's, without which Linux looks for it
/// elsewhere, and the serial port's.
const FIXED_LINES: [u8; 2] = [0, 4];

/// Writes the table for `vcpus` vCPUs and `devices` virtio devices.
///
/// # Errors
/// If guest memory ends below the table.
pub fn write(
    memory: &GuestMemory,
    vcpus: u8,
    devices: usize,
) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&table(vcpus, devices), GuestAddress(ADDRESS))
}

/// Interrupt lines that something is connected to.
fn lines(devices: usize) -> impl Iterator<Item = u8> {
    FIXED_LINES.into_iter().chain((FIRST_IRQ as u8..IOAPIC_PINS as u8).take(devices))
}

/// Floating pointer structure followed by the configuration table.
fn table(vcpus: u8, devices: usize) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        // Enabled; the first is the bootstrap processor. Signature and features as of a CPU with
        // an FPU and an APIC; kernels take the real ones from CPUID.
        let flags = if id == 0 { 3 } else { 1 };
        let mut processor = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags];
        processor.extend_from_slice(&0x600u32.to_le_bytes());
        processor.extend_from_slice(&0x201u32.to_le_bytes());
        processor.extend_from_slice(&[0; 8]);
        entry(&processor);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1];
    ioapic.extend_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    entry(&ioapic);
    // The guest sets up each line that is listed: a dozen accesses to the IOAPIC, a descriptor, and
    // files in sysfs.
    for line in lines(devices) {
        // Vectored interrupt, polarity and trigger as the bus has them (ISA: rising edge).
        entry(&[ENTRY_INTERRUPT, 0, 0, 0, 0, line, ioapic_id, line]);
    }
    // LINT0 takes the PIC (ExtINT), LINT1 the NMI, on all processors.
    entry(&[ENTRY_LOCAL_INTERRUPT, 3, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut header = Vec::from(*b"PCMP");
    header.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    header.extend_from_slice(&[4, 0]); // revision 1.4, checksum
    header.extend_from_slice(b"FIRN    MICROVM     ");
    header.extend_from_slice(&[0; 6]); // no OEM table
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    header.extend_from_slice(&[0; 4]); // no extended table
    header.extend_from_slice(&entries);
    header[7] = checksum(&header);

    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend_from_slice(&(ADDRESS as u32 + 16).to_le_bytes());
    // One paragraph long, revision 1.4, checksum, no default configuration, virtual wire mode.
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);

    pointer.extend_from_slice(&header);
    debug_assert!(pointer.len() <= SPACE);
    pointer
}

/// The byte that makes all of `bytes` (with 0 in its own place) sum to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_sum_to_zero_and_fit() {
        for (vcpus, devices) in (1..=8).flat_map(|vcpus| [(vcpus, 0), (vcpus, 5), (vcpus, 19)]) {
            let table = table(vcpus, devices);
            assert!(table.len() <= SPACE, "{vcpus} vCPUs need {} bytes", table.len());
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            let length = u16::from_le_bytes([table[20], table[21]]) as usize;
            assert_eq!(length, table.len() - 16);
            let entries = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 2 + devices as u16 + 2);
        }
    }

    #[test]
    fn lines_that_lead_somewhere_are_listed() {
        assert_eq!(lines(3).collect::<Vec<_>>(), [0, 4, 5, 6, 7]);
        assert_eq!(lines(1000).last(), Some(IOAPIC_PINS as u8 - 1));
    }
}
