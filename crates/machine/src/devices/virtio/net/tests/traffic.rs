//! Frames in both directions through rings, thread and gate.

use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryRegion;
use vm_memory::bitmap::Bitmap;

use super::*;
use crate::devices::virtio::net::OutputStats;
use crate::devices::virtio::net::nowhere::Nowhere;

const MODERN: u64 = FEATURES & !EVENT_IDX;

#[test]
fn the_guest_sees_its_address_and_a_link() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let mut config = [0xaa; 16];
    rig.device.registers().lock().unwrap().read(0x100, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 0xab, 0xcd, 0xef, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut byte = [0; 1];
    rig.device.registers().lock().unwrap().read(0x105, &mut byte);
    assert_eq!(byte, [0xef]);
    rig.device.registers().lock().unwrap().read(0xfff, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn frames_go_out_in_order() {
    for features in [FEATURES, MODERN] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(features);
        rig.device.go_live(false);
        let frames: Vec<_> = (0..100).map(|n| frame(n, 60 + n as usize * 14)).collect();
        for (n, frame) in frames.iter().enumerate() {
            // Never more in flight than the ring holds.
            wait_for("a free slot", || n as u16 - driver.tx_used() < QUEUE);
            driver.send(n as u16 % QUEUE, frame);
            rig.kick_tx();
        }
        wait_for("all frames", || driver.tx_used() == 100 && rig.sink.count() == 100);
        assert_eq!(rig.sink.frames(), frames);
        assert_eq!((rig.device.stats().tx_frames, rig.device.stats().tx_runts), (100, 0));
    }
}

#[test]
fn a_card_that_is_connected_to_nothing_takes_every_frame_and_gives_none() {
    let memory = memory();
    let mut rig = Rig::usual(&memory);
    let nowhere = Arc::new(Nowhere::with_pairs(1).unwrap());
    let output = Held::new(nowhere.clone(), OutputLimits::default(), OutputMode::PassThrough);
    rig.put_behind(nowhere, &output);
    let driver = rig.boot(MODERN);
    rig.device.go_live(true);
    driver.give_buffer(0, 1526);
    rig.kick_rx();
    for n in 0..100_u16 {
        wait_for("a free slot", || n - driver.tx_used() < QUEUE);
        driver.send(n % QUEUE, &frame(n.into(), 60));
        rig.kick_tx();
    }
    wait_for("all frames", || driver.tx_used() == 100 && rig.device.stats().tx_frames == 100);
    assert_eq!((driver.rx_used(), rig.device.stats().rx_frames), (0, 0));
}

#[test]
fn frames_come_in_order_and_mark_the_pages_they_touch() {
    for features in [FEATURES, MODERN] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(features);
        rig.device.go_live(false);
        let bitmap = memory.iter().next().unwrap().bitmap();
        for slot in 0..QUEUE {
            driver.give_buffer(slot, 1526);
        }
        rig.kick_rx();
        settle();
        let dirty = |slot: u64| bitmap.dirty_at((RX_BUFFERS + slot * 4096) as usize);
        assert!(!dirty(0), "nothing is written before a frame comes");
        let frames: Vec<_> = (0..QUEUE.into()).map(|n| frame(n, 60 + n as usize * 46)).collect();
        for frame in &frames {
            rig.wire.send(frame).unwrap();
        }
        wait_for("all frames", || driver.rx_used() == QUEUE);
        for (index, frame) in frames.iter().enumerate() {
            assert_eq!(driver.received(index as u16), *frame);
            assert!(dirty(index as u64));
        }
        wait_for("the count", || rig.device.stats().rx_frames == u64::from(QUEUE));
    }
}

