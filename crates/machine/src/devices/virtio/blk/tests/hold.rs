//! A shared disk: nothing written in an epoch reaches it before the checkpoint of the epoch is committed.

use outlive_epoch::image::RecordBuf;

use super::super::engine::Operation;
use super::super::{BlockState, LogMode};
use super::driver::{T_DISCARD, T_WRITE_ZEROES};
use super::*;

fn shared(path: &Path) -> DiskOptions {
    DiskOptions { shared: true, ..DiskOptions::new(path) }
}

fn rig(path: &Path, memory: &Arc<Memory>) -> (Rig, Driver) {
    let rig = Rig::manual(memory, &shared(path));
    let driver = rig.boot();
    rig.device.go_live(false);
    (rig, driver)
}

#[test]
fn writes_wait_for_the_commit_of_their_epoch() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.numbered("disk", 2048), &memory);
    driver.write(0, 0, 0, &[1; 512]);
    rig.run();
    assert_eq!(driver.used(0), 1, "at first they pass");
    rig.valve.hold(5).unwrap();
    driver.write(0, 1, 1, &[2; 512]);
    driver.ranges(0, 2, T_DISCARD, &[(100, 8, 0)]);
    driver.read(0, 3, 50, 512);
    driver.flush(0, 4);
    rig.run();
    assert_eq!(driver.used(0), 3, "reads and flushes pass");
    rig.valve.begin(6).unwrap();
    driver.ranges(0, 5, T_WRITE_ZEROES, &[(200, 8, 1)]);
    rig.run();
    assert_eq!((rig.device.in_flight(), rig.device.stats().held), (3, 3));
    let released = rig.release(4);
    assert_eq!((released.writes, released.complete), (0, true));
    let released = rig.release(u64::MAX);
    assert_eq!((released.writes, released.complete), (2, true), "not of the epoch that runs");
    assert_eq!(rig.engine().waiting().len(), 2);
    rig.run();
    assert_eq!((driver.used(0), driver.status(1), driver.status(2), driver.status(5)), (5, OK, OK, 0xaa));
    rig.valve.begin(7).unwrap();
    assert_eq!(rig.release(6).writes, 1);
    rig.run();
    assert_eq!((driver.used(0), rig.device.stats().held, rig.device.stats().released), (6, 0, 3));
}

#[test]
fn reads_do_not_see_what_is_held_and_do_not_overtake_it() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.numbered("disk", 2048), &memory);
    rig.valve.hold(1).unwrap();
    driver.read(0, 0, 10, 512); // before the write
    driver.write(0, 1, 10, &[1; 1024]);
    driver.read(0, 2, 11, 1024); // over its end
    driver.read(0, 3, 12, 512); // beside it
    driver.write(0, 4, 11, &[2; 512]); // over it
    rig.run();
    assert_eq!([0, 1, 2, 3, 4].map(|slot| driver.status(slot)), [OK, 0xaa, 0xaa, OK, 0xaa]);
    assert_eq!(driver.data(0, 8), 11u64.to_le_bytes());
    rig.valve.begin(2).unwrap();
    let released = rig.release(1);
    assert_eq!((released.writes, released.complete), (1, true), "the other waits for it");
    assert!(matches!(rig.engine().waiting()[..], [Operation::Write { offset: 5120, .. }]));
    rig.run();
    assert_eq!([1, 2, 4].map(|slot| driver.status(slot)), [OK, OK, 0xaa]);
    let got = driver.data(2, 1024);
    assert_eq!((got[0], &got[512..520]), (1, &13u64.to_le_bytes()[..]));
    assert_eq!(rig.release(1).writes, 1);
    rig.run();
    assert_eq!(driver.used(0), 5);
    assert_eq!(content(&images.path("disk"))[11 * 512], 2);
}

#[test]
fn a_release_without_permission_lets_nothing_out() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.sparse("disk", 1 << 20), &memory);
    rig.valve.hold(1).unwrap();
    for slot in 0..4 {
        driver.write(0, slot, slot.into(), &[1; 512]);
    }
    rig.turn();
    rig.valve.begin(2).unwrap();
    rig.times.set(2);
    let released = rig.release(1);
    rig.times.set(usize::MAX);
    assert_eq!((released.writes, released.complete), (2, false));
    let released = rig.release(1);
    assert_eq!((released.writes, released.complete), (0, false), "not again");
    rig.run();
    assert_eq!(driver.used(0), 2);
    rig.valve.hold(2).unwrap();
    assert_eq!(rig.release(1).writes, 2, "until it begins anew");
}

#[test]
fn going_on_alone_lets_everything_out() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.sparse("disk", 1 << 20), &memory);
    rig.valve.hold(1).unwrap();
    driver.write(0, 0, 0, &[1; 1024]);
    driver.write(0, 1, 1, &[2; 1024]);
    rig.turn();
    let released = rig.open();
    assert_eq!((released.writes, released.complete), (1, true));
    rig.run();
    driver.write(0, 2, 9, &[3; 512]);
    rig.run();
    assert_eq!((driver.used(0), content(&images.path("disk"))[512]), (3, 2));
}

