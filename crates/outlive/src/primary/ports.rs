//! What the primary's decisions reach: the link, the machine's valve, the arbiter, and the coordinator.
//!
//! Everything here runs under the driver's lock, and the pause waits for that lock. So it only queues work
//! for other threads and gives orders to the valve, which write a few atomic words. See
//! [`outlive_pair::driver`].

use std::mem::{Discriminant, discriminant};
use std::sync::Arc;
use std::sync::mpsc::Sender as Channel;
use std::time::Duration;

use outlive_epoch::{ArbiterSight, EndReason, Hello, Moment, ProtocolVersion};
use outlive_machine::{EpochError, OutputMode, Valve};
use outlive_pair::{Broken, ExitReason, Forgotten, Kept, Link, PrimaryNote, PrimaryPorts, Since, Ticket};

use super::inbox::{Accepted, Inbox, Queue};
use super::links::Errand;
use super::pool::Pool;
use super::stats::Totals;
use crate::arbiter::{Busy, ClaimWorker, Watch};
use crate::clock::Clock;
use crate::link::{Agreed, CheckpointPart, FrameTail, Job, LinkKind, Sender};
use crate::pulse::Pulse;

/// A connection in use.
pub(super) struct Connection {
    pub(super) link: Link,
    pub(super) sender: Sender,
    /// The standby that it leads to, for people.
    pub(super) address: String,
    /// The buffers of its checkpoints.
    pub(super) pool: Arc<Pool>,
    /// The address of its other end.
    pub(super) peer: String,
    /// What protects it.
    pub(super) kind: Option<LinkKind>,
    /// What both sides have agreed on, once they have.
    pub(super) agreed: Option<Agreed>,
}

impl Connection {
    fn version(&self) -> Option<ProtocolVersion> {
        self.agreed.as_ref().map(|agreed| agreed.version)
    }
}

/// A committed checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Commit {
    pub(super) number: u64,
    /// When its acknowledgement came, on the driver's clock.
    pub(super) at: Duration,
}

/// Why a decision cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    /// The thread that makes connections has ended.
    #[error("the thread that makes connections is gone")]
    NoDialler,
    /// Nothing more goes out there.
    #[error("the link is closed")]
    Closed,
    /// The standby has not accepted yet.
    #[error("no version of the stream was agreed on")]
    NoVersion,
    /// An older standby.
    #[error("the standby's release cannot be told that the VM goes on without it")]
    TooOld,
    /// The coordinator has ended.
    #[error("the coordinator is gone")]
    NoCoordinator,
    /// There is nobody to ask.
    #[error("this VM has no arbiter")]
    NoArbiter,
    /// The arbiter still owes an answer.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Output cannot belong to this epoch.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// The standby relies on what is not known any more.
    #[error(transparent)]
    Forgotten(#[from] Forgotten),
    /// Output would not wait for its commit.
    #[error("output is in mode {0:?} but should be held")]
    NotHeld(OutputMode),
}

/// The implementation of [`PrimaryPorts`]; see the module.
pub(crate) struct Ports {
    /// The introduction; the generation is filled in when it is sent.
    hello: Hello,
    clock: Clock,
    valve: Arc<Valve>,
    inbox: Queue,
    /// The orders' queue of the thread that makes and ends connections.
    errands: Channel<Errand>,
    claims: Option<ClaimWorker>,
    /// What a standby gets copies of.
    tail: Option<FrameTail>,
    totals: Arc<Totals>,
    pulse: Arc<Pulse>,
    connection: Option<Connection>,
    /// Whether the orderly end is queued for it: then what is queued goes out before it is closed, at the
    /// process's end.
    ending: bool,
    committed: Option<Commit>,
    /// Since when each write to the VM's memory is known.
    since: Since,
    /// Looks at the arbiter.
    watch: Option<Arc<Watch>>,
    /// What the standby of this link was told of that.
    told_sight: Option<(Link, Discriminant<ArbiterSight>)>,
}

