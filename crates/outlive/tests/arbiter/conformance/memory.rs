//! What an arbiter knows, and for how long.

use std::time::{Duration, SystemTime};

use outlive::arbiter::{self, Claim, Mode};

use super::Place;
use crate::support::{KEPT, OTHER_VM, VM, loser, why};

pub(super) fn a_repeated_claim_is_won_again_but_not_by_another(place: &dyn Place) {
    let mut arbiter = place.open();
    assert_eq!(arbiter.highest(&VM).unwrap(), None);
    for _ in 0..3 {
        assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    }
    // The same process may open it twice.
    assert_eq!(place.open().claim(&VM, 1, "primary"), Claim::Won);
    assert_eq!(loser(arbiter.claim(&VM, 1, "standby")), "primary");
    // Another VM's claims are independent.
    assert_eq!(arbiter.claim(&OTHER_VM, 1, "standby"), Claim::Won);
    assert_eq!(arbiter.claim(&OTHER_VM, 2, "standby"), Claim::Won);
    assert_eq!(arbiter.highest(&VM).unwrap(), Some(1));
    assert_eq!(arbiter.highest(&OTHER_VM).unwrap(), Some(2));
    assert_eq!(arbiter.vms().unwrap(), [VM, OTHER_VM]);
    // The winner of an old generation is still its winner.
    assert_eq!(arbiter.claim(&OTHER_VM, 1, "standby"), Claim::Won);
    let history = arbiter.history(&OTHER_VM).unwrap();
    let token = arbiter::process_token().unwrap();
    for (win, generation) in history.iter().zip(1..) {
        let winner = win.winner.as_ref().unwrap();
        assert_eq!((win.generation, &*winner.owner, winner.is(token)), (generation, "standby", true));
        assert!(!winner.is("another"));
        let age = win.at.unwrap().elapsed().unwrap_or_default();
        assert!(age < Duration::from_secs(600), "{age:?}");
    }
    assert_eq!(history.len(), 2);
}

pub(super) fn an_owner_of_any_characters_is_kept_in_one_line(place: &dyn Place) {
    let mut arbiter = place.open();
    let owners = ["", "a\nowner b", "\0\"\\", &"x".repeat(5000), "zweiter \u{1f980}"];
    for (generation, owner) in (1..).zip(owners) {
        assert_eq!(arbiter.claim(&VM, generation, owner), Claim::Won);
        assert_eq!(arbiter.claim(&VM, generation, owner), Claim::Won);
        let shown = loser(arbiter.claim(&VM, generation, "somebody else"));
        assert!(!shown.contains('\n') && shown.chars().count() <= 200, "{shown}");
    }
}

pub(super) fn old_claims_go_and_their_generations_cannot_be_won_again(place: &dyn Place) {
    let mut arbiter = place.open();
    for generation in 1..=20 {
        assert_eq!(arbiter.claim(&VM, generation, "late"), Claim::Won);
    }
    let old: Vec<u64> = (1..=20 - KEPT).collect();
    assert_eq!(arbiter.prune(&VM, Mode::Name).unwrap(), old);
    assert_eq!(arbiter.history(&VM).unwrap().len(), 20, "nothing was removed yet");
    assert_eq!(arbiter.prune(&VM, Mode::Remove).unwrap(), old);
    assert_eq!(arbiter.prune(&VM, Mode::Remove).unwrap(), [0; 0]);
    arbiter.tidy(&VM);
    let left: Vec<u64> = arbiter.history(&VM).unwrap().iter().map(|win| win.generation).collect();
    assert_eq!(left, (20 - KEPT + 1..=20).collect::<Vec<_>>());
    let mut stranger = place.open();
    for generation in 1..20 {
        let lost = loser(stranger.claim(&VM, generation, "stranger"));
        let known = generation > 20 - KEPT;
        assert!(
            if known { lost == "late" } else { lost.contains("generation 20, which is newer, late") },
            "{lost}"
        );
    }
    assert_eq!(stranger.claim(&VM, 21, "stranger"), Claim::Won);
    assert_eq!(stranger.highest(&VM).unwrap(), Some(21));
    // A generation that nobody can have won yet.
    assert!(why(stranger.claim(&VM, 23, "stranger")).contains("lost the claims"));
}

pub(super) fn an_end_is_noted_until_the_vm_runs_again(place: &dyn Place) {
    let (mut arbiter, mut steward) = (place.open(), place.steward());
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    assert_eq!(arbiter.ending(&VM).unwrap(), None);
    for _ in 0..2 {
        arbiter.note_end(&VM, 1, "the guest\npowered off").unwrap();
    }
    // Of a generation that nobody has won, there is no end.
    for generation in [0, 2, 1000] {
        let error = arbiter.note_end(&VM, generation, "x").unwrap_err().to_string();
        assert!(error.contains("`outlive arbiter release`"), "{error}");
    }
    let end = arbiter.ending(&VM).unwrap().unwrap();
    assert_eq!((end.generation, &*end.why), (1, "the guest?powered off"));
    assert!(end.at.unwrap() <= SystemTime::now() + Duration::from_secs(5));
    assert!(!steward.forget(&VM, Duration::from_secs(3600), Mode::Remove).unwrap(), "it is too young");
    // It runs again, so it has not ended.
    assert_eq!(arbiter.claim(&VM, 2, "primary"), Claim::Won);
    assert_eq!(arbiter.ending(&VM).unwrap(), None);
    assert!(!steward.forget(&VM, Duration::ZERO, Mode::Remove).unwrap());
    arbiter.note_end(&VM, 2, "the end").unwrap();
    assert!(steward.forget(&VM, Duration::ZERO, Mode::Name).unwrap());
    assert_eq!(arbiter.highest(&VM).unwrap(), Some(2));
    assert!(steward.forget(&VM, Duration::ZERO, Mode::Remove).unwrap());
    assert_eq!((arbiter.highest(&VM).unwrap(), arbiter.vms().unwrap().len()), (None, 0));
    // What is forgotten cannot go on.
    assert!(why(arbiter.claim(&VM, 3, "primary")).contains("lost the claims"));
}

pub(super) fn what_has_lost_its_claims_lets_nobody_win(place: &dyn Place) {
    let (mut primary, mut standby) = (place.open(), place.open());
    assert_eq!(primary.claim(&VM, 1, "primary"), Claim::Won);
    assert_eq!(standby.claim(&VM, 2, "standby"), Claim::Won);
    place.empty();
    for generation in 2..5 {
        for (arbiter, owner) in
            [(&mut primary, "primary"), (&mut standby, "standby"), (&mut place.open(), "new")]
        {
            let reason = why(arbiter.claim(&VM, generation, owner));
            assert!(reason.contains("lost the claims of this VM"), "{reason}");
        }
    }
    // It is good for VMs that begin now.
    assert_eq!(standby.claim(&OTHER_VM, 1, "primary"), Claim::Won);
}
