//! Histograms that any thread may add to: fixed buckets, no lock, no allocation.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The most buckets that a histogram of another process may have. Ours have fewer.
const MOST_BUCKETS: usize = 64;

const US: u64 = 1_000;
const MS: u64 = 1_000_000;
const S: u64 = 1_000_000_000;

/// Bounds of a pause, in nanoseconds: from some microseconds to tens of milliseconds, and what must not happen.
pub(crate) const PAUSES: &[u64] = &[
    20 * US,
    50 * US,
    75 * US,
    100 * US,
    150 * US,
    200 * US,
    300 * US,
    400 * US,
    500 * US,
    750 * US,
    MS,
    1_500 * US,
    2 * MS,
    3 * MS,
    5 * MS,
    7_500 * US,
    10 * MS,
    15 * MS,
    20 * MS,
    30 * MS,
    50 * MS,
    100 * MS,
    500 * MS,
    S,
    10 * S,
];
/// Bounds of other times, in nanoseconds.
pub(crate) const TIMES: &[u64] = &[
    US,
    2 * US,
    5 * US,
    10 * US,
    20 * US,
    50 * US,
    100 * US,
    200 * US,
    500 * US,
    MS,
    2 * MS,
    5 * MS,
    10 * MS,
    20 * MS,
    50 * MS,
    100 * MS,
    200 * MS,
    500 * MS,
    S,
    2 * S,
    5 * S,
    10 * S,
    30 * S,
    60 * S,
];
/// Bounds of numbers of pages, frames and checkpoints.
pub(crate) const COUNTS: &[u64] = &[
    0,
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    1 << 10,
    1 << 11,
    1 << 12,
    1 << 13,
    1 << 14,
    1 << 16,
    1 << 18,
];
/// Bounds of bytes.
pub(crate) const SIZES: &[u64] =
    &[0, 256, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28];

/// See the module.
#[derive(Debug)]
pub(crate) struct Histogram {
    /// The largest value of each bucket but the last, which has no bound.
    bounds: &'static [u64],
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// An empty one with these bounds, which grow.
    pub(crate) fn new(bounds: &'static [u64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    /// Counts a value.
    pub(crate) fn record(&self, value: u64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Counts a time, in nanoseconds.
    pub(crate) fn record_time(&self, took: Duration) {
        self.record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What was counted so far. A value that is being counted meanwhile may be in the sum only.
    pub(crate) fn read(&self) -> Buckets {
        Buckets {
            bounds: self.bounds.to_vec(),
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: self.sum.load(Ordering::Relaxed),
        }
    }
}

/// What a histogram has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Buckets {
    /// The largest value of each bucket but the last.
    pub(crate) bounds: Vec<u64>,
    /// Values in each bucket; one more than there are bounds.
    pub(crate) counts: Vec<u64>,
    /// Of all values.
    pub(crate) sum: u64,
}

impl Buckets {
    /// Whether it can be one of a process that is well.
    pub(crate) fn is_sound(&self) -> bool {
        self.counts.len() == self.bounds.len() + 1
            && self.counts.len() <= MOST_BUCKETS
            && self.bounds.is_sorted_by(|a, b| a < b)
            && self.counts.iter().try_fold(0_u64, |sum, &count| sum.checked_add(count)).is_some()
    }

    /// How many values were counted.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_in_the_first_bucket_that_has_room_for_it() {
        let histogram = Histogram::new(&[10, 20]);
        for value in [0, 10, 11, 20, 21, u64::MAX / 2] {
            histogram.record(value);
        }
        let read = histogram.read();
        assert_eq!(read.counts, [2, 2, 2]);
        assert_eq!((read.count(), read.sum), (6, 62 + u64::MAX / 2));
        histogram.record_time(Duration::from_nanos(15));
        assert_eq!(histogram.read().counts, [2, 3, 2]);
    }

    #[test]
    fn our_bounds_grow_and_are_not_too_many() {
        for bounds in [PAUSES, TIMES, COUNTS, SIZES] {
            assert!(Histogram::new(bounds).read().is_sound(), "{bounds:?}");
        }
    }

    #[test]
    fn recording_allocates_nothing() {
        let histogram = Histogram::new(PAUSES);
        let info = allocation_counter::measure(|| (0..1000).for_each(|it| histogram.record(it * 1000)));
        assert_eq!((info.count_total, histogram.read().count()), (0, 1000));
    }

    #[test]
    fn threads_lose_nothing() {
        let histogram = Histogram::new(COUNTS);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|it| histogram.record(it)));
            }
        });
        let read = histogram.read();
        assert_eq!((read.count(), read.sum), (4000, 4 * 499_500));
    }

    #[test]
    fn what_no_histogram_can_be_is_known() {
        let sound = Buckets { bounds: vec![1, 2], counts: vec![0, 1, 2], sum: 7 };
        assert!(sound.is_sound());
        assert!(!Buckets { counts: vec![0, 1], ..sound.clone() }.is_sound());
        assert!(!Buckets { bounds: vec![2, 2], ..sound.clone() }.is_sound());
        assert!(!Buckets { counts: vec![1, u64::MAX, 1], ..sound.clone() }.is_sound());
        let many = Buckets { bounds: (0..64).collect(), counts: vec![0; 65], sum: 0 };
        assert!(!many.is_sound());
    }
}
