//! The disk as the transport and the machine see it.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::SERIAL_BYTES;
use super::config::{self, MAX_DISK_QUEUES, QUEUE_SIZE};
use super::engine::{self, Engine, EngineKind};
use super::hold::ReleasedWrites;
use super::image::{Image, ImageError};
use super::log::WriteLog;
use super::persist::{self, BlockState, DiskFacts, InFlight, RestoreError};
use super::queues::Queues;
use super::request::Geometry;
use super::stats::{BlockStats, Counters};
use super::table::MAX_IN_FLIGHT;
use super::worker::{Parts, Shared};
use crate::bus::SharedDevice;
use crate::devices::complaints::Complaints;
use crate::devices::valve::{HeldOutput, Permit};
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceHost, MAX_QUEUES, QueueProgress, VirtioDevice,
};
use crate::devices::{Device, DeviceRestoreError};

/// What the user chooses about a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// The raw image: a file or a block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub readonly: bool,
    /// Both hosts use the same storage: writes are output, held until the commit of their epoch.
    pub shared: bool,
    /// Serial number, at most 20 printable ASCII characters; `outlive-diskN` if not given.
    pub serial: Option<String>,
    /// Queues, 1 to 16: as many as there are vCPUs is usual.
    pub queues: u16,
    /// What carries the requests to the disk.
    pub engine: EngineKind,
}

impl DiskOptions {
    /// A disk of its own, to read and write, with one queue.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let engine = EngineKind::default();
        Self { path: path.into(), readonly: false, shared: false, serial: None, queues: 1, engine }
    }
}

/// Why a disk cannot be made.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The serial number is too long or is not plain text.
    #[error("\"{0}\" cannot be a serial number: use 1 to {SERIAL_BYTES} printable ASCII characters")]
    Serial(String),
    /// Too few queues, or too many.
    #[error("a disk has 1 to {MAX_DISK_QUEUES} queues, not {0}")]
    Queues(u16),
    /// The kernel refuses an event, the ring or a thread.
    #[error("cannot start the disk: {0}")]
    Start(#[from] io::Error),
}

/// The device model: configuration space and activation. Its queues are worked on by the thread.
pub struct Block<M> {
    shared: Arc<Shared<M>>,
    queue_sizes: Vec<u16>,
}

/// A disk with its registers and its thread.
///
/// It begins passive: the guest may set it up, but nothing is read or written until
/// [`go_live`](Device::go_live).
///
/// The writes to a shared disk, which both hosts use, leave as the machine's
/// [valve](crate::devices::valve) says; any other disk has nothing to do with it.
pub struct BlockDevice<M: GuestMemory + Send + Sync + 'static> {
    transport: Arc<Mutex<MmioTransport<M, Block<M>>>>,
    shared: Arc<Shared<M>>,
    worker: Option<Worker<Shared<M>>>,
}

