//! Bounce buffers for the data of requests on its way between guest memory and the disk.
//!
//! The kernel reads and writes these while the guest runs and while checkpoints are taken; only the device
//! thread touches guest memory, inside the gate.

/// Bytes of the smallest buffers.
const SMALLEST: usize = 4096;
/// Sizes are powers of two from `SMALLEST` on.
const CLASSES: usize = 11;
/// Bytes of the largest.
const LARGEST: usize = SMALLEST << (CLASSES - 1);

const _: () = assert!(LARGEST >= super::config::MAX_DATA, "the largest buffer holds any request");

/// A bounce buffer, at least as large as was asked for.
pub(super) type Buffer = Vec<u8>;

/// Buffers of a disk, never more than `limit` bytes in all.
#[derive(Debug)]
pub(super) struct Pool {
    free: [Vec<Buffer>; CLASSES],
    /// Bytes of all buffers, lent out or free.
    bytes: usize,
    limit: usize,
}

impl Pool {
    /// A pool of at most `limit` bytes, but of one buffer of the largest size in any case.
    pub(super) fn new(limit: usize) -> Self {
        Self { free: Default::default(), bytes: 0, limit: limit.max(LARGEST) }
    }

    /// Lends a buffer of at least `len` bytes; `None` if that would now be too much memory.
    pub(super) fn lend(&mut self, len: usize) -> Option<Buffer> {
        if len == 0 {
            return Some(Buffer::new());
        }
        let class = class(len);
        if let Some(buffer) = self.free[class].pop() {
            return Some(buffer);
        }
        let size = SMALLEST << class;
        while self.bytes + size > self.limit {
            // Free unused buffers of other sizes to make room.
            let dropped = self.free.iter_mut().rev().find_map(Vec::pop)?;
            self.bytes -= dropped.len();
        }
        self.bytes += size;
        Some(vec![0; size])
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        if !buffer.is_empty() {
            self.free[class(buffer.len())].push(buffer);
        }
    }

    /// Bytes of all buffers, lent out or free.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

fn class(len: usize) -> usize {
    len.div_ceil(SMALLEST).next_power_of_two().trailing_zeros() as usize
}
