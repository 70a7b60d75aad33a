//! The slice is the tracker's own list, which the next epoch uses again.

fn main() {}

pub fn end_epoch(tracker: &outlive_dirty::Tracker) -> usize {
    let epoch = tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    let pages = epoch.pages();
    epoch.copied().run();
    pages.len()
}
