//! The disk: what a driver reads of it, what its threads share, and what the machine does with it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemory;

use super::SERIAL_BYTES;
use super::chunks::ChunkSet;
use super::config::{self, MAX_DISK_QUEUES, QUEUE_SIZE, SectorSize};
use super::disk::Disk;
use super::engine::{self, Engine, EngineKind};
use super::hold::ReleasedWrites;
use super::image::{Image, ImageError, LockedImage};
use super::log::WriteLog;
use super::persist::{self, DiskFacts, DiskState, InFlight, Misfit};
use super::request::Geometry;
use super::requests::Requests;
use super::stats::{BlockStats, Counters};
use super::table::MAX_IN_FLIGHT;
use crate::devices::complaints::Complaints;
use crate::devices::valve::{HeldOutput, Permit};
use crate::devices::virtio::chain::Broken;
use crate::devices::virtio::persist::TransportState;
use crate::devices::virtio::ring::Queues;
use crate::devices::virtio::slot::{Batch, CONFIG_BYTES, Identity, Model, Outcome, Shared, Slot};
use crate::devices::virtio::worker::event;
use crate::devices::virtio::{ActivateError, DeviceHost};
use crate::event::EventSink;

/// The user's choices about a disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The raw image: a file or a block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub readonly: bool,
    /// Both hosts use the same storage: writes are output, held until the commit of their epoch.
    pub shared: bool,
    /// Serial number, at most 20 printable ASCII characters; `outlive-diskN` if not given.
    pub serial: Option<String>,
    /// Size of the guest's sectors; 512 bytes if not given, whatever the storage has. A guest finds its
    /// partitions by it, so a VM has the same on both hosts.
    pub sectors: Option<SectorSize>,
    /// Queues, 1 to 16: as many as there are vCPUs is usual.
    pub queues: u16,
    /// The engine that carries out the requests.
    pub engine: EngineKind,
    /// The image at `path`, open and locked by whoever has looked at it before. A disk that is read-only or shared
    /// opens its own.
    pub locked: Option<LockedImage>,
}

impl DiskOptions {
    /// A disk that is not shared, to read and write, with one queue.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let engine = EngineKind::default();
        Self {
            path: path.into(),
            readonly: false,
            shared: false,
            serial: None,
            sectors: None,
            queues: 1,
            engine,
            locked: None,
        }
    }
}

/// What the write log has of the changes to a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartLog {
    /// All of them.
    Has,
    /// All but those of requests in flight. The newest of these has this number; requests are counted from 1 in the
    /// order in which they are taken from the driver.
    Waits(u64),
    /// Not all, and it will not get them: it is not in mode [`Log`](super::LogMode::Log), or a write has failed since
    /// its marks were last taken.
    Lacks,
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

/// A disk. It is passive until it goes live: the guest may set it up, but nothing is read or written before.
///
/// The writes to a shared disk, which both hosts use, leave as the machine's [valve](crate::devices::valve)
/// orders; other disks have nothing to do with it.
pub type BlockDevice<M> = Slot<M, Disk>;

