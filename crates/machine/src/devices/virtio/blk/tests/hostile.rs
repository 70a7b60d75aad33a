//! Drivers that break the rules: the device stops, says so and touches nothing that it should not; after a
//! reset it works.

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;

use super::super::fuzz;
use super::driver::{DATA, INDIRECT, NEXT, QUEUE, WRITE};
use super::*;

const OUTSIDE: u64 = MEMORY as u64;

/// Gives the device something bad, then resets it and checks that it works.
fn meets(lay: impl Fn(&Driver)) {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    lay(&driver);
    let before = rig.interrupts.get();
    rig.run();
    assert!(rig.needs_reset());
    assert!(rig.interrupts.get() > before && rig.read(0x60) & 2 == 2, "the driver is told");
    assert_eq!((driver.used(0), rig.device.in_flight()), (0, 0));
    // It stays stopped, and its state can be saved and restored.
    rig.run();
    let saved = rig.saved();
    rig.device.restore(&saved).unwrap();
    assert!(rig.needs_reset());
    assert!(content(&path).iter().all(|&byte| byte == 0));

    let driver = rig.boot();
    assert!(!rig.needs_reset());
    driver.write(0, 0, 0, &[1; 512]);
    rig.run();
    assert_eq!((driver.used(0), content(&path)[0]), (1, 1));
}

/// A chain with these buffers between its header and its status.
fn one(buffers: &[(u64, u32, u16)]) {
    for kind in [0, 1, 4, 8, 11, 13, 77] {
        meets(|driver| {
            driver.header(0, kind, 0);
            let [header, status] = Driver::ends(0);
            let mut all = vec![(header, 16, 0)];
            all.extend_from_slice(buffers);
            all.push((status, 1, WRITE));
            driver.chain(0, 0, &all);
        });
    }
}

#[test]
fn buffers_outside_of_memory() {
    for at in [OUTSIDE, OUTSIDE - 30, u64::MAX - 5, 1 << 60] {
        one(&[(at, 512, 0)]);
        one(&[(at, 512, WRITE)]);
    }
    one(&[(0x1000, u32::MAX, 0)]);
    one(&[(0x1000, u32::MAX, WRITE), (0x1000, u32::MAX, WRITE)]);
}

#[test]
fn chains_without_header_or_status() {
    let at = Driver::slot(0) + DATA;
    for buffers in [
        &[(at, 16, 0)][..],
        &[(at, 15, 0), (at, 1, WRITE)],
        &[(at, 1, WRITE)],
        &[(at, 0, 0), (at, 100, WRITE)],
        &[(at, 16, 0), (at, 0, WRITE)],
        &[(at, 16, 0), (at, 512, 0)],
        &[(at, 16, 0), (at, 1, WRITE), (at, 512, 0)],
        &[(at, 1, WRITE), (at, 16, 0)],
    ] {
        meets(|driver| driver.chain(0, 0, buffers));
    }
}

#[test]
fn chains_that_loop_or_lead_nowhere() {
    let at = Driver::slot(0) + DATA;
    for flags in [NEXT, NEXT | WRITE] {
        for (len, next) in [(0, 0), (1, 0), (100, QUEUE), (100, u16::MAX)] {
            meets(|driver| {
                driver.put(0, 0, Descriptor::new(at, len, flags, next));
                driver.offer(0, 0);
            });
        }
        meets(|driver| {
            driver.put(0, 0, Descriptor::new(at, 8, flags, 1));
            driver.put(0, 1, Descriptor::new(at, 8, flags, 0));
            driver.offer(0, 0);
        });
    }
}

#[test]
fn heads_and_indexes_out_of_range() {
    for head in [QUEUE, 128, 200, u16::MAX] {
        meets(|driver| driver.offer(0, head));
    }
    for index in [QUEUE + 1, u16::MAX] {
        meets(|driver| driver.set_index(0, index));
    }
}

#[test]
fn a_chain_that_is_in_flight_is_not_taken_again() {
    meets(|driver| {
        driver.write(0, 5, 0, &[0; 512]);
        driver.offer(0, 5);
    });
}

#[test]
fn what_is_in_flight_when_the_device_stops_is_not_given_back() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    driver.read(0, 0, 0, 512);
    rig.turn();
    driver.offer(0, 0);
    rig.run();
    assert!(rig.needs_reset());
    assert_eq!((driver.used(0), driver.status(0)), (0, 0xaa));
}

#[test]
fn indirect_tables_that_are_none() {
    let table = Driver::slot(0);
    for (at, len) in [
        (table, 0),
        (table, 8),
        (table, 17),
        (OUTSIDE, 16),
        (OUTSIDE - 8, 16),
        (u64::MAX - 7, 16),
        (table, 16 * 0x10000),
        (table, !15u32),
    ] {
        meets(|driver| {
            driver.put(0, 0, Descriptor::new(at, len, INDIRECT, 0));
            driver.offer(0, 0);
        });
    }
    // A table within a table; a table that continues in the ring; a table longer than the queue.
    meets(|driver| {
        driver.set(table, Descriptor::new(table, 16, INDIRECT, 0));
        driver.put(0, 0, Descriptor::new(table, 16, INDIRECT, 0));
        driver.offer(0, 0);
    });
    meets(|driver| {
        driver.request(0, 0, 0, 0, 512);
        driver.put(0, 0, Descriptor::new(table, 48, INDIRECT | NEXT, 1));
    });
    meets(|driver| {
        driver.header(0, 0, 0);
        let [header, status] = Driver::ends(0);
        let mut buffers = vec![(header, 16, 0)];
        buffers.extend((0..u64::from(QUEUE)).map(|i| (table + DATA + i * 8, 8, WRITE)));
        buffers.push((status, 1, WRITE));
        driver.chain(0, 0, &buffers);
    });
}

