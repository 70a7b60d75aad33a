//! All messages. Every parse function takes plain bytes and accepts any input.

use super::accept::Accept;
use super::ack::Ack;
use super::audit::{Audit, Audited};
use super::checkpoint::{CheckpointBegin, CheckpointEnd};
use super::disk_audit::{DiskAudit, DiskAudited};
use super::disk_sums::DiskSums;
use super::disk_want::DiskWant;
use super::end::{EndReason, LeaveReason};
use super::error::WireError;
use super::fields::Fields;
use super::frames::TailFrames;
use super::hello::Hello;
use super::kind::SectionKind;
use super::pages::Pages;
use super::refuse::Refuse;
use super::section::Section;
use super::sight::ArbiterSight;
use super::state_changes::StateChanges;
use super::{disk_writes, end, heartbeat, reach, released, state};
use crate::image::{StateSection, UncheckedRecords};

/// Any message, parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// See [`Hello`].
    Hello(Box<Hello>),
    /// See [`Accept`].
    Accept(Accept),
    /// See [`Refuse`].
    Refuse(Refuse),
    /// Pages of the base synchronisation; their tag is the round.
    BasePages(Pages<'a>),
    /// See [`CheckpointBegin`].
    CheckpointBegin(CheckpointBegin),
    /// Pages of the open checkpoint; their tag is its number.
    Pages(Pages<'a>),
    /// A state section of the open checkpoint.
    State {
        /// The checkpoint's number.
        checkpoint: u64,
        /// The section.
        state: StateSection<'a>,
    },
    /// See [`StateChanges`].
    StateChanges(StateChanges<'a>),
    /// Writes to disks in the open checkpoint.
    DiskWrites {
        /// The checkpoint's number.
        checkpoint: u64,
        /// The writes, in order. They are still to be checked.
        writes: UncheckedRecords<'a>,
    },
    /// See [`CheckpointEnd`].
    CheckpointEnd(CheckpointEnd),
    /// See [`DiskSums`].
    DiskSums(DiskSums<'a>),
    /// See [`DiskWant`].
    DiskWant(DiskWant),
    /// Chunks of a disk of the base synchronisation.
    DiskBlocks {
        /// The round: 1 for chunks that were wanted by their sums, more for chunks that were written
        /// meanwhile.
        round: u64,
        /// The chunks as writes. They are still to be checked.
        blocks: UncheckedRecords<'a>,
    },
    /// See [`Ack`].
    Ack(Ack),
    /// The sender lives. From the primary the stamp is its clock; from the standby it is the newest stamp
    /// heard.
    Heartbeat {
        /// Microseconds of the primary's clock.
        stamp_us: u64,
    },
    /// Whether the standby's host reaches the guest's clients; `None` if it does not know.
    Reach(Option<bool>),
    /// Frames that the guest was given and that no checkpoint has.
    Input(TailFrames<'a>),
    /// Frames that the guest has sent in the open checkpoint's epoch.
    Output(TailFrames<'a>),
    /// All output of the guest has left that it has sent in the epochs up to this one.
    Released {
        /// The epoch.
        through: u64,
    },
    /// See [`Audit`].
    Audit(Audit<'a>),
    /// See [`Audited`].
    Audited(Audited),
    /// See [`ArbiterSight`].
    ArbiterSight(ArbiterSight),
    /// See [`DiskAudit`].
    DiskAudit(DiskAudit<'a>),
    /// See [`DiskAudited`].
    DiskAudited(DiskAudited),
    /// The VM has ended in order.
    End(EndReason),
    /// The standby leaves and will not take over.
    Leave(LeaveReason),
    /// The primary goes on without this standby.
    Dismiss,
}

impl<'a> Message<'a> {
    /// Parses the payload of a section.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse(section: &Section<'a>) -> Result<Self, WireError> {
        Self::parse_payload(section.kind(), section.header().version, section.payload())
    }

    /// Parses a payload of a kind, in a version that [`SectionHeader::parse`](super::SectionHeader::parse)
    /// has accepted. Takes any bytes.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse_payload(kind: SectionKind, version: u16, payload: &'a [u8]) -> Result<Self, WireError> {
        Ok(match kind {
            SectionKind::Hello => Self::Hello(Box::new(Hello::parse(version, payload)?)),
            SectionKind::Accept => Self::Accept(Accept::parse(version, payload)?),
            SectionKind::Refuse => Self::Refuse(Refuse::parse(payload)?),
            SectionKind::BasePages => Self::BasePages(Pages::parse(kind, version, payload)?),
            SectionKind::CheckpointBegin => Self::CheckpointBegin(CheckpointBegin::parse(version, payload)?),
            SectionKind::Pages => Self::Pages(Pages::parse(kind, version, payload)?),
            SectionKind::State => {
                let (checkpoint, state) = state::parse(payload)?;
                Self::State { checkpoint, state }
            }
            SectionKind::StateChanges => Self::StateChanges(StateChanges::parse(payload)?),
            SectionKind::DiskWrites => {
                let (checkpoint, writes) = disk_writes::parse(kind, payload)?;
                Self::DiskWrites { checkpoint, writes }
            }
            SectionKind::CheckpointEnd => Self::CheckpointEnd(CheckpointEnd::parse(payload)?),
            SectionKind::DiskSums => Self::DiskSums(DiskSums::parse(payload)?),
            SectionKind::DiskWant => Self::DiskWant(DiskWant::parse(payload)?),
            SectionKind::DiskBlocks => {
                let (round, blocks) = disk_writes::parse(kind, payload)?;
                Self::DiskBlocks { round, blocks }
            }
            SectionKind::Ack => Self::Ack(Ack::parse(payload)?),
            SectionKind::Heartbeat => Self::Heartbeat { stamp_us: heartbeat::parse(payload)? },
            SectionKind::Reach => Self::Reach(reach::parse(payload)?),
            SectionKind::Input => Self::Input(TailFrames::parse(kind, payload)?),
            SectionKind::Output => Self::Output(TailFrames::parse(kind, payload)?),
            SectionKind::Released => Self::Released { through: released::parse(payload)? },
            SectionKind::Audit => Self::Audit(Audit::parse(payload)?),
            SectionKind::Audited => Self::Audited(Audited::parse(payload)?),
            SectionKind::ArbiterSight => Self::ArbiterSight(ArbiterSight::parse(payload)?),
            SectionKind::DiskAudit => Self::DiskAudit(DiskAudit::parse(payload)?),
            SectionKind::DiskAudited => Self::DiskAudited(DiskAudited::parse(payload)?),
            SectionKind::End => Self::End(end::parse(kind, payload, EndReason::from_wire)?),
            SectionKind::Leave => Self::Leave(end::parse(kind, payload, LeaveReason::from_wire)?),
            SectionKind::Dismiss => {
                Fields::new(kind, payload).end()?;
                Self::Dismiss
            }
        })
    }

    /// The kind of section that carries it.
    pub fn kind(&self) -> SectionKind {
        match self {
            Self::Hello(_) => SectionKind::Hello,
            Self::Accept(_) => SectionKind::Accept,
            Self::Refuse(_) => SectionKind::Refuse,
            Self::BasePages(_) => SectionKind::BasePages,
            Self::CheckpointBegin(_) => SectionKind::CheckpointBegin,
            Self::Pages(_) => SectionKind::Pages,
            Self::State { .. } => SectionKind::State,
            Self::StateChanges(_) => SectionKind::StateChanges,
            Self::DiskWrites { .. } => SectionKind::DiskWrites,
            Self::CheckpointEnd(_) => SectionKind::CheckpointEnd,
            Self::DiskSums(_) => SectionKind::DiskSums,
            Self::DiskWant(_) => SectionKind::DiskWant,
            Self::DiskBlocks { .. } => SectionKind::DiskBlocks,
            Self::Ack(_) => SectionKind::Ack,
            Self::Heartbeat { .. } => SectionKind::Heartbeat,
            Self::Reach(_) => SectionKind::Reach,
            Self::Input(_) => SectionKind::Input,
            Self::Output(_) => SectionKind::Output,
            Self::Released { .. } => SectionKind::Released,
            Self::Audit(_) => SectionKind::Audit,
            Self::Audited(_) => SectionKind::Audited,
            Self::ArbiterSight(_) => SectionKind::ArbiterSight,
            Self::DiskAudit(_) => SectionKind::DiskAudit,
            Self::DiskAudited(_) => SectionKind::DiskAudited,
            Self::End(_) => SectionKind::End,
            Self::Leave(_) => SectionKind::Leave,
            Self::Dismiss => SectionKind::Dismiss,
        }
    }
}