impl<M: GuestMemory + Send + Sync + 'static> BlockDevice<M> {
    /// Opens the image and puts the machine's disk number `index` in front of it. If it is shared, its writes
    /// leave as `permit` allows.
    ///
    /// # Errors
    /// [`BlockError`].
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
        let DiskOptions { path, readonly, shared, sectors, .. } = options;
        let image = match options.locked.as_ref().filter(|_| !readonly && !shared) {
            Some(locked) => Image::of_locked(locked, *sectors)?,
            None => Image::open(path, *readonly, *shared, *sectors)?,
        };
        let image = Arc::new(image);
        let asked = options.shared.then(|| permit.clone());
        let engine = engine::start(options.engine, &image, MAX_IN_FLIGHT as u16, asked)?;
        let mut device = Self::with_engine(options, index, log, permit, host, (image, engine))?;
        device.start_thread()?;
        Ok(device)
    }

    /// A disk, without its thread, in front of an image whose requests an engine carries out.
    pub(super) fn with_engine(
        options: &DiskOptions,
        index: u16,
        log: Arc<WriteLog>,
        permit: Arc<Permit>,
        host: DeviceHost<M>,
        (image, engine): (Arc<Image>, Box<dyn Engine>),
    ) -> Result<Self, BlockError> {
        let serial = serial(options.serial.as_deref(), index)?;
        tracing::debug!(index, path = %image.path().display(), engine = engine.name(), "a disk");
        let room = event()?;
        if !options.shared {
            log.attach(index, image.bytes(), &room)?;
        }
        let disk = Disk {
            index,
            geometry: Geometry { sectors: image.sectors(), readonly: options.readonly },
            image,
            queues: options.queues,
            shared: options.shared,
            permit,
            engine,
            log,
            room,
            counters: Counters::default(),
            complaints: Complaints::default(),
            faults: OnceLock::new(),
            calm: Condvar::new(),
            submissions: Mutex::new(Vec::with_capacity(MAX_IN_FLIGHT)),
        };
        let requests = Requests::new(options.shared, serial);
        Ok(Self::without_thread(disk, requests, host)?)
    }

    /// Which disk of the machine this is; its records in the write log have this number.
    pub fn index(&self) -> u16 {
        self.model().index
    }

    /// Length of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.model().image.bytes()
    }

    /// The size of the sectors that the guest sees.
    pub fn sector_size(&self) -> SectorSize {
        self.model().image.sector_size()
    }

    /// Whether its writes are output; if not, the write log has them.
    pub fn is_shared(&self) -> bool {
        self.model().shared
    }

    /// Whether the guest can only read it.
    pub fn is_readonly(&self) -> bool {
        self.model().geometry.readonly
    }

    /// The image, for the thread that synchronises a copy of it: see [`super::log`].
    pub fn image(&self) -> Arc<Image> {
        self.model().image.clone()
    }

    /// The engine that carries out the requests: `io_uring` or `threads`.
    pub fn engine(&self) -> &'static str {
        self.model().engine.name()
    }

    /// The counters.
    pub fn stats(&self) -> BlockStats {
        BlockStats { held: self.shared().held(), ..self.model().counters.read() }
    }

    /// How many requests the guest waits for.
    pub fn in_flight(&self) -> usize {
        self.shared().core().model.in_flight()
    }

    /// From now on tells `sink` when the host's disk fails a request ([`MachineEvent::DiskFault`]), and keeps
    /// the failure from the guest until [`tell_errors`](Self::tell_errors). Only the first call counts.
    ///
    /// [`MachineEvent::DiskFault`]: crate::MachineEvent::DiskFault
    pub fn report_faults_to(&self, sink: EventSink) {
        self.model().faults.set(sink).ok();
    }

    /// Lets the guest hear of the requests that the host's disk has failed so far.
    pub fn tell_errors(&self) {
        self.shared().core().model.tell_failed = true;
        self.shared().wake_thread();
    }

    /// For how long the host's disk has not answered a request. Zero if it has none. A request that it has
    /// failed is answered.
    ///
    /// May be asked while the gate is closed, and is about the disk alone then, too: what follows from an answer waits
    /// until the gate opens. Zero behind a closed gate means that nothing that was given to the disk can still change
    /// it. A request that needs another operation begins that only once the gate is open.
    pub fn unanswered_for(&self) -> Duration {
        let oldest = self.shared().core().model.oldest_at_disk(self.model());
        // A coarse clock must not make it look answered.
        oldest.map_or(Duration::ZERO, |since| since.elapsed().max(Duration::from_nanos(1)))
    }

    /// Adds the chunks that requests in flight may have changed, or may still change. Complete once the machine
    /// stands still: the engine carries out what it has, but no request begins.
    pub fn add_changing(&self, chunks: &mut ChunkSet) {
        self.shared().core().model.add_changing(chunks);
    }

    /// Whether the write log has every change to this part of the disk, of the requests up to the number `last`.
    /// Whoever has read the part *before* it asks for all of them ([`u64::MAX`]) and hears [`PartLog::Has`] has read
    /// nothing that the log does not have, or will have when the running epoch ends. If it hears
    /// [`PartLog::Waits`], the same is true as soon as it hears `Has` for that number: what has begun since was not
    /// there to be read.
    pub fn part_log(&self, offset: u64, len: u64, last: u64) -> PartLog {
        // The requests first: what fails is marked before it leaves the table.
        let changes = self.shared().core().model.newest_change(offset, len, last);
        if !self.model().log.has_all(self.model().index, offset, len) {
            return PartLog::Lacks;
        }
        changes.map_or(PartLog::Has, PartLog::Waits)
    }

    /// Whether the host's disk has failed requests of which the guest has not heard.
    pub fn has_failed(&self) -> bool {
        self.shared().core().model.has_failed()
    }

    /// Whether the host's disk has a request that was in flight on another host when the VM came from there.
    pub fn has_reissued(&self) -> bool {
        self.shared().core().model.has_reissued(self.model())
    }

    /// Takes no new requests and waits until none is in flight, except for held writes of a shared disk. For
    /// a checkpoint at which two copies of a disk are compared. Meanwhile the gate must be open, and the
    /// write log must not be full. Returns `true` if nothing is in flight; no request is taken until
    /// [`resume`](Self::resume). Returns `false` after `limit`; the device has then resumed by itself.
    #[must_use = "the device takes no requests until it is resumed"]
    pub fn rest_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut core = self.shared().core();
        core.model.resting = true;
        while core.model.is_busy() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(core);
                self.resume();
                return false;
            }
            let result = self.model().calm.wait_timeout(core, left);
            core = result.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Ends what [`rest_within`](Self::rest_within) began.
    pub fn resume(&self) {
        self.shared().core().model.resting = false;
        self.shared().wake_thread();
    }

    /// Gives the writes to a shared disk that may leave to the engine, oldest first. The lease is checked
    /// before each: once it has ended, this and every later call lets nothing out until the valve is ordered
    /// to hold or to open anew. A write that waits for an earlier one that it overlaps leaves in a later
    /// call.
    pub fn let_out(&self) -> ReleasedWrites {
        self.shared().let_out()
    }
}

