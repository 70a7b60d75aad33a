//! What a process tells about itself to whoever makes metrics: a line of JSON with numbers and names.
//!
//! It has no words of the log, no addresses and nothing of the guest, because every user of the host may read it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::histogram::Buckets;
use super::tally::{Counted, Takeovers};
use crate::events::{PageCounts, Role};

/// The version of the line. It grows when a field changes its meaning; new fields do not change it.
pub(crate) const FORMAT: u32 = 1;
/// The longest name of a VM that is believed, in bytes.
const LONGEST_NAME: usize = 256;
/// The most disks of a VM that are believed.
const MOST_DISKS: usize = 64;

/// The whole line. Times of the day are seconds since 1970, spans are seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// The release of the process.
    pub(crate) release: String,
    /// Name of the VM, once it is known.
    pub(crate) vm: Option<String>,
    /// Its id.
    pub(crate) id: Option<String>,
    /// What the process is to it.
    pub(crate) role: Role,
    /// When the process began.
    pub(crate) started: f64,
    /// See [`Status`](crate::status::Status), whose facts these are.
    pub(crate) protected: bool,
    /// Since when.
    pub(crate) since: f64,
    /// Whether the VM runs here and its output may leave.
    pub(crate) active: bool,
    /// Nobody knows yet which side goes on, or the VM waits for its fence command.
    pub(crate) waits: bool,
    /// How long the VM has been waiting for the fence command.
    pub(crate) fencing: Option<f64>,
    /// The generation that runs the VM.
    pub(crate) generation: Option<u64>,
    /// The newest committed checkpoint.
    pub(crate) checkpoint: Option<u64>,
    /// Since its commit.
    pub(crate) since_commit: Option<f64>,
    /// Checkpoints that are sent and not committed.
    pub(crate) in_flight: Option<u64>,
    /// Bytes sent since the last commit.
    pub(crate) bytes_in_flight: Option<u64>,
    /// The loss of this host.
    pub(crate) loss_of_this_host: Loss,
    /// The loss of the other one.
    pub(crate) loss_of_other_host: Loss,
    /// The arbiter, if there is one that is no person.
    pub(crate) arbiter: Option<ArbiterReport>,
    /// How long the standby has been without the arbiter, as it says.
    pub(crate) standby_without_arbiter: Option<f64>,
    /// Whether the process is confined.
    pub(crate) sandbox: bool,
    /// Whether TLS protects its links; `None` if it has none.
    pub(crate) tls: Option<bool>,
    /// Until when this host's certificate counts.
    pub(crate) certificate_until: Option<f64>,
    /// How often a protection has ended in this process.
    pub(crate) protection_losses: u64,
    /// The audit.
    pub(crate) audit: AuditReport,
    /// The record that a standby writes, if it was told to.
    #[serde(default)]
    pub(crate) record: Option<RecordReport>,
    /// How long a standby took to apply a checkpoint, in nanoseconds.
    #[serde(default)]
    pub(crate) apply: Buckets,
    /// What has happened.
    #[serde(default)]
    pub(crate) counted: Counted,
    /// The takeovers.
    #[serde(default)]
    pub(crate) takeovers: Takeovers<Buckets>,
    /// What only the host counts where the VM runs.
    #[serde(default)]
    pub(crate) running: Option<Running>,
}

/// What the loss of a host would mean now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Loss {
    /// Whether the VM would go on without anybody's help.
    pub(crate) survived: bool,
    /// How much of the guest's work would be lost, in seconds.
    pub(crate) lost: Option<f64>,
}

/// What is known of the arbiter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ArbiterReport {
    /// Since its last answer.
    pub(crate) answered: Option<f64>,
    /// For how long it has been lost.
    pub(crate) lost: Option<f64>,
}

/// How far the audit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct AuditReport {
    /// Pages compared.
    pub(crate) pages: u64,
    /// How often all of them had their turn.
    pub(crate) rounds: u64,
    /// How often a copy differed.
    pub(crate) differences: u64,
    /// How often all of the disks had their turn.
    #[serde(default)]
    pub(crate) disk_rounds: u64,
}

/// How far a record is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RecordReport {
    /// Whether checkpoints are written.
    pub(crate) active: bool,
    /// How far back the VM can be had, in seconds; `None` before a base is whole.
    pub(crate) reach: Option<f64>,
    /// Bytes of the whole record.
    pub(crate) bytes: u64,
    /// How often the VM went on without being recorded.
    pub(crate) gaps: u64,
}

