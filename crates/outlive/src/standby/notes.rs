//! What the log and the event stream say about a standby's decisions. The main thread writes it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_epoch::RefuseCode;
use outlive_pair::{LossReason, StandbyNote as Note};

use crate::events::{Event, EventWriter, SettlePart};
use crate::status::Standing;
use crate::told::Told;

/// The times of the steps of a takeover.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// How long the primary had been silent at the declaration.
    pub(super) detect: Duration,
    /// When the link was declared dead.
    pub(super) declared: Instant,
    /// When the disks were at the last commit.
    pub(super) settled: Instant,
    /// When the generation was won.
    pub(super) won: Instant,
    /// Whether the primary's process ended, as it does after a fault of its host. A host that has lost its power is
    /// silent.
    pub(super) ended: bool,
}

/// A disk that has not finished what it is at for so long hangs, as far as a person is concerned.
const HANGS: Duration = Duration::from_secs(1);
/// A takeover that has waited for its disks for so long is worth a line, and then again and again.
const SETTLE_SLOW: Duration = Duration::from_secs(2);
const SETTLE_AGAIN: Duration = Duration::from_secs(5);
/// A copy that is thrown away is gone within moments, unless a disk does not answer. It is worth a line then, and again
/// and again.
const LINGERS: Duration = Duration::from_secs(10);
const LINGERS_AGAIN: Duration = Duration::from_secs(60);

/// The writer; see the module.
pub(super) struct Notes {
    events: EventWriter,
    standing: Arc<Standing>,
    times: Times,
    /// The refusals that were logged.
    refusals: Told,
    /// Why the arbiter does not answer the question that is open, as the log has said it.
    no_answer: Told,
    /// A primary is attached: whoever else is refused changes nothing.
    attached: bool,
    /// The primary is lost, and the copy is not ready: when the next line about that is due.
    settling: Option<Instant>,
    /// A copy that was thrown away is not gone: when the next line about that is due.
    lingering: Option<Instant>,
}

impl Notes {
    pub(super) fn new(events: EventWriter, standing: Arc<Standing>) -> Self {
        let now = Instant::now();
        let times = Times { detect: Duration::ZERO, declared: now, settled: now, won: now, ended: false };
        let (refusals, no_answer) = (Told::default(), Told::default());
        let (settling, lingering) = (None, None);
        Self { events, standing, times, refusals, no_answer, attached: false, settling, lingering }
    }

    /// Whether a takeover waits until the copy is ready, as far as is known here.
    pub(super) fn is_settling(&self) -> bool {
        self.settling.is_some()
    }

    /// Says that a takeover waits for the copy, if it is time to say so. `waits`: for what, and for how long a disk has not
    /// finished what it is at; `None` if it waits no longer.
    pub(super) fn settles(&mut self, now: Instant, waits: Option<(SettlePart, Duration)>) {
        let (Some(due), Some((part, hangs))) = (self.settling, waits) else { return };
        let lasts = now.saturating_duration_since(self.times.declared);
        if lasts < SETTLE_SLOW {
            return;
        }
        // Of a disk that gets on there is nothing to say but that it is slow.
        let hangs = if part == SettlePart::Disk && hangs >= HANGS { hangs } else { Duration::ZERO };
        let hung = match hangs.as_secs() {
            0 => String::new(),
            seconds => format!(", and has not finished its last request for {seconds} s"),
        };
        let seconds = lasts.as_secs();
        let waits = match part {
            SettlePart::Memory => {
                format!("the last commit has not been written to the copy's memory for {seconds} s")
            }
            SettlePart::Disk => {
                format!("the copy is ready in memory, its disk has not finished for {seconds} s{hung}")
            }
        };
        self.standing.asking(&waits);
        if now < due {
            return;
        }
        self.settling = Some(now + SETTLE_AGAIN);
        tracing::warn!(
            "TAKEOVER WAITS: {waits}; unless its old host has it, the VM runs nowhere until then: look at this host's \
             storage and load"
        );
        let (for_ms, hangs_ms) = (lasts.as_millis() as u64, hangs.as_millis() as u64);
        self.events.emit(Event::SettleSlow { part, for_ms, hangs_ms });
    }

    /// Says that this host takes no primary, because the last copy is not gone, if it is time to say so. `lasts`: for how
    /// long that has been so; `None` if it is gone.
    pub(super) fn lingers(&mut self, now: Instant, lasts: Option<Duration>) {
        let Some(lasts) = lasts.filter(|lasts| *lasts >= LINGERS) else {
            if self.lingering.take().is_some() {
                tracing::warn!("the copy that was thrown away is gone; this host takes a primary again");
                self.standing.now("it takes a primary again");
            }
            return;
        };
        let seconds = lasts.as_secs();
        let why = format!(
            "this host takes no primary: the copy that it throws away has not been freed for {seconds} s, for example \
             because its disk does not answer"
        );
        self.standing.now(&why);
        if self.lingering.is_some_and(|due| now < due) {
            return;
        }
        self.lingering = Some(now + LINGERS_AGAIN);
        tracing::error!(
            "STANDBY OUT OF USE: {why}; look at this host's storage, and let another host protect the VM meanwhile"
        );
        self.events.emit(Event::CopyLingers { for_ms: lasts.as_millis() as u64 });
    }

