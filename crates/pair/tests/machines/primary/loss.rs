//! The standby is lost or leaves, and the arbiter is asked, or need not be.

use super::*;

#[test]
fn a_standby_lost_before_the_base_is_captured_costs_nothing() {
    for event in [lost(), Leave { link: LINK, reason: LeaveReason::Stopped }] {
        let mut host = Host::attached();
        assert_eq!(host.acts(event), [Hangup { link: LINK }]);
        assert_eq!((host.machine.status(), host.machine.generation()), (PrimaryStatus::Alone, 4));
        assert_eq!(host.acts(BASE), [DropCapture], "one that was under way");
        host.now += 200;
        assert_eq!(host.acts(Tick), [Dial { link: Link(1), address: 0 }]);
    }
}

#[test]
fn a_standby_lost_after_it_must_be_won_against() {
    for event in [lost(), Leave { link: LINK, reason: LeaveReason::BadStream }] {
        let mut host = Host::protected();
        assert_eq!(host.acts(event), [Hangup { link: LINK }, Claim { generation: 5 }]);
        assert_eq!(host.machine.output(), OutputMode::Hold);
        let next = Dial { link: Link(1), address: 0 };
        assert_eq!(
            host.claimed(ClaimResult::Won),
            [ReleaseAll { generation: 5 }, next],
            "and a new standby is looked for at once"
        );
        assert_eq!((host.machine.output(), host.machine.generation()), (OutputMode::PassThrough, 5));
    }
}

/// An operator has started a copy of the image on another host: that host has won the next generation.
#[test]
fn a_vm_that_was_started_elsewhere_stops_here() {
    let superseded = |generation| Superseded { generation, owner: "primary on c".into() };
    let fenced = |generation| {
        let owner = "primary on c".to_owned();
        let reason = ExitReason::Fenced { generation, owner: owner.clone() };
        [Fence { generation, owner }, StopGuest, Exit { reason }]
    };
    let mut alone = Host::new(0);
    alone.acts(Tick);
    assert_eq!(alone.acts(superseded(4)), [], "its own generation");
    assert_eq!(alone.acts(superseded(5)), fenced(5));
    assert_eq!(alone.acts(superseded(6)), [], "it is over");
    for mut host in [Host::attached(), Host::protected()] {
        let acts = host.acts(superseded(5));
        assert_eq!(acts[0], Hangup { link: LINK }, "its standby cannot win this generation either");
        assert_eq!(acts[1..], fenced(5));
        assert_eq!(host.machine.output(), OutputMode::Discard);
    }
    // Before it asks itself, another one's win is all that there is to know.
    let mut host = Host::protected_at(100_000);
    host.hand_over();
    assert_eq!(host.acts(superseded(4)), [], "its own generation");
    assert_eq!(host.acts(superseded(5)), fenced(5));
    // Its own claim is under way: that one's answer decides.
    let mut host = Host::protected();
    host.acts(lost());
    assert_eq!(host.acts(superseded(5)), []);
    assert_eq!(host.win()[0], ReleaseAll { generation: 5 });
}

/// It had nothing whole, and says so itself. One that only is lost may have acknowledged the base.
#[test]
fn a_standby_that_leaves_before_it_has_the_base_costs_no_generation() {
    for reason in [LeaveReason::BadStream, LeaveReason::Failed, LeaveReason::Stopped] {
        let mut host = Host::attached();
        host.acts(BASE);
        assert_eq!(host.machine.output(), OutputMode::Hold);
        let leave = Leave { link: LINK, reason };
        assert_eq!(host.acts(leave), [Hangup { link: LINK }, ReleaseAll { generation: 4 }], "{reason:?}");
        assert_eq!((host.machine.status(), host.machine.generation()), (PrimaryStatus::Alone, 4));
        assert_eq!(host.machine.output(), OutputMode::PassThrough);
        // It fails again and again, and is asked more and more seldom.
        let mut pauses = Vec::new();
        for round in 1..9 {
            let (link, before) = (Link(round), host.now);
            while !host.acts(Tick).contains(&Dial { link, address: 0 }) {
                host.now += 50;
                assert!(host.now < before + 60_000);
            }
            pauses.push(host.now - before);
            host.acts(Connected { link });
            host.acts(Accepted { link, dead_after: ms(500) });
            host.acts(Captured { link, base: true, stays: false });
            let leave = Leave { link, reason };
            assert_eq!(host.acts(leave), [Hangup { link }, ReleaseAll { generation: 4 }]);
        }
        assert!(pauses.is_sorted() && pauses[7] >= 10 * pauses[0], "{pauses:?}");
    }
    let mut host = Host::attached();
    host.acts(BASE);
    assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Claim { generation: 5 }]);
}

#[test]
fn an_arbiter_out_of_reach_is_asked_again_and_reported_once() {
    let mut host = Host::protected();
    host.acts(lost());
    let why = || "no route".to_owned();
    for round in 0..20 {
        let actions = host.on(Claimed { generation: 5, result: ClaimResult::Unreachable { why: why() } });
        let note = Note(PrimaryNote::ArbiterUnreachable { why: why(), held: true });
        assert_eq!(actions.contains(&note), round == 0);
        assert_eq!(host.acts(Tick), []);
        assert_eq!(host.machine.next_deadline(), Some(ms(host.now + 200)));
        host.now += 200;
        assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
        assert_eq!(host.machine.output(), OutputMode::Hold);
    }
    assert_eq!(host.claimed(ClaimResult::Won)[0], ReleaseAll { generation: 5 });
}

