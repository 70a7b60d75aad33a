use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode, VmId};
use outlive_pair::StandbyAction::{self, *};
use outlive_pair::StandbyEvent::{self, *};
use outlive_pair::{
    ClaimResult, Introduction, Link, LossReason, Standby, StandbyConfig, StandbyExit, StandbyNote,
    StandbyStatus,
};

use super::{ms, timing};

const LINK: Link = Link(1);
const VM: VmId = VmId([1; 16]);
const OTHER: VmId = VmId([2; 16]);
const BASE: CheckpointFlags = CheckpointFlags { base_final: true, end: None };
const PLAIN: CheckpointFlags = CheckpointFlags { base_final: false, end: None };

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
    TakeOver { link: LINK, checkpoint, generation: 5, stop }
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

#[test]
fn primaries_that_do_not_fit_are_refused() {
    assert_eq!(Host::new(Some(VM)).refusal(LINK, OTHER, 4), RefuseCode::WrongVm);
    let mut host = Host::protected();
    for link in [Link(2), Link(3)] {
        assert_eq!(host.refusal(link, VM, 4), RefuseCode::Busy);
        assert_eq!(host.refusal(link, OTHER, 9), RefuseCode::Busy);
    }
    // The attached primary has noticed nothing.
    assert_eq!(host.acts(staged(12, PLAIN)), [ack(12), apply(12)]);
    host.acts(applied(12));
    host.acts(lost());
    assert_eq!(host.refusal(Link(4), VM, 4), RefuseCode::Busy, "while it settles");
    host.acts(settled(12));
    assert_eq!(host.refusal(Link(4), VM, 4), RefuseCode::Busy, "while it decides");
    host.claimed(ClaimResult::Lost { owner: "a".into() });
    assert_eq!(host.refusal(Link(5), VM, 5), RefuseCode::Leaving);
}

#[test]
fn an_older_generation_of_the_same_vm_is_refused() {
    let mut host = Host::attached();
    assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Discard { link: LINK }]);
    host.acts(Discarded { link: LINK });
    assert_eq!(host.refusal(Link(2), VM, 3), RefuseCode::StaleGeneration);
    assert!(matches!(host.acts(hello_of(Link(3), VM, 4))[..], [Accept { .. }]));
    host.acts(LinkLost { link: Link(3), why: LossReason::Closed });
    host.acts(Discarded { link: Link(3) });
    assert!(
        matches!(host.acts(hello_of(Link(4), OTHER, 1))[..], [Accept { .. }]),
        "another VM counts for itself"
    );
}

#[test]
fn a_checkpoint_is_acknowledged_applied_and_only_then_the_next() {
    let mut host = Host::protected();
    assert_eq!(host.acts(staged(12, PLAIN)), [ack(12), apply(12)]);
    assert_eq!(host.acts(staged(13, PLAIN)), [], "it waits for 12 to be applied");
    assert_eq!(host.acts(staged(14, PLAIN)), [], "and 14 for 13");
    assert_eq!(host.machine.committed(), Some(12));
    assert_eq!(host.acts(applied(11)), [], "of an earlier one");
    assert_eq!(host.acts(applied(12)), [ack(13), apply(13)]);
    assert_eq!(host.acts(applied(13)), [ack(14), apply(14)]);
    assert_eq!(host.acts(applied(14)), []);
}

/// The primary may not have more checkpoints on their way without an acknowledgement than it announced.
#[test]
fn what_waits_is_bounded() {
    let mut host = Host::protected();
    for number in [12, 13, 14] {
        host.acts(staged(number, PLAIN));
    }
    let actions = host.acts(staged(15, PLAIN));
    assert!(matches!(actions[0], SendLeave { reason: LeaveReason::BadStream, .. }), "{actions:?}");
}

/// A failure of this host is found while the primary lives, and heartbeats continue meanwhile.
#[test]
fn a_base_is_tried_before_it_is_acknowledged() {
    let mut host = Host::attached();
    host.acts(staged(11, BASE));
    assert_eq!(host.acts(staged(12, PLAIN)), []);
    for _ in 0..40 {
        host.now += 125;
        assert_eq!(host.acts(Heartbeat { link: LINK, stamp: ms(77) }), []);
        assert_eq!(host.acts(Tick), []);
    }
    assert_eq!(host.acts(tried(12)), [], "that is not what was tried");
    assert_eq!(host.acts(tried(11)), [ack(11), apply(11)]);
    assert_eq!(host.acts(applied(11)), [ack(12), apply(12)]);

    let mut host = Host::attached();
    host.acts(staged(11, BASE));
    let result = Err("no such CPUID leaf".to_owned());
    let actions = host.acts(Tried { link: LINK, checkpoint: 11, result });
    assert_eq!(
        actions,
        [
            SendLeave { link: LINK, reason: LeaveReason::BadStream },
            Hangup { link: LINK },
            Discard { link: LINK }
        ]
    );
    let mut host = Host::attached();
    host.acts(staged(11, BASE));
    assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Discard { link: LINK }], "nothing was promised");
    assert_eq!(host.acts(tried(11)), []);
}

