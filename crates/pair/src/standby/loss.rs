//! From the loss of the link to the takeover, and every other way in which a standby ends.

use std::time::Duration;

use outlive_epoch::{EndReason, LeaveReason};

use super::giving_up::Worthless;
use super::{Action, Attached, Committed, GivenUp, Introduction, Note, RELEASE, Standby, StandbyExit, State};
use crate::claim::{Claim, Step, Verdict};
use crate::planted::planted;
use crate::{ClaimResult, Link, LossReason, TailUse, Timing};

impl Standby {
    pub(super) fn end(&mut self, link: Link, reason: EndReason, out: &mut Vec<Action>) {
        if self.attached_mut(link).is_some() {
            out.push(Action::SendLeave { link, reason: LeaveReason::Followed });
            out.push(Action::Hangup { link });
            self.exit(StandbyExit::Followed(reason), out);
        }
    }

    pub(super) fn link_lost(&mut self, link: Link, why: LossReason, out: &mut Vec<Action>) {
        let (now, bug) = (self.now, self.bug);
        if matches!(&self.state, State::GivingUp(given) if given.attached.link == link) {
            return self.lost_while_given_up(why, out);
        }
        let Some(attached) = self.attached_mut(link) else { return };
        let (heard, dead_after) = (attached.heard, attached.timing.dead_after);
        // A link that fails at this side says nothing about the primary: it may be stopped, with a lease that
        // still lasts, and would let output out when it continues. Nor does the end of a connection that
        // somebody else has reset; frames may then leave twice, but a write to storage that both sides use
        // must not land after this side's own.
        let storage = attached.shared_storage && !planted!(bug, ClaimsWithinLease);
        let ask_at = match why {
            // Most likely the primary lives, and its guest runs: it is let ahead. This is longer than its lease.
            LossReason::Protocol(_) if planted!(bug, LetsNobodyAhead) => now,
            LossReason::Protocol(_) => now + dead_after * Timing::GIVES_WAY,
            _ if storage => heard + dead_after,
            LossReason::Local(_) => heard + dead_after,
            _ => now,
        };
        match std::mem::replace(&mut self.state, State::Over) {
            State::Committed { attached, committed, releasing } => {
                self.settle((attached, committed), why, ask_at, releasing.is_some(), out);
            }
            state => {
                self.state = state;
                out.push(Action::Hangup { link });
                out.push(Action::Note(Note::LinkLost { why, silent: now - heard, committed: false }));
                self.discard(link, out);
            }
        }
    }

    /// The link of a whole copy is lost. This side makes itself ready, and then asks for the VM.
    pub(super) fn settle(
        &mut self,
        (attached, mut committed): (Attached, Committed),
        why: LossReason,
        ask_at: Duration,
        stop: bool,
        out: &mut Vec<Action>,
    ) {
        let Attached { link, generation, released, timing, heard, ref staged, .. } = attached;
        out.push(Action::Hangup { link });
        out.push(Action::Note(Note::LinkLost { why, silent: self.now - heard, committed: true }));
        if let Some(reason) = committed.end
            && !planted!(self.bug, TakeOverAfterEnd)
        {
            self.state = State::Committed { attached, committed, releasing: None };
            return self.exit(StandbyExit::Followed(reason), out);
        }
        if let (true, Some(next)) = (planted!(self.bug, TakeOverFromUnacknowledged), staged.front()) {
            (committed.checkpoint, committed.applying) = (next.checkpoint, false);
        }
        let Committed { checkpoint, applying, .. } = committed;
        if stop {
            out.push(Action::Note(Note::StopWaits));
        }
        // The primary's lease has ended by then, whoever says what.
        let lease = if planted!(self.bug, HurriesWithinLease) { self.now } else { heard + timing.dead_after };
        let claim = Claim::new(generation + 1, ask_at, timing.retry).may_hurry_from(lease);
        self.state = State::Settling { link, claim, committed, released, stop };
        if !applying || planted!(self.bug, TakeOverBeforeApplied) {
            out.push(Action::Settle { link, checkpoint });
        }
        if planted!(self.bug, ClaimBeforeSettled) {
            self.settled(link, checkpoint, out);
        }
    }

    /// A primary that is refused while this side lets the other ahead. With the generation that this side would claim it
    /// says that the other has asked, and has won: nothing is left to wait for but the end of a lease, because it may lie.
    /// Only the arbiter is believed: the question is asked, and its answer frees this side for the new primary.
    pub(super) fn turned_away(&mut self, hello: &Introduction) {
        let ours = matches!(self.seen, Some((vm, _)) if vm == hello.vm);
        if let State::Settling { claim, .. } | State::Claiming { claim, .. } = &mut self.state
            && ours
            && hello.generation >= claim.generation
        {
            claim.hurry();
        }
    }

