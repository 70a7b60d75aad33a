//! The virtio-mmio transport, register layout version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//! reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK      DEVICE_NEEDS_RESET, FAILED: wait for reset
//!                         features    queues         the device runs
//! ```
//!
//! A register is accepted only in the phase named under the arrow it belongs to; a write out of phase is
//! ignored with a log line, so a confused driver cannot change queues under a running device. The driver may
//! only add status bits; writing 0 resets.

use std::sync::Arc;

use thiserror::Error;
use tracing::debug;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use super::persist::{QueueRecord, TransportState};
use super::ring::Queues;
use super::slot::{Model, Shared};
use super::{Interrupt, InterruptLine, MAX_QUEUES};
use crate::bus::BusDevice;
use crate::devices::complaints::{Complaints, complain};

/// Length of the register window in bytes.
pub const WINDOW: u64 = 0x1000;

/// Offset of the QueueNotify register: an ioeventfd for queue `n` goes here with datamatch `n`, 4 bytes long.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// The register layout of virtio 1.0 and later.
const VERSION: u32 = 2;
/// "OUTL"; drivers only show it.
const VENDOR: u32 = 0x4c54_554f;

const KNOWN_STATUS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
const KNOWN_INTERRUPTS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

/// Why a saved state does not fit this transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TransportRestoreError {
    /// The state belongs to another kind of device.
    #[error("the state is of virtio device type {found}, but this is type {expected}")]
    DeviceType {
        /// What the state says.
        found: u32,
        /// What this device is.
        expected: u32,
    },
    /// The device has another number of queues.
    #[error("the state has {found} queues, but this device has {expected}")]
    QueueCount {
        /// What the state says.
        found: u32,
        /// What this device has.
        expected: u32,
    },
    /// The driver had accepted features this device does not have.
    #[error("the driver uses features {0:#x}, which this device does not have")]
    Features(u64),
    /// No driver can have brought the device into this status.
    #[error("the status {0:#x} is impossible")]
    Status(u32),
    /// No device has raised these interrupts.
    #[error("the interrupt status {0:#x} is impossible")]
    InterruptStatus(u32),
    /// A queue has an impossible size, or lies outside guest memory.
    #[error("queue {0} has an impossible size or lies outside guest memory")]
    Queue(usize),
    /// The driver was ready but a queue the device needs was not.
    #[error("the device cannot continue: {0}")]
    Activate(#[from] super::ActivateError),
}

/// The registers of one device.
pub struct MmioTransport<M: GuestMemory, D: Model<M>> {
    memory: Arc<M>,
    device: Arc<Shared<M, D>>,
    line: Arc<InterruptLine>,
    /// Status register without DEVICE_NEEDS_RESET, which the device sets through the line.
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    config_generation: u32,
    queues: [QueueRecord; MAX_QUEUES],
    queue_count: usize,
    complaints: Complaints,
}

