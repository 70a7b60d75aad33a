//! The primary in the simulation: a queue stands in for the program's threads, around the production driver.

mod capture;

use std::time::Duration;

use outlive_epoch::{EndReason, Moment};

use super::STEP;
use super::hosts::{Process, vm_of};
use super::images::Image;
use super::ports::{PrimaryEffect as Effect, PrimarySide, SimPart};
use super::truth::{Life, Node};
use super::world::{Happening, Msg, World};
use crate::planted::{Planted, planted};
use crate::policy::{Facts, Next, Policy};
use crate::{
    After, Broken, ExitReason, Introduction, KeptMemory, Link, LossReason, Needs, Primary, PrimaryConfig,
    PrimaryDriver, PrimaryEvent, PrimaryNote, Since, Ticket, Wanted,
};

/// The longest time in µs for which output may be held, as long as nothing goes wrong and besides what is known
/// to be slow: an epoch, a large checkpoint in parts, and as many applies as there are slots.
const LONGEST_HELD: u64 = 600_000;

pub(super) struct PrimaryProcess {
    pub(super) driver: PrimaryDriver<PrimarySide>,
    /// What the VM has done.
    node: Node,
    /// Whether the vCPUs are stopped for good.
    stopped: bool,
    /// Whether they are stopped for a checkpoint that goes out in parts.
    paused: bool,
    /// Whether they stay stopped after the checkpoint that is being taken.
    stays: bool,
    /// What the VM was when the writes to its memory began to be known.
    known_since: Option<Node>,
    /// The base that is under way needs memory that was this; `None`: any.
    base_over: Option<Node>,
    /// Set when few enough dirty pages are left for the base-final checkpoint.
    base_ready: Option<Link>,
    policy: Policy,
    /// When the first output of the epoch was held.
    held_since: Option<Duration>,
    /// When the VM came from another host.
    pub(super) came: Option<Duration>,
    /// Whether it was said to be protected, and no longer not to be.
    pub(super) protected: bool,
    /// What the standby has said of its way to the clients.
    pub(super) standby_reaches: Option<bool>,
    /// Whether the operator wants the VM stopped, so that the guest is asked to shut down.
    pub(super) asked: bool,
    /// Whether it was ever left to a standby.
    pub(super) gave: bool,
    /// Whether the disk's error, which is not decided yet, is the one that the VM had on its last host.
    pub(super) same_fault: bool,
    /// What a shared disk was told before the hand-over is not answered.
    pub(super) writes_stay: bool,
    /// Number of drains still to come.
    drains: u32,
    /// Whether a third party had reset the link over which generation + 1 became disputed.
    pub(super) excused: bool,
}

impl PrimaryProcess {
    pub(super) fn node(&self) -> Node {
        self.node
    }

    fn facts(&self, now: Duration) -> Facts {
        // Each step of the guest sends something.
        Facts { now, changed: self.held_since.is_some(), held_since: self.held_since, ..Facts::default() }
    }
}

impl World {
    /// Starts a primary: at the beginning, or in the process of a standby that has taken over.
    /// If the VM was handed over, each write to its memory is known from the first one on.
    pub(super) fn start_primary(
        &mut self,
        host: usize,
        generation: u64,
        checkpoint: u64,
        node: Node,
        handed: bool,
    ) {
        let now = self.clock(host);
        let standbys = self.hosts.len() - 1;
        let config = PrimaryConfig {
            generation,
            checkpoint,
            handed,
            standbys,
            slots: self.slots,
            timing: self.timing,
        };
        let moment = handed.then_some(Moment { generation: generation.wrapping_sub(1), checkpoint });
        let since = Since::began(moment).with(Planted(self.bug));
        let mut machine = Primary::new(config, now);
        machine.bug = Planted(self.bug);
        self.hosts[host].look = None;
        self.hosts[host].image = Some(Image::primary(generation, (host, self.hosts[host].life), node));
        self.hosts[host].process = Process::Primary(Box::new(PrimaryProcess {
            driver: PrimaryDriver::new(machine, PrimarySide::new(since)),
            node,
            stopped: false,
            paused: false,
            stays: false,
            known_since: moment.map(|_| node),
            base_over: None,
            base_ready: None,
            policy: self.ending.policy(Duration::from_micros(self.interval)),
            held_since: None,
            came: (checkpoint > 0).then_some(now),
            protected: false,
            standby_reaches: None,
            asked: false,
            gave: false,
            same_fault: false,
            writes_stay: false,
            drains: 0,
            excused: false,
        }));
        let life = (host, self.hosts[host].life);
        self.after(1, Happening::VmStep(life));
        if self.copies {
            self.look_for_rivals_later(life);
        }
        if checkpoint > 0 && self.hosts[host].disk_fails_until > self.now {
            // What was in flight is issued again.
            let delay = self.rng.range(10, 2_000);
            self.after(delay, Happening::DiskFails(life));
        }
        if self.hosts[host].cut_off_until > self.now {
            self.primary(life, PrimaryEvent::Broken { what: Broken::Network, again: false });
        }
        self.coordinate(life);
    }

