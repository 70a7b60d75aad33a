//! A page that is copied and then re-armed may have been written in between.

fn main() {}

pub fn end_epoch(tracker: &outlive_dirty::Tracker) {
    let epoch = tracker.stopped().state_saved().harvest().unwrap();
    epoch.pages();
}
