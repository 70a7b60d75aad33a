//! Moving frames between the two queues of the guest and the outside, a batch at a time.
//!
//! Everything the driver put into memory is taken for hostile: a chain is walked once, with bounds on
//! descriptors and bytes, through a bounce buffer. Guest memory is written with vm-memory's methods only, so
//! its bitmap has every page this device dirties.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use tracing::warn;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemory, GuestMemoryError};

use super::output::{MAX_FRAME, Output, Pushed};
use super::stats::Counters;
use super::tap::FramePort;
use crate::devices::gate::Pass;
use crate::devices::virtio::{InterruptLine, QueueProgress, wants_interrupt};

/// Index of the queue with the guest's receive buffers.
pub(super) const RX: usize = 0;
/// Index of the queue with the guest's frames.
pub(super) const TX: usize = 1;

/// Length of `struct virtio_net_hdr_v1`, in front of every frame in guest memory.
const HEADER: usize = 12;
/// Shortest frame: an Ethernet header.
const MIN_FRAME: usize = 14;
/// Smallest receive buffer: header and a frame of 1514 bytes (virtio 1.2, 5.1.6.3.1).
const MIN_RX_BUFFER: usize = 1526;
/// Most frames a batch moves in one direction, so that the other one gets its turn.
const BATCH: usize = 64;

/// How the driver broke the rules; the device stops until it is reset.
#[derive(Debug, Error)]
pub(super) enum Broken {
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
    #[error("a receive buffer has {0} bytes, fewer than {MIN_RX_BUFFER}")]
    SmallBuffer(usize),
    #[error("a frame of {0} bytes with its header is shorter than the header")]
    NoHeader(usize),
    #[error("a frame is longer than {MAX_FRAME} bytes")]
    LongFrame,
}

/// Why a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// There may be more; another batch must follow.
    More,
    /// Nothing more to do until the other side says so.
    Idle,
    /// The output is full: nothing more to do until it says so.
    Full,
}

/// Room for one frame with its header on its way through; one more byte shows a frame that is too long.
pub(super) type Bounce = Box<[u8; HEADER + MAX_FRAME + 1]>;

pub(super) fn bounce() -> Bounce {
    Box::new([0; HEADER + MAX_FRAME + 1])
}

/// The queues of a driver that is ready.
pub(super) struct Queues<M> {
    pub(super) memory: Arc<M>,
    pub(super) line: Arc<InterruptLine>,
    rx: Notified,
    tx: Notified,
}

impl<M: GuestMemory> Queues<M> {
    pub(super) fn new(memory: Arc<M>, line: Arc<InterruptLine>, rx: Queue, tx: Queue) -> Self {
        Self { memory, line, rx: Notified::new(rx), tx: Notified::new(tx) }
    }

    pub(super) fn progress(&self, index: usize) -> Option<QueueProgress> {
        let queue = match index {
            RX => &self.rx.queue,
            TX => &self.tx.queue,
            _ => return None,
        };
        Some(QueueProgress { next_avail: queue.next_avail(), next_used: queue.next_used() })
    }

    /// Takes frames from the guest and pushes them to the output until there are no more or the output is
    /// full. Says how many were taken.
    pub(super) fn transmit(
        &mut self,
        output: &Output,
        buffer: &mut Bounce,
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
            let len = gather(chain, memory, self.tx.queue.size(), buffer)?;
            let frame = &buffer[HEADER..len];
            if frame.len() < MIN_FRAME {
                counters.tx_runts.fetch_add(1, Ordering::Relaxed);
            } else if output.push(frame) == Pushed::Full {
                // The frame stays with the guest; the output tells when there is room.
                self.tx.queue.go_to_previous_position();
                break Turn::Full;
            } else {
                counters.tx(frame.len());
            }
            self.tx.queue.add_used(memory, head, 0)?;
            done += 1;
        };
        if done > 0 && wants_interrupt(&mut self.tx.queue, memory)? {
            self.line.signal_used();
        }
        Ok((turn, done))
    }

    /// Delivers frames from the port to the guest until there are no more frames or no more buffers. Frames
    /// that find no buffer stay in the port. Says how many were delivered.
    pub(super) fn receive(
        &mut self,
        port: &dyn FramePort,
        buffer: &mut Bounce,
        counters: &Counters,
        pass: &Pass<'_>,
    ) -> Result<(Turn, usize), Broken> {
        let memory = &*self.memory;
        let mut done = 0;
        let turn = loop {
            if done == BATCH || pass.must_leave() {
                break Turn::More;
            }
            if !self.rx.has_next(memory)? {
                break Turn::Idle;
            }
            let len = match port.receive(&mut buffer[HEADER..]) {
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Turn::Idle,
                Err(error) => {
                    warn!(%error, "cannot read from the tap");
                    break Turn::Idle;
                }
            };
            let delivered = len <= MAX_FRAME && self.rx.deliver(memory, len, buffer)?;
            if delivered {
                counters.rx(len);
                done += 1;
            } else {
                counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
            }
        };
        if done > 0 && wants_interrupt(&mut self.rx.queue, memory)? {
            self.line.signal_used();
        }
        Ok((turn, done))
    }
}

