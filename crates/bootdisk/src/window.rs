//! A partition, as ext4-view may see it: with a superblock that was looked at before, without trees of extents that
//! lead nowhere, and at every read as at the first one.
//!
//! That crate keeps blocks, so that what it walks among those it has costs no read and meets no budget. What is hidden
//! here sees to it that such a walk is short: each node of a tree of extents has different ones below it, each leaf has
//! extents, and each extent has blocks. The guest may write while its disk is read, so a block that reads otherwise than
//! before is an error: a length that was looked at stays what it was.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;

use ext4_view::Ext4Read;

use crate::ReadError;
use crate::partitions::Partition;
use crate::source::Source;

/// Where the superblock is.
pub(crate) const SUPERBLOCK_AT: u64 = 1024;
/// Most bytes of descriptors and revocations in a journal: ext4-view keeps what they say. A journal of a gigabyte has
/// four megabytes of them.
const JOURNAL_TABLES: u64 = 16 << 20;
/// The deepest node below an inode: with it a file has 460,000 extents in blocks of 4096 bytes.
const DEPTH: u16 = 1;
/// With smaller blocks, whose nodes have fewer entries.
const DEPTH_OF_SMALL: u16 = 2;

/// What was read, by where it was and how long.
#[derive(Default)]
pub(crate) struct Seen {
    sums: HashMap<(u64, usize), u64>,
    /// Not guessable, so nobody makes two contents with one sum.
    sum: RandomState,
}

impl Seen {
    /// Compares with what was there, and keeps what was not.
    fn check(&mut self, offset: u64, bytes: &[u8], keep: bool) -> Result<(), ReadError> {
        let (place, sum) = ((offset, bytes.len()), self.sum.hash_one(bytes));
        let before = self.sums.get(&place).copied();
        if keep && before.is_none() {
            self.sums.insert(place, sum);
        }
        if before.is_none_or(|before| before == sum) { Ok(()) } else { Err(ReadError::Changed) }
    }
}

/// The view of a partition.
pub(crate) struct Window {
    source: Rc<Source>,
    start: u64,
    bytes: u64,
    superblock: Vec<u8>,
    block: u64,
    seen: Rc<RefCell<Seen>>,
    tables: u64,
}

impl Window {
    /// With this superblock, whose blocks have so many bytes.
    pub(crate) fn new(
        source: &Rc<Source>,
        partition: &Partition,
        superblock: &[u8],
        block: u64,
        seen: &Rc<RefCell<Seen>>,
    ) -> Self {
        Self {
            source: source.clone(),
            start: partition.start,
            bytes: partition.bytes,
            superblock: superblock.to_vec(),
            block,
            seen: seen.clone(),
            tables: JOURNAL_TABLES,
        }
    }

    /// Whether so many bytes are there.
    pub(crate) fn has(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// Bytes of a block.
    pub(crate) fn block(&self) -> u64 {
        self.block
    }

    /// Fills the buffer with what is at an offset of the partition.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub(crate) fn fill(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.show(offset, buffer, true)
    }

    /// The same. Pieces of blocks are kept only if they are to be: a file system has a million descriptors of groups,
    /// which ext4-view reads once.
    fn show(&mut self, offset: u64, buffer: &mut [u8], keep_pieces: bool) -> Result<(), ReadError> {
        let start = self.start.checked_add(offset).filter(|_| self.has(offset, buffer.len() as u64));
        let start = start.ok_or_else(|| ReadError::Disk(std::io::ErrorKind::UnexpectedEof.into()))?;
        self.source.read(start, buffer)?;
        for (at, piece) in (offset..).step_by(self.block as usize).zip(buffer.chunks(self.block as usize)) {
            // A whole file system's superblock is not looked at again: ours is shown instead.
            if at > SUPERBLOCK_AT || at + (piece.len() as u64) <= SUPERBLOCK_AT {
                let keep = keep_pieces || piece.len() as u64 == self.block;
                self.seen.borrow_mut().check(at, piece, keep)?;
            }
        }
        for (at, byte) in (SUPERBLOCK_AT..).zip(&self.superblock) {
            if let Some(place) = at.checked_sub(offset).and_then(|at| buffer.get_mut(at as usize)) {
                *place = *byte;
            }
        }
        if offset.is_multiple_of(self.block) {
            for block in buffer.chunks_mut(self.block as usize) {
                if is_journal_table(block) {
                    let len = block.len() as u64;
                    self.tables = self.tables.checked_sub(len).ok_or(ReadError::Budget)?;
                }
                if is_harmful_node(block) {
                    // Without its magic number it is none.
                    block[0] = 0;
                }
            }
        }
        Ok(())
    }
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.show(offset, buffer, false)?)
    }
}