impl<M, D> MmioTransport<M, D>
where
    M: GuestMemory + Send + Sync + 'static,
    D: Model<M>,
{
    /// A transport after power-on.
    ///
    /// # Panics
    ///
    /// If the device has more than [`MAX_QUEUES`] queues.
    pub(super) fn new(memory: Arc<M>, device: Arc<Shared<M, D>>, interrupt: Arc<dyn Interrupt>) -> Self {
        let queue_count = device.identity.queue_sizes.len();
        assert!(queue_count <= MAX_QUEUES, "a device has at most {MAX_QUEUES} queues");
        let mut transport = Self {
            memory,
            device,
            line: Arc::new(InterruptLine::new(interrupt)),
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            config_generation: 0,
            queues: Default::default(),
            queue_count,
            complaints: Complaints::default(),
        };
        transport.clear();
        transport
    }

    /// The device's line to the driver.
    #[cfg(test)]
    pub(super) fn line(&self) -> &Arc<InterruptLine> {
        &self.line
    }

    /// Status register as the driver reads it.
    pub fn status(&self) -> u32 {
        if self.line.needs_reset() { self.status | NEEDS_RESET } else { self.status }
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.status & DRIVER_OK != 0 {
            self.line.signal_config();
        }
    }

    /// The state from which the device can continue elsewhere. Needs stopped vCPUs and a closed gate; does
    /// not allocate.
    pub fn save(&self) -> TransportState {
        let mut queues = self.queues;
        if let Some(at_work) = &self.device.core().queues {
            for (index, queue) in queues.iter_mut().enumerate() {
                if let Some(positions) = at_work.positions(index) {
                    (queue.next_avail, queue.next_used) = positions;
                }
            }
        }
        TransportState {
            device_type: self.device.identity.device_type,
            status: self.status(),
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.line.status(),
            config_generation: self.config_generation,
            queue_count: self.queue_count as u32,
            queues,
        }
    }

    /// Loads a saved state; guest memory must be in place already. The state is refused as a whole if any
    /// part of it is impossible, and the device is then as after a reset.
    ///
    /// The state cannot hold notifications and interrupts that were under way. So the caller that lets the
    /// device go live must kick every queue and raise the interrupt once.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), TransportRestoreError> {
        self.reset();
        self.check(state)?;
        self.status = state.status & !NEEDS_RESET;
        self.driver_features = state.driver_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.config_generation = state.config_generation;
        self.queues = state.queues;
        self.line.set(state.interrupt_status, state.status & NEEDS_RESET != 0);
        // A device that waits for its reset must not touch the queues again.
        if state.status & DRIVER_OK != 0 && state.status & NEEDS_RESET == 0 {
            self.activate().inspect_err(|_| self.reset())?;
        }
        Ok(())
    }

    fn check(&self, state: &TransportState) -> Result<(), TransportRestoreError> {
        use TransportRestoreError as Error;
        let expected = self.device.identity.device_type;
        if state.device_type != expected {
            return Err(Error::DeviceType { found: state.device_type, expected });
        }
        let expected = self.queue_count as u32;
        if state.queue_count != expected {
            return Err(Error::QueueCount { found: state.queue_count, expected });
        }
        let (status, features) = (state.status, state.driver_features);
        let needs = |bit, before| status & bit == 0 || status & before == before;
        if status & !KNOWN_STATUS != 0
            || !needs(FEATURES_OK, DRIVER)
            || !needs(DRIVER_OK, DRIVER | FEATURES_OK)
            || !needs(DRIVER, ACKNOWLEDGE)
        {
            return Err(Error::Status(status));
        }
        // Before FEATURES_OK the driver may have written anything.
        if status & FEATURES_OK != 0 && !self.acceptable(features) {
            return Err(Error::Features(features & !self.device.identity.features));
        }
        if state.interrupt_status & !KNOWN_INTERRUPTS != 0 {
            return Err(Error::InterruptStatus(state.interrupt_status));
        }
        for (index, (record, &max)) in state.queues.iter().zip(&self.device.identity.queue_sizes).enumerate()
        {
            let fits = record.size.is_power_of_two() && record.size <= max;
            if !fits || (record.ready && self.build(record, max, features).is_none()) {
                return Err(Error::Queue(index));
            }
        }
        Ok(())
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.device.identity.features == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// The queue at work, if all of it lies in guest memory and is aligned.
    fn build(&self, record: &QueueRecord, max_size: u16, features: u64) -> Option<Queue> {
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        record.build(max_size, event_idx).ok().filter(|queue| queue.is_valid(&*self.memory))
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.device.reset();
        self.clear();
    }

    fn clear(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues = Default::default();
        for (record, &max) in self.queues.iter_mut().zip(&self.device.identity.queue_sizes) {
            record.size = max;
        }
        self.line.set(0, false);
    }

    fn activate(&mut self) -> Result<(), super::ActivateError> {
        let mut queues: [Option<Queue>; MAX_QUEUES] = Default::default();
        for (index, (record, &max)) in self.queues.iter().zip(&self.device.identity.queue_sizes).enumerate() {
            if record.ready {
                queues[index] = self.build(record, max, self.driver_features);
            }
        }
        self.device.activate(Queues::new(
            self.memory.clone(),
            self.driver_features,
            self.line.clone(),
            queues,
        ))
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            debug!(device = self.device.identity.device_type, "the driver resets the device");
            return self.reset();
        }
        let value = value & !NEEDS_RESET;
        if self.status & !value != 0 || value & !KNOWN_STATUS != 0 {
            complain!(
                warn,
                self.complaints,
                status = self.status(),
                value,
                "the driver may only add known status bits"
            );
            return;
        }
        for bit in [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED] {
            if value & bit != 0 && self.status & bit == 0 && !self.add_status(bit) {
                return;
            }
        }
    }

    /// Adds one status bit if it may follow the present ones.
    fn add_status(&mut self, bit: u32) -> bool {
        let before = match bit {
            DRIVER => ACKNOWLEDGE,
            FEATURES_OK => ACKNOWLEDGE | DRIVER,
            DRIVER_OK => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            _ => 0,
        };
        if self.status & before != before || (bit == DRIVER_OK && self.status & FAILED != 0) {
            complain!(
                warn,
                self.complaints,
                status = self.status(),
                bit,
                "the driver sets a status bit too early"
            );
            return false;
        }
        if bit == FEATURES_OK && !self.acceptable(self.driver_features) {
            complain!(
                warn,
                self.complaints,
                features = self.driver_features,
                "the driver accepts features that were not offered"
            );
            return false;
        }
        self.status |= bit;
        if bit == DRIVER_OK
            && let Err(error) = self.activate()
        {
            complain!(warn, self.complaints, %error, "the device cannot start");
            self.line.fail();
        }
        true
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            complain!(
                warn,
                self.complaints,
                status = self.status(),
                "the driver writes features out of order"
            );
            return;
        }
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            // Feature bits from 64 on do not exist here; offered as 0, so only 0 can be accepted.
            select => debug!(select, value, "the driver writes feature bits beyond 64"),
        }
    }

    /// The selected queue, if the driver may set it up now.
    fn queue_in_setup(&mut self) -> Option<&mut QueueRecord> {
        let may = self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK;
        let selected = self.queue_select as usize;
        if !may || selected >= self.queue_count {
            complain!(
                warn,
                self.complaints,
                status = self.status(),
                selected,
                "the driver sets up a queue out of order"
            );
            return None;
        }
        Some(&mut self.queues[selected])
    }

    /// A queue register other than QueueReady: only while the queue is not in use.
    fn set_up_queue(&mut self, set: impl FnOnce(&mut QueueRecord)) {
        match self.queue_in_setup() {
            Some(queue) if !queue.ready => set(queue),
            Some(_) => complain!(warn, self.complaints, "the driver changes a queue that is in use"),
            None => {}
        }
    }

    fn write_queue_size(&mut self, value: u32) {
        let max = self.selected_max();
        match u16::try_from(value) {
            Ok(size) if size.is_power_of_two() && size <= max => self.set_up_queue(|queue| queue.size = size),
            _ => complain!(warn, self.complaints, value, max, "the driver chooses an impossible queue size"),
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let (max, features) = (self.selected_max(), self.driver_features);
        let Some(queue) = self.queue_in_setup() else { return };
        if value & 1 == 0 {
            queue.ready = false;
            return;
        }
        let record = QueueRecord { ready: true, ..*queue };
        if self.build(&record, max, features).is_none() {
            complain!(
                warn,
                self.complaints,
                ?record,
                "the driver puts a queue outside guest memory or unaligned"
            );
            return;
        }
        self.queues[self.queue_select as usize].ready = true;
    }

    fn notify(&self, value: u32) {
        match self.device.kicks.get(value as usize) {
            Some(kick) if self.status & DRIVER_OK != 0 => {
                // Fails only if the counter is full, and then a notification is pending anyway.
                let _ = kick.write(1);
            }
            _ => debug!(value, status = self.status(), "a notification for no queue"),
        }
    }

    fn selected_max(&self) -> u16 {
        self.device.identity.queue_sizes.get(self.queue_select as usize).copied().unwrap_or(0)
    }

    fn selected_ready(&self) -> bool {
        (self.queue_select as usize) < self.queue_count && self.queues[self.queue_select as usize].ready
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.identity.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.device.identity.features as u32,
                1 => (self.device.identity.features >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => u32::from(self.selected_max()),
            VIRTIO_MMIO_QUEUE_READY => u32::from(self.selected_ready()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.line.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            // No shared memory: all regions have the length -1.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => {
                debug!(offset, "the driver reads a register that cannot be read");
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => self.write_queue_size(value),
            VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.line.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.set_up_queue(|q| set_low(&mut q.descriptors, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.set_up_queue(|q| set_high(&mut q.descriptors, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.set_up_queue(|q| set_low(&mut q.available, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.set_up_queue(|q| set_high(&mut q.available, value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.set_up_queue(|q| set_low(&mut q.used, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_up_queue(|q| set_high(&mut q.used, value)),
            _ => debug!(offset, value, "the driver writes a register that cannot be written"),
        }
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

impl<M, D> BusDevice for MmioTransport<M, D>
where
    M: GuestMemory + Send + Sync + 'static,
    D: Model<M>,
{
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(config) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            return self.device.read_config(config, data);
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => *word = self.read_register(offset as u32).to_le_bytes(),
            _ => {
                debug!(offset, len = data.len(), "registers are read as aligned 32-bit words");
                data.fill(0xff);
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            return self.device.write_config(config, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => {
                self.write_register(offset as u32, u32::from_le_bytes(word))
            }
            _ => debug!(offset, len = data.len(), "registers are written as aligned 32-bit words"),
        }
    }
}
