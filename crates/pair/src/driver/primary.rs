//! The primary's driver.

use std::fmt;
use std::time::Duration;

use outlive_epoch::EndReason;

use super::After;
use super::core::{Core, Hands};
use crate::planted::{Planted, planted};
use crate::{
    Broken, ClaimResult, ExitReason, Kept, Link, LossReason, Primary, PrimaryAction as Action,
    PrimaryEvent as Event, PrimaryNote, Ticket, Wanted,
};

/// The effects of the primary's decisions. [The module](super) has the rules that all methods keep.
pub trait PrimaryPorts {
    /// A checkpoint in staging, or a part of one.
    type Part;
    /// Why a method cannot do its work. Nothing is decided by it: the driver reports it to the state machine in
    /// words, for a person.
    type Failure: fmt::Display;

    /// Connect to the standby at this index of the list, then report [`Event::Connected`] or
    /// [`Event::DialFailed`]. The connection is put into the ports before `Connected`.
    ///
    /// # Errors
    /// It cannot be tried.
    fn dial(&mut self, link: Link, address: usize) -> Result<(), Self::Failure>;

    /// Queue preface and Hello.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn send_hello(&mut self, link: Link, generation: u64) -> Result<(), Self::Failure>;

    /// Have the base synchronisation begun: pages go out in rounds while the guest runs, until a checkpoint
    /// can be captured. A failure is reported as [`Event::LinkLost`].
    ///
    /// # Errors
    /// No thread is there to do it.
    fn start_base(&mut self, link: Link) -> Result<(), Self::Failure>;

    /// Queue a checkpoint, or the next part of one, for the link of its ticket, and for no other.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn ship(&mut self, ticket: Ticket, part: Self::Part) -> Result<(), Self::Failure>;

    /// Queue a heartbeat, with the time at which it is written.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn send_heartbeat(&mut self, link: Link) -> Result<(), Self::Failure>;

    /// Queue the orderly end of the VM.
    ///
    /// # Errors
    /// The link no longer accepts anything.
    fn send_end(&mut self, link: Link, reason: EndReason) -> Result<(), Self::Failure>;

    /// Queue that the VM goes on without this standby.
    ///
    /// # Errors
    /// The link no longer accepts anything, or its stream does not have that message.
    fn dismiss(&mut self, link: Link) -> Result<(), Self::Failure>;

    /// Have the link closed (after everything queued for it, if an orderly end is queued), and have the
    /// protection that used it ended. Later reports about it are not given, or are ignored. The link may be
    /// one that is still being dialled.
    fn hang_up(&mut self, link: Link);

    /// Queue the question for the arbiter; its answer is reported as [`Event::Claimed`].
    ///
    /// # Errors
    /// It cannot be asked now. The claim is repeated as if the arbiter were out of reach.
    fn claim(&mut self, generation: u64) -> Result<(), Self::Failure>;

    /// Until when output that is let out may leave; `None`: forever. Called after each event, before its
    /// actions. Each piece of output is checked against it right before it leaves, with a fresh clock.
    fn set_lease(&mut self, until: Option<Duration>);

    /// Until when heartbeats may be written; `None`: forever. Called together with the lease, and checked
    /// before each heartbeat with a fresh clock.
    fn set_beats(&mut self, until: Option<Duration>);

    /// The valve: hold output from now on, for this epoch. In the pause.
    ///
    /// # Errors
    /// Output cannot be held; the protection does not begin.
    fn hold(&mut self, epoch: u64) -> Result<(), Self::Failure>;

    /// The valve: output from now on belongs to this epoch. In the pause.
    ///
    /// # Errors
    /// Output is not held, or not for that epoch; the protection ends.
    fn begin_epoch(&mut self, epoch: u64) -> Result<(), Self::Failure>;

    /// The valve: output that was held for epochs up to this one may leave. It leaves in the drain that
    /// follows ([`After::drain`]), while the lease lasts.
    fn commit(&mut self, through: u64);

    /// The valve: everything held may leave, in order, and from then on output passes through. Held output
    /// leaves in the drain that follows. The VM goes on in this generation.
    fn open(&mut self, generation: u64);

    /// The valve: throw away all held output, and all that follows. Another host runs the VM. When the drain
    /// that follows is done, output on its way has left or never will.
    fn fence(&mut self, generation: u64, owner: String);

