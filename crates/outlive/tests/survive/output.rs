//! Output commit: nothing that the VM sends leaves its host before the standby has the state that it follows
//! from.

use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::support::{Client, Process, Proxy, Side, Value, Way, Witnesses, World};

/// So long that no stall in these tests counts as a death.
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

/// The link stalls, and then the host dies: the standby must have every state that clients have been told
/// about.
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

/// Output ends its epoch. Otherwise each answer would wait for the longest epoch, here a second.
#[test]
fn an_answer_does_not_wait_for_the_longest_epoch() {
    const ANSWERS: u32 = 30;
    let longest = Duration::from_secs(1);
    for way in [&["--policy", "output"][..], &["--policy", "adaptive"], &["--latency", "2ms"]] {
        let Some(world) = World::new() else { return };
        let options = [way, &["--interval", "1s"], &DEAD_AFTER].concat();
        let _standby = world.standby_with(Side::B, &DEAD_AFTER);
        let standby = Side::B.addr().to_string();
        let mut primary = world.run_with(Side::A, &[&["--standby", &standby][..], &options].concat());
        primary.wait_protected();
        let mut client = Client::connect(&world);
        let began = Instant::now();
        for _ in 0..ANSWERS {
            assert_eq!(client.ask("PING"), Ok(Value::Status("PONG".into())));
        }
        let took = began.elapsed();
        assert!(took < longest * ANSWERS / 2, "{ANSWERS} answers in {took:?} with {way:?}");
    }
}
