//! A record, opened for reading.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::places::RunPlaces;
use crate::playback::{PlayError, Playback};
use crate::run::{Found, Run, RunError};

/// Which checkpoint is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The newest one.
    Newest,
    /// The newest one that was committed at this time or before.
    Time(SystemTime),
    /// The one with this number: of this run, or of the newest run that has it.
    Checkpoint {
        /// The run.
        run: Option<u64>,
        /// The number.
        number: u64,
    },
}

/// Why a directory is no record that can be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system's word.
    #[error("cannot read the record {}: {source}", .record.display())]
    Read {
        /// The directory.
        record: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has no run.
    #[error(
        "nothing is recorded in {}: give the directory of outlive standby --record; after its start a record can be \
         played as soon as its base is whole",
        .0.display()
    )]
    Nothing(PathBuf),
}

/// Why a checkpoint cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// It is not in the record.
    #[error("the record has no such moment: {0}")]
    NotThere(String),
    /// A run cannot be read.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// A record, opened for reading. It needs no lock: what the recorder adds or forgets later is not seen.
#[derive(Debug)]
pub struct Record {
    runs: Vec<Run>,
    unread: Vec<(u64, RunError)>,
}

impl Record {
    /// Looks at the runs in a directory.
    ///
    /// # Errors
    /// See [`OpenError`]. Runs that cannot be read are [`unread`](Self::unread) and no error, unless there is no other.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        let record = || directory.to_owned();
        let places =
            RunPlaces::all(directory).map_err(|source| OpenError::Read { record: record(), source })?;
        let (mut runs, mut unread) = (Vec::new(), Vec::new());
        for places in places {
            let number = places.number;
            match Run::open(places) {
                Ok(run) => runs.extend(run),
                Err(error) => unread.push((number, error)),
            }
        }
        if runs.is_empty() && unread.is_empty() {
            return Err(OpenError::Nothing(record()));
        }
        Ok(Self { runs, unread })
    }

    /// The runs of which something can be had, oldest first.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Runs that cannot be read, and why.
    pub fn unread(&self) -> &[(u64, RunError)] {
        &self.unread
    }

    /// Finds a checkpoint.
    ///
    /// # Errors
    /// See [`FindError`].
    pub fn find(&self, at: &At) -> Result<Found, FindError> {
        // A directory may have had several VMs. Who does not name a run means the last one.
        let vm = self.runs.last().map(|run| run.hello().vm);
        let newest_first = self.runs.iter().rev().filter(|run| match at {
            At::Checkpoint { run: Some(wanted), .. } => run.number() == *wanted,
            _ => Some(run.hello().vm) == vm,
        });
        let found = match *at {
            At::Newest => newest_first.map(|run| run.last()).next().flatten(),
            At::Time(time) => first_of(newest_first, |run| run.at(time))?,
            At::Checkpoint { number, .. } => first_of(newest_first, |run| run.with_number(number))?,
        };
        found.ok_or_else(|| FindError::NotThere(self.there_is()))
    }

    /// Begins to play a run up to this checkpoint.
    ///
    /// # Errors
    /// See [`PlayError`].
    pub fn play(&self, found: &Found) -> Result<Playback, PlayError> {
        let run = self.runs.iter().find(|run| run.number() == found.run);
        Playback::open(run.ok_or(PlayError::Forgotten { run: found.run })?, *found)
    }

    /// What can be had, in words.
    fn there_is(&self) -> String {
        let runs = self.runs.iter().filter_map(|run| {
            let (first, last) = run.first().zip(run.last())?;
            Some(format!("run {} has checkpoints {} to {}", run.number(), first.checkpoint, last.checkpoint))
        });
        let runs = runs.collect::<Vec<_>>();
        if runs.is_empty() { "nothing of it can be played".into() } else { runs.join(", ") }
    }
}

fn first_of<'a>(
    runs: impl Iterator<Item = &'a Run>,
    look: impl Fn(&Run) -> Result<Option<Found>, RunError>,
) -> Result<Option<Found>, RunError> {
    let mut unread = None;
    for run in runs {
        match look(run) {
            Ok(Some(found)) => return Ok(Some(found)),
            Ok(None) => {}
            Err(error) => drop(unread.get_or_insert(error)),
        }
    }
    unread.map_or(Ok(None), Err)
}
