//! A host that has lost the VM to another one is the VM's standby again, in the same process.

use std::fs::{self, File};
use std::time::Duration;

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::support::{Dice, Process, Side, WRITTEN, Witnesses, World, wait_until, writer_kernel};

/// Both hosts, the one on `side` with the VM. Neither ends when it loses the VM.
fn staying(world: &World, side: Side) -> (Process, Process) {
    let (here, there) = (side.addr().to_string(), side.other().addr().to_string());
    let standby = world.staying_standby_with(side.other(), &["--standby", &here]);
    let mut primary = world.run_with(side, &["--standby", &there, "--listen", &here]);
    primary.wait_protected();
    (primary, standby)
}

fn wait_back(loser: &mut Process, generation: u64, winner: u32) {
    let back = loser.wait_for("back", |e| matches!(e, Event::BackToStandby { .. }));
    let Event::BackToStandby { why } = back else { unreachable!("the filter above") };
    let names =
        why.contains(&format!("generation {generation} ")) && why.contains(&format!("process {winner})"));
    assert!(names, "neither generation {generation} nor process {winner}: {why}");
    loser.wait_for("listening again", |e| matches!(e, Event::Listening { .. }));
    loser.wait_says(&format!("{why}; this process waits as its standby now"), 1);
}

#[test]
fn a_primary_that_lost_the_vm_protects_it_again_in_the_same_process() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut side = Side::A;
    let (mut active, mut standby) = staying(&world, side);
    let pids = [active.pid(), standby.pid()];
    let witnesses = Witnesses::start(&world, 4);
    // Each process is in each role at least once more than at its start.
    for _ in 0..4 {
        dice.sleep_below(Duration::from_millis(200));
        active.signal(Signal::SIGSTOP);
        let generation = standby.wait_takeover();
        witnesses.hear_all();
        let before = world.settled_frames_out(side);
        active.signal(Signal::SIGCONT);
        wait_back(&mut active, generation, standby.pid());
        standby.wait_protected();
        assert_eq!(world.settled_frames_out(side), before, "the old primary let frames out");
        witnesses.hear_all();
        (active, standby) = (standby, active);
        side = side.other();
    }
    assert_eq!([active.pid(), standby.pid()], pids);
    // It is a real standby.
    active.kill();
    standby.wait_takeover();
    witnesses.finish(&world);
}

