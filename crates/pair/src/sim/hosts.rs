//! The drivers of the two machines in the simulation: what crates/outlive does with threads and sockets, done
//! with a queue.

use std::collections::VecDeque;

use outlive_epoch::{CheckpointFlags, EndReason, VmId};

use super::truth::{Life, Node};
use super::world::{Happening, Msg, World};
use super::{INTERVAL, SLOTS, STEP, timing};
use crate::planted::{Bug, Planted};
use crate::{
    ExitReason, Introduction, Link, LossReason, OutputMode, Primary, PrimaryAction, PrimaryConfig,
    PrimaryEvent, PrimaryNote, Standby, StandbyAction, StandbyConfig, StandbyEvent, StandbyExit, StandbyNote,
    Wanted,
};

const VM: VmId = VmId([7; 16]);

pub(super) enum Process {
    Down,
    Primary(Box<PrimaryProcess>),
    Standby(Box<StandbyProcess>),
}

pub(super) struct PrimaryProcess {
    pub(super) machine: Primary,
    conn: Option<(Link, usize)>,
    /// What the VM has done.
    node: Node,
    /// What the driver does with a frame; follows the actions only.
    mode: OutputMode,
    held: VecDeque<(u64, Node)>,
    /// The vCPUs are stopped for good.
    stopped: bool,
    /// Few enough dirty pages are left for the base-final checkpoint.
    base_ready: Option<Link>,
    /// The link over which generation + 1 became disputed had been reset by a third party.
    pub(super) excused: bool,
}

#[derive(Debug, Clone, Copy)]
struct Buffer {
    number: u64,
    node: Node,
    flags: CheckpointFlags,
    whole: bool,
}

pub(super) struct StandbyProcess {
    pub(super) machine: Standby,
    /// Two staging buffers at most: one is applied, one is filled.
    staging: Vec<Buffer>,
    acked: Option<Buffer>,
    /// The state that memory is, if it is one.
    memory: Option<Node>,
    applying: bool,
    /// The disks are at the committed checkpoint.
    settled: bool,
    /// They will not get there.
    pub(super) bad_disk: bool,
    /// The arbiter was asked.
    claimed: bool,
    /// Base pages were written over a committed state.
    spoiled: bool,
    pub(super) excused: bool,
}

impl StandbyProcess {
    /// The state that a claim of this process is about.
    pub(super) fn claims_from(&self) -> Node {
        self.acked.map_or(0, |buffer| buffer.node)
    }
}

impl PrimaryProcess {
    pub(super) fn node(&self) -> Node {
        self.node
    }
}

impl World {
    pub(super) fn start_standby(&mut self, host: usize) {
        let now = self.clock(host);
        let mut machine = Standby::new(StandbyConfig { vm: None, timing: timing() }, now);
        machine.bug = Planted(self.bug);
        self.hosts[host].life += 1;
        self.hosts[host].tick_at = None;
        self.hosts[host].process = Process::Standby(Box::new(StandbyProcess {
            machine,
            staging: Vec::new(),
            acked: None,
            memory: None,
            applying: false,
            settled: false,
            bad_disk: false,
            claimed: false,
            spoiled: false,
            excused: false,
        }));
    }

    /// Starts a primary: at the beginning, or in the process of a standby that has taken over.
    pub(super) fn start_primary(&mut self, host: usize, generation: u64, checkpoint: u64, node: Node) {
        let now = self.clock(host);
        let standbys = self.hosts.len() - 1;
        let config = PrimaryConfig { generation, checkpoint, standbys, slots: SLOTS, timing: timing() };
        let mut machine = Primary::new(config, now);
        machine.bug = Planted(self.bug);
        self.hosts[host].tick_at = None;
        self.hosts[host].process = Process::Primary(Box::new(PrimaryProcess {
            machine,
            conn: None,
            node,
            mode: OutputMode::PassThrough,
            held: VecDeque::new(),
            stopped: false,
            base_ready: None,
            excused: false,
        }));
        let life = (host, self.hosts[host].life);
        self.after(1, Happening::VmStep(life));
        self.after(INTERVAL, Happening::Capture(life));
        self.primary(life, PrimaryEvent::Tick);
    }

