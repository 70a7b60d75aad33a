//! What the device does with requests, step by step, inside the gate.
//!
//! ```text
//!  driver ─take─► Filling ─► Waiting ─► Running ─► Logging ─► Delivering ─give back─► driver
//!                 (writes)   overlaps,  engine     changes    (reads)
//!                            held
//! ```
//!
//! A step is short: it takes one request, or moves at most [`PIECE`] bytes. The coordinator may close the
//! gate between any two steps; everything in the table is then in flight.

use std::collections::VecDeque;
use std::time::Instant;

use vm_memory::GuestMemory;

use super::SERIAL_BYTES;
use super::chunks::ChunkSet;
use super::config::writes_through;
use super::disk::Disk;
use super::engine::{Completion, Submission};
use super::log::Appended;
use super::pool::Pool;
use super::request::{RequestType, Status, Wanted};
use super::table::{Entry, MAX_IN_FLIGHT, Stage, Table};
use crate::devices::complaints::complain;
use crate::devices::valve::{Fate, OutputMode};
use crate::devices::virtio::chain::Broken;
use crate::devices::virtio::ring::Queues;
use crate::devices::virtio::slot::{Batch, Outcome};
use crate::event::MachineEvent;

/// Most bytes moved to or from guest memory, or to the log, in one step.
pub(super) const PIECE: usize = super::log::MAX_RECORD;
/// Most steps of a batch, so that the batch's requests are submitted soon.
const BATCH: usize = 64;
/// Most bytes of bounce buffers of a disk.
const BOUNCE_BYTES: usize = 16 << 20;

/// The requests of a disk, and how far each is. Used inside the gate, except where it says something else.
pub struct Requests {
    pub(super) table: Table,
    pool: Pool,
    /// Requests of a saved state, to be taken before any other.
    pub(super) reissue: VecDeque<(u16, u16)>,
    /// Whether the request that is being taken is one of those.
    reissuing: bool,
    /// Operations for the engine, which are submitted outside the gate.
    pub(super) outbox: Vec<Submission>,
    /// The engine's results that no batch has taken yet: see [`note_answers`](Self::note_answers).
    completions: Vec<Completion>,
    unblocked: Vec<u16>,
    filling: VecDeque<u16>,
    logging: VecDeque<u16>,
    delivering: VecDeque<u16>,
    /// Requests that the host's disk has failed, each with the error number. They count as in flight until
    /// the guest may hear of them.
    failed: VecDeque<(u16, i32)>,
    /// Whether the guest is to hear of them.
    pub(super) tell_failed: bool,
    /// Whether the log was full at the last attempt.
    pub(super) log_stalled: bool,
    /// Whether new requests are refused.
    pub(super) resting: bool,
    /// The queue whose turn it is.
    next_queue: usize,
    /// Whether there was no buffer for the next request; it waits until one is given back.
    starved: bool,
    pub(super) writeback: bool,
    pub(super) serial: [u8; SERIAL_BYTES],
}

impl Requests {
    pub(super) fn new(shared: bool, serial: [u8; SERIAL_BYTES]) -> Self {
        let list = || VecDeque::with_capacity(MAX_IN_FLIGHT);
        Self {
            table: Table::new(shared),
            pool: Pool::new(BOUNCE_BYTES),
            reissue: VecDeque::with_capacity(MAX_IN_FLIGHT),
            reissuing: false,
            outbox: Vec::with_capacity(MAX_IN_FLIGHT),
            completions: Vec::with_capacity(MAX_IN_FLIGHT),
            unblocked: Vec::with_capacity(MAX_IN_FLIGHT),
            filling: list(),
            logging: list(),
            delivering: list(),
            failed: VecDeque::with_capacity(MAX_IN_FLIGHT),
            tell_failed: false,
            log_stalled: false,
            resting: false,
            next_queue: 0,
            starved: false,
            writeback: true,
            serial,
        }
    }

    /// Takes the engine's results, then does a batch of steps.
    pub(super) fn batch<M: GuestMemory>(
        &mut self,
        disk: &Disk,
        batch: Batch<'_, M>,
    ) -> Result<Outcome, Broken> {
        if std::mem::take(&mut self.tell_failed) {
            self.fail_all(disk);
        }
        self.collect(disk);
        let Batch { mut queues, pass } = batch;
        let mut more = false;
        for step in 0.. {
            if step == BATCH || pass.must_leave() {
                more = true;
                break;
            }
            if !self.step(disk, queues.as_deref_mut())? {
                break;
            }
        }
        disk.counters.set_in_flight(self.in_flight());
        Ok(Outcome { more, wake: queues.is_some_and(|queues| queues.gave_back()) })
    }

