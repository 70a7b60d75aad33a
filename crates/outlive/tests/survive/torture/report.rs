//! The faults of the hosts and what became of the VM, by kind of fault; and the trace of a run.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::PathBuf;
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

/// The whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) seed: u64,
    pub(super) seconds: u64,
    pub(super) rounds: u64,
    pub(super) takeovers: u64,
    pub(super) operations: u64,
    pub(super) frames: u64,
    /// Single frames of committed epochs that a stopped host was about to send and sent when it continued.
    pub(super) late_frames: u64,
    pub(super) longest_wait_ms: u64,
    pub(super) kinds: BTreeMap<&'static str, Count>,
    #[serde(skip)]
    began: Instant,
    #[serde(skip)]
    trace: Vec<String>,
    #[serde(skip)]
    pub(super) folder: Option<PathBuf>,
    #[serde(skip)]
    json: Option<PathBuf>,
}

/// Lines of the trace that a failure shows.
const SHOWN: usize = 40;

impl Report {
    pub(super) fn new(seed: u64, json: Option<PathBuf>) -> Report {
        Report {
            seed,
            seconds: 0,
            rounds: 0,
            takeovers: 0,
            operations: 0,
            frames: 0,
            late_frames: 0,
            longest_wait_ms: 0,
            kinds: BTreeMap::new(),
            began: Instant::now(),
            trace: Vec::new(),
            folder: None,
            json,
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn kind(&mut self, kind: &'static str) -> &mut Count {
        self.kinds.entry(kind).or_default()
    }

    /// Puts a line into the trace.
    pub(super) fn tell(&mut self, what: impl fmt::Display) {
        self.trace.push(format!("{:9.3} {what}", self.elapsed().as_secs_f64()));
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:34}{:>10}{:>10}{:>6}{:>9}{:>15}",
            "kind", "injected", "survived", "lost", "doubled", "not protected"
        );
        for (kind, count) in &self.kinds {
            let Count { injected, survived, lost, doubled, unprotected } = count;
            let _ =
                writeln!(text, "{kind:34}{injected:>10}{survived:>10}{lost:>6}{doubled:>9}{unprotected:>15}");
        }
        let _ = write!(
            text,
            "{} rounds and {} takeovers in {} s, seed {}; {} answers judged, {} frames watched, {} late ones; \
             longest wait {} ms",
            self.rounds,
            self.takeovers,
            self.seconds,
            self.seed,
            self.operations,
            self.frames,
            self.late_frames,
            self.longest_wait_ms
        );
        text
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.seconds = self.elapsed().as_secs();
        if std::thread::panicking() {
            println!("the last that was done:");
            let from = self.trace.len().saturating_sub(SHOWN);
            self.trace[from..].iter().for_each(|line| println!("{line}"));
            if let Some(folder) = &self.folder {
                let trace = folder.join("trace");
                std::fs::write(&trace, self.trace.join("\n") + "\n").ok();
                println!("trace, logs and events were kept in {}", folder.display());
            }
        }
        println!("{}", self.table());
        if let Some(json) = &self.json {
            let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
            if let Err(error) = std::fs::write(json, text) {
                println!("cannot write {}: {error}", json.display());
            }
        }
    }
}
