//! Forgets the oldest checkpoints of a record: they become part of the base, or whole runs go. The order of the steps is in
//! [`base`](crate::base).

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use outlive_epoch::{Checkpoint, DiskOp, Hello, PAGE_SIZE, PageData};

use crate::base::Base;
use crate::places::{RunPlaces, open};
use crate::run::{Run, RunError, open_segment, segments};
use crate::segment::{SegmentError, SegmentName};

/// How much of a VM's past is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// So much time, and a little more.
    Time(Duration),
    /// So many bytes of the file system, with everything; while a new base is being copied, up to twice as many.
    Bytes(u64),
}

/// Why the run that is being written cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForgetError {
    /// It cannot be read.
    #[error(transparent)]
    Run(#[from] RunError),
    /// It cannot be changed.
    #[error("the record cannot be written: {0}")]
    Write(#[from] io::Error),
}

/// The run that is being written.
pub(crate) struct Current<'a> {
    pub(crate) places: &'a RunPlaces,
    /// When its newest checkpoint was committed. Ages count from there, and not from the host's clock, which may jump.
    pub(crate) newest: SystemTime,
    /// Once its base is whole.
    pub(crate) base: Option<(&'a Hello, &'a BaseFiles)>,
}

/// Forgets; see the module.
pub(crate) struct Forgetting {
    keep: Keep,
    /// The time of the last checkpoint of runs that have ended; `None` for one that cannot be read, which stays: another
    /// release may read it.
    ended: HashMap<u64, Option<SystemTime>>,
}

impl Forgetting {
    pub(crate) fn new(keep: Keep) -> Self {
        Self { keep, ended: HashMap::new() }
    }

    /// Forgets what need not be kept. Returns what an operator should know, if there is something: trouble with other runs
    /// ends nothing.
    ///
    /// # Errors
    /// See [`ForgetError`].
    pub(crate) fn forget(
        &mut self,
        record: &Path,
        current: Option<&Current<'_>>,
    ) -> Result<Option<String>, ForgetError> {
        let mut others = VecDeque::from(RunPlaces::all(record)?);
        others.retain(|run| current.is_none_or(|current| run.number != current.places.number));
        match self.keep {
            Keep::Time(keep) => {
                let newest = current.map_or_else(SystemTime::now, |current| current.newest);
                let oldest = newest.checked_sub(keep).unwrap_or(SystemTime::UNIX_EPOCH);
                let note = self.old_runs(&others, oldest);
                if let Some(current) = current {
                    current.fold_older(oldest)?;
                }
                Ok(note)
            }
            Keep::Bytes(limit) => Self::within(limit, others, current),
        }
    }

    /// Removes runs that have ended before this.
    fn old_runs(&mut self, others: &VecDeque<RunPlaces>, oldest: SystemTime) -> Option<String> {
        let mut note = None;
        for run in others {
            let last = self.ended.entry(run.number).or_insert_with(|| {
                let run = Run::open(run.clone()).ok()?;
                // One of which nothing can be had was left by a process that was killed.
                Some(run.and_then(|run| run.last()).map_or(SystemTime::UNIX_EPOCH, |last| last.time))
            });
            if last.is_some_and(|last| last < oldest)
                && let Err(error) = remove(run)
            {
                note = Some(format!("run {} cannot be removed: {error}", run.number));
            }
        }
        note
    }

    /// Keeps everything within so many bytes.
    fn within(
        limit: u64,
        mut others: VecDeque<RunPlaces>,
        current: Option<&Current<'_>>,
    ) -> Result<Option<String>, ForgetError> {
        let is_copying = current.is_some_and(|current| current.base.is_none());
        // The runs before are all that there is until the new base is whole.
        let limit_now = if is_copying { limit.saturating_mul(2) } else { limit };
        loop {
            let own = current.map_or(Ok(0), |current| current.places.allocated())?;
            let rest = others.iter().filter_map(|run| run.allocated().ok()).sum::<u64>();
            if own + rest <= limit_now {
                return Ok(None);
            }
            if let Some(run) = others.pop_front() {
                if let Err(error) = remove(&run) {
                    return Ok(Some(format!("run {} cannot be removed: {error}", run.number)));
                }
                continue;
            }
            let Some(current) = current else { return Ok(None) };
            match current.fold_oldest()? {
                Folded::Yes => {}
                Folded::InUse => return Ok(None),
                Folded::Nothing if is_copying => return Ok(None),
                Folded::Nothing => {
                    return Ok(Some(format!(
                        "the base and the newest checkpoints take {} MiB, and keep= says {} MiB: give more",
                        own >> 20,
                        limit >> 20
                    )));
                }
            }
        }
    }
}

/// What became of the oldest segment.
enum Folded {
    /// It is part of the base.
    Yes,
    /// Somebody plays the run.
    InUse,
    /// There is no base, or no other segment.
    Nothing,
}