    pub(super) fn primary_of(&mut self, life: Life) -> Option<&mut PrimaryProcess> {
        match &mut self.hosts[life.0].process {
            Process::Primary(p) => Some(p),
            _ => None,
        }
    }

    /// Any thread hands in an event.
    pub(super) fn primary(&mut self, life: Life, event: PrimaryEvent) {
        let now = self.believed(life.0);
        if let Some(p) = self.primary_of(life) {
            let after = p.driver.handle(now, event);
            self.primary_after(life, after);
        }
    }

    /// The lock is dropped: the queued effects happen, and the work that was left to the caller.
    fn primary_after(&mut self, life: Life, after: After) {
        let (now, late) = (self.clock(life.0), self.preempted());
        let Some(p) = self.primary_of(life) else { return };
        p.drains += u32::from(after.drain);
        let undrained = p.drains == 0 && p.driver.ports().valve.is_ready(now);
        let (effects, violation, failed) = p.driver.ports_mut().taken();
        self.stats.failed += failed;
        if let Some(what) = violation {
            self.truth.fail(format!("{life:?} {what}"));
        }
        if undrained {
            self.truth.fail(format!("{life:?} may let output out and nobody does it"));
        }
        if after.drain {
            self.after(late, Happening::Drain(life));
        }
        if after.wake {
            self.look_within(life, 100);
        }
        for effect in effects {
            self.primary_does(life, effect);
        }
    }

