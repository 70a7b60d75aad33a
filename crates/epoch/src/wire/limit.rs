//! How long a section may be. Apart from the kinds: it knows every message, and every message knows its kind.

use super::disk_sums::DISK_SUM_LEN;
use super::kind::SectionKind;
use super::{
    ack, audit, checkpoint, disk_audit, disk_sums, disk_want, end, heartbeat, reach, released, sight, state,
    state_changes,
};
use crate::image::limits::{
    MAX_AUDIT_RANGES, MAX_AUDIT_SPANS, MAX_FRAMES_BYTES, MAX_PAYLOAD, MAX_SUMS, MAX_VCPU_STATE,
};

impl SectionKind {
    /// Most bytes of the payload.
    pub fn limit(self) -> u32 {
        let bytes = match self {
            Self::Hello => 4096,
            Self::Accept => 256,
            Self::Refuse => 512,
            Self::BasePages | Self::Pages | Self::DiskWrites | Self::DiskBlocks => MAX_PAYLOAD,
            Self::CheckpointBegin => checkpoint::BEGIN_LEN,
            Self::CheckpointEnd => checkpoint::END_LEN,
            Self::State => state::HEAD_LEN + MAX_VCPU_STATE,
            Self::StateChanges => state_changes::MOST_BYTES,
            Self::Ack => ack::LEN,
            Self::Heartbeat => heartbeat::LEN,
            Self::Reach => reach::LEN,
            Self::Input | Self::Output => MAX_FRAMES_BYTES,
            Self::Released => released::LEN,
            Self::Audit => audit::HEAD_LEN + MAX_AUDIT_SPANS * audit::SPAN_LEN,
            Self::Audited => audit::REPORT_LEN,
            Self::ArbiterSight => sight::LEN,
            Self::DiskAudit => disk_audit::HEAD_LEN + MAX_AUDIT_RANGES * disk_audit::RANGE_LEN,
            Self::DiskAudited => disk_audit::REPORT_LEN,
            Self::End | Self::Leave => end::LEN,
            Self::Dismiss => 0,
            Self::DiskSums => disk_sums::HEAD_LEN + MAX_SUMS * DISK_SUM_LEN,
            Self::DiskWant => disk_want::HEAD_LEN + MAX_SUMS * 2,
        };
        bytes as u32
    }
}
