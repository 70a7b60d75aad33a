//! Collects one whole checkpoint before anybody may look at it.

mod error;

pub use error::IncomingError;

use crate::codec::{PageEntry, with_data};
use crate::image::{Layout, PAGE_SIZE, PageData, RecordBuf, StateBuf, StateSection, UncheckedRecords};
use crate::wire::{
    Audit, AuditRange, AuditSpan, ChangeError, CheckpointBegin, CheckpointEnd, CheckpointFlags, ChunkRange,
    DiskAudit, Message, Pages, Section, SectionKind, StateChanges,
};

/// Bytes of each kind that a buffer keeps when it is reset. An ordinary checkpoint then needs no allocation,
/// and the memory of an extraordinary one, as large as all RAM, is not kept several times.
const KEPT_BYTES: usize = 32 << 20;

/// Limits of a buffer, chosen when protection starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IncomingLimits {
    /// Most pages of one checkpoint.
    pub max_pages: u32,
    /// Most bytes of all state sections together.
    pub max_state_bytes: u32,
    /// Most state sections.
    pub max_state_sections: u32,
    /// Most bytes of all disk records together.
    pub max_disk_bytes: u32,
}

/// Which checkpoint is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The first one of a connection: any number, with the flag base_final.
    Base,
    /// This number, without the flag.
    Number(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waits for the beginning.
    Idle,
    /// Collects.
    Open,
    /// Whole and checked.
    Complete,
    /// Refused; only a reset helps.
    Broken,
}

/// Collects the sections of one checkpoint and gives access to it only when it is whole and every check has
/// passed.
///
/// A buffer grows to the size that the beginning of a checkpoint announces, within the limits. A
/// [`reset`](Self::reset) gives unusually large memory back. A standby uses several buffers: it receives
/// further checkpoints while it applies one.
pub struct Incoming {
    limits: IncomingLimits,
    layout: Layout,
    generation: u64,
    expect: Expect,
    phase: Phase,
    begin: CheckpointBegin,
    stamp_us: u64,
    chain: crc32fast::Hasher,
    entries: Vec<PageEntry>,
    data: Vec<u8>,
    state: StateBuf,
    /// The state of the previous checkpoint, where it is known.
    before: StateBuf,
    /// Disk writes. Its capacity is what the checkpoint announced, because the memory may be handed over with
    /// the writes.
    writes: RecordBuf,
    /// Sums of pages to compare.
    audit: Vec<AuditSpan>,
    /// Sums of chunks of disks to compare.
    disk_audit: Vec<AuditRange>,
    /// Bytes of each disk; 0 for one that is not replicated.
    disks: Vec<u64>,
    /// One bit per page of the layout: whether the page is already in this checkpoint. Cleared by walking
    /// `entries`.
    seen: Vec<u64>,
}

impl Incoming {
    /// An empty buffer. The first checkpoint due is [`Expect::Base`].
    ///
    /// # Errors
    /// [`IncomingError::Memory`].
    pub fn new(limits: IncomingLimits, layout: Layout, generation: u64) -> Result<Self, IncomingError> {
        let seen_len = layout.pages().div_ceil(64) as usize;
        Ok(Self {
            limits,
            generation,
            expect: Expect::Base,
            phase: Phase::Idle,
            begin: CheckpointBegin {
                generation,
                number: 0,
                pages: 0,
                state_bytes: 0,
                disk_bytes: 0,
                flags: CheckpointFlags::default(),
            },
            stamp_us: 0,
            chain: crc32fast::Hasher::new(),
            entries: Vec::new(),
            data: Vec::new(),
            state: reserve_state(&limits)?,
            before: StateBuf::default(),
            writes: RecordBuf::default(),
            audit: Vec::new(),
            disk_audit: Vec::new(),
            disks: Vec::new(),
            seen: zeroed(seen_len)?,
            layout,
        })
    }

