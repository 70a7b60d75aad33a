//! The faults that strike while a schedule runs, and their end.

use super::hosts::{Process, vm_of};
use super::ports::PortFault;
use super::truth::Life;
use super::world::{Happening, Msg, World};
use crate::{Introduction, LossReason, PrimaryEvent, StandbyEvent};

/// The kinds of faults that [`World::fault`] draws.
pub(super) const FAULT_NAMES: [&str; 32] = [
    "crash",
    "crash",
    "crash of the owner",
    "freeze",
    "freeze",
    "freeze of the owner",
    "one way cut",
    "both ways cut",
    "host cut off",
    "arbiter cut from a host",
    "arbiter cut from all",
    "arbiter slow",
    "slow links",
    "connection struck",
    "orderly stop",
    "guest ends",
    "queues swell, then one way cut",
    "broken disk",
    "copy fails",
    "action fails",
    "action fails",
    "a thread wedges",
    "disks fail",
    "cut off from the clients",
    "disk lost",
    "power cut of all hosts",
    "clock stands still or jumps",
    "arbiter forgets",
    "another arbiter's directory",
    "slow disk",
    "slow disk",
    "hand-over",
];

impl World {
    /// All hosts lose power.
    pub(super) fn power_cut(&mut self) {
        (0..self.hosts.len()).for_each(|host| self.crash(host));
    }

    pub(super) fn fault(&mut self) {
        if self.healed {
            return;
        }
        let host = self.rng.range(0, 3) as usize;
        let other = (host + self.rng.range(1, 3) as usize) % 3;
        let until = self.now + self.rng.range(5_000, 400_000);
        let kind = self.rng.range(0, FAULT_NAMES.len() as u64);
        self.disturbed = true;
        self.stats.faults[kind as usize] += 1;
        let name = FAULT_NAMES.get(kind as usize).unwrap_or(&"other");
        self.tell((host, 0), &format_args!("fault {kind} ({name}) until {until}"));
        match kind {
            0 | 1 => self.crash(host),
            2 => {
                let (_, owner) = self.truth.newest();
                self.crash(owner.0);
            }
            3 | 4 => self.freeze(host, until),
            5 => {
                let (_, owner) = self.truth.newest();
                self.freeze(owner.0, until);
            }
            6 => self.cut[host][other] = until,
            7 => {
                self.cut[host][other] = until;
                self.cut[other][host] = until;
            }
            8 => (0..3).for_each(|other| {
                self.cut[host][other] = until;
                self.cut[other][host] = until;
            }),
            9 => self.hosts[host].arbiter_cut_until = until,
            10 => self.hosts.iter_mut().for_each(|host| host.arbiter_cut_until = until),
            11 => self.arbiter_slow_until = until,
            12 => {
                (self.slow_from, self.slow_until, self.slow_by) =
                    (self.now, until, self.rng.range(100, 250_000))
            }
            16 => self.swell_and_cut(),
            13 => self.strike_link(),
            17 => {
                // Its disk no longer accepts writes. Nobody notices before it matters.
                if let Process::Standby(s) = &mut self.hosts[host].process {
                    (s.bad_disk, s.bad_host) = (true, self.company && self.rng.one_in(2));
                }
            }
            14 | 18 if self.frozen(self.life(host)) > self.now => {}
            14 => match &self.hosts[host].process {
                Process::Standby(_) => self.standby(self.life(host), StandbyEvent::Stop),
                Process::Primary(_) if self.rng.one_in(2) => {
                    let ask_guest = self.rng.one_in(2);
                    self.primary(self.life(host), PrimaryEvent::Stop { ask_guest });
                }
                _ => {}
            },
            18 => self.copy_fails(self.life(host)),
            19 | 20 => self.port_fails(host),
            21 => self.wedge(host),
            22 => self.disks_fail(until),
            23 => self.cut_off(host, until),
            24 => {
                self.crash(host);
                (self.hosts[host].image, self.disk_lost) = (None, true);
            }
            // Of one fault the VM must survive what is in its memory.
            25 if !self.company => self.crash(host),
            25 => self.power_cut(),
            26 => self.clock_fails(host, until),
            27 => self.arbiter_forgot_until = until,
            28 => self.hosts[host].swapped_until = until,
            29 | 30 => self.hosts[host].slow_disk_until = until + 300_000,
            31 => self.wants_it_elsewhere(),
            _ => {
                let (_, owner) = self.truth.newest();
                if let Process::Primary(p) = &self.hosts[owner.0].process {
                    let depth = self.truth.depth(p.node());
                    self.guest_end = depth + self.rng.range(1, 60) as u32;
                }
            }
        }
        // Faults like company.
        if self.company && self.rng.one_in(3) {
            let delay = self.rng.range(0, 30_000);
            self.after(delay, Happening::Fault);
        }
    }

    /// The next action of a kind fails.
    fn port_fails(&mut self, host: usize) {
        use PortFault::{Apply, BeginEpoch, Claim, Dial, Hold, Send, Settle, StartBase, Try};
        let mut pick = |from: &[PortFault]| Some(from[self.rng.range(0, from.len() as u64) as usize]);
        match &mut self.hosts[host].process {
            Process::Primary(p) => {
                p.driver.ports_mut().faults.next = pick(&[Dial, Send, StartBase, Hold, BeginEpoch, Claim]);
            }
            Process::Standby(s) => {
                s.driver.ports_mut().faults.next = pick(&[Send, Claim, Try, Apply, Settle]);
            }
            Process::Starting | Process::Down => {}
        }
    }

