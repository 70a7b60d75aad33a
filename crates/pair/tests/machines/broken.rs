//! Something is broken at the primary's host: who keeps the VM.

use std::time::Duration;

use outlive_epoch::LeaveReason;
use outlive_pair::PrimaryAction::{
    self, Claim, Endure, Exit, Fence, GiveAway, HandOver, Hangup, Keep, ReleaseAll, Ship, StopGuest,
};
use outlive_pair::PrimaryEvent::{
    Broken as Breaks, Captured, Claimed, Leave, LinkLost, Mended, StandbyReaches, Tick,
};
use outlive_pair::{
    Broken, ClaimResult, ExitReason, Kept, Link, LossReason, OutputMode, PrimaryEvent, PrimaryStatus, Wanted,
};

use super::primary::{Host, LINK};

const DISK: PrimaryEvent = Breaks { what: Broken::Disk, again: false };
const NETWORK: PrimaryEvent = Breaks { what: Broken::Network, again: false };

const GIVEN: [PrimaryAction; 2] = [GiveAway { what: Broken::Disk }, Hangup { link: LINK }];

fn reaches(reaches: bool) -> PrimaryEvent {
    StandbyReaches { link: LINK, reaches: Some(reaches) }
}

/// Past every rest after a takeover; the standby has just been heard.
fn settled() -> Host {
    Host::protected_at(100_000)
}

#[test]
fn a_disk_that_fails_gives_a_protected_vm_away_and_nothing_leaves_any_more() {
    let mut host = settled();
    assert_eq!(host.acts(DISK), GIVEN);
    assert_eq!(
        (host.machine.status(), host.machine.output()),
        (PrimaryStatus::Arbitrating, OutputMode::Hold)
    );
    assert!(!host.machine.may_release(Duration::from_millis(host.now)));
    // The standby asks first.
    assert_eq!(host.acts(LinkLost { link: LINK, why: LossReason::Closed }), []);
    assert_eq!(host.acts(Tick), []);
    host.now += 10_000;
    assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
    let owner = "b".to_owned();
    let lost = host.acts(Claimed { generation: 5, result: ClaimResult::Lost { owner: owner.clone() } });
    let reason = ExitReason::Fenced { generation: 5, owner: owner.clone() };
    assert_eq!(lost, [Fence { generation: 5, owner }, StopGuest, Exit { reason }]);
}

#[test]
fn a_vm_that_nobody_comes_for_goes_on_and_its_guest_hears_of_the_error() {
    let mut host = settled();
    host.acts(DISK);
    host.now += 10_000;
    host.acts(Tick);
    let won = host.win();
    assert_eq!(won[0], ReleaseAll { generation: 5 });
    assert!(won.contains(&Endure { what: Broken::Disk, why: Kept::Unprotected }), "{won:?}");
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
}

#[test]
fn a_vm_that_is_left_to_a_standby_that_was_leaving_goes_on_at_once() {
    let mut host = settled();
    host.acts(DISK);
    let released = host.acts(Leave { link: LINK, reason: LeaveReason::Released });
    assert_eq!(released[0], ReleaseAll { generation: 4 });
    assert!(released.contains(&Endure { what: Broken::Disk, why: Kept::Unprotected }), "{released:?}");
}

#[test]
fn a_host_that_is_cut_off_from_the_clients_lets_the_other_one_ask_first() {
    let claims = |events: &[PrimaryEvent]| {
        let mut host = settled();
        events.iter().for_each(|event| drop(host.acts(event.clone())));
        host.acts(LinkLost { link: LINK, why: LossReason::Closed });
        let at_once = host.acts(Tick).contains(&Claim { generation: 5 });
        host.now += 10_000;
        at_once || !host.acts(Tick).contains(&Claim { generation: 5 })
    };
    assert!(!claims(&[NETWORK]));
    // Not if the other one is no better.
    assert!(claims(&[reaches(false), NETWORK]));
    assert!(claims(&[NETWORK, Mended { what: Broken::Network }]));
}

#[test]
fn the_guest_of_an_unprotected_vm_hears_at_once() {
    let mut host = Host::attached();
    for _ in 0..2 {
        // Each failure is decided by itself.
        assert_eq!(host.acts(DISK), [Endure { what: Broken::Disk, why: Kept::Unprotected }]);
    }
}

