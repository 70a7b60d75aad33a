//! The devices of the VM that a primary introduced ([`Board`]), on what this standby was given for them: its card's tap and
//! its images.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use outlive_epoch::{DeviceInfo, Hello};
use outlive_machine::{BlockDevice, DiskOptions, GuestMemory, Machine};

use crate::arbiter::Arbiter;
use crate::cli::{StandbyDisk, StandbyOptions};
use crate::disk::{
    Accepted, Book, Books, Held, OverwriteError, PrepareError, Provenance, ReplicaDisk, Store, Target,
};
use crate::vm::{self, Board, UnknownDevices, disks_of};

/// Why the VM's devices cannot be built here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PlanError {
    /// Another release has other devices, or another order of them.
    #[error("{0}: run the same release on both hosts")]
    Unknown(#[from] UnknownDevices),
    /// This standby has no network for the card.
    #[error("the VM has a network card, but this standby has none: give it --net tap=NAME")]
    NoCard,
    /// This standby has images for fewer disks, or for more.
    #[error(
        "the VM has {wanted} disk{}, but this standby has {given}: give it --disk path=FILE for each, in the \
         primary's order",
        if *.wanted == 1 { "" } else { "s" }
    )]
    Disks { wanted: usize, given: usize },
}

/// Why this host's images cannot be the VM's disks.
#[derive(Debug, thiserror::Error)]
pub(super) enum DisksError {
    /// An image is too small, or too large.
    #[error("disk {disk} has {there} bytes at the primary and {} has {here}: {}", .image.display(), size_remedy(.image, *.there, *.here))]
    Size { disk: u16, image: PathBuf, there: u64, here: u64 },
    /// The system has no descriptor left.
    #[error("{}: {source}", .image.display())]
    File { image: PathBuf, source: io::Error },
    /// Another process has an image.
    #[error(transparent)]
    Held(#[from] PrepareError),
    /// An image may be the only copy of something else.
    #[error(transparent)]
    Overwrite(#[from] OverwriteError),
}

/// The guest sees whole sectors of an image.
const SECTOR: u64 = 512;

/// One that is longer may be another server's: what would be cut off is gone.
fn size_remedy(image: &Path, there: u64, here: u64) -> String {
    let is_device = fs::metadata(image).is_ok_and(|about| about.file_type().is_block_device());
    let image = image.display();
    match (is_device, here < there) {
        (false, true) => format!("make it as large with `truncate -s {there} {image}`"),
        (false, false) => format!("is it the right image? Give an empty one of {there} bytes"),
        (true, true) => format!("make it as large, a logical volume with `lvextend -L {there}b {image}`"),
        (true, false) => format!(
            "is it the right one? Make a logical volume as large with `lvreduce -L {there}b {image}`; of any device, give \
             the part that `losetup --find --show --sizelimit {there} {image}` names, at every start"
        ),
    }
}

/// What to build, if this host has everything that it needs.
///
/// # Errors
/// See [`PlanError`].
pub(super) fn plan(hello: &Hello, options: &StandbyOptions) -> Result<Board, PlanError> {
    let board = Board::of(hello)?;
    if board.card.is_some() && options.net.is_none() {
        return Err(PlanError::NoCard);
    }
    let (wanted, given) = (disks_of(hello).count(), options.disks.len());
    if wanted == given { Ok(board) } else { Err(PlanError::Disks { wanted, given }) }
}

/// The images that are the VM's on this host, found to be fit and locked, so their contents stay as they are.
pub(super) struct Images {
    held: Held,
    /// What the operator's word accepted, disk by disk.
    accepted: Vec<Option<Accepted>>,
}

impl Images {
    /// Locks the images and finds out whether they are as large as the primary's and may be overwritten: before a card
    /// joins a bridge, because a standby that refuses is asked again and again.
    ///
    /// # Errors
    /// See [`DisksError`].
    pub(super) fn check(
        hello: &Hello,
        options: &StandbyOptions,
        provenance: &Provenance,
        arbiter: &mut (dyn Arbiter + 'static),
    ) -> Result<Self, DisksError> {
        let own = |info: &DeviceInfo| !info.flags.shared && !info.flags.read_only;
        let given = || disks_of(hello).zip(&options.disks);
        let held = Held::of(given().filter(|(info, _)| own(info)).map(|(_, disk)| disk.path.as_path()))?;
        let mut accepted = Vec::new();
        for ((info, disk), number) in given().zip(0..) {
            let path = &disk.path;
            let failed = |source| DisksError::File { image: path.clone(), source };
            let file = match held.at(path) {
                Some(image) => image.file().map_err(PrepareError::Image)?,
                None => {
                    File::open(path).map_err(|source| PrepareError::Open { image: path.clone(), source })?
                }
            };
            let (there, here) = (info.size, file.bytes().map_err(failed)? / SECTOR * SECTOR);
            if here != there {
                return Err(DisksError::Size { disk: number, image: path.clone(), there, here });
            }
            let target = Target { path, file: &file, overwrite: disk.overwrite };
            accepted.push(match own(info) {
                true => target.check(provenance, hello.generation, arbiter)?,
                false => None,
            });
        }
        Ok(Self { held, accepted })
    }

    /// The VM's disks on them.
    pub(super) fn options(&self, hello: &Hello, options: &StandbyOptions) -> Vec<DiskOptions> {
        let describe = |(info, disk): (&DeviceInfo, &StandbyDisk)| {
            let locked = self.held.at(&disk.path).cloned();
            vm::as_introduced(info, DiskOptions { locked, ..DiskOptions::new(&disk.path) })
        };
        disks_of(hello).zip(&options.disks).map(describe).collect()
    }

    /// What the disks' thread works on, once the machine has them.
    ///
    /// # Errors
    /// See [`DisksError`].
    pub(super) fn replicas(
        self,
        machine: &Machine,
        hello: &Hello,
        options: &StandbyOptions,
        books: &Books,
    ) -> Result<Vec<Option<ReplicaDisk>>, DisksError> {
        let mut disks = Vec::new();
        let given = disks_of(hello).zip(&options.disks).zip(self.accepted);
        for (disk, ((info, given), accepted)) in machine.disks().iter().zip(given) {
            let Some(mut replica) = replica_disk(disk, info)? else {
                disks.push(None);
                continue;
            };
            (replica.thin, replica.accepted) = (given.thin, accepted);
            if !replica.read_only {
                replica.book = books.open(&replica.path, &replica.file, replica.bytes);
            }
            disks.push(Some(replica));
        }
        Ok(disks)
    }
}

/// An image that is as large as the primary's, as the machine sees it; `None` for one that both hosts share.
fn replica_disk(
    disk: &BlockDevice<GuestMemory>,
    info: &DeviceInfo,
) -> Result<Option<ReplicaDisk>, DisksError> {
    let (image, bytes) = (disk.image(), disk.capacity_bytes());
    let path = image.path().to_path_buf();
    if bytes != info.size {
        let (there, here) = (info.size, bytes);
        return Err(DisksError::Size { disk: disk.index(), image: path, there, here });
    }
    if info.flags.shared {
        return Ok(None);
    }
    let file = image.file().try_clone().map_err(|source| DisksError::File { image: path.clone(), source })?;
    let book = Book::none();
    let read_only = info.flags.read_only;
    Ok(Some(ReplicaDisk { path, file, bytes, read_only, accepted: None, thin: false, book }))
}
