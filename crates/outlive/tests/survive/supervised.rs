//! Both hosts are started with the same command, by hand or by a service manager, at any time and in any order:
//! the VM runs exactly once, from its newest image.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::support::{Client, Held, PROGRAM, Process, Side, Witnesses, World, wait_until, writer_kernel};

const SIZE: u64 = 16 << 20;

/// A server's image on host a, and an empty one on host b.
fn install(world: &World) {
    for side in Side::BOTH {
        File::create(world.image(side)).unwrap().set_len(SIZE).unwrap();
    }
    let server = world.image(Side::A);
    File::options().write(true).open(&server).unwrap().write_all_at(b"the server", 1 << 20).unwrap();
}

fn accept(world: &World, side: Side) {
    let accepted = Command::new(PROGRAM).args(["image", "accept", "--yes"]).arg(world.image(side)).output();
    assert!(accepted.unwrap().status.success());
}

/// The command of a host, which is the same for both.
fn start_with(world: &World, side: Side, options: &[&str]) -> Process {
    let (here, there) = (side.addr().to_string(), side.other().addr().to_string());
    let disk = format!("path={}", world.image(side).display());
    let usual = ["--or-standby", "--listen", &here, "--standby", &there, "--disk", &disk];
    world.run_with(side, &[&usual, options].concat())
}

fn start(world: &World, side: Side) -> Process {
    start_with(world, side, &[])
}

/// Both hosts, started with the same command: the VM runs on host a, and host b has all of it.
fn protected(world: &World) -> (Process, Process) {
    install(world);
    accept(world, Side::A);
    let (b, mut a) = (start(world, Side::B), start(world, Side::A));
    a.wait_protected();
    (a, b)
}

/// Waits until the process says that it does not start the VM. Returns why.
fn wait_waits(process: &mut Process) -> String {
    match process.wait_for("a standby", |e| matches!(e, Event::Decided { starts: false, .. })) {
        Event::Decided { why, .. } => why,
        _ => unreachable!("the filter above"),
    }
}

fn wait_runs(process: &mut Process) {
    process.wait_for("a primary", |e| matches!(e, Event::Started { vm: Some(_), .. }));
}

fn sidecar(world: &World, side: Side) -> PathBuf {
    let mut sidecar = world.image(side).into_os_string();
    sidecar.push(".outlive");
    sidecar.into()
}

/// The standby's image is durable a little later than the base is committed.
fn wait_whole(world: &World, side: Side) {
    wait_until("the copy is whole", || {
        fs::read_to_string(sidecar(world, side))
            .is_ok_and(|it| it.contains("whole = true") && it.contains("replica"))
    });
}

/// Both hosts lose their power at once: the standby, on host b, does nothing more after the primary's end.
fn power_cut(world: &World, primary: Process, standby: Process) {
    wait_whole(world, Side::B);
    standby.signal(Signal::SIGSTOP);
    primary.kill();
    standby.kill();
}

/// The first start: nobody knows what an image with data is, until an operator has said so.
#[test]
fn an_image_that_nobody_knows_starts_nothing_by_itself() {
    let Some(world) = World::new() else { return };
    install(&world);
    let mut a = start(&world, Side::A);
    assert_eq!(a.wait_exit(), 2);
    let said = a.log();
    assert!(said.contains("belongs to no VM") && said.contains("outlive image accept --yes"), "{said}");
    let mut b = start(&world, Side::B);
    assert!(wait_waits(&mut b).contains("is empty"));
    accept(&world, Side::A);
    let mut a = start(&world, Side::A);
    a.wait_protected();
    assert_eq!(fs::read(world.image(Side::A)).unwrap(), fs::read(world.image(Side::B)).unwrap());
}

/// The power of both hosts fails, again and again, and they come back in either order.
#[test]
fn after_a_power_cut_of_both_hosts_the_vm_runs_once_from_the_newest_image() {
    let Some(world) = World::new() else { return };
    install(&world);
    accept(&world, Side::A);
    let writer = world.dir().join("writer");
    fs::write(&writer, writer_kernel()).unwrap();
    let kernel = ["--kernel", writer.to_str().unwrap()];
    // A guest that writes to its disk all the time.
    let (b, mut a) = (start_with(&world, Side::B, &kernel), start_with(&world, Side::A, &kernel));
    a.wait_protected();
    std::thread::sleep(Duration::from_millis(500));
    power_cut(&world, a, b);
    // The kernel finishes what a killed process has given it.
    std::thread::sleep(Duration::from_millis(300));
    let newest = fs::read(world.image(Side::A)).unwrap();

    // From here on a guest that leaves its disk alone. Host b has a copy and comes first: it waits.
    let mut b = start(&world, Side::B);
    let why = wait_waits(&mut b);
    assert!(why.contains("a standby's copy") && why.contains("--accept-replica"), "{why}");
    let mut a = start(&world, Side::A);
    a.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    assert_eq!(world.frames_out(Side::B), 0, "two VMs");
    for side in Side::BOTH {
        assert!(fs::read(world.image(side)).unwrap() == newest, "{side:?} has lost what was written");
    }
    witnesses.finish(&world);

    // Host b takes over, and both lose their power once more. Now host a has the old image, and comes first.
    a.kill();
    assert!(b.wait_takeover() > 2);
    b.kill();
    let mut a = start(&world, Side::A);
    let why = wait_waits(&mut a);
    assert!(why.contains("is out of date") && !why.contains("--accept"), "{why}");
    let said = |line: &&str| line.contains("does not start the VM and waits as its standby");
    let log = a.log();
    let line = log.lines().find(said).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("INFO"), "nothing is wrong: {line}");
    let before = world.settled_frames_out(Side::A);
    let mut b = start(&world, Side::B);
    b.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    assert_eq!(world.settled_frames_out(Side::A), before, "two VMs");
    assert!(fs::read(world.image(Side::B)).unwrap() == newest);
    // It is a real standby.
    b.kill();
    a.wait_takeover();
    witnesses.finish(&world);
}

