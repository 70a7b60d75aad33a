//! The host where the VM runs.

#[cfg(test)]
mod age;
mod broken;
mod capture;
mod loss;
mod types;

use std::time::Duration;

use outlive_epoch::{EndReason, RefuseCode};

use crate::claim::{Claim, Step};
use crate::planted::{Planted, planted};
use crate::redial::{Answer, Redial};
use crate::{Link, LossReason, Timing};

pub use broken::{Broken, Kept};
pub use types::{
    ExitReason, OutputMode, PrimaryAction, PrimaryConfig, PrimaryEvent, PrimaryNote, PrimaryStatus, Ticket,
    Wanted,
};

use PrimaryAction as Action;
use PrimaryEvent as Event;
use PrimaryNote as Note;

/// A link that carries base pages or checkpoints.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
struct Attached {
    link: Link,
    /// When the next heartbeat is due.
    beat_at: Duration,
    /// When a byte was last heard. Used while nothing is held: the peer may be slow, as long as it lives.
    heard: Duration,
}

/// What is known about checkpoints from the base-final capture on.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
struct Guard {
    base: u64,
    shipped: u64,
    acked: u64,
    /// The newest time of this host's clock that the standby is known to have heard: the start of the lease.
    contact: Duration,
    /// Whether the last checkpoint has been captured.
    last: bool,
    /// How far the VM is on its way to the standby, if its operator wants it there.
    handing: Option<Handing>,
    /// Why the VM goes on without this standby, which was told so. It has this side's lease as the time to answer that
    /// it hands its right over; nothing is captured meanwhile.
    dismissed: Option<String>,
}

/// How far a hand-over is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
enum Handing {
    /// What was captured before is still being committed. The guest runs.
    Asked,
    /// The last checkpoint is captured, and the guest stands still.
    Captured,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
enum State {
    /// Output passes through, no standby.
    Alone { dial_at: Duration },
    /// Waits for a connection.
    Dialling { link: Link },
    /// Waits for the answer to Hello.
    Greeting { link: Link, until: Duration },
    /// Base pages go out, output passes through.
    BaseSync(Attached),
    /// The base-final checkpoint is captured, so the standby may become able to take over: output is held.
    Guarding(Attached, Guard),
    /// The link is gone and the standby may be able to take over: output is held until the arbiter has
    /// answered, or until it is heard that the standby has handed its right over.
    Arbitrating { link: Link, claim: Claim },
    /// The standby has handed its right over, and the arbiter was asked before that was heard. Nobody else can
    /// run the VM, so output passes. But the next generation may have been won without an answer, and no
    /// standby is looked for before that is known: it would be told a generation that is out of date.
    Unrivalled(Claim),
    /// Nothing happens any more.
    Over { fenced: bool },
}

/// The state machine of the primary. The crate's documentation says how to drive it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Primary {
    config: PrimaryConfig,
    /// The times that the two sides agreed on; the configured ones while there is no standby.
    timing: Timing,
    generation: u64,
    /// Number of the last checkpoint captured, over all standbys.
    checkpoint: u64,
    state: State,
    /// The VM must end, or has ended: no vCPU runs any more.
    end: Option<EndReason>,
    /// Whether the guest was asked to shut itself down.
    guest_asked: bool,
    /// The checkpoint at which the guest stands still, because it is being handed over.
    still: Option<u64>,
    next_link: u64,
    redial: Redial,
    /// The last note about dialling, so that it is given once and not five times a second.
    said: Option<Note>,
    /// What is broken at this host.
    faults: broken::Faults,
    /// Until when the waiting thread is believed to make progress.
    alive_until: Duration,
    now: Duration,
    pub(crate) bug: Planted,
}