impl Ports {
    /// Ports without a connection.
    pub(super) fn new(
        hello: Hello,
        clock: Clock,
        valve: Arc<Valve>,
        inbox: Queue,
        errands: Channel<Errand>,
        totals: Arc<Totals>,
    ) -> Self {
        Self {
            hello,
            clock,
            valve,
            inbox,
            errands,
            claims: None,
            tail: None,
            totals,
            pulse: Arc::new(Pulse::new(clock)),
            connection: None,
            ending: false,
            committed: None,
            since: Since::default(),
            watch: None,
            told_sight: None,
        }
    }

    /// Gives the ports the thread that makes claims.
    pub(super) fn set_claims(&mut self, claims: ClaimWorker) {
        self.claims = Some(claims);
    }

    /// Standbys that can use them get copies of these frames.
    pub(super) fn copying(self, tail: Option<FrameTail>) -> Self {
        Self { tail, ..self }
    }

    /// Each write to the VM's memory since this moment is known.
    pub(super) fn knowing(self, since: Option<Moment>) -> Self {
        Self { since: Since::began(since), ..self }
    }

    /// The standby is told whether this host sees the arbiter.
    pub(super) fn watching(self, watch: Option<Arc<Watch>>) -> Self {
        Self { watch, ..self }
    }

    /// Tells the standby what has changed. Nothing is decided by it: whoever asks there must know.
    fn tell_sight(&mut self, link: Link) -> Result<(), PortError> {
        let version = self.connection(link).and_then(Connection::version);
        let Some(watch) = self.watch.as_ref().filter(|_| version >= Some(ProtocolVersion::V8)) else {
            return Ok(());
        };
        let sight = watch.for_the_peer();
        let told = (link, discriminant(&sight));
        if self.told_sight == Some(told) {
            return Ok(());
        }
        self.told_sight = Some(told);
        self.send(link, || Job::Sight(sight))
    }

    /// From now on writes may be missed.
    pub(super) fn forgets_writes(&mut self) {
        self.since.is_lost();
    }

    /// Whether this side may still say that it lives.
    pub(super) fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// A connection is up, and is used from now on.
    pub(super) fn connect(&mut self, connection: Connection) {
        self.connection = Some(connection);
    }

    /// The connection, if it has this link.
    pub(super) fn connection(&self, link: Link) -> Option<&Connection> {
        self.connection.as_ref().filter(|connection| connection.link == link)
    }

    /// Both sides of this link have agreed on a version of the stream: what is sent from now on is in it.
    pub(super) fn agreed(&mut self, link: Link, agreed: Agreed) {
        if let Some(connection) = self.connection.as_mut().filter(|connection| connection.link == link) {
            let (audit, heat) = (self.totals.audit().clone(), self.totals.heat_counter());
            connection.sender.send(Job::Speak(agreed.version, self.tail.clone(), audit, heat));
            connection.agreed = Some(agreed);
        }
    }

    /// Takes the connection out, for the end of the process.
    pub(super) fn take_connection(&mut self) -> Option<Connection> {
        self.connection.take()
    }

    /// The newest committed checkpoint of this process.
    pub(super) fn committed(&self) -> Option<Commit> {
        self.committed
    }

    fn send(&self, link: Link, job: impl FnOnce() -> Job) -> Result<(), PortError> {
        let connection = self.connection(link).ok_or(PortError::Closed)?;
        connection.sender.send(job());
        Ok(())
    }

    fn tell(&self, message: Inbox) {
        self.inbox.send(message).ok();
    }
}

impl PrimaryPorts for Ports {
    type Part = Box<CheckpointPart>;
    type Failure = PortError;

    fn dial(&mut self, link: Link, address: usize) -> Result<(), PortError> {
        let sent = self.errands.send(Errand::Dial { link, address });
        sent.map_err(|_| PortError::NoDialler)
    }

    fn send_hello(&mut self, link: Link, generation: u64) -> Result<(), PortError> {
        let hello = Hello { generation, since: self.since.offer(link), ..self.hello.clone() };
        self.send(link, || Job::Hello(Box::new(hello)))
    }

