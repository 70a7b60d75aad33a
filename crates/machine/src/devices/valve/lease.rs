//! Until when committed output may leave.

use std::time::Duration;

use super::sync::{AtomicU64, Ordering};

type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// How long the decision to let output out remains valid.
///
/// Between a commit and the write of a frame this process may be stopped for an hour, and meanwhile the
/// standby may have won the VM. So ask [`holds`](Self::holds) right before the write, with a fresh clock.
pub struct Lease {
    /// In nanoseconds of the clock.
    until: AtomicU64,
    clock: Clock,
}

impl Lease {
    /// A lease by CLOCK_BOOTTIME, which runs on while the host sleeps. It holds until it is set.
    pub fn new() -> Self {
        Self::with_clock(boot_time)
    }

    /// A lease by another clock.
    pub fn with_clock(clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { until: AtomicU64::new(u64::MAX), clock: Box::new(clock) }
    }

    /// From now on it holds until this time of its clock; `None`: forever.
    pub fn set(&self, until: Option<Duration>) {
        self.until.store(until.map_or(u64::MAX, nanos), Ordering::SeqCst);
    }

    /// Whether it holds at this moment.
    pub fn holds(&self) -> bool {
        // The clock is read last: this thread may have been stopped before.
        let until = self.until.load(Ordering::SeqCst);
        nanos(self.now()) < until
    }

    /// The time of its clock.
    pub(super) fn now(&self) -> Duration {
        (self.clock)()
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("until", &self.until).finish_non_exhaustive()
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The time since the host was started, its sleep included (CLOCK_BOOTTIME).
fn boot_time() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    // It fails only for a clock that does not exist; Linux has had this one since 2.6.39.
    now.expect("CLOCK_BOOTTIME exists").into()
}