#[test]
fn a_chain_may_be_as_long_as_the_queue() {
    for indirect in [false, true] {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.numbered("disk", 64);
        let rig = Rig::manual(&memory, &DiskOptions::new(&path));
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.header(0, 0, 3);
        let [header, status] = Driver::ends(0);
        let data = Driver::slot(0) + DATA;
        let middle = QUEUE - 2;
        let mut buffers = vec![(header, 16, 0)];
        for index in 0..middle {
            let len = if index == 0 { 512 - (u32::from(middle) - 1) } else { 1 };
            buffers.push((data + u64::from(index) * 600, len, WRITE));
        }
        buffers.push((status, 1, WRITE));
        for (index, &(at, len, flags)) in buffers.iter().enumerate() {
            let (index, more) = (index as u16, if index + 1 < buffers.len() { NEXT } else { 0 });
            let descriptor = Descriptor::new(at, len, flags | more, index + 1);
            if indirect {
                driver.set(Driver::slot(1) + 16 * u64::from(index), descriptor);
            } else {
                driver.put(0, index, descriptor);
            }
        }
        if indirect {
            let len = 16 * u32::from(QUEUE);
            driver.put(0, 0, Descriptor::new(Driver::slot(1), len, INDIRECT, 0));
        }
        driver.offer(0, 0);
        rig.run();
        assert_eq!((driver.used(0), driver.status(0)), (1, OK));
        assert_eq!(driver.data(0, 8), 4u64.to_le_bytes());
    }
}

/// A descriptor that is close to a good one, or any at all. Headers, ranges and data are anywhere from 0x400
/// on.
fn descriptor() -> impl Strategy<Value = [u8; 16]> {
    let at = prop_oneof![6 => (0x40u64..0x100).prop_map(|at| at * 16), 1 => 0u64..0x11000, 1 => any::<u64>()];
    let len = prop_oneof![
        4 => Just(16u32), 3 => Just(1), 3 => Just(512), 2 => (1u32..20).prop_map(|n| n * 16), 1 => 0u32..5000,
        1 => any::<u32>()
    ];
    let flags =
        prop_oneof![12 => prop::sample::select(vec![0u16, 1, 1, 1, 2, 2, 3, 3, 4, 5]), 1 => any::<u16>()];
    let next = prop_oneof![12 => 0u16..fuzz::QUEUE, 1 => any::<u16>()];
    (at, len, flags, next).prop_map(|(at, len, flags, next)| fuzz::descriptor(at, len, flags, next))
}

/// Memory that makes sense to a device: two queues, and headers behind them.
fn input() -> impl Strategy<Value = Vec<u8>> {
    let queue = || {
        (
            prop::collection::vec(descriptor(), usize::from(fuzz::QUEUE)),
            prop::collection::vec(
                prop_oneof![12 => 0u16..fuzz::QUEUE, 1 => any::<u16>()],
                usize::from(fuzz::QUEUE),
            ),
            prop_oneof![12 => 0u16..=fuzz::QUEUE, 1 => any::<u16>()],
        )
    };
    let kind = prop_oneof![8 => prop::sample::select(vec![0u32, 1, 1, 4, 8, 11, 13]), 1 => any::<u32>()];
    let sector = prop_oneof![8 => 0u64..66, 1 => any::<u64>()];
    let headers = prop::collection::vec((kind, sector), 192);
    (any::<[u8; fuzz::CONTROL]>(), [queue().boxed(), queue().boxed()], headers).prop_map(
        |(control, queues, headers)| {
            let mut memory = vec![0; 0x400 + headers.len() * 16];
            let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
            for ((table, ring, index), [table_at, ring_at, _]) in queues.iter().zip(fuzz::RINGS) {
                put(table_at as usize, &table.concat());
                put(ring_at as usize + 2, &index.to_le_bytes());
                for (slot, head) in ring.iter().enumerate() {
                    put(ring_at as usize + 4 + 2 * slot, &head.to_le_bytes());
                }
            }
            // A header, read as a range to discard: its kind is where the first sector is, then comes its
            // sector.
            for (slot, (kind, sector)) in headers.iter().enumerate() {
                put(0x400 + slot * 16, &kind.to_le_bytes());
                put(0x400 + slot * 16 + 8, &sector.to_le_bytes());
            }
            [&control[..], &memory].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_rings(input in input()) {
        fuzz::fuzz(&input);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_memory(input in prop::collection::vec(any::<u8>(), 0..3000)) {
        fuzz::fuzz(&input);
    }
}
