//! Decisions of the standby, carried out. As on the primary, one lock covers the state machine and its
//! actions. The one action that takes time, applying a checkpoint, is left to the session thread that staged
//! it.

use std::io::Write;
use std::sync::mpsc::Sender as Queue;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::{Accept, Ack, DiskWant, Encoder, Preface, RefuseCode, VmId};
use outlive_machine::Host;
use outlive_pair::{
    ClaimResult, Introduction, Link, Standby, StandbyAction as Action, StandbyEvent as Event, StandbyExit,
    StandbyNote as Note,
};

use super::copy::VmCopy;
use crate::arbiter::{self, Claim, ClaimWorker};
use crate::cli::StandbyOptions;
use crate::clock::Clock;
use crate::console::Console;
use crate::disk::DiskEvent;
use crate::events::{self, EventWriter};
use crate::link::{Closer, Writer};
use crate::process;

/// How long a few bytes to the primary may take to leave; a primary that reads nothing for so long is as good
/// as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// What the main thread is told.
pub(super) enum Inbox {
    /// Look at the deadlines again.
    Wake,
    /// The thread of the disks has something to say.
    Disks(Link, DiskEvent),
    /// The operator wants the standby stopped.
    Stop(&'static str),
    /// Run the VM.
    TakeOver(TakeOverOrder),
    /// End the process.
    Exit(StandbyExit),
}

/// A won takeover.
#[derive(Clone, Copy, Debug)]
pub(super) struct TakeOverOrder {
    pub(super) checkpoint: u64,
    pub(super) generation: u64,
    pub(super) stop: bool,
    pub(super) times: Times,
}

/// When what happened on the way to a takeover.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// From the last byte heard to the declaration.
    pub(super) detect: Duration,
    /// The link was declared dead.
    pub(super) declared: Instant,
    /// The disks were at the last commit.
    pub(super) settled: Instant,
    /// The generation was won.
    pub(super) won: Instant,
}

impl Times {
    /// The link was declared dead just now.
    fn new(detect: Duration) -> Self {
        let now = Instant::now();
        Self { detect, declared: now, settled: now, won: now }
    }
}

/// The writing half of a connection.
struct Peer {
    link: Link,
    writer: Writer,
    closer: Closer,
    encoder: Encoder,
    greeted: bool,
}

impl Peer {
    fn write(&mut self, encode: impl FnOnce(&mut Encoder, &mut Vec<u8>)) {
        let mut bytes = Vec::with_capacity(512);
        if !std::mem::replace(&mut self.greeted, true) {
            bytes.extend_from_slice(&Preface::CURRENT.encode());
        }
        encode(&mut self.encoder, &mut bytes);
        if self.writer.write_all(&bytes).is_err() {
            // The reader of this connection notices and reports the loss.
            self.closer.close();
        }
    }
}

struct State {
    pair: Standby,
    actions: Vec<Action>,
    /// The accepted primary and those that are being answered.
    peers: Vec<Peer>,
    copy: Option<VmCopy>,
    claims: Option<ClaimWorker>,
    times: Option<Times>,
    /// The copy of this link is gone.
    discarded: Option<Link>,
    /// The refusal that was logged last.
    last_refusal: String,
}

/// What the caller of [`Control::handle`] must do itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Left {
    /// Write the base pages at hand to memory.
    pub(super) apply_base: bool,
    /// Try the staged base of this number for a takeover.
    pub(super) try_base: Option<u64>,
    /// Apply the staged checkpoint of this number.
    pub(super) apply: Option<u64>,
}

/// The shared half of all threads of the standby.
pub(super) struct Control {
    state: Mutex<State>,
    pub(super) clock: Clock,
    pub(super) host: Arc<Host>,
    pub(super) options: StandbyOptions,
    /// The other ends of the VM's ports.
    pub(super) console: Arc<Console>,
    inbox: Queue<Inbox>,
    events: EventWriter,
}

impl Control {
    pub(super) fn new(
        pair: Standby,
        clock: Clock,
        host: Arc<Host>,
        options: StandbyOptions,
        console: Arc<Console>,
        inbox: Queue<Inbox>,
        events: EventWriter,
    ) -> Arc<Self> {
        let state = State {
            pair,
            actions: Vec::with_capacity(16),
            peers: Vec::new(),
            copy: None,
            claims: None,
            times: None,
            discarded: None,
            last_refusal: String::new(),
        };
        Arc::new(Self { state: Mutex::new(state), clock, host, options, console, inbox, events })
    }

    /// Takes an event and carries out what follows, apart from what the caller must do.
    pub(super) fn handle(self: &Arc<Self>, event: Event) -> Left {
        let mut state = self.lock();
        self.step(&mut state, event)
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.lock().pair.next_deadline()
    }

