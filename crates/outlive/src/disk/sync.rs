//! The primary's side of the base synchronisation of disks. It has its own thread: reading and hashing may
//! wait for a disk, the link's heartbeats may not.
//!
//! Every round is the same dialogue: the primary sends the sums of a *window* of chunks, the standby answers
//! which of them it wants, and the primary sends those chunks. The first round covers the whole disk, the
//! later ones what the guest wrote meanwhile. The standby answers in the order of its work, after it has
//! written the chunks of the windows before; so the windows not yet answered bound everything that is on its
//! way, and no more are ever sent.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::{DISK_CHUNK, DISK_RECORD_LEN, DiskOp, DiskRecord, DiskWant, MAX_ZERO_CHUNKS, RecordBuf};

use super::book::Book;
use super::image::{ChunkReader, Sum, chunks};

/// Chunks in a window: 4 MiB.
const WINDOW: u64 = 64;
/// How many chunks may be in unanswered windows.
const IN_FLIGHT: u64 = 2 * WINDOW;
/// How many windows may be unanswered. Windows of later rounds may have a single chunk.
const WINDOWS: usize = 64;
/// Chunks in one section of blocks. No more, because a heartbeat waits while a section is written.
const SECTION: usize = 3;
/// How many rounds there are at most before the first report. After them, or after a round with no more than
/// this many chunks, memory comes next.
const ROUNDS: u64 = 8;
const FEW: usize = 128;
/// Time between two reports.
const REPORT: Duration = Duration::from_millis(100);

/// A disk to synchronise.
pub(crate) struct SourceDisk {
    /// Its position among the VM's disks.
    pub(crate) index: u16,
    /// Its image.
    pub(crate) file: File,
    /// Its length.
    pub(crate) bytes: u64,
    /// Whether the guest may write to it meanwhile. If not, the standby only compares.
    pub(crate) written: bool,
    /// What is known of its contents, without anything that was written before the log began to mark.
    pub(crate) book: Book,
}

/// Which chunks the guest has written to.
pub(crate) trait Changed: Send + 'static {
    /// Appends, ascending, the chunks written since the last call.
    fn take(&mut self, disk: u16, chunks: &mut Vec<u64>);
}

/// A section to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DiskSection {
    /// Sums of a window.
    Sums {
        /// The disk.
        disk: u16,
        /// Its first chunk.
        first: u64,
        /// Chunks.
        count: u32,
        /// Their sums; `None` if all are zero.
        sums: Option<Vec<Sum>>,
    },
    /// Wanted chunks.
    Blocks {
        /// The round.
        round: u64,
        /// As records, at most a section of them.
        records: RecordBuf,
    },
}

/// What the thread tells the coordinator.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SyncReport {
    /// How far the first round is with a disk.
    Progress {
        /// The disk.
        disk: u16,
        /// Bytes compared.
        done_bytes: u64,
        /// Bytes of the disk.
        total_bytes: u64,
        /// Bytes of chunks sent, in all rounds.
        sent_bytes: u64,
        /// Bytes of chunks read to be compared, of all disks. Holes and what is known are not read.
        read_bytes: u64,
    },
    /// The standby has the disks, except for what is being written.
    Synced,
    /// The standby also has everything written before the order.
    CaughtUp {
        /// As ordered.
        last: bool,
        /// Chunks that had been written since the last time.
        chunks: usize,
    },
    /// The synchronisation failed.
    Failed(String),
}

enum Order {
    Want(DiskWant),
    CatchUp { last: bool },
}

/// The handle of a synchronisation. Dropping it ends the thread.
pub(crate) struct DiskSync {
    orders: Option<Sender<Order>>,
    stop: Arc<Stopped>,
}

/// Whether the handle was dropped. Held while marks are taken: they are the next synchronisation's then.
#[derive(Default)]
struct Stopped {
    is: AtomicBool,
    taking: Mutex<()>,
}

impl Stopped {
    fn taking(&self) -> MutexGuard<'_, ()> {
        self.taking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskSync {
    /// Starts with the first round. The log must mark written chunks already.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(
        disks: Vec<SourceDisk>,
        changed: impl Changed,
        send: impl Fn(DiskSection) + Send + 'static,
        tell: impl Fn(SyncReport) + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let stop = Arc::<Stopped>::default();
        let rounds = Rounds {
            disks,
            changed,
            inbox,
            send,
            tell,
            stop: stop.clone(),
            outstanding: VecDeque::new(),
            in_flight: 0,
            round: 1,
            buffer: vec![0; DISK_CHUNK],
            sent_bytes: 0,
            read_bytes: 0,
            reported: Instant::now(),
        };
        outlive_machine::spawn("disk-sync", move || {
            rounds.run();
        })?;
        Ok(Self { orders: Some(orders), stop })
    }

