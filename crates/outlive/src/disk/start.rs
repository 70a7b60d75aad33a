//! From images to the VM that is started on them: which VM it is, in which generation, and what other hosts
//! may no longer go on with.
//!
//! An image with a sidecar belongs to a VM, and that VM goes on: the same id, the next generation. So a
//! standby that lost its primary and only now reaches the arbiter cannot go on with the VM as well, and an
//! older image of the VM can be recognised.
//!
//! An operator may accept a danger. Where that gives up a part of the VM's line, or nobody can say whether it
//! does, a *new* VM begins, with the image's VM as its ancestor. Generations of one VM are a line without
//! forks; images of the part that was given up then belong to a different VM, and no standby overwrites them
//! unasked.
//!
//! The order in [`Start::carry_out`] makes a power cut at any point harmless: see the comments.

use std::io;
use std::path::{Path, PathBuf};

use outlive_epoch::{Ancestor, Lineage, VmId};
use outlive_pair::{Danger, ImageRole, ImageStanding};

use super::provenance::{Accepted, DangerKind, KnownArbiter, Provenance};
use super::shared::{Note, NoteError, is_noted_here_only};
use super::sidecar::{Role, Sidecar, SidecarError, beside, now};
use super::standing::{Given, Told, judge, judge_shared};
use crate::arbiter::{self, Arbiter, Claim};
use crate::process;

/// The name of a VM to which nobody has given one.
const UNNAMED: &str = "vm";

/// An image with its sidecar and standing.
struct Known {
    path: PathBuf,
    /// Of a shared disk, what its note says.
    sidecar: Sidecar,
    standing: ImageStanding,
    note: Option<Note>,
}

/// Why no VM starts from images.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// A sidecar cannot be read.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// A sidecar cannot be written.
    #[error(transparent)]
    Write(#[from] SidecarNotWritten),
    /// The note of a shared disk cannot be read.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The note of a shared disk cannot be written.
    #[error(
        "cannot write down that this host uses the shared disk {image}: {source}; let this user write files beside it"
    )]
    NoteNotWritten { image: PathBuf, source: io::Error },
    /// Nobody has written down who uses a shared disk, and other hosts could not read it.
    #[error(
        "the disk {} is shared, and this host has no note of a VM that uses it, so another host may run one on it now: \
         to protect that VM, run `outlive standby` here; if no host uses the disk, begin a new VM on it with {option}",
        .0.display(), option = DangerKind::SharedDisk.option()
    )]
    Unnoted(PathBuf),
    /// Two hosts begin at the same time.
    #[error("another host has just begun a VM on the shared disk {}: look there (`outlive status`)", .0.display())]
    JustBegun(PathBuf),
    /// An image has a danger that the operator has not accepted.
    #[error("{}", .danger.refusal(.image))]
    Danger { image: PathBuf, danger: Danger },
    /// The images are of several VMs.
    #[error(
        "the disk images {} and {} belong to different VMs ({} and {}): give the disks of one VM, or make a new VM \
         of them with {}",
        .images[0].display(), .images[1].display(), .vms[0], .vms[1], DangerKind::ForeignImage.option()
    )]
    ForeignImage { images: [PathBuf; 2], vms: [VmId; 2] },
    /// The arbiter does not answer.
    #[error(
        "the arbiter cannot say whether the disk image {image} is up to date: {why}; try again when it can"
    )]
    Unknown { image: PathBuf, why: String },
    /// The arbiter does not answer for a VM without an earlier one.
    #[error("the arbiter cannot be used: {0}")]
    Arbiter(String),
    /// Another host was faster.
    #[error("{owner} has just taken over the VM of the disk image {image}: use the image of that host")]
    TakenOver { owner: String, image: PathBuf },
    /// The random id of the new VM is taken.
    #[error("the arbiter says that this new VM belongs to {0}: start again")]
    NotNew(String),
    /// The host has no random numbers.
    #[error("this host has no random numbers: {0}")]
    NoRandom(#[source] io::Error),
}

