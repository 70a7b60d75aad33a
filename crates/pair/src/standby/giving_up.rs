//! A copy that is worthless while its primary lives: the stream is damaged, something failed here, the copy is not the
//! VM, or the primary goes on without it.
//!
//! The primary could go on at once, but it must not have to ask the arbiter first: that may be out of reach, and the VM
//! would stand still for a trouble of its standby. So what this process leaves of the copy says durably that it is given
//! up, and then the standby leaves *with its right*. If that cannot be written in time, or the link ends before, nobody
//! has heard it, and the primary asks:
//!
//! - A copy that has failed, or is not the VM, never runs, whatever becomes of the link.
//! - One that is whole counts again: what made the primary dismiss it may have been the first sign of the primary's death.
//!   The primary is let ahead at the arbiter, as it was alive.
//!
//! Until then:
//!
//! - Nothing is acknowledged, claimed or applied any more, and no heartbeat is sent: each would be a promise to take
//!   over.
//! - The link stays until the leave is sent, and nothing that comes over it counts, but what is known to have left.

use std::time::Duration;

use outlive_epoch::LeaveReason;

use super::{Action, Attached, Committed, Note, RELEASE, Standby, StandbyExit, State};
use crate::planted::planted;
use crate::{Link, LossReason, Timing};

/// Why a copy is of no use.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Worthless {
    /// Something came over the link that this side refuses.
    BadStream(String),
    /// A part of the copy failed.
    Failed(String),
    /// It is not the VM.
    Differs(String),
    /// The primary goes on without it.
    Dismissed,
}

impl Worthless {
    /// Whether what was committed is the VM all the same.
    fn is_whole(&self) -> bool {
        matches!(self, Self::BadStream(_) | Self::Dismissed)
    }

    fn leave(&self, right: bool) -> LeaveReason {
        match (self, right) {
            (Self::BadStream(_), false) => LeaveReason::BadStream,
            (Self::BadStream(_), true) => LeaveReason::BadStreamReleased,
            (Self::Failed(_), false) => LeaveReason::Failed,
            (Self::Failed(_), true) => LeaveReason::FailedReleased,
            (Self::Differs(_), false) => LeaveReason::Differs,
            (Self::Differs(_), true) => LeaveReason::DiffersReleased,
            // Without its right it has failed at what it was told.
            (Self::Dismissed, false) => LeaveReason::Failed,
            (Self::Dismissed, true) => LeaveReason::Dismissed,
        }
    }
}

/// A copy that is being given up; see the module.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(super) struct GivenUp {
    pub(super) attached: Attached,
    /// `None`: the base was not committed, so that there is no right.
    pub(super) committed: Option<Committed>,
    /// Until when the rest of the copy has time to say so.
    pub(super) until: Duration,
    /// The operator wants this standby stopped, too.
    pub(super) stop: bool,
    why: Worthless,
}

impl GivenUp {
    /// Whether this copy is the VM, and its primary has not ended.
    fn may_still_run(&self) -> bool {
        self.why.is_whole() && self.committed.is_some_and(|committed| committed.end.is_none())
    }

    /// Now it is found not to be the VM, or to have failed.
    pub(super) fn gets_worse(&mut self, why: Worthless, out: &mut Vec<Action>) {
        if !self.why.is_whole() {
            return;
        }
        self.why = why;
        // Nothing more comes of the checkpoint that was being applied.
        if let Some(committed) = &mut self.committed
            && std::mem::replace(&mut committed.applying, false)
        {
            out.push(Action::Release { link: self.attached.link });
        }
    }

    /// A checkpoint that was acknowledged before is whole in memory, and its writes are with the disks.
    pub(super) fn applied(&mut self, checkpoint: u64, out: &mut Vec<Action>) {
        let Some(committed) = &mut self.committed else { return };
        if committed.checkpoint == checkpoint && std::mem::replace(&mut committed.applying, false) {
            out.push(Action::Release { link: self.attached.link });
        }
    }
}

