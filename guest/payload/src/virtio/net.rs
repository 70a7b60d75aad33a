//! The network card: receive and transmit rings, and the device that the TCP/IP stack sees.
//!
//! Memory, packed so that a quiet epoch dirties few pages: one page with everything that changes all the time
//! (both available and used rings), one with the transmit descriptors, 256-byte transmit buffers for the
//! frames of a request-response load, reused last-in-first-out, and 2 KiB buffers for the others, or larger ones
//! if the card says that the network carries more.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::vec::Vec;
use core::{fmt, slice};

use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use super::mmio::{Registers, reg, status};
use super::queue::{DESC_WRITE, Parts, Queue, available_len, descriptors_len, used_len};
use crate::logic::server::NetDevice;

const RX_QUEUE: u32 = 0;
const TX_QUEUE: u32 = 1;
/// Frames wait in the host's tap queue (1000 long), so a short ring that stays in few pages is enough here.
const RX_SIZE: usize = 64;
const TX_SIZE: usize = 128;
/// Of the transmit buffers, this many are small.
const TX_SMALL: usize = 96;
const SMALL_BUFFER: usize = 256;
/// Large buffers are a multiple of this.
const LARGE_STEP: usize = 2048;
/// `struct virtio_net_hdr` of a VIRTIO_F_VERSION_1 device.
const HEADER: usize = 12;
/// Length of an Ethernet header.
const ETHERNET: usize = 14;
/// The MTU of a card that says nothing.
const USUAL_MTU: usize = 1500;
/// No larger packets are sent: more would only take memory.
const MOST_MTU: usize = 9216;
/// Where the configuration has the MTU.
const CONFIG_MTU: u64 = 10;

const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_EVENT_IDX: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// Why there is no network.
#[derive(Debug)]
pub enum NetError {
    /// The window does not hold a modern virtio-mmio device.
    NotVirtio,
    /// It is another kind of device.
    NotNet,
    /// VERSION_1 or MAC is missing, or the device refused our choice.
    Features,
    /// A queue is missing or too short.
    Queue,
    /// No memory for rings and buffers.
    Memory,
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotVirtio => "no virtio-mmio version 2 device at the given address",
            Self::NotNet => "the virtio device is not a network card",
            Self::Features => "the network card lacks VERSION_1 or MAC",
            Self::Queue => "a queue of the network card is missing or too short",
            Self::Memory => "not enough memory for the network card's rings",
        })
    }
}

/// A block of zeroed memory shared with the device, never freed.
fn shared_block(len: usize) -> Result<u64, NetError> {
    let layout = Layout::from_size_align(len, 4096).map_err(|_| NetError::Memory)?;
    // SAFETY: the layout is not empty: no caller passes 0.
    let block = unsafe { alloc_zeroed(layout) };
    if block.is_null() { Err(NetError::Memory) } else { Ok(block as u64) }
}

struct Receive {
    queue: Queue<RX_SIZE>,
    buffers: u64,
    /// Length of a buffer.
    large: usize,
}

impl Receive {
    fn address(&self, id: u16) -> u64 {
        self.buffers + u64::from(id) * self.large as u64
    }

    /// The next frame, without its virtio header; a malformed length gives an empty one.
    fn peek(&self) -> Option<(u16, &[u8])> {
        let (id, len) = self.queue.peek_used()?;
        let len = (len as usize).clamp(HEADER, self.large) - HEADER;
        // SAFETY: buffer `id` lies in our block (`peek_used` checks the id) and is ours until offered again.
        Some((id, unsafe { slice::from_raw_parts((self.address(id) + HEADER as u64) as *const u8, len) }))
    }

    /// Gives the buffer of the frame that `peek` shows back to the device.
    fn release(&mut self) {
        if let Some((id, _)) = self.queue.pop_used() {
            self.queue.offer(id);
        }
    }
}

struct Transmit {
    queue: Queue<TX_SIZE>,
    buffers: u64,
    small_free: Vec<u16>,
    large_free: Vec<u16>,
    /// Length of a large buffer.
    large: usize,
    sent: u64,
}

impl Transmit {
    fn address(&self, id: u16) -> u64 {
        let id = usize::from(id);
        let large = id.saturating_sub(TX_SMALL) * self.large;
        self.buffers + (id.min(TX_SMALL) * SMALL_BUFFER + large) as u64
    }

    /// Takes back the buffers that the device has sent. The lists were made long enough for all of them.
    fn reclaim(&mut self) {
        while let Some((id, _)) = self.queue.pop_used() {
            if usize::from(id) < TX_SMALL { self.small_free.push(id) } else { self.large_free.push(id) }
        }
    }

