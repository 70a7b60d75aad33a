//! `outlive history`: which moments of a VM can be had again.

use std::io::{self, Write};
use std::time::SystemTime;

use outlive_node::shown_in_line;
use outlive_record::{Found, OpenError, Record, Run};
use serde::Serialize;

use crate::cli::HistoryOptions;
use crate::{exit, logs, status};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HistoryError {
    /// There is no record.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Nobody reads it.
    #[error("cannot write to standard output: {0}")]
    Write(#[from] io::Error),
}

/// A part of the past without a gap.
#[derive(Debug, Serialize)]
struct Shown {
    run: u64,
    vm: String,
    id: String,
    generation: u64,
    first: u64,
    first_at: String,
    last: u64,
    last_at: String,
    memory_bytes: u64,
    disks: usize,
    bytes: u64,
    /// Why nothing follows; `null` while it is written, and after a loss of power.
    ended: Option<String>,
    /// The standby's copy was found not to be the VM: its checkpoints may be wrong.
    suspect: bool,
}

impl Shown {
    fn new(run: &Run) -> Option<Self> {
        let (first, last, hello) = (run.first()?, run.last()?, run.hello());
        let is_disk = |it: &&outlive_epoch::DeviceInfo| it.kind == outlive_epoch::DeviceKind::Disk;
        Some(Self {
            run: run.number(),
            vm: shown_in_line(&hello.name).into_owned(),
            id: hello.vm.to_string(),
            generation: first.generation,
            first: first.checkpoint,
            first_at: at(first),
            last: last.checkpoint,
            last_at: at(last),
            memory_bytes: hello.memory_bytes,
            disks: hello.devices.iter().filter(is_disk).count(),
            bytes: run.bytes(),
            ended: run.ended().map(|why| shown_in_line(why).into_owned()),
            suspect: run.is_suspect(),
        })
    }
}

fn at(found: Found) -> String {
    humantime::format_rfc3339_millis(found.time).to_string()
}

/// Carries the command out. Returns the exit code.
pub(crate) fn command(options: &HistoryOptions) -> u8 {
    history(options).unwrap_or_else(exit::usage)
}

fn history(options: &HistoryOptions) -> Result<u8, HistoryError> {
    let record = Record::open(&options.record)?;
    for (run, error) in record.unread() {
        logs::say(&shown_in_line(&format!("outlive: run {run} cannot be read: {error}")));
    }
    let code = if record.unread().is_empty() { exit::OK } else { exit::FAILED };
    let runs = record.runs().iter().filter_map(Shown::new);
    let mut out = outlive_node::printed();
    if options.json {
        let text = serde_json::to_string_pretty(&runs.collect::<Vec<_>>()).map_err(io::Error::from)?;
        writeln!(out, "{text}")?;
        return Ok(code);
    }
    let now = SystemTime::now();
    for (shown, run) in runs.zip(record.runs()) {
        write!(out, "{}", lines(&shown, run, now))?;
    }
    Ok(code)
}

/// A run for people.
fn lines(shown: &Shown, run: &Run, now: SystemTime) -> String {
    let Shown { vm, first, first_at, last, last_at, bytes, ended, .. } = shown;
    let ago = |found: Option<Found>| {
        let time = found.map_or(now, |found| found.time);
        status::span(now.duration_since(time).unwrap_or_default().as_millis() as u64 / 1000 * 1000)
    };
    let end = ended.as_ref().map_or_else(String::new, |why| format!("\n    then: {why}"));
    format!(
        "run {}: {vm}, {}\n    from {first_at} ({} ago), checkpoint {first}\n    to   {last_at} ({} ago), checkpoint {last}{end}\n",
        shown.run,
        size(*bytes),
        ago(run.first()),
        ago(run.last()),
    )
}

fn size(bytes: u64) -> String {
    if bytes < 10 << 30 { format!("{} MiB", bytes >> 20) } else { format!("{} GiB", bytes >> 30) }
}
