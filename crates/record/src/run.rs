//! A run: what is known of it without playing it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use outlive_epoch::{Encoder, Hello, Message, Peer, Preface, ReadError, SectionReader};

use crate::base::{Base, BaseError};
use crate::places::{RunPlaces, open, read_small, write_whole};
use crate::segment::{SegmentError, SegmentName, SegmentReader};

/// How the words begin that say why a run has ended, if its checkpoints may be wrong.
pub(crate) const SUSPECT: &str = "SUSPECT: ";

/// A checkpoint of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The run that has it.
    pub run: u64,
    /// The generation in which the VM ran.
    pub generation: u64,
    /// Its number.
    pub checkpoint: u64,
    /// When it was committed, by the clock of the host that recorded it.
    pub time: SystemTime,
}

/// Why a run cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The operating system's word.
    #[error("{}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of it is not what it should be.
    #[error("{}: {why}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl RunError {
    pub(crate) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn damaged(path: impl Into<PathBuf>, why: impl ToString) -> Self {
        Self::Damaged { path: path.into(), why: why.to_string() }
    }
}

/// Checkpoints of one VM without a gap, on top of a base.
#[derive(Debug, Clone)]
pub struct Run {
    places: RunPlaces,
    hello: Box<Hello>,
    first: Found,
    last: Found,
    bytes: u64,
    ended: Option<String>,
    is_suspect: bool,
}

impl Run {
    /// Its number in the record.
    pub fn number(&self) -> u64 {
        self.places.number
    }

    /// How the primary introduced the VM.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The first checkpoint that can be had.
    pub fn first(&self) -> Option<Found> {
        Some(self.first)
    }

    /// The last checkpoint that can be had.
    pub fn last(&self) -> Option<Found> {
        Some(self.last)
    }

    /// Why nothing follows, in words. `None` for a run that is being written, or whose host has failed.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Whether the standby's copy was found not to be the VM in this run: then its checkpoints may be wrong.
    pub fn is_suspect(&self) -> bool {
        self.is_suspect
    }

    /// Bytes that it takes in its file system.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn places(&self) -> &RunPlaces {
        &self.places
    }

    /// Looks at a run. `None` if nothing of it can be had: its base is not whole.
    ///
    /// # Errors
    /// See [`RunError`].
    pub(crate) fn open(places: RunPlaces) -> Result<Option<Self>, RunError> {
        let base = match Base::read(&places.base()) {
            Ok(Some(base)) => base,
            Ok(None) => return Ok(None),
            Err(BaseError::Read(error)) => return Err(RunError::read(places.base())(error)),
            Err(error) => return Err(RunError::damaged(places.base(), error)),
        };
        let hello = introduction(&places)?;
        // Without its first segments it would be something else.
        if let Some(oldest) = segments(&places)?.first().filter(|oldest| oldest.first > base.from) {
            let why = format!("checkpoints {} to {} are missing in front of it", base.from, oldest.first - 1);
            return Err(RunError::damaged(oldest.path(&places.directory), why));
        }
        let found = |checkpoint, time_us| Found {
            run: places.number,
            generation: hello.generation,
            checkpoint,
            time: time(time_us),
        };
        let first = found(base.from, base.time_us);
        let Some((number, time_us)) = last(&places, &hello)?.filter(|(number, _)| *number >= base.from)
        else {
            return Ok(None);
        };
        let last = found(number, time_us);
        let bytes = places.allocated().map_err(RunError::read(&places.directory))?;
        let ended = read_small(&places.end()).ok();
        let is_suspect = ended.as_ref().is_some_and(|why| why.starts_with(SUSPECT));
        Ok(Some(Self { places, hello, first, last, bytes, ended, is_suspect }))
    }

    /// The newest checkpoint that was committed at this time or before.
    ///
    /// # Errors
    /// See [`RunError`].
    pub(crate) fn at(&self, time: SystemTime) -> Result<Option<Found>, RunError> {
        if time < self.first.time {
            return Ok(None);
        }
        let mut best = self.first;
        let segments = segments(&self.places)?;
        // The newest that begins early enough; without one, the first checkpoint is in it.
        let begun = segments.iter().rev().find(|name| self::time(name.time_us) <= time);
        for (number, at) in checkpoints(&self.places, begun.copied(), &self.hello)? {
            if self::time(at) <= time && number >= best.checkpoint && number <= self.last.checkpoint {
                best = Found { checkpoint: number, time: self::time(at), ..best };
            }
        }
        Ok(Some(best))
    }

    /// The checkpoint with this number.
    ///
    /// # Errors
    /// See [`RunError`].
    pub(crate) fn with_number(&self, wanted: u64) -> Result<Option<Found>, RunError> {
        if !(self.first.checkpoint..=self.last.checkpoint).contains(&wanted) {
            return Ok(None);
        }
        let segments = segments(&self.places)?;
        let has = segments.iter().rev().find(|name| name.first <= wanted);
        let found = checkpoints(&self.places, has.copied(), &self.hello)?;
        let found = found.into_iter().find(|(number, _)| *number == wanted);
        Ok(found.map(|(checkpoint, at)| Found { checkpoint, time: time(at), ..self.first }))
    }
}

