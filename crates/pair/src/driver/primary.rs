//! The primary's driver.

use std::time::Duration;

use outlive_epoch::EndReason;

use super::After;
use super::core::{Core, Hands};
use crate::planted::{Planted, planted};
use crate::{
    ClaimResult, ExitReason, Link, LossReason, Primary, PrimaryAction as Action, PrimaryEvent as Event,
    PrimaryNote, Ticket, Wanted,
};

/// What the primary's decisions reach. See [the module](super) for the rules that all methods keep.
///
/// Errors are texts for people; the driver reports each to the state machine.
pub trait PrimaryPorts {
    /// A checkpoint in staging, or a part of one.
    type Part;

    /// Connect to the standby at this index of the list, then report [`Event::Connected`] or
    /// [`Event::DialFailed`]. Before `Connected` the connection is put into the ports.
    ///
    /// # Errors
    /// It cannot be tried.
    fn dial(&mut self, link: Link, address: usize) -> Result<(), String>;

    /// Queue preface and Hello.
    ///
    /// # Errors
    /// The link takes nothing any more.
    fn send_hello(&mut self, link: Link, generation: u64) -> Result<(), String>;

    /// Have the base synchronisation begun: pages go out in rounds while the guest runs, until a checkpoint
    /// can be captured. Trouble with it is reported as [`Event::LinkLost`].
    ///
    /// # Errors
    /// Nobody is there to do it.
    fn start_base(&mut self, link: Link) -> Result<(), String>;

    /// Queue a checkpoint, or the next part of one, for the link of its ticket, and for no other.
    ///
    /// # Errors
    /// The link takes nothing any more.
    fn ship(&mut self, ticket: Ticket, part: Self::Part) -> Result<(), String>;

    /// Queue a heartbeat, with the time at which it is written.
    ///
    /// # Errors
    /// The link takes nothing any more.
    fn send_heartbeat(&mut self, link: Link) -> Result<(), String>;

    /// Queue the orderly end of the VM.
    ///
    /// # Errors
    /// The link takes nothing any more.
    fn send_end(&mut self, link: Link, reason: EndReason) -> Result<(), String>;

    /// Have the link closed, after what is queued for it if an end is, and the protection that used it ended.
    /// Nothing of it is reported any more, or is ignored. The link may be one that is still being dialled.
    fn hang_up(&mut self, link: Link);

    /// Queue the question for the arbiter; its answer is reported as [`Event::Claimed`].
    ///
    /// # Errors
    /// It cannot be asked now. It is tried again as if the arbiter were out of reach.
    fn claim(&mut self, generation: u64) -> Result<(), String>;

    /// Have the generation given back if it is this side's, after the answer to the question for it.
    fn give_back(&mut self, generation: u64);

    /// Until when output that is let out may leave; `None`: forever. Given after each event and before its
    /// actions. Each piece of output is checked against it right before it leaves, with a fresh clock.
    fn set_lease(&mut self, until: Option<Duration>);

    /// Until when heartbeats may be written; `None`: forever. Given with the lease, and checked before each
    /// heartbeat with a fresh clock.
    fn set_beats(&mut self, until: Option<Duration>);

    /// The valve: hold output from now on, for this epoch. In the pause.
    ///
    /// # Errors
    /// It cannot be held; the protection does not begin.
    fn hold(&mut self, epoch: u64) -> Result<(), String>;

    /// The valve: output from now on belongs to this epoch. In the pause.
    ///
    /// # Errors
    /// It is not held, or not for that epoch; the protection ends.
    fn begin_epoch(&mut self, epoch: u64) -> Result<(), String>;

    /// The valve: what was held for epochs up to this one may leave. It leaves in the drain that
    /// follows ([`After::drain`]), as far as the lease lasts.
    fn commit(&mut self, through: u64);

    /// The valve: everything held may leave, in its order, and from then on output passes through. What is
    /// held leaves in the drain that follows. The VM goes on in this generation.
    fn open(&mut self, generation: u64);

    /// The valve: throw everything held away, and all that follows. Another host runs the VM. What is on its
    /// way has left, or never will, when the drain that follows is done.
    fn fence(&mut self, generation: u64, owner: String);

    /// Have the guest asked to shut itself down.
    fn ask_guest(&mut self);

    /// Have the vCPUs stopped for good.
    fn stop_guest(&mut self);

