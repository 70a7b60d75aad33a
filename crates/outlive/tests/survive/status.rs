//! `outlive status`: what whoever looks is told, while hosts come and go.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use outlive::events::{Event, Role};
use outlive::status::{HeatRange, Status};

use crate::support::{PROGRAM, Process, Readers, Side, Witnesses, World, wait_until};

/// What `outlive status` of a socket says, and its exit code.
fn look(socket: &Path) -> (i32, Option<Status>) {
    let mut command = Command::new(PROGRAM);
    let output = command.args(["status", "--json", "--socket"]).arg(socket).output().unwrap();
    let code = output.status.code().unwrap();
    if code == 2 {
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.lines().count() == 1 && said.contains("--status"), "{said}");
        return (code, None);
    }
    let [status] = serde_json::from_slice::<[Status; 1]>(&output.stdout).unwrap();
    assert_eq!(code, i32::from(!status.protected), "{status}");
    (code, Some(status))
}

pub(crate) fn status(socket: &Path) -> Status {
    look(socket).1.expect("somebody answers")
}

/// Waits until it says so; log, events and status may be behind each other.
fn wait_status(socket: &Path, what: &str, holds: impl Fn(&Status) -> bool) -> Status {
    wait_until(what, || holds(&status(socket)));
    status(socket)
}

fn socket(world: &World, side: Side) -> PathBuf {
    world.dir().join(format!("{}.sock", side.letter()))
}

fn with_status(world: &World, side: Side, start: impl FnOnce(&[&str]) -> Process) -> Process {
    let (other, socket) = (side.other().addr().to_string(), socket(world, side));
    start(&["--standby", &other, "--status", socket.to_str().unwrap()])
}

#[test]
fn whoever_looks_sees_whether_the_vm_is_protected() {
    let Some(world) = World::new() else { return };
    let (a, b) = (socket(&world, Side::A), socket(&world, Side::B));
    assert_eq!(look(&a).0, 2, "nobody is there");
    let mut primary = with_status(&world, Side::A, |options| world.run_with(Side::A, options));
    wait_until("the socket", || a.exists());
    let alone = wait_status(&a, "a standby that is missed", |it| {
        it.why.as_ref().is_some_and(|why| why.contains("no standby can be reached"))
    });
    assert_eq!((alone.vm.as_deref(), alone.role, alone.peer), (Some("vm"), Role::Primary, None));
    assert!(!alone.loss_of_this_host.survived);

    let standby = with_status(&world, Side::B, |options| world.standby_with(Side::B, options));
    primary.wait_protected();
    let there = wait_status(&a, "a protected primary", |it| it.protected);
    assert_eq!((there.generation, there.peer), (Some(1), Some(Side::B.addr().to_string())));
    assert!(there.checkpoint.is_some() && there.in_flight.is_some() && there.why.is_none());
    assert!(there.loss_of_this_host.survived && there.loss_of_other_host.survived);
    let written =
        |it: &Status| it.heat.as_ref().is_some_and(|it| it.pages_per_s.iter().any(|rate| *rate > 0));
    let there = wait_status(&a, "where memory is written", written);
    let map = there.heat.unwrap();
    let cells = |it: &HeatRange| it.bytes.div_ceil(map.cell_bytes) as usize;
    assert_eq!(map.ranges.iter().map(cells).sum::<usize>(), map.pages_per_s.len(), "{map:?}");
    wait_status(&a, "a probe of the arbiter", |it| it.arbiter.as_ref().is_some_and(|it| it.seen.is_some()));
    let here = wait_status(&b, "a standby that protects", |it| it.protected);
    assert_eq!((here.vm.as_deref(), here.role, here.generation), (Some("vm"), Role::Standby, Some(1)));
    assert!(here.heat.is_none(), "a standby writes what it gets");
    assert!(here.peer.unwrap().starts_with(&Side::A.link_ip().to_string()));
    let first = here.checkpoint.expect("a base");
    wait_status(&b, "the next checkpoints", |it| it.checkpoint > Some(first + 10));

    standby.kill();
    let alone = wait_status(&a, "a primary that has lost its standby", |it| it.generation == Some(2));
    assert!(alone.why.as_ref().unwrap().starts_with("the standby was lost: "), "{alone}");
    assert!(!alone.protected && !alone.loss_of_this_host.survived);
    assert_eq!(look(&b).0, 2, "its socket is left, and nobody answers there");

    let mut standby = with_status(&world, Side::B, |options| world.standby_with(Side::B, options));
    primary.wait_protected();
    wait_status(&b, "protection again", |it| it.protected);
    // Another process does not take its place.
    let mut third = world.standby_with_failure(Side::A, &["--status", b.to_str().unwrap()]);
    assert_eq!(third.wait_exit(), 2);
    third.wait_says("another process listens at", 1);
    primary.kill();
    let generation = standby.wait_takeover();
    let took_over = wait_status(&b, "the new primary", |it| it.role == Role::Primary);
    assert_eq!((took_over.generation, took_over.protected), (Some(generation), false));
    assert!(took_over.why.as_ref().unwrap().starts_with("this host took the VM over"), "{took_over}");
    standby.signal(Signal::SIGTERM);
    assert_eq!(standby.wait_exit(), 0);
    assert!(!b.exists(), "the socket goes with its process");
}

#[test]
fn clients_that_never_read_disturb_nothing() {
    let Some(world) = World::new() else { return };
    let mut standby = with_status(&world, Side::B, |options| world.standby_with(Side::B, options));
    let mut primary = with_status(&world, Side::A, |options| world.run_with(Side::A, options));
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    let sockets = Side::BOTH.map(|side| socket(&world, side));
    let silent: Vec<_> = (0..200).map(|number| UnixStream::connect(&sockets[number % 2]).unwrap()).collect();
    witnesses.hear_all();
    for path in &sockets {
        wait_status(path, "an answer all the same", |it| it.protected);
    }
    for process in [&mut primary, &mut standby] {
        assert!(!process.has(|e| matches!(e, Event::LinkLost { .. })));
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap().count();
        assert!(descriptors < 100, "it keeps {descriptors} descriptors for clients");
    }
    drop(silent);
    witnesses.finish(&world);
}

/// An operator who looks at the standby learns why it protects nothing.
#[test]
fn a_standby_says_that_it_has_refused_a_primary() {
    let Some(world) = World::new() else { return };
    let there = Side::A.addr().to_string();
    let standby = world.standby_with(Side::B, &["--standby", &there, "--vm", "another"]);
    let before = status(standby.socket()).why.unwrap();
    assert_eq!(before, "no primary has come yet");
    let _primary = world.run(Side::A);
    let told = wait_status(standby.socket(), "a refusal", |it| {
        it.why.as_ref().is_some_and(|why| why.contains("this standby is kept for VM another"))
    });
    let why = told.why.unwrap();
    assert!(why.starts_with("no primary has been accepted yet; a primary was refused: "), "{why}");
}

#[test]
fn a_standby_that_is_its_own_is_refused() {
    let Some(world) = World::new() else { return };
    let own = Side::B.addr().to_string();
    for listen in [own.as_str(), "0.0.0.0:7000"] {
        let command = ["standby", "--listen", listen];
        let mut process = world.start_for(Side::B, &command, &["--standby", &own], &[], Readers::default());
        assert_eq!(process.wait_exit(), 2);
        process.wait_says("is this host itself", 1);
    }
}
