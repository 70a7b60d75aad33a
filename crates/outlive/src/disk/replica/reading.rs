//! The thread that reads images for the audit, so that the disks' thread never waits for a read.
//!
//! It does one read after another and knows nothing of checkpoints. What a read is worth, the disks' thread decides,
//! which knows what it has written meanwhile: `compare.rs`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use outlive_epoch::ChunkRange;

use super::queue::Queue;
use crate::audit::thread_time;
use crate::disk::image::{ChunkReader, Store};

/// An image to read, and how many bytes of it are the disk.
pub(crate) struct Source<S> {
    pub(crate) store: S,
    pub(crate) bytes: u64,
}

impl Source<File> {
    /// The image once more, for reading only. Whoever has the image locked has done so with his own descriptor, and this
    /// one is not his: a read that hangs keeps nobody from the image who comes next.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn of(image: &File, bytes: u64) -> io::Result<Self> {
        let again = File::open(format!("/proc/self/fd/{}", image.as_raw_fd()));
        Ok(Self { store: again.or_else(|_| image.try_clone())?, bytes })
    }
}

/// What is to be read.
pub(super) struct Order {
    /// Comes back with what was read.
    pub(super) ticket: u64,
    /// The first of them, or several if they are in a hole.
    pub(super) chunks: ChunkRange,
    /// Room for a chunk.
    pub(super) buffer: Vec<u8>,
}

/// What was read.
pub(super) struct Read {
    pub(super) ticket: u64,
    pub(super) found: io::Result<Found>,
    /// The first chunk, if it is [`Found::Data`].
    pub(super) buffer: Vec<u8>,
    /// How long the disk took for that.
    pub(super) took: Duration,
    /// How long that took a core.
    pub(super) spent: Duration,
}

/// What the image has there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// So many chunks are in a hole, the first ones.
    Hole(u32),
    /// One chunk of data.
    Data,
}

/// Reads until nobody gives orders any more. A read that never ends costs this thread and nothing else.
pub(super) fn run<S: Store>(sources: &[Option<Source<S>>], orders: &Receiver<Order>, queue: &Queue) {
    for order in orders {
        queue.read(read(sources, order));
    }
}

fn read<S: Store>(sources: &[Option<Source<S>>], order: Order) -> Read {
    let Order { ticket, chunks, mut buffer } = order;
    let began = thread_time();
    let mut took = Duration::ZERO;
    let source = sources.get(usize::from(chunks.disk)).and_then(Option::as_ref);
    let found = source
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        .and_then(|source| look(source, chunks, &mut buffer, &mut took));
    Read { ticket, found, buffer, took, spent: thread_time().saturating_sub(began) }
}

fn look<S: Store>(
    source: &Source<S>,
    chunks: ChunkRange,
    buffer: &mut [u8],
    took: &mut Duration,
) -> io::Result<Found> {
    // A new one each time: what was a hole at the last read may be none.
    let mut reader = ChunkReader::new(&source.store, source.bytes);
    let mut holes = 0;
    while holes < chunks.count && reader.is_hole(chunks.first + u64::from(holes))? {
        holes += 1;
    }
    if holes > 0 {
        return Ok(Found::Hole(holes));
    }
    let (offset, len) = reader.range(chunks.first);
    let began = Instant::now();
    let result = source.store.read(&mut buffer[..len], offset);
    *took = began.elapsed();
    result.map(|()| Found::Data)
}

#[cfg(test)]
mod tests {
    use std::fs::TryLockError;

    use outlive_epoch::DISK_CHUNK;

    use super::*;

    #[test]
    fn the_first_chunks_are_a_hole_or_the_first_one_is_data() {
        let file = tempfile::tempfile().unwrap();
        let bytes = 5 * DISK_CHUNK as u64 + 700;
        file.set_len(bytes).unwrap();
        file.write(&[7; 300], 2 * DISK_CHUNK as u64 + 5).unwrap();
        file.write(&[8; 700], 5 * DISK_CHUNK as u64).unwrap();
        let sources = [None, Some(Source { store: file, bytes })];
        let order = |disk, first, count| {
            let order =
                Order { ticket: 9, chunks: ChunkRange { disk, first, count }, buffer: vec![0; DISK_CHUNK] };
            read(&sources, order)
        };
        let found = |first, count| order(1, first, count).found.unwrap();
        assert_eq!((found(0, 2), found(0, 1), found(0, 5)), (Found::Hole(2), Found::Hole(1), Found::Hole(2)));
        assert_eq!((found(2, 3), found(3, 3), found(5, 1)), (Found::Data, Found::Hole(2), Found::Data));
        let read = order(1, 2, 1);
        assert_eq!((read.ticket, read.buffer.len(), read.buffer[5..305] == [7; 300]), (9, DISK_CHUNK, true));
        assert!(order(1, 5, 1).buffer.starts_with(&[8; 700]));
        assert!(order(0, 0, 1).found.is_err() && order(2, 0, 1).found.is_err());
    }

    /// A read that hangs outlives the copy, and the next copy must have the image.
    #[test]
    fn an_image_that_is_read_is_not_locked_by_that() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = File::create_new(&path).unwrap();
        file.lock().unwrap();
        let source = Source::of(&file, 0).unwrap();
        let other = File::open(&path).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(file);
        other.try_lock().unwrap();
        drop(source);
    }
}
