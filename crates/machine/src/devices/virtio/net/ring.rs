//! Frames one after another in a fixed piece of memory, each with a label.

use std::collections::VecDeque;

use super::output::OutputLimits;

/// A frame with its header: `len` bytes of the arena from `offset`.
#[derive(Clone, Copy, Debug)]
struct Slot<L> {
    label: L,
    pair: u16,
    offset: usize,
    len: usize,
}

/// A frame in a [`FrameRing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a, L> {
    /// What its owner keeps with it.
    pub label: L,
    /// The queue pair of the guest that it belongs to.
    pub pair: u16,
    /// The frame behind its header.
    pub packet: &'a [u8],
}

/// A queue of frames. Frames and bytes are bounded; all memory is allocated when it is made.
#[derive(Debug)]
pub struct FrameRing<L> {
    frames: usize,
    bytes: usize,
    /// Never longer than `frames`, for which it has room from the start.
    slots: VecDeque<Slot<L>>,
    /// One that does not fit before the end begins at the start again.
    arena: Box<[u8]>,
    /// Where the next frame goes, if it fits there.
    tail: usize,
}

impl<L: Copy> FrameRing<L> {
    /// An empty ring with room for so much.
    pub fn new(limits: OutputLimits) -> Self {
        Self {
            frames: limits.frames,
            bytes: 0,
            slots: VecDeque::with_capacity(limits.frames),
            arena: vec![0; limits.bytes].into_boxed_slice(),
            tail: 0,
        }
    }

    /// How many frames it has.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// How many bytes its frames have, with their headers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies a frame in behind all others. Returns whether there was room.
    #[must_use = "a frame that found no room is not in the ring"]
    pub fn push(&mut self, label: L, pair: u16, packet: &[u8]) -> bool {
        let room = if self.slots.len() < self.frames { self.room(packet.len()) } else { None };
        let Some(offset) = room else { return false };
        self.arena[offset..offset + packet.len()].copy_from_slice(packet);
        self.tail = offset + packet.len();
        self.slots.push_back(Slot { label, pair, offset, len: packet.len() });
        self.bytes += packet.len();
        true
    }

    /// The oldest frame.
    pub fn front(&self) -> Option<Frame<'_, L>> {
        self.get(0)
    }

    /// The frame at this place, counted from the oldest.
    pub fn get(&self, place: usize) -> Option<Frame<'_, L>> {
        let &Slot { label, pair, offset, len } = self.slots.get(place)?;
        Some(Frame { label, pair, packet: &self.arena[offset..offset + len] })
    }

    /// The label of the newest frame.
    pub fn newest(&self) -> Option<L> {
        self.slots.back().map(|slot| slot.label)
    }

    /// The place of the first frame of which this is false, if the frames before it are those of which it is
    /// true.
    pub fn place_after(&self, is_before: impl Fn(L) -> bool) -> usize {
        self.slots.partition_point(|slot| is_before(slot.label))
    }

    /// Drops the oldest frame.
    pub fn pop(&mut self) {
        if let Some(slot) = self.slots.pop_front() {
            self.bytes -= slot.len;
        }
    }

    /// Drops all frames.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.bytes = 0;
    }

    /// All frames, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = Frame<'_, L>> {
        (0..self.slots.len()).filter_map(|place| self.get(place))
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
}
