//! Decisions of the primary, carried out.
//!
//! One lock covers the state machine and its actions, so they are carried out in the order decided, whichever
//! thread brought the event. No action blocks: the slow ones queue work for other threads. An order to the
//! machine's valve is given under the lock and carried out after it: above all, a committed epoch's output leaves
//! by the very thread that read the acknowledgement, and a pause never waits for that.

use std::sync::mpsc::Sender as Queue;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::{DiskWant, Hello};
use outlive_machine::{EpochError, OutputMode, Valve};
use outlive_pair::{
    ClaimResult, ExitReason, Link, LossReason, Primary, PrimaryAction as Action, PrimaryEvent as Event,
    PrimaryNote as Note, PrimaryStatus, Ticket, Wanted,
};

use crate::arbiter::{Claim, ClaimWorker};
use crate::clock::Clock;
use crate::disk::SyncReport;
use crate::events::{self, EventWriter};
use crate::link::{self, Job, Sender, SenderReport};
use crate::primary::self_check::Hashed;
use crate::primary::stats::Totals;

/// A standby that cannot be reached is told of again after this time.
const UNREACHABLE_AGAIN: Duration = Duration::from_secs(60);

/// What the coordinator is told.
pub(crate) enum Inbox {
    /// The guest did something.
    Machine(outlive_machine::MachineEvent),
    /// The sender thread of a link did something.
    Sender(Link, SenderReport),
    /// The standby wants chunks of a disk.
    DiskWant(Link, DiskWant),
    /// The disks are hashed for the self-check.
    DisksHashed(Hashed),
    /// The base synchronisation of the disks has come to a point.
    DiskSync(Link, SyncReport),
    /// This generation is won: the VM goes on here alone.
    Won(u64),
    /// Begin base synchronisation for this link.
    StartBase(Link),
    /// The link is of no further use: stop tracking.
    Detached(Link),
    /// Look again: something that the coordinator waits for may have come.
    Wake,
    /// Ask the guest to shut itself down.
    AskGuest,
    /// Stop the vCPUs for good.
    StopGuest,
    /// End the process.
    Exit(ExitReason),
    /// The operator wants the VM stopped.
    Stop(&'static str),
}

/// Fixed facts about this primary.
pub(crate) struct Facts {
    /// Addresses of its standbys.
    pub(crate) standbys: Vec<String>,
    /// The introduction; the generation is filled in when it dials.
    pub(crate) hello: Hello,
    /// Time between two heartbeats of the sender's own.
    pub(crate) heartbeat: Duration,
}

struct Connection {
    link: Link,
    sender: Sender,
    address: String,
    /// The orderly end has been queued: what is queued must still go out when the link is closed.
    ending: bool,
}

struct State {
    pair: Primary,
    actions: Vec<Action>,
    connection: Option<Connection>,
    claims: Option<ClaimWorker>,
    ship: Option<Ticket>,
    /// The coordinator waits for an acknowledgement before it may capture again.
    starved: bool,
    /// When it was last said that no standby can be reached.
    unreachable_since: Option<Instant>,
    /// An order was given to the valve that somebody has to carry out.
    drain: bool,
}

/// The shared half of the coordinator: see the module.
pub(crate) struct Control {
    state: Mutex<State>,
    /// The time that the state machine is fed with.
    pub(crate) clock: Clock,
    facts: Facts,
    /// All held output of the machine.
    valve: Arc<Valve>,
    inbox: Queue<Inbox>,
    events: EventWriter,
    totals: Arc<Totals>,
}

impl Control {
    /// A control for a machine that owns its generation.
    pub(crate) fn new(
        pair: Primary,
        clock: Clock,
        facts: Facts,
        valve: Arc<Valve>,
        inbox: Queue<Inbox>,
        events: EventWriter,
        totals: Arc<Totals>,
    ) -> Arc<Self> {
        totals.set_generation(pair.generation());
        let state = State {
            pair,
            actions: Vec::with_capacity(16),
            connection: None,
            claims: None,
            ship: None,
            starved: false,
            unreachable_since: None,
            drain: false,
        };
        let control = Self { state: Mutex::new(state), clock, facts, valve, inbox, events, totals };
        control.set_lease(&control.lock().pair);
        Arc::new(control)
    }

