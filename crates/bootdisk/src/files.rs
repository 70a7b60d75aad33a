//! Files of an ext2, ext3 or ext4 file system, by ext4-view.
//!
//! That crate is for file systems that may be damaged, not for ones that are made to harm: it believes sizes, and a
//! few of its checks can be made to panic or to take very long. So it sees the disk through [`Window`], a journal only
//! after [`journal::refuse`], and only short paths whose links were followed and whose directories were measured here.

use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error, Metadata};

use crate::error::short;
use crate::partitions::Partition;
use crate::source::Source;
use crate::window::{SUPERBLOCK_AT, Window};
use crate::{Disk, ReadError, journal};

/// Links that are followed for one path, as Linux does.
const LINKS: usize = 40;
/// Longest path.
const PATH: usize = 4096;
/// Most directories on the way to a file.
const DEEP: usize = 16;
/// Longest directory in bytes: one with 100,000 names. All of it may have to be looked through for one name.
const DIRECTORY: u64 = 8 << 20;
/// What a look at a name costs beside the directories on its way.
const LOOK: u64 = 512;
/// Entries of a directory that are looked at.
const NAMES: usize = 10_000;
/// What a name costs in bytes of memory beside its letters.
const NAME: usize = 64;
/// Larger blocks than pages cannot be mounted by the kernels that are looked for.
const BLOCK: u64 = 4096;
/// Groups of a file system of 128 TiB.
const GROUPS: u64 = 1 << 20;

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
        let seen = Rc::default();
        let window = |superblock: &[u8]| Window::new(source, partition, superblock, block, &seen);
        let is_dirty = word(&superblock, COMPATIBLE) & HAS_JOURNAL != 0
            && word(&superblock, INCOMPATIBLE) & NEEDS_RECOVERY != 0;
        let mut journal = Journal::Clean;
        if is_dirty {
            let refused = journal::refuse(&mut window(&superblock), &superblock)?;
            journal = refused.map_or(Journal::Used, |why| Journal::Ignored(why.into()));
        }
        if matches!(journal, Journal::Ignored(_)) {
            clear(&mut superblock, COMPATIBLE, HAS_JOURNAL);
        }
        let mut opened = Ext4::load(Box::new(window(&superblock)));
        if let (Err(why @ (Ext4Error::Corrupt(_) | Ext4Error::Incompatible(_))), Journal::Used) =
            (&opened, &journal)
        {
            journal = Journal::Ignored(why.to_string());
            clear(&mut superblock, COMPATIBLE, HAS_JOURNAL);
            opened = Ext4::load(Box::new(window(&superblock)));
        }
        let fs = opened.map_err(|error| own(error).unwrap_or_else(|error| wrong(error.to_string())))?;
        let uuid = fs.uuid().to_string();
        let label = fs.label().to_str().unwrap_or_default().to_owned();
        Ok(Self { fs, source: source.clone(), partition: partition.clone(), journal, uuid, label })
    }

    /// The disk, with its budgets.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Whether there is a file, not a directory, behind the path.
    pub(crate) fn is_file(&self, path: &str) -> Result<bool, ReadError> {
        Ok(self.length(path)?.is_some())
    }

    /// Whether there is a directory.
    pub(crate) fn is_directory(&self, path: &str) -> Result<bool, ReadError> {
        Ok(self.resolve(path)?.is_some_and(|found| found.what.is_dir()))
    }

    /// Length of a file in bytes. `None` if there is none.
    pub(crate) fn length(&self, path: &str) -> Result<Option<u64>, ReadError> {
        let found = self.resolve(path)?.map(|found| found.what);
        Ok(found.filter(|what| what.file_type().is_regular_file()).map(|what| what.len()))
    }

    /// A file's contents. `None` if there is none.
    pub(crate) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, ReadError> {
        let Some(At { way, what, walk }) = self.resolve(path)? else { return Ok(None) };
        if !what.file_type().is_regular_file() {
            return Ok(None);
        }
        if what.len() > limit {
            return Err(ReadError::TooLarge { path: path.to_owned(), bytes: what.len(), limit });
        }
        self.source.walk(walk)?;
        let mut contents = vec![0; what.len() as usize];
        let mut file = self.fs.open(way.as_str()).map_err(|error| self.file_error(path, error))?;
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
        let Some(At { way, what, walk }) = self.resolve(path)? else { return Ok(Vec::new()) };
        if !what.is_dir() {
            return Ok(Vec::new());
        }
        self.source.walk(walk.saturating_add(self.measured(path, &what)?))?;
        let entries = self.fs.read_dir(way.as_str()).map_err(|error| self.file_error(path, error))?;
        let mut names = Vec::new();
        for entry in entries.take(NAMES) {
            let entry = entry.map_err(|error| self.file_error(path, error))?;
            // A name that is no text is none of a kernel's.
            let Ok(name) = entry.file_name().as_str().map(str::to_owned) else { continue };
            self.source.think(NAME + name.len())?;
            names.push(name);
        }
        Ok(names)
    }

    /// What is at a path.
    fn resolve(&self, path: &str) -> Result<Option<At>, ReadError> {
        let long = || self.file_error(path, Ext4Error::PathTooLong);
        if path.len() > PATH {
            return Err(long());
        }
        let mut todo: Vec<String> = parts(path).rev().map(str::to_owned).collect();
        let mut way = Way::default();
        let mut links = 0;
        let mut found = self.look(&way, None, path)?;
        while let Some(part) = todo.pop() {
            if part == ".." {
                way.leave();
                found = self.look(&way, None, path)?;
                continue;
            }
            let Some(directory) = found.as_ref().filter(|found| found.is_dir()) else { return Ok(None) };
            way.walk = way.before().saturating_add(self.measured(path, directory)?);
            let Some(there) = self.look(&way, Some(&part), path)? else { return Ok(None) };
            if !there.is_symlink() {
                way.enter(part);
                found = Some(there);
                if way.parts.len() > DEEP {
                    return Err(long());
                }
                continue;
            }
            links += 1;
            if links > LINKS || there.len() > PATH as u64 {
                return Err(long());
            }
            self.source.walk(way.walk)?;
            let target = self.fs.read_link(way.to(Some(&part)).as_str());
            let target = target.map_err(|error| self.file_error(path, error))?;
            let Ok(target) = target.to_str() else { return Ok(None) };
            if target.starts_with('/') {
                way = Way::default();
            }
            todo.extend(parts(target).rev().map(str::to_owned));
            if todo.len() > PATH {
                return Err(long());
            }
            found = self.look(&way, None, path)?;
        }
        let (walk, way) = (way.before(), way.to(None));
        Ok(found.map(|what| At { way, what, walk }))
    }

    /// The length of a directory that is to be looked through, in bytes.
    fn measured(&self, path: &str, directory: &Metadata) -> Result<u64, ReadError> {
        let bytes = directory.len();
        if bytes > DIRECTORY {
            let why = format!("a directory on its way has {bytes} bytes, and {DIRECTORY} are the limit");
            return Err(self.wrong_file(path, why));
        }
        Ok(bytes)
    }

    /// What is at the end of a way without links, or there of this name.
    fn look(&self, way: &Way, name: Option<&str>, path: &str) -> Result<Option<Metadata>, ReadError> {
        let walk = if name.is_some() { way.walk } else { way.before() };
        self.source.walk(LOOK.saturating_add(walk))?;
        let at = way.to(name);
        if at.len() > PATH {
            return Err(self.file_error(path, Ext4Error::PathTooLong));
        }
        match self.fs.symlink_metadata(at.as_str()) {
            Ok(found) => Ok(Some(found)),
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::MalformedPath) => Ok(None),
            Err(error) => Err(self.file_error(path, error)),
        }
    }

    fn wrong_file(&self, path: &str, why: String) -> ReadError {
        ReadError::File { path: short(path).into_owned(), partition: self.partition.to_string(), why }
    }

    fn file_error(&self, path: &str, error: Ext4Error) -> ReadError {
        own(error).unwrap_or_else(|error| self.wrong_file(path, error.to_string()))
    }
}

/// Where a path leads.
struct At {
    /// The path without links.
    way: String,
    what: Metadata,
    /// Bytes of the directories on the way, which are looked through each time.
    walk: u64,
}

/// A way without links, from the root of a file system.
#[derive(Default)]
struct Way {
    /// Each part, with the bytes of the directories that are looked through up to it.
    parts: Vec<(String, u64)>,
    /// The same for a part that is not there yet.
    walk: u64,
}

impl Way {
    /// Bytes of the directories that are looked through to its end.
    fn before(&self) -> u64 {
        self.parts.last().map_or(0, |(_, walk)| *walk)
    }

    fn enter(&mut self, part: String) {
        self.parts.push((part, self.walk));
    }

    fn leave(&mut self) {
        self.parts.pop();
    }

    fn to(&self, name: Option<&str>) -> String {
        let parts: Vec<&str> = self.parts.iter().map(|(part, _)| part.as_str()).chain(name).collect();
        format!("/{}", parts.join("/"))
    }
}

/// The components of a path.
fn parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
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
