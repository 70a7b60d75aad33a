//! The ports of simulated hosts. They queue effects, which the world carries out once the driver has
//! returned; they can fail; and they check that the driver keeps its word.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, Moment, RefuseCode};

use super::truth::Node;
use super::valve::Valve;
use super::world::Msg;
use crate::planted::Bug;
use crate::{
    Broken, ExitReason, Forgotten, Kept, Link, Needs, PrimaryNote, PrimaryPorts, Since, StandbyExit,
    StandbyNote, StandbyPorts, TakeOver, Ticket,
};

/// An action that fails the next time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PortFault {
    Dial,
    Send,
    StartBase,
    Hold,
    BeginEpoch,
    Claim,
    Try,
    Apply,
    Settle,
}

/// Why a simulated port fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum PortFailure {
    /// The world has ordered it.
    #[error("{0:?} fails")]
    Struck(PortFault),
    /// The standby relies on what is not known any more.
    #[error(transparent)]
    Forgotten(#[from] Forgotten),
    /// The driver has broken its word.
    #[error("{0:?} is not up")]
    NotUp(Link),
}

/// An action that fails once.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) next: Option<PortFault>,
    failed: u64,
}

impl Faults {
    fn strike(&mut self, fault: PortFault) -> Result<(), PortFailure> {
        if self.next.take_if(|next| *next == fault).is_none() {
            return Ok(());
        }
        self.failed += 1;
        Err(PortFailure::Struck(fault))
    }
}

/// A checkpoint, or a part of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct SimPart {
    /// The link in use when it was captured.
    pub(super) captured_for: Link,
    pub(super) node: Node,
    pub(super) first: bool,
    pub(super) last: bool,
    pub(super) sections: u32,
}

#[derive(Debug)]
pub(super) enum PrimaryEffect {
    Dial { link: Link, address: usize },
    Hello { conn: usize, generation: u64, since: Option<Moment> },
    StartBase { link: Link, needs: Needs },
    Ship { conn: usize, ticket: Ticket, part: SimPart },
    Beat { conn: usize },
    End { conn: usize, reason: EndReason },
    Dismiss { conn: usize },
    HangUp { conn: Option<usize> },
    Claim { generation: u64 },
    Open { generation: u64 },
    Fence,
    AskGuest,
    StopGuest,
    GiveAway { what: Broken },
    Endure { what: Broken, why: Kept },
    HandOver,
    LetGo,
    Keep { why: Kept },
    Exit(ExitReason),
    Note(PrimaryNote),
}

/// A connection as the primary's ports know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Dialling,
    Up(usize),
    Down,
}

pub(super) struct PrimarySide {
    pub(super) valve: Valve,
    pub(super) faults: Faults,
    pub(super) since: Since,
    /// Whether the standby that has accepted holds what it was offered.
    pub(super) holds: bool,
    lines: BTreeMap<Link, Line>,
    effects: Vec<PrimaryEffect>,
    violation: Option<String>,
}

impl PrimarySide {
    pub(super) fn new(since: Since) -> Self {
        Self {
            valve: Valve::new(),
            faults: Faults::default(),
            since,
            holds: false,
            lines: BTreeMap::new(),
            effects: Vec::new(),
            violation: None,
        }
    }

    pub(super) fn connected(&mut self, link: Link, conn: usize) {
        self.lines.insert(link, Line::Up(conn));
    }

    pub(super) fn conn(&self, link: Link) -> Option<usize> {
        match self.lines.get(&link) {
            Some(Line::Up(conn)) => Some(*conn),
            _ => None,
        }
    }

    /// The queued effects, a broken word, and how many actions failed.
    pub(super) fn taken(&mut self) -> (Vec<PrimaryEffect>, Option<String>, u64) {
        let failed = std::mem::take(&mut self.faults.failed);
        (std::mem::take(&mut self.effects), self.violation.take(), failed)
    }

    fn broken(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// The connection of a link that must carry something.
    fn send(&mut self, link: Link, what: &str) -> Result<usize, PortFailure> {
        self.faults.strike(PortFault::Send)?;
        match self.lines.get(&link) {
            Some(Line::Up(conn)) => Ok(*conn),
            other => {
                self.broken(format!("sends {what} over {link:?}, which is {other:?}"));
                Err(PortFailure::NotUp(link))
            }
        }
    }
}

impl PrimaryPorts for PrimarySide {
    type Part = SimPart;
    type Failure = PortFailure;

