//! Copies the dirty pages of a stopped VM into staging, with all its threads.

// UNSAFETY: several threads write disjoint slots of one staging buffer through its raw pointer.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use outlive_dirty::Gfn;

use crate::memory::{PAGE_SIZE, Ram, Stores, finish_copies};

/// Pages that a thread takes at once: so many that the shared counter does not matter, so few that no thread
/// waits long for the last one.
const SHARE: usize = 16;

/// With so few pages staging stays in the cache from one checkpoint to the next.
const CACHED: usize = 64;

/// The current copy: which pages, to where, and which are taken.
///
/// The controller publishes a job before [`Command::Copy`] and waits for all threads before it touches the
/// buffers again; in between, a slot belongs to the thread that took it.
///
/// [`Command::Copy`]: super::rendezvous::Command::Copy
#[derive(Debug)]
pub(crate) struct CopyJob {
    gfns: AtomicPtr<Gfn>,
    to: AtomicPtr<u8>,
    len: AtomicUsize,
    next: AtomicUsize,
    /// A frame that is not RAM, or [`NONE`].
    outside: AtomicU64,
}

/// No frame has this number.
const NONE: u64 = u64::MAX;

impl Default for CopyJob {
    fn default() -> Self {
        Self {
            gfns: AtomicPtr::new(std::ptr::null_mut()),
            to: AtomicPtr::new(std::ptr::null_mut()),
            len: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            outside: AtomicU64::new(NONE),
        }
    }
}

impl CopyJob {
    /// Copies `gfns` to `to`, on this thread and with `helpers`, which makes other threads call
    /// [`work`](Self::work) and returns when they are done.
    ///
    /// # Errors
    /// A frame that is not RAM: a list of dirty pages with such a frame is wrong, and a checkpoint made of it
    /// would be a VM that never was. The data at `to` is useless then.
    ///
    /// # Safety
    /// `to` must be valid for writes of `gfns.len()` pages and 4096-byte aligned, and nobody else may
    /// use it until this returns. `helpers` must not return before every thread left `work`.
    pub(crate) unsafe fn run(
        &self,
        ram: &Ram,
        gfns: &[Gfn],
        to: *mut u8,
        helpers: Option<impl FnOnce()>,
    ) -> Result<(), Gfn> {
        self.gfns.store(gfns.as_ptr().cast_mut(), Ordering::Relaxed);
        self.to.store(to, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        self.outside.store(NONE, Ordering::Relaxed);
        // Release: a thread that sees the length sees the rest.
        self.len.store(gfns.len(), Ordering::Release);
        match helpers {
            Some(helpers) => helpers(),
            None => self.work(ram),
        }
        self.len.store(0, Ordering::Release);
        // Every thread has left `work`, and waiting for them ordered their stores before this.
        match self.outside.load(Ordering::Relaxed) {
            NONE => Ok(()),
            gfn => Err(Gfn(gfn)),
        }
    }

    /// Copies shares until none is left.
    pub(crate) fn work(&self, ram: &Ram) {
        let len = self.len.load(Ordering::Acquire);
        let (gfns, to) = (self.gfns.load(Ordering::Relaxed), self.to.load(Ordering::Relaxed));
        let stores = if len <= CACHED { Stores::Cached } else { Stores::Streaming };
        loop {
            let from = self.next.fetch_add(SHARE, Ordering::Relaxed);
            if from >= len {
                // Before this thread says that it is done.
                return finish_copies();
            }
            for i in from..len.min(from + SHARE) {
                // SAFETY: i < len, the slice that `run` was given, which outlives the job. Slot i of `to`
                // belongs to this thread alone, because `next` hands every index out once.
                unsafe {
                    let slot = to.add(i * PAGE_SIZE);
                    let gfn = *gfns.add(i);
                    if !ram.read_page_to(gfn, slot, stores) {
                        self.outside.store(gfn.0, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same rule for a frame that is not RAM as in a round of the base: an error, not a page of zeroes.
    #[test]
    fn a_frame_that_is_not_ram_is_an_error() {
        let ram = Ram::new(64 << 20, 64).unwrap();
        let mut outgoing = crate::outgoing::Outgoing::new(40, 0).unwrap();
        let mut copy = |gfns: &[Gfn], job: &CopyJob| {
            // SAFETY: `fill` lends room for all of `gfns`, page-aligned; this thread alone works.
            let result = outgoing.fill(gfns, |gfns, to| unsafe { job.run(&ram, gfns, to, None::<fn()>) });
            assert_eq!(outgoing.gfns().len(), if result.is_ok() { gfns.len() } else { 0 });
            result
        };
        let job = CopyJob::default();
        let inside: Vec<Gfn> = (0..40).map(Gfn).collect();
        assert_eq!(copy(&inside, &job), Ok(()));
        let outside = Gfn((64 << 20) / PAGE_SIZE as u64);
        for at in [0, 15, 16, 39] {
            let mut gfns = inside.clone();
            gfns[at] = outside;
            assert_eq!(copy(&gfns, &job), Err(outside), "{at}");
        }
        assert_eq!(copy(&inside, &job), Ok(()), "and the next copy is one of its own");
    }
}
