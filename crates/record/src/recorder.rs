//! The recorder: who may record where, and what is known of it.
//!
//! ```text
//! applier ──copy of a checkpoint──► queue ──► thread "recorder" ──► segments
//!                                             thread "record-base": memory, images ──► base; forgets what is old
//! ```
//!
//! The applier copies a checkpoint into memory, and goes on. If the queue is full, or writing has failed, the run ends at the
//! last checkpoint that was queued (a *gap*), and another run begins after a while.
//!
//! **No lock is held over input and output** that the applier, or whoever asks for the report, takes: a record's disk may
//! hang for ever. For the same reason the queue has no reference to the VM's memory or images ([`Source`](crate::Source)).

mod base;
mod session;
mod writing;

pub use session::Session;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use outlive_epoch::Hello;

use crate::forget::{Forgetting, Keep};
use crate::places::RunPlaces;
use session::{Job, Pool, RunState};

/// Starts a thread with this name.
pub type Spawn = fn(&str, Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;

/// What the recorder has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// A run has begun. Its base is being copied.
    Began {
        /// Its number.
        run: u64,
    },
    /// The base is whole: the VM can be had from this checkpoint on.
    Whole {
        /// The run's number.
        run: u64,
        /// The checkpoint.
        from: u64,
    },
    /// A run has ended although the VM goes on: what follows is not recorded until the next run begins.
    Gap {
        /// The run's number; 0 if it had not begun.
        run: u64,
        /// Why.
        why: String,
    },
    /// Something that an operator should know. It is told again and again while it lasts.
    Note(String),
}

/// What is known of a recorder now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The run that is being written; `None` without a VM, and in a gap.
    pub run: Option<u64>,
    /// The first checkpoint that can be had of it, and when it was committed; `None` before its base is whole.
    pub from: Option<(u64, SystemTime)>,
    /// The last checkpoint that is in the log, and when it was committed.
    pub last: Option<(u64, SystemTime)>,
    /// Bytes that the whole record takes in its file system, as of the last look.
    pub bytes: u64,
    /// Gaps since the start.
    pub gaps: u64,
    /// Why there is no run although there is a VM, or what else an operator should know.
    pub why: Option<String>,
}

/// What is recorded, and where.
pub struct Config {
    /// The directory; it is made if it is not there.
    pub directory: PathBuf,
    /// How much is kept.
    pub keep: Keep,
    /// Starts threads.
    pub spawn: Spawn,
    /// Is told what happens, on any thread. It must not wait.
    pub tell: Arc<dyn Fn(Told) + Send + Sync>,
}

/// How a log is cut into segments, and how often it is looked after.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most bytes of a segment, and the longest time that it is about. A segment is what is forgotten at once, and what is
    /// read to find a checkpoint.
    pub(crate) segment_bytes: u64,
    pub(crate) segment_time: Duration,
    /// What was written is durable after this time at the latest.
    pub(crate) sync: Duration,
    /// Time between two looks at what need not be kept any more.
    pub(crate) forget: Duration,
    /// How long after a gap the next run begins at the earliest. It doubles with each run that has no base at its end, up
    /// to `longest_rest`: a base costs much, and a recorder that can never keep up would do nothing but copy.
    pub(crate) rest: Duration,
    pub(crate) longest_rest: Duration,
}

impl Limits {
    /// Some hundred segments, whatever is kept: they are looked through all the time.
    fn of(keep: Keep) -> Self {
        let (segment_bytes, segment_time) = match keep {
            Keep::Time(time) => {
                (64 << 20, (time / 200).clamp(Duration::from_secs(5), Duration::from_secs(600)))
            }
            Keep::Bytes(bytes) => ((bytes / 64).clamp(1 << 20, 256 << 20), Duration::from_secs(60)),
        };
        Self {
            segment_bytes,
            segment_time,
            sync: Duration::from_secs(1),
            forget: Duration::from_secs(1),
            rest: Duration::from_secs(5),
            longest_rest: Duration::from_secs(600),
        }
    }
}

