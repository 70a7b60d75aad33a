//! What the standby's decisions reach. Every method queues something and returns; other threads do what takes
//! time, or [`Deferred`] once the lock is dropped.

use std::mem::{Discriminant, discriminant};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outlive_epoch::{
    Accept, Ack, ArbiterSight, Audited, DiskAudited, DiskWant, EncodeError, Encoder, LeaveReason,
    ProtocolVersion, RefuseCode, StrayKey,
};
use outlive_pair::{Link, StandbyExit, StandbyNote, StandbyPorts, TakeOver};

use super::copy::VmCopy;
use super::handover::{Doing, Ending, GiveError, Handover};
use super::outbox::{End, Outbox, PutError};
use super::tail::Tail;
use crate::arbiter::{ClaimWorker, Watch};
use crate::disk::{Replica, STUCK};
use crate::events::SettlePart;
use crate::network::Uplink;
use crate::process;

/// Time between two checks of a thread that ends soon.
pub(super) const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// Messages to the main thread.
pub(super) enum MainMessage {
    /// Check the deadlines again.
    Wake,
    /// The operator wants the standby stopped.
    Stop(&'static str),
    /// Something to log, and when it happened.
    Note(Instant, StandbyNote),
    /// A primary was refused.
    Refused(RefuseCode, String, Untold),
    /// Run the VM.
    TakeOver(TakeOver),
    /// End the process.
    Exit(StandbyExit),
}

/// Refusals that wait for the main thread at most: it may be at something long, and whoever may connect is refused as
/// often as it likes. Those beyond are answered, and not told of.
const MOST_UNTOLD: usize = 64;

/// Held by a refusal that the main thread has not told of yet.
pub(super) struct Untold(#[expect(dead_code, reason = "it is counted")] Arc<()>);

/// Why a decision cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum PortError {
    /// Its thread has ended.
    #[error("the connection is gone")]
    NoConnection,
    /// The connection takes no message.
    #[error(transparent)]
    Put(#[from] PutError),
    /// The copy was thrown away, or belongs to another connection.
    #[error("there is no copy of the VM")]
    NoCopy,
    /// The applier takes no checkpoint.
    #[error(transparent)]
    Give(#[from] GiveError),
}

/// What keeps a copy from following the VM, and will not end by itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stuck {
    /// A disk finishes nothing.
    #[error("the disks of this standby have not answered for {} s", STUCK.as_secs())]
    Disks,
    /// The applier does not get done.
    #[error("this standby has worked on one checkpoint for {} s", STUCK.as_secs())]
    Applier,
    /// The applier stands still.
    #[error("this standby's applier does not fetch its work")]
    Deserted,
}

/// The part of a VM's copy that decisions reach.
pub(super) struct Session {
    pub(super) link: Link,
    /// Bytes of the VM's memory.
    pub(super) memory: u64,
    /// The version of the stream that both sides have.
    pub(super) version: ProtocolVersion,
    /// Whether its memory is of the moment that the primary has named.
    pub(super) holds: bool,
    /// With what it takes strays.
    pub(super) strays: Option<StrayKey>,
    pub(super) handover: Arc<Handover>,
    /// Copies of the guest's frames.
    pub(super) tail: Arc<Tail>,
    /// The copy's disks; its applier drops them.
    pub(super) disks: Weak<Replica>,
    pub(super) claims: ClaimWorker,
    pub(super) applier: JoinHandle<Option<VmCopy>>,
}

impl Session {
    /// What keeps this copy from following the VM, if it is hopeless.
    fn stuck(&self) -> Option<Stuck> {
        if self.disks.upgrade().is_some_and(|disks| disks.is_stuck()) {
            return Some(Stuck::Disks);
        }
        (self.handover.busy_for() >= STUCK).then_some(Stuck::Applier)
    }

    /// The copy, once its applier has no more work. `None` if it was thrown away, or if the applier takes
    /// hopelessly long.
    pub(super) fn into_copy(self) -> Option<VmCopy> {
        self.handover.end(Ending::Return);
        while !self.applier.is_finished() {
            if let Some(why) = self.stuck() {
                tracing::error!("{why}");
                return None;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        self.applier.join().ok().flatten()
    }
}

/// What to do once the lock is dropped, in this order: the acknowledgement is written before the applier is
/// woken, because both may need the same processor.
#[derive(Default)]
pub(super) struct Deferred {
    outbox: Option<Arc<Outbox>>,
    /// Other outboxes to write. Rarely any, because one event concerns one connection.
    others: Vec<Arc<Outbox>>,
    applier: Option<Arc<Handover>>,
    /// The rest of an ended session, which must not be freed under the lock.
    buffers: Option<Arc<Handover>>,
}

impl Deferred {
    /// Does it.
    pub(super) fn carry_out(self) {
        self.outbox.into_iter().chain(self.others).for_each(|outbox| outbox.write());
        if let Some(handover) = self.applier {
            handover.wake();
        }
    }
}

/// The ports; see the module.
pub(super) struct Ports {
    /// The accepted primary's connection and those that are being answered.
    peers: Vec<(Link, Arc<Outbox>)>,
    session: Option<Session>,
    /// The thread that throws the last session's copy away, or has done so, and since when.
    discards: Option<(JoinHandle<Option<VmCopy>>, Instant)>,
    inbox: Sender<MainMessage>,
    /// Counts the refusals that wait in the inbox: each holds it.
    untold: Arc<()>,
    /// Watches this host's way to the guest's clients.
    uplink: Option<Arc<Uplink>>,
    /// What was last said of it, and on which connection.
    told_reach: Option<(Link, Option<bool>)>,
    /// Looks whether the arbiter is there.
    watch: Arc<Watch>,
    /// What was last said of it, without for how long, and on which connection.
    told_sight: Option<(Link, Discriminant<ArbiterSight>)>,
    /// This host's name, for the answer to an introduction.
    host: String,
    deferred: Deferred,
    /// The connection whose last word is a leave, before it is ended and until its thread has ended.
    left: Option<Link>,
    leaving: Option<Link>,
    /// Whether the last primary may have heard that it has no rival any more.
    handed_over: bool,
}

impl Ports {
    pub(super) fn new(inbox: Sender<MainMessage>, uplink: Option<Arc<Uplink>>, watch: Arc<Watch>) -> Self {
        let host = process::host_name();
        let deferred = Deferred::default();
        Self {
            peers: Vec::new(),
            session: None,
            discards: None,
            inbox,
            untold: Arc::default(),
            uplink,
            told_reach: None,
            watch,
            told_sight: None,
            host,
            deferred,
            left: None,
            leaving: None,
            handed_over: false,
        }
    }

    /// Adds a connection under a number that was not used before.
    pub(super) fn connect(&mut self, link: Link, outbox: Arc<Outbox>) {
        self.peers.push((link, outbox));
    }

    /// Forgets a connection whose thread has ended.
    pub(super) fn disconnect(&mut self, link: Link) {
        self.peers.retain(|(known, _)| *known != link);
        self.leaving.take_if(|leaving| *leaving == link);
    }

    /// Answers a connection with a refusal, and ends it.
    pub(super) fn turn_away(&mut self, link: Link, code: RefuseCode, text: &str) {
        let put = self.put(link, |encoder, out| {
            encoder.refuse(out, code, text);
            Ok(())
        });
        if let Some(outbox) = self.outbox(link) {
            outbox.end(if put.is_ok() { End::Finish } else { End::Close });
        }
        self.disconnect(link);
    }

    /// Whether the primary may have heard that it has no rival any more.
    pub(super) fn has_handed_over(&self) -> bool {
        self.handed_over
    }

    /// Whether a peer may not have read yet that this standby leaves.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Sets the copy for the primary whose introduction comes next.
    pub(super) fn admit(&mut self, session: Session) {
        self.session = Some(session);
        self.handed_over = false;
    }

    /// Bytes of memory of the VM that has a copy here, if one has.
    pub(super) fn memory_promised(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.memory)
    }

    /// Takes the session away from the decisions.
    pub(super) fn take_session(&mut self) -> Option<Session> {
        self.session.take()
    }

    /// The thread that throws a copy away, if there was one.
    pub(super) fn take_discards(&mut self) -> Option<JoinHandle<Option<VmCopy>>> {
        self.discards.take().map(|(thread, _)| thread)
    }

    /// For how long the last copy has been thrown away and is not gone.
    pub(super) fn lingers(&self) -> Option<Duration> {
        self.discards.as_ref().filter(|(thread, _)| !thread.is_finished()).map(|(_, since)| since.elapsed())
    }

    /// What keeps the copy from following the VM, if it is hopeless.
    pub(super) fn stuck(&self) -> Option<(Link, Stuck)> {
        let session = self.session.as_ref()?;
        let deserted = || session.handover.is_deserted().then_some(Stuck::Deserted);
        session.stuck().or_else(deserted).map(|why| (session.link, why))
    }

    /// What a takeover waits for that settles, and for how long a disk has not finished what it is at.
    pub(super) fn unsettled(&self) -> Option<(SettlePart, Duration)> {
        let session = self.session.as_ref()?;
        let disks = session.disks.upgrade();
        let (hangs, holds_back) =
            disks.map_or((Duration::ZERO, false), |disks| (disks.working_for(), disks.holds_back()));
        // An applier that waits for a slow disk is busy, too.
        let applies = !session.handover.busy_for().is_zero() && !holds_back;
        Some((if applies { SettlePart::Memory } else { SettlePart::Disk }, hangs))
    }

    /// Queues the answer to sums.
    pub(super) fn want(&mut self, link: Link, want: &DiskWant) -> Result<(), PortError> {
        self.put(link, |encoder, out| encoder.disk_want(out, want))
    }

    /// Queues how far the comparison of pages is.
    pub(super) fn audited(&mut self, link: Link, audited: &Audited) -> Result<(), PortError> {
        self.put(link, |encoder, out| encoder.audited(out, audited))
    }

    /// Queues how far the comparison of disks is.
    pub(super) fn disk_audited(&mut self, link: Link, audited: &DiskAudited) -> Result<(), PortError> {
        self.put(link, |encoder, out| encoder.disk_audited(out, audited))
    }

    /// Ends every connection after sending what is queued.
    pub(super) fn finish(&mut self) {
        for (_, outbox) in std::mem::take(&mut self.peers) {
            outbox.end(End::Finish);
            self.touch(outbox);
        }
    }

    /// Takes what must be done once the lock is dropped.
    pub(super) fn take_deferred(&mut self) -> Deferred {
        std::mem::take(&mut self.deferred)
    }

    fn outbox(&self, link: Link) -> Option<Arc<Outbox>> {
        self.peers.iter().find(|(known, _)| *known == link).map(|(_, outbox)| outbox.clone())
    }

    fn touch(&mut self, outbox: Arc<Outbox>) {
        match &self.deferred.outbox {
            Some(known) if Arc::ptr_eq(known, &outbox) => {}
            Some(_) => self.deferred.others.push(outbox),
            None => self.deferred.outbox = Some(outbox),
        }
    }

    fn put(
        &mut self,
        link: Link,
        encode: impl FnOnce(&mut Encoder, &mut Vec<u8>) -> Result<(), EncodeError>,
    ) -> Result<(), PortError> {
        let outbox = self.outbox(link).ok_or(PortError::NoConnection)?;
        let result = outbox.put(encode);
        self.touch(outbox);
        Ok(result?)
    }

    fn session(&self, link: Link) -> Result<&Session, PortError> {
        let session = self.session.as_ref().filter(|session| session.link == link);
        session.ok_or(PortError::NoCopy)
    }

    fn disks(&self, link: Link) -> Result<Arc<Replica>, PortError> {
        self.session(link)?.disks.upgrade().ok_or(PortError::NoCopy)
    }

    fn give(&mut self, link: Link, checkpoint: u64, doing: Doing) -> Result<(), PortError> {
        let handover = self.session(link)?.handover.clone();
        handover.give(checkpoint, doing)?;
        self.deferred.applier = Some(handover);
        Ok(())
    }

    fn tell(&self, message: MainMessage) {
        // After a takeover nobody listens; nothing is lost then.
        self.inbox.send(message).ok();
    }
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

impl StandbyPorts for Ports {
    type Failure = PortError;

    fn accept(&mut self, link: Link, generation: u64, dead_after: Duration) -> Result<(), PortError> {
        let Session { version, holds, ref strays, .. } = *self.session(link)?;
        let (dead_after_us, host, strays) = (micros(dead_after), self.host.clone(), strays.clone());
        let accept = Accept { generation, dead_after_us, host, version, holds, strays };
        self.put(link, |encoder, out| encoder.accept(out, &accept))
    }

    fn refuse(&mut self, link: Link, code: RefuseCode, text: String) {
        self.turn_away(link, code, &text);
        if Arc::strong_count(&self.untold) <= MOST_UNTOLD {
            self.tell(MainMessage::Refused(code, text, Untold(self.untold.clone())));
        }
    }

    fn try_base(&mut self, link: Link, checkpoint: u64) -> Result<(), PortError> {
        self.give(link, checkpoint, Doing::Try)
    }

    fn ack(
        &mut self,
        link: Link,
        generation: u64,
        checkpoint: u64,
        stamp: Duration,
    ) -> Result<(), PortError> {
        if let Ok(session) = self.session(link) {
            session.tail.committed(checkpoint);
        }
        let ack = Ack { generation, number: checkpoint, stamp_us: micros(stamp) };
        self.put(link, |encoder, out| {
            encoder.ack(out, &ack);
            Ok(())
        })
    }

    fn apply(&mut self, link: Link, checkpoint: u64) -> Result<(), PortError> {
        self.give(link, checkpoint, Doing::Apply)
    }

    fn settle(&mut self, link: Link, checkpoint: u64) -> Result<(), PortError> {
        self.disks(link)?.settle(checkpoint);
        Ok(())
    }

    fn release(&mut self, link: Link) -> Result<(), PortError> {
        self.disks(link)?.release();
        Ok(())
    }

    fn send_heartbeat(&mut self, link: Link, stamp: Duration) -> Result<(), PortError> {
        let reach = (link, self.uplink.as_ref().and_then(|uplink| uplink.reaches()));
        let changed = self.told_reach != Some(reach);
        self.told_reach = Some(reach);
        let sight = self.watch.for_the_peer();
        let told = (link, discriminant(&sight));
        let seen_otherwise = self.told_sight != Some(told);
        self.told_sight = Some(told);
        self.put(link, |encoder, out| {
            encoder.heartbeat(out, micros(stamp));
            // An older primary would not know it.
            if changed && encoder.stream() >= ProtocolVersion::V5 {
                encoder.reach(out, reach.1);
            }
            if seen_otherwise && encoder.stream() >= ProtocolVersion::V7 {
                encoder.arbiter_sight(out, sight)?;
            }
            Ok(())
        })
    }

    fn send_leave(&mut self, link: Link, reason: LeaveReason) {
        // The connection ends next, whether this goes out or not.
        let put = self.put(link, |encoder, out| {
            encoder.leave(out, reason);
            Ok(())
        });
        self.left = put.ok().map(|()| link);
        if self.left.is_some() && reason.hands_over() {
            self.handed_over = true;
            self.disks(link).iter().for_each(|disks| disks.promise());
        }
    }

    fn hang_up(&mut self, link: Link) {
        if let Some(outbox) = self.outbox(link) {
            let leaves = self.left.take_if(|left| *left == link).is_some();
            outbox.end(if leaves { End::Leave } else { End::Close });
            self.leaving = leaves.then_some(link);
            self.touch(outbox);
        }
        self.peers.retain(|(known, _)| *known != link);
        if let Ok(session) = self.session(link) {
            session.handover.hang_up();
        }
    }

    fn discard(&mut self, link: Link) {
        if let Some(session) = self.session.take_if(|session| session.link == link) {
            session.handover.end(Ending::Discard);
            self.deferred.buffers = Some(session.handover);
            self.discards = Some((session.applier, Instant::now()));
        }
    }

    fn claim(&mut self, generation: u64) -> Result<(), PortError> {
        let session = self.session.as_ref().ok_or(PortError::NoCopy)?;
        // Busy means that the answer to the earlier claim is still due.
        let _ = session.claims.submit(generation);
        Ok(())
    }

    fn take_over(&mut self, order: TakeOver) {
        self.tell(MainMessage::TakeOver(order));
    }

    fn exit(&mut self, reason: StandbyExit) {
        self.tell(MainMessage::Exit(reason));
    }

    fn note(&mut self, note: StandbyNote) {
        self.tell(MainMessage::Note(Instant::now(), note));
    }
}