#[test]
fn what_is_discarded_never_reaches_the_disk() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.sparse("disk", 1 << 20), &memory);
    rig.valve.hold(1).unwrap();
    driver.write(0, 0, 0, &[1; 512]);
    rig.turn();
    rig.discard();
    driver.write(0, 1, 1, &[2; 512]);
    rig.turn();
    rig.valve.begin(2).unwrap();
    let released = rig.release(1);
    assert_eq!((released.writes, released.complete), (0, false));
    rig.run();
    assert_eq!((driver.used(0), rig.device.in_flight(), rig.device.stats().held), (0, 2, 0));
    rig.open();
    driver.write(0, 2, 2, &[3; 512]);
    rig.run();
    assert_eq!(driver.used(0), 1, "what is written after that does");
    assert_eq!([0, 512, 1024].map(|at| content(&images.path("disk"))[at]), [0, 0, 3]);
    rig.write(0x70, 0);
    assert_eq!(rig.device.in_flight(), 0);
    rig.run();
    assert_eq!(content(&images.path("disk"))[0], 0);
}

#[test]
fn what_is_discarded_does_not_follow_the_write_it_waited_for() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.sparse("disk", 1 << 20), &memory);
    driver.write(0, 0, 0, &[1; 512]);
    driver.write(0, 1, 0, &[2; 512]);
    rig.turn();
    rig.discard();
    rig.open();
    rig.run();
    assert_eq!((driver.used(0), rig.device.in_flight(), content(&images.path("disk"))[0]), (1, 1, 1));
}

#[test]
fn epochs_do_not_run_backwards() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = rig(&images.sparse("disk", 1 << 20), &memory);
    rig.valve.hold(7).unwrap();
    driver.write(0, 0, 0, &[1; 512]);
    rig.turn();
    let error = EpochError { asked: 6, held: 7 };
    assert_eq!(rig.valve.begin(6), Err(error));
    assert_eq!(rig.valve.hold(6), Err(error));
    rig.valve.begin(8).unwrap();
    rig.release(7);
    rig.run();
    rig.valve.hold(1).unwrap();
}

#[test]
fn held_writes_are_in_flight_and_are_issued_again() {
    let (images, here) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let (rig, driver) = rig(&path, &here);
    rig.valve.hold(1).unwrap();
    driver.write(0, 3, 0, &[1; 512]);
    driver.read(0, 4, 0, 512);
    rig.turn();
    let saved = rig.saved();
    assert_eq!(BlockState::decode(&saved).unwrap().device.in_flight.len(), 2);
    let there = copy(&here);
    rig.discard();
    let standby = Rig::manual(&there, &shared(&path));
    standby.device.restore(&saved).unwrap();
    standby.open();
    standby.device.go_live(false);
    standby.run();
    let driver = Driver::resumed(&there);
    assert_eq!((driver.used(0), content(&path)[0], driver.data(4, 1)), (2, 1, vec![1]));
}

#[test]
fn a_shared_disk_is_not_replicated_and_any_other_is_not_held() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    for share in [true, false] {
        let rig = Rig::manual(&memory, &DiskOptions { shared: share, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        let mut buffer = RecordBuf::with_capacity(1 << 20);
        rig.log.swap(&mut buffer);
        rig.log.set_mode(LogMode::Log);
        rig.valve.hold(1).unwrap();
        driver.write(0, 0, 0, &[1; 512]);
        rig.run();
        rig.valve.begin(2).unwrap();
        assert_eq!(driver.used(0), u16::from(!share));
        assert_eq!(rig.release(1).writes, u64::from(share));
        rig.run();
        assert_eq!((driver.used(0), rig.log.stats().records), (1, u64::from(!share)));
        assert_eq!(rig.log.empty_chunks(0).is_some(), !share);
    }
}

/// With the device's thread and the engine of threads: random epochs, and everything on the disk is
/// committed.
#[test]
fn the_disk_is_never_ahead_of_the_commits() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::new(&memory, &shared(&path));
    assert_eq!(rig.device.engine(), "threads");
    let driver = rig.boot();
    rig.device.go_live(false);
    rig.gate.close();
    rig.valve.hold(1).unwrap();
    rig.gate.open();
    let (mut offered, mut seen, mut busy) = (0, 0, [false; 64]);
    let mut epoch = 1u64;
    let mut next_epoch = || {
        epoch += 1;
        rig.gate.close();
        rig.valve.begin(epoch).unwrap();
        rig.gate.open();
        let committed = epoch - 2;
        rig.release(committed);
        let newest = newest(&path);
        assert!(newest <= committed, "{newest} is on the disk, {committed} is committed");
        epoch
    };
    for round in 0..100u16 {
        // Each epoch writes its number into some sectors, once their slots are free.
        let slots = (round % 8) * 8..(round % 8) * 8 + 8;
        let mut epoch = next_epoch();
        wait_for("free slots", || {
            while seen != driver.used(0) {
                busy[usize::from(driver.used_entry(0, seen).0)] = false;
                seen += 1;
            }
            let free = !slots.clone().any(|slot| busy[usize::from(slot)]);
            if !free {
                // A write belongs to the epoch in which the device found it.
                epoch = next_epoch();
            }
            free
        });
        for slot in slots {
            let sector = u64::from(round % 4) * 8 + u64::from(slot % 8);
            let mut data = [0; 512];
            data[..8].copy_from_slice(&epoch.to_le_bytes());
            driver.write(0, slot, sector, &data);
            busy[usize::from(slot)] = true;
            offered += 1;
        }
        rig.kick(0);
        if round % 3 == 0 {
            std::thread::sleep(Duration::from_micros(300));
        }
    }
    rig.open();
    wait_for("the rest", || driver.used(0) == offered);
    assert_eq!(rig.device.in_flight(), 0);
    assert_eq!(rig.device.stats().writes, u64::from(offered));
}

/// The greatest number at the beginning of a sector.
fn newest(path: &Path) -> u64 {
    let number = |sector: &[u8]| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| sector[i]));
    content(path).chunks(512).map(number).max().unwrap()
}
