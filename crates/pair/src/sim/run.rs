//! One schedule: what happens, which faults strike, and what must be true at the end.

use std::collections::BTreeSet;

use super::checks;
use super::hosts::Process;
use super::stats::Stats;
use super::truth::Life;
use super::world::{Base, Happening, Msg, World};
use crate::planted::Bug;
use crate::{ClaimResult, Link, LossReason, PrimaryEvent, PrimaryStatus, StandbyEvent};

const FAULTS_FROM: u64 = 100_000;
/// By then the VM is protected, even after long work during its base: one fault must not cost it.
const ONE_FAULT_FROM: u64 = 800_000;
const FAULTS_UNTIL: u64 = 1_800_000;
/// By then everybody has done what they do by themselves.
const OPERATOR_FROM: u64 = 2_700_000;
const CHECK_FROM: u64 = 3_300_000;
const END: u64 = 3_700_000;

/// How many faults strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Faults {
    None,
    One,
    Many,
    /// One waiting thread hangs for good.
    Wedge,
    /// The arbiter is out of reach for good, and a standby is stopped in order.
    Stop,
    /// The arbiter is out of reach for long, and the copies of all standbys are found to be worthless.
    Worthless,
    /// One record of a protected VM's link comes damaged.
    Garbled,
    /// Both hosts write to the same storage, a connection is reset at the standby's end, and somebody says there that the
    /// primary has won.
    Storage,
    /// The hosts lose each other, and all of them lose power while the arbiter, which is slow, has their claims.
    Power,
    /// Images are copied, and operators start the copies, with and without a word for it, among other faults.
    Copies,
}

/// The faults of a schedule that strike: all except those that are left out.
#[derive(Debug, Default, Clone)]
pub(super) struct Strikes {
    pub(super) left_out: BTreeSet<u32>,
    /// How many there were so far.
    pub(super) drawn: u32,
}

impl Strikes {
    fn next(&mut self) -> bool {
        self.drawn += 1;
        !self.left_out.contains(&(self.drawn - 1))
    }
}

/// Runs one schedule.
pub(super) fn schedule(seed: u64, faults: Faults, bug: Option<Bug>) -> Result<Stats, String> {
    schedule_of(seed, faults, bug, &mut Strikes::default(), false)
}

/// The same without some of its faults; returns how many there were. Prints what happens if that is wanted.
pub(super) fn schedule_of(
    seed: u64,
    faults: Faults,
    bug: Option<Bug>,
    strikes: &mut Strikes,
    trace: bool,
) -> Result<Stats, String> {
    let mut world = World::new(seed, 3, bug);
    world.trace |= trace;
    world.strikes = std::mem::take(strikes);
    world.hosts[0].life = 1;
    world.copies = faults == Faults::Copies;
    world.start_primary(0, 1, 0, 0, false);
    for host in 1..3 {
        world.start_standby(host);
    }
    world.company = matches!(faults, Faults::Many | Faults::Power | Faults::Copies);
    world.disturbed = !matches!(faults, Faults::None | Faults::One | Faults::Many);
    let count = match faults {
        Faults::None
        | Faults::Wedge
        | Faults::Stop
        | Faults::Worthless
        | Faults::Garbled
        | Faults::Storage
        | Faults::Power => 0,
        Faults::One => 1,
        Faults::Many => world.rng.range(1, 7),
        Faults::Copies => world.rng.range(0, 4),
    };
    let from = if faults == Faults::One { ONE_FAULT_FROM } else { FAULTS_FROM };
    if matches!(faults, Faults::Stop | Faults::Worthless) {
        world.hosts.iter_mut().for_each(|host| host.arbiter_cut_until = u64::MAX);
        let time = world.rng.range(FAULTS_FROM, FAULTS_UNTIL);
        for host in 1..3 {
            let happens =
                if faults == Faults::Stop { Happening::Stop { host } } else { Happening::Worthless { host } };
            world.at(time, happens);
        }
        world.stands_still_at_leave = faults == Faults::Stop && world.rng.one_in(2);
        if faults == Faults::Worthless {
            // For those whose disks were too slow for the primary's patience.
            world.at(OPERATOR_FROM, Happening::ArbiterIsBack);
        }
    }
    if faults == Faults::Wedge {
        let (time, host) = (world.rng.range(ONE_FAULT_FROM, FAULTS_UNTIL), world.rng.range(0, 3) as usize);
        world.at(time, Happening::Wedge { host });
        // By then nobody relies on that host any more.
        if world.rng.one_in(2) {
            world.at(time + 1_000_000, Happening::CrashIfProtected);
        }
    }
    if faults == Faults::Storage {
        world.shared_storage = true;
        let time = world.rng.range(ONE_FAULT_FROM, FAULTS_UNTIL);
        world.at(time, Happening::ResetAtStandby);
    }
    if faults == Faults::Garbled {
        let time = world.rng.range(ONE_FAULT_FROM, FAULTS_UNTIL);
        world.at(time, Happening::Garble);
    }
    if faults == Faults::Power {
        let time = world.rng.range(ONE_FAULT_FROM, FAULTS_UNTIL);
        (world.arbiter_slow_until, world.quick_restarts) = (FAULTS_UNTIL, true);
        for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
            world.at(time, Happening::Cut { from, to });
        }
        let time = time + world.rng.range(10_000, 500_000);
        world.at(time, Happening::PowerCut);
    }
    if faults == Faults::Copies {
        world.plan_copies((FAULTS_FROM, FAULTS_UNTIL));
    }
    for _ in 0..count {
        let time = world.rng.range(from, FAULTS_UNTIL);
        world.at(time, Happening::Fault);
    }
    world.at(FAULTS_UNTIL, Happening::Heal);
    (0..3).for_each(|time| world.at(OPERATOR_FROM + time * 200_000, Happening::Operator));
    world.run_until(CHECK_FROM);
    let tip = world.truth.tip;
    world.run_until(END);
    if world.truth.violation.is_none() {
        world.check_liveness(tip);
    }
    *strikes = world.strikes;
    match world.truth.violation.take().or_else(|| checks::amiss(faults, &world.stats)) {
        Some(what) => Err(what),
        None => Ok(world.stats),
    }
}

