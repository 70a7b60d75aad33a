//! Prepares images for use: brings what an earlier process left in a journal into them, and refuses those
//! that cannot be used.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::apply::recover;
use super::image::Store;
use super::journal::{Identity, Journal};
use super::sidecar::Sidecar;
use super::start::cannot_write;
use crate::cli::StandbyDisk;

/// How long a process that has just ended may still keep an image in use.
const RELEASED_AFTER: Duration = Duration::from_secs(2);

/// Checks the images that a VM will run on and replays their journals. `paths` are those that it writes to
/// and does not share. Call it before the machine opens them.
///
/// # Errors
/// One line that names the remedy.
pub(crate) fn for_run(paths: &[&Path]) -> Result<(), String> {
    // The machine reports a missing image, because it knows what the image is for.
    for path in paths.iter().filter(|path| path.exists()) {
        look(path)?;
    }
    let sidecars = read_sidecars(paths)?;
    for (path, sidecar) in paths.iter().zip(&sidecars) {
        let Some(sidecar) = sidecar else { continue };
        if !sidecar.whole {
            return Err(not_whole(path));
        }
    }
    replay(paths, &sidecars)
}

/// The message for an image whose synchronisation did not finish.
pub(super) fn not_whole(image: &Path) -> String {
    let image = image.display();
    format!(
        "the disk image {image} is not whole, because its synchronisation was interrupted: give it to \
         `outlive standby` again, or restore it from a backup and run `outlive image accept {image}`"
    )
}

/// Refuses an image that is used as it is, read-only or shared, if it is an unfinished copy of a standby.
///
/// # Errors
/// One line that names the remedy.
pub(crate) fn refuse_unfinished(paths: &[&Path]) -> Result<(), String> {
    for (path, sidecar) in paths.iter().zip(read_sidecars(paths)?) {
        let image = path.display();
        match sidecar {
            Some(Sidecar { whole: true, journal: None, .. }) | None => {}
            Some(_) => {
                return Err(format!(
                    "the disk image {image} is an unfinished copy of a standby: give it to `outlive \
                     standby` or `outlive run` as a disk that the VM writes to, or restore it from a backup \
                     and run `outlive image accept {image}`"
                ));
            }
        }
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
pub(crate) fn for_standby(disks: &[StandbyDisk]) -> Result<(), String> {
    let paths: Vec<&Path> = disks.iter().map(|disk| disk.path.as_path()).collect();
    for (at, path) in paths.iter().enumerate() {
        // A wrong path or an image in use is reported now, not when the first primary connects.
        look(path)?;
        can_be_a_disk(path)?;
        let same = |other: &&&Path| std::fs::canonicalize(other).ok() == std::fs::canonicalize(path).ok();
        if paths[..at].iter().find(same).is_some() {
            return Err(format!("the disk image {} is given twice: give each disk its own", path.display()));
        }
    }
    let kept: Vec<&Path> =
        disks.iter().filter(|disk| !disk.overwrite).map(|disk| disk.path.as_path()).collect();
    let say = "or, if a primary has all of it, overwrite them with --disk path=...,overwrite";
    let sidecars = read_sidecars(&kept).map_err(|why| format!("{why}; {say}"))?;
    replay(&kept, &sidecars).map_err(|why| format!("{why}; {say}"))
}

fn read_sidecars(paths: &[&Path]) -> Result<Vec<Option<Sidecar>>, String> {
    paths.iter().map(|path| Sidecar::read(path).map_err(|e| e.to_string())).collect()
}

/// Replays every journal that the sidecars name.
fn replay(paths: &[&Path], sidecars: &[Option<Sidecar>]) -> Result<(), String> {
    let mut journals: Vec<&Path> = sidecars.iter().flatten().filter_map(|s| s.journal.as_deref()).collect();
    journals.sort_unstable();
    journals.dedup();
    journals.into_iter().try_for_each(|journal| replay_one(journal, paths, sidecars))
}

fn replay_one(path: &Path, paths: &[&Path], sidecars: &[Option<Sidecar>]) -> Result<(), String> {
    let place = path.display();
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| {
        format!(
            "cannot open the journal {place} of the disk images: {e}; put it back, or restore the \
        images from a backup and run `outlive image accept` on them"
        )
    })?;
    let unreadable = |e: &dyn std::fmt::Display| {
        format!(
            "cannot replay the journal {place}: {e}; restore the images from a backup and run `outlive \
             image accept` on them"
        )
    };
    let (mut journal, durable) = Journal::open(file).map_err(|e| unreadable(&e))?;
    if journal.replay(|_| Ok(())).map_err(|e| unreadable(&e))?.is_none() {
        // The journal was emptied, but the process was killed before the last sidecar said so: the images
        // have all of it.
        let named =
            paths.iter().zip(sidecars).filter_map(|(image, sidecar)| Some((*image, sidecar.as_ref()?)));
        let named = named.filter(|(_, sidecar)| sidecar.journal.as_deref() == Some(path));
        // The sidecar of an image that was not given may still name the journal.
        let Identity { vm, sizes, .. } = journal.identity();
        let given = sidecars.iter().flatten().filter(|sidecar| {
            sidecar.provenance.vm == *vm && sizes.get(usize::from(sidecar.disk)).is_some_and(|size| *size > 0)
        });
        let all = given.count() == sizes.iter().filter(|size| **size > 0).count();
        return finish(all.then_some(path), durable, named);
    }
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| unreadable(&e))?;
    let (journal, durable) = Journal::open(file).map_err(|e| unreadable(&e))?;
    let identity = journal.identity().clone();
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
        let (image, sidecar) = found.ok_or_else(|| {
            format!("the journal {place} also has writes for disk {index}: give all disks of the VM")
        })?;
        let file = open(image)?;
        let bytes = file.bytes().map_err(|e| unreadable(&e))?;
        if bytes < *size {
            return Err(unreadable(&format!("{} has {bytes} bytes, and had {size}", image.display())));
        }
        images.push(Some(file));
        mine.push((image, sidecar));
    }
    let checkpoint = recover(journal, durable, &images).map_err(|e| unreadable(&e))?;
    tracing::info!(journal = %place, checkpoint, "disk images brought to their last commit");
    finish(Some(path), checkpoint, mine.into_iter())
}

