//! Reads the event streams of the processes while they are written, and adds their statistics up.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use hdrhistogram::Histogram;

use crate::events::{Event, Measured, PageCounts, Record, Stats, ThreadTime, add_pairs, histogram};
use crate::phases::{Phase, histogram_ns};

/// Follows one process' event file.
#[derive(Debug)]
pub(super) struct Tail {
    file: File,
    /// The start of a line whose end is not written yet (or never will be, because its writer was killed).
    rest: Vec<u8>,
}

impl Tail {
    /// Makes the file, so that it exists before its writer does.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        Ok(Self { file, rest: Vec::new() })
    }

    /// The events that were added since the last call. A line that is no event is an error: the processes are
    /// our own.
    pub(super) fn poll(&mut self) -> io::Result<Vec<Record>> {
        self.file.read_to_end(&mut self.rest)?;
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else { return Ok(Vec::new()) };
        let lines: Vec<u8> = self.rest.drain(..=end).collect();
        lines
            .split(|&byte| byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).map_err(io::Error::from))
            .collect()
    }
}

/// What one process reported about the time during which it ran the VM.
#[derive(Debug, Default)]
pub(super) struct Tenure {
    latest: Stats,
    measured: Sums,
    /// How long the VM was protected, in spans that are over.
    protected_us: u64,
    protected_since: Option<u64>,
    latest_t_us: u64,
}

impl Tenure {
    /// Takes note of one event of the process.
    pub(super) fn note(&mut self, record: &Record) {
        match &record.event {
            Event::Stats(stats) => {
                self.latest = stats.clone();
                self.latest_t_us = record.t_us;
            }
            Event::Measured(measured) => self.measured.add(measured),
            // From here on this process runs the VM. What its threads did before belongs to a standby.
            Event::Takeover { .. } => {
                let measured =
                    Sums { threads: std::mem::take(&mut self.measured.threads), ..Sums::default() };
                *self = Self { measured, ..Self::default() };
            }
            Event::Protected { .. } => self.protected_since = Some(record.t_us),
            Event::LinkLost { .. } | Event::Unprotected { .. } => self.protection_ended(record.t_us),
            _ => {}
        }
    }

    /// Its latest statistics.
    pub(super) fn latest(&self) -> &Stats {
        &self.latest
    }

    fn protection_ended(&mut self, t_us: u64) {
        if let Some(since) = self.protected_since.take() {
            self.protected_us += t_us.saturating_sub(since);
        }
    }

    /// Protected time up to the latest statistics, so that it matches the number of checkpoints.
    fn counted_us(&self) -> u64 {
        let current = self.protected_since.map_or(0, |since| self.latest_t_us.saturating_sub(since));
        self.protected_us + current
    }
}

/// What was measured, added up.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    /// By [`Phase`], in nanoseconds.
    phases: Vec<Histogram<u64>>,
    /// Dirty pages of all checkpoints.
    pub(super) dirty_pages: Histogram<u64>,
    /// By name.
    pub(super) threads: BTreeMap<String, ThreadTime>,
}

impl Default for Sums {
    fn default() -> Self {
        let phases = Phase::ALL.iter().map(|_| histogram_ns()).collect();
        Self { phases, dirty_pages: histogram(), threads: BTreeMap::new() }
    }
}

impl Sums {
    /// How long a phase took, in nanoseconds.
    pub(super) fn phase(&self, phase: Phase) -> &Histogram<u64> {
        &self.phases[phase as usize]
    }

    /// Adds what one event says.
    pub(super) fn add(&mut self, measured: &Measured) {
        for phase in Phase::ALL {
            if let Some(pairs) = measured.phases.get(phase.name()) {
                add_pairs(&mut self.phases[phase as usize], pairs);
            }
        }
        add_pairs(&mut self.dirty_pages, &measured.dirty_pages);
        self.add_threads(&measured.threads);
    }

    fn add_threads(&mut self, threads: &BTreeMap<String, ThreadTime>) {
        for (name, time) in threads {
            let sum = self.threads.entry(name.clone()).or_default();
            sum.run_us += time.run_us;
            sum.wait_us += time.wait_us;
            sum.switches += time.switches;
        }
    }

    fn merge(&mut self, other: &Self) {
        for (sum, phase) in self.phases.iter_mut().zip(&other.phases) {
            sum.add(phase).expect("of the same bounds");
        }
        self.dirty_pages.add(&other.dirty_pages).expect("of the same bounds");
        self.add_threads(&other.threads);
    }
}

/// The checkpoints of all processes that ran the VM, taken together.
#[derive(Clone, Debug)]
pub(super) struct Totals {
    /// Checkpoints committed.
    pub(super) checkpoints: u64,
    /// Checkpoints per second of protected time.
    pub(super) rate_hz: f64,
    /// Bytes sent to standbys.
    pub(super) bytes: u64,
    /// How the pages were written down.
    pub(super) pages: PageCounts,
    /// What was measured of them.
    pub(super) measured: Sums,
}

