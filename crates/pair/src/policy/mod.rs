//! The one place that decides when an epoch ends.
//!
//! The coordinator collects [`Facts`], asks [`Policy::next`], and then waits until the time in the answer or
//! until a fact changes. The policy reads no clock and no counter: the answer follows from the facts alone.
//!
//! A policy consists of [`Rule`]s, each in its own file; the rule that wants the earliest end wins. Above
//! them is one guarantee, which no rule can break: **between two pauses the guest runs at least as long as
//! the last pause took**, so it has half of the time, however much the rules ask for. A pause counts
//! as no longer than the one before it, or than 100 ms if that was shorter. The only exception is a
//! guest that KVM has stopped because a dirty ring is full: it cannot use run time.
//!
//! | rule | ends the epoch |
//! |---|---|
//! | [`Output`] | when output is held and the epoch has run for a moment |
//! | [`Latency`] | in time to let output out within a target |
//! | [`Longest`] | when the epoch has run for this long; later if nothing has changed |
//! | [`Interval`] | a fixed time after the previous one ended |
//! | [`DirtyTrigger`] | when this many pages are dirty |
//! | [`DiskLogFull`] | when the log of disk writes is full |
//! | [`DirtyLogFull`] | when a dirty ring is full |
//!
//! A new rule is a file with a type that implements [`Rule`], and a line where the coordinator makes its
//! policy. If the rule needs a fact that is not in [`Facts`] yet, add a field there.

mod full;
mod interval;
mod latency;
mod longest;
mod output;
#[cfg(test)]
mod tests;
mod trigger;

use std::fmt;
use std::time::Duration;

pub use full::{DirtyLogFull, DiskLogFull};
pub use interval::Interval;
pub use latency::Latency;
pub use longest::Longest;
pub use output::Output;
pub use trigger::DirtyTrigger;

/// What is known when the policy is asked. All times come from one clock, which may be any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// The time.
    pub now: Duration,
    /// Pages that this epoch has dirtied, as far as can be seen while the guest runs.
    pub dirty_pages: u64,
    /// Whether this epoch has changed something that a checkpoint would carry, or may have as far as can be
    /// seen: pages, or disks.
    pub changed: bool,
    /// Whether KVM holds a vCPU because its dirty ring is full.
    pub dirty_log_full: bool,
    /// Whether a disk has no room left in the log of writes, so that requests of the guest wait.
    pub disk_log_full: bool,
    /// Since when the oldest output of this epoch is held; `None` if no output is held.
    pub held_since: Option<Duration>,
    /// How long the last checkpoint took from the end of its pause to its acknowledgement.
    pub acknowledged_in: Option<Duration>,
}

/// A finished pause; it also ended an epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pause {
    /// When the guest was stopped.
    pub began: Duration,
    /// When it ran again.
    pub ended: Duration,
    /// Pages of the checkpoint.
    pub pages: u64,
}

impl Pause {
    /// How long the guest was stopped.
    pub fn length(&self) -> Duration {
        self.ended.saturating_sub(self.began)
    }
}

/// When the epoch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Now.
    Now(Why),
    /// Not before this time: ask again then, or when a fact changes.
    At(Duration),
    /// Not before a fact changes.
    Nothing,
}

impl Next {
    /// At this time, which may be past.
    fn from(due: Duration, facts: &Facts, why: Why) -> Self {
        if facts.now >= due { Self::Now(why) } else { Self::At(due) }
    }

    fn earlier(self, other: Self) -> Self {
        match (self, other) {
            (Self::Now(why), _) | (_, Self::Now(why)) => Self::Now(why),
            (Self::At(one), Self::At(other)) => Self::At(one.min(other)),
            (at @ Self::At(_), Self::Nothing) | (Self::Nothing, at) => at,
        }
    }
}

/// The reason for the end of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Its time is over.
    Interval,
    /// Output is held.
    Output,
    /// Output would be held for longer than it may be.
    Latency,
    /// The epoch has reached its greatest length.
    Longest,
    /// This many pages are dirty.
    DirtyPages,
    /// A dirty ring is full, and the guest is stopped.
    DirtyLogFull,
    /// The log of disk writes is full.
    DiskLogFull,
}

impl Why {
    /// Whether the guest cannot use the run time that it is guaranteed.
    fn guest_waits(self) -> bool {
        matches!(self, Self::DirtyLogFull)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interval => "interval",
            Self::Output => "output",
            Self::Latency => "latency",
            Self::Longest => "longest epoch",
            Self::DirtyPages => "dirty pages",
            Self::DirtyLogFull => "dirty log full",
            Self::DiskLogFull => "disk log full",
        })
    }
}

/// One reason to end an epoch.
pub trait Rule: Send + fmt::Debug {
    /// When the epoch should end, according to this rule.
    fn next(&self, facts: &Facts) -> Next;

    /// An epoch has ended, for whatever reason.
    fn ended(&mut self, pause: &Pause) {
        let _ = pause;
    }
}

/// The rules of one VM. See [the module](self).
#[derive(Debug)]
pub struct Policy {
    rules: Vec<Box<dyn Rule>>,
    last: Pause,
    /// How long the guest runs at least after it.
    guaranteed: Duration,
}

/// How long the guest runs at least after a pause that is long as none before it: ten times the longest epoch of
/// the default policies. So it still has most of the time that an exception takes from a few epochs, and output
/// is not held for seconds because one self-check, or one stall of the host, took seconds. Where long pauses
/// follow each other, the guest has half of the time.
const AFTER_EXCEPTION: Duration = Duration::from_millis(100);

impl Policy {
    /// A policy of these rules. If two want an end at the same time, the first one's reason counts.
    pub fn new(rules: Vec<Box<dyn Rule>>) -> Self {
        Self { rules, last: Pause::default(), guaranteed: Duration::ZERO }
    }

    /// When the running epoch ends.
    pub fn next(&self, facts: &Facts) -> Next {
        let wishes = self.rules.iter().map(|rule| rule.next(facts));
        let next = wishes.fold(Next::Nothing, |earliest, wish| match (earliest, wish) {
            // A stopped guest is helped at once, whatever the other rules want.
            (Next::Now(_), Next::Now(why)) if why.guest_waits() => wish,
            _ => earliest.earlier(wish),
        });
        let earliest = self.last.ended + self.guaranteed;
        match next {
            Next::Now(why) if facts.now < earliest && !why.guest_waits() => Next::At(earliest),
            Next::At(time) => Next::At(time.max(earliest)),
            other => other,
        }
    }

    /// An epoch has ended. Allocates nothing.
    pub fn ended(&mut self, pause: &Pause) {
        self.guaranteed = pause.length().min(self.last.length().max(AFTER_EXCEPTION));
        self.last = *pause;
        self.rules.iter_mut().for_each(|rule| rule.ended(pause));
    }
}