/// The host on which the VM ran stays away: its standby's copy is not started by itself, and says what to do.
#[test]
fn a_copy_waits_for_the_host_that_stays_away_until_an_operator_gives_it_up() {
    let Some(world) = World::new() else { return };
    let (a, b) = protected(&world);
    power_cut(&world, a, b);
    let mut b = start(&world, Side::B);
    wait_waits(&mut b);
    // Longer than a host waits that would start the VM.
    std::thread::sleep(Duration::from_secs(5));
    assert!(!b.has(|e| matches!(e, Event::Started { vm: Some(_), .. } | Event::Takeover { .. })));
    assert_eq!(world.frames_out(Side::B), 0);
    b.wait_says("this host does not start the VM and waits as its standby", 1);
    b.kill();
    let (there, disk) = (Side::A.addr().to_string(), format!("path={}", world.image(Side::B).display()));
    let mut b = world.run_with(Side::B, &["--standby", &there, "--disk", &disk, "--accept-replica"]);
    wait_runs(&mut b);
    // The other host comes back after all.
    let mut a = start(&world, Side::A);
    assert!(wait_waits(&mut a).contains("is out of date"));
    b.wait_protected();
}

/// A service manager that starts a killed primary again at once must not boot the VM anew in front of a standby
/// that has all of it.
#[test]
fn a_primary_that_is_started_again_at_once_leaves_the_vm_to_its_standby() {
    let Some(world) = World::new() else { return };
    let (mut a, mut b) = protected(&world);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..2 {
        a.kill();
        a = start(&world, Side::A);
        b.wait_takeover();
        wait_waits(&mut a);
        b.wait_protected();
        witnesses.hear_all();
        b.kill();
        b = start(&world, Side::B);
        a.wait_takeover();
        wait_waits(&mut b);
        a.wait_protected();
        witnesses.hear_all();
    }
    witnesses.finish(&world);
}

fn crash_guest(world: &World, mut host: Process) {
    let mut client = Client::connect(world);
    client.send(&[b"DEBUG", b"PANIC"]).unwrap();
    assert_eq!(host.wait_exit(), 1);
}

/// The guest crashes, and then its host stays away, too.
#[test]
fn a_crashed_guest_is_started_again_by_its_host_or_else_by_the_other_one() {
    let Some(world) = World::new() else { return };
    let (a, mut b) = protected(&world);
    crash_guest(&world, a);
    let mut a = start(&world, Side::A);
    a.wait_protected();
    b.wait_says("its host comes first", 1);
    crash_guest(&world, a);
    assert_eq!(b.wait_exit(), 1, "it waits for a host that does not come back");
    assert!(b.log().contains("its host has not started it again"), "{}", b.log());
    // What a service manager does.
    wait_runs(&mut start(&world, Side::B));
}

