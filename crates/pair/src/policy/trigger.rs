//! Epochs of a bounded number of dirty pages.

use std::time::Duration;

use super::{Facts, Next, Pause, Rule, Why};

/// Ends an epoch when this many pages are dirty, so that the pause for them stays short.
///
/// Nothing reports that a page becomes dirty, so the pages are counted again and again, the more often the
/// sooner they may be too many.
#[derive(Debug)]
pub struct DirtyTrigger {
    pages: u64,
    resumed: Duration,
}

impl DirtyTrigger {
    /// The least time between two looks at the number of pages.
    const OFTEN: Duration = Duration::from_micros(250);
    /// The most. A vCPU dirties about 300 to 2000 pages in this time.
    const SELDOM: Duration = Duration::from_millis(2);

    /// Ends an epoch at this number of pages.
    pub fn new(pages: u64) -> Self {
        Self { pages, resumed: Duration::ZERO }
    }

    /// Half of the time until there will be too many pages, at the rate so far.
    fn look(&self, facts: &Facts) -> Duration {
        let ran = facts.now.saturating_sub(self.resumed).as_nanos();
        let left = u128::from(self.pages - facts.dirty_pages);
        let half = ran.saturating_mul(left) / (2 * u128::from(facts.dirty_pages.max(1)));
        Duration::from_nanos(u64::try_from(half).unwrap_or(u64::MAX)).clamp(Self::OFTEN, Self::SELDOM)
    }
}

impl Rule for DirtyTrigger {
    fn next(&self, facts: &Facts) -> Next {
        if facts.dirty_pages >= self.pages {
            Next::Now(Why::DirtyPages)
        } else {
            Next::At(facts.now + self.look(facts))
        }
    }

    fn ended(&mut self, pause: &Pause) {
        self.resumed = pause.ended;
    }
}
