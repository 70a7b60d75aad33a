//! The standby's port: it hears every connection, and refuses all but the one primary that belongs here.
//!
//! Every connection has its own thread until it is accepted or refused, so that a silent connection cannot
//! keep the primary out; their number is bounded ([`HalfOpen`]). With keys, nothing of what a connection sends is
//! read as Outlive's before its host has shown a certificate.

mod admission;

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use outlive_epoch::{
    Hello, IncomingError, IncomingLimits, Message, PAGE_SIZE, Peer, ProtocolVersion, ReadError, RefuseCode,
    SectionReader, StrayKey, VersionRange, VmId, WireError,
};
use outlive_pair::{Introduction, Link, LossReason, StandbyEvent, Unwelcome};

use super::applier::Applier;
use super::audit::Comparing;
use super::copy::VmCopy;
use super::decisions::Decisions;
use super::half_open::HalfOpen;
use super::handover::{Ending, Handover};
use super::outbox::Outbox;
use super::ports::Session;
use super::reader::{Admitted, ReaderEnd, SessionReader};
use super::refusal::Refusal;
use super::tail::Tail;
use crate::arbiter::{self, Arbiter};
use crate::events::Event;
use crate::keys::{Certificate, Right, Vms};
use crate::link::{Connection, Listener, MayNot, NewConnection, Reader};
use crate::logs::RateLimit;
use crate::strays::{self, Intake};
use crate::vm::disks_of;
use crate::vm::limits::{ACCEPTED_DISK_BYTES, ACCEPTED_STATE_BYTES, ACCEPTED_STATE_SECTIONS};
pub(super) use admission::Overreach;
use admission::{Restricted, are_as_said, believed, is_kept_for, is_wired_as_said};

/// How many connections may be heard at the same time: one is the primary's, and those that [`HalfOpen`] has let
/// go need a moment to end.
const MAX_HEARD: usize = 128;
/// How long a connection may take to introduce itself, from its first byte to its last.
const INTRODUCTION: Duration = Duration::from_secs(2);

/// How many checkpoints in flight a primary may request buffers for.
pub(super) const MAX_SLOTS: u32 = 64;

/// Who decides about new connections.
type Inside = Arc<Mutex<Option<Arc<Decisions>>>>;

/// Why nobody can come to this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DoorError {
    /// The address is not this host's, or not free.
    #[error("cannot listen on {address}: {source}; give --listen a free address of this host")]
    Listen { address: String, source: io::Error },
    /// Nobody would hear who comes.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
}

/// The port of this process. It is claimed at the start, so that a wrong address is reported at once, and stays
/// when the process changes its role.
pub(crate) struct Door {
    address: String,
    /// Until the thread has it that accepts connections.
    listener: Option<Listener>,
    inside: Inside,
    /// Takes strays, beside the links; `None` if somebody else has the port.
    strays: Option<Intake>,
}

impl Door {
    /// Claims an address. Connections are refused until the door is opened.
    ///
    /// # Errors
    /// See [`DoorError`].
    pub(crate) fn reserve(address: &str) -> Result<Self, DoorError> {
        let failed = |source| DoorError::Listen { address: address.to_owned(), source };
        let listener = Listener::reserve(address).map_err(failed)?;
        let strays = listener.address().and_then(Intake::claim).inspect_err(|error| {
            tracing::warn!(
                "cannot take UDP at {address} beside TCP ({error}): clients whose frames come between a host's end and \
                 the takeover wait for their own TCP"
            );
        });
        let address = listener.address().map_or_else(|_| address.to_owned(), |it| it.to_string());
        Ok(Self { address, listener: Some(listener), inside: Inside::default(), strays: strays.ok() })
    }

    /// Takes strays; `None` if somebody else has the port.
    pub(super) fn strays(&self) -> Option<Intake> {
        self.strays.clone()
    }

