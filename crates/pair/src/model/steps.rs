//! What can happen next, and what then is.

use std::time::Duration;

use crate::planted::Bug;
use crate::{Broken, Link, LossReason, PrimaryEvent, StandbyEvent};

use super::world::{Msg, Process, StandbyHost, Work, World, older};

/// For how many steps of time a slow host may lag behind: longer than anybody's patience.
const SLOW: u8 = 4;

/// One step of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Time passes on every host.
    Time,
    /// The oldest message arrives at an end.
    Deliver {
        conn: u64,
        side: usize,
    },
    /// The waiting thread of a slow host looks at last.
    Look(usize),
    /// A checkpoint is captured.
    Capture(usize),
    /// The guest produces output.
    Output(usize),
    /// Output that may leave does.
    Drain(usize),
    /// The applier has done the oldest of its work.
    Work(usize),
    /// A claim reaches the arbiter.
    Land(usize),
    /// The arbiter's answer reaches the claimant.
    Answer(usize),
    /// `outlive run` on the image of a host that is down.
    StartImage(usize),
    /// `outlive standby` on a host that is down.
    StartStandby(usize),
    /// The network is whole again.
    Mend,
    /// A paused host continues.
    Resume(usize),
    // Orders of an operator.
    StopStandby(usize),
    StopVm(usize),
    /// `outlive hand-over`.
    HandOver(usize),
    // Faults.
    /// The process is killed, and its kernel closes its connections.
    Kill(usize),
    /// The host loses its power.
    PowerCut(usize),
    /// The same, and it never comes back.
    Destroy(usize),
    /// Time passes although the host has something to do.
    Slow(usize),
    /// The host and its clock stand still.
    Pause(usize),
    /// Nothing gets from one host to the other.
    Cut(usize, usize),
    /// A third party resets a connection; one end learns of it.
    Reset {
        conn: u64,
        side: usize,
    },
    /// A connection fails at this end alone.
    Local {
        conn: u64,
        side: usize,
    },
    /// The disk of the host where the VM runs fails: the VM may be left to its standby.
    DiskFails(usize),
    /// The oldest work of the applier fails.
    WorkFails(usize),
    /// A claim takes effect, and the claimant is told that nobody knows.
    AnswerLost(usize),
    /// The claimant is told that nobody knows while the claim is still under way.
    AnsweredEarly(usize),
}

impl World {
    /// Everything that can happen next.
    pub(super) fn acts(&self, bug: Option<Bug>, acts: &mut Vec<Act>) {
        if self.broken.is_some() || self.ended {
            return;
        }
        if self.may_time_pass(bug) {
            acts.push(Act::Time);
        }
        for conn in &self.conns {
            acts.extend(
                (0..2)
                    .filter(|side| self.arrives(conn.id, *side))
                    .map(|side| Act::Deliver { conn: conn.id, side }),
            );
        }
        (0..self.hosts.len()).for_each(|host| self.acts_of(host, bug, acts));
        for (at, claim) in self.claims.iter().enumerate() {
            acts.push(if claim.answer.is_none() { Act::Land(at) } else { Act::Answer(at) });
        }
        if !self.cut.is_empty() {
            acts.push(Act::Mend);
        }
        if self.left.faults > 0 {
            self.faults(acts);
        }
    }

    fn acts_of(&self, at: usize, bug: Option<Bug>, acts: &mut Vec<Act>) {
        let host = &self.hosts[at];
        if host.paused {
            return acts.push(Act::Resume(at));
        }
        match &host.process {
            Process::Down if host.gone || self.left.starts == 0 => {}
            Process::Down => {
                acts.push(Act::StartStandby(at));
                acts.extend(self.may_start(at, bug).map(|_| Act::StartImage(at)));
            }
            Process::Starting { .. } => {}
            Process::Primary(primary) => {
                acts.extend(self.wanted(at).map(|_| Act::Capture(at)));
                let runs = primary.machine.guest_may_run() && !primary.stopped;
                acts.extend((runs && self.left.outputs > 0).then_some(Act::Output(at)));
                acts.extend(self.may_drain(at, bug).then_some(Act::Drain(at)));
                let due = primary.machine.next_deadline().is_some_and(|due| due <= super::world::NOW);
                acts.extend((host.slow > 0 && due).then_some(Act::Look(at)));
                if self.left.orders > 0 && runs {
                    acts.extend([Act::StopVm(at), Act::HandOver(at)]);
                }
            }
            Process::Standby(standby) => {
                acts.extend((!standby.work.is_empty()).then_some(Act::Work(at)));
                let due = standby.machine.next_deadline().is_some_and(|due| due <= super::world::NOW);
                acts.extend((host.slow > 0 && due).then_some(Act::Look(at)));
                acts.extend((self.left.orders > 0 && standby.copy.is_some()).then_some(Act::StopStandby(at)));
            }
        }
    }

