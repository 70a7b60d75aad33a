//! The file that is imported.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use outlive_images::{Files, OpenError, Source};

use super::ImportError;
use crate::disk::image::Store;

/// Opens what is imported, and what it names if that is allowed.
pub(super) struct Opened {
    pub(super) may_be_named: bool,
}

struct Disk {
    file: File,
    bytes: u64,
}

impl Files for Opened {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        let file = open(path)?;
        let bytes = file.bytes()?;
        Ok(Box::new(Disk { file, bytes }))
    }

    fn may_be_named(&self) -> bool {
        self.may_be_named
    }
}

/// A pipe or a terminal would be waited for.
fn open(path: &Path) -> io::Result<File> {
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device"));
    }
    File::open(path)
}

impl Source for Disk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Store::next_data(&self.file, offset)
    }
}

/// Keeps VMs of this program from starting on the file while it is read. Refuses one that a VM writes to now.
pub(super) fn hold(path: &Path) -> Result<File, ImportError> {
    let failed = |source| OpenError::Io { path: path.to_owned(), source };
    let file = open(path).map_err(failed)?;
    let is_locked = matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock));
    if is_locked || qemu_writes(&file) {
        return Err(ImportError::InUse(path.to_owned()));
    }
    Ok(file)
}

/// The byte that QEMU locks in an image to which it may write (`RAW_LOCK_PERM_BASE` and `BLK_PERM_WRITE` there).
const WRITES: libc::off_t = 101;

/// Whether a QEMU has the image for writing, as far as its file system tells.
fn qemu_writes(file: &File) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: WRITES,
        l_len: 1,
        l_pid: 0,
    };
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock));
    asked.is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_a_vm_writes_to_is_refused() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        assert!(hold(image.path()).is_ok());
        let other = File::options().read(true).write(true).open(image.path()).unwrap();
        let mut lock = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: WRITES,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(matches!(hold(image.path()), Err(ImportError::InUse(_))));
        lock.l_type = libc::F_UNLCK as libc::c_short;
        fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        other.lock().unwrap();
        assert!(matches!(hold(image.path()), Err(ImportError::InUse(_))));
    }

    #[test]
    fn only_files_and_devices_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [directory.path(), &pipe, Path::new("/dev/zero"), &directory.path().join("missing")] {
            assert!(hold(path).is_err());
            assert!(Opened { may_be_named: true }.open(path).is_err());
        }
    }
}
