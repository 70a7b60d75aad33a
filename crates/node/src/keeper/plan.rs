//! When a process is started again that has ended. Pure: it is given the time.

use std::time::{Duration, Instant};

use crate::ended::End;

/// The first wait after a failure; it doubles with each that follows.
const FIRST: Duration = Duration::from_secs(1);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(60);
/// A process that has lived so long has not failed at its start: what follows is a new row of failures.
const GOOD: Duration = Duration::from_secs(60);

/// What follows the end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Somebody asked for the end.
    Stopped,
    /// The guest has ended by itself, and stays so.
    Ended,
    /// It is started again.
    Again,
    /// It has failed too often.
    GivenUp,
}

/// The failures of a VM's processes on this host.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan {
    failures: u32,
    since: Option<Instant>,
    given_up: bool,
}

impl Plan {
    /// An operator wants it to run: earlier failures are forgotten.
    pub(crate) fn forgive(&mut self) {
        *self = Self::default();
    }

    /// How often in a row it has failed.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// It is left alone until an operator says something.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up
    }

    /// A process has ended at `now` after it has lived for `lived`. With `limit` failures in a row it is given up; 0 is
    /// no limit.
    pub(crate) fn ended(
        &mut self,
        end: &End,
        asked: bool,
        lived: Duration,
        limit: u32,
        now: Instant,
    ) -> Next {
        if asked {
            self.forgive();
            return Next::Stopped;
        }
        if end.is_orderly() {
            self.forgive();
            return Next::Ended;
        }
        if lived >= GOOD {
            self.forgive();
        }
        self.failures = self.failures.saturating_add(1);
        self.since = Some(now);
        self.given_up = limit > 0 && self.failures >= limit;
        if self.given_up { Next::GivenUp } else { Next::Again }
    }

    /// How long it must wait before it is started again.
    pub(crate) fn wait(&self, now: Instant) -> Duration {
        let Some(since) = self.since else { return Duration::ZERO };
        let doubled = 1_u32.checked_shl(self.failures.saturating_sub(1).min(16)).unwrap_or(u32::MAX);
        let whole = FIRST.saturating_mul(doubled).min(LONGEST);
        whole.saturating_sub(now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(code: Option<i32>) -> End {
        End { code, signal: None, what: String::new(), at: String::new() }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn faults_are_started_again_ever_later_until_the_limit() {
        let (mut plan, now) = (Plan::default(), Instant::now());
        assert_eq!(plan.wait(now), Duration::ZERO);
        let mut waits = Vec::new();
        for code in [Some(1), Some(2), Some(3), None, Some(1), Some(1), Some(1), Some(1)] {
            assert_eq!(plan.ended(&end(code), false, SECOND, 9, now), Next::Again);
            waits.push(plan.wait(now).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(plan.wait(now + 59 * SECOND), SECOND);
        assert_eq!(plan.wait(now + 61 * SECOND), Duration::ZERO);
        assert_eq!(plan.ended(&end(Some(1)), false, SECOND, 9, now), Next::GivenUp);
        assert!(plan.is_given_up());
        plan.forgive();
        assert!(!plan.is_given_up() && plan.failures() == 0);
    }

    #[test]
    fn a_process_that_has_lived_long_begins_a_new_row() {
        let (mut plan, now) = (Plan::default(), Instant::now());
        for _ in 0..5 {
            plan.ended(&end(None), false, SECOND, 0, now);
        }
        assert_eq!(plan.ended(&end(None), false, GOOD, 0, now), Next::Again);
        assert_eq!((plan.failures(), plan.wait(now)), (1, SECOND));
        for _ in 0..100 {
            assert_eq!(plan.ended(&end(None), false, SECOND, 0, now), Next::Again, "no limit");
        }
        assert_eq!(plan.wait(now), LONGEST);
    }

    #[test]
    fn orderly_ends_stay() {
        let (mut plan, now) = (Plan::default(), Instant::now());
        plan.ended(&end(Some(1)), false, SECOND, 9, now);
        assert_eq!(plan.ended(&end(Some(0)), false, SECOND, 9, now), Next::Ended);
        assert_eq!(plan.failures(), 0);
        // However it ends: the operator has what was asked for.
        for code in [Some(0), Some(1), Some(3), None] {
            assert_eq!(plan.ended(&end(code), true, SECOND, 9, now), Next::Stopped);
        }
    }
}
