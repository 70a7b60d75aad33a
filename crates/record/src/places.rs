//! Where everything of a record is.
//!
//! ```text
//! DIR/lock                the recorder holds it; it also says that the directory is a record
//! DIR/00000001/           a run: checkpoints without a gap
//!     run                 the stream's preface and the primary's introduction
//!     lock                who plays the run shares it; who changes the base or removes the run has it alone
//!     memory, disk-0 ...  the base, as sparse files: page i of the layout at byte 4096 i
//!     base                from which checkpoint on the run can be played; not there before the base is whole
//!     NUMBER-TIME.log     segments
//!     end                 why nothing follows, in words; not there while it is written, or after a loss of power
//! ```
//!
//! A VM's memory is in it, so everything is its owner's alone. Only what a recorder has made is ever removed.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::segment::SegmentName;

/// The lock of a record, and that of a run.
pub(crate) const LOCK: &str = "lock";
/// The introduction.
const RUN: &str = "run";
/// The copy of the VM's memory.
const MEMORY: &str = "memory";
/// That of a disk, in front of its number.
const DISK: &str = "disk-";
/// See [`Base`](crate::base::Base).
const BASE: &str = "base";
/// Why a run has ended.
const END: &str = "end";
/// How the name of a file ends that is not whole.
const NEW: &str = "new";
/// Digits of a run's name.
const DIGITS: usize = 8;
/// Most bytes of a small file.
const MOST: u64 = 64 << 10;

/// The directory of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunPlaces {
    pub(crate) number: u64,
    pub(crate) directory: PathBuf,
}

impl RunPlaces {
    /// Run `number` of a record.
    pub(crate) fn of(record: &Path, number: u64) -> Self {
        Self { number, directory: record.join(format!("{number:0DIGITS$}")) }
    }

    /// All runs of a record, oldest first. Whatever else is there is passed over.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn all(record: &Path) -> io::Result<Vec<Self>> {
        let mut runs = Vec::new();
        for entry in fs::read_dir(record)? {
            let entry = entry?;
            let name = entry.file_name();
            let digits = |name: &&str| name.len() == DIGITS && name.bytes().all(|it| it.is_ascii_digit());
            let number = name.to_str().filter(digits).and_then(|name| name.parse().ok());
            if let Some(number) = number
                && entry.file_type()?.is_dir()
            {
                runs.push(Self { number, directory: entry.path() });
            }
        }
        runs.sort_by_key(|run| run.number);
        Ok(runs)
    }

    /// Makes the directory of a run, with its lock.
    ///
    /// # Errors
    /// The operating system's; that it is there already is one of them.
    pub(crate) fn make(&self) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(&self.directory)?;
        create(&self.lock()).map(drop)
    }

    /// Removes the files of a run and its directory, and nothing that no recorder has made.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn remove(&self) -> io::Result<()> {
        // First what says that it can be played.
        absent(fs::remove_file(self.base()))?;
        sync_directory(&self.directory)?;
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_str().is_some_and(is_ours) {
                absent(fs::remove_file(entry.path()))?;
            }
        }
        fs::remove_dir(&self.directory)
    }

    pub(crate) fn introduction(&self) -> PathBuf {
        self.directory.join(RUN)
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.directory.join(LOCK)
    }

    pub(crate) fn memory(&self) -> PathBuf {
        self.directory.join(MEMORY)
    }

    pub(crate) fn disk(&self, disk: usize) -> PathBuf {
        self.directory.join(format!("{DISK}{disk}"))
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.directory.join(BASE)
    }

    pub(crate) fn end(&self) -> PathBuf {
        self.directory.join(END)
    }

    /// Bytes that the run takes in its file system.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(&self.directory)? {
            bytes += match entry?.metadata() {
                Ok(metadata) => metadata.blocks() * 512,
                // It was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(error),
            };
        }
        Ok(bytes)
    }
}

/// Whether a recorder makes files of this name in a run.
fn is_ours(name: &str) -> bool {
    let name = name.strip_suffix(NEW).and_then(|name| name.strip_suffix('.')).unwrap_or(name);
    [LOCK, RUN, MEMORY, BASE, END].contains(&name)
        || name.strip_prefix(DISK).is_some_and(|number| number.parse::<u16>().is_ok())
        || SegmentName::parse(name).is_some()
}

fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes a file that is not there, for its owner alone.
///
/// # Errors
/// The operating system's.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Opens a file of a record to read, and follows no link.
///
/// # Errors
/// The operating system's; that it is no file is one of them.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no file")) }
}

/// Reads a small file.
///
/// # Errors
/// The operating system's.
pub(crate) fn read_small(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    open(path)?.take(MOST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Writes a small file so that it is there whole or not at all, whatever happens, and durable.
///
/// # Errors
/// The operating system's.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let making = path.with_extension(NEW);
    absent(fs::remove_file(&making))?;
    let mut file = create(&making)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&making, path)?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// Makes names in a directory durable.
///
/// # Errors
/// The operating system's.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
