//! The host that can take over.

mod types;

use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode, VmId};

use crate::claim::{Claim, Step, Verdict};
use crate::planted::{Planted, planted};
use crate::{ClaimResult, Link, LossReason, Timing};

pub use types::{
    Introduction, StandbyAction, StandbyConfig, StandbyEvent, StandbyExit, StandbyNote, StandbyStatus,
};

use StandbyAction as Action;
use StandbyEvent as Event;
use StandbyNote as Note;

/// The accepted connection.
#[derive(Debug)]
struct Attached {
    link: Link,
    generation: u64,
    timing: Timing,
    heard: Duration,
    /// The newest stamp heard.
    stamp: Duration,
    beat_at: Duration,
}

/// The committed checkpoint: acknowledged, and applied or being applied.
#[derive(Debug)]
struct Committed {
    checkpoint: u64,
    /// The VM ended with it.
    end: Option<EndReason>,
    /// Memory is still being written. Until it is done, nothing else is acknowledged and nothing is run.
    applying: bool,
}

#[derive(Debug)]
enum State {
    Listening,
    /// Base pages are written as they come: memory is not the VM of any moment, so this side cannot take over.
    Base(Attached),
    /// `next` is staged whole and waits for the one before it to be applied.
    Committed {
        attached: Attached,
        committed: Committed,
        next: Option<(u64, CheckpointFlags)>,
    },
    /// The link is gone; whoever wins the next generation runs the VM.
    Claiming {
        claim: Claim,
        committed: Committed,
        stop: bool,
    },
    /// Won; memory must be finished first.
    Won {
        generation: u64,
        committed: Committed,
        stop: bool,
    },
    Over,
}

/// The state machine of the standby. See the crate's documentation for how to drive it.
#[derive(Debug)]
pub struct Standby {
    config: StandbyConfig,
    state: State,
    /// The newest generation seen, of which VM: an older primary of the same VM is out of date.
    seen: Option<(VmId, u64)>,
    now: Duration,
    pub(crate) bug: Planted,
}

impl Standby {
    /// A standby that listens.
    pub fn new(config: StandbyConfig, now: Duration) -> Self {
        Self { config, state: State::Listening, seen: None, now, bug: Planted::default() }
    }

    /// What the machine is doing.
    pub fn status(&self) -> StandbyStatus {
        match &self.state {
            State::Listening => StandbyStatus::Listening,
            State::Base(_) => StandbyStatus::BaseSync,
            State::Committed { .. } => StandbyStatus::Protected,
            State::Claiming { .. } => StandbyStatus::Arbitrating,
            State::Won { .. } => StandbyStatus::Applying,
            State::Over => StandbyStatus::Over,
        }
    }

    /// The committed checkpoint, if there is one.
    pub fn committed(&self) -> Option<u64> {
        match &self.state {
            State::Committed { committed, .. }
            | State::Claiming { committed, .. }
            | State::Won { committed, .. } => Some(committed.checkpoint),
            State::Listening | State::Base(_) | State::Over => None,
        }
    }

    /// Whether the driver may go on reading checkpoints. `false` while one that is staged whole waits for the one before it
    /// to be applied: both buffers are taken, and the link's own flow control must slow the primary down.
    pub fn may_read(&self) -> bool {
        !matches!(self.state, State::Committed { next: Some(_), .. })
    }

    /// Whether a Hello would be accepted now.
    ///
    /// # Errors
    /// The code and the words for the refusal.
    pub fn would_accept(&self, hello: &Introduction) -> Result<(), (RefuseCode, String)> {
        if let Some(vm) = self.config.vm
            && vm != hello.vm
        {
            return Err((
                RefuseCode::WrongVm,
                format!("this standby is kept for VM {vm}, not for {}", hello.vm),
            ));
        }
        match &self.state {
            State::Listening => {}
            State::Base(_) | State::Committed { .. } => {
                return Err((RefuseCode::Busy, "another primary is attached".into()));
            }
            State::Claiming { .. } | State::Won { .. } => {
                return Err((
                    RefuseCode::Busy,
                    "this standby has lost its primary and is about to take over".into(),
                ));
            }
            State::Over => return Err((RefuseCode::Leaving, "this standby is about to end".into())),
        }
        match self.seen {
            Some((vm, seen)) if vm == hello.vm && hello.generation < seen => Err((
                RefuseCode::StaleGeneration,
                format!(
                    "generation {} is out of date: this VM was seen in generation {seen}",
                    hello.generation
                ),
            )),
            _ => Ok(()),
        }
    }

