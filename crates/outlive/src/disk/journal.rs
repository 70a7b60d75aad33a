//! The journal beside a standby's images: the writes of committed checkpoints, each as one unit.
//!
//! | bytes | content |
//! |---|---|
//! | 0..4096, 4096..8192 | two copies of the header; the one with the higher *lap* counts |
//! | 8192.. | epochs, one behind the other |
//!
//! A header has the identity of the VM, the sizes of its disks, the lap, and the checkpoint up to which the
//! images are durable. Emptying the journal writes a header with the next lap over the older of the two
//! copies: what follows it has an earlier lap and no longer counts. An epoch counts if its header and
//! its payload are whole, its lap is the header's and its number is higher than that of the epoch in front of
//! it. The first that does not count ends the journal.

use std::io;

use outlive_epoch::{DiskRecords, RecordError, UncheckedRecords, VmId};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::image::Store;

const MAGIC: [u8; 8] = *b"OUTLVJNL";
/// The format that is written, and the only one so far. A new format must keep the reader of this one: a
/// journal may hold committed writes that are nowhere else.
///
/// - 1: as described above, with the disk records of `outlive_epoch`.
const VERSION: u32 = 1;
const SLOT: usize = size_of::<RawHeader>();
pub(in crate::disk) const START: u64 = 2 * SLOT as u64;
const EPOCH_MARK: [u8; 4] = *b"oEPO";
const EPOCH_HEAD: usize = size_of::<RawEpoch>();
/// How many disks a journal may have.
const MAX_DISKS: usize = 32;
/// How many bytes one epoch may have. A larger number in a header is damage.
const MAX_EPOCH: u64 = 1 << 30;

/// A header as it is in its slot. Magic, version and checksum have the same place in every format.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    disks: U32,
    vm: [u8; 16],
    generation: U64,
    lap: U64,
    checkpoint: U64,
    sizes: [U64; MAX_DISKS],
    zero: [u8; 3780],
    crc: U32,
}

/// The header in front of an epoch's records.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEpoch {
    mark: [u8; 4],
    payload_crc: U32,
    lap: U64,
    number: U64,
    length: U64,
    zero: U32,
    crc: U32,
}

/// The checksum over everything in front of the checksum, which is the last field.
fn checksum(raw: &(impl IntoBytes + Immutable)) -> U32 {
    let bytes = raw.as_bytes();
    crc32fast::hash(&bytes[..bytes.len() - size_of::<U32>()]).into()
}

/// Whose writes a journal has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The VM.
    pub(crate) vm: VmId,
    /// Its generation.
    pub(crate) generation: u64,
    /// Bytes of its disks, in their order; 0 for one that is not replicated.
    pub(crate) sizes: Vec<u64>,
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// The file system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No header is whole.
    #[error("it has no whole header")]
    NoHeader,
    /// Another release wrote it.
    #[error(
        "it has format {found}, this release knows {VERSION}: start the VM with the release that wrote it, \
         or delete the journal and give up what is only in it"
    )]
    Version {
        /// The format.
        found: u32,
    },
    /// An epoch is whole but invalid: the program that wrote it had an error.
    #[error("its checkpoint {number} is invalid: {source}")]
    Nonsense {
        /// The checkpoint.
        number: u64,
        /// What is wrong.
        source: RecordError,
    },
}

/// See the module.
pub(crate) struct Journal<S> {
    store: S,
    identity: Identity,
    lap: u64,
    end: u64,
}

impl<S: Store> Journal<S> {
    /// Begins an empty journal, durable at once. The images are durable up to `checkpoint`. What was in the
    /// file before no longer counts, but a journal of another format is not overwritten.
    pub(crate) fn create(store: S, identity: Identity, checkpoint: u64) -> io::Result<Self> {
        let before = read_headers(&store).map_err(|error| match error {
            JournalError::Io(error) => error,
            other => io::Error::other(other),
        })?;
        let mut journal = Self { store, identity, lap: before.map_or(0, |header| header.lap), end: START };
        journal.reset(checkpoint)?;
        Ok(journal)
    }

    /// Opens a journal for replay. Returns the checkpoint up to which the images are durable without it.
    pub(crate) fn open(store: S) -> Result<(Self, u64), JournalError> {
        let Header { identity, lap, checkpoint } = read_headers(&store)?.ok_or(JournalError::NoHeader)?;
        Ok((Self { store, identity, lap, end: START }, checkpoint))
    }

