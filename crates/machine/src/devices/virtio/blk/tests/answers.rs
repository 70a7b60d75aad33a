//! What the host's disk has answered is known while the gate is closed, and nothing follows from it before it opens.

use outlive_epoch::image::RecordBuf;

use super::super::engine::Operation;
use super::super::{LogMode, PartLog};
use super::*;

fn shared(path: &Path) -> DiskOptions {
    DiskOptions { shared: true, ..DiskOptions::new(path) }
}

fn answered(rig: &Rig) -> bool {
    rig.device.unanswered_for().is_zero()
}

/// As at the end of a hand-over: the gate is closed for good, and what the last checkpoint held is let out. With each
/// engine that the user may choose, with and without a guest that flushes: without, a write takes two operations.
#[test]
fn a_shared_disk_answers_what_is_let_out_behind_a_closed_gate() {
    for (engine, flushes) in ENGINES.into_iter().zip([true, false]) {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 1 << 20);
        let rig = Rig::new(&memory, &DiskOptions { engine, ..shared(&path) });
        let without = if flushes { 0 } else { F_FLUSH | F_CONFIG_WCE };
        let driver = rig.boot_with(rig.offered() & !without, 1);
        rig.device.go_live(false);
        rig.gate.close();
        rig.valve.hold(1).unwrap();
        rig.gate.open();
        driver.write(0, 0, 1, &[1; 512]);
        rig.kick(0);
        wait_for("the write", || rig.device.stats().held == 1);
        assert!(answered(&rig), "what is held is not at the disk");

        rig.gate.close();
        rig.valve.begin(2).unwrap();
        let (saved, interrupts) = (rig.saved(), rig.interrupts.get());
        assert_eq!(rig.release(1).writes, 1);
        wait_for("the disk", || answered(&rig));
        assert_eq!(content(&path)[512..1024], [1; 512], "it is where it belongs");
        settle();
        assert!(answered(&rig));
        assert_eq!((driver.used(0), driver.status(0), rig.device.in_flight()), (0, 0xaa, 1));
        assert_eq!(rig.interrupts.get(), interrupts);
        assert_eq!(rig.saved(), saved, "another host would still issue it again");

        rig.gate.open();
        wait_for("the answer", || driver.used(0) == 1);
        assert_eq!((driver.status(0), rig.device.in_flight()), (OK, 0));
        assert!(answered(&rig) && rig.interrupts.get() > interrupts);
    }
}

/// As while a guest is held: a request is in flight when the gate closes.
#[test]
fn any_disk_answers_behind_a_closed_gate_and_nothing_of_it_is_logged_there() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 1 << 20);
        let rig = Rig::by_turns(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        assert_eq!(rig.device.engine(), if engine == EngineKind::Uring { "io_uring" } else { "threads" });
        let driver = rig.boot();
        rig.device.go_live(false);
        rig.log.swap(&mut RecordBuf::with_capacity(1 << 20));
        rig.log.set_mode(LogMode::Log);
        driver.write(0, 0, 1, &[1; 512]);
        driver.read(0, 1, 100, 512);
        rig.device.turn();

        rig.gate.close();
        wait_for("the disk", || answered(&rig));
        settle();
        let statuses = || [0, 1].map(|slot| driver.status(slot));
        assert_eq!((driver.used(0), statuses(), rig.device.in_flight()), (0, [0xaa; 2], 2));
        assert_eq!(rig.log.stats().records, 0);
        assert_eq!(rig.device.part_log(0, 1024, u64::MAX), PartLog::Waits(1));

        rig.gate.open();
        rig.turn();
        assert_eq!((driver.used(0), statuses(), rig.device.in_flight()), (2, [OK; 2], 0));
        assert_eq!(rig.log.stats().records, 1);
        assert_eq!(rig.device.part_log(0, 1024, u64::MAX), PartLog::Has);
    }
}

#[test]
fn the_oldest_operation_without_an_answer_counts_and_answers_keep_their_order() {
    let (images, memory) = (Images::in_memory(), memory());
    let rig = Rig::manual(&memory, &shared(&images.sparse("disk", 1 << 20)));
    let driver = rig.boot();
    rig.device.go_live(false);
    rig.valve.hold(1).unwrap();
    for slot in 0..3 {
        driver.write(0, slot, slot.into(), &[1; 512]);
    }
    // It waits for the first one.
    driver.write(0, 3, 0, &[2; 512]);
    rig.turn();
    rig.gate.close();
    rig.valve.begin(2).unwrap();
    assert_eq!(rig.release(1).writes, 3);
    std::thread::sleep(Duration::from_millis(20));
    rig.engine().complete(1, None);
    assert!(rig.device.unanswered_for() >= Duration::from_millis(20), "two have no answer");
    rig.engine().complete(0, None);
    assert!(!answered(&rig));
    rig.engine().complete(0, None);
    assert!(answered(&rig) && answered(&rig));
    assert!(rig.engine().waiting().is_empty(), "nothing begins behind the gate");
    assert_eq!((rig.release(1).writes, driver.used(0), rig.device.in_flight()), (0, 0, 4));

    rig.gate.open();
    rig.turn();
    assert_eq!([0, 1, 2].map(|index| driver.used_entry(0, index).0), [1, 0, 2]);
    assert_eq!(rig.release(1).writes, 1, "the last one may leave now");
    rig.run();
    assert_eq!((driver.used(0), content(&images.path("disk"))[0]), (4, 2));
}

/// The storage has answered and has nothing more, so nothing can land there later: the rest begins only once the VM
/// goes on here. If it goes elsewhere, all of the request is issued again there.
#[test]
fn a_request_that_needs_another_operation_is_not_at_the_disk_and_goes_on_when_the_gate_opens() {
    for goes_on in [true, false] {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 1 << 20);
        let rig = Rig::manual(&memory, &shared(&path));
        let driver = rig.boot();
        rig.device.go_live(false);
        rig.valve.hold(1).unwrap();
        driver.write(0, 0, 0, &[1; 1024]);
        rig.turn();
        rig.gate.close();
        rig.valve.begin(2).unwrap();
        assert_eq!(rig.release(1).writes, 1);
        rig.engine().complete(0, Some(Ok(512)));
        assert!(answered(&rig) && rig.engine().waiting().is_empty());
        if !goes_on {
            rig.discard();
        }
        rig.gate.open();
        rig.turn();
        if goes_on {
            assert_eq!(rig.engine().waiting(), [Operation::Write { offset: 512, from: 512, len: 512 }]);
            assert!(!answered(&rig));
        }
        rig.run();
        assert_eq!((driver.used(0), content(&path)[512]), (goes_on.into(), goes_on.into()));
        assert!(answered(&rig));
    }
}

#[test]
fn a_request_of_the_last_host_is_answered_behind_a_closed_gate() {
    let (images, first) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&first, &shared(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 3, &[1; 512]);
    rig.turn();
    let second = copy(&first);
    let there = Rig::manual(&second, &shared(&path));
    there.device.restore(&rig.saved()).unwrap();
    there.device.go_live(false);
    there.turn();
    assert!(there.device.has_reissued());
    there.gate.close();
    there.engine().complete(0, None);
    assert!(!there.device.has_reissued() && answered(&there));
    there.gate.open();
    there.turn();
    assert_eq!((Driver::resumed(&second).used(0), there.device.has_reissued()), (1, false));
}
