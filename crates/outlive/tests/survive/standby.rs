//! A standby whose own host causes trouble: slow, stuck, or without room. It costs the guest speed, or the
//! standby is not accepted; it does not cost the protection, and never the VM.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use outlive::events::{Event, SettlePart};

use crate::status::status;
use crate::support::{
    Held, MemoryLoad, Process, Side, Small, WRITTEN, Witnesses, World, wait_until, writer_kernel,
};

const SIZE: u64 = 48 << 20;
/// Far longer than either host waits for a sign of life (350 and 500 ms).
const LONG: Duration = Duration::from_secs(4);

fn links_lost(process: &mut Process) -> usize {
    process.events().filter(|e| matches!(e, Event::LinkLost { .. })).count()
}

/// The standby's applier is stuck: it writes no memory for seconds. Clients wait; the hosts hear each other
/// all the time.
#[test]
fn an_apply_that_takes_long_costs_time_and_not_the_protection() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let load = MemoryLoad::start(&world, 2000, 20_000);
    for _ in 0..2 {
        witnesses.hear_all();
        let stopped = Held::thread(&standby, "applier");
        std::thread::sleep(LONG);
        let waiting = witnesses.acked();
        std::thread::sleep(LONG / 4);
        assert_eq!(witnesses.acked(), waiting, "nothing is committed, so nothing may be answered");
        drop(stopped);
        witnesses.hear_all();
    }
    assert_eq!((links_lost(&mut active), links_lost(&mut standby)), (0, 0));
    load.finish(&world);
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// If a primary dies while its standby is busy, the standby still takes over, from the last commit.
#[test]
fn a_primary_that_dies_during_a_long_apply_is_succeeded() {
    let Some(world) = World::new() else { return };
    let (active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let stopped = Held::thread(&standby, "applier");
    std::thread::sleep(LONG / 4);
    active.kill();
    std::thread::sleep(LONG / 4);
    assert!(!standby.took_over(), "what is acknowledged is not applied yet");
    drop(stopped);
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Two hosts with an image each, and a guest that writes to its image all the time. The standby's image is
/// where the test says.
struct Writing {
    world: World,
    theirs: PathBuf,
}

impl Writing {
    fn new(world: World, theirs: &Path) -> Self {
        fs::write(world.dir().join("writer"), writer_kernel()).unwrap();
        let writing = Self { world, theirs: theirs.join("b.img") };
        // Without holes, so that the images already have all the room that they will ever need.
        let content = vec![0xa5; SIZE as usize];
        for side in [Side::A, Side::B] {
            fs::write(writing.image(side), &content).unwrap();
        }
        writing
    }

    fn image(&self, side: Side) -> PathBuf {
        match side {
            Side::A => self.world.dir().join("a.img"),
            Side::B => self.theirs.clone(),
        }
    }

    fn standby(&self) -> Process {
        let disk = format!("path={},overwrite", self.image(Side::B).display());
        self.world.standby_with(Side::B, &["--disk", &disk])
    }

    fn staying_standby(&self) -> Process {
        let disk = format!("path={},overwrite", self.image(Side::B).display());
        // The audit would find what a test does to the image.
        self.world.staying_standby_with(Side::B, &["--disk", &disk, "--audit", "off"])
    }

    fn run(&self) -> Process {
        let there = Side::B.addr().to_string();
        let disk = format!("path={}", self.image(Side::A).display());
        let kernel = self.world.dir().join("writer").display().to_string();
        self.world.run_with(Side::A, &["--standby", &there, "--disk", &disk, "--kernel", &kernel])
    }

    /// The guest's disk contents, as a host has them.
    fn written(&self, side: Side) -> Vec<u8> {
        let mut bytes = vec![0; WRITTEN as usize];
        File::open(self.image(side)).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn wait_written(&self, side: Side) {
        let before = self.written(side);
        wait_until("the guest writes to its disk", || self.written(side) != before);
    }
}

/// A disk that does not answer at all for seconds.
#[test]
fn a_disk_that_stands_still_costs_time_and_not_the_protection() {
    let Some(world) = World::new() else { return };
    let directory = world.dir().to_path_buf();
    let writing = Writing::new(world, &directory);
    let mut standby = writing.standby();
    let mut active = writing.run();
    active.wait_protected();
    writing.wait_written(Side::B);
    let stopped = Held::thread(&standby, "disks");
    // Writes may wait for the disk for two seconds; after that the standby acknowledges nothing more, and the
    // primary takes no checkpoint.
    std::thread::sleep(LONG);
    let before = checkpoints(&mut active);
    std::thread::sleep(LONG);
    assert_eq!(checkpoints(&mut active), before, "the backlog is bounded in time");
    let slow = |e: &Event| matches!(e, Event::StandbySlow { behind_ms: 1000.., .. });
    assert_eq!(active.events().filter(|e| slow(e)).count(), 1, "{}", active.log());
    drop(stopped);
    active.wait_for("told that the standby is back", |e| matches!(e, Event::StandbyCaughtUp { .. }));
    wait_until("checkpoints go on", || checkpoints(&mut active) > before + 10);
    writing.wait_written(Side::B);
    assert_eq!((links_lost(&mut active), links_lost(&mut standby)), (0, 0));
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    writing.wait_written(Side::B);
}

/// The disk of a standby hangs, and the primary dies. The takeover waits, because the guest may need what the disk has
/// not taken yet, and whoever looks can see why.
#[test]
fn a_takeover_that_waits_for_a_disk_says_so_until_it_comes() {
    let Some(world) = World::new() else { return };
    let directory = world.dir().to_path_buf();
    let writing = Writing::new(world, &directory);
    let mut standby = writing.standby();
    let mut active = writing.run();
    active.wait_protected();
    writing.wait_written(Side::B);
    let stopped = Held::thread(&standby, "disks");
    active.kill();
    let mut waited = 0;
    for _ in 0..2 {
        let event = standby.wait_for("a takeover that waits", |e| matches!(e, Event::SettleSlow { .. }));
        let Event::SettleSlow { part: SettlePart::Disk, for_ms, hangs_ms } = event else {
            panic!("{event:?}")
        };
        assert!(for_ms > waited && hangs_ms > 0, "{event:?}");
        waited = for_ms;
    }
    standby.wait_says("TAKEOVER WAITS: the copy is ready in memory, its disk has not finished", 2);
    let seen = status(standby.socket());
    let why = seen.why.as_ref().unwrap();
    assert!(
        why.starts_with("the primary was lost: ") && why.contains("its disk has not finished for"),
        "{seen}"
    );
    assert!(!standby.took_over());
    drop(stopped);
    let taken = standby.wait_for("the new primary", |e| matches!(e, Event::Takeover { .. }));
    let Event::Takeover { settle_us, .. } = taken else { unreachable!("the filter above") };
    assert!(settle_us >= waited * 1000, "it has waited for {waited} ms: {taken:?}");
    writing.wait_written(Side::B);
}

/// Committed so far, by the last report.
fn checkpoints(active: &mut Process) -> u64 {
    let last = active.events().filter_map(|e| match e {
        Event::Stats(stats) => Some(stats.checkpoints),
        _ => None,
    });
    last.last().unwrap_or(0)
}

fn sidecar(image: &Path) -> String {
    let mut path = image.as_os_str().to_owned();
    path.push(".outlive");
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn a_full_file_system_beside_the_standbys_image_stops_no_takeover() {
    let Some(world) = World::new() else { return };
    let small = Small::mount(world.dir().join("small"), 120);
    let writing = Writing::new(world, small.path());
    let mut standby = writing.standby();
    let mut active = writing.run();
    active.wait_protected();
    wait_until("the base is whole", || sidecar(&writing.image(Side::B)).contains("whole = true"));
    writing.wait_written(Side::B);
    small.fill();
    writing.wait_written(Side::B);
    assert_eq!(links_lost(&mut active), 0);
    active.kill();
    let began = Instant::now();
    assert_eq!(standby.wait_takeover(), 2);
    assert!(began.elapsed() < Duration::from_secs(15));
    writing.wait_written(Side::B);
    let stale = sidecar(&writing.image(Side::B));
    assert!(stale.contains("generation = 1") && stale.contains(r#"role = "replica""#), "{stale}");
    assert!(standby.log().contains("cannot write"), "{}", standby.log());
    small.make_room();
    wait_until("the sidecar is written later", || {
        let sidecar = sidecar(&writing.image(Side::B));
        sidecar.contains("generation = 2") && sidecar.contains(r#"role = "primary""#)
    });
    assert!(!standby.ended());
    drop(small);
}

#[test]
fn a_standby_without_room_for_its_journal_is_not_accepted() {
    let Some(world) = World::new() else { return };
    let small = Small::mount(world.dir().join("small"), 100);
    let writing = Writing::new(world, small.path());
    let standby = writing.standby();
    let mut active = writing.run();
    let line = "cannot set 64 MiB aside for the journal";
    wait_until("the primary is told", || active.log().contains(line));
    wait_until("the standby says so", || standby.log().contains(line));
    assert!(!active.has(|e| matches!(e, Event::Protected { .. })));
    assert!(sidecar(&writing.image(Side::B)).is_empty(), "nothing was written to its image");
    assert!(!standby.log().contains("OVERWRITTEN"), "{}", standby.log());
    drop(standby);
    drop(small);
}

/// A sparse image takes no room until it is filled, so the standby asks for all of it before the base comes.
#[test]
fn a_standby_without_room_for_its_image_is_not_accepted() {
    let Some(world) = World::new() else { return };
    // The journal takes 64 of them.
    let small = Small::mount(world.dir().join("small"), 70);
    let writing = Writing::new(world, small.path());
    for side in [Side::A, Side::B] {
        let image = writing.image(side);
        fs::remove_file(&image).unwrap();
        File::create(image).unwrap().set_len(16 << 20).unwrap();
    }
    let standby = writing.standby();
    let mut active = writing.run();
    let line = "still need 16 MiB for the holes that they have";
    wait_until("the primary is told", || active.log().contains(line));
    wait_until("the standby says so", || standby.log().contains(line));
    assert!(!active.has(|e| matches!(e, Event::BaseProgress { .. } | Event::Protected { .. })));
    assert!(sidecar(&writing.image(Side::B)).is_empty(), "nothing was written to its image");
    drop(standby);
    // An operator answers for the room.
    let disk = format!("path={},thin,overwrite", writing.image(Side::B).display());
    let standby = writing.world.staying_standby_with(Side::B, &["--disk", &disk]);
    active.wait_for("it is accepted", |e| matches!(e, Event::StandbyAttached { .. }));
    drop(standby);
    drop(small);
}

/// Others fill the file system after the standby was accepted: its copy is lost, and the process stays.
#[test]
fn a_standby_whose_file_system_fills_up_waits_for_room_at_its_post() {
    let Some(world) = World::new() else { return };
    let small = Small::mount(world.dir().join("small"), 120);
    let writing = Writing::new(world, small.path());
    let mut standby = writing.staying_standby();
    let mut active = writing.run();
    active.wait_protected();
    let stopped = Held::thread(&standby, "disks");
    let image = OpenOptions::new().write(true).open(writing.image(Side::B)).unwrap();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&image, hole, 0, SIZE as i64).unwrap();
    small.fill();
    drop(stopped);
    standby.wait_for(
        "back at its post",
        |e| matches!(e, Event::BackToStandby { why } if why.contains("No space")),
    );
    assert!(!standby.ended());
    small.make_room();
    active.wait_protected();
    drop(small);
}
