//! What a standby says, to its primary and to whoever looks, when something is not as it should be.

use super::*;

#[test]
fn a_copy_that_differs_is_given_up_and_its_primary_is_told() {
    let why = || "page 7 differs".to_owned();
    let told = |reason| {
        [
            SendLeave { link: LINK, reason },
            Hangup { link: LINK },
            Note(StandbyNote::Differs { why: why() }),
            Discard { link: LINK },
        ]
    };
    assert_eq!(Host::attached().on(Differs { link: LINK, why: why() }), told(LeaveReason::Differs));
    let mut copy = Host::protected();
    assert_eq!(copy.on(Differs { link: LINK, why: why() }), [Release { link: LINK }]);
    let released = Released { link: LINK, result: Ok(()) };
    assert_eq!(copy.on(released), told(LeaveReason::DiffersReleased));
    for host in [Host::attached, Host::protected] {
        let mut other = host();
        let before = other.machine.status();
        assert_eq!(other.on(Differs { link: Link(99), why: why() }), [], "of an earlier link");
        assert_eq!(other.machine.status(), before);
    }
}

#[test]
fn the_silence_counts_from_what_was_heard_last() {
    let mut host = Host::protected();
    host.now += 300;
    host.on(Heartbeat { link: LINK, stamp: ms(80) });
    host.now += 1000;
    let why = LossReason::Silent(ms(1000));
    let note = StandbyNote::LinkLost { why, silent: ms(1000), committed: true };
    assert!(host.on(Tick).contains(&Note(note)));
}

#[test]
fn a_right_that_could_not_be_written_down_is_told_of_and_so_is_a_win() {
    let mut host = Host::protected();
    host.acts(Stop);
    let why = "no room".to_owned();
    let told = host.on(Released { link: LINK, result: Err(why.clone()) });
    assert!(told.contains(&Note(StandbyNote::NotReleased { why })), "{told:?}");
    let won = Host::claiming().on(Claimed { generation: 5, result: ClaimResult::Won });
    assert!(won.contains(&Note(StandbyNote::Won { generation: 5 })), "{won:?}");
}

/// The applier's answer for another checkpoint, or of another link, ends nothing.
#[test]
fn a_standby_that_leaves_waits_for_its_own_last_checkpoint() {
    let last = CheckpointFlags { base_final: false, end: Some(EndReason::PowerOff), hand_over: false };
    let mut host = Host::protected();
    host.acts(staged(12, last));
    host.acts(End { link: LINK, reason: EndReason::PowerOff });
    assert_eq!(host.acts(applied(11)), []);
    assert_eq!(host.acts(Applied { link: Link(99), checkpoint: 12 }), []);
    assert_eq!(host.acts(applied(12)), [Exit { reason: StandbyExit::Followed(EndReason::PowerOff) }]);
}