impl Primary {
    /// A primary that runs alone and looks for a standby at once, if it has an address. After a takeover,
    /// `generation` and `checkpoint` come from [`StandbyAction::TakeOver`](crate::StandbyAction::TakeOver).
    pub fn new(config: PrimaryConfig, now: Duration) -> Self {
        Self {
            timing: config.timing,
            generation: config.generation,
            checkpoint: config.checkpoint,
            state: State::Alone { dial_at: now },
            end: None,
            guest_asked: false,
            still: None,
            next_link: 0,
            redial: Redial::new(config.standbys, now)
                .expecting(config.handed.then_some(now + Timing::RETURN.1)),
            said: None,
            faults: broken::Faults::none((config.checkpoint > 0).then_some(now)),
            alive_until: now + config.timing.dead_after,
            now,
            bug: Planted::default(),
            config,
        }
    }

    /// The generation in which the VM runs.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The number of the running epoch: frames produced now belong to the checkpoint with this number.
    pub fn epoch(&self) -> u64 {
        self.checkpoint + 1
    }

    /// What the machine is doing.
    pub fn status(&self) -> PrimaryStatus {
        match &self.state {
            State::Alone { .. } | State::Unrivalled(_) => PrimaryStatus::Alone,
            State::Dialling { .. } | State::Greeting { .. } => PrimaryStatus::Dialling,
            State::BaseSync(_) => PrimaryStatus::BaseSync,
            State::Guarding(_, guard) if guard.last => PrimaryStatus::Ending,
            State::Guarding(_, guard) if guard.acked < guard.base => PrimaryStatus::BaseCommit,
            State::Guarding(_, guard) if guard.dismissed.is_some() => PrimaryStatus::Arbitrating,
            State::Guarding(..) => PrimaryStatus::Protected,
            State::Arbitrating { .. } => PrimaryStatus::Arbitrating,
            State::Over { .. } => PrimaryStatus::Over,
        }
    }

    /// Whether a frame that the guest sends now may leave at once or must wait.
    pub fn output(&self) -> OutputMode {
        match &self.state {
            State::Guarding(..) | State::Arbitrating { .. } => OutputMode::Hold,
            State::Over { fenced: true } => OutputMode::Discard,
            _ => OutputMode::PassThrough,
        }
    }

    /// Whether a frame that was released may still leave at this moment. Ask it for every frame, right before
    /// the frame is written, with a fresh `now`: between the decision and the write this process may have
    /// been stopped for an hour.
    pub fn may_release(&self, now: Duration) -> bool {
        self.may_release_until().is_none_or(|end| now < end)
    }

    /// Until when [`may_release`](Self::may_release) says yes, if no event comes before; `None`: forever. For
    /// code that has no access to this state machine, and is told after each event.
    pub fn may_release_until(&self) -> Option<Duration> {
        match &self.state {
            _ if planted!(self.bug, StaleAckReleases) => None,
            State::Guarding(_, guard) => Some(guard.contact + self.timing.primary_patience()),
            State::Arbitrating { .. } | State::Over { fenced: true } => Some(Duration::ZERO),
            _ => None,
        }
    }

    /// Until when heartbeats may be sent, if no event comes before; `None`: forever. While a standby can take
    /// over, heartbeats say that the VM makes progress here and not only that a socket is open. They end when
    /// the thread that waits, captures and follows has given no sign of itself ([`Event::Tick`],
    /// [`Event::Captured`]) for as long as a silent host is given. For code that sends heartbeats on its own.
    pub fn may_beat_until(&self) -> Option<Duration> {
        match &self.state {
            State::Guarding(..) if !planted!(self.bug, BeatsWithoutProgress) => Some(self.alive_until),
            _ => None,
        }
    }

    /// The next checkpoint that the driver must capture. Ask it before every pause; while it is
    /// [`Wanted::Nothing`], the guest runs on (or, if it has ended, waits).
    pub fn wanted_capture(&self) -> Wanted {
        match &self.state {
            State::BaseSync(attached) => Wanted::Base { link: attached.link },
            State::Guarding(_, guard)
                if guard.last
                    || guard.dismissed.is_some()
                    || guard.shipped - guard.acked >= self.config.slots =>
            {
                Wanted::Nothing
            }
            // While the guest stands still nothing else must be on its way.
            State::Guarding(_, Guard { handing: Some(Handing::Captured), .. }) => Wanted::Nothing,
            State::Guarding(_, Guard { handing: Some(Handing::Asked), shipped, acked, .. })
                if self.end.is_none() =>
            {
                if shipped == acked {
                    Wanted::HandOver
                } else {
                    Wanted::Nothing
                }
            }
            State::Guarding(..) => self.end.map_or(Wanted::Epoch, Wanted::Last),
            _ => Wanted::Nothing,
        }
    }

