//! What a port has printed lately, for any number of readers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use outlive_machine::devices::port::PortSink;

/// How many bytes are kept: a new client is shown them, and a reader may fall behind by this much.
pub(crate) const HISTORY: usize = 64 << 10;

/// The last [`HISTORY`] bytes of a port. The guest never waits here: a reader that is too slow loses the
/// oldest bytes.
#[derive(Debug)]
pub(crate) struct Hub {
    state: Mutex<State>,
    news: EventFd,
}

#[derive(Debug)]
struct State {
    ring: Box<[u8]>,
    /// Bytes printed so far; the next one goes to `end % HISTORY`.
    end: u64,
    /// Whether the server waits for news. If not, printing costs no system call.
    asleep: bool,
}

/// What [`Hub::read`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    /// Bytes that were overwritten before the reader came.
    pub(crate) lost: u64,
    /// Bytes read.
    pub(crate) count: usize,
}

impl Hub {
    pub(crate) fn new() -> io::Result<Self> {
        let news = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let ring = vec![0; HISTORY].into_boxed_slice();
        Ok(Self { state: Mutex::new(State { ring, end: 0, asleep: false }), news })
    }

    /// Position of the oldest byte that is kept: where a new reader begins.
    pub(crate) fn oldest(&self) -> u64 {
        self.state().end.saturating_sub(HISTORY as u64)
    }

    /// Reads from `position`, and moves it.
    pub(crate) fn read(&self, position: &mut u64, to: &mut [u8]) -> Read {
        let state = self.state();
        let oldest = state.end.saturating_sub(HISTORY as u64);
        let lost = oldest.saturating_sub(*position);
        *position = (*position).max(oldest);
        let count = to.len().min((state.end - *position) as usize);
        let from = (*position % HISTORY as u64) as usize;
        let first = count.min(HISTORY - from);
        to[..first].copy_from_slice(&state.ring[from..from + first]);
        to[first..count].copy_from_slice(&state.ring[..count - first]);
        *position += count as u64;
        Read { lost, count }
    }

    /// Asks for [`news`](Self::news) about bytes from here on, and says how many there have been.
    pub(crate) fn sleep(&self) -> u64 {
        let mut state = self.state();
        state.asleep = true;
        state.end
    }

    /// Readable once something was printed after [`sleep`](Self::sleep).
    pub(crate) fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// Makes [`news`](Self::news) quiet.
    pub(crate) fn clear_news(&self) {
        // Fails only when it is quiet already.
        let _ = self.news.read();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortSink for Hub {
    fn write(&self, bytes: &[u8]) {
        let mut state = self.state();
        // If more was printed than is kept, only the end is seen.
        let skipped = bytes.len().saturating_sub(HISTORY);
        state.end += skipped as u64;
        for part in bytes[skipped..].chunks(HISTORY) {
            let at = (state.end % HISTORY as u64) as usize;
            let first = part.len().min(HISTORY - at);
            state.ring[at..at + first].copy_from_slice(&part[..first]);
            state.ring[..part.len() - first].copy_from_slice(&part[first..]);
            state.end += part.len() as u64;
        }
        if std::mem::take(&mut state.asleep) {
            drop(state);
            // Fails only if the counter is full, and then the server is being woken anyway.
            let _ = self.news.write(1);
        }
    }
}
