//! The file beside an image that says whose copy the image is: `IMAGE.outlive`, in TOML.
//!
//! ```toml
//! version = 2
//! vm = "3f2a..."            # the VM; the same over restarts and takeovers
//! name = "server"
//! disk = 0
//! disks = 1                 # so many that the VM writes to
//! role = "replica"          # or "primary": the VM runs, or ran, on it
//! whole = true              # false while it is being synchronised
//! generation = 4            # in which it was written last; 0 if the VM has no arbiter
//! checkpoint = 77
//! arbiter = "9c01..."       # missing if the VM has never had one
//! process = "51d0..."       # what that process wins at the arbiter belongs to this image
//! earlier = ["07be..."]     # and what these win, which had it before: a claim may still be on its way
//! journal = "/srv/server.img.journal"
//! host = "hostb"
//! written = "2026-01-31T12:00:00Z"
//!
//! [image]                   # the file that all this is said of
//! bytes = 8589934592
//! file = "2621443-1769..."  # its number and birth, where a file system keeps them
//!
//! [[ancestors]]             # the VMs that it was begun from, by an operator's word
//! vm = "77aa..."
//! through = 3
//!
//! [[accepted]]              # what operators have accepted
//! danger = "stale_image"
//! at = "2026-01-30T12:00:00Z"
//! host = "hostb"
//! about = "generation 4 of VM 77aa..., won by standby on host hosta, was given up"
//! ```
//!
//! Because of `process`, a power cut between a won claim and the sidecar's next version leaves no image that
//! nobody may start: the claim has the token of the process that won it, and the sidecar had that token
//! before the process could claim. Because of `earlier`, this is so too when a claim lands only after its process
//! died and the next one has looked at the arbiter.

#[cfg(test)]
mod golden;
mod old;
mod place;
mod text;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::provenance::{Accepted, Provenance};
use super::stamp::Stamp;
pub(crate) use place::{STATE_DIR, beside};
pub(in crate::disk) use text::now;

/// How many records of what operators accepted are kept.
const ACCEPTED_KEPT: usize = 8;

/// How many processes that had an image before are kept. Each asked for a generation and got no answer.
pub(in crate::disk) const EARLIER_KEPT: usize = 8;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    /// The VM runs, or ran, on it.
    Primary,
    /// A standby's copy.
    Replica,
}

/// How a standby's copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CopyEnd {
    /// The VM ended in order, and this is its final state.
    Followed,
    /// The standby gave it up in order, and the VM went on without it.
    Released,
}

/// What a sidecar says; see the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sidecar {
    /// The VM that it belongs to, and where that comes from.
    pub(crate) provenance: Provenance,
    /// The generation in which the image was written last; 0 if none was ever won.
    pub(crate) generation: u64,
    /// What the image is.
    pub(crate) role: Role,
    /// Whether it is a whole disk of the VM; it is not while it is being synchronised.
    pub(crate) whole: bool,
    /// How a replica ended.
    pub(crate) end: Option<CopyEnd>,
    /// A replica's checkpoint, when this was written; the journal may know newer ones.
    pub(crate) checkpoint: u64,
    /// Its position among the VM's disks.
    pub(crate) disk: u16,
    /// How many disks the VM writes to and does not share; `None` in sidecars of earlier releases.
    pub(crate) disks: Option<u16>,
    /// The journal that may have writes for it.
    pub(crate) journal: Option<PathBuf>,
    /// The token of the process that has, or had, the image. Whatever generation of the VM that process won,
    /// it won for this image.
    pub(crate) process: Option<String>,
    /// The processes that had the image before, oldest first, since its generation was won: the same holds for
    /// them.
    pub(crate) earlier: Vec<String>,
    /// What operators have accepted, newest last.
    pub(crate) accepted: Vec<Accepted>,
}

/// Why a sidecar could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SidecarError {
    /// The file system's.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The sidecar is invalid.
    #[error(
        "{} is invalid in line {line} ({why}): restore it, or, if you know that its image is good, run \
         `outlive image accept {}`",
        path.display(), image.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The image.
        image: PathBuf,
        /// Counted from 1; 0 if a line is missing.
        line: usize,
        /// What is wrong.
        why: String,
    },
}

impl Sidecar {
    /// Reads the sidecar of an image; `None` if it has none.
    ///
    /// # Errors
    /// [`SidecarError`].
    pub(crate) fn read(image: &Path) -> Result<Option<Self>, SidecarError> {
        Ok(Self::read_stamped(image)?.map(|(sidecar, _)| sidecar))
    }

