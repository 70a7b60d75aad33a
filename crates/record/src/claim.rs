//! Whether a directory may be a record, and who records there.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::places::{LOCK, create};

/// Why nothing can be recorded in a directory.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The operating system's word.
    #[error("cannot record in {}: {source}; give a directory of this host, with room for the VM's memory and disks", .record.display())]
    Read {
        /// The directory.
        record: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has something else.
    #[error("{} is not empty and no record: give a directory that the record has for itself", .0.display())]
    NotARecord(PathBuf),
    /// It is open to others.
    #[error("others may write to {}, where a VM's memory would be: chmod go-w {}", .0.display(), .0.display())]
    Open(PathBuf),
    /// Somebody else records there.
    #[error("another standby records in {}: give each its own directory", .0.display())]
    Held(PathBuf),
}

/// Looks whether this process could record there. It makes nothing, and needs no room.
///
/// # Errors
/// See [`ClaimError`].
pub fn check(record: &Path) -> Result<(), ClaimError> {
    match fs::metadata(record) {
        Ok(metadata) => look(record, &metadata, false).map(drop),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let parent = record.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
            match fs::metadata(parent) {
                Ok(parent) if parent.is_dir() => Ok(()),
                Ok(_) => Err(unread(record)(ErrorKind::NotADirectory.into())),
                Err(source) => Err(unread(record)(source)),
            }
        }
        Err(source) => Err(unread(record)(source)),
    }
}

/// Makes the directory, if it is not there, and claims it: nobody else records there while the file is open.
///
/// # Errors
/// See [`ClaimError`].
pub(crate) fn claim(record: &Path) -> Result<File, ClaimError> {
    match DirBuilder::new().mode(0o700).create(record) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(unread(record)(error)),
        _ => {}
    }
    let metadata = fs::metadata(record).map_err(unread(record))?;
    match look(record, &metadata, true)? {
        Some(lock) => Ok(lock),
        None => {
            let lock = create(&record.join(LOCK)).map_err(unread(record))?;
            lock.try_lock().map_err(|_| ClaimError::Held(record.to_owned()))?;
            Ok(lock)
        }
    }
}

/// Looks at a directory. Returns its lock, which is taken, or `None` if it is new.
fn look(record: &Path, metadata: &Metadata, to_write: bool) -> Result<Option<File>, ClaimError> {
    if !metadata.is_dir() {
        return Err(unread(record)(ErrorKind::NotADirectory.into()));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(ClaimError::Open(record.to_owned()));
    }
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let lock = File::options().read(true).write(to_write).custom_flags(flags).open(record.join(LOCK));
    let lock = match lock {
        Ok(lock) => lock,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut others = fs::read_dir(record).map_err(unread(record))?;
            // A file system of its own has this one.
            let other = others.any(|it| it.is_ok_and(|it| it.file_name() != "lost+found"));
            return if other { Err(ClaimError::NotARecord(record.to_owned())) } else { Ok(None) };
        }
        Err(source) => return Err(unread(record)(source)),
    };
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(fs::TryLockError::WouldBlock) => Err(ClaimError::Held(record.to_owned())),
        Err(fs::TryLockError::Error(source)) => Err(unread(record)(source)),
    }
}

fn unread(record: &Path) -> impl FnOnce(io::Error) -> ClaimError + use<> {
    let record = record.to_owned();
    move |source| ClaimError::Read { record, source }
}
