//! What the active side counts and measures, and its reports.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use outlive_epoch::CodecCounts;
use outlive_machine::{CaptureReport, Output, OutputStats};

use super::behind::Behind;
use crate::audit::{Audit, DiskProgress};
use crate::events::{Event, EventWriter, Measured, PageCounts, Stats, histogram};
use crate::heat::{Counter, Heat};
use crate::link::Shipped;
use crate::metrics::{AuditedDisk, COUNTS, Frames, Histogram, PAUSES, Running, SIZES, TIMES};
use crate::phases::{Phase, Phases, Recorded, histogram_ns};
use crate::report::{COUNTERS, Reporter, Schedule, ThreadReport};
use crate::status::Progress;

/// How many checkpoints may be in flight: more than there are buffers.
const MAX_IN_FLIGHT: usize = 64;

/// Counters since this process became the active side. Recording allocates nothing.
pub(crate) struct Totals {
    generation: AtomicU64,
    committed: AtomicU64,
    bytes: AtomicU64,
    pages: Mutex<PageCounts>,
    protected: AtomicBool,
    base_began: Mutex<Option<Instant>>,
    held: Mutex<HeldTime>,
    in_flight: Mutex<InFlight>,
    phases: Phases,
    dirty_pages: Recorded,
    audit: Arc<Audit>,
    meters: Meters,
    /// The VM's frames, if it has a network card.
    output: OnceLock<Arc<Output>>,
    /// Where its memory is written.
    heat: OnceLock<Arc<Heat>>,
}

/// Everything since this process became the active side, for metrics.
struct Meters {
    phases: Vec<Histogram>,
    commit: Histogram,
    dirty_pages: Histogram,
    checkpoint_bytes: Histogram,
    backlog: Histogram,
    backlog_bytes: Histogram,
    held_frames: Histogram,
    held_bytes: Histogram,
}

impl Meters {
    fn new() -> Self {
        let bounds = |phase| match phase {
            Phase::Pause | Phase::VcpuPause => PAUSES,
            _ => TIMES,
        };
        Self {
            phases: Phase::ALL.map(|phase| Histogram::new(bounds(phase))).into(),
            commit: Histogram::new(TIMES),
            dirty_pages: Histogram::new(COUNTS),
            checkpoint_bytes: Histogram::new(SIZES),
            backlog: Histogram::new(COUNTS),
            backlog_bytes: Histogram::new(SIZES),
            held_frames: Histogram::new(COUNTS),
            held_bytes: Histogram::new(SIZES),
        }
    }
}

/// A checkpoint that is sent and not committed.
struct Sent {
    number: u64,
    /// When its last byte was written.
    at: Instant,
    /// How long it took from the end of the pause until then.
    before: Duration,
    /// How many bytes had been sent by then.
    bytes: u64,
}

/// For how long the guest was held back.
#[derive(Clone, Copy, Debug, Default)]
struct HeldTime {
    total: Duration,
    /// How long it was at the beginning of the base synchronisation.
    before_base: Duration,
    /// The longest time that the guest stood still since then.
    longest: Duration,
    /// Rounds of the base synchronisation.
    rounds: u32,
}

/// How the guest fared in a base synchronisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BaseCost {
    /// Rounds of memory.
    pub(crate) rounds: u32,
    /// Milliseconds for which the guest was held, all together.
    pub(crate) held_ms: u64,
    /// The longest time in microseconds that it stood still.
    pub(crate) longest_stop_us: u64,
}

/// How far the checkpoints are.
struct InFlight {
    /// The newest committed one.
    committed: u64,
    /// Those that are sent and not committed.
    sent: VecDeque<Sent>,
    /// When the newest commit was heard of.
    committed_at: Option<Instant>,
    /// How many bytes had been sent when the newest committed checkpoint was.
    committed_bytes: u64,
    /// How many bytes had been sent when the last checkpoint was.
    shipped_bytes: u64,
}

impl Totals {
    /// Counters at zero; `checkpoint` is the last one before this process became active.
    pub(crate) fn new(checkpoint: u64) -> Arc<Self> {
        Arc::new(Self {
            generation: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            pages: Mutex::default(),
            protected: AtomicBool::new(false),
            base_began: Mutex::new(None),
            held: Mutex::default(),
            in_flight: Mutex::new(InFlight {
                committed: checkpoint,
                sent: VecDeque::with_capacity(MAX_IN_FLIGHT),
                committed_at: None,
                committed_bytes: 0,
                shipped_bytes: 0,
            }),
            phases: Phases::new(),
            dirty_pages: Recorded::new(histogram()),
            audit: Arc::default(),
            meters: Meters::new(),
            output: OnceLock::new(),
            heat: OnceLock::new(),
        })
    }

