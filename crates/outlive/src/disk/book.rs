//! What this process knows of the contents of its images: the sums of their chunks. A host that has lost the VM
//! and comes back as its standby compares its images with those of the host where the VM runs; with a book on
//! each side only the chunks that were written since the last comparison are read.
//!
//! A sum that is wrong here makes the two images differ for good, and nobody notices: the chunk counts as equal
//! and is not sent. So a book is about *this* process's image alone and trusts nobody, and these rules hold.
//!
//! **Ordering rules**
//!
//! 1. *Forget, then write.* Whoever writes to an image outside a machine (the standby's disks' thread) forgets the
//!    chunk first. A commit forgets its chunks when it comes, although it reaches the image later, and from the
//!    base on nothing is noted any more.
//! 2. *Touched when complete.* While a machine has the image, each of its writes is in the set of touched chunks
//!    when it is complete, whatever becomes of the log ([`outlive_machine::WriteLog::swap_touched`]). The touched
//!    chunks are taken and forgotten *after* the log has begun to track and *before* the first sum is looked up.
//!    So a write that completes before that is forgotten here; one that completes later is tracked, and its chunk
//!    is read again in a later round, where nothing is looked up.
//! 3. *A write in flight is a write.* The machine that loses the VM ends with writes under way, which its engine
//!    still carries to the disk. They never complete for the guest, so nobody touches them: they are asked for
//!    ([`outlive_machine::BlockDevice::add_changing`]) when the machine stands still, and forgotten.
//! 4. *A late note is no note.* The thread that reads an image may lag behind: what it has read before a new owner
//!    opened the book is not noted.
//! 5. *Closed means unchanged.* While nobody has the image, anybody could write to it. A book that is closed
//!    keeps the file's identity, length and times, and is empty if they differ when it is opened. Block devices
//!    have no such times, so they have no book; nor has a process that has just started.
//!
//! In doubt a chunk is read. A book has 32 bytes for each 64 KiB, allocated as it is filled.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outlive_machine::ChunkSet;

use super::image::{Sum, ZERO_SUM, chunks};

/// How many chunks all books together have at most: 256 GiB of images, 128 MiB of memory. What is behind that is
/// read.
const MOST: u64 = 4 << 20;

/// What is known of one image, by one owner of it. Owners follow each other.
#[derive(Clone, Debug)]
pub(crate) struct Book {
    pages: Arc<Mutex<Pages>>,
    owner: u64,
}

#[derive(Debug)]
struct Pages {
    sums: Vec<Sum>,
    known: ChunkSet,
    owner: u64,
}

impl Book {
    fn new(bytes: u64, most: u64) -> Self {
        let sums = chunks(bytes).min(most);
        let known = ChunkSet::for_disk(sums * outlive_machine::CHUNK);
        let pages = Pages { sums: vec![ZERO_SUM; sums as usize], known, owner: 0 };
        Self { pages: Arc::new(Mutex::new(pages)), owner: 0 }
    }

    /// A book in which nothing stays: for an image of which nothing is to be known.
    pub(crate) fn none() -> Self {
        Self::new(0, 0)
    }

    /// The sum of a chunk, if it is known.
    pub(crate) fn sum(&self, chunk: u64) -> Option<Sum> {
        let pages = self.pages();
        pages.known.contains(chunk).then(|| pages.sums[chunk as usize])
    }

    /// Notes the sum of a chunk that was read, or written, by this owner.
    pub(crate) fn note(&self, chunk: u64, sum: Sum) {
        let mut pages = self.pages();
        if pages.owner == self.owner && chunk < pages.sums.len() as u64 {
            pages.sums[chunk as usize] = sum;
            pages.known.insert(chunk);
        }
    }

    /// Forgets one chunk.
    pub(crate) fn forget(&self, chunk: u64) {
        self.pages().known.remove(chunk);
    }

    /// Forgets the chunks that a range touches.
    pub(crate) fn forget_range(&self, offset: u64, len: u64) {
        if len > 0 {
            let mut pages = self.pages();
            let last = (offset.saturating_add(len) - 1) / outlive_machine::CHUNK;
            let last = last.min((pages.sums.len() as u64).saturating_sub(1));
            (offset / outlive_machine::CHUNK..=last).for_each(|chunk| pages.known.remove(chunk));
        }
    }

    /// Forgets these chunks.
    pub(crate) fn forget_all_of(&self, chunks: &ChunkSet) {
        let mut pages = self.pages();
        chunks.iter().for_each(|chunk| pages.known.remove(chunk));
    }

    /// Forgets everything.
    pub(crate) fn forget_everything(&self) {
        self.pages().known.clear();
    }

    /// How many chunks are known.
    #[cfg(test)]
    pub(crate) fn known(&self) -> u64 {
        self.pages().known.count()
    }

    /// The book in the hands of the next owner: nothing that earlier ones note counts any more.
    fn next_owner(&self) -> Self {
        let mut pages = self.pages();
        pages.owner += 1;
        Self { pages: self.pages.clone(), owner: pages.owner }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of a file changes when somebody writes to it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seal([i64; 4], [u64; 3]);

impl Seal {
    /// `None` if the file cannot be sealed.
    fn of(about: &Metadata) -> Option<Self> {
        let times = [about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec()];
        about.is_file().then(|| Self(times, [about.dev(), about.ino(), about.len()]))
    }
}

#[derive(Debug)]
struct Shelved {
    book: Book,
    /// Set while nobody has the image.
    seal: Option<Seal>,
}

/// The books of this process, by the paths of their images. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Books(Arc<Mutex<HashMap<PathBuf, Shelved>>>);

impl Books {
    /// Opens the book of an image that this process has just opened and locked. It is empty unless it is known
    /// that nobody has written to the image since the book was closed.
    pub(crate) fn open(&self, path: &Path, file: &File, bytes: u64) -> Book {
        let Ok(about) = file.metadata() else { return Book::none() };
        let Some(seal) = Seal::of(&about) else { return Book::none() };
        let mut shelf = self.shelf();
        let others: u64 = shelf.iter().filter(|(other, _)| *other != path).map(|(_, it)| it.book.len()).sum();
        let known = shelf.get(path).filter(|it| it.seal.as_ref() == Some(&seal));
        let book = match known {
            Some(shelved) => shelved.book.next_owner(),
            None => Book::new(bytes, MOST.saturating_sub(others)),
        };
        shelf.insert(path.to_path_buf(), Shelved { book: book.clone(), seal: None });
        book
    }

    /// The open book of an image, in the hands of a new owner; or an empty one. For a machine that runs on the
    /// image, and has perhaps got it from the standby of this process.
    pub(crate) fn opened(&self, path: &Path, file: &File, bytes: u64) -> Book {
        if let Some(shelved) = self.shelf().get_mut(path).filter(|it| it.seal.is_none()) {
            shelved.book = shelved.book.next_owner();
            return shelved.book.clone();
        }
        self.open(path, file, bytes)
    }

    /// Closes all books: this process has let go of its images, and no write of its own is under way any more.
    pub(crate) fn close(&self) {
        for (path, shelved) in self.shelf().iter_mut().filter(|(_, shelved)| shelved.seal.is_none()) {
            // Nothing that is still on its way counts.
            shelved.book = shelved.book.next_owner();
            shelved.seal = std::fs::metadata(path).ok().as_ref().and_then(Seal::of);
            if shelved.seal.is_none() {
                shelved.book = Book::none();
            }
        }
    }

    fn shelf(&self) -> MutexGuard<'_, HashMap<PathBuf, Shelved>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn len(&self) -> u64 {
        self.pages().sums.len() as u64
    }
}