/// How long [`Recorder::close`] waits. What hangs for longer is left behind.
const PATIENCE: Duration = Duration::from_secs(3);

/// A directory in which this process records; see the module.
pub struct Recorder {
    jobs: Sender<Job>,
    pub(crate) shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the threads of a recorder share.
pub(crate) struct Shared {
    config: Config,
    limits: Limits,
    report: Mutex<Report>,
    /// Memory of checkpoints that are written.
    pub(crate) pool: Pool,
    /// Whoever looks after old runs has it. It is held over input and output, so it is only ever tried.
    forgetting: Mutex<Forgetting>,
    /// Nobody else records here.
    claimed: Mutex<Option<File>>,
}

impl Shared {
    /// For a few instructions only; see the module.
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the report if it is about this run.
    fn of_run(&self, run: &RunState, change: impl FnOnce(&mut Report)) {
        let mut report = self.report();
        if report.run.is_some_and(|number| number == run.number.load(Ordering::Relaxed)) {
            change(&mut report);
        }
    }

    /// A run has ended although the VM goes on. Told once.
    fn gap(&self, run: &RunState, why: &str) {
        if run.told.swap(true, Ordering::Relaxed) {
            return;
        }
        let number = run.number.load(Ordering::Relaxed);
        {
            let mut report = self.report();
            report.gaps += 1;
            if report.run.is_none_or(|other| other == number) {
                (report.run, report.from, report.last) = (None, None, None);
                report.why = Some(why.to_owned());
            }
        }
        (self.config.tell)(Told::Gap { run: number, why: why.to_owned() });
    }

    /// An operator should know this.
    fn note(&self, note: Option<String>) {
        let Some(note) = note else { return };
        self.report().why = Some(note.clone());
        (self.config.tell)(Told::Note(note));
    }

    /// Looks how large the record is.
    fn measure(&self) {
        let bytes = allocated(&self.config.directory);
        self.report().bytes = bytes;
    }
}

impl Recorder {
    /// Starts the recorder. It claims the directory as soon as that is possible, which [`check`](crate::check) foresees, and
    /// removes what earlier processes have left half made there.
    ///
    /// # Errors
    /// There is no thread.
    pub fn open(config: Config) -> io::Result<Self> {
        let limits = Limits::of(config.keep);
        Self::with_limits(config, limits)
    }

    pub(crate) fn with_limits(config: Config, limits: Limits) -> io::Result<Self> {
        let (spawn, keep) = (config.spawn, config.keep);
        let shared = Arc::new(Shared {
            config,
            limits,
            report: Mutex::default(),
            pool: Pool::default(),
            forgetting: Mutex::new(Forgetting::new(keep)),
            claimed: Mutex::default(),
        });
        let (jobs, inbox) = channel();
        let writing = writing::Writing::new(shared.clone());
        let thread = spawn("recorder", Box::new(move || writing.serve(&inbox)))?;
        Ok(Self { jobs, shared, thread: Mutex::new(Some(thread)) })
    }

    /// Records a VM, from its next checkpoint on.
    pub fn session(&self, hello: &Hello) -> Session {
        Session::new(self.jobs.clone(), self.shared.clone(), hello.clone())
    }

    /// Where it records.
    pub fn directory(&self) -> &Path {
        &self.shared.config.directory
    }

    /// What is known now.
    pub fn report(&self) -> Report {
        self.shared.report().clone()
    }

    /// Writes what is queued, and ends the recorder; but waits for no more than three seconds.
    pub fn close(&self) {
        self.jobs.send(Job::Close).ok();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            ends_within(&thread, PATIENCE);
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits for the end of a thread, but for no longer than `patience`. Returns whether it has come.
fn ends_within(thread: &JoinHandle<()>, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while !thread.is_finished() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Bytes that a record takes; what cannot be seen is left out.
fn allocated(record: &Path) -> u64 {
    let runs = RunPlaces::all(record).unwrap_or_default();
    runs.iter().filter_map(|run| run.allocated().ok()).sum()
}
