//! What must be true at the end of a schedule, long after its last fault: of the world, and of what was counted.

use super::hosts::Process;
use super::images::Image;
use super::run::Faults;
use super::stats::Stats;
use super::truth::Life;
use super::world::{Host, World};
use crate::PrimaryStatus;

/// What these faults must not do, although it breaks no invariant: cost a VM, or move it.
pub(super) fn amiss(faults: Faults, stats: &Stats) -> Option<String> {
    let disturbed = (stats.links_lost, stats.unreachable, stats.takeovers) != (0, 0, 0);
    let what = match faults {
        Faults::None if disturbed => "without a fault something happened",
        Faults::Stop if stats.takeovers > 0 => "a standby that was stopped took over",
        // While the primary is at long work, which it has announced, it asks nobody.
        Faults::Garbled if stats.takeovers > 0 && stats.long_works + stats.long_pauses == 0 => {
            "a damaged record moved the VM"
        }
        // A link that is lost before the standby has left is decided by the arbiter, and while that is out of reach
        // the primary's turn goes by.
        Faults::Worthless if stats.takeovers > 0 && stats.unreachable == 0 => {
            "a worthless copy was taken over"
        }
        Faults::Many | Faults::Copies => return None,
        _ if stats.vm_lost > 0 => "one fault cost the VM",
        _ => return None,
    };
    Some(format!("{what}: {stats:?}"))
}

impl World {
    /// Some host makes progress and is protected again, unless the VM has ended or was lost to a second
    /// fault.
    pub(super) fn check_liveness(&mut self, tip: usize) {
        if self.truth.ended {
            return;
        }
        let (newest, owner) = self.truth.newest();
        if !self.alive(owner) {
            // The owner died. That may only end the VM if nobody holds a committed checkpoint of it.
            let holds = |process: &Process| matches!(process, Process::Standby(s) if s.driver.machine().committed().is_some());
            match self.hosts.iter().position(|host| holds(&host.process)) {
                Some(host) => self
                    .truth
                    .fail(format!("host {host} holds the VM of generation {newest} and does not run it")),
                None if self.disk_lost => self.stats.vm_lost += 1,
                None if !self.company => self.truth.fail("one fault has cost the VM".into()),
                None => self.check_images(newest, owner),
            }
            return;
        }
        let status = match &self.hosts[owner.0].process {
            Process::Primary(p) => p.driver.machine().status(),
            _ => {
                return self
                    .truth
                    .fail(format!("{owner:?} owns generation {newest} and does not run the VM"));
            }
        };
        if self.truth.tip == tip {
            self.truth
                .fail(format!("{owner:?} owns generation {newest}, is {status:?} and lets nothing out"));
        }
        // Whoever may own the next generation looks for no standby before the arbiter has said so.
        let waits = status == PrimaryStatus::Alone && self.hosts[owner.0].arbiter_cut_until == u64::MAX;
        if status != PrimaryStatus::Protected && !waits {
            self.truth.fail(format!("{owner:?} found no new standby; it is {status:?}"));
        }
    }

    /// The VM runs nowhere, and nobody alive has it. Then no image may have all that the world has seen.
    fn check_images(&mut self, newest: u64, owner: Life) {
        // An operator has ended the VM for a new one, which may not have come to its start.
        if self.forks > 0 {
            return;
        }
        // An operator who put a copy in the place of an image needs a word for it now; and for an older image where the
        // copy took the place of the newest.
        let overwritten = self.hosts[owner.0].image.as_ref().is_some_and(|image| image.copied);
        let asks = |image: &Image| image.copied || overwritten && image.generation < newest;
        let asks = |image: &Image| self.copies && (image.replica || asks(image));
        let whole = |host: &Host| {
            let image = host.image.as_ref().filter(|image| image.whole && !asks(image));
            image.is_some_and(|image| self.truth.is_past_of(self.truth.tip, image.node))
        };
        match self.hosts.iter().position(whole) {
            Some(host) => self.truth.fail(format!(
                "the VM of generation {newest} runs nowhere although the image of host {host} is whole: {:?}",
                self.hosts[host].image
            )),
            None => self.stats.vm_lost += 1,
        }
    }
}