/// The card and the memory of one copy must be free before another one is made.
#[test]
fn the_next_primary_waits_until_the_last_copy_is_gone() {
    let mut host = Host::protected();
    host.acts(BadStream { link: LINK, why: "checksum".into() });
    assert_eq!(host.machine.status(), StandbyStatus::Discarding);
    assert_eq!(host.refusal(Link(2), VM, 4), RefuseCode::Busy);
    assert_eq!(host.acts(Discarded { link: Link(7) }), []);
    assert_eq!(host.refusal(Link(3), VM, 4), RefuseCode::Busy);
    host.acts(Discarded { link: LINK });
    assert!(matches!(host.acts(hello_of(Link(4), VM, 4))[..], [Accept { .. }]));
    // Late reports from the last copy's threads do not concern this one.
    for event in [applied(11), settled(11), tried(11), Failed { link: LINK, why: "late".into() }] {
        assert_eq!(host.acts(event), []);
    }
}

#[test]
fn the_newest_stamp_goes_back() {
    let mut host = Host::protected();
    host.on(Heartbeat { link: LINK, stamp: ms(90) });
    host.on(Heartbeat { link: LINK, stamp: ms(80) });
    host.now += 125;
    assert_eq!(host.on(Tick), [SendHeartbeat { link: LINK, stamp: ms(90) }]);
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now + 125)));
}

#[test]
fn nothing_committed_nothing_claimed() {
    let mut host = Host::attached();
    host.now += 1000;
    assert_eq!(host.acts(Tick), [Hangup { link: LINK }, Discard { link: LINK }]);
    assert_eq!(host.machine.next_deadline(), None);
    host.acts(Discarded { link: LINK });
    assert_eq!(host.machine.status(), StandbyStatus::Listening);
}

#[test]
fn a_dead_primary_is_succeeded() {
    let mut host = Host::protected();
    host.now += 999;
    assert_eq!(host.acts(Tick), []);
    host.now += 1;
    let actions = host.on(Tick);
    let why = LossReason::Silent(ms(1000));
    let note = StandbyNote::LinkLost { why, silent: ms(1000), committed: true };
    let arbitrating = StandbyNote::Arbitrating { generation: 5 };
    assert_eq!(actions, [Hangup { link: LINK }, Note(note), Settle { link: LINK, checkpoint: 11 }]);
    assert_eq!(host.machine.status(), StandbyStatus::Settling);
    assert_eq!(host.machine.next_deadline(), None, "there is nothing to do before the disks are ready");
    assert_eq!(host.on(settled(11)), [Note(arbitrating), Claim { generation: 5 }]);
    assert_eq!(host.claimed(ClaimResult::Won), [taken_over(11, false)]);
}

/// SIGKILL closes the socket; every millisecond of waiting would be a millisecond of outage.
#[test]
fn a_closed_link_is_decided_at_once() {
    assert_eq!(Host::protected().acts(lost()), gone_at(11));
}

#[test]
fn what_is_staged_but_not_acknowledged_is_dropped() {
    let mut host = Host::protected();
    host.acts(staged(12, PLAIN));
    host.acts(staged(13, PLAIN));
    assert_eq!(host.acts(lost()), [Hangup { link: LINK }], "12 is still being applied");
    assert_eq!(host.acts(settled(11)), [], "of an earlier loss");
    assert_eq!(host.acts(applied(12)), [Settle { link: LINK, checkpoint: 12 }]);
    assert_eq!(host.acts(settled(12)), [Claim { generation: 5 }]);
    assert_eq!(host.claimed(ClaimResult::Won), [taken_over(12, false)]);
}

/// The link is read all the while, so silence really is silence.
#[test]
fn a_slow_apply_is_no_silence_and_hides_none() {
    let mut host = Host::protected();
    host.acts(staged(12, PLAIN));
    for _ in 0..40 {
        host.now += 125;
        assert_eq!(
            host.on(Heartbeat { link: LINK, stamp: ms(80) })[0],
            SendHeartbeat { link: LINK, stamp: ms(80) }
        );
    }
    host.now += 999;
    assert_eq!(host.acts(Tick), []);
    host.now += 1;
    assert_eq!(host.acts(Tick), [Hangup { link: LINK }], "12 is still being applied");
    assert_eq!(host.acts(applied(12)), [Settle { link: LINK, checkpoint: 12 }]);
}

