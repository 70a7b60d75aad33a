//! The arbiter's directory is out of reach when it is needed: neither side goes on, both say why, and when it
//! is back exactly one goes on.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use outlive::events::Event;

use crate::hand_over::hand_over;
use crate::status::status;
use crate::support::{Process, Side, Witnesses, World, wait_until};

/// How long a test watches that nothing happens.
const WATCH: Duration = Duration::from_millis(1200);

fn away(world: &World) -> PathBuf {
    world.dir().join("arbiter-away")
}

fn take_arbiter_away(world: &World) {
    fs::rename(world.arbiter(), away(world)).unwrap();
}

fn bring_arbiter_back(world: &World) {
    fs::rename(away(world), world.arbiter()).unwrap();
}

/// Waits until a host says that it cannot reach the arbiter, and checks that the message names the arbiter
/// and the remedy.
fn wait_unreachable(world: &World, process: &mut Process) {
    let event = process.wait_for("without its arbiter", |e| matches!(e, Event::ArbiterUnreachable { .. }));
    let Event::ArbiterUnreachable { why } = event else { unreachable!("the filter above") };
    assert!(
        why.contains(&*world.arbiter().to_string_lossy()) && why.contains("put it back"),
        "neither directory nor remedy: {why}"
    );
    process.wait_says(&why, 1);
}

/// Nobody outside can see the VM run: no frame leaves a host, no request is answered.
fn assert_silence(world: &World, witnesses: &Witnesses) {
    let seen = || (world.frames_out(Side::A), world.frames_out(Side::B), witnesses.acked());
    // Earlier frames may still be on their way to the clients.
    world.settled_frames_out(Side::A);
    world.settled_frames_out(Side::B);
    let before = seen();
    std::thread::sleep(WATCH);
    assert_eq!(seen(), before, "frames of both hosts, answers to the clients");
}

/// Both hosts notice the loss of the arbiter before they need it, and the VM does not notice.
#[test]
fn the_loss_of_the_arbiter_is_told_of_and_disturbs_nothing() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let (arbiter, away) = (world.arbiter(), world.dir().join("away"));
    std::fs::rename(&arbiter, &away).unwrap();
    for host in [&mut active, &mut standby] {
        host.wait_for("without an arbiter", |e| matches!(e, Event::ArbiterLost { .. }));
        host.wait_says("THE ARBITER IS LOST", 1);
    }
    witnesses.hear_all();
    std::fs::rename(&away, &arbiter).unwrap();
    for host in [&mut active, &mut standby] {
        host.wait_for("with its arbiter again", |e| matches!(e, Event::ArbiterBack { .. }));
        assert!(!host.has(|e| matches!(e, Event::LinkLost { .. } | Event::Arbitrating { .. })));
    }
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.finish(&world);
}

/// Only the standby has lost its way to the arbiter. Whoever looks at the primary must not believe that the loss of that
/// host would be survived.
#[test]
fn a_primary_says_that_its_standby_has_lost_the_arbiter() {
    let Some(world) = World::new() else { return };
    let (way, there) = (world.dir().join("way-of-b"), Side::A.addr().to_string());
    let open = || std::os::unix::fs::symlink(world.arbiter(), &way).unwrap();
    open();
    let place = format!("file:{}", way.display());
    let mut standby = world.standby_with(Side::B, &["--standby", &there, "--arbiter", &place]);
    let mut active = world.run(Side::A);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    wait_until("a survivable loss", || status(active.socket()).loss_of_this_host.survived);

    fs::remove_file(&way).unwrap();
    standby.wait_for("without its arbiter", |e| matches!(e, Event::ArbiterLost { .. }));
    active.wait_for("told by its standby", |e| matches!(e, Event::StandbyArbiterLost { .. }));
    active.wait_says("THE STANDBY HAS LOST THE ARBITER", 1);
    let told = status(active.socket());
    assert!(!told.loss_of_this_host.survived && told.loss_of_other_host.survived, "{told}");
    assert!(told.to_string().contains("the standby has not reached the arbiter since "), "{told}");
    assert!(told.standby_lost_arbiter_since.is_some() && told.arbiter.unwrap().lost.is_none());
    let (code, said) = hand_over(&active);
    assert!(code == Some(2) && said.contains("the standby has not reached the arbiter since "), "{said}");
    witnesses.hear_all();

    open();
    active.wait_for("told by its standby", |e| matches!(e, Event::StandbyArbiterBack { .. }));
    wait_until("a survivable loss", || status(active.socket()).loss_of_this_host.survived);
    assert!(!active.has(|e| matches!(e, Event::LinkLost { .. } | Event::ArbiterLost { .. })));
    assert_eq!(active.events().filter(|e| matches!(e, Event::StandbyArbiterLost { .. })).count(), 1);
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.finish(&world);
}

