//! Connections that have not introduced themselves yet.
//!
//! There is room for few. When there is none, the oldest goes: a primary needs some milliseconds, and a stranger that
//! says nothing has been here for longer. So strangers would have to come by the thousand a second to keep a primary
//! out, and they cost no more threads and memory than that.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use outlive_pair::Link;

use crate::link::Hangup;

/// How many there may be.
const MAX_HALF_OPEN: usize = 64;

/// The connections, the oldest first.
#[derive(Default)]
pub(super) struct HalfOpen(Mutex<VecDeque<(Link, Hangup)>>);

impl HalfOpen {
    /// Takes a new one in. Returns whether another one had to go for it.
    pub(super) fn enter(&self, number: Link, hangup: Hangup) -> bool {
        let mut all = self.all();
        all.push_back((number, hangup));
        let oldest = if all.len() > MAX_HALF_OPEN { all.pop_front() } else { None };
        drop(all);
        oldest.map(|(_, oldest)| oldest.hang_up()).is_some()
    }

    /// It has introduced itself, or is gone.
    pub(super) fn leave(&self, number: Link) {
        self.all().retain(|(other, _)| *other != number);
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<(Link, Hangup)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
