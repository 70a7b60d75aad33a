//! The queues of a driver that is ready: taking chains and giving them back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemory;

use super::request::Broken;
use crate::devices::virtio::{InterruptLine, MAX_QUEUES, QueueProgress, wants_interrupt};

/// The queues, and what they need.
pub(super) struct Queues<M> {
    pub(super) memory: Arc<M>,
    pub(super) line: Arc<InterruptLine>,
    /// A write is durable when it is complete.
    pub(super) features: u64,
    rings: [Option<Ring>; MAX_QUEUES],
}

/// One queue.
pub(super) struct Ring {
    pub(super) queue: Queue,
    /// The driver notifies about new chains. True at first: nobody has told it otherwise, or it is not known
    /// because the queue comes from a saved state.
    asked: bool,
    /// Chains were given back since the last interrupt was thought about.
    used: bool,
}

impl<M: GuestMemory> Queues<M> {
    pub(super) fn new(
        memory: Arc<M>,
        line: Arc<InterruptLine>,
        features: u64,
        queues: [Option<Queue>; MAX_QUEUES],
    ) -> Self {
        let rings = queues.map(|queue| queue.map(|queue| Ring { queue, asked: true, used: false }));
        Self { memory, line, features, rings }
    }

    pub(super) fn ring(&mut self, index: u16) -> Option<(&mut Ring, &M)> {
        let ring = self.rings.get_mut(usize::from(index))?.as_mut()?;
        Some((ring, &self.memory))
    }

    pub(super) fn progress(&self, index: usize) -> Option<QueueProgress> {
        let queue = &self.rings.get(index)?.as_ref()?.queue;
        Some(QueueProgress { next_avail: queue.next_avail(), next_used: queue.next_used() })
    }

    /// Gives a chain back to the driver.
    pub(super) fn give_back(&mut self, index: u16, head: u16, len: u32) -> Result<(), Broken> {
        let Some((ring, memory)) = self.ring(index) else { return Ok(()) };
        ring.queue.add_used(memory, head, len)?;
        ring.used = true;
        Ok(())
    }

    /// Raises the interrupt if the driver wants one for what was given back. Says whether anything was.
    pub(super) fn signal(&mut self) -> Result<bool, Broken> {
        let (mut any, mut wanted) = (false, false);
        for ring in self.rings.iter_mut().flatten() {
            if std::mem::take(&mut ring.used) {
                any = true;
                wanted |= wants_interrupt(&mut ring.queue, &*self.memory)?;
            }
        }
        if wanted {
            self.line.signal_used();
        }
        Ok(any)
    }
}

impl Ring {
    /// The head of the next chain the driver has made available. If there is none, it will notify when there
    /// is.
    pub(super) fn next<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<u16>, Broken> {
        if !self.has_next(memory)? {
            return Ok(None);
        }
        match self.queue.iter(memory)?.next() {
            Some(chain) => Ok(Some(chain.head_index())),
            None => Err(Broken::Ring),
        }
    }

    /// Leaves the chain that was taken last with the driver, for later.
    pub(super) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    fn has_next<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, virtio_queue::Error> {
        let available = self.queue.avail_idx(memory, Ordering::Acquire)?.0 != self.queue.next_avail();
        if available {
            if self.asked {
                self.queue.disable_notification(memory)?;
                self.asked = false;
            }
            return Ok(true);
        }
        self.asked = true;
        // Looks again after asking: a chain that came in between brings no notification.
        self.queue.enable_notification(memory)
    }
}