    fn dial(&mut self, link: Link, address: usize) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Dial)?;
        self.lines.retain(|_, line| *line != Line::Down);
        self.lines.insert(link, Line::Dialling);
        self.effects.push(PrimaryEffect::Dial { link, address });
        Ok(())
    }

    fn send_hello(&mut self, link: Link, generation: u64) -> Result<(), PortFailure> {
        let conn = self.send(link, "Hello")?;
        let since = self.since.offer(link);
        self.effects.push(PrimaryEffect::Hello { conn, generation, since });
        Ok(())
    }

    fn start_base(&mut self, link: Link) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::StartBase)?;
        let needs = self.since.answer(link, self.holds)?;
        self.effects.push(PrimaryEffect::StartBase { link, needs });
        Ok(())
    }

    fn ship(&mut self, ticket: Ticket, part: SimPart) -> Result<(), PortFailure> {
        if part.captured_for != ticket.link {
            let link = ticket.link;
            self.broken(format!("ships over {link:?} what was captured for {:?}", part.captured_for));
        }
        let conn = self.send(ticket.link, "a checkpoint")?;
        self.effects.push(PrimaryEffect::Ship { conn, ticket, part });
        Ok(())
    }

    fn send_heartbeat(&mut self, link: Link) -> Result<(), PortFailure> {
        let conn = self.send(link, "a heartbeat")?;
        self.effects.push(PrimaryEffect::Beat { conn });
        Ok(())
    }

    fn send_end(&mut self, link: Link, reason: EndReason) -> Result<(), PortFailure> {
        let conn = self.send(link, "the end")?;
        self.effects.push(PrimaryEffect::End { conn, reason });
        Ok(())
    }

    fn dismiss(&mut self, link: Link) -> Result<(), PortFailure> {
        let conn = self.send(link, "a dismissal")?;
        self.effects.push(PrimaryEffect::Dismiss { conn });
        Ok(())
    }

    fn hang_up(&mut self, link: Link) {
        let conn = self.conn(link);
        if self.lines.insert(link, Line::Down).is_none() {
            self.broken(format!("hangs up {link:?}, which was never dialled"));
        }
        self.effects.push(PrimaryEffect::HangUp { conn });
    }

    fn claim(&mut self, generation: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Claim)?;
        self.effects.push(PrimaryEffect::Claim { generation });
        Ok(())
    }

    fn set_lease(&mut self, until: Option<Duration>) {
        self.valve.set_lease(until);
    }

    fn set_beats(&mut self, _: Option<Duration>) {}

    fn hold(&mut self, epoch: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Hold)?;
        self.valve.hold(epoch);
        Ok(())
    }

    fn begin_epoch(&mut self, epoch: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::BeginEpoch)?;
        self.valve.begin_epoch(epoch);
        Ok(())
    }

    fn commit(&mut self, through: u64) {
        if self.valve.holds() && through >= self.valve.epoch() {
            self.broken(format!("lets output of the running epoch {through} out (invariant 1)"));
        }
        self.valve.commit(through);
    }

    fn open(&mut self, generation: u64) {
        self.valve.open();
        self.effects.push(PrimaryEffect::Open { generation });
    }

    fn fence(&mut self, _: u64, _: String) {
        self.valve.discard();
        self.effects.push(PrimaryEffect::Fence);
    }

    fn give_away(&mut self, what: Broken) {
        self.effects.push(PrimaryEffect::GiveAway { what });
    }

    fn endure(&mut self, what: Broken, why: Kept) {
        self.effects.push(PrimaryEffect::Endure { what, why });
    }

    fn hand_over(&mut self) {
        self.effects.push(PrimaryEffect::HandOver);
    }

    fn let_go(&mut self) {
        self.effects.push(PrimaryEffect::LetGo);
    }

    fn keep(&mut self, why: Kept) {
        self.effects.push(PrimaryEffect::Keep { why });
    }

    fn ask_guest(&mut self) {
        self.effects.push(PrimaryEffect::AskGuest);
    }

    fn stop_guest(&mut self) {
        self.effects.push(PrimaryEffect::StopGuest);
    }

    fn exit(&mut self, reason: ExitReason) {
        self.effects.push(PrimaryEffect::Exit(reason));
    }

    fn note(&mut self, note: PrimaryNote) {
        self.effects.push(PrimaryEffect::Note(note));
    }
}

#[derive(Debug)]
pub(super) enum StandbyEffect {
    HungUp { link: Link, broken: bool },
    Try { link: Link, checkpoint: u64 },
    Apply { link: Link, checkpoint: u64 },
    Settle { link: Link, checkpoint: u64 },
    Release { link: Link },
    Discard { link: Link },
    Claim { generation: u64 },
    TakeOver(TakeOver),
    Exit(StandbyExit),
    Note(StandbyNote),
}

