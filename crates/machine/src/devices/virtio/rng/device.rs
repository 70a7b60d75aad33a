//! The entropy device as the transport and the machine see it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::persist::{RestoreError, RngState};
use super::queues::Queues;
use super::source::{EntropySource, HostEntropy};
use super::stats::RngStats;
use super::worker::Shared;
use crate::bus::SharedDevice;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    ActivateError, Activation, COMMON_FEATURES, DeviceHost, QueueProgress, VirtioDevice,
};
use crate::devices::{Device, DeviceRestoreError};

/// Largest size of the queue.
const QUEUE_SIZES: [u16; 1] = [64];

/// The device model. Its queue is worked on by the thread.
pub struct Rng<M> {
    shared: Arc<Shared<M>>,
}

/// An entropy device with its registers and its thread.
///
/// It begins passive: nothing is given until [`go_live`](Device::go_live).
pub struct RngDevice<M: GuestMemory + Send + Sync + 'static> {
    transport: Arc<Mutex<MmioTransport<M, Rng<M>>>>,
    shared: Arc<Shared<M>>,
    _worker: Worker<Shared<M>>,
}

impl<M: GuestMemory + Send + Sync + 'static> RngDevice<M> {
    /// An entropy device fed by this host's kernel.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn new(host: DeviceHost<M>) -> io::Result<Self> {
        Self::with_source(Box::new(HostEntropy), host)
    }

    /// An entropy device fed by `source`.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn with_source(source: Box<dyn EntropySource>, host: DeviceHost<M>) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(source, host.gate, host.waker)?);
        let model = Rng { shared: shared.clone() };
        let transport = MmioTransport::new(host.memory, model, host.interrupt);
        let worker = Worker::start(shared.clone())?;
        Ok(Self { transport: Arc::new(Mutex::new(transport)), shared, _worker: worker })
    }

    /// The counters.
    pub fn stats(&self) -> RngStats {
        self.shared.counters.read()
    }

    /// Takes over a saved state: see [`Device::restore`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as after a reset.
    pub fn take_over(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let state = RngState::decode(bytes)?;
        Ok(self.transport().restore(&state.transport)?)
    }

    fn transport(&self) -> MutexGuard<'_, MmioTransport<M, Rng<M>>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Device for RngDevice<M> {
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
        RngState::BYTES
    }

    fn save(&self, out: &mut Vec<u8>) {
        RngState { transport: self.transport().save() }.encode(out);
    }

    fn restore(&self, bytes: &[u8]) -> Result<(), DeviceRestoreError> {
        self.take_over(bytes)
            .map_err(|error| DeviceRestoreError { device: "entropy device", source: error.into() })
    }

    fn reset(&self) {
        self.transport().reset();
    }
}

impl<M: GuestMemory + Send + Sync + 'static> VirtioDevice<M> for Rng<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // There is no configuration space.
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError> {
        let Activation { memory, line, mut queues, .. } = activation;
        let queue = queues[0].take().ok_or(ActivateError::QueueNotReady(0))?;
        self.shared.install(Queues::new(memory, line, queue));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.uninstall();
    }

    fn progress(&self, _queue: usize) -> Option<QueueProgress> {
        self.shared.with_queues(Queues::progress)
    }
}
