//! Moving frames between the guest's queues and the outside, a batch at a time.

use std::collections::VecDeque;
use std::io::ErrorKind;

use vm_memory::GuestMemory;

use super::control::{Allowed, execute};
use super::device::{Card, Net};
use super::offload::{ETHERNET, HEADER, Header, MRG_RXBUF};
use super::output::{MAX_FRAME, Pushed};
use crate::devices::complaints::complain;
use crate::devices::gate::Pass;
use crate::devices::valve::OutputMode;
use crate::devices::virtio::chain::{Broken, Chain};
use crate::devices::virtio::ring::{Answer, Queues, Ring, Served, Used};

/// Most frames a batch moves in one direction, so that the other one gets its turn.
const BATCH: usize = 64;
/// Smallest receive buffer where buffers are not merged: header and a frame of 1514 bytes (virtio 1.2,
/// 5.1.6.3.1).
pub(super) const MIN_RX_BUFFER: usize = 1526;

/// Room for one frame with its header on its way through; one more byte shows a frame that is too long.
pub(super) type Bounce = Box<[u8; HEADER + MAX_FRAME + 1]>;

pub(super) fn bounce() -> Bounce {
    // Not made on the stack first.
    let zeroed = vec![0; HEADER + MAX_FRAME + 1].into_boxed_slice();
    match zeroed.try_into() {
        Ok(bounce) => bounce,
        Err(_) => unreachable!("the vector has the length of the array"),
    }
}

/// Bits of a pair's queues.
pub(super) const fn rx_bit(pair: usize) -> u32 {
    1 << (2 * pair)
}

/// What a pair of queues keeps between two batches.
pub(super) struct Pair {
    /// A frame of so many bytes, with its header, waits in `buffer` for more receive buffers. It is not part
    /// of a checkpoint: like the frames in the tap it may be lost.
    pub(super) waiting: Option<usize>,
    /// Packets that come before those of the port: what another host has given this guest in an epoch that died
    /// with it. Not part of a checkpoint either.
    pub(super) given: VecDeque<Box<[u8]>>,
    buffer: Bounce,
    /// The receive buffers of one frame; has room for as many as a queue has.
    used: Vec<Used>,
    /// The first of them, and the one in hand.
    chains: [Chain; 2],
}

/// What happened to a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivered {
    Yes,
    /// The driver has given too few buffers so far.
    NotYet,
    /// No buffer of the driver's can hold it.
    Never,
}

/// What the port gave.
enum Fetched {
    /// A packet of so many bytes, with a header for the guest.
    Packet(usize),
    /// A frame that this guest cannot take; it is counted.
    Unfit,
    Nothing,
}

impl Net {
    /// Does what the driver asks for on the control queue.
    pub(super) fn obey<M: GuestMemory>(
        &self,
        card: &mut Card,
        queues: &mut Queues<M>,
        pass: &Pass<'_>,
    ) -> Result<Served, Broken> {
        let Some(index) = card.control else { return Ok(Served::default()) };
        let allowed = Allowed { features: card.features, pairs: card.pairs.len() as u16 };
        let (settings, buffer) = (&mut card.settings, &mut card.buffer);
        queues.serve(index, BATCH, pass, |memory, chain| {
            let most = HEADER + MAX_FRAME;
            let len = usize::try_from(chain.device_bytes()).ok().filter(|&len| len <= most);
            let command = &mut buffer[..len.ok_or(Broken::Long(most))?];
            if chain.driver_bytes() == 0 {
                return Err(Broken::Rule("a command has no room for the answer"));
            }
            chain.read(memory, 0, command)?;
            chain.write(memory, 0, &[execute(command, allowed, settings)])?;
            Ok(Answer::Used(1))
        })
    }

