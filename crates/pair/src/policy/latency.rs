//! Epochs that end in time to keep a promise about output.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch so that its first output is let out within a target time after the guest has sent it,
/// provided that pause and commit take as long as they last did. If they alone exceed the target, the epoch
/// ends as soon as output is held.
#[derive(Debug)]
pub struct Latency {
    target: Duration,
    pause: Duration,
}

impl Latency {
    /// Output is held for no longer than this.
    pub fn new(target: Duration) -> Self {
        Self { target, pause: Duration::ZERO }
    }
}

impl Rule for Latency {
    fn next(&self, facts: &Facts) -> Next {
        let Some(held) = facts.held_since else { return Next::Nothing };
        let way = self.pause + facts.acknowledged_in.unwrap_or_default();
        Next::from(held + self.target.saturating_sub(way), facts, Why::Latency)
    }

    fn ended(&mut self, pause: &Pause) {
        // One long pause says little; the slow decay makes the rule careful for a few epochs.
        self.pause = pause.length().max(self.pause * 3 / 4);
    }
}
