//! The journal beside a standby's images: the writes of committed checkpoints, each as one unit.
//!
//! | bytes | content |
//! |---|---|
//! | 0..4096, 4096..8192 | two copies of the header; the one with the higher *lap* counts |
//! | 8192.. | epochs, one behind the other |
//!
//! A header has the identity of the VM, the sizes of its disks, the lap, and the checkpoint up to which the
//! images are durable. Emptying the journal writes a header with the next lap over the older of the two
//! copies: what stands behind it has the lap of before and counts no more. An epoch counts if its header and
//! its payload are whole, its lap is the header's and its number is higher than that of the epoch in front of
//! it. The first that does not count ends the journal.

use std::io;

use outlive_epoch::{DiskRecords, VmId};

use super::image::Store;

const MAGIC: [u8; 8] = *b"OUTLVJNL";
const VERSION: u32 = 1;
const SLOT: usize = 4096;
const START: u64 = 2 * SLOT as u64;
const EPOCH_MARK: u32 = u32::from_le_bytes(*b"oEPO");
const EPOCH_HEAD: usize = 40;
/// Bytes of a header before the sizes of the disks.
const FIXED: usize = 56;
/// Most disks of a journal.
const MAX_DISKS: usize = 32;
/// Most bytes of one epoch. Anything larger in a header is damage.
const MAX_EPOCH: u64 = 1 << 30;

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
    /// The file system's.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No header is whole.
    #[error("it has no whole header")]
    NoHeader,
    /// An epoch that is whole and makes no sense: an error of the program that wrote it.
    #[error("checkpoint {number} in it makes no sense: {why}")]
    Nonsense {
        /// The checkpoint.
        number: u64,
        /// What is wrong.
        why: String,
    },
}

/// See the module.
pub(crate) struct Journal<S> {
    store: S,
    identity: Identity,
    lap: u64,
    end: u64,
    head: Vec<u8>,
}

impl<S: Store> Journal<S> {
    /// Begins an empty journal, durable at once. The images are durable up to `checkpoint`. Whatever was in
    /// the file before counts no more.
    pub(crate) fn create(store: S, identity: Identity, checkpoint: u64) -> io::Result<Self> {
        let lap = read_headers(&store)?.map_or(0, |header| header.lap);
        let mut journal = Self { store, identity, lap, end: START, head: Vec::with_capacity(EPOCH_HEAD) };
        journal.reset(checkpoint)?;
        Ok(journal)
    }

    /// Opens a journal for replay. Returns the checkpoint up to which the images are durable without it.
    pub(crate) fn open(store: S) -> Result<(Self, u64), JournalError> {
        let Header { identity, lap, checkpoint } = read_headers(&store)?.ok_or(JournalError::NoHeader)?;
        Ok((Self { store, identity, lap, end: START, head: Vec::with_capacity(EPOCH_HEAD) }, checkpoint))
    }

    /// Whose it is.
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
        self.head.clear();
        self.head.extend_from_slice(&EPOCH_MARK.to_le_bytes());
        self.head.extend_from_slice(&crc32fast::hash(records).to_le_bytes());
        for word in [self.lap, number, records.len() as u64] {
            self.head.extend_from_slice(&word.to_le_bytes());
        }
        self.head.extend_from_slice(&[0; 4]);
        let crc = crc32fast::hash(&self.head);
        self.head.extend_from_slice(&crc.to_le_bytes());
        self.store.write(&self.head, self.end)?;
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
        self.store.write(&header.encode(), (lap % 2) * SLOT as u64)?;
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
            let nonsense = |why| JournalError::Nonsense { number: epoch.number, why };
            let records = DiskRecords::parse(&payload).map_err(|e| nonsense(e.to_string()))?;
            for record in records.iter() {
                let size = self.identity.sizes.get(usize::from(record.disk)).copied().unwrap_or(0);
                if record.end() > size || size == 0 {
                    return Err(nonsense(format!("a write outside disk {}", record.disk)));
                }
            }
            each(records)?;
            last = Some(epoch.number);
            self.end += EPOCH_HEAD as u64 + epoch.length;
        }
        Ok(last)
    }

    /// The epoch at the end of what was read so far, with its payload, if there is a whole one.
    fn epoch(&self, bytes: u64, last: Option<u64>, payload: &mut Vec<u8>) -> io::Result<Option<EpochHead>> {
        if self.end + EPOCH_HEAD as u64 > bytes {
            return Ok(None);
        }
        let mut head = [0; EPOCH_HEAD];
        self.store.read(&mut head, self.end)?;
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
    fn parse(head: &[u8; EPOCH_HEAD], lap: u64) -> Option<Self> {
        let whole = word(head, 0) == EPOCH_MARK && word(head, EPOCH_HEAD - 4) == crc32fast::hash(&head[..36]);
        let epoch = Self { crc: word(head, 4), number: long(head, 16), length: long(head, 24) };
        (whole && long(head, 8) == lap).then_some(epoch)
    }
}

struct Header {
    identity: Identity,
    lap: u64,
    checkpoint: u64,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SLOT);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(self.identity.sizes.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.identity.vm.0);
        for word in [self.identity.generation, self.lap, self.checkpoint] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        self.identity.sizes.iter().for_each(|size| bytes.extend_from_slice(&size.to_le_bytes()));
        bytes.resize(SLOT - 4, 0);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn parse(slot: &[u8; SLOT]) -> Option<Self> {
        let disks = word(slot, 12) as usize;
        let whole = slot[..8] == MAGIC
            && word(slot, 8) == VERSION
            && word(slot, SLOT - 4) == crc32fast::hash(&slot[..SLOT - 4]);
        if !whole || disks > MAX_DISKS {
            return None;
        }
        let mut vm = [0; 16];
        vm.copy_from_slice(&slot[16..32]);
        let sizes = (0..disks).map(|disk| long(slot, FIXED + disk * 8)).collect();
        let identity = Identity { vm: VmId(vm), generation: long(slot, 32), sizes };
        Some(Self { identity, lap: long(slot, 40), checkpoint: long(slot, 48) })
    }
}

/// The header that counts.
fn read_headers(store: &impl Store) -> io::Result<Option<Header>> {
    let bytes = store.bytes()?;
    let mut newest: Option<Header> = None;
    for slot in 0..2 {
        let at = slot * SLOT as u64;
        if at + SLOT as u64 > bytes {
            break;
        }
        let mut copy = [0; SLOT];
        store.read(&mut copy, at)?;
        if let Some(header) = Header::parse(&copy)
            && newest.as_ref().is_none_or(|newest| newest.lap < header.lap)
        {
            newest = Some(header);
        }
    }
    Ok(newest)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
