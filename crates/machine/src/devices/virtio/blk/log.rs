//! What the guest did to its disks since the last checkpoint: one log for all disks of a machine.
//!
//! | mode | a completed write | for |
//! |---|---|---|
//! | [`Off`](LogMode::Off) | leaves no trace | a VM that is not protected |
//! | [`Track`](LogMode::Track) | marks the chunks it touched | synchronising a standby in the background |
//! | [`Log`](LogMode::Log) | is appended, with its data | shipping it with the checkpoint of its epoch |
//!
//! **A write is in the log before the guest can know that it is complete.** The device thread appends it and
//! then fills in the used ring, inside the gate; so the log that a checkpoint takes holds every write that
//! the guest of this checkpoint knows to be complete. It may hold more: a write whose request is still in
//! flight in the checkpoint, or the first part of one. That is harmless, because a resumed VM issues the
//! request again. Writes that overlap are in the log in the order in which they reached the disk.
//!
//! **Touched.** Whatever the mode, a write that has reached its disk also *touches* its chunks, for whoever
//! remembers what an image contains: at the latest when the request is complete, and also if it failed or finds
//! no room in the log. A request that is still in flight may have changed the disk without touching anything;
//! [`BlockDevice::add_changing`](super::BlockDevice::add_changing) knows those.
//!
//! The log is bounded. When there is no room for a record the requests wait, their completion unpublished,
//! until [`swap`](WriteLog::swap) brings an empty buffer.
//!
//! # Taking a copy of a disk that is in use
//!
//! Switch to `Track`, copy all chunks; then, round by round, call [`swap_chunks`](WriteLog::swap_chunks) and
//! copy what was written meanwhile. When little is left, switch to `Log` in the pause of a checkpoint M, take
//! the chunks for the last time, and copy them while the guest runs on. A chunk read now may already hold
//! writes of later epochs. So the copy is whole only at the first checkpoint N that is taken *after* the last
//! chunk was read, once the logs of the epochs M+1 to N have been applied on top of the chunks. Beyond N such
//! a chunk can only hold writes in flight at N, which the checkpoint lists.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outlive_epoch::image::{DiskRecord, RecordBuf};
use vmm_sys_util::eventfd::EventFd;

use super::chunks::ChunkSet;

/// Most bytes of data in one record.
pub const MAX_RECORD: usize = 64 << 10;

/// What becomes of completed writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogMode {
    /// Nothing.
    #[default]
    Off,
    /// The chunks they touch are marked.
    Track,
    /// They are appended to the buffer.
    Log,
}

/// Counters of a log since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Records appended.
    pub records: u64,
    /// Their bytes, headers counted.
    pub bytes: u64,
    /// Most bytes a buffer held when it was swapped out.
    pub most_bytes: u64,
    /// How often the log was full; counted once for each buffer.
    pub full: u64,
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a record that found no room must be appended again"]
pub(super) enum Appended {
    /// It is in the log, or the mode needs no record.
    Done,
    /// No room: try again when the event given to [`WriteLog::attach`] is written.
    Full,
}

type OnFull = Box<dyn Fn() + Send + Sync>;

/// The log of changes to the disks of one machine.
pub struct WriteLog {
    inner: Mutex<Inner>,
    on_full: OnFull,
}

struct Inner {
    mode: LogMode,
    buffer: RecordBuf,
    /// The buffer was found full; the next swap has to wake whoever waits.
    full: bool,
    disks: Vec<Disk>,
    stats: LogStats,
}

struct Disk {
    index: u16,
    chunks: ChunkSet,
    touched: ChunkSet,
    room: EventFd,
}

impl WriteLog {
    /// A log in mode `Off`, without a buffer. When a write finds no room, a device's thread calls `on_full`
    /// inside the gate, once for each buffer: it must not block.
    pub fn new(on_full: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let inner = Inner {
            mode: LogMode::Off,
            buffer: RecordBuf::default(),
            full: false,
            disks: Vec::new(),
            stats: LogStats::default(),
        };
        Arc::new(Self { inner: Mutex::new(inner), on_full: Box::new(on_full) })
    }

    /// What becomes of completed writes.
    pub fn mode(&self) -> LogMode {
        self.inner().mode
    }

    /// From now on completed writes are treated this way. Call it in a pause (gate closed), so that every
    /// write as a whole is treated one way or the other. Marked chunks stay marked and logged records stay in
    /// the buffer.
    ///
    /// Before `Log`, [`swap`](Self::swap) a buffer in: the first buffer has no room at all.
    pub fn set_mode(&self, mode: LogMode) {
        let mut inner = self.inner();
        inner.mode = mode;
        // In other modes than `Log` nothing waits for room.
        inner.wake();
    }

    /// Exchanges the buffer of the log, with everything logged since the last time, for `buffer`, which must
    /// be empty. Call it in a pause (gate closed); its time does not depend on the contents.
    ///
    /// # Panics
    ///
    /// If `buffer` is not empty: writes would be shipped twice.
    pub fn swap(&self, buffer: &mut RecordBuf) {
        assert!(buffer.is_empty(), "the buffer for the next epoch is empty");
        let mut inner = self.inner();
        std::mem::swap(&mut inner.buffer, buffer);
        inner.stats.most_bytes = inner.stats.most_bytes.max(buffer.len() as u64);
        inner.wake();
    }

