//! Hosts on which the VM still runs although their disk fails or the guest's clients cannot reach them.

use super::HANDBACK;
use super::hosts::Process;
use super::primary::PrimaryProcess;
use super::truth::Life;
use super::world::{Happening, Msg, World};
use crate::{Broken, Kept, Link, PrimaryEvent, PrimaryStatus};

impl World {
    /// The disk of the VM's host fails every request for a while; at times all disks do, on storage that all
    /// hosts use.
    pub(super) fn disks_fail(&mut self, until: u64) {
        let (_, owner) = self.truth.newest();
        let all = self.rng.one_in(3);
        for (host, it) in self.hosts.iter_mut().enumerate() {
            if all || host == owner.0 {
                it.disk_fails_until = until;
            }
        }
        self.after(1, Happening::DiskFails(owner));
    }

    /// A request of the guest fails, and the guest does not know yet.
    pub(super) fn disk_fails(&mut self, life: Life) {
        if self.hosts[life.0].disk_fails_until <= self.now {
            return;
        }
        // Whether it is the request that failed on the last host is the program's knowledge.
        let same = self.rng.one_in(2);
        let Some(p) = self.primary_of(life) else { return };
        let again = same && p.came.is_some();
        p.same_fault |= again;
        self.primary(life, PrimaryEvent::Broken { what: Broken::Disk, again });
    }

    /// The host loses its way to the guest's clients; at times all hosts do.
    pub(super) fn cut_off(&mut self, host: usize, until: u64) {
        let all = self.company && self.rng.one_in(3);
        let (_, owner) = self.truth.newest();
        let struck = if self.rng.one_in(2) { owner.0 } else { host };
        for host in (0..self.hosts.len()).filter(|host| all || *host == struck) {
            self.hosts[host].cut_off_until = until;
            self.at(until, Happening::Reconnected { host });
            self.tells_its_way(host);
        }
    }

    pub(super) fn reconnected(&mut self, host: usize) {
        if self.hosts[host].cut_off_until <= self.now {
            self.tells_its_way(host);
        }
    }

    /// Whoever watches the host's network says what it sees.
    fn tells_its_way(&mut self, host: usize) {
        let reaches = self.hosts[host].cut_off_until <= self.now;
        let life = (host, self.hosts[host].life);
        let conn = match &self.hosts[host].process {
            Process::Primary(_) => {
                let what = Broken::Network;
                let broken = PrimaryEvent::Broken { what, again: false };
                return self.primary(life, if reaches { PrimaryEvent::Mended { what } } else { broken });
            }
            Process::Standby(s) => s.driver.ports().copy.as_ref().map(|copy| copy.link),
            Process::Starting | Process::Down => None,
        };
        if let Some(Link(conn)) = conn.filter(|conn| self.conns[conn.0 as usize].open[0]) {
            self.send(conn as usize, 1, Msg::Reaches(reaches));
        }
    }

    /// The VM is left to its standby, whether or not that can take it.
    pub(super) fn gives_away(&mut self, life: Life, what: Broken) {
        self.stats.given_away += 1;
        let now = self.clock(life.0);
        let Some(p) = self.primary_of(life) else { return };
        let (protected, reaches, asked) = (p.protected, p.standby_reaches, p.asked);
        let same = what == Broken::Disk && p.same_fault;
        p.gave = true;
        let soon = p.came.is_some_and(|came| now < came + HANDBACK);
        if asked {
            self.truth.fail(format!("{life:?} gives a VM away whose operator wants it stopped"));
        }
        if same {
            self.truth.fail(format!("{life:?} hands the VM back with the fault that it came with"));
        }
        if !protected {
            self.truth.fail(format!("{life:?} gives the VM away although nobody has it"));
        }
        if soon {
            self.truth.fail(format!("{life:?} hands the VM back at once"));
        }
        if what == Broken::Network && reaches != Some(true) {
            self.truth.fail(format!("{life:?} gives the VM to a host that is cut off as well"));
        }
    }

    /// Its operator wants the VM at its standby.
    pub(super) fn wants_it_elsewhere(&mut self) {
        let (_, owner) = self.truth.newest();
        if self.frozen(owner) <= self.now {
            self.primary(owner, PrimaryEvent::HandOver);
        }
    }

    /// The VM is handed over, whether or not its standby can take it.
    pub(super) fn hands_over(&mut self, life: Life) {
        self.stats.handed += 1;
        let Some(p) = self.primary_of(life) else { return };
        let (protected, asked, reaches) = (p.protected, p.asked, p.standby_reaches);
        p.gave = true;
        let delay = self.rng.range(1_000, 40_000);
        self.after(delay, Happening::SeesWinner(life));
        if asked {
            self.truth.fail(format!("{life:?} hands a VM over whose operator wants it stopped"));
        }
        if !protected {
            self.truth.fail(format!("{life:?} hands the VM over although nobody has it"));
        }
        if reaches == Some(false) {
            self.truth.fail(format!("{life:?} hands the VM to a host that is cut off from the clients"));
        }
    }

    /// A look at the arbiter by a process that has left its VM to the standby: it looks until it knows who has it.
    pub(super) fn sees_winner(&mut self, life: Life) {
        let waits = |p: &mut PrimaryProcess| p.driver.machine().status() == PrimaryStatus::Arbitrating;
        if !self.primary_of(life).is_some_and(waits) || self.sees_rival(life) {
            return;
        }
        let delay = self.rng.range(1_000, 40_000);
        self.after(delay, Happening::SeesWinner(life));
    }

    /// The operator is told why not.
    pub(super) fn keeps(&mut self, life: Life, why: Kept) {
        self.stats.kept += 1;
        let Some(p) = self.primary_of(life) else { return };
        let machine = p.driver.machine();
        let (status, runs) = (machine.status(), machine.guest_may_run());
        let wrong = match why {
            Kept::Unprotected => status == PrimaryStatus::Protected,
            // Or it is being handed over already.
            Kept::Undecided => status == PrimaryStatus::Protected && !p.gave,
            Kept::NotTaken => !p.gave,
            Kept::Stopping => !p.asked && runs,
            Kept::StandbyCutOff => p.standby_reaches != Some(false),
            Kept::SharedDiskHangs => !p.writes_stay,
            Kept::JustTakenOver | Kept::StandbySilent => true,
        };
        if wrong {
            self.truth.fail(format!("{life:?} does not hand the VM over because of {why:?}"));
        }
    }

    /// The VM stays, and the guest hears of its disk's error.
    pub(super) fn endures(&mut self, life: Life, what: Broken, why: Kept) {
        self.stats.endured += 1;
        let Some(p) = self.primary_of(life) else { return };
        let protected = p.driver.machine().status() == PrimaryStatus::Protected;
        let same = what == Broken::Disk && std::mem::take(&mut p.same_fault);
        let wrong = match why {
            Kept::Unprotected => protected,
            Kept::Undecided => true,
            // The time of the decision may be that of a process that was stopped.
            Kept::JustTakenOver => p.came.is_none() && !same,
            Kept::NotTaken => !p.gave,
            Kept::Stopping => !p.asked,
            Kept::StandbyCutOff => p.standby_reaches != Some(false),
            Kept::StandbySilent => p.standby_reaches.is_some(),
            Kept::SharedDiskHangs => true,
        };
        if wrong {
            self.truth.fail(format!("{life:?} keeps the VM with a broken {what:?} because of {why:?}"));
        }
    }
}
