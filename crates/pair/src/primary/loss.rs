//! From the loss of the link until it is known who runs the VM.

use outlive_epoch::LeaveReason;

use super::{Action, ExitReason, Kept, Note, Primary, State};
use crate::claim::{Claim, Step, Verdict};
use crate::planted::planted;
use crate::redial::Answer;
use crate::{ClaimResult, Link, LossReason};

impl Primary {
    pub(super) fn link_lost(&mut self, link: Link, why: LossReason, out: &mut Vec<Action>) {
        match &self.state {
            State::Dialling { link: dialled } if *dialled == link => {
                self.dial_later(Answer::Nothing);
                out.push(Action::Hangup { link });
            }
            State::Greeting { link: greeted, .. } if *greeted == link => {
                self.dial_later(Answer::Nothing);
                out.push(Action::Hangup { link });
                self.say(Note::DialFailed { why: why.to_string() }, out);
            }
            State::BaseSync(attached) if attached.link == link => {
                // This standby does not have a whole VM, so it cannot take over and there is nothing to
                // decide.
                self.dial_later(Answer::NoBase);
                out.push(Action::Hangup { link });
                out.push(Action::Note(Note::LinkLost { why, held: false }));
            }
            State::Guarding(attached, guard) if attached.link == link => {
                let committed = guard.acked >= guard.base;
                if let LossReason::Local(why) = &why
                    && guard.dismissed.is_none()
                    && guard.handing.is_none()
                {
                    return self.dismiss(link, why.clone(), out);
                }
                let why = match (&guard.dismissed, why) {
                    (Some(first), LossReason::Silent(_) | LossReason::Local(_)) => {
                        LossReason::Local(first.clone())
                    }
                    (_, why) => why,
                };
                out.push(Action::Hangup { link });
                out.push(Action::Note(Note::LinkLost { why, held: true }));
                if planted!(self.bug, SkipArbitration)
                    || planted!(self.bug, BaseLossClaimsNothingAfterCapture) && !committed
                {
                    return self.go_on_alone(self.generation + 1, out);
                }
                let claim = Claim::new(self.generation + 1, self.may_ask_from(), self.timing.retry);
                out.push(Action::Note(Note::Arbitrating { generation: claim.generation }));
                self.state = State::Arbitrating { link, claim };
            }
            _ => {}
        }
    }

    /// Something of this side's own has failed, and nothing is wrong with the standby: it would ask the arbiter as soon as
    /// the link closes, and half of the time win a VM that runs well here. So it is told that the VM goes on without it,
    /// and the link closes when it has handed its right over. If it does not, both sides ask.
    pub(super) fn dismiss(&mut self, link: Link, why: String, out: &mut Vec<Action>) {
        let State::Guarding(_, guard) = &mut self.state else { return };
        out.push(Action::Note(Note::Dismissing { why: why.clone() }));
        guard.dismissed = Some(why);
        out.push(Action::Dismiss { link });
        if planted!(self.bug, GoesOnUnanswered) {
            self.go_on_alone(self.generation, out);
        }
    }

    /// The standby leaves, with its right. One that has not acknowledged the base has no right: it had nothing
    /// whole before, and what it acknowledges comes before its leave on the same connection. So nobody is asked,
    /// and no generation is used up, however often a standby fails at the base.
    pub(super) fn left(&mut self, link: Link, reason: LeaveReason, out: &mut Vec<Action>) {
        match &self.state {
            State::Guarding(attached, guard) if attached.link == link && guard.acked < guard.base => {
                self.no_base(link, LossReason::Left(reason), out);
            }
            _ => self.link_lost(link, LossReason::Left(reason), out),
        }
    }

    /// The base was captured, but no standby can have it: the VM continues in its generation.
    pub(super) fn no_base(&mut self, link: Link, why: LossReason, out: &mut Vec<Action>) {
        self.dial_later(Answer::NoBase);
        out.push(Action::Hangup { link });
        out.push(Action::Note(Note::LinkLost { why, held: false }));
        // A part of the output may be held.
        out.push(Action::ReleaseAll { generation: self.generation });
    }

    /// The standby has left and handed its right over: nobody else can run the VM. What it said last may be
    /// heard after its link was declared lost: the thread that writes met the end of the connection first, or
    /// this process stood still for a while.
    pub(super) fn released(&mut self, link: Link, reason: LeaveReason, out: &mut Vec<Action>) {
        let why = LossReason::Left(reason);
        match &self.state {
            State::Guarding(attached, guard) if attached.link == link => {
                let handing = guard.handing.is_some();
                let why = guard.dismissed.clone().map_or(why, LossReason::Local);
                out.push(Action::Hangup { link });
                out.push(Action::Note(Note::LinkLost { why, held: false }));
                if handing {
                    out.push(Action::Keep { why: Kept::NotTaken });
                }
                self.go_on_alone(self.generation, out);
            }
            State::Arbitrating { .. } if planted!(self.bug, RightThrownAway) => {}
            State::Arbitrating { link: lost, claim } if *lost == link => {
                out.push(Action::Note(Note::RightHandedOver));
                if !claim.was_asked() || planted!(self.bug, ClaimForgotten) {
                    return self.go_on_alone(self.generation, out);
                }
                self.state = State::Unrivalled(claim.clone());
                out.push(Action::ReleaseAll { generation: self.generation });
            }
            _ => self.link_lost(link, why, out),
        }
    }

    pub(super) fn claimed(&mut self, generation: u64, result: ClaimResult, out: &mut Vec<Action>) {
        let held = matches!(self.state, State::Arbitrating { .. });
        let (State::Arbitrating { claim, .. } | State::Unrivalled(claim)) = &mut self.state else { return };
        match claim.answer(self.now, generation, result, self.bug) {
            Err(Step::Report(why)) => out.push(Action::Note(Note::ArbiterUnreachable { why, held })),
            Err(_) => {}
            Ok(Verdict::Won) => {
                out.push(Action::Note(Note::Won { generation }));
                self.go_on_alone(generation, out);
            }
            Ok(Verdict::Lost { .. }) if planted!(self.bug, LoserGoesOn) => self.go_on_alone(generation, out),
            Ok(Verdict::Lost { owner }) => self.fenced(generation, owner, out),
        }
    }

    /// The VM runs elsewhere: at the standby that it was left to, or by somebody's hand. A claim that is under way says
    /// the same, or that this process has won after all.
    pub(super) fn superseded(&mut self, generation: u64, owner: String, out: &mut Vec<Action>) {
        let waits = match &self.state {
            State::Arbitrating { claim, .. } => claim.was_asked(),
            State::Unrivalled(_) | State::Over { .. } => true,
            _ => false,
        };
        if waits || generation <= self.generation || planted!(self.bug, SupersededIgnored) {
            return;
        }
        if let Some(link) = self.link() {
            out.push(Action::Hangup { link });
        }
        self.fenced(generation, owner, out);
    }

    fn fenced(&mut self, generation: u64, owner: String, out: &mut Vec<Action>) {
        self.state = State::Over { fenced: true };
        out.push(Action::Fence { generation, owner: owner.clone() });
        out.push(Action::StopGuest);
        out.push(Action::Exit { reason: ExitReason::Fenced { generation, owner } });
    }

    fn go_on_alone(&mut self, generation: u64, out: &mut Vec<Action>) {
        self.nobody_came();
        self.generation = generation;
        self.timing = self.config.timing;
        self.redial.begin_anew(self.now);
        self.state = State::Alone { dial_at: self.now };
        out.push(Action::ReleaseAll { generation });
    }
}
