//! Disks that both hosts use, when the VM is to go of its own accord.
//!
//! A write that the storage has not answered cannot be recalled: carried out after the VM has gone, it would destroy what
//! the new host has written since. So the VM goes only if nothing hangs there, and a guest that stands still for its
//! hand-over is let go only once the storage has answered all that was let out. A host that dies asks nobody; for that
//! there is `--fence`.

use std::time::{Duration, Instant};

use outlive_pair::{Kept, PrimaryEvent};

use super::coordinator::Coordinator;
use crate::events::{Event, Part};

/// How often they are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How long a guest that stands still waits for them before it stays here.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often they are looked at meanwhile.
const LEAVING_LOOK: Duration = Duration::from_millis(1);

/// What is known of the shared disks.
#[derive(Debug, Default)]
pub(super) struct SharedDisks {
    looked: Option<Instant>,
    /// One has not answered for so long that the VM stays.
    hang: bool,
    /// One counts as broken, and people have heard of it.
    told: bool,
    /// Since when output of a VM that is handed over leaves.
    leaving: Option<Instant>,
}

impl SharedDisks {
    /// When to look again.
    pub(super) fn due(&self) -> Option<Duration> {
        self.leaving.map(|_| LEAVING_LOOK)
    }

    /// The VM stays, or has gone.
    pub(super) fn forget_hand_over(&mut self) {
        self.leaving = None;
    }
}

impl Coordinator {
    /// For how long the oldest request at a shared disk has waited. Also while the guest stands still: the disks'
    /// threads do nothing then, but what the storage has answered is known.
    fn shared_unanswered(&self) -> Duration {
        let shared = self.with.machine.disks().iter().filter(|disk| disk.is_shared());
        shared.map(|disk| disk.unanswered_for()).max().unwrap_or_default()
    }

    /// Looks now and then.
    pub(super) fn look_at_shared(&mut self) {
        if self.shared.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.look_at_shared_now();
            self.tell_of_shared();
        }
    }

    /// The VM stays with a shared disk that counts as broken, so people hear why the guest waits.
    fn tell_of_shared(&mut self) {
        let Some(limit) = self.with.disk_timeout else { return };
        let mut shared = self.with.machine.disks().iter().filter(|disk| disk.is_shared());
        let late = shared.find(|disk| disk.unanswered_for() >= limit).map(|disk| disk.index());
        let was_told = std::mem::replace(&mut self.shared.told, late.is_some());
        match late {
            Some(index) if !was_told => {
                let why = format!(
                    "the shared disk {index} has not answered a request for {} s, and the guest waits for it",
                    limit.as_secs_f32()
                );
                let kept = Kept::SharedDiskHangs.to_string();
                tracing::warn!("{why}; the VM stays here: {kept}; mend the storage or the way to it");
                self.with.events.emit(Event::HostFault { part: Part::Disk, why, kept: Some(kept) });
            }
            None if was_told => {
                tracing::info!("this host's shared disks answer again");
                self.with.events.emit(Event::HostMended { part: Part::Disk });
            }
            _ => {}
        }
    }

    /// Comes before each decision about leaving. With a fence command the new host waits until this one cannot write.
    pub(super) fn look_at_shared_now(&mut self) {
        self.shared.looked = Some(Instant::now());
        // The standby waits for this time at least, from when it heard this host last.
        let too_long = self.with.stop_budget / 2;
        let hang = !self.with.fences && self.shared_unanswered() >= too_long;
        if std::mem::replace(&mut self.shared.hang, hang) != hang {
            self.with.driver.handle(PrimaryEvent::SharedDisks { hang });
        }
    }

    /// The output of a VM that is handed over has been let out.
    pub(super) fn output_leaves(&mut self) {
        self.shared.leaving = Some(Instant::now());
        self.look_at_leaving();
    }

    /// Lets the VM go once the shared disks have answered.
    pub(super) fn look_at_leaving(&mut self) {
        let Some(since) = self.shared.leaving else { return };
        if self.with.fences || self.shared_unanswered() == Duration::ZERO {
            self.shared.leaving = None;
            self.vm_has_left();
        } else if since.elapsed() >= PATIENCE {
            self.shared.leaving = None;
            self.with.driver.handle(PrimaryEvent::OutputStays);
        }
    }
}