#[test]
fn a_failure_waits_while_it_is_not_known_whether_a_standby_has_the_vm() {
    let mut host = settled();
    host.acts(LinkLost { link: LINK, why: LossReason::Closed });
    assert_eq!(host.machine.status(), PrimaryStatus::Arbitrating);
    assert_eq!(host.acts(DISK), []);
    let won = host.win();
    assert!(won.contains(&Endure { what: Broken::Disk, why: Kept::Unprotected }), "{won:?}");
}

/// A write that hangs cannot be recalled, and could land after the new host's.
#[test]
fn a_vm_with_a_shared_disk_that_hangs_stays() {
    let why = Kept::SharedDiskHangs;
    let mut host = settled();
    host.acts(reaches(true));
    assert_eq!(host.acts(PrimaryEvent::SharedDisks { hang: true }), []);
    assert_eq!(host.acts(DISK), [Endure { what: Broken::Disk, why }]);
    assert_eq!(host.acts(NETWORK), [Endure { what: Broken::Network, why }]);
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why }]);
    let goes = host.acts(PrimaryEvent::SharedDisks { hang: false });
    assert!(goes.contains(&GiveAway { what: Broken::Network }), "as soon as it answers: {goes:?}");
}

#[test]
fn soon_after_a_takeover_the_vm_stays() {
    let mut host = Host::protected();
    assert_eq!(host.acts(DISK), [Endure { what: Broken::Disk, why: Kept::JustTakenOver }]);
    // The same fault as on the last host, whenever it comes.
    let mut host = settled();
    let again = Breaks { what: Broken::Disk, again: true };
    assert_eq!(host.acts(again), [Endure { what: Broken::Disk, why: Kept::JustTakenOver }]);
}

#[test]
fn a_vm_whose_clients_are_cut_off_goes_to_a_standby_that_reaches_them() {
    let mut host = settled();
    assert_eq!(host.acts(NETWORK), [Endure { what: Broken::Network, why: Kept::StandbySilent }]);
    assert_eq!(host.acts(reaches(false)), [Endure { what: Broken::Network, why: Kept::StandbyCutOff }]);
    // Said once.
    assert_eq!(host.acts(reaches(false)), []);
    // Of another connection.
    assert_eq!(host.acts(StandbyReaches { link: Link(77), reaches: Some(true) }), []);
    let given = host.acts(reaches(true));
    assert_eq!(given, [GiveAway { what: Broken::Network }, Hangup { link: LINK }]);
}

#[test]
fn a_network_that_is_mended_in_time_moves_nothing() {
    let mut host = settled();
    host.acts(NETWORK);
    assert_eq!(host.acts(Mended { what: Broken::Network }), []);
    assert_eq!(host.acts(reaches(true)), []);
    assert_eq!(host.machine.status(), PrimaryStatus::Protected);
}

#[test]
fn a_vm_whose_operator_has_asked_for_its_stop_stays() {
    let mut host = settled();
    host.acts(reaches(true));
    assert_eq!(host.acts(PrimaryEvent::Stop { ask_guest: true }), [PrimaryAction::AskGuest]);
    assert_eq!(host.acts(NETWORK), [Endure { what: Broken::Network, why: Kept::Stopping }]);
    assert_eq!(host.acts(DISK), [Endure { what: Broken::Disk, why: Kept::Stopping }]);
}