    /// Whether vCPUs may run, as far as this machine knows: the VM has not ended, was not lost, and does not stand
    /// still for its hand-over.
    pub fn guest_may_run(&self) -> bool {
        self.is_live() && (self.still.is_none() || planted!(self.bug, RunsOnWhileHandedOver))
    }

    /// The VM has not ended and was not lost.
    fn is_live(&self) -> bool {
        self.end.is_none() && !matches!(self.state, State::Over { .. })
    }

    /// Whether the guest stands still because it is being handed over.
    pub fn stands_still(&self) -> bool {
        self.is_live() && self.still.is_some()
    }

    /// The checkpoint at which the VM was handed over to the host that has it now: its memory here is that of this
    /// checkpoint, if its vCPUs have not run since.
    pub fn handed_over(&self) -> Option<u64> {
        self.still.filter(|_| matches!(self.state, State::Over { fenced: true }))
    }

    /// The connection in use.
    pub fn link(&self) -> Option<Link> {
        match &self.state {
            State::Dialling { link } | State::Greeting { link, .. } => Some(*link),
            State::BaseSync(attached) | State::Guarding(attached, _) => Some(attached.link),
            State::Alone { .. } | State::Arbitrating { .. } | State::Unrivalled(_) | State::Over { .. } => {
                None
            }
        }
    }

