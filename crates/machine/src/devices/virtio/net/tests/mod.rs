//! The network device with a driver of ours on one side and a socket for a wire on the other.

mod control;
mod formats;
mod hostile;
mod lifecycle;
mod merge;
mod offload;
mod output;
mod pairs;
mod pause;
mod tail;
pub(crate) mod tap;
mod tap_offload;
mod traffic;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::offload::HEADER;
use super::output::{FrameSink, MAX_FRAME, Output, OutputLimits, Released};
use super::{FramePort, MacAddr, NetDevice};
use crate::devices::Device;
use crate::devices::gate::DeviceGate;
use crate::devices::valve::tests::Times;
use crate::devices::valve::{EpochError, OutputMode, Permit, Valve};
use crate::devices::virtio::COMMON_FEATURES;
use crate::devices::virtio::hostile::{settle, wait_for};
use crate::devices::virtio::rig::{self, Count, INDIRECT, Memory, NEXT, Ring, WRITE};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
const FEATURES: u64 = COMMON_FEATURES | 1 << 5 | 1 << 16;
const EVENT_IDX: u64 = 1 << 29;
const QUEUE: u16 = 32;

const MEMORY: usize = 4 << 20;
const RX_RINGS: u64 = 0x1_0000;
const TX_RINGS: u64 = 0x2_0000;
/// Receive buffer `i` is at `RX_BUFFERS + i * 4096`, transmit buffer `i` at `TX_BUFFERS + i * 4096`.
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;

const COMMANDS: u64 = 0x30_0000;
const ANSWERS: u64 = 0x31_0000;
/// Room for the longest frames.
const LARGE: u64 = 0x38_0000;

fn memory() -> Arc<Memory> {
    rig::memory(MEMORY)
}

/// The queue at `at`, as it is.
fn ring_at(memory: &Memory, at: u64) -> Ring<'_> {
    Ring::at(memory, at, QUEUE)
}

/// A queue at `at` without descriptors.
fn fresh_ring(memory: &Memory, at: u64) -> Ring<'_> {
    Ring::fresh(memory, at, QUEUE)
}

/// A frame with a number in it.
fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; len];
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    if len >= 18 {
        frame[14..18].copy_from_slice(&number.to_le_bytes());
    }
    frame
}

/// Writes down the packets that left, and the pair each came from.
#[derive(Default)]
struct Recorder(Mutex<Vec<(usize, Vec<u8>)>>);

impl Recorder {
    /// Whole packets.
    fn packets(&self) -> Vec<Vec<u8>> {
        self.0.lock().unwrap().iter().map(|(_, packet)| packet.clone()).collect()
    }

    /// The packets without their headers.
    fn frames(&self) -> Vec<Vec<u8>> {
        self.0.lock().unwrap().iter().map(|(_, packet)| packet[HEADER..].to_vec()).collect()
    }

    fn pairs(&self) -> Vec<usize> {
        self.0.lock().unwrap().iter().map(|&(pair, _)| pair).collect()
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl FrameSink for Recorder {
    fn send(&self, pair: usize, packet: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().push((pair, packet.to_vec()));
        Ok(())
    }
}

/// The device's end of a wire made of socket pairs, one for each queue pair; packets on it have their header.
struct Sockets {
    ends: Vec<UnixDatagram>,
    /// What the device has told its port.
    told: Mutex<Vec<Told>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Offloads(u64),
    Pairs(usize),
}

impl FrameSink for Sockets {
    fn send(&self, pair: usize, packet: &[u8]) -> io::Result<()> {
        self.ends[pair].send(packet).map(|_| ())
    }
}

impl FramePort for Sockets {
    fn pairs(&self) -> usize {
        self.ends.len()
    }

    fn fd(&self, pair: usize) -> RawFd {
        self.ends[pair].as_raw_fd()
    }

    fn receive(&self, pair: usize, buffer: &mut [u8]) -> io::Result<usize> {
        self.ends[pair].recv(buffer)
    }

    fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        self.told.lock().unwrap().push(Told::Offloads(offloads));
        Ok(())
    }

    fn set_pairs(&self, pairs: usize) -> io::Result<()> {
        self.told.lock().unwrap().push(Told::Pairs(pairs));
        Ok(())
    }
}

/// The outer ends of the wire.
struct Wire(Vec<UnixDatagram>);

impl Wire {
    /// Sends a frame on which nothing is left to do.
    fn send(&self, frame: &[u8]) -> io::Result<usize> {
        self.send_packet(0, [0; HEADER], frame)
    }

