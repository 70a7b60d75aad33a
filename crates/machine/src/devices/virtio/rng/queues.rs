//! Filling the guest's buffers with random bytes, a batch at a time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestMemory};

use super::source::EntropySource;
use super::stats::Counters;
use crate::devices::gate::Pass;
use crate::devices::virtio::chains::{Broken, Ring, Turn, walk};
use crate::devices::virtio::{InterruptLine, QueueProgress};

/// Most bytes that one request is given, some microseconds' worth: a checkpoint waits for the request in
/// hand. A driver that wants more asks again; the used ring tells it how many it got.
pub(super) const REQUEST: usize = 4096;

/// What ended a batch.
#[derive(Debug)]
pub(super) enum Ended {
    /// Nothing went wrong.
    Turn(Turn),
    /// All that may be given for now is given.
    Throttled,
    /// The host has no random bytes.
    Dry(io::Error),
}

/// The queue of a driver that is ready.
pub(super) struct Queues<M> {
    memory: Arc<M>,
    pub(super) line: Arc<InterruptLine>,
    ring: Ring,
}

impl<M: GuestMemory> Queues<M> {
    pub(super) fn new(memory: Arc<M>, line: Arc<InterruptLine>, queue: Queue) -> Self {
        Self { memory, line, ring: Ring::new(queue) }
    }

    pub(super) fn progress(&self) -> QueueProgress {
        self.ring.progress()
    }

    /// Answers requests until there are no more or `budget` bytes are given. Says how many were answered.
    pub(super) fn give(
        &mut self,
        source: &dyn EntropySource,
        buffer: &mut [u8; REQUEST],
        budget: &mut usize,
        counters: &Counters,
        pass: &Pass<'_>,
    ) -> Result<(Ended, usize), Broken> {
        let memory = &*self.memory;
        let mut done = 0;
        let ended = loop {
            if pass.must_leave() {
                break Ended::Turn(Turn::More);
            }
            if !self.ring.has_next(memory)? {
                break Ended::Turn(Turn::Idle);
            }
            if *budget == 0 {
                break Ended::Throttled;
            }
            // Before the request is taken: one that cannot be answered stays with the guest.
            if let Err(error) = source.fill(buffer) {
                break Ended::Dry(error);
            }
            let given = answer(&mut self.ring, memory, buffer)?;
            *budget = budget.saturating_sub(given);
            counters.requests.fetch_add(1, Ordering::Relaxed);
            counters.bytes.fetch_add(given as u64, Ordering::Relaxed);
            done += 1;
        };
        // Bytes that the guest did not get are nobody's.
        buffer.fill(0);
        if done > 0 && self.ring.wants_interrupt(memory)? {
            self.line.signal_used();
        }
        Ok((ended, done))
    }
}

fn answer<M: GuestMemory>(ring: &mut Ring, memory: &M, bytes: &[u8]) -> Result<usize, Broken> {
    let chain = ring.next(memory)?.ok_or(Broken::Ring)?;
    let head = chain.head_index();
    let (mut given, mut room) = (0, 0usize);
    walk(chain, ring.size(), |descriptor| {
        if !descriptor.is_write_only() {
            return Err(Broken::Direction("receive"));
        }
        let part = (descriptor.len() as usize).min(bytes.len() - given);
        if part > 0 {
            memory.write_slice(&bytes[given..given + part], descriptor.addr())?;
        }
        given += part;
        room += descriptor.len() as usize;
        Ok(())
    })?;
    if room == 0 {
        return Err(Broken::Chain);
    }
    ring.used(memory, head, given as u32)?;
    Ok(given)
}