    /// Sets the sizes of the VM's disks, in order; 0 for one that is not replicated. Without this every disk
    /// write is refused.
    pub fn with_disks(mut self, sizes: Vec<u64>) -> Self {
        self.disks = sizes;
        self
    }

    /// Forgets everything collected, whole or not, and says which checkpoint is due.
    pub fn reset(&mut self, expect: Expect) {
        self.clear();
        self.expect = expect;
    }

    /// Forgets everything collected, whole or not. [`reset`](Self::reset) of a cleared buffer takes no time.
    pub fn clear(&mut self) {
        for entry in &self.entries {
            if let Some(index) = self.layout.index(entry.gfn()) {
                self.seen[(index / 64) as usize] = 0;
            }
        }
        empty(&mut self.entries);
        empty(&mut self.data);
        self.state.clear();
        self.before.clear();
        self.writes.clear();
        self.audit.clear();
        self.disk_audit.clear();
        self.phase = Phase::Idle;
    }

    /// Sets the state of the previous checkpoint, so that this one may carry changes only. Call it after the
    /// reset, which forgets it.
    ///
    /// # Errors
    /// [`IncomingError::Memory`].
    pub fn follow(&mut self, before: &StateBuf) -> Result<(), IncomingError> {
        let bytes = before.len() as u64;
        self.before.try_copy_from(before).map_err(|_| IncomingError::Memory { bytes })
    }

    /// Takes one section of the checkpoint; `message` is its parsed payload. Returns whether the checkpoint
    /// is whole. `CheckpointBegin`, `Pages`, `State`, `StateChanges`, `DiskWrites`, `Audit`, `DiskAudit` and
    /// `CheckpointEnd` belong here; anything else is refused.
    ///
    /// # Errors
    /// See [`IncomingError`]. The checkpoint is then lost; the committed one before it is not touched.
    pub fn push(&mut self, section: &Section<'_>, message: &Message<'_>) -> Result<bool, IncomingError> {
        let result = self.take(section, message);
        if result.is_err() {
            self.phase = Phase::Broken;
        }
        result
    }

    /// Exchanges the disk writes of a whole checkpoint for an empty buffer, whose memory the next checkpoint
    /// uses: no copy is needed to apply them. Nothing happens if the checkpoint is not whole.
    pub fn swap_disk_writes(&mut self, buffer: &mut RecordBuf) {
        buffer.clear();
        if self.phase == Phase::Complete {
            std::mem::swap(&mut self.writes, buffer);
        }
    }

    /// Exchanges the state sections of a whole checkpoint for an empty table, whose memory the next
    /// checkpoint uses. Nothing happens if the checkpoint is not whole.
    pub fn swap_state(&mut self, table: &mut StateBuf) {
        table.clear();
        if self.phase == Phase::Complete {
            std::mem::swap(&mut self.state, table);
        }
    }

