//! The server of an arbiter, killed again and again while claimants race over TLS: what it has answered stays so.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use outlive::arbiter::{self, Claim, FileArbiter};

use super::keys::{self, Keys};
use super::server::Server;
use crate::conformance::answer;
use crate::support::{VM, directory};

/// How long the claimants race at least.
const TIME: Duration = Duration::from_secs(3);
/// How long at most, on a machine that is busy with something else.
const MOST: Duration = Duration::from_secs(60);
/// How many generations make a race.
const RACE: u64 = 25;

#[test]
fn a_server_killed_at_any_moment_loses_no_answer() {
    let directory = directory();
    FileArbiter::init(directory.path()).unwrap();
    let keys = Keys::make();
    let arbiter_keys = keys.arbiter();
    let server = Server::start(directory.path(), "127.0.0.1:0", Some(&arbiter_keys));
    let address = server.address.to_string();
    let place = keys::place(&address, &keys.host());
    let (ends, reached) = (AtomicBool::new(false), AtomicU64::new(0));
    let (kills, wins) = scope(|threads| {
        let racer = |number: usize| {
            let (place, ends, reached) = (&place, &ends, &reached);
            move || {
                let mut arbiter = loop {
                    // It may be down at this moment.
                    if let Ok(arbiter) = arbiter::parse(place) {
                        break arbiter;
                    }
                };
                let owner = format!("thread {number}");
                let mut said = Vec::new();
                let mut generation = 1;
                while !ends.load(Ordering::Relaxed) {
                    said.push((generation, answer(arbiter.as_mut(), generation, &owner)));
                    reached.fetch_max(generation, Ordering::Relaxed);
                    generation += 1;
                }
                (owner, said)
            }
        };
        let racers: Vec<_> = (0..4).map(|number| threads.spawn(racer(number))).collect();
        let (start, mut kills, mut server) = (Instant::now(), 0, server);
        let races = || reached.load(Ordering::Relaxed) >= RACE || start.elapsed() > MOST;
        while start.elapsed() < TIME || kills < 10 || !races() {
            sleep(Duration::from_millis(30 + 17 * (kills % 7)));
            server.kill();
            kills += 1;
            server = Server::start(directory.path(), &address, Some(&arbiter_keys));
        }
        ends.store(true, Ordering::Relaxed);
        let wins: Vec<(String, Vec<(u64, Claim)>)> =
            racers.into_iter().map(|racer| racer.join().unwrap()).collect();
        server.kill();
        (kills, wins)
    });
    let mut winners: BTreeMap<u64, &str> = BTreeMap::new();
    for (owner, said) in &wins {
        for (generation, _) in said.iter().filter(|(_, claim)| *claim == Claim::Won) {
            assert_eq!(winners.insert(*generation, owner), None, "generation {generation} was won twice");
        }
    }
    // Whoever lost was told of the same winner.
    for (generation, claim) in wins.iter().flat_map(|(_, said)| said) {
        if let Claim::Lost { owner } = claim
            && let Some(winner) = winners.get(generation)
        {
            assert!(owner == winner || owner.contains("which is newer"), "{generation}: {owner}, {winner}");
        }
    }
    // The directory itself says the same.
    let mut arbiter = FileArbiter::open(directory.path()).unwrap();
    for win in arbiter::Arbiter::history(&mut arbiter, &VM).unwrap() {
        if let (Some(winner), Some(known)) = (winners.get(&win.generation), win.winner) {
            assert_eq!(known.owner, **winner, "generation {}", win.generation);
        }
    }
    println!("{kills} kills, {} generations won", winners.len());
    assert!(winners.len() > 20, "there was a race: {}", winners.len());
}