    /// Gives the control the thread that asks the arbiter.
    pub(crate) fn set_claims(&self, claims: ClaimWorker) {
        self.lock().claims = Some(claims);
    }

    /// Takes an event and carries out what follows from it.
    pub(crate) fn handle(self: &Arc<Self>, event: Event) {
        let mut state = self.lock();
        self.step(&mut state, event);
        self.drain(state);
    }

    /// Carries out what was ordered of the valve, without the lock: this may take as long as the tap pleases.
    fn drain(&self, mut state: MutexGuard<'_, State>) {
        let drain = std::mem::take(&mut state.drain);
        drop(state);
        if drain {
            self.valve.drain();
        }
    }

    /// Lets everything out that may leave. When output is discarded, waits for the frame that is being sent:
    /// nothing leaves after this.
    pub(crate) fn finish_output(&self) {
        self.valve.drain();
    }

    /// The arbiter has answered.
    pub(crate) fn claimed(self: &Arc<Self>, generation: u64, claim: Claim) {
        let result = match claim {
            Claim::Won => ClaimResult::Won,
            Claim::Lost { owner } => {
                self.events.emit(events::Event::Lost { generation, owner: owner.clone() });
                ClaimResult::Lost { owner }
            }
            Claim::Unreachable { why } => ClaimResult::Unreachable { why },
        };
        self.handle(Event::Claimed { generation, result });
    }

    /// A checkpoint is captured; called inside the pause. Returns where it goes, or `None` when it is of no
    /// use.
    pub(crate) fn captured(self: &Arc<Self>) -> Option<Ticket> {
        let mut state = self.lock();
        state.ship = None;
        self.step(&mut state, Event::Captured);
        state.ship.take()
    }

    /// Output from here on belongs to the epoch that begins, and waits for its commit.
    fn begin_epoch(&self, epoch: u64) -> Result<(), String> {
        self.valve.begin(epoch).map_err(|e| e.to_string())?;
        match self.valve.mode() {
            OutputMode::Hold => Ok(()),
            mode => Err(format!("output is in mode {mode:?} and should be held")),
        }
    }

    /// What checkpoint is wanted next, and when the state machine wants to be asked again at the latest.
    pub(crate) fn wanted(&self) -> (Wanted, Option<Duration>) {
        let mut state = self.lock();
        let wanted = state.pair.wanted_capture();
        // Under the same lock as the answer: an acknowledgement that comes now wakes the coordinator.
        state.starved = wanted == Wanted::Nothing;
        (wanted, state.pair.next_deadline())
    }

    /// What the primary is doing.
    pub(crate) fn status(&self) -> PrimaryStatus {
        self.lock().pair.status()
    }

    /// Queues a job for the link, if it is still the one in use.
    pub(crate) fn send(&self, link: Link, job: Job) {
        if let Some(connection) = &self.lock().connection
            && connection.link == link
        {
            connection.sender.send(job);
        }
    }

    /// The link in use.
    pub(crate) fn link(&self) -> Option<Link> {
        self.lock().connection.as_ref().map(|c| c.link)
    }