impl<M: GuestMemory + Send + Sync + 'static> HeldOutput for BlockDevice<M> {
    fn newest_held(&self) -> Option<u64> {
        self.shared().newest_held()
    }

    fn drain(&self) {
        self.let_out();
    }
}

impl<M: GuestMemory> Model<M> for Disk {
    type Core = Requests;
    type State = DiskState;
    type Refusal = Misfit;

    const NAME: &'static str = "disk";
    const THREAD: &'static str = "outlive-blk";

    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_BLOCK,
            features: config::features(self.geometry.readonly),
            queue_sizes: vec![QUEUE_SIZE; self.queues.into()],
        }
    }

    fn number(&self) -> Option<u16> {
        Some(self.index)
    }

    fn config(&self, requests: &Requests) -> [u8; CONFIG_BYTES] {
        config::space(self.geometry.sectors, self.image.sector_size(), self.queues, requests.writeback)
    }

    fn write_config(&self, requests: &mut Requests, offset: u64, data: &[u8]) {
        // The only field that a driver can write; a read-only disk does not have it.
        if let (config::WRITEBACK, [value @ (0 | 1)]) = (offset as usize, data)
            && !self.geometry.readonly
        {
            requests.writeback = *value == 1;
        }
    }

    /// A driver that wants fewer queues does not use the last ones (virtio 1.2, 5.2.5).
    fn activate(&self, _requests: &mut Requests, queues: &Queues<M>) -> Result<(), ActivateError> {
        queues.need(0)
    }

    /// Requests that the disk has begun are carried out to their end, in order with those of the next driver.
    fn reset(&self, requests: &mut Requests) {
        requests.abandon(self);
        requests.writeback = true;
        self.calm.notify_all();
    }

    fn stop(&self, requests: &mut Requests) {
        requests.abandon(self);
    }

    fn batch(&self, requests: &mut Requests, batch: Batch<'_, M>) -> Result<Outcome, Broken> {
        let result = requests.batch(self, batch);
        if requests.resting {
            self.calm.notify_all();
        }
        result
    }

    fn save(&self, requests: &Requests, out: &mut Vec<u8>) {
        let facts = DiskFacts {
            sectors: self.geometry.sectors,
            shared: self.shared,
            writeback: requests.writeback,
            serial: requests.serial,
        };
        persist::encode(&facts, requests.heads().map(|(queue, head)| InFlight { queue, head }), out);
    }

    fn check(&self, state: &DiskState, transport: &TransportState) -> Result<(), Misfit> {
        let (expected, found) = (state.facts.sectors, self.geometry.sectors);
        if expected != found {
            return Err(Misfit::Length { expected, found });
        }
        if state.facts.shared != self.shared {
            return Err(Misfit::Shared(state.facts.shared));
        }
        state.check_in_flight(transport)
    }

    fn restore(&self, requests: &mut Requests, state: DiskState) {
        requests.writeback = state.facts.writeback;
        requests.serial = state.facts.serial;
        requests.reissue.extend(state.in_flight.iter().map(|it| (it.queue, it.head)));
        self.counters.set_in_flight(requests.in_flight());
    }

    /// The engine, then the log (room again).
    fn sources(&self) -> Vec<RawFd> {
        vec![self.engine.event().as_raw_fd(), self.room.as_raw_fd()]
    }

    fn ready(&self, requests: &mut Requests, source: usize) -> u32 {
        requests.log_stalled &= source != 1;
        0
    }

    /// Operations are submitted outside the gate, so that the coordinator never waits for the kernel. Waiting
    /// writes to a shared disk are output, and are reported.
    fn rest(&self, shared: &Shared<M, Self>) {
        self.permit.tell_held();
        let mut sending = self.sending();
        std::mem::swap(&mut *sending, &mut shared.core().model.outbox);
        self.engine.submit(&mut sending);
    }

    fn go_live(&self, requests: &mut Requests, _queues: Option<&mut Queues<M>>, _announce: bool) -> bool {
        requests.log_stalled = false;
        false
    }
}

/// The serial number, padded with zeroes.
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
