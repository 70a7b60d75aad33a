//! The host's end: an image file or a block device.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::config::{SECTOR, SectorSize};

/// Why an image cannot be used. Each message names the remedy.
#[derive(Debug, Error)]
pub enum ImageError {
    /// There is no such file.
    #[error("the disk image {} does not exist: make one with `truncate -s 10G {}`, or correct the path", .0.display(), .0.display())]
    Missing(PathBuf),
    /// This user may not open it.
    #[error("no permission to open the disk image {}: let this user read{} it", .path.display(), if *.readonly { "" } else { " and write" })]
    NoPermission {
        /// Path of the image.
        path: PathBuf,
        /// Whether it was to be opened for reading only.
        readonly: bool,
    },
    /// The file system, or the block device, cannot be written to.
    #[error("the disk image {} cannot be written to: give it to the guest with `readonly`", .0.display())]
    ReadOnly(PathBuf),
    /// A directory, a pipe, a terminal.
    #[error("{} is neither a file nor a block device: give the path of a raw disk image", .0.display())]
    Kind(PathBuf),
    /// The image is smaller than one sector.
    #[error("the disk image {} has {bytes} bytes, less than a sector of 512: make it larger with `truncate -s 10G {}`", .path.display(), .path.display())]
    TooSmall {
        /// Path of the image.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The image has no whole number of the sectors that were asked for.
    #[error("the disk image {} has {bytes} bytes, no multiple of {}: make it longer with `truncate -s {} {}`, or leave `sector` out", .path.display(), .size.bytes(), bytes.next_multiple_of(.size.bytes()), .path.display())]
    Length {
        /// Path of the image.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// Length of a sector.
        size: SectorSize,
    },
    /// Another VM, or a mount, uses it.
    #[error("the disk image {} is in use: stop the program that uses it, or, if it is meant to be shared, say `shared` in both", .0.display())]
    InUse(PathBuf),
    /// It was locked, and then another file was put in its place.
    #[error("the disk image {} was replaced while it was being looked at: start again", .0.display())]
    Replaced(PathBuf),
    /// Anything else.
    #[error("cannot open the disk image {}: {source}", .path.display())]
    Other {
        /// Path of the image.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// An image that is open for reading and writing, and locked: nobody else who follows the rules can use it, until this,
/// every clone of it and every [`Image`] made of it are gone. So whoever looks at an image before a machine uses it can
/// hand the lock over.
#[derive(Clone, Debug)]
pub struct LockedImage {
    file: Arc<File>,
    path: PathBuf,
}

impl LockedImage {
    /// Opens and locks `path`, without waiting for whoever has it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let file = open_and_lock(path, false, false)?;
        Ok(Self { file: Arc::new(file), path: path.into() })
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file once more. It keeps the lock, too.
    ///
    /// # Errors
    /// [`ImageError::Replaced`], or the process has too many open files.
    pub fn file(&self) -> Result<File, ImageError> {
        let other = |source| ImageError::Other { path: self.path.clone(), source };
        let (locked, there) = (self.file.metadata().map_err(other)?, fs::metadata(&self.path));
        let there = there.map_err(|error| open_error(&self.path, false, error))?;
        if (locked.dev(), locked.ino()) != (there.dev(), there.ino()) {
            return Err(ImageError::Replaced(self.path.clone()));
        }
        self.file.try_clone().map_err(other)
    }
}

/// An open image. If a file is not a whole number of sectors long, its last bytes are out of reach.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    sectors: u64,
    sector_size: SectorSize,
    readonly: bool,
}

impl Image {
    /// Opens `path`. Unless `shared`, nobody else who follows the rules can have it open at the same time: it
    /// is locked (`flock`), and a block device is opened exclusively.
    ///
    /// The guest sees sectors of size `sectors`; if not given, of 512 bytes, whatever the storage has: it must
    /// not change for the guest when the storage does.
    ///
    /// The kernel releases a file a moment after io_uring is done with it, so an image that seems to be in
    /// use is tried again for a tenth of a second.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(
        path: &Path,
        readonly: bool,
        shared: bool,
        sectors: Option<SectorSize>,
    ) -> Result<Self, ImageError> {
        let mut tries = 10;
        loop {
            match Self::try_open(path, readonly, shared, sectors) {
                Err(ImageError::InUse(_)) if tries > 0 => std::thread::sleep(Duration::from_millis(10)),
                result => return result,
            }
            tries -= 1;
        }
    }

    fn try_open(
        path: &Path,
        readonly: bool,
        shared: bool,
        sectors: Option<SectorSize>,
    ) -> Result<Self, ImageError> {
        Self::of(open_and_lock(path, readonly, shared)?, path, readonly, sectors)
    }

    /// An image that is open and locked already; `sectors` as for [`open`](Self::open).
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn of_locked(locked: &LockedImage, sectors: Option<SectorSize>) -> Result<Self, ImageError> {
        Self::of(locked.file()?, locked.path(), false, sectors)
    }

    fn of(
        mut file: File,
        path: &Path,
        readonly: bool,
        sectors: Option<SectorSize>,
    ) -> Result<Self, ImageError> {
        // The metadata of a block device lack its length.
        let end = file.seek(SeekFrom::End(0));
        let bytes = end.map_err(|source| ImageError::Other { path: path.into(), source })?;
        if bytes < SECTOR {
            return Err(ImageError::TooSmall { path: path.into(), bytes });
        }
        // Not those of a block device: the VM's hosts may store its disk on different ones, and a guest that
        // starts with other sectors sees another disk.
        let sector_size = sectors.unwrap_or(SectorSize::Small);
        if sector_size == SectorSize::Large && !bytes.is_multiple_of(sector_size.bytes()) {
            return Err(ImageError::Length { path: path.into(), bytes, size: sector_size });
        }
        Ok(Self { file, path: path.into(), sectors: bytes / SECTOR, sector_size, readonly })
    }

    /// The open file, for threads that read parts of it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the disk as the guest sees it.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// The size of the sectors that the guest sees.
    pub fn sector_size(&self) -> SectorSize {
        self.sector_size
    }

    /// Length of the disk in units of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it was opened for reading only.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Fills `buffer` with the bytes at `offset`.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// Opens an image. Nobody else has it then, or only others that share it or read it as well.
fn open_and_lock(path: &Path, readonly: bool, shared: bool) -> Result<File, ImageError> {
    let kind = fs::metadata(path).map_err(|error| open_error(path, readonly, error))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::Kind(path.into()));
    }
    let exclusive = kind.is_block_device() && !readonly && !shared;
    let file = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .custom_flags(if exclusive { libc::O_EXCL } else { 0 })
        .open(path)
        .map_err(|error| open_error(path, readonly, error))?;
    let locked = if readonly || shared { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ImageError::InUse(path.into())),
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
            tracing::debug!(path = %path.display(), "the file system of the disk image has no locks");
        }
        Err(TryLockError::Error(source)) => return Err(ImageError::Other { path: path.into(), source }),
    }
    Ok(file)
}

fn open_error(path: &Path, readonly: bool, error: io::Error) -> ImageError {
    let path = path.to_path_buf();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ImageError::Missing(path),
        Some(libc::EACCES | libc::EPERM) => ImageError::NoPermission { path, readonly },
        Some(libc::EROFS) => ImageError::ReadOnly(path),
        Some(libc::EBUSY) => ImageError::InUse(path),
        _ => ImageError::Other { path, source: error },
    }
}