    /// True when a frame of any size can be sent.
    fn ready(&mut self) -> bool {
        if self.large_free.len() <= 1 || self.small_free.is_empty() {
            self.reclaim();
        }
        !self.large_free.is_empty()
    }

    fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(HEADER + len <= self.large, "frame longer than the announced MTU");
        let small = if HEADER + len <= SMALL_BUFFER { self.small_free.pop() } else { None };
        let id = small
            .or_else(|| self.large_free.pop())
            .expect("a token exists only while a large buffer is free");
        let address = self.address(id);
        // SAFETY: buffer `id` is ours (it was in a free list), lies in our block and is long enough for
        // header and frame; the header stays all zero, which means "no offloads".
        let frame = unsafe { slice::from_raw_parts_mut((address + HEADER as u64) as *mut u8, len) };
        let result = fill(frame);
        self.queue.describe(id, address, (HEADER + len) as u32, 0);
        self.queue.offer(id);
        self.sent += 1;
        result
    }
}

/// The network card.
pub struct Net {
    registers: Registers,
    mac: [u8; 6],
    mtu: usize,
    receive: Receive,
    transmit: Transmit,
    kicks: u64,
}

impl Net {
    /// Finds, negotiates and starts the device at `base`.
    ///
    /// # Safety
    /// `base` is the address of a mapped MMIO window, and this is the only driver of what is there.
    pub unsafe fn new(base: u64) -> Result<Self, NetError> {
        // SAFETY: the caller's promise.
        let registers = unsafe { Registers::new(base) };
        let magic = u32::from_le_bytes(*b"virt");
        if registers.read(reg::MAGIC) != magic || registers.read(reg::VERSION) != 2 {
            return Err(NetError::NotVirtio);
        }
        if registers.read(reg::DEVICE_ID) != 1 {
            return Err(NetError::NotNet);
        }
        let result = Self::start(&registers);
        match result {
            Ok((mac, mtu, receive, transmit)) => {
                Ok(Self { registers, mac, mtu, receive, transmit, kicks: 0 })
            }
            Err(error) => {
                registers.write(reg::STATUS, status::FAILED);
                Err(error)
            }
        }
    }

    fn start(registers: &Registers) -> Result<([u8; 6], usize, Receive, Transmit), NetError> {
        let mut state = status::ACKNOWLEDGE | status::DRIVER;
        registers.write(reg::STATUS, 0);
        registers.write(reg::STATUS, state);
        let features = negotiate(registers)?;
        let event_idx = features & FEATURE_EVENT_IDX != 0;
        state |= status::FEATURES_OK;
        registers.write(reg::STATUS, state);
        if registers.read(reg::STATUS) & status::FEATURES_OK == 0 {
            return Err(NetError::Features);
        }
        let config = |index| registers.read_config(index);
        let mtu = if features & FEATURE_MTU != 0 {
            usize::from(u16::from_le_bytes([config(CONFIG_MTU), config(CONFIG_MTU + 1)])).min(MOST_MTU)
        } else {
            USUAL_MTU
        };
        let large = (HEADER + ETHERNET + mtu).next_multiple_of(LARGE_STEP);
        let (rx_parts, tx_parts) = ring_parts()?;
        // SAFETY: `ring_parts` gives fresh zeroed blocks that nothing else uses.
        let (rx_queue, tx_queue) =
            unsafe { (Queue::new(rx_parts, event_idx), Queue::new(tx_parts, event_idx)) };
        announce(registers, RX_QUEUE, RX_SIZE, rx_parts)?;
        announce(registers, TX_QUEUE, TX_SIZE, tx_parts)?;
        let transmit = Transmit {
            queue: tx_queue,
            buffers: shared_block(TX_SMALL * SMALL_BUFFER + (TX_SIZE - TX_SMALL) * large)?,
            small_free: free_list(0..TX_SMALL as u16)?,
            large_free: free_list(TX_SMALL as u16..TX_SIZE as u16)?,
            large,
            sent: 0,
        };
        let mut receive = Receive { queue: rx_queue, buffers: shared_block(RX_SIZE * large)?, large };
        for id in 0..RX_SIZE as u16 {
            receive.queue.describe(id, receive.address(id), large as u32, DESC_WRITE);
            receive.queue.offer(id);
        }
        let mac = core::array::from_fn(|i| config(i as u64));
        registers.write(reg::STATUS, state | status::DRIVER_OK);
        Ok((mac, mtu, receive, transmit))
    }

