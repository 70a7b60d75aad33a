//! The standby's part of the audit of disks: chunks of its images are compared with the VM's as of a checkpoint.
//!
//! The disks' thread does its jobs in their order, so it hears of a comparison when it has committed checkpoint N and not
//! N+1. At that moment chunk N is what the image has, with the writes on top of it that wait. But another thread reads
//! the chunk (`reading.rs`), and the disks' thread goes on. So it notes what it writes into the image until the read is
//! over:
//!
//! - A write of N, or of an earlier checkpoint, changes nothing: the read may have seen it or not, or a half of it, and it
//!   is put on top of what was read, in its order.
//! - A write of N+1, or of a later one, that is about the chunk *overtakes* the read. Which of it the read has seen
//!   nobody knows, and what was there before is gone. The chunk is not compared, and neither is what comes behind it in
//!   the checkpoint's sums, because the primary knows from the number of chunks alone which ones were compared.
//!
//! All other bytes were the same during the whole read. So what is compared is the chunk at N, exactly.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, DiskAudited, DiskRecord, RecordBuf};

use super::reading::{Found, Order, Read};
use crate::audit::{Budget, DiskRate, thread_time};
use crate::disk::apply::Watch;
use crate::disk::{chunk_sum, overlay};

/// How far a comparison may be ahead of the rate at which disks are read: checkpoints come in bunches.
const AHEAD: Duration = Duration::from_millis(500);

/// Comparisons that were asked for and are not over, in the order of their checkpoints; and what was compared so far.
pub(super) struct Audits {
    asked: VecDeque<Asked>,
    /// A read of the first one is under way.
    reading: Option<Reading>,
    ticket: u64,
    orders: Sender<Order>,
    /// Bytes of each disk.
    sizes: Vec<u64>,
    rate: DiskRate,
    so_far: DiskAudited,
    /// What the primary was told.
    told: DiskAudited,
    buffer: Vec<u8>,
}

/// The comparison with a checkpoint.
struct Asked {
    number: u64,
    /// What is left of it. The first range may be begun.
    ranges: VecDeque<AuditRange>,
    budget: Arc<Budget>,
}

/// A read that is under way.
struct Reading {
    ticket: u64,
    /// The checkpoint as of which it counts.
    number: u64,
    chunks: ChunkRange,
    /// What was written into the image meanwhile, of this checkpoint or of earlier ones.
    landed: Option<Landed>,
}

/// Writes that landed during a read.
struct Landed {
    chunks: ChunkRange,
    bytes: Vec<u8>,
    /// Which of the bytes they are about.
    known: Vec<bool>,
}

/// What came of a read.
pub(super) struct Compared {
    pub(super) checkpoint: u64,
    pub(super) disk: u16,
    /// The chunk that differs, if one does; or that it cannot be read.
    pub(super) differs: io::Result<Option<ChunkRange>>,
}

impl Audits {
    /// Reads are ordered there. `sizes` has the bytes of each disk.
    pub(super) fn new(orders: Sender<Order>, sizes: Vec<u64>) -> Self {
        let (so_far, told) = Default::default();
        let (asked, rate, buffer) = (VecDeque::new(), DiskRate::start(), Vec::new());
        Self { asked, reading: None, ticket: 0, orders, sizes, rate, so_far, told, buffer }
    }

    /// Chunks are to be compared with the sums that they have at this checkpoint, which was committed last.
    pub(super) fn ask(&mut self, number: u64, ranges: Vec<AuditRange>, budget: Arc<Budget>) {
        self.asked.push_back(Asked { number, ranges: ranges.into(), budget });
    }

    /// How many comparisons are not over.
    pub(super) fn count(&self) -> usize {
        self.asked.len()
    }

