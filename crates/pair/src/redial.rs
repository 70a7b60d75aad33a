//! When each standby is dialled next.
//!
//! A standby that cannot be reached is dialled again soon, so that it is found as soon as it is there. A
//! standby that gives the same answer again will most likely repeat it: every attempt costs it a machine and
//! changes a link in its network, so the pauses grow.

use std::time::Duration;

use crate::Timing;

/// The outcome of dialling a standby.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) enum Answer {
    /// It could not be reached.
    Nothing,
    /// It refused. Numbers in its words may differ each time, so they are left out.
    Refused(String),
    /// It accepted, but the base synchronisation failed.
    NoBase,
}

impl Answer {
    pub(crate) fn refused(text: &str) -> Self {
        Self::Refused(text.chars().filter(|c| !c.is_ascii_digit()).collect())
    }
}

#[derive(Debug, Clone)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct Standby {
    not_before: Duration,
    pause: Duration,
    last: Answer,
}

/// See the module.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Redial {
    standbys: Vec<Standby>,
    /// The one that was last dialled.
    dialled: Option<usize>,
    /// Until then one of them is expected at any moment.
    expected: Option<Duration>,
}

impl Redial {
    pub(crate) fn new(standbys: usize, now: Duration) -> Self {
        let standby = Standby { not_before: now, pause: Duration::ZERO, last: Answer::Nothing };
        Self { standbys: vec![standby; standbys], dialled: None, expected: None }
    }

    /// One of them comes until then, and is to be found at once.
    pub(crate) fn expecting(self, expected: Option<Duration>) -> Self {
        Self { expected, ..self }
    }

    /// The standby to dial now: the next one in turn that is due. `None` if none is due.
    pub(crate) fn next(&mut self, now: Duration) -> Option<usize> {
        let count = self.standbys.len();
        let first = self.dialled.map_or(0, |dialled| dialled + 1);
        let due =
            (first..first + count).map(|at| at % count).find(|at| self.standbys[*at].not_before <= now)?;
        self.dialled = Some(due);
        Some(due)
    }

    /// Takes the outcome of the last attempt. Returns when to dial next, whichever standby that will be.
    pub(crate) fn failed(&mut self, now: Duration, answer: Answer, timing: &Timing) -> Duration {
        let soon = self.expected.is_some_and(|until| now < until) && answer != Answer::NoBase;
        let retry = if soon { Timing::RETURN.0.min(timing.retry) } else { timing.retry };
        if let Some(standby) = self.dialled.and_then(|at| self.standbys.get_mut(at)) {
            let again = answer != Answer::Nothing && answer == standby.last;
            let longest = timing.retry * Timing::LONGEST_RETRY;
            standby.pause = if again && !soon { (standby.pause * 2).min(longest) } else { retry };
            standby.not_before = now + standby.pause;
            standby.last = answer;
        }
        let due = self.standbys.iter().map(|standby| standby.not_before).min().unwrap_or(now);
        due.max(now + retry)
    }

    /// For the model; see `primary/age.rs`.
    #[cfg(test)]
    pub(crate) fn age(&mut self, move_back: &dyn Fn(&mut Duration)) {
        self.standbys.iter_mut().for_each(|standby| move_back(&mut standby.not_before));
        self.expected.as_mut().map(move_back);
    }

    /// All are dialled at once, and earlier answers are forgotten: the situation is different now.
    pub(crate) fn begin_anew(&mut self, now: Duration) {
        for standby in &mut self.standbys {
            *standby = Standby { not_before: now, pause: Duration::ZERO, last: Answer::Nothing };
        }
    }
}
