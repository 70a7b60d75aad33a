//! The standing of an image, by its sidecar and by what the arbiter knows: whether its VM may go on with it.

use std::path::Path;

use super::provenance::{DangerKind, KnownArbiter};
use super::sidecar::{CopyEnd, Role, Sidecar, beside};
use super::stamp::{Differs, Stamp};
use crate::arbiter::{Arbiter, ArbiterError, Win};

/// What speaks against starting a VM from an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Danger {
    /// The VM ran in a newer generation, elsewhere.
    Stale { generation: u64, newest: u64, owner: Option<String> },
    /// The standby gave the image up, and the VM continued without it.
    Released { generation: u64 },
    /// It is a copy as of the last commit.
    Replica { generation: u64 },
    /// The image knows another arbiter than the one that was given.
    OtherArbiter { known: String, given: String },
    /// The arbiter knows less of the VM than the image does.
    LostClaims { generation: u64, highest: Option<u64> },
    /// The image knows an arbiter (perhaps not which), and none was given.
    NoArbiter { known: Option<String> },
    /// The image is not the file that its sidecar was written for.
    Moved(Differs),
    /// The image was another one of the VM's disks.
    OtherPlace { was: u16, given: u16 },
    /// The VM had more disks.
    Missing { had: u16, given: usize },
}

/// One of the images that a VM is to start from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given<'a> {
    /// Its position among the VM's disks.
    pub(crate) disk: u16,
    /// The image.
    pub(crate) image: &'a Path,
    /// How many images are given.
    pub(crate) of: usize,
}

impl<'a> Given<'a> {
    /// Images with their positions.
    pub(crate) fn all(images: &'a [(u16, &'a Path)]) -> impl Iterator<Item = Self> + use<'a> {
        images.iter().map(|&(disk, image)| Self { disk, image, of: images.len() })
    }

    /// What speaks against using the image in this place with a sidecar that has this stamp.
    pub(super) fn dangers(&self, sidecar: &Sidecar, stamp: Option<&Stamp>) -> Vec<Danger> {
        let moved = stamp.and_then(|stamp| stamp.differs(self.image)).map(Danger::Moved);
        let (was, given) = (sidecar.disk, self.disk);
        // Earlier releases do not say how many there were, and some of their sidecars do not say which one this is.
        let place = sidecar.disks.filter(|_| was != given).map(|_| Danger::OtherPlace { was, given });
        let (had, given) = (sidecar.disks.unwrap_or(0), self.of);
        let missing = (usize::from(had) > given).then_some(Danger::Missing { had, given });
        moved.into_iter().chain(place).chain(missing).collect()
    }
}

impl Danger {
    pub(super) fn kind(&self) -> DangerKind {
        match self {
            Self::Stale { .. } | Self::Released { .. } => DangerKind::StaleImage,
            Self::Replica { .. } => DangerKind::Replica,
            Self::OtherArbiter { .. } => DangerKind::OtherArbiter,
            Self::LostClaims { .. } => DangerKind::LostClaims,
            Self::NoArbiter { .. } => DangerKind::NoArbiter,
            Self::Moved(_) => DangerKind::MovedImage,
            Self::OtherPlace { .. } | Self::Missing { .. } => DangerKind::OtherDisks,
        }
    }

    /// One line with the remedy.
    pub(super) fn refusal(&self, image: &Path) -> String {
        let image_path = image;
        let (image, option) = (image.display(), self.kind().option());
        match self {
            Self::Stale { generation, newest, owner } => {
                let owner = owner.as_ref().map_or_else(String::new, |owner| format!(", won by {owner}"));
                format!(
                    "the disk image {image} is out of date: it has generation {generation} and its VM \
                     continued in generation {newest}{owner}; start from the image of the host that has \
                     that generation, or give up what happened since with {option}"
                )
            }
            Self::Released { generation } => format!(
                "the disk image {image} is out of date: its standby gave it up in generation {generation} \
                 and its VM continued without it; start from the image of the host where it ran, or give up \
                 what happened since with {option}"
            ),
            Self::Replica { generation } => format!(
                "the disk image {image} is a standby's copy as of its last commit in generation {generation}, and the image of the host where the VM ran may be newer: start from that one, or, if it is lost for good, from this one with {option}"
            ),
            Self::OtherArbiter { known, given } => format!(
                "the disk image {image} belongs to a VM with another arbiter (id {known}; the given one has \
                 id {given}), and another host may have taken that VM over: give its arbiter; or, if that \
                 is lost for good and the VM runs nowhere, start with {option}"
            ),
            Self::LostClaims { generation, highest } => {
                let what = match highest {
                    None => "does not know the VM".to_owned(),
                    Some(highest) => format!("knows generation {highest} but not generation {generation}"),
                };
                format!(
                    "the arbiter {what} of the disk image {image}: the arbiter was emptied or is an old \
                     copy, and another host may have taken the VM over; bring the right arbiter back; or, \
                     if the VM runs nowhere, start with {option}"
                )
            }
            Self::NoArbiter { known } => {
                let id = known.as_ref().map_or_else(String::new, |id| format!(" (id {id})"));
                format!(
                    "the disk image {image} belongs to a VM with an arbiter{id}, and another host may have \
                     taken that VM over: give the arbiter with --arbiter; or, if the VM runs nowhere, start \
                     without it with {option}"
                )
            }
            Self::Moved(differs) => format!(
                "the disk image {image} is not the file that {} was written for: {differs}, so nobody knows whether \
                 it has the VM's newest state; bring that file back; or, if this is the VM's newest state and no \
                 other copy of it runs, start with {option}",
                beside(image_path, "outlive").display()
            ),
            Self::OtherPlace { was, given } => format!(
                "the disk image {image} was disk {was} of its VM and is given as disk {given}: give the disks in \
                 their order; or, if the guest is to see them like this, start with {option}"
            ),
            Self::Missing { had, given } => format!(
                "the disk image {image} belongs to a VM that writes to {had} disks, and {given} are given: give all \
                 of them; or, if the guest does without the others from now on, start with {option}"
            ),
        }
    }

