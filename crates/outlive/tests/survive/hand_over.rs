//! An operator moves a VM to its standby and back, while clients watch.

use std::process::Command;
use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::rejoin::writing;
use crate::support::{Client, MemoryLoad, PROGRAM, Process, Side, Value, Witnesses, World};

/// What `outlive hand-over` says to a process: its exit code, and all that it prints.
pub(crate) fn hand_over(process: &Process) -> (Option<i32>, String) {
    let said = Command::new(PROGRAM).arg("hand-over").arg("--socket").arg(process.socket()).output().unwrap();
    (said.status.code(), String::from_utf8([said.stdout, said.stderr].concat()).unwrap())
}

/// Both processes stay: whoever has handed the VM over protects it next.
#[test]
fn a_vm_is_handed_back_and_forth_without_a_lost_connection() {
    const TIMES: usize = 6;
    let Some(world) = World::new() else { return };
    let [here, there] = [Side::A, Side::B].map(|side| side.addr().to_string());
    let standby = world.staying_standby_with(Side::B, &["--standby", &here]);
    let active = world.run_with(Side::A, &["--standby", &there, "--listen", &here]);
    let mut hosts = [active, standby];
    hosts[0].wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    let mut took = Vec::new();
    for time in 0..TIMES {
        witnesses.hear_all();
        let [old, new] = [time % 2, (time + 1) % 2];
        let began = Instant::now();
        let (code, said) = hand_over(&hosts[old]);
        assert_eq!(code, Some(0), "{said}");
        took.push(began.elapsed().as_millis());
        assert!(said.contains(&format!("generation {}", time + 2)), "{said}");
        assert!(hosts[old].has(|e| matches!(e, Event::HandOver { kept: None })));
        hosts[new].wait_for(
            "the VM",
            |e| matches!(e, Event::Takeover { generation, .. } if *generation == time as u64 + 2),
        );
        // Only who has asked for it protects it again, in the other direction.
        hosts[new].wait_for(
            "protected again",
            |e| matches!(e, Event::Protected { generation, .. } if *generation == time as u64 + 2),
        );
        assert!(!hosts[old].ended());
    }
    println!("hand-overs took {took:?} ms");
    // The old host still ends its copy when it is asked first. That is no second VM.
    assert!(!hosts.iter_mut().any(|host| host.has(|e| matches!(e, Event::RunsTwice { .. }))));
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Pages of the last base that a primary has sent, in its first round.
fn base_pages(process: &mut Process) -> u64 {
    let pages = process.events().filter_map(|e| match e {
        Event::BaseProgress { total_pages, .. } => Some(*total_pages),
        _ => None,
    });
    pages.last().expect("a base")
}

/// Hands the VM to and fro, and waits each time until the copy of the host that came back was compared with the VM, all
/// of it. Returns the pages of the first base and those of the later ones.
fn to_and_fro(hosts: &mut [Process; 2], times: usize) -> (u64, Vec<u64>) {
    let first = base_pages(&mut hosts[0]);
    let mut later = Vec::new();
    for time in 0..times {
        let [old, new] = [time % 2, (time + 1) % 2];
        let (code, said) = hand_over(&hosts[old]);
        assert_eq!(code, Some(0), "{said}");
        let generation = time as u64 + 2;
        hosts[new].wait_for(
            "protected again",
            |e| matches!(e, Event::Protected { generation: it, .. } if *it == generation),
        );
        later.push(base_pages(&mut hosts[new]));
        // Of the time when it was the VM's host there is none.
        let checked = hosts[old].wait_for("comparing", |e| matches!(e, Event::SelfCheck { .. }));
        assert!(matches!(checked, Event::SelfCheck { difference: None, .. }), "{checked:?}");
    }
    for host in hosts {
        let differs = host.has(|e| matches!(e, Event::AuditDiffers { .. }));
        assert!(!host.ended() && !differs, "{}", host.log());
    }
    (first, later)
}

/// A page that is left out of the base is lost in silence, so all memory is compared after each return, and the guest
/// compares its own at the end.
#[test]
fn a_host_that_has_handed_the_vm_over_comes_back_with_its_memory() {
    let Some(world) = World::new() else { return };
    let [here, there] = [Side::A, Side::B].map(|side| side.addr().to_string());
    // A busy host must not lose its standby by that.
    let compares = ["--self-check", "20", "--audit", "100", "--dead-after", "20s"];
    let standby = world.staying_standby_with(Side::B, &[&["--standby", &here], &compares[..]].concat());
    let runs = ["--standby", &there, "--listen", &here];
    let active = world.run_with(Side::A, &[&runs, &compares[..]].concat());
    let mut hosts = [active, standby];
    hosts[0].wait_protected();
    let witnesses = Witnesses::start(&world, 3);
    let load = MemoryLoad::start(&world, 2000, 50_000);
    let (first, later) = to_and_fro(&mut hosts, 6);
    println!("the first base had {first} pages, the later ones {later:?}");
    assert!(hosts.iter().all(|host| host.log().contains("it gets what was written since")));
    load.finish(&world);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// The same with a guest that writes to its disk all the time.
#[test]
fn a_host_that_comes_back_with_its_memory_has_its_disk_too() {
    let Some(world) = World::new() else { return };
    let (active, standby) = writing(&world, &["--self-check", "20", "--audit", "100", "--dead-after", "20s"]);
    let mut hosts = [active, standby];
    let (first, later) = to_and_fro(&mut hosts, 4);
    println!("the first base had {first} pages, the later ones {later:?}");
    assert!(hosts.iter().all(|host| host.log().contains("it gets what was written since")));
}

/// Nothing is protected then, and nothing else: who has no base must not be held by a log that nobody empties.
#[test]
fn a_vm_that_cannot_be_protected_after_its_hand_over_runs_on() {
    const MORE: u64 = 150 << 20;
    let Some(world) = World::new() else { return };
    let [here, there] = [Side::A, Side::B].map(|side| side.addr().to_string());
    let mut new = world.staying_standby_with(Side::B, &["--standby", &here]);
    let mut old = world.run_with(Side::A, &["--standby", &there, "--listen", &here, "--memory", "1G"]);
    old.wait_protected();
    let most = new.address_space() + MORE;
    new.limit_address_space(Some(most));
    let (code, said) = hand_over(&old);
    assert_eq!(code, Some(0), "{said}");
    new.wait_says("protection cannot start: ", 1);
    // More pages than all dirty logs have room for.
    let load = MemoryLoad::start(&world, 120_000, 1_000_000);
    let mut client = Client::connect(&world);
    let until = Instant::now() + Duration::from_secs(4);
    let mut number = 0;
    while Instant::now() < until {
        number += 1;
        assert_eq!(client.ask("INCR runs"), Ok(Value::Integer(number)));
    }
    new.limit_address_space(None);
    new.wait_protected();
    load.finish(&world);
}

/// The old host is killed at once, so nobody comes back with the memory: the next standby gets all of it.
#[test]
fn a_standby_without_the_memory_gets_all_of_it() {
    let Some(world) = World::new() else { return };
    let [here, there] = [Side::A, Side::B].map(|side| side.addr().to_string());
    let compares = ["--self-check", "20", "--dead-after", "20s"];
    let mut new = world.staying_standby_with(Side::B, &[&["--standby", &here], &compares[..]].concat());
    let mut old = world.run_with(Side::A, &[&["--standby", &there], &compares[..]].concat());
    old.wait_protected();
    let first = base_pages(&mut old);
    let load = MemoryLoad::start(&world, 500, 50_000);
    // Without --listen it does not stay.
    let (code, said) = hand_over(&old);
    assert_eq!(code, Some(0), "{said}");
    new.wait_takeover();
    old.wait_end();
    let mut standby = world.standby_with(Side::A, &compares);
    new.wait_protected();
    assert!(base_pages(&mut new) >= first, "{}", new.log());
    let checked = standby.wait_for("comparing", |e| matches!(e, Event::SelfCheck { .. }));
    assert!(matches!(checked, Event::SelfCheck { difference: None, .. }), "{checked:?}");
    load.finish(&world);
}

/// Nothing changes where nobody could take the VM.
#[test]
fn a_vm_that_nobody_could_take_stays_and_the_operator_hears_why() {
    let Some(world) = World::new() else { return };
    let there = Side::B.addr().to_string();
    let mut active = world.run_with(Side::A, &["--standby", &there]);
    active.wait_for("running", |e| matches!(e, Event::Started { .. }));
    let witnesses = Witnesses::start(&world, 1);
    let (code, said) = hand_over(&active);
    assert!(code == Some(2) && said.contains("no standby has this VM"), "{said}");
    let standby = world.standby(Side::B);
    let (code, said) = hand_over(&standby);
    assert!(code == Some(2) && said.contains("on the host where it runs"), "{said}");
    active.wait_protected();
    // Both hosts look for the arbiter every few seconds.
    std::fs::rename(world.arbiter(), world.dir().join("away")).unwrap();
    active.wait_for("told that the arbiter is gone", |e| matches!(e, Event::ArbiterLost { .. }));
    let (code, said) = hand_over(&active);
    assert!(code == Some(2) && said.contains("the arbiter does not answer"), "{said}");
    assert!(!active.has(|e| matches!(e, Event::LinkLost { .. } | Event::Unprotected { .. })));
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// The standby is stopped at the moment of the hand-over: it does not come, and the VM goes on where it was.
#[test]
fn a_vm_whose_standby_does_not_come_goes_on_where_it_was() {
    let Some(world) = World::new() else { return };
    let (mut active, standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    standby.signal(nix::sys::signal::Signal::SIGSTOP);
    let (code, said) = hand_over(&active);
    assert!(code == Some(2) && said.contains("did not take the VM over"), "{code:?} {said}");
    active.wait_for("alone", |e| matches!(e, Event::Won { generation: 2 }));
    witnesses.hear_all();
    standby.signal(nix::sys::signal::Signal::SIGCONT);
    std::thread::sleep(Duration::from_millis(200));
    witnesses.hear_all();
    witnesses.finish(&world);
}
