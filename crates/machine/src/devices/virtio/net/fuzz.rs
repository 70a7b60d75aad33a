//! Any driver: bytes become features, rings, descriptors, buffers and frames, over which the device works.
//!
//! Called by the fuzz target and, with random bytes, by the tests. The device must neither panic nor work
//! forever, must not use more buffers than were offered, and must send only headers that say what they may.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::control::Settings;
use super::device::{Card, Net};
use super::frames::Pair;
use super::mac::MacAddr;
use super::offload::{GUEST_OFFLOADS, HEADER, Header, effective, offered};
use super::output::{FrameSink, MAX_PACKET, Output, OutputLimits};
use super::stats::NetStats;
use super::tap::FramePort;
use crate::devices::gate::DeviceGate;
use crate::devices::valve::{Lease, OutputMode, Permit, Valve};
use crate::devices::virtio::rig::{Count, Memory, memory};
use crate::devices::virtio::ring::Queues;
use crate::devices::virtio::{InterruptLine, MAX_QUEUES};

const MEMORY: usize = 1 << 20;
const PAIRS: usize = 2;
const SIZE: u16 = 16;
/// Each queue has its table, available and used ring in three pages.
const QUEUE_BYTES: u64 = 3 * 4096;
/// Batches of each queue.
const ROUNDS: usize = 3;

/// How far a run got: a test also checks that random bytes get far enough.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reached {
    /// The device's counters.
    pub stats: NetStats,
    /// Commands that were done and changed something, at least.
    pub obeyed: u64,
    /// Batches that ended because the driver broke the rules.
    pub broken: u64,
}

/// Runs the device over what `data` says.
pub fn run(data: &[u8]) -> Reached {
    let mut source = Source(data);
    let features = effective(source.number::<8>() & offered(PAIRS, None) | 1 << 32);
    let limits = OutputLimits { frames: 8, bytes: MAX_PACKET };
    let hold = source.byte() & 1 != 0;
    let mode = if hold { OutputMode::Hold } else { OutputMode::PassThrough };
    let memory = memory(MEMORY);
    let port = Arc::new(Port { features, frames: frames(&mut source), next: AtomicUsize::new(0) });
    let permit = Arc::new(Permit::new(mode, Lease::new()));
    let output = match Output::new(port.clone(), limits, permit.clone()) {
        Ok(output) => Arc::new(output),
        Err(error) => panic!("no event for the test: {error}"),
    };
    let mut queues: [Option<Queue>; MAX_QUEUES] = Default::default();
    for (index, to) in queues.iter_mut().enumerate().take(2 * PAIRS + 1) {
        let purpose = match index {
            _ if index == 2 * PAIRS => Purpose::Command,
            _ if index.is_multiple_of(2) => Purpose::Receive,
            _ => Purpose::Send,
        };
        *to = Some(queue(&memory, index, purpose, features, &mut source));
    }
    buffers(&memory, &mut source);

    let line = Arc::new(InterruptLine::new(Arc::<Count>::default()));
    let mut queues = Queues::new(memory, features, line, queues);
    let net = Net::new(port.clone(), output.clone());
    let _ = net.input.start(Arc::new(|| {}));
    let mut card = Card::new(MacAddr([2, 0, 0, 0, 0, 1]));
    card.features = features;
    card.pairs = (0..PAIRS).map(|_| Pair::new(SIZE)).collect();
    card.control = Some(2 * PAIRS);
    card.settings.announce = true;
    use_tail(&net, &mut card, &port.frames);
    let gate = DeviceGate::new();
    let pass = gate.enter();
    let mut reached = Reached::default();
    for _ in 0..ROUNDS {
        queues.look_at(!0);
        let before = card.settings;
        let mut results = vec![net.obey(&mut card, &mut queues, &pass).is_err()];
        let Settings { pairs, mac, offloads, .. } = card.settings;
        reached.obeyed += u64::from(card.settings != before);
        assert!((1..=PAIRS).contains(&pairs.into()) && mac.is_unicast());
        assert_eq!(offloads & !(features & GUEST_OFFLOADS), 0);
        for pair in 0..PAIRS {
            output.drain_if_open();
            results.push(net.transmit(&mut card, &mut queues, pair, &pass).is_err());
            results.push(net.receive(&mut card, &mut queues, pair, &pass).is_err());
        }
        reached.broken += results.into_iter().filter(|&broken| broken).count() as u64;
    }
    let valve = Valve::new(permit, vec![output]);
    valve.open();
    valve.drain();
    let mut copy = Vec::new();
    while net.input.take(&mut copy).is_some() {
        let Some((header, frame)) = copy.split_first_chunk() else { panic!("a packet without header") };
        let header = Header::read(header);
        assert_eq!(
            header.to_deliver(features),
            Some(header),
            "what the guest was given is given elsewhere too"
        );
        assert!(!frame.is_empty());
    }
    Reached { stats: net.counters.read(), ..reached }
}

