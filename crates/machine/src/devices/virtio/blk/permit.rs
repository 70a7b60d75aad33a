//! Whether a shared disk may be changed at this very moment.
//!
//! A write that was let out may wait in the engine's queue for as long as slow storage pleases, or as long as
//! this process is stopped. Meanwhile the standby may have won the VM and carried the same write out, and
//! others over it: so permission is asked again before each system call that changes the storage.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

type May = Arc<dyn Fn() -> bool + Send + Sync>;

/// The permission to change a shared disk, asked by the threads of its engine.
pub(super) struct Permit {
    may: RwLock<May>,
    /// Writes are held until their commit, so another host may win the VM. A VM that passes writes through
    /// has no standby that could.
    asked: AtomicBool,
    /// How often everything on its way was discarded.
    discards: AtomicU64,
}

impl Permit {
    pub(super) fn new() -> Self {
        Self {
            may: RwLock::new(Arc::new(|| true)),
            asked: AtomicBool::new(false),
            discards: AtomicU64::new(0),
        }
    }

    /// From now on `may` is asked.
    pub(super) fn set(&self, may: May) {
        *self.may.write().unwrap_or_else(PoisonError::into_inner) = may;
    }

    /// Whether [`set`](Self::set)'s answer matters.
    pub(super) fn ask(&self, asked: bool) {
        self.asked.store(asked, Ordering::SeqCst);
    }

    /// What has come to the engine before this is never carried out.
    pub(super) fn discard(&self) {
        self.discards.fetch_add(1, Ordering::SeqCst);
    }

    /// To be kept with an operation: what [`allows`](Self::allows) is given.
    pub(super) fn discards(&self) -> u64 {
        self.discards.load(Ordering::SeqCst)
    }

    /// Whether an operation that came after so many discards may be carried out now.
    pub(super) fn allows(&self, discards: u64) -> bool {
        let may = || self.may.read().unwrap_or_else(PoisonError::into_inner).clone();
        // The discards last: the answer may have been long in coming.
        (!self.asked.load(Ordering::SeqCst) || may()()) && self.discards() == discards
    }
}