impl Totals {
    pub(super) fn of<'a>(tenures: impl IntoIterator<Item = &'a Tenure>) -> Self {
        let (pages, measured) = (PageCounts::default(), Sums::default());
        let mut totals = Self { checkpoints: 0, rate_hz: 0.0, bytes: 0, pages, measured };
        let mut protected_us = 0;
        for tenure in tenures {
            totals.checkpoints += tenure.latest.checkpoints;
            totals.bytes += tenure.latest.bytes;
            totals.pages.add(&tenure.latest.pages);
            protected_us += tenure.counted_us();
            totals.measured.merge(&tenure.measured);
        }
        if protected_us > 0 {
            totals.rate_hz = totals.checkpoints as f64 * 1e6 / protected_us as f64;
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn at(t_us: u64, event: Event) -> Record {
        Record::of(event, t_us, 1)
    }

    #[test]
    fn a_tail_waits_for_the_end_of_a_line() {
        let path = std::env::temp_dir().join(format!("outlive-tail-{}", std::process::id()));
        let mut tail = Tail::create(&path).unwrap();
        let mut writer = File::options().append(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(tail.poll().unwrap().is_empty());
        let line = serde_json::to_string(&at(5, Event::Won { generation: 2 })).unwrap();
        let (start, end) = line.split_at(9);
        writer.write_all(format!("{line}\n{line}\n{start}").as_bytes()).unwrap();
        assert_eq!(tail.poll().unwrap().len(), 2);
        assert!(tail.poll().unwrap().is_empty());
        writer.write_all(format!("{end}\n").as_bytes()).unwrap();
        assert_eq!(tail.poll().unwrap(), [at(5, Event::Won { generation: 2 })]);
        writer.write_all(b"no event\n").unwrap();
        tail.poll().unwrap_err();
    }

    #[test]
    fn tenures_add_up() {
        let counts = |raw| PageCounts { raw, ..PageCounts::default() };
        let stats = |checkpoints| {
            let (bytes, pages) = (checkpoints * 1000, counts(checkpoints * 7));
            Event::Stats(Stats { checkpoints, bytes, pages, ..Stats::default() })
        };
        let measured = |checkpoints, pause_us: u64| {
            Event::Measured(Measured {
                phases: [("pause".to_owned(), vec![(pause_us * 1000, checkpoints)])].into(),
                dirty_pages: vec![(10, checkpoints)],
                threads: [("vcpu0".to_owned(), ThreadTime { run_us: 1, wait_us: 2, switches: 3 })].into(),
                ..Measured::default()
            })
        };
        let protected = || Event::Protected {
            generation: 1,
            checkpoint: 1,
            base_ms: 9,
            rounds: 2,
            held_ms: 0,
            longest_stop_us: 0,
        };
        let mut first = Tenure::default();
        // New totals replace the previous ones, measurements are added. The time after the last totals
        // (killed here) is not counted.
        for record in [
            at(0, protected()),
            at(500_000, stats(500)),
            at(500_000, measured(500, 100)),
            at(1_000_000, stats(900)),
            at(1_000_000, measured(400, 100)),
        ] {
            first.note(&record);
        }
        let takeover = Event::Takeover {
            generation: 2,
            checkpoint: 900,
            detect_us: 1,
            settle_us: 1,
            arbitrate_us: 1,
            restore_us: 1,
            first_packet_us: None,
            total_us: 4,
            input_given: 0,
            output_repeated: 0,
        };
        let mut second = Tenure::default();
        for record in [
            at(500_000, protected()),
            at(600_000, measured(50, 100)),
            at(1_050_000, Event::LinkLost { reason: "reset".into() }),
            at(1_100_000, takeover),
            at(2_000_000, protected()),
            at(2_500_000, Event::Unprotected { why: "standby gone".into() }),
            at(9_000_000, protected()),
            at(9_500_000, stats(100)),
            at(9_500_000, measured(100, 2_000)),
        ] {
            second.note(&record);
        }
        let totals = Totals::of([&first, &second]);
        assert_eq!((totals.checkpoints, totals.rate_hz), (1_000, 500.0));
        assert_eq!((totals.bytes, totals.pages), (1_000_000, counts(7_000)));
        let pause = totals.measured.phase(Phase::Pause);
        assert_eq!((pause.len(), totals.measured.dirty_pages.len()), (1_000, 1_000));
        let near = |quantile, value: u64| pause.value_at_quantile(quantile).abs_diff(value) <= value / 50;
        assert!(near(0.5, 100_000) && near(0.99, 2_000_000));
        let of_all = ThreadTime { run_us: 4, wait_us: 8, switches: 12 };
        assert_eq!(totals.measured.threads["vcpu0"], of_all, "the standby's threads count too");
        assert_eq!(Totals::of([&Tenure::default()]).rate_hz, 0.0);
    }
}
