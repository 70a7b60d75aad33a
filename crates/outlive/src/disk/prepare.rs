//! Prepares images for use: brings what an earlier process left in a journal into them, and refuses those
//! that cannot be used.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use outlive_machine::{ImageError, LockedImage};
use outlive_pair::Differs;

use super::apply::recover;
use super::image::Store;
use super::journal::{Identity, Journal};
use super::sidecar::{Sidecar, SidecarError};
use super::start::{SidecarNotWritten, cannot_write};
use crate::cli::StandbyDisk;

/// How long a process that has just ended may still keep an image in use.
const RELEASED_AFTER: Duration = Duration::from_secs(2);

/// Why images cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    /// A sidecar cannot be read.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// A sidecar cannot be written.
    #[error(transparent)]
    Write(#[from] SidecarNotWritten),
    /// A synchronisation did not finish.
    #[error(
        "the disk image {0} is not whole, because its synchronisation was interrupted: give it to `outlive \
         standby` again, or restore it from a backup and run `outlive image accept {0}`"
    )]
    NotWhole(PathBuf),
    /// A standby's copy that nobody has finished is to be used read-only or shared.
    #[error(
        "the disk image {0} is an unfinished copy of a standby: give it to `outlive standby` or `outlive run` as a \
         disk that the VM writes to, or restore it from a backup and run `outlive image accept {0}`"
    )]
    Unfinished(PathBuf),
    /// One image is given for two disks.
    #[error("the disk image {0} is given twice: give each disk its own")]
    Twice(PathBuf),
    /// A sidecar names a journal that cannot be opened.
    #[error(
        "cannot open the journal {journal} of the disk images: {source}; put it back, or restore the images from a \
         backup and run `outlive image accept` on them"
    )]
    NoJournal { journal: PathBuf, source: io::Error },
    /// A journal, or an image that it is for, is damaged.
    #[error(
        "cannot replay the journal {journal}: {source}; restore the images from a backup and run `outlive image \
         accept` on them"
    )]
    Replay { journal: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    /// A journal has writes for an image that is not given.
    #[error("the journal {journal} also has writes for disk {disk}: give all disks of the VM")]
    MissingDisk { journal: PathBuf, disk: usize },
    /// A directory, a socket or the like.
    #[error("{0} is neither a file nor a block device: give a raw disk image")]
    NotDisk(PathBuf),
    /// A journal has writes for another file than the one that is there.
    #[error(
        "the disk image {image} is not the file that its sidecar was written for, and the journal {journal} still has \
         writes for that one: bring that file back; or, if this image is good as it is, run `outlive image accept {image}`",
        image = .image.display(), journal = .journal.display()
    )]
    Moved { image: PathBuf, journal: PathBuf },
    /// An image that must be there is not.
    #[error("the disk image {0} does not exist: correct the path")]
    Missing(PathBuf),
    /// There is no room for one block.
    #[error(
        "{image} has {bytes} bytes, less than one block, so it is no disk image: give another file, as large as the \
         primary's; a new one is made with `truncate -s SIZE NAME.img`"
    )]
    TooSmall { image: PathBuf, bytes: u64 },
    /// An image cannot be opened.
    #[error("{}", cannot_open(.image, .source))]
    Open { image: PathBuf, source: io::Error },
    /// Another program has the image.
    #[error("the disk image {0} is in use: stop the program that uses it")]
    InUse(PathBuf),
    /// Another process has a shared disk.
    #[error(
        "the shared disk {0} is in use by another process, here or at another host: if its VM runs there, protect it with \
         `outlive standby` here; else stop what uses the disk"
    )]
    SharedInUse(PathBuf),
    /// It is locked, and cannot be used nevertheless.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The file system refuses a lock.
    #[error("cannot lock the disk image {image}: {source}")]
    Lock { image: PathBuf, source: io::Error },
    /// A standby's images cannot be brought to their last commit, and an operator may give them up.
    #[error("{0}; or, if a primary has all of it, overwrite them with --disk path=...,overwrite")]
    OrOverwrite(#[source] Box<PrepareError>),
}

