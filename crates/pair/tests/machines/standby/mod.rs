//! The standby: its rig, and its tests by what they are about.

mod attach;
mod commit;
mod giving_up;
mod succession;
mod told;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode, VmId};
use outlive_pair::StandbyAction::{self, *};
use outlive_pair::StandbyEvent::{self, *};
use outlive_pair::{
    ClaimResult, Introduction, Link, LossReason, Standby, StandbyConfig, StandbyExit, StandbyNote,
    StandbyStatus, TailUse,
};

use super::{ms, timing};

const LINK: Link = Link(1);

const VM: VmId = VmId([1; 16]);

const OTHER: VmId = VmId([2; 16]);

const BASE: CheckpointFlags = CheckpointFlags { base_final: true, end: None, hand_over: false };

const PLAIN: CheckpointFlags = CheckpointFlags { base_final: false, end: None, hand_over: false };

struct Host {
    machine: Standby,
    now: u64,
}

fn hello_of(link: Link, vm: VmId, generation: u64) -> StandbyEvent {
    Hello { link, hello: introduction(vm, generation) }
}

fn introduction(vm: VmId, generation: u64) -> Introduction {
    Introduction { vm, generation, slots: 2, dead_after: ms(400), shared_storage: false }
}

fn staged(checkpoint: u64, flags: CheckpointFlags) -> StandbyEvent {
    Staged { link: LINK, checkpoint, flags, stamp: ms(77) }
}

fn ack(checkpoint: u64) -> StandbyAction {
    Ack { link: LINK, generation: 4, checkpoint, stamp: ms(77) }
}

fn lost() -> StandbyEvent {
    LinkLost { link: LINK, why: LossReason::Closed }
}

fn garbled() -> StandbyEvent {
    LinkLost { link: LINK, why: LossReason::Protocol("a bad record".into()) }
}

/// The actions at the loss of the link, with this checkpoint applied.
fn gone_at(checkpoint: u64) -> [StandbyAction; 2] {
    [Hangup { link: LINK }, Settle { link: LINK, checkpoint }]
}

fn apply(checkpoint: u64) -> StandbyAction {
    Apply { link: LINK, checkpoint }
}

fn applied(checkpoint: u64) -> StandbyEvent {
    Applied { link: LINK, checkpoint }
}

fn settled(checkpoint: u64) -> StandbyEvent {
    Settled { link: LINK, checkpoint }
}

fn tried(checkpoint: u64) -> StandbyEvent {
    Tried { link: LINK, checkpoint, result: Ok(()) }
}

fn taken_over(checkpoint: u64, stop: bool) -> StandbyAction {
    TakeOver { link: LINK, checkpoint, generation: 5, handed: false, tail: TailUse::at(checkpoint, 0), stop }
}

impl Host {
    fn new(vm: Option<VmId>) -> Self {
        Self { machine: Standby::new(StandbyConfig { vm, timing: timing() }, ms(0)), now: 0 }
    }

    /// Hands in an event; returns all actions, including those of the waiting thread if it has to ask the
    /// arbiter.
    fn on(&mut self, event: StandbyEvent) -> Vec<StandbyAction> {
        let mut out = Vec::new();
        self.machine.handle(ms(self.now), event, &mut out);
        let due = self.machine.next_deadline().is_some_and(|due| due <= ms(self.now));
        if self.machine.status() == StandbyStatus::Arbitrating && due {
            self.machine.handle(ms(self.now), Tick, &mut out);
        }
        out
    }

    fn acts(&mut self, event: StandbyEvent) -> Vec<StandbyAction> {
        let mut actions = self.on(event);
        actions.retain(|action| !matches!(action, Note(_) | SendHeartbeat { .. }));
        actions
    }

    fn attached() -> Self {
        Self::attached_with(false)
    }

    fn attached_with(shared_storage: bool) -> Self {
        let mut host = Self::new(None);
        let accept = Accept { link: LINK, generation: 4, dead_after: ms(1000) };
        let hello = Introduction { shared_storage, ..introduction(VM, 4) };
        let accepted = host.acts(Hello { link: LINK, hello });
        assert_eq!(accepted, [accept], "the longer patience of the two");
        assert_eq!(host.acts(BasePages { link: LINK }), [ApplyBase { link: LINK }]);
        host
    }

    /// Checkpoint 11, the base, is committed and applied.
    fn protected() -> Self {
        Self::protected_with(false)
    }

    fn protected_with(shared_storage: bool) -> Self {
        let mut host = Self::attached_with(shared_storage);
        assert_eq!(host.acts(staged(11, BASE)), [Try { link: LINK, checkpoint: 11 }]);
        assert_eq!(host.machine.committed(), None);
        assert_eq!(host.acts(tried(11)), [ack(11), apply(11)]);
        assert_eq!(host.acts(applied(11)), []);
        assert_eq!((host.machine.status(), host.machine.committed()), (StandbyStatus::Protected, Some(11)));
        host
    }

    /// The link is gone, and the arbiter was asked.
    fn claiming() -> Self {
        let mut host = Self::protected();
        host.acts(lost());
        assert_eq!(host.acts(settled(11)), [Claim { generation: 5 }]);
        host
    }

    fn claimed(&mut self, result: ClaimResult) -> Vec<StandbyAction> {
        self.acts(Claimed { generation: 5, result })
    }

    fn refusal(&mut self, link: Link, vm: VmId, generation: u64) -> RefuseCode {
        match &self.acts(hello_of(link, vm, generation))[..] {
            [Refuse { link: refused, code, .. }] if *refused == link => *code,
            other => panic!("{other:?}"),
        }
    }
}