impl StartError {
    /// Whether another host has the VM, by the word of the arbiter.
    pub(crate) fn tells_of_another_host(&self) -> bool {
        let stale = |danger: &Danger| danger.kind() == DangerKind::StaleImage;
        matches!(self, Self::TakenOver { .. }) || matches!(self, Self::Danger { danger, .. } if stale(danger))
    }
}

/// A sidecar could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}; let this user write there", beside(.image, "outlive").display())]
pub(crate) struct SidecarNotWritten {
    image: PathBuf,
    source: io::Error,
}

/// A VM that is about to be started.
pub(crate) struct Start {
    /// The VM, with the arbiter that it will have.
    pub(crate) provenance: Provenance,
    /// The generation that it runs in; 1 without an arbiter.
    pub(crate) generation: u64,
    known: Vec<Known>,
    /// Disks that both hosts write to.
    shared: Vec<PathBuf>,
    /// A new VM begins with these images.
    forks: bool,
    /// Generations of VMs that end here.
    ends: Vec<(VmId, u64)>,
    accepted: Vec<Accepted>,
}

impl Start {
    /// Decides which VM starts from `images`: those that it writes to and does not share, with their positions among
    /// all disks; and from `shared` disks, which no process of this host has. Without a `name` it keeps the one that it
    /// has. Changes nothing.
    ///
    /// # Errors
    /// One line with the remedy for the first danger that is not accepted.
    pub(crate) fn plan(
        images: &[(u16, &Path)],
        shared: &[&Path],
        mut arbiter: Option<&mut (dyn Arbiter + 'static)>,
        name: Option<&str>,
        accept: &[DangerKind],
    ) -> Result<Self, StartError> {
        let mut known = Vec::new();
        let mut accepted = Vec::new();
        // Its note says more of a disk that was shared until now than a sidecar from before that.
        let mut noted = Vec::new();
        for given in Given::all(images) {
            let path = given.image;
            if let Some(note) = Note::read(path)? {
                noted.push((path, note));
                continue;
            }
            let Some((sidecar, stamp)) = Sidecar::read_stamped(path)? else { continue };
            let differs = stamp.and_then(|stamp| stamp.differs(path));
            let mut standing = judge(&sidecar, differs.as_ref(), arbiter.as_deref_mut())
                .map_err(|why| StartError::Unknown { image: path.to_path_buf(), why: why.to_string() })?;
            standing.dangers.extend(given.dangers(&sidecar));
            let known_image = Known { path: path.to_path_buf(), sidecar, standing, note: None };
            accepted.extend(known_image.accepted(accept)?);
            known.push(known_image);
        }
        for path in shared {
            match Note::read(path)? {
                Some(note) => noted.push((path, note)),
                // Images that are the VM's newest say so of the VM, and so of all its disks.
                None if !known.is_empty() || !is_noted_here_only(path) => {}
                None if accept.contains(&DangerKind::SharedDisk) => {
                    let about = format!("a new VM on the shared disk {}", path.display());
                    accepted.push(record(DangerKind::SharedDisk, about));
                }
                None => return Err(StartError::Unnoted(path.to_path_buf())),
            }
        }
        let certain = known.iter().all(|it| it.standing.dangers.is_empty());
        let own = known.first().map(|it| it.sidecar.provenance.vm).filter(|_| certain);
        for (path, note) in noted.into_iter().filter(|(_, note)| own != Some(note.provenance.vm)) {
            let standing = judge_shared(&note, arbiter.as_deref_mut())
                .map_err(|why| StartError::Unknown { image: path.to_path_buf(), why: why.to_string() })?;
            let sidecar = Sidecar::primary(&note.provenance, note.generation, None);
            let disk = Known { path: path.to_path_buf(), sidecar, standing, note: Some(note) };
            accepted.extend(disk.accepted(accept)?);
            known.push(disk);
        }
        if let Some((one, other)) = strangers(&known) {
            if !accept.contains(&DangerKind::ForeignImage) {
                return Err(StartError::ForeignImage {
                    images: [one.path.clone(), other.path.clone()],
                    vms: [one.sidecar.provenance.vm, other.sidecar.provenance.vm],
                });
            }
            let (one, other) = (&one.sidecar.provenance.vm, &other.sidecar.provenance.vm);
            accepted.push(record(DangerKind::ForeignImage, format!("VMs {one} and {other}")));
        }
        let shared = shared.iter().map(|path| path.to_path_buf()).collect();
        Self::of(known, shared, arbiter.map(|arbiter| arbiter.identity().to_owned()), name, accepted)
    }

    fn of(
        known: Vec<Known>,
        shared: Vec<PathBuf>,
        arbiter: Option<String>,
        name: Option<&str>,
        mut accepted: Vec<Accepted>,
    ) -> Result<Self, StartError> {
        accepted.dedup();
        let foreign = strangers(&known).is_some();
        let forks = foreign || known.iter().flat_map(|it| &it.standing.dangers).any(Danger::forks);
        let (vm, lineage, generation) = match known.first() {
            Some(first) if !forks => {
                let next = first.standing.next();
                (first.sidecar.provenance.vm, first.sidecar.provenance.lineage.clone(), next)
            }
            _ => (new_vm().map_err(StartError::NoRandom)?, lineage(&known), 1),
        };
        let ends = if forks { ends(&known) } else { Vec::new() };
        let generation = if arbiter.is_some() { generation } else { 1 };
        let arbiter = arbiter.map_or(KnownArbiter::None, KnownArbiter::Id);
        let old_name = known.first().map(|first| first.sidecar.provenance.name.as_str());
        let name = name.or_else(|| old_name.filter(|name| !name.is_empty())).unwrap_or(UNNAMED).to_owned();
        let provenance = Provenance { vm, name, arbiter, lineage };
        Ok(Self { provenance, generation, known, shared, forks, ends, accepted })
    }

    /// The newest generation, if a takeover by an earlier process of this host won it and did not come to its end:
    /// then nobody knows whether the lost primary was fenced off. A sidecar says that its image is the VM's own
    /// only after that. The same if another host had a shared disk last. Ask before [`Start::carry_out`], which says so.
    pub(crate) fn unfenced(&self) -> Option<u64> {
        let won = |it: &Known| it.sidecar.role == Role::Replica && it.standing.role == ImageRole::Primary;
        let elsewhere = |it: &Known| it.standing.dangers.iter().any(|it| it.kind() == DangerKind::SharedDisk);
        self.known.iter().find(|it| won(it) || elsewhere(it)).map(|it| it.standing.generation)
    }

    /// Whether no image says that the VM has run before.
    pub(crate) fn is_new(&self) -> bool {
        self.known.is_empty()
    }

    /// The VM, those of the images, and their ancestors.
    pub(crate) fn vms(&self) -> impl Iterator<Item = VmId> {
        let of_images = self.known.iter().map(|it| it.sidecar.provenance.vm);
        let ancestors = self.provenance.lineage.ancestors().iter().map(|it| it.vm);
        std::iter::once(self.provenance.vm).chain(of_images).chain(ancestors)
    }

    /// What was accepted for this start.
    pub(crate) fn accepted(&self) -> &[Accepted] {
        &self.accepted
    }

    /// Makes the images the VM's, and wins its generation. Call it last, because what is won stays won.
    /// `disks` are all images that the VM writes to, with their positions.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) fn carry_out(
        &self,
        disks: &[(u16, PathBuf)],
        mut arbiter: Option<&mut (dyn Arbiter + 'static)>,
    ) -> Result<(), StartError> {
        let process = arbiter::process_token().map_err(StartError::NoRandom)?;
        if self.forks {
            // First, no other host may go on with the old VMs. After a power cut here the images are only
            // older than before.
            if let Some(arbiter) = arbiter.as_deref_mut() {
                self.end_earlier_vms(arbiter)?;
            }
            // Then the images belong to a new VM, which the arbiter does not know yet.
            let provenance = Provenance { arbiter: KnownArbiter::None, ..self.provenance.clone() };
            self.write(disks, &provenance, 0, process)?;
        } else {
            // What this process is about to win belongs to these images, whatever happens between the win and
            // the next sidecar.
            for Known { path, sidecar, standing, note } in &self.known {
                if let Some(note) = note {
                    // What other hosts have won is not this one's.
                    if note.machine == process::machine() {
                        let note = Note { generation: standing.generation, ..note.handed_to(process) };
                        note.write(path).map_err(|e| note_not_written(path, e))?;
                    }
                    continue;
                }
                let (generation, role) = (standing.generation, standing.role.into());
                let mut intent = Sidecar { generation, role, ..sidecar.handed_to(process) };
                if !standing.had_by_processes {
                    intent.earlier.clear();
                }
                intent.write(path).map_err(|e| cannot_write(path, e))?;
            }
            if self.known.is_empty() {
                self.begin_notes()?;
            }
        }
        match arbiter {
            Some(arbiter) => {
                self.win(arbiter)?;
                self.write(disks, &self.provenance, self.generation, process)?;
                arbiter.tidy(&self.provenance.vm);
            }
            // A VM without an arbiter writes no sidecar beside images that had none.
            None if !self.known.is_empty() => self.write(disks, &self.provenance, 0, process)?,
            None => self.write_notes(&self.provenance, 0)?,
        }
        Ok(())
    }

    /// Of two hosts that begin a VM on the same shared disk at the same time, one is refused.
    fn begin_notes(&self) -> Result<(), StartError> {
        for path in &self.shared {
            let provenance = Provenance { arbiter: KnownArbiter::None, ..self.provenance.clone() };
            let begun = Note::here(&provenance, 0).and_then(|note| note.begin(path));
            begun.map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => StartError::JustBegun(path.clone()),
                _ => note_not_written(path, error),
            })?;
        }
        Ok(())
    }

    fn write_notes(&self, provenance: &Provenance, generation: u64) -> Result<(), StartError> {
        for path in &self.shared {
            let written = Note::here(provenance, generation).and_then(|note| note.write(path));
            written.map_err(|e| note_not_written(path, e))?;
        }
        Ok(())
    }

    /// Wins the generations with which others could go on: each is the one after the newest that was read,
    /// not after the newest now, which may have been won since.
    fn end_earlier_vms(&self, arbiter: &mut dyn Arbiter) -> Result<(), StartError> {
        for (vm, generation) in &self.ends {
            match arbiter.claim(vm, *generation, &arbiter::owner("primary, started anew")) {
                Claim::Won => {}
                Claim::Lost { owner } => return Err(self.taken_over(owner)),
                Claim::Unreachable { why } => return Err(self.unknown(why)),
            }
        }
        Ok(())
    }

    fn win(&self, arbiter: &mut dyn Arbiter) -> Result<(), StartError> {
        match arbiter.claim(&self.provenance.vm, self.generation, &arbiter::owner("primary")) {
            Claim::Won => Ok(()),
            Claim::Lost { owner } if self.known.is_empty() => Err(StartError::NotNew(owner)),
            Claim::Lost { owner } => Err(self.taken_over(owner)),
            Claim::Unreachable { why } if self.known.is_empty() => Err(StartError::Arbiter(why)),
            Claim::Unreachable { why } => Err(self.unknown(why)),
        }
    }

    fn taken_over(&self, owner: String) -> StartError {
        StartError::TakenOver { owner, image: self.first_image() }
    }

    fn unknown(&self, why: String) -> StartError {
        StartError::Unknown { image: self.first_image(), why }
    }

    fn first_image(&self) -> PathBuf {
        self.known.first().map(|known| known.path.clone()).unwrap_or_default()
    }

    fn write(
        &self,
        disks: &[(u16, PathBuf)],
        provenance: &Provenance,
        generation: u64,
        process: &str,
    ) -> Result<(), StartError> {
        // The release before knows no shared disks, and must read what stays.
        let known = |it: &&Accepted| it.danger != DangerKind::SharedDisk;
        for (disk, path) in disks {
            let accepted = self.accepted.iter().filter(known).cloned().collect();
            let fresh = Sidecar::primary(provenance, generation, Some(process));
            let sidecar = Sidecar { disk: *disk, disks: u16::try_from(disks.len()).ok(), accepted, ..fresh };
            sidecar.write(path).map_err(|e| cannot_write(path, e))?;
            // It is no shared disk any more.
            Note::remove(path).map_err(|e| note_not_written(path, e))?;
        }
        self.write_notes(provenance, generation)
    }
}

