//! Whether a standby may overwrite an image with the disk of the VM that a primary introduces.
//!
//! It overwrites unasked an empty image and what the VM's own line has: an older image of the same VM, or of
//! one that it descends from. Everything else may be the only copy of something and is left alone, unless an
//! operator has said `overwrite`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outlive_epoch::VmId;
use outlive_pair::Differs;

use super::blank::{self, Content};
use super::provenance::{Accepted, DangerKind, Provenance};
use super::shared::{Note, NoteError};
use super::sidecar::{Role, Sidecar, SidecarError, beside};
use super::standing::judge;
use super::start::record;
use crate::arbiter::{Arbiter, ArbiterError};

/// How long an image without a sidecar is searched, apart from its ends, while a primary waits for the
/// answer.
const PATIENCE: Duration = Duration::from_millis(500);

/// Why an image is not overwritten.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OverwriteError {
    /// Its sidecar cannot be read.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// It cannot be searched for data.
    #[error("cannot read {}: {source}", .image.display())]
    Read { image: PathBuf, source: io::Error },
    /// The arbiter does not answer.
    #[error("the arbiter cannot say what the standby's images are: {0}")]
    Unknown(#[source] ArbiterError),
    /// Its note cannot be read.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// It is no image of this host's own.
    #[error(
        "the disk image {} is the one on which the VM runs at the primary, so both hosts use the same storage: give it \
         with `shared` to `outlive run`; or give this host an image of its own; if it is a copy, remove {}",
        .0.display(), beside(.0, "outlive").display()
    )]
    Same(PathBuf),
    /// It may be the only copy of something.
    #[error(
        "the disk image {} holds {holds}: nothing is overwritten; give the right image, or say --disk \
         path=...,overwrite",
        .image.display()
    )]
    Holds { image: PathBuf, holds: String },
}

/// An image of a standby, opened for writing, and whether it may be overwritten.
pub(crate) struct Target<'a> {
    /// The path.
    pub(crate) path: &'a Path,
    /// The image.
    pub(crate) file: &'a File,
    /// Whether an operator has said that it may be overwritten.
    pub(crate) overwrite: bool,
}

impl Target<'_> {
    /// Decides whether the image may become a disk of this VM, which runs in `generation`. Returns what the
    /// operator's word accepted, if it was needed.
    ///
    /// # Errors
    /// See [`OverwriteError`].
    pub(crate) fn check(
        &self,
        provenance: &Provenance,
        generation: u64,
        arbiter: &mut (dyn Arbiter + 'static),
    ) -> Result<Option<Accepted>, OverwriteError> {
        let note = Note::read(self.path)?.map(|note| {
            let Provenance { vm, name, .. } = note.provenance;
            format!("a disk that VM {name} ({vm}) shares between its hosts")
        });
        let holds = match Sidecar::read_stamped(self.path) {
            _ if note.is_some() => note,
            Err(error) if !self.overwrite => return Err(error.into()),
            Err(error) => Some(format!("an image whose sidecar is damaged: {error}")),
            Ok(None) => self.data()?.map(|at| format!("data (at byte {at}) and is no standby's copy")),
            // Its sidecar was written for another file, and says nothing about this one.
            Ok(Some((_, Some(stamp)))) if stamp.differs(self.path) == Some(Differs::File) => {
                self.data()?.map(|at| format!("data (at byte {at}) and is not the file of its sidecar"))
            }
            Ok(Some((sidecar, _))) if is_primarys(&sidecar, provenance, generation) => {
                return Err(OverwriteError::Same(self.path.to_owned()));
            }
            Ok(Some((sidecar, _))) => stranger(&sidecar, provenance, generation, arbiter)?,
        };
        match holds {
            None => Ok(None),
            Some(holds) if self.overwrite => {
                Ok(Some(record(DangerKind::Overwrite, format!("it held {holds}"))))
            }
            Some(holds) => Err(OverwriteError::Holds { image: self.path.to_owned(), holds }),
        }
    }

    /// The VMs that the image at `path` is of, as the files beside it say. If it is to be replaced, a sidecar that was
    /// written for another file does not count: [`check`](Self::check) looks at what the image holds then.
    ///
    /// # Errors
    /// The files cannot be read.
    pub(crate) fn owners(path: &Path, is_replaced: bool) -> Result<Vec<VmId>, OverwriteError> {
        let note = Note::read(path)?.map(|note| note.provenance.vm);
        let sidecar = Sidecar::read_stamped(path)?.filter(|(_, stamp)| {
            let is_anothers = stamp.as_ref().is_some_and(|it| it.differs(path) == Some(Differs::File));
            !(is_replaced && is_anothers)
        });
        Ok(note.into_iter().chain(sidecar.map(|(sidecar, _)| sidecar.provenance.vm)).collect())
    }

    /// The place of the image's first data.
    fn data(&self) -> Result<Option<u64>, OverwriteError> {
        let found = blank::scan(self.file, PATIENCE);
        match found.map_err(|source| OverwriteError::Read { image: self.path.to_owned(), source })? {
            Content::Data { at } => Ok(Some(at)),
            Content::Blank => Ok(None),
            Content::BlankInSamples => {
                tracing::info!(
                    image = %self.path.display(),
                    "only zeroes at both ends and in 1024 samples: the image counts as blank"
                );
                Ok(None)
            }
        }
    }
}