    pub(super) fn life(&self, host: usize) -> Life {
        (host, self.hosts[host].life)
    }

    pub(super) fn crash(&mut self, host: usize) {
        if !matches!(self.hosts[host].process, Process::Down) {
            let told = !self.rng.one_in(3);
            self.stop_process(host, told);
        }
    }

    pub(super) fn freeze(&mut self, host: usize, until: u64) {
        if !matches!(self.hosts[host].process, Process::Down) {
            // A second fault wakes nobody: the clock of a host that stands still would go back.
            self.hosts[host].frozen_until = self.hosts[host].frozen_until.max(until);
            self.hosts[host].stale = self.rng.one_in(2).then_some(self.now);
        }
    }

    pub(super) fn wedge(&mut self, host: usize) {
        if !matches!(self.hosts[host].process, Process::Down) {
            self.hosts[host].wedged = true;
            self.stats.wedged += 1;
        }
    }

    /// Queues on the way swell, and then only the way to the standby is cut: old acknowledgements still
    /// arrive at a primary that its standby has long stopped hearing.
    fn swell_and_cut(&mut self) {
        let Some(conn) = self.conns.iter().rposition(|conn| conn.open == [true; 2]) else { return };
        let [standby, primary] = self.conns[conn].ends;
        let start = self.rng.range(50_000, 400_000);
        (self.slow_from, self.slow_until, self.slow_by) = (self.now, self.now + start + 300_000, 250_000);
        self.after(start, Happening::Cut { from: primary.0, to: standby.0 });
    }

    /// A fault on one of the newest connections: a reset by a third party, damage of an open or an encrypted
    /// link, stray base pages, or a fault at the primary itself.
    fn strike_link(&mut self) {
        let Some(conn) = self.conns.iter().rposition(|conn| conn.open == [true; 2]) else { return };
        match self.rng.range(0, 5) {
            0 => {
                self.conns[conn].broken = true;
                for side in 0..2 {
                    if !self.rng.one_in(5) {
                        let delay = self.rng.range(0, 60_000);
                        self.after(delay, Happening::Reset { conn, side });
                    }
                }
            }
            1 => self.send(conn, 0, Msg::Bad),
            2 => self.send(conn, 0, Msg::Base),
            3 => self.send(conn, 0, Msg::Garbled),
            _ => {
                let life = self.conns[conn].ends[1];
                if self.alive(life) && self.frozen(life) <= self.now {
                    let link = self.conns[conn].primary_link;
                    let why = LossReason::Local("the tracker lost a page".into());
                    self.primary(life, PrimaryEvent::LinkLost { link, why });
                    // Its trouble may have been the first sign of its death.
                    if self.rng.one_in(3) {
                        self.trouble_was_death = true;
                        self.stop_process(life.0, true);
                    }
                }
            }
        }
    }

    /// Messages become slow, and then the newest connection ends for the standby; the primary hears of it late, or
    /// never.
    pub(super) fn reset_at_standby(&mut self) {
        let Some(conn) = self.conns.iter().rposition(|conn| conn.open == [true; 2]) else { return };
        self.conns[conn].broken = true;
        let until = self.now + 300_000;
        (self.slow_from, self.slow_until, self.slow_by) = (self.now, until, self.rng.range(5_000, 40_000));
        let delay = self.rng.range(20_000, 120_000);
        self.after(delay, Happening::Reset { conn, side: 0 });
        let delay = delay + self.rng.range(1, 100_000);
        self.after(delay, Happening::FalseHello(self.conns[conn].ends[0]));
    }

    /// The newest link carries a record that nobody can read.
    pub(super) fn garble(&mut self) {
        let Some(conn) = self.conns.iter().rposition(|conn| conn.open == [true; 2]) else { return };
        self.send(conn, 0, Msg::Garbled);
    }

    /// A host with a right to the VM says that it has won.
    pub(super) fn hears_false_hello(&mut self, life: Life) {
        let generation = self.truth.newest().0 + 1;
        let hello = Introduction {
            vm: vm_of(generation),
            generation,
            slots: 1,
            dead_after: self.timing.dead_after,
            shared_storage: self.shared_storage,
        };
        self.standby(life, StandbyEvent::TurnedAway { hello });
    }

    pub(super) fn heal(&mut self) {
        let now = self.now;
        self.healed = true;
        self.cut.iter_mut().flatten().for_each(|until| *until = (*until).min(now));
        for host in &mut self.hosts {
            host.disk_fails_until = host.disk_fails_until.min(now);
            if host.arbiter_cut_until != u64::MAX {
                host.arbiter_cut_until = now.min(host.arbiter_cut_until);
            }
            host.swapped_until = now;
            host.slow_disk_until = now;
            if let Process::Standby(s) = &mut host.process {
                s.bad_host = false;
            }
        }
        for host in 0..self.hosts.len() {
            self.hosts[host].cut_off_until = now.min(self.hosts[host].cut_off_until);
            self.reconnected(host);
        }
        self.slow_until = now;
        self.arbiter_slow_until = now;
        self.arbiter_forgot_until = now;
        if self.company {
            // After more than one fault nobody may be left who could succeed: the operator steps in.
            for host in 0..self.hosts.len() {
                if self.hosts[host].wedged {
                    self.stop_process(host, true);
                }
            }
        }
    }
}
