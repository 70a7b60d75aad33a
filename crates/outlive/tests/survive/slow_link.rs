//! A link that carries less than the guest writes: the first copy comes to its end all the same, without a long
//! stop, and the protection lasts.

use std::time::Duration;

use outlive::events::Event;

use crate::support::{Client, MemoryLoad, Process, Side, Witnesses, World};

/// The longest pause of these tests.
const MAX_PAUSE: Duration = Duration::from_millis(300);

/// Lets the link carry so much, from host a to host b. Returns whether it can, and says so if not.
fn slow_down(world: &World, mbit: u32) -> bool {
    let rate = format!("{mbit}mbit");
    let words =
        ["tc", "qdisc", "add", "dev", World::link(Side::A), "root", "tbf", "rate", &rate, "burst", "128kb"];
    let slow = world.command(Side::A, &[&words[..], &["latency", "50ms"]].concat());
    if !slow {
        println!("skipped: no token bucket filter (tc, sch_tbf)");
    }
    slow
}

fn assert_never_lost(process: &mut Process) {
    let lost = |e: &Event| matches!(e, Event::LinkLost { .. } | Event::Unprotected { .. });
    assert!(!process.has(lost), "the protection was lost");
}

/// A guest that rewrites `pages` pages as fast as it can is protected over a link of `mbit`, and taken over.
fn protects(mbit: u32, pages: u64, more: &[&str]) {
    let Some(world) = World::new() else { return };
    if !slow_down(&world, mbit) {
        return;
    }
    let there = Side::B.addr().to_string();
    let options = [&["--memory", "256M", "--standby", &there, "--max-pause", "300ms"], more].concat();
    let mut primary = world.run_with(Side::A, &options);
    let load = MemoryLoad::start(&world, pages, 200_000);
    let mut client = Client::connect(&world);
    let (alone, began) = (client.work("writes"), std::time::Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    let before = client.work("writes");
    let alone = (before - alone) as f64 / began.elapsed().as_secs_f64();
    let mut standby = world.standby(Side::B);
    let protected = primary.wait_for("protected", |e| matches!(e, Event::Protected { .. }));
    let Event::Protected { base_ms, rounds, held_ms, longest_stop_us, .. } = protected else {
        unreachable!()
    };
    println!(
        "{mbit} Mbit/s, {pages} pages: protected after {base_ms} ms and {rounds} rounds, held for {held_ms} ms, \
         at most {} ms at a time",
        longest_stop_us / 1000
    );
    // Rounds shrink to a half at least, all but a few.
    assert!((2..24).contains(&rounds), "{rounds} rounds");
    // Held for no longer than that; the rest is for a busy machine.
    assert!(longest_stop_us < 5 * MAX_PAUSE.as_micros() as u64, "it stood still for {longest_stop_us} µs");
    let during = (client.work("writes") - before) as f64 / (base_ms as f64 / 1000.0);
    println!("writes a second: {alone:.0} alone, {during:.0} in the meantime");
    let witnesses = Witnesses::start(&world, 1);
    std::thread::sleep(Duration::from_secs(2));
    witnesses.hear_all();
    assert_never_lost(&mut primary);
    primary.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&world);
    load.finish(&world);
}

#[test]
fn a_busy_guest_is_protected_over_200_megabits() {
    protects(200, 12_000, &[]);
}

#[test]
fn a_busy_guest_is_protected_over_a_gigabit() {
    protects(1000, 30_000, &[]);
}

#[test]
fn a_busy_guest_is_protected_over_50_megabits() {
    protects(50, 3000, &[]);
}

/// The bitmap counts nothing while the guest runs.
#[test]
fn a_busy_guest_is_protected_with_a_bitmap() {
    protects(200, 8000, &["--tracker", "bitmap"]);
}