impl<M: GuestMemory + Send + Sync + 'static> BlockDevice<M> {
    /// Opens the image and puts a disk in front of it, the disk number `index` of the machine. If it is shared,
    /// its writes leave as `permit` says.
    pub fn new(
        options: &DiskOptions,
        index: u16,
        log: Arc<WriteLog>,
        permit: Arc<Permit>,
        host: DeviceHost<M>,
    ) -> Result<Self, BlockError> {
        if !(1..=MAX_DISK_QUEUES).contains(&options.queues) {
            return Err(BlockError::Queues(options.queues));
        }
        serial(options.serial.as_deref(), index)?;
        let image = Arc::new(Image::open(&options.path, options.readonly, options.shared)?);
        let asked = options.shared.then(|| permit.clone());
        let engine = engine::start(options.engine, &image, MAX_IN_FLIGHT as u16, asked)?;
        let mut device = Self::with_engine(options, index, log, permit, host, (image, engine))?;
        device.start_thread()?;
        Ok(device)
    }

    /// A disk in front of an image whose requests are carried out by an engine, without its thread.
    pub(super) fn with_engine(
        options: &DiskOptions,
        index: u16,
        log: Arc<WriteLog>,
        permit: Arc<Permit>,
        host: DeviceHost<M>,
        (image, engine): (Arc<Image>, Box<dyn Engine>),
    ) -> Result<Self, BlockError> {
        let serial = serial(options.serial.as_deref(), index)?;
        let geometry = Geometry { sectors: image.sectors(), readonly: options.readonly };
        tracing::debug!(index, path = %image.path().display(), engine = engine.name(), "a disk");
        let DeviceHost { memory, gate, interrupt, waker } = host;
        let (counters, shared) = (Counters::default(), options.shared);
        let complaints = Complaints::default();
        let parts =
            Parts { index, image, geometry, shared, permit, engine, log, waker, counters, complaints };
        let shared = Arc::new(Shared::new(parts, gate, options.queues, serial)?);
        let queue_sizes = vec![QUEUE_SIZE; usize::from(options.queues)];
        let model = Block { shared: shared.clone(), queue_sizes };
        let transport = MmioTransport::new(memory, model, interrupt);
        Ok(Self { transport: Arc::new(Mutex::new(transport)), shared, worker: None })
    }

    pub(super) fn start_thread(&mut self) -> io::Result<()> {
        self.worker = Some(Worker::start(self.shared.clone())?);
        Ok(())
    }

    /// What the thread does when it wakes, for a device that has none. All queues are looked at.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn turn(&self) -> bool {
        let ready: Vec<_> = (0..self.shared.kicks.len() + 2).collect();
        let more = self.shared.work(&ready, &self.shared.gate.enter());
        self.shared.send();
        more
    }

    /// Which disk of the machine this is: the number of its records in the write log.
    pub fn index(&self) -> u16 {
        self.shared.parts.index
    }

    /// Length of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.shared.parts.image.bytes()
    }

    /// Whether its writes are output; if not, they are in the write log.
    pub fn is_shared(&self) -> bool {
        self.shared.parts.shared
    }

    /// Whether the guest can only read it.
    pub fn is_readonly(&self) -> bool {
        self.shared.parts.geometry.readonly
    }

    /// The image, to be read by whoever synchronises a copy of it: see [`super::log`].
    pub fn image(&self) -> Arc<Image> {
        self.shared.parts.image.clone()
    }

    /// What carries the requests to the disk: `io_uring` or `threads`.
    pub fn engine(&self) -> &'static str {
        self.shared.parts.engine.name()
    }

    /// The counters.
    pub fn stats(&self) -> BlockStats {
        BlockStats { held: self.shared.held(), ..self.shared.parts.counters.read() }
    }

    /// How many requests the guest waits for.
    pub fn in_flight(&self) -> usize {
        self.shared.core().in_flight()
    }

    /// Takes no new requests and waits until none is in flight, but for the held writes of a shared disk. For
    /// a checkpoint at which two copies of a disk are compared. The gate must be open meanwhile, and the
    /// write log must not be full. `true`: nothing is in flight, and nothing is taken until
    /// [`resume`](Self::resume). `false`: it took longer than `limit`; the device has resumed by itself.
    #[must_use = "the device takes no requests until it is resumed"]
    pub fn drain(&self, limit: Duration) -> bool {
        self.shared.drain(limit)
    }

    /// Ends what [`drain`](Self::drain) began.
    pub fn resume(&self) {
        self.shared.resume();
    }

    /// Lets the writes to a shared disk that may leave go to the engine, oldest first. The lease is asked before
    /// each: the moment it has ended, this and every later call lets nothing out until the valve is ordered to
    /// hold or to open anew. A write that waits for an earlier one it overlaps goes with a later call.
    pub fn let_out(&self) -> ReleasedWrites {
        self.shared.let_out()
    }

    /// The state as plain data; needs stopped vCPUs and a closed gate.
    pub fn state(&self) -> BlockState {
        let mut bytes = Vec::with_capacity(BlockState::BYTES);
        self.save(&mut bytes);
        BlockState::decode(&bytes).expect("a device saves what can be decoded")
    }

    /// Takes over a saved state: see [`Device::restore`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as after a reset.
    pub fn take_over(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let mut transport = self.transport();
        let checked = self.check(bytes);
        let state = checked.inspect_err(|_| transport.reset())?;
        transport.restore(&state.transport)?;
        let mut core = self.shared.core();
        core.writeback = state.facts.writeback;
        core.serial = state.facts.serial;
        core.reissue.extend(state.in_flight.iter().map(|it| (it.queue, it.head)));
        self.shared.parts.counters.set_in_flight(core.in_flight());
        Ok(())
    }

    fn check(&self, bytes: &[u8]) -> Result<BlockState, RestoreError> {
        let state = BlockState::decode(bytes)?;
        let (expected, found) = (state.facts.sectors, self.shared.parts.geometry.sectors);
        if expected != found {
            return Err(RestoreError::Length { expected, found });
        }
        if state.facts.shared != self.is_shared() {
            return Err(RestoreError::Shared(state.facts.shared));
        }
        state.check_in_flight()?;
        Ok(state)
    }

    fn transport(&self) -> MutexGuard<'_, MmioTransport<M, Block<M>>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> HeldOutput for BlockDevice<M> {
    fn newest_held(&self) -> Option<u64> {
        self.shared.newest_held()
    }

    fn drain(&self) {
        self.let_out();
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Device for BlockDevice<M> {
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
        BlockState::BYTES
    }

    fn save(&self, out: &mut Vec<u8>) {
        let transport = self.transport();
        let registers = transport.save();
        let core = self.shared.core();
        let facts = DiskFacts {
            sectors: self.shared.parts.geometry.sectors,
            shared: self.is_shared(),
            writeback: core.writeback,
            serial: core.serial,
        };
        let in_flight = core.heads().map(|(queue, head)| InFlight { queue, head });
        persist::encode(&facts, in_flight, &registers, out);
    }

    fn restore(&self, bytes: &[u8]) -> Result<(), DeviceRestoreError> {
        self.take_over(bytes).map_err(|error| DeviceRestoreError { device: "disk", source: error.into() })
    }

    /// What the disk has begun goes on to its end, in order with what the rebooted guest asks for.
    fn reset(&self) {
        self.transport().reset();
    }
}

