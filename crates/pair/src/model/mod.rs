//! The arbitration, checked exhaustively: every order of what can happen on two or three hosts, within bounds.
//!
//! The model checker (`stateright`) walks through all states that the production state machines and the world
//! around them can reach: messages under way, work of the applier, claims under way, the arbiter, images and
//! the processes started from them, and faults. The world is small: see [`world`]. What can happen is in
//! [`steps`].
//!
//! No clock moves. Time passes in steps that make everything older ([`world::older`]): the primary's patience
//! ends with the second step, the standby's with the third. Time does not pass while a host that is neither slow nor paused has
//! something to read or to do; it does while the arbiter, an applier or a guest is busy.
//!
//! `OUTLIVE_MODEL_FAULTS=n` goes deeper, with `OUTLIVE_MODEL_HOSTS=n` hosts and for at most
//! `OUTLIVE_MODEL_SECONDS=n` (`cargo xtask model`).

mod arbiter;
mod heal;
mod primary;
mod standby;
mod steps;
mod world;

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::planted::Bug;
use steps::Act;
use world::{Budget, World};

#[derive(Debug, Clone, Copy)]
struct Bounds {
    hosts: usize,
    left: Budget,
    bug: Option<Bug>,
}

impl Model for Bounds {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.hosts, self.left, self.bug)]
    }

    fn actions(&self, state: &World, actions: &mut Vec<Act>) {
        state.acts(self.bug, actions);
    }

    fn next_state(&self, last: &World, act: Act) -> Option<World> {
        let mut next = last.clone();
        next.carry_out(&act, self.bug);
        (next != *last).then_some(next)
    }

    /// Every generation takes a fault, an order or a start.
    fn within_boundary(&self, state: &World) -> bool {
        state.won.len() <= usize::from(1 + self.left.faults + self.left.orders + self.left.starts)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAFE, |_, world: &World| world.broken.is_none()),
            Property::always(RUNS, |model: &Bounds, world: &World| {
                !world.may_time_pass(model.bug) || world.after_healing(model.bug).is_none()
            }),
        ]
    }
}

const SAFE: &str = "no invariant is broken";
const RUNS: &str = "once nothing is broken any more, the VM runs";

/// Explores everything within the bounds, or as much as the time allows: then all of it up to some depth.
/// Prints how much that is, and returns what is wrong, with the shortest way to it.
fn explore(model: Bounds, time: Duration) -> Option<String> {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(4));
    let began = Instant::now();
    let checker = model.checker().threads(threads).timeout(time);
    let checker = checker.finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let took = began.elapsed();
    println!(
        "{} hosts, {:?}, mistake {:?}: {} states, {} steps, depth {}{}, {} s",
        model.hosts,
        model.left,
        model.bug,
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        if took < time { "" } else { " (not all of it)" },
        took.as_secs()
    );
    let (name, path) = checker.discoveries().into_iter().next()?;
    let last = path.last_state();
    let what = last.broken.clone().or_else(|| last.after_healing(model.bug)).unwrap_or_default();
    let acts: Vec<String> = path.into_actions().iter().map(|act| format!("  {act:?}")).collect();
    Some(format!("{name}: {what}\n{}", acts.join("\n")))
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Bounds by their numbers: hosts, faults, orders, outputs, epochs, starts.
fn bounds([hosts, faults, orders, outputs, epochs, starts]: [u8; 6], bug: Option<Bug>) -> Bounds {
    Bounds { hosts: hosts.into(), left: Budget { faults, orders, outputs, epochs, starts }, bug }
}

#[test]
fn no_order_of_events_breaks_the_arbitration() {
    // How long each of the bounds is explored at most.
    let seconds = from_environment("OUTLIVE_MODEL_SECONDS").unwrap_or(12);
    let mut all = vec![[2, 1, 0, 1, 0, 0], [2, 1, 1, 1, 0, 0], [2, 1, 0, 1, 0, 1], [3, 1, 0, 1, 0, 0]];
    if let Some(faults) = from_environment("OUTLIVE_MODEL_FAULTS") {
        let hosts = from_environment("OUTLIVE_MODEL_HOSTS").unwrap_or(2) as u8;
        all = vec![[hosts, faults as u8, 1, 2, 1, 1]];
    }
    for numbers in all {
        let found = explore(bounds(numbers, None), Duration::from_secs(seconds));
        assert!(found.is_none(), "{}", found.unwrap_or_default());
    }
}

/// Each of these mistakes in a machine, at the arbiter or in a start from an image must be found.
#[test]
fn the_model_finds_every_planted_mistake() {
    let mistakes = [
        (Bug::TwoWinners, [2, 1, 0, 1, 0, 0]),
        (Bug::SkipArbitration, [2, 1, 0, 1, 0, 0]),
        (Bug::LoserGoesOn, [2, 1, 0, 1, 0, 0]),
        (Bug::TakeOverWithoutWin, [2, 1, 0, 1, 0, 0]),
        (Bug::ClaimBeforeSettled, [2, 1, 0, 1, 0, 0]),
        (Bug::LeaseForgotten, [2, 1, 0, 1, 1, 0]),
        (Bug::LeaveBeforePromise, [2, 0, 1, 1, 0, 0]),
        (Bug::GivenToAStandbyThatLeaves, [2, 0, 2, 1, 0, 0]),
        (Bug::ClaimNeverRepeated, [2, 2, 0, 0, 0, 0]),
        (Bug::ImpatientStandby, [2, 0, 0, 0, 0, 0]),
        (Bug::ReleaseBeforeAck, [2, 1, 0, 1, 1, 0]),
        (Bug::StaleImageStarts, [2, 1, 0, 1, 0, 1]),
    ];
    let mut blind = Vec::new();
    for (bug, numbers) in mistakes {
        match explore(bounds(numbers, Some(bug)), Duration::from_secs(600)) {
            Some(what) => println!("{bug:?}: {what}"),
            None => blind.push(bug),
        }
    }
    assert!(blind.is_empty(), "not found: {blind:?}");
}
