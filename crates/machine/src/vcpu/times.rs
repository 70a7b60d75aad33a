//! When each vCPU did its part of a pause.
//!
//! The threads write before they arrive at the meeting point, and the controller reads after it has waited
//! for all of them. Only the way back into the guest is written while nobody waits: it is read at the next
//! pause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a vCPU's thread notes, in nanoseconds since the start of a [`Timeline`]; 0 means "not yet".
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// It is out of the guest, and so are all others.
    stopped: AtomicU64,
    /// Its state is saved.
    saved: AtomicU64,
    /// Its dirty ring is harvested.
    harvested: AtomicU64,
    /// It goes back into the guest.
    back: AtomicU64,
    /// How long it was out of the guest before that.
    away: AtomicU64,
}

/// The start of the time that [`Marks`] count. All vCPUs of a machine share one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeline(Instant);

impl Timeline {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    fn nanos(self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.0).as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    fn at(self, nanos: u64) -> Instant {
        self.0 + Duration::from_nanos(nanos)
    }
}

impl Marks {
    pub(super) fn stopped(&self, line: Timeline) {
        self.stopped.store(line.nanos(Instant::now()), Ordering::Relaxed);
    }

    pub(super) fn saved(&self, line: Timeline) {
        self.saved.store(line.nanos(Instant::now()), Ordering::Relaxed);
    }

    pub(super) fn harvested(&self, line: Timeline) {
        self.harvested.store(line.nanos(Instant::now()), Ordering::Relaxed);
    }

    /// The vCPU, which left the guest at `left`, goes back.
    pub(super) fn back(&self, line: Timeline, left: Instant) {
        let now = Instant::now();
        let away = now.saturating_duration_since(left);
        self.away.store(u64::try_from(away.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        // Release: whoever sees it also sees how long the vCPU was away.
        self.back.store(line.nanos(now), Ordering::Release);
    }
}

/// What the vCPUs did in a capture, taken together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CaptureTimes {
    /// When the last one was out of the guest.
    pub(crate) stopped: Instant,
    /// How long saving took the slowest vCPU.
    pub(crate) state: Duration,
    /// How long harvesting took the slowest vCPU.
    pub(crate) harvest: Duration,
    /// When the last one had done its part.
    pub(crate) done: Instant,
}

impl CaptureTimes {
    pub(super) fn of<'a>(line: Timeline, marks: impl Iterator<Item = &'a Marks>) -> Self {
        let (mut stopped, mut state, mut harvest, mut done) = (0, 0, 0, 0);
        for mark in marks {
            let read = |at: &AtomicU64| at.load(Ordering::Relaxed);
            let (out, saved, harvested) = (read(&mark.stopped), read(&mark.saved), read(&mark.harvested));
            stopped = stopped.max(out);
            state = state.max(saved.saturating_sub(out));
            harvest = harvest.max(harvested.saturating_sub(saved));
            done = done.max(harvested);
        }
        Self {
            stopped: line.at(stopped),
            state: Duration::from_nanos(state),
            harvest: Duration::from_nanos(harvest),
            done: line.at(done),
        }
    }
}

/// How the guest resumed after a pause, as its vCPUs saw it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Return {
    /// When the last one went back into the guest.
    pub(crate) back: Instant,
    /// How long the vCPU that was away longest was away: from its last exit to its next entry.
    pub(crate) away: Duration,
}

impl Return {
    /// The notes since the last call.
    pub(super) fn take<'a>(line: Timeline, marks: impl Iterator<Item = &'a Marks>) -> Option<Self> {
        let (mut last, mut longest) = (0, 0);
        for mark in marks {
            let back = mark.back.swap(0, Ordering::Acquire);
            if back != 0 {
                last = last.max(back);
                longest = longest.max(mark.away.load(Ordering::Relaxed));
            }
        }
        (last != 0).then(|| Self { back: line.at(last), away: Duration::from_nanos(longest) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_vcpu_counts_in_each_step() {
        let line = Timeline::start();
        let marks = [[100, 130, 131], [110, 120, 150]].map(|[stopped, saved, harvested]| Marks {
            stopped: AtomicU64::new(stopped),
            saved: AtomicU64::new(saved),
            harvested: AtomicU64::new(harvested),
            ..Marks::default()
        });
        let times = CaptureTimes::of(line, marks.iter());
        assert_eq!((times.stopped, times.done), (line.at(110), line.at(150)));
        assert_eq!((times.state.as_nanos(), times.harvest.as_nanos()), (30, 30));
    }

    #[test]
    fn a_return_is_told_once() {
        let line = Timeline::start();
        let marks = [Marks::default(), Marks::default()];
        assert!(Return::take(line, marks.iter()).is_none());
        let left = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        marks[1].back(line, left);
        let told = Return::take(line, marks.iter()).unwrap();
        assert!(told.away >= Duration::from_millis(2) && told.back >= left + told.away);
        assert!(Return::take(line, marks.iter()).is_none());
    }
}
