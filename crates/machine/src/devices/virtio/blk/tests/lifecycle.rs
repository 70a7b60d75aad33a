//! Passive, live, paused, saved, restored, reset, gone.

use super::super::persist::Misfit;
use super::super::{BlockState, InFlight};
use super::*;
use crate::devices::virtio::slot::RestoreError;

#[test]
fn a_passive_device_touches_nothing() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::new(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    driver.write(0, 0, 0, &[1; 512]);
    rig.kick(0);
    settle();
    assert_eq!((driver.used(0), content(&path)[0]), (0, 0));
    rig.device.go_live(false);
    wait_for("the write", || driver.used(0) == 1);
    assert_eq!(content(&path)[0], 1);
}

#[test]
fn a_checkpoint_does_not_wait_for_the_disk() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let mut rig = Rig::manual(&memory, &DiskOptions { queues: 2, ..DiskOptions::new(&path) });
    rig.start_thread();
    let driver = rig.boot_with(rig.offered(), 2);
    rig.device.go_live(false);
    driver.write(0, 7, 0, &[1; 4096]);
    driver.write(0, 3, 0, &[2; 4096]);
    rig.kick(0);
    wait_for("the disk to get it", || rig.device.in_flight() == 2);
    driver.read(1, 9, 64, 512);
    rig.kick(1);
    wait_for("the disk to get it", || rig.device.in_flight() == 3);
    wait_for("it all to be submitted", || rig.engine().waiting().len() == 2);
    let start = Instant::now();
    rig.gate.close();
    let saved = rig.saved();
    assert!(start.elapsed() < Duration::from_secs(1));
    // The disk finishes with the gate closed, too; the guest learns of it afterwards.
    rig.engine().complete(0, None);
    settle();
    assert_eq!((driver.used(0), rig.saved() == saved), (0, true));
    let listed = BlockState::decode(&saved).unwrap().device.in_flight;
    let expected = [(0, 7), (0, 3), (1, 9)].map(|(queue, head)| InFlight { queue, head });
    assert_eq!(listed, expected, "in order of arrival");
    rig.gate.open();
    wait_for("the first", || driver.used(0) == 1);
    wait_for("the rest", || {
        rig.engine().complete_all();
        driver.used(0) == 2 && driver.used(1) == 1
    });
    assert_eq!(content(&path)[0], 2);
}

/// Closes the gate after every step of a device that has many to do.
#[test]
fn a_checkpoint_may_come_after_any_step() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.write(0, 0, 0, &[1; 200 << 10]);
    driver.read(0, 1, 0, 200 << 10);
    let done = &std::sync::atomic::AtomicBool::new(false);
    let lists = std::thread::scope(|scope| {
        let (rig, driver) = (&rig, &driver);
        let coordinator = scope.spawn(move || {
            let mut lists = Vec::new();
            while !done.load(Ordering::Relaxed) {
                rig.gate.close();
                lists
                    .push((BlockState::decode(&rig.saved()).unwrap().device.in_flight.len(), driver.used(0)));
                rig.gate.open();
                std::thread::yield_now();
            }
            lists
        });
        while driver.used(0) < 2 {
            rig.device.turn();
            if rig.engine().waiting().len() == 2 {
                rig.engine().complete_all();
            }
        }
        done.store(true, Ordering::Relaxed);
        coordinator.join().unwrap()
    });
    assert!(lists.iter().all(|&(listed, used)| listed + usize::from(used) <= 2));
    assert_eq!((driver.status(0), driver.status(1)), (OK, OK));
}

#[test]
fn requests_in_flight_are_issued_again_in_order() {
    let (images, here) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&here, &DiskOptions { queues: 2, ..DiskOptions::new(&path) });
    let driver = rig.boot_with(rig.offered(), 2);
    rig.device.go_live(false);
    driver.write(0, 0, 100, &[9; 512]);
    rig.run();
    driver.write(1, 5, 0, &[1; 1024]);
    rig.turn();
    driver.write(0, 4, 1, &[2; 1024]);
    rig.turn();
    driver.read(1, 2, 100, 512);
    rig.turn();
    driver.flush(0, 3);
    rig.turn();
    // Offered and notified, but not taken.
    driver.write(0, 6, 2, &[3; 512]);
    rig.gate.close();
    let saved = rig.saved();
    let there = copy(&here);
    rig.gate.open();
    drop((driver, rig));

    let standby = images.sparse("standby", 1 << 20);
    std::fs::copy(&path, &standby).unwrap();
    let rig = Rig::manual(&there, &DiskOptions { queues: 2, ..DiskOptions::new(&standby) });
    rig.gate.close();
    rig.device.restore(&saved).unwrap();
    assert_eq!(rig.saved(), saved, "a checkpoint before it runs is the same");
    assert_eq!(rig.device.in_flight(), 4);
    rig.gate.open();
    rig.turn();
    assert!(rig.engine().waiting().is_empty(), "not before it is live");
    rig.device.go_live(false);
    assert_eq!((rig.interrupts.get(), rig.wakes.get()), (1, 1), "the guest is made to look");
    let driver = Driver::resumed(&there);
    rig.turn();
    assert_eq!(rig.device.stats().reissued, 4);
    assert_eq!(rig.device.in_flight(), 5, "and what nobody kicked for again");
    rig.run();
    assert_eq!((driver.used(0), driver.used(1)), (4, 2));
    assert_eq!([5, 4, 2, 3, 6].map(|slot| driver.status(slot)), [OK; 5]);
    assert_eq!(driver.data(2, 512), [9; 512]);
    let disk = content(&standby);
    assert_eq!([0, 512, 1024, 1536].map(|at| disk[at]), [1, 2, 3, 0]);
    // And once more.
    driver.write(1, 1, 3, &[4; 512]);
    rig.run();
    assert_eq!((driver.used(1), content(&standby)[1536]), (3, 4));
}