/// An operator may hand a VM over that has come only just now, and again and again.
#[test]
fn an_operator_hands_a_protected_vm_over_and_it_stays_where_nobody_takes_it() {
    let mut host = Host::protected_at(1);
    assert_eq!(host.acts(PrimaryEvent::HandOver), [HandOver]);
    assert_eq!(host.machine.wanted_capture(), Wanted::HandOver);
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why: Kept::Undecided }]);
    assert!(host.machine.guest_may_run());
    let last = host.acts(Captured { link: LINK, base: false, stays: true });
    assert!(matches!(last[1], Ship(ticket) if ticket.flags.hand_over), "{last:?}");
    assert!(!host.machine.guest_may_run(), "its memory is that of the last checkpoint");
    assert_eq!(host.machine.wanted_capture(), Wanted::Nothing);
    // Not before the standby has all of it.
    assert_eq!(host.acts(PrimaryEvent::OutputLeft), []);
    let number = host.machine.epoch() - 1;
    let stamp = Duration::from_millis(host.now);
    let ack = PrimaryEvent::Ack { link: LINK, generation: 4, checkpoint: number, stamp };
    assert_eq!(host.acts(ack), [PrimaryAction::Release { through: number }, PrimaryAction::LetGo]);
    assert_eq!(host.machine.status(), PrimaryStatus::Protected);
    assert_eq!(host.acts(PrimaryEvent::OutputLeft), [Hangup { link: LINK }]);
    assert_eq!(
        (host.machine.status(), host.machine.output()),
        (PrimaryStatus::Arbitrating, OutputMode::Hold)
    );
    assert!(!host.machine.guest_may_run());
    // The standby asks first.
    assert_eq!(host.acts(Tick), []);
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why: Kept::Undecided }]);
    host.now += 10_000;
    assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
    assert_eq!(host.win()[0], ReleaseAll { generation: 5 });
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
    assert!(host.machine.guest_may_run(), "it goes on where it stood still");
    assert_eq!(host.machine.handed_over(), None);
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why: Kept::Unprotected }]);
}

#[test]
fn a_vm_that_ends_or_whose_standby_is_cut_off_is_not_handed_over() {
    let mut host = settled();
    host.acts(reaches(false));
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why: Kept::StandbyCutOff }]);
    assert_eq!(host.machine.status(), PrimaryStatus::Protected);
    host.acts(reaches(true));
    host.acts(PrimaryEvent::Stop { ask_guest: true });
    assert_eq!(host.acts(PrimaryEvent::HandOver), [Keep { why: Kept::Stopping }]);
}

/// The operator changes his mind, the guest ends, or the standby goes: each is as if nobody had asked.
#[test]
fn a_hand_over_can_be_left_at_each_step() {
    let mut host = settled();
    host.acts(PrimaryEvent::HandOver);
    let stopped = host.acts(PrimaryEvent::Stop { ask_guest: true });
    assert_eq!(stopped, [PrimaryAction::AskGuest, Keep { why: Kept::Stopping }]);
    assert_eq!(host.machine.wanted_capture(), Wanted::Epoch);

    let mut host = settled();
    host.acts(PrimaryEvent::HandOver);
    host.acts(PrimaryEvent::End { reason: outlive_epoch::EndReason::PowerOff });
    assert_eq!(host.machine.wanted_capture(), Wanted::Last(outlive_epoch::EndReason::PowerOff));
    let last = host.acts(Captured { link: LINK, base: false, stays: true });
    assert!(matches!(last[1], Ship(ticket) if !ticket.flags.hand_over), "it has ended: {last:?}");

    // The link is lost while the guest stands still: it may be the standby's already.
    let mut host = settled();
    host.acts(PrimaryEvent::HandOver);
    host.acts(Captured { link: LINK, base: false, stays: true });
    host.acts(LinkLost { link: LINK, why: LossReason::Closed });
    assert!(host.machine.stands_still() && !host.machine.guest_may_run());
    host.win();
    assert!(host.machine.guest_may_run() && !host.machine.stands_still());

    // The standby leaves, and hands its right over: the guest goes on at once.
    let mut host = settled();
    host.acts(PrimaryEvent::HandOver);
    host.acts(Captured { link: LINK, base: false, stays: true });
    let left = host.acts(Leave { link: LINK, reason: LeaveReason::Released });
    assert_eq!(left[1], Keep { why: Kept::NotTaken });
    assert!(host.machine.guest_may_run());
}

/// What is kept is of the checkpoint at which the guest stood still, and of no other.
#[test]
fn the_moment_of_a_hand_over_is_known_only_once_another_host_has_the_vm() {
    let mut host = settled();
    host.hand_over();
    let still = host.machine.epoch() - 1;
    assert_eq!(host.machine.handed_over(), None);
    let (generation, owner) = (5, "standby on b".to_owned());
    host.acts(PrimaryEvent::Superseded { generation, owner });
    assert_eq!(host.machine.handed_over(), Some(still));

    // It was not handed over: it ran on until then.
    let mut host = settled();
    host.acts(LinkLost { link: LINK, why: LossReason::Closed });
    host.acts(Claimed { generation: 5, result: ClaimResult::Lost { owner: "standby on b".into() } });
    assert_eq!((host.machine.status(), host.machine.handed_over()), (PrimaryStatus::Over, None));
}