    /// The card's hardware address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Tells the device, if it asks for it, which buffers were offered since the last call: at most one exit
    /// per queue.
    pub fn flush(&mut self) {
        self.transmit.reclaim();
        for (queue, wanted) in
            [(TX_QUEUE, self.transmit.queue.should_notify()), (RX_QUEUE, self.receive.queue.should_notify())]
        {
            if wanted {
                self.registers.write(reg::QUEUE_NOTIFY, queue);
                self.kicks += 1;
            }
        }
    }

    /// True when a frame waits.
    pub fn has_frame(&self) -> bool {
        self.receive.queue.has_used()
    }

    /// True when no frame can be sent until the device finishes one.
    pub fn is_full(&mut self) -> bool {
        !self.transmit.ready()
    }

    /// Frames sent and notifications made since boot.
    pub fn counters(&self) -> (u64, u64) {
        (self.transmit.sent, self.kicks)
    }
}

/// Accepts VERSION_1, MAC and, if offered, MTU and EVENT_IDX. Returns what is accepted.
fn negotiate(registers: &Registers) -> Result<u64, NetError> {
    let mut offered = 0;
    for half in [0, 1] {
        registers.write(reg::DEVICE_FEATURES_SEL, half);
        offered |= u64::from(registers.read(reg::DEVICE_FEATURES)) << (32 * half);
    }
    let wanted = offered & (FEATURE_MTU | FEATURE_MAC | FEATURE_EVENT_IDX | FEATURE_VERSION_1);
    if wanted & (FEATURE_MAC | FEATURE_VERSION_1) != FEATURE_MAC | FEATURE_VERSION_1 {
        return Err(NetError::Features);
    }
    for half in [0, 1] {
        registers.write(reg::DRIVER_FEATURES_SEL, half);
        registers.write(reg::DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
    }
    Ok(wanted)
}

/// Two pages: all rings and the (constant) receive descriptors in the first, the transmit descriptors in the
/// second.
fn ring_parts() -> Result<(Parts, Parts), NetError> {
    const RX_AVAILABLE: usize = descriptors_len(RX_SIZE);
    const RX_USED: usize = RX_AVAILABLE + available_len(RX_SIZE);
    const TX_AVAILABLE: usize = RX_USED + used_len(RX_SIZE);
    const TX_USED: usize = TX_AVAILABLE + available_len(TX_SIZE);
    const { assert!(TX_USED + used_len(TX_SIZE) <= 4096, "the rings fit one page") };
    let block = shared_block(4096 + descriptors_len(TX_SIZE))?;
    let at = |offset: usize| block + offset as u64;
    Ok((
        Parts { descriptors: at(0), available: at(RX_AVAILABLE), used: at(RX_USED) },
        Parts { descriptors: at(4096), available: at(TX_AVAILABLE), used: at(TX_USED) },
    ))
}

fn announce(registers: &Registers, queue: u32, size: usize, parts: Parts) -> Result<(), NetError> {
    registers.write(reg::QUEUE_SEL, queue);
    if (registers.read(reg::QUEUE_NUM_MAX) as usize) < size {
        return Err(NetError::Queue);
    }
    registers.write(reg::QUEUE_NUM, size as u32);
    registers.write_address(reg::QUEUE_DESC, parts.descriptors);
    registers.write_address(reg::QUEUE_DRIVER, parts.available);
    registers.write_address(reg::QUEUE_DEVICE, parts.used);
    registers.write(reg::QUEUE_READY, 1);
    Ok(())
}

/// A list of the given ids, lowest on top, with room for all of them and never more.
fn free_list(ids: core::ops::Range<u16>) -> Result<Vec<u16>, NetError> {
    let mut list = Vec::new();
    list.try_reserve_exact(ids.len()).map_err(|_| NetError::Memory)?;
    list.extend(ids.rev());
    Ok(list)
}

/// One received frame; its buffer goes back to the device when it is consumed.
pub struct RxToken<'a>(&'a mut Receive);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, use_frame: F) -> R {
        let result = use_frame(self.0.peek().map_or(&[], |(_, frame)| frame));
        self.0.release();
        result
    }
}

/// The right to send one frame.
pub struct TxToken<'a>(&'a mut Transmit);

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.0.send(len, fill)
    }
}

impl Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        if !self.receive.queue.has_used() || !self.transmit.ready() {
            return None;
        }
        Some((RxToken(&mut self.receive), TxToken(&mut self.transmit)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TxToken<'_>> {
        if self.transmit.ready() { Some(TxToken(&mut self.transmit)) } else { None }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET + self.mtu;
        capabilities
    }
}

impl NetDevice for Net {
    fn peek(&self) -> Option<&[u8]> {
        self.receive.peek().map(|(_, frame)| frame)
    }

    fn discard(&mut self) {
        self.receive.release();
    }
}
