//! The primary is lost or ends, or this standby does: who has the VM then.

use super::*;

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

#[test]
fn an_orderly_end_is_followed_whatever_becomes_of_the_link() {
    let reason = EndReason::PowerOff;
    let exit = || Exit { reason: StandbyExit::Followed(reason) };
    let ended = || {
        let mut host = Host::protected();
        host.acts(staged(12, CheckpointFlags { base_final: false, end: Some(reason), hand_over: false }));
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
    assert!(said(host.acts(failed())).contains("may have heard"), "between two questions, too");
    let mut host = Host::protected();
    host.acts(garbled());
    host.acts(settled(11));
    assert_eq!(said(host.acts(failed())), "input/output error", "nothing was asked yet");
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

/// The order was for a standby, and the other host is about to let go of a VM in good health.
#[test]
fn a_stop_does_not_end_a_vm_that_is_just_being_handed_over() {
    let handed = CheckpointFlags { hand_over: true, ..PLAIN };
    for stop_at in 0..3 {
        let mut host = Host::protected();
        assert_eq!(host.acts(staged(12, handed)), [ack(12), apply(12)]);
        host.acts(applied(12));
        for (at, event) in [lost(), settled(12)].into_iter().enumerate() {
            if at == stop_at {
                host.on(Stop);
            }
            host.acts(event);
        }
        if stop_at == 2 {
            host.on(Stop);
        }
        let actions = host.on(Claimed { generation: 5, result: ClaimResult::Won });
        assert!(actions.contains(&Note(StandbyNote::StopForgotten)), "{actions:?}");
        assert!(
            matches!(actions.last(), Some(TakeOver { checkpoint: 12, handed: true, stop: false, .. })),
            "{actions:?}"
        );
    }
}

/// The primary was heard last at 300 ms, and its lease lasts for one second from then.
fn asks_when_the_lease_is_over(mut host: Host, lost: StandbyEvent) {
    host.now = 300;
    host.on(Heartbeat { link: LINK, stamp: ms(290) });
    host.now = 400;
    host.on(lost);
    assert_eq!(host.acts(settled(11)), []);
    host.now = 1299;
    assert_eq!(host.acts(Tick), []);
    host.now = 1300;
    assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
}

#[test]
fn a_link_that_fails_here_gives_the_primary_the_time_of_its_lease() {
    let why = LossReason::Local("a write failed".into());
    asks_when_the_lease_is_over(Host::protected(), LinkLost { link: LINK, why });
}

/// Nothing more can be said over an encrypted link, and its primary may be in good health: it asks first.
#[test]
fn a_primary_whose_link_is_garbled_is_let_ahead() {
    for shared_storage in [false, true] {
        let mut host = Host::protected_with(shared_storage);
        host.now = 300;
        assert_eq!(host.acts(garbled()), gone_at(11), "no leave, and the copy is kept");
        assert_eq!(host.acts(settled(11)), []);
        host.now = 4299;
        assert_eq!(host.acts(Tick), []);
        host.now = 4300;
        assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
        assert_eq!(host.claimed(ClaimResult::Won), [taken_over(11, false)]);
    }
    assert_eq!(Host::attached().acts(garbled()), [Hangup { link: LINK }, Discard { link: LINK }]);
}

/// The primary that was let ahead is back, with the generation that it has won: nothing is left to wait for but its lease,
/// because whoever comes may lie.
#[test]
fn a_primary_that_comes_back_ends_the_wait_for_it() {
    let turned_away = |vm, generation| TurnedAway { hello: introduction(vm, generation) };
    let settles = |event, shared_storage| {
        let mut host = Host::protected_with(shared_storage);
        host.now = 300;
        host.acts(event);
        host
    };
    let waits = || {
        let mut host = settles(garbled(), false);
        assert_eq!(host.acts(settled(11)), []);
        host.now = 1100;
        host
    };
    let asks = [Claim { generation: 5 }];
    assert_eq!(waits().acts(turned_away(VM, 5)), asks);
    assert_eq!(waits().acts(turned_away(VM, 6)), asks, "it has even gone on alone twice");
    assert_eq!(waits().acts(turned_away(VM, 4)), [], "an older process of the same host");
    assert_eq!(waits().acts(turned_away(OTHER, 5)), [], "another VM");
    let mut host = settles(garbled(), false);
    host.now = 1100;
    assert_eq!(host.acts(turned_away(VM, 5)), [], "the disks are not settled");
    assert_eq!(host.acts(settled(11)), asks);

    let local = || LinkLost { link: LINK, why: LossReason::Local("a write failed".into()) };
    for (event, shared_storage) in [(garbled(), false), (garbled(), true), (local(), false), (lost(), true)] {
        let mut host = settles(event, shared_storage);
        host.acts(settled(11));
        host.now = 999;
        assert_eq!(host.acts(turned_away(VM, 5)), [], "its lease lasts");
        assert_eq!(host.acts(Tick), []);
        host.now = 1000;
        assert_eq!(host.acts(Tick), asks);
        assert_eq!(host.acts(turned_away(VM, 5)), [], "it is asked already");
        host.claimed(ClaimResult::Unreachable { why: "no route".into() });
        assert_eq!(host.acts(turned_away(VM, 5)), [], "and again after its usual rest only");
        host.now = 1000 + timing().retry.as_millis() as u64;
        assert_eq!(host.acts(Tick), asks);
        let lost = ClaimResult::Lost { owner: "host-a".into() };
        let reason = StandbyExit::Lost { generation: 5, owner: "host-a".into() };
        assert_eq!(host.claimed(lost), [Discard { link: LINK }, Exit { reason }]);
    }
}

/// A write that the primary has let out could otherwise land after this side's own.
#[test]
fn a_primary_with_shared_storage_is_given_the_time_of_its_lease_however_the_link_ends() {
    asks_when_the_lease_is_over(Host::protected_with(true), lost());
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

/// Frames of the tail: input that no checkpoint has, and output that may not have left.
#[test]
fn a_takeover_gives_uncommitted_input_and_repeats_committed_output_only() {
    let through = |through| OutputReleased { link: LINK, through };
    let mut host = Host::protected();
    host.acts(staged(12, PLAIN));
    host.acts(applied(12));
    host.acts(staged(13, PLAIN));
    assert_eq!(host.acts(through(10)), []);
    host.acts(through(11));
    host.acts(through(9));
    host.acts(OutputReleased { link: Link(99), through: 12 });
    host.acts(staged(14, PLAIN));
    host.acts(lost());
    host.acts(through(13));
    host.acts(applied(13));
    host.acts(settled(13));
    let actions = host.claimed(ClaimResult::Won);
    let [TakeOver { checkpoint: 13, tail, .. }] = actions[..] else { panic!("{actions:?}") };
    assert_eq!(tail, TailUse::at(13, 11));
    let epochs = |uses: &dyn Fn(u64) -> bool| (0..20).filter(|&epoch| uses(epoch)).collect::<Vec<_>>();
    assert_eq!(epochs(&|epoch| tail.repeats(epoch)), [12, 13]);
    assert_eq!(epochs(&|epoch| tail.gives(epoch)), [14, 15, 16, 17, 18, 19]);
}

/// Whatever a primary claims about its output, nothing uncommitted is repeated.
#[test]
fn a_primary_that_says_nonsense_of_its_output_costs_only_the_repetition() {
    let mut host = Host::protected();
    host.acts(OutputReleased { link: LINK, through: u64::MAX });
    host.acts(lost());
    host.acts(settled(11));
    let actions = host.claimed(ClaimResult::Won);
    let [TakeOver { tail, .. }] = actions[..] else { panic!("{actions:?}") };
    assert!((0..20).all(|epoch| !tail.repeats(epoch)) && tail.gives(12) && !tail.gives(11));
}
