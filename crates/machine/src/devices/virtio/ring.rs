//! The queues of a driver that is ready, as the device works on them: taking chains, giving them back,
//! telling the driver.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::chain::{Broken, Chain};
use super::{ActivateError, InterruptLine, MAX_QUEUES};
use crate::devices::gate::Pass;

/// A used chain: its head, and how many bytes were written to it.
pub type Used = (u16, u32);

/// One queue.
///
/// `virtio_queue::Queue` shows the driver each used chain at once. A frame in several merged buffers must
/// appear in one step (virtio 1.2, 5.1.6.4.1): a driver that polls takes the first and would miss the others.
/// So the used ring is filled here, and with it goes the count that decides about interrupts.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    /// Whether the driver notifies about new chains. True at first: nobody has told it otherwise, or the
    /// queue comes from a saved state and it is unknown.
    asked: bool,
    /// Chains given back since the driver was last considered for an interrupt.
    added: u16,
}

impl Ring {
    fn new(queue: Queue) -> Self {
        Self { queue, asked: true, added: 0 }
    }

    /// Number of descriptors, and so the most that a chain may have.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Positions in the available and in the used ring (free-running indexes, as in the rings).
    pub(super) fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Whether the driver has made a chain available. If not, it will notify when it does.
    ///
    /// # Errors
    /// [`Broken`] when the queue cannot be used.
    pub fn has_next<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        let available = self.queue.avail_idx(memory, Ordering::Acquire)?.0 != self.queue.next_avail();
        if available {
            if self.asked {
                self.queue.disable_notification(memory)?;
                self.asked = false;
            }
            return Ok(true);
        }
        self.asked = true;
        // Check again after asking: a chain that came in between causes no notification.
        Ok(self.queue.enable_notification(memory)?)
    }

    /// The head of the next chain that the driver has made available. If there is none, it will notify when
    /// there is.
    ///
    /// # Errors
    /// [`Broken`] when the queue cannot be used.
    pub fn next_head<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<u16>, Broken> {
        if !self.has_next(memory)? {
            return Ok(None);
        }
        match self.queue.iter(memory)?.next() {
            Some(chain) => Ok(Some(chain.head_index())),
            None => Err(Broken::Available),
        }
    }

    /// Takes the next chain, if there is one; returns its head.
    ///
    /// # Errors
    /// [`Broken`] when the queue cannot be used or the chain is invalid.
    pub fn next<M: GuestMemory>(&mut self, memory: &M, chain: &mut Chain) -> Result<Option<u16>, Broken> {
        let head = self.next_head(memory)?;
        head.map_or(Ok(()), |head| self.walk(memory, head, chain))?;
        Ok(head)
    }

    /// Takes the chain that begins at `head`, whether the driver has made it available or not.
    ///
    /// # Errors
    /// [`Broken`] when the chain is invalid.
    pub fn walk<M: GuestMemory>(&self, memory: &M, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        chain.walk(memory, &self.queue, head)
    }

    /// Returns the last `chains` chains to the driver untouched; they will be taken again.
    pub fn put_back(&mut self, chains: usize) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(chains as u16));
    }

    /// Gives chains back to the driver, all in one step.
    ///
    /// # Errors
    /// [`Broken`] when the queue cannot be used.
    pub fn give_back<M: GuestMemory>(&mut self, memory: &M, used: &[Used]) -> Result<(), Broken> {
        let Some((&(head, len), before)) = used.split_last() else { return Ok(()) };
        let next = self.queue.next_used();
        for (index, &(head, len)) in before.iter().enumerate() {
            let entry = next.wrapping_add(index as u16) % self.queue.size();
            let at = self.queue.used_ring() + 4 + 8 * u64::from(entry);
            let bytes = (u64::from(len) << 32 | u64::from(head)).to_le_bytes();
            memory.write_slice(&bytes, GuestAddress(at))?;
        }
        self.queue.set_next_used(next.wrapping_add(before.len() as u16));
        // The last one moves the index past all of them.
        self.queue.add_used(memory, head, len)?;
        self.added = self.added.wrapping_add(used.len() as u16);
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains given back since the last call.
    fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        let added = std::mem::take(&mut self.added);
        // The used ring is filled before the driver's wish is read: if the driver changes it meanwhile it
        // looks at the ring afterwards.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags: u16 = memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)?;
            return Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let at = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
        let event = u16::from_le(memory.load(GuestAddress(at), Ordering::Relaxed)?);
        // The event index is one of those passed since the last call.
        Ok(self.queue.next_used().wrapping_sub(event).wrapping_sub(1) < added)
    }
}

/// What a device does with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done, and this many bytes were written to it.
    Used(u32),
    /// It stays with the driver; the device checks the queue again when something has changed.
    Later,
}

/// How far a device got in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Chains given back.
    pub done: usize,
    /// There may be more: another batch must follow.
    pub more: bool,
}