/// Checks the images that a VM will run on and replays their journals. `paths` are those that it writes to
/// and does not share; those that are `held` stay so. Call it before the machine has them.
///
/// # Errors
/// One line that names the remedy.
pub(crate) fn for_run(paths: &[&Path], held: &Held) -> Result<(), PrepareError> {
    // The machine reports a missing image, because it knows what the image is for.
    for path in paths.iter().filter(|path| held.at(path).is_none() && path.exists()) {
        check_unused(path)?;
    }
    let sidecars = read_sidecars(paths)?;
    for (path, sidecar) in paths.iter().zip(&sidecars) {
        let Some(sidecar) = sidecar else { continue };
        if !sidecar.whole {
            return Err(PrepareError::NotWhole(path.to_path_buf()));
        }
        // Its writes would go into the wrong file, and be missing in the right one.
        if let Some(journal) = &sidecar.journal
            && is_another(path)?
        {
            return Err(PrepareError::Moved { image: path.to_path_buf(), journal: journal.clone() });
        }
    }
    replay(paths, &sidecars, held)
}

/// Refuses an image that is used as it is, read-only or shared, if it is an unfinished copy of a standby.
///
/// # Errors
/// One line that names the remedy.
pub(crate) fn refuse_unfinished(paths: &[&Path]) -> Result<(), PrepareError> {
    for (path, sidecar) in paths.iter().zip(read_sidecars(paths)?) {
        match sidecar {
            Some(Sidecar { whole: true, journal: None, .. }) | None => {}
            Some(_) => return Err(PrepareError::Unfinished(path.to_path_buf())),
        }
    }
    Ok(())
}

/// Refuses a shared disk that another process has, where the file system has locks: on this host, and on others as far
/// as it carries locks there. A standby has one only while it has a copy of a VM.
///
/// # Errors
/// One line that names the remedy.
pub(crate) fn refuse_shared_in_use(paths: &[&Path]) -> Result<(), PrepareError> {
    for path in paths {
        // The machine reports what cannot be opened. A lock of all of a file needs a file that can be written on NFS.
        let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { continue };
        lock(path, || file.try_lock()).map_err(|error| match error {
            PrepareError::InUse(path) => PrepareError::SharedInUse(path),
            other => other,
        })?;
    }
    Ok(())
}

/// Checks the images of a standby and replays their journals. A journal that cannot be replayed now may be
/// replayable later, with all disks given or their file system mounted. It may be all that is left of what
/// was committed, so it is not given up unasked. Images that may be overwritten whatever they hold stay as
/// they are. Whether the others may be overwritten is decided when a primary connects.
///
/// # Errors
/// One line that names the remedy.
pub(crate) fn for_standby(disks: &[StandbyDisk]) -> Result<(), PrepareError> {
    let paths: Vec<&Path> = disks.iter().map(|disk| disk.path.as_path()).collect();
    for (at, path) in paths.iter().enumerate() {
        // A wrong path or an image in use is reported now, not when the first primary connects.
        check_unused(path)?;
        can_be_a_disk(path)?;
        let same = |other: &&&Path| std::fs::canonicalize(other).ok() == std::fs::canonicalize(path).ok();
        if paths[..at].iter().find(same).is_some() {
            return Err(PrepareError::Twice(path.to_path_buf()));
        }
    }
    let kept: Vec<&Path> =
        disks.iter().filter(|disk| !disk.overwrite).map(|disk| disk.path.as_path()).collect();
    let replayed = own_sidecars(&kept).and_then(|sidecars| replay(&kept, &sidecars, &Held::default()));
    replayed.map_err(|error| PrepareError::OrOverwrite(Box::new(error)))
}

/// The sidecars of those images that are still the files that they were written for.
fn own_sidecars(paths: &[&Path]) -> Result<Vec<Option<Sidecar>>, PrepareError> {
    let own = |path: &&Path| Ok(if is_another(path)? { None } else { Sidecar::read(path)? });
    paths.iter().map(own).collect()
}

/// Whether an image has a sidecar that was written for another file.
fn is_another(image: &Path) -> Result<bool, PrepareError> {
    let stamp = Sidecar::read_stamped(image)?.and_then(|(_, stamp)| stamp);
    Ok(stamp.is_some_and(|stamp| stamp.differs(image) == Some(Differs::File)))
}

fn read_sidecars(paths: &[&Path]) -> Result<Vec<Option<Sidecar>>, PrepareError> {
    paths.iter().map(|path| Ok(Sidecar::read(path)?)).collect()
}