    fn primary_does(&mut self, life: Life, effect: Effect) {
        self.tell(life, &effect);
        if self.hosts[life.0].wedged
            && matches!(
                effect,
                Effect::AskGuest | Effect::StopGuest | Effect::StartBase { .. } | Effect::Exit(_)
            )
        {
            // The waiting thread would do it. The decision is made even so.
            if let (Effect::AskGuest, Some(p)) = (&effect, self.primary_of(life)) {
                p.asked = true;
            }
            return;
        }
        let clock = self.clock(life.0);
        match effect {
            Effect::Dial { link, address } => {
                self.may_lose_track(life, 30);
                let target = (life.0 + 1 + address) % self.hosts.len();
                let delay = self.rng.range(100, 2000);
                self.after(delay, Happening::Dialled { life, link, target });
            }
            Effect::Hello { conn, generation, since } => {
                let (slots, dead_after, shared_storage) =
                    (self.slots, self.timing.dead_after, self.shared_storage);
                let hello =
                    Introduction { vm: vm_of(generation), generation, slots, dead_after, shared_storage };
                self.send(conn, 0, Msg::Hello(hello, since));
                self.may_lose_track(life, 8);
            }
            Effect::StartBase { link, needs } => {
                self.base_begins(life, needs);
                let left = self.rng.range(1, 4) as u32;
                self.after(200, Happening::BaseRound { life, link, left });
            }
            Effect::Ship { conn, ticket, part } => self.ship(life, conn, ticket, part, clock),
            Effect::Beat { conn } => {
                self.tell_released(life, conn);
                self.send(conn, 0, Msg::Beat { stamp: clock });
            }
            Effect::End { conn, reason } => self.send(conn, 0, Msg::VmEnd(reason)),
            Effect::Dismiss { conn } => self.send(conn, 0, Msg::Dismiss),
            Effect::HangUp { conn } => {
                let broken = conn.is_some_and(|conn| self.conns[conn].broken);
                if let Some(p) = self.primary_of(life) {
                    p.base_ready = None;
                    p.excused |= broken;
                }
                if let Some(conn) = conn {
                    self.close(conn, 1);
                }
            }
            Effect::Claim { generation } => self.ask_arbiter(life, generation),
            Effect::Open { generation } => {
                if let Some(p) = self.primary_of(life) {
                    p.excused = false;
                }
                // The sidecar is written later, and perhaps never.
                if self.rng.one_in(2)
                    && let Some(image) = &mut self.hosts[life.0].image
                {
                    image.generation = generation;
                }
                self.stats.alone += 1;
                self.truth.goes_on(generation, life);
            }
            Effect::Fence => self.stats.fenced += 1,
            Effect::GiveAway { what } => self.gives_away(life, what),
            Effect::Endure { what, why } => self.endures(life, what, why),
            Effect::HandOver => self.hands_over(life),
            Effect::LetGo => {
                let delay = self.preempted();
                self.after(delay, Happening::LetGo(life));
            }
            Effect::Keep { why } => self.keeps(life, why),
            Effect::AskGuest => {
                if let Some(p) = self.primary_of(life) {
                    p.asked = true;
                    let node = p.node;
                    self.guest_end = self.truth.depth(node) + self.rng.range(1, 5) as u32;
                }
            }
            Effect::StopGuest => {
                if let Some(p) = self.primary_of(life) {
                    p.stopped = true;
                }
            }
            Effect::Exit(reason) => {
                if let ExitReason::Ended(_) = reason {
                    self.truth.ends(life, self.may_not_know(life.0));
                    self.stats.ended += 1;
                }
                let kept = self.keeps_memory(life);
                self.stop_process(life.0, true);
                self.hosts[life.0].kept = kept;
                if kept.is_some() && !self.truth.ended {
                    // The process stays, as a standby.
                    self.start_standby(life.0);
                }
            }
            Effect::Note(PrimaryNote::Protected { .. }) => {
                self.stats.protected += 1;
                self.primary_of(life).into_iter().for_each(|p| p.protected = true);
            }
            Effect::Note(note @ (PrimaryNote::LinkLost { .. } | PrimaryNote::GivenAway { .. })) => {
                self.stats.links_lost += u64::from(matches!(note, PrimaryNote::LinkLost { .. }));
                self.primary_of(life).into_iter().for_each(|p| p.protected = false);
            }
            Effect::Note(PrimaryNote::ArbiterUnreachable { .. }) => self.stats.unreachable += 1,
            Effect::Note(_) => {}
        }
    }

    /// The writes since a hand-over are known for a while only: there may be too many.
    fn may_lose_track(&mut self, life: Life, one_in: u64) {
        let known = self.primary_of(life).is_some_and(|p| p.known_since.is_some());
        if !known || !self.rng.one_in(one_in) {
            return;
        }
        if let Some(p) = self.primary_of(life) {
            // What is known from the next base on begins later.
            p.known_since = Some(p.node);
            p.driver.ports_mut().since.is_lost();
        }
    }

    fn base_begins(&mut self, life: Life, needs: Needs) {
        let rest = needs == Needs::Rest;
        self.stats.rests += u64::from(rest);
        if let Some(p) = self.primary_of(life) {
            p.base_over = p.known_since.filter(|_| rest);
            p.known_since = p.known_since.map(|_| p.node);
        }
    }

    /// A VM that was handed over leaves its memory here.
    fn keeps_memory(&mut self, life: Life) -> Option<(KeptMemory, Node)> {
        let p = self.primary_of(life)?;
        let machine = p.driver.machine();
        let generation = machine.generation();
        let moment = Moment { generation, checkpoint: machine.handed_over()? };
        Some((KeptMemory { vm: vm_of(generation), moment }, p.node))
    }

    fn tell_released(&mut self, life: Life, conn: usize) {
        if let Some(p) = self.primary_of(life) {
            let through = p.driver.ports().valve.released_through();
            self.send(conn, 0, Msg::Released { through });
        }
    }