#[test]
fn a_delivery_wakes_a_guest_that_wants_no_interrupts() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(MODERN);
    driver.rx.set_flags(1);
    driver.tx.set_flags(1);
    rig.device.go_live(false);
    let (interrupts, wakes) = (rig.interrupts.get(), rig.wakes.get());
    assert_eq!((interrupts, wakes), (1, 1), "going live raises both once");
    driver.give_buffer(0, 1526);
    rig.kick_rx();
    driver.send(0, &frame(0, 60));
    rig.kick_tx();
    wait_for("the frame", || rig.sink.count() == 1);
    settle();
    assert_eq!((rig.interrupts.get(), rig.wakes.get()), (1, 1), "sending wakes no one");
    rig.wire.send(&frame(1, 60)).unwrap();
    wait_for("the wake", || rig.wakes.get() == 2);
    assert_eq!(rig.interrupts.get(), 1);
    driver.rx.set_flags(0);
    driver.give_buffer(1, 1526);
    rig.kick_rx();
    rig.wire.send(&frame(2, 60)).unwrap();
    wait_for("the interrupt", || rig.interrupts.get() == 2);
    assert_eq!(rig.read(0x60), 1);
}

#[test]
fn completions_interrupt_where_the_driver_asked() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    driver.tx.set_used_event(2);
    rig.device.go_live(false);
    let before = rig.interrupts.get();
    for n in 0..4 {
        assert_eq!(rig.interrupts.get() - before, usize::from(n > 2));
        driver.send(n, &frame(n.into(), 60));
        rig.kick_tx();
        wait_for("the frame", || driver.tx_used() == n + 1);
        settle();
    }
    assert_eq!(rig.interrupts.get() - before, 1);
}

#[test]
fn frames_wait_in_the_tap_until_the_guest_has_buffers() {
    for features in [FEATURES, MODERN] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(features);
        rig.device.go_live(false);
        for n in 0..4 {
            rig.wire.send(&frame(n, 60)).unwrap();
        }
        settle();
        assert_eq!(rig.device.stats().rx_frames, 0);
        if features & EVENT_IDX == 0 {
            assert_eq!(driver.rx.used_flags(), 0, "the driver is asked to notify");
        } else {
            assert_eq!(driver.rx.avail_event(), 0);
        }
        for slot in 0..3 {
            driver.give_buffer(slot, 1526);
        }
        rig.kick_rx();
        wait_for("three frames", || driver.rx_used() == 3);
        settle();
        assert_eq!(driver.rx_used(), 3);
        if features & EVENT_IDX != 0 {
            assert_eq!(driver.rx.avail_event(), 3);
        }
        driver.give_buffer(3, 1526);
        rig.kick_rx();
        wait_for("the fourth", || driver.rx_used() == 4);
        assert_eq!((0..4).map(|n| driver.received(n)[14]).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
}

#[test]
fn chains_of_several_buffers_and_indirect_ones_work() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    // Sent: a header cut in the middle, then the frame in two pieces.
    let sent = frame(1, 100);
    memory.write_slice(&[0; 12], GuestAddress(TX_BUFFERS)).unwrap();
    memory.write_slice(&sent[..30], GuestAddress(TX_BUFFERS + 0x1000)).unwrap();
    memory.write_slice(&sent[30..], GuestAddress(TX_BUFFERS + 0x2000)).unwrap();
    let pieces = [(TX_BUFFERS, 5), (TX_BUFFERS + 5, 7), (TX_BUFFERS + 0x1000, 30), (TX_BUFFERS + 0x2000, 70)];
    for (slot, (at, len)) in pieces.into_iter().enumerate() {
        let next = if slot < 3 { NEXT } else { 0 };
        driver.tx.put(slot as u16, Descriptor::new(at, len, next, slot as u16 + 1));
    }
    driver.tx.offer(0);
    // And the same again by an indirect table.
    let table = TX_BUFFERS + 0x8000;
    for (slot, (at, len)) in pieces.into_iter().enumerate() {
        let next = if slot < 3 { NEXT } else { 0 };
        rig::put(&memory, table, slot as u16, Descriptor::new(at, len, next, slot as u16 + 1));
    }
    driver.tx.put(7, Descriptor::new(table, 64, 4, 0));
    driver.tx.offer(7);
    rig.kick_tx();
    wait_for("both", || driver.tx_used() == 2 && rig.sink.count() == 2);
    assert_eq!(rig.sink.frames(), [sent.clone(), sent]);

    // Received: header in a buffer of its own, the frame in two more.
    let parts = [(RX_BUFFERS, 12), (RX_BUFFERS + 0x1000, 20), (RX_BUFFERS + 0x2000, 1500)];
    for (slot, (at, len)) in parts.into_iter().enumerate() {
        let flags = if slot < 2 { WRITE | NEXT } else { WRITE };
        driver.rx.put(slot as u16, Descriptor::new(at, len, flags, slot as u16 + 1));
    }
    driver.rx.offer(0);
    rig.kick_rx();
    let came = frame(2, 90);
    rig.wire.send(&came).unwrap();
    wait_for("the frame", || driver.rx_used() == 1);
    let mut got = [0; 90];
    memory.read_slice(&mut got[..20], GuestAddress(RX_BUFFERS + 0x1000)).unwrap();
    memory.read_slice(&mut got[20..], GuestAddress(RX_BUFFERS + 0x2000)).unwrap();
    assert_eq!(got[..], came);
    assert_eq!(driver.rx.used_entry(0), (0, 102));
}