#[test]
fn the_loser_drops_its_copy_and_says_to_whom() {
    let mut host = Host::claiming();
    let reason = StandbyExit::Lost { generation: 5, owner: "host-a".into() };
    assert_eq!(
        reason.to_string(),
        "generation 5 of this VM belongs to host-a: the VM runs there, this copy is dropped"
    );
    assert_eq!(
        host.claimed(ClaimResult::Lost { owner: "host-a".into() }),
        [Discard { link: LINK }, Exit { reason }]
    );
}

#[test]
fn nothing_is_taken_from_the_link_while_the_arbiter_is_asked() {
    let mut host = Host::claiming();
    assert_eq!(host.acts(staged(12, PLAIN)), []);
    assert_eq!(host.acts(End { link: LINK, reason: EndReason::PowerOff }), []);
    host.claimed(ClaimResult::Unreachable { why: "mount point is gone".into() });
    host.now += 200;
    assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
    assert_eq!(host.machine.committed(), Some(11));
}

/// The primary lives; only what it sends is damaged. Its VM must not be disturbed.
#[test]
fn a_bad_stream_makes_the_standby_leave_not_take_over() {
    let bad = || BadStream { link: LINK, why: "checksum".into() };
    for mut host in [Host::attached(), Host::protected()] {
        assert_eq!(
            host.acts(bad()),
            [
                SendLeave { link: LINK, reason: LeaveReason::BadStream },
                Hangup { link: LINK },
                Discard { link: LINK }
            ]
        );
        assert_eq!(host.machine.status(), StandbyStatus::Discarding);
        assert_eq!(host.acts(lost()), []);
        host.now += 10_000;
        assert_eq!(host.acts(Tick), [], "it has promised not to claim");
    }
    // A stranger's damage concerns only the stranger.
    let stranger = BadStream { link: Link(9), why: "HTTP".into() };
    assert_eq!(Host::protected().acts(stranger), [Hangup { link: Link(9) }]);
}

#[test]
fn what_is_not_due_is_a_bad_stream() {
    for event in [staged(11, PLAIN), staged(13, PLAIN), staged(12, BASE), BasePages { link: LINK }] {
        let actions = Host::protected().acts(event.clone());
        assert!(matches!(actions[0], SendLeave { reason: LeaveReason::BadStream, .. }), "{event:?}");
    }
    let actions = Host::attached().acts(staged(12, PLAIN));
    assert!(matches!(actions[0], SendLeave { reason: LeaveReason::BadStream, .. }), "no base yet");
}

#[test]
fn an_orderly_end_is_followed_whatever_becomes_of_the_link() {
    let reason = EndReason::PowerOff;
    let exit = || Exit { reason: StandbyExit::Followed(reason) };
    let ended = || {
        let mut host = Host::protected();
        host.acts(staged(12, CheckpointFlags { base_final: false, end: Some(reason) }));
        host
    };
    let whole = || {
        let mut host = ended();
        assert_eq!(host.acts(applied(12)), []);
        host
    };
    let leave = || SendLeave { link: LINK, reason: LeaveReason::Followed };
    let told = End { link: LINK, reason };
    assert_eq!(whole().acts(told.clone()), [leave(), Hangup { link: LINK }, exit()]);
    assert_eq!(Host::attached().acts(told.clone()), [leave(), Hangup { link: LINK }, exit()]);
    assert_eq!(whole().acts(lost()), [Hangup { link: LINK }, exit()]);
    let mut silent = whole();
    silent.now += 1000;
    assert_eq!(silent.acts(Tick), [Hangup { link: LINK }, exit()]);
    for (event, mut at_once) in [
        (told, vec![leave(), Hangup { link: LINK }]),
        (lost(), vec![Hangup { link: LINK }]),
        (Stop, vec![SendLeave { link: LINK, reason: LeaveReason::Stopped }, Hangup { link: LINK }]),
    ] {
        let mut host = ended();
        let exit = if event == Stop { Exit { reason: StandbyExit::Stopped } } else { exit() };
        assert_eq!(host.acts(event.clone()), at_once, "{event:?} in the middle of the last commit");
        assert_eq!(host.acts(Stop), []);
        assert_eq!(host.acts(lost()), []);
        at_once = host.acts(applied(12));
        assert_eq!(at_once, [exit], "{event:?}");
    }
}

