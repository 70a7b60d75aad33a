//! New seeds on every run. A schedule that fails is reduced to the faults that it needs.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::faults::FAULT_NAMES;
use super::run::{self, Faults, Strikes};
use super::stats::Stats;
use super::{from_environment, search};
use crate::planted::Bug;

/// How long, unless something else is asked for.
const SECONDS: u64 = 10;
/// Seeds between two looks at the clock.
const CHUNK: u64 = 2_000;

/// Every kind of schedule.
const ALL: [Faults; 10] = [
    Faults::None,
    Faults::One,
    Faults::Many,
    Faults::Wedge,
    Faults::Stop,
    Faults::Worthless,
    Faults::Garbled,
    Faults::Storage,
    Faults::Power,
    Faults::Copies,
];

/// A schedule that fails, with as few faults as possible.
struct Shrunk {
    strikes: Strikes,
    what: String,
}

/// Leaves out one fault after the other while the schedule still fails. It may then fail with something else;
/// every failure counts.
fn shrink(seed: u64, faults: Faults, bug: Option<Bug>) -> Option<Shrunk> {
    let run = |left_out: BTreeSet<u32>| {
        let mut strikes = Strikes { left_out, drawn: 0 };
        let result = run::schedule_of(seed, faults, bug, &mut strikes, false);
        result.err().map(|what| Shrunk { strikes, what })
    };
    let mut least = run(BTreeSet::new())?;
    loop {
        let kept = (0..least.strikes.drawn).filter(|fault| !least.strikes.left_out.contains(fault));
        // The last first: nothing after the failure matters.
        let smaller = kept.rev().find_map(|fault| {
            let mut left_out = least.strikes.left_out.clone();
            left_out.insert(fault);
            run(left_out)
        });
        match smaller {
            Some(smaller) => least = smaller,
            None => return Some(least),
        }
    }
}

/// Describes a reduced schedule that fails.
fn describe(seed: u64, faults: Faults, bug: Option<Bug>, what: &str) -> String {
    let Some(mut shrunk) = shrink(seed, faults, bug) else {
        return format!("seed {seed}: {what}; it does not fail again");
    };
    let Strikes { left_out, drawn } = &shrunk.strikes;
    let needed: Vec<u32> = (0..*drawn).filter(|fault| !left_out.contains(fault)).collect();
    println!("the trace of seed {seed} with what it needs of its faults:");
    let left_out = left_out.clone();
    shrunk.strikes.drawn = 0;
    let again = run::schedule_of(seed, faults, bug, &mut Strikes { left_out, drawn: 0 }, true);
    assert_eq!(again.err().as_ref(), Some(&shrunk.what), "a schedule is the same each time");
    format!(
        "seed {seed} ({faults:?}): {what}\n  of its faults it needs {needed:?}, and fails then with: {}\n  again, with \
         the trace: cargo xtask sim --seed {seed}",
        shrunk.what
    )
}

/// Prints the events, what became of the VM, and the faults by kind.
fn tell(seeds: Range<u64>, stats: &Stats, took: Duration) {
    println!(
        "seeds {} to {}: {} schedules, {} events in {} s; {} takeovers, {} times alone, {} ends, {} VMs lost to \
         more than one fault",
        seeds.start,
        seeds.end - 1,
        seeds.end - seeds.start,
        stats.events,
        took.as_secs(),
        stats.takeovers,
        stats.alone,
        stats.ended,
        stats.vm_lost
    );
    let mut kinds: std::collections::BTreeMap<&str, u64> = Default::default();
    for (kind, count) in stats.faults.iter().enumerate().filter(|(_, count)| **count > 0) {
        *kinds.entry(FAULT_NAMES.get(kind).unwrap_or(&"other")).or_default() += count;
    }
    kinds.iter().for_each(|(kind, count)| println!("{count:>12} x {kind}"));
}

/// One seed with its trace, or new ones for some time or up to some number.
#[test]
fn new_seeds_hold_the_invariants_too() {
    if let Some(seed) = from_environment("OUTLIVE_SIM_ONE") {
        for faults in ALL {
            if let Err(what) = run::schedule(seed, faults, None) {
                panic!("{}", describe(seed, faults, None, &what));
            }
        }
        println!("the trace of seed {seed}:");
        let stats = run::schedule_of(seed, Faults::Many, None, &mut Strikes::default(), true);
        return tell(seed..seed + 1, &stats.expect("as before"), Duration::ZERO);
    }
    let drawn = RandomState::new().hash_one("seed") >> 20;
    let first = from_environment("OUTLIVE_SIM_FIRST").unwrap_or(drawn);
    let wanted = from_environment("OUTLIVE_SIM_COUNT");
    let time = Duration::from_secs(from_environment("OUTLIVE_SIM_SECONDS").unwrap_or(SECONDS));
    println!("seeds from {first} on");
    let (began, mut stats, mut next) = (Instant::now(), Stats::default(), first);
    while wanted.map_or(began.elapsed() < time, |wanted| next - first < wanted) {
        let left = wanted.map_or(CHUNK, |wanted| (first + wanted - next).min(CHUNK));
        let seeds = next..next + left;
        for faults in ALL {
            let fewer = match faults {
                Faults::Many => left,
                Faults::One | Faults::Power | Faults::Copies => left / 4,
                _ => left / 16,
            };
            let (some, found) = search(seeds.start..seeds.start + fewer, faults, None);
            if let Some((seed, what)) = found {
                panic!("{}", describe(seed, faults, None, &what));
            }
            stats.add(&some);
        }
        next += left;
    }
    tell(first..next, &stats, began.elapsed());
    assert!(next > first && stats.events > 0);
}

/// The reduced schedule fails, and no longer fails without any one of its faults.
#[test]
fn a_schedule_that_fails_is_cut_to_what_it_needs() {
    let mut cut = 0;
    let bugs = [Bug::SkipArbitration, Bug::StaleAckReleases, Bug::ReleaseBeforeAck];
    for (bug, first) in bugs.into_iter().flat_map(|bug| [(bug, 0), (bug, 1_000), (bug, 2_000)]) {
        let seeds = first..first + 20_000;
        let (seed, _) = search(seeds, Faults::Many, Some(bug)).1.expect("a planted mistake is found");
        let shrunk = shrink(seed, Faults::Many, Some(bug)).expect("it fails again");
        let Strikes { left_out, drawn } = shrunk.strikes;
        cut += left_out.len();
        for fault in (0..drawn).filter(|fault| !left_out.contains(fault)) {
            let mut less = Strikes { left_out: left_out.clone(), drawn: 0 };
            less.left_out.insert(fault);
            let result = run::schedule_of(seed, Faults::Many, Some(bug), &mut less, false);
            assert!(result.is_ok(), "{bug:?}, seed {seed}: fault {fault} is not needed");
        }
    }
    assert!(cut > 0, "nothing could be cut anywhere");
}
