//! What the active side counts, and the thread that reports it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use outlive_machine::{CaptureReport, Output};

use crate::events::{Event, EventWriter, Stats, histogram, pairs};

/// Time between two reports.
const REPORT: Duration = Duration::from_millis(200);

struct Histograms {
    pause_us: Histogram<u64>,
    dirty_pages: Histogram<u64>,
}

/// Counters since this process became the active side. Recording allocates nothing.
pub(crate) struct Totals {
    generation: AtomicU64,
    committed: AtomicU64,
    last_committed: AtomicU64,
    bytes: AtomicU64,
    protected: AtomicBool,
    base_began: Mutex<Option<Instant>>,
    histograms: Mutex<Histograms>,
}

impl Totals {
    /// All zero; `checkpoint` is the last one before this process became active.
    pub(crate) fn new(checkpoint: u64) -> Arc<Self> {
        Arc::new(Self {
            generation: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            last_committed: AtomicU64::new(checkpoint),
            bytes: AtomicU64::new(0),
            protected: AtomicBool::new(false),
            base_began: Mutex::new(None),
            histograms: Mutex::new(Histograms { pause_us: histogram(), dirty_pages: histogram() }),
        })
    }

    /// The generation that runs the VM from now on.
    pub(crate) fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// Everything up to this checkpoint is committed.
    pub(crate) fn committed(&self, through: u64) {
        let before = self.last_committed.swap(through, Ordering::Relaxed);
        self.committed.fetch_add(through.saturating_sub(before), Ordering::Relaxed);
    }

    /// So many bytes went out.
    pub(crate) fn sent(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Base synchronisation begins.
    pub(crate) fn base_begins(&self) {
        *self.base_began.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Time since base synchronisation began, in milliseconds.
    pub(crate) fn base_ms(&self) -> u64 {
        let began = *self.base_began.lock().unwrap_or_else(PoisonError::into_inner);
        began.map_or(0, |b| b.elapsed().as_millis() as u64)
    }

    /// Whether the VM is protected.
    pub(crate) fn protected(&self, is: bool) {
        self.protected.store(is, Ordering::Relaxed);
    }

    /// A checkpoint was captured.
    pub(crate) fn captured(&self, report: &CaptureReport) {
        let mut histograms = self.histograms.lock().unwrap_or_else(PoisonError::into_inner);
        histograms.pause_us.saturating_record(report.pause.as_micros() as u64);
        histograms.dirty_pages.saturating_record(report.pages as u64);
    }

    fn stats(&self, rate_hz: f64, output: Option<&Output>) -> Stats {
        let (pause_us, dirty_pages) = {
            let histograms = self.histograms.lock().unwrap_or_else(PoisonError::into_inner);
            (histograms.pause_us.clone(), histograms.dirty_pages.clone())
        };
        Stats {
            generation: self.generation.load(Ordering::Relaxed),
            checkpoints: self.committed.load(Ordering::Relaxed),
            pause_us: pairs(&pause_us),
            dirty_pages: pairs(&dirty_pages),
            rate_hz,
            bytes: self.bytes.load(Ordering::Relaxed),
            held_frames: output.map_or(0, |o| o.stats().held_frames),
        }
    }
}

/// Writes [`Stats`] to the event stream every 200 ms, and once more when it is dropped.
pub(crate) struct Reporter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reporter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(
        totals: Arc<Totals>,
        output: Option<Arc<Output>>,
        events: EventWriter,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = outlive_machine::spawn("stats", move || {
            let mut before = (Instant::now(), 0);
            let mut report = || {
                let committed = totals.committed.load(Ordering::Relaxed);
                let (since, earlier) = std::mem::replace(&mut before, (Instant::now(), committed));
                let rate_hz = (committed - earlier) as f64 / since.elapsed().as_secs_f64().max(1e-6);
                events.emit(Event::Stats(totals.stats(rate_hz, output.as_deref())));
            };
            while !stopped.load(Ordering::Acquire) {
                std::thread::park_timeout(REPORT);
                report();
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            thread.join().ok();
        }
    }
}
