//! The event stream: what a running `outlive` says about itself, one JSON object a line.
//!
//! `outlive run --events FILE` and `outlive standby --events FILE` write it, `outlive demo`, tests and
//! monitors read it. Every line carries `"event"`, the sender's `pid` and `t_us`, the time on
//! `CLOCK_MONOTONIC` in microseconds, so the lines of all processes of one host can be put in order.
//!
//! Readers must skip fields and events that they do not know; [`Event::Unknown`] stands for the latter.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hdrhistogram::Histogram;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub use crate::disk::DangerKind;
use crate::lines::LineFile;
use crate::lossy::{LossyWriter, Sink};

/// Which of the two commands wrote a [`Event::Started`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `outlive run`: it boots the VM.
    Primary,
    /// `outlive standby`: it waits for a VM to protect.
    Standby,
}

/// One thing that happened. Times are microseconds unless the name says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The process is set up. A standby does not know the VM yet, so it leaves its parts out.
    Started {
        /// Which command this is.
        role: Role,
        /// Name of the VM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
        /// Number of virtual CPUs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vcpus: Option<u32>,
        /// Guest memory in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory: Option<u64>,
        /// Name of the dirty tracker's back end, for example `ring`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tracker: Option<String>,
    },
    /// An operator has accepted a danger, by an option.
    Accepted {
        /// Which danger, for example `stale_image`.
        danger: DangerKind,
        /// What it is about, for a person.
        about: String,
    },
    /// A standby accepts connections at `addr` (with the real port where port 0 was asked for).
    Listening {
        /// `HOST:PORT`.
        addr: String,
    },
    /// A primary has connected to a standby, and the standby has accepted it.
    StandbyAttached {
        /// The standby's `HOST:PORT`.
        addr: String,
    },
    /// How far the base checkpoint is.
    BaseProgress {
        /// Pre-copy round, from 1.
        round: u32,
        /// Pages sent in all rounds so far.
        sent_pages: u64,
        /// Pages of the first round: all that the VM has touched.
        total_pages: u64,
        /// Pages of all rounds so far, sent or not.
        #[serde(default)]
        planned_pages: u64,
    },
    /// The guest's kernel panicked; what follows is its own decision.
    GuestPanicked,
    /// The guest restarted. It stays protected.
    GuestRestarted {
        /// How it asked for the restart.
        how: String,
    },
    /// The standby has compared its copy with what a checkpoint says of the VM (`--self-check`).
    SelfCheck {
        /// The checkpoint.
        checkpoint: u64,
        /// How the copy differs; `null` when it is the same.
        difference: Option<String>,
    },
    /// How far the synchronisation of a disk is.
    DiskSync {
        /// The disk's position among the VM's disks.
        disk: u16,
        /// Bytes compared by their sums.
        done_bytes: u64,
        /// Bytes of the disk.
        total_bytes: u64,
        /// Bytes sent so far, of all disks.
        sent_bytes: u64,
    },
    /// The base checkpoint is committed: from here on the VM survives the loss of this host.
    Protected {
        /// The generation that runs the VM.
        generation: u64,
        /// Number of the committed base checkpoint.
        checkpoint: u64,
        /// How long the base took, in milliseconds.
        base_ms: u64,
    },
    /// Totals since this process became the active side; sent every 200 ms at first, every 2 s in the long
    /// run, and at the end.
    Stats(Stats),
    /// What was measured since the last event of this kind; sent every second at first, every minute in the
    /// long run, and at the end. A standby sends it too, about its threads.
    Measured(Measured),
    /// The peer is considered dead.
    LinkLost {
        /// Why, for a person.
        reason: String,
    },
    /// This side tries to win `generation`.
    Arbitrating {
        /// The generation asked for.
        generation: u64,
    },
    /// The arbiter cannot be asked at the moment; this side waits and asks again.
    ArbiterUnreachable {
        /// Why, for a person.
        why: String,
    },
    /// This side won `generation` and may run the VM.
    Won {
        /// The generation won.
        generation: u64,
    },
    /// The other side won `generation`: this one stops its VM and drops its held output.
    Lost {
        /// The generation lost.
        generation: u64,
        /// Who has it, as the arbiter says.
        owner: String,
    },
    /// The VM runs, but nothing would take over if this host died.
    Unprotected {
        /// Why, for a person.
        why: String,
    },
    /// A standby resumed the VM from the last committed checkpoint.
    Takeover {
        /// The generation that runs the VM from now on.
        generation: u64,
        /// The checkpoint it was resumed from.
        checkpoint: u64,
        /// From the last byte heard of the primary until the link was declared dead.
        detect_us: u64,
        /// From then until memory and disks were at the last committed checkpoint.
        #[serde(default)]
        settle_us: u64,
        /// From then until the generation was won.
        arbitrate_us: u64,
        /// From then until the vCPUs ran.
        restore_us: u64,
        /// From the declaration until the VM's first frame left, if that is known already.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first_packet_us: Option<u64>,
        /// Sum of the four times from detection to restore.
        total_us: u64,
    },
    /// The resumed VM sent its first frame.
    FirstPacket {
        /// Time since the link was declared dead.
        after_us: u64,
    },
    /// Events are missing here: the stream could not be written, or its reader did not read.
    EventsLost {
        /// How many.
        count: u64,
    },
    /// Last line of a process that ends in order.
    Ended {
        /// Why, for a person.
        reason: String,
        /// The exit code.
        code: i32,
    },
    /// An event of a newer version.
    #[serde(other)]
    Unknown,
}

