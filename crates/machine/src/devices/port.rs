//! The host's end of a character port: what the guest writes and what people type.
//!
//! Both directions are bounded and neither waits for the other side. Output goes to a [`PortSink`] at the
//! moment when the guest writes it, on the vCPU's or device's thread; input waits in a [`PortInput`] until
//! the guest takes it, and its sender sees how much room there is.
//!
//! Neither is part of a checkpoint. Output is not held either: a person may see a line of an epoch that a
//! takeover takes back and prints again, or never prints.

// UNSAFETY: an eventfd lends its descriptor as a number only.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// How many bytes may wait for the guest.
pub const INPUT_BYTES: usize = 4096;

/// Takes what the guest writes.
///
/// Called on vCPU and device threads, with device locks held and inside the gate: must not block. A sink
/// without room loses bytes.
pub trait PortSink: Send + Sync {
    /// Takes the next bytes of the port.
    fn write(&self, bytes: &[u8]);
}

/// A sink that throws everything away.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSink;

impl PortSink for NoSink {
    fn write(&self, _bytes: &[u8]) {}
}

/// The host's end of one port. It outlives the device: a standby has one machine after the other.
#[derive(Clone)]
pub struct PortEnd {
    /// Takes the guest's output.
    pub sink: Arc<dyn PortSink>,
    /// The input for the guest.
    pub input: Arc<PortInput>,
}

impl PortEnd {
    /// An end whose output goes to `sink`.
    ///
    /// # Errors
    /// The operating system's, when it has no more eventfds.
    pub fn new(sink: Arc<dyn PortSink>) -> io::Result<Self> {
        Ok(Self { sink, input: Arc::new(PortInput::new()?) })
    }
}

impl std::fmt::Debug for PortEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortEnd").field("input", &self.input).finish_non_exhaustive()
    }
}

/// Bytes on their way to the guest: at most [`INPUT_BYTES`], and none unless the guest runs here.
#[derive(Debug)]
pub struct PortInput {
    waiting: Mutex<Waiting>,
    arrived: EventFd,
    room: EventFd,
}

#[derive(Debug)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// The guest runs here.
    live: bool,
    /// Whether a sender was told that there is no room and wants to know when there is.
    wants_room: bool,
    dropped: u64,
}

impl PortInput {
    /// An empty input to which no guest listens.
    ///
    /// # Errors
    /// The operating system's, when it has no more eventfds.
    pub fn new() -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let waiting = Waiting {
            bytes: VecDeque::with_capacity(INPUT_BYTES),
            live: false,
            wants_room: false,
            dropped: 0,
        };
        Ok(Self { waiting: Mutex::new(waiting), arrived: event()?, room: event()? })
    }

    /// How many bytes [`push`](Self::push) would take; if none, [`room_event`](Self::room_event) is written
    /// as soon as it would. While no guest runs here there is room for everything, because everything is
    /// dropped: what a person typed at a standby must not reach the guest at the moment of a takeover.
    pub fn room(&self) -> usize {
        let mut waiting = self.waiting();
        if !waiting.live {
            return INPUT_BYTES;
        }
        let room = INPUT_BYTES - waiting.bytes.len();
        waiting.wants_room |= room == 0;
        room
    }

    /// Queues as many bytes for the guest as there is room for. Returns how many are dealt with; the caller
    /// keeps the rest and offers them again, or counts them as lost with [`lose`](Self::lose).
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.waiting();
        if !waiting.live {
            waiting.dropped += bytes.len() as u64;
            return bytes.len();
        }
        let taken = bytes.len().min(INPUT_BYTES - waiting.bytes.len());
        waiting.bytes.extend(&bytes[..taken]);
        drop(waiting);
        if taken > 0 {
            signal(&self.arrived);
        }
        taken
    }

    /// Counts bytes that were thrown away because there was no room.
    pub fn lose(&self, bytes: u64) {
        self.waiting().dropped += bytes;
    }

    /// How many bytes were thrown away.
    pub fn dropped(&self) -> u64 {
        self.waiting().dropped
    }

    /// Written when there is room again; only after [`room`](Self::room) has said that there is none.
    pub fn room_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd owns the descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.room.as_raw_fd()) }
    }

    /// Resets [`room_event`](Self::room_event).
    pub fn clear_room_event(&self) {
        // Fails only when it is reset already.
        let _ = self.room.read();
    }

    /// Written when bytes arrive: the device's thread waits for it.
    pub(crate) fn arrived(&self) -> &EventFd {
        &self.arrived
    }

    /// Takes the oldest bytes; returns how many.
    pub(crate) fn take(&self, to: &mut [u8]) -> usize {
        let mut waiting = self.waiting();
        let count = to.len().min(waiting.bytes.len());
        for (to, byte) in to.iter_mut().zip(waiting.bytes.drain(..count)) {
            *to = byte;
        }
        if count > 0 {
            self.tell_room(&mut waiting);
        }
        count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting().bytes.is_empty()
    }

    /// Sets whether the guest runs here. Waiting bytes are dropped either way.
    pub(crate) fn set_live(&self, live: bool) {
        let mut waiting = self.waiting();
        waiting.live = live;
        waiting.dropped += waiting.bytes.len() as u64;
        waiting.bytes.clear();
        self.tell_room(&mut waiting);
    }

    fn tell_room(&self, waiting: &mut Waiting) {
        if std::mem::take(&mut waiting.wants_room) {
            signal(&self.room);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn signal(event: &EventFd) {
    // Fails only if the counter is full, and then the reader is being woken anyway.
    let _ = event.write(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_waits_for_a_guest_that_does_not_run() {
        let input = PortInput::new().unwrap();
        assert_eq!(input.push(b"rm -rf\n"), 7);
        assert_eq!((input.room(), input.dropped(), input.is_empty()), (INPUT_BYTES, 7, true));
        input.set_live(true);
        assert_eq!(input.take(&mut [0; 8]), 0);
    }

    #[test]
    fn bytes_come_in_order_and_room_is_told() {
        let input = PortInput::new().unwrap();
        input.set_live(true);
        assert_eq!(input.push(&[7; INPUT_BYTES + 5]), INPUT_BYTES);
        assert_eq!(input.arrived().read().unwrap(), 1);
        assert!(input.room.read().is_err(), "nobody has asked");
        assert_eq!(input.push(b"x"), 0);
        assert_eq!(input.room(), 0);
        let mut some = [0; 10];
        assert_eq!(input.take(&mut some), 10);
        assert_eq!(input.room.read().unwrap(), 1);
        assert_eq!((input.room(), input.push(b"abc")), (10, 3));
        let mut rest = vec![0; INPUT_BYTES];
        assert_eq!(input.take(&mut rest), INPUT_BYTES - 7);
        assert_eq!(&rest[INPUT_BYTES - 10..INPUT_BYTES - 7], b"abc");
    }

    #[test]
    fn what_waits_is_dropped_with_the_guest() {
        let input = PortInput::new().unwrap();
        input.set_live(true);
        input.push(&[0; INPUT_BYTES]);
        assert_eq!(input.room(), 0);
        input.set_live(false);
        assert_eq!((input.room.read().unwrap(), input.dropped()), (1, INPUT_BYTES as u64));
        assert!(input.is_empty());
    }
}
