//! Orderly is not dead: the standby follows an end on purpose and does not take over.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::support::{
    Client, Dice, MEMORY, Pace, Process, Proxy, Side, Slow, Value, Way, Witnesses, World, flip_program_bit,
    wait_until,
};

/// Both processes have ended in order, for this reason, and the standby has not run the VM.
fn assert_followed(mut primary: Process, mut standby: Process, why: &str) {
    for process in [&mut primary, &mut standby] {
        assert_eq!(process.wait_exit(), 0);
        let said = process
            .has(|e| matches!(e, Event::Ended { reason, code: 0 } if reason.to_lowercase().contains(why)));
        assert!(said, "no event says that it ended because '{why}'");
        assert!(
            !process.has(|e| matches!(e, Event::Takeover { .. } | Event::Won { .. } | Event::Lost { .. }))
        );
    }
}

#[test]
fn a_guest_that_powers_itself_off_ends_both_sides() {
    let Some(world) = World::new() else { return };
    let (primary, standby) = world.protected(Side::A);
    let mut client = Client::connect(&world);
    assert_eq!(client.ask("INCR n"), Ok(Value::Integer(1)));
    client.send(&[b"SHUTDOWN"]).unwrap();
    assert!(client.is_closed(), "the guest closes its connections before it goes");
    assert_followed(primary, standby, "power");
    assert_eq!(world.frames_out(Side::B), 0);
}

#[test]
fn a_guest_that_powers_itself_off_unprotected_ends_too() {
    let Some(world) = World::new() else { return };
    let mut primary = world.run_with(Side::A, &[]);
    let mut client = Client::connect(&world);
    client.send(&[b"SHUTDOWN"]).unwrap();
    assert!(client.is_closed());
    assert_eq!(primary.wait_exit(), 0);
}

#[test]
fn a_planned_stop_ends_both_sides() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let Some(world) = World::new() else { return };
        let (primary, standby) = world.protected(Side::A);
        Client::connect(&world).ask("INCR n").unwrap();
        primary.signal(signal);
        assert_followed(primary, standby, "stop");
    }
}

/// The guest's own death is the same on both hosts: a takeover would only repeat it.
#[test]
fn a_guest_that_panics_ends_both_sides() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let mut client = Client::connect(&world);
    client.send(&[b"DEBUG", b"PANIC"]).unwrap();
    // The primary saw a failure; the standby followed in order.
    for (process, code) in [(&mut primary, 1), (&mut standby, 0)] {
        assert_eq!(process.wait_exit(), code);
        assert!(!process.took_over(), "a dead guest was taken over");
        let said = process.has(|e| matches!(e, Event::Ended { reason, .. } if reason.contains("crash")));
        assert!(said, "no event says that the guest crashed");
    }
    assert!(primary.log().contains("panic"), "the guest's last words are in the log");
}

#[test]
fn a_standby_that_is_stopped_leaves_and_can_be_replaced() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..3 {
        standby.signal(Signal::SIGTERM);
        assert_eq!(standby.wait_exit(), 0);
        assert!(!standby.took_over());
        primary.wait_for("unprotected", |e| matches!(e, Event::Unprotected { .. }));
        witnesses.hear_all();
        standby = world.standby(Side::B);
        primary.wait_protected();
    }
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// After a takeover the stop must reach the VM, not the standby that the process was before.
#[test]
fn a_planned_stop_after_a_takeover_ends_both_sides() {
    let Some(world) = World::new() else { return };
    let (primary, mut active) = world.protected(Side::A);
    primary.kill();
    active.wait_takeover();
    let standby = world.standby(Side::A);
    active.wait_protected();
    active.signal(Signal::SIGTERM);
    for mut process in [active, standby] {
        assert_eq!(process.wait_exit(), 0);
    }
}

/// A standby that is stopped in order hands over its right: the VM continues at once although nobody can ask
/// the arbiter, and the copy that is left starts nowhere.
#[test]
fn an_orderly_stop_of_the_standby_needs_no_arbiter() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let (arbiter, away) = (world.arbiter(), world.dir().join("away"));
    std::fs::rename(&arbiter, &away).unwrap();
    standby.signal(Signal::SIGTERM);
    assert_eq!(standby.wait_exit(), 0, "{}", standby.log());
    active.wait_for(
        "unprotected",
        |e| matches!(e, Event::Unprotected { why } if why.contains("handed its right")),
    );
    witnesses.hear_all();
    assert!(!active.has(|e| matches!(e, Event::Arbitrating { .. })), "{}", active.log());
    std::fs::rename(&away, &arbiter).unwrap();
    // In the same generation the primary finds its next standby.
    let mut standby = world.standby(Side::B);
    let again = active.wait_for("protected", |e| matches!(e, Event::Protected { .. }));
    assert!(matches!(again, Event::Protected { generation: 1, .. }), "{again:?}");
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.finish(&world);
}