    /// The VM is left to its standby, because this is broken: tell. The link closes next, without an orderly end,
    /// and output stays held until it is known whether the standby has taken the VM over.
    fn give_away(&mut self, what: Broken);

    /// The VM stays although this is broken: tell, and let the guest hear of its disk's failures.
    fn endure(&mut self, what: Broken, why: Kept);

    /// The VM is being handed over to its standby, because its operator wants that: tell.
    fn hand_over(&mut self);

    /// All of the VM that is handed over is committed: let its output out, and report [`Event::OutputLeft`].
    fn let_go(&mut self);

    /// The VM is not handed over: tell the operator.
    fn keep(&mut self, why: Kept);

    /// Have the guest asked to shut itself down.
    fn ask_guest(&mut self);

    /// Have the vCPUs stopped for good.
    fn stop_guest(&mut self);

    /// Have the process ended, after what was queued before.
    fn exit(&mut self, reason: ExitReason);

    /// Have something logged, but not on this thread, which holds the lock.
    fn note(&mut self, note: PrimaryNote);
}

/// The primary's state machine with its ports. See [the module](super).
pub struct PrimaryDriver<P> {
    core: Core<Primary>,
    ports: P,
    /// The ticket of the checkpoint captured just now, until the caller gets it.
    captured: Option<Ticket>,
    /// What the waiting thread was told.
    told: Option<Wanted>,
}

impl<P: PrimaryPorts> PrimaryDriver<P> {
    /// A driver. It does nothing before the first event: hand in a `Tick`.
    pub fn new(machine: Primary, mut ports: P) -> Self {
        ports.set_lease(machine.may_release_until());
        ports.set_beats(machine.may_beat_until());
        let bug = machine.bug;
        Self { core: Core::new(machine, bug), ports, captured: None, told: None }
    }

    /// The state machine, for questions.
    pub fn machine(&self) -> &Primary {
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

    /// Takes an event and carries out what follows from it. For a capture see [`captured`](Self::captured).
    pub fn handle(&mut self, now: Duration, event: Event) -> After {
        let mut hands = Carrying { ports: &mut self.ports, captured: &mut self.captured, bug: self.core.bug };
        let mut after = self.core.run(now, event, &mut hands);
        let wanted = self.core.machine.wanted_capture();
        if self.told.is_some_and(|told| told != wanted) && !planted!(self.core.bug, WakeForgotten) {
            self.told = Some(wanted);
            after.wake = true;
        }
        after
    }

    /// The VM is stopped and all of a checkpoint is in staging: this decides about it. The ticket goes with
    /// the pages, and [`ship`](Self::ship) needs it. Without a ticket the checkpoint is useless, and its
    /// pages can no longer be sent to any standby. Allocates nothing, unless the capture loses the link.
    ///
    /// From here on output belongs to the next epoch, whatever the answer.
    /// `link` and `base` say what was wanted when the pause began, and `stays` whether the vCPUs stay stopped after it.
    pub fn captured(
        &mut self,
        now: Duration,
        link: Link,
        base: bool,
        stays: bool,
    ) -> (Option<Ticket>, After) {
        self.captured = None;
        let after = self.handle(now, Event::Captured { link, base, stays });
        (self.captured.take(), after)
    }

    /// Queues a checkpoint, or the next part of one, for the link of its ticket.
    ///
    /// # Errors
    /// The part, if that link is no longer in use.
    pub fn ship(&mut self, now: Duration, mut ticket: Ticket, part: P::Part) -> Result<After, P::Part> {
        if planted!(self.core.bug, TicketOnNewLink) {
            ticket.link = self.core.machine.link().unwrap_or(ticket.link);
        }
        if self.core.machine.link() != Some(ticket.link) {
            return Err(part);
        }
        Ok(match self.ports.ship(ticket, part) {
            Ok(()) => After::default(),
            Err(why) => self.handle(now, lost(ticket.link, why)),
        })
    }

    /// What the waiting thread may wait for: the checkpoint that is wanted, if any, and the time at which a
    /// `Tick` is due. [`After::wake`] says when this changes to something earlier.
    pub fn wait(&mut self) -> (Wanted, Option<Duration>) {
        let wanted = self.core.machine.wanted_capture();
        self.told = Some(wanted);
        (wanted, self.core.wait())
    }
}

fn lost(link: Link, why: impl fmt::Display) -> Event {
    Event::LinkLost { link, why: LossReason::Local(why.to_string()) }
}

/// The ports while an event is carried out.
struct Carrying<'a, P> {
    ports: &'a mut P,
    captured: &'a mut Option<Ticket>,
    bug: Planted,
}

