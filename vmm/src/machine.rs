//! The machine around the vCPUs: one fixed plan of devices in one order, and the dispatch of
//! port and MMIO exits to them.
//!
//! | MMIO window, interrupt line | device |
//! |---|---|
//! | 0 | vsock |
//! | 1 | rng |
//! | 2 … | block devices, `/dev/vda` first |
//!
//! Port space holds the reset line of a keyboard controller (0x64) and, on request, a 16550A at
//! 0x3f8. All dispatch runs on the vCPU thread that took the exit; each device has its own lock.

use std::{
    io::{self, Stderr},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
};

use firn_proto::control::{DiskKind, DiskSource, ShellConfig};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::{Serial, Trigger, serial::NoEvents};

use crate::{
    arch::{FIRST_IRQ, MMIO_BASE, MMIO_SIZE},
    console::Console,
    devices::{
        block::{Block, BlockState, Medium, MediumError},
        rng::{Rng, RngState},
        vsock::{NotQuiet, Vsock, VsockState},
    },
    handover::Lapics,
    hold,
    memory::GuestMemory,
    virtio::{
        Device, DeviceError, Halt, Interrupt, RestoreError,
        mmio::{VirtioMmio, VirtioMmioState},
    },
};

const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
const SERIAL_IRQ: u32 = 4;
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// One edge-triggered line of the in-kernel IOAPIC.
struct IrqLine {
    vm: Arc<VmFd>,
    line: u32,
}

impl IrqLine {
    fn pulse(&self) {
        // A rising edge is what counts. Synchronous on purpose: an irqfd to the IOAPIC would take
        // a detour through a kernel work queue. Neither call can fail for a line that exists.
        let _ = self.vm.set_irq_line(self.line, true);
        let _ = self.vm.set_irq_line(self.line, false);
    }
}

impl Interrupt for IrqLine {
    fn raise(&self, _: Lapics) {
        if !hold::swallows_interrupt() {
            self.pulse();
        }
    }
}

impl Trigger for IrqLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        // The serial port moves in `port_out` alone, whose caller has shown the LAPICs.
        self.pulse();
        Ok(())
    }
}

/// What a port write means beyond the device that took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortEffect {
    /// Nothing.
    None,
    /// The guest pulled the reset line.
    Reset,
}

/// Interrupts that wait for their drivers' acknowledgement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unacknowledged {
    /// Their lines, a bit each.
    pub lines: u32,
    /// Sum of these devices' acknowledgements so far: it changes when one of them comes.
    acknowledged: u32,
}

/// All devices of a microVM.
pub struct Machine {
    vsock: Mutex<VirtioMmio<Vsock>>,
    rng: Mutex<VirtioMmio<Rng>>,
    disks: Vec<Mutex<VirtioMmio<Block>>>,
    serial: Option<Mutex<SerialPort>>,
    halt: Halt,
    vm: Arc<VmFd>,
}

/// Saved state of all devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    vsock: VirtioMmioState<VsockState>,
    rng: VirtioMmioState<RngState>,
    disks: Vec<VirtioMmioState<BlockState>>,
}

