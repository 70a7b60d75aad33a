//! The counters of a tracker.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::report;

/// Counters since the tracker was made, except `hot` and `credits`, which are present values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrackerStats {
    /// Epochs completed ([`crate::Epoch::run`]).
    pub epochs: u64,
    /// Pages of completed epochs, hot ones included.
    pub pages: u64,
    /// Ring entries and marks of pages that were already in the epoch.
    pub duplicates: u64,
    /// How often a vCPU's list was full and its further entries were left in the ring until the epoch ended.
    pub spilled: u64,
    /// Epochs with more than `max_dirty_pages`.
    pub oversized: u64,
    /// Harvests that searched the global bitmap because the global list was full or a marker was at work.
    pub searches: u64,
    /// Ring entries and marks that are not pages of the layout.
    pub ignored: u64,
    /// Resets that were interrupted, after which all of memory was write-protected anew.
    pub full_rearms: u64,
    /// Pages that threads fetched before the epoch ended.
    pub fetched: u64,
    /// Hot pages now.
    pub hot: u64,
    /// Pages that became hot.
    pub heated: u64,
    /// Pages that ceased to be hot, most of them as a probe.
    pub cooled: u64,
    /// Traps that hot pages would have cost if each had been written in every epoch: the most that was saved.
    /// Each page that the caller found [unchanged](crate::Epoch::unchanged) is subtracted.
    pub traps_avoided: u64,
    /// Ring entries held back now: for pages that are hot, and for an exact trigger.
    pub credits: u64,
    /// How often a vCPU at its limit got more of the trigger.
    pub grants: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) epochs: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) duplicates: AtomicU64,
    pub(super) spilled: AtomicU64,
    pub(super) oversized: AtomicU64,
    pub(super) ignored: AtomicU64,
    pub(super) full_rearms: AtomicU64,
    pub(super) fetched: AtomicU64,
    pub(super) traps_avoided: AtomicU64,
    pub(super) grants: AtomicU64,
    /// `ignored` at the last warning.
    pub(super) warned: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    if amount != 0 {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

impl super::Tracker {
    /// The counters.
    pub fn stats(&self) -> TrackerStats {
        let counters = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (heated, cooled) = self.hot.as_ref().map_or((0, 0), |hot| hot.counts());
        TrackerStats {
            epochs: get(&counters.epochs),
            pages: get(&counters.pages),
            duplicates: get(&counters.duplicates),
            spilled: get(&counters.spilled),
            oversized: get(&counters.oversized),
            searches: self.global.scans(),
            ignored: get(&counters.ignored) + self.global.ignored(),
            full_rearms: get(&counters.full_rearms),
            fetched: get(&counters.fetched),
            hot: self.hot_pages() as u64,
            heated,
            cooled,
            traps_avoided: get(&counters.traps_avoided),
            credits: self.source.credits(),
            grants: get(&counters.grants),
        }
    }

    pub(super) fn warn_of_ignored(&self) {
        let ignored = self.counters.ignored.load(Ordering::Relaxed);
        // At 1, 2, 4, 8...: a VMM whose layout is wrong should hear of it, not drown in it.
        if ignored > 0 && ignored >= 2 * self.counters.warned.load(Ordering::Relaxed) {
            self.counters.warned.store(ignored, Ordering::Relaxed);
            report::warn(format_args!("{ignored} dirty log entries are no page of the memory layout"));
        }
    }
}
