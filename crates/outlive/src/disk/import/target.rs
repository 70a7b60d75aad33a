//! An image that is made: a file gets its name when it is whole and durable, and a block device its first bytes last.
//!
//! It goes where nothing is, or nothing but zeroes. What has data is overwritten only if an operator says so, and what
//! is a VM's never is.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, PosixFadviseAdvice, RenameFlags, posix_fadvise, renameat2};
use nix::libc;
use nix::unistd::geteuid;
use outlive_epoch::VmId;
use outlive_machine::{ImageError, LockedImage};

use super::super::blank::{self, Content};
use super::super::image::Store;
use super::super::overwrite;
use super::super::sidecar::beside;
use super::source::{self, Identity};

/// How long what is at the place is searched for data, apart from its ends.
const PATIENCE: Duration = Duration::from_secs(30);
/// So much of a block device is written last: whoever looks at it finds no disk before it is one.
pub(super) const HEAD: usize = 1 << 20;
/// What a file is called until it is whole.
const SUFFIX: &str = "importing";

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub(in crate::disk) enum TargetError {
    /// There is something.
    #[error(
        "{} has data (at byte {at}), and nothing is overwritten: give another path, or say --overwrite to lose what is \
         there",
        .path.display()
    )]
    HasData { path: PathBuf, at: u64 },
    /// A VM has or had it.
    #[error(
        "{} is a disk of VM {vm}, as {} says: give another path; if nobody needs that VM any more, remove both first",
        .path.display(), beside(.path, "outlive").display()
    )]
    OfAVm { path: PathBuf, vm: VmId },
    /// What is beside it cannot be read.
    #[error(transparent)]
    Beside(#[from] overwrite::OverwriteError),
    /// It is what is read.
    #[error("{} is the file that is imported: give another path", .0.display())]
    Itself(PathBuf),
    /// It is in use, or cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Another process makes it.
    #[error("{} is being made by another process: wait for it, or stop it", .0.display())]
    Busy(PathBuf),
    /// Something has the name that the image has until it is whole.
    #[error(
        "{} is in the way, and nothing says that an import has left it there: move it away, or give another path",
        .0.display()
    )]
    InTheWay(PathBuf),
    /// There is no such directory, for example.
    #[error("cannot make {}: {source}", .path.display())]
    Make { path: PathBuf, source: io::Error },
    /// The storage has no room, or fails.
    #[error("cannot write {}: {source}; {left}", .path.display())]
    Write { path: PathBuf, source: io::Error, left: &'static str },
    /// It was written and cannot be read.
    #[error("cannot read {} back: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    /// Something came there in the meantime.
    #[error("{} was made by somebody else in the meantime: nothing was changed; give another path", .0.display())]
    Appeared(PathBuf),
    /// A block device has its own length.
    #[error("{} is a block device of {bytes} bytes, and {needs} are needed: give a larger one", .path.display())]
    SmallDevice { path: PathBuf, bytes: u64, needs: u64 },
    /// A block device is as long as it is.
    #[error("{} is a block device, which is as long as it is: leave --size out", .0.display())]
    DeviceSize(PathBuf),
}

/// What was written when it failed.
const REMOVED: &str = "what was written is removed";
const PARTLY: &str = "a part was written, so once this is repaired repeat it with --overwrite";

/// An image that is being made. Unless it is kept, it is removed.
pub(super) struct Target {
    path: PathBuf,
    file: File,
    kind: Kind,
}

enum Kind {
    /// A file under another name. Its own is free, or is that of a file that is replaced.
    File {
        named: PathBuf,
        /// The file that is replaced, locked: no VM begins to use it meanwhile.
        replaces: Option<LockedImage>,
        is_kept: bool,
    },
    /// A block device, which is locked.
    Device {
        /// What is written last.
        head: Vec<u8>,
        /// Whether zeroes have to be written.
        has_data: bool,
        bytes: u64,
        _locked: LockedImage,
    },
}

impl Target {
    /// Opens what becomes the image at `path`, which is made of the files `from`.
    pub(super) fn open(path: &Path, from: &[Identity], overwrite: bool) -> Result<Self, TargetError> {
        let make = |source| TargetError::Make { path: path.to_owned(), source };
        let about = match fs::metadata(path) {
            Ok(about) => Some(about),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(make(error)),
        };
        if about.as_ref().is_some_and(|to| from.contains(&Identity::of(to))) {
            return Err(TargetError::Itself(path.to_owned()));
        }
        refuse_owned(path)?;
        let Some(about) = about else { return Self::file(path, from, None, None) };
        let locked = LockedImage::open(path)?;
        let file = locked.file()?;
        if from.contains(&Identity::of(&file.metadata().map_err(make)?)) {
            return Err(TargetError::Itself(path.to_owned()));
        }
        // An installer that has just begun has written nothing yet.
        if source::qemu_uses(&file) {
            return Err(ImageError::InUse(path.to_owned()).into());
        }
        let content = blank::scan(&file, PATIENCE).map_err(make)?;
        if let (Content::Data { at }, false) = (content, overwrite) {
            return Err(TargetError::HasData { path: path.to_owned(), at });
        }
        if about.file_type().is_block_device() {
            let bytes = file.bytes().map_err(make)?;
            let has_data = content != Content::Blank;
            let kind = Kind::Device { head: vec![0; HEAD], has_data, bytes, _locked: locked };
            return Ok(Self { path: path.to_owned(), file, kind });
        }
        // Of a link what it leads to is replaced, and the link stays.
        let path = fs::canonicalize(path).map_err(make)?;
        refuse_owned(&path)?;
        Self::file(&path, from, Some(&about), Some(locked))
    }

