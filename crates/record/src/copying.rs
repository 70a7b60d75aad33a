//! Copies memory and disks into a base, beside the commits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Weak;
use std::time::{Duration, Instant};

use outlive_epoch::{Layout, PAGE_SIZE, is_zero};

use crate::places::{RunPlaces, create};
use crate::source::{Settled, Source};

/// Bytes that are read and written at once.
const STEP: usize = 256 << 10;
const STEP_PAGES: usize = STEP / PAGE_SIZE;
/// What was written is made durable in pieces of so many bytes: the log is on the same disk, and one large piece would keep
/// it waiting for as long as that takes.
const SYNC_BYTES: u64 = 8 << 20;
/// A copy rests as long as its last piece has taken, so that it takes half of a disk's time; no longer than this.
const LONGEST_REST: Duration = Duration::from_millis(500);
/// Time between two questions whether the images are settled, or the run is over.
const ASK: Duration = Duration::from_millis(10);
/// Pages of which the source knows together whether they were touched.
const SPAN: u64 = 64;

/// Why there is no base.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// The run has ended.
    #[error("the run has ended")]
    Over,
    /// The images will not have what was committed before.
    #[error("the standby's disks have failed")]
    Disks,
    /// An image cannot be read.
    #[error("disk {disk} cannot be read: {source}")]
    Read { disk: usize, source: io::Error },
    /// The base cannot be written.
    #[error("the base cannot be written: {0}")]
    Write(#[source] io::Error),
}

/// Copies everything. It is not durable yet when this returns, and nothing of the source is held or looked at any more.
///
/// # Errors
/// See [`CopyError`].
pub(crate) fn copy(
    places: &RunPlaces,
    layout: &Layout,
    source: &Weak<dyn Source>,
    goes_on: &dyn Fn() -> bool,
) -> Result<Vec<File>, CopyError> {
    let mut files = vec![copy_memory(places, layout, source, goes_on)?];
    let disks = loop {
        {
            let source = source.upgrade().ok_or(CopyError::Over)?;
            match source.settled() {
                Settled::Yes => break source.disks(),
                Settled::Never => return Err(CopyError::Disks),
                Settled::NotYet => {}
            }
        }
        if !goes_on() {
            return Err(CopyError::Over);
        }
        std::thread::sleep(ASK);
    };
    for (disk, bytes) in disks.into_iter().enumerate() {
        if let Some(bytes) = bytes {
            files.push(copy_disk(places, (disk, bytes), source, goes_on)?);
        }
    }
    Ok(files)
}

fn copy_memory(
    places: &RunPlaces,
    layout: &Layout,
    source: &Weak<dyn Source>,
    goes_on: &dyn Fn() -> bool,
) -> Result<File, CopyError> {
    let mut to = Target::create(&places.memory(), layout.pages() * PAGE_SIZE as u64, goes_on)?;
    let mut bytes = Vec::with_capacity(STEP);
    for range in layout.ranges() {
        let end = range.start + range.pages;
        for span in (range.start..end).step_by(SPAN as usize) {
            let touched = source.upgrade().ok_or(CopyError::Over)?.touched(span);
            let wanted = (span..end.min(span + SPAN)).filter(|gfn| touched >> (gfn - span) & 1 == 1);
            for gfns in wanted.collect::<Vec<_>>().chunks(STEP_PAGES) {
                let index = read_pages(layout, source, gfns, &mut bytes)?;
                for (index, page) in index.iter().zip(bytes.chunks(PAGE_SIZE)) {
                    to.write(page, index * PAGE_SIZE as u64)?;
                }
            }
            to.rest_if_due()?;
        }
    }
    to.rest()?;
    Ok(to.file)
}

/// Reads pages, and returns the places of those that are not zero.
fn read_pages(
    layout: &Layout,
    source: &Weak<dyn Source>,
    gfns: &[u64],
    bytes: &mut Vec<u8>,
) -> Result<Vec<u64>, CopyError> {
    let source = source.upgrade().ok_or(CopyError::Over)?;
    let (mut indices, mut page) = (Vec::with_capacity(gfns.len()), [0; PAGE_SIZE]);
    bytes.clear();
    for gfn in gfns {
        if let Some(index) = layout.index(*gfn)
            && source.read_page(*gfn, &mut page)
            && !is_zero(&page)
        {
            indices.push(index);
            bytes.extend_from_slice(&page);
        }
    }
    Ok(indices)
}

fn copy_disk(
    places: &RunPlaces,
    (disk, bytes): (usize, u64),
    source: &Weak<dyn Source>,
    goes_on: &dyn Fn() -> bool,
) -> Result<File, CopyError> {
    let unread = |source| CopyError::Read { disk, source };
    let mut to = Target::create(&places.disk(disk), bytes, goes_on)?;
    let mut buffer = vec![0; STEP];
    let mut from = 0;
    loop {
        let (at, piece) = {
            let source = source.upgrade().ok_or(CopyError::Over)?;
            let next = source.next_data(disk, from).map_err(unread)?;
            let Some(at) = next.filter(|at| *at < bytes) else { break };
            // In whole steps, so that zeroes in a piece are seen in the same places every time.
            let end = bytes.min((at / STEP as u64 + 1) * STEP as u64);
            let piece = &mut buffer[..(end - at) as usize];
            source.read_disk(disk, piece, at).map_err(unread)?;
            (at, &*piece)
        };
        for (block, offset) in piece.chunks(PAGE_SIZE).zip((at..).step_by(PAGE_SIZE)) {
            if !is_zero(block) {
                to.write(block, offset)?;
            }
        }
        from = at + piece.len() as u64;
        to.rest_if_due()?;
    }
    to.rest()?;
    Ok(to.file)
}

/// A file of the base, which is written with rests.
struct Target<'a> {
    file: File,
    /// Bytes that are not durable yet.
    wet: u64,
    /// When the last rest was over.
    rested: Instant,
    goes_on: &'a dyn Fn() -> bool,
}

impl<'a> Target<'a> {
    fn create(path: &std::path::Path, bytes: u64, goes_on: &'a dyn Fn() -> bool) -> Result<Self, CopyError> {
        let file = create(path).and_then(|file| file.set_len(bytes).map(|()| file));
        Ok(Self { file: file.map_err(CopyError::Write)?, wet: 0, rested: Instant::now(), goes_on })
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> Result<(), CopyError> {
        self.wet += bytes.len() as u64;
        self.file.write_all_at(bytes, at).map_err(CopyError::Write)
    }

    /// Rests behind a piece.
    fn rest_if_due(&mut self) -> Result<(), CopyError> {
        if self.wet >= SYNC_BYTES || self.rested.elapsed() >= LONGEST_REST { self.rest() } else { Ok(()) }
    }

    fn rest(&mut self) -> Result<(), CopyError> {
        if std::mem::take(&mut self.wet) > 0 {
            self.file.sync_data().map_err(CopyError::Write)?;
        }
        let until = Instant::now() + self.rested.elapsed().min(LONGEST_REST);
        loop {
            if !(self.goes_on)() {
                return Err(CopyError::Over);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(ASK));
        }
        self.rested = Instant::now();
        Ok(())
    }
}
