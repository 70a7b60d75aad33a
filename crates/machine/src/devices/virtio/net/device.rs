//! The network device as the transport and the machine see it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::config::config_space;
use super::mac::MacAddr;
use super::offload::{CTRL_VQ, MQ, effective, offered};
use super::output::{MAX_PACKET, Output, OutputLimits};
use super::persist::{NetState, RestoreError};
use super::queues::Queues;
use super::stats::NetStats;
use super::tap::{FramePort, Tap, TapError};
use super::worker::Shared;
use crate::bus::SharedDevice;
use crate::devices::valve::Permit;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceHost, MAX_QUEUES, QueueProgress, VirtioDevice,
};
use crate::devices::{Device, DeviceRestoreError};

/// Largest size of the queues that carry frames: 256 each way.
const FRAMES: u16 = 256;
/// Largest size of the control queue.
const COMMANDS: u16 = 64;

/// Most queue pairs: with the control queue they are at most [`MAX_QUEUES`].
pub const MAX_PAIRS: u16 = 8;
const _: () = assert!(2 * (MAX_PAIRS as usize) < MAX_QUEUES);

/// What the user chooses about a network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Name of the tap interface.
    pub tap: String,
    /// Address of the guest's interface.
    pub mac: MacAddr,
    /// How many queue pairs the guest may use: 1 to [`MAX_PAIRS`]. The same on both hosts.
    pub pairs: u16,
    /// How much output may be held.
    pub limits: OutputLimits,
}

/// Why a network device cannot be made.
#[derive(Debug, Error)]
pub enum NetError {
    /// No tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// No queue pair, or too many.
    #[error("a network device has 1 to {MAX_PAIRS} queue pairs, not {0}")]
    Pairs(u16),
    /// The longest frame would never find room.
    #[error(
        "{0} bytes of held output are too few: allow at least {MAX_PACKET}, one frame of the largest size"
    )]
    Limits(usize),
    /// The kernel refuses an event, or the thread.
    #[error("cannot start the network device: {0}")]
    Start(#[from] io::Error),
}

/// The device model: configuration space and activation. Its queues are worked on by the thread.
pub struct Net<M> {
    /// The address a reset brings back.
    mac: MacAddr,
    queue_sizes: Vec<u16>,
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
    /// Opens the tap and puts a network device in front of it, whose frames leave as `permit` says.
    pub fn new(config: &NetConfig, permit: Arc<Permit>, host: DeviceHost<M>) -> Result<Self, NetError> {
        if !(1..=MAX_PAIRS).contains(&config.pairs) {
            return Err(NetError::Pairs(config.pairs));
        }
        if config.limits.bytes < MAX_PACKET {
            return Err(NetError::Limits(config.limits.bytes));
        }
        let tap = Arc::new(Tap::with_queues(&config.tap, config.pairs)?);
        let output = Output::new(tap.clone(), config.limits, permit)?;
        Ok(Self::with_port(config.mac, tap, Arc::new(output), host)?)
    }

    /// A network device that takes frames from `port`, which has at most [`MAX_PAIRS`] pairs, and gives
    /// frames to `output`.
    pub fn with_port(
        mac: MacAddr,
        port: Arc<dyn FramePort>,
        output: Arc<Output>,
        host: DeviceHost<M>,
    ) -> io::Result<Self> {
        let mut queue_sizes = vec![FRAMES; 2 * port.pairs()];
        queue_sizes.push(COMMANDS);
        let shared = Arc::new(Shared::new(mac, port, output, &host)?);
        let model = Net { mac, queue_sizes, shared: shared.clone() };
        let transport = MmioTransport::new(host.memory, model, host.interrupt);
        let worker = Worker::start(shared.clone())?;
        // The thread knows all queues of the port now, and tells it that none but the first are in use.
        shared.ring();
        Ok(Self { transport: Arc::new(Mutex::new(transport)), shared, _worker: worker })
    }

    /// The guest's output.
    pub fn output(&self) -> &Arc<Output> {
        &self.shared.output
    }

    /// Address of the guest's interface.
    pub fn mac(&self) -> MacAddr {
        self.shared.settings().mac
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
        let settings = self.shared.settings();
        NetState { mac: transport.device().mac, settings, transport: transport.save() }
    }

    /// Takes over a saved state: see [`Device::restore`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as after a reset.
    pub fn take_over(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let mut transport = self.transport();
        let state = NetState::decode(bytes)
            .and_then(|state| state.check(self.shared.port.pairs()).map(|()| state))
            .inspect_err(|_| transport.reset())?;
        transport.restore(&state.transport)?;
        transport.device_mut().mac = state.mac;
        self.shared.set_up(state.settings);
        Ok(())
    }

    /// The offloads and the number of pairs that the port was last told.
    #[cfg(test)]
    pub(super) fn told(&self) -> Option<(u64, u16)> {
        self.shared.told()
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

    /// Throws away the frames that have waited in the tap, has all queues looked at and interrupt and waker
    /// called once, and lets frames move. With `announce`, tells the network at once where the guest is, and
    /// four times more within 350 ms, not while the output discards; and asks the driver, if it knows how, to
    /// do so with the guest's own addresses.
    fn go_live(&self, announce: bool) {
        let mut transport = self.transport();
        if self.shared.go_live(announce) {
            transport.config_changed();
        }
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

impl<M: GuestMemory + Send + Sync + 'static> VirtioDevice<M> for Net<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        offered(self.shared.port.pairs())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = config_space(&self.shared.settings(), self.shared.port.pairs());
        let from = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
        for (to, from) in data.iter_mut().zip(&config[from..]) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Nothing in it may be written by a modern driver.
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError> {
        let Activation { memory, line, features, mut queues } = activation;
        let features = effective(features);
        // A driver that does not know of several pairs finds the control queue behind the first (virtio 1.2,
        // 5.1.2).
        let pairs = if features & MQ != 0 { self.shared.port.pairs() } else { 1 };
        let (frames, rest) = queues.split_at_mut(2 * pairs);
        let mut ready = Vec::with_capacity(pairs);
        for (index, pair) in frames.chunks_exact_mut(2).enumerate() {
            match (pair[0].take(), pair[1].take()) {
                (Some(rx), Some(tx)) => ready.push([rx, tx]),
                (rx, _) if index == 0 => return Err(ActivateError::QueueNotReady(rx.is_some().into())),
                // A driver may leave out the last pairs; they cannot come into use.
                _ => break,
            }
        }
        let control =
            if features & CTRL_VQ != 0 { rest[0].take().map(|queue| (2 * pairs, queue)) } else { None };
        self.shared.install(Queues::new(memory, line, features, ready, control));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.uninstall(self.mac);
    }

    fn progress(&self, queue: usize) -> Option<QueueProgress> {
        self.shared.with_queues(|queues| queues.progress(queue)).flatten()
    }
}
