//! The host that can take over.

#[cfg(test)]
mod age;
mod giving_up;
mod loss;
mod types;
mod unwelcome;

use std::collections::VecDeque;
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, VmId};

use self::giving_up::GivenUp;

use crate::claim::{Claim, Step};
use crate::planted::{Planted, planted};
use crate::{Link, LossReason, Timing};

pub use types::{
    Introduction, StandbyAction, StandbyConfig, StandbyEvent, StandbyExit, StandbyNote, StandbyStatus,
};
pub use unwelcome::Unwelcome;

use StandbyAction as Action;
use StandbyEvent as Event;
use StandbyNote as Note;

/// The accepted connection.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
struct Attached {
    link: Link,
    generation: u64,
    timing: Timing,
    slots: u64,
    shared_storage: bool,
    heard: Duration,
    /// The newest stamp heard.
    stamp: Duration,
    beat_at: Duration,
    /// Through which epoch the primary's output is known to have left.
    released: u64,
    /// Checkpoints that are staged whole and not acknowledged, the oldest first.
    staged: VecDeque<Staged>,
}

#[derive(Debug, Clone, Copy)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct Staged {
    checkpoint: u64,
    flags: CheckpointFlags,
}

/// How long an orderly stop waits at most until the rest of the copy says that it was given up. Without that
/// the primary has to ask the arbiter. From when the copy's turn has come, the patience with a silent host
/// bounds it too: nothing is acknowledged meanwhile, and the guest's clients wait.
const RELEASE: Duration = Duration::from_secs(5);

/// The committed checkpoint: acknowledged, and applied or being applied.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct Committed {
    checkpoint: u64,
    /// Set if the VM ended with it.
    end: Option<EndReason>,
    /// The VM stood still after it, to be handed over to this side.
    handed: bool,
    /// Whether memory is still being written. Until that is done, nothing else is acknowledged and nothing
    /// runs.
    applying: bool,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
enum State {
    Listening,
    /// The memory of an earlier copy is not free yet.
    Discarding {
        link: Link,
    },
    /// Base pages are written as they come. So memory is not the VM of any one moment, and this side cannot
    /// take over. The oldest staged checkpoint, if there is one, is the base, and it is being tried.
    Base(Attached),
    /// Staged checkpoints wait until the previous one is applied.
    Committed {
        attached: Attached,
        committed: Committed,
        /// The operator wants this side stopped. Nothing more is acknowledged, and the copy has until this
        /// time to say that it was given up. Should the primary die meanwhile, this side still takes over.
        releasing: Option<Duration>,
    },
    /// See [`giving_up`].
    GivingUp(GivenUp),
    /// The link is gone. Nothing is claimed before this side could run the VM: a failure after a generation
    /// is won leaves a VM that runs nowhere, perhaps although the other side is in perfect health.
    Settling {
        link: Link,
        claim: Claim,
        committed: Committed,
        released: u64,
        stop: bool,
    },
    /// Whichever side wins the next generation runs the VM.
    Claiming {
        link: Link,
        claim: Claim,
        checkpoint: u64,
        released: u64,
        /// The VM is being handed over.
        handed: bool,
        stop: bool,
        failed: Option<String>,
    },
    /// Nothing more is accepted from anybody; the process ends when memory and disks are at the committed
    /// checkpoint.
    Leaving {
        link: Link,
        checkpoint: u64,
        exit: StandbyExit,
    },
    /// The VM runs here, and another state machine is in charge of it.
    TakenOver,
    Over,
}

/// The state machine of the standby. The crate's documentation says how to drive it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Standby {
    config: StandbyConfig,
    state: State,
    /// The newest generation seen, and of which VM: an older primary of the same VM is out of date.
    seen: Option<(VmId, u64)>,
    /// When the waiting thread gave its last sign.
    ticked: Duration,
    now: Duration,
    pub(crate) bug: Planted,
}

impl Standby {
    /// A standby that listens.
    pub fn new(config: StandbyConfig, now: Duration) -> Self {
        Self { config, state: State::Listening, seen: None, ticked: now, now, bug: Planted::default() }
    }

