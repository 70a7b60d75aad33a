//! A copy that is worthless while its primary lives: its right is handed over. If that was not heard, a copy that is whole
//! counts again, and any other one never runs.

use super::*;

type Trouble = fn() -> StandbyEvent;

/// Each kind, with how the standby leaves without its right and with it, and what it does then.
fn kinds() -> [(Trouble, LeaveReason, LeaveReason, StandbyAction); 3] {
    let discard = || Discard { link: LINK };
    [
        (
            || BadStream { link: LINK, why: "checksum".into() },
            LeaveReason::BadStream,
            LeaveReason::BadStreamReleased,
            discard(),
        ),
        (
            || Differs { link: LINK, why: "page 7 differs".into() },
            LeaveReason::Differs,
            LeaveReason::DiffersReleased,
            discard(),
        ),
        (
            || Failed { link: LINK, why: "input/output error".into() },
            LeaveReason::Failed,
            LeaveReason::FailedReleased,
            Exit { reason: StandbyExit::Failed("input/output error".into()) },
        ),
    ]
}

/// Those whose copy has failed, or is not the VM.
fn never_runs() -> impl Iterator<Item = (Trouble, LeaveReason, LeaveReason, StandbyAction)> {
    kinds().into_iter().skip(1)
}

/// Those whose copy is whole.
const WHOLE: [Trouble; 2] =
    [|| BadStream { link: LINK, why: "checksum".into() }, || Dismissed { link: LINK }];

fn released(result: Result<(), String>) -> StandbyEvent {
    Released { link: LINK, result }
}

fn leaves(reason: LeaveReason, then: StandbyAction) -> [StandbyAction; 3] {
    [SendLeave { link: LINK, reason }, Hangup { link: LINK }, then]
}

#[test]
fn the_right_goes_with_the_leave_once_it_is_written_down() {
    for (trouble, _, with, then) in kinds() {
        let mut host = Host::protected();
        assert_eq!(host.acts(trouble()), [Release { link: LINK }]);
        assert_eq!(host.acts(released(Ok(()))), leaves(with, then));
    }
    for (trouble, without, _, then) in never_runs() {
        let mut host = Host::protected();
        host.acts(trouble());
        let why = "no room".to_owned();
        let told = host.on(released(Err(why.clone())));
        assert!(told.contains(&Note(StandbyNote::NotReleased { why })), "{told:?}");
        for action in leaves(without, then) {
            assert!(told.contains(&action), "{told:?} lacks {action:?}");
        }
    }
}

/// The guest's output is held all the while, so a disk that does not answer is not waited for.
#[test]
fn what_cannot_be_written_down_in_time_is_left_to_the_arbiter() {
    for (trouble, without, _, then) in never_runs() {
        let mut host = Host::protected();
        host.acts(trouble());
        let until = host.machine.next_deadline().expect("a deadline");
        assert_eq!(until, ms(host.now + 1000), "the silence that counts as death");
        host.now = until.as_millis() as u64 - 1;
        assert_eq!(host.acts(Tick), []);
        host.now += 1;
        assert_eq!(host.acts(Tick), leaves(without, then));
        assert_eq!(host.acts(released(Ok(()))), [], "too late");
    }
}

/// Nobody has heard that it is given up, whichever way that came.
#[test]
fn a_whole_copy_counts_again_if_its_primary_is_gone() {
    let ends: [fn(&mut Host) -> StandbyEvent; 3] = [
        |_| lost(),
        |_| released(Err("no room".into())),
        |host| {
            host.now += 1000;
            Tick
        },
    ];
    for (trouble, end) in WHOLE.into_iter().flat_map(|trouble| ends.map(|end| (trouble, end))) {
        let mut host = Host::protected();
        assert_eq!(host.acts(trouble()), [Release { link: LINK }]);
        let end = end(&mut host);
        assert_eq!(host.acts(end.clone()), [Hangup { link: LINK }, Settle { link: LINK, checkpoint: 11 }]);
        assert_eq!(host.acts(released(Ok(()))), [], "too late");
        assert_eq!(host.acts(Settled { link: LINK, checkpoint: 11 }), [], "the primary is let ahead");
        host.now += 3999;
        assert_eq!(host.acts(Tick), [], "{end:?}");
        host.now += 1;
        assert_eq!(host.acts(Tick), [Claim { generation: 5 }], "{end:?}");
    }
}

/// What its primary has let out meanwhile is not repeated.
#[test]
fn a_whole_copy_that_counts_again_knows_what_has_left() {
    let mut host = Host::protected();
    host.acts(Dismissed { link: LINK });
    host.acts(OutputReleased { link: LINK, through: 11 });
    host.acts(lost());
    host.acts(Settled { link: LINK, checkpoint: 11 });
    host.now += 4000;
    host.acts(Tick);
    let takes = host.acts(Claimed { generation: 5, result: ClaimResult::Won });
    let [TakeOver { tail, .. }] = &takes[..] else { panic!("{takes:?}") };
    assert_eq!(*tail, TailUse::at(11, 11));
}

/// What was acknowledged is applied first, and a stop is not forgotten.
#[test]
fn a_whole_copy_counts_again_once_it_is_applied() {
    let mut host = Host::protected();
    host.acts(staged(12, PLAIN));
    host.acts(Dismissed { link: LINK });
    host.acts(Stop);
    let told = host.on(lost());
    assert!(told.contains(&Note(StandbyNote::StopWaits)), "{told:?}");
    assert_eq!(host.acts(applied(12)), [Settle { link: LINK, checkpoint: 12 }]);
}

