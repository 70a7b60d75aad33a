//! A machine around one device, and the driver's side of its queues (virtio 1.2, 2.7), byte by byte in guest
//! memory: for the tests of all devices and for the fuzz targets.
#![cfg_attr(not(test), allow(dead_code, reason = "the fuzz targets use a part of it"))]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{DeviceHost, Interrupt, Waker};
use crate::bus::SharedDevice;
use crate::devices::Device;
use crate::devices::gate::DeviceGate;

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Guest memory of so many bytes from address 0 on.
pub(super) fn memory(bytes: usize) -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), bytes)]).expect("the host has some memory"))
}

/// What a machine is asked for: interrupts, or wakes.
#[derive(Default)]
pub(crate) struct Count(AtomicUsize);

impl Count {
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// One more. Says how many there were before.
    pub(crate) fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

impl Interrupt for Count {
    fn trigger(&self) {
        self.add();
    }
}

impl Waker for Count {
    fn wake(&self) {
        self.add();
    }
}

/// A machine around one device.
pub(super) struct Rig<D> {
    pub(super) memory: Arc<Memory>,
    pub(super) device: Arc<D>,
    pub(super) gate: Arc<DeviceGate>,
    pub(super) interrupts: Arc<Count>,
    pub(super) wakes: Arc<Count>,
    pub(super) registers: SharedDevice,
}

impl<D: Device> Rig<D> {
    pub(super) fn on(memory: Arc<Memory>, make: impl FnOnce(DeviceHost<Memory>) -> D) -> Self {
        let (gate, interrupts, wakes) = <(Arc<DeviceGate>, Arc<Count>, Arc<Count>)>::default();
        let host = DeviceHost {
            memory: memory.clone(),
            gate: gate.clone(),
            interrupt: interrupts.clone(),
            waker: wakes.clone(),
        };
        let device = Arc::new(make(host));
        let registers = device.registers();
        Self { memory, device, gate, interrupts, wakes, registers }
    }

    pub(super) fn write(&self, register: u64, value: u32) {
        self.registers.lock().expect("nothing panics").write(register, &value.to_le_bytes());
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.registers.lock().expect("nothing panics").read(register, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.read(0x70) & 64 != 0
    }

    /// The features that the device offers.
    pub(super) fn offered(&self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.write(0x14, half);
            all | u64::from(self.read(0x10)) << (32 * half)
        })
    }

    /// Resets the device and agrees on features.
    pub(super) fn negotiate(&self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
    }

    pub(super) fn add_queue(&self, index: u32, ring: &Ring<'_>) {
        self.write(0x30, index);
        self.write(0x38, ring.size.into());
        let [table, available, used] = ring.at;
        self.write(0x80, table as u32);
        self.write(0x90, available as u32);
        self.write(0xa0, used as u32);
        self.write(0x44, 1);
    }

    /// The driver says that it is ready.
    pub(super) fn ready(&self) {
        self.write(0x70, 15);
    }

    /// The driver is ready, and the device starts.
    pub(super) fn start(&self) {
        self.ready();
        assert_eq!(self.read(0x70), 15, "the device starts");
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
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("the buffer lies in memory");
        bytes
    }
}

/// The driver's side of one queue.
#[derive(Clone, Copy)]
pub(super) struct Ring<'m> {
    memory: &'m Memory,
    /// Descriptor table, available ring, used ring.
    at: [u64; 3],
    size: u16,
}

impl<'m> Ring<'m> {
    /// Bytes of a queue whose parts are a page each.
    pub(super) const BYTES: u64 = 3 * 4096;

    /// The queue at these addresses, as it is.
    pub(super) fn new(memory: &'m Memory, at: [u64; 3], size: u16) -> Self {
        Self { memory, at, size }
    }

    /// The queue whose parts are a page each, as it is.
    pub(super) fn at(memory: &'m Memory, at: u64, size: u16) -> Self {
        Self::new(memory, [at, at + 4096, at + 2 * 4096], size)
    }

    /// A queue there without descriptors.
    pub(super) fn fresh(memory: &'m Memory, at: u64, size: u16) -> Self {
        memory.write_slice(&[0; Self::BYTES as usize], GuestAddress(at)).expect("rings lie in memory");
        Self::at(memory, at, size)
    }

    pub(super) fn table(&self) -> u64 {
        self.at[0]
    }

    fn get<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).expect("rings lie in memory")
    }

    fn set<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).expect("rings lie in memory");
    }

    pub(super) fn put(&self, slot: u16, descriptor: Descriptor) {
        put(self.memory, self.at[0], slot, descriptor);
    }

    /// Makes the chain that begins at `head` available.
    pub(super) fn offer(&self, head: u16) {
        let index: u16 = self.get(self.at[1] + 2);
        self.set_entry(index % self.size, head);
        self.set_index(index.wrapping_add(1));
    }

    pub(super) fn set_entry(&self, entry: u16, head: u16) {
        self.set(self.at[1] + 4 + 2 * u64::from(entry), head);
    }

    pub(super) fn set_index(&self, index: u16) {
        self.set(self.at[1] + 2, index);
    }

    /// 1: the driver wants no interrupts.
    pub(super) fn set_flags(&self, flags: u16) {
        self.set(self.at[1], flags);
    }

    /// The driver wants an interrupt once the entry of this index is used.
    pub(super) fn set_used_event(&self, index: u16) {
        self.set_entry(self.size, index);
    }

    /// 1: the device wants no notifications.
    pub(super) fn used_flags(&self) -> u16 {
        self.get(self.at[2])
    }

    /// The device wants a notification once the entry of this index is available.
    pub(super) fn avail_event(&self) -> u16 {
        self.get(self.at[2] + 4 + 8 * u64::from(self.size))
    }

    pub(super) fn used_index(&self) -> u16 {
        self.get(self.at[2] + 2)
    }

    /// Head and length of what was used as number `index`.
    pub(super) fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = self.at[2] + 4 + 8 * u64::from(index % self.size);
        (self.get(at), self.get(at + 4))
    }
}

/// Writes a descriptor into a table.
pub(super) fn put(memory: &Memory, table: u64, slot: u16, descriptor: Descriptor) {
    let at = table + 16 * u64::from(slot);
    memory.write_obj(descriptor, GuestAddress(at)).expect("descriptors lie in memory");
}
