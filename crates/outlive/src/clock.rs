//! The clock of the protocol's state machines.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since this process began to take part. It runs on while the process is stopped and while the host
/// sleeps (CLOCK_BOOTTIME), so a primary notices that it was away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Duration);

impl Clock {
    /// A clock that begins now.
    pub(crate) fn start() -> Self {
        Self(boot_time())
    }

    /// The time since the start.
    pub(crate) fn now(&self) -> Duration {
        boot_time().saturating_sub(self.0)
    }

    /// A time of this clock as one of CLOCK_BOOTTIME itself.
    pub(crate) fn boot_time(&self, since_start: Duration) -> Duration {
        self.0.saturating_add(since_start)
    }

    /// A time of CLOCK_BOOTTIME as one of this clock.
    pub(crate) fn since_start(&self, boot_time: Duration) -> Duration {
        boot_time.saturating_sub(self.0)
    }
}

fn boot_time() -> Duration {
    // The call can only fail for a clock that does not exist; Linux has this one since 2.6.39.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists");
    Duration::new(now.tv_sec() as u64, now.tv_nsec() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on() {
        let clock = Clock::start();
        let before = clock.now();
        std::thread::sleep(Duration::from_millis(3));
        assert!(clock.now() >= before + Duration::from_millis(3));
    }
}