/// Devices can't take a saved state.
#[derive(Debug, thiserror::Error)]
pub enum MachineRestoreError {
    /// The snapshot has another number of block devices.
    #[error("snapshot has {found} block devices, this shell has {expected}")]
    Disks {
        /// In the snapshot.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// One device refuses.
    #[error("{device}: {source}")]
    Device {
        /// Which.
        device: String,
        /// Why.
        source: RestoreError,
    },
    /// A medium does not fit its device.
    #[error("{device}: {source}")]
    Medium {
        /// Which.
        device: String,
        /// Why.
        source: MediumError,
    },
}

/// A device's lock. Device code does not panic, and if it did, the process would end before
/// anyone saw the poison (see `main`); so poison carries no information.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Makes the devices of `config`.
    pub fn new(config: &ShellConfig, memory: &Arc<GuestMemory>, vm: &Arc<VmFd>) -> Self {
        let mut next_line = FIRST_IRQ;
        let mut line = || -> Arc<dyn Interrupt> {
            let irq = IrqLine { vm: vm.clone(), line: next_line };
            next_line += 1;
            Arc::new(irq)
        };
        let vsock = VirtioMmio::new(Vsock::new(memory.clone()), memory.clone(), line());
        let rng = VirtioMmio::new(Rng::new(memory.clone()), memory.clone(), line());
        let halt = Halt::default();
        let disks = config.disks.iter().enumerate().map(|(slot, &kind)| {
            let block =
                Block::new(memory.clone(), kind, &format!("firn-disk-{slot}"), halt.clone());
            Mutex::new(VirtioMmio::new(block, memory.clone(), line()))
        });
        let disks = disks.collect();
        let serial = config.serial.then(|| Mutex::new(serial_port(vm.clone())));
        Self { vsock: Mutex::new(vsock), rng: Mutex::new(rng), disks, serial, halt, vm: vm.clone() }
    }

    /// Number of virtio devices for `disks` block devices.
    pub fn devices(disks: &[DiskKind]) -> usize {
        2 + disks.len()
    }