    /// Takes an answer of the standby.
    pub(crate) fn want(&self, want: DiskWant) {
        self.order(Order::Want(want));
    }

    /// Orders the thread to send what was written meanwhile, and to report when the standby has it. With
    /// `last` the standby makes everything durable.
    pub(crate) fn catch_up(&self, last: bool) {
        self.order(Order::CatchUp { last });
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // A thread that has failed has reported it.
            orders.send(order).ok();
        }
    }
}

impl Drop for DiskSync {
    fn drop(&mut self) {
        // The thread looks before every chunk. It is not waited for: it may be in a disk that does not answer.
        // What it says and sends until then is of a link that is gone.
        let _taking = self.stop.taking();
        self.stop.is.store(true, Ordering::Relaxed);
        self.orders = None;
    }
}

/// Why the thread stops.
enum Stop {
    /// The handle was dropped.
    Unwanted,
    Failed(String),
}

struct Window {
    disk: u16,
    first: u64,
    count: u32,
    /// Its share of [`IN_FLIGHT`].
    weight: u64,
}

struct Rounds<C, S, T> {
    disks: Vec<SourceDisk>,
    changed: C,
    inbox: Receiver<Order>,
    send: S,
    tell: T,
    stop: Arc<Stopped>,
    outstanding: VecDeque<Window>,
    in_flight: u64,
    round: u64,
    buffer: Vec<u8>,
    sent_bytes: u64,
    read_bytes: u64,
    reported: Instant,
}

impl<C: Changed, S: Fn(DiskSection), T: Fn(SyncReport)> Rounds<C, S, T> {
    fn run(mut self) {
        if let Err(Stop::Failed(why)) = self.serve() {
            (self.tell)(SyncReport::Failed(why));
        }
    }

    fn serve(&mut self) -> Result<(), Stop> {
        for disk in 0..self.disks.len() {
            let whole = chunks(self.disks[disk].bytes);
            self.offer_span(disk, 0, whole)?;
            self.report(disk, whole);
        }
        while self.round < ROUNDS && self.later_round()? > FEW {}
        self.barrier()?;
        (self.tell)(SyncReport::Synced);
        loop {
            match self.inbox.recv() {
                Ok(Order::CatchUp { last }) => {
                    let chunks = self.later_round()?;
                    if last {
                        self.barrier()?;
                    }
                    self.wait_for_all()?;
                    (self.tell)(SyncReport::CaughtUp { last, chunks });
                }
                Ok(Order::Want(want)) => self.answer(&want)?,
                Err(_) => return Err(Stop::Unwanted),
            }
        }
    }

    /// Offers what was written since the last round. Returns the number of chunks.
    fn later_round(&mut self) -> Result<usize, Stop> {
        self.round += 1;
        let (mut written, mut total) = (Vec::new(), 0);
        for disk in 0..self.disks.len() {
            if !self.disks[disk].written {
                continue;
            }
            written.clear();
            let taking = self.stop.taking();
            if self.stop.is.load(Ordering::Relaxed) {
                return Err(Stop::Unwanted);
            }
            self.changed.take(self.disks[disk].index, &mut written);
            drop(taking);
            total += written.len();
            for run in written.chunk_by(|a, b| a + 1 == *b) {
                self.offer_span(disk, run[0], run.len() as u64)?;
            }
        }
        Ok(total)
    }

    /// Has the standby make durable what it has written, and waits until everything is answered.
    fn barrier(&mut self) -> Result<(), Stop> {
        for disk in 0..self.disks.len() {
            if self.disks[disk].written {
                let disk = self.disks[disk].index;
                self.wait_for_room()?;
                self.offer(Window { disk, first: 0, count: 0, weight: 1 }, Some(Vec::new()));
            }
        }
        self.wait_for_all()
    }

    /// Offers chunks of one disk, window by window.
    fn offer_span(&mut self, disk: usize, first: u64, count: u64) -> Result<(), Stop> {
        let (mut at, end) = (first, first + count);
        while at < end {
            self.wait_for_room()?;
            let index = self.disks[disk].index;
            let (zeroes, sums) = self.next_window(disk, at, end).map_err(|error| match error {
                None => Stop::Unwanted,
                Some(error) => Stop::Failed(format!("disk {index} cannot be read: {error}")),
            })?;
            let count = if zeroes > 0 { zeroes } else { sums.len() as u64 };
            let weight = if zeroes > 0 { 1 } else { count };
            let window = Window { disk: index, first: at, count: count as u32, weight };
            self.offer(window, (zeroes == 0).then_some(sums));
            at += count;
            if self.round == 1 && self.reported.elapsed() >= REPORT {
                self.report(disk, at);
            }
        }
        Ok(())
    }