    /// Lets connections wait at the door until it is opened.
    ///
    /// # Errors
    /// See [`DoorError`].
    pub(super) fn listen(&self) -> Result<(), DoorError> {
        let listens = self.listener.as_ref().map_or(Ok(()), Listener::listen);
        listens.map_err(|source| DoorError::Listen { address: self.address.clone(), source })
    }

    /// From now on these decisions hear everyone who comes.
    ///
    /// # Errors
    /// See [`DoorError`].
    pub(super) fn open(&mut self, decisions: Arc<Decisions>) -> Result<(), DoorError> {
        self.listen()?;
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = Some(decisions);
        if let Some(strays) = &self.strays {
            strays.open().map_err(DoorError::NoThread)?;
        }
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let inside = self.inside.clone();
        let started = outlive_machine::spawn("listen", move || accept_all(&listener, &inside));
        started.map(drop).map_err(DoorError::NoThread)
    }

    /// The address, with the port that the system chose if port 0 was asked for.
    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

fn accept_all(listener: &Listener, inside: &Inside) {
    let heard = Arc::new(AtomicUsize::new(0));
    let numbers = AtomicU64::new(0);
    let limit = Arc::new(RateLimit::default());
    let half_open = Arc::new(HalfOpen::default());
    loop {
        let incoming = match listener.accept() {
            Ok(incoming) => incoming,
            Err(error) => {
                // Most likely there are no descriptors left. A tight loop would not help.
                tracing::warn!(%error, "cannot accept a connection");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if heard.fetch_add(1, Ordering::AcqRel) >= MAX_HEARD {
            heard.fetch_sub(1, Ordering::AcqRel);
            if limit.allows() {
                tracing::warn!(from = incoming.peer(), "too many connections; some are dropped");
            }
            continue;
        }
        let number = Link(numbers.fetch_add(1, Ordering::Relaxed));
        let decisions = inside.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(decisions) = decisions else { continue };
        if half_open.enter(number, incoming.hangup()) && limit.allows() {
            tracing::warn!("too many connections that say nothing; the oldest are dropped");
        }
        let (count, limit, waiting) = (heard.clone(), limit.clone(), half_open.clone());
        let started = outlive_machine::spawn("session", move || {
            serve(&decisions, incoming, number, &limit, &waiting);
            waiting.leave(number);
            decisions.disconnect(number);
            count.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = started {
            heard.fetch_sub(1, Ordering::AcqRel);
            half_open.leave(number);
            tracing::warn!(%error, "cannot start a thread for a connection");
        }
    }
}

fn serve(
    decisions: &Arc<Decisions>,
    incoming: NewConnection,
    number: Link,
    limit: &RateLimit,
    half_open: &HalfOpen,
) {
    let from = incoming.peer();
    let (outbox, sender);
    let mut stream = match incoming.open(&decisions.equipment.options.active.security()) {
        Ok(Connection { reader, writer, closer, host }) => {
            sender = host;
            outbox = Arc::new(Outbox::new(writer, closer));
            decisions.connect(number, outbox.clone());
            reader
        }
        Err(error) => {
            if limit.allows() {
                tracing::warn!(from, "refused a connection: {error}");
                let (events, why) = (&decisions.equipment.events, error.to_string());
                events.emit(Event::ConnectionRefused { from, why });
            }
            return;
        }
    };
    let mut reader = SectionReader::new(Peer::Primary);
    let hello = match introduction(&mut reader, &mut stream, &outbox) {
        Ok(hello) => hello,
        Err(error) => {
            if limit.allows() {
                match &error {
                    ReadError::Io(late)
                        if matches!(late.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
                    {
                        tracing::warn!(
                            from,
                            "a connection did not introduce itself in time; a primary \
                        would try again"
                        );
                    }
                    _ => tracing::warn!(from, "not a primary: {error}"),
                }
            }
            match error {
                // A stranger gets no answer.
                ReadError::Wire(WireError::NotOutlive { .. }) | ReadError::Io(_) | ReadError::Closed => {}
                ReadError::Wire(
                    ref wire @ (WireError::UnknownProtocol { .. } | WireError::UnknownVersion { .. }),
                ) => {
                    decisions.refuse(number, RefuseCode::Version, wire.to_string());
                }
                other => decisions.refuse(number, RefuseCode::Malformed, other.to_string()),
            }
            return;
        }
    };
    half_open.leave(number);
    // From here on the decisions measure the silence, with the limit that both sides agreed on.
    if let Err(error) = stream.set_timeout(None) {
        tracing::warn!(from, %error, "cannot serve a connection");
        // Nothing is wrong with the primary: it may try again.
        let text = format!("the standby cannot serve this connection: {error}");
        return decisions.refuse(number, RefuseCode::Busy, text);
    }
    match admit(decisions, number, &hello, sender.as_ref()) {
        Ok((admitted, version)) => {
            tracing::info!(primary = from, version = version as u32, "primary attached");
            reader.agree(version);
            let standing = &decisions.equipment.standing;
            standing.vm(&hello.name, &hello.vm.to_string(), hello.generation);
            standing.peer(&from);
            let events = &decisions.equipment.events;
            events.of_vm(&hello.name, &hello.vm.to_string());
            events.emit(Event::PrimaryAttached { addr: from.clone(), link: stream.kind() });
            let reader = SessionReader::new(decisions.clone(), number, stream, reader, admitted);
            let mut rest = reader.run();
            // What is left is of no use, but where this standby leaves, its last words must arrive. They may come later:
            // a copy that is given up says so durably first.
            if outbox.may_leave() {
                rest.drop_the_rest();
            }
            // A copy that is being given up counts again if its primary is gone before it has heard so. The reader has
            // ended with what it refused, so nobody else says that the connection has ended.
            decisions.handle(StandbyEvent::LinkLost { link: number, why: LossReason::Closed });
        }
        Err(refusal @ Refusal::OnlyAsked) => decisions.answer(number, &refusal),
        Err(refusal) => decisions.refuse(number, refusal.code(), refusal.to_string()),
    }
}

fn introduction(
    reader: &mut SectionReader,
    stream: &mut Reader,
    outbox: &Outbox,
) -> Result<Hello, ReadError> {
    let mut stream = Until { stream, deadline: Instant::now() + INTRODUCTION };
    outbox.introduce(reader.read_preface(&mut stream)?);
    let section = reader.read_section(&mut stream)?;
    let kind = section.kind();
    match Message::parse(&section)? {
        Message::Hello(hello) => Ok(*hello),
        _ => Err(WireError::Malformed { kind, what: "a connection must begin with Hello", value: 0 }.into()),
    }
}

/// A stream that can be read until a deadline, however slowly the bytes come.
struct Until<'a> {
    stream: &'a mut Reader,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeout(Some(left))?;
        self.stream.read(to)
    }
}

/// Checks everything that speaks against this primary, and allocates memory for its VM. Returns the version
/// of the stream, too, that both sides have.
fn admit(
    decisions: &Arc<Decisions>,
    link: Link,
    hello: &Hello,
    sender: Option<&Certificate>,
) -> Result<(Admitted, ProtocolVersion), Refusal> {
    let version = VersionRange::CURRENT.common(hello.versions).map_err(Refusal::Version)?;
    may_send(hello, sender)?;
    let introduction = Introduction {
        vm: hello.vm,
        generation: hello.generation,
        slots: hello.limits.slots.into(),
        dead_after: Duration::from_micros(hello.dead_after_us),
        shared_storage: hello.devices.iter().any(|device| device.flags.shared),
    };
    if let Err(why) = decisions.would_accept(&introduction) {
        if why == Unwelcome::TakingOver && speaks_of_our_arbiter(decisions, hello) {
            decisions.handle(StandbyEvent::TurnedAway { hello: introduction });
        }
        return Err(unwelcome(decisions, why, sender));
    }
    // Before anything that a primary must be: whoever asks has made no VM yet.
    if hello.limits.slots == 0 {
        return Err(Refusal::OnlyAsked);
    }
    let Hello { vm, name, .. } = hello;
    let options = &decisions.equipment.options;
    let kept_for = options.vm.as_deref();
    if let Some(served) = kept_for.filter(|it| !is_kept_for(it, options.was_run, name, *vm)) {
        let served = may_learn_of(sender, served.parse().ok()).then(|| served.to_owned());
        return Err(Refusal::WrongVm { served, name: name.clone(), vm: *vm });
    }
    let hello = &Hello { lineage: believed(&hello.lineage, sender), ..hello.clone() };
    if let Some(restricted) = Restricted::of(sender, *vm, options) {
        if !restricted.continues(options.known, &hello.lineage) {
            return Err(Refusal::OtherVm);
        }
        restricted.may_have(disks_of(hello).zip(&options.disks))?;
    }
    are_as_said(disks_of(hello).zip(&options.disks))?;
    is_wired_as_said(hello, options)?;
    decisions.equipment.differences.check()?;
    if hello.limits.slots > MAX_SLOTS {
        return Err(Refusal::Slots(hello.limits.slots));
    }
    let arbiter = same_arbiter(decisions, hello)?;
    let by_hand = arbiter.is_a_person();
    let told = decisions.clone();
    let kept = decisions.equipment.shelf.take_for(hello, &introduction);
    let holds = kept.is_some();
    let copy = VmCopy::new(hello, &decisions.equipment, arbiter, kept, move |event| told.disks(link, event))?;
    let (ram, disks, shape) = (copy.ram(), copy.disks(), copy.shape());
    let handover = Arc::new(buffers(hello, &disks.sizes())?);
    let claims = decisions.claim_worker(hello.vm)?;
    let audit = Comparing::new(ram.clone(), decisions.equipment.options.active.audit);
    let applier = Applier {
        decisions: decisions.clone(),
        link,
        handover: handover.clone(),
        copy,
        audit,
        difference: None,
    };
    let applier = applier.start().map_err(Refusal::NoThread)?;
    let tail = Arc::new(Tail::new(decisions.equipment.options.active.frame_tail.is_on()));
    let strays = decisions.equipment.strays.as_ref().and_then(|intake| Some((intake, key_for_strays()?)));
    let session = Session {
        link,
        memory: hello.memory_bytes,
        version,
        holds,
        strays: strays.as_ref().map(|(_, key)| key.clone()),
        handover: handover.clone(),
        tail: tail.clone(),
        disks: Arc::downgrade(&disks),
        claims,
        applier,
    };
    let admitted = Admitted { ram, disks, shape, tail: tail.clone(), handover: ReaderEnd(handover) };
    decisions.hello(link, introduction, session).map_err(|session| {
        // Another primary was faster, and the refusal has been sent. The applier frees the copy.
        session.handover.end(Ending::Discard);
        Refusal::Attached
    })?;
    // Not before: what a primary that is refused says of its generation must not become what an operator decides about. A
    // person is at hand; opening any other arbiter may take long, and the primary is not heard meanwhile.
    if by_hand && let Ok(mut arbiter) = arbiter::parse(&decisions.equipment.options.arbiter) {
        arbiter.introduced(&arbiter::VmId(hello.vm.0), hello.generation);
    }
    if let Some((intake, key)) = strays {
        let sink: Weak<Tail> = Arc::downgrade(&tail);
        intake.expect(&key, sink);
    }
    Ok((admitted, version))
}

fn key_for_strays() -> Option<StrayKey> {
    strays::draw_key()
        .inspect_err(|error| tracing::warn!(%error, "no key: strays do not follow the guest"))
        .ok()
}

/// The words of a refusal. Where a VM runs, it says which: the primary may have it, too. A host without a right to that
/// VM learns no more than that this one is busy.
fn unwelcome(decisions: &Decisions, why: Unwelcome, sender: Option<&Certificate>) -> Refusal {
    let runs = decisions.equipment.standing.runs().filter(|_| why == Unwelcome::TakenOver);
    match (runs, why) {
        (Some(runs), _) if may_learn_of(sender, runs.id.parse().ok()) => Refusal::Runs(runs),
        (_, Unwelcome::WrongVm { served, .. }) if !may_learn_of(sender, Some(served)) => Refusal::OtherVm,
        (_, why) => why.into(),
    }
}

/// Whether a host may hear of the VM with this id. What is only known by name may be any.
fn may_learn_of(host: Option<&Certificate>, vm: Option<VmId>) -> bool {
    host.is_none_or(|host| host.grant.concerns_all_or(vm.as_ref()))
}

/// A question about no VM is any host's that has VMs, see `primary/ask.rs`: one that only holds them asks, too.
fn may_send(hello: &Hello, sender: Option<&Certificate>) -> Result<(), Refusal> {
    let asks = hello.limits.slots == 0;
    match sender {
        Some(host) if asks && host.grant.send == Vms::NONE && host.grant.hold == Vms::NONE => {
            Err(Refusal::NoVms(host.name.clone()))
        }
        Some(host) if !asks && !host.grant.allows(Right::Send, &hello.vm) => {
            Err(MayNot::new(host, Right::Send, hello.vm).into())
        }
        _ => Ok(()),
    }
}

/// The buffers of a session: one for each checkpoint that may wait for its acknowledgement, and one for the
/// checkpoint that is being applied.
fn buffers(hello: &Hello, disks: &[u64]) -> Result<Handover, IncomingError> {
    let limits = IncomingLimits {
        max_pages: hello.limits.max_pages.min(u32::try_from(hello.layout.pages()).unwrap_or(u32::MAX)),
        max_state_bytes: hello.limits.max_state_bytes.min(ACCEPTED_STATE_BYTES),
        max_state_sections: ACCEPTED_STATE_SECTIONS,
        max_disk_bytes: hello.limits.max_disk_bytes.min(ACCEPTED_DISK_BYTES),
    };
    let buffer = || {
        let buffer = outlive_epoch::Incoming::new(limits, hello.layout.clone(), hello.generation);
        buffer.map(|buffer| buffer.with_disks(disks.to_vec()))
    };
    let buffers = (0..=hello.limits.slots).map(|_| buffer()).collect::<Result<_, _>>()?;
    let largest = u64::from(limits.max_pages) * PAGE_SIZE as u64
        + u64::from(limits.max_state_bytes)
        + u64::from(limits.max_disk_bytes);
    Ok(Handover::new(buffers, 2 * largest))
}

/// Whether this is a primary that says it has its generation from this standby's arbiter. Whoever only asks has none, and a
/// person is not asked earlier because of what a host says.
fn speaks_of_our_arbiter(decisions: &Decisions, hello: &Hello) -> bool {
    let ours = arbiter::parse(&decisions.equipment.options.arbiter);
    hello.limits.slots > 0 && ours.is_ok_and(|it| !it.is_a_person() && it.identity() == hello.arbiter)
}

/// Two hosts with different directories would both win every generation. The primary won its generation at
/// the arbiter before it connected, so this side must find that generation there.
fn same_arbiter(decisions: &Decisions, hello: &Hello) -> Result<Box<dyn Arbiter>, Refusal> {
    let spec = &decisions.equipment.options.arbiter;
    let mut arbiter = arbiter::parse(spec)?;
    let spec = spec.clone();
    if hello.arbiter != arbiter.identity() {
        let (here, there) = (arbiter.identity().to_owned(), hello.arbiter.clone());
        return Err(Refusal::OtherArbiter { spec, here, there });
    }
    match arbiter.highest(&arbiter::VmId(hello.vm.0)) {
        Ok(Some(highest)) if highest == hello.generation => Ok(arbiter),
        Ok(Some(highest)) if highest > hello.generation => {
            Err(Refusal::Stale { introduced: hello.generation, highest })
        }
        // It knows what this process has seen, and hears of this primary once it is accepted.
        Ok(_) if arbiter.is_a_person() && hello.generation > 0 => Ok(arbiter),
        Ok(_) => Err(Refusal::UnknownVm(spec)),
        Err(source) => Err(Refusal::Arbiter { spec, source }),
    }
}