/// The standby is so slow that it has not noticed the loss of its primary when that is started again.
#[test]
fn a_primary_that_is_started_again_leaves_the_vm_to_a_standby_that_is_slow() {
    let Some(world) = World::new() else { return };
    let (a, mut b) = protected(&world);
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    b.signal(Signal::SIGSTOP);
    a.kill();
    let mut a = start(&world, Side::A);
    a.wait_says("may be taking it over and does not say", 1);
    // Longer than a takeover usually takes.
    std::thread::sleep(Duration::from_secs(5));
    assert!(
        !a.has(|e| matches!(e, Event::Started { vm: Some(_), .. })),
        "it boots what its standby has whole"
    );
    b.signal(Signal::SIGCONT);
    b.wait_takeover();
    wait_waits(&mut a);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// A guest that is deaf to its power button is stopped in time, and the standby does not take it over.
#[test]
fn a_stop_has_a_time_limit() {
    let Some(world) = World::new() else { return };
    let writer = world.dir().join("writer");
    fs::write(&writer, writer_kernel()).unwrap();
    File::create(world.image(Side::A)).unwrap().set_len(SIZE).unwrap();
    File::create(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    let disk = |side| format!("path={}", world.image(side).display());
    let mut b = world.standby_with(Side::B, &["--disk", &disk(Side::B)]);
    let there = Side::B.addr().to_string();
    let kernel = writer.to_str().unwrap();
    let options =
        ["--standby", &there, "--kernel", kernel, "--disk", &disk(Side::A), "--stop-within", "700ms"];
    let mut a = world.run_with(Side::A, &options);
    a.wait_protected();
    a.signal(Signal::SIGTERM);
    assert_eq!((a.wait_exit(), b.wait_exit()), (0, 0));
    a.wait_says("asked the guest to shut down", 1);
    a.wait_says("the guest has not shut down within 0.7 s (--stop-within): stopping the VM", 1);
    assert!(!b.took_over());
}

/// A closed terminal is no order to anybody.
#[test]
fn a_closed_terminal_ends_nothing() {
    let Some(world) = World::new() else { return };
    let (mut a, mut b) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for host in [&a, &b] {
        host.signal(Signal::SIGHUP);
        host.wait_says("the terminal was closed (SIGHUP)", 1);
    }
    witnesses.hear_all();
    assert!(!a.ended() && !b.ended() && !b.took_over() && !a.has(|e| matches!(e, Event::LinkLost { .. })));
    witnesses.finish(&world);
}

/// The host waits for its peer, which does not come. Meanwhile it answers, and nobody takes its place.
#[test]
fn a_host_that_waits_before_it_starts_the_vm_can_be_asked_and_is_alone() {
    let Some(world) = World::new() else { return };
    let (standby, active) = protected(&world);
    power_cut(&world, active, standby);
    let socket = world.dir().join("asked").display().to_string();
    let mut waiting = start_with(&world, Side::A, &["--status", &socket]);
    wait_until("it says what it waits for", || {
        let said = Command::new(PROGRAM).args(["status", "--socket", &socket]).output().unwrap();
        String::from_utf8_lossy(&said.stdout).contains("this host starts the VM in")
    });
    let mut second = start(&world, Side::A);
    assert_eq!(second.wait_exit(), 2);
    assert!(!second.log().contains("starts the VM in"), "it waits for a place that is taken");
    assert!(second.log().contains("in use"), "{}", second.log());
    assert!(!waiting.ended());
}

/// Somebody else grasps at the image all the time, from the first question to the VM that runs: at no moment is it free.
#[test]
fn nobody_gets_the_image_between_the_decision_and_the_vm() {
    let Some(world) = World::new() else { return };
    let (standby, active) = protected(&world);
    power_cut(&world, active, standby);
    let mut waiting = start(&world, Side::A);
    waiting.wait_says("this host starts the VM in", 1);
    let (image, ended) = (world.image(Side::A), AtomicBool::new(false));
    let tries = std::thread::scope(|scope| {
        let grasping = scope.spawn(|| {
            let mut tries = 0;
            while !ended.load(Ordering::Relaxed) {
                let got = File::open(&image).unwrap().try_lock();
                assert!(matches!(got, Err(TryLockError::WouldBlock)), "it was free: {got:?}");
                tries += 1;
                std::thread::sleep(Duration::from_micros(100));
            }
            tries
        });
        wait_runs(&mut waiting);
        ended.store(true, Ordering::Relaxed);
        grasping.join().unwrap()
    });
    assert!(tries > 100, "{tries}");
}

/// An operator ends it meanwhile: nothing has begun, so nothing is asked of a guest.
#[test]
fn a_host_that_waits_before_it_starts_the_vm_can_be_told_to_stop() {
    let Some(world) = World::new() else { return };
    let (standby, active) = protected(&world);
    power_cut(&world, active, standby);
    let before = fs::read_to_string(sidecar(&world, Side::A)).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut waiting = start(&world, Side::A);
        waiting.wait_says("this host starts the VM in", 1);
        waiting.signal(signal);
        assert_eq!(waiting.wait_exit(), 0, "{}", waiting.log());
        assert!(waiting.log().contains("told to stop while it was not decided"), "{}", waiting.log());
    }
    assert_eq!(fs::read_to_string(sidecar(&world, Side::A)).unwrap(), before);
}

/// Between the decision of a host to start the VM and its claim another host wins it. The slow one has a standby's
/// work to do, and its service manager none.
#[test]
fn a_host_that_loses_its_claim_waits_as_the_standby() {
    let Some(world) = World::new() else { return };
    let (a, b) = protected(&world);
    power_cut(&world, a, b);
    let mut b = start(&world, Side::B);
    wait_waits(&mut b);
    let mut a = start(&world, Side::A);
    a.wait_says("this host starts the VM in", 1);
    // It makes its machine after the decision and before the claim.
    let held = Held::first(&a);
    held.wait_until_it_opens("/dev/kvm");
    b.kill();
    let (there, disk) = (Side::A.addr().to_string(), format!("path={}", world.image(Side::B).display()));
    let mut b = world.run_with(Side::B, &["--standby", &there, "--disk", &disk, "--accept-replica"]);
    wait_runs(&mut b);
    drop(held);
    assert!(wait_waits(&mut a).contains("is out of date"));
    a.wait_says("looking again which host starts the VM", 1);
    b.wait_protected();
    assert!(!a.has(|e| matches!(e, Event::Started { vm: Some(_), .. })));
}
