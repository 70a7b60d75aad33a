//! A vCPU that has nothing to do, and its wake-up.
//!
//! The payload guest cannot use HLT (it runs at CPL3 without interrupts), so it asks to idle by a port write.
//! If a wake-up comes while the guest is still on its way to the port, it is kept: the next idle returns at
//! once, so no wake-up is ever missed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::futex;

const WOKEN: u32 = 1;
const STOP: u32 = 2;
/// The thread sleeps, or is about to: it must be woken. Without this bit the system call is saved.
const SLEEPS: u32 = 4;

/// How an idle period ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Somebody woke the vCPU, or the time is over: the guest runs on.
    Over,
    /// The controller wants the thread; afterwards the vCPU may idle again.
    Interrupted,
}

/// The idle state of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct IdleState {
    word: AtomicU32,
}

impl IdleState {
    /// Ends the idle period, or the next one if there is none.
    pub(crate) fn wake(&self) {
        self.set(WOKEN);
    }

    /// Takes the thread out of its idle period until [`resume`](Self::resume).
    pub(crate) fn interrupt(&self) {
        self.set(STOP);
    }

    fn set(&self, bit: u32) {
        if self.word.fetch_or(bit, Ordering::AcqRel) & SLEEPS != 0 {
            futex::wake_all(&self.word);
        }
    }

    /// Allows idle periods again.
    pub(crate) fn resume(&self) {
        self.word.fetch_and(!STOP, Ordering::AcqRel);
    }

    /// Idles until woken, interrupted or `deadline`.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Idle {
        loop {
            // Only this thread sleeps.
            let word = self.word.fetch_and(!SLEEPS, Ordering::AcqRel) & !SLEEPS;
            if word & WOKEN != 0 {
                self.word.fetch_and(!WOKEN, Ordering::AcqRel);
                return Idle::Over;
            }
            if word & STOP != 0 {
                return Idle::Interrupted;
            }
            let timeout = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if timeout.is_some_and(|t| t.is_zero()) {
                return Idle::Over;
            }
            let asleep = word | SLEEPS;
            if self.word.compare_exchange(word, asleep, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                futex::wait(&self.word, asleep, timeout);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_wake_before_the_wait_is_not_lost() {
        let idle = IdleState::default();
        idle.wake();
        assert_eq!(idle.wait(None), Idle::Over);
        assert_eq!(idle.wait(Some(Instant::now())), Idle::Over);
    }

    #[test]
    fn an_interrupt_leaves_the_wake_in_place() {
        let idle = IdleState::default();
        idle.interrupt();
        assert_eq!(idle.wait(None), Idle::Interrupted);
        idle.wake();
        idle.resume();
        assert_eq!(idle.wait(None), Idle::Over);
    }

    #[test]
    fn a_thousand_wakes_from_another_thread_are_all_seen() {
        let idle = Arc::new(IdleState::default());
        let seen = Arc::new(AtomicU32::new(0));
        let sleeper = {
            let (idle, seen) = (idle.clone(), seen.clone());
            std::thread::spawn(move || {
                for _ in 0..1000 {
                    assert_eq!(idle.wait(Some(Instant::now() + Duration::from_secs(20))), Idle::Over);
                    seen.fetch_add(1, Ordering::Release);
                }
            })
        };
        for i in 0..1000 {
            idle.wake();
            while seen.load(Ordering::Acquire) <= i {
                std::hint::spin_loop();
            }
        }
        sleeper.join().unwrap();
    }
}