#[test]
fn a_stop_leaves_in_order() {
    let exit = || Exit { reason: StandbyExit::Stopped };
    let leave = || SendLeave { link: LINK, reason: LeaveReason::Released };
    assert_eq!(Host::new(None).acts(Stop), [exit()]);
    assert_eq!(Host::attached().acts(Stop), [leave(), Hangup { link: LINK }, exit()]);
    let mut host = Host::protected();
    host.acts(Stop);
    let released = Released { link: LINK, result: Ok(()) };
    assert_eq!(host.acts(released), [leave(), Hangup { link: LINK }, exit()]);
    assert_eq!(host.acts(lost()), []);
    let failed = Host::protected().acts(Failed { link: LINK, why: "memory".into() });
    assert!(matches!(failed[..], [SendLeave { .. }, Hangup { .. }, Exit { .. }]));
}

/// The other side may be in perfect health. A VM that is claimed and cannot be run runs nowhere.
#[test]
fn a_side_that_could_not_run_the_vm_does_not_ask_for_it() {
    let failed = || Failed { link: LINK, why: "input/output error".into() };
    let mut host = Host::protected();
    assert_eq!(host.acts(lost()), gone_at(11));
    let reason = StandbyExit::Failed("input/output error".into());
    assert_eq!(host.acts(failed()), [Exit { reason: reason.clone() }]);
    assert_eq!(host.acts(settled(11)), []);

    // In the middle of a commit, too.
    let mut host = Host::protected();
    host.acts(staged(12, PLAIN));
    host.acts(lost());
    assert_eq!(host.acts(failed()), [Exit { reason }]);
    assert_eq!(host.acts(applied(12)), []);
}

/// Too late to take the question back: the answer decides what must be said.
#[test]
fn a_failure_during_arbitration_waits_for_the_answer() {
    let failed = || Failed { link: LINK, why: "input/output error".into() };
    let said = |actions: Vec<StandbyAction>| match &actions[..] {
        [Exit { reason: StandbyExit::Failed(why) }] => why.clone(),
        other => panic!("{other:?}"),
    };
    let mut host = Host::claiming();
    assert_eq!(host.acts(failed()), []);
    assert!(said(host.claimed(ClaimResult::Won)).contains("runs nowhere"));
    let mut host = Host::claiming();
    host.acts(failed());
    assert!(matches!(
        host.claimed(ClaimResult::Lost { owner: "a".into() })[..],
        [Discard { link: LINK }, Exit { .. }]
    ));
    let mut host = Host::claiming();
    host.acts(failed());
    let unreachable = ClaimResult::Unreachable { why: "no route".into() };
    assert!(said(host.claimed(unreachable.clone())).contains("may have heard"));
    let mut host = Host::claiming();
    host.claimed(unreachable);
    assert_eq!(said(host.acts(failed())), "input/output error", "no question is open");
}

/// A side that has asked the arbiter may already own the VM; if it walks away, nobody has the VM.
#[test]
fn a_stop_during_arbitration_waits_for_the_answer() {
    let mut host = Host::claiming();
    assert_eq!(host.on(Stop), [Note(StandbyNote::StopWaits)]);
    assert_eq!(host.on(Stop), [Note(StandbyNote::StopWaits)], "each is told so");
    assert_eq!(host.claimed(ClaimResult::Won), [taken_over(11, true)]);
    let mut host = Host::protected();
    host.acts(lost());
    assert_eq!(host.on(Stop), [Note(StandbyNote::StopWaits)]);
    host.acts(settled(11));
    assert_eq!(host.claimed(ClaimResult::Won), [taken_over(11, true)]);
}

#[test]
fn stamps_are_returned_while_the_thread_that_takes_over_gets_on() {
    let returned = |host: &mut Host, stamp| {
        let actions = host.on(Heartbeat { link: LINK, stamp: ms(stamp) });
        actions.into_iter().find_map(|action| match action {
            SendHeartbeat { stamp, .. } => Some(stamp),
            _ => None,
        })
    };
    let mut host = Host::protected();
    host.now = 900;
    assert_eq!(returned(&mut host, 890), Some(ms(890)));
    host.now = 1200;
    assert_eq!(returned(&mut host, 1190), Some(ms(890)), "nobody here would take over");
    host.on(Tick);
    host.now = 1400;
    assert_eq!(returned(&mut host, 1390), Some(ms(1390)));
}

#[test]
fn a_link_that_fails_here_gives_the_primary_the_time_of_its_lease() {
    let mut host = Host::protected();
    host.now = 300;
    host.on(Heartbeat { link: LINK, stamp: ms(290) });
    host.now = 400;
    host.on(LinkLost { link: LINK, why: LossReason::Local("a write failed".into()) });
    assert_eq!(host.acts(settled(11)), []);
    host.now = 1299;
    assert_eq!(host.acts(Tick), []);
    host.now = 1300;
    assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
}