/// The counters of [`Event::Stats`], all since the process became the active side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The generation that runs the VM.
    pub generation: u64,
    /// Checkpoints committed.
    pub checkpoints: u64,
    /// Checkpoints per second lately.
    pub rate_hz: f64,
    /// Bytes sent to the standby.
    pub bytes: u64,
    /// Frames that wait for their checkpoint's commit right now.
    pub held_frames: u64,
    /// How the pages of checkpoints were written down.
    #[serde(default)]
    pub pages: PageCounts,
}

/// How the pages of checkpoints were written down for the standby. All together are the pages that were
/// captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Whole.
    pub raw: u64,
    /// As zeroes.
    pub zero: u64,
    /// As the granules that have changed.
    pub granules: u64,
    /// Bytes of those granules, with their masks.
    pub granule_bytes: u64,
    /// Not at all, because nothing has changed.
    pub unchanged: u64,
}

impl PageCounts {
    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.raw += other.raw;
        self.zero += other.zero;
        self.granules += other.granules;
        self.granule_bytes += other.granule_bytes;
        self.unchanged += other.unchanged;
    }
}

/// What [`Event::Measured`] says. Everything covers the time since the last such event, so readers can add it
/// up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Microseconds since the last such event.
    pub span_us: u64,
    /// The phases of checkpoints by name, in *nanoseconds*, as `[value, count]` pairs ([`pairs`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases: BTreeMap<String, Vec<(u64, u64)>>,
    /// Dirty pages of a checkpoint, as `[value, count]` pairs ([`pairs`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dirty_pages: Vec<(u64, u64)>,
    /// What the kernel's scheduler gave the threads of the process, by name: at most 64 of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub threads: BTreeMap<String, ThreadTime>,
}

/// The time of one thread, or of several of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadTime {
    /// Microseconds on a core.
    pub run_us: u64,
    /// Microseconds in which it wanted to run and waited for a core.
    pub wait_us: u64,
    /// How often it got a core.
    pub switches: u64,
}

/// One line of the stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// When: `CLOCK_MONOTONIC` in microseconds.
    pub t_us: u64,
    /// Who says so.
    pub pid: u32,
}

/// `CLOCK_MONOTONIC` in microseconds, the clock of [`Record::t_us`].
pub fn now_us() -> u64 {
    // The call can only fail for a clock that does not exist.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1_000
}

/// Largest value that [`histogram`] tells apart; a larger one counts as this.
pub const HISTOGRAM_MAX: u64 = 1 << 30;

/// A histogram as the stream uses it: values to [`HISTOGRAM_MAX`] within 1 %. It never grows, so
/// `saturating_record` does not allocate and may be called while the VM is paused.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, HISTOGRAM_MAX, 2).expect("constant bounds are valid")
}

/// The non-empty buckets of a histogram, as the stream carries them.
pub fn pairs(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
}

/// Adds what [`pairs`] gave to another histogram.
pub fn add_pairs(histogram: &mut Histogram<u64>, pairs: &[(u64, u64)]) {
    for &(value, count) in pairs {
        histogram.saturating_record_n(value, count);
    }
}

/// How many events may wait for the stream's reader. The largest, [`Event::Stats`], come five times a second.
const WAITING: usize = 256;
/// How long an ending process waits for its last events to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Writes the event stream; cheap to clone, may be used by any thread, and never waits. A separate thread
/// makes the lines and hands each to the kernel in one `write`, so the lines of several processes that append
/// to one file do not mix. A reader that does not read, a full disk and a closed pipe cost events, and
/// [`Event::EventsLost`] says how many as soon as something can be written again; they never cost the VM
/// anything.
#[derive(Clone, Default)]
pub struct EventWriter {
    shared: Arc<Shared>,
}

/// Sees every event on the thread that emits it.
type Observer = Box<dyn Fn(&Event) + Send + Sync>;

#[derive(Default)]
struct Shared {
    stream: Option<LossyWriter<(u64, Event)>>,
    observer: OnceLock<Observer>,
}

