//! The program: links, arbiters, the coordinator of a primary, the standby, the demo and the machine check.
//!
//! `crates/machine` runs a VM, `crates/epoch` knows the wire, `crates/pair` decides; this crate carries the
//! decisions out.

#![forbid(unsafe_code)]

pub mod arbiter;
mod audit;
pub mod check;
pub mod cli;
mod clock;
pub mod console;
pub mod demo;
mod disk;
pub mod doctor;
pub mod events;
pub mod exit;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod golden;
mod heat;
mod history;
pub mod keys;
mod lines;
mod link;
pub mod logs;
mod lossy;
pub mod metrics;
mod names;
pub mod network;
mod notify;
mod phases;
mod primary;
mod process;
mod pulse;
mod report;
mod rewind;
pub mod sandbox;
mod sentinel;
mod serving;
mod socket;
mod standby;
pub mod status;
mod strays;
mod threads;
mod told;
mod ui;
mod vm;