    /// Handles a read of a device register; what answers nowhere reads as ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some((index, offset)) = window(address) else { return };
        match index {
            0 => lock(&self.vsock).read(offset, data),
            1 => lock(&self.rng).read(offset, data),
            n => {
                if let Some(disk) = self.disks.get(n - 2) {
                    lock(disk).read(offset, data);
                }
            }
        }
    }

    /// Handles a write of a device register; queue notifications do their work here.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest did what no driver may do.
    pub fn mmio_write(&self, address: u64, data: &[u8], lapics: Lapics) -> Result<(), DeviceError> {
        let Some((index, offset)) = window(address) else { return Ok(()) };
        match index {
            0 => lock(&self.vsock).write(offset, data, lapics),
            1 => lock(&self.rng).write(offset, data, lapics),
            n => match self.disks.get(n - 2) {
                Some(disk) => lock(disk).write(offset, data, lapics),
                None => Ok(()),
            },
        }
    }

    /// Handles a port read.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(serial), true, [byte]) =
            (&self.serial, SERIAL_PORTS.contains(&port), &mut *data)
        {
            *byte = lock(serial).read((port - SERIAL_PORTS.start()) as u8);
        } else if matches!(port, I8042_DATA | I8042_COMMAND) {
            // "Input buffer empty": the guest need not wait before it pulls the reset line.
            data.fill(0);
        }
    }

    /// Handles a port write.
    pub fn port_out(&self, port: u16, data: &[u8], _: Lapics) -> PortEffect {
        match (port, data) {
            (I8042_COMMAND, [I8042_RESET]) => return PortEffect::Reset,
            (port, [byte]) if SERIAL_PORTS.contains(&port) => {
                if let Some(serial) = &self.serial {
                    // A full or closed standard error loses output, never the guest.
                    let _ = lock(serial).write((port - SERIAL_PORTS.start()) as u8, *byte);
                }
            }
            _ => {}
        }
        PortEffect::None
    }

    /// Gives the invoke connection a new host end.
    pub fn set_host_stream(&self, stream: UnixStream, moment_due: bool) {
        lock(&self.vsock).set_host_stream(stream, moment_due);
    }

    /// Moves bytes between guest and host until nothing can move.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest did what no driver may do.
    pub fn pump(&self, lapics: Lapics) -> Result<(), DeviceError> {
        lock(&self.vsock).pump(lapics)
    }

    /// What a guest that is about to run has to hear of: interrupts that could not be raised while it
    /// had no LAPICs, and what the host has sent.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest did what no driver may do.
    pub fn wake(&self, lapics: Lapics) -> Result<(), DeviceError> {
        for disk in &self.disks {
            lock(disk).raise_unacknowledged(lapics);
        }
        self.pump(lapics)
    }

    /// The guest is to stop, or runs on: with `true` vCPU threads are soon back from what they do for
    /// disks, and what is left waits for [`Self::go_on`].
    pub fn halt(&self, halt: bool) {
        self.halt.set(halt);
    }

    /// Serves what waits in disks' queues. One vCPU thread does it, before its guest runs.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest did what no driver may do.
    pub fn go_on(&self, lapics: Lapics) -> Result<(), DeviceError> {
        self.disks.iter().try_for_each(|disk| lock(disk).go_on(lapics))
    }

    /// Which interrupts wait for their drivers' acknowledgement. A device that is at work now, for a
    /// driver that is then awake, counts as acknowledged: nobody waits here for a slow disk.
    pub fn unacknowledged(&self) -> Unacknowledged {
        let mut found = Unacknowledged::default();
        let mut line = FIRST_IRQ;
        self.each(
            |acknowledged| {
                if let Some(acknowledged) = acknowledged {
                    found.lines |= 1 << line;
                    found.acknowledged = found.acknowledged.wrapping_add(acknowledged);
                }
                line += 1;
            },
            None,
        );
        found
    }

    /// Raises again what drivers have not acknowledged; how many lines that were.
    pub fn raise_unacknowledged(&self, lapics: Lapics) -> u64 {
        let mut count = 0;
        self.each(|acknowledged| count += u64::from(acknowledged.is_some()), Some(lapics));
        count
    }

    /// Tells of each device, in the order of their lines, how often its driver has acknowledged
    /// interrupts, if one waits; with `lapics` that is raised again.
    fn each(&self, mut tell: impl FnMut(Option<u32>), lapics: Option<Lapics>) {
        tell(waits(&self.vsock, lapics));
        tell(waits(&self.rng, lapics));
        self.disks.iter().for_each(|disk| tell(waits(disk, lapics)));
    }

    /// The vsock device, through which a guest hears of everything, in a line of text for people.
    pub fn describe(&self) -> String {
        lock(&self.vsock).describe()
    }

    /// Whether the host has written something that the guest has not got yet.
    pub fn host_has_bytes(&self) -> bool {
        lock(&self.vsock).host_has_bytes()
    }

    /// The host's TSC when the clocks of a guest that was restored go on, if the host has said so.
    ///
    /// # Errors
    /// The host stream's.
    pub fn take_moment(&self) -> io::Result<Option<u64>> {
        lock(&self.vsock).take_moment()
    }

    /// When the first byte from the guest reached the host, in nanoseconds of `CLOCK_MONOTONIC`.
    pub fn first_byte(&self) -> Option<u64> {
        lock(&self.vsock).first_byte()
    }

    /// Whether the machine can be saved.
    ///
    /// # Errors
    /// [`NotQuiet`] names what is still on its way.
    pub fn quiescent(&self) -> Result<(), NotQuiet> {
        lock(&self.vsock).quiescent()
    }

    /// Puts the first media in, before the guest runs.
    ///
    /// # Errors
    /// [`MachineRestoreError::Medium`].
    pub fn install(
        &self,
        sources: &[DiskSource],
        descriptors: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<(), MachineRestoreError> {
        if sources.len() != self.disks.len() {
            return Err(MachineRestoreError::Disks {
                found: sources.len(),
                expected: self.disks.len(),
            });
        }
        for (slot, (disk, &source)) in self.disks.iter().zip(sources).enumerate() {
            Medium::from_source(source, descriptors)
                .and_then(|medium| lock(disk).install(medium))
                .map_err(|source| MachineRestoreError::Medium {
                    device: disk_name(slot),
                    source,
                })?;
        }
        Ok(())
    }

    /// Replaces a medium under a guest. One whose vCPUs have no LAPICs now hears of it by [`Self::wake`].
    ///
    /// # Errors
    /// [`MediumError`]; `None`: there is no such slot.
    pub fn replace(
        &self,
        slot: usize,
        source: DiskSource,
        descriptors: &mut impl Iterator<Item = OwnedFd>,
        lapics: Option<Lapics>,
    ) -> Option<Result<(), MediumError>> {
        let disk = self.disks.get(slot)?;
        let medium = Medium::from_source(source, descriptors);
        Some(medium.and_then(|medium| lock(disk).replace(medium, lapics)))
    }

    /// The copy-on-write disks' slots, in order.
    pub fn writable_slots(kinds: &[DiskKind]) -> impl Iterator<Item = usize> {
        kinds.iter().enumerate().filter(|(_, k)| **k == DiskKind::CopyOnWrite).map(|(slot, _)| slot)
    }

    /// Writes what the guest has changed on one disk into an empty file.
    ///
    /// # Errors
    /// I/O.
    pub fn save_delta(&self, slot: usize, out: &std::fs::File) -> std::io::Result<()> {
        match self.disks.get(slot) {
            Some(disk) => lock(disk).save_delta(out).map(drop),
            None => Ok(()),
        }
    }

    /// All devices' state, while the machine is quiescent.
    pub fn save(&self) -> MachineState {
        MachineState {
            vsock: lock(&self.vsock).save(),
            rng: lock(&self.rng).save(),
            disks: self.disks.iter().map(|disk| lock(disk).save()).collect(),
        }
    }

    /// Takes over a saved state; media must have been installed before.
    ///
    /// # Errors
    /// [`MachineRestoreError`].
    pub fn restore(&self, state: &MachineState) -> Result<(), MachineRestoreError> {
        let refused = |device: &str| {
            let device = device.to_string();
            move |source| MachineRestoreError::Device { device, source }
        };
        if state.disks.len() != self.disks.len() {
            return Err(MachineRestoreError::Disks {
                found: state.disks.len(),
                expected: self.disks.len(),
            });
        }
        lock(&self.vsock).restore(&state.vsock).map_err(refused("vsock"))?;
        lock(&self.rng).restore(&state.rng).map_err(refused("rng"))?;
        for (slot, (disk, saved)) in self.disks.iter().zip(&state.disks).enumerate() {
            lock(disk).restore(saved).map_err(refused(&disk_name(slot)))?;
        }
        Ok(())
    }

    /// Goes back to the state that [`Self::restore`] took over, from any state; media stay.
    ///
    /// # Errors
    /// [`MachineRestoreError`].
    pub fn reset(&self, state: &MachineState) -> Result<(), MachineRestoreError> {
        if let Some(serial) = &self.serial {
            // A snapshot has no serial port's state: a thawed guest finds it as after power-on.
            *lock(serial) = serial_port(self.vm.clone());
        }
        self.restore(state)
    }
}

