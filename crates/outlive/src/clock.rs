//! The time that the protocol's state machines are fed with.

use std::time::{Duration, Instant};

/// Time since this process began to take part. It goes on while the process is stopped (CLOCK_MONOTONIC), which is what
/// makes a stopped primary notice that it was away.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that begins now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time since the start.
    pub fn now(&self) -> Duration {
        self.0.elapsed()
    }
}