    /// The comparison of pages with the standby's.
    pub(crate) fn audit(&self) -> &Arc<Audit> {
        &self.audit
    }

    /// The generation that runs the VM from now on.
    pub(crate) fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// Everything up to this checkpoint is committed: its acknowledgement was just read.
    pub(crate) fn committed(&self, through: u64) {
        let mut in_flight = self.in_flight();
        self.committed.fetch_add(through.saturating_sub(in_flight.committed), Ordering::Relaxed);
        in_flight.committed = in_flight.committed.max(through);
        in_flight.committed_at = Some(Instant::now());
        while let Some(sent) = in_flight.sent.pop_front_if(|sent| sent.number <= through) {
            let took = sent.at.elapsed();
            self.record(Phase::Acknowledge, took);
            self.meters.commit.record_time(sent.before + took);
            in_flight.committed_bytes = sent.bytes;
        }
    }

    fn record(&self, phase: Phase, took: Duration) {
        self.phases.record(phase, took);
        self.meters.phases[phase as usize].record_time(took);
    }

    /// Held output is counted at each commit from now on.
    pub(crate) fn counts_output(&self, output: &Arc<Output>) {
        self.output.get_or_init(|| output.clone());
    }

    /// Changed pages are counted in this map from now on.
    pub(crate) fn counts_heat(&self, heat: &Arc<Heat>) {
        self.heat.get_or_init(|| heat.clone());
    }

    /// The table of a new connection, in which it counts changed pages.
    pub(crate) fn heat_counter(&self) -> Option<Counter> {
        self.heat.get().map(Heat::counter)
    }

    /// Output is about to be let out.
    pub(crate) fn releases(&self) {
        if let Some(output) = self.output.get() {
            let OutputStats { held_frames, held_bytes, .. } = output.stats();
            self.meters.held_frames.record(held_frames);
            self.meters.held_bytes.record(held_bytes);
        }
    }

