//! A standby that records its VM: every checkpoint can be had again, and nothing waits for the recorder.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use outlive::events::Event;
use outlive_epoch::{Checkpoint, DiskOp, Layout, PageData};
use outlive_record::{At, PlayError, Playback, Record};

use crate::support::{Process, Side, Small, WRITTEN, World, wait_until, writer_kernel};

const PAGE: usize = 4096;

/// The VM at a checkpoint, as it is played.
struct Played {
    layout: Layout,
    memory: Vec<u8>,
    disk: Vec<u8>,
}

impl Played {
    fn new(record: &Record, checkpoint: u64) -> Self {
        let found = record.find(&At::Checkpoint { run: None, number: checkpoint }).unwrap();
        let mut playback = record.play(&found).unwrap();
        let mut played = Self::of_base(&playback);
        playback
            .each::<PlayError>(|incoming| {
                played.apply(&incoming.checkpoint().unwrap());
                Ok(())
            })
            .unwrap();
        played
    }

    fn of_base(playback: &Playback) -> Self {
        let layout = playback.hello().layout.clone();
        let (mut memory, mut disk) = (vec![0; layout.pages() as usize * PAGE], vec![0; WRITTEN as usize]);
        playback.memory().read_exact_at(&mut memory, 0).unwrap();
        playback.disk(0).unwrap().read_exact_at(&mut disk, 0).unwrap();
        Self { layout, memory, disk }
    }

    fn apply(&mut self, checkpoint: &Checkpoint<'_>) {
        for (gfn, page) in checkpoint.pages() {
            let at = self.layout.index(gfn).unwrap() as usize * PAGE;
            let to = &mut self.memory[at..at + PAGE];
            match page {
                PageData::Zero => to.fill(0),
                PageData::Raw(bytes) => to.copy_from_slice(bytes),
                PageData::Granules(granules) => {
                    granules
                        .iter()
                        .for_each(|(place, bytes)| to[place..place + bytes.len()].copy_from_slice(bytes));
                }
            }
        }
        for record in checkpoint.disk_writes().iter() {
            if let DiskOp::Data(bytes) = record.op {
                self.disk[record.offset as usize..record.end() as usize].copy_from_slice(bytes);
            }
        }
    }

    fn word(&self, address: usize) -> u64 {
        let at = self.layout.index((address / PAGE) as u64).unwrap() as usize * PAGE + address % PAGE;
        u64::from_le_bytes(self.memory[at..at + 8].try_into().unwrap())
    }

    /// Which request the guest has prepared last, by its memory; and whether the disk has all before it, and perhaps that
    /// one, and no other.
    fn requests(&self) -> u64 {
        let last = self.word(0x200_4000);
        let (mut random, mut disk) = (0x9e37_79b9_u64, vec![0; WRITTEN as usize]);
        for count in 1..4_000_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = (random as usize & 0x3ff8) * 512;
            if random == last && self.disk == disk {
                return count;
            }
            disk[at..at + PAGE].fill(0);
            disk[at..at + 8].copy_from_slice(&random.to_le_bytes());
            disk[at + PAGE - 8..at + PAGE].copy_from_slice(&random.to_le_bytes());
            if random == last {
                assert!(
                    self.disk == disk,
                    "the disk is not of the moment of which memory is, request {count}"
                );
                return count;
            }
        }
        panic!("memory has no number that the guest makes: {last:#x}");
    }
}

/// Two hosts; the second one records in `record`.
struct Recording {
    world: World,
    record: PathBuf,
    primary: Process,
    standby: Process,
}

impl Recording {
    fn start(world: World, record: &Path, keep: &str) -> Self {
        fs::write(world.dir().join("writer"), writer_kernel()).unwrap();
        for side in [Side::A, Side::B] {
            fs::File::create(world.image(side)).unwrap().set_len(WRITTEN).unwrap();
        }
        let disk = |side| format!("path={}", world.image(side).display());
        let option = format!("{}{keep}", record.display());
        let standby = world.standby_with(Side::B, &["--disk", &disk(Side::B), "--record", &option]);
        let there = Side::B.addr().to_string();
        let kernel = world.dir().join("writer").display().to_string();
        let options = ["--standby", &there, "--disk", &disk(Side::A), "--kernel", &kernel];
        let mut primary = world.run_with(Side::A, &options);
        primary.wait_protected();
        Self { world, record: record.to_owned(), primary, standby }
    }

