//! The file that is imported.

use std::cell::RefCell;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use outlive_images::{Files, OpenError, Source};

use super::ImportError;
use crate::disk::image::Store;

/// Opens what is imported, and what it names if that is allowed.
pub(super) struct Opened {
    may_be_named: bool,
    /// What was opened.
    read: RefCell<Vec<Identity>>,
}

impl Opened {
    pub(super) fn new(may_be_named: bool) -> Self {
        Self { may_be_named, read: RefCell::default() }
    }

    /// The files that were opened: none of them may become the target.
    pub(super) fn read(&self) -> Vec<Identity> {
        self.read.borrow().clone()
    }
}

/// Which file or block device something is, by whatever path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    File(u64, u64),
    Device(u64),
}

impl Identity {
    pub(super) fn of(about: &Metadata) -> Self {
        if about.file_type().is_block_device() {
            Self::Device(about.rdev())
        } else {
            Self::File(about.dev(), about.ino())
        }
    }
}

struct Disk {
    file: File,
    bytes: u64,
}

impl Files for Opened {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        let file = hold(path)?;
        self.read.borrow_mut().push(Identity::of(&file.metadata()?));
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

/// A program writes to the file.
#[derive(Debug, thiserror::Error)]
#[error("a program writes to it")]
struct InUse;

/// Opens a file and keeps VMs of this program from starting on it while it is read. Refuses one that a VM writes to now.
fn hold(path: &Path) -> io::Result<File> {
    let file = open(path)?;
    let is_locked = matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock));
    if is_locked || qemu_writes(&file) {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, InUse));
    }
    Ok(file)
}

/// Why an image is not opened: if because a program writes to one of its files, the remedy is another one.
pub(super) fn not_opened(error: OpenError) -> ImportError {
    match error {
        OpenError::Io { path, source } if source.get_ref().is_some_and(|why| why.is::<InUse>()) => {
            ImportError::InUse(path)
        }
        other => other.into(),
    }
}

/// The byte that QEMU locks in an image to which it may write (`RAW_LOCK_PERM_BASE` and `BLK_PERM_WRITE` there).
const WRITES: libc::off_t = 101;
/// All bytes that QEMU locks in an image that it uses, for writing or for reading: a hundred for what it does, and a
/// hundred for what it lets nobody else do.
const USES: (libc::off_t, libc::off_t) = (100, 200);

/// Whether a QEMU has the image for writing, as far as its file system tells.
fn qemu_writes(file: &File) -> bool {
    is_locked(file, WRITES, 1)
}

/// Whether a QEMU has the image at all, also for reading only: as what a VM's overlay is based on, for example.
pub(super) fn qemu_uses(file: &File) -> bool {
    is_locked(file, USES.0, USES.1)
}

fn is_locked(file: &File, from: libc::off_t, bytes: libc::off_t) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: from,
        l_len: bytes,
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
        let open = || {
            let files = Opened::new(false);
            outlive_images::Image::open(image.path(), &files).map_err(not_opened)
        };
        assert!(open().is_ok());
        let other = File::options().read(true).write(true).open(image.path()).unwrap();
        let mut lock = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: WRITES,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(matches!(open(), Err(ImportError::InUse(_))));
        assert!(qemu_uses(image.as_file()));
        lock.l_type = libc::F_UNLCK as libc::c_short;
        fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(open().is_ok() && !qemu_uses(image.as_file()));
        other.lock().unwrap();
        assert!(matches!(open(), Err(ImportError::InUse(_))));
    }

    #[test]
    fn only_files_and_devices_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [directory.path(), &pipe, Path::new("/dev/zero"), &directory.path().join("missing")] {
            assert!(Opened::new(true).open(path).is_err());
        }
    }
}