    /// Counts bytes that were sent.
    pub(crate) fn sent(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Pages were written down like this.
    pub(crate) fn written(&self, counts: &CodecCounts) {
        let CodecCounts { raw, zero, granules, granule_bytes, unchanged } = *counts;
        self.pages().add(&PageCounts { raw, zero, granules, granule_bytes, unchanged });
    }

    fn pages(&self) -> MutexGuard<'_, PageCounts> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A checkpoint was sent to its end.
    pub(crate) fn shipped(&self, shipped: &Shipped) {
        self.record(Phase::Queue, shipped.queue);
        self.record(Phase::Encode, shipped.encode);
        self.record(Phase::Send, shipped.send);
        let before = shipped.queue + shipped.encode + shipped.send;
        let bytes = self.bytes.load(Ordering::Relaxed);
        let mut in_flight = self.in_flight();
        self.meters.checkpoint_bytes.record(bytes.saturating_sub(in_flight.shipped_bytes));
        in_flight.shipped_bytes = bytes;
        if shipped.number <= in_flight.committed {
            // The acknowledgement came before the write of the last byte returned.
            self.record(Phase::Acknowledge, Duration::ZERO);
            self.meters.commit.record_time(before);
            in_flight.committed_bytes = bytes;
        } else if in_flight.sent.len() < MAX_IN_FLIGHT {
            in_flight.sent.push_back(Sent { number: shipped.number, at: Instant::now(), before, bytes });
        }
        self.meters.backlog.record(in_flight.sent.len() as u64);
        self.meters.backlog_bytes.record(in_flight.waiting());
    }

    /// Output was let out; records how long that took.
    pub(crate) fn released(&self, took: Duration) {
        self.record(Phase::Release, took);
    }

    /// Base synchronisation begins.
    pub(crate) fn base_begins(&self) {
        // What was in flight on an earlier link never arrives.
        self.in_flight().sent.clear();
        *self.base_began.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let mut held = self.held_time();
        *held = HeldTime { total: held.total, before_base: held.total, ..HeldTime::default() };
    }

    fn held_time(&self) -> MutexGuard<'_, HeldTime> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest was held back for so long.
    pub(crate) fn held(&self, took: Duration) {
        let mut held = self.held_time();
        held.total += took;
        held.longest = held.longest.max(took);
    }

    /// The base is captured, after so many rounds.
    pub(crate) fn base_rounds(&self, rounds: u32) {
        self.held_time().rounds = rounds;
    }

    /// How the guest has fared since the base synchronisation began.
    pub(crate) fn base_cost(&self) -> BaseCost {
        let held = *self.held_time();
        BaseCost {
            rounds: held.rounds,
            held_ms: (held.total - held.before_base).as_millis() as u64,
            longest_stop_us: held.longest.as_micros() as u64,
        }
    }

    /// Time since base synchronisation began, in milliseconds.
    pub(crate) fn base_ms(&self) -> u64 {
        let began = *self.base_began.lock().unwrap_or_else(PoisonError::into_inner);
        began.map_or(0, |b| b.elapsed().as_millis() as u64)
    }

    /// What [`protected`](Self::protected) was told last.
    pub(crate) fn is_protected(&self) -> bool {
        self.protected.load(Ordering::Relaxed)
    }

    /// Whether the VM is protected.
    pub(crate) fn protected(&self, is: bool) {
        self.protected.store(is, Ordering::Relaxed);
    }

    /// A checkpoint was captured. Called after its pause.
    pub(crate) fn captured(&self, report: &CaptureReport) {
        let CaptureReport { pause, stop, state, harvest, handover, rearm, decide, copy, .. } = *report;
        let times = [
            (Phase::Pause, pause),
            (Phase::Stop, stop),
            (Phase::State, state),
            (Phase::Harvest, harvest),
            (Phase::Handover, handover),
            (Phase::Rearm, rearm),
            (Phase::Decide, decide),
            (Phase::Copy, copy),
        ];
        times.into_iter().for_each(|(phase, took)| self.record(phase, took));
        if let Some(returned) = report.returned {
            self.record(Phase::Resume, returned.resume);
            self.record(Phase::VcpuPause, returned.vcpu_pause);
        }
        self.dirty_pages.record(report.pages as u64);
        self.meters.dirty_pages.record(report.pages as u64);
    }

    fn stats(&self, rate_hz: f64, output: Option<&Output>) -> Stats {
        Stats {
            generation: self.generation.load(Ordering::Relaxed),
            checkpoints: self.committed.load(Ordering::Relaxed),
            rate_hz,
            bytes: self.bytes.load(Ordering::Relaxed),
            held_frames: output.map_or(0, |o| o.stats().held_frames),
            guest_held_us: self.held_time().total.as_micros() as u64,
            pages: *self.pages(),
            audit: self.audit.progress().into(),
        }
    }

    /// How far the standby is behind.
    pub(crate) fn progress(&self) -> Progress {
        let in_flight = self.in_flight();
        Progress {
            checkpoint: in_flight.committed,
            since_commit: in_flight.committed_at.map(|at| at.elapsed()),
            in_flight: in_flight.sent.len() as u64,
            bytes_in_flight: Some(in_flight.waiting()),
            audit: self.audit.progress(),
        }
    }

    fn in_flight(&self) -> MutexGuard<'_, InFlight> {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything for metrics.
    pub(crate) fn running(&self) -> Running {
        let Meters { phases, commit, dirty_pages, checkpoint_bytes, .. } = &self.meters;
        let Meters { backlog, backlog_bytes, held_frames, held_bytes, .. } = &self.meters;
        let of = |phase: Phase| phases[phase as usize].read();
        let parts = Phase::ALL.into_iter().filter(|phase| !matches!(phase, Phase::Pause | Phase::VcpuPause));
        Running {
            checkpoints: self.committed.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            guest_held_ns: u64::try_from(self.held_time().total.as_nanos()).unwrap_or(u64::MAX),
            pages: *self.pages(),
            frames: self.output.get().map(|output| frames(output.stats())),
            pause: of(Phase::Pause),
            vcpu_pause: of(Phase::VcpuPause),
            commit: commit.read(),
            dirty_pages: dirty_pages.read(),
            checkpoint_bytes: checkpoint_bytes.read(),
            backlog: backlog.read(),
            backlog_bytes: backlog_bytes.read(),
            held_frames: held_frames.read(),
            held_bytes: held_bytes.read(),
            phases: parts.map(|phase| (phase.name().to_owned(), of(phase))).collect(),
            disks: self.audit.disks().into_iter().map(audited).collect(),
        }
    }
}

fn audited(disk: DiskProgress) -> AuditedDisk {
    let DiskProgress { index, bytes, compared, left_out, compared_at, since } = disk;
    let ago = |at: SystemTime| SystemTime::now().duration_since(at).unwrap_or_default().as_secs_f64();
    let age = since.map(|since| ago(compared_at.map_or(since, |at| at.max(since))));
    AuditedDisk { disk: index, size: bytes, compared, left_out, age }
}

impl InFlight {
    /// Bytes that are sent and not committed.
    fn waiting(&self) -> u64 {
        self.sent.back().map_or(0, |sent| sent.bytes.saturating_sub(self.committed_bytes))
    }
}

fn frames(stats: OutputStats) -> Frames {
    Frames {
        held: stats.held_frames,
        held_bytes: stats.held_bytes,
        released: stats.released_frames,
        passed: stats.passed_frames,
        discarded: stats.discarded_frames,
        refused: stats.refused_frames,
        full: stats.full,
    }
}

/// Reports the counters and what was measured to the event stream.
///
/// # Errors
/// The operating system's, when it refuses the thread.
pub(crate) fn report(
    totals: Arc<Totals>,
    output: Option<Arc<Output>>,
    events: EventWriter,
) -> std::io::Result<Reporter> {
    let mut counters = CounterReport::new(totals.clone(), output);
    let mut measured = MeasuredReport::new(totals.clone());
    let mut behind = Behind::default();
    Reporter::start(move |last| {
        if let Some(stats) = counters.due(last) {
            events.emit(Event::Stats(stats));
        }
        if let Some(measured) = measured.due(last) {
            events.emit(Event::Measured(measured));
        }
        if let Some(event) = behind.look(totals.is_protected(), &totals.progress(), Instant::now()) {
            match &event {
                Event::StandbySlow { behind_ms, in_flight } => tracing::warn!(
                    behind_ms,
                    in_flight,
                    "the standby is slow: the guest's clients wait for it, the protection goes on"
                ),
                _ => tracing::info!("the standby has caught up"),
            }
            events.emit(event);
        }
    })
}

struct CounterReport {
    totals: Arc<Totals>,
    output: Option<Arc<Output>>,
    schedule: Schedule,
    committed: u64,
}

impl CounterReport {
    fn new(totals: Arc<Totals>, output: Option<Arc<Output>>) -> Self {
        Self { totals, output, schedule: Schedule::new(COUNTERS), committed: 0 }
    }