#[test]
fn an_arbiter_that_does_not_answer_is_reported() {
    let mut host = Host::protected();
    host.acts(lost());
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now + 1000)));
    host.now += 1000;
    let note = Note(PrimaryNote::ArbiterUnreachable { why: "no answer for 1 s".into(), held: true });
    assert_eq!(host.on(Tick), [note], "and not asked a second time");
    assert_eq!(host.machine.next_deadline(), None);
    assert_eq!(host.claimed(ClaimResult::Won)[0], ReleaseAll { generation: 5 });
}

#[test]
fn answers_to_other_questions_are_ignored() {
    let mut host = Host::protected();
    assert_eq!(host.claimed(ClaimResult::Won), []);
    host.acts(lost());
    assert_eq!(host.acts(Claimed { generation: 4, result: ClaimResult::Won }), []);
    assert_eq!(host.machine.status(), PrimaryStatus::Arbitrating);
}

#[test]
fn events_of_an_old_link_are_ignored() {
    let mut host = Host::attached();
    host.acts(lost());
    host.now += 200;
    host.acts(Tick);
    host.acts(Connected { link: Link(1) });
    host.acts(Accepted { link: Link(1), dead_after: ms(0) });
    for event in [lost(), ack(11, 0), Leave { link: LINK, reason: LeaveReason::Failed }] {
        assert_eq!(host.acts(event), []);
    }
    assert_eq!(host.machine.status(), PrimaryStatus::BaseSync);
    assert_eq!(host.acts(Connected { link: LINK }), [Hangup { link: LINK }], "a dial that came too late");
}

#[test]
fn only_the_thread_that_waits_asks_the_arbiter() {
    let mut host = Host::protected();
    let (mut lost, mut tick) = (Vec::new(), Vec::new());
    let event = LinkLost { link: LINK, why: LossReason::Closed };
    host.machine.handle(ms(host.now), event, &mut lost);
    assert!(!lost.iter().any(|action| matches!(action, Claim { .. })), "{lost:?}");
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now)), "it is woken");
    host.machine.handle(ms(host.now), Tick, &mut tick);
    assert_eq!(tick, [Claim { generation: 5 }]);
}

#[test]
fn a_standby_that_hands_its_right_over_leaves_nothing_to_ask() {
    let mut host = Host::protected();
    let leave = |reason| Leave { link: LINK, reason };
    let actions = host.acts(leave(LeaveReason::Released));
    assert_eq!(actions[..2], [Hangup { link: LINK }, ReleaseAll { generation: 4 }]);
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
    let mut host = Host::protected();
    assert_eq!(host.acts(leave(LeaveReason::Stopped)), [Hangup { link: LINK }, Claim { generation: 5 }]);
}

/// SIGSTOP before the leave, SIGCONT when the silence is over: the clock comes first, and the leave behind it.
#[test]
fn a_right_that_is_handed_over_counts_after_a_long_stop() {
    let mut host = Host::protected();
    host.now += 700;
    let mut out = Vec::new();
    host.machine.handle(ms(host.now), released(), &mut out);
    out.retain(|action| !matches!(action, Note(_)));
    assert_eq!(out[..2], [Hangup { link: LINK }, ReleaseAll { generation: 4 }]);
    assert!(!out.iter().any(|action| matches!(action, Claim { .. })), "{out:?}");
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
}

/// The next generation may be won unheard: the guest goes on, and the next standby waits for the answer.
#[test]
fn a_right_that_is_handed_over_ends_the_wait_for_the_arbiter() {
    let unreachable = || ClaimResult::Unreachable { why: "no route".into() };
    for asked_again in [false, true] {
        let mut host = Host::protected();
        assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Claim { generation: 5 }]);
        if asked_again {
            assert_eq!(host.claimed(unreachable()), []);
        }
        let other = Leave { link: Link(7), reason: LeaveReason::Released };
        assert_eq!(host.acts(other), [], "of another link");
        assert_eq!(host.acts(released()), [ReleaseAll { generation: 4 }]);
        assert_eq!((host.machine.output(), host.machine.generation()), (OutputMode::PassThrough, 4));
        assert!(host.machine.may_release(ms(host.now)));
        if !asked_again {
            assert_eq!(host.claimed(unreachable()), []);
        }
        host.now += 1000;
        assert_eq!(host.acts(Tick), [Claim { generation: 5 }], "and nobody is dialled");
        let won = host.claimed(ClaimResult::Won);
        assert_eq!(won, [ReleaseAll { generation: 5 }, Dial { link: Link(1), address: 0 }]);
    }
    let mut host = Host::protected();
    host.acts(lost());
    host.acts(released());
    let ended = ExitReason::Ended(EndReason::PowerOff);
    assert_eq!(host.acts(End { reason: EndReason::PowerOff }), [Exit { reason: ended }]);
}