impl Known {
    /// The record of the dangers that are accepted.
    fn accepted(&self, accept: &[DangerKind]) -> Result<Vec<Accepted>, StartError> {
        let of = |danger: &Danger| {
            if !accept.contains(&danger.kind()) {
                return Err(StartError::Danger { image: self.path.clone(), danger: danger.clone() });
            }
            Ok(record(danger.kind(), danger.about(&self.sidecar.provenance.vm.to_string())))
        };
        self.standing.dangers.iter().map(of).collect()
    }
}

impl Sidecar {
    /// The sidecar of an image that a VM runs on or is about to run on, with the token of a process if there
    /// is one.
    pub(super) fn primary(provenance: &Provenance, generation: u64, process: Option<&str>) -> Self {
        Self {
            provenance: provenance.clone(),
            generation,
            role: Role::Primary,
            whole: true,
            end: None,
            checkpoint: 0,
            disk: 0,
            disks: None,
            journal: None,
            process: process.map(str::to_owned),
            earlier: Vec::new(),
            accepted: Vec::new(),
        }
    }
}

/// An entry for the record, with this time and host.
pub(super) fn record(danger: DangerKind, about: String) -> Accepted {
    Accepted { danger, at: now(), host: process::host_name(), about }
}

pub(super) fn cannot_write(image: &Path, source: io::Error) -> SidecarNotWritten {
    SidecarNotWritten { image: image.to_path_buf(), source }
}

