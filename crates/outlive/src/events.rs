//! The event stream: what a running `outlive` says about itself, one JSON object a line.
//!
//! `outlive run --events FILE` and `outlive standby --events FILE` write it, `outlive demo`, tests and
//! monitors read it. Every line carries `"event"`, the sender's `pid` and `t_us`, the time on
//! `CLOCK_MONOTONIC` in microseconds, so the lines of all processes of one host can be put in order; `time`, the
//! time of day; and once it is known, the VM (`vm_name`, `vm_id`).
//!
//! Readers must skip fields and events that they do not know; [`Event::Unknown`] stands for the latter.

mod counts;
mod event;
mod histogram;
#[cfg(test)]
mod tests;
mod writer;

use nix::time::{ClockId, clock_gettime};

pub use counts::{Measured, PageCounts, Stats, ThreadTime};
pub use event::{Event, Part, Place, Record, Role, SettlePart};
pub use histogram::{HISTOGRAM_MAX, add_pairs, histogram, pairs};
pub use writer::EventWriter;
pub(crate) use writer::{EventsError, EventsTo, open};

pub use crate::disk::DangerKind;

/// `CLOCK_MONOTONIC` in microseconds, the clock of [`Record::t_us`].
pub fn now_us() -> u64 {
    // The call can only fail for a clock that does not exist.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1_000
}
