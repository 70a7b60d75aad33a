//! Epochs that end when somebody outside waits for them.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch as soon as output is held, but not before it has run for a moment: output that comes in that
/// time goes with the same checkpoint.
///
/// An answer waits for the end of its epoch and for its commit. This rule removes the first wait.
#[derive(Debug)]
pub struct Output {
    coalesce: Duration,
    resumed: Duration,
}

impl Output {
    /// The usual moment. In it a guest answers a handful of requests, and it is about as long as a pause.
    pub const COALESCE: Duration = Duration::from_micros(80);

    /// Epochs with output are at least this long.
    pub fn new(coalesce: Duration) -> Self {
        Self { coalesce, resumed: Duration::ZERO }
    }
}

impl Rule for Output {
    fn next(&self, facts: &Facts) -> Next {
        let Some(held) = facts.held_since else { return Next::Nothing };
        Next::from(held.max(self.resumed + self.coalesce), facts, Why::Output)
    }

    fn ended(&mut self, pause: &Pause) {
        self.resumed = pause.ended;
    }
}
