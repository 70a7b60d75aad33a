//! What a primary says to whoever looks.

use outlive_pair::Broken;

use super::*;

#[test]
fn protection_is_told_of_once() {
    let mut host = Host::attached();
    host.acts(BASE);
    let protected = |actions: &[PrimaryAction]| {
        actions.iter().any(|it| matches!(it, Note(PrimaryNote::Protected { .. })))
    };
    assert!(protected(&host.on(ack(11, 0))));
    host.acts(EPOCH);
    assert!(!protected(&host.on(ack(12, 0))));
}

#[test]
fn a_vm_that_is_given_away_is_told_of() {
    let mut host = Host::protected_at(100_000);
    let what = Broken::Disk;
    let actions = host.on(PrimaryEvent::Broken { what, again: false });
    assert!(actions.contains(&Note(PrimaryNote::GivenAway { what })), "{actions:?}");
}
