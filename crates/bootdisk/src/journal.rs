//! Whether ext4-view may read a journal.
//!
//! It keeps what the journal's tables say, and believes the journal's length and its list of blocks: with one block over
//! and over again it would keep as much as there is memory, without a read. So the list is looked at before: it has a
//! length that journals have, and no block twice.

use crate::ReadError;
use crate::window::Window;

/// Blocks of the longest journal; mke2fs makes none with more than 262,144 unless it is told to.
const BLOCKS: u64 = 1 << 20;
/// Most pieces of the list.
const RUNS: usize = 1 << 20;
/// Deepest node of a tree of extents, from the inode.
const DEPTH: u16 = 3;

/// Why ext4-view may not see the journal. `None` if it may.
///
/// # Errors
/// See [`ReadError`].
pub(crate) fn refuse(window: &mut Window, superblock: &[u8]) -> Result<Option<&'static str>, ReadError> {
    let inode = match inode(window, superblock)? {
        Ok(inode) => inode,
        Err(why) => return Ok(Some(why)),
    };
    let bytes = u64::from(u32_at(&inode, 0x6c)) << 32 | u64::from(u32_at(&inode, 4));
    let blocks = bytes.div_ceil(window.block());
    if blocks > BLOCKS {
        return Ok(Some("it is longer than any"));
    }
    let mut list = List { window, runs: Vec::new(), left: blocks };
    let root = &inode[0x28..0x28 + 60];
    let walked =
        if u32_at(&inode, 0x20) & 0x8_0000 != 0 { list.extents(root, DEPTH)? } else { list.map(root)? };
    if let Err(why) = walked {
        return Ok(Some(why));
    }
    let mut runs = list.runs;
    runs.sort_unstable();
    let repeats = runs.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0);
    Ok(repeats.then_some("it has a block twice"))
}

/// The journal's inode.
fn inode(window: &mut Window, superblock: &[u8]) -> Result<Result<Vec<u8>, &'static str>, ReadError> {
    const WRONG: &str = "it is nowhere";
    let is_64_bit = u32_at(superblock, 0x60) & 0x80 != 0;
    let (number, per_group) = (u64::from(u32_at(superblock, 0xe0)), u64::from(u32_at(superblock, 0x28)));
    let (inode_size, described) = (u64::from(u16_at(superblock, 0x58)), u64::from(u16_at(superblock, 0xfe)));
    let described = if is_64_bit { described } else { 32 };
    let block = window.block();
    if number == 0 || per_group == 0 || !(128..=block).contains(&inode_size) {
        return Ok(Err(WRONG));
    }
    if !(32..=block).contains(&described) || (is_64_bit && described < 64) {
        return Ok(Err(WRONG));
    }
    let (group, within) = ((number - 1) / per_group, (number - 1) % per_group);
    let first = if block == 1024 { 2 } else { 1 };
    let per_block = block / described;
    let mut descriptor = vec![0; described as usize];
    let at = (first + group / per_block) * block + group % per_block * described;
    if !window.has(at, described) {
        return Ok(Err(WRONG));
    }
    window.fill(at, &mut descriptor)?;
    let high = if is_64_bit { u64::from(u32_at(&descriptor, 0x28)) } else { 0 };
    let table = high << 32 | u64::from(u32_at(&descriptor, 8));
    let Some(at) = table.checked_mul(block).and_then(|at| at.checked_add(within * inode_size)) else {
        return Ok(Err(WRONG));
    };
    // As ext4-view does: the block with the inode.
    let (start, within) = (at - at % block, (at % block) as usize);
    if !window.has(start, block) {
        return Ok(Err(WRONG));
    }
    let mut bytes = vec![0; block as usize];
    window.fill(start, &mut bytes)?;
    let inode = bytes.get(within..within + inode_size as usize).map(<[u8]>::to_vec);
    Ok(inode.ok_or(WRONG))
}

/// The list of a file's blocks, which are `left` ones from here.
struct List<'a> {
    window: &'a mut Window,
    /// First block and number of blocks.
    runs: Vec<(u64, u64)>,
    left: u64,
}

type Walked = Result<Result<(), &'static str>, ReadError>;

const DAMAGED: &str = "the list of its blocks is damaged";

impl List<'_> {
    fn add(&mut self, first: u64, blocks: u64) -> Result<(), &'static str> {
        self.runs.push((first, blocks));
        if self.runs.len() > RUNS { Err("its blocks are in too many pieces") } else { Ok(()) }
    }

    /// A block, if it is there.
    fn read(&mut self, block: u64) -> Result<Option<Vec<u8>>, ReadError> {
        let size = self.window.block();
        let Some(at) = block.checked_mul(size).filter(|at| self.window.has(*at, size)) else {
            return Ok(None);
        };
        let mut bytes = vec![0; size as usize];
        self.window.fill(at, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// A node of a tree of extents, at most so deep.
    fn extents(&mut self, node: &[u8], deepest: u16) -> Walked {
        let (magic, entries, depth) = (u16_at(node, 0), usize::from(u16_at(node, 2)), u16_at(node, 6));
        if magic != 0xf30a || depth > deepest || 12 * (entries + 1) > node.len() {
            return Ok(Err(DAMAGED));
        }
        for entry in node[12..].chunks_exact(12).take(entries) {
            if depth == 0 {
                let first = u64::from(u16_at(entry, 6)) << 32 | u64::from(u32_at(entry, 8));
                if let Err(why) = self.add(first, u16_at(entry, 4).into()) {
                    return Ok(Err(why));
                }
                continue;
            }
            let below = self.read(u64::from(u16_at(entry, 8)) << 32 | u64::from(u32_at(entry, 4)))?;
            let Some(below) = below.filter(|below| u16_at(below, 6) == depth - 1) else {
                return Ok(Err(DAMAGED));
            };
            if let Err(why) = self.extents(&below, depth - 1)? {
                return Ok(Err(why));
            }
        }
        Ok(Ok(()))
    }

    /// A map of blocks: twelve, and three blocks of more of them.
    fn map(&mut self, root: &[u8]) -> Walked {
        if let Err(why) = self.direct(&root[..48]) {
            return Ok(Err(why));
        }
        for (depth, pointer) in (1..=3).zip(root[48..60].chunks_exact(4)) {
            if let Err(why) = self.indirect(u32_at(pointer, 0), depth)? {
                return Ok(Err(why));
            }
        }
        Ok(Ok(()))
    }

    fn direct(&mut self, pointers: &[u8]) -> Result<(), &'static str> {
        for pointer in pointers.chunks_exact(4) {
            if self.left == 0 {
                break;
            }
            self.left -= 1;
            let block = u32_at(pointer, 0);
            if block == 0 {
                return Err("it has a hole");
            }
            self.add(block.into(), 1)?;
        }
        Ok(())
    }

    fn indirect(&mut self, block: u32, depth: u32) -> Walked {
        if self.left == 0 {
            return Ok(Ok(()));
        }
        let Some(pointers) = self.read(block.into())? else { return Ok(Err(DAMAGED)) };
        if depth == 1 {
            return Ok(self.direct(&pointers));
        }
        for pointer in pointers.chunks_exact(4) {
            if let Err(why) = self.indirect(u32_at(pointer, 0), depth - 1)? {
                return Ok(Err(why));
            }
        }
        Ok(Ok(()))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |it| u16::from_le_bytes([it[0], it[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|it| it.try_into().ok()).map_or(0, u32::from_le_bytes)
}