    /// How many requests the driver waits for.
    pub(super) fn in_flight(&self) -> usize {
        self.table.heads().count() + self.reissue.len()
    }

    /// Queue and head of the requests that the driver waits for, in the order in which they were taken.
    pub(super) fn heads(&self) -> impl Iterator<Item = (u16, u16)> {
        self.table.heads().chain(self.reissue.iter().copied())
    }

    /// Adds the chunks of all requests in the table that change the disk, whatever their stage: a request that has
    /// not begun costs no more than a chunk that is read once more.
    pub(super) fn add_changing(&self, chunks: &mut ChunkSet) {
        for (_, entry) in self.table.iter().filter(|(_, entry)| entry.job.kind.changes()) {
            chunks.insert_bytes(entry.job.span.offset, entry.job.span.len);
        }
    }

    /// The number of the newest request in the table that changes this part of the disk, whatever its stage. Requests
    /// with numbers above `last` do not count.
    pub(super) fn newest_change(&self, offset: u64, len: u64, last: u64) -> Option<u64> {
        let changes = self.table.iter().filter(|(_, entry)| entry.job.kind.changes() && entry.number <= last);
        let hits = changes.filter(|(_, entry)| {
            let span = &entry.job.span;
            span.offset < offset.saturating_add(len) && offset < span.end()
        });
        hits.map(|(_, entry)| entry.number).max()
    }