    /// The process ends. `told` is whether its kernel lives to close its connections.
    pub(super) fn stop_process(&mut self, host: usize, told: bool) {
        let life = (host, self.hosts[host].life);
        self.hosts[host].process = Process::Down;
        self.hosts[host].frozen_until = 0;
        self.hosts[host].stale = None;
        for conn in 0..self.conns.len() {
            for side in 0..2 {
                if self.conns[conn].ends[side] == life && told {
                    self.close(conn, side);
                }
            }
        }
        if !self.truth.ended {
            let delay = self.rng.range(20_000, 300_000);
            self.after(delay, Happening::Restart { host });
        }
    }

    fn close(&mut self, conn: usize, side: usize) {
        if std::mem::replace(&mut self.conns[conn].open[side], false) {
            self.send(conn, 1 - side, Msg::Closed);
        }
    }

    /// The time that a process believes it is.
    fn believed(&mut self, host: usize) -> std::time::Duration {
        match self.hosts[host].stale.take() {
            Some(time) => self.clock_at(host, time),
            None => self.clock(host),
        }
    }

    fn plan_tick(&mut self, life: Life) {
        let deadline = match &self.hosts[life.0].process {
            Process::Primary(p) => p.machine.next_deadline(),
            Process::Standby(s) => s.machine.next_deadline(),
            Process::Down => None,
        };
        let Some(deadline) = deadline else { return };
        let at = self.when(life.0, deadline).max(self.now);
        if self.hosts[life.0].tick_at.is_none_or(|planned| at < planned) {
            self.hosts[life.0].tick_at = Some(at);
            // The scheduler of that host is not punctual.
            let late = self.rng.range(0, 1500);
            self.at(at + late, Happening::Tick(life));
        }
    }

    pub(super) fn primary(&mut self, life: Life, event: PrimaryEvent) {
        let now = self.believed(life.0);
        let mut actions = Vec::new();
        if let Process::Primary(p) = &mut self.hosts[life.0].process {
            p.machine.handle(now, event, &mut actions);
        }
        for action in actions {
            self.primary_does(life, action);
        }
        self.plan_tick(life);
    }

    fn primary_does(&mut self, life: Life, action: PrimaryAction) {
        let clock = self.clock(life.0);
        let Process::Primary(p) = &mut self.hosts[life.0].process else { return };
        let conn_of = |link: Link| p.conn.filter(|(known, _)| *known == link).map(|(_, conn)| conn);
        match action {
            PrimaryAction::Dial { link, address } => {
                let target = (life.0 + 1 + address) % self.hosts.len();
                let delay = self.rng.range(100, 2000);
                self.after(delay, Happening::Dialled { life, link, target });
            }
            PrimaryAction::SendHello { link, generation } => {
                let hello = Introduction { vm: VM, generation, dead_after: timing().dead_after };
                conn_of(link).into_iter().for_each(|conn| self.send(conn, 0, Msg::Hello(hello)));
            }
            PrimaryAction::StartBase { link } => {
                let left = self.rng.range(1, 4) as u32;
                self.after(200, Happening::BaseRound { life, link, left });
            }
            PrimaryAction::HoldOutput => p.mode = OutputMode::Hold,
            PrimaryAction::Ship { link, checkpoint: number, flags } => {
                let node = p.node;
                p.stopped |= flags.end.is_some();
                let Some(conn) = conn_of(link) else { return };
                self.send(conn, 0, Msg::Begin { number, node, flags });
                for _ in 0..self.rng.range(0, 3) {
                    self.send(conn, 0, Msg::Part);
                }
                self.send(conn, 0, Msg::End { stamp: clock });
            }
            PrimaryAction::Release { through } => self.release(life, through),
            PrimaryAction::SendHeartbeat { link } => {
                conn_of(link).into_iter().for_each(|conn| self.send(conn, 0, Msg::Beat { stamp: clock }));
            }
            PrimaryAction::SendEnd { link, reason } => {
                conn_of(link).into_iter().for_each(|conn| self.send(conn, 0, Msg::VmEnd(reason)));
            }
            PrimaryAction::Hangup { link } => {
                p.base_ready = None;
                if let Some(conn) = conn_of(link) {
                    p.conn = None;
                    p.excused |= self.conns[conn].broken;
                    self.close(conn, 1);
                }
            }
            PrimaryAction::Claim { generation } => self.ask_arbiter(life, generation),
            PrimaryAction::ReleaseAll => {
                p.mode = OutputMode::PassThrough;
                p.excused = false;
                let generation = p.machine.generation();
                let held = std::mem::take(&mut p.held);
                self.stats.alone += 1;
                self.truth.goes_on(generation, life);
                held.into_iter().for_each(|(_, node)| self.truth.output(node, generation, life));
            }
            PrimaryAction::Fence { .. } => {
                p.mode = OutputMode::Discard;
                p.stopped = true;
                p.held.clear();
                self.stats.fenced += 1;
            }
            PrimaryAction::Exit { reason, .. } => {
                if let ExitReason::Ended(_) = reason {
                    self.truth.ends(life);
                    self.stats.ended += 1;
                }
                self.stop_process(life.0, true);
            }
            PrimaryAction::Note(PrimaryNote::Protected { .. }) => self.stats.protected += 1,
            PrimaryAction::Note(PrimaryNote::ArbiterUnreachable { .. }) => self.stats.unreachable += 1,
            PrimaryAction::DropCapture | PrimaryAction::Note(_) => {}
        }
    }

