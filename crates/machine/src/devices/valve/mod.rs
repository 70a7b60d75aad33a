//! Held output: **nothing produced in epoch N leaves the host before checkpoint N is committed.**
//!
//! Output is what cannot be taken back when the VM continues elsewhere from its last checkpoint: the frames
//! of the network card and the writes to a disk that both hosts use. All of it is behind one [`Valve`]. Each
//! order is given once, to the valve:
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
//!   wait for no lock that is held over one. So they may be given in the pause and under the lock that guards
//!   the decision.
//! - **[`drain`](Valve::drain)** carries the orders out, with as many system calls as that takes, after that
//!   lock was dropped. Any thread may drain, several even at once: they take turns. When a drain that began
//!   after an order returns, everything that the order let out has left. Output that passes through is
//!   drained by the device's own thread, outside the gate, so that no pause waits for the sink.
//! - **The first output of an epoch is reported** to whoever ends epochs ([`on_held`](Valve::on_held)): noted
//!   inside the gate by an atomic, reported outside of it.
//! - **Mode and lease are checked for each frame and each write**, right before its system call.

mod lease;
mod permit;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use lease::Lease;
pub use permit::{Fate, Order, OutputMode, Permit, Tag};

/// The primitives of the permission. The model test replaces them with those of its checker.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

/// Output of a machine that is held until its epoch is committed. Its [`Permit`] says what may leave.
pub trait HeldOutput: Send + Sync {
    /// The newest epoch that has output held here. The answer may lag behind for a moment.
    fn newest_held(&self) -> Option<u64>;

    /// Lets out, in order, what the permission allows and what was taken before this call; drops what was
    /// discarded. When it returns after a discard, no frame is on its way to the sink, and no more writes are
    /// handed to the storage.
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
    /// A valve in front of `outputs`, which consult `permit`.
    pub fn new(permit: Arc<Permit>, outputs: Vec<Arc<dyn HeldOutput>>) -> Self {
        Self { permit, outputs }
    }

    /// From now on output is held and belongs to `epoch`. Call it in a pause, with the gate closed. It ends
    /// *discard* for output that is taken from now on.
    ///
    /// # Errors
    ///
    /// If output of a later epoch is held; nothing has changed then.
    pub fn hold(&self, epoch: u64) -> Result<(), EpochError> {
        self.check(epoch)?;
        self.permit.hold(epoch);
        Ok(())
    }

    /// From now on output belongs to `epoch`. Call it in each pause, with the gate closed. It does not change
    /// the mode.
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
    /// lease holds. Output of the running epoch stays, whatever `through` says. [`drain`](Self::drain) must
    /// follow.
    pub fn commit(&self, through: u64) {
        self.permit.commit(through);
    }

    /// Everything held may leave, and from now on output leaves at once, behind it. For a VM that goes on
    /// alone (its generation is won) or is not protected. It ends *discard* for output that is taken from now
    /// on. [`drain`](Self::drain) must follow.
    pub fn open(&self) {
        self.permit.open();
    }

    /// Held output and output that is taken from now on never leaves. [`drain`](Self::drain) must follow; it
    /// waits for the frame that is being sent. A write to a shared disk that was let out and has not begun is
    /// given up; system calls under way end by themselves. The guest waits for its writes forever.
    pub fn discard(&self) {
        self.permit.discard();
    }

    /// Carries out the orders: see the module. Not in the pause and not under a lock of the decision.
    pub fn drain(&self) {
        self.outputs.iter().for_each(|output| output.drain());
    }

    /// What becomes of output now.
    pub fn mode(&self) -> OutputMode {
        self.permit.order().mode()
    }

    /// Committed output may leave until this time of the lease's clock; `None`: forever. Whoever decides
    /// gives this order after each decision. It also takes back refusals: when a thread refused output
    /// because the lease had just ended, that output would otherwise stay for as long as the VM is protected.
    pub fn renew(&self, until: Option<Duration>) {
        self.permit.renew(until);
    }

    /// Until when committed output may leave.
    pub fn lease(&self) -> &Lease {
        self.permit.lease()
    }

    /// The running epoch, while output is held. It changes in the pause, when the checkpoint of the epoch before has
    /// its dirty pages: whoever finds the same number before and after it has read guest memory has read what is of
    /// that epoch, and every page that was written in it is in its checkpoint.
    pub fn running_epoch(&self) -> Option<u64> {
        let tag = self.permit.tag();
        (tag.mode == OutputMode::Hold).then_some(tag.epoch)
    }

    /// When the first output of the running epoch was held, on the lease's clock; `None` if no output is
    /// held.
    pub fn held_since(&self) -> Option<Duration> {
        self.permit.held_since()
    }

    /// Has a device's thread call `tell` when the first output of an epoch is held, outside the gate and
    /// without a lock. Set it once: a second listener is ignored.
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