    fn faults(&self, acts: &mut Vec<Act>) {
        for (at, host) in self.hosts.iter().enumerate().filter(|(_, host)| !host.paused) {
            if matches!(host.process, Process::Down) {
                continue;
            }
            acts.extend([Act::Kill(at), Act::PowerCut(at), Act::Destroy(at), Act::Pause(at)]);
            acts.extend((host.slow == 0).then_some(Act::Slow(at)));
            acts.extend(matches!(host.process, Process::Primary(_)).then_some(Act::DiskFails(at)));
            if let Process::Standby(standby) = &host.process
                && standby.work.front().is_some_and(|work| !matches!(work, Work::Discard(_)))
            {
                acts.push(Act::WorkFails(at));
            }
        }
        let pairs = (0..self.hosts.len()).flat_map(|from| (0..self.hosts.len()).map(move |to| (from, to)));
        acts.extend(
            pairs
                .filter(|(from, to)| from != to && !self.is_cut(*from, *to))
                .map(|(from, to)| Act::Cut(from, to)),
        );
        for conn in self.conns.iter().filter(|conn| conn.open == [true; 2]) {
            let id = conn.id;
            acts.extend(
                (0..2).flat_map(|side| [Act::Reset { conn: id, side }, Act::Local { conn: id, side }]),
            );
        }
        for (at, claim) in self.claims.iter().enumerate() {
            if self.alive(claim.life) && !self.hosts[claim.life.0].paused {
                acts.push(Act::AnswerLost(at));
                acts.extend(claim.answer.is_none().then_some(Act::AnsweredEarly(at)));
            }
        }
    }

    fn arrives(&self, conn: u64, side: usize) -> bool {
        let Some(conn) = self.conn(conn).map(|at| &self.conns[at]) else { return false };
        let (from, to) = (conn.ends[1 - side].0, conn.ends[side].0);
        let hears = self.alive(conn.ends[side]) && !self.hosts[to].paused;
        hears && !conn.queues[side].is_empty() && !self.is_cut(from, to)
    }

    /// Time passes when every host has done what it had to do, except hosts that are slow, appliers, the
    /// arbiter and whatever is cut off: those take any time.
    pub(super) fn may_time_pass(&self, bug: Option<Bug>) -> bool {
        let waits = |host: usize| self.hosts[host].slow == 0 && !self.hosts[host].paused;
        let undelivered = |id: u64, ends: [(usize, u8); 2]| {
            (0..2).any(|side| waits(ends[side].0) && self.arrives(id, side))
        };
        !self.conns.iter().any(|conn| undelivered(conn.id, conn.ends))
            && !(0..self.hosts.len())
                .any(|host| waits(host) && (self.may_drain(host, bug) || self.releases(host)))
    }

    /// A sidecar is about to say that its copy was given up: that takes no time, unless its host is slow.
    fn releases(&self, host: usize) -> bool {
        match &self.hosts[host].process {
            Process::Standby(standby) => matches!(standby.work.front(), Some(Work::Release(_))),
            _ => false,
        }
    }