    /// Writes out what may leave; each frame is asked for with the true time.
    fn release(&mut self, life: Life, through: u64) {
        let clock = self.clock(life.0);
        let Process::Primary(p) = &mut self.hosts[life.0].process else { return };
        let generation = p.machine.generation();
        while let Some((epoch, node)) = p.held.front().copied()
            && epoch <= through
        {
            if !p.machine.may_release(clock) {
                self.stats.late_frames += 1;
                break;
            }
            p.held.pop_front();
            self.stats.released += 1;
            self.truth.output(node, generation, life);
        }
    }

    fn ask_arbiter(&mut self, life: Life, generation: u64) {
        let delay = self.arbiter_delay();
        self.after(delay, Happening::ClaimArrives { life, generation });
    }

    pub(super) fn arbiter_delay(&mut self) -> u64 {
        let slow = if self.now < self.arbiter_slow_until { 300_000 } else { 1000 };
        self.rng.range(50, slow)
    }

    pub(super) fn vm_step(&mut self, life: Life) {
        let Process::Primary(p) = &mut self.hosts[life.0].process else { return };
        if p.stopped {
            return;
        }
        p.node = self.truth.step(p.node);
        let (node, generation) = (p.node, p.machine.generation());
        match p.mode {
            OutputMode::PassThrough => self.truth.output(node, generation, life),
            OutputMode::Hold => p.held.push_back((p.machine.epoch(), node)),
            OutputMode::Discard => {}
        }
        if self.truth.depth(node) >= self.guest_end {
            p.stopped = true;
            self.primary(life, PrimaryEvent::End { reason: EndReason::PowerOff });
        }
        let delay = self.rng.range(STEP / 2, STEP * 3 / 2);
        self.after(delay, Happening::VmStep(life));
    }

    pub(super) fn capture(&mut self, life: Life) {
        self.after(INTERVAL, Happening::Capture(life));
        let Process::Primary(p) = &mut self.hosts[life.0].process else { return };
        let end = match p.machine.wanted_capture() {
            Wanted::Nothing => return,
            Wanted::Base { link } if p.base_ready == Some(link) => None,
            Wanted::Base { .. } => return,
            Wanted::Epoch => None,
            Wanted::Last(reason) => Some(reason),
        };
        self.primary(life, PrimaryEvent::Captured { end });
    }

    pub(super) fn base_round(&mut self, life: Life, link: Link, left: u32) {
        let Process::Primary(p) = &mut self.hosts[life.0].process else { return };
        let Some((_, conn)) = p.conn.filter(|(known, _)| *known == link) else { return };
        if left == 0 {
            p.base_ready = Some(link);
            return;
        }
        self.send(conn, 0, Msg::Base);
        self.after(1000, Happening::BaseRound { life, link, left: left - 1 });
    }

    pub(super) fn dialled(&mut self, life: Life, link: Link, target: usize) {
        let listens = matches!(self.hosts[target].process, Process::Standby(_));
        let reached = self.cut[life.0][target] <= self.now && self.cut[target][life.0] <= self.now;
        if listens && reached {
            let conn = self.connect(life, link, (target, self.hosts[target].life));
            if let Process::Primary(p) = &mut self.hosts[life.0].process {
                p.conn = Some((link, conn));
            }
            self.primary(life, PrimaryEvent::Connected { link });
        } else {
            self.primary(life, PrimaryEvent::DialFailed { link, why: "connection refused".into() });
        }
    }