#[test]
fn frames_that_do_not_fit_are_dropped_and_the_next_one_comes() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    driver.give_buffer(0, 1526);
    driver.give_buffer(1, 1530);
    rig.kick_rx();
    for (n, len) in [(1, 1515), (2, 65_554), (3, 1514), (4, 1518)] {
        rig.wire.send(&frame(n, len)).unwrap();
    }
    wait_for("the ones that fit", || driver.rx_used() == 2);
    assert_eq!(driver.received(0), frame(3, 1514));
    assert_eq!(driver.received(1), frame(4, 1518));
    assert_eq!(rig.device.stats().rx_dropped, 2);
}

#[test]
fn a_runt_is_given_back_unsent() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    driver.send(0, &[]);
    driver.send(1, &[0; 13]);
    driver.send(2, &frame(1, 14));
    rig.kick_tx();
    wait_for("all three", || driver.tx_used() == 3 && rig.sink.count() == 1);
    assert_eq!(rig.sink.frames(), [frame(1, 14)]);
    assert_eq!(rig.device.stats().tx_runts, 2);
}

#[test]
fn held_frames_fill_the_ring_and_then_stay_with_the_guest() {
    let memory = memory();
    let rig = Rig::new(&memory, OutputLimits { frames: 4, bytes: 1 << 16 }, OutputMode::Discard);
    rig.output.hold(1).unwrap();
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    for n in 0..10 {
        driver.send(n, &frame(n.into(), 60));
    }
    rig.kick_tx();
    wait_for("a full ring", || driver.tx_used() == 4);
    settle();
    assert_eq!((driver.tx_used(), rig.sink.count()), (4, 0));
    for (epoch, left) in [(2, 4), (3, 8), (4, 10)] {
        let wakes = rig.wakes.get();
        rig.gate.close();
        rig.output.begin(epoch).unwrap();
        rig.gate.open();
        assert!(rig.output.release(epoch - 1).complete);
        assert_eq!(rig.sink.count(), left);
        let next = 10.min(left + 4) as u16;
        wait_for("the next ones", || driver.tx_used() == next);
        settle();
        assert_eq!(rig.wakes.get() - wakes, usize::from(left < 10), "a guest that waits for room is woken");
    }
    assert_eq!(rig.sink.frames(), (0..10).map(|n| frame(n, 60)).collect::<Vec<_>>());
}

#[test]
fn a_closed_gate_stops_both_directions() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    driver.give_buffer(0, 1526);
    rig.kick_rx();
    settle();
    rig.gate.close();
    driver.send(0, &frame(0, 60));
    rig.kick_tx();
    rig.wire.send(&frame(1, 60)).unwrap();
    settle();
    assert_eq!((rig.sink.count(), driver.tx_used(), driver.rx_used()), (0, 0, 0));
    rig.gate.open();
    wait_for("both", || driver.tx_used() == 1 && driver.rx_used() == 1);
    wait_for("the frame to leave", || {
        rig.output.stats() == OutputStats { passed_frames: 1, ..rig.output.stats() }
    });
}
