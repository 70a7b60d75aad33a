//! Things that all simulated hosts do: their processes start, sleep, and end.

use std::time::Duration;

use outlive_epoch::VmId;

use super::primary::PrimaryProcess;
use super::standby::StandbyProcess;
use super::truth::{LINE, Life};
use super::world::{Base, Happening, Host, Msg, World};

/// Which VM it is that has this generation.
pub(super) fn vm_of(generation: u64) -> VmId {
    VmId([7 + (generation / LINE) as u8; 16])
}

pub(super) enum Process {
    Down,
    /// `outlive run` on an image: it has asked for the next generation.
    Starting,
    Primary(Box<PrimaryProcess>),
    Standby(Box<StandbyProcess>),
}

impl World {
    /// The process ends. `told` says whether its kernel lives to close its connections.
    pub(super) fn stop_process(&mut self, host: usize, told: bool) {
        let life = (host, self.hosts[host].life);
        if told {
            self.write_out_all(life);
        }
        self.hosts[host].process = Process::Down;
        self.hosts[host].frozen_until = 0;
        self.hosts[host].stale = None;
        (self.hosts[host].wedged, self.hosts[host].busy_until) = (false, 0);
        for conn in 0..self.conns.len() {
            for side in 0..2 {
                if self.conns[conn].ends[side] == life && told {
                    self.close(conn, side);
                }
            }
        }
        if !self.truth.ended {
            self.restart_later(host);
        }
    }

    pub(super) fn close(&mut self, conn: usize, side: usize) {
        let was_open = std::mem::replace(&mut self.conns[conn].open[side], false);
        // Whoever has reset a connection lets nothing more through, at times: the other side hears of no end.
        let swallowed = self.conns[conn].broken && self.rng.one_in(2);
        if was_open && !swallowed {
            self.send(conn, 1 - side, Msg::Closed);
        }
    }

    /// The time that a process believes it is.
    pub(super) fn believed(&mut self, host: usize) -> Duration {
        match self.hosts[host].stale.take() {
            Some(time) => self.clock_at(host, time),
            None => self.clock(host),
        }
    }

    /// How long a thread takes until it does its work after the lock: now and then another thread comes
    /// first.
    pub(super) fn preempted(&mut self) -> u64 {
        if self.rng.one_in(60) { self.rng.range(0, 5000) } else { self.rng.range(0, 20) }
    }

    /// The waiting thread of a process checks what is due.
    pub(super) fn look(&mut self, life: Life, number: u64) {
        let Host { wedged, busy_until, .. } = self.hosts[life.0];
        if wedged {
            return;
        }
        if busy_until > self.now {
            return self.at(busy_until, Happening::Look(life, number));
        }
        if self.hosts[life.0].look.take_if(|(_, planned)| *planned == number).is_none() {
            // It was woken before.
            return;
        }
        match &self.hosts[life.0].process {
            Process::Primary(_) => self.coordinate(life),
            Process::Standby(_) => self.wait_for_deadline(life),
            Process::Starting | Process::Down => {}
        }
    }

    /// It sleeps until then.
    pub(super) fn look_when(&mut self, life: Life, until: Option<Duration>) {
        let Some(until) = until else { return };
        let at = self.when(life.0, until).max(self.now);
        // The scheduler of that host is not punctual.
        let late = if self.rng.one_in(4) { 1500 } else { 100 };
        let late = self.rng.range(0, late);
        self.look_at(life, at, at + late);
    }

    /// Another thread wakes it.
    pub(super) fn look_within(&mut self, life: Life, time: u64) {
        let late = self.rng.range(0, time.max(1));
        self.look_at(life, self.now, self.now + late);
    }

    fn look_at(&mut self, life: Life, due: u64, at: u64) {
        if self.alive(life) && self.hosts[life.0].look.is_none_or(|(planned, _)| due < planned) {
            self.looks += 1;
            self.hosts[life.0].look = Some((due, self.looks));
            self.at(at, Happening::Look(life, self.looks));
        }
    }

    pub(super) fn ask_arbiter(&mut self, life: Life, generation: u64) {
        let excuses = !self.shared_storage;
        let from = match &self.hosts[life.0].process {
            Process::Primary(p) => (p.node(), p.excused && excuses),
            Process::Standby(s) => (s.claims_from(), s.excused && excuses),
            Process::Starting => (self.hosts[life.0].image.as_ref().map_or(0, |image| image.node), false),
            Process::Down => return,
        };
        if !self.disturbed {
            self.truth.fail(format!("{life:?} asks the arbiter although nothing has gone wrong"));
        }
        let starts = matches!(self.hosts[life.0].process, Process::Starting);
        let image = self.hosts[life.0].image.as_ref().filter(|_| starts);
        let word = image.is_some_and(|image| image.excuses(generation));
        let from = Base { node: from.0, excused: from.1 || self.clock_failed, word };
        let delay = self.arbiter_delay();
        self.after(delay, Happening::ClaimArrives { life, generation, from });
    }

    pub(super) fn arbiter_delay(&mut self) -> u64 {
        let slow = if self.now < self.arbiter_slow_until { 300_000 } else { 1000 };
        self.rng.range(50, slow)
    }
}
