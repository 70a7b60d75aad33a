//! Passive, live, saved, restored, gone.

use super::*;
use crate::devices::virtio::net::announce::rarp;
use crate::devices::virtio::net::persist::NetState;
use crate::devices::virtio::persist::TransportState;
use crate::devices::virtio::slot::RestoreError;

/// The memory of the machine that takes over: a copy.
fn copy(from: &Memory) -> Arc<Memory> {
    let to = memory();
    let mut bytes = vec![0; MEMORY];
    from.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    to.write_slice(&bytes, GuestAddress(0)).unwrap();
    to
}

#[test]
fn a_passive_device_moves_nothing_and_forgets_what_came() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    for slot in 0..4 {
        driver.give_buffer(slot, 1526);
    }
    rig.kick_rx();
    driver.send(0, &frame(0, 60));
    rig.kick_tx();
    for n in 1..=5 {
        rig.wire.send(&frame(n, 60)).unwrap();
    }
    settle();
    assert!(!rig.device.is_live());
    assert_eq!((rig.sink.count(), driver.rx_used(), driver.tx_used()), (0, 0, 0));
    rig.device.go_live(false);
    assert!(rig.device.is_live());
    wait_for("what the guest sends", || rig.sink.count() == 1);
    settle();
    assert_eq!((rig.device.stats().stale, driver.rx_used()), (5, 0));
    rig.wire.send(&frame(9, 60)).unwrap();
    wait_for("a fresh frame", || driver.rx_used() == 1);
    assert_eq!(driver.received(0), frame(9, 60));
}

#[test]
fn traffic_goes_on_in_the_machine_that_takes_over() {
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        let here = memory();
        let rig = Rig::usual(&here);
        let driver = rig.boot(features);
        rig.device.go_live(false);
        for slot in 0..8 {
            driver.give_buffer(slot, 1526);
        }
        rig.kick_rx();
        for n in 0..5 {
            driver.send(n, &frame(n.into(), 60));
            rig.kick_tx();
            rig.wire.send(&frame(100 + u32::from(n), 60)).unwrap();
        }
        wait_for("some traffic", || driver.tx_used() == 5 && driver.rx_used() == 5);

        // A checkpoint in the middle: the guest has offered and notified three frames the device did not get
        // to.
        rig.gate.close();
        for n in 5..8 {
            driver.send(n, &frame(n.into(), 60));
        }
        rig.kick_tx();
        let mut saved = Vec::new();
        rig.device.save(&mut saved);
        let there = copy(&here);
        rig.gate.open();
        wait_for("the old machine", || driver.tx_used() == 8);
        drop((driver, rig));

        let rig = Rig::usual(&there);
        rig.gate.close();
        rig.device.restore(&saved).unwrap();
        let mut again = Vec::new();
        rig.device.save(&mut again);
        assert_eq!(again, saved);
        rig.device.go_live(false);
        let driver = Driver::resumed(&there);
        settle();
        assert_eq!((rig.sink.count(), driver.tx_used()), (0, 5), "not before the machine runs");
        assert_eq!((rig.interrupts.get(), rig.wakes.get()), (1, 1), "the guest is made to look");
        rig.gate.open();
        // No kick: the one the guest gave was lost with the old machine.
        wait_for("the pending frames", || driver.tx_used() == 8 && rig.sink.count() == 3);
        assert_eq!(rig.sink.frames(), (5..8).map(|n| frame(n, 60)).collect::<Vec<_>>());
        for n in 5..8 {
            rig.wire.send(&frame(100 + n, 60)).unwrap();
        }
        wait_for("the rest of the buffers", || driver.rx_used() == 8);
        let got: Vec<_> = (0..8).map(|index| driver.received(index)).collect();
        assert_eq!(got, (0..8).map(|n| frame(100 + n, 60)).collect::<Vec<_>>());
        // And on: notifications still work in both directions.
        driver.send(8, &frame(8, 60));
        rig.kick_tx();
        wait_for("one more", || driver.tx_used() == 9);
        driver.give_buffer(8, 1526);
        rig.kick_rx();
        rig.wire.send(&frame(108, 60)).unwrap();
        wait_for("and one back", || driver.rx_used() == 9);
    }
}

