//! The disk, and how much of it may be read; and how much work and memory a look at it may cost.
//!
//! Reads are not all that a disk can make costly: a script is carried out, and ext4-view keeps blocks, so it can walk a
//! directory for years without a read. So there are three limits, each of which ends the look by itself:
//!
//! - [`walk`](Source::walk) and [`read`](Source::read) share a budget in bytes of the disk, where a directory counts
//!   each time it is looked through;
//! - [`think`](Source::think) has a budget in bytes of memory for everything that configurations are made into.
//!   What was let go counts, too: so it bounds the work as well as the memory;
//! - [`in_time`](Source::in_time) is asked at every step: for the time until which somebody waits, for the time without
//!   the disk's own, and whether anybody wants it at all.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::{Disk, Limits, ReadError};

/// What a read costs beside its bytes: many small ones are as bad as a large one.
const PER_READ: u64 = 64;

/// A disk with a budget.
pub(crate) struct Source {
    disk: Box<dyn Disk>,
    left: Cell<u64>,
    thoughts: Cell<u64>,
    until: Option<Instant>,
    began: Instant,
    own_time: Duration,
    /// The time that the disk has taken.
    in_disk: Cell<Duration>,
}

impl Source {
    pub(crate) fn new(disk: Box<dyn Disk>, limits: &Limits) -> Self {
        Self {
            disk,
            left: Cell::new(limits.rest),
            thoughts: Cell::new(limits.memory),
            until: limits.until,
            began: Instant::now(),
            own_time: limits.own_time,
            in_disk: Cell::new(Duration::ZERO),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    /// More may be read: a file of at most this length is next.
    pub(crate) fn allow(&self, bytes: u64) {
        // Blocks are read in groups, and a scattered file uses one block of each.
        self.left.set(self.left.get().saturating_add(bytes.saturating_mul(2)));
    }

    /// Fails once it has taken too long, or nobody wants it any more.
    pub(crate) fn in_time(&self) -> Result<(), ReadError> {
        if !self.disk.is_wanted() {
            return Err(ReadError::Unwanted);
        }
        let now = Instant::now();
        let own = now.saturating_duration_since(self.began).saturating_sub(self.in_disk.get());
        if own > self.own_time || self.until.is_some_and(|until| now >= until) {
            return Err(ReadError::Time);
        }
        Ok(())
    }

    /// So many bytes of the disk are looked through, whether they are read or known.
    pub(crate) fn walk(&self, bytes: u64) -> Result<(), ReadError> {
        self.in_time()?;
        self.left.set(self.left.get().checked_sub(bytes).ok_or(ReadError::Budget)?);
        Ok(())
    }

    /// So many bytes are needed for what a configuration says. To be asked before they are.
    pub(crate) fn think(&self, bytes: usize) -> Result<(), ReadError> {
        self.in_time()?;
        self.thoughts.set(self.thoughts.get().checked_sub(bytes as u64).ok_or(ReadError::Memory)?);
        Ok(())
    }

    /// Fills the buffer, or fails if that much is not there.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.walk((buffer.len() as u64).saturating_add(PER_READ))?;
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.disk.bytes()) {
            return Err(ReadError::Disk(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let began = Instant::now();
        let done = self.disk.read_at(buffer, offset).map_err(ReadError::Disk);
        self.in_disk.set(self.in_disk.get() + began.elapsed());
        done
    }

    /// As much as is there, of at most `len` bytes; the rest is zero.
    pub(crate) fn peek(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; len];
        let there = self.disk.bytes().saturating_sub(offset).min(len as u64) as usize;
        self.read(offset.min(self.disk.bytes()), &mut bytes[..there])?;
        Ok(bytes)
    }
}
