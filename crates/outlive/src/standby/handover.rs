//! The buffers of one session, on their way from its reader to its applier and back.
//!
//! ```text
//!            free ──► reader fills ──► staged ──(acknowledged)──► applier ──► free
//!                                       │  ▲
//!                                       └──┘ tried, the base only
//! ```
//!
//! A primary has at most `slots` unacknowledged checkpoints in flight, and one more is being applied: with
//! `slots + 1` buffers the reader always finds one, whatever the applier does. Their memory is bounded too:
//! buffers grow with the checkpoints, but all together hold at most two of the largest kind. Only a third one
//! of that kind makes the reader wait.
//!
//! Everything here takes a few instructions. Only the reader and the applier drop large memory, never a
//! thread that decides.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::Incoming;

/// An applier that has nothing else to do fetches its work within this time, on the busiest host. Servers
/// give a handshake some ten seconds, and the guest's answers are held meanwhile.
const FETCHES: Duration = Duration::from_secs(6);
/// And by the time it was looked for this often: after a stop of the whole process the clock alone says
/// nothing.
const LOOKS: u32 = 8;

/// The handover; see the module.
pub(super) struct Handover {
    state: Mutex<State>,
    /// The applier waits for this.
    work: Condvar,
    /// The reader waits for this, and the applier for the reader's end.
    room: Condvar,
    /// How many bytes all buffers together may hold.
    budget: u64,
}

struct State {
    free: Vec<Incoming>,
    /// How many bytes the checkpoints have that are being filled, staged, tried and applied.
    bytes: u64,
    /// Whole and unacknowledged checkpoints, in their order.
    staged: VecDeque<Held>,
    /// What the applier does next; never more than one thing.
    work: Option<(Held, Doing)>,
    /// Since when the applier has something to do that is not done.
    doing: Option<Instant>,
    /// How often it was looked whether the applier has fetched its work, and it had not.
    looks: u32,
    /// Whether the link is gone: then nothing more is taken from the reader.
    hung_up: bool,
    reader_gone: bool,
    end: Option<Ending>,
}

/// A buffer, with the announced size of its checkpoint in bytes.
pub(super) struct Held {
    pub(super) buffer: Incoming,
    bytes: u64,
}

/// What the applier does with a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// Try whether the VM could be resumed from it.
    Try,
    /// Apply it to the copy.
    Apply,
}

/// How the applier's work ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The copy is handed back.
    Return,
    /// The copy is thrown away.
    Discard,
}

/// Why there is no buffer for the reader.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoBuffer {
    /// The session is over.
    HungUp,
    /// The primary has more checkpoints in flight than it announced.
    Overrun,
}

/// Why the applier takes no checkpoint.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum GiveError {
    /// Another one comes next, or none.
    #[error("checkpoint {due} is due, but {staged:?} is staged")]
    NotNext { due: u64, staged: Option<u64> },
    /// It has one, or none any more.
    #[error("the applier is busy")]
    Busy,
}

