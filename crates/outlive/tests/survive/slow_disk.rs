//! A guest that writes faster than the disk of its standby can. The guest is slowed, and the VM stays protected.

use std::fs::{self, File};
use std::io::Write as _;
use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::support::{Habits, PATIENCE, Pace, Process, Side, Slow, World, wait_until, writer_with};

/// Bytes of an image, all of them with blocks.
const SIZE: usize = 24 << 20;
/// Of the standby's disk, in bytes a second; less where the guest is slow itself. Everything is written twice, to the
/// journal and to the image.
const RATE: u64 = 20_000_000;
/// The disk carries so many times less than the guest writes, and everything twice.
const OF_THE_GUEST: u64 = 4;
/// So far a guest of this speed may be ahead of an image on a disk of this rate: what it writes until the disk is known as
/// slow, what the disk takes in the two seconds that a write may wait for it, and the checkpoints in flight.
fn most_ahead(guest: u64, rate: u64) -> u64 {
    guest / 2 + 2 * rate + (48 << 20)
}

/// Shorter than what the disk has to do all the time, and longer than the turn of a thread takes on a busy machine.
const DEAD_AFTER: &str = "2s";

/// Two hosts whose images are behind FUSE servers, which count what is written. That of the standby can have a rate.
struct Hosts {
    active: Process,
    standby: Process,
    images: [Slow; 2],
    world: World,
}

impl Hosts {
    /// A protected guest that writes to its disk all the time. `None`, after saying why, where that is not possible.
    fn new() -> Option<Hosts> {
        let world = World::new()?;
        let habits = Habits { large: Some(256 << 10), ..Habits::default() };
        fs::write(world.dir().join("writer"), writer_with(habits)).unwrap();
        let mount = |side: Side| {
            let behind = world.dir().join(format!("behind-{}", side.letter()));
            fs::create_dir(&behind).unwrap();
            File::create(behind.join("image")).unwrap().write_all(&vec![0xa5; SIZE]).unwrap();
            Slow::mount(world.dir().join(format!("disk-{}", side.letter())), &behind)
        };
        let images = [mount(Side::A)?, mount(Side::B)?];
        let image = |side: Side| images[side as usize].path().join("image").display().to_string();
        let (here, theirs) =
            (format!("path={}", image(Side::A)), format!("path={},overwrite", image(Side::B)));
        let (there, kernel) = (Side::B.addr().to_string(), world.dir().join("writer").display().to_string());
        let standby = world.standby_with(Side::B, &["--disk", &theirs, "--dead-after", DEAD_AFTER]);
        let options = ["--standby", &there, "--disk", &here, "--kernel", &kernel, "--dead-after", DEAD_AFTER];
        let mut active = world.run_with(Side::A, &options);
        active.wait_protected();
        Some(Hosts { active, standby, images, world })
    }

    /// Bytes that were written to the image of a host so far.
    fn written(&self, side: Side) -> u64 {
        self.images[side as usize].written("image")
    }

    fn set_rate(&self, rate: Option<u64>) {
        self.images[Side::B as usize].set(Pace { rate, ..Pace::default() });
    }

    fn assert_linked(&mut self) {
        for process in [&mut self.active, &mut self.standby] {
            let lost = process.has(|e| matches!(e, Event::LinkLost { .. } | Event::Unprotected { .. }));
            assert!(!lost, "the protection is lost\n{}", process.log());
        }
    }
}

/// The guest writes as much as the standby's disk would take in so many seconds, then its host dies.
fn a_slow_disk_slows_the_guest(seconds: u64) {
    let Some(mut hosts) = Hosts::new() else { return };
    let (before, began) = (hosts.written(Side::A), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let guest = ((hosts.written(Side::A) - before) as f64 / began.elapsed().as_secs_f64()) as u64;
    let rate = RATE.min(guest / OF_THE_GUEST).max(1);
    let (bytes, most) = (rate * seconds, most_ahead(guest, rate));
    println!("the guest writes {guest} bytes a second, its standby's disk carries {rate}");
    hosts.set_rate(Some(rate));
    let from = Side::BOTH.map(|side| hosts.written(side));
    let (began, mut backlog, mut last) = (Instant::now(), 0, (0, Instant::now()));
    let slow = |e: &Event| matches!(e, Event::StandbySlow { .. });
    loop {
        let [ours, theirs] = Side::BOTH.map(|side| hosts.written(side) - from[side as usize]);
        backlog = backlog.max(ours.saturating_sub(theirs));
        assert!(backlog <= most, "the guest is {backlog} bytes ahead of its standby's disk");
        hosts.assert_linked();
        // Whoever is behind for long is told of, at some moment.
        if ours >= bytes && hosts.active.has(slow) {
            break;
        }
        assert!(ours < 4 * bytes + most, "nobody is told\n{}", hosts.active.log());
        if ours > last.0 {
            last = (ours, Instant::now());
        }
        assert!(last.1.elapsed() < PATIENCE, "the guest does not write\n{}", hosts.standby.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{bytes} bytes in {:?}, at most {backlog} ahead of the standby's disk", began.elapsed());

    // What the takeover waits for was waiting when its primary died.
    let before = hosts.written(Side::B);
    let Hosts { active, mut standby, images, world } = hosts;
    active.kill();
    let taken = standby.wait_for("the new primary", |e| matches!(e, Event::Takeover { .. }));
    let Event::Takeover { settle_us, .. } = taken else { unreachable!("the filter above") };
    let settled = images[1].written("image") - before;
    println!("{settled} bytes were written to the image in the takeover, which settled for {settle_us} us");
    assert!(settled <= most, "the takeover has waited for {settled} bytes");
    images[1].set(Pace::default());
    let after = images[1].written("image");
    wait_until("the guest writes again", || images[1].written("image") > after);
    drop((standby, images, world));
}

/// A tenth of what the test below does: 200 MB at 20 MB/s where the guest is fast enough.
#[test]
fn a_guest_that_writes_faster_than_its_standbys_disk_stays_protected() {
    a_slow_disk_slows_the_guest(10);
}

#[test]
#[ignore = "takes some minutes: 2 GB at 20 MB/s"]
fn a_guest_that_writes_two_gigabytes_to_a_slow_standby_stays_protected() {
    a_slow_disk_slows_the_guest(100);
}
