//! A disk, for the command `DISK`: one request at a time, and the vCPU waits for its answer.

use alloc::alloc::{Layout, alloc_zeroed};
use core::{ptr, slice};

use super::mmio::{Registers, reg, status};
use super::queue::{DESC_WRITE, Parts, Queue, available_len, descriptors_len, used_len};
use crate::cpu;
use crate::logic::command::{BLOCK, Disk};

const QUEUE: u32 = 0;
/// A request has three descriptors: header, data and status.
const SIZE: usize = 4;
const DEVICE: u32 = 2;
const SECTOR: u64 = 512;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

const FEATURE_FLUSH: u32 = 1 << 9;
/// VIRTIO_F_VERSION_1, in the upper half of the features.
const FEATURE_VERSION_1: u32 = 1;

/// First and longest rest between two looks for the answer.
const REST_US: u32 = 50;
const LONGEST_REST_US: u32 = 2000;

/// Offsets in the shared block: the rings, the header and the status byte in one page, the data in the next.
const AVAILABLE: usize = descriptors_len(SIZE);
const USED: usize = AVAILABLE + available_len(SIZE);
const HEADER: usize = USED + used_len(SIZE);
const HEADER_LEN: usize = 16;
const STATUS: usize = HEADER + HEADER_LEN;
const DATA: usize = 4096;
const _: () = assert!(STATUS < DATA);

/// A disk and its driver.
pub struct Blk {
    registers: Registers,
    queue: Queue<SIZE>,
    block: u64,
    blocks: u64,
    flushes: bool,
}

impl Blk {
    /// Finds, negotiates and starts the disk at `base`. `None` if there is none, or none that we can use.
    ///
    /// # Safety
    /// `base` is the address of a mapped MMIO window, and this is the only driver of what is there.
    pub unsafe fn new(base: u64) -> Option<Self> {
        // SAFETY: the caller's promise.
        let registers = unsafe { Registers::new(base) };
        let magic = u32::from_le_bytes(*b"virt");
        let is_disk = registers.read(reg::MAGIC) == magic && registers.read(reg::VERSION) == 2;
        if !is_disk || registers.read(reg::DEVICE_ID) != DEVICE {
            return None;
        }
        let started = Self::start(&registers);
        if started.is_none() {
            registers.write(reg::STATUS, status::FAILED);
        }
        let (queue, block, blocks, flushes) = started?;
        Some(Self { registers, queue, block, blocks, flushes })
    }

    fn start(registers: &Registers) -> Option<(Queue<SIZE>, u64, u64, bool)> {
        let mut state = status::ACKNOWLEDGE | status::DRIVER;
        registers.write(reg::STATUS, 0);
        registers.write(reg::STATUS, state);
        let [low, high] = [0, 1].map(|half| {
            registers.write(reg::DEVICE_FEATURES_SEL, half);
            registers.read(reg::DEVICE_FEATURES)
        });
        for (half, wanted) in [(0, low & FEATURE_FLUSH), (1, high & FEATURE_VERSION_1)] {
            registers.write(reg::DRIVER_FEATURES_SEL, half);
            registers.write(reg::DRIVER_FEATURES, wanted);
        }
        state |= status::FEATURES_OK;
        registers.write(reg::STATUS, state);
        registers.write(reg::QUEUE_SEL, QUEUE);
        let accepted = registers.read(reg::STATUS) & status::FEATURES_OK != 0;
        if !accepted || high & FEATURE_VERSION_1 == 0 || (registers.read(reg::QUEUE_NUM_MAX) as usize) < SIZE
        {
            return None;
        }
        let layout = Layout::from_size_align(DATA + BLOCK, 4096).ok()?;
        // SAFETY: the layout is not empty.
        let block = unsafe { alloc_zeroed(layout) } as u64;
        if block == 0 {
            return None;
        }
        let at = |offset: usize| block + offset as u64;
        let parts = Parts { descriptors: at(0), available: at(AVAILABLE), used: at(USED) };
        // SAFETY: a fresh zeroed block that nothing else uses and nobody frees.
        let queue = unsafe { Queue::new(parts, false) };
        registers.write(reg::QUEUE_NUM, SIZE as u32);
        registers.write_address(reg::QUEUE_DESC, parts.descriptors);
        registers.write_address(reg::QUEUE_DRIVER, parts.available);
        registers.write_address(reg::QUEUE_DEVICE, parts.used);
        registers.write(reg::QUEUE_READY, 1);
        let sectors = u64::from_le_bytes(core::array::from_fn(|at| registers.read_config(at as u64)));
        registers.write(reg::STATUS, state | status::DRIVER_OK);
        Some((queue, block, sectors / (BLOCK as u64 / SECTOR), low & FEATURE_FLUSH != 0))
    }

    fn data(&mut self) -> &mut [u8] {
        // SAFETY: the second page of our block; the device has it only while `request` waits.
        unsafe { slice::from_raw_parts_mut((self.block + DATA as u64) as *mut u8, BLOCK) }
    }

    /// Makes a request and waits for its answer.
    fn request(&mut self, kind: u32, block: u64, data: Option<u16>) -> bool {
        let at = |offset: usize| self.block + offset as u64;
        let (header, status) = (at(HEADER), at(STATUS) as *mut u8);
        // SAFETY: inside the first page of our block, and the device has no request at the moment.
        unsafe {
            ptr::write_volatile(header as *mut [u32; 2], [kind, 0]);
            ptr::write_volatile((header + 8) as *mut u64, block * (BLOCK as u64 / SECTOR));
            ptr::write_volatile(status, 0xff);
        }
        let first = (header, HEADER_LEN as u32, 0);
        let last = (status as u64, 1, DESC_WRITE);
        match data {
            Some(flags) => self.queue.describe_chain(&[first, (at(DATA), BLOCK as u32, flags), last]),
            None => self.queue.describe_chain(&[first, last]),
        }
        self.queue.offer(0);
        if self.queue.should_notify() {
            self.registers.write(reg::QUEUE_NOTIFY, QUEUE);
        }
        let mut rest = REST_US;
        while self.queue.pop_used().is_none() {
            cpu::idle(rest);
            rest = (2 * rest).min(LONGEST_REST_US);
        }
        // SAFETY: as above; the device has answered.
        unsafe { ptr::read_volatile(status) == 0 }
    }
}

impl Disk for Blk {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn read(&mut self, block: u64) -> Option<&[u8]> {
        let done = self.request(READ, block, Some(DESC_WRITE));
        done.then(|| &*self.data())
    }

    fn write(&mut self, block: u64, text: &[u8]) -> bool {
        let data = self.data();
        let (head, rest) = data.split_at_mut(text.len().min(BLOCK));
        head.copy_from_slice(&text[..head.len()]);
        rest.fill(0);
        self.request(WRITE, block, Some(0))
    }

    fn sync(&mut self) -> bool {
        // A disk without this feature answers no write before it is durable.
        !self.flushes || self.request(FLUSH, 0, None)
    }
}