    /// Takes frames from the guest and pushes them to the output until there are no more or the output is
    /// full. Says whether a guest that polls has waited for that.
    pub(super) fn transmit<M: GuestMemory>(
        &self,
        card: &mut Card,
        queues: &mut Queues<M>,
        pair: usize,
        pass: &Pass<'_>,
    ) -> Result<(Served, bool), Broken> {
        let mut full = false;
        let (features, buffer) = (card.features, &mut card.buffer);
        let served = queues.serve(2 * pair + 1, BATCH, pass, |memory, chain| {
            let packet = &mut buffer[..chain.sent(HEADER + MAX_FRAME)?];
            if packet.len() < HEADER {
                return Err(Broken::Rule("a frame with its header is shorter than the header"));
            }
            chain.read(memory, 0, packet)?;
            // The frame stays with the guest; the output tells when there is room.
            full = self.send(pair, packet, features) == Some(Pushed::Full);
            Ok(if full { Answer::Later } else { Answer::Used(0) })
        })?;
        // A guest that could not send for lack of room may have gone idle.
        let bit = 1 << pair;
        let wake = served.done > 0 && card.stalled & bit != 0;
        if served.done > 0 {
            card.stalled &= !bit;
        }
        if full {
            card.stalled |= bit;
        }
        Ok((served, wake))
    }

    /// Gives a packet of the guest to the output, with a header that says only what it may say. `None` if it is no
    /// packet that can be sent; it is counted.
    pub(super) fn send(&self, pair: usize, packet: &mut [u8], features: u64) -> Option<Pushed> {
        let (header, frame) = packet.split_first_chunk_mut::<HEADER>()?;
        let len = frame.len();
        if len < ETHERNET {
            self.counters.tx_runts.add(1);
            return None;
        }
        let Some(sent) = Header::read(header).to_send(len, features) else {
            self.counters.tx_bad_headers.add(1);
            return None;
        };
        *header = sent.bytes();
        let pushed = self.output.push(pair, packet);
        if pushed == Pushed::Taken {
            self.counters.tx_frames.add(1);
            self.counters.tx_bytes.add(len as u64);
        }
        Some(pushed)
    }

    /// Delivers frames from the port to the guest until there are no more frames or no more buffers. Frames
    /// that find no buffer stay in the port.
    pub(super) fn receive<M: GuestMemory>(
        &self,
        card: &mut Card,
        queues: &mut Queues<M>,
        index: usize,
        pass: &Pass<'_>,
    ) -> Result<Served, Broken> {
        let (queue, mut served) = (2 * index, Served::default());
        let merge = card.features & MRG_RXBUF != 0;
        let offloads = card.settings.offloads;
        let Some(pair) = card.pairs.get_mut(index) else { return Ok(served) };
        if queues.pending() & rx_bit(index) == 0 {
            return Ok(served);
        }
        let Some((ring, memory)) = queues.ring(queue) else { return Ok(served) };
        let mut tried = 0;
        served.more = loop {
            if tried == BATCH || pass.must_leave() {
                break true;
            }
            if !ring.has_next(memory)? {
                break false;
            }
            let len = match pair.waiting.take() {
                Some(len) => len,
                None => match self.fetch(index, pair, offloads) {
                    Fetched::Packet(len) => len,
                    Fetched::Unfit => {
                        tried += 1;
                        continue;
                    }
                    Fetched::Nothing => break false,
                },
            };
            tried += 1;
            match pair.deliver(ring, memory, len, merge)? {
                Delivered::Yes => {
                    self.copy_to_tail(index, &pair.buffer[..len]);
                    self.counters.rx_frames.add(1);
                    self.counters.rx_bytes.add((len - HEADER) as u64);
                    served.done += 1;
                }
                Delivered::NotYet => {
                    pair.waiting = Some(len);
                    break false;
                }
                Delivered::Never => self.counters.rx_dropped.add(1),
            }
        };
        if !served.more {
            queues.looked_at(queue);
        }
        Ok(served)
    }

