//! A host that has lost the VM to another one is the VM's standby again, in the same process.

use std::time::Duration;

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::support::{Dice, Process, Side, Witnesses, World, wait_until};

/// Both hosts, the one on `side` with the VM. Neither ends when it loses the VM.
fn staying(world: &World, side: Side) -> (Process, Process) {
    let (here, there) = (side.addr().to_string(), side.other().addr().to_string());
    let standby = world.staying_standby_with(side.other(), &["--standby", &here]);
    let mut primary = world.run_with(side, &["--standby", &there, "--listen", &here]);
    primary.wait_protected();
    (primary, standby)
}

fn wait_back(loser: &mut Process, generation: u64, winner: u32) {
    let back = loser.wait_for("back", |e| matches!(e, Event::BackToStandby { .. }));
    let Event::BackToStandby { why } = back else { unreachable!("the filter above") };
    let names =
        why.contains(&format!("generation {generation} ")) && why.contains(&format!("process {winner})"));
    assert!(names, "neither generation {generation} nor process {winner}: {why}");
    loser.wait_for("listening again", |e| matches!(e, Event::Listening { .. }));
    loser.wait_says(&format!("{why}; this process waits as its standby now"), 1);
}

#[test]
fn a_primary_that_lost_the_vm_protects_it_again_in_the_same_process() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut side = Side::A;
    let (mut active, mut standby) = staying(&world, side);
    let pids = [active.pid(), standby.pid()];
    let witnesses = Witnesses::start(&world, 4);
    // Each process is in each role at least once more than at its start.
    for _ in 0..4 {
        dice.sleep_below(Duration::from_millis(200));
        active.signal(Signal::SIGSTOP);
        let generation = standby.wait_takeover();
        witnesses.hear_all();
        let before = world.settled_frames_out(side);
        active.signal(Signal::SIGCONT);
        wait_back(&mut active, generation, standby.pid());
        standby.wait_protected();
        assert_eq!(world.settled_frames_out(side), before, "the old primary let frames out");
        witnesses.hear_all();
        (active, standby) = (standby, active);
        side = side.other();
    }
    assert_eq!([active.pid(), standby.pid()], pids);
    // It is a real standby.
    active.kill();
    standby.wait_takeover();
    witnesses.finish(&world);
}

#[test]
fn whoever_loses_when_the_link_is_cut_comes_back_when_it_is_mended() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = staying(&world, Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..3 {
        let times =
            |it: &mut Process| it.events().filter(|e| matches!(e, Event::BackToStandby { .. })).count();
        let before = [times(&mut active), times(&mut standby)];
        world.cut_link();
        wait_until("one side has given up", || [times(&mut active), times(&mut standby)] != before);
        witnesses.hear_all();
        if times(&mut active) > before[0] {
            (active, standby) = (standby, active);
        }
        assert!(!active.ended() && !standby.ended());
        world.mend_link();
        active.wait_protected();
        witnesses.hear_all();
    }
    // A stop is a stop, also for a host that came back.
    standby.signal(Signal::SIGTERM);
    assert_eq!(standby.wait_exit(), 0);
    active.wait_for("unprotected", |e| matches!(e, Event::Unprotected { .. }));
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn an_address_that_is_taken_is_refused_before_the_vm_starts() {
    let Some(world) = World::new() else { return };
    let here = Side::A.addr().to_string();
    let taken = world.on(Side::A, || std::net::TcpListener::bind(Side::A.addr())).unwrap();
    let mut refused = world.run_with(Side::A, &["--listen", &here]);
    assert_eq!(refused.wait_exit(), 2);
    assert!(refused.log().contains("give --listen a free address of this host"), "{}", refused.log());
    drop(taken);
    assert!(!refused.has(|e| matches!(e, Event::Started { .. })));
    // A process that is its own standby.
    let mut refused = world.run_with(Side::A, &["--listen", &here, "--standby", &here]);
    assert_eq!(refused.wait_exit(), 2);
    assert!(refused.log().contains("is this host itself"), "{}", refused.log());
}
