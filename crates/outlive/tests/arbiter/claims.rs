//! Which generations can be won, and by which claimant.

use std::fs;

use outlive::arbiter::{self, Arbiter, Claim, FileArbiter};

use crate::support::{KEPT, OTHER_VM, VM, claim_path, directory, loser, names, open};

#[test]
fn a_repeated_claim_is_won_again_but_not_by_another() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.highest(&VM).unwrap(), None);
    for _ in 0..3 {
        assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    }
    // The same process may open it twice.
    assert_eq!(open(directory.path()).claim(&VM, 1, "primary"), Claim::Won);
    assert_eq!(loser(arbiter.claim(&VM, 1, "standby")), "primary");
    // Another VM's claims are independent.
    assert_eq!(arbiter.claim(&OTHER_VM, 1, "standby"), Claim::Won);
    assert_eq!(arbiter.claim(&OTHER_VM, 2, "standby"), Claim::Won);
    assert_eq!(arbiter.highest(&VM).unwrap(), Some(1));
    assert_eq!(arbiter.highest(&OTHER_VM).unwrap(), Some(2));
    let history = arbiter.history(&OTHER_VM).unwrap();
    let owners: Vec<_> =
        history.iter().map(|win| (win.generation, &*win.winner.as_ref().unwrap().owner)).collect();
    assert_eq!(owners, [(1, "standby"), (2, "standby")]);
    assert!(
        history.iter().all(|win| win.winner.as_ref().unwrap().process == arbiter::process_token().unwrap())
    );
    assert_eq!(names(directory.path()).len(), 4, "nothing but the marker and the claims");
}

/// A host that was stopped for long must not win an old generation whose file was pruned.
#[test]
fn a_generation_below_the_highest_cannot_be_won() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    for generation in 1..=5 {
        assert_eq!(arbiter.claim(&VM, generation, "standby"), Claim::Won);
    }
    for generation in 1..=4 {
        fs::remove_file(claim_path(directory.path(), generation)).unwrap();
    }
    assert!(loser(arbiter.claim(&VM, 4, "primary")).contains("generation 5, which is newer"));
    assert_eq!(arbiter.claim(&VM, 6, "primary"), Claim::Won);
    // The winner of an old generation is still its winner.
    assert_eq!(arbiter.claim(&VM, 5, "standby"), Claim::Won);
}

#[test]
fn an_owner_of_any_characters_is_kept_in_one_line() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    let owners = ["", "a\nowner b", "\0", &"x".repeat(5000), "zweiter \u{1f980}"];
    for (generation, owner) in (1..).zip(owners) {
        assert_eq!(arbiter.claim(&VM, generation, owner), Claim::Won);
        assert_eq!(arbiter.claim(&VM, generation, owner), Claim::Won);
        let shown = loser(arbiter.claim(&VM, generation, "somebody else"));
        assert!(!shown.contains('\n') && shown.chars().count() <= 200, "{shown}");
        assert!(!shown.contains("damaged"), "{shown}");
    }
}

#[test]
fn old_claims_go_and_their_generations_cannot_be_won_again() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    let claim_all = |arbiter: &mut FileArbiter, end: u64| {
        (1..=end).for_each(|generation| assert_eq!(arbiter.claim(&VM, generation, "late"), Claim::Won));
    };
    claim_all(&mut arbiter, 20);
    arbiter.tidy(&VM);
    let left: Vec<u64> = arbiter.history(&VM).unwrap().iter().map(|win| win.generation).collect();
    assert_eq!(left, (20 - KEPT + 1..=20).collect::<Vec<_>>());
    let mut stranger = open(directory.path());
    for generation in 1..=20 - KEPT {
        let lost = loser(stranger.claim(&VM, generation, "stranger"));
        assert!(lost.contains("generation 20, which is newer, late"), "{lost}");
    }

    // Claimants that were stopped between their check and their claim, while all others came and went: they
    // find their own claims, alone in the directory.
    let elsewhere = self::directory();
    claim_all(&mut open(elsewhere.path()), 5);
    for generation in [4, 5] {
        fs::copy(claim_path(elsewhere.path(), generation), claim_path(directory.path(), generation)).unwrap();
        let lost = loser(open(directory.path()).claim(&VM, generation, "late"));
        assert!(lost.contains("generation 20, which is newer"), "{lost}");
    }
    // Nor does that claim help anyone to win the next generation.
    assert!(loser(open(directory.path()).claim(&VM, 6, "late")).contains("generation 20"));
    assert_eq!(stranger.claim(&VM, 21, "stranger"), Claim::Won);
    assert_eq!(stranger.highest(&VM).unwrap(), Some(21));
}
