//! The requests in flight: taken from the driver and not yet given back.
//!
//! They are kept in the order in which they were taken. A restored device issues them again in that order,
//! and those that overlap are carried out in it: a request that changes the disk counts the unfinished
//! earlier requests that it overlaps, and starts when that count is zero.

use std::time::Instant;

use super::config::QUEUE_SIZE;
use super::job::Job;
use super::pool::Buffer;
use super::request::{RequestType, Status};
use crate::devices::valve::Tag;
use crate::devices::virtio::MAX_QUEUES;
use crate::devices::virtio::chain::Chain;

/// Most requests of a disk in flight at a time.
pub const MAX_IN_FLIGHT: usize = 256;

const _: () = assert!(QUEUE_SIZE == u128::BITS as u16, "one bit for each descriptor");

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The entry is free.
    Free,
    /// This many bytes of its data have been copied from guest memory.
    Filling(usize),
    /// It waits for earlier ones, or to be let out.
    Waiting,
    /// The engine has it, or is about to get it.
    Running,
    /// The disk is done with it; its changes go to the log.
    Logging(Status),
    /// This many bytes of its data have been copied to guest memory.
    Delivering(Status, usize),
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stage: Stage,
    /// Which request of the disk it is: a later one has a greater number.
    pub(super) number: u64,
    pub(super) queue: u16,
    pub(super) head: u16,
    /// The driver has reset the device: nobody is told when this is done.
    pub(super) orphan: bool,
    /// It was in flight on another host before.
    pub(super) reissued: bool,
    /// How many unfinished earlier requests it overlaps.
    pub(super) waits: u16,
    /// Since when the host's disk has its operation; `None` once that was answered.
    pub(super) since: Option<Instant>,
    /// When it was taken: says when a write to a shared disk may leave.
    pub(super) tag: Tag,
    pub(super) chain: Chain,
    pub(super) job: Job,
    pub(super) buffer: Buffer,
}

/// All requests in flight of one disk.
#[derive(Debug)]
pub(super) struct Table {
    entries: Vec<Entry>,
    free: Vec<u16>,
    /// Entries in use, oldest request first.
    order: Vec<u16>,
    /// The heads in flight of each queue.
    heads: [u128; MAX_QUEUES],
    /// How many requests were ever in flight.
    admitted: u64,
    /// Whether the disk is shared: reads then wait for overlapping writes, too.
    reads_wait: bool,
}

impl Table {
    pub(super) fn new(reads_wait: bool) -> Self {
        let entry = || Entry {
            stage: Stage::Free,
            number: 0,
            queue: 0,
            head: 0,
            orphan: false,
            reissued: false,
            waits: 0,
            since: None,
            tag: Tag::NONE,
            chain: Chain::default(),
            job: Job::idle(),
            buffer: Buffer::new(),
        };
        Self {
            entries: (0..MAX_IN_FLIGHT).map(|_| entry()).collect(),
            free: (0..MAX_IN_FLIGHT as u16).rev().collect(),
            order: Vec::with_capacity(MAX_IN_FLIGHT),
            heads: [0; MAX_QUEUES],
            admitted: 0,
            reads_wait,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn get(&self, token: u16) -> &Entry {
        &self.entries[usize::from(token)]
    }

    pub(super) fn get_mut(&mut self, token: u16) -> &mut Entry {
        &mut self.entries[usize::from(token)]
    }

    /// The requests in flight, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, &Entry)> {
        self.order.iter().map(|&token| (token, self.get(token)))
    }

    /// The entries that are in use now, oldest request first, to walk while the table changes.
    pub(super) fn token_at(&self, position: usize) -> Option<u16> {
        self.order.get(position).copied()
    }

    /// Queue and head of each request that the driver waits for, oldest first.
    pub(super) fn heads(&self) -> impl Iterator<Item = (u16, u16)> {
        self.iter().filter(|(_, entry)| !entry.orphan).map(|(_, entry)| (entry.queue, entry.head))
    }

    /// Whether the driver waits for this chain.
    pub(super) fn has(&self, queue: u16, head: u16) -> bool {
        self.heads[usize::from(queue)] & 1 << head != 0
    }

    /// The entry for the next request, to read the request into.
    pub(super) fn next_free(&mut self) -> Option<&mut Entry> {
        let token = *self.free.last()?;
        Some(self.get_mut(token))
    }

    /// Takes [`next_free`](Self::next_free) into use; its job has begun. Counts the requests that it has to
    /// wait for.
    pub(super) fn admit(&mut self, queue: u16, head: u16, tag: Tag, stage: Stage) -> Option<u16> {
        let token = self.free.pop()?;
        let job = &self.get(token).job;
        let waits = self.iter().filter(|(_, earlier)| earlier.holds_up(job, self.reads_wait)).count() as u16;
        self.order.push(token);
        self.heads[usize::from(queue)] |= 1 << head;
        self.admitted += 1;
        let number = self.admitted;
        let entry = self.get_mut(token);
        (entry.stage, entry.queue, entry.head, entry.number) = (stage, queue, head, number);
        (entry.waits, entry.tag, entry.orphan) = (waits, tag, false);
        Some(token)
    }

    /// The disk is done with `token` (or will never see it): the requests that waited for it wait for one
    /// less. `done` gets each that no longer waits. Call this while the entry still has its old stage.
    pub(super) fn finished(&mut self, token: u16, mut done: impl FnMut(u16)) {
        let Some(position) = self.order.iter().position(|&it| it == token) else { return };
        for &later in &self.order[position + 1..] {
            if self.get(token).holds_up(&self.get(later).job, self.reads_wait) {
                let entry = &mut self.entries[usize::from(later)];
                entry.waits -= 1;
                if entry.waits == 0 {
                    done(later);
                }
            }
        }
    }

    /// The driver no longer waits for `token`.
    pub(super) fn orphan(&mut self, token: u16) {
        let entry = &mut self.entries[usize::from(token)];
        entry.orphan = true;
        self.heads[usize::from(entry.queue)] &= !(1 << entry.head);
    }

    /// Frees the entry. Returns its buffer.
    pub(super) fn free(&mut self, token: u16) -> Buffer {
        let entry = &mut self.entries[usize::from(token)];
        if !entry.orphan {
            self.heads[usize::from(entry.queue)] &= !(1 << entry.head);
        }
        entry.stage = Stage::Free;
        entry.since = None;
        let buffer = std::mem::take(&mut entry.buffer);
        self.order.retain(|&it| it != token);
        self.free.push(token);
        buffer
    }
}

impl Entry {
    /// Whether this request, taken earlier, must be done before `later` may start.
    fn holds_up(&self, later: &Job, reads_wait: bool) -> bool {
        let under_way = matches!(self.stage, Stage::Filling(_) | Stage::Waiting | Stage::Running);
        let (mine, its) = (&self.job.span, &later.span);
        under_way
            && self.job.kind.changes()
            && (later.kind.changes() || reads_wait && later.kind == RequestType::Read)
            && mine.offset < its.end()
            && its.offset < mine.end()
    }
}
