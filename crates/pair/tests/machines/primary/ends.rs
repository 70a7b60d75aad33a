//! The VM ends, or its operator wants it to.

use super::*;

#[test]
fn the_end_of_the_vm_is_committed_before_it_is_carried_out() {
    for reason in [EndReason::PowerOff, EndReason::Reset, EndReason::Stopped, EndReason::Crash] {
        let mut host = Host::protected();
        host.acts(EPOCH);
        assert_eq!(host.acts(End { reason }), []);
        assert_eq!(host.machine.wanted_capture(), Wanted::Last(reason));
        let flags = CheckpointFlags { base_final: false, end: Some(reason), hand_over: false };
        let last = Ship(ticket(13, flags));
        assert_eq!(host.acts(EPOCH), [BeginEpoch { link: LINK, epoch: 14 }, last]);
        assert_eq!(host.machine.wanted_capture(), Wanted::Nothing);
        assert_eq!(host.acts(ack(12, 1)), [Release { through: 12 }]);
        let exit = Exit { reason: ExitReason::Ended(reason) };
        assert_eq!(
            host.acts(ack(13, 1)),
            [Release { through: 13 }, SendEnd { link: LINK, reason }, Hangup { link: LINK }, exit]
        );
        assert_eq!(host.acts(Tick), []);
    }
}

#[test]
fn without_protection_the_vm_ends_at_once() {
    let reason = EndReason::PowerOff;
    let exit = || Exit { reason: ExitReason::Ended(reason) };
    assert_eq!(Host::new(0).acts(End { reason }), [exit()]);
    let mut dialling = Host::new(1);
    dialling.acts(Tick);
    assert_eq!(dialling.acts(End { reason }), [Hangup { link: LINK }, exit()]);
    assert_eq!(
        Host::attached().acts(End { reason }),
        [SendEnd { link: LINK, reason }, Hangup { link: LINK }, exit()]
    );
}

#[test]
fn an_operator_asks_the_guest_first() {
    let mut host = Host::protected();
    assert_eq!(host.acts(Stop { ask_guest: true }), [AskGuest]);
    assert_eq!(host.machine.wanted_capture(), Wanted::Epoch);
    assert!(host.machine.guest_may_run());
    assert_eq!(host.acts(Stop { ask_guest: true }), [StopGuest], "asked once");
    assert_eq!(host.machine.wanted_capture(), Wanted::Last(EndReason::Stopped));
    assert!(!host.machine.guest_may_run());
    assert_eq!(host.acts(Stop { ask_guest: true }), []);
    assert_eq!(host.acts(End { reason: EndReason::PowerOff }), [], "the first reason counts");
    assert_eq!(host.machine.wanted_capture(), Wanted::Last(EndReason::Stopped));

    let exit = Exit { reason: ExitReason::Ended(EndReason::Stopped) };
    assert_eq!(Host::new(0).acts(Stop { ask_guest: false }), [StopGuest, exit]);
}

#[test]
fn an_end_whose_link_is_lost_waits_for_the_arbiter() {
    let reason = EndReason::PowerOff;
    let ending = || {
        let mut host = Host::protected();
        host.acts(End { reason });
        host.acts(EPOCH);
        assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Claim { generation: 5 }]);
        host
    };
    let exit = Exit { reason: ExitReason::Ended(reason) };
    assert_eq!(ending().claimed(ClaimResult::Won), [ReleaseAll { generation: 5 }, exit]);
    let fenced = ending().claimed(ClaimResult::Lost { owner: "b".into() });
    assert!(matches!(fenced[..], [Fence { .. }, StopGuest, Exit { .. }]));
}
