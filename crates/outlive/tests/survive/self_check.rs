//! The self-check: from time to time all memory and the disks of both hosts are compared.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use outlive::events::Event;

use crate::support::{Dice, MemoryLoad, Process, Side, WRITTEN, Witnesses, World, wait_until, writer_kernel};

const SIZE: u64 = 48 << 20;
const CHECK: [&str; 2] = ["--self-check", "100"];

fn wait_equal(standby: &mut Process) {
    let checked = standby.wait_for("comparing", |e| matches!(e, Event::SelfCheck { .. }));
    assert!(matches!(checked, Event::SelfCheck { difference: None, .. }), "{checked:?}");
}

#[test]
fn the_copy_equals_the_vm_at_every_hundredth_checkpoint_and_after_a_takeover() {
    let Some(world) = World::new() else { return };
    let mut standby = world.standby_with(Side::B, &CHECK);
    let mut primary =
        world.run_with(Side::A, &[&["--standby", &Side::B.addr().to_string()], &CHECK[..]].concat());
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 4);
    // The most written pages stay writable, and some of their writes change nothing.
    let load = MemoryLoad::start(&world, 500, 200_000);
    for _ in 0..10 {
        wait_equal(&mut standby);
    }
    load.finish(&world);
    primary.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Two hosts with an image each, and a guest that writes to its image all the time.
struct Writing {
    world: World,
    kernel: PathBuf,
}

impl Writing {
    fn new() -> Option<Self> {
        let world = World::new()?;
        let kernel = world.dir().join("writer");
        fs::write(&kernel, writer_kernel()).unwrap();
        let writing = Self { world, kernel };
        let mut dice = Dice::new();
        for side in [Side::A, Side::B] {
            let file = File::create(writing.world.image(side)).unwrap();
            file.set_len(SIZE).unwrap();
            // Different data, and holes in different places.
            for _ in 0..60 {
                let bytes = vec![dice.below(256) as u8; 1 + dice.below(200_000) as usize];
                file.write_all_at(&bytes, dice.below(SIZE - bytes.len() as u64)).unwrap();
            }
        }
        Some(writing)
    }

    /// The options of a host, without those of the guest.
    fn options(&self, side: Side) -> Vec<String> {
        let there = side.other().addr().to_string();
        let disk = format!("path={}", self.world.image(side).display());
        [&["--standby", &there, "--disk", &disk], &CHECK[..]].concat().into_iter().map(Into::into).collect()
    }

    fn standby(&self, side: Side) -> Process {
        let mut options = self.options(side);
        // At first the image is unknown.
        if !PathBuf::from(format!("{}.outlive", self.world.image(side).display())).exists() {
            options[3].push_str(",overwrite");
        }
        // Or it might find what the self-check is to find.
        let options = options.iter().map(String::as_str).chain(["--audit", "off"]);
        self.world.standby_with(side, &options.collect::<Vec<_>>())
    }

    fn run(&self, side: Side, more: &[&str]) -> Process {
        let (options, kernel) = (self.options(side), self.kernel.display().to_string());
        let options = options.iter().map(String::as_str).chain(["--kernel", &kernel]);
        self.world.run_with(side, &options.chain(more.iter().copied()).collect::<Vec<_>>())
    }

    /// The guest's disk contents, as a host has them.
    fn written(&self, side: Side) -> Vec<u8> {
        let mut bytes = vec![0; WRITTEN as usize];
        File::open(self.world.image(side)).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn wait_written(&self, side: Side) {
        let before = self.written(side);
        wait_until("the guest writes to its disk", || self.written(side) != before);
    }
}

#[test]
fn the_standbys_disk_equals_the_vms_while_the_guest_writes_and_after_takeovers() {
    let Some(writing) = Writing::new() else { return };
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A, &[]);
    for side in [Side::B, Side::A, Side::B] {
        primary.wait_protected();
        for _ in 0..8 {
            writing.wait_written(side);
            wait_equal(&mut standby);
        }
        assert!(!primary.has(|e| matches!(e, Event::GuestRestarted { .. })), "{}", primary.log());
        primary.kill();
        standby.wait_takeover();
        primary = standby;
        standby = writing.standby(side.other());
    }
}

/// The largest number of vCPUs, and memory on both sides of the devices' hole below 4 GiB.
#[test]
fn the_largest_number_of_vcpus_is_taken_over() {
    let Some(writing) = Writing::new() else { return };
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A, &["--vcpus", "32", "--memory", "5G"]);
    for side in [Side::B, Side::A] {
        primary.wait_protected();
        writing.wait_written(side);
        wait_equal(&mut standby);
        primary.kill();
        standby.wait_takeover();
        primary = standby;
        standby = writing.standby(side.other());
    }
    primary.wait_protected();
    assert!(!primary.has(|e| matches!(e, Event::GuestRestarted { .. })), "{}", primary.log());
}

#[test]
fn a_byte_that_differs_on_the_standbys_disk_is_found_and_the_image_is_used_no_more() {
    let Some(writing) = Writing::new() else { return };
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A, &[]);
    primary.wait_protected();
    wait_equal(&mut standby);
    let image = File::options().read(true).write(true).open(writing.world.image(Side::B)).unwrap();
    // A place that the guest does not write.
    let at = SIZE - 4097;
    let mut byte = [0];
    image.read_exact_at(&mut byte, at).unwrap();
    image.write_all_at(&[byte[0] ^ 0x10], at).unwrap();

    let differs = |e: &Event| matches!(e, Event::SelfCheck { difference: Some(_), .. });
    wait_until("the difference is found", || standby.has(differs));
    assert_eq!(standby.wait_exit(), 1);
    assert!(standby.log().contains("SELF-CHECK FAILED: disk 0: "), "{}", standby.log());
    primary.wait_for("going on alone", |e| matches!(e, Event::Unprotected { .. }));

    // No VM starts from it, and a new base repairs it.
    let sidecar = fs::read_to_string(format!("{}.outlive", writing.world.image(Side::B).display())).unwrap();
    assert!(sidecar.lines().any(|line| line == "whole = false"), "{sidecar}");
    let mut standby = writing.standby(Side::B);
    primary.wait_protected();
    wait_equal(&mut standby);
    assert!(!primary.ended());
}
