//! What a migration or protection would cost, from the rates of a VM.

use std::time::Duration;

use super::RateReport;
use crate::layout::PAGE_SIZE;

/// Pre-copy rounds after which a migration counts as endless.
const MAX_ROUNDS: u32 = 50;
/// A round makes no progress unless it is shorter than the last one by this factor.
const PROGRESS: f64 = 0.95;

/// The link to the other host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Its payload bandwidth.
    pub bytes_per_second: f64,
    /// How long the guest may be stopped while the last pages are sent.
    pub downtime: Duration,
}

/// The forecast of a pre-copy migration.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Migration {
    /// Rounds after the base copy.
    pub rounds: u32,
    /// From the start until the guest runs on the other host.
    pub total: Duration,
    /// How long the guest is stopped while the last pages are sent; state and devices come on top.
    pub downtime: Duration,
    /// All bytes that are sent.
    pub bytes: f64,
    /// The guest's remaining speed meanwhile, with one vCPU writing: 1 is full speed.
    pub speed: f64,
    /// Whether the last round gets short enough. If not, slow the guest down, or it will be stopped for
    /// longer.
    pub converges: bool,
}

/// The costs of a page: `SelfTest` measures both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// The trap at the first write to a page.
    pub fault: Duration,
    /// Copying a page in the pause.
    pub copy: Duration,
    /// A pause without any page: stop the vCPUs, read their state, let them run on.
    pub pause: Duration,
}

/// The forecast of checkpoints at a steady interval.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Protection {
    /// Different pages in an epoch.
    pub pages: f64,
    /// Their bandwidth on the link, before compression.
    pub bytes_per_second: f64,
    /// The guest's remaining speed with one vCPU writing: 1 is full speed.
    pub speed: f64,
}

impl RateReport {
    /// Different pages written in this time: as measured for 1, 10 and 100 ms, with the same growth between
    /// and beyond them. None if nothing was measured.
    pub fn unique_pages(&self, time: Duration) -> Option<f64> {
        let set = self.working_set;
        let measured = [(1e-3, set.in_1_ms), (1e-2, set.in_10_ms), (0.1, set.in_100_ms)];
        let points: Vec<(f64, f64)> =
            measured.into_iter().filter_map(|(time, pages)| Some((time, pages?.max(1e-3)))).collect();
        let time = time.as_secs_f64();
        let (first, last) = (points.first()?, points.last()?);
        if time <= first.0 {
            // Fewer, but not in proportion: nothing more is known about the shortest time.
            return Some(first.1 * time / first.0);
        }
        // The part of the curve that contains the time, or the last part.
        let pair = points.windows(2).find(|pair| time <= pair[1].0).or_else(|| points.windows(2).last());
        let Some(&[(t0, p0), (t1, p1)]) = pair.map(|pair| <&[_; 2]>::try_from(pair).expect("two points"))
        else {
            // One point: at most in proportion to time.
            return Some(last.1 * time / last.0);
        };
        let growth = ((p1 / p0).ln() / (t1 / t0).ln()).clamp(0.0, 1.0);
        Some(p1 * (time / t1).powf(growth))
    }

    /// Pre-copy of this much memory, in bytes, round after round until the rest fits into the downtime.
    /// Without a measured working set it assumes that nothing is written.
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

    /// A checkpoint every `interval`, without hot pages: no page is left unarmed. None if no working set was
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