    /// A message has arrived at the primary.
    pub(super) fn primary_hears(&mut self, life: Life, conn: usize, msg: Msg) {
        let link = self.conns[conn].primary_link;
        let event = match msg {
            Msg::Accept { dead_after } => PrimaryEvent::Accepted { link, dead_after },
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

    pub(super) fn standby(&mut self, life: Life, event: StandbyEvent) {
        let now = self.believed(life.0);
        let mut actions = Vec::new();
        if let Process::Standby(s) = &mut self.hosts[life.0].process {
            s.machine.handle(now, event, &mut actions);
        }
        for action in actions {
            self.standby_does(life, action);
        }
        self.plan_tick(life);
    }

    fn standby_does(&mut self, life: Life, action: StandbyAction) {
        let Process::Standby(s) = &mut self.hosts[life.0].process else { return };
        match action {
            StandbyAction::Accept { link, dead_after, .. } => {
                self.send(link.0 as usize, 1, Msg::Accept { dead_after });
            }
            StandbyAction::Refuse { link, code, text } => {
                self.send(link.0 as usize, 1, Msg::Refuse(code, text));
                self.close(link.0 as usize, 0);
            }
            StandbyAction::ApplyBase { .. } => s.spoiled |= s.acked.is_some(),
            StandbyAction::Ack { link, generation, checkpoint, stamp } => {
                s.acked = s.staging.iter().find(|buffer| buffer.number == checkpoint).copied();
                if !s.acked.is_some_and(|buffer| buffer.whole) && self.bug != Some(Bug::AckWhilePartial) {
                    self.truth
                        .fail(format!("invariant 2: {life:?} acknowledges {checkpoint}, which is not whole"));
                }
                self.send(link.0 as usize, 1, Msg::Ack { generation, number: checkpoint, stamp });
            }
            StandbyAction::Apply { checkpoint } => {
                if s.applying || !s.staging.iter().any(|buffer| buffer.number == checkpoint) {
                    return self.truth.fail(format!("invariant 2: {life:?} cannot apply {checkpoint}"));
                }
                s.applying = true;
                let slow = self.rng.one_in(20) && !self.healed;
                let delay = if slow { 40_000 } else { self.rng.range(10, 4000) };
                self.after(delay, Happening::Applied { life, number: checkpoint });
            }
            StandbyAction::SendHeartbeat { link, stamp } => {
                self.send(link.0 as usize, 1, Msg::Beat { stamp })
            }
            StandbyAction::SendLeave { link, reason } => {
                self.stats.left += 1;
                self.send(link.0 as usize, 1, Msg::Leave(reason));
            }
            StandbyAction::Hangup { link } => {
                s.excused |= self.conns[link.0 as usize].broken;
                self.close(link.0 as usize, 0);
            }
            StandbyAction::DiscardStaged => {
                let acked = s.acked.map(|buffer| buffer.number);
                s.staging.retain(|buffer| Some(buffer.number) <= acked);
            }
            StandbyAction::DiscardAll => {
                // A write to memory that is under way ends first; its report is dropped in `applied`.
                s.staging.clear();
                s.applying = false;
                (s.acked, s.memory, s.spoiled, s.excused) = (None, None, false, false);
            }
            StandbyAction::Settle { checkpoint } => {
                let delay = self.rng.range(10, 50_000);
                self.after(delay, Happening::Settled { life, number: checkpoint });
            }
            StandbyAction::Claim { generation } => {
                s.claimed = true;
                self.ask_arbiter(life, generation);
            }
            StandbyAction::TakeOver { checkpoint, generation, stop } => {
                self.take_over(life, checkpoint, generation, stop)
            }
            StandbyAction::Exit { reason, .. } => {
                let failed = matches!(reason, StandbyExit::Failed(_));
                if s.applying && !failed {
                    self.truth.fail(format!("invariant 2: {life:?} ends in the middle of a commit"));
                }
                if s.claimed && failed {
                    self.truth.fail(format!("{life:?} has claimed the VM and cannot run it"));
                }
                match reason {
                    StandbyExit::Lost { .. } => self.stats.standby_lost += 1,
                    StandbyExit::Followed(_) => self.stats.followed += 1,
                    StandbyExit::Stopped | StandbyExit::Failed(_) => {}
                }
                self.stop_process(life.0, true);
            }
            StandbyAction::Note(StandbyNote::ArbiterUnreachable { .. }) => self.stats.unreachable += 1,
            StandbyAction::Note(_) => {}
        }
    }

    fn take_over(&mut self, life: Life, checkpoint: u64, generation: u64, stop: bool) {
        let Process::Standby(s) = &self.hosts[life.0].process else { return };
        let Some(acked) = s.acked else {
            return self.truth.fail(format!("{life:?} takes over without a committed checkpoint"));
        };
        if s.applying || !s.settled || s.spoiled || s.memory != Some(acked.node) || acked.number != checkpoint
        {
            self.truth.fail(format!(
                "invariant 2: {life:?} takes over from memory that is not checkpoint {checkpoint}"
            ));
        }
        if acked.flags.end.is_some() || self.truth.ended {
            self.truth.fail(format!("invariant 8: {life:?} takes over a VM that has ended in order"));
        }
        self.truth.goes_on(generation, life);
        self.stats.takeovers += 1;
        self.start_primary(life.0, generation, checkpoint, acked.node);
        if stop {
            self.primary(life, PrimaryEvent::End { reason: EndReason::Stopped });
        }
    }

    pub(super) fn applied(&mut self, life: Life, number: u64) {
        if let Process::Standby(s) = &mut self.hosts[life.0].process {
            let Some(buffer) = s.staging.iter().find(|buffer| buffer.number == number).copied() else {
                return;
            };
            s.staging.retain(|buffer| buffer.number != number);
            s.applying = false;
            s.memory = buffer.whole.then_some(buffer.node);
        }
        self.standby(life, StandbyEvent::Applied { checkpoint: number });
    }

    pub(super) fn settled(&mut self, life: Life, number: u64) {
        let Process::Standby(s) = &mut self.hosts[life.0].process else { return };
        let event = if s.bad_disk {
            self.stats.unsettled += 1;
            StandbyEvent::Failed { why: "input/output error".into() }
        } else {
            s.settled = !s.applying;
            StandbyEvent::Settled { checkpoint: number }
        };
        self.standby(life, event);
    }

    /// Whether the standby's driver reads the link just now.
    pub(super) fn standby_reads(&self, life: Life) -> bool {
        match &self.hosts[life.0].process {
            Process::Standby(s) => s.machine.may_read(),
            _ => true,
        }
    }

    /// A message has arrived at the standby.
    pub(super) fn standby_hears(&mut self, life: Life, conn: usize, msg: Msg) {
        let link = Link(conn as u64);
        let early = self.bug == Some(Bug::AckWhilePartial);
        let Process::Standby(s) = &mut self.hosts[life.0].process else { return };
        let event = match msg {
            Msg::Hello(hello) => StandbyEvent::Hello { link, hello },
            Msg::Base => StandbyEvent::BasePages { link },
            Msg::Begin { number, node, flags } => {
                s.staging.push(Buffer { number, node, flags, whole: false });
                if early {
                    StandbyEvent::Staged { link, checkpoint: number, flags, stamp: std::time::Duration::ZERO }
                } else {
                    StandbyEvent::Heard { link }
                }
            }
            Msg::Part => StandbyEvent::Heard { link },
            Msg::End { stamp } => match s.staging.last_mut() {
                Some(buffer) if early => {
                    buffer.whole = true;
                    StandbyEvent::Heartbeat { link, stamp }
                }
                Some(buffer) => {
                    buffer.whole = true;
                    StandbyEvent::Staged { link, checkpoint: buffer.number, flags: buffer.flags, stamp }
                }
                None => StandbyEvent::BadStream { link, why: "the end of nothing".into() },
            },
            Msg::Beat { stamp } => StandbyEvent::Heartbeat { link, stamp },
            Msg::VmEnd(reason) => StandbyEvent::End { link, reason },
            Msg::Closed => StandbyEvent::LinkLost { link, why: LossReason::Closed },
            other => StandbyEvent::BadStream { link, why: format!("{other:?}") },
        };
        self.standby(life, event);
    }
}
