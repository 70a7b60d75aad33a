//! The thread that writes to a link. It owns the writing end and the encoder, so the order on the wire is the
//! order of its jobs.

use std::io::{self, IoSlice, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender as Queue, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outlive_dirty::Gfn;
use outlive_epoch::{
    AuditRange, CheckpointBegin, DiskSums, EncodeError, Encoder, MAX_PAGES_PER_SECTION, PageCodec, PageEntry,
    PageWriter, Preface, ProtocolVersion, RecordBuf, StateBuf, squeeze_zero_pages,
};
use outlive_machine::{Outgoing, PAGE_SIZE, Ram};
use outlive_pair::Ticket;

use super::jobs::{CheckpointPart, Job, SenderReport, SentRound, Shipped};
use super::tail::Writing;
use super::{Closer, Writer};
use crate::audit::{MOST_CHUNKS, Picked, Taking};
use crate::clock::Clock;
use crate::disk::DiskSection;
use crate::heat::Counter;
use crate::pulse::Pulse;
use crate::vm::limits::REMEMBERED_PAGES;

/// Most bytes of pages, state or disk writes in one write, and in one section. A heartbeat may go out between
/// two writes, so at most this much is between a heartbeat that is due and the link. Larger writes are no
/// faster: 64 pages cost one system call.
pub(super) const BATCH_BYTES: usize = 256 << 10;
const BATCH_PAGES: usize = BATCH_BYTES / PAGE_SIZE;
const _: () = assert!(BATCH_PAGES <= MAX_PAGES_PER_SECTION);

/// How long the thread of a closed link may take to end.
const LAST_STEPS: Duration = Duration::from_secs(1);

/// The handle of a sender thread.
pub(crate) struct Sender {
    /// Each with the time of the order.
    jobs: Queue<(Instant, Job)>,
    closer: Closer,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    /// Starts the thread for a connection that begins in the version `introduction`. The thread calls
    /// `report`. It writes heartbeats while the pulse lasts.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(
        to: Writer,
        closer: Closer,
        clock: Clock,
        pulse: Arc<Pulse>,
        heartbeat: Duration,
        introduction: ProtocolVersion,
        report: impl Fn(SenderReport) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, inbox) = channel();
        let work = Work {
            bell: jobs.clone(),
            tail: None,
            audit: None,
            heat: None,
            picked: Picked::new(),
            ranges: Vec::with_capacity(MOST_CHUNKS),
            to,
            closer: closer.clone(),
            encoder: Encoder::speaking(introduction),
            clock,
            pulse,
            heartbeat,
            beaten: Instant::now(),
            pages: PageWriter::plain(),
            remembers: false,
            entries: Vec::with_capacity(MAX_PAGES_PER_SECTION),
            state: StateBuf::default(),
            unchanged: Vec::new(),
            heads: Vec::with_capacity(1 << 20),
            cuts: Vec::with_capacity(64),
            batched: 0,
            shipped: Shipped::default(),
            writing: Duration::ZERO,
            written: 0,
            report,
        };
        let thread = outlive_machine::spawn("sender", move || {
            work.serve(&inbox);
        })?;
        Ok(Self { jobs, closer, thread: Some(thread) })
    }

    /// Queues a job. Never blocks. A job for a link that is gone is dropped.
    pub(crate) fn send(&self, job: Job) {
        self.jobs.send((Instant::now(), job)).ok();
    }

    /// Breaks the link at once: reads and writes on it end.
    pub(crate) fn close(&self) {
        self.closer.close();
    }

    /// Lets the thread finish its queue, but for no longer than `patience`, and closes the link.
    pub(crate) fn finish(mut self, patience: Duration) {
        self.send(Job::Close);
        self.ends_within(patience);
        self.close_and_leave();
    }

    /// Closes the link and lets its thread end. A thread that does not end in time is left behind: nobody
    /// waits for it.
    pub(crate) fn close_and_leave(&mut self) {
        self.close();
        self.send(Job::Close);
        if !self.ends_within(LAST_STEPS) {
            tracing::error!("the sender of a link does not end, and is left behind");
        }
        self.thread = None;
    }

    /// Waits for the thread's end, but for no longer than `patience`.
    fn ends_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.close_and_leave();
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum SendError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error("a page outside the guest's memory was reported dirty")]
    NoSuchPage,
}

