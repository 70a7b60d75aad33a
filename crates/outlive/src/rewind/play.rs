//! From a record to memory, disks and state as of one checkpoint.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use outlive_dirty::Gfn;
use outlive_epoch::{Checkpoint, Layout, StateKind, is_zero};
use outlive_machine::state::StateError;
use outlive_machine::{CheckError, DiskHash, Hashes, PAGE_SIZE, Ram};
use outlive_record::{PlayError, Playback};

use crate::disk::{Store, apply, hash_contents};
use crate::vm::limits::ACCEPTED_STATE_BYTES;
use crate::vm::{LastState, write_pages};

/// Bytes of the base's memory that are read at a time.
const STEP: usize = 1 << 20;

/// Why a moment cannot be played.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlayingError {
    /// The record.
    #[error(transparent)]
    Play(#[from] PlayError),
    /// The base.
    #[error("cannot read the record's memory: {0}")]
    Memory(#[source] io::Error),
    /// A page has no place. The record checks every page, so this is an error in this program.
    #[error("the record has page {0:#x}, which is not of the VM's memory")]
    Page(u64),
    /// A disk has no copy.
    #[error("the record writes to disk {0}, of which it has no copy")]
    NoDisk(u16),
    /// An image.
    #[error("cannot write disk {disk}: {source}; what was written is removed")]
    Write { disk: u16, source: io::Error },
    /// The VM's own hashes cannot be read.
    #[error("the record has hashes of the VM that cannot be read: {0}")]
    Hashes(#[from] StateError),
    /// It is not what the VM was.
    #[error(
        "{0}: do not use this part of the record, and look at the storage and the memory of the host that wrote it"
    )]
    Differs(#[from] CheckError),
    /// The same of a disk.
    #[error(
        "disk {0} differs from the VM's as it was: do not use this part of the record, and look at the storage and the \
         memory of the host that wrote it"
    )]
    DiskDiffers(u16),
    /// Nobody wants it any more.
    #[error("told to stop")]
    Stopped,
}

/// Fills memory, in which nothing is yet, with the base's.
///
/// # Errors
/// See [`PlayingError`].
pub(super) fn fill(
    ram: &Ram,
    layout: &Layout,
    base: &File,
    goes_on: &dyn Fn() -> bool,
) -> Result<(), PlayingError> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let (mut first, mut buffer) = (0, vec![0; STEP]);
    for range in layout.ranges() {
        let end = (first + range.pages) * PAGE;
        let mut at = first * PAGE;
        while let Some(data) = base.next_data(at).map_err(PlayingError::Memory)?.filter(|data| *data < end) {
            if !goes_on() {
                return Err(PlayingError::Stopped);
            }
            // Holes may begin within a page where blocks are small.
            at = data / PAGE * PAGE;
            let piece = &mut buffer[..(end - at).min(STEP as u64) as usize];
            base.read_exact_at(piece, at).map_err(PlayingError::Memory)?;
            for page in piece.as_chunks::<PAGE_SIZE>().0 {
                let gfn = range.start + at / PAGE - first;
                if !is_zero(page) && !ram.write_page(Gfn(gfn), page) {
                    return Err(PlayingError::Page(gfn));
                }
                at += PAGE;
            }
        }
        first += range.pages;
    }
    Ok(())
}

/// What of the VM follows its checkpoints.
pub(super) struct Moving<'a> {
    ram: &'a Ram,
    disks: &'a [File],
    /// The state of the last one.
    pub(super) state: LastState,
    /// What the primary has said of the last one, if it was a self-check (`--self-check`).
    hashes: Option<Hashes>,
}

impl<'a> Moving<'a> {
    /// With memory and images as the base has them.
    pub(super) fn new(ram: &'a Ram, disks: &'a [File], max_state_bytes: u32) -> Self {
        let state = LastState::new(max_state_bytes.min(ACCEPTED_STATE_BYTES) as usize);
        Self { ram, disks, state, hashes: None }
    }

    /// Plays everything through the checkpoint that was asked for.
    ///
    /// # Errors
    /// See [`PlayingError`].
    pub(super) fn play(
        &mut self,
        playback: &mut Playback,
        goes_on: &dyn Fn() -> bool,
        show: &dyn Fn(u64),
    ) -> Result<(), PlayingError> {
        playback.each(|incoming| {
            if !goes_on() {
                return Err(PlayingError::Stopped);
            }
            let Some(checkpoint) = incoming.checkpoint() else { return Ok(()) };
            self.follow(&checkpoint)?;
            show(checkpoint.number());
            Ok(())
        })?;
        self.hashes.take().map_or(Ok(()), |hashes| self.compare(&hashes, goes_on))
    }

    /// Compares what was played with the VM as its primary had it.
    fn compare(&self, hashes: &Hashes, goes_on: &dyn Fn() -> bool) -> Result<(), PlayingError> {
        hashes.compare_memory(self.ram)?;
        for &DiskHash { disk, hash } in &hashes.disks {
            let image = self.disks.get(usize::from(disk)).ok_or(PlayingError::NoDisk(disk))?;
            let failed = |source| PlayingError::Write { disk, source };
            let bytes = image.bytes().map_err(failed)?;
            match hash_contents(image, bytes, goes_on).map_err(failed)? {
                None => return Err(PlayingError::Stopped),
                Some(here) if here == hash => {}
                Some(_) => return Err(PlayingError::DiskDiffers(disk)),
            }
        }
        tracing::info!("self-check: memory and disks are the VM's as they were");
        Ok(())
    }

    fn follow(&mut self, checkpoint: &Checkpoint<'_>) -> Result<(), PlayingError> {
        write_pages(self.ram, checkpoint.pages()).map_err(PlayingError::Page)?;
        for record in checkpoint.disk_writes().iter() {
            let disk = record.disk;
            let image = self.disks.get(usize::from(disk)).ok_or(PlayingError::NoDisk(disk))?;
            apply(image, &record).map_err(|source| PlayingError::Write { disk, source })?;
        }
        self.state.follow(checkpoint);
        let hashes = checkpoint.state().find(StateKind::Check, 0);
        self.hashes = hashes.map(|section| Hashes::decode(section.bytes)).transpose()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
