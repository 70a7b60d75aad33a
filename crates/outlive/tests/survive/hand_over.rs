//! An operator moves a VM to its standby and back, while clients watch.

use std::process::Command;
use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::support::{PROGRAM, Process, Side, Witnesses, World};

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
    witnesses.hear_all();
    witnesses.finish(&world);
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
