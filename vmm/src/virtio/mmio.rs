//! The modern MMIO transport, version 2 (virtio 1.2 §4.2.2): a register file around one device.
//!
//! ```text
//!  0x000 magic, version, IDs      0x044 QueueReady       0x080… ring addresses
//!  0x010 features                 0x050 QueueNotify      0x0fc  ConfigGeneration
//!  0x030 queue selection, size    0x060 interrupts       0x100… device configuration
//!                                 0x070 Status           0x1000 end of the window
//! ```
//!
//! The register file must never let the guest choose when a device runs on rings that were not
//! checked: a ring is checked when the driver sets it ready, or when a snapshot says it was, and
//! devices run only between `DRIVER_OK` and reset. See [`super`] for what a rule breaker gets.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
        VIRTIO_F_VERSION_1,
    },
    virtio_mmio::{
        VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
        VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
        VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
        VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
    },
};

use super::{
    Device, DeviceError, Interrupt, RestoreError,
    queue::{Queues, Ring, RingState},
};
use crate::{handover::Lapics, memory::GuestMemory};

/// Bytes of guest physical address space of one device.
pub const WINDOW: u64 = 0x1000;

/// Version of [`VirtioMmioState`].
pub const STATE_VERSION: u16 = 1;

/// "virt" in little endian.
const MAGIC: u32 = 0x7472_6976;
/// "FIRN" in little endian.
const VENDOR: u32 = 0x4e52_4946;

const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// What a snapshot keeps of a device and its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmioState<S> {
    version: u16,
    device_version: u16,
    registers: Registers,
    rings: Vec<RingState>,
    device: S,
}

/// The registers that hold a value of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    /// What the driver accepted.
    features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    status: u32,
    config_generation: u32,
}

/// A device behind its registers.
pub struct VirtioMmio<D> {
    pub(crate) device: D,
    pub(crate) queues: Queues,
    registers: Registers,
    interrupt: Arc<dyn Interrupt>,
    acknowledged: u32,
}

impl<D: Device> VirtioMmio<D> {
    /// A device as it is after power-on.
    pub fn new(device: D, memory: Arc<GuestMemory>, interrupt: Arc<dyn Interrupt>) -> Self {
        let queues = Queues::new(memory, D::QUEUES);
        Self { device, queues, registers: Registers::default(), interrupt, acknowledged: 0 }
    }

