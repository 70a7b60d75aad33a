//! The wait for the arbiter, the same on both sides.

use std::time::Duration;

use crate::ClaimResult;
use crate::planted::{Planted, planted};

/// An arbiter that gives no answer at all for this long is reported as out of reach.
const SLOW_ANSWER: Duration = Duration::from_secs(1);

/// A claim under way: asked, answered with "unreachable", asked again, until it is won or lost. Only one
/// question is open at a time, and there is no time-out: a host that stops waiting without an answer breaks
/// invariant 3.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) generation: u64,
    retry: Duration,
    asked: Option<Duration>,
    /// Whether it was asked at least once, so that the generation may be won without an answer.
    may_be_won: bool,
    /// Since when the answer has been that it is lost.
    lost_since: Option<Duration>,
    ask_at: Duration,
    reported: Option<String>,
}

/// What a claim requires now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Nothing,
    Ask,
    /// Report why the arbiter does not answer; once per reason.
    Report(String),
}

/// An answer that ends the wait.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Won,
    Lost { owner: String },
}

impl Claim {
    pub(crate) fn new(generation: u64, ask_at: Duration, retry: Duration) -> Self {
        Self { generation, retry, asked: None, may_be_won: false, lost_since: None, ask_at, reported: None }
    }

    /// Call it after every event, carry the answer out and call it again until it is `Nothing`.
    pub(crate) fn step(&mut self, now: Duration) -> Step {
        match self.asked {
            None if now >= self.ask_at => {
                self.asked = Some(now);
                self.may_be_won = true;
                Step::Ask
            }
            Some(asked) if now.saturating_sub(asked) >= SLOW_ANSWER => {
                self.report(format!("no answer for {} s", SLOW_ANSWER.as_secs()))
            }
            _ => Step::Nothing,
        }
    }

    /// Whether the generation may be this side's, whatever the answers said.
    pub(crate) fn may_be_won(&self) -> bool {
        self.may_be_won
    }

    /// A loss may be taken back: a winner that cannot run the VM gives the generation back. So this asks
    /// again, until the generation has been lost for this long. Returns whether it has.
    pub(crate) fn lost_for(&mut self, patience: Duration, now: Duration) -> bool {
        let since = *self.lost_since.get_or_insert(now);
        self.asked = None;
        self.ask_at = now + self.retry;
        now.saturating_sub(since) >= patience
    }

    /// Whether a question is open: then the claim may be won, whatever is decided here.
    pub(crate) fn is_open(&self) -> bool {
        self.asked.is_some()
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        match self.asked {
            None => Some(self.ask_at),
            Some(_) if self.reported.is_some() => None,
            Some(asked) => Some(asked + SLOW_ANSWER),
        }
    }

    /// Takes an answer; an answer to a question that is not open is ignored.
    pub(crate) fn answer(
        &mut self,
        now: Duration,
        generation: u64,
        result: ClaimResult,
        bug: Planted,
    ) -> Result<Verdict, Step> {
        if generation != self.generation || self.asked.is_none() {
            return Err(Step::Nothing);
        }
        match result {
            ClaimResult::Won => Ok(Verdict::Won),
            ClaimResult::Lost { owner } => Ok(Verdict::Lost { owner }),
            ClaimResult::Unreachable { why } => {
                if !planted!(bug, ClaimNeverRepeated) {
                    self.asked = None;
                    self.ask_at = now + self.retry;
                }
                Err(self.report(why))
            }
        }
    }

    fn report(&mut self, why: String) -> Step {
        if self.reported.as_ref() == Some(&why) {
            return Step::Nothing;
        }
        self.reported = Some(why.clone());
        Step::Report(why)
    }
}