/// The segments of a run, in their order.
pub(crate) fn segments(places: &RunPlaces) -> Result<Vec<SegmentName>, RunError> {
    let unread = RunError::read(&places.directory);
    let list = || -> io::Result<Vec<SegmentName>> {
        let mut segments = Vec::new();
        for entry in fs::read_dir(&places.directory)? {
            segments.extend(entry?.file_name().to_str().and_then(SegmentName::parse));
        }
        segments.sort();
        Ok(segments)
    };
    list().map_err(unread)
}

/// Opens a segment. `None` if it has been removed, because it is no longer needed.
pub(crate) fn open_segment(
    places: &RunPlaces,
    name: SegmentName,
    hello: &Hello,
) -> Result<Option<SegmentReader>, RunError> {
    let path = name.path(&places.directory);
    let file = match open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(RunError::read(path)(error)),
    };
    SegmentReader::open(file, name, hello).map(Some).map_err(|error| segment(path, error))
}

/// What is wrong with a segment.
pub(crate) fn segment(path: PathBuf, error: SegmentError) -> RunError {
    match error {
        SegmentError::Read(source) => RunError::Read { path, source },
        error => RunError::damaged(path, error),
    }
}

/// The checkpoints of a segment, with the times of their commits.
fn checkpoints(
    places: &RunPlaces,
    name: Option<SegmentName>,
    hello: &Hello,
) -> Result<Vec<(u64, u64)>, RunError> {
    let mut found = Vec::new();
    let Some(name) = name else { return Ok(found) };
    let Some(mut reader) = open_segment(places, name, hello)? else { return Ok(found) };
    loop {
        match reader.next() {
            Ok(incoming) => found.extend(incoming.checkpoint().map(|it| (it.number(), it.stamp_us()))),
            Err(SegmentError::Ends(_)) => return Ok(found),
            Err(error) => return Err(segment(name.path(&places.directory), error)),
        }
    }
}

/// The last whole checkpoint of a run, with its time. Each segment is durable before the next one begins.
fn last(places: &RunPlaces, hello: &Hello) -> Result<Option<(u64, u64)>, RunError> {
    for name in segments(places)?.into_iter().rev() {
        if let Some(last) = checkpoints(places, Some(name), hello)?.pop() {
            return Ok(Some(last));
        }
    }
    Ok(None)
}

/// Reads how the primary introduced the VM.
pub(crate) fn introduction(places: &RunPlaces) -> Result<Box<Hello>, RunError> {
    let path = places.introduction();
    let mut file = open(&path).map_err(RunError::read(&path))?;
    let mut reader = SectionReader::new(Peer::Primary);
    let mut read = || -> Result<Box<Hello>, ReadError> {
        reader.read_preface(&mut file)?;
        let section = reader.read_section(&mut file)?;
        match Message::parse(&section)? {
            Message::Hello(hello) => Ok(hello),
            _ => Err(ReadError::Closed),
        }
    };
    read().map_err(|error| match error {
        ReadError::Io(source) => RunError::Read { path, source },
        error => RunError::damaged(path, error),
    })
}

/// Writes how the primary introduced the VM.
///
/// # Errors
/// The operating system's.
pub(crate) fn write_introduction(places: &RunPlaces, hello: &Hello) -> io::Result<()> {
    let mut encoder = Encoder::new();
    let mut bytes = Preface { version: encoder.stream() }.encode().to_vec();
    encoder.hello(&mut bytes, hello).map_err(io::Error::other)?;
    write_whole(&places.introduction(), &bytes)
}

pub(crate) fn time(micros: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}
