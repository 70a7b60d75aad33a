//! The recorder's thread.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outlive_epoch::StateBuf;

use super::base::BaseWork;
use super::session::{Begin, Job, RunState};
use super::{Config, Limits, Shared, Told, ends_within};
use crate::claim::claim;
use crate::forget::{Keep, remove};
use crate::frame::Frame;
use crate::places::{RunPlaces, sync_directory, write_whole};
use crate::run::{Run as Reading, time, write_introduction};
use crate::segment::SegmentWriter;

/// How long the end of a run waits for the thread of its base, which stops within a moment unless a disk hangs.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct Writing {
    shared: Arc<Shared>,
    run: Option<Run>,
    /// The last number of a run. A number is never used again: a thread that was left behind may still write to its run.
    number: u64,
    /// Threads of bases that have not ended with their runs.
    left: Vec<(RunPlaces, JoinHandle<()>)>,
    /// There was no room.
    was_full: bool,
    looked: Instant,
}

/// The run that is being written.
struct Run {
    state: Arc<RunState>,
    places: RunPlaces,
    constants: StateBuf,
    segment: Option<SegmentWriter>,
    begun: Instant,
    synced: Instant,
    base: JoinHandle<()>,
    limits: Limits,
}

impl Writing {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, run: None, number: 0, left: Vec::new(), was_full: false, looked: Instant::now() }
    }

    pub(super) fn serve(mut self, inbox: &Receiver<Job>) {
        if let Err(error) = self.claim() {
            self.shared.note(Some(error.to_string()));
        }
        loop {
            let job = match inbox.try_recv() {
                Ok(job) => Ok(job),
                Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {
                    self.careful(Run::flush);
                    inbox.recv_timeout(self.shared.limits.sync)
                }
            };
            match job {
                Ok(Job::Begin(begin)) => self.begin(*begin),
                Ok(Job::Frame(run, frame)) => {
                    if self.is_now(&run) {
                        self.careful(|run| run.write(&frame));
                        self.written(&run, &frame);
                    }
                    self.shared.pool.give_back(frame);
                }
                Ok(Job::End(run)) if self.is_now(&run) => self.end(),
                Ok(Job::End(_)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.careful(Run::sync);
                    self.forget();
                }
                Ok(Job::Close) | Err(RecvTimeoutError::Disconnected) => return self.end(),
            }
        }
    }

    fn is_now(&self, run: &Arc<RunState>) -> bool {
        self.run.as_ref().is_some_and(|it| Arc::ptr_eq(&it.state, run))
    }

    /// Claims the directory, unless this process has it, and removes what earlier processes have left half made there.
    fn claim(&mut self) -> Result<(), crate::ClaimError> {
        let mut claimed = self.shared.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        if claimed.is_some() {
            return Ok(());
        }
        *claimed = Some(claim(&self.shared.config.directory)?);
        drop(claimed);
        self.tidy();
        self.shared.measure();
        Ok(())
    }

    /// Removes runs of which nothing can be had. One that cannot be read stays: another release may read it.
    fn tidy(&mut self) {
        self.left.retain(|(_, thread)| !thread.is_finished());
        for places in RunPlaces::all(&self.shared.config.directory).unwrap_or_default() {
            self.number = self.number.max(places.number);
            let is_left = self.left.iter().any(|(left, _)| *left == places);
            if !is_left
                && matches!(Reading::open(places.clone()), Ok(None))
                && let Err(error) = remove(&places)
            {
                self.shared.note(Some(format!("run {} cannot be removed: {error}", places.number)));
            }
        }
    }

    fn begin(&mut self, begin: Begin) {
        self.end();
        // It may have waited here for long.
        if begin.run.is_over() {
            return;
        }
        let state = begin.run.clone();
        let begun = self.claim().map_err(io::Error::other).and_then(|()| {
            self.tidy();
            self.make_room();
            self.number += 1;
            Run::begin(&self.shared, self.number, begin)
        });
        match begun {
            Ok(run) => {
                let number = run.places.number;
                let mut report = self.shared.report();
                (report.run, report.from, report.last, report.why) = (Some(number), None, None, None);
                drop(report);
                self.run = Some(run);
                (self.shared.config.tell)(Told::Began { run: number });
            }
            Err(error) => {
                self.was_full |= error.kind() == io::ErrorKind::StorageFull;
                let why = format!("a run cannot begin: {error}");
                state.end(&why);
                self.shared.gap(&state, &why);
            }
        }
    }

    /// Whoever gives a size wants the present recorded, and not the past kept, where there is less than that.
    fn make_room(&mut self) {
        let Config { directory, keep, .. } = &self.shared.config;
        if std::mem::take(&mut self.was_full)
            && matches!(keep, Keep::Bytes(_))
            && let Some(oldest) = RunPlaces::all(directory).unwrap_or_default().first()
        {
            let removed = remove(oldest);
            let why = removed.err().map_or_else(String::new, |error| format!(" (it cannot be: {error})"));
            self.shared.note(Some(format!("no room is left: run {} is forgotten{why}", oldest.number)));
        }
    }

    /// Does something with the run. If that fails, the run ends.
    fn careful(&mut self, work: impl FnOnce(&mut Run) -> io::Result<()>) {
        let Some(run) = &mut self.run else { return };
        if let Err(error) = work(run) {
            self.was_full |= error.kind() == io::ErrorKind::StorageFull;
            // It must not be asked again to write what it could not.
            run.segment = None;
            let why = format!("the log cannot be written: {error}");
            run.state.end(&why);
            self.shared.gap(&run.state.clone(), &why);
            self.end();
        }
    }

    fn written(&self, run: &RunState, frame: &Frame) {
        self.shared.of_run(run, |report| report.last = Some((frame.number, time(frame.time_us))));
    }

    fn end(&mut self) {
        let Some(mut run) = self.run.take() else { return };
        run.state.end("the standby's process has ended");
        if let Some(Err(error)) = run.segment.as_mut().map(SegmentWriter::sync) {
            self.shared.gap(&run.state, &format!("the log cannot be written: {error}"));
        }
        self.shared.of_run(&run.state, |report| {
            (report.run, report.from, report.last, report.why) = (None, None, None, None);
        });
        if !ends_within(&run.base, PATIENCE) {
            return self.left.push((run.places, run.base));
        }
        // A base without the checkpoints that belong on top of it, or none at all, is of no use.
        if matches!(Reading::open(run.places.clone()), Ok(None)) {
            remove(&run.places).ok();
        } else {
            // For people only.
            write_whole(&run.places.end(), run.state.why().as_bytes()).ok();
        }
        self.shared.measure();
    }

    /// Forgets what is too old while no run is written; otherwise the thread of the base does it.
    fn forget(&mut self) {
        if self.run.is_some() || self.looked.elapsed() < self.shared.limits.forget {
            return;
        }
        self.looked = Instant::now();
        let is_claimed = self.shared.claimed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        let Ok(mut forgetting) = self.shared.forgetting.try_lock() else { return };
        if is_claimed {
            // A record that cannot be read is told of when a run begins.
            let note = forgetting.forget(&self.shared.config.directory, None).ok().flatten();
            drop(forgetting);
            self.shared.note(note);
            self.shared.measure();
        }
    }
}

