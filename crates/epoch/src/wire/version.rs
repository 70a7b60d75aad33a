//! The versions of the protocol.

use std::fmt;

use crate::codec::PageCodec;
use crate::image::{StateKind, StateVersions};

/// Versions of the stream, with one line of history each.
///
/// The policy:
///
/// * Frozen forever, in every version: the preface, the section header, the numbers of the section kinds, and
///   the payload of `Refuse` version 1. So any two releases can at least tell each other, in words, why they
///   do not match.
/// * The two sides agree on a version. The preface, `Hello`, `Accept` and everything else before the
///   agreement are in the version [`INTRODUCTION`](Self::INTRODUCTION), which grows much less often than the
///   stream's. `Hello` lists the versions that the primary writes, `Accept` the highest of them that the
///   standby reads, and from then on both sides write that one.
/// * A release that knows only version 2 reads no newer `Hello`: its payload had to end where that release
///   expected. So the range cannot be hidden in it. That release refuses with its own preface, which says
///   that it speaks version 2, and the primary dials once more with a `Hello` of that version
///   ([`introduction`](Self::introduction)). From version 3 on, fields may follow at the end of `Hello` and
///   `Accept` that an older release skips, so one attempt is enough. A field that a standby must not skip
///   cannot be added like this: it needs a new version of the stream, and a primary that needs it offers no
///   older one.
/// * A change of the meaning of the stream as a whole (order, who speaks when) adds a variant here. A change
///   of one payload raises the version of that kind in [`SectionKind::version`](super::SectionKind::version),
///   and the parser of the old one stays while the last release that wrote it is supported.
/// * A section's version is between its version in the oldest stream that is read and the current one
///   ([`SectionKind::version_in`](super::SectionKind::version_in)); the parser is given the version that was
///   found.
/// * A page codec is used from the version that introduces it: [`has_codec`](Self::has_codec).
/// * What is unknown is refused, never skipped: a skipped section could be a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum ProtocolVersion {
    /// 2: devices in the introduction, disk writes in checkpoints, base synchronisation of disks. Version 1
    /// (base pages, checkpoints of raw and zero pages and state sections, heartbeats with stamps, orderly
    /// end) was in no release.
    V2 = 2,
    /// 3: pages state the length of their data, so a codec can be added whose data has no fixed length. GFNs
    /// have 40 bits. Both sides agree on a version; the introduction can have more fields. Everything else is
    /// as in 2.
    V3 = 3,
    /// 4: pages of checkpoints may be written as granules, the beginning of a checkpoint says how many pages
    /// follow at most, and pages that have not changed since they were last sent are left out. The state may
    /// be sent as its changes. The state of the VM is a section of version 2.
    V4 = 4,
    /// 5: the standby says whether its host reaches the guest's clients.
    V5 = 5,
    /// 6: frames that no checkpoint has: what the guest was given since the last one, and what it has sent, with
    /// word of what has left.
    V6 = 6,
    /// 7: sums of some pages, and of some chunks of disks, in a checkpoint, which the standby compares with its copy;
    /// it says how far it is, and may leave because its copy differs. The standby says whether it sees the arbiter.
    V7 = 7,
    /// 8: the last checkpoint before a hand-over says so. The primary, too, says whether it sees the arbiter.
    V8 = 8,
}

impl ProtocolVersion {
    /// The newest version that this release reads and writes.
    pub const CURRENT: Self = Self::V8;
    /// The oldest version that this release reads and writes.
    pub const OLDEST: Self = Self::V2;
    /// The newest version of the introduction: preface, `Hello` and `Accept`. Raising it costs a second
    /// attempt with every standby of an older release.
    pub const INTRODUCTION: Self = Self::V3;

    /// The version with this number, if this release understands it.
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            4 => Some(Self::V4),
            5 => Some(Self::V5),
            6 => Some(Self::V6),
            7 => Some(Self::V7),
            8 => Some(Self::V8),
            _ => None,
        }
    }

    /// Whether a stream of this version may have pages of this codec. A new codec comes with a new version of
    /// the stream and is added here. Code that encodes pages must ask here, for the version that was agreed
    /// on ([`Encoder::stream`](super::Encoder::stream)).
    pub fn has_codec(self, codec: PageCodec) -> bool {
        match codec {
            PageCodec::Raw | PageCodec::Zero => self >= Self::V2,
            PageCodec::Granules => self >= Self::V4,
        }
    }

    /// The versions of state sections that every release which reads this version of the stream also reads. A
    /// new version of a section is added here, under the version of the stream that introduces it.
    pub fn state_versions(self) -> StateVersions {
        match self {
            Self::V2 | Self::V3 => StateVersions::NEWEST.with(StateKind::Vm, 1),
            Self::V4 | Self::V5 | Self::V6 | Self::V7 | Self::V8 => StateVersions::NEWEST,
        }
    }

    /// The version in which two sides introduce themselves if they can write this version and none newer.
    pub fn introduction(self) -> Self {
        self.min(Self::INTRODUCTION)
    }
}

/// The versions of the stream that a release reads and writes: all from the oldest to the newest. The numbers
/// may come from another release, so this one may have no names for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    /// The oldest.
    pub oldest: u32,
    /// The newest.
    pub newest: u32,
}

impl VersionRange {
    /// The versions of this release.
    pub const CURRENT: Self =
        Self { oldest: ProtocolVersion::OLDEST as u32, newest: ProtocolVersion::CURRENT as u32 };

    /// A range of one version.
    pub const fn only(version: ProtocolVersion) -> Self {
        Self { oldest: version as u32, newest: version as u32 }
    }

    /// The newest version that both this release and the other have.
    ///
    /// # Errors
    /// If there is none: a text for the other side, with both ranges and the remedy.
    pub fn common(self, other: Self) -> Result<ProtocolVersion, String> {
        let newest = self.newest.min(other.newest);
        let oldest = self.oldest.max(other.oldest);
        let common = ProtocolVersion::from_wire(newest).filter(|_| oldest <= newest);
        common.ok_or_else(|| {
            let older = if other.newest < self.newest { "primary" } else { "standby" };
            format!(
                "no version of the stream in common: the standby reads {self}, the primary writes {other}; \
                 upgrade Outlive on the {older}'s host"
            )
        })
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { oldest, newest } = self;
        if oldest == newest { write!(f, "{newest}") } else { write!(f, "{oldest} to {newest}") }
    }
}
