//! The frames that the guest sends: held output of the network card.
//!
//! Every frame the guest sends goes through one [`Output`], behind the machine's
//! [valve](crate::devices::valve). It is stored with its tag and leaves, in the order in which the guest sent
//! it, when the permission says so:
//!
//! ```text
//!             push (device thread, inside the gate)
//!               │
//!   hold        ├─► [e5 e5 e6 e6 e6 e7] ──drain, after commit(6)──► sink (tap)
//!   pass through├─► [e0 e0 e0] ──drain, by the device's own thread──► sink
//!   discard     ×
//! ```
//!
//! Who calls what:
//!
//! | caller | calls |
//! |---|---|
//! | device thread, inside the gate | [`push`](Output::push) |
//! | device thread, outside the gate | [`rest`](Output::rest), [`announce`](Output::announce) |
//! | the thread that gave the valve an order | [`drain`](Output::drain) |
//!
//! Two locks, always in this order: `writer` is held over system calls by the one thread that sends; `ring`
//! is held for moments only, so neither a push nor an order ever waits for the sink.
//!
//! A frame is held with the header in front of it, which tells the tap what the guest has left to the host.
//! Frames and bytes are bounded and allocated at the start. A full ring refuses the frame and leaves it with
//! the guest; [`Output::space`] is written when there is room again.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::offload::HEADER;
use super::ring::{Frame, FrameRing};
use crate::devices::valve::{Fate, HeldOutput, Order, OutputMode, Permit, Tag};

/// Longest frame in bytes: the largest IP packet, Ethernet header, one VLAN tag; no checksum. A guest that
/// leaves the cutting of TCP segments to the host sends such frames.
pub const MAX_FRAME: usize = 14 + 4 + 65_535;

/// Longest packet: a frame with its header.
pub const MAX_PACKET: usize = HEADER + MAX_FRAME;

// Every frame of the guest fits into the frame tail.
const _: () = assert!(MAX_PACKET == outlive_epoch::MAX_PACKET_BYTES);

/// Where frames go: the tap, or a test that writes them down.
pub trait FrameSink: Send + Sync {
    /// Sends one packet: a frame behind the header that says what is left to do about it. It comes from the
    /// guest's queue pair number `pair`; the answers should come back there. Must not block; an error means
    /// that the frame is gone, as on a wire that is unplugged.
    fn send(&self, pair: usize, packet: &[u8]) -> io::Result<()>;
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

/// What happened to one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a frame that found no room must stay with the guest"]
pub enum Pushed {
    /// On its way, held or dropped, as the mode says.
    Taken,
    /// There is no room. Nothing happened; try again when [`Output::space`] is written.
    Full,
}

/// What a drain let out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Frames that left.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Everything that may leave has left. Otherwise the permission was withdrawn, or an order to hold or to
    /// discard came meanwhile.
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

/// The frames of a network card on their way out.
pub struct Output {
    ring: Mutex<Ring>,
    /// Copy of the frame being sent, so that the ring is not locked over a system call.
    writer: Mutex<Box<[u8]>>,
    sink: Arc<dyn FrameSink>,
    permit: Arc<Permit>,
    space: EventFd,
    /// The epoch of the newest frame in the ring, and one more; 0: the ring is empty. Written with `ring`
    /// locked.
    newest: AtomicU64,
}

type FirstFrame = Box<dyn FnOnce() + Send>;
/// The right to send, with room for a copy of the frame.
type Writer<'a> = MutexGuard<'a, Box<[u8]>>;

/// What may leave next.
enum Next {
    /// A frame, copied out, under this order.
    Frame { len: usize, pair: u16, number: u64, order: Order },
    /// Nothing more.
    Nothing,
    /// No frame may leave.
    Forbidden,
}

impl Output {
    /// An output in front of `sink` that asks `permit`. Everything it will ever need is allocated here.
    ///
    /// # Errors
    ///
    /// If the kernel has no eventfd to give.
    pub fn new(sink: Arc<dyn FrameSink>, limits: OutputLimits, permit: Arc<Permit>) -> io::Result<Self> {
        Ok(Self {
            ring: Mutex::new(Ring::new(limits)),
            writer: Mutex::new(vec![0; MAX_PACKET].into_boxed_slice()),
            sink,
            permit,
            space: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            newest: AtomicU64::new(0),
        })
    }