/// All queues of a device, and what it needs to work on them.
#[derive(Debug)]
pub struct Queues<M> {
    /// Guest memory.
    pub memory: Arc<M>,
    /// The features that the driver accepted.
    pub features: u64,
    line: Arc<InterruptLine>,
    rings: [Option<Ring>; MAX_QUEUES],
    /// Queues to be looked at, a bit for each.
    pending: u32,
    /// The current chain.
    chain: Chain,
}

impl<M: GuestMemory> Queues<M> {
    /// Queues that must all be checked; `None` where the driver did not set one up.
    pub(super) fn new(
        memory: Arc<M>,
        features: u64,
        line: Arc<InterruptLine>,
        queues: [Option<Queue>; MAX_QUEUES],
    ) -> Self {
        let rings = queues.map(|queue| queue.map(Ring::new));
        Self { memory, features, line, rings, pending: !0, chain: Chain::default() }
    }

    /// Whether the driver has set up queue `index`.
    pub fn has(&self, index: usize) -> bool {
        self.rings.get(index).is_some_and(Option::is_some)
    }

    /// Requires queue `index`.
    ///
    /// # Errors
    /// [`ActivateError`] when the driver has not set it up.
    pub fn need(&self, index: usize) -> Result<(), ActivateError> {
        if self.has(index) { Ok(()) } else { Err(ActivateError::QueueNotReady(index)) }
    }

    /// Queue `index`, with its memory.
    pub fn ring(&mut self, index: usize) -> Option<(&mut Ring, &M)> {
        Some((self.rings.get_mut(index)?.as_mut()?, &self.memory))
    }

    /// Positions of the device in queue `index`.
    pub(super) fn positions(&self, index: usize) -> Option<(u16, u16)> {
        Some(self.rings.get(index)?.as_ref()?.positions())
    }

    /// The sizes of the existing queues.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> [Option<u16>; MAX_QUEUES] {
        self.rings.each_ref().map(|ring| ring.as_ref().map(Ring::size))
    }

    pub(super) fn line(&self) -> &InterruptLine {
        &self.line
    }

    /// Queues to be looked at, a bit for each.
    pub fn pending(&self) -> u32 {
        self.pending
    }

    /// Marks queues to check.
    pub fn look_at(&mut self, queues: u32) {
        self.pending |= queues;
    }

    /// There is nothing more to do in queue `index` until the driver notifies.
    pub fn looked_at(&mut self, index: usize) {
        self.pending &= !(1 << index);
    }

    /// Answers the chains of queue `index`, if it is marked: until there are no more, `most` are given back
    /// or the coordinator waits.
    ///
    /// # Errors
    /// [`Broken`] when the driver broke the rules.
    pub fn serve(
        &mut self,
        index: usize,
        most: usize,
        pass: &Pass<'_>,
        mut answer: impl FnMut(&M, &Chain) -> Result<Answer, Broken>,
    ) -> Result<Served, Broken> {
        let mut served = Served::default();
        let Self { memory, rings, pending, chain, .. } = self;
        let Some(ring) = rings[index].as_mut().filter(|_| *pending & 1 << index != 0) else {
            return Ok(served);
        };
        loop {
            if served.done == most || pass.must_leave() {
                served.more = true;
                return Ok(served);
            }
            let Some(head) = ring.next(&**memory, chain)? else { break };
            match answer(memory, chain)? {
                Answer::Used(len) => ring.give_back(&**memory, &[(head, len)])?,
                Answer::Later => {
                    ring.put_back(1);
                    break;
                }
            }
            served.done += 1;
        }
        *pending &= !(1 << index);
        Ok(served)
    }

    /// Whether chains were given back since the driver was last told.
    pub fn gave_back(&self) -> bool {
        self.rings.iter().flatten().any(|ring| ring.added > 0)
    }

    /// Raises the interrupt if the driver wants one for what was given back.
    pub(super) fn signal(&mut self) -> Result<(), Broken> {
        let mut wanted = false;
        for ring in self.rings.iter_mut().flatten().filter(|ring| ring.added > 0) {
            wanted |= ring.wants_interrupt(&*self.memory)?;
        }
        if wanted {
            self.line.signal_used();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::{self, memory};
    use super::*;

    #[test]
    fn without_event_index_the_flag_decides_about_interrupts() {
        let memory = memory(1 << 16);
        let driver = rig::Ring::fresh(&memory, 0x1000, 32);
        let mut queue = Queue::new(32).unwrap();
        queue.set_desc_table_address(Some(0x1000), Some(0));
        queue.set_avail_ring_address(Some(0x2000), Some(0));
        queue.set_used_ring_address(Some(0x3000), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&*memory));
        let mut ring = Ring::new(queue);
        assert!(ring.wants_interrupt(&*memory).unwrap());
        driver.set_flags(1);
        assert!(!ring.wants_interrupt(&*memory).unwrap());
    }
}