    /// The same, with the stamp of the file that it was written for; `None` if it has none.
    ///
    /// # Errors
    /// [`SidecarError`].
    pub(crate) fn read_stamped(image: &Path) -> Result<Option<(Self, Option<Stamp>)>, SidecarError> {
        let path = beside(image, "outlive");
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map(Some).map_err(|(line, why)| SidecarError::Malformed {
                path,
                image: image.to_path_buf(),
                line,
                why,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SidecarError::Io { path, source }),
        }
    }

    /// The processes whose wins are this image's.
    pub(in crate::disk) fn claimants(&self) -> impl Iterator<Item = &str> {
        self.earlier.iter().chain(&self.process).map(String::as_str)
    }

    /// The image goes from the processes that had it to this one.
    pub(in crate::disk) fn handed_to(&self, process: &str) -> Self {
        let mut earlier: Vec<_> = self.claimants().filter(|it| *it != process).map(str::to_owned).collect();
        earlier.drain(..earlier.len().saturating_sub(EARLIER_KEPT));
        Self { process: Some(process.to_owned()), earlier, ..self.clone() }
    }

    /// Writes the sidecar of an image, for the file that is there now: after this returns it is durable, and until
    /// then the old one is whole. What was accepted for the image stays in it.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write(&self, image: &Path) -> io::Result<()> {
        self.write_for(image, Stamp::of(image).ok())
    }

    /// The same for the file with this stamp.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write_for(&self, image: &Path, stamp: Option<Stamp>) -> io::Result<()> {
        let path = beside(image, "outlive");
        let new = beside(image, "outlive.new");
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let mut accepted = Self::read(image).ok().flatten().map_or_else(Vec::new, |old| old.accepted);
        accepted
            .extend(self.accepted.iter().filter(|new| !accepted.contains(new)).cloned().collect::<Vec<_>>());
        accepted.drain(..accepted.len().saturating_sub(ACCEPTED_KEPT));
        let text = Self { accepted, ..self.clone() }.text(stamp).map_err(io::Error::other)?;
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(directory)?.sync_all()
    }

    /// Finds out whether the sidecar of an image could be written now. Changes nothing.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn probe(image: &Path) -> io::Result<()> {
        // Another file than the one that `write` renames.
        let new = beside(image, "outlive.probe");
        if let Some(directory) = new.parent() {
            fs::create_dir_all(directory)?;
        }
        let tried = File::create(&new).and_then(|mut file| {
            // Every sidecar is smaller.
            file.write_all(&[b'#'; 4096])?;
            file.sync_all()
        });
        tried.and(fs::remove_file(&new))
    }
}

#[cfg(test)]
mod tests {
    use outlive_epoch::{Ancestor, Lineage, VmId};

    use super::*;
    use crate::disk::provenance::{DangerKind, KnownArbiter};

    /// With everything but dangers.
    pub(super) fn sidecar() -> Sidecar {
        Sidecar {
            provenance: Provenance {
                vm: VmId(*b"0123456789abcdef"),
                name: "server".into(),
                arbiter: KnownArbiter::Id("9c01".repeat(8)),
                lineage: Lineage::new([Ancestor { vm: VmId([7; 16]), through: 3 }]),
            },
            generation: 4,
            role: Role::Replica,
            whole: true,
            end: Some(CopyEnd::Released),
            checkpoint: 77,
            disk: 2,
            disks: Some(3),
            journal: Some("/srv/with space/root.img.journal".into()),
            process: Some("51d0".repeat(8)),
            earlier: vec!["07be".repeat(8), "9c3f".repeat(8)],
            accepted: Vec::new(),
        }
    }

    fn accepted(about: usize) -> Accepted {
        let (at, host) = ("2026-01-31T12:00:00Z".to_owned(), "hostb".to_owned());
        Accepted { danger: DangerKind::StaleImage, at, host, about: about.to_string() }
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("root.img");
        File::create(&image).unwrap();
        assert_eq!(Sidecar::read(&image).unwrap(), None);
        let provenance = Provenance { arbiter: KnownArbiter::None, ..sidecar().provenance };
        let bare = Sidecar { process: None, earlier: Vec::new(), end: None, provenance, ..sidecar() };
        let primary = Sidecar { role: Role::Primary, whole: false, journal: None, ..bare };
        for sidecar in [sidecar(), primary] {
            sidecar.write(&image).unwrap();
            assert_eq!(Sidecar::read(&image).unwrap(), Some(sidecar));
        }
        let names: Vec<_> = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        // A link leads to the same image.
        let link = directory.path().join("link.img");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert!(Sidecar::read(&link).unwrap().is_some());
    }

