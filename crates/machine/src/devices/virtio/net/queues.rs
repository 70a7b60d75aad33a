//! Moving frames between the queues of the guest and the outside, a batch at a time.
//!
//! Everything the driver put into memory is taken for hostile. Guest memory is written with vm-memory's
//! methods only, so its bitmap has every page this device dirties.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;
use virtio_queue::Queue;
use vm_memory::GuestMemory;

use super::chains::{Bounce, Broken, MIN_RX_BUFFER, bounce, converse, gather, scatter};
use super::control::{Allowed, Settings, execute};
use super::offload::{ETHERNET, HEADER, Header, MRG_RXBUF};
use super::output::{MAX_FRAME, Output, Pushed};
use super::ring::{Ring, Used};
use super::stats::Counters;
use super::tap::FramePort;
use crate::devices::gate::Pass;
use crate::devices::virtio::{InterruptLine, QueueProgress};

/// Most frames a batch moves in one direction, so that the other one gets its turn.
const BATCH: usize = 64;

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

/// What the frames pass on their way.
pub(super) struct Way<'a> {
    pub(super) port: &'a dyn FramePort,
    pub(super) output: &'a Output,
    pub(super) counters: &'a Counters,
    pub(super) pass: &'a Pass<'a>,
}

/// The queues of a driver that is ready.
pub(super) struct Queues<M> {
    pub(super) memory: Arc<M>,
    pub(super) line: Arc<InterruptLine>,
    /// The features in effect.
    pub(super) features: u64,
    pairs: Vec<Pair>,
    control: Option<Control>,
}

/// A receive and a transmit queue.
struct Pair {
    rx: Ring,
    tx: Ring,
    /// A frame of so many bytes, with its header, waits in `buffer` for more receive buffers. It is not part
    /// of a checkpoint: like the frames in the tap it may be lost.
    waiting: Option<usize>,
    buffer: Bounce,
    /// The receive buffers of one frame; has room for as many as the queue has.
    used: Vec<Used>,
}

/// The control queue, and which queue of the device it is.
struct Control {
    index: usize,
    ring: Ring,
}

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivered {
    Yes,
    /// The driver has given too few buffers so far.
    NotYet,
    /// No buffer of the driver's can hold it.
    Never,
}

impl<M: GuestMemory> Queues<M> {
    /// Queues of which the driver has set up `pairs` (receive, transmit) and, perhaps, the control queue,
    /// which is number `control.0` of the device.
    pub(super) fn new(
        memory: Arc<M>,
        line: Arc<InterruptLine>,
        features: u64,
        pairs: Vec<[Queue; 2]>,
        control: Option<(usize, Queue)>,
    ) -> Self {
        let pairs = pairs.into_iter().map(|[rx, tx]| Pair::new(Ring::new(rx), Ring::new(tx))).collect();
        let control = control.map(|(index, queue)| Control { index, ring: Ring::new(queue) });
        Self { memory, line, features, pairs, control }
    }

    /// Which queue of the device is the control queue, if the driver has set one up.
    pub(super) fn control_index(&self) -> Option<usize> {
        self.control.as_ref().map(|control| control.index)
    }

    /// The device's position in its queue number `index`.
    pub(super) fn progress(&self, index: usize) -> Option<QueueProgress> {
        if let Some(control) = self.control.as_ref().filter(|control| control.index == index) {
            return Some(control.ring.progress());
        }
        let pair = self.pairs.get(index / 2)?;
        Some(if index.is_multiple_of(2) { pair.rx.progress() } else { pair.tx.progress() })
    }

    /// Takes frames from the guest and pushes them to the output until there are no more or the output is
    /// full. Says how many were taken.
    pub(super) fn transmit(
        &mut self,
        index: usize,
        way: &Way<'_>,
        buffer: &mut Bounce,
    ) -> Result<(Turn, usize), Broken> {
        let memory = &*self.memory;
        let Some(pair) = self.pairs.get_mut(index) else { return Ok((Turn::Idle, 0)) };
        let mut done = 0;
        let turn = loop {
            if done == BATCH || way.pass.must_leave() {
                break Turn::More;
            }
            let Some(chain) = pair.tx.next(memory)? else { break Turn::Idle };
            let head = chain.head_index();
            let len = gather(chain, memory, pair.tx.size(), buffer)?;
            if send(index, &mut buffer[..len], self.features, way) == Pushed::Full {
                // The frame stays with the guest; the output tells when there is room.
                pair.tx.rewind(1);
                break Turn::Full;
            }
            pair.tx.give_back(memory, &[(head, 0)])?;
            done += 1;
        };
        if done > 0 && pair.tx.wants_interrupt(memory)? {
            self.line.signal_used();
        }
        Ok((turn, done))
    }

    /// Delivers frames from the port to the guest until there are no more frames or no more buffers. Frames
    /// that find no buffer stay in the port. Says how many were delivered.
    pub(super) fn receive(
        &mut self,
        index: usize,
        way: &Way<'_>,
        offloads: u64,
    ) -> Result<(Turn, usize), Broken> {
        let memory = &*self.memory;
        let merge = self.features & MRG_RXBUF != 0;
        let Some(pair) = self.pairs.get_mut(index) else { return Ok((Turn::Idle, 0)) };
        let (mut tried, mut done) = (0, 0);
        let turn = loop {
            if tried == BATCH || way.pass.must_leave() {
                break Turn::More;
            }
            if !pair.rx.has_next(memory)? {
                break Turn::Idle;
            }
            let len = match pair.waiting.take() {
                Some(len) => len,
                None => match pair.fetch(index, way, offloads) {
                    Fetched::Packet(len) => len,
                    Fetched::Unfit => {
                        tried += 1;
                        continue;
                    }
                    Fetched::Nothing => break Turn::Idle,
                },
            };
            tried += 1;
            match pair.deliver(memory, len, merge)? {
                Delivered::Yes => {
                    way.counters.rx(len - HEADER);
                    done += 1;
                }
                Delivered::NotYet => {
                    pair.waiting = Some(len);
                    break Turn::Idle;
                }
                Delivered::Never => way.counters.drop_received(),
            }
        };
        if done > 0 && pair.rx.wants_interrupt(memory)? {
            self.line.signal_used();
        }
        Ok((turn, done))
    }

