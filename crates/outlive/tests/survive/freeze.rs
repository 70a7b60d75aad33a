//! SIGSTOP and SIGCONT: a host that everybody else takes for dead comes back in the middle of its work.

use std::time::Duration;

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::support::{Dice, Process, Proxy, Side, Way, Witnesses, World, wait_until};

/// The host that was given up must end with code 3 and name the winner.
fn assert_fenced(loser: &mut Process, generation: u64, winner: u32) {
    assert_eq!(loser.wait_exit(), 3, "a host that lost the arbitration exits with 3");
    let lost = loser.has(|e| {
        matches!(e, Event::Lost { generation: g, owner }
            if *g == generation && owner.contains(&format!("process {winner})")))
    });
    assert!(lost, "it does not report generation {generation} as lost to process {winner}");
    let log = loser.log();
    let last = log.lines().find(|line| line.starts_with("outlive: ")).unwrap_or_default();
    assert!(
        last.contains(&format!("generation {generation} ")) && last.contains(&format!("process {winner})")),
        "the message names neither generation {generation} nor process {winner}: '{last}'"
    );
}

/// Stops the primary at random moments until the standby runs the VM, then lets it continue: it must not send
/// a single frame.
fn old_primaries_stay_silent(interval: &str, rounds: u64) {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut side = Side::A;
    let standby_on = |side: Side| {
        let peer = side.other().addr().to_string();
        world.standby_with(side, &["--standby", &peer, "--interval", interval])
    };
    let mut standby = standby_on(side.other());
    let mut active =
        world.run_with(side, &["--standby", &side.other().addr().to_string(), "--interval", interval]);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 4);
    for _ in 0..rounds {
        dice.sleep_below(Duration::from_millis(200));
        active.signal(Signal::SIGSTOP);
        let generation = standby.wait_takeover();
        witnesses.hear_all();
        let before = world.settled_frames_out(side);
        active.signal(Signal::SIGCONT);
        assert_fenced(&mut active, generation, standby.pid());
        assert_eq!(world.settled_frames_out(side), before, "the old primary let frames out");
        witnesses.hear_all();
        active = standby;
        standby = standby_on(side);
        side = side.other();
        active.wait_protected();
    }
    witnesses.finish(&world);
}

#[test]
fn a_primary_that_was_stopped_until_the_takeover_lets_no_frame_out() {
    old_primaries_stay_silent("1ms", 6);
}

/// Only the silence that both sides agree on counts, and no limit of the connection's own: here 3 s of 6.
#[test]
fn a_primary_that_stands_still_for_less_than_that_keeps_its_standby() {
    let Some(world) = World::new() else { return };
    let (active, mut standby) = world.protected_with(Side::A, &["--dead-after", "6s"]);
    let witnesses = Witnesses::start(&world, 4);
    active.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(3));
    active.signal(Signal::SIGCONT);
    witnesses.hear_all();
    assert!(
        !standby.has(|e| matches!(e, Event::LinkLost { .. } | Event::Arbitrating { .. })),
        "{}",
        standby.log()
    );
    witnesses.finish(&world);
}

/// With long epochs the stopped process almost always has held output and an unread acknowledgement.
#[test]
fn nor_does_one_that_was_stopped_with_much_output_held() {
    old_primaries_stay_silent("30ms", 5);
}

/// Acknowledgements arrive while the process cannot read them. When it continues it finds them, together with
/// the output that they would have released in time.
#[test]
fn acknowledgements_found_after_a_stop_release_nothing() {
    let Some(world) = World::new() else { return };
    let proxies = [Proxy::start(&world, Side::A), Proxy::start(&world, Side::B)];
    let mut side = Side::A;
    let mut standby = world.standby_with(Side::B, &["--standby", &proxies[1].addr()]);
    let mut active = world.run_with(Side::A, &["--standby", &proxies[0].addr()]);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 4);
    for round in 0..4 {
        let here = &proxies[round % 2];
        here.stall(Way::ToPrimary);
        std::thread::sleep(Duration::from_millis(30));
        active.signal(Signal::SIGSTOP);
        here.flow();
        let generation = standby.wait_takeover();
        witnesses.hear_all();
        let before = world.settled_frames_out(side);
        active.signal(Signal::SIGCONT);
        assert_fenced(&mut active, generation, standby.pid());
        assert_eq!(world.settled_frames_out(side), before, "the old primary let frames out");
        active = standby;
        standby = world.standby_with(side, &["--standby", &here.addr()]);
        side = side.other();
        active.wait_protected();
    }
    witnesses.finish(&world);
}

fn losses(process: &mut Process) -> usize {
    process.events().filter(|e| matches!(e, Event::LinkLost { .. })).count()
}

#[test]
fn a_stop_of_any_length_leaves_exactly_one_host_with_the_vm() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut side = Side::A;
    let (mut active, mut standby) = world.protected(side);
    let witnesses = Witnesses::start(&world, 2);
    let mut known = 0;
    for _ in 0..6 {
        active.signal(Signal::SIGSTOP);
        // Both time limits (350 and 500 ms) are within this range.
        dice.sleep_below(Duration::from_millis(900));
        active.signal(Signal::SIGCONT);
        witnesses.hear_all();
        if losses(&mut active) == known && !standby.took_over() {
            println!("it was too short for anybody to notice");
            continue;
        }
        wait_until("the arbitration is over", || standby.ended() || standby.took_over());
        if standby.took_over() {
            println!("the standby took over");
            assert_eq!(active.wait_exit(), 3);
            (active, known) = (standby, 1);
            standby = world.standby(side);
            side = side.other();
        } else {
            println!("the VM went on where it was");
            assert_eq!(standby.wait_exit(), 3);
            assert!(!active.ended());
            known = losses(&mut active);
            standby = world.standby(side.other());
        }
        active.wait_protected();
    }
    witnesses.finish(&world);
}

#[test]
fn a_standby_that_was_stopped_until_it_was_given_up_loses() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for generation in [2, 3] {
        standby.signal(Signal::SIGSTOP);
        let won = active.wait_for("alone", |e| matches!(e, Event::Won { .. }));
        assert_eq!(won, Event::Won { generation });
        witnesses.hear_all();
        standby.signal(Signal::SIGCONT);
        assert_fenced(&mut standby, generation, active.pid());
        assert_eq!(world.frames_out(Side::B), 0, "a standby sends nothing of the VM's");
        standby = world.standby(Side::B);
        active.wait_protected();
    }
    witnesses.finish(&world);
}
