//! Epochs of a bounded length.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch that nothing else has ended: a takeover repeats no more of the guest's work than this.
///
/// An epoch in which nothing has changed may last longer. Its checkpoint would say what the last one says.
#[derive(Debug)]
pub struct Longest {
    length: Duration,
    unchanged: Duration,
    resumed: Duration,
}

impl Longest {
    /// Epochs of this length at most.
    pub fn new(length: Duration) -> Self {
        Self { length, unchanged: length, resumed: Duration::ZERO }
    }

    /// The same, and of `unchanged` as long as nothing changes; a change is in a checkpoint after `length` at
    /// the latest all the same.
    pub fn unless_unchanged(length: Duration, unchanged: Duration) -> Self {
        Self { length, unchanged: unchanged.max(length), resumed: Duration::ZERO }
    }
}

impl Rule for Longest {
    fn next(&self, facts: &Facts) -> Next {
        let (due, last) = (self.resumed + self.length, self.resumed + self.unchanged);
        if facts.changed || facts.now < due {
            return Next::from(due, facts, Why::Longest);
        }
        // Nobody tells of a change. Half of the length, so that a look and the wish that follows it are in
        // time.
        Next::from(last, facts, Why::Longest).earlier(Next::At(facts.now + self.length / 2))
    }

    fn ended(&mut self, pause: &Pause) {
        self.resumed = pause.ended;
    }
}
