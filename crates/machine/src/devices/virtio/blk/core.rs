//! What the device does with requests, step by step, inside the gate.
//!
//! ```text
//!  driver ─take─► Filling ─► Waiting ─► Running ─► Logging ─► Delivering ─give back─► driver
//!                 (writes)   overlaps,  engine     changes    (reads)
//!                            held
//! ```
//!
//! A step is short: one request taken, or at most [`PIECE`] bytes moved. Between any two of them the
//! coordinator may close the gate; whatever is in the table then is in flight.

use std::collections::VecDeque;

use vm_memory::GuestMemory;

use super::SERIAL_BYTES;
use super::config::writes_through;
use super::engine::{Completion, Submission};
use super::log::Appended;
use super::pool::Pool;
use super::queues::Queues;
use super::request::{Broken, Kind, Status, Wanted};
use super::stats::add;
use super::table::{MAX_IN_FLIGHT, Slot, Stage, Table};
use super::worker::Parts;
use crate::devices::complaints::complain;
use crate::devices::gate::Pass;
use crate::devices::valve::{Fate, OutputMode};

/// Most bytes moved to or from guest memory, or to the log, in one step.
pub(super) const PIECE: usize = super::log::MAX_RECORD;
/// Most steps of a batch, so that what was taken is submitted soon.
const BATCH: usize = 64;
/// Most bytes of bounce buffers of a disk.
const BOUNCE_BYTES: usize = 16 << 20;

/// What is worked on inside the gate: by the device's thread in its batches, by the coordinator while the
/// gate is closed, and by a vCPU thread when the driver resets or starts the device.
pub(super) struct Core<M> {
    pub(super) queues: Option<Queues<M>>,
    pub(super) table: Table,
    pool: Pool,
    /// Requests of a saved state, to be taken before any other.
    pub(super) reissue: VecDeque<(u16, u16)>,
    /// Operations for the engine, which gets them outside the gate.
    pub(super) outbox: Vec<Submission>,
    completions: Vec<Completion>,
    unblocked: Vec<u16>,
    filling: VecDeque<u16>,
    logging: VecDeque<u16>,
    delivering: VecDeque<u16>,
    /// The log was full when it was last tried.
    pub(super) log_stalled: bool,
    pub(super) live: bool,
    /// Nothing new is taken.
    pub(super) draining: bool,
    /// Queues to look at.
    pub(super) pending: u32,
    /// The queue whose turn it is.
    turn: u16,
    /// There was no buffer for the next request; wait until one is given back.
    starved: bool,
    pub(super) writeback: bool,
    pub(super) serial: [u8; SERIAL_BYTES],
}

impl<M: GuestMemory> Core<M> {
    pub(super) fn new(shared: bool, serial: [u8; SERIAL_BYTES]) -> Self {
        let list = || VecDeque::with_capacity(MAX_IN_FLIGHT);
        Self {
            queues: None,
            table: Table::new(shared),
            pool: Pool::new(BOUNCE_BYTES),
            reissue: VecDeque::with_capacity(MAX_IN_FLIGHT),
            outbox: Vec::with_capacity(MAX_IN_FLIGHT),
            completions: Vec::with_capacity(MAX_IN_FLIGHT),
            unblocked: Vec::with_capacity(MAX_IN_FLIGHT),
            filling: list(),
            logging: list(),
            delivering: list(),
            log_stalled: false,
            live: false,
            draining: false,
            pending: 0,
            turn: 0,
            starved: false,
            writeback: true,
            serial,
        }
    }

    /// Takes what the engine has done, then does a batch of steps. Says whether another batch must follow.
    pub(super) fn batch(&mut self, parts: &Parts, pass: &Pass<'_>) -> bool {
        self.collect(parts);
        let mut more = false;
        let result = (|| {
            for step in 0.. {
                if step == BATCH || pass.must_leave() {
                    more = true;
                    break;
                }
                if !self.step(parts)? {
                    break;
                }
            }
            self.queues.as_mut().map_or(Ok(false), Queues::signal)
        })();
        match result {
            Ok(used) if used => parts.waker.wake(),
            Ok(_) => {}
            Err(reason) => self.stop(parts, &reason),
        }
        parts.counters.set_in_flight(self.in_flight());
        more
    }

    /// How many requests the driver waits for.
    pub(super) fn in_flight(&self) -> usize {
        self.table.heads().count() + self.reissue.len()
    }

    /// Queue and head of the requests the driver waits for, in the order in which they were taken.
    pub(super) fn heads(&self) -> impl Iterator<Item = (u16, u16)> {
        self.table.heads().chain(self.reissue.iter().copied())
    }

