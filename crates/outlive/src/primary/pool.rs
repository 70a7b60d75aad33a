//! The buffers that hold the checkpoints of one protection between the pause and the link.
//!
//! The state machine decides how many checkpoints may be in flight. A buffer returns here once it is sent,
//! before its checkpoint is acknowledged; only a checkpoint that goes out in parts uses more than one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outlive_machine::Outgoing;

#[derive(Default)]
struct State {
    free: Vec<Outgoing>,
    /// The protection has not ended.
    open: bool,
    /// Whether a thread found no buffer, and wants to know when one returns.
    missed: bool,
}

/// The pool; see the module.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    returned: Condvar,
}

impl Pool {
    /// Opens the pool with these buffers.
    pub(crate) fn open(&self, buffers: Vec<Outgoing>) {
        let mut state = self.lock();
        *state = State { free: buffers, open: true, missed: false };
    }

    /// Ends the pool: buffers that return later are freed.
    pub(crate) fn close(&self) {
        let ended = std::mem::take(&mut *self.lock());
        // After the lock, because freeing large memory takes time.
        drop(ended);
    }

    /// Takes a buffer. If there is none, the next [`put`](Self::put) returns that one was missed.
    pub(crate) fn take(&self) -> Option<Outgoing> {
        let mut state = self.lock();
        let buffer = state.free.pop();
        state.missed = buffer.is_none();
        buffer
    }

    /// Whether a buffer is free. If none is, the next [`put`](Self::put) returns that one was missed.
    pub(crate) fn has_free(&self) -> bool {
        let mut state = self.lock();
        state.missed = state.free.is_empty();
        !state.missed
    }

    /// Takes a buffer, and waits at most `patience` for one.
    pub(crate) fn take_within(&self, patience: Duration) -> Option<Outgoing> {
        let wait = self.returned.wait_timeout_while(self.lock(), patience, |state| state.free.is_empty());
        wait.unwrap_or_else(PoisonError::into_inner).0.free.pop()
    }

    /// Gives a buffer back. Returns whether one was missed meanwhile.
    pub(crate) fn put(&self, buffer: Outgoing) -> bool {
        let mut state = self.lock();
        if !state.open {
            drop(state);
            return false;
        }
        state.free.push(buffer);
        let missed = std::mem::take(&mut state.missed);
        drop(state);
        self.returned.notify_one();
        missed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn buffer() -> Outgoing {
        Outgoing::new(1, 0).unwrap()
    }

    #[test]
    fn a_buffer_that_was_missed_is_told_of_once() {
        let pool = Pool::default();
        pool.open(vec![buffer()]);
        assert!(pool.has_free());
        let taken = pool.take().unwrap();
        assert!(!pool.put(taken), "nobody missed it");
        let taken = pool.take().unwrap();
        assert!(pool.take().is_none());
        assert!(pool.put(taken));
        let taken = pool.take().unwrap();
        assert!(!pool.has_free());
        assert!(pool.put(taken));
    }

    #[test]
    fn who_waits_gets_it() {
        let pool = Pool::default();
        pool.open(vec![buffer()]);
        let taken = pool.take().unwrap();
        assert!(pool.take_within(Duration::from_millis(1)).is_none());
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| pool.put(taken));
            assert!(pool.take_within(Duration::from_secs(60)).is_some());
        });
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn an_ended_protection_takes_nothing_back() {
        let pool = Pool::default();
        pool.open(vec![buffer(), buffer()]);
        let taken = pool.take().unwrap();
        assert!(pool.take().is_some() && pool.take().is_none());
        pool.close();
        assert!(!pool.put(taken));
        assert!(!pool.has_free());
    }
}