    /// Whether this introduction would be accepted now.
    pub(super) fn would_accept(&self, hello: &Introduction) -> Result<(), (RefuseCode, String)> {
        let state = self.lock();
        state.pair.would_accept(hello)
    }

    /// Registers the writing half of a new connection.
    pub(super) fn connect(&self, link: Link, writer: Writer, closer: Closer) -> std::io::Result<()> {
        writer.set_timeout(Some(WRITE_TIMEOUT))?;
        let peer = Peer { link, writer, closer, encoder: Encoder::new(), greeted: false };
        self.lock().peers.push(peer);
        Ok(())
    }

    /// Refuses a connection.
    pub(super) fn refuse(&self, link: Link, code: RefuseCode, text: &str) {
        self.refuse_locked(&mut self.lock(), link, code, text);
    }

    /// A primary's introduction, with the copy that was made for its VM. The machine may have decided
    /// otherwise since `would_accept`; then the copy is dropped.
    pub(super) fn hello(
        self: &Arc<Self>,
        link: Link,
        hello: Introduction,
        copy: VmCopy,
        claims: ClaimWorker,
    ) -> bool {
        let mut state = self.lock();
        if state.pair.would_accept(&hello).is_ok() {
            state.copy = Some(copy);
            state.claims = Some(claims);
            self.step(&mut state, Event::Hello { link, hello });
            true
        } else {
            self.step(&mut state, Event::Hello { link, hello });
            false
        }
    }

    /// A thread that asks the arbiter for generations of `vm` and reports here.
    pub(super) fn claim_worker(self: &Arc<Self>, vm: VmId) -> Result<ClaimWorker, String> {
        let arbiter = arbiter::parse(&self.options.arbiter).map_err(|e| e.to_string())?;
        let control = self.clone();
        ClaimWorker::start(arbiter, arbiter::VmId(vm.0), arbiter::owner("standby"), move |answer| {
            let generation = answer.generation;
            let result = match answer.claim {
                Claim::Won => ClaimResult::Won,
                Claim::Lost { owner } => {
                    control.events.emit(events::Event::Lost { generation, owner: owner.clone() });
                    ClaimResult::Lost { owner }
                }
                Claim::Unreachable { why } => ClaimResult::Unreachable { why },
            };
            control.handle(Event::Claimed { generation, result });
        })
        .map_err(|e| format!("cannot start a thread: {e}"))
    }

    /// Works on the copy. `None` when there is none (any more).
    pub(super) fn with_copy<T>(&self, work: impl FnOnce(&mut VmCopy) -> T) -> Option<T> {
        self.lock().copy.as_mut().map(work)
    }

    /// Takes the copy out, for the takeover.
    pub(super) fn take_copy(&self) -> Option<VmCopy> {
        self.lock().copy.take()
    }

    /// The copy was compared with the VM.
    pub(super) fn compared(&self, checkpoint: u64, difference: Option<&String>) {
        match difference {
            None => tracing::debug!(checkpoint, "self-check: the copy is the VM's"),
            Some(why) => tracing::error!(checkpoint, "SELF-CHECK FAILED: {why}"),
        }
        self.events.emit(events::Event::SelfCheck { checkpoint, difference: difference.cloned() });
    }

    /// The thread of the disks has something to say. Without a lock: that thread may be waited for under it.
    pub(super) fn disks(&self, link: Link, told: DiskEvent) {
        self.tell(Inbox::Disks(link, told));
    }

    /// Answers to sums.
    pub(super) fn want(&self, link: Link, want: &DiskWant) {
        let mut state = self.lock();
        // A window has no more chunks than an answer may want.
        on_peer(&mut state, link, |p| p.write(|encoder, out| drop(encoder.disk_want(out, want))));
    }

    /// Closes every connection; what was written still goes out.
    pub(super) fn finish(&self) {
        for peer in self.lock().peers.drain(..) {
            peer.closer.finish();
        }
    }