#[test]
fn what_was_offered_is_found_without_a_kick() {
    for engine in ENGINES {
        let (images, here) = (Images::in_memory(), memory());
        let options = DiskOptions { engine, ..DiskOptions::new(images.sparse("disk", 1 << 20)) };
        let rig = Rig::new(&here, &options);
        let driver = rig.boot();
        rig.device.go_live(false);
        rig.gate.close();
        driver.write(0, 0, 0, &[1; 512]);
        rig.kick(0);
        let saved = rig.saved();
        let there = copy(&here);
        drop(rig);
        let rig = Rig::new(&there, &options);
        rig.device.restore(&saved).unwrap();
        rig.device.go_live(false);
        wait_for("the write", || Driver::resumed(&there).used(0) == 1);
        // The same without a restore: a driver that is there before the machine is live.
        let rig = Rig::new(&there, &DiskOptions::new(images.sparse("other", 1 << 20)));
        let driver = rig.boot();
        driver.write(0, 0, 0, &[1; 512]);
        rig.device.go_live(false);
        wait_for("the write", || driver.used(0) == 1);
    }
}

#[test]
fn an_impossible_list_of_requests_is_refused() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions { queues: 3, ..DiskOptions::new(&path) });
    let driver = rig.boot_with(rig.offered(), 2);
    rig.device.go_live(false);
    for slot in 0..3 {
        driver.read(0, slot, 0, 512);
    }
    rig.turn();
    driver.read(1, 8, 0, 512);
    rig.turn();
    let good = rig.device.state();
    assert_eq!(good.device.in_flight.len(), 4);
    let refused = |change: &dyn Fn(&mut BlockState)| {
        let mut state = good.clone();
        change(&mut state);
        let mut bytes = Vec::new();
        state.encode(&mut bytes);
        let error = rig.device.take_over(&bytes).unwrap_err();
        assert_eq!((rig.read(0x70), rig.device.in_flight()), (0, 0), "as after a reset");
        let mut bytes = Vec::new();
        good.encode(&mut bytes);
        rig.device.restore(&bytes).unwrap();
        assert_eq!(rig.device.in_flight(), 4);
        error
    };
    let in_flight = |queue, head| RestoreError::Refused(Misfit::InFlight { queue, head });
    assert_eq!(refused(&|it| it.device.in_flight[1].head = 64), in_flight(0, 64));
    assert_eq!(refused(&|it| it.device.in_flight[1].head = u16::MAX), in_flight(0, u16::MAX));
    assert_eq!(refused(&|it| it.device.in_flight[1].head = 0), in_flight(0, 0));
    assert_eq!(refused(&|it| it.device.in_flight[1].queue = 2), in_flight(2, 1), "no such queue in use");
    assert_eq!(refused(&|it| it.device.in_flight[1].queue = 3), in_flight(3, 1));
    let count = |queue, expected, listed| RestoreError::Refused(Misfit::Count { queue, expected, listed });
    assert_eq!(refused(&|it| it.device.in_flight.truncate(3)), count(1, 1, 0));
    assert_eq!(refused(&|it| it.device.in_flight[1] = InFlight { queue: 1, head: 1 }), count(0, 3, 2));
    assert_eq!(refused(&|it| it.device.in_flight.push(InFlight { queue: 0, head: 9 })), count(0, 3, 4));
    assert_eq!(refused(&|it| it.transport.status = 3), in_flight(0, 0), "the driver is not ready");
    assert_eq!(refused(&|it| it.transport.status |= 64), in_flight(0, 0), "the device had stopped");
    let length = RestoreError::Refused(Misfit::Length { expected: 2049, found: 2048 });
    assert_eq!(refused(&|it| it.device.facts.sectors = 2049), length);
    assert_eq!(refused(&|it| it.device.facts.shared = true), RestoreError::Refused(Misfit::Shared(true)));
    assert!(matches!(refused(&|it| it.transport.queue_count = 2), RestoreError::Transport(_)));
    // After all of that it works.
    rig.device.go_live(false);
    rig.run();
    assert_eq!((driver.used(0), driver.used(1)), (3, 1));
}

