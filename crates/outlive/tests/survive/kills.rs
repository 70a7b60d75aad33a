//! SIGKILL, which does to a process what a power cut does to a host.

use std::fs;
use std::time::Duration;

use outlive::events::Event;

use crate::support::{Dice, MemoryLoad, Process, Side, Witnesses, World, crashing_kernel, wait_until};

/// Takeovers of the long run; `OUTLIVE_TAKEOVERS` sets another number.
const TAKEOVERS: u64 = 50;
/// A kill comes at a random moment within this time after the VM is protected.
const SPAN: Duration = Duration::from_millis(300);

/// The host that the VM runs on, and the one that protects it.
struct Pair {
    side: Side,
    active: Process,
    standby: Process,
}

impl Pair {
    fn start(world: &World, options: &[&str]) -> Pair {
        let (active, standby) = world.protected_with(Side::A, options);
        Pair { side: Side::A, active, standby }
    }

    /// Waits until the current standby could take over; the primary may still talk about the previous one.
    fn wait_protected(&self) {
        wait_until("the standby has the base", || self.standby.log().contains("this standby can take over"));
    }

    /// Kills the primary; the standby must take over, and a new one in the dead one's place must protect it.
    fn kill_primary(self, world: &World) -> Pair {
        self.active.kill();
        let mut active = self.standby;
        active.wait_takeover();
        let standby = world.standby(self.side);
        active.wait_protected();
        Pair { side: self.side.other(), active, standby }
    }

    /// Kills the standby; the VM must run on where it is.
    fn kill_standby(mut self, world: &World) -> Pair {
        self.standby.kill();
        self.standby = world.standby(self.side.other());
        self
    }
}

#[test]
fn the_vm_survives_fifty_kills_of_its_host() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let takeovers = std::env::var("OUTLIVE_TAKEOVERS").map_or(TAKEOVERS, |n| n.parse().unwrap());
    let mut pair = Pair::start(&world, &[]);
    let load = MemoryLoad::start(&world, 2000, 3000);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..takeovers {
        dice.sleep_below(SPAN);
        pair = pair.kill_primary(&world);
    }
    witnesses.hear_all();
    witnesses.finish(&world);
    load.finish(&world);
}

#[test]
fn the_vm_goes_on_when_its_standby_is_killed_at_any_moment() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut pair = Pair::start(&world, &[]);
    // Enough used memory that synchronising it takes a while.
    let load = MemoryLoad::start(&world, 6000, 10_000);
    let witnesses = Witnesses::start(&world, 2);
    for round in 0..16 {
        // Every second kill comes at any stage: not yet attached, in the middle of the base, protecting.
        dice.sleep_below(SPAN * 2);
        pair = pair.kill_standby(&world);
        if round % 2 == 0 {
            pair.wait_protected();
        }
        assert!(!pair.standby.took_over(), "a new standby ran the VM");
    }
    pair.wait_protected();
    witnesses.hear_all();
    witnesses.finish(&world);
    load.finish(&world);
}

#[test]
fn the_vm_survives_kills_of_both_hosts_in_turn() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut pair = Pair::start(&world, &["--vcpus", "2"]);
    let load = MemoryLoad::start(&world, 2000, 3000);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..8 {
        dice.sleep_below(SPAN);
        pair = pair.kill_standby(&world);
        dice.sleep_below(SPAN);
        pair = pair.kill_standby(&world);
        pair.wait_protected();
        dice.sleep_below(SPAN);
        pair = pair.kill_primary(&world);
    }
    witnesses.hear_all();
    witnesses.finish(&world);
    load.finish(&world);
}

fn restarts(process: &mut Process) -> usize {
    process.events().filter(|e| matches!(e, Event::GuestRestarted { .. })).count()
}

/// A guest that cannot boot restarts for ever, and waits longer each time. Its host dies meanwhile, and the wait does
/// not begin anew.
#[test]
fn a_guest_that_restarts_again_and_again_stays_slow_after_a_takeover() {
    let Some(world) = World::new() else { return };
    let kernel = world.dir().join("crashing");
    fs::write(&kernel, crashing_kernel()).unwrap();
    let (mut active, mut standby) = world.protected_with(Side::A, &["--kernel", kernel.to_str().unwrap()]);
    active.wait_says("again and again: this one waits for 8 s", 1);
    // Some checkpoints later.
    std::thread::sleep(Duration::from_secs(1));
    let before = restarts(&mut active);
    active.kill();
    standby.wait_takeover();
    // The one that waited waits once more, and the next one longer.
    standby.wait_says("again and again: this one waits for 8 s", 1);
    standby.wait_for("a restart", |e| matches!(e, Event::GuestRestarted { .. }));
    standby.wait_says("again and again: this one waits for 16 s", 1);
    assert_eq!((before, restarts(&mut standby)), (5, 1));
    assert!(!standby.log().contains("waits for 1 s"), "{}", standby.log());
}