    /// This side could run the VM now, so it may ask for it.
    pub(super) fn settled(&mut self, from: Link, settled: u64, out: &mut Vec<Action>) {
        let State::Settling { link, claim, committed, released, stop } = &mut self.state else { return };
        let (link, released, stop) = (*link, *released, *stop);
        let Committed { checkpoint, handed, .. } = *committed;
        if link != from || checkpoint != settled {
            return;
        }
        let claim = claim.clone();
        out.push(Action::Note(Note::Arbitrating { generation: claim.generation }));
        self.state = State::Claiming { link, claim, checkpoint, released, handed, stop, failed: None };
        if planted!(self.bug, TakeOverWithoutWin) {
            self.take_over(out);
        }
    }

    /// The stream is damaged, but the primary that sends it may be in good health: taking over from it would
    /// harm the VM. So this side gives up its claim and starts again, and tells the primary, which does the
    /// same.
    pub(super) fn bad_stream(&mut self, link: Link, why: String, out: &mut Vec<Action>) {
        match &self.state {
            State::GivingUp(given) if given.attached.link == link => {}
            State::Base(attached) | State::Committed { attached, .. } if attached.link == link => {
                self.give_up(Worthless::BadStream(why), out);
            }
            _ => out.push(Action::Hangup { link }),
        }
    }

    /// The thread that would run the VM hangs: this side protects nobody, and says so before it is relied on.
    pub(super) fn hangs(&mut self, link: Link, out: &mut Vec<Action>) {
        let why = LossReason::Local("the thread of this standby that takes over hangs".into());
        let silent = self.attached().map_or(self.now, |attached| self.now - attached.heard);
        out.push(Action::SendLeave { link, reason: LeaveReason::Failed });
        out.push(Action::Hangup { link });
        out.push(Action::Note(Note::LinkLost { why, silent, committed: false }));
        self.discard(link, out);
    }

    /// Nothing of this VM is kept. The next one must wait until its memory is free.
    pub(super) fn discard(&mut self, link: Link, out: &mut Vec<Action>) {
        out.push(Action::Discard { link });
        self.state = State::Discarding { link };
    }