    /// Whether no checkpoint has begun since the last reset.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// The checkpoint, if it is whole.
    pub fn checkpoint(&self) -> Option<Checkpoint<'_>> {
        (self.phase == Phase::Complete).then_some(Checkpoint { incoming: self })
    }

    fn take(&mut self, section: &Section<'_>, message: &Message<'_>) -> Result<bool, IncomingError> {
        let place = match (self.phase, message) {
            (Phase::Idle, Message::CheckpointBegin(_))
            | (
                Phase::Open,
                Message::Pages(_)
                | Message::State { .. }
                | Message::StateChanges(_)
                | Message::DiskWrites { .. }
                | Message::Audit(_)
                | Message::DiskAudit(_)
                | Message::CheckpointEnd(_),
            ) => None,
            (Phase::Idle, _) => Some("outside a checkpoint"),
            (Phase::Open, _) => Some("inside a checkpoint"),
            (Phase::Complete, _) => Some("before the last checkpoint was taken out of its buffer"),
            (Phase::Broken, _) => Some("after a refused checkpoint"),
        };
        if let Some(place) = place {
            return Err(IncomingError::Order { kind: section.kind(), place });
        }
        match message {
            Message::CheckpointBegin(begin) => self.begin(begin)?,
            Message::Pages(pages) => self.pages(pages)?,
            Message::State { checkpoint, state } => self.state(*checkpoint, state)?,
            Message::StateChanges(changes) => self.state_changes(changes)?,
            Message::DiskWrites { checkpoint, writes } => self.disk_writes(*checkpoint, *writes)?,
            Message::Audit(audit) => self.audit(audit)?,
            Message::DiskAudit(audit) => self.disk_audit(audit)?,
            Message::CheckpointEnd(end) => {
                self.end(end)?;
                return Ok(true);
            }
            _ => return Err(IncomingError::Order { kind: section.kind(), place: "inside a checkpoint" }),
        }
        self.chain.update(&section.header().chained());
        Ok(false)
    }

    fn begin(&mut self, begin: &CheckpointBegin) -> Result<(), IncomingError> {
        let CheckpointBegin { generation, number, pages, state_bytes, disk_bytes, flags } = *begin;
        if generation != self.generation {
            return Err(IncomingError::Generation { expected: self.generation, found: generation });
        }
        let base_final = match self.expect {
            Expect::Base => true,
            Expect::Number(expected) if expected != number => {
                return Err(IncomingError::Number { expected, found: number });
            }
            Expect::Number(_) => false,
        };
        if flags.base_final != base_final {
            return Err(IncomingError::BaseFinal { number, found: flags.base_final });
        }
        if pages > self.limits.max_pages {
            let limit = self.limits.max_pages;
            return Err(IncomingError::TooManyPages { number, found: pages.into(), limit });
        }
        if state_bytes > self.limits.max_state_bytes {
            let limit = self.limits.max_state_bytes;
            return Err(IncomingError::TooMuchState { number, found: state_bytes.into(), limit });
        }
        if disk_bytes > self.limits.max_disk_bytes {
            let limit = self.limits.max_disk_bytes;
            return Err(IncomingError::TooManyDiskWrites { number, found: disk_bytes.into(), limit });
        }
        reserve(&mut self.entries, pages as usize)?;
        reserve(&mut self.data, pages as usize * PAGE_SIZE)?;
        self.writes
            .empty_for(disk_bytes as usize)
            .map_err(|_| IncomingError::Memory { bytes: disk_bytes.into() })?;
        self.begin = *begin;
        self.chain = crc32fast::Hasher::new();
        self.phase = Phase::Open;
        Ok(())
    }

    fn pages(&mut self, pages: &Pages<'_>) -> Result<(), IncomingError> {
        let CheckpointBegin { number, pages: announced, .. } = self.begin;
        if pages.tag != number {
            return Err(IncomingError::Number { expected: number, found: pages.tag });
        }
        let found = self.entries.len() + pages.len();
        if found > announced as usize {
            let found = found as u32;
            return Err(IncomingError::Totals { number, what: "pages", expected: announced, found });
        }
        for entry in pages.entries() {
            let gfn = entry.gfn();
            let index = self.layout.index(gfn).ok_or(IncomingError::OutsideLayout { gfn })?;
            let (word, bit) = ((index / 64) as usize, 1 << (index % 64));
            if self.seen[word] & bit != 0 {
                return Err(IncomingError::DuplicatePage { gfn, number });
            }
            self.seen[word] |= bit;
            self.entries.push(entry);
        }
        self.data.extend_from_slice(pages.data());
        Ok(())
    }

    fn state(&mut self, checkpoint: u64, state: &StateSection<'_>) -> Result<(), IncomingError> {
        let CheckpointBegin { number, state_bytes: announced, .. } = self.begin;
        if checkpoint != number {
            return Err(IncomingError::Number { expected: number, found: checkpoint });
        }
        let StateSection { kind, index, bytes, .. } = *state;
        let found = self.state.len() + bytes.len();
        if found > announced as usize {
            let found = found as u32;
            return Err(IncomingError::Totals { number, what: "bytes of state", expected: announced, found });
        }
        if self.state.sections().len() >= self.limits.max_state_sections as usize {
            return Err(IncomingError::TooManySections { number, limit: self.limits.max_state_sections });
        }
        if self.state.find(kind, index).is_some() {
            return Err(IncomingError::DuplicateState { kind, index, number });
        }
        self.state.push(*state);
        Ok(())
    }

    fn state_changes(&mut self, changes: &StateChanges<'_>) -> Result<(), IncomingError> {
        let CheckpointBegin { number, state_bytes: announced, .. } = self.begin;
        if changes.checkpoint != number {
            return Err(IncomingError::Number { expected: number, found: changes.checkpoint });
        }
        let place = match (self.before.is_empty(), self.state.is_empty()) {
            (true, _) => Some("without a checkpoint before it"),
            (_, false) => Some("behind other state"),
            (false, true) => None,
        };
        if let Some(place) = place {
            return Err(IncomingError::Order { kind: SectionKind::StateChanges, place });
        }
        changes.apply(&self.before, &mut self.state).map_err(|error| {
            let (kind, index, what) = match error {
                ChangeError::NoSection(kind, index) => (kind, index, "there is none, or not in this place"),
                ChangeError::Outside(kind, index) => (kind, index, "they are not within it"),
            };
            IncomingError::Changes { number, kind, index, what }
        })?;
        let found = self.state.len();
        if found > announced as usize {
            let found = found as u32;
            return Err(IncomingError::Totals { number, what: "bytes of state", expected: announced, found });
        }
        Ok(())
    }

    fn disk_writes(&mut self, checkpoint: u64, writes: UncheckedRecords<'_>) -> Result<(), IncomingError> {
        let CheckpointBegin { number, disk_bytes: expected, .. } = self.begin;
        if checkpoint != number {
            return Err(IncomingError::Number { expected: number, found: checkpoint });
        }
        let found = self.writes.len() + writes.len();
        if found > expected as usize {
            let found = found as u32;
            return Err(IncomingError::Totals { number, what: "bytes of disk writes", expected, found });
        }
        let appended = self.writes.check_and_append(writes, &self.disks);
        appended.map_err(|source| IncomingError::Records { number, source })
    }

    fn audit(&mut self, audit: &Audit<'_>) -> Result<(), IncomingError> {
        let number = self.begin.number;
        if audit.checkpoint != number {
            return Err(IncomingError::Number { expected: number, found: audit.checkpoint });
        }
        if !self.audit.is_empty() {
            return Err(IncomingError::Order { kind: SectionKind::Audit, place: "twice in a checkpoint" });
        }
        for span in audit.spans() {
            let outside = span.gfns().find(|gfn| self.layout.index(*gfn).is_none());
            if let Some(gfn) = outside {
                return Err(IncomingError::OutsideLayout { gfn });
            }
            self.audit.push(span);
        }
        Ok(())
    }

    fn disk_audit(&mut self, audit: &DiskAudit<'_>) -> Result<(), IncomingError> {
        let number = self.begin.number;
        if audit.checkpoint != number {
            return Err(IncomingError::Number { expected: number, found: audit.checkpoint });
        }
        if !self.disk_audit.is_empty() {
            return Err(IncomingError::Order {
                kind: SectionKind::DiskAudit,
                place: "twice in a checkpoint",
            });
        }
        for range in audit.ranges() {
            let ChunkRange { disk, first, .. } = range.chunks;
            let bytes = self.disks.get(usize::from(disk)).copied().unwrap_or(0);
            if !range.chunks.fits(bytes) {
                return Err(IncomingError::OutsideDisk { disk, chunk: first });
            }
            self.disk_audit.push(range);
        }
        Ok(())
    }

    fn end(&mut self, end: &CheckpointEnd) -> Result<(), IncomingError> {
        let CheckpointBegin { number, pages, state_bytes, disk_bytes, .. } = self.begin;
        if end.number != number {
            return Err(IncomingError::Number { expected: number, found: end.number });
        }
        // At most what the beginning announced (see `pages`); fewer if some pages have not changed.
        let sent = self.entries.len() as u32;
        for (what, expected, found) in [
            ("pages", end.pages, sent),
            ("pages", pages.max(end.pages), pages),
            ("bytes of state", state_bytes, self.state.len() as u32),
            ("bytes of state", state_bytes, end.state_bytes),
            ("bytes of disk writes", disk_bytes, self.writes.len() as u32),
            ("bytes of disk writes", disk_bytes, end.disk_bytes),
        ] {
            if expected != found {
                return Err(IncomingError::Totals { number, what, expected, found });
            }
        }
        let computed = self.chain.clone().finalize();
        if computed != end.chain {
            return Err(IncomingError::Chain { number, stored: end.chain, computed });
        }
        self.stamp_us = end.stamp_us;
        self.phase = Phase::Complete;
        Ok(())
    }
}

