//! A cluster of three whose members are killed, frozen and left without a majority while claimants race.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use outlive::arbiter::{self, Claim};

use super::etcd_cluster::{Cluster, has_etcd};
use crate::conformance::answer;
use crate::support::{VM, why};

/// A race has more generations than this; a busy machine takes longer for them, but not for ever.
pub(super) const RACE: u64 = 20;
const MOST: Duration = Duration::from_secs(60);

/// Waits until the claimants have raced for enough generations.
pub(super) fn wait_for_race(reached: &AtomicU64) {
    let began = Instant::now();
    while reached.load(Ordering::Relaxed) <= RACE + 1 && began.elapsed() < MOST {
        sleep(Duration::from_millis(50));
    }
}

#[test]
fn members_that_fail_during_claims_leave_one_winner_each() {
    if !has_etcd() {
        return;
    }
    let mut cluster = Cluster::start(3);
    let place = format!("etcd:{}/faults", cluster.urls());
    arbiter::init(&place).unwrap();
    let (ends, reached) = (AtomicBool::new(false), AtomicU64::new(0));
    let said: Vec<(String, Vec<(u64, Claim)>)> = scope(|threads| {
        let racer = |number: usize| {
            let (place, ends, reached) = (&place, &ends, &reached);
            move || {
                let mut arbiter = arbiter::parse(place).unwrap();
                let owner = format!("thread {number}");
                let mut said = Vec::new();
                while !ends.load(Ordering::Relaxed) {
                    let generation = said.len() as u64 + 1;
                    said.push((generation, answer(arbiter.as_mut(), generation, &owner)));
                    reached.fetch_max(generation, Ordering::Relaxed);
                }
                (owner, said)
            }
        };
        let racers: Vec<_> = (0..3).map(|number| threads.spawn(racer(number))).collect();
        sleep(Duration::from_millis(300));
        fail_one_after_the_other(&mut cluster);
        wait_for_race(&reached);
        ends.store(true, Ordering::Relaxed);
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    let winners = one_winner_each(&said);
    let highest = arbiter::parse(&place).unwrap().highest(&VM).unwrap();
    assert_eq!(highest, winners.keys().next_back().copied());
    println!("{} generations won", winners.len());
    assert!(winners.len() as u64 > RACE, "there was a race: {}", winners.len());
}

/// What the claimants were told fits together: each generation has at most one winner, and everybody names the same.
pub(super) fn one_winner_each(said: &[(String, Vec<(u64, Claim)>)]) -> BTreeMap<u64, &str> {
    let mut winners: BTreeMap<u64, &str> = BTreeMap::new();
    for (owner, said) in said {
        for (generation, _) in said.iter().filter(|(_, claim)| *claim == Claim::Won) {
            assert_eq!(winners.insert(*generation, owner), None, "generation {generation} was won twice");
        }
    }
    for (generation, claim) in said.iter().flat_map(|(_, said)| said) {
        if let Claim::Lost { owner } = claim {
            assert_eq!(Some(&owner.as_str()), winners.get(generation), "generation {generation}");
        }
    }
    winners
}

fn fail_one_after_the_other(cluster: &mut Cluster) {
    for number in 0..3 {
        cluster.kill(number);
        sleep(Duration::from_millis(700));
        cluster.run(number);
        sleep(Duration::from_millis(300));
    }
    // Frozen: a connection to it is made, and nothing comes.
    for number in 0..2 {
        cluster.signal(number, SIGSTOP);
        sleep(Duration::from_millis(1500));
        cluster.signal(number, SIGCONT);
    }
    // The third is cut off from both others, and has no majority.
    cluster.signal(0, SIGSTOP);
    cluster.signal(1, SIGSTOP);
    sleep(Duration::from_millis(1500));
    cluster.signal(0, SIGCONT);
    cluster.signal(1, SIGCONT);
    sleep(Duration::from_millis(1000));
}

/// Without a majority nobody wins, and it is said within seconds; with one again, the claim is won.
#[test]
fn without_a_majority_nobody_wins() {
    if !has_etcd() {
        return;
    }
    let cluster = Cluster::start(3);
    let place = format!("etcd:{}/majority", cluster.urls());
    let (mut arbiter, _) = arbiter::init(&place).unwrap();
    assert_eq!(answer(arbiter.as_mut(), 1, "primary"), Claim::Won);
    // One frozen member harms nobody.
    cluster.signal(0, SIGSTOP);
    assert_eq!(answer(arbiter.as_mut(), 2, "primary"), Claim::Won);
    cluster.signal(1, SIGSTOP);
    let start = Instant::now();
    let why = why(arbiter.claim(&VM, 3, "primary"));
    assert!(why.contains("a majority of the members runs"), "{why}");
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert!(arbiter.highest(&VM).is_err(), "no member answers from memory");
    cluster.signal(0, SIGCONT);
    cluster.signal(1, SIGCONT);
    assert_eq!(answer(arbiter.as_mut(), 3, "primary"), Claim::Won);
}