/// What goes out when the ports are drained.
#[derive(Debug)]
pub(super) enum Out {
    Send(Link, Msg),
    Close(Link),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Buffer {
    pub(super) number: u64,
    pub(super) node: Node,
    pub(super) flags: CheckpointFlags,
    pub(super) whole: bool,
    /// Of a base: what memory must have been before; `None`: anything.
    pub(super) over: Option<Node>,
}

/// The copy of a VM.
pub(super) struct Copy {
    pub(super) link: Link,
    slots: u64,
    /// Staging buffers in use: one is being filled, others wait for their acknowledgement, one is being
    /// applied.
    pub(super) staging: Vec<Buffer>,
    pub(super) acked: Option<Buffer>,
    /// What memory was before the base, if it was kept.
    pub(super) kept: Option<Node>,
    /// The state in memory, if memory is one state.
    pub(super) memory: Option<Node>,
    pub(super) applying: Option<u64>,
    /// Whether the base was restored on trial, successfully.
    pub(super) tried: bool,
    /// Whether the disks are at the committed checkpoint.
    pub(super) settled: bool,
    /// Whether base pages were written over a committed state.
    pub(super) spoiled: bool,
    /// Whether the rest of the copy says that it was given up.
    pub(super) released: bool,
    /// A part of it has failed, so that nothing more comes of what is being applied.
    pub(super) failed: bool,
    /// Copies of input and of output, with their epochs.
    pub(super) input: Vec<(u64, Node)>,
    pub(super) output: Vec<(u64, Node)>,
    /// Through which epoch the primary has said that its output has left.
    pub(super) left: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Introduced,
    Accepted,
    Down,
}

pub(super) struct StandbySide {
    pub(super) copy: Option<Copy>,
    /// Whether the arbiter was asked.
    pub(super) claimed: bool,
    pub(super) outbox: VecDeque<Out>,
    pub(super) faults: Faults,
    lines: BTreeMap<Link, Heard>,
    /// A link over which something could not be sent: it is broken, although the other end may not know yet.
    reset: Option<Link>,
    effects: Vec<StandbyEffect>,
    violation: Option<String>,
    bug: Option<Bug>,
}

impl StandbySide {
    pub(super) fn new(bug: Option<Bug>) -> Self {
        Self {
            copy: None,
            claimed: false,
            outbox: VecDeque::new(),
            faults: Faults::default(),
            lines: BTreeMap::new(),
            reset: None,
            effects: Vec::new(),
            violation: None,
            bug,
        }
    }

    /// A connection has introduced itself. `accepted` says whether memory was set aside for its VM.
    pub(super) fn introduced(&mut self, link: Link, slots: u64, accepted: bool) {
        self.lines.insert(link, Heard::Introduced);
        if accepted {
            self.copy = Some(Copy {
                link,
                slots,
                staging: Vec::new(),
                acked: None,
                kept: None,
                memory: None,
                applying: None,
                tried: false,
                settled: false,
                spoiled: false,
                released: false,
                failed: false,
                input: Vec::new(),
                output: Vec::new(),
                left: 0,
            });
        }
    }

    /// The copy that this connection feeds.
    pub(super) fn fed_by(&mut self, link: Link) -> Option<&mut Copy> {
        let heard = self.lines.get(&link) == Some(&Heard::Accepted);
        self.copy.as_mut().filter(|copy| heard && copy.link == link)
    }

    /// A checkpoint begins to arrive; the reader takes a free buffer for it.
    pub(super) fn begins(&mut self, link: Link, buffer: Buffer) {
        let Some(copy) = self.fed_by(link) else { return };
        copy.staging.push(buffer);
        if copy.staging.len() as u64 > copy.slots + 1 {
            self.broken("needs more staging buffers than the primary has slots and one".into());
        }
    }

    pub(super) fn taken(&mut self) -> (Vec<StandbyEffect>, Option<String>, u64) {
        let failed = std::mem::take(&mut self.faults.failed);
        (std::mem::take(&mut self.effects), self.violation.take(), failed)
    }

    pub(super) fn broken(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    fn send(&mut self, link: Link, msg: Msg) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Send).inspect_err(|_| self.reset = Some(link))?;
        match self.lines.get(&link) {
            Some(Heard::Introduced | Heard::Accepted) => self.outbox.push_back(Out::Send(link, msg)),
            other => self.broken(format!("sends {msg:?} over {link:?}, which is {other:?}")),
        }
        Ok(())
    }

    fn acked(&self) -> Option<u64> {
        self.copy.as_ref().and_then(|copy| copy.acked).map(|acked| acked.number)
    }
}

impl StandbyPorts for StandbySide {
    type Failure = PortFailure;

    fn accept(&mut self, link: Link, _: u64, dead_after: Duration) -> Result<(), PortFailure> {
        let holds = self.copy.as_ref().is_some_and(|copy| copy.link == link && copy.kept.is_some());
        self.send(link, Msg::Accept { dead_after, holds })?;
        self.lines.insert(link, Heard::Accepted);
        Ok(())
    }