/// Replays every journal that the sidecars name.
fn replay(paths: &[&Path], sidecars: &[Option<Sidecar>], held: &Held) -> Result<(), PrepareError> {
    let mut journals: Vec<&Path> = sidecars.iter().flatten().filter_map(|s| s.journal.as_deref()).collect();
    journals.sort_unstable();
    journals.dedup();
    journals.into_iter().try_for_each(|journal| replay_one(journal, paths, sidecars, held))
}

fn replay_one(
    path: &Path,
    paths: &[&Path],
    sidecars: &[Option<Sidecar>],
    held: &Held,
) -> Result<(), PrepareError> {
    let open_journal = || OpenOptions::new().read(true).write(true).open(path);
    let journal = || path.to_path_buf();
    let file = open_journal().map_err(|source| PrepareError::NoJournal { journal: journal(), source })?;
    let damaged = |source: Box<dyn std::error::Error + Send + Sync>| PrepareError::Replay {
        journal: journal(),
        source,
    };
    let (mut opened, durable) = Journal::open(file).map_err(|e| damaged(e.into()))?;
    if opened.replay(|_| Ok(())).map_err(|e| damaged(e.into()))?.is_none() {
        // The journal was emptied, but the process was killed before the last sidecar said so: the images
        // have all of it.
        let named =
            paths.iter().zip(sidecars).filter_map(|(image, sidecar)| Some((*image, sidecar.as_ref()?)));
        let named = named.filter(|(_, sidecar)| sidecar.journal.as_deref() == Some(path));
        // The sidecar of an image that was not given may still name the journal.
        let Identity { vm, sizes, .. } = opened.identity();
        let given = sidecars.iter().flatten().filter(|sidecar| {
            sidecar.provenance.vm == *vm && sizes.get(usize::from(sidecar.disk)).is_some_and(|size| *size > 0)
        });
        let all = given.count() == sizes.iter().filter(|size| **size > 0).count();
        return finish(all.then_some(path), durable, named);
    }
    let file = open_journal().map_err(|e| damaged(e.into()))?;
    let (opened, durable) = Journal::open(file).map_err(|e| damaged(e.into()))?;
    let identity = opened.identity().clone();
    let mut images = Vec::new();
    let mut mine = Vec::new();
    for (index, size) in identity.sizes.iter().enumerate() {
        if *size == 0 {
            images.push(None);
            continue;
        }
        let found = paths.iter().zip(sidecars).find_map(|(image, sidecar)| {
            let sidecar = sidecar.as_ref()?;
            let same = sidecar.journal.as_deref() == Some(path) && usize::from(sidecar.disk) == index;
            (same && sidecar.provenance.vm == identity.vm).then_some((*image, sidecar))
        });
        let (image, sidecar) =
            found.ok_or_else(|| PrepareError::MissingDisk { journal: journal(), disk: index })?;
        let file = held.open(image)?;
        let bytes = file.bytes().map_err(|e| damaged(e.into()))?;
        if bytes < *size {
            return Err(damaged(format!("{} has {bytes} bytes, but had {size}", image.display()).into()));
        }
        images.push(Some(file));
        mine.push((image, sidecar));
    }
    let checkpoint = recover(opened, durable, &images).map_err(|e| damaged(e.into()))?;
    tracing::info!(journal = %path.display(), checkpoint, "disk images brought to their last commit");
    finish(Some(path), checkpoint, mine.into_iter())
}

/// Writes into the sidecars that the images are at this checkpoint and need no journal. Removes the empty
/// journal if it is given.
fn finish<'a>(
    journal: Option<&Path>,
    checkpoint: u64,
    images: impl Iterator<Item = (&'a Path, &'a Sidecar)>,
) -> Result<(), PrepareError> {
    for (image, sidecar) in images {
        let sidecar = Sidecar { checkpoint, journal: None, ..sidecar.clone() };
        sidecar.write(image).map_err(|e| cannot_write(image, e))?;
    }
    if let Some(journal) = journal
        && let Err(error) = std::fs::remove_file(journal)
    {
        // The journal is empty, and no sidecar names it.
        tracing::warn!(journal = %journal.display(), %error, "cannot remove the journal");
    }
    Ok(())
}

