//! Whether output may leave: the word that all outputs of a machine ask.
//!
//! An *order* changes a few atomic words, so it never waits and is never half carried out. A device that
//! takes output from the guest gets a [`Tag`] for it and keeps the two together. Before output leaves, its
//! [`Fate`] is looked up, and the permission is asked once more right before the system call.

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
    /// It is dropped: the VM is not (or no longer) the one that may speak.
    Discard = 2,
}

/// The order in force, as one word, so that it is seen whole:
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

/// What is kept with output that was taken from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The epoch that produced it.
    pub epoch: u64,
    /// What became of output when it was taken.
    pub mode: OutputMode,
    era: u64,
}

impl Tag {
    /// Of nothing.
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

/// The permission to let output leave: mode, epoch, what is committed, lease.
#[derive(Debug)]
pub struct Permit {
    order: AtomicU64,
    /// The epoch that runs.
    epoch: AtomicU64,
    /// Output of epochs below this one has been let out. Never above `epoch`.
    committed_below: AtomicU64,
    /// When the first output of the running epoch was held, in nanoseconds of the lease's clock; 0: none.
    held_since: AtomicU64,
    /// Whether that is still to be told.
    untold: AtomicU64,
    listener: Listener,
    lease: Lease,
}

/// Who is told of the first output of an epoch.
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
        // Acquire: what an order set before it was given is seen with it.
        Order(self.order.load(Ordering::Acquire))
    }

    /// The lease, which is asked for output that was held.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// What to keep with output that is taken from the guest now. Inside the gate: so a hold, which is
    /// ordered in a pause, comes before or after it.
    pub fn tag(&self) -> Tag {
        let order = self.order();
        let epoch = self.epoch.load(Ordering::Acquire);
        Tag { epoch, mode: order.mode(), era: order.era() }
    }

    /// Output with this tag was taken. Inside the gate, as the tag; [`tell_held`](Self::tell_held) follows.
    pub fn note_held(&self, tag: Tag) {
        if tag.mode == OutputMode::Hold && self.held_since.load(Ordering::Relaxed) == 0 {
            let now = nanos(self.lease.now()).max(1);
            let first = self.held_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            if first.is_ok() {
                // Release: who is told finds the time.
                self.untold.store(1, Ordering::Release);
            }
        }
    }

    /// Tells who wants to know that the first output of an epoch is held, if that is new: once for each
    /// epoch. Outside the gate and without a lock, since it may make a system call that wakes a thread. May
    /// come when the epoch has ended already.
    pub fn tell_held(&self) {
        if self.untold.load(Ordering::Relaxed) != 0
            && self.untold.swap(0, Ordering::AcqRel) != 0
            && let Some(tell) = self.listener.0.get()
        {
            tell();
        }
    }

    /// Has `tell` called as [`tell_held`](Self::tell_held) says. Once for all: a second listener is not
    /// taken.
    pub fn on_held(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.listener.0.set(Box::new(tell)).ok();
    }

    /// What may become, under this order, of what was taken.
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

    /// Asked right before what [`fate`](Self::fate) found to leave under `order` is sent or handed over. When
    /// the lease has ended this refuses everything until the next order.
    pub fn confirms(&self, order: Order) -> bool {
        if order.mode() == OutputMode::Hold && !self.lease.holds() {
            // Unless another order has come, which knows nothing of this lease.
            let refused = order.0 | REFUSED;
            self.order.compare_exchange(order.0, refused, Ordering::AcqRel, Ordering::Relaxed).ok();
            return false;
        }
        // Last: the lease's clock may have been long in coming.
        self.order() == order
    }

    /// For what was let out and has waited since for its turn at the storage: whether it may be carried out
    /// now.
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

    /// When the first output of the epoch that runs was held, on the lease's clock.
    pub fn held_since(&self) -> Option<Duration> {
        let nanos = self.held_since.load(Ordering::Relaxed);
        (nanos != 0).then(|| Duration::from_nanos(nanos))
    }

    /// The lease lasts until then, and what was refused for the want of it is refused no more. A refusal may
    /// come after this from a thread that has asked the lease before it; the next renewal takes it back.
    pub(super) fn renew(&self, until: Option<Duration>) {
        self.lease.set(until);
        if self.order.load(Ordering::Acquire) & REFUSED != 0 && self.lease.holds() {
            self.order.fetch_and(!REFUSED, Ordering::AcqRel);
        }
    }

    pub(super) fn hold(&self, epoch: u64) {
        self.give(|order| {
            // What passed through and is still on its way has been let out already; what was held before
            // begins to wait anew.
            let passed = order.mode() == OutputMode::PassThrough;
            self.committed_below.store(if passed { epoch } else { 0 }, Ordering::Release);
            self.epoch.store(epoch, Ordering::Release);
            self.held_since.store(0, Ordering::Relaxed);
            OutputMode::Hold
        });
    }

    pub(super) fn begin(&self, epoch: u64) {
        // An epoch that runs is not committed, also when numbers go back.
        self.committed_below.fetch_min(epoch, Ordering::AcqRel);
        self.epoch.store(epoch, Ordering::Release);
        self.held_since.store(0, Ordering::Relaxed);
    }

    pub(super) fn commit(&self, through: u64) {
        // A commit of the epoch that runs cannot be: such a call is a mistake and must not let anything out.
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
            // Release: what `mode` has set is seen by whoever sees the order.
            match self.order.compare_exchange(order, next.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => order = now,
            }
        }
    }
}