    /// Lets what is queued go out and closes the link.
    pub(crate) fn finish(&self, patience: Duration) {
        let connection = self.lock().connection.take();
        if let Some(mut connection) = connection {
            connection.sender.finish(patience);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(self: &Arc<Self>, state: &mut State, event: Event) {
        let mut actions = std::mem::take(&mut state.actions);
        state.pair.handle(self.clock.now(), event, &mut actions);
        self.set_lease(&state.pair);
        let mut failure = None;
        for action in actions.drain(..) {
            if let Err(event) = self.carry_out(state, action) {
                failure = Some(event);
            }
        }
        state.actions = actions;
        if let Some(event) = failure {
            self.step(state, event);
        }
    }

    /// The valve asks before every single frame or write, with a fresh clock, because this process may be stopped
    /// for an hour between two of them (invariant 1).
    fn set_lease(&self, pair: &Primary) {
        let until = pair.may_release_until().map(|until| self.clock.boot_time(until));
        self.valve.lease().set(until);
    }

    fn carry_out(self: &Arc<Self>, state: &mut State, action: Action) -> Result<(), Event> {
        match action {
            Action::Dial { link, address } => self.dial(link, address),
            Action::SendHello { link, generation } => {
                let hello = Hello { generation, ..self.facts.hello.clone() };
                on_link(state, link, |c| c.sender.send(Job::Hello(Box::new(hello))));
            }
            Action::StartBase { link } => self.tell(Inbox::StartBase(link)),
            Action::HoldOutput { link, epoch } => {
                let failed = |why: EpochError| Event::HoldFailed { link, why: why.to_string() };
                return self.valve.hold(epoch).map_err(failed);
            }
            Action::BeginEpoch { link, epoch } => {
                // Frames of the next epoch would not wait for their commit: this checkpoint must not become
                // one that the standby can take over from.
                let lost = |why| Event::LinkLost { link, why: LossReason::Local(why) };
                return self.begin_epoch(epoch).map_err(lost);
            }
            Action::Ship(ticket) => state.ship = Some(ticket),
            Action::DropCapture => state.ship = None,
            Action::Release { through } => self.release(state, through),
            Action::SendHeartbeat { link } => on_link(state, link, |c| c.sender.send(Job::Heartbeat)),
            Action::SendEnd { link, reason } => on_link(state, link, |c| {
                c.ending = true;
                c.sender.send(Job::End(reason));
            }),
            Action::Hangup { link } => self.hang_up(state, link),
            Action::Claim { generation } => self.claim(state, generation),
            Action::ReleaseAll { generation } => self.release_all(state, generation),
            Action::AskGuest => self.tell(Inbox::AskGuest),
            Action::StopGuest => self.tell(Inbox::StopGuest),
            Action::Fence { generation, owner } => {
                self.valve.discard();
                state.drain = true;
                tracing::error!(generation, %owner, "another host runs this VM: stopping this copy");
            }
            Action::Exit { reason } => self.tell(Inbox::Exit(reason)),
            Action::Note(note) => self.note(state, note),
        }
        Ok(())
    }

    /// Tells the coordinator something. Never blocks.
    pub(crate) fn tell(&self, message: Inbox) {
        // The coordinator outlives everything that talks to it, but for threads that end later than it.
        self.inbox.send(message).ok();
    }

    fn dial(self: &Arc<Self>, link: Link, address: usize) {
        let control = self.clone();
        let dialled = outlive_machine::spawn("dial", move || {
            let address = control.facts.standbys[address].clone();
            match link::dial(&address) {
                Ok(connection) => control.connected(link, connection, address),
                Err(error) => {
                    let why = format!("{address}: {error}");
                    control.handle(Event::DialFailed { link, why });
                }
            }
        });
        if let Err(error) = dialled {
            // Told from another thread's stack would need one; the next tick dials again after the time-out.
            tracing::error!(%error, "cannot start a thread to dial");
            let (inbox, why) = (self.inbox.clone(), format!("cannot start a thread: {error}"));
            inbox.send(Inbox::Sender(link, SenderReport::Failed(why))).ok();
        }
    }

    /// The dial thread becomes the link's receiver.
    fn connected(self: &Arc<Self>, link: Link, connection: link::Connection, address: String) {
        let (inbox, totals) = (self.inbox.clone(), self.totals.clone());
        let report = move |report| match report {
            SenderReport::Sent(bytes) => totals.sent(bytes),
            other => drop(inbox.send(Inbox::Sender(link, other))),
        };
        let link::Connection { reader, writer, closer } = connection;
        match Sender::start(writer, closer, self.clock, self.facts.heartbeat, report) {
            Ok(sender) => {
                let mut state = self.lock();
                state.connection = Some(Connection { link, sender, address, ending: false });
                self.step(&mut state, Event::Connected { link });
                self.drain(state);
            }
            Err(error) => {
                return self.handle(Event::DialFailed { link, why: format!("{address}: {error}") });
            }
        }
        let control = self.clone();
        let want = |want| control.tell(Inbox::DiskWant(link, want));
        link::receive(reader, link, |event| control.handle(event), want);
    }

    fn release(&self, state: &mut State, through: u64) {
        self.totals.committed(through);
        self.valve.commit(through);
        state.drain = true;
        if std::mem::take(&mut state.starved) {
            self.tell(Inbox::Wake);
        }
    }

    fn release_all(&self, state: &mut State, generation: u64) {
        self.totals.set_generation(generation);
        self.valve.open();
        state.drain = true;
    }

    fn hang_up(&self, state: &mut State, link: Link) {
        state.ship.take_if(|ticket| ticket.link == link);
        let Some(connection) = state.connection.take_if(|c| c.link == link) else { return };
        self.tell(Inbox::Detached(link));
        if connection.ending {
            // `finish` at the end of the process lets the queue run empty.
            state.connection = Some(connection);
        } else {
            connection.sender.close();
            // Joining the sender here could wait for a write; its thread ends by itself after the shutdown.
            let closing = std::thread::Builder::new().name("close".into());
            // Without a thread the connection is dropped with the closure, here; that is right, only slower.
            closing.spawn(move || drop(connection)).ok();
        }
    }

    fn claim(&self, state: &State, generation: u64) {
        match &state.claims {
            // Busy: the answer to the earlier claim is still to come, and the machine asks again after it.
            Some(claims) => {
                let _ = claims.submit(generation);
            }
            None => tracing::error!("no arbiter: a protected VM always has one"),
        }
    }

    fn note(&self, state: &mut State, note: Note) {
        let emit = |event| self.events.emit(event);
        match note {
            Note::DialFailed { why } => {
                // Asked again and again; the reason may differ each time although nothing has changed.
                if state.unreachable_since.is_none_or(|told| told.elapsed() >= UNREACHABLE_AGAIN) {
                    state.unreachable_since = Some(Instant::now());
                    tracing::warn!("standby not reachable, trying on: {why}");
                } else {
                    tracing::debug!("standby not reachable: {why}");
                }
            }
            Note::Refused { text, .. } => tracing::warn!("standby refused: {text}"),
            Note::Attached { link } => {
                state.unreachable_since = None;
                let addr = state.connection.as_ref().filter(|c| c.link == link).map(|c| c.address.clone());
                let addr = addr.unwrap_or_default();
                tracing::info!(standby = %addr, "standby attached, base synchronisation begins");
                emit(events::Event::StandbyAttached { addr });
            }
            Note::Protected { generation, checkpoint } => {
                let base_ms = self.totals.base_ms();
                self.totals.protected(true);
                tracing::info!(generation, checkpoint, base_ms, "protected");
                emit(events::Event::Protected { generation, checkpoint, base_ms });
            }
            Note::LinkLost { why, held } => {
                self.totals.protected(false);
                let why = why.to_string();
                tracing::warn!(held_output = held, "standby lost: {why}");
                emit(events::Event::LinkLost { reason: why.clone() });
                emit(events::Event::Unprotected { why });
            }
            Note::Arbitrating { generation } => {
                tracing::info!(generation, "asking the arbiter; output is held until it answers");
                emit(events::Event::Arbitrating { generation });
            }
            Note::ArbiterUnreachable { why } => {
                tracing::error!("arbiter not reachable, output stays held: {why}");
                emit(events::Event::ArbiterUnreachable { why });
            }
            Note::Won { generation } => {
                tracing::warn!(generation, "won: the VM goes on here, UNPROTECTED");
                self.tell(Inbox::Won(generation));
                emit(events::Event::Won { generation });
            }
        }
    }
}

fn on_link(state: &mut State, link: Link, act: impl FnOnce(&mut Connection)) {
    if let Some(connection) = &mut state.connection
        && connection.link == link
    {
        act(connection);
    }
}

#[cfg(test)]
mod tests;