/// Whether a disk can be kept in this file.
fn can_be_a_disk(path: &Path) -> Result<(), PrepareError> {
    let about = std::fs::metadata(path).map_err(|e| not_opened(path, e))?;
    let (image, kind) = (path.to_path_buf(), about.file_type());
    if !kind.is_file() && !kind.is_block_device() {
        return Err(PrepareError::NotDisk(image));
    }
    if kind.is_file() && about.len() < 512 {
        return Err(PrepareError::TooSmall { image, bytes: about.len() });
    }
    Ok(())
}

/// Refuses what is no disk image at all.
pub(super) fn is_an_image(path: &Path) -> Result<(), PrepareError> {
    let about = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => PrepareError::Missing(path.to_path_buf()),
        _ => not_opened(path, error),
    })?;
    let kind = about.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(PrepareError::NotDisk(path.to_path_buf()))
    }
}

/// Whether a program has the image for writing now, as far as this user may find out.
pub(super) fn is_in_use(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Whether an image exists and no VM runs on it. How it will be used is known only when the primary connects.
fn check_unused(path: &Path) -> Result<(), PrepareError> {
    let file = File::open(path).map_err(|error| not_opened(path, error))?;
    lock(path, || file.try_lock_shared())
}

fn not_opened(path: &Path, source: io::Error) -> PrepareError {
    PrepareError::Open { image: path.to_path_buf(), source }
}

pub(super) fn cannot_open(path: &Path, error: &io::Error) -> String {
    let image = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => {
            format!(
                "the disk image {image} does not exist: make one with `truncate -s SIZE {image}`, as large as the primary's"
            )
        }
        io::ErrorKind::PermissionDenied => {
            format!("no permission to open the disk image {image}: let this user read and write it")
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            format!("the disk image {image} is on a read-only file system: mount it for writing")
        }
        _ => format!("cannot open the disk image {image}: {error}"),
    }
}

/// The kernel keeps files open that a killed process used through io_uring, for some moments after the
/// process is gone. Tries again as long as an error says that.
fn when_released<T, E>(attempt: impl Fn() -> Result<T, E>, in_use: impl Fn(&E) -> bool) -> Result<T, E> {
    let deadline = Instant::now() + RELEASED_AFTER;
    loop {
        match attempt() {
            Err(error) if in_use(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

fn lock(path: &Path, attempt: impl Fn() -> Result<(), TryLockError>) -> Result<(), PrepareError> {
    match when_released(attempt, |error| matches!(error, TryLockError::WouldBlock)) {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(PrepareError::InUse(path.to_path_buf())),
        // Not every file system has locks.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(source)) => Err(PrepareError::Lock { image: path.to_path_buf(), source }),
    }
}

/// The images that this process may start a VM from, locked, so that no other process begins to use them. The VM's
/// machine gets the locks handed over: there is no moment between the first look at an image and the end of its VM in
/// which somebody else could take it.
#[derive(Default)]
pub(crate) struct Held(Vec<LockedImage>);

impl Held {
    /// Locks images. One that cannot be opened is somebody else's to complain about.
    ///
    /// # Errors
    /// One is in use.
    pub(crate) fn of<'a>(images: impl Iterator<Item = &'a Path>) -> Result<Self, PrepareError> {
        let mut held = Vec::new();
        for path in images {
            match when_released(|| LockedImage::open(path), |error| matches!(error, ImageError::InUse(_))) {
                Ok(image) => held.push(image),
                Err(ImageError::InUse(image)) => return Err(PrepareError::InUse(image)),
                Err(_) => {}
            }
        }
        Ok(Self(held))
    }

    /// The image at this path, if it is held.
    pub(crate) fn at(&self, path: &Path) -> Option<&LockedImage> {
        self.0.iter().find(|image| image.path() == path)
    }

    /// Opens an image for writing and locks it, unless it is held.
    fn open(&self, path: &Path) -> Result<File, PrepareError> {
        match self.at(path) {
            Some(image) => Ok(image.file()?),
            None => open(path),
        }
    }
}

/// Opens an image for writing and locks it.
pub(super) fn open(path: &Path) -> Result<File, PrepareError> {
    let file =
        OpenOptions::new().read(true).write(true).open(path).map_err(|error| not_opened(path, error))?;
    lock(path, || file.try_lock())?;
    Ok(file)
}