#[test]
fn whoever_loses_when_the_link_is_cut_comes_back_when_it_is_mended() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = staying(&world, Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..3 {
        let times =
            |it: &mut Process| it.events().filter(|e| matches!(e, Event::BackToStandby { .. })).count();
        let before = [times(&mut active), times(&mut standby)];
        world.cut_link();
        wait_until("one side has given up", || [times(&mut active), times(&mut standby)] != before);
        witnesses.hear_all();
        if times(&mut active) > before[0] {
            (active, standby) = (standby, active);
        }
        assert!(!active.ended() && !standby.ended());
        world.mend_link();
        active.wait_protected();
        witnesses.hear_all();
    }
    // A stop is a stop, also for a host that came back.
    standby.signal(Signal::SIGTERM);
    assert_eq!(standby.wait_exit(), 0);
    active.wait_for("unprotected", |e| matches!(e, Event::Unprotected { .. }));
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn an_address_that_is_taken_is_refused_before_the_vm_starts() {
    let Some(world) = World::new() else { return };
    let here = Side::A.addr().to_string();
    let taken = world.on(Side::A, || std::net::TcpListener::bind(Side::A.addr())).unwrap();
    let mut refused = world.run_with(Side::A, &["--listen", &here]);
    assert_eq!(refused.wait_exit(), 2);
    assert!(refused.log().contains("give --listen a free address of this host"), "{}", refused.log());
    drop(taken);
    assert!(!refused.has(|e| matches!(e, Event::Started { .. })));
    // A process that is its own standby.
    let mut refused = world.run_with(Side::A, &["--listen", &here, "--standby", &here]);
    assert_eq!(refused.wait_exit(), 2);
    assert!(refused.log().contains("is this host itself"), "{}", refused.log());
}

const SIZE: u64 = 96 << 20;

/// Both hosts with a disk without holes and a guest that writes to it all the time.
pub(crate) fn writing(world: &World, options: &[&str]) -> (Process, Process) {
    let writer = world.dir().join("writer");
    fs::write(&writer, writer_kernel()).unwrap();
    let server: Vec<u8> = (0..SIZE).step_by(4).flat_map(|at| (at as u32 | 1).to_le_bytes()).collect();
    fs::write(world.image(Side::A), server).unwrap();
    File::create(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    let disks = Side::BOTH.map(|side| format!("path={}", world.image(side).display()));
    let (here, there) = (Side::A.addr().to_string(), Side::B.addr().to_string());
    let waits = ["--standby", &here, "--disk", &disks[1]];
    let standby = world.staying_standby_with(Side::B, &[&waits, options].concat());
    let kernel = writer.to_str().unwrap();
    let runs = ["--kernel", kernel, "--disk", &disks[0], "--standby", &there, "--listen", &here];
    let mut primary = world.run_with(Side::A, &[&runs, options].concat());
    primary.wait_protected();
    (primary, standby)
}

/// Bytes of its disk that a primary has read to compare them, in its last synchronisation.
fn compared(process: &mut Process) -> u64 {
    let read = process.events().filter_map(|e| match e {
        Event::DiskSync { read_bytes, .. } => Some(*read_bytes),
        _ => None,
    });
    read.last().expect("a synchronisation")
}

/// Neither host reads the whole disk again when a host that has lost the VM comes back, and the images are equal
/// in the end, although the old primary has written on after its last commit.
#[test]
fn a_host_that_comes_back_is_synchronised_with_what_was_written_since() {
    let Some(world) = World::new() else { return };
    // The guest is deaf to its power button.
    let (mut active, mut standby) = writing(&world, &["--stop-within", "500ms"]);
    assert!(compared(&mut active) >= SIZE);
    for _ in 0..3 {
        // Writes are under way whenever this comes.
        active.signal(Signal::SIGSTOP);
        standby.wait_takeover();
        std::thread::sleep(Duration::from_millis(300));
        active.signal(Signal::SIGCONT);
        standby.wait_protected();
        let read = compared(&mut standby);
        assert!(read <= WRITTEN + (4 << 20), "{read} bytes of {SIZE} were read again");
        (active, standby) = (standby, active);
    }
    active.signal(Signal::SIGTERM);
    assert_eq!((active.wait_exit(), standby.wait_exit()), (0, 0));
    let images = Side::BOTH.map(|side| fs::read(world.image(side)).unwrap());
    // The guest was stopped, so the one write that it had under way may be on the primary's disk alone.
    let blocks = images[0].chunks(4096).zip(images[1].chunks(4096)).enumerate();
    let differ: Vec<usize> = blocks.filter(|(_, (a, b))| a != b).map(|(block, _)| block).collect();
    assert!(differ.len() <= 1, "the images differ in blocks {differ:?}");
}

/// The same, with all memory and both disks compared all the time.
#[test]
fn a_host_that_comes_back_has_the_vms_disks() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = writing(&world, &["--self-check", "20"]);
    let checks = |it: &mut Process| it.events().filter(|e| matches!(e, Event::SelfCheck { .. })).count();
    for _ in 0..2 {
        active.signal(Signal::SIGSTOP);
        standby.wait_takeover();
        active.signal(Signal::SIGCONT);
        standby.wait_protected();
        (active, standby) = (standby, active);
        let before = checks(&mut standby);
        wait_until("the hosts were compared", || checks(&mut standby) > before + 1);
    }
    for host in [&mut active, &mut standby] {
        assert!(!host.has(|e| matches!(e, Event::SelfCheck { difference: Some(_), .. })), "{}", host.log());
        assert!(!host.ended());
    }
}
