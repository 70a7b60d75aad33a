//! The end of an epoch as a typestate: each step is possible only after the one before it.
// UNSAFETY: lends the list of the epoch as a slice; the types below are what keeps it unchanged meanwhile.
#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

use crate::hot::Comparison;
use crate::layout::Gfn;
use crate::source::{HarvestError, RearmError};
use crate::tracker::{Token, Tracker};

/// The vCPUs are out of KVM_RUN and devices do not write memory.
#[derive(Debug)]
pub enum Stopped {}
/// The state of vCPUs and devices has been read. Reading it can make KVM write guest memory, so it comes
/// before the harvest.
#[derive(Debug)]
pub enum StateSaved {}
/// The dirty pages are known.
#[derive(Debug)]
pub enum Harvested {}
/// The next write to each of them will be caught, so their contents may be read.
#[derive(Debug)]
pub enum Rearmed {}
/// The pages have been read.
#[derive(Debug)]
pub enum Copied {}

/// An epoch that is ending, in the state `S`. One exists at a time.
///
/// Dropping it before [`Epoch::run`] loses nothing: the pages taken so far are part of the next epoch.
///
/// ```no_run
/// # fn end(tracker: &outlive_dirty::Tracker, mut copy: impl FnMut(outlive_dirty::Gfn))
/// # -> Result<(), Box<dyn std::error::Error>> {
/// let epoch = tracker.stopped();
/// // ... read the state of vCPUs and devices ...
/// let epoch = epoch.state_saved().harvest()?.rearm()?;
/// for &gfn in epoch.pages() {
///     copy(gfn);
/// }
/// epoch.copied().run();
/// # Ok(())
/// # }
/// ```
///
/// Steps in the wrong order do not compile. Pages cannot be read before they are re-armed:
///
/// ```compile_fail
/// # fn end(tracker: &outlive_dirty::Tracker) {
/// let epoch = tracker.stopped().state_saved().harvest().unwrap();
/// epoch.pages();
/// # }
/// ```
///
/// and the harvest comes after the state:
///
/// ```compile_fail
/// # fn end(tracker: &outlive_dirty::Tracker) {
/// tracker.stopped().harvest();
/// # }
/// ```
#[must_use = "an epoch that is dropped comes again"]
pub struct Epoch<'t, S> {
    ending: Ending<'t>,
    state: PhantomData<S>,
}

/// The common part of the states; on drop the guest may run and vCPU threads may harvest.
struct Ending<'t> {
    token: Token<'t>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.token.tracker.close();
        self.token.tracker.take_back();
        self.token.tracker.reopen();
    }
}

impl<'t, S> Epoch<'t, S> {
    fn tracker(&self) -> &'t Tracker {
        self.ending.token.tracker
    }

    fn becomes<T>(self) -> Epoch<'t, T> {
        Epoch { ending: self.ending, state: PhantomData }
    }
}

impl<'t> Epoch<'t, Stopped> {
    pub(crate) fn begin(token: Token<'t>) -> Self {
        Epoch { ending: Ending { token }, state: PhantomData }
    }

    /// Says that the state of every vCPU and device has been read.
    pub fn state_saved(self) -> Epoch<'t, StateSaved> {
        self.becomes()
    }
}

impl<'t> Epoch<'t, StateSaved> {
    /// Takes every dirty page of the epoch: from the rings, what vCPU threads have left there; KVM's bitmap;
    /// the global list. Each page comes once, in one contiguous list.
    ///
    /// # Errors
    /// On an error the epoch is dropped; begin again with [`Tracker::stopped`], the guest need not run in
    /// between. After [`HarvestError::Overrun`] and [`HarvestError::Failed`] tracking is over. After any
    /// other error the pages taken so far come with the next harvest.
    pub fn harvest(self) -> Result<Epoch<'t, Harvested>, HarvestError> {
        self.tracker().harvest()?;
        Ok(self.becomes())
    }
}

impl<'t> Epoch<'t, Harvested> {
    /// The number of pages to copy, including hot ones.
    pub fn count(&self) -> usize {
        self.tracker().flat().len()
    }