    /// Have the process ended, after what was queued before.
    fn exit(&mut self, reason: ExitReason);

    /// Have something logged, not on this thread under this lock.
    fn note(&mut self, note: PrimaryNote);
}

/// The primary's state machine with its ports. See [the module](super).
pub struct PrimaryDriver<P> {
    core: Core<Primary>,
    ports: P,
    /// The checkpoint captured just now, until it is handed to the caller.
    captured: Option<Ticket>,
    /// What the waiting thread was told.
    told: Option<Wanted>,
}

impl<P: PrimaryPorts> PrimaryDriver<P> {
    /// A driver. Nothing is done before the first event: hand in a `Tick`.
    pub fn new(machine: Primary, mut ports: P) -> Self {
        ports.set_lease(machine.may_release_until());
        ports.set_beats(machine.may_beat_until());
        let bug = machine.bug;
        Self { core: Core::new(machine, bug), ports, captured: None, told: None }
    }

    /// The state machine, to ask it.
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

    /// The VM stands still and all of a checkpoint is in staging: what becomes of it? The ticket goes with
    /// the pages, and is what [`ship`](Self::ship) wants; without one the checkpoint is of no use, and its
    /// pages can be told to no standby any more. Allocates nothing, but if the link is lost by it.
    ///
    /// Output from here on belongs to the next epoch, whatever the answer.
    pub fn captured(&mut self, now: Duration) -> (Option<Ticket>, After) {
        self.captured = None;
        let after = self.handle(now, Event::Captured);
        (self.captured.take(), after)
    }

    /// Queues a checkpoint, or the next part of one, for the link of its ticket.
    ///
    /// # Errors
    /// The part, if that link is not in use any more.
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

    /// What the thread that waits may wait for: the checkpoint that is wanted, if one is, and the time at
    /// which a `Tick` is due. [`After::wake`] says when this changes for the better.
    pub fn wait(&mut self) -> (Wanted, Option<Duration>) {
        let wanted = self.core.machine.wanted_capture();
        self.told = Some(wanted);
        (wanted, self.core.wait())
    }
}

fn lost(link: Link, why: String) -> Event {
    Event::LinkLost { link, why: LossReason::Local(why) }
}

/// The ports while an event is carried out.
struct Carrying<'a, P> {
    ports: &'a mut P,
    captured: &'a mut Option<Ticket>,
    bug: Planted,
}

impl<P: PrimaryPorts> Hands<Primary> for Carrying<'_, P> {
    /// The lease comes before the actions: what is let out asks it, and one that has ended must be known
    /// before anything else is.
    fn decided(&mut self, machine: &Primary) {
        if !planted!(self.bug, LeaseForgotten) {
            self.ports.set_lease(machine.may_release_until());
        }
        self.ports.set_beats(machine.may_beat_until());
    }

    fn carry_out(&mut self, machine: &Primary, action: Action, after: &mut After) -> Result<(), Event> {
        let ports = &mut *self.ports;
        match action {
            Action::Dial { link, address } => {
                ports.dial(link, address).map_err(|why| Event::DialFailed { link, why })
            }
            Action::SendHello { link, generation } => {
                ports.send_hello(link, generation).map_err(|why| lost(link, why))
            }
            Action::StartBase { link } => ports.start_base(link).map_err(|why| lost(link, why)),
            Action::HoldOutput { link, epoch } => {
                ports.hold(epoch).map_err(|why| Event::HoldFailed { link, why })
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
                ports.commit(through);
                after.drain |=
                    !planted!(self.bug, ReleaseWithoutDrain) && !planted!(self.bug, DrainBeforeCommit);
                Ok(())
            }
            Action::SendHeartbeat { link } => ports.send_heartbeat(link).map_err(|why| lost(link, why)),
            Action::SendEnd { link, reason } => ports.send_end(link, reason).map_err(|why| lost(link, why)),
            Action::Hangup { link } => {
                // A ticket that nobody has yet is for a link that is gone.
                self.captured.take_if(|ticket| ticket.link == link);
                ports.hang_up(link);
                Ok(())
            }
            Action::Claim { generation } => ports.claim(generation).map_err(|why| {
                let result = ClaimResult::Unreachable { why };
                Event::Claimed { generation, result }
            }),
            Action::GiveBack { generation } => {
                ports.give_back(generation);
                Ok(())
            }
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
