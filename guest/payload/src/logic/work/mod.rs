//! `WORK`: a load that writes memory, and finds out whether a takeover lost any of it.
//!
//! Each worker (one per further vCPU, or the one vCPU between requests) owns an arena of pages. A write puts
//! a fresh pattern into one page and counts it in a table; a verification compares every page with the table,
//! so a page that came back old, torn or foreign shows.

mod control;
mod pattern;
mod worker;

pub use control::{Control, Setting, Stat};
pub use pattern::Page;
pub use worker::{Arena, Step, Worker};

/// Most workers there can be.
pub const MAX_WORKERS: usize = 8;