fn note_not_written(image: &Path, source: io::Error) -> StartError {
    StartError::NoteNotWritten { image: image.to_path_buf(), source }
}

pub(super) fn new_vm() -> io::Result<VmId> {
    Ok(VmId(process::random()?))
}

/// Two images of different VMs, if there are any.
fn strangers(known: &[Known]) -> Option<(&Known, &Known)> {
    let first = known.first()?;
    let vm = first.sidecar.provenance.vm;
    known.iter().find(|other| other.sidecar.provenance.vm != vm).map(|other| (first, other))
}

/// The lineage of a VM that begins with these images: their VMs up to what all of the images have, then the
/// ancestors of those.
fn lineage(known: &[Known]) -> Lineage {
    let nearest =
        known.iter().map(|it| Ancestor { vm: it.sidecar.provenance.vm, through: it.standing.generation });
    let farther = known.iter().flat_map(|it| it.sidecar.provenance.lineage.ancestors().iter().copied());
    Lineage::new(nearest.chain(farther))
}

/// The generations after the newest of the images' VMs, where the arbiter knows them.
fn ends(known: &[Known]) -> Vec<(VmId, u64)> {
    let mut ends: Vec<(VmId, u64)> =
        known.iter().filter_map(|it| Some((it.sidecar.provenance.vm, it.standing.ending()?))).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}
