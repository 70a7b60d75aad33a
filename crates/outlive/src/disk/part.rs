//! Which part this host has in a VM whose two hosts are started with the same command: it starts the VM, or it
//! waits as the VM's standby.
//!
//! Only the images' sidecars and the arbiter say so, and neither of them is asked to trust the other host:
//!
//! | this host's images | part |
//! |---|---|
//! | the VM's own, in its newest generation | it starts the VM |
//! | as they were at the VM's orderly end | it starts the VM, but lets the host on which the VM ran come first |
//! | empty, not whole, of an older generation, given up | it waits: it has nothing, or the other host has more |
//! | empty, and not the file that its sidecar was written for | it waits: what the sidecar speaks of is lost |
//! | a standby's copy in the newest generation | it waits: the host where the VM ran has its own, perhaps newer image |
//! | one of the VM's own in its newest generation, and one of no VM: a new disk, or a lost one | neither; an operator must say which |
//! | anything that nobody can judge | neither; an operator must look |
//!
//! A copy is never started here by itself. Its commits are durable a little later than they are acknowledged, so
//! after a power cut of both hosts the other image may have answers that clients have seen and the copy has not.
//! If two hosts nevertheless begin at the same time, the arbiter lets one of them win.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outlive_pair::{Danger, Differs, ImageRole};

use super::blank::{self, Content};
use super::prepare::cannot_open;
use super::provenance::DangerKind;
use super::sidecar::{CopyEnd, Sidecar, SidecarError};
use super::standing::{Given, Told, judge};
use crate::arbiter::{Arbiter, ArbiterError};

/// How long an image without a sidecar is searched, apart from its ends.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a copy that followed the VM to its end waits for the host on which the VM ran.
const AFTER_YOU: Duration = Duration::from_secs(15);

/// The part of this host; see the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// It starts the VM, once other hosts have had this time to take it over or to start it.
    Starts {
        /// How long, apart from what a takeover takes.
        after: Duration,
        /// Whether another host may be about to take the VM over.
        may_be_taken_over: bool,
    },
    /// It waits as the VM's standby.
    Waits {
        /// Why it does not start the VM, for a person.
        why: String,
        /// The VM's name, if the images know it.
        name: Option<String>,
        /// Whether nobody may start the VM before an operator has done something.
        needs_operator: bool,
    },
}

/// Why nobody but an operator can say.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartError {
    /// No image remembers anything.
    #[error(
        "--or-standby needs a --disk that the VM writes to and that is not shared: only its image remembers \
         whether this host has the newest state of the VM"
    )]
    NoImage,
    /// A sidecar cannot be read.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// An image cannot be read.
    #[error("{}", cannot_open(.image, .source))]
    Read {
        /// The image.
        image: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An image with data belongs to no VM.
    #[error(
        "the disk image {0} has data and belongs to no VM, so nobody knows whether it is the server or something \
         else: run `outlive image accept --yes {0}` once, on the host that has the server, and give the other \
         host an empty image"
    )]
    Unknown(PathBuf),
    /// The arbiter does not answer.
    #[error("the arbiter cannot say whether the disk image {image} is up to date: {source}")]
    Arbiter {
        /// The image.
        image: PathBuf,
        /// Why.
        source: ArbiterError,
    },
    /// The VM has one disk more than it had, or has lost one. Both hosts would wait for each other.
    #[error(
        "the disk image {own} is the VM's own in its newest generation, but {other} belongs to no VM: if {other} is \
         a new disk of it, run this command once without --or-standby, here, and give the other host an empty \
         image for that disk; if it replaces one that is lost, bring that back, or start the VM once from the \
         other host's copy, there, with --accept-replica in place of --or-standby"
    )]
    NewDisk {
        /// The VM's own.
        own: PathBuf,
        /// Of no VM.
        other: PathBuf,
    },
    /// Nobody can judge it. The text has the remedy.
    #[error("{0}")]
    Unclear(String),
}

