//! A VM that begins from a moment of another one's past: as which VM, and what its images say of themselves.

use std::io;
use std::path::{Path, PathBuf};

use outlive_epoch::{Ancestor, Hello, Lineage};

use super::provenance::{KnownArbiter, Provenance};
use super::sidecar::Sidecar;
use super::stamp::Stamp;
use super::start::{SidecarNotWritten, cannot_write, new_vm};
use crate::arbiter;

/// A new VM that descends from one as it was introduced, from somewhere within this generation of it. It has not all that
/// was committed in that generation, so its line leaves the old VM's at the one before: no standby of the new VM may take an
/// image of the old one for an older state of its own.
///
/// # Errors
/// This host has no random numbers.
pub(crate) fn descendant(of: &Hello, generation: u64, name: String) -> io::Result<Provenance> {
    let nearest = Ancestor { vm: of.vm, through: generation.saturating_sub(1) };
    let lineage = Lineage::new(std::iter::once(nearest).chain(of.lineage.ancestors().iter().copied()));
    Ok(Provenance { vm: new_vm()?, name, arbiter: KnownArbiter::None, lineage })
}

/// An image that is about to get its name.
pub(crate) struct Newborn {
    /// Its position among the VM's disks.
    pub(crate) disk: u16,
    /// The name that it will have.
    pub(crate) image: PathBuf,
    /// The name that it has.
    pub(crate) now: PathBuf,
}

/// Why an image does not say whose it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NewbornError {
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] SidecarNotWritten),
    /// The host has no random numbers.
    #[error("this host has no random numbers: {0}")]
    NoRandom(#[source] io::Error),
}

/// Writes the sidecars of all images that a new VM without an arbiter writes to.
///
/// # Errors
/// See [`NewbornError`].
pub(crate) fn write_sidecars(images: &[Newborn], provenance: &Provenance) -> Result<(), NewbornError> {
    let process = arbiter::process_token().map_err(NewbornError::NoRandom)?;
    let disks = u16::try_from(images.len()).ok();
    for Newborn { disk, image, now } in images {
        let sidecar = Sidecar { disk: *disk, disks, ..Sidecar::primary(provenance, 0, Some(process)) };
        let written = sidecar.write_for(image, stamp(now));
        written.map_err(|error| cannot_write(image, error))?;
    }
    Ok(())
}

/// Of the file, which is the same under its next name.
fn stamp(now: &Path) -> Option<Stamp> {
    Stamp::of(now).ok()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use outlive_epoch::VmId;

    use super::*;
    use crate::disk::Start;

    #[test]
    fn a_descendant_lacks_the_generation_in_which_it_left_the_line() {
        let older = Ancestor { vm: VmId([7; 16]), through: 3 };
        let hello = Hello { lineage: Lineage::new([older]), ..crate::primary::test_hello() };
        let new = descendant(&hello, 5, "new".into()).unwrap();
        assert!(new.vm != hello.vm && new.arbiter == KnownArbiter::None);
        assert!(new.includes(1, hello.vm, 4) && new.includes(1, older.vm, 3));
        assert!(!new.includes(9, hello.vm, 5), "what was committed after that moment is not in it");
        assert!(!new.includes(9, older.vm, 4));
        assert_ne!(descendant(&hello, 5, "new".into()).unwrap().vm, new.vm, "each time another one");
    }

    #[test]
    fn a_vm_starts_again_from_such_images_as_itself_and_from_one_of_two_not() {
        let there = tempfile::tempdir().unwrap();
        let provenance = descendant(&crate::primary::test_hello(), 1, "new".into()).unwrap();
        let newborn = |disk: u16| {
            let image = there.path().join(format!("disk-{disk}.raw"));
            let now = there.path().join(format!("{disk}"));
            File::create(&now).unwrap().set_len(4096).unwrap();
            Newborn { disk, image, now }
        };
        let images = [newborn(0), newborn(2)];
        write_sidecars(&images, &provenance).unwrap();
        images.iter().for_each(|it| fs::rename(&it.now, &it.image).unwrap());
        let given: Vec<_> = images.iter().map(|it| (it.disk, it.image.as_path())).collect();
        let start = Start::plan(&given, &[], None, None, &[]).unwrap();
        assert_eq!((start.provenance, start.generation), (provenance, 1));
        let alone = Start::plan(&given[..1], &[], None, None, &[]);
        assert!(alone.is_err_and(|why| why.to_string().contains("--accept-other-disks")));
    }
}
