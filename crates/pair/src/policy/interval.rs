//! Epochs of a fixed length.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch a fixed time after the previous one ended.
///
/// The ends keep a rhythm: a late one does not make the next one late, so checkpoints come at the configured
/// rate. After a long pause the rhythm begins anew.
#[derive(Debug)]
pub struct Interval {
    length: Duration,
    due: Duration,
}

impl Interval {
    /// Epochs of this length; the first one is due at once.
    pub fn new(length: Duration) -> Self {
        Self { length, due: Duration::ZERO }
    }
}

impl Rule for Interval {
    fn next(&self, facts: &Facts) -> Next {
        Next::from(self.due, facts, Why::Interval)
    }

    fn ended(&mut self, pause: &Pause) {
        self.due = (self.due + self.length).max(pause.began + self.length / 2);
        // Ends that another rule brought forward do not add up to a far-away one.
        self.due = self.due.min(pause.began + self.length);
    }
}
