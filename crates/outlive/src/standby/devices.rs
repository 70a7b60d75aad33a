//! The devices of the VM that a primary introduced, and what this host makes of them. The primary's list
//! decides alone: no device is guessed from the kind of guest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use outlive_epoch::{DeviceInfo, DeviceKind, Hello, Wiring};
use outlive_machine::{BlockDevice, DiskOptions, GuestMemory, Machine, SectorSize};

use crate::arbiter::Arbiter;
use crate::cli::{StandbyDisk, StandbyOptions};
use crate::disk::{
    Accepted, Book, Books, Held, OverwriteError, PrepareError, Provenance, ReplicaDisk, Store, Target,
};
use crate::vm;

/// What a network card must be like, because the guest has seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Card {
    /// Queue pairs.
    pub(super) pairs: u16,
    /// How it is connected.
    pub(super) wiring: Wiring,
}

/// Which devices a machine must have, besides its disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// The network card, if there is one.
    pub(super) card: Option<Card>,
    /// A source of random numbers.
    pub(super) rng: bool,
    /// A console.
    pub(super) console: bool,
    /// A serial port.
    pub(super) serial: bool,
}

/// Why the VM's devices cannot be built here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PlanError {
    /// Another release has other devices, or another order of them.
    #[error(
        "this release builds no machine with these devices ({list}; {mac} network address): run the same release on both hosts"
    )]
    Unknown { list: String, mac: &'static str },
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
pub(super) fn plan(hello: &Hello, options: &StandbyOptions) -> Result<Plan, PlanError> {
    let plan = board(hello)?;
    if plan.card.is_some() && options.net.is_none() {
        return Err(PlanError::NoCard);
    }
    let (wanted, given) = (disks_of(hello).count(), options.disks.len());
    if wanted == given { Ok(plan) } else { Err(PlanError::Disks { wanted, given }) }
}

/// Checks that a machine of this release can have these devices in this order: a card, disks, and one of each
/// other kind.
fn board(hello: &Hello) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let mut last = None;
    for DeviceInfo { kind, queues, wiring, .. } in &hello.devices {
        let follows =
            last.is_none_or(|last| last < *kind as u8 || *kind == DeviceKind::Disk && last == *kind as u8);
        let fits = vm::fixed_queues(*kind).is_none_or(|fixed| fixed == *queues);
        if !follows || !fits {
            return Err(unknown(hello));
        }
        last = Some(*kind as u8);
        match kind {
            DeviceKind::Net => plan.card = Some(Card { pairs: *queues, wiring: *wiring }),
            DeviceKind::Disk => {}
            DeviceKind::Rng => plan.rng = true,
            DeviceKind::Console => plan.console = true,
            DeviceKind::Serial => plan.serial = true,
        }
    }
    if plan.card.is_some() == hello.mac.is_some() { Ok(plan) } else { Err(unknown(hello)) }
}

fn unknown(hello: &Hello) -> PlanError {
    let describe = |it: &DeviceInfo| format!("{:?} with {} queues", it.kind, it.queues);
    let list: Vec<String> = hello.devices.iter().map(describe).collect();
    let mac = if hello.mac.is_some() { "a" } else { "no" };
    PlanError::Unknown { list: list.join(", "), mac }
}

/// The VM's disks, in their order.
pub(super) fn disks_of(hello: &Hello) -> impl Iterator<Item = &DeviceInfo> {
    hello.devices.iter().filter(|device| device.kind == DeviceKind::Disk)
}

/// The guest has seen them, so this host's device may have others.
fn sectors(info: &DeviceInfo) -> SectorSize {
    if info.flags.large_sectors { SectorSize::Large } else { SectorSize::Small }
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
        let describe = |(info, disk): (&DeviceInfo, &StandbyDisk)| DiskOptions {
            readonly: info.flags.read_only,
            shared: info.flags.shared,
            serial: (!info.serial.is_empty()).then(|| info.serial.clone()),
            sectors: Some(sectors(info)),
            queues: info.queues,
            locked: self.held.at(&disk.path).cloned(),
            ..DiskOptions::new(&disk.path)
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

#[cfg(test)]
mod tests {
    use outlive_epoch::{GfnRange, Layout, Limits, VersionRange, VmId};

    use super::*;

    fn board_of(kinds: &[(DeviceKind, u16)], mac: bool) -> Result<Plan, PlanError> {
        board(&Hello {
            vm: VmId([1; 16]),
            generation: 1,
            vcpus: 1,
            memory_bytes: 64 << 20,
            layout: Layout::new(vec![GfnRange { start: 0, pages: 16384 }]).unwrap(),
            mac: mac.then_some([2; 6]),
            limits: Limits { max_pages: 1, max_state_bytes: 1, slots: 1, max_disk_bytes: 0 },
            firmware_bytes: 0,
            devices: kinds.iter().map(|(kind, queues)| DeviceInfo::new(*kind, *queues)).collect(),
            interval_us: 1000,
            dead_after_us: 500_000,
            name: String::new(),
            host: String::new(),
            tracker: String::new(),
            vendor: String::new(),
            arbiter: String::new(),
            lineage: Default::default(),
            versions: VersionRange::CURRENT,
            microcode: 0,
            vcpu: None,
            since: None,
        })
    }

    #[test]
    fn the_list_alone_says_what_is_built() {
        use DeviceKind::{Console, Disk, Net, Rng, Serial};
        assert_eq!(board_of(&[], false), Ok(Plan::default()));
        let card = |pairs| Some(Card { pairs, wiring: Wiring::default() });
        assert_eq!(board_of(&[(Net, 4)], true), Ok(Plan { card: card(4), ..Plan::default() }));
        let serial = Plan { serial: true, ..Plan::default() };
        assert_eq!(board_of(&[(Disk, 1), (Disk, 8), (Serial, 0)], false), Ok(serial));
        let all = [(Net, 1), (Disk, 1), (Rng, 1), (Console, 2), (Serial, 0)];
        let plan = Plan { card: card(1), rng: true, console: true, serial: true };
        assert_eq!(board_of(&all, true), Ok(plan));
        for (wrong, mac) in [
            (&[(Disk, 1), (Net, 1)][..], true),
            (&[(Net, 1), (Net, 1)], true),
            (&[(Rng, 1), (Rng, 1)], false),
            (&[(Serial, 0), (Console, 2)], false),
            (&[(Rng, 2)], false),
            (&[(Console, 1)], false),
            (&[(Serial, 1)], false),
            (&[(Net, 1)], false),
            (&[], true),
        ] {
            let refused = board_of(wrong, mac).unwrap_err().to_string();
            assert!(refused.contains("run the same release on both hosts"), "{refused}");
            assert_eq!(refused.lines().count(), 1);
        }
        assert_eq!(
            board_of(&[(Disk, 1), (Rng, 9)], true).unwrap_err().to_string(),
            "this release builds no machine with these devices (Disk with 1 queues, Rng with 9 queues; a network address): run the same release on both hosts"
        );
    }
}
