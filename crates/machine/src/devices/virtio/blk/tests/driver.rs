//! The guest's driver: what it does to its rings and buffers, byte by byte in guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::{Memory, Ring};
pub(super) use crate::devices::virtio::rig::{INDIRECT, NEXT, WRITE};

/// Size of each queue.
pub(super) const QUEUE: u16 = 64;
/// Where the queues begin.
const RINGS: u64 = 0x1_0000;
/// Where slots begin: each has an indirect table, a header, a status, and data.
const SLOTS: u64 = 0x10_0000;
const SLOT: u64 = 0x4_0000;
const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x1010;
pub(super) const DATA: u64 = 0x2000;
/// Most data of a slot.
pub(super) const MAX: usize = (SLOT - DATA) as usize;

pub(super) const T_IN: u32 = 0;
pub(super) const T_OUT: u32 = 1;
pub(super) const T_FLUSH: u32 = 4;
pub(super) const T_GET_ID: u32 = 8;
pub(super) const T_DISCARD: u32 = 11;
pub(super) const T_WRITE_ZEROES: u32 = 13;

fn ring_at(queue: u16) -> u64 {
    RINGS + Ring::BYTES * u64::from(queue)
}

/// The driver of a disk with several queues. A request is built in a slot, whose number is also the number of
/// its first descriptor.
pub(super) struct Driver {
    pub(super) memory: Arc<Memory>,
    /// Whether requests use indirect tables; otherwise they use the queue's own descriptors, three per slot.
    pub(super) indirect: AtomicBool,
}

impl Driver {
    pub(super) fn fresh(memory: &Arc<Memory>, queues: u16) -> Self {
        for queue in 0..queues {
            Ring::fresh(memory, ring_at(queue), QUEUE);
        }
        Self { memory: memory.clone(), indirect: AtomicBool::new(true) }
    }

    /// The driver of a guest that was resumed.
    pub(super) fn resumed(memory: &Arc<Memory>) -> Self {
        Self { memory: memory.clone(), indirect: AtomicBool::new(true) }
    }

    pub(super) fn ring(&self, queue: u16) -> Ring<'_> {
        Ring::at(&self.memory, ring_at(queue), QUEUE)
    }

    /// Address of a slot.
    pub(super) fn slot(slot: u16) -> u64 {
        SLOTS + SLOT * u64::from(slot)
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(super) fn set<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that begins at `head` available.
    pub(super) fn offer(&self, queue: u16, head: u16) {
        self.ring(queue).offer(head);
    }

    pub(super) fn set_index(&self, queue: u16, index: u16) {
        self.ring(queue).set_index(index);
    }

    /// How many chains the device has given back.
    pub(super) fn used(&self, queue: u16) -> u16 {
        self.ring(queue).used_index()
    }

    /// Head and length of the chain that was given back as number `index`.
    pub(super) fn used_entry(&self, queue: u16, index: u16) -> (u16, u32) {
        let (head, len) = self.ring(queue).used_entry(index);
        (head as u16, len)
    }

    pub(super) fn put(&self, queue: u16, index: u16, descriptor: Descriptor) {
        self.ring(queue).put(index, descriptor);
    }

    /// Lays out a chain of buffers and makes it available.
    pub(super) fn chain(&self, queue: u16, slot: u16, buffers: &[(u64, u32, u16)]) {
        let table = Self::slot(slot);
        let last = buffers.len() - 1;
        for (index, &(at, len, flags)) in buffers.iter().enumerate() {
            let more = if index < last { NEXT } else { 0 };
            if self.indirect.load(Ordering::Relaxed) {
                let descriptor = Descriptor::new(at, len, flags | more, index as u16 + 1);
                self.set(table + 16 * index as u64, descriptor);
            } else {
                // The heads are the slots; the other descriptors are taken from the end of the table.
                let place = |index: usize| match index {
                    0 => slot,
                    more => QUEUE / 2 + (slot * 4 + more as u16 - 1) % (QUEUE / 2),
                };
                let descriptor = Descriptor::new(at, len, flags | more, place(index + 1));
                self.put(queue, place(index), descriptor);
            }
        }
        if self.indirect.load(Ordering::Relaxed) {
            let len = 16 * buffers.len() as u32;
            self.put(queue, slot, Descriptor::new(table, len, INDIRECT, 0));
        }
        self.offer(queue, slot);
    }

    /// Puts a header and a status that no device writes into a slot.
    pub(super) fn header(&self, slot: u16, kind: u32, sector: u64) {
        let at = Self::slot(slot);
        self.set(at + HEADER, kind);
        self.set(at + HEADER + 4, 0u32);
        self.set(at + HEADER + 8, sector);
        self.set(at + STATUS, 0xaau8);
    }

    /// A request with `len` bytes of data in the slot, in one buffer.
    pub(super) fn request(&self, queue: u16, slot: u16, kind: u32, sector: u64, len: usize) {
        self.header(slot, kind, sector);
        let at = Self::slot(slot);
        let to_driver = matches!(kind, T_IN | T_GET_ID);
        let data = (at + DATA, len as u32, if to_driver { WRITE } else { 0 });
        let (header, status) = ((at + HEADER, 16, 0), (at + STATUS, 1, WRITE));
        if len > 0 {
            self.chain(queue, slot, &[header, data, status]);
        } else {
            self.chain(queue, slot, &[header, status]);
        }
    }

    pub(super) fn fill(&self, slot: u16, data: &[u8]) {
        assert!(data.len() <= MAX);
        self.memory.write_slice(data, GuestAddress(Self::slot(slot) + DATA)).unwrap();
    }

    pub(super) fn write(&self, queue: u16, slot: u16, sector: u64, data: &[u8]) {
        self.fill(slot, data);
        self.request(queue, slot, T_OUT, sector, data.len());
    }

    pub(super) fn read(&self, queue: u16, slot: u16, sector: u64, len: usize) {
        self.request(queue, slot, T_IN, sector, len);
    }

    pub(super) fn flush(&self, queue: u16, slot: u16) {
        self.request(queue, slot, T_FLUSH, 0, 0);
    }

    /// A discard or write-zeroes of ranges: first sector, sectors, flags.
    pub(super) fn ranges(&self, queue: u16, slot: u16, kind: u32, ranges: &[(u64, u32, u32)]) {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.fill(slot, &bytes);
        self.request(queue, slot, kind, 0, bytes.len());
    }

    pub(super) fn status(&self, slot: u16) -> u8 {
        self.get(Self::slot(slot) + STATUS)
    }

    pub(super) fn data(&self, slot: u16, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(Self::slot(slot) + DATA)).unwrap();
        data
    }

    /// Buffers of a slot's header and status.
    pub(super) fn ends(slot: u16) -> [u64; 2] {
        [Self::slot(slot) + HEADER, Self::slot(slot) + STATUS]
    }
}