/// Writes into the sidecars that the images are at this checkpoint and need no journal. Removes the empty
/// journal if it is given.
fn finish<'a>(
    journal: Option<&Path>,
    checkpoint: u64,
    images: impl Iterator<Item = (&'a Path, &'a Sidecar)>,
) -> Result<(), String> {
    for (image, sidecar) in images {
        let sidecar = Sidecar { checkpoint, journal: None, ..sidecar.clone() };
        sidecar.write(image).map_err(|e| cannot_write(image, &e))?;
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
fn can_be_a_disk(path: &Path) -> Result<(), String> {
    let (image, about) = (path.display(), std::fs::metadata(path).map_err(|e| cannot_open(path, &e))?);
    let kind = about.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(format!("{image} is neither a file nor a block device: give a raw disk image"));
    }
    if kind.is_file() && about.len() < 512 {
        return Err(format!(
            "the disk image {image} has {} bytes, less than one block: make it as large as the primary's with `truncate -s SIZE {image}`",
            about.len()
        ));
    }
    Ok(())
}

/// Whether an image of this name exists.
pub(super) fn exists(path: &Path) -> Result<(), String> {
    std::fs::metadata(path).map(drop).map_err(|error| cannot_open(path, &error))
}

/// Whether an image exists and no VM runs on it. How it will be used is known only when the primary connects.
fn look(path: &Path) -> Result<(), String> {
    let file = File::open(path).map_err(|error| cannot_open(path, &error))?;
    lock(path, || file.try_lock_shared())
}

fn cannot_open(path: &Path, error: &io::Error) -> String {
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
/// process is gone.
fn lock(path: &Path, attempt: impl Fn() -> Result<(), TryLockError>) -> Result<(), String> {
    let image = path.display();
    let deadline = Instant::now() + RELEASED_AFTER;
    let mut locked = attempt();
    while matches!(locked, Err(TryLockError::WouldBlock)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
        locked = attempt();
    }
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(format!("the disk image {image} is in use: stop the program that uses it"))
        }
        // Not every file system has locks.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(error)) => Err(format!("cannot lock the disk image {image}: {error}")),
    }
}

/// Opens an image for writing and locks it.
pub(super) fn open(path: &Path) -> Result<File, String> {
    let file =
        OpenOptions::new().read(true).write(true).open(path).map_err(|error| cannot_open(path, &error))?;
    lock(path, || file.try_lock())?;
    Ok(file)
}
