//! The end of a pause, lent by the controller to the vCPU's thread that arrives last.
//!
//! Who does it and when is decided by the [meeting point](super::rendezvous); this only carries it over.

// UNSAFETY: the thread calls a closure on the controller's stack.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Instant;

use super::rendezvous::{Order, Rendezvous};

/// Which thread ends a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// The one that has ordered it.
    Controller,
    /// The vCPU's that arrived last.
    LastVcpu,
}

/// What is lent. It may be called once.
pub(crate) type Work<'a> = dyn FnMut(Who) + Send + 'a;

/// A place for it.
#[derive(Debug, Default)]
pub(super) struct Lent(AtomicPtr<()>);

impl Lent {
    /// Controller: has the thread that arrives last do `work`, or does it itself if all have arrived, and
    /// returns when it is done. `late` is asked what to do each time that the deadline has passed before all have
    /// arrived: a new deadline, or none.
    ///
    /// # Errors
    /// How many threads have not arrived. Then nobody does `work`.
    pub(super) fn lend(
        &self,
        meeting: &Rendezvous,
        mut work: &mut Work<'_>,
        mut deadline: Option<Instant>,
        mut late: impl FnMut() -> Option<Instant>,
        help: impl Fn(),
    ) -> Result<(), u32> {
        // A reference to a trait object is two words, so what is passed on is where it is.
        self.0.store((&raw mut work).cast(), Ordering::Relaxed);
        // The order makes this visible to the thread that arrives last.
        if !meeting.lend() {
            work(Who::Controller);
            return Ok(());
        }
        while !meeting.wait_done(deadline, &help) {
            deadline = late();
            if deadline.is_some() {
                continue;
            }
            if let Some(missing) = meeting.revoke() {
                return Err(missing);
            }
        }
        Ok(())
    }

    /// The thread for which [`Rendezvous::arrive`] has returned true for the order `last`: does what was lent.
    /// Returns the order that this thread has carried out last.
    pub(super) fn take(&self, meeting: &Rendezvous, last: Order) -> Order {
        // Also if `work` panics: the controller must not wait for ever.
        let done = Done(meeting);
        let work = self.0.load(Ordering::Relaxed).cast::<&mut Work<'_>>();
        // SAFETY: `lend` has stored the address of its own `work`. It returns only after `Done`, because it could
        // not revoke: `arrive` returns true to one thread, and to none after a revocation. Meanwhile it does not
        // touch `work`, which may be sent. The lifetime that is made up here ends before that.
        unsafe { (*work)(Who::LastVcpu) };
        // Before `Done`: after it the controller may publish the next order, which nobody has carried out.
        let carried_out = meeting.carried_out(last);
        drop(done);
        carried_out
    }
}

struct Done<'a>(&'a Rendezvous);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.done();
    }
}