impl<M: GuestMemory + Send + Sync + 'static> VirtioDevice<M> for Block<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        config::features(self.shared.parts.geometry.readonly)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let writeback = self.shared.core().writeback;
        let sectors = self.shared.parts.geometry.sectors;
        config::read(sectors, self.queue_sizes.len() as u16, writeback, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The one field that can be written; a disk that cannot be written to does not have it.
        if let (config::WRITEBACK, [value @ (0 | 1)]) = (offset as usize, data)
            && !self.shared.parts.geometry.readonly
        {
            self.shared.core().writeback = *value == 1;
        }
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, line } = activation;
        let queues: [_; MAX_QUEUES] = queues;
        // A driver that wants fewer queues than there are leaves the last ones alone (virtio 1.2, 5.2.5).
        if queues[0].is_none() {
            return Err(ActivateError::QueueNotReady(0));
        }
        self.shared.install(Queues::new(memory, line, features, queues));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.uninstall();
    }

    fn progress(&self, queue: usize) -> Option<QueueProgress> {
        self.shared.core().queues.as_ref()?.progress(queue)
    }
}

/// The serial number, filled up with zeroes.
fn serial(chosen: Option<&str>, index: u16) -> Result<[u8; SERIAL_BYTES], BlockError> {
    let text = chosen.map_or_else(|| format!("outlive-disk{index}"), str::to_owned);
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if text.is_empty() || text.len() > SERIAL_BYTES || !plain {
        return Err(BlockError::Serial(text));
    }
    let mut serial = [0; SERIAL_BYTES];
    serial[..text.len()].copy_from_slice(text.as_bytes());
    Ok(serial)
}
