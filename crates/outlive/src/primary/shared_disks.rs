//! Disks that both hosts use, when the VM is to go of its own accord.
//!
//! A write that the storage has not answered cannot be recalled: carried out after the VM has gone, it would destroy what
//! the new host has written since. So the VM goes only if nothing hangs there, and a guest that stands still for its
//! hand-over is let go only once the storage has answered all that was let out. A host that dies asks nobody; for that
//! there is `--fence`.

use std::time::{Duration, Instant};

use outlive_pair::PrimaryEvent;

use super::coordinator::Coordinator;

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
    hang: bool,
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
    /// For how long the oldest request at a shared disk has waited.
    fn shared_unanswered(&self) -> Duration {
        let shared = self.with.machine.disks().iter().filter(|disk| disk.is_shared());
        shared.map(|disk| disk.unanswered_for()).max().unwrap_or_default()
    }

    /// Looks now and then.
    pub(super) fn look_at_shared(&mut self) {
        if self.shared.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.look_at_shared_now();
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
