//! The standby's driver.
//!
//! The threads that a program needs around it:
//!
//! ```text
//! reader (per link)   reads all the time: stamps, base pages, checkpoints into staging   ──► events
//! applier             tries, applies, discards, one after the other, in their order      ──► events
//! disks, arbiter      settle; answer claims                                              ──► events
//! main                waits for deadlines; takes over; ends
//! ```
//!
//! * The reader never waits for the applier. A checkpoint that is staged while another one is applied waits
//!   for its *acknowledgement*. But its stamp was heard, and heartbeats are heard and answered all the while,
//!   so a slow apply or a slow disk costs speed and not the protection. The primary has at most `slots` (of
//!   its Hello) unacknowledged checkpoints, so with `slots + 1` staging buffers the reader never waits,
//!   whatever the applier does.
//! * Before it reports a checkpoint as `Staged` the reader puts the full buffer into the ports, under the
//!   same lock. The ports own the buffer until [`apply`](StandbyPorts::apply) hands it to the applier, or
//!   [`hang_up`](StandbyPorts::hang_up) or [`discard`](StandbyPorts::discard) drops it.
//! * After an `Applied` the applier gives the buffer back to the reader of that link, if there still is one.

use std::fmt;
use std::time::Duration;

use outlive_epoch::{LeaveReason, RefuseCode};

use super::After;
use super::core::{Core, Hands};
use crate::planted::{Planted, planted};
use crate::{
    ClaimResult, Introduction, Link, LossReason, Standby, StandbyAction as Action, StandbyEvent as Event,
    StandbyExit, StandbyNote, TailUse, Unwelcome,
};

/// A takeover that was won.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeOver {
    /// The connection over which the copy came.
    pub link: Link,
    /// The checkpoint of memory and state.
    pub checkpoint: u64,
    /// The generation won.
    pub generation: u64,
    /// Whether the VM stood still at the primary after this checkpoint, to be handed over.
    pub handed: bool,
    /// Which frames of the tail are used.
    pub tail: TailUse,
    /// Whether the operator wants the VM ended in order at once.
    pub stop: bool,
}

/// The effects of the standby's decisions. [The module](super) has the rules that all methods keep.
///
/// Bytes for a link are queued here and written in the drain ([`After::drain`]); an error of that write is
/// reported as [`Event::LinkLost`].
pub trait StandbyPorts {
    /// Why a method cannot do its work. Nothing is decided by it: the driver reports it to the state machine in
    /// words, for a person.
    type Failure: fmt::Display;

    /// Queue preface and Accept.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn accept(&mut self, link: Link, generation: u64, dead_after: Duration) -> Result<(), Self::Failure>;

    /// Queue preface and Refuse, and have the link closed after it.
    fn refuse(&mut self, link: Link, code: RefuseCode, text: String);

    /// Have the applier try the base for a takeover; report [`Event::Tried`]. Memory is not changed; the
    /// machine may be.
    ///
    /// # Errors
    /// No thread is there to do it.
    fn try_base(&mut self, link: Link, checkpoint: u64) -> Result<(), Self::Failure>;

    /// Queue an acknowledgement.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn ack(
        &mut self,
        link: Link,
        generation: u64,
        checkpoint: u64,
        stamp: Duration,
    ) -> Result<(), Self::Failure>;

    /// Hand the staged checkpoint to the applier. The applier writes all of it to memory, keeps the state and
    /// gives the disk writes to their thread, whatever happens to the link; then report [`Event::Applied`].
    ///
    /// # Errors
    /// No thread is there to do it: this copy is worthless.
    fn apply(&mut self, link: Link, checkpoint: u64) -> Result<(), Self::Failure>;

    /// Have the disks brought to the checkpoint, durably; report [`Event::Settled`] or [`Event::Failed`].
    ///
    /// # Errors
    /// No thread is there to do it: this copy is worthless.
    fn settle(&mut self, link: Link, checkpoint: u64) -> Result<(), Self::Failure>;

    /// Have whatever this process leaves of the copy say, durably, that it is given up; report
    /// [`Event::Released`].
    ///
    /// # Errors
    /// No thread is there to do it.
    fn release(&mut self, link: Link) -> Result<(), Self::Failure>;

    /// Queue a heartbeat with this stamp.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn send_heartbeat(&mut self, link: Link, stamp: Duration) -> Result<(), Self::Failure>;

    /// Queue the orderly leave.
    fn send_leave(&mut self, link: Link, reason: LeaveReason);

    /// Have the link closed, after what is queued for it. Drop everything that is staged from it, whole or
    /// partial, except for what the applier has.
    fn hang_up(&mut self, link: Link);

    /// Have the applier throw away the copy of this link, after its current work; then report
    /// [`Event::Discarded`]. No other primary is accepted before.
    fn discard(&mut self, link: Link);

    /// Queue the question for the arbiter; its answer is reported as [`Event::Claimed`].
    ///
    /// # Errors
    /// It cannot be asked now. The claim is repeated as if the arbiter were out of reach.
    fn claim(&mut self, generation: u64) -> Result<(), Self::Failure>;

    /// Have the VM run from the applied checkpoint. The applier is idle then.
    fn take_over(&mut self, order: TakeOver);

    /// Have the process ended, after what was queued before.
    fn exit(&mut self, reason: StandbyExit);

    /// Have something logged, but not on this thread, which holds the lock. The time of a note is the time of
    /// this call.
    fn note(&mut self, note: StandbyNote);
}