    /// Forgets a connection whose thread ends.
    pub(super) fn disconnect(&self, link: Link) {
        self.lock().peers.retain(|p| p.link != link);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(self: &Arc<Self>, state: &mut State, event: Event) -> Left {
        let mut left = Left::default();
        let mut actions = std::mem::take(&mut state.actions);
        state.pair.handle(self.clock.now(), event, &mut actions);
        for action in actions.drain(..) {
            self.carry_out(state, action, &mut left);
        }
        state.actions = actions;
        if let Some(link) = state.discarded.take() {
            let rest = self.step(state, Event::Discarded { link });
            debug_assert_eq!(rest.apply, None);
        }
        left
    }

    fn carry_out(&self, state: &mut State, action: Action, left: &mut Left) {
        match action {
            Action::Accept { link, generation, dead_after } => {
                let accept = Accept {
                    generation,
                    dead_after_us: dead_after.as_micros() as u64,
                    host: process::host_name(),
                };
                // The host's name is cut to what the format allows.
                on_peer(state, link, |p| p.write(|encoder, out| drop(encoder.accept(out, &accept))));
                // From here on there are deadlines, which the main thread does not know yet.
                self.tell(Inbox::Wake);
            }
            Action::Refuse { link, code, text } => self.refuse_locked(state, link, code, &text),
            Action::ApplyBase { .. } => left.apply_base = true,
            Action::Ack { link, generation, checkpoint, stamp } => {
                let ack = Ack { generation, number: checkpoint, stamp_us: stamp.as_micros() as u64 };
                on_peer(state, link, |p| p.write(|encoder, out| encoder.ack(out, &ack)));
            }
            Action::Try { checkpoint, .. } => left.try_base = Some(checkpoint),
            Action::Apply { checkpoint, .. } => left.apply = Some(checkpoint),
            Action::Settle { checkpoint, .. } => {
                if let Some(copy) = &state.copy {
                    copy.disks().settle(checkpoint);
                }
            }
            Action::SendHeartbeat { link, stamp } => {
                let stamp = stamp.as_micros() as u64;
                on_peer(state, link, |p| p.write(|encoder, out| encoder.heartbeat(out, stamp)));
            }
            Action::SendLeave { link, reason } => {
                on_peer(state, link, |p| p.write(|encoder, out| encoder.leave(out, reason)));
            }
            Action::Hangup { link } => {
                on_peer(state, link, |p| p.closer.close());
                state.peers.retain(|p| p.link != link);
            }
            Action::Discard { link } => {
                state.copy = None;
                state.discarded = Some(link);
            }
            Action::Claim { generation } => {
                if let Some(claims) = &state.claims {
                    // Busy: the answer to the earlier claim is still to come.
                    let _ = claims.submit(generation);
                }
                self.tell(Inbox::Wake);
            }
            Action::TakeOver { checkpoint, generation, stop, .. } => {
                let times = state.times.unwrap_or_else(|| Times::new(Duration::ZERO));
                self.tell(Inbox::TakeOver(TakeOverOrder { checkpoint, generation, stop, times }));
            }
            Action::Exit { reason } => self.tell(Inbox::Exit(reason)),
            Action::Note(note) => self.note(state, note),
        }
    }

    fn tell(&self, message: Inbox) {
        // After a takeover nobody listens any more; nothing is lost then.
        self.inbox.send(message).ok();
    }

    fn refuse_locked(&self, state: &mut State, link: Link, code: RefuseCode, text: &str) {
        // A primary asks five times a second.
        if state.last_refusal != text {
            tracing::warn!(?code, "a primary is refused: {text}");
            text.clone_into(&mut state.last_refusal);
        }
        on_peer(state, link, |p| {
            p.write(|encoder, out| encoder.refuse(out, code, text));
            p.closer.finish();
        });
        state.peers.retain(|p| p.link != link);
    }

    fn note(&self, state: &mut State, note: Note) {
        let emit = |event| self.events.emit(event);
        match note {
            Note::Attached { link } => {
                let addr = state.peers.iter().find(|p| p.link == link).map(|p| p.closer.peer());
                tracing::info!(primary = addr.unwrap_or_default(), "primary attached");
            }
            Note::Protected { generation, checkpoint } => {
                tracing::info!(generation, checkpoint, "base committed: this standby can take over");
            }
            Note::LinkLost { why, silent, committed } => {
                state.times = Some(Times::new(silent));
                tracing::warn!(can_take_over = committed, "primary lost: {why}");
                emit(events::Event::LinkLost { reason: why.to_string() });
            }
            Note::Arbitrating { generation } => {
                if let Some(times) = &mut state.times {
                    times.settled = Instant::now();
                }
                tracing::info!(generation, "asking the arbiter");
                emit(events::Event::Arbitrating { generation });
            }
            Note::ArbiterUnreachable { why } => {
                tracing::error!("arbiter not reachable, this standby waits: {why}");
                emit(events::Event::ArbiterUnreachable { why });
            }
            Note::Won { generation } => {
                if let Some(times) = &mut state.times {
                    times.won = Instant::now();
                }
                emit(events::Event::Won { generation });
            }
            Note::StopWaits => {
                tracing::warn!("the stop waits for the arbiter: this may be the only host that has the VM")
            }
            Note::StreamRefused { why } => {
                tracing::error!("what the primary sent is refused, it is told so and goes on: {why}");
            }
        }
    }
}

fn on_peer(state: &mut State, link: Link, act: impl FnOnce(&mut Peer)) {
    if let Some(peer) = state.peers.iter_mut().find(|p| p.link == link) {
        act(peer);
    }
}
