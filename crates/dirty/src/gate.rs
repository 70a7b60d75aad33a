//! Decides what is allowed at the moment: vCPU threads harvest, or the epoch is closed, or its pages are
//! being read.

use crate::sync::{AtomicUsize, Ordering, spin_loop};

/// Nothing is tracked.
const OFF: usize = 0;
/// vCPU threads may harvest.
const OPEN: usize = 1;
/// The epoch is harvested; KVM's new entries belong to the next one and stay where they are.
const CLOSED: usize = 2;
/// As closed, and the pages may be read.
const READABLE: usize = 3;

const STATE: usize = 3;
const ONE_READER: usize = 4;

/// The one thread that holds the epoch moves it from one state to the next; all threads ask it.
///
/// State and number of readers share one word, so that every change of one is ordered against every change of
/// the other.
pub(crate) struct Gate(AtomicUsize);

impl Gate {
    /// A gate that is off.
    pub(crate) fn new() -> Gate {
        Gate(AtomicUsize::new(OFF))
    }

    fn state(&self) -> usize {
        self.0.load(Ordering::Acquire) & STATE
    }

    fn set(&self, state: usize) {
        // Only the holder of the epoch changes the state, so the difference holds whatever readers do
        // meanwhile.
        self.0.fetch_add(state.wrapping_sub(self.state()), Ordering::AcqRel);
    }

    pub(crate) fn is_off(&self) -> bool {
        self.state() == OFF
    }

    /// Whether a vCPU thread may harvest. It asks after it owns its list: a thread that closes the gate then
    /// finds the list owned, or has owned it before and is seen here.
    pub(crate) fn is_open(&self) -> bool {
        self.state() == OPEN
    }

    pub(crate) fn turn_off(&self) {
        self.set(OFF);
    }

    pub(crate) fn open(&self) {
        self.set(OPEN);
    }

    pub(crate) fn close(&self) {
        self.set(CLOSED);
    }

    /// Lets threads read the pages.
    pub(crate) fn let_read(&self) {
        self.set(READABLE);
    }

    /// Becomes a reader, until `read_done`; false if the pages may not be read now.
    pub(crate) fn read(&self) -> bool {
        let readable = self.0.fetch_add(ONE_READER, Ordering::AcqRel) & STATE == READABLE;
        if !readable {
            self.read_done();
        }
        readable
    }

    pub(crate) fn read_done(&self) {
        self.0.fetch_sub(ONE_READER, Ordering::Release);
    }

    /// Lets no new reader begin, and waits for the present ones.
    pub(crate) fn end_reading(&self) {
        if self.state() == READABLE {
            self.close();
            while self.0.load(Ordering::Acquire) >= ONE_READER {
                spin_loop();
            }
        }
    }
}