    /// A file beside its place, which nobody else writes. One that a killed process has left is taken.
    fn file(
        path: &Path,
        from: &[Identity],
        replaced: Option<&fs::Metadata>,
        replaces: Option<LockedImage>,
    ) -> Result<Self, TargetError> {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(SUFFIX);
        let named = PathBuf::from(name);
        let make = |source| TargetError::Make { path: named.clone(), source };
        loop {
            let open = |is_new| {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create_new(is_new).mode(0o600);
                options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&named)
            };
            let (file, is_new) = match open(true) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => match open(false) {
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    file => (file.map_err(make)?, false),
                },
                file => (file.map_err(make)?, true),
            };
            let opened = file.metadata().map_err(make)?;
            if !opened.is_file() {
                return Err(make(io::Error::other("it is no file: remove it")));
            }
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Err(TargetError::Busy(path.to_owned())),
                Err(TryLockError::Error(error)) if error.kind() != ErrorKind::Unsupported => {
                    return Err(make(error));
                }
                _ => {}
            }
            // Whoever had the lock may just have given the file its name, or removed it.
            if !fs::metadata(&named).is_ok_and(|there| there.ino() == opened.ino()) {
                continue;
            }
            if !is_new && !is_leftover(&named, &opened, from, replaced)? {
                return Err(TargetError::InTheWay(named));
            }
            let kind = Kind::File { named: named.clone(), replaces, is_kept: false };
            let target = Self { path: path.to_owned(), file, kind };
            target.file.set_len(0).map_err(make)?;
            if let Some(about) = replaced {
                fchown(&target.file, Some(about.uid()), Some(about.gid())).map_err(make)?;
                let mode = fs::Permissions::from_mode(about.mode() & 0o777);
                target.file.set_permissions(mode).map_err(make)?;
            }
            return Ok(target);
        }
    }

    /// Keeps a file to its owner, also where it replaces one that others may read.
    pub(super) fn close_to_others(&self) -> Result<(), TargetError> {
        if let Kind::File { named, .. } = &self.kind {
            let closed = self.file.set_permissions(fs::Permissions::from_mode(0o600));
            closed.map_err(|source| TargetError::Make { path: named.clone(), source })?;
        }
        Ok(())
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Begins a disk of `needs` bytes. Returns its length: a block device has its own.
    pub(super) fn begin(&self, needs: u64, is_asked_for: bool) -> Result<u64, TargetError> {
        let Kind::Device { bytes, .. } = self.kind else { return Ok(needs) };
        if is_asked_for {
            return Err(TargetError::DeviceSize(self.path.clone()));
        }
        if bytes < needs {
            return Err(TargetError::SmallDevice { path: self.path.clone(), bytes, needs });
        }
        // It is no disk any more, and not a new one yet.
        self.zero(0, bytes.min(HEAD as u64))?;
        Ok(bytes)
    }

    /// Writes data.
    pub(super) fn write(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), TargetError> {
        let mut offset = offset;
        if let Kind::Device { head, .. } = &mut self.kind
            && let Some(place) = usize::try_from(offset).ok().and_then(|at| head.get_mut(at..))
        {
            let (first, rest) = bytes.split_at(bytes.len().min(place.len()));
            place[..first.len()].copy_from_slice(first);
            offset += first.len() as u64;
            bytes = rest;
        }
        self.file.write_all_at(bytes, offset).map_err(|error| self.not_written(error))
    }

    /// Makes zero what is not yet.
    pub(super) fn zero(&self, offset: u64, length: u64) -> Result<(), TargetError> {
        match self.kind {
            Kind::Device { has_data: true, .. } if length > 0 => {
                self.file.zero(offset, length).map_err(|error| self.not_written(error))
            }
            _ => Ok(()),
        }
    }

    /// Makes durable what was written.
    pub(super) fn sync(&self) -> Result<(), TargetError> {
        self.file.sync_data().map_err(|error| self.not_written(error))
    }

    /// Makes the image `bytes` long and durable. `written` bytes of it are there.
    pub(super) fn finish(&mut self, written: u64, bytes: u64) -> Result<(), TargetError> {
        if matches!(self.kind, Kind::File { .. }) {
            self.file.set_len(bytes).map_err(|error| self.not_written(error))?;
        } else {
            // What was behind the disk, such as the copy of an old partition table, is none of its business.
            self.zero(written, bytes - written)?;
            self.sync()?;
        }
        if let Kind::Device { head, .. } = &self.kind {
            let length = head.len().min(bytes as usize);
            self.file.write_all_at(&head[..length], 0).map_err(|error| self.not_written(error))?;
        }
        self.file.sync_all().map_err(|error| self.not_written(error))
    }

    /// Has a block device begin with zeroes again, as it is no disk.
    pub(super) fn spoil(&self) {
        if let Kind::Device { bytes, .. } = self.kind {
            let zeroes = vec![0; HEAD.min(bytes as usize)];
            if let Err(error) = self.file.write_all_at(&zeroes, 0).and_then(|()| self.file.sync_all()) {
                tracing::warn!(path = %self.path.display(), %error, "the beginning of the bad disk cannot be removed");
            }
        }
    }

    /// Has what is read next come from the storage.
    pub(super) fn forget_cached(&self) {
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
    }

    /// Reads what was written.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TargetError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| TargetError::Read { path: self.path.clone(), source })
    }

    /// The first byte at or behind `offset` that may not be zero.
    pub(super) fn next_data(&self, offset: u64) -> Result<Option<u64>, TargetError> {
        Store::next_data(&self.file, offset)
            .map_err(|source| TargetError::Read { path: self.path.clone(), source })
    }

    /// Gives a file its name, durably.
    pub(super) fn keep(mut self) -> Result<(), TargetError> {
        let path = self.path.clone();
        let make = |source| TargetError::Make { path: path.clone(), source };
        if let Kind::File { named, replaces, is_kept } = &mut self.kind {
            let is_free = replaces.is_none();
            if let Some(replaced) = replaces {
                // It took long: another image may be there now, of a VM that has begun meanwhile.
                replaced.file()?;
            }
            refuse_owned(&path)?;
            let flags = if is_free { RenameFlags::RENAME_NOREPLACE } else { RenameFlags::empty() };
            match renameat2(AT_FDCWD, named.as_path(), AT_FDCWD, &path, flags) {
                Ok(()) => {}
                Err(Errno::EEXIST) => return Err(TargetError::Appeared(path)),
                // Not every file system can do both in one.
                Err(Errno::EINVAL) if is_free => rename_by_link(named, &path)?,
                Err(error) => return Err(make(error.into())),
            }
            *is_kept = true;
            let directory = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(directory).and_then(|it| it.sync_all()).map_err(make)?;
        }
        Ok(())
    }

    fn not_written(&self, source: io::Error) -> TargetError {
        let left = if matches!(self.kind, Kind::File { .. }) { REMOVED } else { PARTLY };
        TargetError::Write { path: self.path.clone(), source, left }
    }
}