/// A whole checkpoint, checked. Only this can be acknowledged and applied.
#[derive(Clone, Copy)]
pub struct Checkpoint<'a> {
    incoming: &'a Incoming,
}

impl<'a> Checkpoint<'a> {
    /// Its number.
    pub fn number(&self) -> u64 {
        self.incoming.begin.number
    }

    /// The generation in which the VM runs.
    pub fn generation(&self) -> u64 {
        self.incoming.begin.generation
    }

    /// What is special about this checkpoint.
    pub fn flags(&self) -> CheckpointFlags {
        self.incoming.begin.flags
    }

    /// The primary's clock when its end was written, in microseconds.
    pub fn stamp_us(&self) -> u64 {
        self.incoming.stamp_us
    }

    /// Every page, in the order received. No GFN appears twice, and all are RAM of the layout.
    pub fn pages(&self) -> impl Iterator<Item = (u64, PageData<'a>)> + 'a {
        with_data(self.incoming.entries.iter().copied(), &self.incoming.data)
    }

    /// The pages as they came: their entries, and the data of all entries in their order.
    pub fn raw_pages(&self) -> (&'a [PageEntry], &'a [u8]) {
        (&self.incoming.entries, &self.incoming.data)
    }

    /// The state sections, in the order received. None appears twice.
    pub fn state(&self) -> &'a StateBuf {
        &self.incoming.state
    }

