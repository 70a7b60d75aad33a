//! Reading the state of a vCPU can make KVM write guest memory: what is harvested before it is not complete.

fn main() {}

pub fn end_epoch(tracker: &outlive_dirty::Tracker) {
    let epoch = tracker.stopped();
    epoch.harvest();
}
