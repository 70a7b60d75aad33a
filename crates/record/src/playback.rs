//! Plays a run up to a checkpoint.

use std::fs::File;
use std::io;

use outlive_epoch::{Hello, Incoming};

use crate::base::Base;
use crate::places::open;
use crate::run::{Found, Run, RunError, open_segment, segment, segments};
use crate::segment::SegmentError;

/// Why a run cannot be played.
#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    /// A file of it cannot be read, or is damaged.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The recorder has forgotten that moment since.
    #[error("the record no longer has this moment of run {run}: choose a later one")]
    Forgotten {
        /// The run.
        run: u64,
    },
    /// A checkpoint is missing.
    #[error("run {run} of the record breaks off behind checkpoint {after}: choose one up to there")]
    BreaksOff {
        /// The run.
        run: u64,
        /// The last checkpoint in front of the break.
        after: u64,
    },
}

/// A run that is being played. While it exists the recorder neither changes the base nor removes anything of the run.
pub struct Playback {
    run: Run,
    found: Found,
    /// The first checkpoint that can be had.
    from: u64,
    memory: File,
    disks: Vec<Option<File>>,
    _lock: File,
}

impl Playback {
    pub(crate) fn open(run: &Run, found: Found) -> Result<Self, PlayError> {
        let places = run.places();
        let gone = |path: std::path::PathBuf| {
            move |source: io::Error| match source.kind() {
                io::ErrorKind::NotFound => PlayError::Forgotten { run: found.run },
                _ => RunError::Read { path, source }.into(),
            }
        };
        let lock = open(&places.lock()).map_err(gone(places.lock()))?;
        lock.lock_shared().map_err(gone(places.lock()))?;
        // Under the lock: it may have been changed until now.
        let base = Base::read(&places.base()).map_err(|error| RunError::damaged(places.base(), error))?;
        let from = base.map(|base| base.from).filter(|from| *from <= found.checkpoint);
        let from = from.ok_or(PlayError::Forgotten { run: found.run })?;
        let memory = open(&places.memory()).map_err(gone(places.memory()))?;
        let mut disks = Vec::new();
        for disk in 0..crate::segment_disks(run.hello()).len() {
            disks.push(match open(&places.disk(disk)) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(RunError::read(places.disk(disk))(error).into()),
            });
        }
        Ok(Self { run: run.clone(), found, from, memory, disks, _lock: lock })
    }

    /// How the primary introduced the VM.
    pub fn hello(&self) -> &Hello {
        self.run.hello()
    }

    /// The checkpoint up to which it is played.
    pub fn found(&self) -> Found {
        self.found
    }

    /// The base's memory: page i of the layout ([`Layout::index`](outlive_epoch::Layout::index)) at byte 4096 i. Holes
    /// are zeroes.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// The base's copy of a disk, of the disk's length; holes are zeroes. `None` for one that is not recorded.
    pub fn disk(&self, disk: u16) -> Option<&File> {
        self.disks.get(usize::from(disk))?.as_ref()
    }

    /// Every checkpoint from the base on through the one that was asked for, in order. The base is the VM at none of them
    /// before the last one is on top of it.
    ///
    /// # Errors
    /// What `apply` returns, and [`PlayError`].
    pub fn each<E: From<PlayError>>(
        &mut self,
        mut apply: impl FnMut(&mut Incoming) -> Result<(), E>,
    ) -> Result<(), E> {
        let places = self.run.places();
        // The base has what comes in front of the oldest segment, and nothing else has.
        let mut before: Option<u64> = None;
        let breaks =
            |before: Option<u64>| PlayError::BreaksOff { run: self.found.run, after: before.unwrap_or(0) };
        for name in segments(places).map_err(PlayError::Run)? {
            if before.map_or(name.first > self.from, |before| before + 1 != name.first) {
                return Err(breaks(before).into());
            }
            let reader = open_segment(places, name, self.run.hello()).map_err(PlayError::Run)?;
            let mut reader = reader.ok_or_else(|| breaks(before))?;
            loop {
                let incoming = match reader.next() {
                    Ok(incoming) => incoming,
                    Err(SegmentError::Ends(_)) => break,
                    Err(error) => {
                        return Err(PlayError::Run(segment(name.path(&places.directory), error)).into());
                    }
                };
                let number = incoming.checkpoint().map(|it| it.number());
                apply(incoming)?;
                before = number;
                if number == Some(self.found.checkpoint) {
                    return Ok(());
                }
            }
        }
        Err(breaks(before).into())
    }
}