    fn send_packet(&self, pair: usize, header: [u8; HEADER], frame: &[u8]) -> io::Result<usize> {
        self.0[pair].send(&[&header, frame].concat())
    }
}

/// An output with the valve in front of it.
struct Held {
    output: Arc<Output>,
    valve: Valve,
    times: Arc<Times>,
}

impl Held {
    fn new(sink: Arc<dyn FrameSink>, limits: OutputLimits, mode: OutputMode) -> Arc<Self> {
        let (times, lease) = Times::lease();
        let permit = Arc::new(Permit::new(mode, lease));
        let output = Arc::new(Output::new(sink, limits, permit.clone()).unwrap());
        Arc::new(Self { valve: Valve::new(permit, vec![output.clone()]), output, times })
    }

    fn hold(&self, epoch: u64) -> Result<(), EpochError> {
        self.valve.hold(epoch)
    }

    fn begin(&self, epoch: u64) -> Result<(), EpochError> {
        self.valve.begin(epoch)
    }

    fn release(&self, through: u64) -> Released {
        self.valve.commit(through);
        self.drain()
    }

    /// With permission for so many frames. Says how often it was asked for, too.
    fn release_with(&self, through: u64, frames: usize) -> (Released, usize) {
        self.times.set(frames);
        let released = self.release(through);
        let asked = self.times.asked();
        self.times.set(usize::MAX);
        (released, asked)
    }

    fn open(&self) -> Released {
        self.valve.open();
        self.drain()
    }

    fn discard(&self) {
        self.valve.discard();
        let _ = self.drain();
    }
}

impl std::ops::Deref for Held {
    type Target = Output;

    fn deref(&self) -> &Output {
        &self.output
    }
}

/// A machine around one network device.
struct Rig<'m> {
    rig: rig::Rig<NetDevice<Memory>>,
    memory: &'m Arc<Memory>,
    wire: Wire,
    port: Arc<Sockets>,
    sink: Arc<Recorder>,
    output: Arc<Held>,
}

impl std::ops::Deref for Rig<'_> {
    type Target = rig::Rig<NetDevice<Memory>>;

    fn deref(&self) -> &Self::Target {
        &self.rig
    }
}

impl<'m> Rig<'m> {
    fn new(memory: &'m Arc<Memory>, limits: OutputLimits, mode: OutputMode) -> Self {
        Self::with_pairs(memory, 1, limits, mode)
    }

    fn with_pairs(memory: &'m Arc<Memory>, pairs: usize, limits: OutputLimits, mode: OutputMode) -> Self {
        let (ends, wire) = (0..pairs).map(|_| UnixDatagram::pair().unwrap()).unzip::<_, _, Vec<_>, _>();
        ends.iter().for_each(|end| end.set_nonblocking(true).unwrap());
        let port = Arc::new(Sockets { ends, told: Mutex::default() });
        let sink = Arc::new(Recorder::default());
        let output = Held::new(sink.clone(), limits, mode);
        let rig = behind(memory, port.clone(), &output);
        Self { rig, memory, wire: Wire(wire), port, sink, output }
    }

    /// A rig with everything at its usual.
    fn usual(memory: &'m Arc<Memory>) -> Self {
        Self::new(memory, OutputLimits::default(), OutputMode::PassThrough)
    }

    /// Puts another device in the place of the one with the sockets.
    fn put_behind(&mut self, port: Arc<dyn FramePort>, output: &Held) {
        self.rig = behind(self.memory, port, output);
    }