#[test]
fn a_resumed_guest_keeps_its_serial_number() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    rig.boot();
    let mut state = rig.device.state();
    state.device.facts.serial = *b"another one 89012345";
    let mut bytes = Vec::new();
    state.encode(&mut bytes);
    rig.device.restore(&bytes).unwrap();
    rig.device.go_live(false);
    let driver = Driver::resumed(&memory);
    driver.request(0, 0, super::driver::T_GET_ID, 0, 20);
    rig.run();
    assert_eq!(driver.data(0, 20), *b"another one 89012345");
}

#[test]
fn a_reset_driver_hears_no_more_of_its_requests() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    for power_on in [false, true] {
        let rig = Rig::manual(&memory, &DiskOptions::new(&path));
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.write(0, 0, 0, &[1; 1024]);
        driver.write(0, 1, 1, &[2; 512]); // will never begin
        driver.read(0, 2, 50, 512);
        rig.device.turn();
        memory.write_slice(&[0x77; 512], GuestAddress(Driver::slot(2) + super::driver::DATA)).unwrap();
        if power_on {
            rig.gate.close();
            rig.device.reset();
            rig.gate.open();
        } else {
            rig.write(0x70, 0);
        }
        assert_eq!(rig.device.in_flight(), 0);
        assert_eq!(rig.read(0x70), 0);
        rig.run();
        assert_eq!(driver.used(0), 0);
        assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [0xaa; 3]);
        assert_eq!(driver.data(2, 512), [0x77; 512], "nothing is written to the memory of a reset driver");
        assert_eq!(content(&path)[512], 1, "what had begun was done, the rest was not");
        let driver = rig.boot();
        driver.write(0, 0, 1, &[5; 512]);
        rig.run();
        assert_eq!((driver.used(0), content(&path)[512]), (1, 5));
    }
}

#[test]
fn a_driver_that_resets_in_the_middle_of_traffic_gets_a_fresh_device() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 1 << 20);
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        rig.device.go_live(false);
        for round in 0..50u8 {
            let driver = rig.boot();
            for slot in 0..16 {
                driver.write(0, slot, u64::from(slot / 2), &[round; 1024]);
            }
            rig.kick(0);
            if round % 2 == 0 {
                wait_for("all of it", || driver.used(0) == 16);
                assert!(content(&path)[..9 * 512].iter().all(|&byte| byte == round), "round {round}");
            }
            rig.write(0x70, 0);
            let used = driver.used(0);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(driver.used(0), used, "a device after its reset wrote to memory");
        }
        assert!(!rig.needs_reset());
    }
}

#[test]
fn a_rest_waits_for_what_is_in_flight_and_takes_nothing_new() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let mut rig = Rig::manual(&memory, &DiskOptions::new(&path));
    rig.start_thread();
    let driver = rig.boot();
    rig.device.go_live(false);
    assert!(rig.device.rest_within(Duration::from_secs(5)), "there is nothing");
    rig.device.resume();
    driver.write(0, 0, 0, &[1; 512]);
    rig.kick(0);
    wait_for("the write", || rig.engine().waiting().len() == 1);
    assert!(!rig.device.rest_within(Duration::from_millis(20)), "the disk is slow");
    let rested = std::thread::scope(|scope| {
        let rested = scope.spawn(|| rig.device.rest_within(Duration::from_secs(20)));
        settle();
        driver.write(0, 1, 1, &[2; 512]);
        rig.kick(0);
        settle();
        assert_eq!(rig.engine().waiting().len(), 1, "nothing new");
        rig.engine().complete(0, None);
        rested.join().unwrap()
    });
    assert!(rested);
    assert_eq!((driver.used(0), rig.device.in_flight()), (1, 0));
    rig.kick(0);
    settle();
    assert_eq!(rig.device.in_flight(), 0, "until it is resumed");
    rig.device.resume();
    wait_for("the second", || rig.engine().complete_all() == 1);
    wait_for("the second", || driver.used(0) == 2);
}

#[test]
fn the_device_goes_away_from_behind_a_closed_gate() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 16 << 20);
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        for slot in 0..60 {
            driver.write(0, slot, u64::from(slot) * 500, &[1; 240 << 10]);
        }
        rig.kick(0);
        wait_for("some of it", || driver.used(0) > 0);
        rig.gate.close();
        let start = Instant::now();
        let image = rig.device.image();
        drop((rig.valve, rig.rig.device, rig.rig.registers));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(Arc::strong_count(&image), 1, "nothing of the device is left");
    }
}