/// Trouble of the standby's own is none of the VM's either: the stream comes damaged, or the copy is not the VM. The VM
/// continues at once in its generation, and the copy is made anew, without the arbiter.
#[test]
fn a_worthless_copy_needs_no_arbiter() {
    // Over TLS a record that was changed ends both directions, so that no last word would be heard.
    let Some(world) = World::plain() else { return };
    let proxy = Proxy::start(&world, Side::A);
    let audited = ["--audit", "100", "--dead-after", "2s"];
    let mut standby = world.standby_with(Side::B, &audited);
    let mut active = world.run_with(Side::A, &[&["--standby", &*proxy.addr()], &audited[..]].concat());
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    let (arbiter, away) = (world.arbiter(), world.dir().join("away"));
    std::fs::rename(&arbiter, &away).unwrap();
    let left =
        |words: &'static str| move |e: &Event| matches!(e, Event::Unprotected { why } if why.contains(words));
    proxy.flip(Way::ToStandby, Dice::new().below(1 << 40));
    active.wait_for("without its standby", left("refused what came over the link, and has handed its right"));
    witnesses.hear_all();
    std::fs::rename(&away, &arbiter).unwrap();
    active.wait_protected();

    std::fs::rename(&arbiter, &away).unwrap();
    flip_program_bit(&standby, MEMORY);
    active.wait_for("told of the difference", left("thrown away with its right"));
    witnesses.hear_all();
    std::fs::rename(&away, &arbiter).unwrap();
    let again = active.wait_for("protected", |e| matches!(e, Event::Protected { .. }));
    assert!(matches!(again, Event::Protected { generation: 1, .. }), "{again:?}");
    for host in [&mut active, &mut standby] {
        assert!(!host.has(|e| matches!(e, Event::Arbitrating { .. })), "{}", host.log());
    }
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.finish(&world);
}

/// Over TLS nothing more is said after a record that was changed. The copy is whole, so it goes on where the primary
/// cannot: here it does not reach the arbiter.
#[test]
fn a_record_that_was_changed_is_a_lost_link() {
    let Some(mut world) = World::new() else { return };
    let proxy = Proxy::start(&world, Side::A);
    let mut standby = world.standby(Side::B);
    let mount = world.dir().join("arbiter-of-a");
    std::os::unix::fs::symlink(world.arbiter(), &mount).unwrap();
    world.ask_arbiter(format!("file:{}", mount.display()));
    let mut active = world.run_with(Side::A, &["--standby", &proxy.addr()]);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    std::fs::remove_file(&mount).unwrap();
    proxy.flip(Way::ToStandby, Dice::new().below(1 << 40));
    active.wait_for("asking in vain", |e| matches!(e, Event::ArbiterUnreachable { .. }));
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.hear_all();
    std::os::unix::fs::symlink(world.arbiter(), &mount).unwrap();
    assert_eq!(active.wait_exit(), 3, "{}", active.log());
    witnesses.finish(&world);
}

/// The primary dies before it has heard that the copy of its standby is given up, which is still being written down.
#[test]
fn a_whole_copy_is_not_thrown_away_when_its_primary_is_gone() {
    let Some(world) = World::plain() else { return };
    let behind = world.dir().join("behind");
    std::fs::create_dir(&behind).unwrap();
    for image in [behind.join("image"), world.dir().join("image")] {
        std::fs::File::create(image).unwrap().set_len(1 << 20).unwrap();
    }
    let Some(slow) = Slow::mount(world.dir().join("slow"), &behind) else { return };
    let disk = |place: &Path| format!("path={}", place.join("image").display());
    let proxy = Proxy::start(&world, Side::A);
    let patience = ["--dead-after", "3s"];
    let theirs = disk(slow.path());
    let mut standby = world.standby_with(Side::B, &[&["--disk", &theirs][..], &patience].concat());
    let (there, ours) = (proxy.addr(), disk(world.dir()));
    let mut active =
        world.run_with(Side::A, &[&["--standby", &there, "--disk", &ours][..], &patience].concat());
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 1);
    slow.set(Pace { sync: Duration::from_secs(3600), ..Pace::default() });
    proxy.flip(Way::ToStandby, Dice::new().below(1 << 40));
    wait_until("it is being written down", || slow.waiting() > 0);
    active.kill();
    // It would be given up if it were written down now.
    let killed = Instant::now();
    while !standby.has(|e| matches!(e, Event::LinkLost { .. })) && killed.elapsed() < Duration::from_secs(1) {
        thread::sleep(Duration::from_millis(10));
    }
    slow.set(Pace::default());
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.hear_all();
    witnesses.finish(&world);
}
