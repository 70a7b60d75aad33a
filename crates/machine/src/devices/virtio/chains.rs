//! Taking buffers from a driver that may be hostile: what the small devices have in common.
//!
//! A chain is walked once, with a bound on its descriptors; what is wrong with it stops the device. Guest
//! memory is touched with vm-memory's methods only, so that its bitmap has every page a device dirties.

use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory, GuestMemoryError};

use super::{QueueProgress, wants_interrupt};

/// How the driver broke the rules; the device stops until it is reset.
#[derive(Debug, Error)]
pub(crate) enum Broken {
    #[error("the queue cannot be used: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("a buffer lies outside guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("the available ring cannot be read")]
    Ring,
    #[error("a descriptor chain is empty, is cut off or has more descriptors than the queue")]
    Chain,
    #[error("a buffer to {0} has the wrong direction")]
    Direction(&'static str),
    #[error("a buffer is longer than {0} bytes")]
    Long(usize),
}

/// Why a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// There may be more; another batch must follow.
    More,
    /// Nothing more to do until the other side says so.
    Idle,
}

/// A queue and whether the driver has been asked to notify it.
pub(crate) struct Ring {
    queue: Queue,
    /// The driver notifies about new buffers. True at first: nobody has told it otherwise, or it is not known
    /// because the queue comes from a saved state.
    asked: bool,
}

impl Ring {
    pub(crate) fn new(queue: Queue) -> Self {
        Self { queue, asked: true }
    }

    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(crate) fn progress(&self) -> QueueProgress {
        QueueProgress { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Whether the driver has made a buffer available. If not, it will notify when it does.
    pub(crate) fn has_next<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
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
        Ok(self.queue.enable_notification(memory)?)
    }

    pub(crate) fn next<'m, M: GuestMemory>(
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

    /// Gives a buffer back.
    pub(crate) fn used<M: GuestMemory>(&mut self, memory: &M, head: u16, len: u32) -> Result<(), Broken> {
        Ok(self.queue.add_used(memory, head, len)?)
    }

    /// Whether the driver wants an interrupt for the buffers given back since the last call.
    pub(crate) fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        Ok(wants_interrupt(&mut self.queue, memory)?)
    }
}

/// Visits the descriptors of a chain. The iterator simply stops where a chain is broken (an index or an
/// indirect table out of range, a loop, 4 GiB); it can be told by the last descriptor, which then still
/// points to a next one.
pub(crate) fn walk<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    limit: u16,
    mut visit: impl FnMut(Descriptor) -> Result<(), Broken>,
) -> Result<(), Broken> {
    let mut count = 0;
    let mut cut_off = true;
    for descriptor in chain {
        count += 1;
        if count > limit {
            return Err(Broken::Chain);
        }
        visit(descriptor)?;
        cut_off = descriptor.has_next();
    }
    if cut_off { Err(Broken::Chain) } else { Ok(()) }
}
