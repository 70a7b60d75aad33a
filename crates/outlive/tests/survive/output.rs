//! Output commit: nothing that the VM sends leaves its host before the standby has what it follows from.

use std::time::Duration;

use outlive::events::Event;

use crate::support::{Process, Proxy, Side, Way, Witnesses, World};

/// So long that no stall in these tests is taken for a death.
const DEAD_AFTER: [&str; 2] = ["--dead-after", "20s"];

/// A pair whose link goes through a proxy.
fn start(world: &World) -> (Proxy, Process, Process) {
    let proxy = Proxy::start(world, Side::A);
    let standby = world.standby_with(Side::B, &DEAD_AFTER);
    let mut primary = world.run_with(Side::A, &[&["--standby", &proxy.addr()], &DEAD_AFTER[..]].concat());
    primary.wait_protected();
    (proxy, primary, standby)
}

#[test]
fn nothing_leaves_while_nothing_can_be_committed() {
    let Some(world) = World::new() else { return };
    let (proxy, mut primary, mut standby) = start(&world);
    let witnesses = Witnesses::start(&world, 4);
    for way in [Way::ToStandby, Way::ToPrimary, Way::ToStandby, Way::ToPrimary] {
        proxy.stall(way);
        let before = (world.settled_frames_out(Side::A), witnesses.acked());
        std::thread::sleep(Duration::from_millis(800));
        assert_eq!(
            (world.frames_out(Side::A), witnesses.acked()),
            before,
            "frames, answers; {way:?} stalled"
        );
        proxy.flow();
        witnesses.hear_all();
    }
    for process in [&mut primary, &mut standby] {
        assert!(!process.has(|e| matches!(e, Event::LinkLost { .. })), "a stall was taken for a death");
    }
    witnesses.finish(&world);
}

/// The link stalls, and then the host dies: what the clients have been told must be in what the standby has.
#[test]
fn nobody_has_heard_of_what_was_not_committed() {
    for round in 0..5 {
        let Some(world) = World::new() else { return };
        let (proxy, primary, mut standby) = start(&world);
        let witnesses = Witnesses::start(&world, 4);
        proxy.stall(Way::ToStandby);
        std::thread::sleep(Duration::from_millis(10 + 40 * round));
        primary.kill();
        proxy.cut();
        standby.wait_takeover();
        witnesses.hear_all();
        witnesses.finish(&world);
    }
}
