//! An arbiter that cannot be reached, or is another one.

use outlive::arbiter::{self, Claim, Initialized};

use super::{Place, Reach, answer};
use crate::support::{VM, loser, why};

pub(super) fn it_is_the_same_arbiter_for_everyone(place: &dyn Place) {
    let identity = place.open().identity().to_owned();
    assert!(identity.len() >= 16, "{identity}");
    assert_eq!(place.open().identity(), identity);
    // Making it once more changes nothing. Not every kind is made in this way.
    if let Ok((arbiter, done)) = arbiter::init(&place.text()) {
        assert_eq!((arbiter.identity(), done), (&*identity, Initialized::Already));
    }
}

pub(super) fn another_arbiter_in_its_place_is_none(place: &dyn Place) {
    let mut arbiter = place.open();
    let mut probe = arbiter.prober();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    probe().unwrap();
    place.swap();
    for generation in [1, 2] {
        let reason = why(arbiter.claim(&VM, generation, "primary"));
        assert!(reason.contains("now another arbiter"), "{reason}");
    }
    assert!(arbiter.highest(&VM).is_err() && arbiter.history(&VM).is_err() && arbiter.vms().is_err());
    assert!(arbiter.note_end(&VM, 1, "").is_err());
    assert!(probe().is_err());
    let mut other = place.open();
    assert_ne!(other.identity(), arbiter.identity());
    assert!(why(other.claim(&VM, 2, "primary")).contains("lost the claims"));
}

pub(super) fn what_is_out_of_reach_is_said_to_be_and_works_when_it_is_back(place: &dyn Place) {
    let mut arbiter = place.open();
    let mut probe = arbiter.prober();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    assert!(place.reach(Reach::Away), "every kind can be out of reach");
    let reason = why(arbiter.claim(&VM, 2, "primary"));
    let (_, rest) = place.text().split_once(':').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert!(reason.contains(&rest) && !reason.contains('\n'), "{reason}");
    assert!(arbiter.highest(&VM).is_err() && probe().is_err());
    let refusal = arbiter::parse(&place.text()).map(drop).unwrap_err().to_string();
    assert!(refusal.contains(&rest) && !refusal.contains('\n'), "{refusal}");
    place.reach(Reach::Here);
    assert_eq!(loser(answer(arbiter.as_mut(), 1, "standby")), "primary");
    assert_eq!(answer(arbiter.as_mut(), 2, "primary"), Claim::Won);
    probe().unwrap();
}

pub(super) fn a_claim_whose_answer_was_lost_is_won_again_and_by_nobody_else(place: &dyn Place) {
    let (mut first, mut second) = (place.open(), place.open());
    if !place.reach(Reach::Deaf) {
        // A directory answers with what is in it.
        return;
    }
    for generation in 1..=4 {
        // On a busy host the claim may be given up before it is said.
        let has_landed = (0..20).any(|_| {
            place.reach(Reach::Deaf);
            why(first.claim(&VM, generation, "first"));
            place.reach(Reach::Here);
            second.history(&VM).is_ok_and(|won| won.len() as u64 == generation)
        });
        assert!(has_landed, "no claim arrives");
        // It was won, whoever hears of it.
        let (owner, other) = match generation % 2 {
            0 => (answer(first.as_mut(), generation, "first"), answer(second.as_mut(), generation, "second")),
            _ => {
                let other = answer(second.as_mut(), generation, "second");
                (answer(first.as_mut(), generation, "first"), other)
            }
        };
        assert_eq!((owner, loser(other)), (Claim::Won, "first".to_owned()));
    }
    assert_eq!(first.history(&VM).unwrap().len(), 4, "a repetition claims nothing else");
}
