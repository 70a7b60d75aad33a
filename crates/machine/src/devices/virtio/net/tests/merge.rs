//! Frames in several receive buffers.

use super::*;
use crate::devices::virtio::net::offload::MRG_RXBUF;

const MERGING: u64 = FEATURES | MRG_RXBUF;

/// The frame that begins at used entry `index`, put together from its buffers, and how many they are.
fn merged(driver: &Driver<'_>, index: u16) -> (Vec<u8>, u16) {
    let (head, _) = driver.rx.used_entry(index);
    let at = RX_BUFFERS + u64::from(head) * 4096;
    let count: u16 = driver.memory.read_obj(GuestAddress(at + 10)).unwrap();
    let mut packet = Vec::new();
    for index in index..index + count {
        let (head, len) = driver.rx.used_entry(index);
        let mut part = vec![0; len as usize];
        driver.memory.read_slice(&mut part, GuestAddress(RX_BUFFERS + u64::from(head) * 4096)).unwrap();
        packet.extend(part);
    }
    (packet.split_off(12), count)
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(MERGING);
    rig.device.go_live(false);
    for slot in 0..QUEUE {
        driver.give_buffer(slot, 1536);
    }
    rig.kick_rx();
    let mut used = 0;
    for (len, buffers) in [(60, 1), (1524, 1), (1525, 2), (3060, 2), (3061, 3), (30_000, 20)] {
        rig.wire.send(&frame(len, len as usize)).unwrap();
        wait_for("the frame", || driver.rx_used() > used);
        assert!(merged(&driver, used) == (frame(len, len as usize), buffers), "{len}");
        used += buffers;
        assert_eq!(driver.rx_used(), used);
    }
    wait_for("the count", || rig.device.stats().rx_frames == 6);
}

#[test]
fn a_frame_waits_for_enough_buffers() {
    for features in [MERGING, MERGING & !EVENT_IDX] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(features);
        rig.device.go_live(false);
        for slot in 0..3 {
            driver.give_buffer(slot, 1000);
        }
        rig.kick_rx();
        rig.wire.send(&frame(1, 5000)).unwrap();
        rig.wire.send(&frame(2, 100)).unwrap();
        settle();
        assert_eq!(driver.rx_used(), 0, "no part of a frame");
        if features & EVENT_IDX == 0 {
            assert_eq!(driver.rx.used_flags(), 0, "the driver is asked to notify");
        } else {
            assert_eq!(driver.rx.avail_event(), 3);
        }
        driver.give_buffer(3, 1000);
        rig.kick_rx();
        settle();
        assert_eq!(driver.rx_used(), 0);
        for slot in 4..8 {
            driver.give_buffer(slot, 1000);
        }
        rig.kick_rx();
        wait_for("both frames", || driver.rx_used() == 7);
        assert!(merged(&driver, 0) == (frame(1, 5000), 6));
        assert!(merged(&driver, 6) == (frame(2, 100), 1));
        assert_eq!(rig.device.stats().rx_dropped, 0);
    }
}

#[test]
fn a_frame_that_can_never_fit_is_dropped() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(MERGING);
    rig.device.go_live(false);
    for slot in 0..QUEUE {
        driver.give_buffer(slot, 64);
    }
    rig.kick_rx();
    rig.wire.send(&frame(1, 64 * usize::from(QUEUE) - 11)).unwrap();
    rig.wire.send(&frame(2, 64 * usize::from(QUEUE) - 12)).unwrap();
    wait_for("the one that just fits", || driver.rx_used() == QUEUE);
    assert!(merged(&driver, 0) == (frame(2, 64 * usize::from(QUEUE) - 12), QUEUE));
    assert_eq!(rig.device.stats().rx_dropped, 1);
}

