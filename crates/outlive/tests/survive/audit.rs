//! The audit: pages of both hosts are compared all the time, and a copy that differs is made anew.

use std::fs;
use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::support::{MEMORY, MemoryLoad, Process, Side, Witnesses, World, flip_program_bit, wait_until};

/// As much as there is. A standby that a busy host gives up takes what is to be found with it.
const ALL: [&str; 4] = ["--audit", "100", "--dead-after", "20s"];

fn hosts(world: &World, audit: &[&str]) -> (Process, Process) {
    let standby = world.standby_with(Side::B, audit);
    let to = Side::B.addr().to_string();
    let mut primary = world.run_with(Side::A, &[&["--standby", &to], audit].concat());
    primary.wait_protected();
    (primary, standby)
}

/// Pages compared and rounds, as the primary says.
fn compared(primary: &mut Process) -> (u64, u64) {
    let counts = |event: &Event| match event {
        Event::Stats(stats) => Some((stats.audit.pages, stats.audit.rounds)),
        _ => None,
    };
    primary.events().filter_map(counts).last().unwrap_or_default()
}

fn differs(event: &Event) -> bool {
    matches!(event, Event::AuditDiffers { .. })
}

#[test]
fn a_bit_that_differs_in_the_copy_is_found_and_the_copy_is_made_anew() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = hosts(&world, &ALL);
    let witnesses = Witnesses::start(&world, 4);
    wait_until("pages are compared", || compared(&mut primary).1 >= 1);
    assert!(!standby.has(differs), "{}", standby.log());

    flip_program_bit(&standby, MEMORY);
    primary.wait_for("told of the difference", differs);
    primary.wait_for("without its standby", |e| matches!(e, Event::Unprotected { .. }));
    primary.wait_protected();
    assert!(standby.has(differs), "{}", standby.log());
    assert!(!standby.ended() && !standby.took_over());
    witnesses.hear_all();

    primary.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn a_host_whose_copies_differ_again_and_again_takes_no_more() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = hosts(&world, &ALL);
    for time in 1..=3 {
        flip_program_bit(&standby, MEMORY);
        primary.wait_for("told of the difference", differs);
        if time < 3 {
            primary.wait_protected();
        }
    }
    standby.wait_for(
        "refusing",
        |e| matches!(e, Event::PrimaryRefused { why } if why.contains("3 times within an hour")),
    );
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    witnesses.finish(&world);
    assert!(!primary.ended());
}

/// For longer, set OUTLIVE_AUDIT_SECONDS.
#[test]
fn a_guest_that_writes_all_the_time_never_differs() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = hosts(&world, &ALL);
    let witnesses = Witnesses::start(&world, 4);
    // The most written pages stay writable, and some of their writes change nothing.
    let load = MemoryLoad::start(&world, 2000, 400_000);
    let seconds = std::env::var("OUTLIVE_AUDIT_SECONDS").map_or(10, |text| text.parse().unwrap());
    let until = Instant::now() + Duration::from_secs(seconds);
    wait_until("pages are compared", || compared(&mut primary).1 >= 2);
    while Instant::now() < until {
        assert!(!standby.has(differs) && !primary.has(differs), "{}", standby.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let (pages, rounds) = compared(&mut primary);
    println!("{pages} pages compared in {rounds} rounds");
    load.finish(&world);
    primary.kill();
    standby.wait_takeover();
    assert!(!standby.has(differs), "{}", standby.log());
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Time that a thread has had a core.
fn core_time(process: &Process, thread: &str) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap();
    let named = tasks
        .filter_map(|task| Some(task.ok()?.path()))
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == thread));
    let counts = fs::read_to_string(named.expect("the thread is there").join("schedstat")).unwrap();
    Duration::from_nanos(counts.split_whitespace().next().unwrap().parse().unwrap())
}

/// As it is without an option: it compares, and takes next to nothing for that.
#[test]
fn the_usual_audit_compares_for_a_small_share_of_a_core() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = hosts(&world, &ALL[2..]);
    let witnesses = Witnesses::start(&world, 2);
    let (began, before) = (Instant::now(), core_time(&primary, "audit"));
    wait_until("pages are compared", || compared(&mut primary).0 >= 1000 && began.elapsed().as_secs() >= 5);
    let share = (core_time(&primary, "audit") - before).as_secs_f64() / began.elapsed().as_secs_f64();
    println!("{} pages for {:.2} % of a core", compared(&mut primary).0, share * 100.0);
    // 0.5 % and what a busy host adds; without a limit it takes what it can get.
    assert!(share < 0.03, "{share}");
    assert!(!standby.has(differs) && !primary.has(differs), "{}", standby.log());
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn an_audit_that_is_off_compares_nothing() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = hosts(&world, &["--audit", "off"]);
    flip_program_bit(&standby, MEMORY);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(compared(&mut primary), (0, 0));
    assert!(!standby.has(differs));
}