    /// The driver is no longer interested in anything: what the disk has not begun is dropped, what it has
    /// begun goes on to its end and into the log.
    pub(super) fn abandon(&mut self, parts: &Parts) {
        self.pending = 0;
        self.reissue.clear();
        self.filling.clear();
        self.delivering.clear();
        let mut position = 0;
        while let Some(token) = self.table.token_at(position) {
            match self.table.get(token).stage {
                Stage::Running | Stage::Logging(_) => {
                    self.table.orphan(token);
                    position += 1;
                }
                _ => {
                    // Whoever waited for it is dropped in its turn.
                    self.table.finished(token, |_| {});
                    self.free(token);
                }
            }
        }
        parts.counters.set_in_flight(0);
    }

    /// Whether something is under way that ends by itself: everything but held writes and what waits for
    /// them.
    pub(super) fn is_busy(&self) -> bool {
        let waits_for_commit = |stage| stage == Stage::Waiting;
        !self.reissue.is_empty() || self.table.iter().any(|(_, slot)| !waits_for_commit(slot.stage))
    }

    fn is_active(&self) -> bool {
        self.live && self.queues.as_ref().is_some_and(|queues| !queues.line.needs_reset())
    }

    fn stop(&mut self, parts: &Parts, reason: &Broken) {
        complain!(error, parts.complaints, disk = parts.index, %reason, "a disk stops until the driver resets it");
        self.abandon(parts);
        if let Some(queues) = &self.queues {
            queues.line.fail();
        }
        parts.waker.wake();
    }

    /// Takes what the engine has done.
    fn collect(&mut self, parts: &Parts) {
        let mut completions = std::mem::take(&mut self.completions);
        parts.engine.reap(&mut completions);
        for completion in completions.drain(..) {
            self.completed(parts, completion);
        }
        self.completions = completions;
    }

    fn completed(&mut self, parts: &Parts, Completion { token, buffer, result }: Completion) {
        use super::job::After;
        let slot = self.table.get_mut(token);
        slot.buffer = buffer;
        let Some(result) = result else { return self.set_aside(parts, token) };
        match slot.job.done(result) {
            After::Again if parts.is_dropped(slot) => self.set_aside(parts, token),
            After::Again => self.start(parts, token),
            After::Finished(status, error) => {
                if let Some(number) = error {
                    self.complain(parts, token, number);
                }
                self.disk_done(parts, token, status);
            }
        }
    }

    /// A change of a shared disk, on its way or in part done, has lost its permission: it is held again. It
    /// was let out before, so it goes with whatever is let out next.
    fn set_aside(&mut self, parts: &Parts, token: u16) {
        let slot = self.table.get_mut(token);
        if !slot.orphan {
            slot.stage = Stage::Waiting;
            slot.tag.epoch = 0;
            return self.start_if_possible(parts, token);
        }
        // The driver that wanted it is gone.
        let mut unblocked = std::mem::take(&mut self.unblocked);
        self.table.finished(token, |later| unblocked.push(later));
        self.free(token);
        for later in unblocked.drain(..) {
            self.start_if_possible(parts, later);
        }
        self.unblocked = unblocked;
    }

    /// One step. Says whether there was anything to do.
    fn step(&mut self, parts: &Parts) -> Result<bool, Broken> {
        if self.log_next(parts) {
            return Ok(true);
        }
        if !self.is_active() {
            return Ok(false);
        }
        Ok(self.deliver_next(parts)? || self.fill_next(parts)? || self.take_next(parts)?)
    }

    /// Takes the next request: of a saved state, or from the next queue that has one.
    fn take_next(&mut self, parts: &Parts) -> Result<bool, Broken> {
        if self.starved || self.table.is_full() {
            return Ok(false);
        }
        if let Some(&(queue, head)) = self.reissue.front() {
            let taken = self.admit(parts, queue, head)?;
            if taken {
                self.reissue.pop_front();
                add(&parts.counters.reissued, 1);
            }
            return Ok(taken);
        }
        while self.pending != 0 && !self.draining {
            // The lowest queue that is pending, from the one whose turn it is.
            let ahead = self.pending >> self.turn << self.turn;
            let queue = if ahead != 0 { ahead } else { self.pending }.trailing_zeros() as u16;
            let Some((ring, memory)) = self.queues.as_mut().and_then(|queues| queues.ring(queue)) else {
                self.pending &= !(1 << queue);
                continue;
            };
            let Some(head) = ring.next(memory)? else {
                self.pending &= !(1 << queue);
                continue;
            };
            let taken = self.admit(parts, queue, head)?;
            if !taken && let Some((ring, _)) = self.queues.as_mut().and_then(|queues| queues.ring(queue)) {
                ring.put_back();
            }
            self.turn = if queue < 31 { queue + 1 } else { 0 };
            return Ok(taken);
        }
        Ok(false)
    }