/// With tables of their own the buffers of one frame could have as many descriptors as the queue has,
/// squared, and a checkpoint waits for the frame in hand.
#[test]
fn the_buffers_of_a_frame_have_no_more_descriptors_than_the_queue() {
    const PIECES: u16 = QUEUE / 2;
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(MERGING);
    rig.device.go_live(false);
    for slot in 0..QUEUE {
        let [table, buffer] = [LARGE, RX_BUFFERS].map(|at| at + u64::from(slot) * 4096);
        for piece in 0..PIECES {
            let more = if piece + 1 < PIECES { NEXT } else { 0 };
            let at = buffer + 20 * u64::from(piece);
            rig::put(&memory, table, piece, Descriptor::new(at, 20, WRITE | more, piece + 1));
        }
        driver.rx.put(slot, Descriptor::new(table, 16 * u32::from(PIECES), INDIRECT, 0));
        driver.rx.offer(slot);
    }
    rig.kick_rx();
    let most = 2 * 20 * usize::from(PIECES) - HEADER;
    rig.wire.send(&frame(1, most + 1)).unwrap();
    rig.wire.send(&frame(2, most)).unwrap();
    wait_for("the one that just fits", || driver.rx_used() == 2);
    assert!(merged(&driver, 0) == (frame(2, most), 2));
    assert_eq!(rig.device.stats().rx_dropped, 1);
}

#[test]
fn buffers_that_hold_no_header_stop_the_device() {
    for len in [0, 1, 11] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(MERGING);
        rig.device.go_live(false);
        driver.give_buffer(0, 1536);
        driver.give_buffer(1, len);
        rig.kick_rx();
        rig.wire.send(&frame(1, 60)).unwrap();
        wait_for("a good one", || driver.rx_used() == 1);
        rig.wire.send(&frame(2, 60)).unwrap();
        wait_for("the device to stop", || rig.needs_reset());
        assert_eq!(driver.rx_used(), 1);
    }
}

/// A driver that polls must see all the buffers of a frame as soon as it sees the first.
#[test]
fn the_buffers_of_a_frame_appear_together() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(MERGING);
    rig.device.go_live(false);
    for slot in 0..QUEUE {
        driver.give_buffer(slot, 200);
    }
    rig.kick_rx();
    let buffers = 8;
    let mut taken = 0u16;
    for round in 0..400 {
        rig.wire.send(&frame(round, 200 * 8 - 12)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut used = driver.rx_used();
        while used == taken {
            assert!(Instant::now() < deadline, "no frame");
            used = driver.rx_used();
        }
        assert_eq!(used.wrapping_sub(taken), buffers, "a part of a frame in round {round}");
        for index in 0..buffers {
            driver.rx.offer(driver.rx.used_entry(taken.wrapping_add(index)).0 as u16);
        }
        taken = used;
        rig.kick_rx();
    }
}

#[test]
fn an_interrupt_comes_when_any_of_the_buffers_was_asked_for() {
    for event in 0..4 {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(MERGING);
        driver.rx.set_used_event(event);
        rig.device.go_live(false);
        for slot in 0..8 {
            driver.give_buffer(slot, 100);
        }
        rig.kick_rx();
        settle();
        let before = rig.interrupts.get();
        rig.wire.send(&frame(0, 288)).unwrap();
        wait_for("the frame", || driver.rx_used() == 3);
        settle();
        assert_eq!(rig.interrupts.get() - before, usize::from(event < 3), "event {event}");
    }
}

#[test]
fn a_waiting_frame_is_forgotten_by_a_device_that_goes_live_again() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(MERGING);
    rig.device.go_live(false);
    driver.give_buffer(0, 100);
    rig.kick_rx();
    rig.wire.send(&frame(1, 1000)).unwrap();
    settle();
    rig.gate.close();
    rig.device.go_live(false);
    rig.gate.open();
    assert_eq!(rig.device.stats().stale, 1);
    rig.wire.send(&frame(2, 60)).unwrap();
    wait_for("a fresh one", || driver.rx_used() == 1);
    assert!(merged(&driver, 0) == (frame(2, 60), 1));
}