    /// Sums of pages as they are at this checkpoint, to be compared with the copy. All pages are RAM of the layout.
    pub fn audit(&self) -> &'a [AuditSpan] {
        &self.incoming.audit
    }

    /// Sums of chunks of disks as they are at this checkpoint, to be compared with the images. Each lies within its
    /// disk.
    pub fn disk_audit(&self) -> &'a [AuditRange] {
        &self.incoming.disk_audit
    }

    /// The disk writes in the order in which the guest's requests completed. Each lies within its disk.
    pub fn disk_writes(&self) -> &'a RecordBuf {
        &self.incoming.writes
    }
}

fn reserve_state(limits: &IncomingLimits) -> Result<StateBuf, IncomingError> {
    let (bytes, sections) = (limits.max_state_bytes, limits.max_state_sections as usize);
    StateBuf::try_with_capacity(bytes as usize, sections)
        .map_err(|_| IncomingError::Memory { bytes: bytes.into() })
}

/// Makes room in an empty vector.
fn reserve<T>(vec: &mut Vec<T>, count: usize) -> Result<(), IncomingError> {
    let bytes = (count as u64).saturating_mul(size_of::<T>() as u64);
    vec.try_reserve(count).map_err(|_| IncomingError::Memory { bytes })
}

fn zeroed(count: usize) -> Result<Vec<u64>, IncomingError> {
    let mut vec = Vec::new();
    reserve(&mut vec, count)?;
    vec.resize(count, 0);
    Ok(vec)
}

/// Empties a vector and frees its memory if it is unusually large.
fn empty<T>(vec: &mut Vec<T>) {
    vec.clear();
    vec.shrink_to(KEPT_BYTES / size_of::<T>());
}
