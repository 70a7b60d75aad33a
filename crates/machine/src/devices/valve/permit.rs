//! Whether output may leave: all outputs of a machine ask here.
//!
//! An *order* changes a few atomic words, so it never waits and is never half carried out. A device that
//! takes output from the guest gets a [`Tag`] for it and keeps the two together. Before output leaves, its
//! device looks up its [`Fate`] and asks the permission once more, right before the system call.

use std::sync::OnceLock;
use std::time::Duration;

use super::lease::{Lease, nanos};
use super::sync::{AtomicU64, Ordering};

/// What becomes of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum OutputMode {
    /// It leaves at once: the VM is unprotected.
    PassThrough = 0,
    /// It waits for the commit of its epoch.
    Hold = 1,
    /// It is dropped: this VM may not, or no longer, send.
    Discard = 2,
}

/// The order in force. It is one word, so that it is read as a whole:
///
/// | bits | |
/// |---|---|
/// | 0-1 | the [`OutputMode`] |
/// | 2 | the lease was found to have ended: nothing leaves until the next order |
/// | 3-31 | the era: changes when a discard begins and when it ends |
/// | 32-63 | counts the orders |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order(u64);

const REFUSED: u64 = 1 << 2;
const ERA_SHIFT: u32 = 3;
const ERA_BITS: u64 = (1 << 29) - 1;
const COUNT_SHIFT: u32 = 32;

impl Order {
    const fn first(mode: OutputMode) -> Self {
        Self(mode as u64)
    }

    /// What becomes of output.
    pub fn mode(self) -> OutputMode {
        match self.0 & 3 {
            0 => OutputMode::PassThrough,
            1 => OutputMode::Hold,
            _ => OutputMode::Discard,
        }
    }

    /// Whether the lease was found to have ended.
    pub fn is_refused(self) -> bool {
        self.0 & REFUSED != 0
    }

    fn era(self) -> u64 {
        self.0 >> ERA_SHIFT & ERA_BITS
    }

    /// The order that follows this one.
    fn next(self, mode: OutputMode) -> Self {
        let discards = mode == OutputMode::Discard || self.mode() == OutputMode::Discard;
        let era = self.era().wrapping_add(discards.into()) & ERA_BITS;
        let count = (self.0 >> COUNT_SHIFT).wrapping_add(1);
        Self(count << COUNT_SHIFT | era << ERA_SHIFT | mode as u64)
    }
}

/// What a device keeps with output that it took from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The epoch that produced it.
    pub epoch: u64,
    /// What became of output when it was taken.
    pub mode: OutputMode,
    era: u64,
}

impl Tag {
    /// A tag of no output.
    pub const NONE: Self = Self { epoch: 0, mode: OutputMode::PassThrough, era: 0 };
}

/// What may become of output that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It may leave.
    Leaves,
    /// It waits.
    Waits,
    /// It was taken before or during a discard: it never leaves.
    Dropped,
}

/// The permission to let output leave: mode, epoch, committed epochs, lease.
#[derive(Debug)]
pub struct Permit {
    order: AtomicU64,
    /// The running epoch.
    epoch: AtomicU64,
    /// Output of epochs below this one has been let out. Never above `epoch`.
    committed_below: AtomicU64,
    /// When the first output of the running epoch was held, in nanoseconds of the lease's clock; 0: none.
    held_since: AtomicU64,
    /// Whether that is still to be reported.
    untold: AtomicU64,
    listener: Listener,
    lease: Lease,
}

/// The listener for the first output of an epoch.
#[derive(Default)]
struct Listener(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Listener").field(&self.0.get().is_some()).finish()
    }
}

impl Permit {
    /// A permission that begins in this mode.
    pub fn new(mode: OutputMode, lease: Lease) -> Self {
        Self {
            order: AtomicU64::new(Order::first(mode).0),
            epoch: AtomicU64::new(0),
            committed_below: AtomicU64::new(0),
            held_since: AtomicU64::new(0),
            untold: AtomicU64::new(0),
            listener: Listener::default(),
            lease,
        }
    }

    /// The order in force.
    pub fn order(&self) -> Order {
        // Acquire: whatever was set before an order was given is seen with it.
        Order(self.order.load(Ordering::Acquire))
    }

    /// The lease, which is checked for output that was held.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// The tag for output that is taken from the guest now. Call it inside the gate, so that a hold, which is
    /// ordered in a pause, comes before or after it.
    pub fn tag(&self) -> Tag {
        let order = self.order();
        let epoch = self.epoch.load(Ordering::Acquire);
        Tag { epoch, mode: order.mode(), era: order.era() }
    }