/// A descriptor or a revocation, in the byte order of journals.
fn is_journal_table(block: &[u8]) -> bool {
    let word =
        |at: usize| block.get(at..at + 4).and_then(|it| it.try_into().ok()).map_or(0, u32::from_be_bytes);
    word(0) == 0xc03b_3998 && matches!(word(4), 1 | 5)
}

/// Whether a block is a node of a tree of extents as no file of a gigabyte has it: too deep, without entries, with
/// extents without blocks, or with a node below it twice.
fn is_harmful_node(block: &[u8]) -> bool {
    let half = |at: usize| block.get(at..at + 2).map_or(0, |it| u16::from_le_bytes([it[0], it[1]]));
    let (entries, most, depth) = (half(2), half(4), half(6));
    let fits = 12 * (usize::from(most) + 1) <= block.len() && entries <= most;
    if half(0) != 0xf30a || !fits || depth > 5 {
        return false;
    }
    let deepest = if block.len() < 2048 { DEPTH_OF_SMALL } else { DEPTH };
    if entries == 0 || depth > deepest {
        return true;
    }
    let mut places = (1..=usize::from(entries)).map(|number| number * 12);
    if depth == 0 {
        return places.any(|at| half(at + 4) == 0);
    }
    let mut below = HashSet::new();
    places.any(|at| !below.insert((half(at + 4), half(at + 6), half(at + 8))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(depth: u16, entries: &[[u16; 6]]) -> Vec<u8> {
        let count = entries.len() as u16;
        let halves = [0xf30a, count, 340, depth, 0, 0].into_iter().chain(entries.iter().flatten().copied());
        let mut node: Vec<u8> = halves.flat_map(u16::to_le_bytes).collect();
        node.resize(4096, 0);
        node
    }

    #[test]
    fn nodes_of_files_are_seen_and_those_that_lead_nowhere_are_not() {
        // An extent: where in the file, how many blocks, where. A node below: where in the file, where.
        let leaf = [[0, 0, 8, 0, 100, 0], [8, 0, 8, 0, 100, 0]];
        let inner = [[0, 0, 50, 0, 0, 0], [8, 0, 51, 0, 0, 0]];
        assert!(!is_harmful_node(&node(0, &leaf)), "a block may be in a file twice: it is read as often");
        assert!(!is_harmful_node(&node(1, &inner)));
        assert!(is_harmful_node(&node(2, &inner)), "too deep");
        let mut small = node(2, &inner);
        small.truncate(1024);
        small[4..6].copy_from_slice(&84_u16.to_le_bytes());
        assert!(!is_harmful_node(&small), "small nodes have fewer entries, so trees of them are deeper");
        assert!(is_harmful_node(&node(0, &[])) && is_harmful_node(&node(1, &[])), "no entries");
        assert!(is_harmful_node(&node(0, &[leaf[0], [8, 0, 0, 0, 100, 0]])), "no blocks");
        assert!(is_harmful_node(&node(1, &[inner[0], inner[1], [16, 0, 50, 0, 0, 0]])), "twice the same");
        assert!(!is_harmful_node(&[b'#'; 4096]));
    }
}
