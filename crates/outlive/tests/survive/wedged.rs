//! One thread of a host is stuck for good, and everything else of that host continues: its sockets, its
//! heartbeats' timers, its claims. The stuck host is given up, and the VM continues.

use outlive::events::Event;

use crate::support::{Held, Process, Side, Witnesses, World, wait_until};

/// Which host's thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Primary,
    Standby,
}

/// Holds a thread of a protected VM's host: the VM continues on the host that `goes_on` names, and is
/// protected again although the thread never moves.
fn survives(of: Of, thread: &str, goes_on: Option<Of>) {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 4);
    let held = Held::thread(if of == Of::Primary { &active } else { &standby }, thread);
    wait_until("the VM goes on", || goes_on_alone(&mut active) || standby.took_over());
    witnesses.hear_all();
    let moved = standby.took_over();
    if let Some(host) = goes_on {
        assert_eq!(moved, host == Of::Standby, "{}\n{}", active.log(), standby.log());
    }
    let (mut winner, loser, side) =
        if moved { (standby, active, Side::A) } else { (active, standby, Side::B) };
    // A process with a held thread cannot be reaped.
    let of_the_loser = moved == (of == Of::Primary);
    let held = (!of_the_loser).then_some(held);
    loser.kill();
    let _new = world.standby(side);
    winner.wait_protected();
    witnesses.hear_all();
    witnesses.finish(&world);
    drop(held);
}

/// By the arbiter's word, or by that of a standby that has given its copy up.
fn goes_on_alone(process: &mut Process) -> bool {
    process.has(|e| match e {
        Event::Won { .. } => true,
        Event::LinkLost { reason } => reason.contains("has handed its right to the VM over"),
        _ => false,
    })
}

#[test]
fn a_coordinator_that_stands_still_is_succeeded() {
    survives(Of::Primary, "outlive", Some(Of::Standby));
}

#[test]
fn a_sender_that_stands_still_costs_its_link() {
    survives(Of::Primary, "sender", None);
}

#[test]
fn a_receiver_that_stands_still_costs_its_link() {
    survives(Of::Primary, "receiver", None);
}

#[test]
fn a_reader_that_stands_still_costs_its_link() {
    survives(Of::Standby, "session", None);
}

#[test]
fn a_standby_whose_main_thread_stands_still_is_dropped() {
    survives(Of::Standby, "outlive", Some(Of::Primary));
}

#[test]
fn a_standby_whose_applier_stands_still_is_dropped() {
    survives(Of::Standby, "applier", Some(Of::Primary));
}

/// The process whose coordinator does not move ends, and says why.
#[test]
fn a_host_that_is_succeeded_because_it_stands_still_ends() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let held = Held::thread(&active, "outlive");
    standby.wait_takeover();
    active.wait_says("stands still", 1);
    let threads = format!("/proc/{}/task", active.pid());
    wait_until("all others end", || std::fs::read_dir(&threads).map_or(0, Iterator::count) <= 1);
    // The first thread's end is heard of only when nobody holds it.
    drop(held);
    wait_until("the process ends", || active.status().is_some());
}
