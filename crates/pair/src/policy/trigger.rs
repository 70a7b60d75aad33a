//! Epochs of a bounded number of dirty pages.

use std::time::Duration;

use super::{Facts, Next, Rule, Why};

/// Ends an epoch when so many pages are dirty, so that the pause for them stays short.
///
/// Nobody says when a page becomes dirty, so the pages are counted again and again.
#[derive(Debug)]
pub struct DirtyTrigger {
    pages: u64,
}

impl DirtyTrigger {
    /// Time between two looks at the number of pages.
    const LOOK: Duration = Duration::from_micros(250);

    /// Ends an epoch at this number of pages.
    pub fn new(pages: u64) -> Self {
        Self { pages }
    }
}

impl Rule for DirtyTrigger {
    fn next(&self, facts: &Facts) -> Next {
        if facts.dirty_pages >= self.pages {
            Next::Now(Why::DirtyPages)
        } else {
            Next::At(facts.now + Self::LOOK)
        }
    }
}
