//! The applier's side of the recorder: it waits for nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use outlive_epoch::{Checkpoint, Hello, StateBuf, StateKind};

use super::{Limits, Shared};
use crate::frame::{Frame, micros};
use crate::run::SUSPECT;
use crate::source::Source;

/// How many bytes of checkpoints may wait to be written.
pub(crate) const QUEUE_BYTES: usize = 64 << 20;
/// Why a run ends whose queue is full.
const TOO_FAST: &str = "checkpoints come faster than they can be written";
/// How many empty frames are kept.
const SPARE_FRAMES: usize = 32;

/// What the recorder's thread is to do, in order.
pub(super) enum Job {
    Begin(Box<Begin>),
    Frame(Arc<RunState>, Frame),
    End(Arc<RunState>),
    Close,
}

/// The beginning of a run.
pub(super) struct Begin {
    pub(super) run: Arc<RunState>,
    pub(super) hello: Hello,
    pub(super) constants: StateBuf,
    pub(super) source: Weak<dyn Source>,
}

/// What is known of a run on all threads.
#[derive(Default)]
pub(super) struct RunState {
    /// Its number, once it has begun.
    pub(super) number: AtomicU64,
    /// The last checkpoint that was queued: nothing newer can be in what a base is copied from. Set before memory and
    /// disks get it.
    pub(super) handed: AtomicU64,
    /// When it was committed.
    pub(super) handed_us: AtomicU64,
    /// Nothing more comes. Set before anything but commits writes to what a base is copied from.
    over: AtomicBool,
    /// Why, in words.
    why: Mutex<String>,
    /// Its gap was told.
    pub(super) told: AtomicBool,
    /// Its base is whole.
    pub(super) whole: AtomicBool,
}

