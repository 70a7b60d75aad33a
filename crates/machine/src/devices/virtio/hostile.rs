//! Drivers that break the rules, which all devices must survive. The small devices have their whole driver
//! here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::COMMON_FEATURES;
pub(super) use super::rig::{INDIRECT, Memory, NEXT, Rig, Ring, WRITE, memory, put};
use crate::devices::Device;

pub(super) const MEMORY: usize = 1 << 20;
/// Size of every queue.
pub(super) const QUEUE: u16 = 16;
/// The rings of queue `i` begin at `RINGS + i * 0x4000`.
const RINGS: u64 = 0x1_0000;
/// Buffers of the tests begin here.
pub(super) const BUFFERS: u64 = 0x4_0000;

pub(crate) fn wait_for(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Gives the device thread time to do what it must not do.
pub(crate) fn settle() {
    std::thread::sleep(Duration::from_millis(20));
}

impl<D: Device> Rig<D> {
    /// A rig with the memory of the small devices.
    pub(super) fn new(make: impl FnOnce(super::DeviceHost<Memory>) -> D) -> Self {
        Self::on(memory(MEMORY), make)
    }

    /// Sets up the device with `queues` fresh queues.
    pub(super) fn boot(&self, queues: u32) {
        self.negotiate(COMMON_FEATURES);
        for index in 0..queues {
            self.add_queue(index, &Ring::fresh(&self.memory, ring_at(index), QUEUE));
        }
        self.start();
    }

    pub(super) fn ring(&self, index: u32) -> Ring<'_> {
        Ring::at(&self.memory, ring_at(index), QUEUE)
    }
}

fn ring_at(index: u32) -> u64 {
    RINGS + u64::from(index) * 0x4000
}

/// Lays one thing after the other that no driver may do into queue `queue`, has the device look, and checks
/// that it has stopped, stays stopped and starts again with the next driver. `right` are the flags of a right
/// buffer there.
pub(super) fn hostile<D: Device>(rig: &Rig<D>, queues: u32, queue: u32, right: u16, works: impl Fn(&Rig<D>)) {
    let outside = MEMORY as u64;
    type Lay<'a> = Box<dyn Fn(Ring<'_>) + 'a>;
    let one = |at: u64, len: u32, flags: u16, next: u16| -> Lay<'_> {
        Box::new(move |ring| {
            ring.put(0, Descriptor::new(at, len, flags, next));
            ring.offer(0);
        })
    };
    let table = BUFFERS + 0x8000;
    let mut cases: Vec<Lay<'_>> = vec![
        one(outside, 64, right, 0),
        one(outside - 30, 64, right, 0),
        one(u64::MAX - 5, 64, right, 0),
        one(BUFFERS, 64, right ^ WRITE, 0),
        one(BUFFERS, 0, right | NEXT, 0),
        one(BUFFERS, 1, right | NEXT, 0),
        one(BUFFERS, 64, right | NEXT, QUEUE),
        one(BUFFERS, 64, right | NEXT, u16::MAX),
        Box::new(|ring| {
            ring.put(0, Descriptor::new(BUFFERS, 1, right | NEXT, 1));
            ring.put(1, Descriptor::new(BUFFERS, 1, right | NEXT, 0));
            ring.offer(0);
        }),
        Box::new(|ring| {
            ring.put(0, Descriptor::new(BUFFERS, 64, right | NEXT, 1));
            ring.put(1, Descriptor::new(BUFFERS, u32::MAX, right, 0));
            ring.offer(0);
        }),
        Box::new(|ring| ring.offer(QUEUE)),
        Box::new(|ring| ring.offer(u16::MAX)),
        Box::new(|ring| ring.set_index(QUEUE + 1)),
        Box::new(|ring| ring.set_index(u16::MAX)),
        Box::new(|ring| {
            put(&rig.memory, table, 0, Descriptor::new(table, 16, INDIRECT, 0));
            ring.put(0, Descriptor::new(table, 16, INDIRECT, 0));
            ring.offer(0);
        }),
    ];
    for (at, len) in [(table, 0), (table, 17), (outside, 16), (u64::MAX - 7, 16), (table, !15)] {
        cases.push(one(at, len, INDIRECT, 0));
    }
    for (number, lay) in cases.iter().enumerate() {
        rig.boot(queues);
        rig.memory.write_slice(&[0; 0x4000], GuestAddress(table)).unwrap();
        lay(rig.ring(queue));
        rig.kick(queue);
        wait_for(&format!("the device to stop in case {number}"), || rig.needs_reset());
        assert_eq!(rig.read(0x60) & 2, 2, "the driver is told");
        assert_eq!(rig.ring(queue).used_index(), 0, "case {number}");
        rig.kick(queue);
        rig.boot(queues);
        works(rig);
    }
}

/// What a fuzzer gives a device: the bytes of its rings and some notifications and register accesses.
pub(super) fn any_guest() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<(u16, u32)>)> {
    let descriptors = prop::collection::vec(
        (
            prop_oneof![0..MEMORY as u64 + 64, any::<u64>()],
            prop_oneof![0..200u32, any::<u32>()],
            0..8u16,
            0..QUEUE + 1,
        ),
        1..QUEUE as usize,
    );
    let queue = (
        descriptors,
        prop::collection::vec(0..QUEUE + 1, QUEUE as usize),
        prop_oneof![0..QUEUE + 2, any::<u16>()],
    );
    let queue = queue.prop_map(|(descriptors, heads, index)| {
        let mut bytes = vec![0; 0x1004 + 2 * QUEUE as usize];
        for (slot, (at, len, flags, next)) in descriptors.into_iter().enumerate() {
            let slot = &mut bytes[16 * slot..16 * slot + 16];
            slot[..8].copy_from_slice(&at.to_le_bytes());
            slot[8..12].copy_from_slice(&len.to_le_bytes());
            slot[12..14].copy_from_slice(&flags.to_le_bytes());
            slot[14..].copy_from_slice(&next.to_le_bytes());
        }
        bytes[0x1002..0x1004].copy_from_slice(&index.to_le_bytes());
        for (entry, head) in heads.into_iter().enumerate() {
            bytes[0x1004 + 2 * entry..][..2].copy_from_slice(&head.to_le_bytes());
        }
        bytes
    });
    (prop::collection::vec(queue, 2), prop::collection::vec((0..0x104u16, any::<u32>()), 0..8))
}

/// The entry of a fuzz target: lays `rings` into memory, lets the device at them, writes `registers`.
/// Whatever they are, the device survives, its state can be taken over by `other`, and it works with the next
/// driver.
pub(super) fn fuzz<D: Device>(
    rig: &Rig<D>,
    other: impl FnOnce(&Arc<Memory>) -> Rig<D>,
    queues: u32,
    rings: &[Vec<u8>],
    registers: &[(u16, u32)],
    works: impl Fn(&Rig<D>),
) {
    rig.boot(queues);
    for (index, bytes) in (0..queues).zip(rings) {
        rig.memory.write_slice(bytes, GuestAddress(rig.ring(index).table())).unwrap();
        rig.kick(index);
    }
    for &(register, value) in registers {
        rig.write(u64::from(register & !3), value);
    }
    rig.gate.close();
    let state = rig.saved();
    let new = other(&rig.memory);
    // A driver may have broken its queues so that nobody can go on with them; then the new device is reset.
    if new.device.restore(&state).is_ok() {
        assert_eq!(new.saved(), state, "a state survives the way unchanged");
        new.device.go_live(false);
    }
    drop(new);
    rig.device.reset();
    rig.gate.open();
    rig.boot(queues);
    works(rig);
}