/// Refuses to touch what is a VM's.
fn refuse_owned(path: &Path) -> Result<(), TargetError> {
    match overwrite::Target::owners(path, false)?.first() {
        Some(vm) => Err(TargetError::OfAVm { path: path.to_owned(), vm: *vm }),
        None => Ok(()),
    }
}

/// Whether the file `named`, which `about` is of, is what an import has left that was killed: of this user, or of the
/// one whose image was to be replaced, and nothing else to anybody.
fn is_leftover(
    named: &Path,
    about: &fs::Metadata,
    from: &[Identity],
    replaced: Option<&fs::Metadata>,
) -> Result<bool, TargetError> {
    let is_ours = about.uid() == geteuid().as_raw() || replaced.is_some_and(|it| it.uid() == about.uid());
    let is_read = from.contains(&Identity::of(about));
    Ok(is_ours && !is_read && about.nlink() == 1 && overwrite::Target::owners(named, false)?.is_empty())
}

/// Gives a file its name where a file system cannot rename and look in one: a second name does not replace anything.
fn rename_by_link(named: &Path, path: &Path) -> Result<(), TargetError> {
    let make = |source| TargetError::Make { path: path.to_owned(), source };
    match fs::hard_link(named, path) {
        Ok(()) => fs::remove_file(named).map_err(make),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(TargetError::Appeared(path.to_owned())),
        // It knows no second names either.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
            if path.exists() {
                return Err(TargetError::Appeared(path.to_owned()));
            }
            fs::rename(named, path).map_err(make)
        }
        Err(error) => Err(make(error)),
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Still locked, so it is no other process's.
        if let Kind::File { named, is_kept: false, .. } = &self.kind {
            fs::remove_file(named).ok();
        }
    }
}