#[test]
fn a_restored_guest_keeps_its_address() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let mut saved = Vec::new();
    rig.device.save(&mut saved);
    saved[7] = 0x41;
    saved[13] = 0x42;
    rig.device.restore(&saved).unwrap();
    assert_eq!(rig.device.mac(), MacAddr([0x52, 0x54, 0, 0xab, 0xcd, 0x42]));
    let mut config = [0; 6];
    rig.device.registers().lock().unwrap().read(0x100, &mut config);
    assert_eq!(config, rig.device.mac().0);
    rig.device.reset();
    assert_eq!(rig.device.mac(), MacAddr([0x52, 0x54, 0, 0xab, 0xcd, 0x41]), "the card's own");
}

#[test]
fn a_bad_state_leaves_a_reset_device() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let _driver = rig.boot(FEATURES);
    let mut saved = Vec::new();
    rig.device.save(&mut saved);
    let status = NetState::BYTES - TransportState::BYTES + 4;
    saved[status] = DRIVER_OK_ALONE;
    assert!(matches!(rig.device.take_over(&saved), Err(RestoreError::Transport(_))));
    assert_eq!(rig.read(0x70), 0);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    driver.send(0, &frame(1, 60));
    rig.kick_tx();
    wait_for("a frame", || rig.sink.count() == 1);
}

const DRIVER_OK_ALONE: u8 = 4;

#[test]
fn a_machine_that_takes_over_announces_itself() {
    let memory = memory();
    let rig = Rig::new(&memory, OutputLimits::default(), OutputMode::Discard);
    rig.output.open();
    // Also while the gate is closed: an announcement is not the guest's.
    rig.gate.close();
    let start = Instant::now();
    rig.device.go_live(true);
    assert_eq!(rig.sink.count(), 1, "at once");
    rig.gate.open();
    wait_for("four more", || rig.sink.count() == 5);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(350) && took < Duration::from_secs(5), "{took:?}");
    assert!(rig.sink.frames().iter().all(|frame| frame[..] == rarp(MAC)));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.sink.count(), 5);
}

#[test]
fn a_machine_that_must_be_silent_does_not_announce_itself() {
    let memory = memory();
    let rig = Rig::new(&memory, OutputLimits::default(), OutputMode::Discard);
    rig.device.go_live(true);
    std::thread::sleep(Duration::from_millis(120));
    assert_eq!(rig.sink.count(), 0);
}

#[test]
fn the_device_goes_away_from_behind_a_closed_gate() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(true);
    rig.gate.close();
    driver.send(0, &frame(0, 60));
    rig.kick_tx();
    settle();
    let start = Instant::now();
    drop((rig.rig.device, rig.rig.registers));
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(Arc::strong_count(&rig.output), 1, "nothing of the device is left");
}

#[test]
fn a_driver_that_resets_in_the_middle_of_traffic_gets_a_fresh_device() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    rig.device.go_live(false);
    for round in 0..20 {
        let driver = rig.boot(FEATURES);
        for slot in 0..8 {
            driver.give_buffer(slot, 1526);
            driver.send(slot, &frame(round, 60));
            rig.kick_tx();
        }
        rig.kick_rx();
        rig.wire.send(&frame(round, 60)).unwrap();
        if round % 2 == 0 {
            wait_for("traffic", || driver.tx_used() == 8 && driver.rx_used() > 0);
        }
        rig.write(0x70, 0);
        let (tx, rx) = (driver.tx_used(), driver.rx_used());
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(
            (driver.tx_used(), driver.rx_used()),
            (tx, rx),
            "a device after its reset wrote to memory"
        );
    }
    assert!(!rig.needs_reset());
}