/// The same frames as from the port, as if another host had sent copies of them: input and output.
fn use_tail(net: &Net, card: &mut Card, frames: &[(usize, [u8; HEADER])]) {
    for (number, &(len, header)) in frames.iter().enumerate() {
        let mut packet = vec![0; len];
        let head = len.min(HEADER);
        packet[..head].copy_from_slice(&header[..head]);
        card.pairs[number % PAIRS].given.push_back(packet.clone().into());
        packet.truncate(MAX_PACKET);
        let _ = net.send(number % PAIRS, &mut packet, card.features);
    }
}

/// What a queue's chains should be, and mostly are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Receive,
    Send,
    /// Two descriptors: the command and the answer.
    Command,
}

/// A queue whose rings and table say what `source` says.
fn queue(memory: &Memory, index: usize, purpose: Purpose, features: u64, source: &mut Source<'_>) -> Queue {
    let table = QUEUE_BYTES * index as u64;
    let [available, used] = [table + 4096, table + 2 * 4096];
    for slot in 0..SIZE {
        let mut descriptor = source.descriptor(purpose);
        if purpose == Purpose::Command && slot.is_multiple_of(2) {
            let (command, len) = source.command();
            if source.byte() < 192 {
                descriptor = Descriptor::new(descriptor.addr().0, len, VRING_DESC_F_NEXT as u16, slot + 1);
            }
            // Where there is no memory there is nothing to write.
            let _ = memory.write_slice(&command, descriptor.addr());
        }
        put(memory, table + 16 * u64::from(slot), descriptor);
        let head = source.small(SIZE);
        put(memory, available + 4 + 2 * u64::from(slot), head);
    }
    // Mostly no more than there are.
    let offered = source.small(SIZE + 1);
    put(memory, available + 2, offered);
    let Ok(mut queue) = Queue::new(SIZE) else { unreachable!("the size is a power of two") };
    queue.set_desc_table_address(Some(table as u32), Some(0));
    queue.set_avail_ring_address(Some(available as u32), Some(0));
    queue.set_used_ring_address(Some(used as u32), Some(0));
    queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
    queue.set_ready(true);
    queue
}

/// Puts headers, commands and indirect tables where descriptors point to.
fn buffers(memory: &Memory, source: &mut Source<'_>) {
    while !source.0.is_empty() {
        let at = source.address();
        // Where there is no memory there is nothing to write.
        let _ = match source.byte() % 4 {
            0 => {
                let mut bytes = [0; 24];
                bytes.fill_with(|| source.byte());
                memory.write_slice(&bytes, GuestAddress(at))
            }
            1 => memory.write_obj(source.descriptor(Purpose::Send), GuestAddress(at)),
            _ => memory.write_slice(&source.command().0, GuestAddress(at)),
        };
    }
}

