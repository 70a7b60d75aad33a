//! The book against the image itself: whatever is done in whatever order, what is known is so.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use outlive_machine::{CHUNK, ChunkSet};

use crate::disk::image::{ChunkReader, Sum};
use crate::disk::{Book, Books};

const CHUNKS: u64 = 12;
const BYTES: u64 = CHUNKS * CHUNK - 1000;

/// Mistakes that the test must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// Writes that are under way at the end of a machine are left out.
    InFlight,
    /// What the machine has touched is not taken when a synchronisation begins.
    Touched,
    /// A commit is not forgotten when it comes.
    Commit,
    /// A reader that lags behind still notes what it has read.
    Late,
}

/// A write that has reached the disk in part.
struct UnderWay {
    at: u64,
    data: Vec<u8>,
}

/// Who has the image.
enum Owner {
    Nobody,
    /// A standby's copy, with its commits that have not reached the image.
    Standby(Book, Vec<(u64, Vec<u8>)>),
    Machine(Vec<UnderWay>),
}

struct World {
    rng: fastrand::Rng,
    bug: Option<Bug>,
    folder: tempfile::TempDir,
    file: File,
    books: Books,
    owner: Owner,
    touched: ChunkSet,
    /// Books of synchronisations, the last of which may go on, and what they have read and not yet noted.
    readers: Vec<Book>,
    read: Vec<(usize, u64, Sum)>,
    /// How often something was known when it was of use.
    useful: u64,
}