    /// Reads the request of a chain and begins it. `false` if there is no buffer for it now.
    fn admit(&mut self, parts: &Parts, queue: u16, head: u16) -> Result<bool, Broken> {
        let Some(queues) = &mut self.queues else { return Ok(false) };
        let features = queues.features;
        let Some((ring, memory)) = queues.ring(queue) else { return Err(Broken::Ring) };
        if head >= virtio_queue::QueueT::size(&ring.queue) {
            return Err(Broken::Chain);
        }
        if self.table.has(queue, head) {
            return Err(Broken::Twice(head));
        }
        let Some(slot) = self.table.next_free() else { return Ok(false) };
        slot.segments.gather(memory, &ring.queue, head)?;
        let wanted = parts.geometry.judge(memory, &slot.segments, &mut slot.job.ranges)?;
        let (kind, span, len) = match wanted {
            Wanted::Disk { kind, span, len } => (kind, span, len),
            Wanted::Serial => {
                let len = SERIAL_BYTES.min((slot.segments.to_driver - 1) as usize);
                slot.segments.write(memory, 0, &self.serial[..len])?;
                slot.segments.write_status(memory, Status::Ok)?;
                queues.give_back(queue, head, len as u32 + 1)?;
                return Ok(true);
            }
            Wanted::Refused(status) => {
                add(&parts.counters.errors, 1);
                slot.segments.write_status(memory, status)?;
                queues.give_back(queue, head, 1)?;
                return Ok(true);
            }
        };
        let Some(buffer) = self.pool.lend(len) else {
            self.starved = true;
            add(&parts.counters.no_room, 1);
            return Ok(false);
        };
        slot.buffer = buffer;
        slot.job.begin(kind, span, len, writes_through(features, self.writeback));
        let stage = if kind == Kind::Write { Stage::Filling(0) } else { Stage::Waiting };
        let Some(token) = self.table.admit(queue, head, parts.permit.tag(), stage) else { return Ok(false) };
        self.begun(parts, token);
        Ok(true)
    }

    fn begun(&mut self, parts: &Parts, token: u16) {
        let slot = self.table.get(token);
        if slot.waits > 0 {
            add(&parts.counters.serialised, 1);
        }
        match slot.stage {
            Stage::Filling(_) => self.filling.push_back(token),
            _ => self.start_if_possible(parts, token),
        }
    }

    /// Copies the next piece of a write's data from guest memory.
    fn fill_next(&mut self, parts: &Parts) -> Result<bool, Broken> {
        let (Some(&token), Some(queues)) = (self.filling.front(), &self.queues) else { return Ok(false) };
        let slot = self.table.get_mut(token);
        let Stage::Filling(from) = slot.stage else { return Ok(false) };
        let to = slot.job.len.min(from + PIECE);
        let data = &mut slot.buffer[from..to];
        slot.segments.read(&*queues.memory, super::request::HEADER + from, data)?;
        if to < slot.job.len {
            slot.stage = Stage::Filling(to);
        } else {
            slot.stage = Stage::Waiting;
            self.filling.pop_front();
            self.start_if_possible(parts, token);
        }
        Ok(true)
    }

    /// Gives a request to the engine if it waits for nothing and may leave.
    pub(super) fn start_if_possible(&mut self, parts: &Parts, token: u16) {
        let slot = self.table.get(token);
        let held = parts.shared && slot.job.kind.changes() && !parts.passes(slot);
        if slot.stage == Stage::Waiting && slot.waits == 0 && !held {
            self.start(parts, token);
        }
    }

    /// Has the engine do what the request needs next.
    pub(super) fn start(&mut self, parts: &Parts, token: u16) {
        let slot = self.table.get_mut(token);
        slot.stage = Stage::Running;
        match slot.job.operation() {
            Some(operation) => {
                let buffer = std::mem::take(&mut slot.buffer);
                self.outbox.push(Submission { token, operation, buffer, tag: slot.tag });
            }
            // A request for nothing: to zero no sectors.
            None => self.disk_done(parts, token, Status::Ok),
        }
    }