    /// Copies of what the guest was given and has sent go over as well, as far as there is room for them.
    fn copy(&mut self, conn: usize, msg: Msg) {
        if !self.rng.one_in(10) {
            self.send(conn, 0, msg);
        }
    }

    fn ship(&mut self, life: Life, conn: usize, ticket: Ticket, part: SimPart, stamp: Duration) {
        if part.first {
            self.tell_released(life, conn);
            let Ticket { number, flags, .. } = ticket;
            let over = self.primary_of(life).filter(|_| flags.base_final).and_then(|p| p.base_over);
            self.send(conn, 0, Msg::Begin { number, node: part.node, flags, over });
        }
        for _ in 0..part.sections {
            self.send(conn, 0, Msg::Part);
        }
        if part.last {
            let epoch = ticket.number;
            let sent = self.primary_of(life).map(|p| p.driver.ports().valve.held_for(epoch));
            for node in sent.into_iter().flatten() {
                self.copy(conn, Msg::Output { epoch, node });
            }
            self.send(conn, 0, Msg::End { stamp });
        }
    }

    /// The thread that read an acknowledgement lets out what may leave, slowly at times; each piece is
    /// checked at the true time.
    pub(super) fn drain(&mut self, life: Life) {
        let clock = self.clock(life.0);
        let breaks_off = self.rng.one_in(4);
        // Before a takeover the same process had other drains.
        let Some(p) = self.primary_of(life).filter(|p| p.drains > 0) else { return };
        p.drains -= 1;
        let generation = p.driver.machine().generation();
        let mut out = Vec::new();
        let late = loop {
            match p.driver.ports_mut().valve.drain(clock) {
                Ok(Some(node)) => out.push(node),
                Ok(None) => break false,
                Err(()) => break true,
            }
            if breaks_off {
                p.drains += 1;
                break false;
            }
        };
        self.stats.late_frames += u64::from(late);
        self.stats.released += out.len() as u64;
        if breaks_off && !out.is_empty() {
            let delay = self.preempted();
            self.after(delay, Happening::Drain(life));
        }
        for (node, at) in out {
            let held = (self.now - self.slowness().min(self.now)).saturating_sub(at);
            if !self.disturbed {
                self.stats.longest_held = self.stats.longest_held.max(held);
            }
            if !self.disturbed && held > LONGEST_HELD {
                self.truth.fail(format!("{life:?} has held output for {held} µs and nothing has gone wrong"));
            }
            self.lets_out(node, generation, life);
        }
    }

    pub(super) fn vm_step(&mut self, life: Life) {
        let Some(p) = self.primary_of(life) else { return };
        if p.stopped {
            return;
        }
        let runs = !p.paused && p.driver.machine().guest_may_run();
        if runs {
            let from = p.node;
            let node = self.truth.step(from);
            self.guest_sends(life, node);
        }
        let delay = self.rng.range(STEP / 2, STEP * 3 / 2);
        self.after(delay, Happening::VmStep(life));
    }

    fn guest_sends(&mut self, life: Life, node: Node) {
        let (now, bug, at) =
            (self.clock(life.0), Planted(self.bug), self.now - self.slowness().min(self.now));
        let ends = self.truth.depth(node) >= self.guest_end;
        let Some(p) = self.primary_of(life) else { return };
        if planted!(bug, KnowsWritesTooLate) && p.known_since == Some(p.node) {
            p.known_since = Some(node);
        }
        p.node = node;
        p.stopped |= ends;
        if let Some(image) = &mut self.hosts[life.0].image {
            image.node = node;
        }
        let Some(p) = self.primary_of(life) else { return };
        let generation = p.driver.machine().generation();
        let first = p.held_since.is_none();
        let (ports, epoch) = (p.driver.ports(), p.driver.ports().valve.epoch());
        let conn =
            p.driver.machine().link().filter(|_| ports.valve.holds()).and_then(|link| ports.conn(link));
        match p.driver.ports_mut().valve.push(node, at) {
            Some(node) => self.lets_out(node, generation, life),
            None => {
                p.held_since.get_or_insert(now);
                if first && !planted!(bug, HeldUntold) {
                    self.look_within(life, 100);
                }
                self.expect_a_look(life, now);
            }
        }
        if let Some(conn) = conn {
            self.copy(conn, Msg::Input { epoch, node });
        }
        if ends && !self.hosts[life.0].wedged {
            self.primary(life, PrimaryEvent::End { reason: EndReason::PowerOff });
            self.look_within(life, 100);
        }
    }