    fn due(&mut self, last: bool) -> Option<Stats> {
        let since = self.schedule.due(last)?;
        let committed = self.totals.committed.load(Ordering::Relaxed);
        let earlier = std::mem::replace(&mut self.committed, committed);
        let rate_hz = (committed - earlier) as f64 / since.as_secs_f64().max(1e-6);
        Some(self.totals.stats(rate_hz, self.output.as_deref()))
    }
}

struct MeasuredReport {
    totals: Arc<Totals>,
    threads: ThreadReport,
    spare_ns: hdrhistogram::Histogram<u64>,
    spare_pages: hdrhistogram::Histogram<u64>,
}

impl MeasuredReport {
    fn new(totals: Arc<Totals>) -> Self {
        let threads = ThreadReport::new("coordinator");
        Self { totals, threads, spare_ns: histogram_ns(), spare_pages: histogram() }
    }

    fn due(&mut self, last: bool) -> Option<Measured> {
        let (span_us, threads) = self.threads.due(last)?;
        let phases = self.totals.phases.take(&mut self.spare_ns);
        let phases = phases.into_iter().map(|(phase, pairs)| (phase.name().to_owned(), pairs)).collect();
        let dirty_pages = self.totals.dirty_pages.take(&mut self.spare_pages);
        Some(Measured { span_us, phases, dirty_pages, threads })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped(number: u64) -> Shipped {
        let time = Duration::from_micros(5);
        Shipped { number, queue: time, encode: time, send: time }
    }

    fn counted(totals: &Totals, phase: Phase) -> u64 {
        let taken = totals.phases.take(&mut histogram_ns());
        let of = taken.into_iter().find(|(it, _)| *it == phase);
        of.map_or(0, |(_, pairs)| pairs.iter().map(|(_, count)| count).sum())
    }

    #[test]
    fn each_checkpoint_is_acknowledged_once() {
        let totals = Totals::new(7);
        for number in 8..=10 {
            totals.shipped(&shipped(number));
        }
        totals.committed(9);
        assert_eq!(counted(&totals, Phase::Acknowledge), 2);
        totals.committed(10);
        // The acknowledgement is faster than the system call that sent the checkpoint.
        totals.committed(11);
        totals.shipped(&shipped(11));
        assert_eq!(counted(&totals, Phase::Acknowledge), 2);
        assert_eq!(totals.committed.load(Ordering::Relaxed), 4);
        totals.sent(500);
        totals.shipped(&shipped(12));
        let Progress { checkpoint, in_flight, bytes_in_flight, since_commit, .. } = totals.progress();
        assert_eq!((checkpoint, in_flight, bytes_in_flight), (11, 1, Some(500)));
        assert!(since_commit.is_some());
        let running = totals.running();
        assert_eq!((running.checkpoints, running.bytes), (4, 500));
        assert_eq!((running.commit.count(), running.checkpoint_bytes.sum), (4, 500));
        assert!(running.commit.sum >= 4 * 15_000, "all that came before the acknowledgement counts");
        assert_eq!((running.backlog.count(), running.backlog.sum), (5, 7), "1, 2, 3, none and 1");
        assert_eq!(running.backlog_bytes.sum, 500);
        totals.base_begins();
        assert_eq!(totals.progress().in_flight, 0);
        totals.committed(13);
        assert_eq!(counted(&totals, Phase::Acknowledge), 0, "that link is gone");
    }
}