/// Only the primary has lost its way to the arbiter: its standby would take over, and the VM would not go on without
/// that standby. Both hosts say so.
#[test]
fn a_standby_knows_that_its_primary_has_lost_the_arbiter() {
    let Some(world) = World::new() else { return };
    let (way, there) = (world.dir().join("way-of-a"), Side::B.addr().to_string());
    let open = || std::os::unix::fs::symlink(world.arbiter(), &way).unwrap();
    open();
    let mut standby = world.standby(Side::B);
    let place = format!("file:{}", way.display());
    let mut active = world.run_with(Side::A, &["--standby", &there, "--arbiter", &place]);
    active.wait_protected();
    let survived = |host: &Process| {
        let told = status(host.socket());
        [told.loss_of_this_host.survived, told.loss_of_other_host.survived]
    };
    wait_until("survivable losses", || {
        survived(&active) == [true, true] && survived(&standby) == [true, true]
    });

    fs::remove_file(&way).unwrap();
    active.wait_for("without its arbiter", |e| matches!(e, Event::ArbiterLost { .. }));
    wait_until("what each loss means", || {
        survived(&active) == [true, false] && survived(&standby) == [false, true]
    });
    let told = status(standby.socket()).to_string();
    assert!(told.contains("the arbiter has not been reached there since "), "{told}");

    open();
    active.wait_for("with its arbiter again", |e| matches!(e, Event::ArbiterBack { .. }));
    wait_until("survivable losses", || {
        survived(&active) == [true, true] && survived(&standby) == [true, true]
    });
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    standby.kill();
}

#[test]
fn with_the_link_cut_and_no_arbiter_nobody_goes_on() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    take_arbiter_away(&world);
    // Nobody needs it yet.
    witnesses.hear_all();
    world.cut_link();
    wait_unreachable(&world, &mut primary);
    wait_unreachable(&world, &mut standby);
    assert_silence(&world, &witnesses);
    assert!(!primary.ended() && !standby.ended() && !standby.took_over());
    assert!(!primary.has(|e| matches!(e, Event::Won { .. })));

    bring_arbiter_back(&world);
    witnesses.hear_all();
    wait_until("one side gives up", || primary.ended() || standby.ended());
    let loser = if primary.ended() { &mut primary } else { &mut standby };
    assert_eq!(loser.wait_exit(), 3);
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn with_the_primary_dead_and_no_arbiter_the_standby_waits() {
    let Some(world) = World::new() else { return };
    let (primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    take_arbiter_away(&world);
    primary.kill();
    wait_unreachable(&world, &mut standby);
    assert_silence(&world, &witnesses);
    assert!(!standby.took_over());

    bring_arbiter_back(&world);
    standby.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn with_the_standby_dead_and_no_arbiter_the_primary_waits() {
    let Some(world) = World::new() else { return };
    let (mut primary, standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    take_arbiter_away(&world);
    primary.wait_for("without its arbiter", |e| matches!(e, Event::ArbiterLost { .. }));
    standby.kill();
    wait_unreachable(&world, &mut primary);
    assert_silence(&world, &witnesses);
    assert!(!primary.has(|e| matches!(e, Event::Won { .. })));

    bring_arbiter_back(&world);
    primary.wait_for("alone", |e| matches!(e, Event::Won { .. }));
    witnesses.hear_all();
    // The answer says that the arbiter is there; the next probe may be 10 s away.
    let of_both = |e: &&Event| matches!(e, Event::Won { .. } | Event::ArbiterBack { .. });
    let told: Vec<_> = primary.events().filter(of_both).collect();
    assert!(matches!(told[..], [Event::ArbiterBack { .. }, Event::Won { .. }]), "{told:?}");
    let _standby = world.standby(Side::B);
    primary.wait_protected();
    assert!(!primary.log().contains("only once the arbiter is back"), "{}", primary.log());
    witnesses.finish(&world);
}