impl Run {
    fn begin(shared: &Arc<Shared>, number: u64, begin: Begin) -> io::Result<Self> {
        let Begin { run: state, hello, constants, source } = begin;
        let places = RunPlaces::of(&shared.config.directory, number);
        places.make()?;
        write_introduction(&places, &hello)?;
        sync_directory(&shared.config.directory)?;
        state.number.store(number, std::sync::atomic::Ordering::Relaxed);
        let base = BaseWork { shared: shared.clone(), state: state.clone(), places: places.clone(), hello };
        let base = (shared.config.spawn)("record-base", Box::new(move || base.run(&source)))?;
        let now = Instant::now();
        Ok(Self {
            state,
            places,
            constants,
            segment: None,
            begun: now,
            synced: now,
            base,
            limits: shared.limits,
        })
    }

    fn write(&mut self, frame: &Frame) -> io::Result<()> {
        let Limits { segment_bytes, segment_time, sync, .. } = self.limits;
        let is_over =
            |it: &mut SegmentWriter| it.bytes() >= segment_bytes || self.begun.elapsed() >= segment_time;
        if let Some(mut segment) = self.segment.take_if(is_over) {
            // Behind a durable segment only: a record is not to have holes after a loss of power.
            segment.sync()?;
        }
        match &mut self.segment {
            Some(segment) => segment.push(frame)?,
            None => {
                self.begun = Instant::now();
                self.segment = Some(SegmentWriter::begin(&self.places.directory, frame, &self.constants)?);
                sync_directory(&self.places.directory)?;
            }
        }
        if self.synced.elapsed() >= sync { self.sync() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.segment.as_mut().map_or(Ok(()), SegmentWriter::flush)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.synced = Instant::now();
        self.segment.as_mut().map_or(Ok(()), SegmentWriter::sync)
    }
}
