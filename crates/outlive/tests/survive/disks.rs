//! Disks of both hosts: equal while the VM is protected, whole or known not to be whole, and never used by
//! two VMs.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use outlive::events::Event;
use outlive::network::Netlink;

use crate::support::{Dice, Process, Side, World, wait_until};

const SIZE: u64 = 48 << 20;

/// An image of one host.
fn option(world: &World, side: Side) -> String {
    format!("path={}", world.image(side).display())
}

/// A sparse image with data here and there.
fn make(world: &World, side: Side, dice: &mut Dice) {
    let file = File::create(world.image(side)).unwrap();
    file.set_len(SIZE).unwrap();
    for _ in 0..60 {
        let bytes = vec![dice.below(255) as u8 + 1; 1 + dice.below(200_000) as usize];
        file.write_all_at(&bytes, dice.below(SIZE - bytes.len() as u64)).unwrap();
    }
}

fn sidecar(world: &World, side: Side) -> String {
    let mut path = world.image(side).into_os_string();
    path.push(".outlive");
    fs::read_to_string(path).unwrap_or_default()
}

fn standby(world: &World, side: Side) -> Process {
    let there = side.other().addr().to_string();
    world.standby_with(side, &["--standby", &there, "--disk", &option(world, side)])
}

fn run(world: &World, side: Side) -> Process {
    let there = side.other().addr().to_string();
    world.run_with(side, &["--standby", &there, "--disk", &option(world, side)])
}

fn equal(world: &World) -> bool {
    fs::read(world.image(Side::A)).unwrap() == fs::read(world.image(Side::B)).unwrap()
}

/// The standby says so in its log; the primary may still talk about the previous one.
fn wait_whole(standby: &Process) {
    wait_until("the standby has the base", || standby.log().contains("this standby can take over"));
}

/// The sidecar follows the commit.
fn wait_sidecar(world: &World, side: Side, lines: &[&str]) {
    wait_until(&format!("sidecar of {side:?} has {lines:?}"), || {
        let sidecar = sidecar(world, side);
        lines.iter().all(|line| sidecar.lines().any(|l| l == *line))
    });
}