impl World {
    fn run_until(&mut self, time: u64) {
        while self.truth.violation.is_none()
            && let Some(happening) = self.pop(time)
        {
            self.happen(happening);
        }
    }

    fn happen(&mut self, happening: Happening) {
        self.stats.events += 1;
        let life = match &happening {
            Happening::Look(life, _)
            | Happening::Drain(life)
            | Happening::VmStep(life)
            | Happening::DiskFails(life)
            | Happening::SeesWinner(life)
            | Happening::LetGo(life)
            | Happening::Counted { life, .. }
            | Happening::ShipPart { life, .. }
            | Happening::Dialled { life, .. }
            | Happening::BaseRound { life, .. }
            | Happening::ClaimAnswered { life, .. }
            | Happening::Tried { life, .. }
            | Happening::Applied { life, .. }
            | Happening::Settled { life, .. }
            | Happening::Released { life, .. }
            | Happening::LookForRivals(life)
            | Happening::FalseHello(life)
            | Happening::Superseded { life, .. }
            | Happening::Discarded { life, .. } => Some(*life),
            Happening::Reset { conn, side } => Some(self.conns[*conn].ends[*side]),
            _ => None,
        };
        if let Some(life) = life {
            if !self.alive(life) {
                return;
            }
            let frozen = self.frozen(life);
            if frozen > self.now {
                // It waits in a queue of the kernel; after SIGCONT things happen in any order.
                let at = frozen + self.rng.range(0, 300);
                return self.at(at, happening);
            }
        }
        match happening {
            Happening::Deliver { conn, side } => self.deliver(conn, side),
            Happening::Reset { conn, side } => self.reset(conn, side),
            Happening::Look(life, number) => self.look(life, number),
            Happening::Drain(life) => match &self.hosts[life.0].process {
                Process::Primary(_) => self.drain(life),
                _ => self.write_out(life),
            },
            Happening::Dialled { life, link, target } => self.dialled(life, link, target),
            Happening::VmStep(life) => self.vm_step(life),
            Happening::DiskFails(life) => self.disk_fails(life),
            Happening::SeesWinner(life) => self.sees_winner(life),
            Happening::LetGo(life) => self.let_go(life),
            Happening::Reconnected { host } => self.reconnected(host),
            Happening::Counted { life, link, base } => self.counted(life, link, base),
            Happening::ShipPart { life, captured_for, ticket, node, left } => {
                self.ship_part(life, captured_for, (ticket, node), false, left)
            }
            Happening::BaseRound { life, link, left } => self.base_round(life, link, left),
            Happening::ClaimArrives { life, generation, from } => self.claim_arrives(life, generation, from),
            Happening::ClaimAnswered { life, generation, result } => match &self.hosts[life.0].process {
                Process::Primary(_) => self.primary(life, PrimaryEvent::Claimed { generation, result }),
                Process::Starting => self.image_answered(life, generation, &result),
                _ => self.standby(life, StandbyEvent::Claimed { generation, result }),
            },
            Happening::Tried { life, link, number } => self.tried(life, link, number),
            Happening::Applied { life, link, number } => self.applied(life, link, number),
            Happening::Settled { life, link, number } => self.settled(life, link, number),
            Happening::Released { life, link } => self.released(life, link),
            Happening::Discarded { life, link } => self.standby(life, StandbyEvent::Discarded { link }),
            Happening::Restart { host } => self.restart(host),
            Happening::Operator => self.operator(),
            Happening::Backup => self.backup(),
            Happening::StartCopy => self.start_copy(),
            Happening::LookForRivals(life) => self.look_for_rivals(life),
            Happening::Superseded { life, generation, owner } => {
                self.superseded(life, generation, owner);
            }
            Happening::Fault => {
                if self.strikes.next() {
                    self.fault();
                }
            }
            Happening::Wedge { host } => self.wedge(host),
            Happening::Stop { host } => {
                if matches!(self.hosts[host].process, Process::Standby(_)) {
                    self.standby(self.life(host), StandbyEvent::Stop);
                }
            }
            Happening::Worthless { host } => self.copy_is_worthless(self.life(host)),
            Happening::ArbiterIsBack => self.hosts.iter_mut().for_each(|host| host.arbiter_cut_until = 0),
            Happening::CrashIfProtected => {
                let (_, owner) = self.truth.newest();
                if let Process::Primary(p) = &self.hosts[owner.0].process
                    && p.driver.machine().status() == PrimaryStatus::Protected
                {
                    self.crash(owner.0);
                }
            }
            Happening::Cut { from, to } => {
                if !self.healed {
                    self.cut[from][to] = self.now + 300_000;
                }
            }
            Happening::PowerCut => self.power_cut(),
            Happening::ResetAtStandby => self.reset_at_standby(),
            Happening::Garble => self.garble(),
            Happening::FalseHello(life) => self.hears_false_hello(life),
            Happening::Heal => self.heal(),
        }
    }

