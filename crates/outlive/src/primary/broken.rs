//! What the coordinator does when something is broken at this host but the VM still runs: it asks the decisions
//! whether the VM goes to its standby, and tells people.

use std::time::{Duration, Instant};

use outlive_pair::{Broken, Kept, PrimaryEvent};

use super::coordinator::{Coordinator, SAME_FAULT};
use crate::events::{Event, Part};
use crate::network::Sight;

/// How often the disks are checked for requests that they do not answer.
const LOOK: Duration = Duration::from_secs(1);
/// A fault that comes again and again is told of this often.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// A fault this soon after one that the last host had, too, counts as the same.
const SAME_LASTS: Duration = Duration::from_secs(600);

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
    /// A request has not been answered in time.
    late: bool,
    /// When a fault last counted as that of the last host.
    same: Option<Instant>,
    /// Why the VM was left to its standby, until it is known whether that has taken it over.
    pub(super) given_away: Option<String>,
}

impl Coordinator {
    /// This host's disk has failed a request; the guest does not know yet. `again`: it was in flight on the last
    /// host, too.
    pub(super) fn disk_fault(&mut self, why: String, again: bool) {
        self.faults.disk = why;
        let again = self.is_the_same(again, SAME_FAULT);
        self.look_at_shared_now();
        self.with.driver.handle(PrimaryEvent::Broken { what: Broken::Disk, again });
    }

    /// Whether a fault counts as that of the last host, so that handing the VM back would not help: it met a
    /// request of the last host, it came soon, or one that counted came not long ago.
    fn is_the_same(&mut self, again: bool, soon: Duration) -> bool {
        let lasts = self.faults.same.is_some_and(|at| at.elapsed() < SAME_LASTS);
        let same = again || lasts || self.came_within(soon);
        if same {
            self.faults.same = Some(Instant::now());
        }
        same
    }

    /// Whether the VM was taken over so recently.
    fn came_within(&self, time: Duration) -> bool {
        self.with.took_over.is_some_and(|at| at.elapsed() < time)
    }

    /// A disk of this host that does not answer is as bad as one that fails. After a takeover what was in
    /// flight is issued again, so storage that is behind both hosts' images would not answer the second one
    /// either.
    pub(super) fn look_at_disks(&mut self) {
        self.look_at_shared();
        let Some(limit) = self.with.disk_timeout else { return };
        if self.faults.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        self.faults.looked = Some(Instant::now());
        let mut own = self.with.machine.disks().iter().filter(|disk| !disk.is_shared());
        let late = own.find(|disk| disk.unanswered_for() >= limit);
        let late = late.map(|disk| (disk.index(), disk.has_reissued()));
        if let Some((index, again)) = late {
            self.faults.late = true;
            self.faults.disk =
                format!("disk {index} has not answered a request for {} s", limit.as_secs_f32());
            let again = self.is_the_same(again, SAME_FAULT + limit);
            self.with.driver.handle(PrimaryEvent::Broken { what: Broken::Disk, again });
        } else if std::mem::take(&mut self.faults.late) && !self.with.machine.has_failed_requests() {
            tracing::info!("this host's disks answer again");
            self.with.events.emit(Event::HostMended { part: Part::Disk });
            self.with.driver.handle(PrimaryEvent::Mended { what: Broken::Disk });
        }
    }

    /// The network of the guest's clients is out of reach, or is there again, or nothing tells.
    pub(super) fn network(&mut self, sight: Sight) {
        let what = Broken::Network;
        match sight {
            Some(Err(why)) => {
                tracing::warn!("this host is cut off from the clients' network: {why}");
                self.faults.network = why.to_string();
                self.look_at_shared_now();
                self.with.driver.handle(PrimaryEvent::Broken { what, again: false });
            }
            // What nobody can tell moves no VM.
            None => {
                tracing::warn!("nothing tells any more whether this host reaches the clients' network");
                self.with.driver.handle(PrimaryEvent::Mended { what });
            }
            Some(Ok(())) => {
                tracing::info!("this host reaches the clients' network again");
                self.with.events.emit(Event::HostMended { part: Part::Network });
                self.with.driver.handle(PrimaryEvent::Mended { what });
            }
        }
    }

    /// The VM is left to its standby. This process keeps it until the arbiter has said who has it.
    pub(super) fn give_away(&mut self, what: Broken) {
        let why = self.why(what);
        tracing::error!(
            "{why}; the VM is left to its standby, and kept until it is known whether that takes it"
        );
        self.with.events.emit(Event::HostFault { part: part(what), why: why.clone(), kept: None });
        self.faults.given_away = Some(why);
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
