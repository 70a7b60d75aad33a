//! What events count and measure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::audit::AuditProgress;

/// The counters of [`Event::Stats`](super::Event::Stats), all since the process became the active side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The generation that runs the VM.
    pub generation: u64,
    /// Checkpoints committed.
    pub checkpoints: u64,
    /// Checkpoints per second lately.
    pub rate_hz: f64,
    /// Bytes sent to the standby.
    pub bytes: u64,
    /// Frames that wait for their checkpoint's commit right now.
    pub held_frames: u64,
    /// For how long the guest was held, because it wrote faster than the link carries.
    #[serde(default)]
    pub guest_held_us: u64,
    /// How the pages of checkpoints were written down.
    #[serde(default)]
    pub pages: PageCounts,
    /// What the audit has compared.
    #[serde(default)]
    pub audit: AuditCounts,
}

/// What the audit has compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditCounts {
    /// Pages that the standby has compared.
    pub pages: u64,
    /// How often all pages of the VM have had their turn.
    pub rounds: u64,
    /// Bytes of disks that the standby has compared.
    #[serde(default)]
    pub disk_bytes: u64,
    /// How often all of the replicated disks have had their turn.
    #[serde(default)]
    pub disk_rounds: u64,
    /// Bytes of disks that were left out of a round, because they could not be compared however often they were tried.
    #[serde(default)]
    pub disk_left_out: u64,
    /// How often a copy was found to differ.
    pub differences: u64,
}

impl From<AuditProgress> for AuditCounts {
    fn from(progress: AuditProgress) -> Self {
        let AuditProgress { pages, rounds, differences, .. } = progress;
        let AuditProgress { disk_bytes, disk_rounds, disk_left_out, .. } = progress;
        Self { pages, rounds, disk_bytes, disk_rounds, disk_left_out, differences }
    }
}

/// How the pages of checkpoints were written down for the standby. All together are the pages that were
/// captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Whole.
    pub raw: u64,
    /// As zeroes.
    pub zero: u64,
    /// As the granules that have changed.
    pub granules: u64,
    /// Bytes of those granules, with their masks.
    pub granule_bytes: u64,
    /// Not at all, because nothing has changed.
    pub unchanged: u64,
}

impl PageCounts {
    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.raw += other.raw;
        self.zero += other.zero;
        self.granules += other.granules;
        self.granule_bytes += other.granule_bytes;
        self.unchanged += other.unchanged;
    }
}

/// What [`Event::Measured`](super::Event::Measured) says. Everything covers the time since the last such event, so readers can add it
/// up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Microseconds since the last such event.
    pub span_us: u64,
    /// The phases of checkpoints by name, in *nanoseconds*, as `[value, count]` pairs ([`pairs`](super::pairs)).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases: BTreeMap<String, Vec<(u64, u64)>>,
    /// Dirty pages of a checkpoint, as `[value, count]` pairs ([`pairs`](super::pairs)).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dirty_pages: Vec<(u64, u64)>,
    /// What the kernel's scheduler gave the threads of the process, by name: at most 64 of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub threads: BTreeMap<String, ThreadTime>,
}

/// The time of one thread, or of several of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadTime {
    /// Microseconds on a core.
    pub run_us: u64,
    /// Microseconds in which it wanted to run and waited for a core.
    pub wait_us: u64,
    /// How often it got a core.
    pub switches: u64,
}