    fn start_base(&mut self, link: Link) -> Result<(), PortError> {
        let connection = self.connection(link).ok_or(PortError::Closed)?;
        let (pool, peer) = (connection.pool.clone(), connection.peer.clone());
        let Agreed { version, holds, ref strays } =
            *connection.agreed.as_ref().ok_or(PortError::NoVersion)?;
        let strays = strays.clone().filter(|_| self.tail.is_some()).map(|key| (peer, key));
        let needs = self.since.answer(link, holds)?;
        let start = Inbox::StartBase(Accepted { link, pool, version, needs, strays });
        self.inbox.send(start).map_err(|_| PortError::NoCoordinator)
    }

    fn ship(&mut self, ticket: Ticket, part: Box<CheckpointPart>) -> Result<(), PortError> {
        self.send(ticket.link, || Job::Checkpoint(part))
    }

    fn send_heartbeat(&mut self, link: Link) -> Result<(), PortError> {
        self.tell_sight(link)?;
        self.send(link, || Job::Heartbeat)
    }

    fn send_end(&mut self, link: Link, reason: EndReason) -> Result<(), PortError> {
        self.ending = true;
        self.send(link, || Job::End(reason))
    }

    fn dismiss(&mut self, link: Link) -> Result<(), PortError> {
        let agreed = self.connection.as_ref().and_then(|connection| connection.agreed.as_ref());
        match agreed {
            Some(agreed) if agreed.version >= ProtocolVersion::V8 => self.send(link, || Job::Dismiss),
            _ => Err(PortError::TooOld),
        }
    }

    fn hang_up(&mut self, link: Link) {
        let Some(connection) = self.connection.take_if(|connection| connection.link == link) else { return };
        self.tell(Inbox::Detached(link));
        if self.ending {
            self.connection = Some(connection);
        } else {
            // Without that thread it is closed here; that is correct, only slower.
            self.errands.send(Errand::Close(connection)).ok();
        }
    }

    fn claim(&mut self, generation: u64) -> Result<(), PortError> {
        let claims = self.claims.as_ref().ok_or(PortError::NoArbiter)?;
        Ok(claims.submit(generation)?)
    }

    fn set_lease(&mut self, until: Option<Duration>) {
        self.valve.renew(until.map(|until| self.clock.boot_time(until)));
    }

    fn set_beats(&mut self, until: Option<Duration>) {
        self.pulse.set(until);
    }

    fn hold(&mut self, epoch: u64) -> Result<(), PortError> {
        Ok(self.valve.hold(epoch)?)
    }

    fn begin_epoch(&mut self, epoch: u64) -> Result<(), PortError> {
        match self.valve.mode() {
            OutputMode::Hold => Ok(self.valve.begin(epoch)?),
            mode => Err(PortError::NotHeld(mode)),
        }
    }

    fn commit(&mut self, through: u64) {
        self.totals.committed(through);
        self.committed = Some(Commit { number: through, at: self.clock.now() });
        self.valve.commit(through);
    }

    fn open(&mut self, generation: u64) {
        self.totals.set_generation(generation);
        self.valve.open();
    }

    fn fence(&mut self, _generation: u64, _owner: String) {
        self.valve.discard();
    }

    fn give_away(&mut self, what: Broken) {
        self.tell(Inbox::GiveAway(what));
    }

    fn endure(&mut self, what: Broken, why: Kept) {
        self.tell(Inbox::Endure(what, why));
    }

    fn hand_over(&mut self) {
        self.tell(Inbox::HandsOver);
    }

    fn let_go(&mut self) {
        self.tell(Inbox::LetGo);
    }

    fn keep(&mut self, why: Kept) {
        self.tell(Inbox::Keeps(why));
    }

    fn ask_guest(&mut self) {
        self.tell(Inbox::AskGuest);
    }

    fn stop_guest(&mut self) {
        self.tell(Inbox::StopGuest);
    }

    fn exit(&mut self, reason: ExitReason) {
        self.tell(Inbox::Exit(reason));
    }

    fn note(&mut self, note: PrimaryNote) {
        self.tell(Inbox::Note(note));
    }
}
