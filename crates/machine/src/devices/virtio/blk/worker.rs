//! The thread of a disk, and what it shares with the device model and the machine.
//!
//! It waits for the notifications of the queues, for the engine and for room in the write log. Inside the
//! gate it takes and gives back requests; what they need of the disk is submitted outside, so that the
//! coordinator never waits for the kernel.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::SERIAL_BYTES;
use super::core::Core;
use super::engine::{Engine, Submission};
use super::image::Image;
use super::log::WriteLog;
use super::queues::Queues;
use super::request::Geometry;
use super::stats::Counters;
use super::table::MAX_IN_FLIGHT;
use crate::devices::complaints::Complaints;
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::valve::Permit;
use crate::devices::virtio::Waker;
use crate::devices::virtio::worker::{Wake, Work, event};

/// What a disk is made of and does not change.
pub(super) struct Parts {
    /// Which disk of the machine.
    pub(super) index: u16,
    pub(super) image: Arc<Image>,
    pub(super) geometry: Geometry,
    /// A write is output.
    pub(super) shared: bool,
    /// When writes to a shared disk may leave.
    pub(super) permit: Arc<Permit>,
    pub(super) engine: Box<dyn Engine>,
    pub(super) log: Arc<WriteLog>,
    pub(super) waker: Arc<dyn Waker>,
    pub(super) counters: Counters,
    /// Of the driver's mistakes and the disk's failures.
    pub(super) complaints: Complaints,
}

/// What the thread, the device model and the machine share.
///
/// Two locks, always in this order: `sending` is held over system calls by whoever submits; `core` is held
/// for moments by everyone but the thread, which holds it for a batch.
pub(super) struct Shared<M> {
    pub(super) parts: Parts,
    pub(super) gate: Arc<DeviceGate>,
    /// Written when the driver notifies a queue.
    pub(super) kicks: Vec<EventFd>,
    /// Written when a full log has room again.
    room: EventFd,
    pub(super) wake: Wake,
    core: Mutex<Core<M>>,
    /// Told after each batch while someone drains.
    calm: Condvar,
    pub(super) sending: Mutex<Vec<Submission>>,
}

impl<M: GuestMemory> Shared<M> {
    pub(super) fn new(
        parts: Parts,
        gate: Arc<DeviceGate>,
        queues: u16,
        serial: [u8; SERIAL_BYTES],
    ) -> io::Result<Self> {
        let room = event()?;
        if !parts.shared {
            parts.log.attach(parts.index, parts.image.bytes(), &room)?;
        }
        Ok(Self {
            gate,
            kicks: (0..queues).map(|_| event()).collect::<io::Result<_>>()?,
            room,
            wake: Wake::new()?,
            core: Mutex::new(Core::new(parts.shared, serial)),
            calm: Condvar::new(),
            sending: Mutex::new(Vec::with_capacity(MAX_IN_FLIGHT)),
            parts,
        })
    }

    pub(super) fn install(&self, queues: Queues<M>) {
        let mut core = self.core();
        core.queues = Some(queues);
        core.pending = self.all_queues();
        drop(core);
        self.wake.wake();
    }

    pub(super) fn uninstall(&self) {
        let mut core = self.core();
        core.abandon(&self.parts);
        core.queues = None;
        core.writeback = true;
        drop(core);
        self.calm.notify_all();
    }

    /// See [`super::BlockDevice::go_live`].
    pub(super) fn go_live(&self) {
        let mut core = self.core();
        core.live = true;
        core.log_stalled = false;
        core.pending = self.all_queues();
        if let Some(queues) = &core.queues {
            queues.line.signal_used();
        }
        drop(core);
        self.parts.waker.wake();
        self.wake.wake();
    }

    /// See [`super::BlockDevice::drain`].
    pub(super) fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut core = self.core();
        core.draining = true;
        while core.is_busy() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(core);
                self.resume();
                return false;
            }
            let result = self.calm.wait_timeout(core, left);
            core = result.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// See [`super::BlockDevice::resume`].
    pub(super) fn resume(&self) {
        self.core().draining = false;
        self.wake.wake();
    }

    /// Gives the engine what waits for it.
    pub(super) fn send(&self) {
        let mut sending = self.sending();
        std::mem::swap(&mut *sending, &mut self.core().outbox);
        self.parts.engine.submit(&mut sending);
    }

    /// What the thread does in one go: its events, then a batch.
    pub(super) fn work(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        let mut core = self.core();
        for &position in ready {
            if position < self.kicks.len() {
                core.pending |= 1 << position;
            } else if position == self.room_position() {
                core.log_stalled = false;
            }
        }
        let more = core.batch(&self.parts, pass);
        if core.draining {
            self.calm.notify_all();
        }
        more
    }

    fn all_queues(&self) -> u32 {
        (1 << self.kicks.len()) - 1
    }

    fn room_position(&self) -> usize {
        self.kicks.len() + 1
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sending(&self) -> MutexGuard<'_, Vec<Submission>> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Work for Shared<M> {
    fn name(&self) -> &'static str {
        "outlive-blk"
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn wake(&self) -> &Wake {
        &self.wake
    }

    fn sources(&self) -> Vec<RawFd> {
        let more = [self.parts.engine.event().as_raw_fd(), self.room.as_raw_fd()];
        self.kicks.iter().map(AsRawFd::as_raw_fd).chain(more).collect()
    }

    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        self.work(ready, pass)
    }

    fn rest(&self) {
        self.send();
    }
}
