//! Which primary is accepted, and when.

use super::*;

#[test]
fn primaries_that_do_not_fit_are_refused() {
    assert_eq!(Host::new(Some(VM)).refusal(LINK, OTHER, 4), RefuseCode::WrongVm);
    let mut host = Host::protected();
    for link in [Link(2), Link(3)] {
        assert_eq!(host.refusal(link, VM, 4), RefuseCode::Busy);
        assert_eq!(host.refusal(link, OTHER, 9), RefuseCode::Busy);
    }
    // The attached primary has noticed nothing.
    assert_eq!(host.acts(staged(12, PLAIN)), [ack(12), apply(12)]);
    host.acts(applied(12));
    host.acts(lost());
    assert_eq!(host.refusal(Link(4), VM, 4), RefuseCode::Busy, "while it settles");
    host.acts(settled(12));
    assert_eq!(host.refusal(Link(4), VM, 4), RefuseCode::Busy, "while it decides");
    host.claimed(ClaimResult::Lost { owner: "a".into() });
    assert_eq!(host.refusal(Link(5), VM, 5), RefuseCode::Leaving);
}

#[test]
fn an_older_generation_of_the_same_vm_is_refused() {
    let mut host = Host::attached();
    assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Discard { link: LINK }]);
    host.acts(Discarded { link: LINK });
    assert_eq!(host.refusal(Link(2), VM, 3), RefuseCode::StaleGeneration);
    assert!(matches!(host.acts(hello_of(Link(3), VM, 4))[..], [Accept { .. }]));
    host.acts(LinkLost { link: Link(3), why: LossReason::Closed });
    host.acts(Discarded { link: Link(3) });
    assert!(
        matches!(host.acts(hello_of(Link(4), OTHER, 1))[..], [Accept { .. }]),
        "another VM counts for itself"
    );
}

/// The card and the memory of one copy must be free before another one is made.
#[test]
fn the_next_primary_waits_until_the_last_copy_is_gone() {
    let mut host = Host::protected();
    host.acts(BadStream { link: LINK, why: "checksum".into() });
    assert_eq!(host.machine.status(), StandbyStatus::Discarding);
    assert_eq!(host.refusal(Link(2), VM, 4), RefuseCode::Busy);
    host.acts(Released { link: LINK, result: Ok(()) });
    assert_eq!(host.acts(Discarded { link: Link(7) }), []);
    assert_eq!(host.refusal(Link(3), VM, 4), RefuseCode::Busy);
    host.acts(Discarded { link: LINK });
    assert!(matches!(host.acts(hello_of(Link(4), VM, 4))[..], [Accept { .. }]));
    // Late reports from the last copy's threads do not concern this one.
    for event in [applied(11), settled(11), tried(11), Failed { link: LINK, why: "late".into() }] {
        assert_eq!(host.acts(event), []);
    }
}

#[test]
fn a_standby_whose_waiting_thread_stands_still_accepts_nobody() {
    let mut host = Host::new(None);
    host.now = 2500;
    let refused = host.acts(hello_of(LINK, VM, 4));
    assert!(matches!(refused[..], [Refuse { code: RefuseCode::Busy, .. }]), "{refused:?}");
    host.on(Tick);
    let accepted = host.acts(hello_of(LINK, VM, 4));
    assert!(matches!(accepted[..], [Accept { .. }]), "{accepted:?}");
}