    /// Carries one step out.
    pub(super) fn carry_out(&mut self, act: &Act, bug: Option<Bug>) {
        match *act {
            Act::Time => self.time_passes(bug),
            Act::Deliver { conn, side } => self.deliver(conn, side, bug),
            Act::Look(host) => match self.hosts[host].process {
                Process::Primary(_) => self.primary_event(host, PrimaryEvent::Tick, bug),
                _ => self.standby_event(host, StandbyEvent::Tick, bug),
            },
            Act::Capture(host) => {
                if let Some(wanted) = self.wanted(host) {
                    self.capture(host, wanted, bug);
                }
            }
            Act::Output(host) => self.guest_sends(host),
            Act::Drain(host) => self.drain(host, bug),
            Act::Work(host) => self.work_done(host, false, bug),
            Act::Land(at) => self.land(at, bug),
            Act::Answer(at) => {
                let claim = self.claims.remove(at);
                self.answered(claim.life, claim.generation, claim.answer, bug);
            }
            Act::StartImage(host) => {
                self.left.starts -= 1;
                self.start_image(host, bug);
            }
            Act::StartStandby(host) => {
                self.left.starts -= 1;
                self.start_standby(host, bug);
            }
            Act::Mend => self.mend(),
            Act::Resume(host) => self.resume(host, bug),
            Act::StopStandby(host) => {
                self.left.orders -= 1;
                if let Process::Standby(standby) = &mut self.hosts[host].process {
                    standby.stopping = true;
                }
                self.tell_standby(host, StandbyEvent::Stop, bug);
            }
            Act::StopVm(host) => {
                self.left.orders -= 1;
                self.tell_primary(host, PrimaryEvent::Stop { ask_guest: false }, bug);
            }
            Act::HandOver(host) => {
                self.left.orders -= 1;
                self.tell_primary(host, PrimaryEvent::HandOver, bug);
            }
            _ => {
                self.left.faults -= 1;
                self.disturbed = true;
                self.strike(act, bug);
            }
        }
        self.hear_beats(bug);
        self.tidy();
    }

    /// Heartbeats change nothing but what is known of the other side's time. So the orders in which they
    /// arrive need not be told apart: a host that is not slow hears them at once, which gives a lease the most
    /// time.
    fn hear_beats(&mut self, bug: Option<Bug>) {
        loop {
            let next = self.conns.iter().find_map(|conn| {
                let heard = |side: &usize| {
                    let beats = matches!(conn.queues[*side].front(), Some(Msg::Beat(_)));
                    beats && self.hosts[conn.ends[*side].0].slow == 0 && self.arrives(conn.id, *side)
                };
                (0..2).find(heard).map(|side| (conn.id, side))
            });
            match next {
                Some((conn, side)) if self.broken.is_none() => self.deliver(conn, side, bug),
                _ => return,
            }
        }
    }

    fn strike(&mut self, act: &Act, bug: Option<Bug>) {
        match *act {
            Act::Kill(host) => self.stop_process(host, true),
            Act::PowerCut(host) => self.stop_process(host, false),
            Act::Destroy(host) => {
                self.stop_process(host, false);
                (self.hosts[host].gone, self.hosts[host].image) = (true, None);
            }
            Act::Slow(host) => self.hosts[host].slow = SLOW,
            Act::Pause(host) => (self.hosts[host].paused, self.stood_still) = (true, true),
            Act::Cut(from, to) => {
                self.cut.push((from, to));
                self.cut.sort_unstable();
            }
            Act::Reset { conn, side } => {
                if let Some(at) = self.conn(conn) {
                    self.conns[at].reset = true;
                }
                self.loses(conn, side, LossReason::Error("connection reset by peer".into()), bug);
            }
            Act::Local { conn, side } => self.loses(conn, side, LossReason::Local("trouble".into()), bug),
            Act::WorkFails(host) => self.work_done(host, true, bug),
            Act::DiskFails(host) => {
                let event = PrimaryEvent::Broken { what: Broken::Disk, again: false };
                self.tell_primary(host, event, bug);
            }
            Act::AnswerLost(at) => {
                let (life, generation) = (self.claims[at].life, self.claims[at].generation);
                if self.claims[at].answer.is_none() {
                    self.land(at, bug);
                }
                self.claims
                    .retain(|it| (it.life, it.generation) != (life, generation) || it.answer.is_none());
                self.answered(life, generation, None, bug);
            }
            Act::AnsweredEarly(at) => {
                let (life, generation) = (self.claims[at].life, self.claims[at].generation);
                self.answered(life, generation, None, bug);
            }
            _ => {}
        }
    }