    /// A shared disk may not have answered all that it was told.
    fn let_go(&mut self, life: Life) {
        let stays = self.disturbed && self.rng.one_in(8);
        let Some(p) = self.primary_of(life) else { return };
        p.writes_stay |= stays;
        let event = if stays { PrimaryEvent::OutputStays } else { PrimaryEvent::OutputLeft };
        self.primary(life, event);
    }

    fn deliver(&mut self, conn: usize, side: usize) {
        if let Some(until) = self.held_up(conn, side) {
            let at = until + self.rng.range(0, 300);
            return self.at(at, Happening::Deliver { conn, side });
        }
        let life = self.conns[conn].ends[side];
        let Some(msg) = self.conns[conn].queues[side].pop_front() else { return };
        // What the kernel had when the connection was closed is read to its end.
        let hears = self.alive(life) && (self.conns[conn].open[side] || matches!(msg, Msg::Leave(_)));
        match side {
            _ if !hears => {}
            0 => self.standby_hears(life, conn, msg),
            _ => self.primary_hears(life, conn, msg),
        }
    }

    fn reset(&mut self, conn: usize, side: usize) {
        let life = self.conns[conn].ends[side];
        if !self.conns[conn].open[side] {
            return;
        }
        let why = LossReason::Error("connection reset by peer".into());
        if side == 0 {
            self.standby(life, StandbyEvent::LinkLost { link: Link(conn as u64), why });
        } else {
            let link = self.conns[conn].primary_link;
            self.primary(life, PrimaryEvent::LinkLost { link, why });
        }
    }

    /// A claim reaches the arbiter, or does not, or does and its answer is lost. The process that sent it may
    /// have died.
    fn claim_arrives(&mut self, life: Life, generation: u64, base: Base) {
        let cut = self.hosts[life.0].arbiter_cut_until > self.now;
        let mut result = ClaimResult::Unreachable { why: "no route".into() };
        let swapped = self.hosts[life.0].swapped_until > self.now;
        let forgot = self.arbiter_forgot_until > self.now;
        if swapped && self.bug == Some(Bug::AnyArbiter) {
            result = ClaimResult::Won;
        } else if forgot && self.bug == Some(Bug::TwoWinners) {
            self.truth.forget(generation);
        }
        // An arbiter that is another one, or that lacks the claim before this one, takes none.
        let refuses = swapped || forgot && self.bug != Some(Bug::TwoWinners);
        if !refuses && (!cut || self.rng.one_in(3)) {
            let verdict = self.truth.claim(generation, life, base);
            if base.word && verdict.is_ok() {
                self.copy_won = self.now;
            }
            if !cut {
                result = match verdict {
                    Ok(()) => ClaimResult::Won,
                    Err(owner) => ClaimResult::Lost { owner: format!("{owner:?}") },
                };
            }
        }
        let delay = self.arbiter_delay();
        self.after(delay, Happening::ClaimAnswered { life, generation, result });
    }
}