    /// Where it is.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn into_store(self) -> S {
        self.store
    }

    /// Which VM's journal it is.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Bytes used.
    pub(crate) fn len(&self) -> u64 {
        self.end
    }

    /// Whether no epoch is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.end == START
    }

    /// Appends the writes of a checkpoint. They count after the next [`sync`](Self::sync).
    pub(crate) fn append(&mut self, number: u64, records: &[u8]) -> io::Result<()> {
        let mut head = RawEpoch {
            mark: EPOCH_MARK,
            payload_crc: crc32fast::hash(records).into(),
            lap: self.lap.into(),
            number: number.into(),
            length: (records.len() as u64).into(),
            zero: U32::ZERO,
            crc: U32::ZERO,
        };
        head.crc = checksum(&head);
        self.store.write(head.as_bytes(), self.end)?;
        self.store.write(records, self.end + EPOCH_HEAD as u64)?;
        self.end += (EPOCH_HEAD + records.len()) as u64;
        Ok(())
    }

    /// Makes everything appended durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.store.sync()
    }

    /// Empties the journal: the images are durable up to `checkpoint`.
    pub(crate) fn reset(&mut self, checkpoint: u64) -> io::Result<()> {
        let lap = self.lap + 1;
        let header = Header { identity: self.identity.clone(), lap, checkpoint };
        self.store.write(header.encode().as_bytes(), (lap % 2) * SLOT as u64)?;
        self.store.sync()?;
        self.lap = lap;
        self.end = START;
        Ok(())
    }

    /// Calls `each` for every whole checkpoint in order, and returns the number of the last. To be called
    /// once, after [`open`](Self::open).
    pub(crate) fn replay(
        &mut self,
        mut each: impl FnMut(DiskRecords<'_>) -> io::Result<()>,
    ) -> Result<Option<u64>, JournalError> {
        let bytes = self.store.bytes()?;
        let (mut last, mut payload) = (None, Vec::new());
        while let Some(epoch) = self.epoch(bytes, last, &mut payload)? {
            let nonsense = |source| JournalError::Nonsense { number: epoch.number, source };
            let records = UncheckedRecords::new(&payload).check(&self.identity.sizes);
            each(records.map_err(nonsense)?)?;
            last = Some(epoch.number);
            self.end += EPOCH_HEAD as u64 + epoch.length;
        }
        Ok(last)
    }

    /// The epoch at the end of what was read so far, with its payload, if it is whole.
    fn epoch(&self, bytes: u64, last: Option<u64>, payload: &mut Vec<u8>) -> io::Result<Option<EpochHead>> {
        if self.end + EPOCH_HEAD as u64 > bytes {
            return Ok(None);
        }
        let mut head = RawEpoch::new_zeroed();
        self.store.read(head.as_mut_bytes(), self.end)?;
        let Some(epoch) = EpochHead::parse(&head, self.lap) else { return Ok(None) };
        let payload_at = self.end + EPOCH_HEAD as u64;
        let fits = epoch.length <= MAX_EPOCH && payload_at + epoch.length <= bytes;
        if !fits || last.is_some_and(|last| epoch.number <= last) {
            return Ok(None);
        }
        payload.resize(epoch.length as usize, 0);
        self.store.read(payload, payload_at)?;
        Ok((crc32fast::hash(payload) == epoch.crc).then_some(epoch))
    }
}

struct EpochHead {
    crc: u32,
    number: u64,
    length: u64,
}

impl EpochHead {
    fn parse(head: &RawEpoch, lap: u64) -> Option<Self> {
        let whole = head.mark == EPOCH_MARK && head.crc == checksum(head);
        let epoch =
            Self { crc: head.payload_crc.get(), number: head.number.get(), length: head.length.get() };
        (whole && head.lap == lap).then_some(epoch)
    }
}

struct Header {
    identity: Identity,
    lap: u64,
    checkpoint: u64,
}

impl Header {
    fn encode(&self) -> RawHeader {
        let Self { identity: Identity { vm, generation, sizes }, lap, checkpoint } = self;
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = VERSION.into();
        raw.disks = (sizes.len() as u32).into();
        raw.vm = vm.0;
        raw.generation = (*generation).into();
        raw.lap = (*lap).into();
        raw.checkpoint = (*checkpoint).into();
        raw.sizes.iter_mut().zip(sizes).for_each(|(to, size)| *to = (*size).into());
        raw.crc = checksum(&raw);
        raw
    }

    /// `None` if there is no whole header.
    fn parse(raw: &RawHeader) -> Result<Option<Self>, JournalError> {
        if raw.magic != MAGIC || raw.crc != checksum(raw) {
            return Ok(None);
        }
        if raw.version != VERSION {
            return Err(JournalError::Version { found: raw.version.get() });
        }
        let Some(sizes) = raw.sizes.get(..raw.disks.get() as usize) else { return Ok(None) };
        let sizes = sizes.iter().map(|size| size.get()).collect();
        let identity = Identity { vm: VmId(raw.vm), generation: raw.generation.get(), sizes };
        Ok(Some(Self { identity, lap: raw.lap.get(), checkpoint: raw.checkpoint.get() }))
    }
}

/// The header that counts.
fn read_headers(store: &impl Store) -> Result<Option<Header>, JournalError> {
    let bytes = store.bytes()?;
    let mut newest: Option<Header> = None;
    for slot in 0..2 {
        let at = slot * SLOT as u64;
        if at + SLOT as u64 > bytes {
            break;
        }
        let mut copy = RawHeader::new_zeroed();
        store.read(copy.as_mut_bytes(), at)?;
        if let Some(header) = Header::parse(&copy)?
            && newest.as_ref().is_none_or(|newest| newest.lap < header.lap)
        {
            newest = Some(header);
        }
    }
    Ok(newest)
}
