//! Each step takes the epoch with it: none can be done again.

fn main() {}

pub fn end_epoch(tracker: &outlive_dirty::Tracker) {
    let epoch = tracker.stopped().state_saved();
    let harvested = epoch.harvest();
    let again = epoch.harvest();
    drop((harvested, again));
}