/// How far the audit of a disk is, where the VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct AuditedDisk {
    /// Its position among the VM's disks.
    pub(crate) disk: u16,
    /// Its length in bytes.
    pub(crate) size: u64,
    /// Bytes compared.
    pub(crate) compared: u64,
    /// Bytes left out of a round.
    pub(crate) left_out: u64,
    /// Since the standby last compared some of it, or since it could have; nothing without a standby.
    pub(crate) age: Option<f64>,
}

/// What only the host counts where the VM runs, since it runs there. Times are nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Running {
    /// Checkpoints committed.
    pub(crate) checkpoints: u64,
    /// Bytes sent to the standby.
    pub(crate) bytes: u64,
    /// For how long the guest was held because it wrote faster than the link carries.
    pub(crate) guest_held_ns: u64,
    /// How pages were written down.
    pub(crate) pages: PageCounts,
    /// The frames of the network card.
    pub(crate) frames: Option<Frames>,
    /// The pause.
    pub(crate) pause: Buckets,
    /// The same, for the vCPU that was away longest.
    pub(crate) vcpu_pause: Buckets,
    /// From the end of the pause to the commit.
    pub(crate) commit: Buckets,
    /// Dirty pages of a checkpoint.
    pub(crate) dirty_pages: Buckets,
    /// Bytes sent for a checkpoint.
    pub(crate) checkpoint_bytes: Buckets,
    /// Checkpoints in flight when one was sent.
    pub(crate) backlog: Buckets,
    /// Bytes in flight then.
    pub(crate) backlog_bytes: Buckets,
    /// Frames held when a commit came.
    pub(crate) held_frames: Buckets,
    /// Bytes of those frames.
    pub(crate) held_bytes: Buckets,
    /// The steps of a checkpoint by their names.
    pub(crate) phases: Vec<(String, Buckets)>,
    /// The disks that the audit compares.
    pub(crate) disks: Vec<AuditedDisk>,
}

/// What becomes of frames that the guest sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Frames {
    /// Held now.
    pub(crate) held: u64,
    /// Their bytes.
    pub(crate) held_bytes: u64,
    /// Held, and then let out.
    pub(crate) released: u64,
    /// Let out without being held.
    pub(crate) passed: u64,
    /// Thrown away because another host has the VM.
    pub(crate) discarded: u64,
    /// Not taken by this host's network.
    pub(crate) refused: u64,
    /// How often there was no room for one.
    pub(crate) full: u64,
}

impl Running {
    /// All histograms.
    fn histograms(&self) -> impl Iterator<Item = &Buckets> {
        let named = [
            &self.pause,
            &self.vcpu_pause,
            &self.commit,
            &self.dirty_pages,
            &self.checkpoint_bytes,
            &self.backlog,
            &self.backlog_bytes,
            &self.held_frames,
            &self.held_bytes,
        ];
        named.into_iter().chain(self.phases.iter().map(|(_, phase)| phase))
    }
}

/// Why a report is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unsound {
    /// Another version.
    #[error(
        "it speaks version {0} of the report, and this program speaks version {FORMAT}: use the newer one"
    )]
    Format(u32),
    /// Nothing that this program would write.
    #[error("it tells what cannot be")]
    Impossible,
}

impl Report {
    /// Checks what another process says.
    ///
    /// # Errors
    /// See [`Unsound`].
    pub(crate) fn check(&self) -> Result<(), Unsound> {
        if self.format != FORMAT {
            return Err(Unsound::Format(self.format));
        }
        let names = [Some(&self.release), self.vm.as_ref(), self.id.as_ref()];
        let phases = self.running.iter().flat_map(|running| &running.phases);
        let names = names.into_iter().flatten().chain(phases.clone().map(|(name, _)| name));
        // A histogram that a release does not have is empty.
        let sound = |it: &Buckets| it.is_sound() || *it == Buckets::default();
        let takeovers = self.takeovers.steps().into_iter().map(|(_, it)| it).chain([&self.takeovers.total]);
        let own = self.running.iter().flat_map(Running::histograms);
        let mut histograms = own.chain(takeovers).chain([&self.apply]);
        let known =
            names.clone().all(|name| name.len() <= LONGEST_NAME && !name.chars().any(char::is_control));
        // Two of one name would be one series twice.
        let mut seen: Vec<_> = phases.map(|(name, _)| name).collect();
        seen.sort();
        let single = seen.len() <= LONGEST_NAME && seen.is_sorted_by(|a, b| a < b);
        let numbered =
            |disks: &[AuditedDisk]| disks.len() <= MOST_DISKS && disks.is_sorted_by(|a, b| a.disk < b.disk);
        let single = single && self.running.iter().all(|running| numbered(&running.disks));
        if known && single && histograms.all(sound) { Ok(()) } else { Err(Unsound::Impossible) }
    }
}

/// A time of the day as metrics have it.
pub(crate) fn unix(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
