//! The input tail: copies of the frames that the guest was given in epochs that are not committed yet, on
//! their way to the standby.
//!
//! A frame that has reached the guest is in the next checkpoint, and is lost if the primary dies before: its
//! sender waits for TCP's timer and sends it again. A standby that has a copy gives it to the guest at the
//! takeover.
//!
//! ```text
//!   device thread, inside the gate ── push ──► ring ◄── take ── thread that writes to the link
//!                  outside the gate ── tell ─────────────────►
//! ```
//!
//! Best effort: a frame that finds no room here is not copied. The guest gets it in any case. Nobody waits for
//! room, and the lock is held for the copying of one frame at a time.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::output::OutputLimits;
use super::ring::FrameRing;

/// What may wait for the thread that writes to the link.
const WAITING: OutputLimits = OutputLimits { frames: 512, bytes: 512 << 10 };

/// How much of one epoch is copied: the first frames. A guest that receives a stream gets the rest again soon
/// from TCP itself, since later frames tell the sender what is missing.
pub const PER_EPOCH: OutputLimits = OutputLimits { frames: 128, bytes: 128 << 10 };

/// Tells the thread that writes to the link.
pub type Tell = Arc<dyn Fn() + Send + Sync>;

/// The input tail of a network card; see the module. It copies nothing until it is [started](Self::start).
#[derive(Default)]
pub struct InputTail {
    /// Whether frames are copied. A hint: the lock decides.
    on: AtomicBool,
    /// Whether the listener has frames that it was not told of.
    untold: AtomicBool,
    dropped: AtomicU64,
    inner: Mutex<Option<Inner>>,
}

struct Inner {
    ring: FrameRing<u64>,
    tell: Tell,
    /// Whether it was told and has not begun to take.
    told: bool,
    /// The epoch of the newest frame, and how much of it was copied.
    epoch: u64,
    copied: OutputLimits,
    /// Which start this belongs to.
    number: u64,
}

/// A start of the tail: only its owner ends it.
#[derive(Debug, PartialEq, Eq)]
pub struct Started(u64);

impl InputTail {
    /// Copies frames from now on, and has `tell` called outside the gate when there are some. It ends an
    /// earlier start.
    pub fn start(&self, tell: Tell) -> Started {
        let ring = FrameRing::new(WAITING);
        let mut inner = self.inner();
        let number = inner.as_ref().map_or(0, |inner| inner.number + 1);
        let copied = OutputLimits { frames: 0, bytes: 0 };
        let before = inner.replace(Inner { ring, tell, told: false, epoch: 0, copied, number });
        self.on.store(true, Ordering::Release);
        drop(inner);
        // Not under the lock, because it has large memory.
        drop(before);
        Started(number)
    }

    /// Copies nothing any more, unless it was started anew since.
    pub fn stop(&self, started: &Started) {
        let mut inner = self.inner();
        let ended = inner.take_if(|inner| inner.number == started.0);
        if ended.is_some() {
            self.on.store(false, Ordering::Release);
        }
        drop(inner);
        drop(ended);
    }

    /// The guest was given this frame, with the header it got, in its queue pair number `pair`. The checkpoint
    /// number `epoch` will have it. For the device's thread, inside the gate; makes no system call.
    pub fn push(&self, epoch: u64, pair: usize, packet: &[u8]) {
        let mut guard = self.inner();
        let Some(inner) = &mut *guard else { return };
        if epoch != inner.epoch {
            (inner.epoch, inner.copied) = (epoch, OutputLimits { frames: 0, bytes: 0 });
        }
        // A frame that is left out leaves out those after it, so that what is there has no hole.
        inner.copied.frames += 1;
        inner.copied.bytes += packet.len();
        let fits = inner.copied.frames <= PER_EPOCH.frames && inner.copied.bytes <= PER_EPOCH.bytes;
        if !(fits && inner.ring.push(epoch, pair as u16, packet)) {
            inner.copied.frames = PER_EPOCH.frames;
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        drop(guard);
        self.untold.store(true, Ordering::Release);
    }

    /// Whether frames are copied at all.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Tells of new frames. For the device's thread, outside the gate.
    pub fn tell(&self) {
        if !self.untold.load(Ordering::Relaxed) || !self.untold.swap(false, Ordering::AcqRel) {
            return;
        }
        let tell = match &mut *self.inner() {
            Some(inner) if !inner.told => {
                inner.told = true;
                Some(inner.tell.clone())
            }
            _ => None,
        };
        if let Some(tell) = tell {
            tell();
        }
    }

    /// Takes the oldest frame: copies it, and returns its epoch and its queue pair. For the thread that writes to
    /// the link. The lock is held for one frame at a time, because the device's thread waits for it inside the
    /// gate.
    pub fn take(&self, copy: &mut Vec<u8>) -> Option<(u64, u16)> {
        let mut guard = self.inner();
        let inner = guard.as_mut()?;
        inner.told = false;
        let frame = inner.ring.front()?;
        copy.clear();
        copy.extend_from_slice(frame.packet);
        let taken = (frame.label, frame.pair);
        inner.ring.pop();
        Some(taken)
    }

    /// How many frames found no room.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn inner(&self) -> MutexGuard<'_, Option<Inner>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for InputTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InputTail")
            .field("on", &self.on)
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}