    /// Takes a frame, with its header, from the guest's queue pair number `pair`. Called by the device thread
    /// inside the gate, before it gives the descriptor back; makes no system call. The order of the pushes is
    /// the order in which the frames leave, whatever pairs they come from.
    ///
    /// # Panics
    ///
    /// If the packet is longer than [`MAX_PACKET`].
    pub fn push(&self, pair: usize, packet: &[u8]) -> Pushed {
        assert!(packet.len() <= MAX_PACKET, "the device checks the length of frames");
        let mut ring = self.ring();
        let tag = self.permit.tag();
        if tag.mode == OutputMode::Discard {
            ring.stats.discarded_frames += 1;
            return Pushed::Taken;
        }
        let pushed = ring.push(pair, packet, tag);
        self.note_newest(&ring);
        drop(ring);
        // A frame that found no room waits too.
        self.permit.note_held(tag);
        pushed
    }

    /// After each batch of the device thread, outside the gate: lets out what passes through, and tells of
    /// what is held.
    pub fn rest(&self) {
        self.permit.tell_held();
        self.drain_if_open();
    }

    /// Sends a packet that carries nothing of the guest's state (an announcement of its address), held by no
    /// epoch. Returns whether the output was allowed to speak: only while it passes frames through. A
    /// protected VM may have lost its place without knowing it yet, and an announcement would pull its
    /// address away from the host where it runs. Outside the gate.
    pub fn announce(&self, packet: &[u8]) -> bool {
        let passes = || self.permit.order().mode() == OutputMode::PassThrough;
        if !passes() {
            return false;
        }
        // With the lock, so that a thread that discards can wait for its end.
        let writer = self.writer();
        let may = passes();
        if may {
            // An announcement lost on the wire is repeated by its schedule.
            let _ = self.sink.send(0, packet);
        }
        drop(writer);
        self.tell_space();
        may
    }

    /// Lets out, in order, the frames that may leave.
    ///
    /// What was in the ring when this began, and, if it may all leave, what was pushed meanwhile too; not
    /// more, so that a guest which sends on and on keeps nobody but its own device thread. The permission is
    /// asked before *each* frame. The moment the lease has ended, this and every later drain lets nothing
    /// out, and the frames stay, until the valve is ordered to hold or to open anew.
    pub fn drain(&self) -> Released {
        self.drain_with(self.writer())
    }

    fn drain_with(&self, mut writer: Writer<'_>) -> Released {
        let mut released = Released::default();
        let began = self.permit.order();
        let mut last = self.ring().next_number;
        let mut extended = false;
        loop {
            let next = {
                let mut ring = self.ring();
                let next = ring.copy_next(&self.permit, last, &mut writer);
                self.note_newest(&ring);
                next
            };
            match next {
                Next::Frame { len, pair, number, order } => {
                    // Invariant 1: right before the system call, because this process may have been stopped
                    // for an hour since the last look.
                    if self.permit.confirms(order) {
                        self.send(pair, &writer[..len], number, &mut released);
                    }
                }
                Next::Nothing if !extended && self.passes(began) => {
                    extended = true;
                    last = self.ring().next_number;
                }
                Next::Nothing => {
                    let cut = began.mode() == OutputMode::PassThrough && !self.passes(began);
                    released.complete = !cut;
                    break;
                }
                Next::Forbidden => break,
            }
        }
        drop(writer);
        self.tell_space();
        released
    }

