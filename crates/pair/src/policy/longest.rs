//! Epochs of a bounded length.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch that nothing else has ended: a takeover repeats at most this much of the guest's work.
///
/// An epoch in which nothing has changed may last longer, because its checkpoint would equal the previous
/// one.
#[derive(Debug)]
pub struct Longest {
    length: Duration,
    unchanged: Duration,
    resumed: Duration,
}

impl Longest {
    /// Epochs of at most this length.
    pub fn new(length: Duration) -> Self {
        Self { length, unchanged: length, resumed: Duration::ZERO }
    }

    /// The same, but epochs may last `unchanged` as long as nothing changes. A change is still in a
    /// checkpoint after `length` at the latest.
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
        // Nothing reports a change. Looking after half of the length leaves time for the wish that follows.
        Next::from(last, facts, Why::Longest).earlier(Next::At(facts.now + self.length / 2))
    }

    fn ended(&mut self, pause: &Pause) {
        self.resumed = pause.ended;
    }
}
