//! The kinds of sections, their versions, and who may send them.

use std::fmt;

use super::version::ProtocolVersion;

/// Who sent a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The host where the VM runs.
    Primary,
    /// The host that can take over.
    Standby,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
        })
    }
}

/// What a section is. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum SectionKind {
    /// The primary introduces itself and its VM.
    Hello = 1,
    /// The standby is ready for base pages.
    Accept = 2,
    /// The standby says no, and why.
    Refuse = 3,
    /// Pages of the base synchronisation; applied at once.
    BasePages = 4,
    /// A checkpoint begins.
    CheckpointBegin = 5,
    /// Pages of the open checkpoint.
    Pages = 6,
    /// One state section of the open checkpoint.
    State = 7,
    /// The open checkpoint is complete.
    CheckpointEnd = 8,
    /// The standby holds all of a checkpoint.
    Ack = 9,
    /// The sender lives.
    Heartbeat = 10,
    /// The VM has ended in order: do not take over.
    End = 11,
    /// The standby leaves in order and will not take over.
    Leave = 12,
    /// Writes to disks in the open checkpoint, in their order.
    DiskWrites = 13,
    /// Sums of a part of a disk, for the base synchronisation.
    DiskSums = 14,
    /// Which chunks of that part the standby wants.
    DiskWant = 15,
    /// Chunks of a disk in the base synchronisation; written at once.
    DiskBlocks = 16,
    /// The changes of the state since the previous checkpoint; from version 4 of the stream on.
    StateChanges = 17,
    /// Whether the standby's host reaches the guest's clients; from version 5 of the stream on.
    Reach = 18,
    /// Frames that the guest was given and that no checkpoint has; from version 6 of the stream on.
    Input = 19,
    /// Frames that the guest has sent in the open checkpoint's epoch; from version 6 of the stream on.
    Output = 20,
    /// Through which epoch the guest's output has left; from version 6 of the stream on.
    Released = 21,
    /// Sums of pages as they are at the open checkpoint, for the standby to compare; from version 7 of the stream
    /// on.
    Audit = 22,
    /// What the standby has compared so far, and whether it differs; from version 7 of the stream on.
    Audited = 23,
    /// Whether the standby sees the arbiter; from version 7 of the stream on.
    ArbiterSight = 24,
    /// Sums of chunks of disks as they are at the open checkpoint, for the standby to compare; from version 7 of the
    /// stream on.
    DiskAudit = 25,
    /// What the standby has compared of its disks so far, and whether it differs; from version 7 of the stream on.
    DiskAudited = 26,
    /// The primary goes on without this standby, which is to hand its right over; from version 8 of the stream on.
    Dismiss = 27,
}

impl SectionKind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Self; 27] = [
        Self::Hello,
        Self::Accept,
        Self::Refuse,
        Self::BasePages,
        Self::CheckpointBegin,
        Self::Pages,
        Self::State,
        Self::CheckpointEnd,
        Self::Ack,
        Self::Heartbeat,
        Self::End,
        Self::Leave,
        Self::DiskWrites,
        Self::DiskSums,
        Self::DiskWant,
        Self::DiskBlocks,
        Self::StateChanges,
        Self::Reach,
        Self::Input,
        Self::Output,
        Self::Released,
        Self::Audit,
        Self::Audited,
        Self::ArbiterSight,
        Self::DiskAudit,
        Self::DiskAudited,
        Self::Dismiss,
    ];

    /// The kind with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The newest version of the payload: the one that a stream of the current version has.
    pub fn version(self) -> u16 {
        self.version_in(ProtocolVersion::CURRENT)
    }

    /// The oldest version of the payload that is read.
    pub fn oldest_version(self) -> u16 {
        self.version_in(ProtocolVersion::OLDEST).max(1)
    }

    /// The version of the payload in a stream of this version.
    pub fn version_in(self, stream: ProtocolVersion) -> u16 {
        match self {
            // Version 2 added the data length to entries, version 3 granules (in checkpoints only).
            Self::Pages => match stream {
                ProtocolVersion::V2 => 1,
                ProtocolVersion::V3 => 2,
                _ => 3,
            },
            Self::BasePages => match stream {
                ProtocolVersion::V2 => 1,
                _ => 2,
            },
            // Version 2 added devices, version 3 the arbiter and the ancestors, version 4 the versions of the
            // stream and whatever a later release appends.
            Self::Hello => match stream {
                ProtocolVersion::V2 => 3,
                _ => 4,
            },
            // Version 2 added the version of the stream and whatever a later release appends.
            Self::Accept => match stream {
                ProtocolVersion::V2 => 1,
                _ => 2,
            },
            // 0: older streams do not have it.
            Self::StateChanges => u16::from(stream >= ProtocolVersion::V4),
            Self::Reach => u16::from(stream >= ProtocolVersion::V5),
            Self::Input | Self::Output | Self::Released => u16::from(stream >= ProtocolVersion::V6),
            Self::Audit | Self::Audited | Self::ArbiterSight | Self::DiskAudit | Self::DiskAudited => {
                u16::from(stream >= ProtocolVersion::V7)
            }
            Self::Dismiss => u16::from(stream >= ProtocolVersion::V8),
            // Version 2 added the totals of disk writes. (In a stream of version 4 the beginning's number of
            // pages is a limit.)
            Self::CheckpointEnd => 2,
            // Version 3 added the flag of a hand-over.
            Self::CheckpointBegin => 2 + u16::from(stream >= ProtocolVersion::V8),
            _ => 1,
        }
    }

    /// Whether this side may send it.
    pub fn may_come_from(self, peer: Peer) -> bool {
        match self {
            // A primary tells of it from version 8 of the stream on.
            Self::Heartbeat | Self::ArbiterSight => true,
            Self::Accept
            | Self::Refuse
            | Self::Ack
            | Self::Leave
            | Self::DiskWant
            | Self::Reach
            | Self::Audited
            | Self::DiskAudited => peer == Peer::Standby,
            Self::Hello
            | Self::BasePages
            | Self::CheckpointBegin
            | Self::Pages
            | Self::State
            | Self::StateChanges
            | Self::CheckpointEnd
            | Self::DiskWrites
            | Self::DiskSums
            | Self::DiskBlocks
            | Self::Input
            | Self::Output
            | Self::Released
            | Self::Audit
            | Self::DiskAudit
            | Self::End
            | Self::Dismiss => peer == Peer::Primary,
        }
    }
}