/// First the heads up to this byte, then these bytes of page data.
struct Cut {
    heads_end: usize,
    data: Range<usize>,
}

struct Work<R> {
    /// This thread's own queue, by which the card's thread wakes it. So the queue never ends by itself: the thread
    /// ends with [`Job::Close`], which [`Sender`] sends in any case.
    bell: Queue<(Instant, Job)>,
    /// Copies of the guest's frames.
    tail: Option<Writing>,
    /// Sums of the guest's pages.
    audit: Option<Taking>,
    /// Where memory is written.
    heat: Option<Counter>,
    /// Those of the checkpoint whose parts are being sent.
    picked: Picked,
    /// Those of its disks.
    ranges: Vec<AuditRange>,
    to: Writer,
    closer: Closer,
    encoder: Encoder,
    clock: Clock,
    pulse: Arc<Pulse>,
    heartbeat: Duration,
    beaten: Instant,
    /// How pages are written down; see the rule in [`outlive_epoch::codec`].
    pages: PageWriter,
    /// Whether the writer has its memory.
    remembers: bool,
    /// The entries of the section that is being put together.
    entries: Vec<PageEntry>,
    /// The state that was last sent; empty before the first checkpoint of a base.
    state: StateBuf,
    /// Places of pages of the checkpoint that have not changed.
    unchanged: Vec<usize>,
    /// Everything but page data, for one write.
    heads: Vec<u8>,
    cuts: Vec<Cut>,
    /// Bytes of pages, state and disk writes in both.
    batched: usize,
    /// About the checkpoint whose parts are being sent.
    shipped: Shipped,
    /// Time in system calls that write, since it was last read out.
    writing: Duration,
    /// Bytes written to the link so far.
    written: u64,
    report: R,
}

impl<R: Fn(SenderReport)> Work<R> {
    fn serve(mut self, inbox: &Receiver<(Instant, Job)>) {
        while let Ok((ordered, job)) = inbox.recv() {
            if matches!(job, Job::Close) {
                break;
            }
            if let Err(error) = self.carry_out(job, ordered) {
                (self.report)(SenderReport::Failed(error.to_string()));
                break;
            }
        }
        self.closer.close();
        // Buffers in the queue are dropped with it: protection starts anew with new buffers.
    }

    fn carry_out(&mut self, job: Job, ordered: Instant) -> Result<(), SendError> {
        match job {
            Job::Hello(hello) => {
                self.heads.extend_from_slice(&Preface { version: self.encoder.stream() }.encode());
                self.encoder.hello(&mut self.heads, &hello)?;
                self.flush(&[])
            }
            Job::Speak(version, tail, audit, heat) => {
                self.heat = heat;
                self.encoder.speak(version);
                let bell = self.bell.clone();
                let ring = move || drop(bell.send((Instant::now(), Job::Tail)));
                self.tail = tail
                    .filter(|_| version >= ProtocolVersion::V6)
                    .map(|frames| Writing::start(frames, ring));
                self.audit = (version >= ProtocolVersion::V7).then(|| Taking::start(audit));
                Ok(())
            }
            Job::Tail => self.send_tail(),
            Job::BaseRound { round, gfns, ram } => {
                let (began, before) = (Instant::now(), self.written);
                self.base_round(round, &gfns, &ram)?;
                let (bytes, took) = (self.written - before, began.elapsed());
                (self.report)(SenderReport::BaseRoundDone(SentRound { gfns, bytes, took }));
                Ok(())
            }
            Job::Disk(section) => self.disk(&section),
            Job::Checkpoint(mut part) => {
                let began = Instant::now();
                self.writing = Duration::ZERO;
                self.checkpoint(&mut part)?;
                self.note_part(&part, began.saturating_duration_since(ordered), began.elapsed());
                (self.report)(SenderReport::Free(part.staging));
                Ok(())
            }
            Job::Sight(sight) => Ok(self.encoder.arbiter_sight(&mut self.heads, sight)?),
            Job::Heartbeat => self.beat(),
            Job::End(reason) => {
                self.encoder.end(&mut self.heads, reason);
                self.flush(&[])
            }
            Job::Dismiss => {
                self.encoder.dismiss(&mut self.heads);
                self.flush(&[])
            }
            Job::Close => Ok(()),
        }
    }