    /// The times of the takeover that is under way.
    pub(super) fn times(&self) -> Times {
        self.times
    }

    /// Logs that a primary was refused. It asks five times a second.
    pub(super) fn refused(&mut self, code: RefuseCode, text: String, now: Instant) {
        if !self.attached {
            self.standing.refused(&text);
        }
        if self.refusals.is_news(&text, now) {
            // It is nothing to be alarmed about that a standby which ends takes no primary.
            match code {
                RefuseCode::Leaving => tracing::info!("refused a primary: {text}"),
                _ => tracing::warn!(?code, "refused a primary: {text}"),
            }
            self.events.emit(Event::PrimaryRefused { why: text });
        }
    }

    /// Logs one decision and its time.
    pub(super) fn note(&mut self, at: Instant, note: Note) {
        match note {
            Note::Attached { .. } => self.attached = true,
            // What is due then says more than who is refused meanwhile.
            Note::LinkLost { committed, .. } => self.attached = committed,
            Note::StreamRefused { .. } | Note::Differs { .. } | Note::Dismissed => self.attached = false,
            _ => {}
        }
        self.settling = match note {
            Note::LinkLost { committed: true, .. } => Some(at + SETTLE_SLOW),
            // An operator's stop is told to wait, and waits for the same.
            Note::StopWaits => self.settling,
            _ => None,
        };
        match note {
            // The thread that heard the primary logs it with its address.
            Note::Attached { .. } => {
                self.standing.unprotected("a primary is attached, its base is not committed yet")
            }
            Note::Protected { generation, checkpoint } => {
                self.standing.protected(generation);
                tracing::info!(generation, checkpoint, "base committed: this standby can take over");
                self.events.emit(Event::Ready { generation, checkpoint });
            }
            Note::LinkLost { why, silent, committed } => {
                let ended = matches!(why, LossReason::Closed | LossReason::Error(_));
                self.times = Times { detect: silent, declared: at, settled: at, won: at, ended };
                let lost = format!("the primary was lost: {why}");
                if committed {
                    self.standing.unprotected(&lost);
                    self.standing.asking("the copy is being made ready");
                } else {
                    self.standing.no_copy(&lost);
                }
                let nowhere = "; the base was not complete, so this host cannot run the VM: if its host is gone, \
                               it runs nowhere now, and is started there again";
                let nowhere = if committed { "" } else { nowhere };
                tracing::warn!(can_take_over = committed, "primary lost: {why}{nowhere}");
                self.events.emit(Event::LinkLost { reason: why.to_string() });
            }
            Note::Arbitrating { generation } => {
                self.no_answer = Told::default();
                (self.times.settled, self.times.won) = (at, at);
                self.standing.asking("asking the arbiter for the VM");
                tracing::info!(generation, "asking the arbiter");
                self.events.emit(Event::Arbitrating { generation });
            }
            Note::ArbiterUnreachable { why } => {
                let now = self.standing.no_answer("this standby waits", &why);
                self.standing.asking(&now);
                if self.no_answer.is_news(&why, at) {
                    tracing::error!("{now}");
                    self.events.emit(Event::ArbiterUnreachable { why });
                }
            }
            Note::Won { generation } => {
                self.times.won = at;
                self.standing.won(generation);
                self.events.emit(Event::Won { generation });
            }
            Note::StopWaits => {
                tracing::warn!(
                    "the stop waits for the arbiter: this may be the only host that has the VM. When it answers, \
                     this host takes the VM over and shuts it down in order, unless it was being handed over to this host; only SIGKILL ends the wait"
                );
            }
            Note::StopForgotten => {
                tracing::warn!(
                    "TOLD TO STOP while the VM was handed over to this host: the VM runs here now, and runs on; order the \
                     stop once more to shut it down, or hand it back first"
                );
            }
            Note::NotReleased { why } => {
                tracing::warn!(
                    "the primary will need the arbiter: this standby cannot hand its right over: {why}"
                );
            }
            Note::Differs { why } => {
                self.standing.no_copy(&format!("it was thrown away: {why}"));
                tracing::error!(
                    "AUDIT: {why}; the copy is thrown away, and the primary is asked for a new one"
                );
            }
            Note::Dismissed => {
                let why = "the primary goes on without this standby, and will send a new base";
                self.standing.no_copy(why);
                self.events.emit(Event::Dismissed);
                tracing::warn!("{why}");
            }
            Note::StreamRefused { why } => {
                self.standing.no_copy(&format!("what the primary sent was refused: {why}"));
                self.events.emit(Event::StreamRefused { why: why.clone() });
                tracing::error!("refused what the primary sent; the primary is told and goes on: {why}");
            }
        }
    }
}