    /// Whether a read is under way.
    pub(super) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Has the next chunk read, if none is. Returns what the primary has to be told, as often as there is something: a
    /// comparison is over. It counts as answered even if all of it was left out, so that the primary knows that it was.
    pub(super) fn go_on(&mut self) -> Option<(DiskAudited, u64)> {
        while self.reading.is_none() {
            let Asked { number, ranges, budget } = self.asked.front_mut()?;
            // A primary may want more than this host gives.
            if self.rate.wait() > AHEAD || budget.is_used_up() {
                ranges.clear();
            }
            let number = *number;
            if let Some(AuditRange { chunks, .. }) = ranges.front() {
                self.ticket += 1;
                let (ticket, chunks) = (self.ticket, *chunks);
                self.reading = Some(Reading { ticket, number, chunks, landed: None });
                let mut buffer = std::mem::take(&mut self.buffer);
                buffer.resize(DISK_CHUNK, 0);
                // Without that thread no comparison is ever over.
                self.orders.send(Order { ticket, chunks, buffer }).ok();
                break;
            }
            self.asked.pop_front();
            self.so_far.checkpoint = number;
            if let told @ Some(_) = self.due() {
                return told;
            }
        }
        None
    }

    /// Compares what was read. `waiting` has the records that are not in the images. `None` if nobody wants to know any
    /// more.
    pub(super) fn compare<'a>(
        &mut self,
        read: Read,
        waiting: impl Iterator<Item = (u64, &'a RecordBuf)> + Clone,
    ) -> Option<Compared> {
        let reading = self.reading.take_if(|reading| reading.ticket == read.ticket)?;
        let began = thread_time();
        let Read { found, took, spent, buffer, .. } = read;
        self.buffer = buffer;
        self.so_far.read_ns += took.as_nanos() as u64;
        let differs = found.map(|found| {
            if found == Found::Data {
                self.rate.charge(1, took);
            }
            self.differs(&reading, found, waiting)
        });
        let spent = spent + thread_time().saturating_sub(began);
        self.so_far.spent_ns += spent.as_nanos() as u64;
        if let Some(asked) = self.asked.front() {
            asked.budget.spend(spent);
        }
        if let Ok(Some(chunks)) = differs {
            (self.so_far.checkpoint, self.so_far.differs) = (reading.number, Some(chunks));
        }
        Some(Compared { checkpoint: reading.number, disk: reading.chunks.disk, differs })
    }

    fn differs<'a>(
        &mut self,
        reading: &Reading,
        found: Found,
        waiting: impl Iterator<Item = (u64, &'a RecordBuf)> + Clone,
    ) -> Option<ChunkRange> {
        let disk = reading.chunks.disk;
        let size = self.sizes.get(usize::from(disk)).copied().unwrap_or(0);
        let (count, is_hole) = match found {
            Found::Hole(count) => (count, true),
            Found::Data => (1, false),
        };
        for _ in 0..count {
            // Nothing is left of it if it was overtaken.
            let AuditRange { chunks: left, sum } = self.asked.front_mut()?.ranges.front_mut()?;
            let chunk = ChunkRange { count: 1, ..*left };
            let bytes = &mut self.buffer[..size.saturating_sub(chunk.offset()).min(chunk.len()) as usize];
            if is_hole {
                bytes.fill(0);
            }
            reading.landed.iter().for_each(|landed| landed.put_on(bytes, chunk.offset()));
            for (_, records) in waiting.clone().filter(|(number, _)| *number <= reading.number) {
                overlay(bytes, disk, chunk.offset(), records.iter());
            }
            self.so_far.chunks += 1;
            // Several have a sum of zeroes.
            if chunk_sum(chunk.first, bytes) != *sum {
                return Some(chunk);
            }
            (left.first, left.count) = (left.first + 1, left.count - 1);
            if left.count == 0 {
                self.asked.front_mut()?.ranges.pop_front();
                break;
            }
        }
        None
    }

