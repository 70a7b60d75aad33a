//! A shared disk whose writes were let out and wait for slow storage while another host wins the VM.

use super::driver::T_WRITE_ZEROES;
use super::*;

const WRITES: u16 = 40;

/// A disk with the engine of threads, in epoch 1. Its permission takes a while, as slow storage would, and is
/// given `times` times; the counter says how often it was asked for.
fn rig(path: &Path, memory: &Arc<Memory>, times: usize) -> (Rig, Driver, Arc<Count>) {
    let asked = Arc::new(Count::default());
    let count = asked.clone();
    let lease = Lease::with_clock(move || {
        // Threads that let writes out always get it.
        if std::thread::current().name() != Some("outlive-blk-io") {
            return Duration::ZERO;
        }
        std::thread::sleep(Duration::from_millis(2));
        let holds = count.add() < times;
        if holds { Duration::ZERO } else { Duration::from_secs(2) }
    });
    lease.set(Some(Duration::from_secs(1)));
    let (unused, _) = Times::lease();
    let options = DiskOptions { shared: true, ..DiskOptions::new(path) };
    let rig = Rig::with_lease(memory, &options, unused, lease);
    let driver = rig.boot();
    rig.device.go_live(false);
    paused(&rig, || rig.valve.hold(1).unwrap());
    (rig, driver, asked)
}

fn paused(rig: &Rig, work: impl FnOnce()) {
    rig.gate.close();
    work();
    rig.gate.open();
}

/// Commits the epoch with this many writes of the driver.
fn commit(rig: &Rig, writes: u64) {
    rig.kick(0);
    wait_for("the writes", || rig.device.stats().held == writes);
    paused(rig, || rig.valve.begin(2).unwrap());
    assert_eq!(rig.release(1).writes, writes);
}

/// Writes sector after sector, each in its own request.
fn write_all(driver: &Driver) {
    (0..WRITES).for_each(|slot| driver.write(0, slot, slot.into(), &[1; 512]));
}

/// How many of the sectors have been written.
fn written(path: &Path) -> u16 {
    content(path).chunks(512).filter(|sector| sector[0] == 1).count() as u16
}

#[test]
fn released_writes_stay_when_permission_ends_and_go_when_it_is_back() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let (rig, driver, asked) = rig(&path, &memory, 10);
    write_all(&driver);
    commit(&rig, WRITES.into());
    wait_for("the rest to be held again", || rig.device.stats().held == 30);
    wait_for("the others", || driver.used(0) == 10);
    settle();
    assert_eq!((written(&path), driver.used(0), rig.device.in_flight()), (10, 10, 30));
    let released = rig.release(1);
    assert_eq!(released.writes, 30, "they go with a later release");
    wait_for("the engine to refuse them", || rig.device.stats().held == 30);
    assert_eq!((written(&path), asked.get()), (10, 70));
    assert_eq!(rig.open().writes, 30);
    wait_for("all", || driver.used(0) == WRITES);
    settle();
    assert_eq!((written(&path), driver.used(0), rig.device.in_flight()), (WRITES, WRITES, 0));
    assert_eq!((rig.device.stats().writes, asked.get()), (WRITES.into(), 70), "each is done once");
}

#[test]
fn what_waits_for_slow_storage_is_discarded_and_issued_again_elsewhere() {
    let (images, here) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let (rig, driver, asked) = rig(&path, &here, usize::MAX);
    write_all(&driver);
    rig.kick(0);
    wait_for("the writes", || rig.device.stats().held == u64::from(WRITES));
    rig.gate.close();
    let saved = rig.saved();
    let there = copy(&here);
    rig.gate.open();
    commit(&rig, WRITES.into());
    wait_for("some", || asked.get() >= 8);
    rig.discard();
    settle();
    let reached = written(&path);
    assert!((4..20).contains(&reached), "{reached}");
    // Neither a new protection nor going on alone brings back writes that another host may have done.
    paused(&rig, || rig.valve.hold(2).unwrap());
    rig.release(1);
    rig.open();
    settle();
    assert_eq!((written(&path), driver.used(0)), (reached, reached));
    assert_eq!(rig.device.in_flight(), usize::from(WRITES - reached));

    let standby = Rig::manual(&there, &DiskOptions { shared: true, ..DiskOptions::new(&path) });
    standby.device.restore(&saved).unwrap();
    standby.open();
    standby.device.go_live(false);
    standby.run();
    assert_eq!((Driver::resumed(&there).used(0), written(&path)), (WRITES, WRITES));
}

/// The storage never gets it, so nothing of it can land later.
#[test]
fn what_the_engine_refuses_behind_a_closed_gate_is_not_at_the_disk_and_is_held_again() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let (rig, driver, asked) = rig(&path, &memory, 0);
    driver.write(0, 0, 0, &[1; 512]);
    rig.kick(0);
    wait_for("the write", || rig.device.stats().held == 1);
    rig.gate.close();
    rig.valve.begin(2).unwrap();
    assert_eq!(rig.release(1).writes, 1);
    wait_for("the engine to refuse it", || rig.device.unanswered_for().is_zero());
    assert_eq!((asked.get(), written(&path), rig.device.in_flight()), (1, 0, 1));
    assert_eq!(rig.device.stats().held, 0, "what follows waits for the gate");
    rig.gate.open();
    wait_for("it to be held again", || rig.device.stats().held == 1);
    assert_eq!(rig.open().writes, 1);
    wait_for("the write", || driver.used(0) == 1);
    assert_eq!((written(&path), driver.status(0)), (1, OK));
}

#[test]
fn the_end_of_a_disk_carries_nothing_out() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let (rig, driver, asked) = rig(&path, &memory, usize::MAX);
    write_all(&driver);
    commit(&rig, WRITES.into());
    wait_for("some", || asked.get() >= 8);
    drop(rig);
    let reached = written(&path);
    assert!((4..20).contains(&reached), "{reached}");
}

#[test]
fn a_request_of_many_operations_asks_before_each() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.path("disk");
    std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
    // This file system cannot make a range zero at once, and says so to the first operation.
    let (rig, driver, asked) = rig(&path, &memory, 3);
    driver.ranges(0, 0, T_WRITE_ZEROES, &[(0, 512, 0)]);
    commit(&rig, 1);
    wait_for("the rest to be held again", || rig.device.stats().held == 1);
    let zeroes = || content(&path).iter().take_while(|&&byte| byte == 0).count();
    assert_eq!((zeroes(), driver.used(0), asked.get()), (128 << 10, 0, 4));
    rig.open();
    wait_for("the rest", || driver.used(0) == 1);
    assert_eq!((zeroes(), driver.status(0)), (256 << 10, OK));
}

#[test]
fn discarding_ends_a_request_between_two_operations() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions { shared: true, ..DiskOptions::new(&path) });
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 0, &[1; 1024]);
    driver.read(0, 1, 100, 512);
    rig.turn();
    rig.discard();
    // The operation under way ends, here with fewer bytes than it asked for.
    rig.engine().complete(0, Some(Ok(512)));
    rig.run();
    rig.open();
    rig.run();
    assert_eq!((written(&path), driver.used(0), driver.status(1), rig.device.in_flight()), (1, 1, OK, 1));
    rig.write(0x70, 0);
    assert_eq!(rig.device.in_flight(), 0, "a driver that begins anew does not wait for it");
}
