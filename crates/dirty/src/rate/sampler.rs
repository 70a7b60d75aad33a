//! Windows by fetching.

use std::fmt;
use std::time::Instant;

use super::Window;
use crate::layout::Gfn;
use crate::source::HarvestError;
use crate::tracker::{Fetch, Tracker};

/// Pages that are fetched at once.
const BUFFER: usize = 4096;

/// Makes a [`Window`] of each stretch of time between two samples, while the guest runs.
///
/// It takes the dirty pages and arms them, so each page that is written is trapped once a window: sampling
/// every millisecond costs the guest as much as checkpoints every millisecond would. The pages are only in
/// the windows, so use it when nobody else needs them (before a migration begins), or hand them on. It does
/// not know which vCPU wrote a page, and hot pages do not appear: make the tracker with
/// [`crate::HotPages::Off`].
///
/// ```no_run
/// # use std::time::Duration;
/// # use outlive_dirty::{Tracker, rate::{RateMeter, RateReport, RateSampler}};
/// # fn f(tracker: &Tracker) -> Result<RateReport, Box<dyn std::error::Error>> {
/// tracker.enable()?;
/// let mut meter = RateMeter::new(tracker.layout().gfn_space());
/// let mut sampler = RateSampler::new(tracker)?;
/// for _ in 0..1000 {
///     std::thread::sleep(Duration::from_millis(1));
///     meter.add(&sampler.window()?);
/// }
/// tracker.disable()?;
/// # Ok(meter.report()) }
/// ```
pub struct RateSampler<'t> {
    tracker: &'t Tracker,
    buffer: Vec<Gfn>,
    since: Instant,
}

impl<'t> RateSampler<'t> {
    /// Begins: takes and forgets everything that was dirty before.
    ///
    /// # Errors
    /// As [`Tracker::fetch`]; the tracker must be enabled.
    pub fn new(tracker: &'t Tracker) -> Result<RateSampler<'t>, HarvestError> {
        let mut sampler = RateSampler { tracker, buffer: vec![Gfn(0); BUFFER], since: Instant::now() };
        sampler.window()?;
        Ok(sampler)
    }

    /// The pages that have become dirty since the last call.
    ///
    /// # Errors
    /// As [`Tracker::fetch`].
    pub fn window(&mut self) -> Result<Window, HarvestError> {
        let now = Instant::now();
        let time = now - std::mem::replace(&mut self.since, now);
        let devices = self.tracker.estimate().marked as u64;
        let mut pages = Vec::new();
        loop {
            let fetched = self.tracker.fetch(&mut self.buffer, Fetch { rearm: true, ..Fetch::default() })?;
            let fetched = fetched.rearm().map_err(|_| HarvestError::Failed)?;
            pages.extend_from_slice(fetched);
            if fetched.len() < BUFFER {
                break;
            }
        }
        // A page that was written again while others were taken.
        pages.sort_unstable();
        pages.dedup();
        Ok(Window { time, vcpus: Vec::new(), devices, hot: 0, pages })
    }
}

impl fmt::Debug for RateSampler<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateSampler").field("since", &self.since).finish_non_exhaustive()
    }
}