    /// Does what the driver asks for on the control queue.
    pub(super) fn obey(
        &mut self,
        settings: &mut Settings,
        buffer: &mut Bounce,
        pass: &Pass<'_>,
    ) -> Result<Turn, Broken> {
        let memory = &*self.memory;
        let allowed = Allowed { features: self.features, pairs: self.pairs.len() as u16 };
        let Some(Control { ring, .. }) = &mut self.control else { return Ok(Turn::Idle) };
        let mut done = 0;
        let turn = loop {
            if done == BATCH || pass.must_leave() {
                break Turn::More;
            }
            let Some(chain) = ring.next(memory)? else { break Turn::Idle };
            let head = chain.head_index();
            converse(chain, memory, ring.size(), buffer, |command| execute(command, allowed, settings))?;
            ring.give_back(memory, &[(head, 1)])?;
            done += 1;
        };
        if done > 0 && ring.wants_interrupt(memory)? {
            self.line.signal_used();
        }
        Ok(turn)
    }

    /// Forgets the frames that wait for buffers of the driver.
    pub(super) fn forget_waiting(&mut self) -> u64 {
        self.pairs.iter_mut().filter_map(|pair| pair.waiting.take()).count() as u64
    }
}

/// Gives a packet of the guest to the output, with a header that says only what it may say.
fn send(pair: usize, packet: &mut [u8], features: u64, way: &Way<'_>) -> Pushed {
    let Some((header, frame)) = packet.split_first_chunk_mut::<HEADER>() else { return Pushed::Taken };
    let len = frame.len();
    if len < ETHERNET {
        way.counters.tx_runts.fetch_add(1, Ordering::Relaxed);
        return Pushed::Taken;
    }
    let Some(sent) = Header::read(header).to_send(len, features) else {
        way.counters.tx_bad_headers.fetch_add(1, Ordering::Relaxed);
        return Pushed::Taken;
    };
    *header = sent.bytes();
    let pushed = way.output.push(pair, packet);
    if pushed == Pushed::Taken {
        way.counters.tx(len);
    }
    pushed
}

/// What the port had.
enum Fetched {
    /// A packet of so many bytes, with a header for the guest.
    Packet(usize),
    /// A frame that this guest cannot take; it is counted.
    Unfit,
    Nothing,
}

impl Pair {
    fn new(rx: Ring, tx: Ring) -> Self {
        let used = Vec::with_capacity(rx.size().into());
        Self { rx, tx, waiting: None, buffer: bounce(), used }
    }

    /// Takes the next frame from the port into the buffer.
    fn fetch(&mut self, index: usize, way: &Way<'_>, offloads: u64) -> Fetched {
        let len = loop {
            match way.port.receive(index, &mut self.buffer[..]) {
                Ok(len) => break len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        warn!(%error, "cannot read from the tap");
                    }
                    return Fetched::Nothing;
                }
            }
        };
        let header = self.buffer.first_chunk_mut::<HEADER>().filter(|_| len <= HEADER + MAX_FRAME);
        let fit = header.filter(|_| len >= HEADER + ETHERNET).and_then(|header| {
            *header = Header::read(header).to_deliver(offloads)?.bytes();
            Some(len)
        });
        match fit {
            Some(len) => Fetched::Packet(len),
            None => {
                way.counters.drop_received();
                Fetched::Unfit
            }
        }
    }

    /// Puts the packet of `len` bytes in the buffer into receive buffers: one, or with `merge` as many as it
    /// takes.
    fn deliver<M: GuestMemory>(&mut self, memory: &M, len: usize, merge: bool) -> Result<Delivered, Broken> {
        let Self { rx, buffer, used, .. } = self;
        let packet = &mut buffer[..len];
        used.clear();
        let mut first = None;
        let mut filled = 0;
        while filled < packet.len() {
            let chain = if used.len() < rx.size().into() { rx.next(memory)? } else { None };
            let Some(chain) = chain else {
                rx.rewind(used.len());
                // All the buffers a queue can have are too few.
                let all = used.len() >= rx.size().into();
                return Ok(if all { Delivered::Never } else { Delivered::NotYet });
            };
            let head = chain.head_index();
            first.get_or_insert_with(|| chain.clone());
            let room = scatter(chain, memory, rx.size(), &packet[filled..])?;
            if room < if merge { HEADER } else { MIN_RX_BUFFER } {
                return Err(Broken::SmallBuffer(room));
            }
            let part = room.min(packet.len() - filled);
            filled += part;
            used.push((head, part as u32));
            if !merge && filled < packet.len() {
                rx.rewind(1);
                return Ok(Delivered::Never);
            }
        }
        if let Some(first) = first.filter(|_| used.len() > 1) {
            // The header was written before the number of buffers was known.
            packet[HEADER - 2..HEADER].copy_from_slice(&(used.len() as u16).to_le_bytes());
            if scatter(first, memory, rx.size(), &packet[..HEADER])? < HEADER {
                return Err(Broken::Chain);
            }
        }
        rx.give_back(memory, used)?;
        Ok(Delivered::Yes)
    }
}
