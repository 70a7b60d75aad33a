//! Files of an ext2, ext3 or ext4 file system, by ext4-view.
//!
//! That crate is for file systems that may be damaged, not for ones that are made to harm: it believes sizes, and a
//! few of its checks can be made to panic or to take very long. So it sees the disk through [`Window`], which shows it
//! a superblock that was looked at before, and only paths whose links were followed here.

use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use crate::partitions::Partition;
use crate::source::Source;
use crate::{Disk, ReadError};

/// Links that are followed for one path, as Linux does.
const LINKS: usize = 40;
/// Longest path.
const PATH: usize = 4096;
/// Entries of a directory that are looked at.
const NAMES: usize = 10_000;
/// Larger blocks than pages cannot be mounted by the kernels that are looked for.
const BLOCK: u64 = 4096;
/// Groups of a file system of 128 TiB.
const GROUPS: u64 = 1 << 20;

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK: usize = 1024;
/// Offsets in the superblock.
const COMPATIBLE: usize = 0x5c;
const INCOMPATIBLE: usize = 0x60;
const READ_ONLY: usize = 0x64;
const HAS_JOURNAL: u32 = 4;
/// It was not unmounted: the journal has writes that are not in their places.
const NEEDS_RECOVERY: u32 = 4;
/// Sums of metadata. The crate takes the length of what it sums from the disk, unchecked.
const METADATA_SUMS: u32 = 0x400;

/// What became of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Journal {
    /// There is nothing in it, or there is none.
    Clean,
    /// What it has is read in place of what it replaces.
    Used,
    /// It cannot be read, so files are read as they are in their places.
    Ignored(String),
}

/// An open file system.
pub(crate) struct Files {
    fs: Ext4,
    source: Rc<Source>,
    partition: Partition,
    pub(crate) journal: Journal,
    /// As in `UUID=`.
    pub(crate) uuid: String,
    /// As in `LABEL=`.
    pub(crate) label: String,
}

impl Files {
    pub(crate) fn open(source: &Rc<Source>, partition: &Partition) -> Result<Self, ReadError> {
        let wrong = |why: String| ReadError::FileSystem { partition: partition.to_string(), why };
        let mut superblock = source.peek(partition.start + SUPERBLOCK_AT, SUPERBLOCK)?;
        let block = check(&superblock).map_err(|why| wrong(why.into()))?;
        clear(&mut superblock, READ_ONLY, METADATA_SUMS);
        let window = |superblock: &[u8]| {
            let (start, bytes) = (partition.start, partition.bytes);
            Window { source: source.clone(), start, bytes, superblock: superblock.to_vec(), block }
        };
        let is_dirty = word(&superblock, COMPATIBLE) & HAS_JOURNAL != 0
            && word(&superblock, INCOMPATIBLE) & NEEDS_RECOVERY != 0;
        let mut journal = if is_dirty { Journal::Used } else { Journal::Clean };
        let mut opened = Ext4::load(Box::new(window(&superblock)));
        if let (Err(why @ (Ext4Error::Corrupt(_) | Ext4Error::Incompatible(_))), true) = (&opened, is_dirty) {
            journal = Journal::Ignored(why.to_string());
            clear(&mut superblock, COMPATIBLE, HAS_JOURNAL);
            opened = Ext4::load(Box::new(window(&superblock)));
        }
        let fs = opened.map_err(|error| own(error).unwrap_or_else(|error| wrong(error.to_string())))?;
        let uuid = fs.uuid().to_string();
        let label = fs.label().to_str().unwrap_or_default().to_owned();
        Ok(Self { fs, source: source.clone(), partition: partition.clone(), journal, uuid, label })
    }

    /// Whether there is a file, not a directory, behind the path.
    pub(crate) fn is_file(&self, path: &str) -> Result<bool, ReadError> {
        Ok(self.length(path)?.is_some())
    }

    /// Whether there is a directory.
    pub(crate) fn is_directory(&self, path: &str) -> Result<bool, ReadError> {
        Ok(self.resolve(path)?.is_some_and(|(_, what)| what.is_dir()))
    }

    /// Length of a file in bytes. `None` if there is none.
    pub(crate) fn length(&self, path: &str) -> Result<Option<u64>, ReadError> {
        let found = self.resolve(path)?;
        Ok(found.filter(|(_, what)| what.file_type().is_regular_file()).map(|(_, what)| what.len()))
    }

    /// A file's contents. `None` if there is none.
    pub(crate) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, ReadError> {
        let Some((real, what)) = self.resolve(path)? else { return Ok(None) };
        if !what.file_type().is_regular_file() {
            return Ok(None);
        }
        if what.len() > limit {
            return Err(ReadError::TooLarge { path: path.to_owned(), bytes: what.len(), limit });
        }
        let mut contents = vec![0; what.len() as usize];
        let mut file = self.fs.open(real.as_str()).map_err(|error| self.file_error(path, error))?;
        let mut read = 0;
        while read < contents.len() {
            match file.read_bytes(&mut contents[read..]).map_err(|error| self.file_error(path, error))? {
                0 => break,
                bytes => read += bytes,
            }
            self.source.in_time()?;
        }
        contents.truncate(read);
        Ok(Some(contents))
    }

