//! The provenance of images: what the sidecars of all images of a VM have in common, on both hosts.

use outlive_epoch::{Hello, Lineage, VmId};
use serde::{Deserialize, Serialize};

/// A VM, its arbiter and the VMs that it descends from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Provenance {
    /// The VM.
    pub(crate) vm: VmId,
    /// Its name, for people.
    pub(crate) name: String,
    /// The arbiter that gives its generations.
    pub(crate) arbiter: KnownArbiter,
    /// The VMs of the images that it was begun from.
    pub(crate) lineage: Lineage,
}

/// What an image knows of its VM's arbiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KnownArbiter {
    /// The VM has never had one, so no other host can have the VM.
    None,
    /// The arbiter with this identity.
    Id(String),
    /// Unknown: the release that wrote the sidecar did not record it.
    Unsaid,
}

/// What a sidecar has for [`KnownArbiter::Unsaid`]; identities have 32 hexadecimal digits.
const UNSAID: &str = "unsaid";

impl KnownArbiter {
    /// Its identity, if it is known.
    pub(crate) fn id(&self) -> Option<&str> {
        match self {
            Self::Id(id) => Some(id),
            Self::None | Self::Unsaid => None,
        }
    }

    /// As it stands in a sidecar.
    pub(super) fn from_text(text: Option<String>) -> Self {
        match text {
            None => Self::None,
            Some(text) if text == UNSAID => Self::Unsaid,
            Some(id) => Self::Id(id),
        }
    }

    /// As it stands in a sidecar.
    pub(super) fn to_text(&self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Id(id) => Some(id.clone()),
            Self::Unsaid => Some(UNSAID.into()),
        }
    }
}

impl Provenance {
    /// The provenance of the VM that a primary introduces; its arbiter has this identity.
    pub(crate) fn introduced(hello: &Hello, arbiter: &str) -> Self {
        Self {
            vm: hello.vm,
            name: hello.name.clone(),
            arbiter: KnownArbiter::Id(arbiter.to_owned()),
            lineage: hello.lineage.clone(),
        }
    }

    /// Whether the VM, running in generation `own`, has everything that `vm` had committed in `generation`.
    pub(crate) fn includes(&self, own: u64, vm: VmId, generation: u64) -> bool {
        vm == self.vm && generation <= own || self.lineage.includes(vm, generation)
    }
}

/// What an operator has accepted, for the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Accepted {
    /// Which danger.
    pub(crate) danger: DangerKind,
    /// When, as RFC 3339.
    pub(crate) at: String,
    /// On which host.
    pub(crate) host: String,
    /// What it was about.
    pub(crate) about: String,
}

/// The dangers that an operator can accept, each by its own option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DangerKind {
    /// The image's VM went on elsewhere; what was committed there is given up.
    StaleImage,
    /// The image is a standby's copy; what the other host has beyond its last commit is given up.
    Replica,
    /// The image's VM had another arbiter: nobody can say whether it went on elsewhere, or stop it there.
    OtherArbiter,
    /// The arbiter has lost the claims of the image's VM: as with another arbiter.
    LostClaims,
    /// No arbiter is given, and the image's VM had one: as with another arbiter.
    NoArbiter,
    /// The images belong to several VMs.
    ForeignImage,
    /// The image is not the file that its sidecar was written for: it was copied, restored, made anew or cut.
    MovedImage,
    /// The disks are given in another order, or not all of them.
    OtherDisks,
    /// A shared disk's VM may run at another host, or nobody has written down who uses the disk.
    SharedDisk,
    /// The image is not whole, or its sidecar is unreadable, and the operator has restored it.
    Unknown,
    /// An image of a standby with data of its own is overwritten.
    Overwrite,
}

impl DangerKind {
    /// The option of `outlive run` that accepts it.
    pub(crate) fn option(self) -> &'static str {
        match self {
            Self::StaleImage => "--accept-stale-image",
            Self::Replica => "--accept-replica",
            Self::OtherArbiter => "--accept-other-arbiter",
            Self::LostClaims => "--accept-lost-claims",
            Self::NoArbiter => "--accept-no-arbiter",
            Self::ForeignImage => "--accept-foreign-image",
            Self::MovedImage => "--accept-moved-image",
            Self::OtherDisks => "--accept-other-disks",
            Self::SharedDisk => "--accept-shared-disk",
            Self::Unknown | Self::Overwrite => "",
        }
    }
}