impl Part {
    /// Decides from the images that the VM writes to and does not share. Changes nothing.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) fn decide(
        images: &[(u16, &Path)],
        arbiter: &mut (dyn Arbiter + 'static),
        name: Option<&str>,
    ) -> Result<Self, PartError> {
        if images.is_empty() {
            return Err(PartError::NoImage);
        }
        let mut name = name.map(str::to_owned);
        let mut waits: Option<String> = None;
        let mut needs_operator = false;
        let (mut own, mut unknown) = (None, Vec::new());
        let (mut after, mut may_be_taken_over) = (Duration::ZERO, false);
        for given in Given::all(images) {
            let image = given.image;
            let Some((sidecar, stamp)) = Sidecar::read_stamped(image)? else {
                unknown.push(image);
                continue;
            };
            let differs = stamp.and_then(|stamp| stamp.differs(image));
            // A new file in the place of a lost one has nothing of what the sidecar says.
            if differs == Some(Differs::File) && is_blank(image)? {
                let image = image.display();
                waits.get_or_insert_with(|| format!("the disk image {image} is empty, and was made anew"));
                continue;
            }
            let moved = differs.map(Danger::Moved);
            if let Some(danger) = moved.iter().chain(&given.dangers(&sidecar)).next() {
                return Err(PartError::Unclear(danger.refusal(image)));
            }
            let known = &sidecar.provenance.name;
            name = name.or_else(|| Some(known.clone()).filter(|name| !name.is_empty()));
            let standing = judge(&sidecar, None, Some(&mut *arbiter))
                .map_err(|source| PartError::Arbiter { image: image.to_path_buf(), source })?;
            if sidecar.whole && standing.role == ImageRole::Primary && standing.dangers.is_empty() {
                own = own.or(Some(image));
            }
            if !sidecar.whole {
                waits.get_or_insert_with(|| format!("the disk image {} is not whole", image.display()));
            }
            for danger in &standing.dangers {
                match danger.kind() {
                    // Nothing is wrong: the host with the newest image starts the VM.
                    DangerKind::StaleImage => waits.get_or_insert_with(|| danger.why(image)),
                    DangerKind::Replica => {
                        needs_operator = true;
                        waits.get_or_insert_with(|| danger.refusal(image))
                    }
                    _ => return Err(PartError::Unclear(danger.refusal(image))),
                };
            }
            may_be_taken_over |= standing.highest.is_some() && sidecar.end.is_none();
            if standing.role == ImageRole::Replica && sidecar.end == Some(CopyEnd::Followed) {
                after = AFTER_YOU;
            }
        }
        for image in unknown {
            if let Some(own) = own {
                return Err(PartError::NewDisk { own: own.to_path_buf(), other: image.to_path_buf() });
            }
            let why = blank(image)?;
            needs_operator |= waits.is_none();
            waits.get_or_insert(why);
        }
        Ok(match waits {
            Some(why) => Self::Waits { why, name, needs_operator },
            None => Self::Starts { after, may_be_taken_over },
        })
    }
}

/// Why a host with an image without a sidecar waits: the image is empty.
fn blank(image: &Path) -> Result<String, PartError> {
    match is_blank(image)? {
        true => Ok(format!(
            "the disk image {image} is empty, so this host waits for one that has the VM; if there is no VM yet, begin \
             it on one host: end this command there, run `outlive image accept --yes {image}` (with the server's data in the \
             image, or empty), and start this command again",
            image = image.display()
        )),
        false => Err(PartError::Unknown(image.to_path_buf())),
    }
}

fn is_blank(image: &Path) -> Result<bool, PartError> {
    let failed = |source| PartError::Read { image: image.to_path_buf(), source };
    let file = File::open(image).map_err(failed)?;
    let content = blank::scan(&file, PATIENCE).map_err(failed)?;
    Ok(matches!(content, Content::Blank | Content::BlankInSamples))
}