impl World {
    fn new(seed: u64, bug: Option<Bug>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(folder.path().join("image"));
        let file = file.unwrap();
        file.set_len(BYTES).unwrap();
        let (rng, books, owner) = (fastrand::Rng::with_seed(seed), Books::default(), Owner::Nobody);
        let touched = ChunkSet::for_disk(BYTES);
        let (readers, read) = (Vec::new(), Vec::new());
        Self { rng, bug, folder, file, books, owner, touched, readers, read, useful: 0 }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    fn sum(&self, chunk: u64) -> Sum {
        ChunkReader::new(&self.file, BYTES).sum(chunk, &mut vec![0; CHUNK as usize]).unwrap()
    }

    /// A range and its data: often the same few chunks.
    fn some_write(&mut self) -> (u64, Vec<u8>) {
        let len = 1 + self.rng.usize(0..100_000);
        let at = self.rng.u64(0..BYTES - len as u64);
        (at, vec![self.rng.u8(1..); len])
    }

    /// Every known sum is that of the image, except where a write is under way.
    fn check(&mut self, book: &Book, under_way: &ChunkSet) -> Result<(), String> {
        for chunk in (0..CHUNKS).filter(|chunk| !under_way.contains(*chunk)) {
            if let Some(sum) = book.sum(chunk) {
                self.useful += 1;
                if sum != self.sum(chunk) {
                    return Err(format!("chunk {chunk} is not what the book says"));
                }
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.owner, Owner::Nobody) {
            Owner::Nobody => self.free(),
            Owner::Standby(book, commits) => self.standby(book, commits),
            Owner::Machine(under_way) => self.machine(under_way),
        }
    }

    fn free(&mut self) -> Result<(), String> {
        match self.rng.u8(0..8) {
            // Somebody else writes. Times have the resolution of the system's clock, so they are set.
            0 => {
                let (at, data) = self.some_write();
                self.file.write_all_at(&data, at).unwrap();
                let later = SystemTime::now() + Duration::from_secs(self.rng.u64(1..1 << 30));
                self.file.set_modified(later).unwrap();
                Ok(())
            }
            1..4 => {
                self.owner = Owner::Machine(Vec::new());
                self.touched.clear();
                let path = self.path();
                drop(self.books.open(&path, &self.file, BYTES));
                Ok(())
            }
            _ => {
                let path = self.path();
                let book = self.books.open(&path, &self.file, BYTES);
                self.owner = Owner::Standby(book, Vec::new());
                Ok(())
            }
        }
    }

    fn standby(&mut self, book: Book, mut commits: Vec<(u64, Vec<u8>)>) -> Result<(), String> {
        let (at, data) = self.some_write();
        match self.rng.u8(0..10) {
            0..3 if commits.is_empty() => {
                self.check(&book, &ChunkSet::for_disk(BYTES))?;
                (0..CHUNKS).for_each(|chunk| book.note(chunk, self.sum(chunk)));
            }
            3..5 if commits.is_empty() => {
                book.forget_range(at, data.len() as u64);
                self.file.write_all_at(&data, at).unwrap();
            }
            5..8 => {
                if !self.has(Bug::Commit) {
                    book.forget_range(at, data.len() as u64);
                }
                commits.push((at, data));
            }
            8 => {
                self.apply(&mut commits);
                self.books.close();
                return Ok(());
            }
            9 => {
                self.apply(&mut commits);
                // The takeover.
                self.touched.clear();
                self.owner = Owner::Machine(Vec::new());
                return Ok(());
            }
            _ => {}
        }
        self.owner = Owner::Standby(book, commits);
        Ok(())
    }

    fn apply(&mut self, commits: &mut Vec<(u64, Vec<u8>)>) {
        commits.drain(..).for_each(|(at, data)| self.file.write_all_at(&data, at).unwrap());
    }

    fn machine(&mut self, mut under_way: Vec<UnderWay>) -> Result<(), String> {
        match self.rng.u8(0..12) {
            0..3 => {
                let (at, data) = self.some_write();
                let begun = self.rng.usize(0..=data.len());
                self.file.write_all_at(&data[..begun], at).unwrap();
                under_way.push(UnderWay { at, data });
            }
            3..6 => {
                for UnderWay { at, data } in under_way.drain(..) {
                    self.file.write_all_at(&data, at).unwrap();
                    self.touched.insert_bytes(at, data.len() as u64);
                }
            }
            6..8 => {
                let path = self.path();
                let book = self.books.opened(&path, &self.file, BYTES);
                let touched = std::mem::replace(&mut self.touched, ChunkSet::for_disk(BYTES));
                if !self.has(Bug::Touched) {
                    book.forget_all_of(&touched);
                }
                self.check(&book, &chunks_of(&under_way))?;
                self.readers.push(book);
            }
            8..11 if !self.readers.is_empty() => {
                // One of the readers, perhaps of an earlier synchronisation, reads or notes.
                let lately = self.readers.len().saturating_sub(2);
                let reader = self.rng.usize(lately..self.readers.len());
                if self.rng.bool() {
                    let chunk = self.rng.u64(0..CHUNKS);
                    self.read.push((reader, chunk, self.sum(chunk)));
                } else if let Some((reader, chunk, sum)) = self.read.pop() {
                    let reader = if self.has(Bug::Late) { self.readers.len() - 1 } else { reader };
                    self.readers[reader].note(chunk, sum);
                }
            }
            11 => {
                let path = self.path();
                let book = self.books.opened(&path, &self.file, BYTES);
                book.forget_all_of(&self.touched);
                if !self.has(Bug::InFlight) {
                    book.forget_all_of(&chunks_of(&under_way));
                }
                // The engine ends.
                for UnderWay { at, data } in under_way {
                    self.file.write_all_at(&data, at).unwrap();
                }
                self.books.close();
                return Ok(());
            }
            _ => {}
        }
        self.owner = Owner::Machine(under_way);
        Ok(())
    }
}

fn chunks_of(under_way: &[UnderWay]) -> ChunkSet {
    let mut chunks = ChunkSet::for_disk(BYTES);
    under_way.iter().for_each(|it| chunks.insert_bytes(it.at, it.data.len() as u64));
    chunks
}

/// Runs a schedule. Returns how often something was known when it was of use.
fn run(seed: u64, bug: Option<Bug>) -> Result<u64, String> {
    let mut world = World::new(seed, bug);
    for _ in 0..250 {
        world.step()?;
    }
    Ok(world.useful)
}

#[test]
fn what_a_book_knows_is_so() {
    let useful: u64 =
        (0..120).map(|seed| run(seed, None).unwrap_or_else(|why| panic!("seed {seed}: {why}"))).sum();
    assert!(useful > 10_000, "the book was of use {useful} times only");
}

#[test]
fn every_mistake_with_a_book_is_found() {
    for bug in [Bug::InFlight, Bug::Touched, Bug::Commit, Bug::Late] {
        assert!((0..400).any(|seed| run(seed, Some(bug)).is_err()), "{bug:?} is not found");
    }
}

#[test]
fn a_book_has_a_limit_and_block_devices_have_none() {
    let folder = tempfile::tempdir().unwrap();
    let (books, path) = (Books::default(), folder.path().join("large"));
    let file = File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let book = books.open(&path, &file, 1 << 40);
    let last = (4 << 20) - 1;
    for chunk in [0, last, last + 1, u64::MAX] {
        book.note(chunk, [1; 32]);
    }
    assert_eq!((book.known(), book.sum(last), book.sum(last + 1)), (2, Some([1; 32]), None));
    book.forget_range(0, u64::MAX);
    assert_eq!(book.known(), 0);
    let null = books.open("/dev/null".as_ref(), &File::open("/dev/null").unwrap(), 1 << 20);
    null.note(0, [1; 32]);
    assert_eq!(null.known(), 0);
}
