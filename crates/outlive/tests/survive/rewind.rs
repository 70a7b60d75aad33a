//! A VM that is rewound: memory and disks as they were at one moment, as a VM of its own.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use outlive::events::Event;
use outlive_record::{At, Record};

use crate::support::{Habits, Process, Side, Small, WRITTEN, World, wait_until, writer_with};

/// Room behind what is written: a discard may reach beyond that.
const SIZE: u64 = 2 * WRITTEN;

/// Two hosts; the second one has recorded the VM of the first one, which compares both hosts now and then.
struct Recorded {
    world: World,
    record: PathBuf,
    primary: Process,
    standby: Process,
    /// The first checkpoint that can be had.
    from: u64,
}

impl Recorded {
    fn start(world: World) -> Self {
        let habits = Habits { discards: true, ..Habits::default() };
        fs::write(world.dir().join("writer"), writer_with(habits)).unwrap();
        for side in [Side::A, Side::B] {
            fs::File::create(world.image(side)).unwrap().set_len(SIZE).unwrap();
        }
        let (record, disk) =
            (world.dir().join("record"), |side| format!("path={}", world.image(side).display()));
        let keep = format!("{},keep=1h", record.display());
        let check = ["--self-check", "50"];
        let standby = world
            .standby_with(Side::B, &[&["--disk", &disk(Side::B), "--record", &keep][..], &check].concat());
        let (there, kernel) = (Side::B.addr().to_string(), world.dir().join("writer").display().to_string());
        let options =
            ["--standby", &there, "--disk", &disk(Side::A), "--kernel", &kernel, "--name", "writer"];
        let mut primary = world.run_with(Side::A, &[&options[..], &check].concat());
        primary.wait_protected();
        let mut standby = standby;
        let whole = standby.wait_for("a base", |e| matches!(e, Event::RecordWhole { .. }));
        let Event::RecordWhole { from, .. } = whole else { unreachable!() };
        Self { world, record, primary, standby, from }
    }

    /// Waits for so many comparisons behind the record's base. Returns their checkpoints.
    fn compared(&mut self, times: usize) -> Vec<u64> {
        let from = self.from;
        let mut found = Vec::new();
        wait_until("self-checks", || {
            let of_disks = |e: &Event| match *e {
                Event::SelfCheck { checkpoint, difference: None, .. } if checkpoint > from => {
                    Some(checkpoint)
                }
                _ => None,
            };
            found = self.standby.events().filter_map(of_disks).collect();
            found.dedup();
            found.len() >= times
        });
        found
    }

    fn rewind(&self, options: &[&str]) -> Process {
        let record = self.record.display().to_string();
        self.world.start_rewind(Side::B, &[&[record.as_str()], options].concat())
    }

    /// Runs the command to its end, which is soon.
    fn ends(&self, options: &[&str]) -> Output {
        let mut command = Command::new(self.world.program(Side::B));
        command.arg("rewind").arg(&self.record).args(options).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn refuses(&self, options: &[&str], why: &str) {
        let output = self.ends(options);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(why), "{options:?}: {output:?}");
        let last = said.lines().filter(|line| line.starts_with("outlive: ")).count();
        assert_eq!(last, 1, "one line says why: {said}");
    }
}

/// What a disk has in each block of 4 KiB, by its first word.
fn blocks(image: &Path) -> Vec<u64> {
    let word = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
    fs::read(image).unwrap().chunks(4096).map(word).collect()
}