type SerialPort = Serial<IrqLine, NoEvents, Console<Stderr>>;

fn serial_port(vm: Arc<VmFd>) -> SerialPort {
    Serial::new(IrqLine { vm, line: SERIAL_IRQ }, Console::new(io::stderr()))
}

/// How often the driver has acknowledged interrupts, if it has not acknowledged the last one, which is
/// raised again with `lapics`; `None`, too, where the device is at work.
fn waits<D: Device>(device: &Mutex<VirtioMmio<D>>, lapics: Option<Lapics>) -> Option<u32> {
    let device = match device.try_lock() {
        Ok(device) => device,
        Err(TryLockError::Poisoned(poison)) => poison.into_inner(),
        Err(TryLockError::WouldBlock) => return None,
    };
    let waits = match lapics {
        Some(lapics) => device.raise_unacknowledged(lapics),
        None => device.is_unacknowledged(),
    };
    waits.then(|| device.acknowledged())
}

fn disk_name(slot: usize) -> String {
    format!("block device {slot}")
}

/// Which device's window `address` lies in, and where in it.
fn window(address: u64) -> Option<(usize, u64)> {
    let distance = address.checked_sub(MMIO_BASE)?;
    Some(((distance / MMIO_SIZE) as usize, distance % MMIO_SIZE))
}