/// A queue and whether the driver has been asked to notify it.
struct Notified {
    queue: Queue,
    /// The driver notifies about new buffers. True at first: nobody has told it otherwise, or it is not known
    /// because the queue comes from a saved state.
    asked: bool,
}

impl Notified {
    fn new(queue: Queue) -> Self {
        Self { queue, asked: true }
    }

    /// Whether the driver has made a buffer available. If not, it will notify when it does.
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
        // Looks again after asking: a buffer that came in between brings no notification.
        self.queue.enable_notification(memory)
    }

    fn next<'m, M: GuestMemory>(&mut self, memory: &'m M) -> Result<Option<DescriptorChain<&'m M>>, Broken> {
        if !self.has_next(memory)? {
            return Ok(None);
        }
        match self.queue.iter(memory)?.next() {
            Some(chain) => Ok(Some(chain)),
            None => Err(Broken::Ring),
        }
    }

    /// Puts the frame of `len` bytes in `buffer` into the next receive buffer. `false` if it does not fit
    /// there.
    fn deliver<M: GuestMemory>(
        &mut self,
        memory: &M,
        len: usize,
        buffer: &mut Bounce,
    ) -> Result<bool, Broken> {
        let chain = self.next(memory)?.ok_or(Broken::Ring)?;
        let head = chain.head_index();
        buffer[..HEADER].fill(0);
        buffer[HEADER - 2] = 1; // num_buffers, little-endian
        let packet = &buffer[..HEADER + len];
        if scatter(chain, memory, self.queue.size(), packet)? < packet.len() {
            self.queue.go_to_previous_position();
            return Ok(false);
        }
        self.queue.add_used(memory, head, packet.len() as u32)?;
        Ok(true)
    }
}

/// Copies a chain of the driver's buffers together; says how long they are. At most header and longest frame.
fn gather<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    buffer: &mut Bounce,
) -> Result<usize, Broken> {
    let mut len = 0;
    walk(chain, limit, |descriptor| {
        if descriptor.is_write_only() {
            return Err(Broken::Direction("send"));
        }
        let more = descriptor.len() as usize;
        if more > HEADER + MAX_FRAME - len {
            return Err(Broken::LongFrame);
        }
        memory.read_slice(&mut buffer[len..len + more], descriptor.addr())?;
        len += more;
        Ok(())
    })?;
    if len < HEADER { Err(Broken::NoHeader(len)) } else { Ok(len) }
}

/// Copies `packet` into a chain of buffers, as much as there is room for; says how much room there is.
fn scatter<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    packet: &[u8],
) -> Result<usize, Broken> {
    let mut room = 0usize;
    walk(chain, limit, |descriptor| {
        if !descriptor.is_write_only() {
            return Err(Broken::Direction("receive"));
        }
        let rest = &packet[room.min(packet.len())..];
        let part = rest.len().min(descriptor.len() as usize);
        if part > 0 {
            memory.write_slice(&rest[..part], descriptor.addr())?;
        }
        // The iterator ends a chain of 4 GiB or more.
        room += descriptor.len() as usize;
        Ok(())
    })?;
    if room < MIN_RX_BUFFER { Err(Broken::SmallBuffer(room)) } else { Ok(room) }
}

/// Visits the descriptors of a chain. The iterator simply stops where a chain is broken (an index or an
/// indirect table out of range, a loop, 4 GiB); it can be told by the last descriptor, which then still
/// points to a next one.
fn walk<M: GuestMemory>(
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
