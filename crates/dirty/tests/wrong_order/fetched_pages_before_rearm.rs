//! A page that was fetched while the guest runs, and read before it is armed, may be written unseen
//! afterwards.

use outlive_dirty::{Fetch, Gfn, Tracker};

fn main() {}

pub fn copy(tracker: &Tracker) {
    let mut buffer = [Gfn(0); 64];
    let fetched = tracker.fetch(&mut buffer, Fetch::default()).unwrap();
    for gfn in &fetched {
        println!("{gfn}");
    }
}
