//! Held output: **nothing produced in epoch N leaves the host before checkpoint N is committed.**
//!
//! Every frame the guest sends goes through one [`Output`]. While the VM is protected the output is in mode
//! *hold*: a frame is stored with the number of the epoch that produced it, and leaves only when the
//! coordinator releases that epoch, in the order in which the guest sent it.
//!
//! ```text
//!             push (device thread, inside the gate)
//!               │
//!   pass through│──────────────────────────────► sink (tap)
//!   hold        └─► [e5 e5 e6 e6 e6 e7]──release(6)──► sink
//!   discard     ×
//! ```
//!
//! Who calls what:
//!
//! | caller | calls |
//! |---|---|
//! | device thread, inside the gate | [`push`](Output::push), [`announce`](Output::announce) |
//! | coordinator, in a pause (gate closed) | [`hold`](Output::hold), [`set_epoch`](Output::set_epoch) |
//! | receiver of commits | [`release`](Output::release) |
//! | winner, loser of the arbitration | [`pass_through`](Output::pass_through), [`discard`](Output::discard) |
//!
//! Two locks, always in this order: `writer` is held by the one thread that empties the ring, over its writes
//! to the sink; `ring` is held for moments only, so a push never waits for a release to finish.
//!
//! A frame is held with the header in front of it, which tells the tap what the guest has left to the host.
//! Frames and bytes are bounded and allocated at the start. A full ring refuses the frame and leaves it with
//! the guest; [`Output::space`] is written when there is room again.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::offload::HEADER;

/// Longest frame in bytes: the largest IP packet, Ethernet header, one VLAN tag; no checksum. A guest that
/// leaves the cutting of TCP segments to the host sends such frames.
pub const MAX_FRAME: usize = 14 + 4 + 65_535;

/// Longest packet: a frame with its header.
pub const MAX_PACKET: usize = HEADER + MAX_FRAME;

/// Where frames go: the tap, or a test that writes them down.
pub trait FrameSink: Send + Sync {
    /// Sends one packet: a frame behind the header that says what is left to do about it. It comes from the
    /// guest's queue pair number `pair`; the answers should come back there. Must not block; an error means
    /// that the frame is gone, as on a wire that is unplugged.
    fn send(&self, pair: usize, packet: &[u8]) -> io::Result<()>;
}

/// What becomes of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputMode {
    /// They leave at once: the VM is unprotected.
    PassThrough,
    /// They wait for the commit of their epoch.
    Hold,
    /// They are dropped: the VM is not (or no longer) the one that may speak.
    Discard,
}

/// How much may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputLimits {
    /// Most frames.
    pub frames: usize,
    /// Most bytes of frames with their headers; at least [`MAX_PACKET`], or the longest frames could never
    /// leave.
    pub bytes: usize,
}

impl Default for OutputLimits {
    /// 4096 frames, 6 MiB: as many frames of 1500 bytes as there is room for.
    fn default() -> Self {
        Self { frames: 4096, bytes: 6 << 20 }
    }
}

/// What became of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a frame that found no room must stay with the guest"]
pub enum Pushed {
    /// Sent, held or dropped, as the mode says.
    Taken,
    /// There is no room. Nothing happened; try again when [`Output::space`] is written.
    Full,
}

/// Why an epoch cannot begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("epoch {asked} cannot follow: frames of epoch {held} are held")]
pub struct EpochError {
    /// The epoch asked for.
    pub asked: u64,
    /// The newest epoch that has frames in the ring.
    pub held: u64,
}

/// What a release let out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Frames that left.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Everything asked for has left. Otherwise the permission was withdrawn or the output discards.
    pub complete: bool,
}

/// Counters of an output since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputStats {
    /// Frames held now.
    pub held_frames: u64,
    /// Bytes held now.
    pub held_bytes: u64,
    /// Most frames held at one time.
    pub most_frames: u64,
    /// Most bytes held at one time.
    pub most_bytes: u64,
    /// Frames that were held and then left.
    pub released_frames: u64,
    /// Frames that left without being held.
    pub passed_frames: u64,
    /// Frames dropped because the output discards.
    pub discarded_frames: u64,
    /// Frames that left but that the sink did not take (interface down, its queue full).
    pub refused_frames: u64,
    /// How often the ring was full.
    pub full: u64,
}