    /// The device behind the registers.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The guest reads `data.len()` bytes at `offset` of the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            if let Ok(offset) = usize::try_from(offset - CONFIG) {
                self.device.read_config(offset, data);
            }
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.register(offset as u32).to_le_bytes();
        }
    }

    /// The guest writes `data` at `offset` of the window. A kick is handled before this returns.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest did what no driver may do. The device then has
    /// `DEVICE_NEEDS_RESET` and ignores kicks until the driver resets it.
    pub fn write(&mut self, offset: u64, data: &[u8], lapics: Lapics) -> Result<(), DeviceError> {
        // No device here has writable configuration.
        let Ok(data) = <[u8; 4]>::try_from(data) else { return Ok(()) };
        if offset >= CONFIG || !offset.is_multiple_of(4) {
            return Ok(());
        }
        let result = self.set_register(offset as u32, u32::from_le_bytes(data), lapics);
        self.stop_on_error(result)
    }

    /// Tells the driver that device configuration has changed. Without LAPICs it hears of it by
    /// [`Self::raise_unacknowledged`].
    pub fn config_changed(&mut self, lapics: Option<Lapics>) {
        let registers = &mut self.registers;
        registers.config_generation = registers.config_generation.wrapping_add(1);
        if registers.status & DRIVER_OK != 0 {
            registers.interrupt_status |= VIRTIO_MMIO_INT_CONFIG;
            if let Some(lapics) = lapics {
                self.interrupt.raise(lapics);
            }
        }
    }

    /// Whether an interrupt waits for the driver's acknowledgement (`InterruptACK`, §4.2.2).
    pub fn is_unacknowledged(&self) -> bool {
        self.registers.interrupt_status != 0
    }

    /// How often the driver has acknowledged interrupts. It wraps.
    pub fn acknowledged(&self) -> u32 {
        self.acknowledged
    }

    /// Raises the line again if the driver has not acknowledged what it was raised for; whether it
    /// was. To a driver that is about to it does no harm: it finds nothing to do.
    pub fn raise_unacknowledged(&self, lapics: Lapics) -> bool {
        if self.is_unacknowledged() {
            self.interrupt.raise(lapics);
        }
        self.is_unacknowledged()
    }

    /// Interrupt status and the queues' indices, in a line of text for people.
    pub fn describe(&self) -> String {
        let registers = &self.registers;
        format!(
            "status {:#x}, interrupt status {:#x}, queues {}",
            registers.status,
            registers.interrupt_status,
            self.queues.describe()
        )
    }

    /// What a snapshot has to keep.
    pub fn save(&self) -> VirtioMmioState<D::State> {
        VirtioMmioState {
            version: STATE_VERSION,
            device_version: D::VERSION,
            registers: self.registers.clone(),
            rings: self.queues.save(),
            device: self.device.save(),
        }
    }

    /// Goes to a saved state, from any state. Neither touches guest memory nor raises the line: a
    /// pending interrupt is part of the irqchip's state. An error leaves the device as it was.
    ///
    /// # Errors
    /// [`RestoreError`] if the state, which is not trusted, can't be one of this device.
    pub fn restore(&mut self, state: &VirtioMmioState<D::State>) -> Result<(), RestoreError> {
        let device = D::ID;
        let found = (state.version, state.device_version);
        let supported = (STATE_VERSION, D::VERSION);
        if found != supported {
            return Err(RestoreError::Version { device, found, supported });
        }
        let registers = &state.registers;
        let offered = self.offered();
        let status = registers.status;
        // Until `FEATURES_OK` the register holds a wish, which `set_status` judges.
        if status & FEATURES_OK != 0 && registers.features & !offered != 0 {
            return Err(RestoreError::Features { device, found: registers.features, offered });
        }
        let wrong = |register, found| RestoreError::Register { device, register, found };
        let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
        let unnegotiated = status & FEATURES_OK != 0 && registers.features & VERSION_1 == 0;
        let early = status & DRIVER_OK != 0 && status & FEATURES_OK == 0;
        if status & !known != 0 || unnegotiated || early {
            return Err(wrong("Status", status));
        }
        if registers.interrupt_status & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(wrong("InterruptStatus", registers.interrupt_status));
        }
        if state.rings.len() != D::QUEUES.len() {
            return Err(RestoreError::QueueCount {
                device,
                found: state.rings.len(),
                expected: D::QUEUES.len(),
            });
        }
        let queues = self
            .queues
            .restored(&state.rings)
            .map_err(|source| RestoreError::Queue { device, source })?;
        if queues.any_ready() && status & FEATURES_OK == 0 {
            return Err(wrong("Status", status));
        }
        self.device.restore(&state.device)?;
        self.queues = queues;
        self.registers = registers.clone();
        Ok(())
    }

    /// Runs `work` on device and queues if the driver is up, then raises the interrupt if the
    /// driver wants it: how a device moves without a kick.
    pub(crate) fn drive(
        &mut self,
        lapics: Lapics,
        work: impl FnOnce(&mut D, &mut Queues) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let result = self.drive_inner(lapics, work);
        self.stop_on_error(result)
    }

    fn drive_inner(
        &mut self,
        lapics: Lapics,
        work: impl FnOnce(&mut D, &mut Queues) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if self.registers.status & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            return Ok(());
        }
        work(&mut self.device, &mut self.queues)?;
        if self.queues.take_interrupt()? {
            // The status first: the handler may run at once, on another vCPU.
            self.registers.interrupt_status |= VIRTIO_MMIO_INT_VRING;
            self.interrupt.raise(lapics);
        }
        Ok(())
    }

    fn stop_on_error(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.registers.status |= NEEDS_RESET;
        }
        result
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn selected(&mut self) -> Option<&mut Ring> {
        self.queues.ring(self.registers.queue_sel as usize)
    }

    fn register(&mut self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => 2,
            VIRTIO_MMIO_DEVICE_ID => D::ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.registers.device_features_sel {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |ring| ring.max().into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected().is_some_and(|ring| ring.is_ready()).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.registers.interrupt_status,
            VIRTIO_MMIO_STATUS => self.registers.status,
            // No shared memory region exists: length and base of each are -1.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.registers.config_generation,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u32, value: u32, lapics: Lapics) -> Result<(), DeviceError> {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.registers.status & FEATURES_OK == 0 => {
                let half = &mut self.registers.features;
                match self.registers.driver_features_sel {
                    0 => set_low(half, value),
                    1 => set_high(half, value),
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM => self.configure(|ring| ring.size = value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.configure(|r| set_low(&mut r.descriptors, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.configure(|r| set_high(&mut r.descriptors, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.configure(|r| set_low(&mut r.available, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.configure(|r| set_high(&mut r.available, value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.configure(|r| set_low(&mut r.used, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.configure(|r| set_high(&mut r.used, value)),
            VIRTIO_MMIO_QUEUE_READY => return self.set_ready(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.kick(value, lapics),
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.registers.interrupt_status &= !value;
                self.acknowledged = self.acknowledged.wrapping_add(1);
            }
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => {}
        }
        Ok(())
    }

    /// Whether the driver may set up queues now (§3.1.1).
    fn may_configure(&self) -> bool {
        self.registers.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK
    }

    fn configure(&mut self, set: impl FnOnce(&mut Ring)) {
        if self.may_configure()
            && let Some(ring) = self.selected()
            && !ring.is_ready()
        {
            set(ring);
        }
    }

    fn set_ready(&mut self, value: u32) -> Result<(), DeviceError> {
        let may_configure = self.may_configure();
        let index = self.registers.queue_sel as usize;
        let Some(ring) = self.queues.ring(index) else { return Ok(()) };
        if value == 0 {
            ring.disable();
        } else if may_configure && !ring.is_ready() {
            self.queues.enable(index)?;
        }
        Ok(())
    }

    fn kick(&mut self, queue: u32, lapics: Lapics) -> Result<(), DeviceError> {
        let queue = queue as usize;
        if !self.queues.ring(queue).is_some_and(|ring| ring.is_ready()) {
            return Ok(());
        }
        self.drive_inner(lapics, |device, queues| device.notify(queue, queues))
    }

    fn set_status(&mut self, value: u32) {
        let registers = &mut self.registers;
        if value == 0 {
            let config_generation = registers.config_generation;
            *registers = Registers { config_generation, ..Registers::default() };
            self.queues.reset();
            self.device.reset();
            return;
        }
        let mut status =
            registers.status | value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        let features = registers.features;
        // A driver that gets neither bit to stick has to give up (§3.1.1 steps 6 and 8).
        if features & !self.offered() != 0 || features & VERSION_1 == 0 {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.registers.status = status;
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
