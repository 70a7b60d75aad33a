//! Metrics for Prometheus.
//!
//! Two kinds of processes have a part in them. A process with a VM, or a standby, counts and tells what it has counted, as a
//! line, at a socket that hears nothing; it speaks no HTTP. `outlive metrics` asks all of them on its host, makes text of
//! the answers, and serves it; it has no right over any VM.
//!
//! - `histogram`, `tally`: what is counted, without a lock. `report`: the line. `tell`: the thread that says it.
//! - `ask`: hears the processes of this host. `families`: every metric, with its name, unit and meaning, and where it comes
//!   from. `text`: the formats of Prometheus.
//! - `http`: serves two pages. `command`: `outlive metrics`.

mod ask;
mod command;
mod families;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod histogram;
mod http;
mod report;
mod tally;
mod tell;
mod text;

#[cfg(test)]
mod page;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod units;

pub use command::command;
pub(crate) use histogram::{Buckets, COUNTS, Histogram, PAUSES, SIZES, TIMES};
pub(crate) use report::{
    ArbiterReport, AuditReport, AuditedDisk, FORMAT, Frames, Loss, RecordReport, Report, Running, unix,
};
pub(crate) use tally::Tally;
pub(crate) use tell::tell;