impl Current<'_> {
    fn fold_older(&self, oldest: SystemTime) -> Result<(), ForgetError> {
        while let Some((_, next)) = oldest_two(self.places)?
            && (crate::run::time(next.time_us) < oldest || is_before(self.places, next))
            && matches!(self.fold_oldest()?, Folded::Yes)
        {}
        Ok(())
    }

    fn fold_oldest(&self) -> Result<Folded, ForgetError> {
        match (self.base, oldest_two(self.places)?) {
            (Some((hello, files)), Some(two)) => fold(self.places, hello, files, two),
            _ => Ok(Folded::Nothing),
        }
    }
}

/// The files of a base, open for writing.
pub(crate) struct BaseFiles {
    memory: File,
    disks: Vec<Option<File>>,
}

impl BaseFiles {
    /// Opens them.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn open(places: &RunPlaces, disks: usize) -> io::Result<Self> {
        let open = |path| File::options().write(true).open(path);
        let disks = (0..disks).map(|disk| match open(places.disk(disk)) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        });
        Ok(Self { memory: open(places.memory())?, disks: disks.collect::<io::Result<_>>()? })
    }

    /// Writes a checkpoint into the base.
    fn apply(&self, hello: &Hello, checkpoint: &Checkpoint<'_>) -> io::Result<()> {
        for (gfn, page) in checkpoint.pages() {
            // The reader has checked that it is of the layout.
            let at = hello.layout.index(gfn).unwrap_or(0) * PAGE_SIZE as u64;
            match page {
                PageData::Zero => zero(&self.memory, at, PAGE_SIZE as u64)?,
                PageData::Raw(bytes) => self.memory.write_all_at(bytes, at)?,
                PageData::Granules(granules) => granules
                    .iter()
                    .try_for_each(|(place, bytes)| self.memory.write_all_at(bytes, at + place as u64))?,
            }
        }
        for record in checkpoint.disk_writes().iter() {
            let Some(Some(file)) = self.disks.get(usize::from(record.disk)) else { continue };
            match record.op {
                DiskOp::Data(bytes) => file.write_all_at(bytes, record.offset)?,
                DiskOp::Zero(len) => zero(file, record.offset, len)?,
                DiskOp::Flush => {}
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        std::iter::once(&self.memory).chain(self.disks.iter().flatten()).try_for_each(File::sync_data)
    }
}

/// Makes a range zero, as a hole if the file system has holes.
fn zero(file: &File, at: u64, len: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeroes = [0; 64 << 10];
            let mut done = 0;
            while done < len {
                let step = (len - done).min(zeroes.len() as u64);
                file.write_all_at(&zeroes[..step as usize], at + done)?;
                done += step;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

/// The oldest segment of a run and the one behind it. The last one is never forgotten.
fn oldest_two(places: &RunPlaces) -> Result<Option<(SegmentName, SegmentName)>, RunError> {
    Ok(segments(places)?.first_chunk().map(|[oldest, next]| (*oldest, *next)))
}

/// Whether nothing in front of this segment can be had anyway.
fn is_before(places: &RunPlaces, next: SegmentName) -> bool {
    Base::read(&places.base()).ok().flatten().is_some_and(|base| next.first <= base.from)
}

/// Plays the oldest segment on the base and removes it.
fn fold(
    places: &RunPlaces,
    hello: &Hello,
    files: &BaseFiles,
    (oldest, next): (SegmentName, SegmentName),
) -> Result<Folded, ForgetError> {
    let Some(_lock) = alone(places)? else { return Ok(Folded::InUse) };
    let base = Base::read(&places.base()).map_err(|error| RunError::damaged(places.base(), error))?;
    let raised = Base { from: next.first, time_us: next.time_us };
    if base.is_none_or(|base| base.from < raised.from) {
        raised.write(&places.base())?;
    }
    let path = oldest.path(&places.directory);
    if let Some(mut reader) = open_segment(places, oldest, hello)? {
        let mut after = oldest.first;
        loop {
            match reader.next() {
                Ok(incoming) => {
                    let Some(checkpoint) = incoming.checkpoint() else { break };
                    after = checkpoint.number() + 1;
                    files.apply(hello, &checkpoint)?;
                }
                Err(SegmentError::Ends(_)) if after == next.first => break,
                Err(error) => return Err(crate::run::segment(path, error).into()),
            }
        }
        files.sync()?;
    }
    fs::remove_file(&path)?;
    Ok(Folded::Yes)
}

/// Removes a run, if nobody plays it.
///
/// # Errors
/// The operating system's.
pub(crate) fn remove(places: &RunPlaces) -> io::Result<()> {
    match alone(places) {
        Ok(None) => Ok(()),
        // A run that was begun and has no lock yet is nobody's.
        Err(error) if error.kind() == io::ErrorKind::NotFound => places.remove(),
        Err(error) => Err(error),
        Ok(Some(_lock)) => places.remove(),
    }
}

/// The lock of a run, if nobody plays it.
fn alone(places: &RunPlaces) -> io::Result<Option<File>> {
    let lock = open(&places.lock())?;
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}
