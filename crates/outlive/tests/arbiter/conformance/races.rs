//! Many claimants at once, in threads and processes, some of which are killed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread::{scope, sleep};
use std::time::Duration;

use outlive::arbiter::{self, Claim};

use super::{Place, answer};
use crate::support::{VM, loser};

pub(super) fn of_many_threads_exactly_one_wins_and_the_others_know_who(place: &dyn Place, rounds: u64) {
    const THREADS: usize = 4;
    let barrier = Barrier::new(THREADS);
    let results: Vec<Vec<Claim>> = scope(|threads| {
        let racer = |number: usize| {
            let barrier = &barrier;
            move || {
                let mut arbiter = place.open();
                let owner = format!("thread {number}");
                let claim = |generation| {
                    barrier.wait();
                    answer(arbiter.as_mut(), generation, &owner)
                };
                (1..=rounds).map(claim).collect()
            }
        };
        let racers: Vec<_> = (0..THREADS).map(|number| threads.spawn(racer(number))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    for round in 0..rounds as usize {
        let claims: Vec<&Claim> = results.iter().map(|claims| &claims[round]).collect();
        let winners: Vec<usize> = (0..THREADS).filter(|&thread| *claims[thread] == Claim::Won).collect();
        let [winner] = winners[..] else { panic!("round {round}: winners {winners:?}") };
        let lost = Claim::Lost { owner: format!("thread {winner}") };
        assert!((0..THREADS).all(|thread| thread == winner || *claims[thread] == lost), "{claims:?}");
    }
    assert_eq!(place.open().highest(&VM).unwrap(), Some(rounds));
}

const RACER: &str = "OUTLIVE_TEST_CLAIMANT";

/// The program of the racing processes: claims one generation after another, and prints those that it won.
pub(crate) fn racer_ends_with_claims() {
    let Ok(text) = std::env::var(RACER) else { return };
    let (rounds, place) = text.split_once(' ').unwrap();
    let mut arbiter = arbiter::parse(place).unwrap();
    println!("\nready");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    for generation in 1..=rounds.parse().unwrap() {
        // All use one name on purpose: only the process distinguishes them.
        if answer(arbiter.as_mut(), generation, "racer") == Claim::Won {
            println!("\nwon {generation}");
        }
    }
}

struct Racer(Child, BufReader<std::process::ChildStdout>);

impl Racer {
    /// Starts one, which waits for [`Racer::go`].
    fn start(place: &dyn Place, rounds: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["kinds::claimant", "--exact", "--nocapture"])
            .env(RACER, format!("{rounds} {}", place.text()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while line.trim() != "ready" {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "the claimant has ended");
        }
        Self(child, lines)
    }

    fn go(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    /// What it says it won, until it ends.
    fn wins(&mut self) -> Vec<u64> {
        let lines = self.1.by_ref().lines().map_while(Result::ok);
        let wins = lines.filter_map(|line| line.strip_prefix("won ")?.parse().ok()).collect();
        self.0.wait().unwrap();
        wins
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn of_many_processes_exactly_one_wins(place: &dyn Place, rounds: u64) {
    let mut racers: Vec<Racer> = (0..3).map(|_| Racer::start(place, rounds)).collect();
    racers.iter_mut().for_each(Racer::go);
    let mut winners = BTreeMap::new();
    for (number, racer) in racers.iter_mut().enumerate() {
        for generation in racer.wins() {
            let earlier = winners.insert(generation, number);
            assert_eq!(earlier, None, "generation {generation} was won twice");
        }
    }
    assert!(winners.keys().copied().eq(1..=rounds), "every generation was won by somebody: {winners:?}");
}

/// What a killed process has won stays won: a process that is started again is another claimant.
pub(super) fn a_claimant_killed_at_any_moment_leaves_no_second_winner(place: &dyn Place) {
    let mut racers = [Racer::start(place, 100_000), Racer::start(place, 100_000)];
    racers.iter_mut().for_each(Racer::go);
    sleep(Duration::from_millis(250));
    racers.iter_mut().for_each(|racer| racer.0.kill().unwrap());
    let won: Vec<u64> = racers.iter_mut().flat_map(Racer::wins).collect();
    let mut successor = place.open();
    let highest = successor.highest(&VM).unwrap().unwrap_or(0);
    for generation in won {
        assert!(generation <= highest, "generation {generation} was won and is not known");
        let lost = loser(answer(successor.as_mut(), generation, "racer"));
        assert_eq!(lost, "racer", "generation {generation}");
    }
    assert_eq!(answer(successor.as_mut(), highest + 1, "racer"), Claim::Won);
}
