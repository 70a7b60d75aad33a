//! Copying the dirty pages of a stopped VM into staging, by all its threads.

// UNSAFETY: several threads write disjoint slots of one staging buffer through its raw pointer.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use outlive_dirty::Gfn;

use crate::memory::{PAGE_SIZE, Ram};

/// Pages that a thread takes at once: large enough that the shared counter does not matter, small
/// enough that no thread waits long for the last one.
const SHARE: usize = 16;

/// The copy that is going on: which pages, to where, and which are taken.
///
/// The controller publishes a job before [`Command::Copy`] and waits for all threads before it
/// touches the buffers again; in between a slot belongs to the thread that took it.
///
/// [`Command::Copy`]: super::rendezvous::Command::Copy
#[derive(Debug)]
pub(crate) struct CopyJob {
    gfns: AtomicPtr<Gfn>,
    to: AtomicPtr<u8>,
    len: AtomicUsize,
    next: AtomicUsize,
}

impl Default for CopyJob {
    fn default() -> Self {
        Self {
            gfns: AtomicPtr::new(std::ptr::null_mut()),
            to: AtomicPtr::new(std::ptr::null_mut()),
            len: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
        }
    }
}

impl CopyJob {
    /// Runs `helpers` (which makes other threads call [`work`](Self::work) and returns when they are
    /// done) and this thread on the copy of `gfns` to `to`.
    ///
    /// # Safety
    /// `to` must be valid for writes of `gfns.len()` pages and 4096-byte aligned, and nobody else may
    /// use it until this returns. `helpers` must not return before every thread left `work`.
    pub(crate) unsafe fn run(&self, ram: &Ram, gfns: &[Gfn], to: *mut u8, helpers: Option<impl FnOnce()>) {
        self.gfns.store(gfns.as_ptr().cast_mut(), Ordering::Relaxed);
        self.to.store(to, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        // Release: a thread that sees the length sees the rest.
        self.len.store(gfns.len(), Ordering::Release);
        match helpers {
            Some(helpers) => helpers(),
            None => self.work(ram),
        }
        self.len.store(0, Ordering::Release);
    }

    /// Copies shares until none is left.
    pub(crate) fn work(&self, ram: &Ram) {
        let len = self.len.load(Ordering::Acquire);
        let (gfns, to) = (self.gfns.load(Ordering::Relaxed), self.to.load(Ordering::Relaxed));
        loop {
            let from = self.next.fetch_add(SHARE, Ordering::Relaxed);
            if from >= len {
                return;
            }
            for i in from..len.min(from + SHARE) {
                // SAFETY: i < len, the slice that `run` was given, which outlives the job. Slot i of
                // `to` is this thread's alone, because `next` hands every index out once.
                unsafe {
                    let slot = to.add(i * PAGE_SIZE);
                    if !ram.read_page_to(*gfns.add(i), slot) {
                        std::ptr::write_bytes(slot, 0, PAGE_SIZE);
                    }
                }
            }
        }
    }
}