    /// The guest has this packet now, and the standby should get a copy: see [`InputTail`](super::tail::InputTail).
    fn copy_to_tail(&self, pair: usize, packet: &[u8]) {
        if self.input.is_on() {
            // Inside the gate, so a capture comes before or after the frame and this.
            let tag = self.output.tag();
            if tag.mode == OutputMode::Hold {
                self.input.push(tag.epoch, pair, packet);
            }
        }
    }

    /// Takes the next frame, a given one or one from the port, into the pair's buffer.
    fn fetch(&self, index: usize, pair: &mut Pair, offloads: u64) -> Fetched {
        let buffer = &mut pair.buffer;
        let given = pair.given.pop_front().filter(|packet| packet.len() <= buffer.len());
        let len = match given {
            Some(packet) => {
                buffer[..packet.len()].copy_from_slice(&packet);
                self.counters.rx_given.add(1);
                packet.len()
            }
            None => match self.fetch_from_port(index, buffer) {
                Some(len) => len,
                None => return Fetched::Nothing,
            },
        };
        let header = buffer.first_chunk_mut::<HEADER>().filter(|_| len <= HEADER + MAX_FRAME);
        let fit = header.filter(|_| len >= HEADER + ETHERNET).and_then(|header| {
            *header = Header::read(header).to_deliver(offloads)?.bytes();
            Some(len)
        });
        match fit {
            Some(len) => Fetched::Packet(len),
            None => {
                self.counters.rx_dropped.add(1);
                Fetched::Unfit
            }
        }
    }

    fn fetch_from_port(&self, pair: usize, buffer: &mut Bounce) -> Option<usize> {
        loop {
            match self.port.receive(pair, &mut buffer[..]) {
                Ok(len) => return Some(len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => {
                    complain!(warn, self.complaints, %error, "cannot read from the tap");
                    return None;
                }
            }
        }
    }
}

impl Pair {
    pub(super) fn new(queue_size: u16) -> Self {
        let used = Vec::with_capacity(queue_size.into());
        let given = VecDeque::new();
        Self { waiting: None, given, buffer: bounce(), used, chains: Default::default() }
    }

    /// Puts the packet of `len` bytes in the buffer into receive buffers: one, or with `merge` as many as it
    /// takes. Together they have at most as many descriptors as the queue: a checkpoint waits for the frame
    /// in hand, and with tables of their own the buffers of one frame could have as many squared.
    fn deliver<M: GuestMemory>(
        &mut self,
        ring: &mut Ring,
        memory: &M,
        len: usize,
        merge: bool,
    ) -> Result<Delivered, Broken> {
        let Self { buffer, used, chains: [first, next], .. } = self;
        let packet = &mut buffer[..len];
        used.clear();
        let (mut filled, mut descriptors) = (0, 0);
        while filled < packet.len() {
            let chain = if used.is_empty() { &mut *first } else { &mut *next };
            let most = usize::from(ring.size());
            let head = if descriptors < most { ring.next(memory, chain)? } else { None };
            let Some(head) = head else {
                ring.put_back(used.len());
                // All the buffers that one frame can have are too few.
                return Ok(if descriptors < most { Delivered::NotYet } else { Delivered::Never });
            };
            descriptors += chain.descriptors();
            let room = chain.room()?;
            if room < if merge { HEADER } else { MIN_RX_BUFFER } {
                return Err(Broken::Rule("a receive buffer has fewer bytes than the least allowed"));
            }
            let part = room.min(packet.len() - filled);
            chain.write(memory, 0, &packet[filled..filled + part])?;
            filled += part;
            used.push((head, part as u32));
            if !merge && filled < packet.len() {
                ring.put_back(1);
                return Ok(Delivered::Never);
            }
        }
        if used.len() > 1 {
            // The header was written before the number of buffers was known.
            first.write(memory, HEADER - 2, &(used.len() as u16).to_le_bytes())?;
        }
        ring.give_back(memory, used)?;
        Ok(Delivered::Yes)
    }
}
