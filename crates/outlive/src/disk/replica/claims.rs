//! What a standby's disks will need from their file systems. It is claimed and tried before a primary is
//! accepted: afterwards the VM may be protected, and a full file system would be found too late.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use nix::unistd::geteuid;

use super::ReplicaDisk;
use crate::disk::apply::JOURNAL_BYTES;
use crate::disk::sidecar::{Sidecar, beside};
use crate::disk::sidecars::nobody_writes;

/// Why something cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    /// A thread of an earlier copy still writes.
    #[error("the .outlive files of the last copy are still being written; the standby tries again")]
    StillWritten,
    /// There is no journal, or no room for it.
    #[error("the standby cannot set {} MiB aside for the journal {}: {source}", JOURNAL_BYTES >> 20, .journal.display())]
    Journal { journal: PathBuf, source: io::Error },
    /// The file system of an image would be full before the image is.
    #[error(
        "no room for the VM's disks at the standby: the images on the file system of {} still need {} MiB for the holes \
         that they have, and {} MiB are free: make room there, or give --disk path=...,thin, if its file system or an operator sees to it \
         that there is room in time",
        .image.display(), .needed.div_ceil(MIB), .free / MIB
    )]
    Room { image: PathBuf, needed: u64, free: u64 },
    /// Nobody knows what room there is.
    #[error("cannot find out what room there is for {}: {source}", .image.display())]
    UnknownRoom { image: PathBuf, source: io::Error },
    /// A sidecar could not be written.
    #[error("the standby cannot write {}: {source}", .file.display())]
    Sidecar { file: PathBuf, source: io::Error },
}

const MIB: u64 = 1 << 20;

/// How long a claim waits while the sidecars of an earlier copy are being written.
const PATIENCE: Duration = Duration::from_secs(2);

/// A journal with the room that it usually needs.
pub(super) struct ClaimedJournal {
    /// Where it is.
    pub(super) path: PathBuf,
    /// The file. No sidecar names it, or it is empty.
    pub(super) file: File,
    /// Whether the claim made it.
    made: bool,
}

/// Claims a journal beside the first image that is written, if any, and tries to write sidecars.
///
/// # Errors
/// See [`ClaimError`].
pub(super) fn claim(disks: &[Option<ReplicaDisk>]) -> Result<Option<ClaimedJournal>, ClaimError> {
    let mut written = disks.iter().flatten().filter(|disk| !disk.read_only).peekable();
    let Some(first) = written.peek() else { return Ok(None) };
    // Held until the end: a writer of an earlier copy would take what is claimed here for its own.
    let _nobody_writes = nobody_writes(PATIENCE).ok_or(ClaimError::StillWritten)?;
    let journal = beside(&first.path, "journal");
    let claimed = ClaimedJournal::open(&journal).map_err(|source| ClaimError::Journal { journal, source })?;
    let probed = written.clone().try_for_each(|ReplicaDisk { path, .. }| {
        Sidecar::probe(path).map_err(|source| ClaimError::Sidecar { file: beside(path, "outlive"), source })
    });
    match probed.and_then(|()| room(written.filter(|disk| !disk.thin))) {
        Ok(()) => Ok(Some(claimed)),
        Err(why) => {
            claimed.give_up();
            Err(why)
        }
    }
}

/// Whether the file systems have room for what the images lack, now that the journal has its own. An image is as
/// large as the VM's disk; the guest may fill all of it, and after a takeover this host has nobody to leave the VM to.
fn room<'a>(written: impl Iterator<Item = &'a ReplicaDisk>) -> Result<(), ClaimError> {
    let mut file_systems = BTreeMap::<u64, (PathBuf, u64)>::new();
    for ReplicaDisk { path, bytes, .. } in written {
        let unknown = |source| ClaimError::UnknownRoom { image: path.clone(), source };
        let about = fs::metadata(path).map_err(unknown)?;
        // A block device has its room.
        if about.is_file() {
            let (_, needed) = file_systems.entry(about.dev()).or_insert_with(|| (path.clone(), 0));
            *needed += bytes.saturating_sub(about.blocks() * 512);
        }
    }
    for (image, needed) in file_systems.into_values().filter(|(_, needed)| *needed > 0) {
        let unknown = |errno: Errno| ClaimError::UnknownRoom { image: image.clone(), source: errno.into() };
        let about = statvfs(&image).map_err(unknown)?;
        let blocks = if geteuid().is_root() { about.blocks_free() } else { about.blocks_available() };
        let free = blocks.saturating_mul(about.fragment_size());
        if free < needed {
            return Err(ClaimError::Room { image, needed, free });
        }
    }
    Ok(())
}

impl ClaimedJournal {
    fn open(path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let mut options = OpenOptions::new();
        // What the guest writes is in it, whoever may read the folder.
        options.read(true).write(true).truncate(false).mode(0o600);
        let (file, made) = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (options.open(path)?, false),
            other => (other?, true),
        };
        let claimed = Self { path: path.to_path_buf(), file, made };
        match fallocate(&claimed.file, FallocateFlags::empty(), 0, JOURNAL_BYTES as i64) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
            Err(error) => {
                claimed.give_up();
                return Err(error.into());
            }
        }
        // Its name must last as long as the sidecars that name it.
        if let Err(error) = File::open(directory).and_then(|directory| directory.sync_all()) {
            claimed.give_up();
            return Err(error);
        }
        Ok(claimed)
    }

    /// Gives back a journal that was not needed. One that was there before stays: the sidecar of an image
    /// that is not here may name it.
    pub(super) fn give_up(self) {
        if self.made
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the journal");
        }
    }
}
