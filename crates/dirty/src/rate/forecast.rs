//! What a migration or a protection would cost, from the rates of a VM.

use std::time::Duration;

use super::RateReport;
use crate::layout::PAGE_SIZE;

/// Rounds of pre-copy after which a migration is given up as one that does not end.
const MAX_ROUNDS: u32 = 50;
/// A round that is not shorter than the last one by this factor makes no progress.
const PROGRESS: f64 = 0.95;

/// The way to the other host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Payload that goes through it.
    pub bytes_per_second: f64,
    /// How long the guest may stand while the last pages are sent.
    pub downtime: Duration,
}

/// What is to be expected of a pre-copy migration.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Migration {
    /// Rounds after the base copy.
    pub rounds: u32,
    /// From the start until the guest runs on the other host.
    pub total: Duration,
    /// How long the guest stands while the last pages are sent; state and devices come on top.
    pub downtime: Duration,
    /// All that is sent.
    pub bytes: f64,
    /// What is left of the guest's speed on the way, with one vCPU writing: 1 is all of it.
    pub speed: f64,
    /// Whether the last round gets short enough. If not, the guest must be slowed down, or stands for longer.
    pub converges: bool,
}

/// What a page costs: [`crate::SelfTest`] measures both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// The trap at the first write to a page.
    pub fault: Duration,
    /// To copy a page in the pause.
    pub copy: Duration,
    /// Of a pause without any page: stop the vCPUs, read their state, let them go on.
    pub pause: Duration,
}

/// What is to be expected of checkpoints at a steady interval.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Protection {
    /// Different pages in an epoch.
    pub pages: f64,
    /// What they need of the link, before they are made smaller.
    pub bytes_per_second: f64,
    /// What is left of the guest's speed with one vCPU writing: 1 is all of it.
    pub speed: f64,
}

impl RateReport {
    /// Different pages written in such a time: as measured for 1, 10 and 100 ms, between and beyond them with
    /// the same growth. None if nothing was measured.
    pub fn unique_pages(&self, time: Duration) -> Option<f64> {
        let set = self.working_set;
        let measured = [(1e-3, set.in_1_ms), (1e-2, set.in_10_ms), (0.1, set.in_100_ms)];
        let points: Vec<(f64, f64)> =
            measured.into_iter().filter_map(|(time, pages)| Some((time, pages?.max(1e-3)))).collect();
        let time = time.as_secs_f64();
        let (first, last) = (points.first()?, points.last()?);
        if time <= first.0 {
            // Fewer, but not in proportion: of the shortest time nothing more is known.
            return Some(first.1 * time / first.0);
        }
        // The stretch of the curve that the time lies in, or the last one.
        let pair = points.windows(2).find(|pair| time <= pair[1].0).or_else(|| points.windows(2).last());
        let Some(&[(t0, p0), (t1, p1)]) = pair.map(|pair| <&[_; 2]>::try_from(pair).expect("two points"))
        else {
            // One point: at most in proportion to time.
            return Some(last.1 * time / last.0);
        };
        let growth = ((p1 / p0).ln() / (t1 / t0).ln()).clamp(0.0, 1.0);
        Some(p1 * (time / t1).powf(growth))
    }

    /// Pre-copy of so much memory, in bytes, round after round until the rest fits into the downtime. Without
    /// a measured working set it is as if nothing were written.
    pub fn migration(&self, link: &Link, memory: u64, costs: &Costs) -> Migration {
        let all = memory as f64;
        let rest = |time: f64| {
            let pages = self.unique_pages(Duration::from_secs_f64(time.min(1e6))).unwrap_or(0.0);
            (pages * PAGE_SIZE as f64).min(all)
        };
        let speed = link.bytes_per_second.max(1.0);
        let (mut bytes, mut round) = (all, all / speed);
        let (mut total, mut rounds) = (round, 0);
        loop {
            let left = rest(round);
            let next = left / speed;
            let fits = next <= link.downtime.as_secs_f64();
            if fits || next > round * PROGRESS || rounds == MAX_ROUNDS {
                let downtime = Duration::from_secs_f64(next.min(1e9));
                // Each page that is sent again was trapped once before.
                let traps = (bytes + left - all) / PAGE_SIZE as f64;
                let speed = total / (total + traps * costs.fault.as_secs_f64()).max(1e-9);
                let total = Duration::from_secs_f64((total + next).min(1e9));
                return Migration { rounds, total, downtime, bytes: bytes + left, speed, converges: fits };
            }
            bytes += left;
            total += next;
            round = next;
            rounds += 1;
        }
    }

    /// A checkpoint each `interval`, hot pages or not: no page is left unarmed. None if no working set was
    /// measured.
    pub fn protection(&self, interval: Duration, costs: &Costs) -> Option<Protection> {
        let pages = self.unique_pages(interval)?;
        let seconds = interval.as_secs_f64().max(1e-9);
        let lost = pages * (costs.fault + costs.copy).as_secs_f64() + costs.pause.as_secs_f64();
        Some(Protection {
            pages,
            bytes_per_second: pages * PAGE_SIZE as f64 / seconds,
            speed: seconds / (seconds + lost),
        })
    }
}
