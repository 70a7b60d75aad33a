//! Something of the primary's own fails while its standby is well: the standby is told, and hands its right over.

use super::*;

fn trouble() -> PrimaryEvent {
    LinkLost { link: LINK, why: LossReason::Local("ring full".into()) }
}

fn dismissing() -> Host {
    let mut host = Host::protected();
    assert_eq!(host.acts(EPOCH), ships(12));
    assert_eq!(host.acts(trouble()), [Dismiss { link: LINK }]);
    host
}

fn leaves(reason: LeaveReason) -> PrimaryEvent {
    Leave { link: LINK, reason }
}

#[test]
fn the_vm_goes_on_in_its_generation_and_nobody_is_asked() {
    let mut host = dismissing();
    assert_eq!(host.machine.output(), OutputMode::Hold);
    assert!(host.machine.guest_may_run());
    let next = Dial { link: Link(1), address: 0 };
    let told = host.on(leaves(LeaveReason::Dismissed));
    let lost = PrimaryNote::LinkLost { why: LossReason::Local("ring full".into()), held: false };
    assert_eq!(told, [Hangup { link: LINK }, Note(lost), ReleaseAll { generation: 4 }, next]);
    assert_eq!((host.machine.generation(), host.machine.output()), (4, OutputMode::PassThrough));
}

/// Its pages are part of no checkpoint of that standby.
#[test]
fn nothing_is_captured_meanwhile() {
    let mut host = dismissing();
    assert_eq!(host.machine.wanted_capture(), Wanted::Nothing);
    assert_eq!(host.acts(EPOCH), [DropCapture], "one that was under way");
    assert_eq!(host.acts(ack(12, 1)), [Release { through: 12 }], "it was said before");
    assert_eq!(host.machine.wanted_capture(), Wanted::Nothing);
    assert_ne!(host.machine.status(), PrimaryStatus::Protected);
}

#[test]
fn a_standby_that_does_not_hand_its_right_over_must_be_won_against() {
    let asks = [Hangup { link: LINK }, Claim { generation: 5 }];
    for event in [lost(), leaves(LeaveReason::Failed), trouble()] {
        assert_eq!(dismissing().acts(event.clone()), asks, "{event:?}");
    }
    let mut silent = dismissing();
    silent.now += 699;
    assert_eq!(silent.acts(Tick), []);
    silent.now += 2;
    assert_eq!(silent.acts(Tick), asks);
    // Its word comes late.
    assert_eq!(silent.acts(leaves(LeaveReason::Dismissed)), [ReleaseAll { generation: 4 }]);
}

/// It may have acknowledged the base already.
#[test]
fn a_base_that_is_not_acknowledged_yet_is_dismissed_too() {
    let mut host = Host::attached();
    host.acts(BASE);
    assert_eq!(host.acts(trouble()), [Dismiss { link: LINK }]);
    assert_eq!(host.acts(leaves(LeaveReason::Failed)), [Hangup { link: LINK }, ReleaseAll { generation: 4 }]);
    let mut acked = Host::attached();
    acked.acts(BASE);
    acked.acts(trouble());
    assert_eq!(acked.acts(ack(11, 0)), [Release { through: 11 }]);
    assert_eq!(
        acked.acts(leaves(LeaveReason::Dismissed))[..2],
        [Hangup { link: LINK }, ReleaseAll { generation: 4 }]
    );
}

/// The standby may be on its way to run the VM.
#[test]
fn a_vm_that_is_handed_over_dismisses_nobody() {
    let mut host = Host::protected();
    host.acts(PrimaryEvent::HandOver);
    assert_eq!(host.acts(trouble())[0], Hangup { link: LINK });
}

#[test]
fn a_vm_that_ends_meanwhile_ends_when_it_has_no_rival() {
    let mut host = dismissing();
    assert_eq!(host.acts(End { reason: EndReason::PowerOff }), []);
    let acts = host.acts(leaves(LeaveReason::Dismissed));
    assert_eq!(acts.last(), Some(&Exit { reason: ExitReason::Ended(EndReason::PowerOff) }));
}

#[test]
fn what_breaks_meanwhile_sends_the_vm_to_nobody() {
    let mut host = dismissing();
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why: outlive_pair::Kept::Undecided }]);
    assert_eq!(host.acts(Broken { what: outlive_pair::Broken::Disk, again: false }), []);
}

/// What was written to a disk that both hosts use cannot be recalled: the guest goes on here.
#[test]
fn a_vm_whose_writes_hang_is_not_let_go() {
    let mut host = Host::protected();
    host.acts(PrimaryEvent::HandOver);
    assert_eq!(host.acts(PrimaryEvent::OutputStays), [], "the guest runs");
    host.acts(Captured { link: LINK, base: false, stays: true });
    host.acts(ack(12, host.now));
    assert!(!host.machine.guest_may_run());
    let keep = PrimaryAction::Keep { why: Kept::SharedDiskHangs };
    assert_eq!(host.acts(PrimaryEvent::OutputStays), [keep, Dismiss { link: LINK }]);
    assert_eq!(host.acts(PrimaryEvent::OutputLeft), [], "too late");
    assert!(!host.machine.guest_may_run(), "the standby may still go on with it");
    host.acts(leaves(LeaveReason::Dismissed));
    assert!(host.machine.guest_may_run());
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
}