    /// The names in a directory, in no order; none if there is no such directory.
    pub(crate) fn names(&self, path: &str) -> Result<Vec<String>, ReadError> {
        let Some((real, what)) = self.resolve(path)? else { return Ok(Vec::new()) };
        if !what.is_dir() {
            return Ok(Vec::new());
        }
        let entries = self.fs.read_dir(real.as_str()).map_err(|error| self.file_error(path, error))?;
        let mut names = Vec::new();
        for entry in entries.take(NAMES) {
            self.source.in_time()?;
            let entry = entry.map_err(|error| self.file_error(path, error))?;
            // A name that is no text is none of a kernel's.
            names.extend(entry.file_name().as_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    /// The path without links, and what is there.
    fn resolve(&self, path: &str) -> Result<Option<(String, ext4_view::Metadata)>, ReadError> {
        let long = || self.file_error(path, Ext4Error::PathTooLong);
        let mut todo: Vec<String> = parts(path).rev().map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        let mut found = self.look("/", path)?;
        while let Some(part) = todo.pop() {
            if part == ".." {
                done.pop();
                found = self.look(&joined(&done), path)?;
                continue;
            }
            let at = format!("{}/{part}", joined(&done).trim_end_matches('/'));
            if at.len() > PATH || todo.len() > PATH {
                return Err(long());
            }
            if !found.as_ref().is_some_and(ext4_view::Metadata::is_dir) {
                return Ok(None);
            }
            let Some(there) = self.look(&at, path)? else { return Ok(None) };
            if !there.is_symlink() {
                done.push(part);
                found = Some(there);
                continue;
            }
            links += 1;
            if links > LINKS || there.len() > PATH as u64 {
                return Err(long());
            }
            let target = self.fs.read_link(at.as_str()).map_err(|error| self.file_error(path, error))?;
            let Ok(target) = target.to_str() else { return Ok(None) };
            if target.starts_with('/') {
                done.clear();
            }
            todo.extend(parts(target).rev().map(str::to_owned));
            found = self.look(&joined(&done), path)?;
        }
        Ok(found.map(|found| (joined(&done), found)))
    }

    /// What is at a path without links.
    fn look(&self, at: &str, path: &str) -> Result<Option<ext4_view::Metadata>, ReadError> {
        self.source.in_time()?;
        match self.fs.symlink_metadata(at) {
            Ok(found) => Ok(Some(found)),
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::MalformedPath) => Ok(None),
            Err(error) => Err(self.file_error(path, error)),
        }
    }

    fn file_error(&self, path: &str, error: Ext4Error) -> ReadError {
        own(error).unwrap_or_else(|error| ReadError::File {
            path: path.to_owned(),
            partition: self.partition.to_string(),
            why: error.to_string(),
        })
    }
}

/// The components of a path.
fn parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

fn joined(parts: &[String]) -> String {
    format!("/{}", parts.join("/"))
}

/// An error of ours that went through the crate.
fn own(error: Ext4Error) -> Result<ReadError, Ext4Error> {
    match error {
        Ext4Error::Io(inner) => inner.downcast::<ReadError>().map(|it| *it).map_err(Ext4Error::Io),
        other => Err(other),
    }
}

/// Whether the crate may see this superblock: what it allocates by it is bounded. Returns the block size in bytes.
fn check(superblock: &[u8]) -> Result<u64, &'static str> {
    let log = word(superblock, 0x18);
    let block = 1024u64.checked_shl(log).filter(|_| log <= 6).unwrap_or(u64::MAX);
    if block > BLOCK {
        return Err("its blocks are larger than 4096 bytes");
    }
    let high =
        if word(superblock, INCOMPATIBLE) & 0x80 == 0 { 0 } else { u64::from(word(superblock, 0x150)) };
    let blocks = high << 32 | u64::from(word(superblock, 4));
    let per_group = u64::from(word(superblock, 0x20));
    if per_group == 0 || blocks / per_group >= GROUPS {
        return Err("it has more groups of blocks than any");
    }
    Ok(block)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|it| it.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn clear(bytes: &mut [u8], at: usize, bits: u32) {
    let value = word(bytes, at) & !bits;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The partition, as ext4-view may see it.
struct Window {
    source: Rc<Source>,
    start: u64,
    bytes: u64,
    superblock: Vec<u8>,
    block: u64,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.bytes);
        let start = self.start.checked_add(offset).filter(|_| end.is_some());
        let start = start.ok_or_else(|| ReadError::Disk(std::io::ErrorKind::UnexpectedEof.into()))?;
        self.source.read(start, buffer)?;
        for (at, byte) in (SUPERBLOCK_AT..).zip(&self.superblock) {
            if let Some(place) = at.checked_sub(offset).and_then(|at| buffer.get_mut(at as usize)) {
                *place = *byte;
            }
        }
        if offset.is_multiple_of(self.block) {
            buffer.chunks_mut(self.block as usize).for_each(hide_deep_extents);
        }
        Ok(())
    }
}

/// Hides a node of an extent tree that no file of a gigabyte has. Five levels of nodes whose entries all lead to one
/// node below would be walked for years, without a read that the budget could stop.
fn hide_deep_extents(block: &mut [u8]) {
    let half = |at: usize| block.get(at..at + 2).map_or(0, |it| u16::from_le_bytes([it[0], it[1]]));
    let (entries, most, depth) = (half(2), half(4), half(6));
    let fits = 12 * (usize::from(most) + 1) <= block.len() && entries <= most;
    if half(0) == 0xf30a && fits && (3..=5).contains(&depth) {
        block[0] = 0;
    }
}

/// A disk in memory.
impl Disk for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        let range = usize::try_from(offset).ok().and_then(|at| self.get(at..)?.get(..buffer.len()));
        buffer.copy_from_slice(range.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