    /// The operator's stop.
    pub(super) fn stop(&mut self, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Leaving { .. } | State::TakenOver | State::Over => {}
            State::Settling { stop, .. } | State::Claiming { stop, .. } => {
                // This may be the only side that has the VM, and the claim may have reached the arbiter
                // already. To walk away then leaves a VM that nobody runs and that the other side can never
                // win. Each stop is told so.
                *stop = true;
                out.push(Action::Note(Note::StopWaits));
            }
            State::Committed { attached, .. } if planted!(self.bug, LeaveBeforePromise) => {
                let link = attached.link;
                out.push(Action::SendLeave { link, reason: LeaveReason::Released });
                self.link_lost(link, LossReason::Closed, out);
            }
            State::Committed { attached, committed, releasing: releasing @ None }
                if committed.end.is_none() =>
            {
                *releasing = Some(self.now + RELEASE);
                if !committed.applying {
                    *releasing = Some(self.now + attached.timing.dead_after.min(RELEASE));
                    out.push(Action::Release { link: attached.link });
                }
            }
            State::GivingUp(given) if !given.stop => given.stop = true,
            State::GivingUp(_) => self.leave_what_is_given_up(false, out),
            // Nobody could start from anything here, and this side could not ask for anything.
            State::Base(_) => self.leave(LeaveReason::Released, StandbyExit::Stopped, out),
            // The second stop waits for nothing.
            State::Listening | State::Discarding { .. } | State::Committed { .. } => {
                self.leave(LeaveReason::Stopped, StandbyExit::Stopped, out);
            }
        }
    }

    /// The rest of the copy says that it was given up, or cannot.
    pub(super) fn released(&mut self, link: Link, result: Result<(), String>, out: &mut Vec<Action>) {
        match &self.state {
            State::Committed { attached, releasing: Some(_), .. } if attached.link == link => {}
            State::GivingUp(given) if given.attached.link == link => {
                let durable = result.is_ok();
                if let Err(why) = result {
                    out.push(Action::Note(Note::NotReleased { why }));
                }
                return self.given_up(durable, out);
            }
            _ => return,
        }
        let reason = match result {
            Ok(()) => LeaveReason::Released,
            Err(why) => {
                out.push(Action::Note(Note::NotReleased { why }));
                LeaveReason::Stopped
            }
        };
        self.leave(reason, StandbyExit::Stopped, out);
    }

    /// A failure of this side's copy.
    pub(super) fn failed(&mut self, from: Link, why: String, out: &mut Vec<Action>) {
        let (State::Base(Attached { link, .. })
        | State::Committed { attached: Attached { link, .. }, .. }
        | State::GivingUp(GivenUp { attached: Attached { link, .. }, .. })
        | State::Settling { link, .. }
        | State::Claiming { link, .. }
        | State::Leaving { link, .. }) = &self.state
        else {
            return;
        };
        if *link != from {
            return;
        }
        match &mut self.state {
            // The answer decides whether more than this side's failure must be reported.
            State::Claiming { claim, failed, .. } if claim.is_open() => {
                failed.get_or_insert(why);
            }
            State::GivingUp(given) => given.gets_worse(Worthless::Failed(why), out),
            State::Committed { .. } => self.give_up(Worthless::Failed(why), out),
            // Between two claims: one of them may have been heard though its answer was lost.
            State::Claiming { claim, .. } if claim.was_asked() => {
                let why = may_be_won(&why, claim.generation);
                self.exit(StandbyExit::Failed(why), out);
            }
            _ => self.leave(LeaveReason::Failed, StandbyExit::Failed(why), out),
        }
    }

    /// The copy is not the VM, so it is no committed checkpoint, and must never run. While the primary lives it
    /// is told, and sends a new base: this side is as good as before. Once the link is gone nobody takes this
    /// copy over. The other side may still run the VM; if it does not, the VM is lost, which everybody sees,
    /// and the disks are as of the last commit. A VM that goes on with wrong memory harms what was acknowledged,
    /// and nobody sees it.
    pub(super) fn differs(&mut self, from: Link, why: String, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Base(attached) | State::Committed { attached, .. } if attached.link == from => {
                self.give_up(Worthless::Differs(why), out);
            }
            State::GivingUp(given) if given.attached.link == from => {
                given.gets_worse(Worthless::Differs(why), out);
            }
            _ => self.failed(from, why, out),
        }
    }

    pub(super) fn leave(&mut self, reason: LeaveReason, exit: StandbyExit, out: &mut Vec<Action>) {
        if let Some(Attached { link, .. }) = self.attached() {
            out.push(Action::SendLeave { link: *link, reason });
            out.push(Action::Hangup { link: *link });
        }
        self.exit(exit, out);
    }

    pub(super) fn claimed(&mut self, generation: u64, result: ClaimResult, out: &mut Vec<Action>) {
        let State::Claiming { link, claim, failed, .. } = &mut self.state else { return };
        let answer = claim.answer(self.now, generation, result, self.bug);
        match (answer, failed.take()) {
            (Err(Step::Report(why)), None) => out.push(Action::Note(Note::ArbiterUnreachable { why })),
            (Err(_), None) => {}
            (Ok(Verdict::Won), None) => {
                out.push(Action::Note(Note::Won { generation }));
                self.take_over(out);
            }
            (Ok(Verdict::Lost { owner }), _) => {
                out.push(Action::Discard { link: *link });
                self.exit(StandbyExit::Lost { generation, owner }, out);
            }
            (Ok(Verdict::Won), Some(why)) => {
                let why = format!(
                    "{why}; generation {generation} is won and cannot be given back, so the VM runs nowhere"
                );
                self.exit(StandbyExit::Failed(why), out);
            }
            (Err(_), Some(why)) => {
                self.exit(StandbyExit::Failed(may_be_won(&why, generation)), out);
            }
        }
    }

    fn take_over(&mut self, out: &mut Vec<Action>) {
        let State::Claiming { link, claim, checkpoint, released, handed, stop, .. } =
            std::mem::replace(&mut self.state, State::TakenOver)
        else {
            return;
        };
        let mut tail = TailUse::at(checkpoint, released);
        if planted!(self.bug, RepeatsUncommitted) {
            tail.repeated_through = u64::MAX;
        }
        if planted!(self.bug, RepeatsWhatHasLeft) {
            tail.repeated_after = 0;
        }
        if planted!(self.bug, GivesCommittedInput) {
            tail.given_after = checkpoint.saturating_sub(1);
        }
        // The order was for a standby. After a crash this may be the only side that has the VM, and the VM stops in order.
        // A VM that its operator has just moved here was to run on, and the other side is about to let go of it.
        let keeps = stop && handed;
        if keeps {
            out.push(Action::Note(Note::StopForgotten));
        }
        let stop = stop && !keeps;
        out.push(Action::TakeOver { link, checkpoint, generation: claim.generation, handed, tail, stop });
    }

    /// Ends the process, but not while an acknowledged checkpoint is half applied: the primary may die after
    /// that acknowledgement, and the copy here would be older than what this side answered for.
    pub(super) fn exit(&mut self, exit: StandbyExit, out: &mut Vec<Action>) {
        let applying = match &self.state {
            State::Committed { attached, committed, .. }
            | State::GivingUp(GivenUp { attached, committed: Some(committed), .. })
                if committed.applying =>
            {
                Some((attached.link, committed.checkpoint))
            }
            _ => None,
        };
        let may_wait = !matches!(exit, StandbyExit::Failed(_)) && !planted!(self.bug, ExitWhileApplying);
        match applying.filter(|_| may_wait) {
            Some((link, checkpoint)) => self.state = State::Leaving { link, checkpoint, exit },
            None => {
                self.state = State::Over;
                out.push(Action::Exit { reason: exit });
            }
        }
    }

    pub(super) fn exit_now(&mut self, out: &mut Vec<Action>) {
        if let State::Leaving { exit, .. } = std::mem::replace(&mut self.state, State::Over) {
            self.exit(exit, out);
        }
    }
}

/// What the operator must know of a copy that failed after it was claimed for.
fn may_be_won(why: &str, generation: u64) -> String {
    format!("{why}; the arbiter may have heard the claim of generation {generation}")
}
