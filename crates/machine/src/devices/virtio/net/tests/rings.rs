//! The driver's view of one split queue (virtio 1.2, 2.7), byte by byte in guest memory.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Memory, QUEUE};

/// Descriptor table at the start, available ring a page on, used ring two pages on.
#[derive(Clone, Copy)]
pub(super) struct Ring<'m> {
    memory: &'m Memory,
    at: u64,
}

impl<'m> Ring<'m> {
    /// The queue at `at`, as it is.
    pub(super) fn at(memory: &'m Memory, at: u64) -> Self {
        Self { memory, at }
    }

    /// A queue at `at` without descriptors.
    pub(super) fn fresh(memory: &'m Memory, at: u64) -> Self {
        memory.write_slice(&[0; 3 * 4096], GuestAddress(at)).unwrap();
        Self { memory, at }
    }

    pub(super) fn table(&self) -> u64 {
        self.at
    }

    pub(super) fn available(&self) -> u64 {
        self.at + 4096
    }

    pub(super) fn used(&self) -> u64 {
        self.at + 2 * 4096
    }

    fn get(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn set(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(super) fn put(&self, slot: u16, descriptor: Descriptor) {
        put(self.memory, self.table(), slot, descriptor);
    }

    /// Makes the chain that begins at `head` available.
    pub(super) fn offer(&self, head: u16) {
        let index = self.get(self.available() + 2);
        self.set_entry(index % QUEUE, head);
        self.set_index(index.wrapping_add(1));
    }

    pub(super) fn set_entry(&self, entry: u16, head: u16) {
        self.set(self.available() + 4 + 2 * u64::from(entry), head);
    }

    pub(super) fn set_index(&self, index: u16) {
        self.set(self.available() + 2, index);
    }

    /// 1: the driver wants no interrupts.
    pub(super) fn set_flags(&self, flags: u16) {
        self.set(self.available(), flags);
    }

    /// The driver wants an interrupt once the entry of this index is used.
    pub(super) fn set_used_event(&self, index: u16) {
        self.set(self.available() + 4 + 2 * u64::from(QUEUE), index);
    }

    /// 1: the device wants no notifications.
    pub(super) fn used_flags(&self) -> u16 {
        self.get(self.used())
    }

    /// The device wants a notification once the entry of this index is available.
    pub(super) fn avail_event(&self) -> u16 {
        self.get(self.used() + 4 + 8 * u64::from(QUEUE))
    }

    pub(super) fn used_index(&self) -> u16 {
        self.get(self.used() + 2)
    }

    /// Head and length of what was used as number `index`.
    pub(super) fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = self.used() + 4 + 8 * u64::from(index % QUEUE);
        let [head, len] = [at, at + 4].map(|at| self.memory.read_obj(GuestAddress(at)).unwrap());
        (head, len)
    }

    /// The device's side.
    pub(super) fn device(&self) -> Queue {
        let mut queue = Queue::new(QUEUE).unwrap();
        queue.set_size(QUEUE);
        queue.set_desc_table_address(Some(self.table() as u32), Some(0));
        queue.set_avail_ring_address(Some(self.available() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used() as u32), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(self.memory));
        queue
    }
}

/// Writes a descriptor into a table.
pub(super) fn put(memory: &Memory, table: u64, slot: u16, descriptor: Descriptor) {
    let at = table + 16 * u64::from(slot);
    memory.write_obj(descriptor, GuestAddress(at)).unwrap();
}