/// Opens the event stream of an option.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn open(path: Option<&Path>) -> Result<EventWriter, String> {
    let Some(path) = path else { return Ok(EventWriter::disabled()) };
    EventWriter::open(path)
        .map_err(|e| format!("cannot write events to {}: {e}; give --events another file", path.display()))
}

impl EventWriter {
    /// A writer that throws everything away.
    pub fn disabled() -> Self {
        Self::default()
    }

    /// Opens what `--events` names: `-` is standard output, everything else a file to append to.
    ///
    /// # Errors
    ///
    /// The file cannot be created or opened, or standard output is closed.
    pub fn open(target: &Path) -> io::Result<Self> {
        let file = if target.as_os_str() == "-" {
            File::from(io::stdout().as_fd().try_clone_to_owned()?)
        } else {
            OpenOptions::new().create(true).append(true).open(target)?
        };
        let stream =
            LossyWriter::start("events", WAITING, Stream { file: LineFile::new(file), failed: false })?;
        Ok(Self { shared: Arc::new(Shared { stream: Some(stream), observer: OnceLock::new() }) })
    }

    /// Also passes every event from now on to an observer in this process, on the thread that emits it, so
    /// the observer must not wait. The first observer stays.
    pub(crate) fn observe(&self, observer: impl Fn(&Event) + Send + Sync + 'static) {
        self.shared.observer.set(Box::new(observer)).ok();
    }

    /// Writes one event, stamped with this moment and this process.
    pub fn emit(&self, event: Event) {
        self.emit_at(now_us(), event);
    }

    /// Writes one event that happened at `t_us` (see [`now_us`]).
    pub fn emit_at(&self, t_us: u64, event: Event) {
        if let Some(observer) = self.shared.observer.get() {
            observer(&event);
        }
        if let Some(stream) = &self.shared.stream {
            stream.push((t_us, event));
        }
    }

    /// Waits for the last events to be written, but not for long. Returns whether they are.
    pub fn finish(&self) -> bool {
        self.shared.stream.as_ref().is_none_or(|stream| stream.flush(LAST_WORDS))
    }
}

/// The stream as its thread writes it.
struct Stream {
    file: LineFile,
    /// Whether the last line could not be written, and the log has said so.
    failed: bool,
}

impl Stream {
    fn put(&mut self, t_us: u64, event: Event) -> io::Result<()> {
        let record = Record { event, t_us, pid: std::process::id() };
        // Numbers, strings and lists only: this cannot fail.
        let mut line = serde_json::to_vec(&record).expect("an event is plain data");
        line.push(b'\n');
        let result = self.file.write(&line);
        if let Err(error) = &result
            && !self.failed
        {
            tracing::warn!(%error, "cannot write the event stream; events are lost until it can be written \
            again");
        }
        self.failed = result.is_err();
        result
    }
}

impl Sink for Stream {
    type Line = (u64, Event);

    fn write(&mut self, (t_us, event): Self::Line) -> io::Result<()> {
        self.put(t_us, event)
    }