impl RunState {
    /// Nothing more comes. The first word counts. Returns whether this is it.
    pub(super) fn end(&self, why: &str) -> bool {
        let mut said = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = !self.over.swap(true, Ordering::SeqCst);
        if is_news {
            why.clone_into(&mut said);
        }
        is_news
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub(super) fn why(&self) -> String {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Memory for checkpoints on their way.
#[derive(Default)]
pub(crate) struct Pool {
    frames: Mutex<Vec<Frame>>,
    /// Bytes of the checkpoints that wait.
    queued: AtomicUsize,
}

impl Pool {
    fn take(&self, bytes: usize) -> Option<Frame> {
        let room = self.queued.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= QUEUE_BYTES;
        if !room {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
            return None;
        }
        let spare = self.frames.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Some(Frame { queued: bytes, ..spare.unwrap_or_default() })
    }

    /// Nothing more is taken, or again.
    #[cfg(test)]
    pub(crate) fn pretend_full(&self, full: bool) {
        let bytes = QUEUE_BYTES * 2;
        if full {
            self.queued.fetch_add(bytes, Ordering::Relaxed)
        } else {
            self.queued.fetch_sub(bytes, Ordering::Relaxed)
        };
    }

    /// Takes a frame back whose checkpoint is written.
    pub(super) fn give_back(&self, mut frame: Frame) {
        self.queued.fetch_sub(frame.queued, Ordering::Relaxed);
        frame.clear();
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if frames.len() < SPARE_FRAMES {
            frames.push(frame);
        }
    }
}

enum Phase {
    /// The next run begins then at the earliest.
    Resting {
        until: Instant,
    },
    Running(Running),
}

struct Running {
    state: Arc<RunState>,
    /// The only reference that lasts.
    _source: Arc<dyn Source>,
    /// When the run began, by both clocks: the host's clock may be set meanwhile, and times of a run only grow.
    began: Instant,
    began_us: u64,
}

/// Records one VM's copy; dropping it ends the run in order.
pub struct Session {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    hello: Hello,
    /// From the base checkpoint of the link.
    constants: StateBuf,
    phase: Phase,
    rest: Duration,
    /// It was said that a checkpoint is too large for a run to begin with.
    said_large: bool,
}

impl Session {
    pub(super) fn new(jobs: Sender<Job>, shared: Arc<Shared>, hello: Hello) -> Self {
        let phase = Phase::Resting { until: Instant::now() };
        let rest = shared.limits.rest;
        let constants = StateBuf::default();
        Self { jobs, shared, hello, constants, phase, rest, said_large: false }
    }

    /// Takes a committed checkpoint, before memory and disks get it. Waits for nothing, and fails never: what it cannot
    /// take is a gap. `source` is asked when a run begins with this checkpoint.
    pub fn commit(&mut self, checkpoint: &Checkpoint<'_>, source: impl FnOnce() -> Arc<dyn Source>) {
        self.keep_constants(checkpoint);
        let bytes = Frame::bytes_of(checkpoint);
        match &self.phase {
            Phase::Running(Running { state, .. }) if state.is_over() => self.rest(),
            Phase::Resting { until } if *until <= Instant::now() => {
                // The first checkpoint of a link may be as large as all memory. The run begins behind it.
                if bytes <= QUEUE_BYTES / 2 {
                    self.begin(source());
                } else if !std::mem::replace(&mut self.said_large, true) {
                    self.shared.report().why = Some(too_large(bytes));
                }
            }
            _ => {}
        }
        let Phase::Running(Running { state, began, began_us, .. }) = &self.phase else { return };
        let (state, now) = (state.clone(), began_us + began.elapsed().as_micros() as u64);
        state.handed_us.store(now, Ordering::Relaxed);
        state.handed.store(checkpoint.number(), Ordering::SeqCst);
        let filled = self.shared.pool.take(bytes).and_then(|mut frame| {
            if frame.fill(checkpoint, now) {
                return Some(frame);
            }
            self.shared.pool.give_back(frame);
            None
        });
        match filled {
            Some(frame) => drop(self.jobs.send(Job::Frame(state, frame))),
            None if bytes > QUEUE_BYTES => self.gap(&too_large(bytes)),
            None => self.gap(TOO_FAST),
        }
    }

    fn keep_constants(&mut self, checkpoint: &Checkpoint<'_>) {
        let constants = || checkpoint.state().sections().filter(|it| it.kind == StateKind::VcpuConstant);
        if constants().next().is_some() {
            self.constants.clear();
            constants().for_each(|it| self.constants.push(it));
        }
    }

    fn begin(&mut self, source: Arc<dyn Source>) {
        self.said_large = false;
        let state = Arc::new(RunState::default());
        let begin = Begin {
            run: state.clone(),
            hello: self.hello.clone(),
            constants: self.constants.clone(),
            source: Arc::downgrade(&source),
        };
        self.jobs.send(Job::Begin(Box::new(begin))).ok();
        let (began, began_us) = (Instant::now(), micros(SystemTime::now()));
        self.phase = Phase::Running(Running { state, _source: source, began, began_us });
    }

    /// Ends the run with a gap.
    fn gap(&mut self, why: &str) {
        if let Phase::Running(Running { state, .. }) = &self.phase {
            state.end(why);
            self.shared.gap(state, why);
            self.rest();
        }
    }

    /// The run is over. Lets go of what it was copied from.
    fn rest(&mut self) {
        let Phase::Running(Running { state, .. }) = &self.phase else { return };
        let Limits { rest, longest_rest, .. } = self.shared.limits;
        let was_worth_it = state.whole.load(Ordering::Relaxed);
        self.rest = if was_worth_it { rest } else { (self.rest * 2).min(longest_rest) };
        self.jobs.send(Job::End(state.clone())).ok();
        self.phase = Phase::Resting { until: Instant::now() + self.rest };
    }

    /// Nothing more comes: what was queued is written, and memory and images are not looked at any more, but for a read that
    /// is under way. `why` is for people.
    pub fn finish(mut self, why: &str) {
        self.end(why);
    }

    /// The same, because the copy was found not to be the VM: what was recorded may be wrong.
    pub fn finish_suspect(mut self, why: &str) {
        self.end(&format!("{SUSPECT}{why}"));
    }

    fn end(&mut self, why: &str) {
        if let Phase::Running(Running { state, .. }) = &self.phase {
            state.end(why);
            self.rest();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end("the standby's process has ended");
    }
}

fn too_large(bytes: usize) -> String {
    format!("a checkpoint of {} MiB is too large to be recorded", bytes >> 20)
}