/// The standby's state machine with its ports. See [the module](super).
pub struct StandbyDriver<P> {
    core: Core<Standby>,
    ports: P,
    /// Whether the current base pages may be written.
    base_may: bool,
}

impl<P: StandbyPorts> StandbyDriver<P> {
    /// A driver of a standby that listens.
    pub fn new(machine: Standby, ports: P) -> Self {
        let bug = machine.bug;
        Self { core: Core::new(machine, bug), ports, base_may: false }
    }

    /// The state machine, for questions.
    pub fn machine(&self) -> &Standby {
        &self.core.machine
    }

    /// The ports.
    pub fn ports(&self) -> &P {
        &self.ports
    }

    /// The ports.
    pub fn ports_mut(&mut self) -> &mut P {
        &mut self.ports
    }

    /// Whether this introduction would be accepted now: ask this before memory is set aside for its VM.
    ///
    /// # Errors
    /// See [`Unwelcome`].
    pub fn would_accept(&self, now: Duration, hello: &Introduction) -> Result<(), Unwelcome> {
        self.core.machine.would_accept(now, hello)
    }

    /// Takes an event and carries out what follows from it. For base pages see
    /// [`base_pages`](Self::base_pages).
    pub fn handle(&mut self, now: Duration, event: Event) -> After {
        let mut hands = Carrying { ports: &mut self.ports, base_may: &mut self.base_may, bug: self.core.bug };
        self.core.run(now, event, &mut hands)
    }

    /// A section of base pages (or of the base synchronisation of disks) has arrived: returns whether it may
    /// be written. The permission lasts until the reader reads on.
    pub fn base_pages(&mut self, now: Duration, link: Link) -> (bool, After) {
        self.base_may = false;
        let after = self.handle(now, Event::BasePages { link });
        (self.base_may, after)
    }

    /// Until when the thread that waits for deadlines may sleep. [`After::wake`] says when an earlier one has
    /// come.
    pub fn wait(&mut self) -> Option<Duration> {
        self.core.wait()
    }
}

fn lost(link: Link, why: impl fmt::Display) -> Event {
    Event::LinkLost { link, why: LossReason::Local(why.to_string()) }
}

fn failed(link: Link, why: impl fmt::Display) -> Event {
    Event::Failed { link, why: why.to_string() }
}

/// The ports while an event is carried out.
struct Carrying<'a, P> {
    ports: &'a mut P,
    base_may: &'a mut bool,
    bug: Planted,
}

impl<P: StandbyPorts> Carrying<'_, P> {
    /// The action's link, unless a mistake is planted.
    fn link(&self, machine: &Standby, link: Link) -> Link {
        if planted!(self.bug, ActsOnAttachedLink) { machine.link().unwrap_or(link) } else { link }
    }
}

impl<P: StandbyPorts> Hands<Standby> for Carrying<'_, P> {
    fn decided(&mut self, _: &Standby) {}

    fn carry_out(&mut self, machine: &Standby, action: Action, after: &mut After) -> Result<(), Event> {
        let wrote = !planted!(self.bug, ReleaseWithoutDrain);
        match action {
            Action::Accept { link, generation, dead_after } => {
                after.drain |= wrote;
                self.ports.accept(link, generation, dead_after).map_err(|why| lost(link, why))
            }
            Action::Refuse { link, code, text } => {
                after.drain |= wrote;
                let link = self.link(machine, link);
                self.ports.refuse(link, code, text);
                Ok(())
            }
            Action::ApplyBase { .. } => {
                *self.base_may = true;
                Ok(())
            }
            Action::Try { link, checkpoint } => {
                self.ports.try_base(link, checkpoint).map_err(|why| failed(link, why))
            }
            Action::Ack { link, generation, checkpoint, stamp } => {
                after.drain |= wrote;
                self.ports.ack(link, generation, checkpoint, stamp).map_err(|why| lost(link, why))
            }
            Action::Apply { link, checkpoint } => {
                self.ports.apply(link, checkpoint).map_err(|why| failed(link, why))
            }
            Action::Settle { link, checkpoint } => {
                self.ports.settle(link, checkpoint).map_err(|why| failed(link, why))
            }
            Action::Release { link } => self.ports.release(link).map_err(|why| {
                let result = Err(why.to_string());
                Event::Released { link, result }
            }),
            Action::SendHeartbeat { link, stamp } => {
                after.drain |= wrote;
                self.ports.send_heartbeat(link, stamp).map_err(|why| lost(link, why))
            }
            Action::SendLeave { link, reason } => {
                after.drain |= wrote;
                self.ports.send_leave(link, reason);
                Ok(())
            }
            Action::Hangup { link } => {
                after.drain |= wrote;
                let link = self.link(machine, link);
                self.ports.hang_up(link);
                Ok(())
            }
            Action::Discard { link } => {
                self.ports.discard(link);
                Ok(())
            }
            Action::Claim { generation } => self.ports.claim(generation).map_err(|why| {
                let result = ClaimResult::Unreachable { why: why.to_string() };
                Event::Claimed { generation, result }
            }),
            Action::TakeOver { link, checkpoint, generation, handed, tail, stop } => {
                self.ports.take_over(TakeOver { link, checkpoint, generation, handed, tail, stop });
                Ok(())
            }
            Action::Exit { reason } => {
                self.ports.exit(reason);
                Ok(())
            }
            Action::Note(note) => {
                self.ports.note(note);
                Ok(())
            }
        }
    }
}
