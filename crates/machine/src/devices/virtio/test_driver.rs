//! A driver for the tests of the small devices: the guest's side of the registers and of split queues (virtio
//! 1.2, 2.7), byte by byte in guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{COMMON_FEATURES, DeviceHost, Interrupt, Waker};
use crate::bus::SharedDevice;
use crate::devices::Device;
use crate::devices::gate::DeviceGate;

pub(super) type Memory = GuestMemoryMmap<AtomicBitmap>;

pub(super) const MEMORY: usize = 1 << 20;
/// Size of every queue.
pub(super) const QUEUE: u16 = 16;
/// The rings of queue `i` begin at `RINGS + i * 0x4000`.
const RINGS: u64 = 0x1_0000;
/// Buffers of the tests begin here.
pub(super) const BUFFERS: u64 = 0x4_0000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) fn wait_for(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Gives the device thread time to do what it must not do.
pub(super) fn settle() {
    std::thread::sleep(Duration::from_millis(20));
}

#[derive(Default)]
pub(super) struct Count(AtomicUsize);

impl Count {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Interrupt for Count {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Waker for Count {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A machine around one device.
pub(super) struct Rig<D> {
    pub(super) memory: Arc<Memory>,
    pub(super) device: D,
    pub(super) gate: Arc<DeviceGate>,
    pub(super) interrupts: Arc<Count>,
    pub(super) wakes: Arc<Count>,
    registers: SharedDevice,
}

impl<D: Device> Rig<D> {
    pub(super) fn new(make: impl FnOnce(DeviceHost<Memory>) -> D) -> Self {
        Self::on(Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()), make)
    }

    pub(super) fn on(memory: Arc<Memory>, make: impl FnOnce(DeviceHost<Memory>) -> D) -> Self {
        let (gate, interrupts, wakes) =
            (Arc::new(DeviceGate::new()), Arc::<Count>::default(), Arc::<Count>::default());
        let device = make(DeviceHost {
            memory: memory.clone(),
            gate: gate.clone(),
            interrupt: interrupts.clone(),
            waker: wakes.clone(),
        });
        let registers = device.registers();
        Self { memory, device, gate, interrupts, wakes, registers }
    }

    pub(super) fn write(&self, register: u64, value: u32) {
        self.registers.lock().unwrap().write(register, &value.to_le_bytes());
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.registers.lock().unwrap().read(register, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.read(0x70) & 64 != 0
    }

    /// Sets up the device with `queues` fresh queues.
    pub(super) fn boot(&self, queues: u32) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x24, half);
            self.write(0x20, (COMMON_FEATURES >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
        for index in 0..queues {
            let ring = self.ring(index);
            self.memory.write_slice(&[0; 0x4000], GuestAddress(ring.at)).unwrap();
            self.write(0x30, index);
            self.write(0x38, QUEUE.into());
            self.write(0x80, ring.at as u32);
            self.write(0x90, ring.at as u32 + 0x1000);
            self.write(0xa0, ring.at as u32 + 0x2000);
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "the device starts");
    }

    pub(super) fn ring(&self, index: u32) -> Ring<'_> {
        Ring { memory: &self.memory, at: RINGS + u64::from(index) * 0x4000 }
    }

    pub(super) fn kick(&self, queue: u32) {
        self.write(0x50, queue);
    }

    pub(super) fn saved(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.device.state_bytes());
        let at = bytes.as_ptr();
        self.device.save(&mut bytes);
        assert_eq!(bytes.as_ptr(), at, "saving does not allocate");
        bytes
    }

    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// The driver's side of a queue.
#[derive(Clone, Copy)]
pub(super) struct Ring<'m> {
    memory: &'m Memory,
    pub(super) at: u64,
}

impl Ring<'_> {
    pub(super) fn put(&self, slot: u16, at: u64, len: u32, flags: u16, next: u16) {
        put(self.memory, self.at, slot, Descriptor::new(at, len, flags, next));
    }

    /// Makes the chain that begins at `head` available.
    pub(super) fn offer(&self, head: u16) {
        let index: u16 = self.memory.read_obj(GuestAddress(self.at + 0x1002)).unwrap();
        let entry = self.at + 0x1004 + 2 * u64::from(index % QUEUE);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.set_index(index.wrapping_add(1));
    }

    pub(super) fn set_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.at + 0x1002)).unwrap();
    }

    pub(super) fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.at + 0x2002)).unwrap()
    }

    /// Head and length of what was used as number `index`.
    pub(super) fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = self.at + 0x2004 + 8 * u64::from(index % QUEUE);
        let [head, len] = [at, at + 4].map(|at| self.memory.read_obj(GuestAddress(at)).unwrap());
        (head, len)
    }
}

fn put(memory: &Memory, table: u64, slot: u16, descriptor: Descriptor) {
    memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(slot))).unwrap();
}

/// Lays one thing after the other that no driver may do into queue `queue`, has the device look, and checks
/// that it has stopped, stays stopped and starts again with the next driver. `right` are the flags of a right
/// buffer there.
pub(super) fn hostile<D: Device>(rig: &Rig<D>, queues: u32, queue: u32, right: u16, works: impl Fn(&Rig<D>)) {
    let outside = MEMORY as u64;
    type Lay<'a> = Box<dyn Fn(Ring<'_>) + 'a>;
    let one = |at: u64, len: u32, flags: u16, next: u16| -> Lay<'_> {
        Box::new(move |ring| {
            ring.put(0, at, len, flags, next);
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
            ring.put(0, BUFFERS, 1, right | NEXT, 1);
            ring.put(1, BUFFERS, 1, right | NEXT, 0);
            ring.offer(0);
        }),
        Box::new(|ring| {
            ring.put(0, BUFFERS, 64, right | NEXT, 1);
            ring.put(1, BUFFERS, u32::MAX, right, 0);
            ring.offer(0);
        }),
        Box::new(|ring| ring.offer(QUEUE)),
        Box::new(|ring| ring.offer(u16::MAX)),
        Box::new(|ring| ring.set_index(QUEUE + 1)),
        Box::new(|ring| ring.set_index(u16::MAX)),
        Box::new(|ring| {
            put(ring.memory, table, 0, Descriptor::new(table, 16, INDIRECT, 0));
            ring.put(0, table, 16, INDIRECT, 0);
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
        assert_eq!(rig.ring(queue).used(), 0, "case {number}");
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
        rig.memory.write_slice(bytes, GuestAddress(rig.ring(index).at)).unwrap();
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
