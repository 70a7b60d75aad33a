//! Epochs that end in time for a promise about output.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch so that its first output is let out within a target time after the guest has sent it, as
/// far as pause and commit take what they took the last time. A target that they alone exceed ends an epoch
/// as soon as output is held.
#[derive(Debug)]
pub struct Latency {
    target: Duration,
    pause: Duration,
}

impl Latency {
    /// Output is to be held no longer than this.
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
        // One long pause says little; a slow fall makes the rule careful for a few epochs.
        self.pause = pause.length().max(self.pause * 3 / 4);
    }
}