/// Logs the result of comparing the copy with the VM.
pub(super) fn compared(events: &EventWriter, checkpoint: u64, difference: Option<&str>) {
    match difference {
        None => tracing::debug!(checkpoint, "self-check: the copy is the VM's"),
        Some(why) => tracing::error!(checkpoint, "SELF-CHECK FAILED: {why}"),
    }
    events.emit(Event::SelfCheck { checkpoint, difference: difference.map(str::to_owned) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Role;
    use crate::status::NO_PRIMARY;

    #[test]
    fn a_takeover_that_waits_for_its_disk_says_so_again_and_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let (standing, events) =
            (Standing::new(Role::Standby, None, NO_PRIMARY), EventWriter::open(&path).unwrap());
        let mut notes = Notes::new(events.clone(), standing.clone());
        let lost = Instant::now();
        let after = |seconds| lost + Duration::from_secs(seconds);
        let disk = |seconds| Some((SettlePart::Disk, Duration::from_secs(seconds)));
        notes.settles(after(9), disk(9));
        let why = outlive_pair::LossReason::Closed;
        notes.note(lost, Note::LinkLost { why, silent: Duration::ZERO, committed: true });
        let why = || standing.status().why.unwrap();
        notes.settles(after(1), disk(1));
        assert!(why().ends_with("the copy is being made ready"), "{}", why());
        for seconds in 2..=9 {
            notes.settles(after(seconds), disk(0));
            assert!(why().ends_with(&format!("its disk has not finished for {seconds} s")), "{}", why());
        }
        notes.settles(after(12), disk(7));
        assert!(why().ends_with("for 12 s, and has not finished its last request for 7 s"), "{}", why());
        notes.settles(after(13), Some((SettlePart::Memory, Duration::ZERO)));
        assert!(why().ends_with("written to the copy's memory for 13 s"), "{}", why());
        notes.note(after(14), Note::Arbitrating { generation: 2 });
        assert!(!notes.is_settling());
        notes.settles(after(30), disk(30));
        assert!(why().ends_with("asking the arbiter for the VM"), "{}", why());
        assert!(events.finish());
        let text = std::fs::read_to_string(&path).unwrap();
        let told: Vec<_> = text
            .lines()
            .filter_map(|line| match serde_json::from_str::<crate::events::Record>(line).unwrap().event {
                Event::SettleSlow { part: SettlePart::Disk, for_ms, hangs_ms } => Some((for_ms, hangs_ms)),
                _ => None,
            })
            .collect();
        assert_eq!(told, [(2000, 0), (7000, 0), (12_000, 7000)]);
    }

    #[test]
    fn a_copy_that_does_not_go_away_is_told_of_again_and_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let (standing, events) =
            (Standing::new(Role::Standby, None, NO_PRIMARY), EventWriter::open(&path).unwrap());
        let mut notes = Notes::new(events.clone(), standing.clone());
        let began = Instant::now();
        let why = || standing.status().why.unwrap();
        for second in 0..100 {
            let lasts = Duration::from_secs(second);
            notes.lingers(began + lasts, Some(lasts));
            let said = why().contains(&format!("has not been freed for {second} s"));
            assert_eq!(said, second >= 10, "{second}: {}", why());
        }
        notes.lingers(began + Duration::from_secs(100), None);
        assert!(why().contains("takes a primary again"), "{}", why());
        // The next one has its own time.
        notes.lingers(began + Duration::from_secs(101), Some(Duration::from_secs(10)));
        assert!(events.finish());
        let text = std::fs::read_to_string(&path).unwrap();
        let told: Vec<_> = text
            .lines()
            .filter_map(|line| match serde_json::from_str::<crate::events::Record>(line).unwrap().event {
                Event::CopyLingers { for_ms } => Some(for_ms / 1000),
                _ => None,
            })
            .collect();
        assert_eq!(told, [10, 70, 10]);
    }

    #[test]
    fn a_primary_that_was_refused_has_come() {
        let standing = Standing::new(Role::Standby, None, NO_PRIMARY);
        let mut notes = Notes::new(EventWriter::disabled(), standing.clone());
        let why = || standing.status().why.unwrap();
        assert_eq!(why(), NO_PRIMARY);
        for _ in 0..2 {
            notes.refused(RefuseCode::WrongVm, "kept for another".into(), Instant::now());
            assert_eq!(why(), "no primary has been accepted yet; a primary was refused: kept for another");
        }
        notes.note(Instant::now(), Note::Protected { generation: 1, checkpoint: 1 });
        standing.unprotected("why");
        // A second primary is no news while there is one.
        notes.attached = true;
        notes.refused(RefuseCode::Busy, "another primary is attached".into(), Instant::now());
        assert_eq!(why(), "why");
    }
}
