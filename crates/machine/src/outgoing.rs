//! The buffer that holds a checkpoint between the guest and the link.

// UNSAFETY: the page buffer is our own mapping, which several threads fill through its address.
#![allow(unsafe_code)]

use outlive_dirty::{Comparison, Gfn};
use outlive_epoch::image::limits::{MAX_STATE_BYTES, MAX_STATE_SECTIONS};
use outlive_epoch::image::{RecordBuf, StateBuf, StateKind, StateSection, StateVersions};

use crate::memory::{PAGE_SIZE, keep_out_of_dumps};

/// Why staging could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot reserve {bytes} bytes of staging: {source}")]
pub struct OutgoingError {
    bytes: usize,
    source: std::io::Error,
}

/// The pages and the state of one checkpoint, or of a part of one that has more pages than fit.
///
/// Everything is allocated and populated when protection starts; filling the buffer allocates nothing
/// (invariant 5).
pub struct Outgoing {
    pages: *mut u8,
    capacity: usize,
    gfns: Vec<Gfn>,
    state: StateBuf,
    versions: StateVersions,
    disk: RecordBuf,
    /// The list of hot pages, which is told of those that have not changed.
    hot: Option<Hot>,
}

struct Hot {
    comparison: Comparison,
    /// The first hot page of the checkpoint, as a place in its whole list of pages.
    first: usize,
    /// Where this buffer's pages begin in that list.
    begin: usize,
}

// SAFETY: the mapping belongs to this object alone; `&Outgoing` only reads it.
unsafe impl Send for Outgoing {}
// SAFETY: as above.
unsafe impl Sync for Outgoing {}

impl Outgoing {
    /// Allocates and populates room for `capacity` pages and `disk_bytes` of writes to disks.
    ///
    /// # Errors
    /// [`OutgoingError`] when the host does not have that much memory.
    pub fn new(capacity: usize, disk_bytes: usize) -> Result<Self, OutgoingError> {
        let capacity = capacity.max(1);
        let bytes = capacity * PAGE_SIZE;
        // SAFETY: a new anonymous mapping. It is populated now, so that no page fault happens in a pause.
        let pages = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if pages == libc::MAP_FAILED {
            return Err(OutgoingError { bytes, source: std::io::Error::last_os_error() });
        }
        keep_out_of_dumps(pages.cast(), bytes);
        Ok(Self {
            pages: pages.cast(),
            capacity,
            gfns: Vec::with_capacity(capacity),
            state: StateBuf::populated(MAX_STATE_BYTES, MAX_STATE_SECTIONS),
            versions: StateVersions::NEWEST,
            disk: RecordBuf::with_capacity(disk_bytes),
            hot: None,
        })
    }

    /// How many pages fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The frame numbers of the pages in [`page_bytes`](Self::page_bytes), in the same order.
    pub fn gfns(&self) -> &[Gfn] {
        &self.gfns
    }

    /// The pages, 4096 bytes each, one after the other.
    pub fn page_bytes(&self) -> &[u8] {
        // SAFETY: `fill` wrote gfns.len() <= capacity pages; the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.pages, self.gfns.len() * PAGE_SIZE) }
    }

    /// [`gfns`](Self::gfns) and [`page_bytes`](Self::page_bytes), for a caller that writes the pages down in
    /// place: what is there afterwards is the caller's business.
    pub fn pages_mut(&mut self) -> (&[Gfn], &mut [u8]) {
        // SAFETY: as in `page_bytes`; nobody else has this buffer.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.pages, self.gfns.len() * PAGE_SIZE) };
        (&self.gfns, bytes)
    }

    /// The state sections; empty for a part that only carries pages.
    pub fn state(&self) -> &StateBuf {
        &self.state
    }

    /// The records of the guest's disk writes in the epoch.
    pub fn disk_writes(&self) -> &RecordBuf {
        &self.disk
    }

    /// The same buffer, to swap with the log's.
    pub fn disk_writes_mut(&mut self) -> &mut RecordBuf {
        &mut self.disk
    }

    /// Says that the page at this place of [`gfns`](Self::gfns) is unchanged since it was last sent. A hot
    /// page is captured in every checkpoint because it is written so often; one that stays unchanged will be
    /// captured only when it is written again. Any thread may call this at any time.
    pub fn unchanged(&self, place: usize) {
        if let (Some(hot), Some(gfn)) = (&self.hot, self.gfns.get(place))
            && let Some(place) = (hot.begin + place).checked_sub(hot.first)
        {
            hot.comparison.unchanged(place, *gfn);
        }
    }

    /// `comparison` is the list of hot pages, and where those begin in the checkpoint's list of all pages.
    /// This buffer has the pages from `begin` on.
    pub(crate) fn compare_with(&mut self, comparison: Option<(Comparison, usize)>, begin: usize) {
        self.hot = comparison.map(|(comparison, first)| Hot { comparison, first, begin });
    }

    pub(crate) fn clear_state(&mut self) {
        self.state.clear();
    }

    /// Forgets the state. State that is pushed next is in these versions.
    pub(crate) fn begin_state(&mut self, versions: StateVersions) {
        self.state.clear();
        self.versions = versions;
    }

    pub(crate) fn push_section(&mut self, kind: StateKind, index: u16, bytes: &[u8]) {
        self.state.push(StateSection { kind, version: self.versions.of(kind), index, bytes });
    }

    /// Sets the pages to `gfns` (at most [`capacity`](Self::capacity)) and lets `copy` write them.
    ///
    /// # Errors
    /// The error of `copy`; there are no pages then.
    pub(crate) fn fill<E>(
        &mut self,
        gfns: &[Gfn],
        copy: impl FnOnce(&[Gfn], *mut u8) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(gfns.len() <= self.capacity, "more pages than staging has room for");
        // `copy` must have written every page before they can be seen, so the list comes after it.
        self.gfns.clear();
        copy(gfns, self.pages)?;
        self.gfns.extend_from_slice(gfns);
        Ok(())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`.
        unsafe { libc::munmap(self.pages.cast(), self.capacity * PAGE_SIZE) };
    }
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing")
            .field("capacity", &self.capacity)
            .field("pages", &self.gfns.len())
            .field("state_bytes", &self.state.len())
            .finish()
    }
}
