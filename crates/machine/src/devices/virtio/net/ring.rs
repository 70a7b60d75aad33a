//! One queue of the driver at work: its notifications, and buffers that are used together.
//!
//! `virtio_queue::Queue` shows the driver each used buffer at once. A frame in several merged buffers must
//! appear in one step (virtio 1.2, 5.1.6.4.1): a driver that polls takes the first and would miss the others.
//! So the used ring is filled here, and with it goes the count that decides about interrupts.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::chains::Broken;
use crate::devices::virtio::{QueueProgress, wants_interrupt};

/// A used buffer: head of its chain, bytes written.
pub(super) type Used = (u16, u32);

/// A queue and whether the driver has been asked to notify it.
pub(super) struct Ring {
    queue: Queue,
    /// The driver notifies about new buffers. True at first: nobody has told it otherwise, or it is not known
    /// because the queue comes from a saved state.
    asked: bool,
    /// Buffers used since the driver was last considered for an interrupt.
    added: u16,
}

impl Ring {
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue, asked: true, added: 0 }
    }

    /// Number of descriptors, and so the most a chain may have.
    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(super) fn progress(&self) -> QueueProgress {
        QueueProgress { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Whether the driver has made a buffer available. If not, it will notify when it does.
    pub(super) fn has_next<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, virtio_queue::Error> {
        let available = self.queue.avail_idx(memory, Ordering::Acquire)?.0 != self.queue.next_avail();
        if available {
            if self.asked {
                self.queue.disable_notification(memory)?;
                self.asked = false;
            }
            return Ok(true);
        }
        self.asked = true;
        // Looks again after asking: a buffer that came in between brings no notification.
        self.queue.enable_notification(memory)
    }

    /// The next chain the driver has made available.
    pub(super) fn next<'m, M: GuestMemory>(
        &mut self,
        memory: &'m M,
    ) -> Result<Option<DescriptorChain<&'m M>>, Broken> {
        if !self.has_next(memory)? {
            return Ok(None);
        }
        match self.queue.iter(memory)?.next() {
            Some(chain) => Ok(Some(chain)),
            None => Err(Broken::Ring),
        }
    }

    /// Leaves the last `chains` chains with the driver, to be taken again.
    pub(super) fn rewind(&mut self, chains: usize) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(chains as u16));
    }

    /// Gives buffers back to the driver, all in one step.
    pub(super) fn give_back<M: GuestMemory>(
        &mut self,
        memory: &M,
        used: &[Used],
    ) -> Result<(), virtio_queue::Error> {
        let Some((&(head, len), before)) = used.split_last() else { return Ok(()) };
        let next = self.queue.next_used();
        for (index, &(head, len)) in before.iter().enumerate() {
            let entry = next.wrapping_add(index as u16) % self.queue.size();
            let at = self.queue.used_ring() + 4 + 8 * u64::from(entry);
            let bytes = (u64::from(len) << 32 | u64::from(head)).to_le_bytes();
            memory.write_slice(&bytes, GuestAddress(at)).map_err(virtio_queue::Error::GuestMemory)?;
        }
        self.queue.set_next_used(next.wrapping_add(before.len() as u16));
        // The last one moves the index past all of them.
        self.queue.add_used(memory, head, len)?;
        self.added = self.added.wrapping_add(used.len() as u16);
        Ok(())
    }

    /// Whether the driver wants an interrupt for the buffers used since the last call.
    pub(super) fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        let added = std::mem::take(&mut self.added);
        // The used ring is filled before the driver's wish is read: if the driver changes it meanwhile it
        // looks at the ring afterwards.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            return Ok(wants_interrupt(&mut self.queue, memory)?);
        }
        let at = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
        let event = u16::from_le(memory.load(GuestAddress(at), Ordering::Relaxed)?);
        // The event index is one of those passed since the last call.
        Ok(self.queue.next_used().wrapping_sub(event).wrapping_sub(1) < added)
    }
}
