//! Points of a VM, from what its process has counted.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::{Mark, Point, Role, Spread};
use crate::asking;

/// What is added to the path of the status socket.
const SUFFIX: &str = ".metrics";
/// How long an answer may take. It is there at once, or its process stands still.
const PATIENCE: Duration = Duration::from_millis(250);
/// The longest answer, in bytes.
const LONGEST: usize = 128 << 10;
/// How many questions are left out after one that nobody has answered.
const RESTS: u32 = 4;
/// The version of the answer that is understood.
const FORMAT: u32 = 1;
/// The most buckets of a histogram.
const BUCKETS: usize = 64;
const US: u64 = 1_000;
const MS: u64 = 1_000_000;

/// The parts of an answer that a time line has. Releases may add others. Times are nanoseconds.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Report {
    format: u32,
    role: Role,
    /// When the process began.
    started: f64,
    protected: bool,
    active: bool,
    protection_losses: u64,
    #[serde(default)]
    apply: Buckets,
    #[serde(default)]
    counted: Counted,
    #[serde(default)]
    running: Option<Running>,
}

/// What is counted where the VM runs, since it runs there.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Running {
    checkpoints: u64,
    bytes: u64,
    guest_held_ns: u64,
    pause: Buckets,
    commit: Buckets,
    dirty_pages: Buckets,
    held_bytes: Buckets,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Counted {
    takeovers: u64,
    hand_overs: u64,
    link_losses: u64,
    arbiter_losses: u64,
    guest_restarts: u64,
    guest_panics: u64,
    vcpu_faults: u64,
    disk_faults: u64,
    network_faults: u64,
}

/// A histogram.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Buckets {
    /// The largest value of each bucket but the last.
    bounds: Vec<u64>,
    counts: Vec<u64>,
    sum: u64,
}

impl Buckets {
    fn is_sound(&self) -> bool {
        let none = self.bounds.is_empty() && self.counts.is_empty();
        none || (self.counts.len() == self.bounds.len() + 1 && self.counts.len() <= BUCKETS)
    }

    /// What was counted after `earlier`, in this unit. If it was counted anew since then, that is everything.
    fn since(&self, earlier: &Self, unit: u64) -> Option<Spread> {
        let goes_on = self.bounds == earlier.bounds
            && self.counts.len() == earlier.counts.len()
            && self.counts.iter().zip(&earlier.counts).all(|(now, then)| now >= then);
        let then = |at: usize| if goes_on { earlier.counts[at] } else { 0 };
        let counts = || self.counts.iter().enumerate().map(|(at, now)| now - then(at));
        let count = counts().fold(0, u64::saturating_add);
        let sum = self.sum.saturating_sub(if goes_on { earlier.sum } else { 0 });
        let last = counts().rposition(|it| it > 0)?;
        let most = self.bounds.get(last).map(|it| it.div_ceil(unit));
        // A value that is being counted may be in the sum only.
        let mean = (sum / count / unit).min(most.unwrap_or(u64::MAX));
        Some(Spread { mean, most })
    }
}

/// Hears a VM's process from time to time.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    last: Option<(Instant, Report)>,
    rests: u32,
}

impl Meter {
    /// What the process of this number has counted since the last time. Nothing the first time, and while it does not say:
    /// then it is asked less often.
    pub(crate) fn look(&mut self, status: &Path, pid: u32) -> Option<Point> {
        if self.rests > 0 {
            self.rests -= 1;
            return None;
        }
        match hear(status, pid) {
            Ok(report) => self.step(report, Instant::now()),
            Err(_) => {
                (self.last, self.rests) = (None, RESTS);
                None
            }
        }
    }

    /// The next answer. One of another process begins anew.
    pub(super) fn step(&mut self, report: Report, now: Instant) -> Option<Point> {
        let (then, earlier) = self.last.replace((now, report.clone()))?;
        let is_same = earlier.started.to_bits() == report.started.to_bits();
        is_same.then(|| point(&earlier, &report, now.saturating_duration_since(then)))
    }
}

/// What the process says whose status socket this is.
fn hear(status: &Path, pid: u32) -> io::Result<Report> {
    let mut path = status.to_owned().into_os_string();
    path.push(SUFFIX);
    let (said, by) = asking::hear(path.as_ref(), PATIENCE, LONGEST)?;
    // Others may listen there.
    if by != pid {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    read(&said).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A report that can be used.
pub(super) fn read(said: &[u8]) -> Option<Report> {
    let report: Report = serde_json::from_slice(said).ok()?;
    let running = report.running.clone().unwrap_or_default();
    let Running { pause, commit, dirty_pages, held_bytes, .. } = &running;
    let sound = [&report.apply, pause, commit, dirty_pages, held_bytes].iter().all(|it| it.is_sound());
    (report.format == FORMAT && sound).then_some(report)
}

/// What the API says of the second between two answers of a process; `None`: nobody makes a point of them. The program's tests
/// ask this for what its processes really write.
#[must_use]
pub fn point_between(earlier: &[u8], now: &[u8]) -> Option<serde_json::Value> {
    let began = Instant::now();
    let mut meter = Meter::default();
    meter.step(read(earlier)?, began);
    let point = meter.step(read(now)?, began + Duration::from_secs(1))?;
    serde_json::to_value(point).ok()
}

fn point(earlier: &Report, now: &Report, span: Duration) -> Point {
    let none = Running::default();
    let (then, running) = (earlier.running.as_ref().unwrap_or(&none), now.running.as_ref().unwrap_or(&none));
    // Counted anew since then, it is less.
    let grown = |now: u64, then: u64| now.checked_sub(then).unwrap_or(now);
    Point {
        time: crate::view::now(),
        span_ms: u64::try_from(span.as_millis()).unwrap_or(u64::MAX),
        role: now.role,
        protected: now.protected,
        active: now.active,
        checkpoints: grown(running.checkpoints, then.checkpoints),
        pause_us: running.pause.since(&then.pause, US),
        commit_us: running.commit.since(&then.commit, US),
        dirty_pages: running.dirty_pages.since(&then.dirty_pages, 1),
        held_bytes: running.held_bytes.since(&then.held_bytes, 1),
        apply_us: now.apply.since(&earlier.apply, US),
        sent_bytes: grown(running.bytes, then.bytes),
        guest_held_ms: grown(running.guest_held_ns, then.guest_held_ns) / MS,
        marks: marks(earlier, now),
    }
}

fn marks(earlier: &Report, now: &Report) -> Vec<Mark> {
    let faults =
        |it: &Counted| it.vcpu_faults.saturating_add(it.disk_faults).saturating_add(it.network_faults);
    let (then, counted) = (&earlier.counted, &now.counted);
    let all = [
        (Mark::Takeover, then.takeovers, counted.takeovers),
        (Mark::HandOver, then.hand_overs, counted.hand_overs),
        (Mark::ProtectionLost, earlier.protection_losses, now.protection_losses),
        (Mark::LinkLost, then.link_losses, counted.link_losses),
        (Mark::ArbiterLost, then.arbiter_losses, counted.arbiter_losses),
        (Mark::GuestRestart, then.guest_restarts, counted.guest_restarts),
        (Mark::GuestPanic, then.guest_panics, counted.guest_panics),
        (Mark::HostFault, faults(then), faults(counted)),
    ];
    all.into_iter().filter(|(_, then, now)| now > then).map(|(mark, ..)| mark).collect()
}