/// What befalls it meanwhile is not forgotten.
#[test]
fn a_whole_copy_that_fails_while_it_is_given_up_never_runs() {
    for whole in WHOLE {
        for (trouble, without, with, then) in never_runs() {
            let mut host = Host::protected();
            host.acts(whole());
            assert_eq!(host.acts(trouble()), []);
            assert_eq!(host.acts(lost()), leaves(without, then.clone()));
            let mut busy = Host::protected();
            busy.acts(staged(12, PLAIN));
            assert_eq!(busy.acts(whole()), []);
            assert_eq!(busy.acts(trouble()), [Release { link: LINK }]);
            assert_eq!(busy.acts(lost()), leaves(without, then.clone()));
            // Nothing waits for a checkpoint that will never be applied.
            let stopped = Exit { reason: StandbyExit::Stopped };
            let then = if matches!(then, Discard { .. }) { stopped } else { then };
            for first in [&whole, &trouble] {
                let mut stopping = Host::protected();
                stopping.acts(staged(12, PLAIN));
                stopping.acts(first());
                stopping.acts(trouble());
                stopping.acts(Stop);
                assert_eq!(stopping.acts(released(Ok(()))), leaves(with, then.clone()));
            }
        }
    }
}

#[test]
fn nothing_that_comes_counts_any_more() {
    for (trouble, ..) in kinds() {
        let mut host = Host::protected();
        host.acts(trouble());
        for event in [
            staged(12, PLAIN),
            BasePages { link: LINK },
            Heartbeat { link: LINK, stamp: ms(90) },
            BadStream { link: LINK, why: "more of it".into() },
            Failed { link: LINK, why: "more of it".into() },
            Differs { link: LINK, why: "more of it".into() },
        ] {
            assert_eq!(host.acts(event.clone()), [], "{event:?}");
        }
        assert_eq!(host.machine.committed(), None);
        assert_eq!(host.machine.status(), StandbyStatus::Discarding);
    }
}

/// It was worthless before, so it does not become the VM because the primary dies.
#[test]
fn a_copy_that_has_failed_or_differs_is_not_taken_over() {
    for (trouble, without, _, then) in never_runs() {
        let mut host = Host::protected();
        host.acts(trouble());
        host.now += 7;
        let told = host.on(lost());
        let silent = ms(7);
        let note = Note(StandbyNote::LinkLost { why: LossReason::Closed, silent, committed: false });
        assert!(told.contains(&note), "{told:?}");
        for action in leaves(without, then) {
            assert!(told.contains(&action), "{told:?} lacks {action:?}");
        }
        host.now += 10_000;
        assert_eq!(host.acts(Tick), []);
    }
}

/// Its writes are still on their way to the disks.
#[test]
fn a_checkpoint_that_is_being_applied_comes_first() {
    let mut host = Host::protected();
    host.acts(staged(12, PLAIN));
    assert_eq!(host.acts(BadStream { link: LINK, why: "checksum".into() }), []);
    assert_eq!(host.acts(applied(11)), [], "of an earlier one");
    assert_eq!(host.acts(applied(12)), [Release { link: LINK }]);
    assert_eq!(host.acts(applied(12)), []);
    // What failed or differs while it was applied is not reported as applied.
    for (trouble, ..) in kinds().into_iter().skip(1) {
        let mut host = Host::protected();
        host.acts(staged(12, PLAIN));
        assert_eq!(host.acts(trouble()), [Release { link: LINK }]);
    }
}

#[test]
fn a_stop_ends_the_process_afterwards_and_a_second_one_at_once() {
    let stopped = || Exit { reason: StandbyExit::Stopped };
    let bad = || BadStream { link: LINK, why: "checksum".into() };
    let mut host = Host::protected();
    host.acts(bad());
    assert_eq!(host.acts(Stop), []);
    assert_eq!(host.acts(released(Ok(()))), leaves(LeaveReason::BadStreamReleased, stopped()));
    let mut hurry = Host::protected();
    hurry.acts(bad());
    hurry.acts(Stop);
    assert_eq!(hurry.acts(Stop), leaves(LeaveReason::BadStream, stopped()));
}

/// The primary waits for nobody: the VM has ended with what was acknowledged.
#[test]
fn a_vm_that_has_ended_leaves_no_right() {
    let last = CheckpointFlags { base_final: false, end: Some(EndReason::PowerOff), hand_over: false };
    for (trouble, without, _, then) in kinds() {
        let mut host = Host::protected();
        host.acts(staged(12, last));
        host.acts(applied(12));
        assert_eq!(host.acts(trouble()), leaves(without, then));
    }
}

#[test]
fn a_standby_that_is_dismissed_hands_its_right_over_and_listens_again() {
    let dismissed = || Dismissed { link: LINK };
    let discard = || Discard { link: LINK };
    let mut host = Host::protected();
    assert_eq!(host.acts(Dismissed { link: Link(9) }), [], "of an earlier link");
    assert_eq!(host.acts(dismissed()), [Release { link: LINK }]);
    assert_eq!(host.acts(released(Ok(()))), leaves(LeaveReason::Dismissed, discard()));
    assert_eq!(Host::attached().acts(dismissed()), leaves(LeaveReason::Failed, discard()), "it has no right");
    let mut busy = Host::protected();
    busy.acts(staged(12, PLAIN));
    assert_eq!(busy.acts(dismissed()), []);
    assert_eq!(busy.acts(applied(12)), [Release { link: LINK }]);
    // A stop that is under way is not forgotten.
    let mut stopping = Host::protected();
    stopping.acts(Stop);
    stopping.acts(dismissed());
    let stopped = Exit { reason: StandbyExit::Stopped };
    assert_eq!(stopping.acts(released(Ok(()))), leaves(LeaveReason::Dismissed, stopped));
}
