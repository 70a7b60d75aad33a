//! The gate behind which device threads work.
//!
//! A device thread takes a [`Pass`] for one batch of requests; the coordinator closes the gate for a
//! checkpoint and opens it afterwards. Closing waits until no thread is inside; from then on newcomers park
//! until it opens.
//!
//! An open gate costs one compare-and-swap to enter and one subtraction to leave. Nothing here allocates,
//! sleeps or polls: a thread that must wait does so on a condition variable (a futex).
//!
//! How long [`DeviceGate::close`] waits is the rest of the longest batch inside. A batch therefore asks
//! [`Pass::must_leave`] after each request and ends early, so that the wait is one request, not one batch.

use std::time::Instant;

use super::sync::{AtomicBool, AtomicU32, Condvar, Mutex, MutexGuard, Ordering};

/// Set while the gate is closed or a close waits; the bits below count the threads inside.
const CLOSED: u32 = 1 << 31;

/// Keeps the coordinator and any number of device threads apart.
///
/// One coordinator at a time may use [`close`](Self::close) and [`open`](Self::open). A thread must not enter
/// twice: a close between the two would wait for the first pass while the second entry waits for the opening.
#[derive(Debug)]
pub struct DeviceGate {
    state: AtomicU32,
    /// How many threads wait for the gate to open. State changes that end a wait are made *before* this lock
    /// is taken to notify, and waiters look at the state while they hold it, so no wake-up is lost.
    parked: Mutex<u32>,
    opened: Condvar,
    emptied: Condvar,
}

/// The right to touch guest memory and device state; given back when dropped.
#[derive(Debug)]
#[must_use = "the gate is left as soon as the pass is dropped"]
pub struct Pass<'a> {
    gate: &'a DeviceGate,
}

impl Default for DeviceGate {
    fn default() -> Self {
        Self::new()
    }
}

impl DeviceGate {
    /// An open gate.
    pub fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            parked: Mutex::new(0),
            opened: Condvar::new(),
            emptied: Condvar::new(),
        }
    }

    /// Enters the gate; parks while it is closed.
    pub fn enter(&self) -> Pass<'_> {
        loop {
            if let Some(pass) = self.try_enter() {
                return pass;
            }
            self.park(|| true);
        }
    }

    /// Enters the gate unless `quit` is set; parks while it is closed. To call a parked thread off, set
    /// `quit` and then call [`recheck`](Self::recheck).
    pub fn enter_unless(&self, quit: &AtomicBool) -> Option<Pass<'_>> {
        while !quit.load(Ordering::Acquire) {
            if let Some(pass) = self.try_enter() {
                return Some(pass);
            }
            self.park(|| !quit.load(Ordering::Acquire));
        }
        None
    }

    /// Enters the gate if it is open.
    pub fn try_enter(&self) -> Option<Pass<'_>> {
        let mut state = self.state.load(Ordering::Relaxed);
        while state & CLOSED == 0 {
            // Acquire: a thread that enters later sees what the coordinator did while the gate was closed.
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Pass { gate: self }),
                Err(now) => state = now,
            }
        }
        None
    }

    /// Closes the gate and waits until no thread is inside. What they did there is visible afterwards.
    /// Closing a closed gate only waits.
    pub fn close(&self) {
        if self.state.fetch_or(CLOSED, Ordering::AcqRel) & !CLOSED == 0 {
            return;
        }
        let mut parked = self.lock();
        while self.state.load(Ordering::Acquire) & !CLOSED != 0 {
            parked = wait(&self.emptied, parked);
        }
    }

    /// Like [`close`](Self::close), but waits until `deadline` at most. Returns whether the gate is empty; it
    /// is closed in any case.
    #[must_use = "a gate that is not empty must not be relied on"]
    pub fn close_until(&self, deadline: Instant) -> bool {
        if self.state.fetch_or(CLOSED, Ordering::AcqRel) & !CLOSED == 0 {
            return true;
        }
        let mut parked = self.lock();
        while self.state.load(Ordering::Acquire) & !CLOSED != 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            parked = match self.emptied.wait_timeout(parked, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    /// Opens the gate and wakes the threads that wait for it.
    pub fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::Release);
        self.recheck();
    }

    /// Makes every parked thread check its reason to wait again.
    pub fn recheck(&self) {
        if *self.lock() > 0 {
            self.opened.notify_all();
        }
    }

    /// Whether the gate is closed (or a close waits for the threads inside).
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::Relaxed) & CLOSED != 0
    }

    /// Waits until the gate is open or `wanted` is no longer true.
    fn park(&self, wanted: impl Fn() -> bool) {
        let mut parked = self.lock();
        while self.state.load(Ordering::Relaxed) & CLOSED != 0 && wanted() {
            *parked += 1;
            parked = wait(&self.opened, parked);
            *parked -= 1;
        }
    }

    fn leave(&self) {
        // Release: the batch happens before the coordinator sees the gate empty.
        if self.state.fetch_sub(1, Ordering::Release) == CLOSED | 1 {
            drop(self.lock());
            self.emptied.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        match self.parked.lock() {
            Ok(guard) => guard,
            // The counter is whole at every point where a panic could come from.
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

impl Pass<'_> {
    /// Whether the coordinator waits for this pass: end the batch after the request in hand.
    pub fn must_leave(&self) -> bool {
        self.gate.is_closed()
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.leave();
    }
}

fn wait<'a>(on: &Condvar, guard: MutexGuard<'a, u32>) -> MutexGuard<'a, u32> {
    match on.wait(guard) {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}
