//! What is acknowledged, applied and answered, and what is a bad stream.

use super::*;

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
    // The oldest is being applied; the copy is given up after it.
    assert_eq!(host.acts(staged(15, PLAIN)), []);
    assert_eq!(host.acts(applied(12)), [Release { link: LINK }]);
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

#[test]
fn the_newest_stamp_goes_back() {
    let mut host = Host::protected();
    host.on(Heartbeat { link: LINK, stamp: ms(90) });
    host.on(Heartbeat { link: LINK, stamp: ms(80) });
    host.now += 125;
    assert_eq!(host.on(Tick), [SendHeartbeat { link: LINK, stamp: ms(90) }]);
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now + 125)));
}

/// The primary lives; only what it sends is damaged. Its VM must not be disturbed.
#[test]
fn a_bad_stream_makes_the_standby_leave_not_take_over() {
    let bad = || BadStream { link: LINK, why: "checksum".into() };
    let leaves = |reason| [SendLeave { link: LINK, reason }, Hangup { link: LINK }, Discard { link: LINK }];
    let mut base = Host::attached();
    assert_eq!(base.acts(bad()), leaves(LeaveReason::BadStream), "there is no right to hand over");
    let mut copy = Host::protected();
    assert_eq!(copy.acts(bad()), [Release { link: LINK }]);
    assert_eq!(copy.acts(Released { link: LINK, result: Ok(()) }), leaves(LeaveReason::BadStreamReleased));
    for mut host in [base, copy] {
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
        assert_eq!(actions, [Release { link: LINK }], "{event:?}");
    }
    let actions = Host::attached().acts(staged(12, PLAIN));
    assert!(matches!(actions[0], SendLeave { reason: LeaveReason::BadStream, .. }), "no base yet");
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
