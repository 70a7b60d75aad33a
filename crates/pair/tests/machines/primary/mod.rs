//! The primary: its rig, and its tests by what they are about.

mod choice;
mod dismissal;
mod ends;
mod loss;
mod output;
mod told;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode};
use outlive_pair::PrimaryAction::{self, *};
use outlive_pair::PrimaryEvent::{self, *};
use outlive_pair::{
    ClaimResult, ExitReason, Kept, Link, LossReason, OutputMode, Primary, PrimaryConfig, PrimaryNote,
    PrimaryStatus, Ticket, Wanted,
};

use super::{ms, timing};

/// A primary and the time.
pub(crate) struct Host {
    pub(crate) machine: Primary,
    pub(crate) now: u64,
}

impl Host {
    fn new(standbys: usize) -> Self {
        let config = PrimaryConfig {
            generation: 4,
            checkpoint: 10,
            handed: false,
            standbys,
            slots: 2,
            timing: timing(),
        };
        Self { machine: Primary::new(config, ms(0)), now: 0 }
    }

    /// Hands in an event; returns all actions, including those of the waiting thread if it has to ask the
    /// arbiter.
    fn on(&mut self, event: PrimaryEvent) -> Vec<PrimaryAction> {
        let mut out = Vec::new();
        self.machine.handle(ms(self.now), event, &mut out);
        let due = self.machine.next_deadline().is_some_and(|due| due <= ms(self.now));
        if self.machine.status() == PrimaryStatus::Arbitrating && due {
            self.machine.handle(ms(self.now), Tick, &mut out);
        }
        out
    }

    /// Hands in an event; returns the actions without notes and heartbeats.
    pub(crate) fn acts(&mut self, event: PrimaryEvent) -> Vec<PrimaryAction> {
        let mut actions = self.on(event);
        actions.retain(|action| !matches!(action, Note(_) | SendHeartbeat { .. }));
        actions
    }

    /// Up to the base synchronisation on link 0.
    pub(crate) fn attached() -> Self {
        Self::attached_at(0)
    }

    fn attached_at(now: u64) -> Self {
        let mut host = Self::new(1);
        host.now = now;
        assert_eq!(host.acts(Tick), [Dial { link: LINK, address: 0 }]);
        assert_eq!(host.acts(Connected { link: LINK }), [SendHello { link: LINK, generation: 4 }]);
        assert_eq!(host.acts(Accepted { link: LINK, dead_after: ms(500) }), [StartBase { link: LINK }]);
        host
    }

    /// Up to "protected"; checkpoint 11 is the base.
    pub(crate) fn protected() -> Self {
        Self::protected_at(0)
    }

    pub(crate) fn protected_at(now: u64) -> Self {
        let mut host = Self::attached_at(now);
        let base = CheckpointFlags { base_final: true, end: None, hand_over: false };
        assert_eq!(host.acts(BASE), [HoldOutput { link: LINK, epoch: 12 }, Ship(ticket(11, base))]);
        host.now += 1;
        assert_eq!(host.acts(ack(11, host.now)), [Release { through: 11 }]);
        assert_eq!(host.machine.status(), PrimaryStatus::Protected);
        host
    }

    /// The arbiter answers.
    /// From protected to standing still: all is committed, its output has left, and the link is closed.
    pub(crate) fn hand_over(&mut self) {
        self.acts(PrimaryEvent::HandOver);
        self.acts(Captured { link: LINK, base: false, stays: true });
        let (checkpoint, stamp) = (self.machine.epoch() - 1, ms(self.now));
        self.acts(PrimaryEvent::Ack { link: LINK, generation: 4, checkpoint, stamp });
        let left = self.acts(PrimaryEvent::OutputLeft);
        assert_eq!(left, [PrimaryAction::Hangup { link: LINK }]);
    }

    pub(crate) fn win(&mut self) -> Vec<PrimaryAction> {
        self.claimed(ClaimResult::Won)
    }

    fn claimed(&mut self, result: ClaimResult) -> Vec<PrimaryAction> {
        self.acts(Claimed { generation: 5, result })
    }
}

pub(crate) const LINK: Link = Link(0);

const BASE: PrimaryEvent = Captured { link: LINK, base: true, stays: false };

const EPOCH: PrimaryEvent = Captured { link: LINK, base: false, stays: false };

const PLAIN: CheckpointFlags = CheckpointFlags { base_final: false, end: None, hand_over: false };

fn ack(checkpoint: u64, stamp: u64) -> PrimaryEvent {
    Ack { link: LINK, generation: 4, checkpoint, stamp: ms(stamp) }
}

fn ticket(number: u64, flags: CheckpointFlags) -> Ticket {
    Ticket { link: LINK, generation: 4, number, flags }
}

/// The actions that a capture brings.
fn ships(number: u64) -> [PrimaryAction; 2] {
    [BeginEpoch { link: LINK, epoch: number + 1 }, Ship(ticket(number, PLAIN))]
}

fn lost() -> PrimaryEvent {
    LinkLost { link: LINK, why: LossReason::Closed }
}

/// The leave of a standby that goes for good and wants nothing any more.
pub(super) fn released() -> PrimaryEvent {
    Leave { link: LINK, reason: LeaveReason::Released }
}