    /// Drains what passes through. For the device's thread after a batch, outside the gate. Held frames wait
    /// for the thread that commits them. Does not wait for another thread that drains: [`space`](Self::space)
    /// is written when it has done.
    pub fn drain_if_open(&self) {
        // The thread that gave an order to open drains what was pushed before it.
        if self.newest.load(Ordering::Acquire) == 0 || self.mode() != OutputMode::PassThrough {
            return;
        }
        let writer = self.try_writer().or_else(|| {
            // Before the second look: who holds the lock now finds this when it is given back.
            self.ring().someone_waits = true;
            self.try_writer()
        });
        if let Some(writer) = writer {
            let _ = self.drain_with(writer);
        }
    }

    /// Copies a frame that is held for this epoch: the first one whose number is at least `from`. Returns its
    /// number and its queue pair; `None` after the last. For whoever tells the standby what a checkpoint's epoch
    /// has sent, while that epoch is not committed. Any thread may call this.
    pub fn copy_held(&self, epoch: u64, from: u64, copy: &mut Vec<u8>) -> Option<(u64, u16)> {
        let ring = self.ring();
        let frame = ring.held(epoch, from)?;
        copy.clear();
        copy.extend_from_slice(frame.packet);
        Some((frame.label.number, frame.pair))
    }

    /// All that was held for the epochs up to this one has left, or there was nothing. 0 if that is not known.
    pub fn released_through(&self) -> u64 {
        let ring = self.ring();
        let oldest = ring.frames.front().map(|front| front.label.tag.epoch);
        // Asked with the ring locked: the running epoch's output may come later, but none of an epoch before.
        let tag = self.permit.tag();
        if tag.mode != OutputMode::Hold {
            return 0;
        }
        oldest.unwrap_or(tag.epoch).min(tag.epoch).saturating_sub(1)
    }

    /// Calls `then` once, right after the next frame of the guest that leaves: the end of a takeover as the
    /// clients see it. Runs on the thread that sent the frame; must be short.
    pub fn on_first_frame(&self, then: impl FnOnce() + Send + 'static) {
        self.ring().first_frame = Some(Box::new(then));
    }

    /// Written when a push was refused and there is room again, or when the device's thread could not drain.
    pub fn space(&self) -> &EventFd {
        &self.space
    }

    /// The tag of what passes through the card now. Inside the gate.
    pub(super) fn tag(&self) -> Tag {
        self.permit.tag()
    }

    /// What happens to frames now.
    pub fn mode(&self) -> OutputMode {
        self.permit.order().mode()
    }

    /// The counters.
    pub fn stats(&self) -> OutputStats {
        let mut ring = self.ring();
        ring.drop_discarded(&self.permit, self.permit.order());
        self.note_newest(&ring);
        let (held_frames, held_bytes) = (ring.frames.len() as u64, ring.frames.bytes() as u64);
        OutputStats { held_frames, held_bytes, ..ring.stats }
    }

    fn passes(&self, order: Order) -> bool {
        order.mode() == OutputMode::PassThrough && self.permit.order() == order
    }

    fn send(&self, pair: u16, packet: &[u8], number: u64, released: &mut Released) {
        let refused = self.sink.send(pair.into(), packet).is_err();
        released.frames += 1;
        released.bytes += packet.len() as u64;
        let first = {
            let mut ring = self.ring();
            let first = ring.sent(number, refused);
            self.note_newest(&ring);
            first
        };
        report(first);
    }

    fn tell_space(&self) {
        let mut ring = self.ring();
        if std::mem::take(&mut ring.someone_waits) {
            // Fails only if the counter is full, and then it is readable anyway.
            let _ = self.space.write(1);
        }
    }

