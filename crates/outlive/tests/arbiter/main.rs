//! Arbiters under races of threads and processes, crashes, lost answers, damage and places that are missing or are
//! others: what every kind must do (`conformance`), over each kind (`kinds`), and what is special in the directory.

mod claims;
mod conformance;
mod damage;
mod directories;
mod kinds;
mod races;
#[path = "../common/stop.rs"]
mod stop;
mod support;
