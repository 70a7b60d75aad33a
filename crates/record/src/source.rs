//! What a base is copied from.

use std::io;

use outlive_epoch::PAGE_SIZE;

/// Whether what was committed before a run is in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It is.
    Yes,
    /// It is on its way there.
    NotYet,
    /// It will not be: the disks have failed, or are gone.
    Never,
}

/// The VM's copy at a standby: its memory, in which everything is that was committed before the run, and its images. Commits
/// write to both while they are read.
///
/// The session keeps the only lasting reference. The thread that copies has one for the time of a read, and holds nothing
/// while it writes: so the next copy of the VM gets memory and images at once, whatever the record's disk does.
pub trait Source: Send + Sync {
    /// Which of the 64 pages from this frame on may be other than zero; bit 0 is the first. A page that a later commit
    /// writes need not be among them.
    fn touched(&self, first: u64) -> u64;

    /// Copies a page; false if there is none. What is being written meanwhile may be old, new or a mixture.
    fn read_page(&self, gfn: u64, to: &mut [u8; PAGE_SIZE]) -> bool;

    /// Whether the images have what was committed before the run. The disks may be looked at after that. Does not wait.
    fn settled(&self) -> Settled;

    /// The length of each of the VM's disks in bytes; `None` for one that has no image of its own here.
    fn disks(&self) -> Vec<Option<u64>>;

    /// Where the next data of a disk is, from this byte on; `None` if there is none.
    ///
    /// # Errors
    /// The operating system's.
    fn next_data(&self, disk: usize, from: u64) -> io::Result<Option<u64>>;

    /// Fills `to` with the bytes at this place of a disk, which are within it.
    ///
    /// # Errors
    /// The operating system's.
    fn read_disk(&self, disk: usize, to: &mut [u8], at: u64) -> io::Result<()>;
}