    fn note_part(&mut self, part: &CheckpointPart, queue: Duration, took: Duration) {
        let shipped = &mut self.shipped;
        shipped.number = part.ticket.number;
        shipped.queue += queue;
        shipped.encode += took.saturating_sub(self.writing);
        shipped.send += self.writing;
        if part.last {
            (self.report)(SenderReport::Shipped(std::mem::take(shipped)));
        }
    }

    fn beat(&mut self) -> Result<(), SendError> {
        self.beaten = Instant::now();
        if !self.pulse.lasts() {
            // What earlier decisions have queued may be written much later.
            return Ok(());
        }
        if let Some(tail) = &mut self.tail {
            tail.put_released(&mut self.encoder, &mut self.heads)?;
        }
        let stamp = self.stamp();
        self.encoder.heartbeat(&mut self.heads, stamp);
        self.flush(&[])
    }

    /// Writes what the guest was given meanwhile. Nothing else may wait to be written.
    fn send_tail(&mut self) -> Result<(), SendError> {
        let Some(tail) = &mut self.tail else { return Ok(()) };
        tail.put_input(&mut self.encoder, &mut self.heads)?;
        if self.heads.is_empty() {
            return Ok(());
        }
        self.flush(&[])
    }

    /// During a long job, tells the peer that this side lives, and what the guest was given.
    fn beat_if_due(&mut self) -> Result<(), SendError> {
        self.send_tail()?;
        if self.beaten.elapsed() >= self.heartbeat { self.beat() } else { Ok(()) }
    }

    fn stamp(&self) -> u64 {
        self.clock.now().as_micros() as u64
    }

    /// A base begins: from here on the standby's memory is what this connection carries.
    fn remember(&mut self, ram: &Ram) -> Result<(), SendError> {
        self.pages.forget();
        self.state.clear();
        if self.remembers || !self.encoder.stream().has_codec(PageCodec::Granules) {
            return Ok(());
        }
        self.remembers = true;
        let mut beaten = Ok(());
        let writer = PageWriter::remembering(REMEMBERED_PAGES.min(ram.pages() as usize), || {
            if beaten.is_ok() {
                beaten = self.beat_if_due();
            }
        });
        match writer {
            Ok(writer) => self.pages = writer,
            Err(error) => tracing::warn!(%error, "pages are sent whole: no memory to remember what was sent"),
        }
        beaten
    }

    fn base_round(&mut self, round: u32, gfns: &[Gfn], ram: &Ram) -> Result<(), SendError> {
        self.remember(ram)?;
        let mut data = vec![0u8; BATCH_BYTES];
        let mut numbers = Vec::with_capacity(BATCH_PAGES);
        let mut entries = Vec::with_capacity(BATCH_PAGES);
        for chunk in gfns.chunks(BATCH_PAGES) {
            numbers.clear();
            entries.clear();
            let (pages, _) = data.as_chunks_mut::<PAGE_SIZE>();
            for (gfn, page) in chunk.iter().zip(pages) {
                if !ram.read_page(*gfn, page) {
                    return Err(SendError::NoSuchPage);
                }
                numbers.push(gfn.0);
            }
            let bytes = chunk.len() * PAGE_SIZE;
            let length = squeeze_zero_pages(&numbers, &mut data[..bytes], &mut entries);
            let entries = entries.iter().copied();
            self.encoder.base_pages_head(&mut self.heads, u64::from(round), entries, &data[..length])?;
            self.add(0..length);
            self.flush(&data)?;
            (self.report)(SenderReport::BaseProgress { pages: chunk.len() as u64 });
            self.beat_if_due()?;
        }
        Ok(())
    }

