//! The time that the protocol's state machines are fed with.

use std::time::{Duration, Instant};

/// Time since this process began to take part. It goes on while the process is stopped (CLOCK_MONOTONIC), which is what
/// makes a stopped primary notice that it was away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// A clock that begins now.
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// The time since the start.
    pub(crate) fn now(&self) -> Duration {
        self.0.elapsed()
    }
}