    #[test]
    fn a_sidecar_remembers_the_processes_that_had_its_image() {
        let tokens: Vec<_> = (0..12).map(|number| format!("{number:032x}")).collect();
        let first = Sidecar { process: None, earlier: Vec::new(), ..sidecar() };
        let last = tokens.iter().fold(first, |sidecar, token| sidecar.handed_to(token));
        assert_eq!(last.claimants().collect::<Vec<_>>(), tokens[3..]);
        // Nobody is there twice.
        assert_eq!(last.handed_to(&tokens[11]), last);
    }

    #[test]
    fn what_was_accepted_stays_for_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("root.img");
        File::create(&image).unwrap();
        for number in 0..10 {
            Sidecar { accepted: vec![accepted(number)], ..sidecar() }.write(&image).unwrap();
            // It is neither written twice nor lost at the next write.
            sidecar().write(&image).unwrap();
        }
        let kept = Sidecar::read(&image).unwrap().unwrap().accepted;
        assert_eq!(kept, (2..10).map(accepted).collect::<Vec<_>>());
        let size = fs::metadata(beside(&image, "outlive")).unwrap().len();
        assert!(size < 4096, "{size} bytes");
    }

    #[test]
    fn nonsense_is_named_by_its_line() {
        let good = sidecar().text(None).unwrap();
        assert_eq!(Sidecar::parse(&good), Ok((sidecar(), None)));
        for (from, to, line) in [
            ("vm = \"3031", "vm = \"30x1", 0),
            ("vm = \"3031", "vm = \"303", 0),
            ("role = \"replica\"", "role = \"other\"", 7),
            ("whole = true", "whole = perhaps", 8),
            ("checkpoint = 77", "checkpoint = -1", 11),
            ("disk = 2", "colour = 5", 5),
            ("disk = 2\n", "", 0),
            ("version = 2", "version = 3", 0),
            ("generation = 4", "generation", 10),
            ("through = 3", "through = 3\nhow = 4", 22),
        ] {
            assert!(good.contains(from), "{from}");
            let error = Sidecar::parse(&good.replace(from, to)).unwrap_err();
            assert!(error.0 == line || line == 0 && error.0 <= 1, "{to}: {error:?}, expected {line}");
            assert!(!error.1.contains('\n'), "{error:?}");
        }
    }

    const OLD: &str = "# Written by outlive: whose disk the image beside this file is.\nversion = 1\n\
        vm = 30313233343536373839616263646566\ndisk = 2\nrole = replica\ngeneration = 4\ncheckpoint = 77\n\
        whole = yes\njournal = /srv/with space/root.img.journal\n";

    /// The previous release had a format of its own. It is read, and the next write uses this release's.
    #[test]
    fn a_sidecar_of_the_release_before_is_read_and_upgraded() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("root.img");
        File::create(&image).unwrap();
        fs::write(beside(&image, "outlive"), OLD).unwrap();
        let old = Sidecar::read(&image).unwrap().unwrap();
        let expected = Provenance {
            vm: VmId(*b"0123456789abcdef"),
            name: String::new(),
            arbiter: KnownArbiter::Unsaid,
            lineage: Lineage::default(),
        };
        assert_eq!(
            old,
            Sidecar {
                provenance: expected,
                disks: None,
                process: None,
                earlier: Vec::new(),
                end: None,
                ..sidecar()
            }
        );
        old.write(&image).unwrap();
        assert!(fs::read_to_string(beside(&image, "outlive")).unwrap().contains("version = 2"));
        assert_eq!(Sidecar::read(&image).unwrap(), Some(old), "nothing is lost");
        for (from, to, line) in [
            ("vm = 3031", "vm = 303", 3),
            ("role = replica", "role = other", 5),
            ("whole = yes", "whole = perhaps", 8),
            ("disk = 2\n", "", 0),
        ] {
            assert_eq!(Sidecar::parse(&OLD.replace(from, to)).unwrap_err().0, line, "{to}");
        }
    }
}