    /// What the machine is doing.
    pub fn status(&self) -> StandbyStatus {
        match &self.state {
            State::Listening => StandbyStatus::Listening,
            State::Discarding { .. } | State::GivingUp(_) => StandbyStatus::Discarding,
            State::Base(_) => StandbyStatus::BaseSync,
            State::Committed { .. } => StandbyStatus::Protected,
            State::Settling { .. } => StandbyStatus::Settling,
            State::Claiming { .. } => StandbyStatus::Arbitrating,
            State::Leaving { .. } | State::TakenOver | State::Over => StandbyStatus::Over,
        }
    }

    /// The committed checkpoint, if there is one.
    pub fn committed(&self) -> Option<u64> {
        match &self.state {
            State::Committed { committed, .. } | State::Settling { committed, .. } => {
                Some(committed.checkpoint)
            }
            State::Claiming { checkpoint, .. } => Some(*checkpoint),
            _ => None,
        }
    }

    /// The connection of the attached primary.
    pub fn link(&self) -> Option<Link> {
        self.attached().map(|attached| attached.link)
    }

    /// Whether a Hello would be accepted now.
    ///
    /// # Errors
    /// See [`Unwelcome`].
    pub fn would_accept(&self, now: Duration, hello: &Introduction) -> Result<(), Unwelcome> {
        if let Some(served) = self.config.vm
            && served != hello.vm
        {
            return Err(Unwelcome::WrongVm { served, introduced: hello.vm });
        }
        match &self.state {
            State::Listening if self.gets_on(now, self.config.timing.dead_after * 2) => {}
            State::Listening => return Err(Unwelcome::StandsStill),
            State::Discarding { .. } | State::GivingUp(_) => return Err(Unwelcome::Discarding),
            State::Base(_) | State::Committed { .. } => return Err(Unwelcome::Attached),
            State::Settling { .. } | State::Claiming { .. } => return Err(Unwelcome::TakingOver),
            State::TakenOver => return Err(Unwelcome::TakenOver),
            State::Leaving { .. } | State::Over => return Err(Unwelcome::Ending),
        }
        match self.seen {
            Some((vm, seen)) if vm == hello.vm && hello.generation < seen => {
                Err(Unwelcome::Stale { introduced: hello.generation, seen })
            }
            _ => Ok(()),
        }
    }

    /// When the next `Tick` is due, if no other event comes before.
    pub fn next_deadline(&self) -> Option<Duration> {
        match &self.state {
            // Nothing is due; it is the sign that the thread waits.
            State::Listening => Some(self.ticked + self.config.timing.dead_after / 2),
            State::Committed { attached, releasing: Some(until), .. } => {
                Some(attached.deadline().min(*until))
            }
            State::Base(attached) | State::Committed { attached, .. } => Some(attached.deadline()),
            State::GivingUp(given) => Some(given.until),
            State::Claiming { claim, .. } => claim.deadline(),
            _ => None,
        }
    }

    /// Takes one event and appends what must be done to `out`.
    pub fn handle(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        self.look_at_clock(out);
        // Only the waiting thread hands these in.
        let waits = matches!(event, Event::Tick);
        match event {
            Event::Tick => self.ticked = self.now,
            Event::Hello { link, hello } => self.hello(link, hello, out),
            Event::TurnedAway { hello } => self.turned_away(&hello),
            Event::Heard { link } => self.heard(link, Duration::ZERO),
            Event::Heartbeat { link, stamp } => self.heard(link, stamp),
            Event::OutputReleased { link, through } => self.output_released(link, through),
            Event::BasePages { link } => self.base_pages(link, out),
            Event::Staged { link, checkpoint, flags, stamp } => {
                self.heard(link, stamp);
                self.staged(link, Staged { checkpoint, flags }, out);
            }
            Event::Tried { link, checkpoint, result } => self.tried(link, checkpoint, result, out),
            Event::Applied { link, checkpoint } => self.applied(link, checkpoint, out),
            Event::Settled { link, checkpoint } => self.settled(link, checkpoint, out),
            Event::Discarded { link } => self.discarded(link),
            Event::Released { link, result } => self.released(link, result, out),
            Event::End { link, reason } => self.end(link, reason, out),
            Event::Dismissed { link } => self.dismissed(link, out),
            Event::LinkLost { link, why } => self.link_lost(link, why, out),
            Event::BadStream { link, why } => self.bad_stream(link, why, out),
            Event::Claimed { generation, result } => self.claimed(generation, result, out),
            Event::Stop => self.stop(out),
            Event::Failed { link, why } => self.failed(link, why, out),
            Event::Differs { link, why } => self.differs(link, why, out),
        }
        self.go_on(waits, out);
    }