    /// The driver wants nothing any more: requests that the disk has not begun are dropped; those that it has
    /// begun are carried out to their end and logged.
    pub(super) fn abandon(&mut self, disk: &Disk) {
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
                    // Requests that waited for it are dropped in turn.
                    self.table.finished(token, |_| {});
                    self.free(token);
                }
            }
        }
        disk.counters.set_in_flight(0);
    }

    /// Whether something is under way that ends by itself: everything but held writes and the requests that
    /// wait for them.
    pub(super) fn is_busy(&self) -> bool {
        let waits_for_commit = |stage| stage == Stage::Waiting;
        !self.reissue.is_empty() || self.table.iter().any(|(_, entry)| !waits_for_commit(entry.stage))
    }

    /// Notes which operations the host's disk has answered, for somebody who asks while the gate may be closed. What
    /// follows from an answer waits for the next batch: it may belong into the log or into guest memory, and a
    /// checkpoint may be under way that has neither.
    ///
    /// An operation that was answered counts as answered even if its request needs another one. That one begins in a
    /// batch, so until then the disk has nothing of this request that could still reach the storage.
    fn note_answers(&mut self, disk: &Disk) {
        let noted = self.completions.len();
        disk.engine.try_reap(&mut self.completions);
        for completion in &self.completions[noted..] {
            self.table.get_mut(completion.token).since = None;
        }
    }

    /// Takes the engine's results, those first that were noted before.
    fn collect(&mut self, disk: &Disk) {
        let mut completions = std::mem::take(&mut self.completions);
        disk.engine.reap(&mut completions);
        for completion in completions.drain(..) {
            self.completed(disk, completion);
        }
        self.completions = completions;
    }

    fn completed(&mut self, disk: &Disk, Completion { token, buffer, result }: Completion) {
        use super::job::After;
        let entry = self.table.get_mut(token);
        entry.buffer = buffer;
        let Some(result) = result else { return self.set_aside(disk, token) };
        match entry.job.done(result) {
            After::Again if disk.is_dropped(entry) => self.set_aside(disk, token),
            After::Again => self.start(disk, token),
            After::Finished(_, Some(number)) => self.disk_failed(disk, token, number),
            After::Finished(status, None) => self.disk_done(disk, token, status),
        }
    }

    /// The host's disk failed a request. Whoever wants to know decides what becomes of it: it may give the VM
    /// to another host, whose disk works. So until then nothing of the failure is in the log or in guest
    /// memory, and a checkpoint lists the request as in flight.
    fn disk_failed(&mut self, disk: &Disk, token: u16, number: i32) {
        let why = self.complain(disk, token, number);
        match disk.faults.get() {
            Some(tell) if !self.table.get(token).orphan => {
                let entry = self.table.get_mut(token);
                entry.since = None;
                let again = entry.reissued;
                self.failed.push_back((token, number));
                // One answer is for all that have failed until then.
                if self.failed.len() == 1 || again {
                    tell(MachineEvent::DiskFault { disk: disk.index, why, again });
                }
            }
            _ => self.fail(disk, token),
        }
    }

    /// The guest hears of the failed requests.
    fn fail_all(&mut self, disk: &Disk) {
        while let Some((token, _)) = self.failed.pop_front() {
            self.fail(disk, token);
        }
    }

    fn fail(&mut self, disk: &Disk, token: u16) {
        let job = &self.table.get(token).job;
        if job.kind.changes() && !disk.shared {
            disk.log.damaged(disk.index, job.span.offset, job.span.len);
        }
        self.disk_done(disk, token, Status::IoError);
    }

    /// Since when the host's disk has the operation that it has had for the longest time. Also while the gate is
    /// closed.
    pub(super) fn oldest_at_disk(&mut self, disk: &Disk) -> Option<Instant> {
        self.note_answers(disk);
        self.table
            .iter()
            .filter(|(_, entry)| entry.stage == Stage::Running)
            .filter_map(|(_, it)| it.since)
            .min()
    }

    /// Whether there are failed requests of which the guest has not heard. A failure that was only noted counts: nobody
    /// must take the disk for mended because its answer waits for a batch.
    pub(super) fn has_failed(&self) -> bool {
        let noted = self.completions.iter().any(|it| matches!(it.result, Some(Err(_))));
        noted || !self.failed.is_empty()
    }

    /// Whether the host's disk has a request that was in flight on another host before. Also while the gate is
    /// closed.
    pub(super) fn has_reissued(&mut self, disk: &Disk) -> bool {
        self.note_answers(disk);
        self.table.iter().any(|(_, it)| it.reissued && it.stage == Stage::Running && it.since.is_some())
    }

    /// A change of a shared disk, under way or partly done, has lost its permission: it is held again. It was
    /// let out before, so it leaves with the next writes that are let out.
    fn set_aside(&mut self, disk: &Disk, token: u16) {
        let entry = self.table.get_mut(token);
        if !entry.orphan {
            entry.stage = Stage::Waiting;
            entry.tag.epoch = 0;
            return self.start_if_possible(disk, token);
        }
        // The driver that wanted it is gone.
        let mut unblocked = std::mem::take(&mut self.unblocked);
        self.table.finished(token, |later| unblocked.push(later));
        self.free(token);
        for later in unblocked.drain(..) {
            self.start_if_possible(disk, later);
        }
        self.unblocked = unblocked;
    }

    /// Does one step. Returns whether there was anything to do.
    fn step<M: GuestMemory>(&mut self, disk: &Disk, queues: Option<&mut Queues<M>>) -> Result<bool, Broken> {
        if self.log_next(disk) {
            return Ok(true);
        }
        let Some(queues) = queues else { return Ok(false) };
        Ok(self.deliver_next(disk, queues)?
            || self.fill_next(disk, queues)?
            || self.take_next(disk, queues)?)
    }

    /// Takes the next request: one of a saved state, or one from the next queue that has any.
    fn take_next<M: GuestMemory>(&mut self, disk: &Disk, queues: &mut Queues<M>) -> Result<bool, Broken> {
        if self.starved || self.table.is_full() {
            return Ok(false);
        }
        if let Some(&(queue, head)) = self.reissue.front() {
            self.reissuing = true;
            let taken = self.admit(disk, queues, queue, head);
            self.reissuing = false;
            let taken = taken?;
            if taken {
                self.reissue.pop_front();
                disk.counters.reissued.add(1);
            }
            return Ok(taken);
        }
        while queues.pending() != 0 && !self.resting {
            // The lowest pending queue, from the one whose turn it is.
            let ahead = queues.pending() >> self.next_queue << self.next_queue;
            let queue = if ahead != 0 { ahead } else { queues.pending() }.trailing_zeros() as usize;
            let head = match queues.ring(queue) {
                Some((ring, memory)) => ring.next_head(memory)?,
                None => None,
            };
            let Some(head) = head else {
                queues.looked_at(queue);
                continue;
            };
            let taken = self.admit(disk, queues, queue as u16, head)?;
            if !taken && let Some((ring, _)) = queues.ring(queue) {
                ring.put_back(1);
            }
            self.next_queue = if queue < 31 { queue + 1 } else { 0 };
            return Ok(taken);
        }
        Ok(false)
    }

    /// Reads the request of a chain and begins it. `false` if no buffer is free for it now.
    fn admit<M: GuestMemory>(
        &mut self,
        disk: &Disk,
        queues: &mut Queues<M>,
        queue: u16,
        head: u16,
    ) -> Result<bool, Broken> {
        let features = queues.features;
        let Some((ring, memory)) = queues.ring(queue.into()) else { return Err(Broken::Available) };
        if head >= ring.size() {
            return Err(Broken::Chain);
        }
        if self.table.has(queue, head) {
            return Err(Broken::Rule("a chain is offered while it is in flight"));
        }
        let Some(entry) = self.table.next_free() else { return Ok(false) };
        ring.walk(memory, head, &mut entry.chain)?;
        let wanted = disk.geometry.judge(memory, &entry.chain, &mut entry.job.ranges)?;
        let (kind, span, len) = match wanted {
            Wanted::Disk { kind, span, len } => (kind, span, len),
            Wanted::Serial => {
                let len = SERIAL_BYTES.min((entry.chain.driver_bytes() - 1) as usize);
                entry.chain.write(memory, 0, &self.serial[..len])?;
                Status::Ok.write(memory, &entry.chain)?;
                ring.give_back(memory, &[(head, len as u32 + 1)])?;
                return Ok(true);
            }
            Wanted::Refused(status) => {
                disk.counters.errors.add(1);
                status.write(memory, &entry.chain)?;
                ring.give_back(memory, &[(head, 1)])?;
                return Ok(true);
            }
        };
        let Some(buffer) = self.pool.lend(len) else {
            self.starved = true;
            disk.counters.no_room.add(1);
            return Ok(false);
        };
        entry.buffer = buffer;
        entry.job.begin(kind, span, len, writes_through(features, self.writeback));
        entry.reissued = self.reissuing;
        let stage = if kind == RequestType::Write { Stage::Filling(0) } else { Stage::Waiting };
        let tag = disk.permit.tag();
        let Some(token) = self.table.admit(queue, head, tag, stage) else { return Ok(false) };
        if disk.shared && kind.changes() {
            disk.permit.note_held(tag);
        }
        self.begun(disk, token);
        Ok(true)
    }

    fn begun(&mut self, disk: &Disk, token: u16) {
        let entry = self.table.get(token);
        if entry.waits > 0 {
            disk.counters.serialised.add(1);
        }
        match entry.stage {
            Stage::Filling(_) => self.filling.push_back(token),
            _ => self.start_if_possible(disk, token),
        }
    }

    /// Copies the next piece of a write's data from guest memory.
    fn fill_next<M: GuestMemory>(&mut self, disk: &Disk, queues: &Queues<M>) -> Result<bool, Broken> {
        let Some(&token) = self.filling.front() else { return Ok(false) };
        let entry = self.table.get_mut(token);
        let Stage::Filling(from) = entry.stage else { return Ok(false) };
        let to = entry.job.len.min(from + PIECE);
        let data = &mut entry.buffer[from..to];
        entry.chain.read(&*queues.memory, super::request::HEADER + from, data)?;
        if to < entry.job.len {
            entry.stage = Stage::Filling(to);
        } else {
            entry.stage = Stage::Waiting;
            self.filling.pop_front();
            self.start_if_possible(disk, token);
        }
        Ok(true)
    }

    /// Gives a request to the engine if it waits for nothing and may leave.
    pub(super) fn start_if_possible(&mut self, disk: &Disk, token: u16) {
        let entry = self.table.get(token);
        let held = disk.shared && entry.job.kind.changes() && !disk.passes(entry);
        if entry.stage == Stage::Waiting && entry.waits == 0 && !held {
            self.start(disk, token);
        }
    }

    /// Has the engine carry out the request's next operation.
    pub(super) fn start(&mut self, disk: &Disk, token: u16) {
        let entry = self.table.get_mut(token);
        entry.stage = Stage::Running;
        entry.since = Some(Instant::now());
        match entry.job.operation() {
            Some(operation) => {
                let buffer = std::mem::take(&mut entry.buffer);
                self.outbox.push(Submission { token, operation, buffer, tag: entry.tag });
            }
            // An empty request, for example to zero no sectors.
            None => self.disk_done(disk, token, Status::Ok),
        }
    }

    /// The disk is done with a request: those that overlap it may start.
    fn disk_done(&mut self, disk: &Disk, token: u16, status: Status) {
        let mut unblocked = std::mem::take(&mut self.unblocked);
        self.table.finished(token, |later| unblocked.push(later));
        let entry = self.table.get_mut(token);
        entry.stage = Stage::Logging(status);
        let kind = entry.job.kind;
        if !disk.shared && kind != RequestType::Read {
            self.logging.push_back(token);
        } else {
            self.deliver(token, status);
        }
        for later in unblocked.drain(..) {
            self.start_if_possible(disk, later);
        }
        self.unblocked = unblocked;
    }

    /// Moves the next piece of a change to the log, in the order in which the disk finished the requests.
    fn log_next(&mut self, disk: &Disk) -> bool {
        let Some(&token) = self.logging.front() else { return false };
        if self.log_stalled {
            return false;
        }
        let entry = self.table.get_mut(token);
        let Stage::Logging(status) = entry.stage else { return false };
        match entry.job.next_change(disk.index, &entry.buffer) {
            Some(change) => match disk.log.append(change) {
                Appended::Done => entry.job.logged(&change),
                Appended::Full => {
                    self.log_stalled = true;
                    disk.counters.log_full.add(1);
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

    /// A request is done; only the driver must be told, if it still wants to know.
    fn deliver(&mut self, token: u16, status: Status) {
        let entry = self.table.get_mut(token);
        if entry.orphan {
            return self.free(token);
        }
        entry.stage = Stage::Delivering(status, 0);
        self.delivering.push_back(token);
    }

    /// Copies the next piece of a read's data to guest memory; after the last, gives the chain back.
    fn deliver_next<M: GuestMemory>(&mut self, disk: &Disk, queues: &mut Queues<M>) -> Result<bool, Broken> {
        let Some(&token) = self.delivering.front() else { return Ok(false) };
        let entry = self.table.get_mut(token);
        let Stage::Delivering(status, from) = entry.stage else { return Ok(false) };
        let total =
            if entry.job.kind == RequestType::Read && status == Status::Ok { entry.job.len } else { 0 };
        let to = total.min(from + PIECE);
        let Some((ring, memory)) = queues.ring(entry.queue.into()) else { return Err(Broken::Available) };
        entry.chain.write(memory, from, &entry.buffer[from..to])?;
        if to < total {
            entry.stage = Stage::Delivering(status, to);
            return Ok(true);
        }
        status.write(memory, &entry.chain)?;
        ring.give_back(memory, &[(entry.head, total as u32 + 1)])?;
        count(disk, entry.job.kind, entry.job.len, status);
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
    fn complain(&self, disk: &Disk, token: u16, number: i32) -> String {
        let job = &self.table.get(token).job;
        let error = std::io::Error::from_raw_os_error(number);
        complain!(warn, disk.complaints, disk = disk.index, offset = job.span.offset, len = job.span.len,
            kind = ?job.kind, %error, "the host's disk failed a request of the guest");
        let (kind, len, offset) = (job.kind, job.span.len, job.span.offset);
        format!("disk {}, {kind:?} of {len} bytes at {offset}: {error}", disk.index)
    }
}

impl Disk {
    /// Whether a write leaves at once.
    fn passes(&self, entry: &Entry) -> bool {
        let order = self.permit.order();
        order.mode() == OutputMode::PassThrough && self.permit.fate(order, entry.tag) == Fate::Leaves
    }

    /// Whether a write must not continue, because it was discarded.
    fn is_dropped(&self, entry: &Entry) -> bool {
        let changes = self.shared && entry.job.kind.changes();
        changes && self.permit.fate(self.permit.order(), entry.tag) == Fate::Dropped
    }
}

fn count(disk: &Disk, kind: RequestType, len: usize, status: Status) {
    let counters = &disk.counters;
    if status != Status::Ok {
        return counters.errors.add(1);
    }
    match kind {
        RequestType::Read => {
            counters.reads.add(1);
            counters.read_bytes.add(len as u64);
        }
        RequestType::Write => {
            counters.writes.add(1);
            counters.write_bytes.add(len as u64);
        }
        RequestType::Flush => counters.flushes.add(1),
        RequestType::Discard => counters.discards.add(1),
        RequestType::WriteZeroes => counters.zeroes.add(1),
    }
}