/// What comes from outside: lengths and headers.
fn frames(source: &mut Source<'_>) -> Vec<(usize, [u8; HEADER])> {
    let count = usize::from(source.byte() % 8);
    let mut frame = || {
        let mut header = [0; HEADER];
        if source.byte() & 1 != 0 {
            header.fill_with(|| source.byte());
        }
        (source.number::<3>() as usize % (MAX_PACKET + 2), header)
    };
    (0..count).map(|_| frame()).collect()
}

fn put<T: vm_memory::ByteValued>(memory: &Memory, at: u64, value: T) {
    if let Err(error) = memory.write_obj(value, GuestAddress(at)) {
        panic!("the rings of the test lie in memory: {error}");
    }
}

/// Takes numbers from the front of the bytes; zero when they are used up.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        self.number::<1>() as u8
    }

    fn number<const N: usize>(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let (front, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..front.len()].copy_from_slice(front);
        self.0 = rest;
        u64::from_le_bytes(bytes)
    }

    /// A number below `limit`, now and then any.
    fn small(&mut self, limit: u16) -> u16 {
        match self.byte() {
            u8::MAX => self.number::<2>() as u16,
            byte => u16::from(byte) % limit,
        }
    }

    /// An address in memory or not far behind, now and then any. Few different ones, so that they meet.
    fn address(&mut self) -> u64 {
        match self.byte() {
            u8::MAX => self.number::<8>(),
            byte => (u64::from(byte) * 4099) % (MEMORY as u64 + 4096),
        }
    }

    /// A command and the length it should have. Classes and numbers are few, and so are the values they take.
    fn command(&mut self) -> ([u8; 10], u32) {
        let class = self.byte() % 6;
        let bytes = [class, self.byte() % 2, self.byte() % 4, 0, 0, 0, 0, self.byte() % 2, 0, 0];
        (bytes, [3, 8, 4, 2, 4, 10][usize::from(class)])
    }

    fn descriptor(&mut self, purpose: Purpose) -> Descriptor {
        let addr = self.address();
        let len = match (self.byte(), purpose) {
            (0..=63, Purpose::Send) => HEADER as u32,
            (0..=63, _) => 1526,
            (64..=127, _) => 1526 + u32::from(self.byte()),
            (128..=159, _) => u32::from(self.byte()),
            (160..=191, _) => 1 << 16,
            (192..=223, _) => 16 * u32::from(self.byte() % 8),
            (224..=250, _) => self.number::<2>() as u32,
            _ => self.number::<4>() as u32,
        };
        let next = VRING_DESC_F_NEXT as u16;
        let write = VRING_DESC_F_WRITE as u16;
        let flags = match (self.byte(), purpose) {
            (0..=229, Purpose::Command | Purpose::Receive) => write,
            (0..=179, Purpose::Send) => 0,
            (180..=229, Purpose::Send) => next,
            _ => self.small(8),
        };
        Descriptor::new(addr, len, flags, self.small(SIZE))
    }
}

/// The outside: gives the same frames again and again, and judges what comes.
struct Port {
    features: u64,
    frames: Vec<(usize, [u8; HEADER])>,
    next: AtomicUsize,
}

impl FrameSink for Port {
    fn send(&self, _pair: usize, packet: &[u8]) -> io::Result<()> {
        let Some((header, frame)) = packet.split_first_chunk() else { panic!("a packet without header") };
        let header = Header::read(header);
        assert_eq!(header.to_send(frame.len(), self.features), Some(header));
        Ok(())
    }
}

impl FramePort for Port {
    fn pairs(&self) -> usize {
        PAIRS
    }

    fn fd(&self, _pair: usize) -> RawFd {
        unreachable!("no one waits for this port")
    }

    fn receive(&self, _pair: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        match self.frames.get(next % (self.frames.len() + 1)) {
            Some(&(len, header)) => {
                let len = len.min(buffer.len());
                let head = len.min(HEADER);
                buffer[..head].copy_from_slice(&header[..head]);
                Ok(len)
            }
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn set_offloads(&self, _offloads: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_pairs(&self, _pairs: usize) -> io::Result<()> {
        Ok(())
    }
}
