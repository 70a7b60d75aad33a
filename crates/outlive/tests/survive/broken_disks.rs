//! The disk of the VM's host fails or hangs, while everything else on that host works. A standby takes the VM
//! over before the guest hears of it; without one, the guest hears.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};
use outlive::events::{Event, Part};

use crate::hand_over::hand_over;
use crate::support::{Process, Side, Small, WRITTEN, World, wait_until, writer_kernel};

const SIZE: u64 = 24 << 20;

/// Two hosts with an image each. The guest writes to its image all the time; it crashes, and restarts, when a
/// write fails.
struct Writing {
    world: World,
    images: [PathBuf; 2],
    /// What the primary's disk has more.
    shared: &'static str,
}

impl Writing {
    /// The images, without blocks, are in these directories.
    fn new(world: World, places: [&Path; 2]) -> Self {
        fs::write(world.dir().join("writer"), writer_kernel()).unwrap();
        let images = [places[0].join("a.img"), places[1].join("b.img")];
        for image in &images {
            File::create(image).unwrap().set_len(SIZE).unwrap();
        }
        Self { world, images, shared: "" }
    }

    fn disk(&self, side: Side) -> String {
        format!("path={}", self.images[side as usize].display())
    }

    fn standby(&self, side: Side) -> Process {
        let there = side.other().addr().to_string();
        let options = ["--disk", &self.disk(side), "--standby", &there, "--disk-timeout", "1s"];
        // What `fill` does to an image would be found.
        self.world.standby_with(side, &[&options[..], &["--audit", "off"]].concat())
    }

    fn run(&self, side: Side) -> Process {
        let there = side.other().addr().to_string();
        let kernel = self.world.dir().join("writer").display().to_string();
        let (disk, timeout) = (self.disk(side) + self.shared, ["--disk-timeout", "1s"]);
        let options = ["--disk", &disk, "--standby", &there, "--kernel", &kernel];
        self.world.run_with(side, &[&options[..], &timeout].concat())
    }

    /// Fills the file system of a host's image up. Most of the image has no blocks then, so that writes fail
    /// from now on.
    fn fill(&self, side: Side, small: &Small) {
        let image = File::options().write(true).open(&self.images[side as usize]).unwrap();
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&image, hole, 0, SIZE as i64).unwrap();
        small.fill();
    }

    fn wait_written(&self, side: Side) {
        let written = || {
            let mut bytes = vec![0; WRITTEN as usize];
            File::open(&self.images[side as usize]).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let before = written();
        wait_until("the guest writes to its disk", || written() != before);
    }
}

fn restarted(process: &mut Process) -> bool {
    process.has(|e| matches!(e, Event::GuestRestarted { .. }))
}

fn left_because_of(process: &mut Process, words: &str) -> bool {
    process
        .has(|e| matches!(e, Event::HostFault { part: Part::Disk, why, kept: None } if why.contains(words)))
}

#[test]
fn a_host_whose_disk_is_full_leaves_the_vm_to_its_standby_before_the_guest_hears() {
    let Some(world) = World::new() else { return };
    let (small, there) = (Small::mount(world.dir().join("small"), 16), world.dir().to_path_buf());
    let writing = Writing::new(world, [small.path(), &there]);
    let mut standby = writing.standby(Side::B);
    let mut active = writing.run(Side::A);
    active.wait_protected();
    writing.fill(Side::A, &small);
    assert_eq!(standby.wait_takeover(), 2);
    assert_eq!(active.wait_exit(), 1);
    assert!(left_because_of(&mut active, "No space left"), "{}", active.log());
    assert!(active.log().contains("leaving it to its standby"), "{}", active.log());
    writing.wait_written(Side::B);
    assert!(!restarted(&mut active) && !restarted(&mut standby), "the guest has heard of the error");
    drop(small);
}

#[test]
fn without_a_standby_the_guest_hears_of_its_disks_error() {
    let Some(world) = World::new() else { return };
    let (small, there) = (Small::mount(world.dir().join("small"), 16), world.dir().to_path_buf());
    let writing = Writing::new(world, [small.path(), &there]);
    let mut active = writing.run(Side::A);
    writing.wait_written(Side::A);
    writing.fill(Side::A, &small);
    wait_until("the guest hears of it", || restarted(&mut active));
    let kept = |e: &Event| matches!(e, Event::HostFault { part: Part::Disk, kept: Some(why), .. } if why.contains("no standby"));
    assert!(active.has(kept), "{}", active.log());
    assert!(!active.ended());
    small.make_room();
    writing.wait_written(Side::A);
    drop(small);
}