/// The guest's output.
pub struct Output {
    ring: Mutex<Ring>,
    /// Copy of the frame being written, so that the ring is not locked over a system call.
    writer: Mutex<Box<[u8]>>,
    sink: Arc<dyn FrameSink>,
    space: EventFd,
}

type FirstFrame = Box<dyn FnOnce() + Send>;

/// What a release may let out next.
enum Next {
    /// A frame, copied out.
    Frame { len: usize, pair: u16, number: u64 },
    /// Nothing more that is asked for.
    Nothing,
    /// No frame may leave.
    Forbidden,
}

impl Output {
    /// An output in front of `sink`. Everything it will ever need is allocated here.
    ///
    /// # Errors
    ///
    /// If the kernel has no eventfd to give.
    pub fn new(sink: Arc<dyn FrameSink>, limits: OutputLimits, mode: OutputMode) -> io::Result<Self> {
        Ok(Self {
            ring: Mutex::new(Ring::new(limits, mode)),
            writer: Mutex::new(vec![0; MAX_PACKET].into_boxed_slice()),
            sink,
            space: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Takes a frame, with its header, from the guest's queue pair number `pair`. Called by the device thread
    /// inside the gate, before it gives the descriptor back. The order of the pushes is the order in which
    /// the frames leave, whatever pairs they come from.
    ///
    /// # Panics
    ///
    /// If the packet is longer than [`MAX_PACKET`].
    pub fn push(&self, pair: usize, packet: &[u8]) -> Pushed {
        assert!(packet.len() <= MAX_PACKET, "the device checks the length of frames");
        let mut ring = self.ring();
        match ring.mode {
            OutputMode::Discard => ring.stats.discarded_frames += 1,
            OutputMode::Hold => return ring.hold(pair, packet),
            OutputMode::PassThrough => {
                // Under the lock, so that no mode change and no held frame can come in between.
                let refused = self.sink.send(pair, packet).is_err();
                ring.stats.passed_frames += 1;
                ring.stats.refused_frames += u64::from(refused);
                let first = ring.first_frame.take();
                drop(ring);
                report(first);
            }
        }
        Pushed::Taken
    }

    /// Sends a packet that carries nothing of the guest's state (an announcement of its address), held by no
    /// epoch. Returns whether the output was allowed to speak: only while it passes frames through. A
    /// protected VM may have lost its place without knowing it yet, and an announcement would pull its
    /// address away from the host where it runs.
    pub fn announce(&self, packet: &[u8]) -> bool {
        let ring = self.ring();
        let may = ring.mode == OutputMode::PassThrough;
        if may {
            // An announcement lost on the wire is repeated by its schedule.
            let _ = self.sink.send(0, packet);
        }
        may
    }

    /// From now on frames are held and belong to `epoch`. Called in a pause with the gate closed. Ends
    /// *discard*.
    ///
    /// # Errors
    ///
    /// If frames of a later epoch are held; nothing has changed then.
    pub fn hold(&self, epoch: u64) -> Result<(), EpochError> {
        let mut ring = self.ring();
        ring.begin(epoch)?;
        ring.mode = OutputMode::Hold;
        ring.orders += 1;
        ring.forbidden = false;
        Ok(())
    }

    /// From now on frames belong to `epoch`. Called in each pause with the gate closed. Does not change the
    /// mode.
    ///
    /// # Errors
    ///
    /// If frames of a later epoch are held; nothing has changed then.
    pub fn set_epoch(&self, epoch: u64) -> Result<(), EpochError> {
        self.ring().begin(epoch)
    }

    /// Lets out, in order, the held frames of all epochs up to `through`, whose checkpoints are committed.
    ///
    /// `may` is asked before *each* frame: the moment it says no, this and every later release lets nothing
    /// out, and the frames stay, until [`hold`](Self::hold) or [`pass_through`](Self::pass_through) begins
    /// anew. It must not call this output.
    ///
    /// The epoch that still runs cannot be committed: its frames stay whatever `through` says.
    pub fn release(&self, through: u64, mut may: impl FnMut() -> bool) -> Released {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut released = Released::default();
        loop {
            let next = self.ring().copy_next(Some(through), &mut writer);
            match next {
                Next::Nothing => released.complete = true,
                Next::Forbidden => {}
                Next::Frame { .. } if !may() => self.ring().forbidden = true,
                Next::Frame { len, pair, number } => {
                    self.send_held(pair, &writer[..len], number, &mut released);
                    continue;
                }
            }
            break;
        }
        drop(writer);
        self.tell_space();
        released
    }

    /// Lets out everything held, in order, and from then on every frame at once. For a VM that goes on alone
    /// (its generation is won) or is not protected. Ends *discard*. A [`discard`](Self::discard) or
    /// [`hold`](Self::hold) that comes while this runs wins; the answer is then not `complete`.
    pub fn pass_through(&self) -> Released {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (order, mut left) = {
            let mut ring = self.ring();
            ring.forbidden = false;
            ring.orders += 1;
            (ring.orders, ring.slots.len())
        };
        let mut released = Released::default();
        // What is held now goes out without stopping the guest; it may push more behind it meanwhile.
        while left > 0 {
            let next = self.ring().copy_next(None, &mut writer);
            let Next::Frame { len, pair, number } = next else { break };
            self.send_held(pair, &writer[..len], number, &mut released);
            left -= 1;
        }
        // The rest, and the change of mode, in one step, so that no frame overtakes another.
        let mut ring = self.ring();
        let mut first = None;
        if ring.orders == order {
            while let Next::Frame { len, pair, number } = ring.copy_next(None, &mut writer) {
                let refused = self.sink.send(pair.into(), &writer[..len]).is_err();
                first = first.or(ring.sent(number, len, refused, &mut released));
            }
            ring.mode = OutputMode::PassThrough;
            released.complete = true;
        }
        drop(ring);
        drop(writer);
        report(first);
        self.tell_space();
        released
    }

    /// Drops what is held and every later frame. When this returns no frame is on its way to the sink. Only
    /// [`hold`](Self::hold) or [`pass_through`](Self::pass_through) end it.
    pub fn discard(&self) {
        {
            let mut ring = self.ring();
            ring.mode = OutputMode::Discard;
            ring.orders += 1;
            ring.stats.discarded_frames += ring.slots.len() as u64;
            ring.clear();
        }
        // A release in progress ends at its next look at the ring: wait for the frame it may be writing.
        drop(self.writer.lock().unwrap_or_else(PoisonError::into_inner));
        self.tell_space();
    }

    /// Calls `then` once, right after the next frame of the guest that leaves: the end of a takeover as the
    /// clients see it. Runs on the thread that sent the frame; must be short.
    pub fn on_first_frame(&self, then: impl FnOnce() + Send + 'static) {
        self.ring().first_frame = Some(Box::new(then));
    }

    /// Written when a push was refused and there is room again.
    pub fn space(&self) -> &EventFd {
        &self.space
    }

    /// What happens to frames now.
    pub fn mode(&self) -> OutputMode {
        self.ring().mode
    }

    /// The counters.
    pub fn stats(&self) -> OutputStats {
        let ring = self.ring();
        OutputStats { held_frames: ring.slots.len() as u64, held_bytes: ring.held_bytes as u64, ..ring.stats }
    }

    fn send_held(&self, pair: u16, packet: &[u8], number: u64, released: &mut Released) {
        let refused = self.sink.send(pair.into(), packet).is_err();
        let first = self.ring().sent(number, packet.len(), refused, released);
        report(first);
    }

    fn tell_space(&self) {
        let mut ring = self.ring();
        if std::mem::take(&mut ring.someone_waits) {
            // Fails only if the counter is full, and then it is readable anyway.
            let _ = self.space.write(1);
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn report(first: Option<FirstFrame>) {
    if let Some(then) = first {
        then();
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ring = self.ring();
        f.debug_struct("Output").field("mode", &ring.mode).field("stats", &ring.stats).finish_non_exhaustive()
    }
}

/// A held frame with its header: `len` bytes of the arena from `offset`.
#[derive(Clone, Copy, Debug)]
struct Slot {
    epoch: u64,
    /// The queue pair it came from.
    pair: u16,
    /// Counts the frames ever held: tells whether the front is still the frame that was copied out.
    number: u64,
    offset: usize,
    len: usize,
}

/// The frames held, the mode, and all that must change together with them.
struct Ring {
    mode: OutputMode,
    /// The epoch the guest runs in.
    epoch: u64,
    /// A release was refused permission: nothing may leave.
    forbidden: bool,
    /// Counts the orders to hold, pass through or discard: a later order ends a pass-through under way.
    orders: u64,
    someone_waits: bool,
    first_frame: Option<FirstFrame>,
    stats: OutputStats,
    limits: OutputLimits,
    next_number: u64,
    held_bytes: usize,
    /// Never longer than `limits.frames`, for which it has room from the start.
    slots: VecDeque<Slot>,
    /// Frames one after another; one that does not fit before the end begins at the start again.
    arena: Box<[u8]>,
    /// Where the next frame goes, if it fits there.
    tail: usize,
}

impl Ring {
    fn new(limits: OutputLimits, mode: OutputMode) -> Self {
        Self {
            mode,
            epoch: 0,
            forbidden: false,
            orders: 0,
            someone_waits: false,
            first_frame: None,
            stats: OutputStats::default(),
            limits,
            next_number: 0,
            held_bytes: 0,
            slots: VecDeque::with_capacity(limits.frames),
            arena: vec![0; limits.bytes].into_boxed_slice(),
            tail: 0,
        }
    }

    fn begin(&mut self, epoch: u64) -> Result<(), EpochError> {
        match self.slots.back() {
            Some(slot) if slot.epoch > epoch => Err(EpochError { asked: epoch, held: slot.epoch }),
            _ => {
                self.epoch = epoch;
                Ok(())
            }
        }
    }

    fn hold(&mut self, pair: usize, packet: &[u8]) -> Pushed {
        let room = if self.slots.len() < self.limits.frames { self.room(packet.len()) } else { None };
        let Some(offset) = room else {
            self.someone_waits = true;
            self.stats.full += 1;
            return Pushed::Full;
        };
        self.arena[offset..offset + packet.len()].copy_from_slice(packet);
        self.tail = offset + packet.len();
        self.slots.push_back(Slot {
            epoch: self.epoch,
            pair: pair as u16,
            number: self.next_number,
            offset,
            len: packet.len(),
        });
        self.next_number += 1;
        self.held_bytes += packet.len();
        self.stats.most_frames = self.stats.most_frames.max(self.slots.len() as u64);
        self.stats.most_bytes = self.stats.most_bytes.max(self.held_bytes as u64);
        Pushed::Taken
    }

    /// Where `len` bytes in one piece are free.
    fn room(&self, len: usize) -> Option<usize> {
        let Some(front) = self.slots.front() else {
            return (len <= self.arena.len()).then_some(0);
        };
        let head = front.offset;
        if self.tail > head {
            // Free: from the tail to the end, and from the start to the head.
            if self.arena.len() - self.tail >= len { Some(self.tail) } else { (head >= len).then_some(0) }
        } else {
            // The frames go round the end; free: from the tail to the head.
            (head - self.tail >= len).then_some(self.tail)
        }
    }

    /// Copies the front frame out if it may leave: any frame, or one of the epochs up to `through`.
    fn copy_next(&self, through: Option<u64>, copy: &mut [u8]) -> Next {
        if self.mode == OutputMode::Discard || self.forbidden {
            return Next::Forbidden;
        }
        let Some(slot) = self.slots.front() else { return Next::Nothing };
        // A commit of an epoch that has not ended cannot be; such a call is a mistake and must not leak a
        // frame.
        if through.is_some_and(|through| slot.epoch > through || slot.epoch >= self.epoch) {
            return Next::Nothing;
        }
        copy[..slot.len].copy_from_slice(&self.arena[slot.offset..slot.offset + slot.len]);
        Next::Frame { len: slot.len, pair: slot.pair, number: slot.number }
    }

    /// Takes the frame that has left out of the ring, unless a discard has done so meanwhile.
    fn sent(
        &mut self,
        number: u64,
        len: usize,
        refused: bool,
        released: &mut Released,
    ) -> Option<FirstFrame> {
        released.frames += 1;
        released.bytes += len as u64;
        self.stats.refused_frames += u64::from(refused);
        if self.slots.front().is_some_and(|slot| slot.number == number) {
            self.slots.pop_front();
            self.held_bytes -= len;
            self.stats.released_frames += 1;
        }
        self.first_frame.take()
    }

    fn clear(&mut self) {
        self.slots.clear();
        self.held_bytes = 0;
        self.tail = 0;
    }
}