    /// Makes the next write to each of the pages trap, except hot ones. With the ring that is one
    /// KVM_RESET_DIRTY_RINGS, with every signal blocked in this thread.
    ///
    /// # Errors
    /// Any error ends tracking: pages may have been written unseen. Synchronise in full by other means.
    pub fn rearm(self) -> Result<Epoch<'t, Rearmed>, RearmError> {
        self.tracker().rearm()?;
        Ok(self.becomes())
    }
}

impl<'t> Epoch<'t, Rearmed> {
    /// The pages to copy, each once, in no order. [`Tracker::part`] divides them among several threads.
    ///
    /// First [those that were written](Epoch::written), then [those that may have been](Epoch::hot).
    pub fn pages(&self) -> &[Gfn] {
        // SAFETY: only a harvest, `run`, enable and disable store to the list. All of them need this epoch or
        // its token, which the borrow of `self` keeps here.
        unsafe { self.tracker().flat().slice() }
    }

    /// The pages that a vCPU, a device or the kernel wrote in the epoch. (The first read of a page that KVM
    /// has not mapped yet counts as a write. So does every page that was hot in an epoch that was dropped
    /// after the re-arm.)
    pub fn written(&self) -> &[Gfn] {
        &self.pages()[..self.tracker().written()]
    }

    /// The pages that may have been written, because they are written so often that they are not armed: copy
    /// and compare. They are in [`Epoch::pages`], after the others.
    pub fn hot(&self) -> &[Gfn] {
        &self.pages()[self.tracker().written()..]
    }

    /// Says that the page at this place of [`Epoch::pages`] was compared with its last copy and has not
    /// changed. A hot page that stays unchanged for some epochs is armed again. For other pages this does
    /// nothing.
    pub fn unchanged(&self, index: usize) {
        self.tracker().unchanged(index);
    }

    /// Compares the hot pages of this epoch later, when the epoch may be over: for code that has their last
    /// copies but no part in the pause. Also returns how many of [`Epoch::pages`] come before the hot ones
    /// that it knows: [`Comparison::unchanged`] counts places from there. None if there are no hot pages.
    pub fn comparison(&self) -> Option<(Comparison, usize)> {
        self.tracker().comparison()
    }

    /// Adds the pages to `pages` and begins the next epoch before they are copied: for a migration, whose
    /// guest runs on while its pages are sent. Writes in the meantime belong to the next epoch, whichever
    /// contents were sent. `pages` grows if it has too little room; that is the only allocation.
    pub fn run_then_copy(self, pages: &mut Vec<Gfn>) {
        pages.extend_from_slice(self.pages());
        self.copied().run();
    }

    /// Says that the contents of the pages have been read. Waits for parts that other threads still hold.
    pub fn copied(self) -> Epoch<'t, Copied> {
        self.tracker().close();
        self.becomes()
    }
}

impl Epoch<'_, Copied> {
    /// Forgets the pages and begins the next epoch; the guest may run.
    pub fn run(self) {
        self.tracker().begin();
    }
}

impl<S> fmt::Debug for Epoch<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = std::any::type_name::<S>().rsplit("::").next().unwrap_or_default();
        f.debug_struct("Epoch").field("state", &state).finish_non_exhaustive()
    }
}

/// A part of the pages of an epoch, held by a thread that copies them.
pub struct Part<'t> {
    pub(crate) tracker: &'t Tracker,
    pub(crate) range: Range<usize>,
}

impl Part<'_> {
    /// As [`Epoch::unchanged`], for a place of this part.
    pub fn unchanged(&self, index: usize) {
        if index < self.range.len() {
            self.tracker.unchanged(self.range.start + index);
        }
    }
}

impl Deref for Part<'_> {
    type Target = [Gfn];

    fn deref(&self) -> &[Gfn] {
        // SAFETY: while a part is counted as a reader, the epoch cannot get past `close`, and before that
        // nobody stores to the list.
        let pages = unsafe { self.tracker.flat().slice() };
        &pages[self.range.clone()]
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.tracker.part_done();
    }
}

impl fmt::Debug for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Part").field(&self.range).finish()
    }
}