    /// Whether the waiting thread, which would also run the VM, has given a sign within this time.
    fn gets_on(&self, now: Duration, within: Duration) -> bool {
        now.max(self.now) < self.ticked + within || planted!(self.bug, StampsWithoutProgress)
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

    /// The clock comes before the event.
    fn look_at_clock(&mut self, out: &mut Vec<Action>) {
        let hurry = if planted!(self.bug, ImpatientStandby) { 10 } else { 1 };
        if let Some(attached) = self.attached()
            && self.now >= attached.heard + attached.timing.dead_after / hurry
        {
            let (link, silent) = (attached.link, self.now - attached.heard);
            self.link_lost(link, LossReason::Silent(silent), out);
        }
        if let State::Committed { releasing: Some(until), .. } = &self.state
            && self.now >= *until
        {
            self.leave(LeaveReason::Stopped, StandbyExit::Stopped, out);
        }
        self.look_at_what_is_given_up(out);
    }

    /// Does what is due in the state that was reached.
    fn go_on(&mut self, waits: bool, out: &mut Vec<Action>) {
        let may_claim = waits || planted!(self.bug, AnyThreadClaims);
        match &mut self.state {
            State::Base(attached) | State::Committed { attached, .. } if self.now >= attached.beat_at => {
                attached.beat_at = self.now + attached.timing.heartbeat();
                out.push(Action::SendHeartbeat { link: attached.link, stamp: attached.stamp });
            }
            // A host whose waiting thread hangs would win a VM that it does not run.
            State::Claiming { claim, .. } if may_claim => loop {
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
        if let Err(why) = self.would_accept(self.now, &hello) {
            out.push(Action::Refuse { link, code: why.code(), text: why.to_string() });
            return;
        }
        let dead_after = self.config.timing.dead_after.max(hello.dead_after);
        self.seen = Some((hello.vm, hello.generation));
        self.state = State::Base(Attached {
            link,
            generation: hello.generation,
            timing: Timing { dead_after, ..self.config.timing },
            slots: hello.slots,
            shared_storage: hello.shared_storage,
            heard: self.now,
            stamp: Duration::ZERO,
            beat_at: self.now,
            released: 0,
            staged: VecDeque::new(),
        });
        out.push(Action::Accept { link, generation: hello.generation, dead_after });
        out.push(Action::Note(Note::Attached { link }));
    }

    fn heard(&mut self, link: Link, stamp: Duration) {
        let now = self.now;
        let patience = self.attached().map_or(Duration::ZERO, |attached| attached.timing.dead_after);
        // Returning a stamp is a promise to take over. If this side could not take over, it returns an old
        // one.
        let stamp = if self.gets_on(now, patience) { stamp } else { Duration::ZERO };
        if let Some(attached) = self.attached_mut(link) {
            attached.heard = now;
            attached.stamp = attached.stamp.max(stamp);
        }
    }

    /// No sign of life: whoever sends it may be alive where the thread that takes checkpoints is not.
    fn output_released(&mut self, link: Link, through: u64) {
        let attached = match &mut self.state {
            State::GivingUp(given) if given.attached.link == link => Some(&mut given.attached),
            _ => self.attached_mut(link),
        };
        if let Some(attached) = attached {
            attached.released = attached.released.max(through);
        }
    }

    fn base_pages(&mut self, link: Link, out: &mut Vec<Action>) {
        self.heard(link, Duration::ZERO);
        match &self.state {
            State::Base(attached) if attached.link == link && attached.staged.is_empty() => {
                out.push(Action::ApplyBase { link })
            }
            State::Committed { .. } if planted!(self.bug, BaseAfterCommit) => {
                out.push(Action::ApplyBase { link })
            }
            State::GivingUp(_) => {}
            _ => self.bad_stream(link, "base pages after the base was complete".into(), out),
        }
    }

    fn staged(&mut self, link: Link, staged: Staged, out: &mut Vec<Action>) {
        let (due, committed) = match &self.state {
            State::Base(attached) if attached.link == link => (attached.is_due(None, staged), None),
            State::Committed { attached, committed, .. } if attached.link == link => {
                (attached.is_due(Some(committed), staged), Some(*committed))
            }
            _ => return,
        };
        if !due {
            let why = format!("checkpoint {} was not due", staged.checkpoint);
            return self.bad_stream(link, why, out);
        }
        let Some(attached) = self.attached_mut(link) else { return };
        attached.staged.push_back(staged);
        let first = attached.staged.len() == 1;
        match committed {
            None if first && !planted!(self.bug, AckUntried) => {
                out.push(Action::Try { link, checkpoint: staged.checkpoint });
            }
            None if !first => {}
            Some(committed) if committed.applying => {}
            _ => self.commit(out),
        }
    }

    fn tried(&mut self, link: Link, checkpoint: u64, result: Result<(), String>, out: &mut Vec<Action>) {
        match &self.state {
            State::Base(attached) if attached.link == link => match attached.staged.front() {
                Some(base) if base.checkpoint == checkpoint => {}
                _ => return,
            },
            _ => return,
        }
        let patience = self.attached().map_or(Duration::ZERO, |attached| attached.timing.dead_after);
        match result {
            // The answer says "protected", which is true only where somebody would take over.
            Ok(()) if !self.gets_on(self.now, patience) => self.hangs(link, out),
            Ok(()) => self.commit(out),
            Err(why) => self.bad_stream(link, why, out),
        }
    }

    /// Acknowledges the oldest checkpoint that is staged whole, and has it applied. The acknowledgement goes
    /// first: the guest's answers to its clients wait for it, and the commit does not depend on where in this
    /// host's memory the checkpoint is.
    fn commit(&mut self, out: &mut Vec<Action>) {
        let first = matches!(self.state, State::Base(_));
        if matches!(self.state, State::Committed { releasing: Some(_), .. }) {
            return;
        }
        let Some(attached) = self.attached() else { return };
        let (link, generation, stamp) = (attached.link, attached.generation, attached.stamp);
        let Some(Staged { checkpoint, flags }) = self.attached_mut(link).and_then(|it| it.staged.pop_front())
        else {
            return;
        };
        out.push(Action::Ack { link, generation, checkpoint, stamp });
        out.push(Action::Apply { link, checkpoint });
        if first {
            out.push(Action::Note(Note::Protected { generation, checkpoint }));
        }
        let committed = Committed { checkpoint, end: flags.end, handed: flags.hand_over, applying: true };
        if let State::Base(attached) | State::Committed { attached, .. } =
            std::mem::replace(&mut self.state, State::Over)
        {
            self.state = State::Committed { attached, committed, releasing: None };
        }
    }

    fn applied(&mut self, from: Link, checkpoint: u64, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Committed { attached, committed, releasing }
                if attached.link == from && committed.checkpoint == checkpoint =>
            {
                committed.applying = false;
                if let Some(until) = releasing {
                    *until = (*until).min(self.now + attached.timing.dead_after);
                    out.push(Action::Release { link: from });
                }
                self.commit(out);
            }
            State::GivingUp(given) if given.attached.link == from => given.applied(checkpoint, out),
            State::Settling { link, committed, .. }
                if *link == from && committed.checkpoint == checkpoint && committed.applying =>
            {
                committed.applying = false;
                out.push(Action::Settle { link: *link, checkpoint });
            }
            State::Leaving { link, checkpoint: last, .. } if *link == from && *last == checkpoint => {
                self.exit_now(out)
            }
            _ => {}
        }
    }

    fn discarded(&mut self, discarded: Link) {
        if matches!(self.state, State::Discarding { link } if link == discarded) {
            self.state = State::Listening;
        }
    }
}

impl Attached {
    fn deadline(&self) -> Duration {
        self.beat_at.min(self.heard + self.timing.dead_after)
    }

    /// Whether a checkpoint may come now: the base first, then one after the other, and no more at a time
    /// than the primary announced.
    fn is_due(&self, committed: Option<&Committed>, next: Staged) -> bool {
        let last = self.staged.back().map(|it| (it.checkpoint, it.flags.end.is_some() || it.flags.hand_over));
        let last = last.or(committed.map(|it| (it.checkpoint, it.end.is_some() || it.handed)));
        let follows = match last {
            None => next.flags.base_final,
            Some((checkpoint, last)) => {
                !next.flags.base_final && !last && Some(next.checkpoint) == checkpoint.checked_add(1)
            }
        };
        follows && (self.staged.len() as u64) < self.slots
    }
}
