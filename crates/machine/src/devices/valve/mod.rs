//! Held output: **nothing produced in epoch N leaves the host before checkpoint N is committed.**
//!
//! Output is what cannot be taken back when the VM goes on from its last checkpoint elsewhere: the frames of
//! the network card and the writes to a disk that both hosts use. All of it is behind one [`Valve`]. An order
//! is given once, to the valve:
//!
//! ```text
//!              hold, begin        commit       open         discard
//!  pause ───────────┐   receiver ───┐   winner ──┐   loser ───┐     orders: a few atomic words
//!                   ▼               ▼            ▼            ▼
//!               ┌──────────────── Permit: mode, epoch, committed, Lease ───────────────┐
//!               ▼ a tag for what is taken                  ▼ asked right before each system call
//!  guest ──► device thread, inside the gate ──► held ──► drain() ──► tap, storage
//! ```
//!
//! - **Orders** ([`hold`](Valve::hold), [`begin`](Valve::begin), [`commit`](Valve::commit),
//!   [`open`](Valve::open), [`discard`](Valve::discard)) are O(number of outputs), make no system call and
//!   wait for no lock that is held over one. So they may be given in the pause and under the lock of the
//!   decision.
//! - **[`drain`](Valve::drain)** carries out what was ordered, with as many system calls as it takes, after
//!   that lock was dropped. Any thread may, several at once too: they follow each other. What an order let
//!   out has left when a drain that began after the order returns. What passes through is drained by the
//!   device's own thread, outside the gate, so that no pause waits for the sink.
//! - **The first output of an epoch is told** to who ends epochs ([`on_held`](Valve::on_held)): noted inside
//!   the gate by an atomic, told outside of it.
//! - **Mode and lease are asked for each frame and each write**, right before its system call.

mod lease;
mod permit;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use lease::Lease;
pub use permit::{Fate, Order, OutputMode, Permit, Tag};

/// The primitives of the permission. The model test puts the ones of its checker in their place.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

/// Output of a machine that is held until its epoch is committed. What it may do it asks its [`Permit`].
pub trait HeldOutput: Send + Sync {
    /// The newest epoch that has output held here. May say so for a moment longer than it is true.
    fn newest_held(&self) -> Option<u64>;

    /// Lets out, in order, what the permission allows and what was taken before this call; drops what was
    /// discarded. When it returns after a discard, no frame is on its way to the sink, and no write is handed
    /// to the storage any more.
    fn drain(&self);
}

/// Why an epoch cannot begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("epoch {asked} cannot follow: output of epoch {held} is held")]
pub struct EpochError {
    /// The epoch asked for.
    pub asked: u64,
    /// The newest epoch that has output held.
    pub held: u64,
}

/// All held output of a machine.
pub struct Valve {
    permit: Arc<Permit>,
    outputs: Vec<Arc<dyn HeldOutput>>,
}

impl Valve {
    /// A valve in front of `outputs`, which ask `permit`.
    pub fn new(permit: Arc<Permit>, outputs: Vec<Arc<dyn HeldOutput>>) -> Self {
        Self { permit, outputs }
    }

    /// From now on output is held and belongs to `epoch`. In a pause, with the gate closed. Ends *discard*
    /// for what is taken from now on.
    ///
    /// # Errors
    ///
    /// If output of a later epoch is held; nothing has changed then.
    pub fn hold(&self, epoch: u64) -> Result<(), EpochError> {
        self.check(epoch)?;
        self.permit.hold(epoch);
        Ok(())
    }

    /// From now on output belongs to `epoch`. In each pause, with the gate closed. Does not change the mode.
    ///
    /// # Errors
    ///
    /// If output of a later epoch is held; nothing has changed then.
    pub fn begin(&self, epoch: u64) -> Result<(), EpochError> {
        self.check(epoch)?;
        self.permit.begin(epoch);
        Ok(())
    }

    /// The checkpoints of all epochs up to `through` are committed: their output may leave, as long as the
    /// lease holds. Output of the epoch that still runs stays whatever `through` says. [`drain`](Self::drain)
    /// follows.
    pub fn commit(&self, through: u64) {
        self.permit.commit(through);
    }

    /// Everything held may leave, and from now on output leaves at once, behind it. For a VM that goes on
    /// alone (its generation is won) or is not protected. Ends *discard* for what is taken from now on.
    /// [`drain`](Self::drain) follows.
    pub fn open(&self) {
        self.permit.open();
    }

    /// What is held and what is taken from now on never leaves. [`drain`](Self::drain) follows, and waits for
    /// the frame that is being sent. A write to a shared disk that was let out and has not begun is given up;
    /// the system calls under way end by themselves. The guest waits for its writes for good.
    pub fn discard(&self) {
        self.permit.discard();
    }

    /// Carries out what was ordered: see the module. Not in the pause and under no lock of the decision.
    pub fn drain(&self) {
        self.outputs.iter().for_each(|output| output.drain());
    }

    /// What becomes of output now.
    pub fn mode(&self) -> OutputMode {
        self.permit.order().mode()
    }

    /// Committed output may leave until this time of the lease's clock; `None`: forever. An order of whoever
    /// decides, after each decision: what a thread has refused because the lease had just ended is refused no
    /// more, or committed output would stay for as long as the VM is protected.
    pub fn renew(&self, until: Option<Duration>) {
        self.permit.renew(until);
    }

    /// Until when committed output may leave.
    pub fn lease(&self) -> &Lease {
        self.permit.lease()
    }

    /// When the first output of the epoch that runs was held, on the lease's clock; none is held if nothing
    /// is said.
    pub fn held_since(&self) -> Option<Duration> {
        self.permit.held_since()
    }

    /// Has `tell` called when the first output of an epoch is held, by a device's thread, outside the gate
    /// and without a lock. Once for all: a second listener is not taken.
    pub fn on_held(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.permit.on_held(tell);
    }

    fn check(&self, epoch: u64) -> Result<(), EpochError> {
        if self.mode() == OutputMode::Discard {
            return Ok(());
        }
        match self.outputs.iter().filter_map(|output| output.newest_held()).max() {
            Some(held) if held > epoch => Err(EpochError { asked: epoch, held }),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Valve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Valve").field("permit", &self.permit).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod permit_model;
#[cfg(test)]
pub(crate) mod tests;