    fn refuse(&mut self, link: Link, code: RefuseCode, text: String) {
        if self.lines.insert(link, Heard::Down) != Some(Heard::Introduced) {
            self.broken(format!("refuses {link:?}, which has not introduced itself just now"));
        }
        self.outbox.push_back(Out::Send(link, Msg::Refuse(code, text)));
        self.outbox.push_back(Out::Close(link));
    }

    fn try_base(&mut self, link: Link, checkpoint: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Try)?;
        self.effects.push(StandbyEffect::Try { link, checkpoint });
        Ok(())
    }

    fn ack(
        &mut self,
        link: Link,
        generation: u64,
        checkpoint: u64,
        stamp: Duration,
    ) -> Result<(), PortFailure> {
        let early = self.bug == Some(Bug::AckWhilePartial);
        match &mut self.copy {
            Some(copy) if copy.link == link => {
                let staged = copy.staging.iter().find(|buffer| buffer.number == checkpoint).copied();
                let whole = staged.is_some_and(|buffer| buffer.whole) || early;
                let in_turn = copy.applying.is_none() && (copy.tried || early);
                copy.acked = staged;
                if !whole || !in_turn {
                    self.broken(format!(
                        "acknowledges {checkpoint}, which is not whole, not tried, or not due (invariant 2)"
                    ));
                }
            }
            _ => self.broken(format!("acknowledges {checkpoint} over {link:?}")),
        }
        self.send(link, Msg::Ack { generation, number: checkpoint, stamp })
    }

    fn apply(&mut self, link: Link, checkpoint: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Apply)?;
        let acked = self.acked();
        match &mut self.copy {
            Some(copy) if copy.link == link && copy.applying.is_none() && acked == Some(checkpoint) => {
                copy.applying = Some(checkpoint);
            }
            _ => self.broken(format!("applies {checkpoint}, acknowledged is {acked:?} (invariant 2)")),
        }
        self.effects.push(StandbyEffect::Apply { link, checkpoint });
        Ok(())
    }

    fn settle(&mut self, link: Link, checkpoint: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Settle)?;
        self.effects.push(StandbyEffect::Settle { link, checkpoint });
        Ok(())
    }

    fn release(&mut self, link: Link) -> Result<(), PortFailure> {
        let applying = self.copy.as_ref().is_some_and(|copy| copy.applying.is_some() && !copy.failed);
        if applying {
            self.broken("gives a copy up in the middle of a commit".into());
        }
        self.effects.push(StandbyEffect::Release { link });
        Ok(())
    }

    fn send_heartbeat(&mut self, link: Link, stamp: Duration) -> Result<(), PortFailure> {
        self.send(link, Msg::Beat { stamp })
    }

    fn send_leave(&mut self, link: Link, reason: LeaveReason) {
        let promised = self.copy.as_ref().is_none_or(|copy| copy.acked.is_none() || copy.released);
        if reason.hands_over() && !promised {
            self.broken("hands its right over before it has written that down".into());
        }
        // Never fails here: a lost leave is a lost link.
        self.faults.next.take_if(|next| *next == PortFault::Send);
        self.send(link, Msg::Leave(reason)).ok();
    }

    fn hang_up(&mut self, link: Link) {
        self.lines.insert(link, Heard::Down);
        self.outbox.push_back(Out::Close(link));
        if let Some(copy) = self.copy.as_mut().filter(|copy| copy.link == link) {
            let acked = copy.acked.map(|buffer| buffer.number);
            copy.staging.retain(|buffer| Some(buffer.number) <= acked);
        }
        let broken = self.reset.take_if(|reset| *reset == link).is_some();
        self.effects.push(StandbyEffect::HungUp { link, broken });
    }

    fn discard(&mut self, link: Link) {
        match self.copy.take() {
            Some(copy) if copy.link == link => {}
            _ => self.broken(format!("discards a copy of {link:?}, which it does not have")),
        }
        self.effects.push(StandbyEffect::Discard { link });
    }

    fn claim(&mut self, generation: u64) -> Result<(), PortFailure> {
        self.faults.strike(PortFault::Claim)?;
        self.claimed = true;
        self.effects.push(StandbyEffect::Claim { generation });
        Ok(())
    }

    fn take_over(&mut self, order: TakeOver) {
        self.effects.push(StandbyEffect::TakeOver(order));
    }

    fn exit(&mut self, reason: StandbyExit) {
        self.effects.push(StandbyEffect::Exit(reason));
    }

    fn note(&mut self, note: StandbyNote) {
        self.effects.push(StandbyEffect::Note(note));
    }
}
