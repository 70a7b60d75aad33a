//! Holds a guest so that it writes no more than so many pages a second.
//!
//! The guest is stopped at the page, as by the trigger of a dirty log, and not slowed down: a guest that only reads
//! loses nothing. (The tracker's own exact trigger is fixed for the life of a VM and takes its room from the dirty
//! ring, which a guest whose kernel is emulated may overrun.) It is a pure calculation; [`hold`](super::hold) has
//! the clock and the machine.

use std::time::Duration;

/// The least time between two looks at the number of dirty pages.
const OFTEN: Duration = Duration::from_micros(250);
/// What the guest may write at once: what it is allowed in this time.
const AT_ONCE: Duration = Duration::from_millis(5);
/// The least that it may write at once, in pages.
const AT_LEAST: f64 = 4.0;
/// How long a guest runs at least after it was held for the longest time.
const LEAST_RUN: Duration = Duration::from_millis(1);

/// What the guest does now, and when to look again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It runs.
    Run(Option<Duration>),
    /// It is held.
    Hold(Duration),
}

/// The brake of one round; see the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Brake {
    pages_per_s: f64,
    began: Duration,
    /// The guest is held for no longer than this at a time.
    longest: Duration,
    held_since: Option<Duration>,
    /// Runs until then in any case.
    runs_until: Duration,
}

impl Brake {
    /// From `now` on, when no page is dirty.
    pub(super) fn new(pages_per_s: f64, longest: Duration, now: Duration) -> Self {
        Self { pages_per_s, began: now, longest, held_since: None, runs_until: now }
    }

    /// So many pages are dirty now.
    pub(super) fn step(&mut self, now: Duration, dirty: usize) -> Step {
        let due = self.due(dirty);
        match self.held_since {
            Some(since) if now < due && now < since + self.longest => {
                Step::Hold((due.min(since + self.longest) - now).max(OFTEN))
            }
            Some(since) => {
                self.held_since = None;
                let forced = now >= since + self.longest && now < due;
                self.runs_until = if forced { now + LEAST_RUN } else { now };
                Step::Run(Some(OFTEN))
            }
            None if now < due && now >= self.runs_until => {
                self.held_since = Some(now);
                Step::Hold((due - now).min(self.longest).max(OFTEN))
            }
            None => Step::Run(Some(OFTEN)),
        }
    }

    /// When so many pages are allowed.
    fn due(&self, dirty: usize) -> Duration {
        let at_once = (self.pages_per_s * AT_ONCE.as_secs_f64()).max(AT_LEAST);
        let seconds = (dirty as f64 - at_once).max(0.0) / self.pages_per_s;
        let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        self.began.saturating_add(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_millis(300);

    /// A guest that writes so many pages a second while it runs, until this time. Returns what it has written,
    /// for how long it ran, and the longest hold.
    fn play(pages_per_s: f64, writes_per_s: f64, until: Duration) -> (f64, Duration, Duration) {
        let start = Duration::from_secs(100);
        let mut brake = Brake::new(pages_per_s, LONGEST, start);
        let (mut now, mut written, mut ran) = (start, 0.0, Duration::ZERO);
        let (mut held, mut longest) = (Duration::ZERO, Duration::ZERO);
        while now < start + until {
            let (holds, look) = match brake.step(now, written as usize) {
                Step::Hold(look) => (true, look),
                Step::Run(look) => (false, look.unwrap()),
            };
            assert!(look >= OFTEN, "a busy loop");
            if holds {
                held += look;
                longest = longest.max(held);
            } else {
                held = Duration::ZERO;
                ran += look;
                written += writes_per_s * look.as_secs_f64();
            }
            now += look;
        }
        (written, ran, longest)
    }

    #[test]
    fn a_guest_writes_what_it_may_and_is_never_held_for_long() {
        let seconds = 20;
        for (allowed, writes) in [(100.0, 20_000.0), (3000.0, 200_000.0), (50_000.0, 200_000.0)] {
            let (written, _, longest) = play(allowed, writes, Duration::from_secs(seconds));
            let part = written / (allowed * seconds as f64);
            assert!((0.9..1.2).contains(&part), "{allowed}/s: {part} of it");
            assert!(longest <= LONGEST, "{allowed}/s: held for {longest:?}");
        }
    }

    #[test]
    fn a_guest_that_only_reads_loses_nothing() {
        let (_, ran, _) = play(10.0, 0.0, Duration::from_secs(2));
        assert!(ran >= Duration::from_secs(2));
        let (written, ran, _) = play(5000.0, 4000.0, Duration::from_secs(2));
        assert!(written >= 7990.0 && ran >= Duration::from_millis(1990), "{written} in {ran:?}");
    }

    /// Otherwise it would stand still for seconds.
    #[test]
    fn a_guest_that_has_written_far_too_much_runs_all_the_same() {
        let (_, ran, longest) = play(1.0, 500_000.0, Duration::from_secs(30));
        assert!(longest <= LONGEST, "{longest:?}");
        assert!(ran >= Duration::from_millis(90), "{ran:?}");
    }
}
