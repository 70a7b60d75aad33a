//! The host that can take over.

mod loss;
mod types;

use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, RefuseCode, VmId};

use crate::claim::{Claim, Step};
use crate::planted::{Planted, planted};
use crate::{Link, LossReason, Timing};

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
#[derive(Debug, Clone, Copy)]
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
    /// Base pages are written as they come: memory is not the VM of any moment, so this side cannot take
    /// over.
    Base(Attached),
    /// `next` is staged whole and waits for the one before it to be applied.
    Committed {
        attached: Attached,
        committed: Committed,
        next: Option<(u64, CheckpointFlags)>,
    },
    /// The link is gone. Nothing is claimed before this side could run the VM: what fails once a generation
    /// is won leaves a VM that runs nowhere, perhaps although the other side is in the best of health.
    Settling {
        claim: Claim,
        committed: Committed,
        stop: bool,
    },
    /// Whoever wins the next generation runs the VM.
    Claiming {
        claim: Claim,
        checkpoint: u64,
        stop: bool,
        failed: Option<String>,
    },
    /// Nothing more is taken from anybody; the process ends when memory and disks are at the committed
    /// checkpoint.
    Leaving {
        checkpoint: u64,
        exit: StandbyExit,
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
            State::Settling { .. } => StandbyStatus::Settling,
            State::Claiming { .. } => StandbyStatus::Arbitrating,
            State::Leaving { .. } | State::Over => StandbyStatus::Over,
        }
    }

    /// The committed checkpoint, if there is one.
    pub fn committed(&self) -> Option<u64> {
        match &self.state {
            State::Committed { committed, .. } | State::Settling { committed, .. } => {
                Some(committed.checkpoint)
            }
            State::Claiming { checkpoint, .. } => Some(*checkpoint),
            State::Listening | State::Base(_) | State::Leaving { .. } | State::Over => None,
        }
    }

    /// Whether the driver may go on reading checkpoints. `false` while one that is staged whole waits for the
    /// one before it to be applied: both buffers are taken, and the link's own flow control must slow the
    /// primary down.
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
            State::Settling { .. } | State::Claiming { .. } => {
                return Err((
                    RefuseCode::Busy,
                    "this standby has lost its primary and is about to take over".into(),
                ));
            }
            State::Leaving { .. } | State::Over => {
                return Err((RefuseCode::Leaving, "this standby is about to end".into()));
            }
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
            State::Listening | State::Settling { .. } | State::Leaving { .. } | State::Over => None,
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
            Event::Settled { checkpoint } => self.settled(checkpoint, out),
            Event::End { link, reason } => self.end(link, reason, out),
            Event::LinkLost { link, why } => self.link_lost(link, why, out),
            Event::BadStream { link, why } => self.bad_stream(link, why, out),
            Event::Claimed { generation, result } => self.claimed(generation, result, out),
            Event::Stop => self.stop(out),
            Event::Failed { why } => self.failed(why, out),
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

    /// The clock comes before the event. While a checkpoint is being applied nobody listens to the link, so
    /// the silence of that time is this side's own and does not count.
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

    /// Acknowledges a checkpoint that is staged whole, and has it applied. The acknowledgement goes first: it
    /// is on the guest's way to its clients, and the commit does not depend on where in this host's memory
    /// the checkpoint is.
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
            State::Settling { committed, .. } if committed.checkpoint == checkpoint => {
                committed.applying = false;
                out.push(Action::Settle { checkpoint });
            }
            State::Leaving { checkpoint: last, .. } if *last == checkpoint => self.exit_now(out),
            _ => {}
        }
    }
}

impl Attached {
    fn deadline(&self) -> Duration {
        self.beat_at.min(self.heard + self.timing.dead_after)
    }
}