    /// What was accepted, for the record.
    pub(super) fn about(&self, vm: &str) -> String {
        match self {
            Self::Stale { generation, newest, owner } => {
                let owner = owner.as_ref().map_or_else(String::new, |owner| format!(", won by {owner},"));
                format!("VM {vm}: generation {newest}{owner} is given up for generation {generation}")
            }
            Self::Released { generation } => {
                format!("VM {vm}: what came after the copy of generation {generation} is given up")
            }
            Self::Replica { generation } => {
                format!("VM {vm}: the primary's image of generation {generation} is given up")
            }
            Self::OtherArbiter { known, given } => {
                format!("VM {vm}: arbiter {given} in place of {known}")
            }
            Self::LostClaims { generation, .. } => {
                format!("VM {vm}: an arbiter that does not know generation {generation}")
            }
            Self::NoArbiter { .. } => format!("VM {vm}: no arbiter"),
            Self::Moved(differs) => format!("VM {vm}: another file in the image's place: {differs}"),
            Self::OtherPlace { was, given } => format!("VM {vm}: disk {was} becomes disk {given}"),
            Self::Missing { had, given } => format!("VM {vm}: {given} of its {had} disks"),
        }
    }
}

/// The standing of an image; see the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// The generation of the image: that of its sidecar, or the newest that its process has won since.
    pub(super) generation: u64,
    /// What the image is in that generation.
    pub(super) role: Role,
    /// The newest generation that the given arbiter knows of the image's VM, if it is the VM's.
    pub(super) highest: Option<u64>,
    /// Everything that speaks against it.
    pub(super) dangers: Vec<Danger>,
}

impl Standing {
    /// Judges a sidecar with the arbiter that was given.
    ///
    /// # Errors
    /// The arbiter's, with the remedy.
    pub(super) fn of(
        sidecar: &Sidecar,
        arbiter: Option<&mut (dyn Arbiter + 'static)>,
    ) -> Result<Self, ArbiterError> {
        let Sidecar { provenance, generation, role, .. } = sidecar;
        let unasked = |danger: Option<Danger>| Self {
            generation: *generation,
            role: *role,
            highest: None,
            dangers: danger.into_iter().collect(),
        };
        let mut standing = match (&provenance.arbiter, arbiter) {
            (KnownArbiter::None, None) => unasked(None),
            (KnownArbiter::Id(id), None) => unasked(Some(Danger::NoArbiter { known: Some(id.clone()) })),
            (KnownArbiter::Unsaid, None) => unasked(Some(Danger::NoArbiter { known: None })),
            (KnownArbiter::Id(known), Some(arbiter)) if known != arbiter.identity() => {
                let given = arbiter.identity().to_owned();
                unasked(Some(Danger::OtherArbiter { known: known.clone(), given }))
            }
            (_, Some(arbiter)) => Self::asked(sidecar, arbiter)?,
        };
        if standing.role == Role::Replica && sidecar.end.is_none() {
            standing.dangers.push(Danger::Replica { generation: standing.generation });
        }
        Ok(standing)
    }

    fn asked(sidecar: &Sidecar, arbiter: &mut dyn Arbiter) -> Result<Self, ArbiterError> {
        let Sidecar { provenance, generation, role, end, .. } = sidecar;
        let history = arbiter.history(&provenance.vm)?;
        let (newest, highest) = (history.last(), history.last().map(|win| win.generation));
        // A process that wins a generation keeps its images. It may have died before their sidecars said so.
        let own = |win: &&Win| {
            win.winner.as_ref().is_some_and(|winner| sidecar.claimants().any(|token| winner.is(token)))
        };
        let won = history.iter().rev().find(own).map(|win| win.generation).filter(|won| won > generation);
        let (generation, role) = won.map_or((*generation, *role), |won| (won, Role::Primary));
        let mut dangers = Vec::new();
        match highest {
            Some(highest) if highest > generation => {
                let owner = newest.and_then(|win| win.winner.as_ref()).map(|winner| winner.owner.clone());
                dangers.push(Danger::Stale { generation, newest: highest, owner });
            }
            Some(highest) if highest == generation && *end == Some(CopyEnd::Released) && won.is_none() => {
                dangers.push(Danger::Released { generation });
            }
            Some(highest) if highest == generation => {}
            None if provenance.arbiter == KnownArbiter::None => {}
            _ => dangers.push(Danger::LostClaims { generation, highest }),
        }
        Ok(Self { generation, role, highest, dangers })
    }
}