    /// When the next `Tick` is due, if no other event comes before.
    pub fn next_deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Alone { dial_at } => (self.config.standbys > 0).then_some(*dial_at),
            State::Greeting { until, .. } => Some(*until),
            State::BaseSync(attached) => {
                Some(attached.beat_at.min(attached.heard + self.timing.primary_patience()))
            }
            State::Guarding(attached, guard) => {
                Some(attached.beat_at.min(guard.contact + self.timing.primary_patience()))
            }
            State::Arbitrating { claim, .. } | State::Unrivalled(claim) => claim.deadline(),
            State::Dialling { .. } | State::Over { .. } => None,
        }
    }

    /// Takes one event and appends what must be done to `out`.
    pub fn handle(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        // The times of events from two threads may be slightly out of order; time never goes back here.
        self.now = self.now.max(now);
        if !planted!(self.bug, StaleAckReleases) || matches!(event, Event::Tick) {
            self.look_at_clock(out);
        }
        // A pause has no room for anything that can wait, and a heartbeat can.
        let in_pause = matches!(event, Event::Captured { .. });
        // Only the waiting thread hands these in.
        let waits = matches!(event, Event::Tick);
        match event {
            Event::Tick | Event::Captured { .. } => self.alive_until = self.now + self.timing.dead_after,
            Event::LongWork { within } => self.alive_until = self.now + within + self.timing.dead_after,
            _ => {}
        }
        match event {
            Event::Tick | Event::LongWork { .. } => {}
            Event::End { reason } => self.end = self.end.or(Some(reason)),
            Event::Stop { ask_guest } => self.stop(ask_guest, out),
            Event::Captured { link, base, stays } => self.captured(link, base, stays, out),
            Event::HoldFailed { link, why } => self.hold_failed(link, why, out),
            Event::Claimed { generation, result } => self.claimed(generation, result, out),
            Event::Superseded { generation, owner } => self.superseded(generation, owner, out),
            Event::Connected { link } => self.connected(link, out),
            Event::DialFailed { link, why, lasts } => self.dial_failed(link, why, lasts, out),
            Event::Accepted { link, dead_after } => self.accepted(link, dead_after, out),
            Event::Refused { link, code, text } => self.refused(link, code, text, out),
            Event::Heard { link } => self.heard(link),
            Event::Heartbeat { link, stamp } => drop(self.contact(link, stamp, out)),
            Event::Ack { link, generation, checkpoint, stamp } => {
                self.ack(link, generation, checkpoint, stamp, out)
            }
            Event::Leave { link, reason } if reason.hands_over() => self.released(link, reason, out),
            Event::Leave { link, reason } => self.left(link, reason, out),
            Event::LinkLost { link, why } => self.link_lost(link, why, out),
            Event::Broken { what, again } => self.broken(what, again),
            Event::Mended { what } => self.mended(what),
            Event::StandbyReaches { link, reaches } => self.standby_reaches(link, reaches),
            Event::HandOver => self.hand_over(out),
            Event::OutputLeft => self.output_left(out),
            Event::OutputStays => self.output_stays(out),
            Event::SharedDisks { hang } => self.shared_disks(hang),
        }
        if !matches!(self.state, State::Guarding(..) | State::Arbitrating { .. } | State::Over { .. }) {
            // Nobody else can have the VM.
            self.still = None;
        }
        if !in_pause {
            self.look_at_faults(out);
        }
        self.go_on(in_pause, waits, out);
    }

    /// The clock comes before the event: see the crate's documentation.
    fn look_at_clock(&mut self, out: &mut Vec<Action>) {
        let patience = self.timing.primary_patience();
        let silent = match &self.state {
            State::Greeting { link, until } if self.now >= *until => {
                Some((*link, self.config.timing.greeting))
            }
            State::BaseSync(attached) if self.now >= attached.heard + patience => {
                Some((attached.link, self.now - attached.heard))
            }
            State::Guarding(attached, guard) if self.now >= guard.contact + patience => {
                Some((attached.link, self.now - guard.contact))
            }
            _ => None,
        };
        if let Some((link, time)) = silent {
            self.link_lost(link, LossReason::Silent(time), out);
        }
    }

    /// Does what is due in the state that was reached.
    fn go_on(&mut self, in_pause: bool, waits: bool, out: &mut Vec<Action>) {
        if let Some(reason) = self.end {
            self.end_if_possible(reason, out);
        }
        let may_beat = !in_pause && self.may_beat_until().is_none_or(|end| self.now < end);
        let may_claim = waits || planted!(self.bug, AnyThreadClaims);
        let held = matches!(self.state, State::Arbitrating { .. });
        match &mut self.state {
            State::Alone { dial_at } if self.config.standbys > 0 && self.now >= *dial_at => {
                // Whichever was due first is due by now.
                if let Some(address) = self.redial.next(self.now) {
                    let link = Link(self.next_link);
                    self.next_link += 1;
                    self.state = State::Dialling { link };
                    out.push(Action::Dial { link, address });
                }
            }
            State::BaseSync(attached) | State::Guarding(attached, _)
                if self.now >= attached.beat_at && may_beat =>
            {
                attached.beat_at = self.now + self.timing.heartbeat();
                out.push(Action::SendHeartbeat { link: attached.link });
            }
            // A host whose waiting thread hangs would win a VM that nobody takes care of.
            State::Arbitrating { claim, .. } | State::Unrivalled(claim) if may_claim => loop {
                match claim.step(self.now) {
                    Step::Nothing => break,
                    Step::Ask => out.push(Action::Claim { generation: claim.generation }),
                    Step::Report(why) => out.push(Action::Note(Note::ArbiterUnreachable { why, held })),
                }
            },
            _ => {}
        }
    }

    /// The VM has ended or must end: at once if nobody else can run it, otherwise after the last checkpoint
    /// is committed or the arbiter has answered.
    fn end_if_possible(&mut self, reason: EndReason, out: &mut Vec<Action>) {
        match &self.state {
            State::Alone { .. } | State::Unrivalled(_) => {}
            State::Dialling { link } | State::Greeting { link, .. } => {
                out.push(Action::Hangup { link: *link })
            }
            State::BaseSync(attached) => self.say_end(attached.link, reason, out),
            State::Guarding(attached, guard) if guard.last && guard.acked == guard.shipped => {
                self.say_end(attached.link, reason, out);
            }
            State::Arbitrating { .. } if planted!(self.bug, EndWithoutArbitration) => {
                out.push(Action::ReleaseAll { generation: self.generation })
            }
            State::Guarding(..) | State::Arbitrating { .. } | State::Over { .. } => return,
        }
        self.state = State::Over { fenced: false };
        out.push(Action::Exit { reason: ExitReason::Ended(reason) });
    }

    /// The operator's stop: a guest that can shut down is asked to do so, once.
    fn stop(&mut self, ask_guest: bool, out: &mut Vec<Action>) {
        if !self.is_live() {
            return;
        }
        if ask_guest && !std::mem::replace(&mut self.guest_asked, true) {
            out.push(Action::AskGuest);
        } else {
            self.end = Some(EndReason::Stopped);
            out.push(Action::StopGuest);
        }
        self.ends_instead(out);
    }

    fn say_end(&self, link: Link, reason: EndReason, out: &mut Vec<Action>) {
        out.push(Action::SendEnd { link, reason });
        out.push(Action::Hangup { link });
    }

    fn connected(&mut self, link: Link, out: &mut Vec<Action>) {
        if matches!(self.state, State::Dialling { link: dialled } if dialled == link) {
            self.state = State::Greeting { link, until: self.now + self.config.timing.greeting };
            out.push(Action::SendHello { link, generation: self.generation });
        } else {
            out.push(Action::Hangup { link });
        }
    }

    fn dial_failed(&mut self, link: Link, why: String, lasts: bool, out: &mut Vec<Action>) {
        if matches!(self.state, State::Dialling { link: dialled } if dialled == link) {
            self.dial_later(if lasts { Answer::refused(&why) } else { Answer::Nothing });
            self.say(Note::DialFailed { why }, out);
        }
    }

    fn accepted(&mut self, link: Link, dead_after: Duration, out: &mut Vec<Action>) {
        if !matches!(self.state, State::Greeting { link: greeted, .. } if greeted == link) {
            return;
        }
        self.timing.dead_after = self.config.timing.dead_after.max(dead_after);
        self.said = None;
        self.faults.forget_standby();
        let attached = Attached { link, beat_at: self.now, heard: self.now };
        self.state = State::BaseSync(attached);
        out.push(Action::StartBase { link });
        out.push(Action::Note(Note::Attached { link }));
    }

    fn refused(&mut self, link: Link, code: Result<RefuseCode, u16>, text: String, out: &mut Vec<Action>) {
        if matches!(self.state, State::Greeting { link: greeted, .. } if greeted == link) {
            self.dial_later(Answer::refused(&text));
            out.push(Action::Hangup { link });
            self.say(Note::Refused { code, text }, out);
        }
    }

    fn dial_later(&mut self, answer: Answer) {
        let dial_at = self.redial.failed(self.now, answer, &self.timing);
        self.state = State::Alone { dial_at };
    }

    /// Gives a note about dialling unless it is the same as the last one.
    fn say(&mut self, note: Note, out: &mut Vec<Action>) {
        if self.said.as_ref() != Some(&note) {
            self.said = Some(note.clone());
            out.push(Action::Note(note));
        }
    }

    fn heard(&mut self, link: Link) {
        match &mut self.state {
            State::BaseSync(attached) | State::Guarding(attached, _) if attached.link == link => {
                attached.heard = self.now;
                if let (true, State::Guarding(_, guard)) =
                    (planted!(self.bug, SilenceByLastByte), &mut self.state)
                {
                    guard.contact = self.now;
                }
            }
            _ => {}
        }
    }

    /// The standby has returned a stamp. Returns whether the link is still good.
    fn contact(&mut self, link: Link, stamp: Duration, out: &mut Vec<Action>) -> bool {
        self.heard(link);
        if stamp > self.now {
            self.link_lost(link, LossReason::Protocol("it returned a stamp from the future".into()), out);
            return false;
        }
        match &mut self.state {
            State::BaseSync(attached) => attached.link == link,
            State::Guarding(attached, guard) if attached.link == link => {
                guard.contact = guard.contact.max(stamp);
                true
            }
            _ => false,
        }
    }
}
