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
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(crate) struct Claim {
    pub(crate) generation: u64,
    retry: Duration,
    asked: Option<Duration>,
    asked_once: bool,
    ask_at: Duration,
    /// From when on it may be brought forward. `None`: never, or it was asked already and has its usual rest.
    hurry_from: Option<Duration>,
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
        Self { generation, retry, asked: None, asked_once: false, ask_at, hurry_from: None, reported: None }
    }

    /// Lets [`hurry`](Self::hurry) bring the first question forward, to this time at the earliest.
    pub(crate) fn may_hurry_from(self, time: Duration) -> Self {
        Self { hurry_from: Some(time), ..self }
    }

    /// Waiting has lost its reason: the first question comes as soon as it may.
    pub(crate) fn hurry(&mut self) {
        if let Some(from) = self.hurry_from {
            self.ask_at = self.ask_at.min(from);
        }
    }

    /// Call it after every event, carry the answer out and call it again until it is `Nothing`.
    pub(crate) fn step(&mut self, now: Duration) -> Step {
        match self.asked {
            None if now >= self.ask_at => {
                self.asked = Some(now);
                self.asked_once = true;
                self.hurry_from = None;
                Step::Ask
            }
            Some(asked) if now.saturating_sub(asked) >= SLOW_ANSWER => {
                self.report(format!("no answer for {} s", SLOW_ANSWER.as_secs()))
            }
            _ => Step::Nothing,
        }
    }

    /// Whether a question is open: then the claim may be won, whatever is decided here.
    pub(crate) fn is_open(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether the question may ever have been heard: then the claim may be won, also after "unreachable".
    pub(crate) fn was_asked(&self) -> bool {
        self.asked_once
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

    /// For the model; see `primary/age.rs`.
    #[cfg(test)]
    pub(crate) fn age(&mut self, move_back: &dyn Fn(&mut Duration)) {
        self.asked.as_mut().map(move_back);
        move_back(&mut self.ask_at);
        self.hurry_from.as_mut().map(move_back);
    }

    fn report(&mut self, why: String) -> Step {
        if self.reported.as_ref() == Some(&why) {
            return Step::Nothing;
        }
        self.reported = Some(why.clone());
        Step::Report(why)
    }
}