    fn disk(&mut self, section: &DiskSection) -> Result<(), SendError> {
        match section {
            DiskSection::Sums { disk, first, count, sums } => {
                let window = DiskSums { disk: *disk, first: *first, count: *count, sums: sums.as_deref() };
                self.encoder.disk_sums(&mut self.heads, &window)?;
                self.flush(&[])?;
            }
            DiskSection::Blocks { round, records } => {
                let records = records.records();
                self.encoder.disk_blocks_head(&mut self.heads, *round, records)?;
                self.add(0..records.bytes().len());
                self.flush(records.bytes())?;
            }
        }
        self.beat_if_due()
    }

    fn checkpoint(&mut self, part: &mut CheckpointPart) -> Result<(), SendError> {
        let Ticket { generation, number, flags, .. } = part.ticket;
        if let Some(tail) = &mut self.tail {
            tail.put_released(&mut self.encoder, &mut self.heads)?;
            tail.put_input(&mut self.encoder, &mut self.heads)?;
        }
        if let Some((pages, state_bytes)) = part.totals {
            let (pages, state_bytes) = (pages as u32, state_bytes as u32);
            // Like the state, the writes to disks are all in the first part.
            let disk_bytes = part.staging.disk_writes().len() as u32;
            let begin = CheckpointBegin { generation, number, pages, state_bytes, disk_bytes, flags };
            self.encoder.checkpoint_begin(&mut self.heads, &begin)?;
        }
        self.pick(part);
        self.pages(&mut part.staging)?;
        let data = part.staging.page_bytes();
        self.state(part.staging.state(), data)?;
        self.disk_writes(part.staging.disk_writes(), data)?;
        if part.last {
            if let Some(tail) = &mut self.tail {
                tail.put_output(number, &mut self.encoder, &mut self.heads)?;
            }
            let spans = self.picked.spans();
            if !spans.is_empty() {
                self.encoder.audit(&mut self.heads, spans)?;
                self.picked.clear();
            }
            if !self.ranges.is_empty() {
                self.encoder.disk_audit(&mut self.heads, &self.ranges)?;
                self.ranges.clear();
            }
            let stamp = self.stamp();
            self.encoder.checkpoint_end(&mut self.heads, stamp)?;
        }
        self.flush(data)?;
        self.unchanged.drain(..).for_each(|place| part.staging.unchanged(place));
        (self.report)(SenderReport::Written(self.pages.take_counts()));
        self.heat.iter_mut().for_each(Counter::tell);
        self.beat_if_due()
    }

    /// Takes the sums for a checkpoint with its first part. Those of pages that this part has are made anew, before
    /// the pages are written down in place.
    fn pick(&mut self, part: &CheckpointPart) {
        let Some(audit) = &self.audit else { return };
        let Ticket { number, flags, .. } = part.ticket;
        if flags.base_final {
            // The copy is made anew.
            return audit.forget();
        }
        // Nobody takes over what has ended.
        if part.totals.is_some() && flags.end.is_none() {
            audit.take(number, &mut self.picked);
            // All writes are in the first part.
            audit.take_chunks(number, part.staging.disk_writes(), &mut self.ranges);
        }
        self.picked.captured(part.staging.gfns(), part.staging.page_bytes());
    }

