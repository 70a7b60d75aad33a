//! The disks of the VM that runs here: what the coordinator does with them while a standby is synchronised,
//! and how the writes to shared ones wait for their commit.

use std::io;
use std::sync::Arc;

use outlive_epoch::{DiskWant, RecordBuf};
use outlive_machine::{ChunkSet, LogMode, Machine, WriteLog};
use outlive_pair::Link;

use super::driver::SharedDriver;
use super::inbox::Inbox;
use crate::disk::{Book, Books, Changed, DiskSync, SourceDisk, SyncReport};
use crate::events::{Event, EventWriter};
use crate::link::Job;
use crate::vm::limits::DISK_BYTES;

/// The log begins once no more than this many chunks were written meanwhile: 8 MiB.
const FEW: usize = 128;
/// After this many rounds of what was written meanwhile the log begins, however much there is.
const CATCH_UPS: u32 = 4;

/// The marks of the machine's write log.
struct Marks(Arc<WriteLog>);

impl Changed for Marks {
    fn take(&mut self, disk: u16, chunks: &mut Vec<u64>) {
        if let Some(mut marked) = self.0.empty_chunks(disk)
            && self.0.swap_chunks(disk, &mut marked)
        {
            chunks.extend(ChunkSet::iter(&marked));
        }
    }
}

/// Forgets what the machine has written. The order is in `disk/book.rs`.
fn forget_touched(log: &WriteLog, disk: u16, book: &Book) {
    if let Some(mut touched) = log.empty_chunks(disk)
        && log.swap_touched(disk, &mut touched)
    {
        book.forget_all_of(&touched);
    }
}

/// A machine that stands still lets go of its images: what it has written, and what is still under way, is
/// forgotten. Its engine ends only with it.
pub(super) fn let_go(machine: &Machine, books: &Books) {
    let log = machine.write_log();
    for disk in machine.disks().iter().filter(|disk| !disk.is_shared() && !disk.is_readonly()) {
        let image = disk.image();
        // A new owner, so that a synchronisation that is still reading notes nothing more.
        let book = books.opened(image.path(), image.file(), disk.capacity_bytes());
        forget_touched(log, disk.index(), &book);
        if let Some(mut changing) = log.empty_chunks(disk.index()) {
            disk.add_changing(&mut changing);
            book.forget_all_of(&changing);
        }
    }
}

/// Forgets what is known of the image of one disk.
pub(super) fn forget(machine: &Machine, books: &Books, index: u16) {
    let known = machine.disks().iter().find(|disk| disk.index() == index && !disk.is_shared());
    if let Some(disk) = known.filter(|disk| !disk.is_readonly()) {
        let image = disk.image();
        books.opened(image.path(), image.file(), disk.capacity_bytes()).forget_everything();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The first rounds: everything that differs.
    Syncing,
    /// The standby has the disks, and memory is being sent.
    Synced,
    /// What was written meanwhile is being sent.
    CatchingUp,
    /// The log has begun, and what was written before it is being sent.
    Last,
    /// The standby has everything that is not in the log.
    Done,
}

/// What follows from a report of the synchronisation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing yet.
    Wait,
    /// The rounds of memory.
    Memory,
    /// The rest of memory, and the pause.
    Final,
    /// The protection fails.
    Fail(String),
}

/// Why a synchronisation of the disks cannot begin.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskBaseError {
    /// The system has no descriptor left.
    #[error(transparent)]
    File(io::Error),
    /// Nobody would read the disks.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
}

/// The disks in one base synchronisation.
pub(super) struct DiskBase {
    sync: DiskSync,
    log: Arc<WriteLog>,
    phase: Phase,
    catch_ups: u32,
    events: EventWriter,
}

impl DiskBase {
    /// Begins, if there is a disk to synchronise.
    ///
    /// # Errors
    /// See [`DiskBaseError`].
    pub(super) fn start(
        machine: &Machine,
        driver: &Arc<SharedDriver>,
        link: Link,
        books: &Books,
        events: &EventWriter,
    ) -> Result<Option<Self>, DiskBaseError> {
        let log = machine.write_log().clone();
        let mut disks = Vec::new();
        for disk in machine.disks().iter().filter(|disk| !disk.is_shared()) {
            let image = disk.image();
            let file = image.file().try_clone().map_err(DiskBaseError::File)?;
            let (index, bytes, written) = (disk.index(), disk.capacity_bytes(), !disk.is_readonly());
            let book = if written { books.opened(image.path(), &file, bytes) } else { Book::none() };
            disks.push(SourceDisk { index, file, bytes, written, book });
        }
        if disks.is_empty() {
            return Ok(None);
        }
        // A write that completes from here on is marked; a write that completed before is in the image that
        // is read now, and its chunk is forgotten.
        log.set_mode(LogMode::Track);
        disks.iter().for_each(|disk| forget_touched(&log, disk.index, &disk.book));
        let (sending, telling) = (driver.clone(), driver.clone());
        let sync = DiskSync::start(
            disks,
            Marks(log.clone()),
            move |section| sending.send(link, Job::Disk(section)),
            move |report| telling.tell(Inbox::DiskSync(link, report)),
        )
        .map_err(DiskBaseError::NoThread)?;
        Ok(Some(Self { sync, log, phase: Phase::Syncing, catch_ups: 0, events: events.clone() }))
    }

    /// Whether memory must wait for the disks.
    pub(super) fn comes_first(&self) -> bool {
        self.phase == Phase::Syncing
    }

    /// Takes the standby's answer to sums.
    pub(super) fn want(&self, want: DiskWant) {
        self.sync.want(want);
    }

    /// Little memory is left to send. Returns whether the disks are ready for the pause; if not, a report
    /// follows once they are.
    pub(super) fn is_ready(&mut self) -> bool {
        if self.phase == Phase::Synced {
            self.phase = Phase::CatchingUp;
            self.catch_ups = 1;
            self.sync.catch_up(false);
        }
        self.phase == Phase::Done
    }

    /// Whether the log has begun, and the standby has everything that is not in it.
    pub(super) fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Takes a report.
    pub(super) fn report(&mut self, report: SyncReport) -> Next {
        match report {
            SyncReport::Progress { disk, done_bytes, total_bytes, sent_bytes, read_bytes } => {
                self.events.emit(Event::DiskSync { disk, done_bytes, total_bytes, sent_bytes, read_bytes });
                Next::Wait
            }
            SyncReport::Synced => {
                self.phase = Phase::Synced;
                Next::Memory
            }
            SyncReport::CaughtUp { last: true, .. } => {
                self.phase = Phase::Done;
                Next::Final
            }
            SyncReport::CaughtUp { last: false, chunks } => {
                if chunks <= FEW || self.catch_ups >= CATCH_UPS {
                    self.begin_log();
                } else {
                    self.catch_ups += 1;
                    self.sync.catch_up(false);
                }
                Next::Wait
            }
            SyncReport::Failed(why) => Next::Fail(why),
        }
    }

    /// From here on writes are logged and go with the final checkpoint. A write is either marked, and in a
    /// chunk that is read after this, or in the log, which the standby applies after the chunks; a write that
    /// straddles this moment is half of each. When the log is full, writes wait for the checkpoint, which
    /// slows down a guest that writes faster than the link carries.
    fn begin_log(&mut self) {
        self.phase = Phase::Last;
        // This drops what an earlier protection left in the log.
        self.log.swap(&mut RecordBuf::with_capacity(DISK_BYTES));
        self.log.set_mode(LogMode::Log);
        self.sync.catch_up(true);
    }
}
