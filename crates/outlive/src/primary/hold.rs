//! Holds the guest where it writes more than the link carries, so that what waits to be sent stays small.
//!
//! In the base synchronisation it may write so many pages a second ([`brake`](super::brake)). While it is
//! protected, an epoch may have as many pages as a buffer: a guest that has written them while no checkpoint can
//! be taken, because all are on their way, waits for the next one. Otherwise that one would be larger than
//! staging, and the guest would stand still until the link has carried all of it.

use std::time::{Duration, Instant};

use outlive_pair::Wanted;

use super::brake::Step;
use super::coordinator::Coordinator;

/// Time between two looks at the number of dirty pages while no checkpoint can be taken.
const LOOK: Duration = Duration::from_micros(500);
/// The same while the guest is held; what ends the hold wakes the coordinator.
const HELD_LOOK: Duration = Duration::from_millis(20);

/// The guest is held.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    since: Instant,
}

impl Coordinator {
    /// Holds the guest, or lets it go. Returns when to look again.
    pub(super) fn hold_or_let_go(&mut self, wanted: Wanted) -> Option<Duration> {
        match self.step(wanted) {
            Step::Hold(look) => {
                self.hold();
                Some(look)
            }
            Step::Run(look) => {
                self.let_go();
                look
            }
        }
    }

    fn step(&mut self, wanted: Wanted) -> Step {
        let now = self.with.driver.clock().now();
        let ran = if self.held.is_some() { Duration::ZERO } else { now.saturating_sub(self.looked_at) };
        self.looked_at = now;
        let Some(protection) = &mut self.protection else { return Step::Run(None) };
        let tracker = self.with.machine.tracker();
        let counted = || tracker.estimate().logged.map(|_| tracker.pending());
        if let Some(base) = &mut protection.base {
            return base.step(now, ran, counted());
        }
        let must_wait = wanted == Wanted::Nothing || !protection.pool.has_free();
        // Once held it stays so until the checkpoint is taken: see `Coordinator::facts`.
        if !must_wait && self.held.is_none() {
            return Step::Run(None);
        }
        let written = counted().unwrap_or_else(|| self.last_epoch.expected(now));
        if written >= self.with.staging_pages {
            Step::Hold(HELD_LOOK)
        } else {
            Step::Run(must_wait.then_some(LOOK))
        }
    }

    /// Stops the guest until [`let_go`](Self::let_go).
    pub(super) fn hold(&mut self) {
        if self.held.is_none() && self.with.driver.guest_may_run() {
            self.with.machine.pause();
            self.held = Some(Held { since: Instant::now() });
        }
    }

    /// Lets a held guest run, if it may.
    pub(super) fn let_go(&mut self) {
        if self.held.is_some() {
            self.resume();
        }
    }

    /// A hold ends, for whatever reason.
    pub(super) fn end_hold(&mut self) {
        if let Some(held) = self.held.take() {
            self.with.totals.held(held.since.elapsed());
        }
    }
}

/// How fast the guest wrote in the last epoch, for a tracker that cannot count while the guest runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastEpoch {
    pages_per_s: f64,
    ended: Duration,
}

impl LastEpoch {
    /// An epoch has ended, with so many pages; the guest ran again at `resumed`.
    pub(super) fn ended(&mut self, stopped: Duration, resumed: Duration, pages: usize) {
        let ran = stopped.saturating_sub(self.ended).as_secs_f64().max(1e-4);
        *self = Self { pages_per_s: pages as f64 / ran, ended: resumed };
    }

    /// How many pages it has written by now, at that rate.
    fn expected(&self, now: Duration) -> usize {
        (now.saturating_sub(self.ended).as_secs_f64() * self.pages_per_s) as usize
    }
}
