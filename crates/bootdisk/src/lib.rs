//! Finds the Linux kernel that a disk boots: what a boot loader would find, without running anything of the disk.
//!
//! [`read`] takes a whole disk, or one file system, and returns kernel, initrd and command line:
//!
//! 1. the partitions: a GPT, an MBR with its logical partitions, or one file system without a table;
//! 2. their file systems: ext2, ext3 and ext4 are read (by the crate ext4-view); others are named in the error;
//! 3. what they boot, the first that is there: GRUB's configuration (`grub.cfg`, with `grubenv` and, by `blscfg`,
//!    entries of the Boot Loader Specification); such entries without a `grub.cfg`; the newest `vmlinuz-*`.
//!
//! **Nothing on the disk is believed.** A guest can write whatever it likes, so each size is bounded before anything
//! is allocated ([`Limits`]), all reads together have a budget, and so has what configurations are made into. Every
//! step looks whether there is time and whether anybody still waits, and nothing here panics. What cannot be read is an
//! error with a reason.
//!
//! ```text
//! source.rs      the disk, and how much of it may be read
//! partitions.rs  partition tables                        volumes.rs   partitions with their file systems
//! probe.rs       which file system it is                 files.rs     files of an ext file system
//! window.rs      what ext4-view sees of a partition      journal.rs   whether it may read the journal
//! grub/          grub.cfg: words, syntax, commands       bls.rs       entries of the Boot Loader Specification
//! newest.rs      the newest kernel without any entry     versions.rs  which version is newer
//! ```

#![forbid(unsafe_code)]

mod bls;
mod command_line;
mod error;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod grub;
mod journal;
mod newest;
mod partitions;
mod probe;
mod source;
mod versions;
mod volumes;
mod window;

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

pub use command_line::extend;
pub use error::ReadError;

use crate::source::Source;
use crate::volumes::{Place, Volumes};

/// A disk that is read.
pub trait Disk {
    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// Of the disk.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Whether anybody still waits for what is read. Asked at every step, so it must not take long.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// How much is read, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the largest kernel.
    pub kernel: u64,
    /// Bytes of the largest initrd, all its files together.
    pub initrd: u64,
    /// Bytes of all reads beyond these two: tables, directories, journals, configurations.
    pub rest: u64,
    /// Bytes of memory for everything that boot loaders' configurations are made into. What was let go again counts,
    /// so this bounds how long they can be carried out, too.
    pub memory: u64,
    /// How long all this may take without the time in which the disk answers.
    pub own_time: Duration,
    /// When reading is given up.
    pub until: Option<Instant>,
}

/// Enough for a configuration of a megabyte, carried out once; distributions' ones need a hundredth.
const MEMORY: u64 = 64 << 20;
/// Usually it is a tenth of a second.
const OWN_TIME: Duration = Duration::from_secs(60);

impl Default for Limits {
    fn default() -> Self {
        Self {
            kernel: 256 << 20,
            initrd: 1 << 30,
            rest: 512 << 20,
            memory: MEMORY,
            own_time: OWN_TIME,
            until: None,
        }
    }
}

/// What a disk boots.
#[derive(Clone, PartialEq, Eq)]
pub struct Boot {
    /// The kernel file.
    pub kernel: Vec<u8>,
    /// The initrd files, one after the other; empty if there is none.
    pub initrd: Vec<u8>,
    /// The command line, as the entry has it.
    pub command_line: String,
    /// Where all this comes from.
    pub found: Found,
}

/// Where a kernel was found, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The entry's title.
    pub entry: String,
    /// The kernel's path in its file system.
    pub kernel: String,
    /// The partition of its file system; 0 is the whole disk.
    pub partition: u32,
    /// What the log should say besides.
    pub notes: Vec<String>,
}

impl std::fmt::Debug for Boot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Boot")
            .field("kernel", &self.kernel.len())
            .field("initrd", &self.initrd.len())
            .field("command_line", &self.command_line)
            .field("found", &self.found)
            .finish()
    }
}

/// An entry: what is to be loaded, before it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    title: String,
    kernel: Option<Place>,
    initrds: Vec<Place>,
    command_line: String,
}

/// Reads what the disk boots.
///
/// # Errors
/// [`ReadError`], in one line.
pub fn read(disk: Box<dyn Disk>, limits: &Limits) -> Result<Boot, ReadError> {
    let source = Rc::new(Source::new(disk, limits));
    let volumes = Volumes::open(&source)?;
    let mut notes = volumes.notes();
    let entry = choose(&volumes, &mut notes)?;
    load(&volumes, entry, notes, limits, &source)
}

fn choose(volumes: &Volumes, notes: &mut Vec<String>) -> Result<Entry, ReadError> {
    if let Some(entry) = grub::choose(volumes, notes)? {
        return Ok(entry);
    }
    if let Some(entry) = bls::choose(volumes)? {
        return Ok(entry);
    }
    if let Some(entry) = newest::choose(volumes)? {
        notes.push("the disk has no boot loader's configuration, so its newest kernel is taken".into());
        return Ok(entry);
    }
    Err(volumes.nothing())
}

fn load(
    volumes: &Volumes,
    entry: Entry,
    notes: Vec<String>,
    limits: &Limits,
    source: &Source,
) -> Result<Boot, ReadError> {
    let Some(place) = &entry.kernel else { return Err(ReadError::NoLinux { entry: entry.title }) };
    source.allow(limits.kernel);
    let kernel = volumes.read(place, limits.kernel)?;
    source.allow(limits.initrd);
    let mut initrd = Vec::new();
    for place in &entry.initrds {
        // Each archive begins at a multiple of four, as boot loaders place them.
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        let left = limits.initrd.saturating_sub(initrd.len() as u64);
        initrd.append(&mut volumes.read(place, left)?);
    }
    let partition = volumes.partition(place);
    let found = Found {
        entry: error::short(&entry.title).into_owned(),
        kernel: place.path.clone(),
        partition,
        notes,
    };
    Ok(Boot { kernel, initrd, command_line: entry.command_line, found })
}

#[cfg(test)]
mod tests;
