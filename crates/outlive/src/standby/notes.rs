//! What the log and the event stream say of a standby's decisions, said by the main thread.

use std::time::{Duration, Instant};

use outlive_epoch::RefuseCode;
use outlive_pair::StandbyNote as Note;

use crate::events::{Event, EventWriter};

/// When what happened on the way to a takeover.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// From the last byte heard to the declaration.
    pub(super) detect: Duration,
    /// The link was declared dead.
    pub(super) declared: Instant,
    /// The disks were at the last commit.
    pub(super) settled: Instant,
    /// The generation was won.
    pub(super) won: Instant,
}

/// See the module.
pub(super) struct Notes {
    events: EventWriter,
    times: Times,
    /// The refusal that was logged last.
    last_refusal: String,
}

impl Notes {
    pub(super) fn new(events: EventWriter) -> Self {
        let now = Instant::now();
        let times = Times { detect: Duration::ZERO, declared: now, settled: now, won: now };
        Self { events, times, last_refusal: String::new() }
    }

    /// The times of the takeover that is under way.
    pub(super) fn times(&self) -> Times {
        self.times
    }

    /// A primary was refused. It asks five times a second.
    pub(super) fn refused(&mut self, code: RefuseCode, text: String) {
        if self.last_refusal != text {
            tracing::warn!(?code, "a primary is refused: {text}");
            self.last_refusal = text;
        }
    }

    /// What was decided at a moment.
    pub(super) fn note(&mut self, at: Instant, note: Note) {
        match note {
            // Logged, with its address, by the thread that heard it.
            Note::Attached { .. } => {}
            Note::Protected { generation, checkpoint } => {
                tracing::info!(generation, checkpoint, "base committed: this standby can take over");
            }
            Note::LinkLost { why, silent, committed } => {
                self.times = Times { detect: silent, declared: at, settled: at, won: at };
                tracing::warn!(can_take_over = committed, "primary lost: {why}");
                self.events.emit(Event::LinkLost { reason: why.to_string() });
            }
            Note::Arbitrating { generation } => {
                (self.times.settled, self.times.won) = (at, at);
                tracing::info!(generation, "asking the arbiter");
                self.events.emit(Event::Arbitrating { generation });
            }
            Note::ArbiterUnreachable { why } => {
                tracing::error!("arbiter not reachable, this standby waits: {why}");
                self.events.emit(Event::ArbiterUnreachable { why });
            }
            Note::Won { generation } => {
                self.times.won = at;
                self.events.emit(Event::Won { generation });
            }
            Note::StopWaits => {
                tracing::warn!("the stop waits for the arbiter: this may be the only host that has the VM");
            }
            Note::StreamRefused { why } => {
                tracing::error!("what the primary sent is refused, it is told so and goes on: {why}");
            }
        }
    }
}

/// The copy was compared with the VM.
pub(super) fn compared(events: &EventWriter, checkpoint: u64, difference: Option<&str>) {
    match difference {
        None => tracing::debug!(checkpoint, "self-check: the copy is the VM's"),
        Some(why) => tracing::error!(checkpoint, "SELF-CHECK FAILED: {why}"),
    }
    events.emit(Event::SelfCheck { checkpoint, difference: difference.map(str::to_owned) });
}