impl Handover {
    /// A handover of these buffers, which together may hold this many bytes.
    pub(super) fn new(free: Vec<Incoming>, budget: u64) -> Self {
        let state = State {
            staged: VecDeque::with_capacity(free.len()),
            free,
            bytes: 0,
            work: None,
            doing: None,
            looks: 0,
            hung_up: false,
            reader_gone: false,
            end: None,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), room: Condvar::new(), budget }
    }

    /// A buffer for a checkpoint with this announced size. Waits only if the total would be too large.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn take(&self, bytes: u64) -> Result<Held, NoBuffer> {
        let mut state = self.lock();
        loop {
            if state.hung_up || state.end.is_some() {
                return Err(NoBuffer::HungUp);
            }
            if state.bytes == 0 || state.bytes.saturating_add(bytes) <= self.budget {
                let buffer = state.free.pop().ok_or(NoBuffer::Overrun)?;
                state.bytes = state.bytes.saturating_add(bytes);
                return Ok(Held { buffer, bytes });
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a whole and checked checkpoint from the reader, which reports it to the decisions next.
    pub(super) fn stage(&self, held: Held) {
        let mut state = self.lock();
        if state.hung_up {
            state.bytes -= held.bytes;
            state.free.push(held.buffer);
        } else {
            state.staged.push_back(held);
        }
    }

    /// Gives the next staged checkpoint to the applier; the caller calls [`wake`](Self::wake) later, when
    /// there is time.
    ///
    /// # Errors
    /// See [`GiveError`].
    pub(super) fn give(&self, checkpoint: u64, doing: Doing) -> Result<(), GiveError> {
        let mut state = self.lock();
        let staged = state.staged.front().and_then(|held| held.buffer.checkpoint()).map(|it| it.number());
        if staged != Some(checkpoint) {
            return Err(GiveError::NotNext { due: checkpoint, staged });
        }
        if state.work.is_some() || state.end.is_some() {
            return Err(GiveError::Busy);
        }
        state.work = state.staged.pop_front().map(|held| (held, doing));
        // An applier that does not come for it is as bad as one that does not get done.
        state.doing = Some(Instant::now());
        state.looks = 0;
        Ok(())
    }

    /// Wakes the applier for the checkpoint that it was given.
    pub(super) fn wake(&self) {
        self.work.notify_one();
    }

    /// The link is gone: drops what is staged, and gives the reader no more buffers.
    pub(super) fn hang_up(&self) {
        let mut state = self.lock();
        state.hung_up = true;
        while let Some(held) = state.staged.pop_front() {
            state.bytes -= held.bytes;
            state.free.push(held.buffer);
        }
        self.room.notify_all();
    }

    /// Ends the applier after its current work. It still does what it was given but has not begun, unless
    /// everything is thrown away.
    pub(super) fn end(&self, how: Ending) {
        let mut state = self.lock();
        state.end.get_or_insert(how);
        self.room.notify_all();
        self.work.notify_one();
    }

    /// Whether the applier stands still: it was idle, and does not fetch what it was given. A slow disk is no
    /// reason for that, so it is found much sooner than work that takes long. To be asked now and then.
    pub(super) fn is_deserted(&self) -> bool {
        let mut state = self.lock();
        if state.work.is_none() {
            return false;
        }
        state.looks = state.looks.saturating_add(1);
        state.looks >= LOOKS && state.doing.is_some_and(|since| since.elapsed() >= FETCHES)
    }

    /// For how long the applier has not got done with what it was given.
    pub(super) fn busy_for(&self) -> Duration {
        self.lock().doing.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Waits for the applier's next work.
    ///
    /// # Errors
    /// The applier must end; the value says how.
    pub(super) fn next(&self) -> Result<(Held, Doing), Ending> {
        let mut state = self.lock();
        loop {
            match (state.end, state.work.take()) {
                // Whatever the applier was to do with it, nobody needs it now.
                (Some(Ending::Discard), _) => return Err(Ending::Discard),
                (_, Some(work)) => return Ok(work),
                (Some(end), None) => return Err(end),
                (None, None) => {}
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stages the tried checkpoint again, in front of all others.
    pub(super) fn tried(&self, held: Held) {
        let mut state = self.lock();
        state.doing = None;
        if state.hung_up {
            state.bytes -= held.bytes;
            state.free.push(held.buffer);
        } else {
            state.staged.push_front(held);
        }
    }

    /// Returns an applied checkpoint's buffer, emptied, to the reader.
    pub(super) fn applied(&self, held: Held) {
        let mut state = self.lock();
        state.doing = None;
        state.bytes -= held.bytes;
        state.free.push(held.buffer);
        self.room.notify_all();
    }

    /// The reader has ended and holds nothing of the copy.
    pub(super) fn reader_ends(&self) {
        let mut state = self.lock();
        state.reader_gone = true;
        state.hung_up = true;
        self.room.notify_all();
    }

    /// Waits until the reader holds nothing of the copy.
    pub(super) fn wait_for_reader(&self) {
        let mut state = self.lock();
        while !state.reader_gone {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