    /// Output with this tag was taken. Call it inside the gate, like the tag; [`tell_held`](Self::tell_held)
    /// must follow.
    pub fn note_held(&self, tag: Tag) {
        if tag.mode == OutputMode::Hold && self.held_since.load(Ordering::Relaxed) == 0 {
            let now = nanos(self.lease.now()).max(1);
            let first = self.held_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            if first.is_ok() {
                // Release: whoever is told finds the time.
                self.untold.store(1, Ordering::Release);
            }
        }
    }

    /// Tells the listener that the first output of an epoch is held, if that is new: once for each epoch.
    /// Call it outside the gate and without a lock, since it may make a system call that wakes a thread. It
    /// may come when the epoch has ended already.
    pub fn tell_held(&self) {
        if self.untold.load(Ordering::Relaxed) != 0
            && self.untold.swap(0, Ordering::AcqRel) != 0
            && let Some(tell) = self.listener.0.get()
        {
            tell();
        }
    }

    /// Has `tell` called as [`tell_held`](Self::tell_held) says. Set it once: a second listener is ignored.
    pub fn on_held(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.listener.0.set(Box::new(tell)).ok();
    }

    /// What may become, under this order, of output with this tag.
    pub fn fate(&self, order: Order, tag: Tag) -> Fate {
        if order.mode() == OutputMode::Discard || order.era() != tag.era {
            Fate::Dropped
        } else if order.is_refused() {
            Fate::Waits
        } else if order.mode() == OutputMode::PassThrough
            || tag.epoch < self.committed_below.load(Ordering::Acquire)
        {
            Fate::Leaves
        } else {
            Fate::Waits
        }
    }

    /// Asked right before output that may leave under `order` ([`fate`](Self::fate)) is sent or handed over.
    /// Once the lease has ended, this refuses everything until the next order.
    pub fn confirms(&self, order: Order) -> bool {
        if order.mode() == OutputMode::Hold && !self.lease.holds() {
            // Unless another order has come, which is independent of this lease.
            let refused = order.0 | REFUSED;
            self.order.compare_exchange(order.0, refused, Ordering::AcqRel, Ordering::Relaxed).ok();
            return false;
        }
        // Last: reading the lease's clock may have taken long.
        self.order() == order
    }

    /// For output that was let out and has waited since for its turn at the storage: whether it may be
    /// carried out now.
    pub fn allows(&self, tag: Tag) -> bool {
        loop {
            let order = self.order();
            if order.mode() == OutputMode::Discard || order.era() != tag.era {
                return false;
            }
            if order.mode() == OutputMode::Hold && !self.lease.holds() {
                return false;
            }
            if self.order() == order {
                return true;
            }
        }
    }

    /// When the first output of the running epoch was held, on the lease's clock.
    pub fn held_since(&self) -> Option<Duration> {
        let nanos = self.held_since.load(Ordering::Relaxed);
        (nanos != 0).then(|| Duration::from_nanos(nanos))
    }

    /// The lease lasts until this time, and refusals because of its end are taken back. A thread that asked
    /// the lease earlier may still refuse after this; the next renewal takes that back.
    pub(super) fn renew(&self, until: Option<Duration>) {
        self.lease.set(until);
        if self.order.load(Ordering::Acquire) & REFUSED != 0 && self.lease.holds() {
            self.order.fetch_and(!REFUSED, Ordering::AcqRel);
        }
    }

    pub(super) fn hold(&self, epoch: u64) {
        self.give(|order| {
            // Output that passed through and is still on its way has been let out already; output that was
            // held before begins to wait anew.
            let passed = order.mode() == OutputMode::PassThrough;
            self.committed_below.store(if passed { epoch } else { 0 }, Ordering::Release);
            self.epoch.store(epoch, Ordering::Release);
            self.held_since.store(0, Ordering::Relaxed);
            OutputMode::Hold
        });
    }

    pub(super) fn begin(&self, epoch: u64) {
        // A running epoch is not committed, even when numbers go back.
        self.committed_below.fetch_min(epoch, Ordering::AcqRel);
        self.epoch.store(epoch, Ordering::Release);
        self.held_since.store(0, Ordering::Relaxed);
    }

    pub(super) fn commit(&self, through: u64) {
        // The running epoch cannot be committed: such a call is a mistake and must not let anything out.
        let below = through.saturating_add(1).min(self.epoch.load(Ordering::Acquire));
        self.committed_below.fetch_max(below, Ordering::AcqRel);
    }

    pub(super) fn open(&self) {
        self.give(|_| OutputMode::PassThrough);
    }

    pub(super) fn discard(&self) {
        self.give(|_| OutputMode::Discard);
    }

    fn give(&self, mode: impl Fn(Order) -> OutputMode) {
        let mut order = self.order.load(Ordering::Acquire);
        loop {
            let next = Order(order).next(mode(Order(order)));
            // Release: whoever sees the order sees what `mode` has set.
            match self.order.compare_exchange(order, next.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => order = now,
            }
        }
    }
}
