//! Histograms, and how the stream carries them.

use hdrhistogram::Histogram;

/// Largest value that [`histogram`] tells apart; a larger one counts as this.
pub const HISTOGRAM_MAX: u64 = 1 << 30;

/// A histogram as the stream uses it: values to [`HISTOGRAM_MAX`] within 1 %. It never grows, so
/// `saturating_record` does not allocate and may be called while the VM is paused.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, HISTOGRAM_MAX, 2).expect("constant bounds are valid")
}

/// The non-empty buckets of a histogram, as the stream carries them.
pub fn pairs(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
}

/// Adds what [`pairs`] gave to another histogram.
pub fn add_pairs(histogram: &mut Histogram<u64>, pairs: &[(u64, u64)]) {
    for &(value, count) in pairs {
        histogram.saturating_record_n(value, count);
    }
}
