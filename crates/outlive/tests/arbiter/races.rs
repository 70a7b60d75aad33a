//! Of many hosts that claim at once exactly one wins, whatever happens to the others.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread::{scope, sleep};
use std::time::Duration;

use outlive::arbiter::{Arbiter, Claim, FileArbiter};

use crate::support::{KEPT, VM, directory, loser, names, open};

const ROUNDS: u64 = 1000;

#[test]
fn of_many_threads_exactly_one_wins_and_the_others_know_who() {
    const THREADS: usize = 8;
    let directory = directory();
    let barrier = Barrier::new(THREADS);
    let results: Vec<Vec<Claim>> = scope(|threads| {
        let racer = |number: usize| {
            let (barrier, path) = (&barrier, directory.path());
            move || {
                // Opening the directory is a race too: all must agree which arbiter it is.
                barrier.wait();
                let mut arbiter = open(path);
                let owner = format!("thread {number}");
                let claim = |generation| {
                    barrier.wait();
                    arbiter.claim(&VM, generation, &owner)
                };
                (1..=ROUNDS).map(claim).collect()
            }
        };
        let racers: Vec<_> = (0..THREADS).map(|number| threads.spawn(racer(number))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    for round in 0..ROUNDS as usize {
        let claims: Vec<&Claim> = results.iter().map(|claims| &claims[round]).collect();
        let winners: Vec<usize> = (0..THREADS).filter(|&thread| *claims[thread] == Claim::Won).collect();
        let [winner] = winners[..] else { panic!("round {round}: winners {winners:?}") };
        let lost = Claim::Lost { owner: format!("thread {winner}") };
        assert!(
            claims.iter().enumerate().all(|(thread, claim)| thread == winner || **claim == lost),
            "{claims:?}"
        );
    }
    assert_eq!(open(directory.path()).highest(&VM).unwrap(), Some(ROUNDS));
    assert_eq!(names(directory.path()).len(), ROUNDS as usize + 1, "the marker and one file a generation");
}

const RACER_DIRECTORY: &str = "OUTLIVE_TEST_RACER";

/// Not a test by itself: the program that the racing processes run. It claims one generation after another
/// and prints those that it won.
#[test]
fn racer() {
    let Ok(directory) = std::env::var(RACER_DIRECTORY) else { return };
    let mut arbiter = open(Path::new(&directory));
    // All racers use one name on purpose: only the process distinguishes them.
    println!("\nready");
    while !Path::new(&directory).join("go").exists() {
        std::hint::spin_loop();
    }
    for generation in 1..=ROUNDS {
        match arbiter.claim(&VM, generation, "racer") {
            Claim::Won => println!("\nwon {generation}"),
            Claim::Lost { .. } => {}
            Claim::Unreachable { why } => panic!("{why}"),
        }
    }
}

fn start_racer(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["races::racer", "--exact", "--nocapture"])
        .env(RACER_DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The generations that a racer says it won. Reads until the racer ends.
fn wins(racer: &mut Child) -> Vec<u64> {
    let lines = BufReader::new(racer.stdout.take().unwrap()).lines().map_while(Result::ok);
    lines.filter_map(|line| line.strip_prefix("won ")?.parse().ok()).collect()
}

#[test]
fn of_many_processes_exactly_one_wins() {
    let directory = directory();
    let mut racers: Vec<Child> = (0..6).map(|_| start_racer(directory.path())).collect();
    sleep(Duration::from_millis(300));
    fs::write(directory.path().join("go"), "").unwrap();
    let mut winners = BTreeMap::new();
    for (number, racer) in racers.iter_mut().enumerate() {
        for generation in wins(racer) {
            let earlier = winners.insert(generation, number);
            assert_eq!(earlier, None, "generation {generation} was won twice");
        }
        assert!(racer.wait().unwrap().success());
    }
    assert!(winners.keys().copied().eq(1..=ROUNDS), "every generation was won by somebody");
}

/// Every generation that a killed process had won stays won, and its unfinished work harms nobody.
#[test]
fn a_claimant_killed_at_any_moment_leaves_no_second_winner() {
    for round in 0..12_u64 {
        let directory = directory();
        open(directory.path());
        fs::write(directory.path().join("go"), "").unwrap();
        let mut racers = [start_racer(directory.path()), start_racer(directory.path())];
        sleep(Duration::from_millis(20 + 7 * round));
        racers.iter_mut().for_each(|racer| racer.kill().unwrap());
        let won: Vec<u64> = racers.iter_mut().flat_map(wins).collect();
        for racer in &mut racers {
            racer.wait().unwrap();
        }

        let mut successor = open(directory.path());
        let highest = successor.highest(&VM).unwrap().unwrap_or(0);
        for generation in won {
            assert_eq!(loser(successor.claim(&VM, generation, "racer")), "racer", "generation {generation}");
        }
        assert_eq!(successor.claim(&VM, highest + 1, "racer"), Claim::Won);
    }
}

/// If many processes make a directory an arbiter at once, all get the same one.
#[test]
fn an_arbiter_is_made_once() {
    for _ in 0..50 {
        let directory = directory();
        let barrier = Barrier::new(4);
        let identities: Vec<String> = scope(|threads| {
            let make = || {
                barrier.wait();
                FileArbiter::init(directory.path()).unwrap().0.identity().to_owned()
            };
            let makers: Vec<_> = (0..4).map(|_| threads.spawn(make)).collect();
            makers.into_iter().map(|maker| maker.join().unwrap()).collect()
        });
        assert!(identities.iter().all(|it| *it == identities[0]), "{identities:?}");
    }
}

/// All racers prune all the time.
#[test]
fn with_claims_going_all_the_time_exactly_one_wins() {
    const THREADS: usize = 4;
    let directory = directory();
    let barrier = Barrier::new(THREADS);
    let wins: Vec<Vec<u64>> = scope(|threads| {
        let racer = |number: usize| {
            let (barrier, path) = (&barrier, directory.path());
            move || {
                let mut arbiter = open(path);
                let owner = format!("thread {number}");
                let mut won = Vec::new();
                for generation in 1..=400 {
                    barrier.wait();
                    match arbiter.claim(&VM, generation, &owner) {
                        Claim::Won => won.push(generation),
                        Claim::Lost { .. } => {}
                        Claim::Unreachable { why } => panic!("{why}"),
                    }
                    arbiter.tidy(&VM);
                }
                won
            }
        };
        let racers: Vec<_> = (0..THREADS).map(|number| threads.spawn(racer(number))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    let mut all = wins.concat();
    all.sort_unstable();
    assert!(all.into_iter().eq(1..=400), "every generation was won once");
    let names = names(directory.path());
    let is_claim = |name: &&String| !name.contains('.') && name.contains('/');
    assert_eq!(names.iter().filter(is_claim).count() as u64, KEPT, "{names:?}");
    assert!(names.len() as u64 <= KEPT + 3, "the claims, the marker, what was pruned: {names:?}");
}
