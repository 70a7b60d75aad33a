//! Something is broken at the primary's host: who keeps the VM.

use outlive_pair::PrimaryAction::{Endure, GiveAway};
use outlive_pair::PrimaryEvent::{Broken as Breaks, LinkLost, Mended, StandbyReaches, Tick};
use outlive_pair::{Broken, Kept, Link, LossReason, OutputMode, PrimaryEvent, PrimaryStatus};

use super::primary::{Host, LINK};

const DISK: PrimaryEvent = Breaks { what: Broken::Disk, again: false };
const NETWORK: PrimaryEvent = Breaks { what: Broken::Network, again: false };

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
    assert_eq!(host.acts(DISK), [GiveAway { what: Broken::Disk }]);
    assert_eq!((host.machine.status(), host.machine.output()), (PrimaryStatus::Over, OutputMode::Discard));
    // It does not ask for the VM that it has given away.
    assert_eq!(host.acts(LinkLost { link: LINK, why: LossReason::Closed }), []);
    host.now += 10_000;
    assert_eq!(host.acts(Tick), []);
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
    assert_eq!(host.acts(reaches(true)), [GiveAway { what: Broken::Network }]);
}

#[test]
fn a_network_that_is_mended_in_time_moves_nothing() {
    let mut host = settled();
    host.acts(NETWORK);
    assert_eq!(host.acts(Mended { what: Broken::Network }), []);
    assert_eq!(host.acts(reaches(true)), []);
    assert_eq!(host.machine.status(), PrimaryStatus::Protected);
}