/// A write that the primary has let out could otherwise land after this side's own.
#[test]
fn a_primary_with_shared_storage_is_given_the_time_of_its_lease_however_the_link_ends() {
    let mut host = Host::protected_with(true);
    host.now = 300;
    host.on(Heartbeat { link: LINK, stamp: ms(290) });
    host.now = 400;
    host.on(lost());
    assert_eq!(host.acts(settled(11)), []);
    host.now = 1299;
    assert_eq!(host.acts(Tick), []);
    host.now = 1300;
    assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
}

#[test]
fn a_standby_whose_waiting_thread_stands_still_accepts_nobody() {
    let mut host = Host::new(None);
    host.now = 2500;
    let refused = host.acts(hello_of(LINK, VM, 4));
    assert!(matches!(refused[..], [Refuse { code: RefuseCode::Busy, .. }]), "{refused:?}");
    host.on(Tick);
    let accepted = host.acts(hello_of(LINK, VM, 4));
    assert!(matches!(accepted[..], [Accept { .. }]), "{accepted:?}");
}

#[test]
fn a_standby_that_is_stopped_hands_its_right_over_when_that_is_written_down() {
    let leaves = |reason| {
        [SendLeave { link: LINK, reason }, Hangup { link: LINK }, Exit { reason: StandbyExit::Stopped }]
    };
    let released = |result| Released { link: LINK, result };
    let mut host = Host::protected();
    assert_eq!(host.acts(Stop), [Release { link: LINK }]);
    assert_eq!(host.acts(staged(12, PLAIN)), [], "nothing more is acknowledged");
    assert_eq!(host.acts(released(Ok(()))), leaves(LeaveReason::Released));

    let mut failed = Host::protected();
    failed.acts(Stop);
    assert_eq!(failed.acts(released(Err("no room".into()))), leaves(LeaveReason::Stopped));

    let mut slow = Host::protected();
    slow.acts(Stop);
    slow.now = 999;
    assert_eq!(slow.acts(Heartbeat { link: LINK, stamp: ms(999) }), []);
    assert_eq!(slow.acts(Tick), []);
    // Meanwhile nothing is acknowledged, so the guest's clients wait no longer than for a silent host.
    slow.now = 1000;
    assert_eq!(slow.acts(Tick), leaves(LeaveReason::Stopped));

    let mut twice = Host::protected();
    twice.acts(Stop);
    assert_eq!(twice.acts(Stop), leaves(LeaveReason::Stopped));

    // Acknowledged checkpoints are applied first.
    let mut busy = Host::protected();
    busy.acts(staged(12, PLAIN));
    assert_eq!(busy.acts(Stop), []);
    busy.now = 900;
    busy.acts(Heartbeat { link: LINK, stamp: ms(900) });
    assert_eq!(busy.acts(applied(12)), [Release { link: LINK }]);
    busy.now = 1800;
    busy.acts(Heartbeat { link: LINK, stamp: ms(1800) });
    assert_eq!(busy.acts(Tick), [], "the apply would have made them wait anyway");
    busy.now = 1900;
    assert_eq!(busy.acts(Tick), leaves(LeaveReason::Stopped));

    // The primary dies before it was told: this is the only side that has the VM.
    let mut alone = Host::protected();
    alone.acts(Stop);
    assert_eq!(alone.acts(lost()), gone_at(11));
    assert_eq!(alone.acts(released(Ok(()))), []);
    assert_eq!(alone.acts(settled(11)), [Claim { generation: 5 }]);
    assert_eq!(alone.claimed(ClaimResult::Won), [taken_over(11, true)]);
}

/// The acknowledgement of the base says that this side would take over.
#[test]
fn a_standby_whose_thread_that_takes_over_hangs_commits_no_base() {
    for hangs in [false, true] {
        let mut host = Host::attached();
        host.acts(staged(11, BASE));
        for time in (500..=1500).step_by(500) {
            host.now = time;
            host.acts(Heartbeat { link: LINK, stamp: ms(time) });
            if !hangs {
                host.acts(Tick);
            }
        }
        let leave = SendLeave { link: LINK, reason: LeaveReason::Failed };
        let gives_up = [leave, Hangup { link: LINK }, Discard { link: LINK }];
        let actions = host.acts(tried(11));
        if hangs {
            assert_eq!(actions, gives_up);
        } else {
            assert_eq!(actions.len(), 2, "{actions:?}");
        }
    }
}