    /// The state of a checkpoint: its changes, or all of it. It goes with the first part.
    fn state(&mut self, state: &StateBuf, data: &[u8]) -> Result<(), SendError> {
        if state.is_empty() {
            return Ok(());
        }
        let before = self.heads.len();
        let changes = self.encoder.state_changes(&mut self.heads, &self.state, state)?;
        self.batched += self.heads.len() - before;
        for section in state.sections().filter(|section| !(changes && section.kind.is_kept())) {
            self.make_room(section.bytes.len(), data)?;
            self.encoder.state_head(&mut self.heads, &section)?;
            self.heads.extend_from_slice(section.bytes);
            self.batched += section.bytes.len();
        }
        if self.state.try_copy_from(state).is_err() {
            // Then the next state is sent whole.
            self.state.clear();
        }
        Ok(())
    }

    /// The pages of a checkpoint, written down in place. The last of them may wait there.
    fn pages(&mut self, staging: &mut Outgoing) -> Result<(), SendError> {
        let (gfns, data) = staging.pages_mut();
        let (mut begin, mut end) = (0, 0);
        for (place, gfn) in gfns.iter().enumerate() {
            if self.entries.len() == MAX_PAGES_PER_SECTION || end - begin + PAGE_SIZE > BATCH_BYTES {
                self.section_of_pages(begin..end, data)?;
                begin = end;
            }
            match self.pages.write(gfn.0, data, place * PAGE_SIZE, end) {
                Some(entry) => {
                    end += entry.data_len();
                    self.entries.push(entry);
                    if let Some(heat) = &mut self.heat {
                        heat.count(gfn.0);
                    }
                }
                None => self.unchanged.push(place),
            }
        }
        self.section_of_pages(begin..end, data)
    }

    /// The collected entries, with their data.
    fn section_of_pages(&mut self, range: Range<usize>, data: &[u8]) -> Result<(), SendError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        self.make_room(range.len(), data)?;
        let entries = self.entries.iter().copied();
        self.encoder.pages_head(&mut self.heads, entries, &data[range.clone()])?;
        self.entries.clear();
        self.add(range);
        Ok(())
    }

    /// The writes to disks, behind the pages and the state that wait in `data` and in the heads.
    fn disk_writes(&mut self, writes: &RecordBuf, data: &[u8]) -> Result<(), SendError> {
        if writes.is_empty() {
            return Ok(());
        }
        self.flush(data)?;
        self.beat_if_due()?;
        for section in writes.sections(BATCH_BYTES) {
            self.encoder.disk_writes_head(&mut self.heads, section)?;
            let bytes = section.bytes();
            self.add(0..bytes.len());
            self.flush(bytes)?;
            self.beat_if_due()?;
        }
        Ok(())
    }

    /// Adds the payload of the section whose head was just written.
    fn add(&mut self, data: Range<usize>) {
        self.batched += data.len();
        self.cuts.push(Cut { heads_end: self.heads.len(), data });
    }

    /// Writes the waiting bytes if `more` bytes would make the batch too large. A heartbeat that is due goes
    /// first.
    fn make_room(&mut self, more: usize, data: &[u8]) -> Result<(), SendError> {
        if self.batched > 0 && self.batched + more > BATCH_BYTES {
            self.flush(data)?;
            self.beat_if_due()?;
        }
        Ok(())
    }

    /// Writes heads and page data in their order with as few system calls as the kernel allows.
    fn flush(&mut self, data: &[u8]) -> Result<(), SendError> {
        let mut slices = Vec::with_capacity(self.cuts.len() * 2 + 1);
        let mut at = 0;
        for cut in &self.cuts {
            slices.push(IoSlice::new(&self.heads[at..cut.heads_end]));
            slices.push(IoSlice::new(&data[cut.data.clone()]));
            at = cut.heads_end;
        }
        slices.push(IoSlice::new(&self.heads[at..]));
        let total: usize = slices.iter().map(|s| s.len()).sum();
        let began = Instant::now();
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match self.to.write_vectored(rest) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => IoSlice::advance_slices(&mut rest, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.writing += began.elapsed();
        self.heads.clear();
        self.cuts.clear();
        self.batched = 0;
        self.written += total as u64;
        (self.report)(SenderReport::Sent(total as u64));
        Ok(())
    }
}