    fn write_lost(&mut self, count: u64) -> io::Result<()> {
        self.put(now_us(), Event::EventsLost { count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_event() -> Vec<Event> {
        vec![
            Event::Started {
                role: Role::Primary,
                vm: Some("demo".into()),
                vcpus: Some(2),
                memory: Some(1 << 28),
                tracker: Some("ring".into()),
            },
            Event::Started { role: Role::Standby, vm: None, vcpus: None, memory: None, tracker: None },
            Event::Listening { addr: "127.0.0.1:7000".into() },
            Event::StandbyAttached { addr: "127.0.0.1:7000".into() },
            Event::BaseProgress { round: 1, sent_pages: 10, total_pages: 65536, planned_pages: 65600 },
            Event::GuestPanicked,
            Event::GuestRestarted { how: "a triple fault".into() },
            Event::DiskSync { disk: 1, done_bytes: 1 << 20, total_bytes: 1 << 30, sent_bytes: 65536 },
            Event::SelfCheck { checkpoint: 100, difference: None },
            Event::Protected { generation: 1, checkpoint: 3, base_ms: 120 },
            Event::Stats(Stats { rate_hz: 812.5, ..Stats::default() }),
            Event::Measured(Measured {
                span_us: 1,
                phases: [("copy".to_owned(), vec![(100, 3), (200, 1)])].into(),
                threads: [("vcpu0".to_owned(), ThreadTime { run_us: 1, wait_us: 2, switches: 3 })].into(),
                ..Measured::default()
            }),
            Event::LinkLost { reason: "nothing heard for 500 ms".into() },
            Event::Arbitrating { generation: 2 },
            Event::ArbiterUnreachable { why: "no such directory".into() },
            Event::Won { generation: 2 },
            Event::Lost { generation: 2, owner: "b".into() },
            Event::Unprotected { why: "no standby".into() },
            Event::Takeover {
                generation: 2,
                checkpoint: 99,
                detect_us: 500_000,
                settle_us: 1_000,
                arbitrate_us: 200,
                restore_us: 3_000,
                first_packet_us: None,
                total_us: 504_200,
            },
            Event::FirstPacket { after_us: 4_000 },
            Event::EventsLost { count: 12 },
            Event::Ended { reason: "guest powered off".into(), code: 0 },
        ]
    }

    #[test]
    fn every_event_survives_the_way_through_a_file() {
        let path = std::env::temp_dir().join(format!("outlive-events-{}", std::process::id()));
        let writer = EventWriter::open(&path).unwrap();
        let before = now_us();
        for event in every_event() {
            writer.emit(event);
        }
        assert!(writer.finish());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let records: Vec<Record> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(records.iter().map(|r| r.event.clone()).collect::<Vec<_>>(), every_event());
        assert!(records.iter().all(|r| r.t_us >= before && r.pid == std::process::id()));
    }

    #[test]
    fn a_reader_that_stops_costs_events_and_is_told_how_many() {
        use std::io::Read;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stopped");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        // For both directions, so that nobody waits for the other end.
        let mut reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        let writer = EventWriter::open(&path).unwrap();
        let emitted = 20_000;
        let began = std::time::Instant::now();
        for generation in 0..emitted {
            writer.emit(Event::Won { generation });
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(!writer.finish(), "a reader that does not read is not waited for");
        // The reader reads again.
        let copy = writer.clone();
        let flushed = std::thread::spawn(move || while !copy.finish() {});
        let (mut text, mut part) = (Vec::new(), vec![0; 4096]);
        let (mut next, mut lost) = (0, 0);
        while next < emitted {
            let count = reader.read(&mut part).unwrap();
            text.extend_from_slice(&part[..count]);
            while let Some(end) = text.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                match serde_json::from_slice::<Record>(&line).unwrap().event {
                    Event::Won { generation } => {
                        assert_eq!(generation, next, "in order, and no gap that nobody told of");
                        next += 1;
                    }
                    Event::EventsLost { count } => (next, lost) = (next + count, lost + count),
                    other => panic!("{other:?}"),
                }
            }
        }
        flushed.join().unwrap();
        assert_eq!(next, emitted);
        assert!(lost > emitted / 2, "{lost} were lost");
    }

    #[test]
    fn the_line_looks_as_documented() {
        let record = Record { event: Event::Won { generation: 2 }, t_us: 5, pid: 7 };
        assert_eq!(
            serde_json::to_string(&record).unwrap(),
            r#"{"event":"won","generation":2,"t_us":5,"pid":7}"#
        );
    }

    #[test]
    fn newer_fields_and_events_are_skipped() {
        let line = r#"{"t_us":5,"event":"won","pid":7,"generation":2,"colour":"red"}"#;
        assert_eq!(serde_json::from_str::<Record>(line).unwrap().event, Event::Won { generation: 2 });
        let line = r#"{"event":"moon_landing","where":[1,2],"t_us":5,"pid":7}"#;
        assert_eq!(serde_json::from_str::<Record>(line).unwrap().event, Event::Unknown);
    }

    #[test]
    fn histograms_survive_as_pairs_and_add_up() {
        let (mut one, mut two, mut all) = (histogram(), histogram(), histogram());
        for value in 0..2_000 {
            if value % 3 == 0 { &mut one } else { &mut two }.saturating_record(value);
            all.saturating_record(value);
        }
        two.saturating_record(u64::MAX);
        all.saturating_record(u64::MAX);
        let mut merged = histogram();
        add_pairs(&mut merged, &pairs(&one));
        add_pairs(&mut merged, &pairs(&two));
        assert_eq!(merged.len(), 2_001);
        for quantile in [0.0, 0.5, 0.99, 1.0] {
            assert_eq!(merged.value_at_quantile(quantile), all.value_at_quantile(quantile));
        }
    }

    #[test]
    fn processes_never_mix_their_lines() {
        let path = std::env::temp_dir().join(format!("outlive-events-mixed-{}", std::process::id()));
        // Each opens the file itself, as a process would.
        let writers: Vec<EventWriter> = (0..4).map(|_| EventWriter::open(&path).unwrap()).collect();
        for generation in 0..200 {
            writers.iter().for_each(|writer| writer.emit(Event::Won { generation }));
        }
        assert!(writers.iter().all(EventWriter::finish));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().filter(|l| serde_json::from_str::<Record>(l).is_ok()).count(), 800);
    }
}
