//! Files: written whole or not at all, and locked; directories.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

/// Replaces a file. After a power cut there is the old one or the new one.
///
/// # Errors
/// The operating system's; the old file is still there.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".new");
    let new = folder.join(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    })();
    written.inspect_err(|_| {
        // It may not have been made.
        let _ = fs::remove_file(&new);
    })
}

/// Opens a file to read it. Anything else in its place is refused: a pipe would hold up the node until somebody writes.
///
/// # Errors
/// The operating system's.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    regular(OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?)
}

fn regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"))
}

/// Takes the lock that a file stands for, as long as that is open. `None`: somebody has it. The file is removed only by who
/// has the lock, and while nobody else may want it, or two could have a lock each.
///
/// # Errors
/// The operating system's.
pub(crate) fn lock(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    // Whatever is in its place is neither followed nor waited for.
    let file = regular(options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(path)?)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Makes a directory for the node, unless it is there.
///
/// # Errors
/// The operating system's.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Keeps what one user has made in a directory from others who may write there, too.
///
/// # Errors
/// The operating system's.
pub(crate) fn protect_each(folder: &Path) -> io::Result<()> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let folder = OpenOptions::new().read(true).custom_flags(flags.bits()).open(folder)?;
    let mut rights = folder.metadata()?.permissions();
    if rights.mode() & 0o022 != 0 && rights.mode() & STICKY == 0 {
        rights.set_mode(rights.mode() | STICKY);
        folder.set_permissions(rights)?;
    }
    Ok(())
}

/// Only its owner removes or renames a file.
const STICKY: u32 = 0o1000;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_lock_is_a_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (folder.path().join("lock"), folder.path().join("elsewhere"));
        symlink(&elsewhere, &path).unwrap();
        lock(&path).unwrap_err();
        assert!(!elsewhere.exists(), "it was made where a link leads");
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        lock(&path).unwrap_err();
        fs::remove_file(&path).unwrap();
        let held = lock(&path).unwrap();
        assert!(held.is_some() && lock(&path).unwrap().is_none());
    }

    #[test]
    fn a_directory_of_many_keeps_each_one_s_files() {
        let folder = tempfile::tempdir().unwrap();
        let mode = || fs::metadata(folder.path()).unwrap().permissions().mode() & 0o7777;
        for (before, after) in [(0o755, 0o755), (0o775, 0o1775), (0o777, 0o1777), (0o1777, 0o1777)] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(before)).unwrap();
            protect_each(folder.path()).unwrap();
            assert_eq!(mode(), after);
        }
    }
}
