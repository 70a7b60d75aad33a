//! Reports to the event stream: when they are due, and the thread that makes them.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::events::{Event, EventWriter, Measured, ThreadTime};
use crate::threads::Sampler;

/// Time between two reports of counters: at first, and in the long run.
pub(crate) const COUNTERS: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];
/// Time between two reports of what was measured: at first, and in the long run.
const MEASURED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// The interval is this part of the process's age. So a kill loses no larger part of what was measured, and
/// the stream of a process that runs for days stays small.
const AGE: u32 = 20;

/// A thread that reports from time to time, and once more when this is dropped.
pub(crate) struct Reporter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reporter {
    /// Starts a thread that reports only the times of threads: for a side that does not run the VM.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn of_threads(events: EventWriter) -> io::Result<Self> {
        let mut threads = ThreadReport::new("standby");
        Self::start(move |last| {
            if let Some((span_us, threads)) = threads.due(last) {
                events.emit(Event::Measured(Measured { span_us, threads, ..Measured::default() }));
            }
        })
    }

    /// Starts a thread that calls `report` often enough, with `true` the last time.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(mut report: impl FnMut(bool) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = outlive_machine::spawn("stats", move || {
            while !stopped.load(Ordering::Acquire) {
                report(false);
                std::thread::park_timeout(COUNTERS[0]);
            }
            report(true);
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

/// When a report is due: the older the process, the rarer the reports.
pub(crate) struct Schedule {
    began: Instant,
    last: Instant,
    bounds: [Duration; 2],
}

impl Schedule {
    /// A schedule from now on, with the first and the longest interval.
    pub(crate) fn new(bounds: [Duration; 2]) -> Self {
        let now = Instant::now();
        Self { began: now, last: now, bounds }
    }

    /// The time since the last report, if the next one is due. The last one of all always is.
    pub(crate) fn due(&mut self, last: bool) -> Option<Duration> {
        self.due_at(Instant::now(), last)
    }

    fn due_at(&mut self, now: Instant, last: bool) -> Option<Duration> {
        let [least, most] = self.bounds;
        let interval = (now.saturating_duration_since(self.began) / AGE).clamp(least, most);
        let since = now.saturating_duration_since(self.last);
        if !last && since < interval {
            return None;
        }
        self.last = now;
        Some(since)
    }
}

/// What the scheduler gave the threads of this process.
pub(crate) struct ThreadReport {
    sampler: Sampler,
    schedule: Schedule,
}

impl ThreadReport {
    /// Samples from now on. `main` is the name of the main thread.
    pub(crate) fn new(main: &'static str) -> Self {
        Self { sampler: Sampler::new(main), schedule: Schedule::new(MEASURED) }
    }

    /// Microseconds since the last report, and the threads' times in them.
    pub(crate) fn due(&mut self, last: bool) -> Option<(u64, BTreeMap<String, ThreadTime>)> {
        let since = self.schedule.due(last)?;
        Some((since.as_micros() as u64, self.sampler.sample()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_become_seldom_with_age_and_the_last_comes_always() {
        let mut schedule = Schedule::new(MEASURED);
        let began = schedule.began;
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        assert_eq!(schedule.due_at(began, false), None);
        assert_eq!(schedule.due_at(at(1), false), Some(Duration::from_secs(1)));
        let times = (2..=86_400).filter(|&second| schedule.due_at(at(second), false).is_some()).count();
        assert!((1_400..1_600).contains(&times), "{times} reports in a day");
        assert!(schedule.due_at(at(86_401), true).is_some());
    }
}
