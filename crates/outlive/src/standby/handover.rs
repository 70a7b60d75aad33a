//! The buffers of one session, on their way from its reader to its applier and back.
//!
//! ```text
//!            free ──► reader fills ──► staged ──(acknowledged)──► applier ──► free
//!                                       │  ▲
//!                                       └──┘ tried, the base only
//! ```
//!
//! A primary has at most `slots` checkpoints on their way without an acknowledgement, and one is being
//! applied beside them: with `slots + 1` buffers the reader always finds one, whatever the applier does.
//! Their memory is bounded too: buffers grow to what comes, and two checkpoints of the largest kind are as
//! much as there ever is. Only a third one of that kind makes the reader wait.
//!
//! Everything here is done in some instructions. What is large is dropped by the reader or the applier, never
//! by whoever decides.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::Incoming;

/// See the module.
pub(super) struct Handover {
    state: Mutex<State>,
    /// The applier waits for this.
    work: Condvar,
    /// The reader waits for this, and the applier for the reader's end.
    room: Condvar,
    /// Bytes that all buffers together may hold.
    budget: u64,
}

struct State {
    free: Vec<Incoming>,
    /// Bytes of the checkpoints that are being filled, staged, tried and applied.
    bytes: u64,
    /// Whole, in their order, and not acknowledged.
    staged: VecDeque<Held>,
    /// What the applier has to do next. It never has to do more than one thing.
    work: Option<(Held, Doing)>,
    /// What the applier does, and since when.
    doing: Option<Instant>,
    /// The link is gone: nothing more is taken from the reader.
    hung_up: bool,
    reader_gone: bool,
    end: Option<Ending>,
}

/// A buffer with the bytes that it was announced to hold.
pub(super) struct Held {
    pub(super) buffer: Incoming,
    bytes: u64,
}

/// What the applier does with a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// See whether the VM could be resumed from it.
    Try,
    /// Make it this side's state.
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
    /// The primary has more checkpoints on their way than it said.
    Overrun,
}

impl Handover {
    /// For these buffers, which may hold so many bytes together.
    pub(super) fn new(free: Vec<Incoming>, budget: u64) -> Self {
        let state = State {
            staged: VecDeque::with_capacity(free.len()),
            free,
            bytes: 0,
            work: None,
            doing: None,
            hung_up: false,
            reader_gone: false,
            end: None,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), room: Condvar::new(), budget }
    }

    /// A buffer for a checkpoint that is announced to have so many bytes. Waits only if that would be too
    /// many in all.
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

    /// The reader has a checkpoint whole and checked. Whoever decides is told of it next.
    pub(super) fn stage(&self, held: Held) {
        let mut state = self.lock();
        if state.hung_up {
            state.bytes -= held.bytes;
            state.free.push(held.buffer);
        } else {
            state.staged.push_back(held);
        }
    }

    /// The next checkpoint that is staged goes to the applier; [`wake`](Self::wake) follows when there is
    /// time.
    ///
    /// # Errors
    /// It is not this one, or the applier is not idle.
    pub(super) fn give(&self, checkpoint: u64, doing: Doing) -> Result<(), String> {
        let mut state = self.lock();
        let number = state.staged.front().and_then(|held| held.buffer.checkpoint()).map(|it| it.number());
        if number != Some(checkpoint) {
            return Err(format!("checkpoint {checkpoint} is due, and staged is {number:?}"));
        }
        if state.work.is_some() || state.end.is_some() {
            return Err("the applier has something else to do".into());
        }
        state.work = state.staged.pop_front().map(|held| (held, doing));
        Ok(())
    }

    /// Wakes the applier for what it was given.
    pub(super) fn wake(&self) {
        self.work.notify_one();
    }

    /// The link is gone: what is staged is of no use, and the reader gets no buffer any more.
    pub(super) fn hang_up(&self) {
        let mut state = self.lock();
        state.hung_up = true;
        while let Some(held) = state.staged.pop_front() {
            state.bytes -= held.bytes;
            state.free.push(held.buffer);
        }
        self.room.notify_all();
    }

    /// The applier ends after what it does now. What it was given and has not begun is done before, unless
    /// all is thrown away.
    pub(super) fn end(&self, how: Ending) {
        let mut state = self.lock();
        state.end.get_or_insert(how);
        self.room.notify_all();
        self.work.notify_one();
    }

    /// For how long the applier has been at what it does.
    pub(super) fn busy_for(&self) -> Duration {
        self.lock().doing.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// What the applier has to do next. Waits for it.
    ///
    /// # Errors
    /// It has to end, and how.
    pub(super) fn next(&self) -> Result<(Held, Doing), Ending> {
        let mut state = self.lock();
        state.doing = None;
        loop {
            match (state.end, state.work.take()) {
                // Whatever was to be done with it, nobody needs it any more.
                (Some(Ending::Discard), _) => return Err(Ending::Discard),
                (_, Some((held, doing))) => {
                    state.doing = Some(Instant::now());
                    return Ok((held, doing));
                }
                (Some(end), None) => return Err(end),
                (None, None) => {}
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What was tried is staged again, in front of all others.
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

    /// What was applied, emptied, is for the reader again.
    pub(super) fn applied(&self, held: Held) {
        let mut state = self.lock();
        state.doing = None;
        state.bytes -= held.bytes;
        state.free.push(held.buffer);
        self.room.notify_all();
    }

    /// The reader has ended and holds nothing of the copy any more.
    pub(super) fn reader_ends(&self) {
        let mut state = self.lock();
        state.reader_gone = true;
        state.hung_up = true;
        self.room.notify_all();
    }

    /// Waits until the reader holds nothing of the copy any more.
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