impl Standby {
    /// This copy is worthless, and its primary may be in good health.
    pub(super) fn give_up(&mut self, why: Worthless, out: &mut Vec<Action>) {
        let (attached, mut committed, stop) = match std::mem::replace(&mut self.state, State::Over) {
            State::Base(attached) => (attached, None, false),
            State::Committed { attached, committed, releasing } => {
                (attached, Some(committed), releasing.is_some())
            }
            other => return self.state = other,
        };
        let link = attached.link;
        let until = self.now + RELEASE.min(attached.timing.dead_after);
        // The primary of a VM that has ended waits for nobody's right.
        let has_right = committed.is_some_and(|it| it.end.is_none());
        // Nothing more comes of a checkpoint that failed, or was found to differ, while it was applied.
        let waits = why.is_whole() && committed.is_some_and(|it| it.applying);
        if let Some(committed) = committed.as_mut().filter(|_| !waits) {
            committed.applying = false;
        }
        self.state = State::GivingUp(GivenUp { attached, committed, until, stop, why });
        if !has_right {
            self.given_up(false, out);
        } else if planted!(self.bug, GivenUpBeforePromise) {
            self.given_up(true, out);
        } else if !waits {
            out.push(Action::Release { link });
        }
    }

    /// The primary goes on without this side.
    pub(super) fn dismissed(&mut self, link: Link, out: &mut Vec<Action>) {
        if self.attached_mut(link).is_some() {
            self.give_up(Worthless::Dismissed, out);
        }
    }

    /// The rest of the copy has said that it is given up, or has not.
    pub(super) fn given_up(&mut self, durable: bool, out: &mut Vec<Action>) {
        match &self.state {
            State::GivingUp(given) if !durable && given.may_still_run() => {
                let why = LossReason::Local("that this copy is given up could not be written down".into());
                self.counts_again(why, out);
            }
            _ => self.leave_what_is_given_up(durable, out),
        }
    }

    pub(super) fn leave_what_is_given_up(&mut self, durable: bool, out: &mut Vec<Action>) {
        let State::GivingUp(given) = &self.state else { return };
        let (link, why, stop) = (given.attached.link, given.why.clone(), given.stop);
        out.push(Action::SendLeave { link, reason: why.leave(durable) });
        if planted!(self.bug, ClaimAfterLeave) && matches!(why, Worthless::BadStream(_))
            || planted!(self.bug, DiffersAndClaims) && matches!(why, Worthless::Differs(_))
        {
            return self.claim_all_the_same(out);
        }
        out.push(Action::Hangup { link });
        let note = match why {
            Worthless::Failed(why) => return self.exit(StandbyExit::Failed(why), out),
            Worthless::BadStream(why) => Note::StreamRefused { why },
            Worthless::Differs(why) => Note::Differs { why },
            Worthless::Dismissed => Note::Dismissed,
        };
        out.push(Action::Note(note));
        if stop {
            return self.exit(StandbyExit::Stopped, out);
        }
        self.discard(link, out);
    }

    /// The link ends before the leave is sent.
    pub(super) fn lost_while_given_up(&mut self, why: LossReason, out: &mut Vec<Action>) {
        let State::GivingUp(given) = &self.state else { return };
        if planted!(self.bug, ClaimsWhatIsGivenUp) {
            return self.claim_all_the_same(out);
        }
        if given.may_still_run() && !planted!(self.bug, ThrownAwayUnasked) {
            return self.counts_again(why, out);
        }
        let silent = self.now - given.attached.heard;
        out.push(Action::Note(Note::LinkLost { why, silent, committed: false }));
        self.leave_what_is_given_up(false, out);
    }

    /// Nobody has heard that this copy is given up, so it is a copy like any other whose link is lost.
    fn counts_again(&mut self, why: LossReason, out: &mut Vec<Action>) {
        let State::GivingUp(given) = std::mem::replace(&mut self.state, State::Over) else { return };
        let GivenUp { attached, committed, stop, .. } = given;
        let Some(committed) = committed else { return };
        let turns = if planted!(self.bug, LetsNobodyAhead) { 0 } else { Timing::GIVES_WAY };
        let ask_at = self.now + attached.timing.dead_after * turns;
        self.settle((attached, committed), why, ask_at, stop, out);
    }

    pub(super) fn look_at_what_is_given_up(&mut self, out: &mut Vec<Action>) {
        if let State::GivingUp(given) = &self.state
            && self.now >= given.until
        {
            self.given_up(false, out);
        }
    }

    /// What a planted mistake does.
    fn claim_all_the_same(&mut self, out: &mut Vec<Action>) {
        let State::GivingUp(given) = std::mem::replace(&mut self.state, State::Over) else { return };
        let GivenUp { attached, committed, .. } = given;
        let link = attached.link;
        self.state = match committed {
            Some(committed) => State::Committed { attached, committed, releasing: None },
            None => State::Base(attached),
        };
        self.link_lost(link, LossReason::Closed, out);
    }
}