    /// Whether the waiting records, if they were written now, would overtake something.
    pub(super) fn would_be_overtaken<'a>(
        &self,
        mut waiting: impl Iterator<Item = (u64, &'a RecordBuf)>,
    ) -> bool {
        !self.asked.is_empty()
            && waiting.any(|(number, records)| {
                let older = || self.asked.iter().filter(|asked| asked.number < number);
                records.iter().any(|record| {
                    older().any(|it| it.ranges.iter().any(|range| touches(&range.chunks, &record)))
                })
            })
    }

    /// An image is written in a way that has no checkpoint.
    pub(super) fn overtake_all(&mut self) {
        self.asked.iter_mut().for_each(|asked| asked.ranges.clear());
    }

    /// The disks have had their rest.
    #[cfg(test)]
    pub(super) fn have_rested(&mut self) {
        self.rate = DiskRate::start();
    }

    /// How many chunks are to be compared, if nothing comes between.
    #[cfg(test)]
    pub(super) fn left(&self) -> u32 {
        self.asked.iter().flat_map(|asked| &asked.ranges).map(|range| range.chunks.count).sum()
    }

    /// Nobody wants an answer any more.
    pub(super) fn give_up(&mut self) {
        self.asked.clear();
        self.reading = None;
    }

    /// What to tell the primary, which waits for an answer to each checkpoint's sums, and how many chunks it has not
    /// heard of.
    pub(super) fn due(&mut self) -> Option<(DiskAudited, u64)> {
        let told = std::mem::replace(&mut self.told, self.so_far);
        (told != self.so_far).then(|| (self.so_far, self.so_far.chunks - told.chunks))
    }
}

impl Watch for Audits {
    fn about_to_write(&mut self, checkpoint: u64, records: &RecordBuf) {
        if let Some(reading) = self.reading.as_mut().filter(|reading| checkpoint <= reading.number) {
            reading.note(records);
        }
        for asked in self.asked.iter_mut().filter(|asked| asked.number < checkpoint) {
            records.iter().for_each(|record| asked.cut(&record));
        }
    }
}

impl Asked {
    /// The chunks that this record is about, and all behind them, are not compared any more.
    fn cut(&mut self, record: &DiskRecord<'_>) {
        let hit = self.ranges.iter().position(|range| touches(&range.chunks, record));
        if let Some(at) = hit {
            let ChunkRange { first, count, .. } = &mut self.ranges[at].chunks;
            *count = (record.offset / DISK_CHUNK as u64).saturating_sub(*first) as u32;
            let left = at + usize::from(*count > 0);
            self.ranges.truncate(left);
        }
    }
}

impl Reading {
    fn note(&mut self, records: &RecordBuf) {
        for record in records.iter().filter(|record| touches(&self.chunks, record)) {
            self.landed.get_or_insert_with(|| Landed::new(self.chunks)).add(&record);
        }
    }
}

impl Landed {
    fn new(chunks: ChunkRange) -> Self {
        let len = chunks.len() as usize;
        Self { chunks, bytes: vec![0; len], known: vec![false; len] }
    }

    fn add(&mut self, record: &DiskRecord<'_>) {
        let start = self.chunks.offset();
        overlay(&mut self.bytes, self.chunks.disk, start, std::iter::once(*record));
        let (from, to) = (record.offset.max(start), record.end().min(start + self.chunks.len()));
        self.known[(from - start) as usize..(to - start) as usize].fill(true);
    }

    /// Puts them on top of what was read at `offset`.
    fn put_on(&self, read: &mut [u8], offset: u64) {
        let from = (offset - self.chunks.offset()) as usize;
        for ((byte, new), known) in read.iter_mut().zip(&self.bytes[from..]).zip(&self.known[from..]) {
            if *known {
                *byte = *new;
            }
        }
    }
}

/// Whether the record is about these chunks.
fn touches(chunks: &ChunkRange, record: &DiskRecord<'_>) -> bool {
    let end = chunks.offset() + chunks.len();
    record.disk == chunks.disk && !record.is_empty() && record.offset < end && chunks.offset() < record.end()
}