    /// The next window: some chunks in a hole, or the sums of some chunks. `None` if stopped.
    fn next_window(
        &mut self,
        disk: usize,
        first: u64,
        end: u64,
    ) -> Result<(u64, Vec<Sum>), Option<io::Error>> {
        let SourceDisk { file, bytes, book, .. } = &self.disks[disk];
        let mut reader = ChunkReader::new(file, *bytes);
        let mut zeroes = 0;
        while first + zeroes < end && zeroes < u64::from(MAX_ZERO_CHUNKS) && reader.is_hole(first + zeroes)? {
            zeroes += 1;
        }
        let mut sums = Vec::new();
        if zeroes == 0 {
            for chunk in first..end.min(first + WINDOW) {
                if self.stop.is.load(Ordering::Relaxed) {
                    return Err(None);
                }
                // Later rounds are about chunks that were written just now.
                let known = if self.round == 1 { book.sum(chunk) } else { None };
                let sum = match known {
                    Some(sum) => sum,
                    None => {
                        self.read_bytes += reader.range(chunk).1 as u64;
                        reader.sum(chunk, &mut self.buffer)?
                    }
                };
                book.note(chunk, sum);
                sums.push(sum);
            }
        }
        Ok((zeroes, sums))
    }

    fn offer(&mut self, window: Window, sums: Option<Vec<Sum>>) {
        let Window { disk, first, count, weight } = window;
        self.in_flight += weight;
        self.outstanding.push_back(window);
        (self.send)(DiskSection::Sums { disk, first, count, sums });
    }

    fn wait_for_room(&mut self) -> Result<(), Stop> {
        // There must be room for a whole window.
        while self.in_flight + WINDOW > IN_FLIGHT || self.outstanding.len() >= WINDOWS {
            self.wait_for_answer()?;
        }
        Ok(())
    }

    fn wait_for_all(&mut self) -> Result<(), Stop> {
        while !self.outstanding.is_empty() {
            self.wait_for_answer()?;
        }
        Ok(())
    }

    fn wait_for_answer(&mut self) -> Result<(), Stop> {
        match self.inbox.recv() {
            Ok(Order::Want(want)) => self.answer(&want),
            Ok(Order::CatchUp { .. }) => Err(Stop::Failed("two orders at a time".into())),
            Err(_) => Err(Stop::Unwanted),
        }
    }

    /// Sends what the standby wants of the oldest window.
    fn answer(&mut self, want: &DiskWant) -> Result<(), Stop> {
        let due = self.outstanding.pop_front();
        let Some(window) = due.filter(|w| (w.disk, w.first, w.count) == (want.disk, want.first, want.count))
        else {
            return Err(Stop::Failed("the standby answered to sums that were not sent".into()));
        };
        self.in_flight -= window.weight;
        let Some(SourceDisk { file, bytes, .. }) = self.disks.iter().find(|d| d.index == want.disk) else {
            return Ok(());
        };
        let mut reader = ChunkReader::new(file, *bytes);
        for section in want.wanted.chunks(SECTION) {
            let mut records = RecordBuf::with_capacity(section.len() * (DISK_RECORD_LEN + DISK_CHUNK));
            for at in section {
                if self.stop.is.load(Ordering::Relaxed) {
                    return Err(Stop::Unwanted);
                }
                let chunk = want.first + u64::from(*at);
                let (offset, len) = reader.range(chunk);
                let data = reader
                    .read(chunk, &mut self.buffer)
                    .map_err(|error| Stop::Failed(format!("disk {} cannot be read: {error}", want.disk)))?;
                let op = data.map_or(DiskOp::Zero(len as u64), DiskOp::Data);
                if !records.push(DiskRecord { disk: want.disk, offset, op }) {
                    return Err(Stop::Failed("a chunk found no room in its section".into()));
                }
                self.sent_bytes += len as u64;
            }
            (self.send)(DiskSection::Blocks { round: self.round, records });
        }
        Ok(())
    }

    fn report(&mut self, disk: usize, chunks: u64) {
        self.reported = Instant::now();
        let SourceDisk { index, bytes, .. } = self.disks[disk];
        (self.tell)(SyncReport::Progress {
            disk: index,
            done_bytes: (chunks * DISK_CHUNK as u64).min(bytes),
            total_bytes: bytes,
            sent_bytes: self.sent_bytes,
            read_bytes: self.read_bytes,
        });
    }
}