    fn loses(&mut self, conn: u64, side: usize, why: LossReason, bug: Option<Bug>) {
        let Some(at) = self.conn(conn) else { return };
        let (host, primary_link) = (self.conns[at].ends[side].0, self.conns[at].primary_link);
        if side == 0 {
            self.tell_standby(host, StandbyEvent::LinkLost { link: Link(conn), why }, bug);
        } else {
            self.tell_primary(host, PrimaryEvent::LinkLost { link: primary_link, why }, bug);
        }
    }

    fn deliver(&mut self, conn: u64, side: usize, bug: Option<Bug>) {
        let Some(at) = self.conn(conn) else { return };
        let host = self.conns[at].ends[side].0;
        let Some(msg) = self.conns[at].queues[side].pop_front() else { return };
        match self.hosts[host].process {
            Process::Standby(_) if side == 0 => self.standby_hears(host, at, msg, bug),
            Process::Primary(_) if side == 1 => self.primary_hears(host, at, msg, bug),
            _ => {}
        }
    }

    pub(super) fn start_image(&mut self, host: usize, bug: Option<Bug>) {
        let Some(generation) = self.may_start(host, bug) else { return };
        self.hosts[host].life += 1;
        let life = self.life(host);
        let mut history = Vec::new();
        if let Some(image) = &mut self.hosts[host].image {
            // Before it asks, the sidecar names the process that may win.
            if image.generation < generation - 1 {
                (image.generation, image.replica, image.released) = (generation - 1, false, false);
            }
            image.process = life.1;
            history.clone_from(&image.history);
        }
        self.hosts[host].process = Process::Starting { generation };
        let disturbed = std::mem::replace(&mut self.disturbed, true);
        self.ask(life, generation, history);
        self.disturbed = disturbed;
    }

    pub(super) fn mend(&mut self) {
        self.cut.clear();
        self.hosts.iter_mut().for_each(|host| host.slow = 0);
    }

    pub(super) fn resume(&mut self, host: usize, bug: Option<Bug>) {
        self.hosts[host].paused = false;
        match self.hosts[host].process {
            Process::Primary(_) => self.tell_primary(host, PrimaryEvent::Tick, bug),
            Process::Standby(_) => self.tell_standby(host, StandbyEvent::Tick, bug),
            Process::Starting { .. } | Process::Down => {}
        }
    }

    fn time_passes(&mut self, bug: Option<Bug>) {
        let runs: Vec<bool> = self.hosts.iter().map(|host| !host.paused).collect();
        let age = |time: &mut Duration| older(time);
        for host in &mut self.hosts {
            host.slow = host.slow.saturating_sub(1);
            // A copy that is not done in time is not given up: then the primary asks.
            let late = |it: &StandbyHost| it.stopping && !it.work.is_empty();
            self.disturbed |= matches!(&host.process, Process::Standby(it) if late(it));
            match &mut host.process {
                Process::Primary(primary) if !host.paused => primary.machine.age(&age),
                Process::Standby(standby) if !host.paused => standby.machine.age(&age),
                _ => {}
            }
        }
        // Stamps are times of the primary's clock, wherever they are.
        for at in 0..self.conns.len() {
            let [standby, primary] = self.conns[at].ends;
            if !runs[primary.0] {
                continue;
            }
            self.conns[at].queues.iter_mut().flatten().filter_map(|msg| msg.stamp()).for_each(older);
            let id = Link(self.conns[at].id);
            if self.alive(standby)
                && let Some(standby) = self.standby(standby.0)
                && standby.machine.link() == Some(id)
            {
                standby.machine.age_stamp(&age);
            }
        }
        // A primary's heartbeat is answered within one step.
        let looks: Vec<usize> =
            (0..self.hosts.len()).filter(|host| runs[*host] && self.hosts[*host].slow == 0).collect();
        for host in &looks {
            self.primary_event(*host, PrimaryEvent::Tick, bug);
        }
        self.hear_beats(bug);
        for host in looks {
            self.standby_event(host, StandbyEvent::Tick, bug);
        }
    }
}