/// Whether the sidecar is the one that the primary has written for the VM as it runs now.
fn is_primarys(sidecar: &Sidecar, provenance: &Provenance, generation: u64) -> bool {
    let same = sidecar.provenance.vm == provenance.vm && sidecar.generation == generation;
    same && sidecar.role == Role::Primary
}

/// What the image holds that this VM does not have.
fn stranger(
    sidecar: &Sidecar,
    provenance: &Provenance,
    generation: u64,
    arbiter: &mut (dyn Arbiter + 'static),
) -> Result<Option<String>, OverwriteError> {
    let Provenance { vm, name, .. } = &sidecar.provenance;
    // Its process may have won a generation and died before the sidecar said so; the arbiter knows.
    let own = judge(sidecar, None, Some(arbiter)).map_err(OverwriteError::Unknown)?.generation;
    if provenance.includes(generation, *vm, own) {
        return Ok(None);
    }
    Ok(Some(if *vm == provenance.vm {
        format!("generation {own} of this VM, which its generation {generation} does not have")
    } else {
        let name = if name.is_empty() { String::new() } else { format!(" {name}") };
        format!("generation {own} of another VM{name} ({vm})")
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::stamp::Stamp;
    use crate::disk::tests::provenance;

    const VM: VmId = VmId([9; 16]);
    const OTHER: VmId = VmId([8; 16]);

    #[test]
    fn an_image_is_of_the_vms_that_its_sidecar_and_its_note_name() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, [7; 4096]).unwrap();
        let owners = |is_replaced| Target::owners(&image, is_replaced).unwrap();
        assert_eq!(owners(true), []);
        Sidecar::primary(&provenance(VM), 1, None).write(&image).unwrap();
        assert_eq!((owners(true), owners(false)), (vec![VM], vec![VM]));
        Note::here(&provenance(OTHER), 1).unwrap().write(&image).unwrap();
        assert_eq!((owners(true), owners(false)), (vec![OTHER, VM], vec![OTHER, VM]));
    }

    #[test]
    fn the_sidecar_of_another_file_counts_unless_the_image_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (image, copy) = (directory.path().join("image"), directory.path().join("copy"));
        fs::write(&image, [7; 4096]).unwrap();
        Sidecar::primary(&provenance(VM), 1, None).write(&image).unwrap();
        if !Stamp::of(&image).unwrap().is_certain() {
            return println!("skipped: a file system with steady numbers for the tests' directory");
        }
        fs::copy(&image, &copy).unwrap();
        fs::copy(beside(&image, "outlive"), beside(&copy, "outlive")).unwrap();
        let owners = |is_replaced| Target::owners(&copy, is_replaced).unwrap();
        assert_eq!((owners(true), owners(false)), (vec![], vec![VM]));
    }
}
