//! Moving bytes between the two queues of the guest and the host's end of the port, a batch at a time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue};
use vm_memory::{Bytes, GuestMemory};

use super::stats::Counters;
use crate::devices::gate::Pass;
use crate::devices::port::{PortInput, PortSink};
use crate::devices::virtio::chains::{Broken, Ring, Turn, walk};
use crate::devices::virtio::{InterruptLine, QueueProgress};

/// Index of the queue with the guest's receive buffers.
pub(super) const RX: usize = 0;
/// Index of the queue with the guest's output.
pub(super) const TX: usize = 1;

/// Bytes that are moved at once.
pub(super) const PART: usize = 4096;
/// Longest output in one buffer; a checkpoint waits for the buffer in hand.
const MAX_OUTPUT: usize = 64 << 10;
/// Most buffers a batch moves in one direction, so that the other one gets its turn.
const BATCH: usize = 16;

/// The queues of a driver that is ready.
pub(super) struct Queues<M> {
    memory: Arc<M>,
    pub(super) line: Arc<InterruptLine>,
    rx: Ring,
    tx: Ring,
}

impl<M: GuestMemory> Queues<M> {
    pub(super) fn new(memory: Arc<M>, line: Arc<InterruptLine>, rx: Queue, tx: Queue) -> Self {
        Self { memory, line, rx: Ring::new(rx), tx: Ring::new(tx) }
    }

    pub(super) fn progress(&self, index: usize) -> Option<QueueProgress> {
        match index {
            RX => Some(self.rx.progress()),
            TX => Some(self.tx.progress()),
            _ => None,
        }
    }

    /// Hands the guest's output to `sink`. Says how many buffers were taken.
    pub(super) fn transmit(
        &mut self,
        sink: &dyn PortSink,
        buffer: &mut [u8; PART],
        counters: &Counters,
        pass: &Pass<'_>,
    ) -> Result<(Turn, usize), Broken> {
        let memory = &*self.memory;
        let mut done = 0;
        let turn = loop {
            if done == BATCH || pass.must_leave() {
                break Turn::More;
            }
            let Some(chain) = self.tx.next(memory)? else { break Turn::Idle };
            let head = chain.head_index();
            let len = print(chain, memory, self.tx.size(), sink, buffer)?;
            counters.tx_bytes.fetch_add(len as u64, Ordering::Relaxed);
            self.tx.used(memory, head, 0)?;
            done += 1;
        };
        if done > 0 && self.tx.wants_interrupt(memory)? {
            self.line.signal_used();
        }
        Ok((turn, done))
    }

    /// Gives the guest what was typed, until there is no more or it has no more buffers. Says how many were
    /// filled.
    pub(super) fn receive(
        &mut self,
        input: &PortInput,
        buffer: &mut [u8; PART],
        counters: &Counters,
        pass: &Pass<'_>,
    ) -> Result<(Turn, usize), Broken> {
        let memory = &*self.memory;
        let mut done = 0;
        let turn = loop {
            if done == BATCH || pass.must_leave() {
                break Turn::More;
            }
            // First the buffer, so that its arrival is told while nothing is typed.
            if !self.rx.has_next(memory)? || input.is_empty() {
                break Turn::Idle;
            }
            let chain = self.rx.next(memory)?.ok_or(Broken::Ring)?;
            let head = chain.head_index();
            let len = fill(chain, memory, self.rx.size(), input, buffer)?;
            counters.rx_bytes.fetch_add(len as u64, Ordering::Relaxed);
            self.rx.used(memory, head, len as u32)?;
            done += 1;
        };
        if done > 0 && self.rx.wants_interrupt(memory)? {
            self.line.signal_used();
        }
        Ok((turn, done))
    }
}

fn print<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    sink: &dyn PortSink,
    buffer: &mut [u8; PART],
) -> Result<usize, Broken> {
    let mut len = 0;
    walk(chain, limit, |descriptor| {
        if descriptor.is_write_only() {
            return Err(Broken::Direction("send"));
        }
        let mut rest = descriptor.len() as usize;
        if rest > MAX_OUTPUT - len {
            return Err(Broken::Long(MAX_OUTPUT));
        }
        len += rest;
        let mut at = descriptor.addr();
        while rest > 0 {
            let part = &mut buffer[..rest.min(PART)];
            memory.read_slice(part, at)?;
            sink.write(part);
            rest -= part.len();
            // Does not wrap: all of the part was read.
            at = vm_memory::GuestAddress(at.0.wrapping_add(part.len() as u64));
        }
        Ok(())
    })?;
    Ok(len)
}

fn fill<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    input: &PortInput,
    buffer: &mut [u8; PART],
) -> Result<usize, Broken> {
    let (mut len, mut room) = (0, 0usize);
    walk(chain, limit, |descriptor| {
        if !descriptor.is_write_only() {
            return Err(Broken::Direction("receive"));
        }
        let most = (descriptor.len() as usize).min(PART - len);
        let count = input.take(&mut buffer[..most]);
        if count > 0 {
            memory.write_slice(&buffer[..count], descriptor.addr())?;
        }
        len += count;
        room += descriptor.len() as usize;
        Ok(())
    })?;
    if room == 0 { Err(Broken::Chain) } else { Ok(len) }
}
