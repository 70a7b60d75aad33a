//! Writes the files and directories of keys.
//!
//! A new directory is made beside its place and moved there when it is whole; a file is replaced at once. So whoever
//! reads keys finds old ones or new ones. What an attempt leaves that was killed is removed by the next one.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use super::ISSUED;
use super::ca;

/// What the names of new files and directories have before the number of their process.
const NEW: &str = "new-";
/// How long another command may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", .path.display())]
pub struct WriteError {
    /// The file or directory.
    pub path: PathBuf,
    /// The system's error.
    #[source]
    pub source: io::Error,
}

impl WriteError {
    fn of(path: &Path) -> impl Fn(io::Error) -> Self + Copy + '_ {
        |source| Self { path: path.to_owned(), source }
    }
}

/// Waits until no other command is at work in a directory of keys, and removes what one has left that was killed. The
/// directory is held until the file is dropped; `None`: there is none.
///
/// # Errors
/// The operating system's, `WouldBlock` if another command takes too long.
pub(super) fn hold(directory: &Path) -> io::Result<Option<File>> {
    let held = match File::open(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        held => held?,
    };
    let until = Instant::now() + PATIENCE;
    while let Err(error) = held.try_lock() {
        match error {
            // A file system without locks.
            fs::TryLockError::Error(_) => break,
            fs::TryLockError::WouldBlock if Instant::now() > until => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            fs::TryLockError::WouldBlock => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    let place = ca::place(directory);
    for folder in [directory.to_owned(), directory.join(ISSUED), place.join(ISSUED), place] {
        let left = fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path());
        left.filter(|file| is_new(file) && file.is_file()).for_each(|file| drop(fs::remove_file(file)));
    }
    Ok(Some(held))
}

/// Whether a file is one that was being written.
pub(super) fn is_new(file: &Path) -> bool {
    let extension = file.extension().and_then(|it| it.to_str());
    extension.and_then(|it| it.strip_prefix(NEW)).is_some_and(is_number)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The directory that has this file or directory.
pub(super) fn parent(place: &Path) -> &Path {
    place.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a directory that is whole from the first moment, for its owner alone.
pub(super) fn new_directory<E: From<WriteError>>(
    place: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let failed = WriteError::of(place);
    let parent = parent(place);
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let beginning = format!(".{name}.{NEW}");
    // Whatever the umask: who could write there could put other keys in the place of these.
    let new_parent = fs::DirBuilder::new().mode(0o755).create(parent).is_ok();
    remove_left(parent, &beginning);
    let beside = parent.join(format!("{beginning}{}", std::process::id()));
    let make = || -> Result<(), E> {
        let made = private_directory(&beside).and_then(|()| File::open(&beside)).map_err(failed)?;
        // Others see by the lock that somebody is at work there.
        let _ = made.try_lock();
        fill(&beside)?;
        Ok(made.sync_all().and_then(|()| fs::rename(&beside, place)).map_err(failed)?)
    };
    make().inspect_err(|_| {
        // There is nothing better to do about an error now.
        let _ = fs::remove_dir_all(&beside);
        if new_parent {
            let _ = fs::remove_dir(parent);
        }
    })?;
    sync(parent);
    Ok(())
}

/// Makes a directory for its owner alone, whatever the umask.
pub(super) fn private_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o700))
}

/// Removes directories that were being made when their process was killed.
fn remove_left(parent: &Path, beginning: &str) {
    for file in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = file.file_name();
        let is_left = name.to_str().and_then(|it| it.strip_prefix(beginning)).is_some_and(is_number)
            && file.metadata().is_ok_and(|it| it.is_dir() && it.uid() == geteuid().as_raw());
        let nobody = |path: &Path| File::open(path).is_ok_and(|it| it.try_lock().is_ok());
        if is_left && nobody(&file.path()) {
            let _ = fs::remove_dir_all(file.path());
        }
    }
}

/// Writes a new file, durably, with this mode whatever the umask.
pub(super) fn write(path: &Path, text: &str, mode: u32) -> Result<(), WriteError> {
    let failed = WriteError::of(path);
    let file = File::options().write(true).create_new(true).mode(mode).open(path);
    let mut file = file.map_err(failed)?;
    let mut fill = || {
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    fill().map_err(|error| {
        let _ = fs::remove_file(path);
        failed(error)
    })
}

/// Makes or replaces a file: whoever opens it gets the old one or the new one.
pub(super) fn replace(path: &Path, text: &str, mode: u32) -> Result<(), WriteError> {
    let new = path.with_extension(format!("{NEW}{}", std::process::id()));
    write(&new, text, mode)?;
    fs::rename(&new, path).map_err(|source| {
        let _ = fs::remove_file(&new);
        WriteError { path: path.to_owned(), source }
    })?;
    sync(parent(path));
    Ok(())
}

/// Makes the names in a directory durable. A file system that cannot, as some over a network, is no reason to undo what is
/// there already.
fn sync(directory: &Path) {
    if let Err(error) = File::open(directory).and_then(|it| it.sync_all()) {
        tracing::warn!(%error, "{} may be as it was after a loss of power", directory.display());
    }
}