    /// Output is held: the coordinator must not sleep beyond the end of its epoch.
    fn expect_a_look(&mut self, life: Life, now: Duration) {
        let Some(p) = self.primary_of(life) else { return };
        if p.paused || p.driver.machine().wanted_capture() != Wanted::Epoch {
            return;
        }
        let due = match p.policy.next(&p.facts(now)) {
            Next::Now(_) => now,
            Next::At(due) => due.max(now),
            Next::Nothing => return,
        };
        let due = self.when(life.0, due);
        if self.hosts[life.0].look.is_none_or(|(planned, _)| planned > due.max(self.now)) {
            self.truth.fail(format!("{life:?} holds output and sleeps beyond the end of its epoch"));
        }
    }

    /// The coordinator checks what is due, and goes to sleep again.
    pub(super) fn coordinate(&mut self, life: Life) {
        self.primary(life, PrimaryEvent::Tick);
        if self.rng.one_in(800) && !self.healed {
            return self.work_long(life);
        }
        self.capture_if_due(life);
        let now = self.clock(life.0);
        let Some(p) = self.primary_of(life) else { return };
        let (wanted, mut until) = p.driver.wait();
        let next = match wanted {
            Wanted::Epoch if !p.paused => p.policy.next(&p.facts(now)),
            _ => Next::Nothing,
        };
        match next {
            Next::Now(_) => until = Some(now),
            Next::At(at) => until = Some(until.map_or(at, |until| until.min(at))),
            Next::Nothing => {}
        }
        self.look_when(life, until);
    }

    pub(super) fn dialled(&mut self, life: Life, link: Link, target: usize) {
        let listens = matches!(self.hosts[target].process, Process::Standby(_));
        let reached = self.cut[life.0][target] <= self.now && self.cut[target][life.0] <= self.now;
        if listens && reached {
            let conn = self.connect(life, link, (target, self.hosts[target].life));
            if let Some(p) = self.primary_of(life) {
                p.driver.ports_mut().connected(link, conn);
            }
            self.primary(life, PrimaryEvent::Connected { link });
        } else {
            self.primary(
                life,
                PrimaryEvent::DialFailed { link, why: "connection refused".into(), lasts: false },
            );
        }
    }

    /// A message has arrived at the primary.
    pub(super) fn primary_hears(&mut self, life: Life, conn: usize, msg: Msg) {
        let link = self.conns[conn].primary_link;
        if let Some(p) = self.primary_of(life) {
            match &msg {
                Msg::Accept { holds, .. } => {
                    p.standby_reaches = None;
                    p.driver.ports_mut().holds = *holds;
                }
                Msg::Reaches(reaches) => p.standby_reaches = Some(*reaches),
                _ => {}
            }
        }
        let event = match msg {
            Msg::Reaches(reaches) => PrimaryEvent::StandbyReaches { link, reaches: Some(reaches) },
            Msg::Accept { dead_after, .. } => PrimaryEvent::Accepted { link, dead_after },
            Msg::Refuse(code, text) => PrimaryEvent::Refused { link, code: Ok(code), text },
            Msg::Beat { stamp } => PrimaryEvent::Heartbeat { link, stamp },
            Msg::Ack { generation, number, stamp } => {
                PrimaryEvent::Ack { link, generation, checkpoint: number, stamp }
            }
            Msg::Leave(reason) => PrimaryEvent::Leave { link, reason },
            Msg::Closed => PrimaryEvent::LinkLost { link, why: LossReason::Closed },
            other => PrimaryEvent::LinkLost { link, why: LossReason::Protocol(format!("{other:?}")) },
        };
        self.primary(life, event);
    }
}
