//! What devices count: numbers that their threads add to and that anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, or says how many of something there are.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, now: u64) {
        self.0.store(now, Ordering::Relaxed);
    }

    /// Raises it to at least this value.
    pub(crate) fn raise(&self, to: u64) {
        self.0.fetch_max(to, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Defines what a device counts: the running counters, and a snapshot of them.
macro_rules! counters {
    (
        $(#[$about:meta])* $stats:ident, $counters:ident:
        $($(#[$doc:meta])* $name:ident,)+
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $stats {
            $($(#[$doc])* pub $name: u64,)+
        }

        #[derive(Debug, Default)]
        pub(super) struct $counters {
            $(pub(super) $name: $crate::devices::counters::Counter,)+
        }

        impl $counters {
            pub(super) fn read(&self) -> $stats {
                $stats { $($name: self.$name.get(),)+ }
            }
        }
    };
}
pub(crate) use counters;