    /// Has the driver set up the first pair of the device with fresh rings, and nothing else.
    fn boot(&self, features: u64) -> Driver<'m> {
        let driver = Driver {
            memory: self.memory,
            rx: fresh_ring(self.memory, RX_RINGS),
            tx: fresh_ring(self.memory, TX_RINGS),
        };
        self.negotiate(features);
        self.add_queue(0, &driver.rx);
        self.add_queue(1, &driver.tx);
        self.start();
        driver
    }

    /// Has the driver set up queues of the device, those in `indexes`, with fresh rings.
    fn boot_queues(&self, features: u64, indexes: std::ops::Range<u32>) -> Vec<Ring<'m>> {
        self.negotiate(features);
        let rings = indexes.map(|index| {
            let ring = fresh_ring(self.memory, rings_at(index));
            self.add_queue(index, &ring);
            ring
        });
        let rings = rings.collect();
        self.start();
        rings
    }

    /// Has the driver set up the first pair and the control queue, which is number `index`.
    fn boot_with_control(&self, features: u64, index: u32) -> (Driver<'m>, Control<'_, 'm>) {
        let rings = self.boot_queues(features, 0..index + 1);
        let driver = Driver { memory: self.memory, rx: rings[0], tx: rings[1] };
        (driver, Control { rig: self, ring: rings[index as usize], index })
    }

    fn kick_rx(&self) {
        self.write(0x50, 0);
    }

    fn kick_tx(&self) {
        self.write(0x50, 1);
    }
}

fn behind(memory: &Arc<Memory>, port: Arc<dyn FramePort>, output: &Held) -> rig::Rig<NetDevice<Memory>> {
    let output = output.output.clone();
    rig::Rig::on(memory.clone(), |host| NetDevice::with_port(MAC, port, output, host).unwrap())
}

/// Where a driver has the rings of a queue.
fn rings_at(index: u32) -> u64 {
    RX_RINGS + (TX_RINGS - RX_RINGS) * u64::from(index)
}

/// The driver's side of the control queue.
struct Control<'r, 'm> {
    rig: &'r Rig<'m>,
    ring: Ring<'m>,
    index: u32,
}

impl Control<'_, '_> {
    /// Gives a command and waits for the answer.
    fn ask(&self, class: u8, number: u8, data: &[u8]) -> u8 {
        let command = [&[class, number], data].concat();
        self.rig.memory.write_slice(&command, GuestAddress(COMMANDS)).unwrap();
        self.rig.memory.write_slice(&[0xee], GuestAddress(ANSWERS)).unwrap();
        self.ring.put(0, Descriptor::new(COMMANDS, command.len() as u32, NEXT, 1));
        self.ring.put(1, Descriptor::new(ANSWERS, 1, WRITE, 0));
        let before = self.ring.used_index();
        self.ring.offer(0);
        self.rig.write(0x50, self.index);
        wait_for("the answer", || self.ring.used_index() != before);
        assert_eq!(self.ring.used_entry(before), (0, 1));
        self.rig.memory.read_obj(GuestAddress(ANSWERS)).unwrap()
    }
}

/// The guest's driver: what it does to its rings.
struct Driver<'m> {
    memory: &'m Memory,
    rx: Ring<'m>,
    tx: Ring<'m>,
}

impl<'m> Driver<'m> {
    /// The driver of a guest that was restored into `memory`, in the middle of its work.
    fn resumed(memory: &'m Memory) -> Self {
        Self { memory, rx: ring_at(memory, RX_RINGS), tx: ring_at(memory, TX_RINGS) }
    }

    /// Makes receive buffer `slot` of `len` bytes available.
    fn give_buffer(&self, slot: u16, len: u32) {
        let at = RX_BUFFERS + u64::from(slot) * 4096;
        self.rx.put(slot, Descriptor::new(at, len, WRITE, 0));
        self.rx.offer(slot);
    }

    /// Makes `frame` available for sending, in one buffer with its header.
    fn send(&self, slot: u16, frame: &[u8]) {
        assert!(frame.len() + HEADER <= 4096);
        let at = TX_BUFFERS + u64::from(slot) * 4096;
        self.memory.write_slice(&[0; 12], GuestAddress(at)).unwrap();
        self.memory.write_slice(frame, GuestAddress(at + 12)).unwrap();
        self.tx.put(slot, Descriptor::new(at, 12 + frame.len() as u32, 0, 0));
        self.tx.offer(slot);
    }

    fn rx_used(&self) -> u16 {
        self.rx.used_index()
    }

    fn tx_used(&self) -> u16 {
        self.tx.used_index()
    }

    /// The frame that was delivered as number `index`, without its header, which is checked.
    fn received(&self, index: u16) -> Vec<u8> {
        let (head, len) = self.rx.used_entry(index);
        let mut packet = vec![0; len as usize];
        let at = RX_BUFFERS + u64::from(head) * 4096;
        self.memory.read_slice(&mut packet, GuestAddress(at)).unwrap();
        assert_eq!(packet[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "header with num_buffers 1");
        packet.split_off(12)
    }
}
