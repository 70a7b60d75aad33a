//! Drivers that break the rules: the device stops, says so and touches nothing it should not; after a reset
//! it works.

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::net::fuzz;

const OUTSIDE: u64 = MEMORY as u64;

/// Has the device meet a bad chain in the transmit (or receive) queue, then resets it and checks that it
/// works.
fn meets(receive: bool, lay: impl Fn(&Memory, Ring<'_>)) {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    lay(&memory, if receive { driver.rx } else { driver.tx });
    rig.kick_rx();
    rig.kick_tx();
    if receive {
        rig.wire.send(&frame(1, 60)).unwrap();
    }
    wait_for("the device to stop", || rig.needs_reset());
    assert_eq!(rig.read(0x60) & 2, 2, "the driver is told");
    assert_eq!((driver.rx_used(), driver.tx_used(), rig.sink.count()), (0, 0, 0));
    // It stays stopped.
    rig.kick_tx();
    settle();
    assert!(rig.needs_reset());

    let driver = rig.boot(FEATURES);
    driver.give_buffer(0, 1526);
    rig.kick_rx();
    driver.send(0, &frame(2, 60));
    rig.kick_tx();
    wait_for("a frame out", || rig.sink.count() == 1);
    rig.wire.send(&frame(3, 60)).unwrap();
    wait_for("a frame in", || driver.rx_used() == 1);
    assert_eq!(driver.received(0), frame(3, 60));
}

fn one(receive: bool, descriptor: Descriptor) {
    meets(receive, |_, queue| {
        queue.put(0, descriptor);
        queue.offer(0);
    });
}

#[test]
fn buffers_outside_of_memory() {
    for at in [OUTSIDE, OUTSIDE - 30, u64::MAX - 5, 1 << 60] {
        one(false, Descriptor::new(at, 72, 0, 0));
    }
    for at in [OUTSIDE, OUTSIDE - 30, u64::MAX - 5, 1 << 60] {
        one(true, Descriptor::new(at, 1526, WRITE, 0));
    }
}

#[test]
fn absurd_sizes() {
    for len in [0, 1, 11, 12 + MAX_FRAME as u32 + 1, 1 << 17, u32::MAX] {
        one(false, Descriptor::new(TX_BUFFERS, len, 0, 0));
    }
    for len in [0, 1, 12, 72, 1525] {
        one(true, Descriptor::new(RX_BUFFERS, len, WRITE, 0));
    }
}

#[test]
fn wrong_direction() {
    one(false, Descriptor::new(TX_BUFFERS, 72, WRITE, 0));
    one(true, Descriptor::new(RX_BUFFERS, 1526, 0, 0));
}

#[test]
fn chains_that_loop_or_lead_nowhere() {
    for receive in [false, true] {
        let flags = if receive { WRITE | NEXT } else { NEXT };
        // To itself, with and without bytes; to a descriptor the table does not have.
        for (len, next) in [(0, 0), (1, 0), (100, QUEUE), (100, u16::MAX)] {
            one(receive, Descriptor::new(TX_BUFFERS, len, flags, next));
        }
        // A ring of two.
        meets(receive, |_, queue| {
            queue.put(0, Descriptor::new(TX_BUFFERS, 1, flags, 1));
            queue.put(1, Descriptor::new(TX_BUFFERS, 1, flags, 0));
            queue.offer(0);
        });
        // More than 4 GiB together.
        meets(receive, |_, queue| {
            queue.put(0, Descriptor::new(TX_BUFFERS, 2000, flags, 1));
            queue.put(1, Descriptor::new(TX_BUFFERS, u32::MAX, flags & !NEXT, 0));
            queue.offer(0);
        });
    }
}

#[test]
fn heads_and_indexes_out_of_range() {
    for receive in [false, true] {
        meets(receive, |_, queue| queue.offer(QUEUE));
        meets(receive, |_, queue| queue.offer(u16::MAX));
        meets(receive, |_, queue| queue.set_index(QUEUE + 1));
        meets(receive, |_, queue| queue.set_index(u16::MAX));
    }
}

#[test]
fn indirect_tables_that_are_none() {
    for receive in [false, true] {
        let table = TX_BUFFERS + 0x8000;
        for (at, len) in
            [(table, 0), (table, 8), (table, 17), (OUTSIDE, 16), (u64::MAX - 7, 16), (table, !15u32)]
        {
            one(receive, Descriptor::new(at, len, INDIRECT, 0));
        }
        // A table within a table, and a table longer than the queue.
        meets(receive, |memory, queue| {
            rig::put(memory, table, 0, Descriptor::new(table, 16, INDIRECT, 0));
            queue.put(0, Descriptor::new(table, 16, INDIRECT, 0));
            queue.offer(0);
        });
        meets(receive, |memory, queue| {
            // Right in everything but its number of descriptors.
            for n in 0..QUEUE + 1 {
                let more = if n < QUEUE { NEXT } else { 0 };
                let (len, flags) = if receive { (50, WRITE | more) } else { (3, more) };
                rig::put(memory, table, n, Descriptor::new(TX_BUFFERS, len, flags, n + 1));
            }
            queue.put(0, Descriptor::new(table, u32::from(QUEUE + 1) * 16, INDIRECT, 0));
            queue.offer(0);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn any_driver(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        fuzz::run(&bytes);
    }
}

/// Random bytes reach everything that a driver can.
#[test]
fn any_driver_comes_far() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut byte = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    };
    let mut all = fuzz::Reached::default();
    for _ in 0..2000 {
        let bytes: Vec<u8> = (0..1500).map(|_| byte()).collect();
        let one = fuzz::run(&bytes);
        all.obeyed += one.obeyed;
        all.broken += one.broken;
        all.stats.tx_frames += one.stats.tx_frames;
        all.stats.tx_bad_headers += one.stats.tx_bad_headers;
        all.stats.rx_frames += one.stats.rx_frames;
        all.stats.rx_dropped += one.stats.rx_dropped;
    }
    let few = [all.obeyed, all.stats.tx_frames, all.stats.rx_frames, all.stats.rx_dropped];
    assert!(few.iter().all(|&count| count > 20) && all.broken > 1000, "{all:?}");
    assert!(all.stats.tx_bad_headers > 20, "{all:?}");
}