    /// The disk is done with a request: those that overlap it may start.
    fn disk_done(&mut self, parts: &Parts, token: u16, status: Status) {
        let mut unblocked = std::mem::take(&mut self.unblocked);
        self.table.finished(token, |later| unblocked.push(later));
        let slot = self.table.get_mut(token);
        slot.stage = Stage::Logging(status);
        let kind = slot.job.kind;
        if !parts.shared && kind != Kind::Read {
            self.logging.push_back(token);
        } else {
            self.deliver(token, status);
        }
        for later in unblocked.drain(..) {
            self.start_if_possible(parts, later);
        }
        self.unblocked = unblocked;
    }

    /// Moves the next piece of what was changed to the log, in the order in which the disk was done.
    fn log_next(&mut self, parts: &Parts) -> bool {
        let Some(&token) = self.logging.front() else { return false };
        if self.log_stalled {
            return false;
        }
        let slot = self.table.get_mut(token);
        let Stage::Logging(status) = slot.stage else { return false };
        match slot.job.next_change(parts.index, &slot.buffer) {
            Some(change) => match parts.log.append(change) {
                Appended::Done => slot.job.logged(&change),
                Appended::Full => {
                    self.log_stalled = true;
                    add(&parts.counters.log_full, 1);
                    return false;
                }
            },
            None => {
                self.logging.pop_front();
                self.deliver(token, status);
            }
        }
        true
    }

    /// A request is done but for telling the driver, if there is one that wants to know.
    fn deliver(&mut self, token: u16, status: Status) {
        let slot = self.table.get_mut(token);
        if slot.orphan {
            return self.free(token);
        }
        slot.stage = Stage::Delivering(status, 0);
        self.delivering.push_back(token);
    }

    /// Copies the next piece of a read's data to guest memory; after the last, gives the chain back.
    fn deliver_next(&mut self, parts: &Parts) -> Result<bool, Broken> {
        let (Some(&token), Some(queues)) = (self.delivering.front(), &mut self.queues) else {
            return Ok(false);
        };
        let slot = self.table.get_mut(token);
        let Stage::Delivering(status, from) = slot.stage else { return Ok(false) };
        let total = if slot.job.kind == Kind::Read && status == Status::Ok { slot.job.len } else { 0 };
        let to = total.min(from + PIECE);
        slot.segments.write(&*queues.memory, from, &slot.buffer[from..to])?;
        if to < total {
            slot.stage = Stage::Delivering(status, to);
            return Ok(true);
        }
        slot.segments.write_status(&*queues.memory, status)?;
        queues.give_back(slot.queue, slot.head, total as u32 + 1)?;
        count(parts, slot.job.kind, slot.job.len, status);
        self.delivering.pop_front();
        self.free(token);
        Ok(true)
    }

    fn free(&mut self, token: u16) {
        let buffer = self.table.free(token);
        self.pool.give_back(buffer);
        self.starved = false;
    }

    /// The host's disk failed.
    fn complain(&self, parts: &Parts, token: u16, number: i32) {
        let job = &self.table.get(token).job;
        if job.kind.changes() && !parts.shared {
            parts.log.damaged(parts.index, job.span.offset, job.span.len);
        }
        let error = std::io::Error::from_raw_os_error(number);
        complain!(warn, parts.complaints, disk = parts.index, offset = job.span.offset, len = job.span.len,
            kind = ?job.kind, %error, "the host's disk failed a request of the guest");
    }
}

impl Parts {
    /// Whether a write leaves at once.
    fn passes(&self, slot: &Slot) -> bool {
        let order = self.permit.order();
        order.mode() == OutputMode::PassThrough && self.permit.fate(order, slot.tag) == Fate::Leaves
    }

    /// Whether a write must not go on, because it was discarded.
    fn is_dropped(&self, slot: &Slot) -> bool {
        let changes = self.shared && slot.job.kind.changes();
        changes && self.permit.fate(self.permit.order(), slot.tag) == Fate::Dropped
    }
}

fn count(parts: &Parts, kind: Kind, len: usize, status: Status) {
    let counters = &parts.counters;
    if status != Status::Ok {
        return add(&counters.errors, 1);
    }
    match kind {
        Kind::Read => {
            add(&counters.reads, 1);
            add(&counters.read_bytes, len as u64);
        }
        Kind::Write => {
            add(&counters.writes, 1);
            add(&counters.write_bytes, len as u64);
        }
        Kind::Flush => add(&counters.flushes, 1),
        Kind::Discard => add(&counters.discards, 1),
        Kind::WriteZeroes => add(&counters.zeroes, 1),
    }
}
