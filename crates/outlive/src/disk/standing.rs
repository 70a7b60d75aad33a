//! The standing of an image, by its sidecar and by what the arbiter knows: whether its VM may go on with it. What
//! follows from these facts is decided in `outlive_pair`, where the simulator decides it as well.

use std::path::Path;

use outlive_epoch::VmId;
use outlive_pair::{
    Danger, Differs, ImageArbiter, ImageEnd, ImageFacts, ImageRole, ImageStanding, SharedFacts, Won,
};

use super::provenance::{DangerKind, KnownArbiter};
use super::shared::Note;
use super::sidecar::{CopyEnd, Role, Sidecar, beside};
use crate::arbiter::{Arbiter, ArbiterError, Win};
use crate::process;

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

    /// What speaks against using the image in this place with this sidecar.
    pub(super) fn dangers(&self, sidecar: &Sidecar) -> Vec<Danger> {
        let (was, given) = (sidecar.disk, self.disk);
        // Earlier releases do not say how many there were, and some of their sidecars do not say which one this is.
        let place = sidecar.disks.filter(|_| was != given).map(|_| Danger::OtherPlace { was, given });
        let (had, given) = (sidecar.disks.unwrap_or(0), self.of);
        let missing = (usize::from(had) > given).then_some(Danger::Missing { had, given });
        place.into_iter().chain(missing).collect()
    }
}

/// How a host whose image is older protects the VM again.
fn join(image: &Path) -> String {
    format!(
        "to protect the VM, run `outlive standby ... --disk path={}` here (or `outlive run --or-standby ...`), which \
         brings the image up to date",
        image.display()
    )
}

/// How a danger is told to people, and accepted by them.
pub(super) trait Told {
    /// The option that accepts it.
    fn kind(&self) -> DangerKind;
    /// What is so, without a remedy.
    fn why(&self, image: &Path) -> String;
    /// One line with the remedy.
    fn refusal(&self, image: &Path) -> String;
    /// What was accepted, for the record.
    fn about(&self, vm: &str) -> String;
}

impl Told for Danger {
    fn kind(&self) -> DangerKind {
        match self {
            Self::Stale { .. } | Self::Released { .. } => DangerKind::StaleImage,
            Self::Replica { .. } => DangerKind::Replica,
            Self::OtherArbiter { .. } => DangerKind::OtherArbiter,
            Self::LostClaims { .. } => DangerKind::LostClaims,
            Self::NoArbiter { .. } => DangerKind::NoArbiter,
            Self::Moved(_) => DangerKind::MovedImage,
            Self::OtherPlace { .. } | Self::Missing { .. } => DangerKind::OtherDisks,
            Self::Elsewhere { .. } => DangerKind::SharedDisk,
        }
    }

    fn why(&self, image: &Path) -> String {
        let shown = image.display();
        match self {
            Self::Stale { generation, newest, owner } => {
                let owner = owner.as_ref().map_or_else(String::new, |owner| format!(", won by {owner}"));
                format!(
                    "the disk image {shown} is out of date: it has generation {generation} and its VM continued in \
                     generation {newest}{owner}"
                )
            }
            Self::Released { generation } => format!(
                "the disk image {shown} is out of date: its standby gave it up in generation {generation} and its VM \
                 continued without it"
            ),
            other => other.refusal(image),
        }
    }

    fn refusal(&self, image: &Path) -> String {
        let image_path = image;
        let (image, option) = (image.display(), self.kind().option());
        match self {
            Self::Stale { .. } | Self::Released { .. } => format!(
                "{}; {}; or start from the image of the host where the VM ran last; \
                 only if that one is lost for good, give up what happened since with {option}",
                self.why(image_path),
                join(image_path)
            ),
            Self::Replica { generation } => format!(
                "the disk image {image} is a standby's copy as of its last commit in generation {generation}, and the image of the host where the VM ran may be newer: start from that one, or, if it is lost for good, from this one with {option}"
            ),
            Self::OtherArbiter { known, given } => format!(
                "the disk image {image} belongs to a VM with another arbiter (id {known}; the given one has \
                 id {given}), and another host may have taken that VM over: give its arbiter; or, if that \
                 is lost for good and the VM runs nowhere, start with {option}"
            ),
            Self::LostClaims { by_hand: true, .. } => format!(
                "the disk image {image} has been a VM's, and with --arbiter manual a process that is started anew does \
                 not know whether that VM runs at another host: look there (`outlive status`); if it runs there, \
                 run `outlive standby ... --disk path={image}` here; if it runs nowhere and this is its newest image, start \
                 with {option}"
            ),
            Self::LostClaims { generation, highest, by_hand: false } => {
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
            Self::Elsewhere { generation, owner } => {
                let owner = owner.as_ref().map_or_else(|| "another host".to_owned(), String::clone);
                format!(
                    "the disk {image} is shared, and its VM may run at another host: {owner} had it last, in generation \
                     {generation}, and nothing says that the VM has ended there; to protect that VM, run `outlive standby` \
                     here; if it runs nowhere, start it on that host; or here with {option}"
                )
            }
        }
    }

    fn about(&self, vm: &str) -> String {
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
            Self::Elsewhere { generation, .. } => {
                format!("VM {vm}: a shared disk on which another host ran it in generation {generation}")
            }
        }
    }
}

