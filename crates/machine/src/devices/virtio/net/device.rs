//! The network device as the transport and the machine see it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::mac::MacAddr;
use super::output::{Output, OutputLimits, OutputMode};
use super::persist::{NetState, RestoreError};
use super::queues::{Queues, RX, TX};
use super::stats::NetStats;
use super::tap::{FramePort, Tap, TapError};
use super::worker::Shared;
use crate::bus::SharedDevice;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    ActivateError, Activation, COMMON_FEATURES, DeviceHost, MAX_QUEUES, QueueProgress, VirtioDevice,
};
use crate::devices::{Device, DeviceRestoreError};

/// Largest size of the queues: 256 frames each way.
const QUEUE_SIZES: [u16; 2] = [256; 2];

/// What the user chooses about a network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Name of the tap interface.
    pub tap: String,
    /// Address of the guest's interface.
    pub mac: MacAddr,
    /// How much output may be held.
    pub limits: OutputLimits,
    /// What happens to frames at first.
    pub output: OutputMode,
}

/// Why a network device cannot be made.
#[derive(Debug, Error)]
pub enum NetError {
    /// No tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel refuses an event, or the thread.
    #[error("cannot start the network device: {0}")]
    Start(#[from] io::Error),
}

/// The device model: configuration space and activation. Its queues are worked on by the thread.
pub struct Net<M> {
    mac: MacAddr,
    shared: Arc<Shared<M>>,
}

/// A network device with its registers and its thread.
///
/// It begins passive: the guest may set it up, but no frame moves until [`go_live`](Self::go_live).
pub struct NetDevice<M: GuestMemory + Send + Sync + 'static> {
    transport: Arc<Mutex<MmioTransport<M, Net<M>>>>,
    shared: Arc<Shared<M>>,
    _worker: Worker<Shared<M>>,
}

impl<M: GuestMemory + Send + Sync + 'static> NetDevice<M> {
    /// Opens the tap and puts a network device in front of it.
    pub fn new(config: &NetConfig, host: DeviceHost<M>) -> Result<Self, NetError> {
        let tap = Arc::new(Tap::open(&config.tap)?);
        let output = Output::new(tap.clone(), config.limits, config.output)?;
        Ok(Self::with_port(config.mac, tap, Arc::new(output), host)?)
    }

    /// A network device that takes frames from `port` and gives them to `output`.
    pub fn with_port(
        mac: MacAddr,
        port: Arc<dyn FramePort>,
        output: Arc<Output>,
        host: DeviceHost<M>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(port, output, host.gate, host.waker)?);
        let model = Net { mac, shared: shared.clone() };
        let transport = MmioTransport::new(host.memory, model, host.interrupt);
        let worker = Worker::start(shared.clone())?;
        Ok(Self { transport: Arc::new(Mutex::new(transport)), shared, _worker: worker })
    }

    /// The guest's output.
    pub fn output(&self) -> &Arc<Output> {
        &self.shared.output
    }

    /// Address of the guest's interface.
    pub fn mac(&self) -> MacAddr {
        self.transport().device().mac
    }

    /// The counters.
    pub fn stats(&self) -> NetStats {
        self.shared.counters.read()
    }

    /// Whether frames move.
    pub fn is_live(&self) -> bool {
        self.shared.is_live()
    }

    /// The state as plain data; needs stopped vCPUs and a closed gate.
    pub fn state(&self) -> NetState {
        let transport = self.transport();
        NetState { mac: transport.device().mac, transport: transport.save() }
    }

    /// Takes over a saved state: see [`Device::restore`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as after a reset.
    pub fn take_over(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let state = NetState::decode(bytes)?;
        let mut transport = self.transport();
        transport.restore(&state.transport)?;
        transport.device_mut().mac = state.mac;
        Ok(())
    }

    fn transport(&self) -> MutexGuard<'_, MmioTransport<M, Net<M>>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Device for NetDevice<M> {
    fn registers(&self) -> SharedDevice {
        self.transport.clone()
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    /// Throws away the frames that have waited in the tap, has both queues looked at and interrupt and waker called
    /// once, and lets frames move. With `announce`, tells the network at once where the guest is, and four times more
    /// within 350 ms; not while the output discards.
    fn go_live(&self, announce: bool) {
        let mac = announce.then(|| self.mac());
        self.shared.go_live(mac);
    }

    fn state_bytes(&self) -> usize {
        NetState::BYTES
    }

    fn save(&self, out: &mut Vec<u8>) {
        self.state().encode(out);
    }

    fn restore(&self, bytes: &[u8]) -> Result<(), DeviceRestoreError> {
        self.take_over(bytes)
            .map_err(|error| DeviceRestoreError { device: "network card", source: error.into() })
    }

    fn reset(&self) {
        self.transport().reset();
    }
}

impl<M> Net<M> {
    /// The configuration space: MAC address and link status (virtio 1.2, 5.1.4). The link is always up.
    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config
    }
}

impl<M: GuestMemory + Send + Sync + 'static> VirtioDevice<M> for Net<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.config();
        let from = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
        for (to, from) in data.iter_mut().zip(&config[from..]) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Nothing in it may be written by a modern driver.
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError> {
        let Activation { memory, line, queues, .. } = activation;
        let mut queues: [_; MAX_QUEUES] = queues;
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
