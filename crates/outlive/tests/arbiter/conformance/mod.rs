//! What every kind of arbiter must do. A kind that is new makes a [`Place`] and calls [`all`].

mod memory;
mod races;
mod reach;

use outlive::arbiter::{self, Arbiter, Claim};

pub(crate) use races::racer_ends_with_claims;

/// How a place can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// As it should be.
    Here,
    /// Not at all.
    Away,
    /// Questions arrive, answers do not.
    Deaf,
}

/// A place of an arbiter that knows no VM yet, made for one test.
pub(crate) trait Place: Sync {
    /// As in `--arbiter`.
    fn text(&self) -> String;
    /// Makes it reachable or not. Returns whether this kind can be made so.
    fn reach(&self, reach: Reach) -> bool;
    /// Makes it lose all that it knows but its identity.
    fn empty(&self);
    /// Puts another arbiter in its place.
    fn swap(&self);

    /// Opens it.
    fn open(&self) -> Box<dyn Arbiter> {
        arbiter::parse(&self.text()).unwrap_or_else(|error| panic!("{}: {error}", self.text()))
    }

    /// Opens it for whoever may have VMs forgotten.
    fn steward(&self) -> Box<dyn Arbiter> {
        self.open()
    }
}

/// Makes places of a kind.
pub(crate) type Make<'a> = dyn Fn() -> Box<dyn Place + 'a> + Sync + 'a;

/// Something that every kind must do.
type Check<'a> = dyn Fn(&dyn Place) + Sync + 'a;

/// Runs everything over one kind, side by side. `rounds` is how many generations a race goes through.
pub(crate) fn all(make: &Make, rounds: u64) {
    let checks: [(&str, &Check); 12] = [
        ("a repeated claim is won again", &memory::a_repeated_claim_is_won_again_but_not_by_another),
        ("owners of any characters", &memory::an_owner_of_any_characters_is_kept_in_one_line),
        ("old claims go", &memory::old_claims_go_and_their_generations_cannot_be_won_again),
        ("ends are noted", &memory::an_end_is_noted_until_the_vm_runs_again),
        ("lost claims", &memory::what_has_lost_its_claims_lets_nobody_win),
        ("another in its place", &reach::another_arbiter_in_its_place_is_none),
        ("out of reach", &reach::what_is_out_of_reach_is_said_to_be_and_works_when_it_is_back),
        ("lost answers", &reach::a_claim_whose_answer_was_lost_is_won_again_and_by_nobody_else),
        ("identity", &reach::it_is_the_same_arbiter_for_everyone),
        ("threads", &|place| races::of_many_threads_exactly_one_wins_and_the_others_know_who(place, rounds)),
        ("processes", &|place| races::of_many_processes_exactly_one_wins(place, rounds)),
        ("killed", &races::a_claimant_killed_at_any_moment_leaves_no_second_winner),
    ];
    std::thread::scope(|threads| {
        let running = checks.map(|(name, check)| {
            let run = move || check(make().as_ref());
            (name, std::thread::Builder::new().name(name.into()).spawn_scoped(threads, run).unwrap())
        });
        let failed: Vec<&str> =
            running.into_iter().filter_map(|(name, thread)| thread.join().is_err().then_some(name)).collect();
        assert!(failed.is_empty(), "these failed: {failed:?}");
    });
}

/// Claims until there is an answer: a place that has just come back may need a moment.
pub(crate) fn answer(arbiter: &mut dyn Arbiter, generation: u64, owner: &str) -> Claim {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match arbiter.claim(&crate::support::VM, generation, owner) {
            Claim::Unreachable { why } => {
                assert!(std::time::Instant::now() < deadline, "no answer: {why}");
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            claim => return claim,
        }
    }
}