    /// When the next `Tick` is due, if no other event comes before.
    pub fn next_deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Base(attached) => Some(attached.deadline()),
            State::Committed { attached, committed, .. } if committed.applying => Some(attached.beat_at),
            State::Committed { attached, .. } => Some(attached.deadline()),
            State::Claiming { claim, .. } => claim.deadline(),
            State::Listening | State::Won { .. } | State::Over => None,
        }
    }

    /// Takes one event and appends what must be done to `out`.
    pub fn handle(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        self.look_at_clock(out);
        match event {
            Event::Tick => {}
            Event::Hello { link, hello } => self.hello(link, hello, out),
            Event::Heard { link } => self.heard(link, Duration::ZERO),
            Event::Heartbeat { link, stamp } => self.heard(link, stamp),
            Event::BasePages { link } => self.base_pages(link, out),
            Event::Staged { link, checkpoint, flags, stamp } => {
                self.heard(link, stamp);
                self.staged(link, checkpoint, flags, out);
            }
            Event::Applied { checkpoint } => self.applied(checkpoint, out),
            Event::End { link, reason } => self.end(link, reason, out),
            Event::LinkLost { link, why } => self.link_lost(link, why, out),
            Event::BadStream { link, why } => self.bad_stream(link, why, out),
            Event::Claimed { generation, result } => self.claimed(generation, result, out),
            Event::Stop => self.leave(LeaveReason::Stopped, StandbyExit::Stopped, out),
            Event::Failed { why } => self.leave(LeaveReason::Failed, StandbyExit::Failed(why), out),
        }
        self.go_on(out);
    }

    fn attached(&self) -> Option<&Attached> {
        match &self.state {
            State::Base(attached) | State::Committed { attached, .. } => Some(attached),
            _ => None,
        }
    }

    fn attached_mut(&mut self, link: Link) -> Option<&mut Attached> {
        match &mut self.state {
            State::Base(attached) | State::Committed { attached, .. } if attached.link == link => {
                Some(attached)
            }
            _ => None,
        }
    }

    /// The clock comes before the event. While a checkpoint is being applied nobody listens to the link, so the silence of
    /// that time is this side's own and does not count.
    fn look_at_clock(&mut self, out: &mut Vec<Action>) {
        if matches!(&self.state, State::Committed { committed, .. } if committed.applying) {
            return;
        }
        if let Some(attached) = self.attached()
            && self.now >= attached.heard + attached.timing.dead_after
        {
            let (link, silent) = (attached.link, self.now - attached.heard);
            self.link_lost(link, LossReason::Silent(silent), out);
        }
    }

    /// What is due in the state reached.
    fn go_on(&mut self, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Base(attached) | State::Committed { attached, .. } if self.now >= attached.beat_at => {
                attached.beat_at = self.now + attached.timing.heartbeat();
                out.push(Action::SendHeartbeat { link: attached.link, stamp: attached.stamp });
            }
            State::Claiming { claim, .. } => loop {
                match claim.step(self.now) {
                    Step::Nothing => break,
                    Step::Ask => out.push(Action::Claim { generation: claim.generation }),
                    Step::Report(why) => out.push(Action::Note(Note::ArbiterUnreachable { why })),
                }
            },
            _ => {}
        }
    }

    fn hello(&mut self, link: Link, hello: Introduction, out: &mut Vec<Action>) {
        if let Err((code, text)) = self.would_accept(&hello) {
            out.push(Action::Refuse { link, code, text });
            return;
        }
        let dead_after = self.config.timing.dead_after.max(hello.dead_after);
        self.seen = Some((hello.vm, hello.generation));
        self.state = State::Base(Attached {
            link,
            generation: hello.generation,
            timing: Timing { dead_after, ..self.config.timing },
            heard: self.now,
            stamp: Duration::ZERO,
            beat_at: self.now,
        });
        out.push(Action::Accept { link, generation: hello.generation, dead_after });
        out.push(Action::Note(Note::Attached { link }));
    }

    fn heard(&mut self, link: Link, stamp: Duration) {
        let now = self.now;
        if let Some(attached) = self.attached_mut(link) {
            attached.heard = now;
            attached.stamp = attached.stamp.max(stamp);
        }
    }

    fn base_pages(&mut self, link: Link, out: &mut Vec<Action>) {
        self.heard(link, Duration::ZERO);
        match &self.state {
            State::Base(attached) if attached.link == link => out.push(Action::ApplyBase { link }),
            State::Committed { .. } if planted!(self.bug, BaseAfterCommit) => {
                out.push(Action::ApplyBase { link })
            }
            _ => self.bad_stream(link, "base pages after the base was committed".into(), out),
        }
    }

    fn staged(&mut self, link: Link, checkpoint: u64, flags: CheckpointFlags, out: &mut Vec<Action>) {
        let due = match &self.state {
            State::Base(attached) if attached.link == link => flags.base_final,
            State::Committed { attached, committed, next: None } if attached.link == link => {
                !flags.base_final && committed.end.is_none() && checkpoint == committed.checkpoint + 1
            }
            State::Committed { attached, .. } if attached.link == link => false,
            _ => return,
        };
        if !due {
            return self.bad_stream(link, format!("checkpoint {checkpoint} was not due"), out);
        }
        match &mut self.state {
            State::Committed { committed, next, .. } if committed.applying => {
                *next = Some((checkpoint, flags))
            }
            _ => self.commit(checkpoint, flags, out),
        }
    }

    /// Acknowledges a checkpoint that is staged whole, and has it applied. The acknowledgement goes first: it is on the
    /// guest's way to its clients, and the commit does not depend on where in this host's memory the checkpoint is.
    fn commit(&mut self, checkpoint: u64, flags: CheckpointFlags, out: &mut Vec<Action>) {
        let first = matches!(self.state, State::Base(_));
        let (State::Base(attached) | State::Committed { attached, .. }) =
            std::mem::replace(&mut self.state, State::Over)
        else {
            return;
        };
        let Attached { link, generation, stamp, .. } = attached;
        out.push(Action::Ack { link, generation, checkpoint, stamp });
        out.push(Action::Apply { checkpoint });
        if first {
            out.push(Action::Note(Note::Protected { generation, checkpoint }));
        }
        let committed = Committed { checkpoint, end: flags.end, applying: true };
        self.state = State::Committed { attached, committed, next: None };
    }

    fn applied(&mut self, checkpoint: u64, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Committed { attached, committed, next } if committed.checkpoint == checkpoint => {
                committed.applying = false;
                attached.heard = self.now;
                if let Some((checkpoint, flags)) = next.take() {
                    self.commit(checkpoint, flags, out);
                }
            }
            State::Claiming { committed, .. } if committed.checkpoint == checkpoint => {
                committed.applying = false
            }
            State::Won { generation, committed, stop } if committed.checkpoint == checkpoint => {
                let (generation, stop) = (*generation, *stop);
                self.state = State::Over;
                out.push(Action::TakeOver { checkpoint, generation, stop });
            }
            _ => {}
        }
    }

    fn end(&mut self, link: Link, reason: EndReason, out: &mut Vec<Action>) {
        if self.attached_mut(link).is_some() {
            self.state = State::Over;
            out.push(Action::SendLeave { link, reason: LeaveReason::Followed });
            out.push(Action::Hangup { link });
            self.exit(StandbyExit::Followed(reason), out);
        }
    }

    fn link_lost(&mut self, link: Link, why: LossReason, out: &mut Vec<Action>) {
        let Some(attached) = self.attached_mut(link) else { return };
        let (heard, generation, retry) = (attached.heard, attached.generation, attached.timing.retry);
        let silent = self.now - heard;
        let committed = matches!(self.state, State::Committed { .. });
        out.push(Action::Hangup { link });
        out.push(Action::Note(Note::LinkLost { why, silent, committed }));
        let State::Committed { mut committed, next, .. } =
            std::mem::replace(&mut self.state, State::Listening)
        else {
            out.push(Action::DiscardAll);
            return;
        };
        if let Some(reason) = committed.end
            && !planted!(self.bug, TakeOverAfterEnd)
        {
            self.state = State::Over;
            return self.exit(StandbyExit::Followed(reason), out);
        }
        if let (true, Some((checkpoint, _))) = (planted!(self.bug, TakeOverFromUnacknowledged), next) {
            committed.checkpoint = checkpoint;
        }
        out.push(Action::DiscardStaged);
        out.push(Action::Note(Note::Arbitrating { generation: generation + 1 }));
        let claim = Claim::new(generation + 1, self.now, retry);
        self.state = State::Claiming { claim, committed, stop: false };
        if planted!(self.bug, TakeOverWithoutWin) {
            self.take_over(out);
        }
    }

    /// The stream is damaged, but the primary that sends it may be in good health: to take over from it would harm the VM.
    /// So this side gives up its claim and starts again, and the primary, told so, does the same.
    fn bad_stream(&mut self, link: Link, why: String, out: &mut Vec<Action>) {
        if self.attached_mut(link).is_none() {
            out.push(Action::Hangup { link });
            return;
        }
        out.push(Action::SendLeave { link, reason: LeaveReason::BadStream });
        if planted!(self.bug, ClaimAfterLeave) {
            return self.link_lost(link, LossReason::Closed, out);
        }
        out.push(Action::Hangup { link });
        out.push(Action::Note(Note::StreamRefused { why }));
        out.push(Action::DiscardAll);
        self.state = State::Listening;
    }

    /// The operator's stop, or a failure of this side.
    fn leave(&mut self, reason: LeaveReason, exit: StandbyExit, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Over => return,
            State::Claiming { stop, .. } | State::Won { stop, .. } if reason == LeaveReason::Stopped => {
                // The claim may have been heard already. Whoever walks away from it now leaves a VM that nobody runs and
                // that the other side can never win.
                if !std::mem::replace(stop, true) {
                    out.push(Action::Note(Note::StopWaits));
                }
                return;
            }
            State::Base(attached) | State::Committed { attached, .. } => {
                out.push(Action::SendLeave { link: attached.link, reason });
                out.push(Action::Hangup { link: attached.link });
            }
            State::Listening | State::Claiming { .. } | State::Won { .. } => {}
        }
        self.state = State::Over;
        self.exit(exit, out);
    }

    fn claimed(&mut self, generation: u64, result: ClaimResult, out: &mut Vec<Action>) {
        let State::Claiming { claim, .. } = &mut self.state else { return };
        match claim.answer(self.now, generation, result, self.bug) {
            Err(Step::Report(why)) => out.push(Action::Note(Note::ArbiterUnreachable { why })),
            Err(_) => {}
            Ok(Verdict::Won) => {
                out.push(Action::Note(Note::Won { generation }));
                self.take_over(out);
            }
            Ok(Verdict::Lost { owner }) => {
                self.state = State::Over;
                out.push(Action::DiscardAll);
                self.exit(StandbyExit::Lost { generation, owner }, out);
            }
        }
    }

    fn take_over(&mut self, out: &mut Vec<Action>) {
        let State::Claiming { claim, committed, stop } = std::mem::replace(&mut self.state, State::Over)
        else {
            return;
        };
        let generation = claim.generation;
        if committed.applying && !planted!(self.bug, TakeOverBeforeApplied) {
            self.state = State::Won { generation, committed, stop };
        } else {
            out.push(Action::TakeOver { checkpoint: committed.checkpoint, generation, stop });
        }
    }

    fn exit(&mut self, reason: StandbyExit, out: &mut Vec<Action>) {
        out.push(Action::Exit { code: reason.code(), reason });
    }
}

impl Attached {
    fn deadline(&self) -> Duration {
        self.beat_at.min(self.heard + self.timing.dead_after)
    }
}
