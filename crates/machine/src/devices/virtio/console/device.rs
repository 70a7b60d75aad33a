//! The console as the transport and the machine see it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::config::ScreenSize;
use super::persist::{ConsoleState, RestoreError};
use super::queues::{Queues, RX, TX};
use super::stats::ConsoleStats;
use super::worker::Shared;
use crate::bus::SharedDevice;
use crate::devices::port::PortEnd;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    ActivateError, Activation, COMMON_FEATURES, DeviceHost, QueueProgress, VirtioDevice,
};
use crate::devices::{Device, DeviceRestoreError};

/// Largest size of the queues.
const QUEUE_SIZES: [u16; 2] = [64; 2];
/// VIRTIO_CONSOLE_F_SIZE: the configuration space holds the size of the screen.
const F_SIZE: u32 = 0;

/// The device model. Its queues are worked on by the thread.
pub struct Console<M> {
    size: ScreenSize,
    shared: Arc<Shared<M>>,
}

/// A console with its registers and its thread.
///
/// It begins passive: nothing moves until [`go_live`](Device::go_live).
pub struct ConsoleDevice<M: GuestMemory + Send + Sync + 'static> {
    transport: Arc<Mutex<MmioTransport<M, Console<M>>>>,
    shared: Arc<Shared<M>>,
    _worker: Worker<Shared<M>>,
}

impl<M: GuestMemory + Send + Sync + 'static> ConsoleDevice<M> {
    /// A console whose port ends at `end`.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn new(end: PortEnd, host: DeviceHost<M>) -> io::Result<Self> {
        // Bytes for a machine of before are not for this one.
        end.input.set_live(false);
        let shared = Arc::new(Shared::new(end, host.gate, host.waker)?);
        let model = Console { size: ScreenSize::default(), shared: shared.clone() };
        let transport = MmioTransport::new(host.memory, model, host.interrupt);
        let worker = Worker::start(shared.clone())?;
        Ok(Self { transport: Arc::new(Mutex::new(transport)), shared, _worker: worker })
    }

    /// The counters.
    pub fn stats(&self) -> ConsoleStats {
        self.shared.counters.read(self.shared.end.input.dropped())
    }

    /// The size of the screen, as the driver sees it.
    pub fn size(&self) -> ScreenSize {
        self.transport().device().size
    }

    /// The screen has another size: tells the driver. Waits while the gate is closed.
    pub fn resize(&self, size: ScreenSize) {
        let _pass = self.shared.gate.enter();
        let mut transport = self.transport();
        if transport.device().size != size {
            transport.device_mut().size = size;
            transport.config_changed();
        }
    }

    /// Takes over a saved state: see [`Device::restore`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as after a reset.
    pub fn take_over(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let state = ConsoleState::decode(bytes)?;
        let mut transport = self.transport();
        transport.restore(&state.transport)?;
        transport.device_mut().size = state.size;
        Ok(())
    }

    fn transport(&self) -> MutexGuard<'_, MmioTransport<M, Console<M>>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Drop for ConsoleDevice<M> {
    fn drop(&mut self) {
        self.shared.end.input.set_live(false);
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Device for ConsoleDevice<M> {
    fn registers(&self) -> SharedDevice {
        self.transport.clone()
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn go_live(&self, _announce: bool) {
        self.shared.go_live();
    }

    fn state_bytes(&self) -> usize {
        ConsoleState::BYTES
    }

    fn save(&self, out: &mut Vec<u8>) {
        let transport = self.transport();
        ConsoleState { size: transport.device().size, transport: transport.save() }.encode(out);
    }

    fn restore(&self, bytes: &[u8]) -> Result<(), DeviceRestoreError> {
        self.take_over(bytes).map_err(|error| DeviceRestoreError { device: "console", source: error.into() })
    }

    fn reset(&self) {
        self.transport().reset();
    }
}

impl<M: GuestMemory + Send + Sync + 'static> VirtioDevice<M> for Console<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | 1 << F_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.size.read(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // What may be written belongs to a feature that is not offered.
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError> {
        let Activation { memory, line, mut queues, .. } = activation;
        let rx = queues[RX].take().ok_or(ActivateError::QueueNotReady(RX))?;
        let tx = queues[TX].take().ok_or(ActivateError::QueueNotReady(TX))?;
        self.shared.install(Queues::new(memory, line, rx, tx));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.uninstall();
    }

    fn progress(&self, queue: usize) -> Option<QueueProgress> {
        self.shared.with_queues(|queues| queues.progress(queue)).flatten()
    }
}