    /// Bytes in the buffer now, and its capacity.
    pub fn fill(&self) -> (usize, usize) {
        let inner = self.inner();
        (inner.buffer.len(), inner.buffer.capacity())
    }

    /// The empty set of chunks for a disk; `None` if the machine does not have the disk or does not replicate
    /// it.
    pub fn empty_chunks(&self, disk: u16) -> Option<ChunkSet> {
        let inner = self.inner();
        let disk = inner.disks.iter().find(|known| known.index == disk)?;
        // Sets differ only in their length.
        let bytes = disk.chunks.chunks() * super::chunks::CHUNK;
        drop(inner);
        Some(ChunkSet::for_disk(bytes))
    }

    /// Exchanges the set of chunks that were marked since the last time for `chunks`, at any time. Returns
    /// `false`, and does nothing, if there is no such disk or the set is for a disk of another size.
    ///
    /// A write is marked when it completes: a chunk that is read after this does not hold the write yet or
    /// will be marked again.
    pub fn swap_chunks(&self, disk: u16, chunks: &mut ChunkSet) -> bool {
        let mut inner = self.inner();
        match inner.disks.iter_mut().find(|known| known.index == disk) {
            Some(known) if known.chunks.chunks() == chunks.chunks() => {
                std::mem::swap(&mut known.chunks, chunks);
                true
            }
            _ => false,
        }
    }

    /// Exchanges the set of chunks that were touched since the last time for `chunks`, at any time. Returns
    /// `false`, and does nothing, if there is no such disk or the set is for a disk of another size.
    pub fn swap_touched(&self, disk: u16, chunks: &mut ChunkSet) -> bool {
        let mut inner = self.inner();
        match inner.disks.iter_mut().find(|known| known.index == disk) {
            Some(known) if known.touched.chunks() == chunks.chunks() => {
                std::mem::swap(&mut known.touched, chunks);
                true
            }
            _ => false,
        }
    }

    /// Whether every change to this part of the disk since the marks were last taken was appended: the mode is
    /// `Log`, and nothing there is marked, as what a failed write leaves is.
    pub(super) fn has_all(&self, disk: u16, offset: u64, len: u64) -> bool {
        let inner = self.inner();
        let mut marked = ChunkSet::chunks_of(offset, len);
        let known = inner.disks.iter().find(|known| known.index == disk);
        inner.mode == LogMode::Log
            && known.is_some_and(|known| !marked.any(|chunk| known.chunks.contains(chunk)))
    }

    /// The counters.
    pub fn stats(&self) -> LogStats {
        self.inner().stats
    }

    /// Registers a disk; `room` is written when a full log has room again.
    pub(super) fn attach(&self, index: u16, bytes: u64, room: &EventFd) -> io::Result<()> {
        let (chunks, touched) = (ChunkSet::for_disk(bytes), ChunkSet::for_disk(bytes));
        let disk = Disk { index, chunks, touched, room: room.try_clone()? };
        let mut inner = self.inner();
        inner.disks.retain(|known| known.index != index);
        inner.disks.push(disk);
        Ok(())
    }

    /// Notes a change of a disk. Called by the device thread, inside the gate, before the guest can know of
    /// the change. Data is at most [`MAX_RECORD`] bytes.
    pub(super) fn append(&self, write: DiskRecord<'_>) -> Appended {
        let mut inner = self.inner();
        // Before anything else: a write that finds no room has changed the disk all the same.
        inner.touch(write.disk, write.offset, write.len());
        match inner.mode {
            LogMode::Off => return Appended::Done,
            LogMode::Track => inner.mark(write.disk, write.offset, write.len()),
            LogMode::Log => {
                let before = inner.buffer.len();
                if !inner.buffer.push(write) {
                    let first = !std::mem::replace(&mut inner.full, true);
                    inner.stats.full += u64::from(first);
                    drop(inner);
                    if first {
                        (self.on_full)();
                    }
                    return Appended::Full;
                }
                inner.stats.records += 1;
                inner.stats.bytes += (inner.buffer.len() - before) as u64;
            }
        }
        Appended::Done
    }

    /// Notes that a write failed: the contents of the disk there are unknown. The chunks are touched, and marked
    /// in every mode but `Off`.
    pub(super) fn damaged(&self, disk: u16, offset: u64, len: u64) {
        let mut inner = self.inner();
        inner.touch(disk, offset, len);
        if inner.mode != LogMode::Off {
            inner.mark(disk, offset, len);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn mark(&mut self, disk: u16, offset: u64, len: u64) {
        if let Some(disk) = self.disks.iter_mut().find(|known| known.index == disk) {
            disk.chunks.insert_bytes(offset, len);
        }
    }

    fn touch(&mut self, disk: u16, offset: u64, len: u64) {
        if let Some(disk) = self.disks.iter_mut().find(|known| known.index == disk) {
            disk.touched.insert_bytes(offset, len);
        }
    }

    fn wake(&mut self) {
        if std::mem::take(&mut self.full) {
            for disk in &self.disks {
                // Fails only if the counter is full, and then it is readable anyway.
                let _ = disk.room.write(1);
            }
        }
    }
}

impl fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner();
        f.debug_struct("WriteLog")
            .field("mode", &inner.mode)
            .field("buffer", &inner.buffer)
            .field("stats", &inner.stats)
            .finish_non_exhaustive()
    }
}