/// A file system whose writers can be made to wait for as long as the test likes.
struct Frozen {
    place: PathBuf,
}

impl Frozen {
    /// `None`, after saying why, where this cannot be made.
    fn mount(world: &World) -> Option<Self> {
        let (file, place) = (world.dir().join("fs"), world.dir().join("mounted"));
        File::create(&file).unwrap().set_len(96 << 20).unwrap();
        fs::create_dir(&place).unwrap();
        let frozen = Self { place };
        let made = command("mkfs.ext4", &["-q", "-F", "-m", "0", file.to_str().unwrap()])
            && command("mount", &["-o", "loop", file.to_str().unwrap(), frozen.place.to_str().unwrap()])
            && frozen.freeze(true)
            && frozen.freeze(false);
        if !made {
            println!("skipped: no file system that can be frozen");
        }
        made.then_some(frozen)
    }

    fn freeze(&self, freeze: bool) -> bool {
        command("fsfreeze", &[if freeze { "-f" } else { "-u" }, self.place.to_str().unwrap()])
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.freeze(false);
        command("umount", &["-l", self.place.to_str().unwrap()]);
    }
}

fn command(program: &str, words: &[&str]) -> bool {
    Command::new(program).args(words).output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_host_whose_disk_does_not_answer_leaves_the_vm_to_its_standby() {
    let Some(world) = World::new() else { return };
    let Some(frozen) = Frozen::mount(&world) else { return };
    let there = world.dir().to_path_buf();
    let writing = Writing::new(world, [&frozen.place, &there]);
    let mut standby = writing.standby(Side::B);
    let mut active = writing.run(Side::A);
    active.wait_protected();
    writing.wait_written(Side::A);
    // Nobody can wait for a process whose disk does not answer.
    let thaws = Thaws(&frozen);
    assert!(frozen.freeze(true));
    // The old process cannot even end: it waits in the kernel for its disk.
    assert_eq!(standby.wait_takeover(), 2);
    writing.wait_written(Side::B);
    assert!(!restarted(&mut standby));
    assert!(left_because_of(&mut active, "has not answered a request for 1 s"), "{}", active.log());
    drop(thaws);
    assert_eq!(active.wait_exit(), 1);
    drop(frozen);
}

/// A write that hangs could land after what another host would write.
#[test]
fn a_shared_disk_that_does_not_answer_moves_nothing_and_is_told_of() {
    let Some(world) = World::new() else { return };
    let Some(frozen) = Frozen::mount(&world) else { return };
    let place = frozen.place.clone();
    let mut writing = Writing::new(world, [&place, &place]);
    writing.images[1] = writing.images[0].clone();
    let mut standby = writing.standby(Side::B);
    writing.shared = ",shared";
    let mut active = writing.run(Side::A);
    active.wait_protected();
    writing.wait_written(Side::A);
    let thaws = Thaws(&frozen);
    assert!(frozen.freeze(true));
    let told = |e: &Event| matches!(e, Event::HostFault { part: Part::Disk, why, kept: Some(kept) } if why.contains("shared disk 0") && kept.contains("cannot be recalled"));
    active.wait_for("told of the disk", told);
    assert!(!standby.took_over() && !active.ended());
    // Nor does it go on an operator's word.
    let (code, said) = hand_over(&active);
    assert!(code == Some(2) && said.contains("a write that hangs cannot be recalled"), "{code:?}: {said}");
    drop(thaws);
    active.wait_for("told that it answers", |e| matches!(e, Event::HostMended { part: Part::Disk }));
    writing.wait_written(Side::A);
    // One fault for each time that it hangs: the storage of a busy machine does so by itself, too.
    let of_disk = |event: &Event| match event {
        Event::HostFault { part, .. } => Some((*part, true)),
        Event::HostMended { part: Part::Disk } => Some((Part::Disk, false)),
        _ => None,
    };
    let told: Vec<_> = active.events().filter_map(of_disk).collect();
    let by_turns = told.iter().enumerate().all(|(at, it)| *it == (Part::Disk, at % 2 == 0));
    assert!(by_turns, "{told:?}: {}", active.log());
    assert!(!restarted(&mut active) && !standby.took_over());
    // They hold files there.
    drop((active, standby));
    drop(frozen);
}

/// Lets the writers go on, before anything that was declared earlier is dropped.
struct Thaws<'a>(&'a Frozen);

impl Drop for Thaws<'_> {
    fn drop(&mut self) {
        self.0.freeze(false);
    }
}