/// Judges an image by its sidecar, by how its file differs from the one that the sidecar was written for, and by the
/// arbiter that was given.
///
/// # Errors
/// The arbiter's, with the remedy.
pub(super) fn judge(
    sidecar: &Sidecar,
    differs: Option<&Differs>,
    arbiter: Option<&mut (dyn Arbiter + 'static)>,
) -> Result<ImageStanding, ArbiterError> {
    let processes: Vec<String> = sidecar.claimants().map(str::to_owned).collect();
    let facts = ImageFacts {
        generation: sidecar.generation,
        role: sidecar.role.into(),
        end: sidecar.end.map(Into::into),
        arbiter: sidecar.provenance.arbiter.known(),
        processes: &processes,
        differs,
        by_hand: arbiter.as_ref().is_some_and(|arbiter| arbiter.is_a_person()),
    };
    let given = arbiter.as_ref().map(|arbiter| arbiter.identity().to_owned());
    facts.judge(given.as_deref(), || history(&sidecar.provenance.vm, &processes, arbiter))
}

/// Judges a shared disk by its note, and by the arbiter that was given. No process of this host has the disk.
///
/// # Errors
/// The arbiter's, with the remedy.
pub(super) fn judge_shared(
    note: &Note,
    arbiter: Option<&mut (dyn Arbiter + 'static)>,
) -> Result<ImageStanding, ArbiterError> {
    let facts = SharedFacts {
        generation: note.generation,
        arbiter: note.provenance.arbiter.known(),
        processes: &note.processes,
        over: note.over,
        here: note.machine == process::machine(),
        by_hand: arbiter.as_ref().is_some_and(|arbiter| arbiter.is_a_person()),
    };
    let given = arbiter.as_ref().map(|arbiter| arbiter.identity().to_owned());
    let mut standing =
        facts.judge(given.as_deref(), || history(&note.provenance.vm, &note.processes, arbiter))?;
    for danger in &mut standing.dangers {
        if let Danger::Elsewhere { owner, .. } = danger {
            owner.get_or_insert_with(|| format!("host {}", note.host));
        }
    }
    Ok(standing)
}

/// What the arbiter knows of a VM. It is asked only if one is given.
fn history(
    vm: &VmId,
    processes: &[String],
    arbiter: Option<&mut (dyn Arbiter + 'static)>,
) -> Result<Vec<Won<String>>, ArbiterError> {
    // A served arbiter tells other hosts no token, but what can be compared with one.
    let by_token = |mut win: Win| {
        if let Some(winner) = &mut win.winner
            && let Some(own) = processes.iter().find(|token| winner.is(token))
        {
            winner.process = own.clone();
        }
        win.into()
    };
    match arbiter {
        Some(arbiter) => Ok(arbiter.history(vm)?.into_iter().map(by_token).collect()),
        None => Ok(Vec::new()),
    }
}

impl KnownArbiter {
    fn known(&self) -> ImageArbiter<'_> {
        match self {
            Self::None => ImageArbiter::None,
            Self::Id(id) => ImageArbiter::Id(id),
            Self::Unsaid => ImageArbiter::Unsaid,
        }
    }
}

impl From<Role> for ImageRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Primary => Self::Primary,
            Role::Replica => Self::Replica,
        }
    }
}

impl From<ImageRole> for Role {
    fn from(role: ImageRole) -> Self {
        match role {
            ImageRole::Primary => Self::Primary,
            ImageRole::Replica => Self::Replica,
        }
    }
}

impl From<CopyEnd> for ImageEnd {
    fn from(end: CopyEnd) -> Self {
        match end {
            CopyEnd::Followed => Self::Followed,
            CopyEnd::Released => Self::Released,
        }
    }
}
