//! What was written since the VM was handed over to this host.
//!
//! Tracking began before the first instruction here (`standby/takeover.rs`) and goes on until the host from which the
//! VM came is back as its standby, which needs only these pages; or until it has not come for so long, or so much was
//! written, that a whole base is no worse. See [`outlive_pair::Since`].

use std::time::{Duration, Instant};

use outlive_dirty::Gfn;

use super::coordinator::Coordinator;

/// How long the old host is waited for. Tracking costs the guest a fault for each page that it writes first.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was written, as far as the tracker has given it out.
pub(super) struct Known {
    pages: Vec<Gfn>,
    until: Instant,
    /// As many pages as are worth it.
    most: usize,
}

impl Known {
    /// Tracking has begun. A VM has so many pages.
    pub(super) fn begin(pages: u64) -> Self {
        Self { pages: Vec::new(), until: Instant::now() + PATIENCE, most: pages as usize / 4 }
    }

    /// The pages, for the base; those that the tracker still has are not among them.
    pub(super) fn into_pages(self) -> Vec<Gfn> {
        self.pages
    }
}

impl Coordinator {
    /// A dirty log is full, and no standby is there: its pages are taken for later.
    pub(super) fn keep_dirty(&mut self) {
        let Some(known) = &mut self.with.known else {
            // Nobody wants to know, and without tracking a full log holds no vCPU.
            return self.with.machine.disable_tracking();
        };
        if let Err(error) = self.with.machine.take_dirty(&mut known.pages) {
            self.forget_writes();
            return self.capture_failed(&error);
        }
        known.pages.sort_unstable();
        known.pages.dedup();
    }

    /// Ends what nobody comes for.
    pub(super) fn look_at_known(&mut self) {
        let Some(known) = &self.with.known else { return };
        if self.protection.is_none() && (known.until <= Instant::now() || known.pages.len() > known.most) {
            tracing::info!(
                "the host from which the VM came has not come back: its next standby gets a whole copy"
            );
            self.forget_writes();
        }
    }

    /// From now on writes may be missed.
    pub(super) fn forget_writes(&mut self) {
        if self.with.known.take().is_some() {
            self.with.driver.forgets_writes();
            self.with.machine.disable_tracking();
        }
    }
}