#[test]
fn an_image_is_synchronised_and_follows_the_vm_through_takeovers() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    make(&world, Side::A, &mut dice);
    File::create(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    let b = standby(&world, Side::B);
    let mut a = run(&world, Side::A);
    a.wait_protected();
    wait_sidecar(&world, Side::B, &[r#"role = "replica""#, "whole = true", "generation = 1"]);
    wait_sidecar(&world, Side::A, &[r#"role = "primary""#, "whole = true", "generation = 1"]);
    assert!(equal(&world));
    // A hole stays a hole.
    let blocks = |side| fs::metadata(world.image(side)).unwrap().blocks() * 512;
    assert!(blocks(Side::B) < SIZE, "{} of {SIZE}", blocks(Side::B));
    let done = |e: &Event| matches!(e, Event::DiskSync { disk: 0, done_bytes: SIZE, total_bytes: SIZE, .. });
    assert!(a.has(done));

    a.kill();
    let mut b = b;
    assert_eq!(b.wait_takeover(), 2);
    wait_sidecar(&world, Side::B, &[r#"role = "primary""#, "whole = true", "generation = 2"]);
    assert!(!world.image(Side::B).with_extension("img.journal").exists());

    // The old image is out of date; a VM that is started on it is refused with that reason.
    let mut stale = run(&world, Side::A);
    assert_eq!(stale.wait_exit(), 2);
    assert!(stale.log().contains("is out of date: it has generation 1"), "{}", stale.log());
    assert!(stale.log().contains("generation 2, won by standby on "), "{}", stale.log());

    // As a standby's image it is welcome; only the differences are sent.
    File::options()
        .write(true)
        .open(world.image(Side::A))
        .unwrap()
        .write_all_at(&[0xee; 5], 1 << 20)
        .unwrap();
    let a = standby(&world, Side::A);
    b.wait_protected();
    wait_whole(&a);
    wait_sidecar(&world, Side::A, &[r#"role = "replica""#, "whole = true", "generation = 2"]);
    assert!(equal(&world));
    let sent = b.events().filter_map(|e| match e {
        Event::DiskSync { sent_bytes, .. } => Some(*sent_bytes),
        _ => None,
    });
    let sent = sent.max().unwrap();
    assert!(sent <= 2 * 65536, "{sent} bytes sent for five that differ");
}

#[test]
fn images_that_do_not_fit_are_refused_with_the_remedy() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    make(&world, Side::A, &mut dice);
    let mut missing = world.standby_with_failure(Side::B, &["--disk", &option(&world, Side::B)]);
    assert_eq!(missing.wait_exit(), 2);
    assert!(missing.log().contains("does not exist: make one with `truncate"), "{}", missing.log());

    File::create(world.image(Side::B)).unwrap().set_len(SIZE - 512).unwrap();
    let a = run(&world, Side::A);
    let b = standby(&world, Side::B);
    wait_until("the size is refused", || a.log().contains(&format!("truncate -s {SIZE}")));
    drop(b);
    let b = world.standby_with(Side::B, &[]);
    wait_until("the number is refused", || a.log().contains("the VM has 1 disk, but this standby has 0"));
    drop(b);
    // The primary's own image: a VM runs on it.
    let mut busy = world.standby_with_failure(Side::B, &["--disk", &option(&world, Side::A)]);
    assert_eq!(busy.wait_exit(), 2);
    assert!(busy.log().contains("is in use: stop the program"), "{}", busy.log());
    File::options().write(true).open(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    let b = standby(&world, Side::B);
    wait_whole(&b);
    assert!(equal(&world));
}

/// A standby that refuses is asked again and again. Each interface that is made in the host's network takes the next
/// number there.
#[test]
fn an_image_that_does_not_fit_is_refused_before_the_network_is_touched() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, &mut Dice::new());
    File::create(world.image(Side::B)).unwrap().set_len(SIZE + 512).unwrap();
    let b = standby(&world, Side::B);
    let mut a = run(&world, Side::A);
    let refusals = |b: &Process| b.log().matches("refused a primary").count();
    wait_until("the size is refused", || refusals(&b) > 0);
    let next_number = |name: &str| {
        world.on(Side::B, || {
            let mut netlink = Netlink::open().unwrap();
            netlink.create_veth(name, &format!("{name}-peer")).unwrap();
            netlink.link(name).unwrap().index
        })
    };
    let before = next_number("first");
    std::thread::sleep(Duration::from_secs(10));
    let after = next_number("second");
    assert_eq!(after - before, 2, "only this test has made interfaces");
    assert!(!a.ended() && a.log().contains(&format!("Give an empty one of {SIZE} bytes")), "{}", a.log());
    // Nothing of the attempts is in the way of one that succeeds.
    File::options().write(true).open(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    a.wait_protected();
    assert!(equal(&world));
}

#[test]
fn a_synchronisation_that_breaks_leaves_an_image_that_nobody_starts_from() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    make(&world, Side::A, &mut dice);
    File::create(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    let mut a = run(&world, Side::A);
    let mut broken = false;
    for _ in 0..20 {
        let b = standby(&world, Side::B);
        wait_until("a part was written", || {
            !sidecar(&world, Side::B).is_empty() || b.log().contains("can take over")
        });
        dice.sleep_below(Duration::from_millis(20));
        b.kill();
        if sidecar(&world, Side::B).contains("whole = false") {
            broken = true;
            break;
        }
        fs::remove_file(world.image(Side::B).with_extension("img.outlive")).ok();
        File::create(world.image(Side::B)).unwrap().set_len(SIZE).unwrap();
    }
    assert!(broken, "no kill came in time");
    let mut refused = world.run_with(Side::B, &["--disk", &option(&world, Side::B)]);
    assert_eq!(refused.wait_exit(), 2);
    assert!(refused.log().contains("is not whole"), "{}", refused.log());
    let b = standby(&world, Side::B);
    wait_whole(&b);
    wait_sidecar(&world, Side::B, &["whole = true"]);
    assert!(equal(&world));
    assert!(!a.ended());
}
