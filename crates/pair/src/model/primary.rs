//! The primary in the model: carries out what the production state machine decides.

use std::collections::VecDeque;

use crate::planted::Bug;
use crate::{
    ExitReason, Introduction, Link, LossReason, PrimaryAction as Action, PrimaryEvent as Event,
    PrimaryStatus, Wanted,
};

use super::world::{Checkpoint, Conn, Mode, Msg, NOW, Process, TIMING, VM, World};

impl World {
    /// Hands an event in and carries out what follows. A thread that is due to look does so at once, unless
    /// its host is slow.
    pub(super) fn tell_primary(&mut self, host: usize, event: Event, bug: Option<Bug>) {
        self.primary_event(host, event, bug);
        let prompt = self.hosts[host].slow == 0 && !self.hosts[host].paused;
        let due = |world: &mut Self| {
            world.primary(host).is_some_and(|p| p.machine.next_deadline().is_some_and(|due| due <= NOW))
        };
        if prompt && due(self) {
            self.primary_event(host, Event::Tick, bug);
        }
    }

    pub(super) fn primary_event(&mut self, host: usize, event: Event, bug: Option<Bug>) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            let Some(primary) = self.primary(host) else { return };
            primary.machine.handle(NOW, event, &mut actions);
            for action in actions {
                events.extend(self.primary_does(host, action, bug));
            }
        }
    }

    fn primary_does(&mut self, host: usize, action: Action, bug: Option<Bug>) -> Option<Event> {
        let life = self.life(host);
        match action {
            Action::Dial { link, address } => return Some(self.dial(host, link, address)),
            Action::SendHello { link, generation } => {
                let hello = Introduction {
                    vm: VM,
                    generation,
                    slots: 1,
                    dead_after: TIMING.dead_after,
                    shared_storage: false,
                };
                self.send_as_primary(host, link, Msg::Hello(hello));
            }
            Action::StartBase { link } => self.primary(host)?.base_ready = Some(link),
            Action::HoldOutput { .. } => self.primary(host)?.valve.mode = Mode::Hold,
            Action::Ship(ticket) => {
                let history = self.primary(host)?.history.clone();
                let checkpoint = Checkpoint { number: ticket.number, history, flags: ticket.flags };
                self.send_as_primary(host, ticket.link, Msg::Checkpoint(checkpoint, NOW));
            }
            Action::Release { through } => {
                let valve = &mut self.primary(host)?.valve;
                valve.committed = valve.committed.max(through);
            }
            Action::ReleaseAll { generation } => {
                self.goes_on(generation, life);
                self.primary(host)?.valve.mode = Mode::Open;
                if let Some(image) = &mut self.hosts[host].image {
                    image.generation = generation;
                }
            }
            Action::SendHeartbeat { link } => self.send_as_primary(host, link, Msg::Beat(NOW)),
            Action::SendEnd { link, reason } => self.send_as_primary(host, link, Msg::End(reason)),
            Action::Dismiss { link } => self.send_as_primary(host, link, Msg::Dismiss),
            Action::Hangup { link } => {
                self.primary(host)?.base_ready = None;
                let conn = self.conn_of(life, link);
                conn.into_iter().for_each(|conn| self.close(conn, 1));
            }
            Action::Claim { generation } => {
                let history = self.primary(host)?.history.clone();
                self.ask(life, generation, history);
            }
            Action::Fence { .. } => {
                let valve = &mut self.primary(host)?.valve;
                valve.mode = Mode::Discard;
                valve.held.clear();
            }
            Action::StopGuest => self.primary(host)?.stopped = true,
            // Here the process dies then. The simulator has it wait for the arbiter.
            Action::GiveAway { .. } => self.stop_process(host, true),
            Action::Exit { reason } => {
                if let ExitReason::Ended(_) = reason {
                    self.ends(life);
                }
                self.drain(host, bug);
                self.stop_process(host, true);
            }
            // The arbiter is asked then, as after a fault.
            Action::HandOver => self.disturbed = true,
            Action::LetGo => {
                self.drain(host, bug);
                return Some(Event::OutputLeft);
            }
            Action::BeginEpoch { .. }
            | Action::DropCapture
            | Action::AskGuest
            | Action::Endure { .. }
            | Action::Keep { .. }
            | Action::Note(_) => {}
        }
        None
    }

    fn send_as_primary(&mut self, host: usize, link: Link, msg: Msg) {
        let conn = self.conn_of(self.life(host), link);
        conn.into_iter().for_each(|conn| self.send(conn, 0, msg.clone()));
    }

    /// A standby that is there is reached at once.
    fn dial(&mut self, host: usize, link: Link, address: usize) -> Event {
        let target = (host + 1 + address) % self.hosts.len();
        let there = &self.hosts[target];
        let listens = matches!(there.process, Process::Standby(_)) && !there.paused;
        if !listens || self.is_cut(host, target) || self.is_cut(target, host) {
            return Event::DialFailed { link, why: "connection refused".into(), lasts: false };
        }
        let ends = [self.life(target), self.life(host)];
        let (id, open, queues, reset) = (self.free_id(), [true; 2], Default::default(), false);
        self.conns.push(Conn { id, ends, primary_link: link, open, queues, reset });
        Event::Connected { link }
    }

    /// The guest produces something.
    pub(super) fn guest_sends(&mut self, host: usize) {
        let number = self.left.outputs;
        self.left.outputs -= 1;
        let Some(primary) = self.primary(host) else { return };
        primary.history.push((host as u8) << 4 | number);
        let (generation, history) = (primary.machine.generation(), primary.history.clone());
        let epoch = primary.machine.epoch();
        let valve = &mut primary.valve;
        let leaves = valve.mode == Mode::Open && valve.held.is_empty();
        if !leaves && valve.mode != Mode::Discard {
            valve.held.push_back((epoch, history.clone()));
        }
        if let Some(image) = &mut self.hosts[host].image {
            image.history = history.clone();
        }
        if leaves {
            self.output(history, generation, self.life(host));
        }
    }

    /// Output that may leave does, if the lease lasts.
    pub(super) fn drain(&mut self, host: usize, bug: Option<Bug>) {
        let life = self.life(host);
        let Some(primary) = self.primary(host) else { return };
        let generation = primary.machine.generation();
        let mut out = Vec::new();
        let lasts = primary.machine.may_release(NOW) || bug == Some(Bug::LeaseForgotten);
        while primary.valve.lets_out() && (lasts || primary.valve.mode == Mode::Open) {
            out.extend(primary.valve.held.pop_front().map(|(_, history)| history));
        }
        out.into_iter().for_each(|history| self.output(history, generation, life));
    }

    /// Whether there is something for [`drain`](Self::drain).
    pub(super) fn may_drain(&self, host: usize, bug: Option<Bug>) -> bool {
        match &self.hosts[host].process {
            Process::Primary(p) => {
                let lasts = p.machine.may_release(NOW) || bug == Some(Bug::LeaseForgotten);
                p.valve.lets_out() && (p.valve.mode == Mode::Open || lasts)
            }
            _ => false,
        }
    }

    /// Whether a checkpoint can be captured now, whether it is the base, and whether the VM stands still after it.
    pub(super) fn wanted(&self, host: usize) -> Option<(Link, bool, bool)> {
        let Process::Primary(p) = &self.hosts[host].process else { return None };
        let link = p.machine.link()?;
        match p.machine.wanted_capture() {
            Wanted::Base { link } => (p.base_ready == Some(link)).then_some((link, true, false)),
            Wanted::Epoch => (self.left.epochs > 0).then_some((link, false, false)),
            Wanted::Last(_) => Some((link, false, true)),
            Wanted::HandOver => Some((link, false, true)),
            Wanted::Nothing => None,
        }
    }

    pub(super) fn capture(&mut self, host: usize, (link, base, stays): (Link, bool, bool), bug: Option<Bug>) {
        if let Process::Primary(p) = &self.hosts[host].process
            && p.machine.wanted_capture() == Wanted::Epoch
        {
            self.left.epochs -= 1;
        }
        self.tell_primary(host, Event::Captured { link, base, stays }, bug);
    }

    /// A message has arrived.
    pub(super) fn primary_hears(&mut self, host: usize, conn: usize, msg: Msg, bug: Option<Bug>) {
        let link = self.conns[conn].primary_link;
        let event = match msg {
            Msg::Accept => Event::Accepted { link, dead_after: TIMING.dead_after },
            Msg::Refuse => Event::Refused { link, code: Err(0), text: "refused".into() },
            Msg::Beat(stamp) => Event::Heartbeat { link, stamp },
            Msg::Ack { generation, checkpoint, stamp } => Event::Ack { link, generation, checkpoint, stamp },
            Msg::Leave(reason) => Event::Leave { link, reason },
            Msg::Closed => Event::LinkLost { link, why: LossReason::Closed },
            other => Event::LinkLost { link, why: LossReason::Protocol(format!("{other:?}")) },
        };
        self.tell_primary(host, event, bug);
    }

    /// Whether the VM runs here, with output that leaves or waits for a checkpoint only.
    pub(super) fn runs_at(&self, host: usize) -> bool {
        match &self.hosts[host].process {
            Process::Primary(p) => {
                let waits = matches!(p.machine.status(), PrimaryStatus::Arbitrating | PrimaryStatus::Over);
                !waits && self.newest().1 == self.life(host)
            }
            _ => false,
        }
    }
}
