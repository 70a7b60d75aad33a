//! The faults of the hosts and what became of the VM, by kind of fault; and the trace of a run.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// What became of the VM after faults of one kind.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Count {
    pub(super) injected: u64,
    /// All clients were served again, and their answers were true.
    pub(super) survived: u64,
    /// The VM, or an acknowledged write, is gone.
    pub(super) lost: u64,
    /// Two hosts ran the VM, or a command was carried out twice.
    pub(super) doubled: u64,
    /// The VM was unprotected at the time, and ended.
    pub(super) unprotected: u64,
}

/// The whole run, over all pairs of hosts.
#[derive(Debug, Default, Serialize)]
pub(super) struct Totals {
    pub(super) seed: u64,
    pub(super) pairs: u64,
    pub(super) seconds: u64,
    pub(super) rounds: u64,
    pub(super) takeovers: u64,
    pub(super) operations: u64,
    pub(super) frames: u64,
    /// Single frames of committed epochs that a stopped host was about to send and sent when it continued.
    pub(super) late_frames: u64,
    /// Blocks that were compared with the images of both hosts.
    pub(super) blocks: u64,
    pub(super) longest_wait_ms: u64,
    /// What could not be right, if anything.
    pub(super) failure: Option<String>,
    pub(super) kinds: BTreeMap<&'static str, Count>,
}

/// What all pairs of hosts report to.
pub(super) struct Report {
    totals: Mutex<Totals>,
    began: Instant,
    json: Option<PathBuf>,
    /// When the file was last written.
    written: Mutex<Instant>,
}

/// Lines of the trace that a failure shows.
const SHOWN: usize = 40;
/// So often the file is written: a run that is killed leaves what it found.
const WRITE: Duration = Duration::from_secs(10);

impl Report {
    pub(super) fn new(seed: u64, pairs: u64, json: Option<PathBuf>) -> Report {
        let totals = Mutex::new(Totals { seed, pairs, ..Totals::default() });
        Report { totals, began: Instant::now(), json, written: Mutex::new(Instant::now()) }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the counts of a kind of fault.
    pub(super) fn count(&self, kind: &'static str, change: impl FnOnce(&mut Count)) {
        change(self.totals().kinds.entry(kind).or_default());
    }

    /// Writes the file now and then.
    pub(super) fn write_sometimes(&self) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.elapsed() > WRITE {
            *written = Instant::now();
            self.write();
        }
    }

    /// Writes the file, if one is wanted.
    pub(super) fn write(&self) {
        let mut totals = self.totals();
        totals.seconds = self.elapsed().as_secs();
        let Some(json) = &self.json else { return };
        let text = serde_json::to_string_pretty(&*totals).unwrap_or_default() + "\n";
        if let Err(error) = std::fs::write(json, text) {
            println!("cannot write {}: {error}", json.display());
        }
    }

    pub(super) fn table(&self) -> String {
        let totals = self.totals();
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:38}{:>10}{:>10}{:>6}{:>9}{:>15}",
            "kind", "injected", "survived", "lost", "doubled", "not protected"
        );
        for (kind, count) in &totals.kinds {
            let Count { injected, survived, lost, doubled, unprotected } = count;
            let _ =
                writeln!(text, "{kind:38}{injected:>10}{survived:>10}{lost:>6}{doubled:>9}{unprotected:>15}");
        }
        let _ = write!(
            text,
            "{} rounds and {} takeovers in {} s on {} pairs of hosts, seed {}; {} answers judged, {} frames \
             watched, {} late ones; {} blocks compared with the images; longest wait {} ms",
            totals.rounds,
            totals.takeovers,
            totals.seconds,
            totals.pairs,
            totals.seed,
            totals.operations,
            totals.frames,
            totals.late_frames,
            totals.blocks,
            totals.longest_wait_ms
        );
        text
    }
}

/// What one pair of hosts has done.
pub(super) struct Trace {
    pub(super) report: Arc<Report>,
    /// Repeats the pair's choices.
    seed: u64,
    lines: Vec<String>,
    pub(super) folder: Option<PathBuf>,
}

impl Trace {
    pub(super) fn new(report: Arc<Report>, seed: u64) -> Trace {
        Trace { report, seed, lines: Vec::new(), folder: None }
    }

    /// Puts a line into the trace.
    pub(super) fn tell(&mut self, what: impl fmt::Display) {
        self.lines.push(format!("{:9.3} {what}", self.report.elapsed().as_secs_f64()));
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        println!("seed {}: the last that was done:", self.seed);
        let from = self.lines.len().saturating_sub(SHOWN);
        self.lines[from..].iter().for_each(|line| println!("{line}"));
        let last = self.lines.last().cloned().unwrap_or_default();
        self.report.totals().failure.get_or_insert(format!("seed {}: {last}", self.seed));
        if let Some(folder) = &self.folder {
            std::fs::write(folder.join("trace"), self.lines.join("\n") + "\n").ok();
            println!("trace, logs and events were kept in {}", folder.display());
        }
    }
}
