//! What the coordinator does when something is broken at this host but the VM still runs: it asks the decisions
//! whether the VM goes to its standby, and tells people.

use std::time::{Duration, Instant};

use outlive_pair::{Broken, Kept, PrimaryEvent};

use super::coordinator::{Coordinator, SAME_FAULT};
use crate::events::{Event, Part};

/// How often the disks are checked for requests that they do not answer.
const LOOK: Duration = Duration::from_secs(1);
/// A fault that comes again and again is told of this often.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// What is known of faults; see the module.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// The last words about a disk, and about the network.
    disk: String,
    network: String,
    /// When the disks were last checked.
    looked: Option<Instant>,
    /// When a disk's fault was last told of.
    told: Option<Instant>,
    /// The VM was left to its standby.
    pub(super) given_away: bool,
}

impl Coordinator {
    /// This host's disk has failed a request; the guest does not know yet.
    pub(super) fn disk_fault(&mut self, why: String) {
        self.faults.disk = why;
        let soon = self.came_within(SAME_FAULT);
        self.with.driver.handle(PrimaryEvent::Broken { what: Broken::Disk, again: soon });
    }

    /// Whether the VM was taken over so recently.
    fn came_within(&self, time: Duration) -> bool {
        self.with.took_over.is_some_and(|at| at.elapsed() < time)
    }

    /// A disk that does not answer is as bad as one that fails. After a takeover what was in flight is issued
    /// again, so storage that both hosts share would not answer the second one either.
    pub(super) fn look_at_disks(&mut self) {
        let Some(limit) = self.with.disk_timeout else { return };
        if self.faults.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        self.faults.looked = Some(Instant::now());
        let late = self.with.machine.disks().iter().find(|disk| disk.unanswered_for() >= limit);
        if let Some(disk) = late {
            let (index, secs) = (disk.index(), limit.as_secs_f32());
            self.faults.disk = format!("disk {index} has not answered a request for {secs} s");
            let again = self.came_within(SAME_FAULT + limit);
            self.with.driver.handle(PrimaryEvent::Broken { what: Broken::Disk, again });
        }
    }

    /// The network of the guest's clients is out of reach, or is there again.
    pub(super) fn network(&mut self, broken: Option<String>) {
        let what = Broken::Network;
        match broken {
            Some(why) => {
                tracing::warn!("this host is cut off from the clients' network: {why}");
                self.faults.network = why;
                self.with.driver.handle(PrimaryEvent::Broken { what, again: false });
            }
            None => {
                tracing::info!("this host reaches the clients' network again");
                self.with.events.emit(Event::HostMended { part: Part::Network });
                self.with.driver.handle(PrimaryEvent::Mended { what });
            }
        }
    }

    /// The VM is left to its standby.
    pub(super) fn give_away(&mut self, what: Broken) {
        let why = self.why(what);
        self.faults.given_away = true;
        self.with.events.emit(Event::HostFault { part: part(what), why: why.clone(), kept: None });
        self.over = Some(why);
    }

    /// The VM stays. The guest hears now of requests that have failed.
    pub(super) fn endure(&mut self, what: Broken, kept: Kept) {
        if what == Broken::Disk {
            self.with.machine.tell_disk_errors();
            if self.faults.told.is_some_and(|told| told.elapsed() < TELL_AGAIN) {
                return;
            }
            self.faults.told = Some(Instant::now());
        }
        let (why, kept) = (self.why(what), kept.to_string());
        tracing::warn!("{why}; the VM stays here: {kept}");
        self.with.events.emit(Event::HostFault { part: part(what), why, kept: Some(kept) });
    }

    fn why(&self, what: Broken) -> String {
        match what {
            Broken::Disk => format!("this host's disk fails the guest: {}", self.faults.disk),
            Broken::Network => {
                format!("this host is cut off from the clients' network: {}", self.faults.network)
            }
        }
    }
}

fn part(what: Broken) -> Part {
    match what {
        Broken::Disk => Part::Disk,
        Broken::Network => Part::Network,
    }
}
