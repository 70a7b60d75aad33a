//! The disk, and how much of it may be read.

use std::cell::Cell;
use std::time::Instant;

use crate::{Disk, Limits, ReadError};

/// What a read costs beside its bytes: many small ones are as bad as a large one.
const PER_READ: u64 = 64;

/// A disk with a budget.
pub(crate) struct Source {
    disk: Box<dyn Disk>,
    left: Cell<u64>,
    until: Option<Instant>,
}

impl Source {
    pub(crate) fn new(disk: Box<dyn Disk>, limits: &Limits) -> Self {
        Self { disk, left: Cell::new(limits.rest), until: limits.until }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    /// More may be read: a file of at most this length is next.
    pub(crate) fn allow(&self, bytes: u64) {
        // Blocks are read in groups, and a scattered file uses one block of each.
        self.left.set(self.left.get().saturating_add(bytes.saturating_mul(2)));
    }

    /// Fails once it has taken too long.
    pub(crate) fn in_time(&self) -> Result<(), ReadError> {
        if self.until.is_some_and(|until| Instant::now() >= until) { Err(ReadError::Time) } else { Ok(()) }
    }

    /// Fills the buffer, or fails if that much is not there.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.in_time()?;
        let cost = (buffer.len() as u64).saturating_add(PER_READ);
        let left = self.left.get().checked_sub(cost).ok_or(ReadError::Budget)?;
        self.left.set(left);
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.disk.bytes()) {
            return Err(ReadError::Disk(std::io::ErrorKind::UnexpectedEof.into()));
        }
        self.disk.read_at(buffer, offset).map_err(ReadError::Disk)
    }

    /// As much as is there, of at most `len` bytes; the rest is zero.
    pub(crate) fn peek(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; len];
        let there = self.disk.bytes().saturating_sub(offset).min(len as u64) as usize;
        self.read(offset.min(self.disk.bytes()), &mut bytes[..there])?;
        Ok(bytes)
    }
}
