//! Nor can they be read in the caller's own buffer.

use outlive_dirty::{Fetch, Gfn, Tracker};

fn main() {}

pub fn copy(tracker: &Tracker) {
    let mut buffer = [Gfn(0); 64];
    let fetched = tracker.fetch(&mut buffer, Fetch::default()).unwrap();
    println!("{}", buffer[0]);
    fetched.rearm().unwrap();
}
