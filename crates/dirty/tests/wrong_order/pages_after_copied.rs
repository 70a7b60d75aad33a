//! After `copied` the next epoch may begin at any moment.

fn main() {}

pub fn end_epoch(tracker: &outlive_dirty::Tracker) {
    let epoch = tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap().copied();
    epoch.pages();
}