impl<P: PrimaryPorts> Hands<Primary> for Carrying<'_, P> {
    /// The lease comes before the actions: output that is let out asks it, and an ended lease must be known
    /// before anything else.
    fn decided(&mut self, machine: &Primary) {
        if !planted!(self.bug, LeaseForgotten) {
            self.ports.set_lease(machine.may_release_until());
        }
        self.ports.set_beats(machine.may_beat_until());
    }

    fn carry_out(&mut self, machine: &Primary, action: Action, after: &mut After) -> Result<(), Event> {
        let ports = &mut *self.ports;
        match action {
            Action::Dial { link, address } => ports.dial(link, address).map_err(|why| Event::DialFailed {
                link,
                why: why.to_string(),
                lasts: false,
            }),
            Action::SendHello { link, generation } => {
                ports.send_hello(link, generation).map_err(|why| lost(link, why))
            }
            Action::StartBase { link } => ports.start_base(link).map_err(|why| lost(link, why)),
            Action::HoldOutput { link, epoch } => {
                ports.hold(epoch).map_err(|why| Event::HoldFailed { link, why: why.to_string() })
            }
            Action::BeginEpoch { link, epoch } => ports.begin_epoch(epoch).map_err(|why| lost(link, why)),
            Action::Ship(ticket) => {
                *self.captured = Some(ticket);
                if planted!(self.bug, CommitAtCapture) {
                    ports.commit(ticket.number);
                    after.drain = true;
                }
                after.drain |= planted!(self.bug, DrainBeforeCommit);
                Ok(())
            }
            Action::DropCapture => {
                *self.captured = None;
                Ok(())
            }
            Action::Release { through } => {
                let through = if planted!(self.bug, CommitThroughEpoch) { machine.epoch() } else { through };
                let late = if planted!(self.bug, ReleaseLate) { 50 } else { 0 };
                let through = through.saturating_sub(late);
                ports.commit(through);
                after.drain |=
                    !planted!(self.bug, ReleaseWithoutDrain) && !planted!(self.bug, DrainBeforeCommit);
                Ok(())
            }
            Action::SendHeartbeat { link } => ports.send_heartbeat(link).map_err(|why| lost(link, why)),
            Action::SendEnd { link, reason } => ports.send_end(link, reason).map_err(|why| lost(link, why)),
            Action::Dismiss { link } => ports.dismiss(link).map_err(|why| lost(link, why)),
            Action::Hangup { link } => {
                // A ticket that nobody has received yet is for a link that is gone.
                self.captured.take_if(|ticket| ticket.link == link);
                ports.hang_up(link);
                Ok(())
            }
            Action::Claim { generation } => ports.claim(generation).map_err(|why| {
                let result = ClaimResult::Unreachable { why: why.to_string() };
                Event::Claimed { generation, result }
            }),
            Action::ReleaseAll { generation } => {
                ports.open(generation);
                after.drain |= !planted!(self.bug, ReleaseWithoutDrain);
                Ok(())
            }
            Action::AskGuest => {
                ports.ask_guest();
                Ok(())
            }
            Action::StopGuest => {
                ports.stop_guest();
                Ok(())
            }
            Action::Fence { generation, owner } => {
                ports.fence(generation, owner);
                after.drain = true;
                Ok(())
            }
            Action::GiveAway { what } => {
                ports.give_away(what);
                Ok(())
            }
            Action::Endure { what, why } => {
                ports.endure(what, why);
                Ok(())
            }
            Action::HandOver => {
                ports.hand_over();
                Ok(())
            }
            Action::LetGo => {
                ports.let_go();
                Ok(())
            }
            Action::Keep { why } => {
                ports.keep(why);
                Ok(())
            }
            Action::Exit { reason } => {
                ports.exit(reason);
                Ok(())
            }
            Action::Note(note) => {
                ports.note(note);
                Ok(())
            }
        }
    }
}