/// After how many requests of the guest its disk has exactly this.
fn requests(disk: &[u64]) -> Option<u32> {
    let (mut random, mut have) = (0x9e37_79b9_u64, vec![0; disk.len()]);
    let mut differ = disk.iter().filter(|word| **word != 0).count();
    let mut put = |at: usize, word: u64, differ: &mut usize| {
        *differ -= usize::from(have[at] != disk[at]);
        have[at] = word;
        *differ += usize::from(have[at] != disk[at]);
    };
    for count in 0..4_000_000_u32 {
        if differ == 0 {
            return Some(count);
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = (random as usize & 0x3ff8) / 8;
        if count % 4 == 0 {
            (at..(at + 8).min(disk.len())).for_each(|at| put(at, 0, &mut differ));
        } else {
            put(at, random, &mut differ);
        }
    }
    None
}

/// A VM of which one moment is known to be right: the record has the primary's hashes of memory and disks there.
fn rewinds_exactly(recorded: &Recorded, checkpoint: u64, into: &Path) -> (Process, u32) {
    let place = into.display().to_string();
    let mut process = recorded.rewind(&["--to", &checkpoint.to_string(), "--into", &place]);
    let rewound = process.wait_for("the VM", |e| matches!(e, Event::Rewound { .. }));
    assert!(matches!(rewound, Event::Rewound { checkpoint: its, .. } if its == checkpoint), "{rewound:?}");
    process.wait_says("self-check: memory and disks are the VM's as they were", 1);
    let image = into.join("disk-0.raw");
    let before = blocks(&image);
    wait_until("the guest goes on", || blocks(&image) != before);
    let before = blocks(&image);
    wait_until("the guest goes on and on", || blocks(&image) != before);
    stop(&mut process);
    let made = requests(&blocks(&image)).expect("the disk has what the guest has written, and nothing else");
    (process, made)
}

fn stop(process: &mut Process) {
    process.signal(nix::sys::signal::Signal::SIGTERM);
    // Two of the same kind at once would be one.
    process.wait_says("asked the guest to shut down", 1);
    process.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(process.wait_exit(), 0, "{}", process.log());
}

#[test]
fn a_vm_is_rewound_to_each_moment_exactly() {
    let Some(world) = World::new() else { return };
    let mut recorded = Recorded::start(world);
    let compared = recorded.compared(6);
    let dir = recorded.world.dir().to_owned();
    let mut made = Vec::new();
    // The VM runs on, and its standby records.
    for (number, checkpoint) in [compared[1], compared[5], compared[3]].into_iter().enumerate() {
        let (_, requests) = rewinds_exactly(&recorded, checkpoint, &dir.join(format!("vm{number}")));
        made.push((checkpoint, requests));
    }
    assert!(!recorded.primary.has(|e| matches!(e, Event::Unprotected { .. })), "{}", recorded.primary.log());

    // By time, the same checkpoint; and the newest, when nothing follows.
    let living = Record::open(&recorded.record).unwrap();
    let found = living.find(&At::Checkpoint { run: None, number: compared[2] }).unwrap();
    let time = humantime::format_rfc3339_micros(found.time).to_string();
    let mut by_time = recorded.rewind(&["--to", &time, "--into", &dir.join("time").display().to_string()]);
    let rewound = by_time.wait_for("the VM", |e| matches!(e, Event::Rewound { .. }));
    assert!(matches!(rewound, Event::Rewound { checkpoint, .. } if checkpoint == compared[2]), "{rewound:?}");
    by_time.wait_says("self-check: memory and disks are the VM's", 1);
    stop(&mut by_time);

    let id = |image: &Path| sidecar(image)["vm"].clone();
    let old = id(&recorded.world.image(Side::A));
    let new: Vec<_> = (0..3).map(|number| id(&dir.join(format!("vm{number}/disk-0.raw")))).collect();
    assert!(new.iter().all(|id| *id != old) && new[0] != new[1], "{old} {new:?}");
    let Recorded { primary, mut standby, .. } = recorded;
    primary.kill();
    standby.wait_takeover();
}

/// The lines of an image's sidecar about the image itself.
fn sidecar(image: &Path) -> HashMap<String, String> {
    let text = fs::read_to_string(format!("{}.outlive", image.display())).unwrap();
    let lines =
        text.lines().take_while(|line| !line.starts_with('[')).filter_map(|line| line.split_once(" = "));
    lines.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn a_rewound_vm_is_another_one_that_touches_nothing_of_the_old_one() {
    let Some(world) = World::new() else { return };
    let mut recorded = Recorded::start(world);
    let checkpoint = recorded.compared(2)[1];
    let dir = recorded.world.dir().to_owned();
    let into = dir.join("vm");
    let frames = recorded.world.settled_frames_out(Side::B);
    let (process, _) = rewinds_exactly(&recorded, checkpoint, &into);
    assert!(process.log().contains("REWOUND: this is VM writer ("), "{}", process.log());
    assert_eq!(recorded.world.settled_frames_out(Side::B), frames, "it is connected to nothing");
    drop(process);
    let show = |image: &Path| {
        let output =
            Command::new(recorded.world.program(Side::B)).args(["image", "show"]).arg(image).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let shown = show(&into.join("disk-0.raw"));
    assert!(shown.contains("writer-rewound"), "{shown}");
    let mut names: Vec<_> =
        fs::read_dir(&into).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["disk-0.raw", "disk-0.raw.outlive"]);
    // It starts again from its disk, as itself, and now with an arbiter.
    let id = sidecar(&into.join("disk-0.raw"))["vm"].clone();
    let disk = format!("path={}", into.join("disk-0.raw").display());
    let kernel = dir.join("writer").display().to_string();
    let mut cold =
        recorded.world.run_with(Side::B, &["--disk", &disk, "--kernel", &kernel, "--net", "tap=cold0"]);
    cold.wait_for("a start", |e| matches!(e, Event::Started { .. }));
    stop(&mut cold);
    assert_eq!(sidecar(&into.join("disk-0.raw"))["vm"], id);
    let living = Record::open(&recorded.record).unwrap();
    assert_eq!(living.runs().len(), 1, "the recorder has gone on without a gap");
    assert!(!recorded.primary.has(|e| matches!(e, Event::Unprotected { .. })), "{}", recorded.primary.log());
}

#[test]
fn what_cannot_be_rewound_is_refused_and_leaves_nothing() {
    let Some(world) = World::new() else { return };
    let mut recorded = Recorded::start(world);
    let checkpoint = recorded.compared(1)[0].to_string();
    let dir = recorded.world.dir().to_owned();
    let into = dir.join("vm");
    let place = into.display().to_string();
    recorded.refuses(&["--to", "999999999", "--into", &place], "the record has no such moment");
    recorded.refuses(&["--to", "-9d", "--into", &place], "shows what can be had");
    recorded.refuses(&["--to", "77/1", "--into", &place], "the record has no such moment");
    let full = dir.join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "").unwrap();
    recorded.refuses(&["--to", "newest", "--into", &full.display().to_string()], "is not empty");
    let small = Small::mount(dir.join("small"), 1);
    let on_small = small.path().join("vm");
    recorded.refuses(&["--to", &checkpoint, "--into", &on_small.display().to_string()], "No space left");
    assert!(!on_small.exists());
    recorded.refuses(&["--to", &checkpoint, "--into", &place, "--console", "/proc/x"], "--console");
    assert!(!into.exists(), "{:?}", fs::read_dir(&into).unwrap().collect::<Vec<_>>());
    let output = recorded.ends(&["--to", &checkpoint, "--dry-run"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains(&format!("as of checkpoint {checkpoint}, ")), "{said}");
    assert!(said.contains("64 MiB of memory, disks of 16 MiB: it can run here"), "{said}");
}