    fn note_newest(&self, ring: &Ring) {
        let newest = ring.frames.newest().map_or(0, |it| it.tag.epoch.saturating_add(1));
        self.newest.store(newest, Ordering::Release);
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever gives this back tells the device thread, which may have found it taken.
    fn writer(&self) -> Writer<'_> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_writer(&self) -> Option<Writer<'_>> {
        match self.writer.try_lock() {
            Ok(writer) => Some(writer),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl HeldOutput for Output {
    fn newest_held(&self) -> Option<u64> {
        self.newest.load(Ordering::Acquire).checked_sub(1)
    }

    fn drain(&self) {
        let _ = Self::drain(self);
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
        f.debug_struct("Output")
            .field("permit", &self.permit)
            .field("stats", &ring.stats)
            .finish_non_exhaustive()
    }
}

/// What is kept with a frame.
#[derive(Clone, Copy, Debug)]
struct Label {
    tag: Tag,
    /// Counts the frames ever pushed: tells whether the front is still the frame that was copied out.
    number: u64,
}

/// The frames on their way out, and all that must change together with them.
struct Ring {
    /// The device's thread is to be told at the end of the next drain.
    someone_waits: bool,
    first_frame: Option<FirstFrame>,
    stats: OutputStats,
    next_number: u64,
    frames: FrameRing<Label>,
}

impl Ring {
    fn new(limits: OutputLimits) -> Self {
        Self {
            someone_waits: false,
            first_frame: None,
            stats: OutputStats::default(),
            next_number: 0,
            frames: FrameRing::new(limits),
        }
    }

    fn push(&mut self, pair: usize, packet: &[u8], tag: Tag) -> Pushed {
        let label = Label { tag, number: self.next_number };
        if !self.frames.push(label, pair as u16, packet) {
            self.someone_waits = true;
            self.stats.full += 1;
            return Pushed::Full;
        }
        self.next_number += 1;
        self.stats.most_frames = self.stats.most_frames.max(self.frames.len() as u64);
        self.stats.most_bytes = self.stats.most_bytes.max(self.frames.bytes() as u64);
        Pushed::Taken
    }

    /// Takes the frames out that a discard has caught: they are the oldest ones.
    fn drop_discarded(&mut self, permit: &Permit, order: Order) {
        while let Some(front) = self.frames.front()
            && permit.fate(order, front.label.tag) == Fate::Dropped
        {
            self.frames.pop();
            self.stats.discarded_frames += 1;
        }
    }

    /// Copies the front frame out if it may leave and is older than the frame number `last`.
    fn copy_next(&mut self, permit: &Permit, last: u64, copy: &mut [u8]) -> Next {
        let order = permit.order();
        self.drop_discarded(permit, order);
        if order.mode() == OutputMode::Discard || order.is_refused() {
            return Next::Forbidden;
        }
        let front = self.frames.front().filter(|front| front.label.number < last);
        let Some(front) = front.filter(|front| permit.fate(order, front.label.tag) == Fate::Leaves) else {
            return Next::Nothing;
        };
        let len = front.packet.len();
        copy[..len].copy_from_slice(front.packet);
        Next::Frame { len, pair: front.pair, number: front.label.number, order }
    }

    /// Takes the frame that has left out of the ring, unless a discard has done so meanwhile.
    fn sent(&mut self, number: u64, refused: bool) -> Option<FirstFrame> {
        self.stats.refused_frames += u64::from(refused);
        if let Some(front) = self.frames.front().filter(|front| front.label.number == number) {
            match front.label.tag.mode {
                OutputMode::Hold => self.stats.released_frames += 1,
                _ => self.stats.passed_frames += 1,
            }
            self.frames.pop();
        }
        self.first_frame.take()
    }

    /// The frame of this epoch with the smallest number from `from` on. Epochs in the ring never go back.
    fn held(&self, epoch: u64, from: u64) -> Option<Frame<'_, Label>> {
        let place = self.frames.place_after(|it| it.tag.epoch < epoch || it.number < from);
        let frame = self.frames.get(place)?;
        (frame.label.tag.epoch == epoch && frame.label.tag.mode == OutputMode::Hold).then_some(frame)
    }
}