    fn wait_whole(&mut self) -> u64 {
        let whole = self.standby.wait_for("a base", |e| matches!(e, Event::RecordWhole { .. }));
        let Event::RecordWhole { from, .. } = whole else { unreachable!() };
        from
    }

    fn wait_written(&self, side: Side) {
        let read = || fs::read(self.world.image(side)).unwrap();
        let before = read();
        wait_until("the guest writes to its disk", || read() != before);
    }

    /// What `outlive metrics` says of the standby.
    fn scraped(&self) -> String {
        let mut command = Command::new(self.world.program(Side::B));
        let output = command.args(["metrics", "--socket"]).arg(self.standby.socket()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What `outlive history` prints.
    fn history(&self, more: &[&str]) -> String {
        let mut command = Command::new(self.world.program(Side::B));
        let output = command.arg("history").args(more).arg(&self.record).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn a_vm_can_be_had_again_as_it_was_at_each_checkpoint() {
    let Some(world) = World::new() else { return };
    let record = world.dir().join("record");
    let mut pair = Recording::start(world, &record, ",keep=1h");
    let from = pair.wait_whole();
    let status = crate::status::status(pair.standby.socket());
    let recorded = status.record.expect("it records");
    assert!(recorded.first == Some(from) && recorded.run == Some(1) && recorded.bytes > 0, "{recorded:?}");
    std::thread::sleep(Duration::from_secs(2));
    pair.wait_written(Side::B);
    let scraped = pair.scraped();
    let told =
        |name: &str| scraped.lines().find_map(|it| it.strip_prefix(name)?.rsplit(' ').next()?.parse().ok());
    let reach: f64 = told("outlive_record_reach_seconds{").expect("a gauge");
    let bytes: f64 = told("outlive_record_size_bytes{").expect("a gauge");
    assert!((1.9..60.0).contains(&reach), "{reach}");
    // The kernel of the guest, what it writes, and its disk.
    assert!((1e5..1e9).contains(&bytes), "{bytes}");
    assert_eq!((told("outlive_record_active{"), told("outlive_record_gaps_total{")), (Some(1.0), Some(0.0)));
    let shown: serde_json::Value = serde_json::from_str(&pair.history(&["--json"])).unwrap();
    assert_eq!((shown[0]["first"].as_u64(), shown[0]["ended"].is_null()), (Some(from), true), "{shown}");
    // While it is written, too.
    let living = Record::open(&pair.record).unwrap();
    Played::new(&living, living.find(&At::Newest).unwrap().checkpoint).requests();

    let Recording { world, primary, standby, .. } = pair;
    primary.kill();
    let mut standby = standby;
    standby.wait_takeover();
    let taken = standby.events().find_map(|event| match event {
        Event::Takeover { checkpoint, .. } => Some(*checkpoint),
        _ => None,
    });
    let says = |words: &str| {
        let output = Command::new(world.program(Side::B)).arg("history").arg(&record).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains(words)
    };
    wait_until("history says why the run has ended", || says("then: the VM was taken over by this host"));
    let record = Record::open(&record).unwrap();
    let last = record.find(&At::Newest).unwrap().checkpoint;
    assert_eq!(Some(last), taken, "the last checkpoint of the record is the one from which the VM went on");
    let mut before = 0;
    for step in 0..8 {
        let number = from + (last - from) * step / 7;
        let requests = Played::new(&record, number).requests();
        assert!(
            requests >= before,
            "checkpoint {number} has {requests} requests, one before it had {before}"
        );
        before = requests;
    }
    assert!(before > Played::new(&record, from).requests(), "the guest went on");
}

#[test]
fn a_record_whose_directory_is_full_is_a_gap_and_costs_no_protection() {
    let Some(world) = World::new() else { return };
    let small = Small::mount(world.dir().join("small"), 16);
    let record = small.path().join("record");
    let mut pair = Recording::start(world, &record, ",keep=1h");
    pair.wait_whole();
    small.fill();
    let gap = pair.standby.wait_for("a gap", |e| matches!(e, Event::RecordGap { .. }));
    let Event::RecordGap { why, .. } = gap else { unreachable!() };
    assert!(why.contains("No space left"), "{why}");
    pair.standby.wait_says("A GAP IN THE RECORD", 1);
    pair.wait_written(Side::B);
    assert!(!pair.primary.has(|e| matches!(e, Event::Unprotected { .. })), "{}", pair.primary.log());
    small.make_room();
    let again = |e: &Event| matches!(e, Event::RecordWhole { run, .. } if *run > 1);
    pair.standby.wait_for("another run", again);
    let living = Record::open(&pair.record).unwrap();
    assert_eq!(living.runs().len(), 2, "what was recorded before is good");
    for run in living.runs() {
        Played::new(&living, run.last().unwrap().checkpoint).requests();
    }
    drop(pair);
    drop(small);
}

/// A file system that can be made to hang.
struct Frozen {
    place: PathBuf,
}

impl Frozen {
    fn mount(world: &World) -> Option<Self> {
        let (image, place) = (world.dir().join("ext4"), world.dir().join("frozen"));
        fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
        fs::create_dir(&place).unwrap();
        let does = |program: &str, words: &[&str]| {
            let done = Command::new(program).args(words).arg(&image).status();
            done.is_ok_and(|it| it.success())
        };
        let mounted = does("mkfs.ext4", &["-q", "-F"])
            && Command::new("mount")
                .args(["-o", "loop"])
                .args([&image, &place])
                .status()
                .is_ok_and(|it| it.success());
        mounted.then_some(Self { place })
    }

    fn freeze(&self, freeze: bool) {
        let option = if freeze { "-f" } else { "-u" };
        assert!(Command::new("fsfreeze").arg(option).arg(&self.place).status().unwrap().success());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        Command::new("fsfreeze").arg("-u").arg(&self.place).stderr(std::process::Stdio::null()).status().ok();
        Command::new("umount").arg("-l").arg(&self.place).status().ok();
    }
}

#[test]
fn a_record_on_a_disk_that_hangs_delays_neither_commits_nor_a_takeover() {
    let Some(world) = World::new() else { return };
    let Some(disk) = Frozen::mount(&world) else {
        return eprintln!("skipped: no ext4 file system can be made and mounted here");
    };
    let record = disk.place.join("record");
    let mut pair = Recording::start(world, &record, ",keep=1h");
    pair.wait_whole();
    disk.freeze(true);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(500));
        pair.wait_written(Side::B);
    }
    assert!(!pair.primary.has(|e| matches!(e, Event::Unprotected { .. })), "{}", pair.primary.log());
    let Recording { world, primary, mut standby, .. } = pair;
    primary.kill();
    standby.wait_takeover();
    let read = || fs::read(world.image(Side::B)).unwrap();
    let before = read();
    wait_until("the VM runs on", || read() != before);
    disk.freeze(false);
    let record = || Record::open(&record).ok().filter(|it| it.runs()[0].ended().is_some());
    wait_until("the run is brought to its end", || record().is_some());
    let record = record().unwrap();
    Played::new(&record, record.find(&At::Newest).unwrap().checkpoint).requests();
    drop(standby);
}

#[test]
fn two_standbys_do_not_record_in_one_place() {
    let Some(world) = World::new() else { return };
    let record = world.dir().join("record").display().to_string();
    let _first = world.standby_with(Side::A, &["--record", &record]);
    let mut second = world.standby_with_failure(Side::B, &["--record", &record]);
    assert_eq!(second.wait_exit(), 2);
    assert!(second.log().contains("another standby records in"), "{}", second.log());
    let mut third = world.standby_with_failure(Side::B, &["--record", "/nope/record"]);
    assert_eq!(third.wait_exit(), 2);
    assert!(third.log().contains("cannot record in /nope/record"), "{}", third.log());
}
