//! What the log, the events and the counters say about decisions. The coordinator's thread writes it, so that
//! no decision waits for a reader of the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_epoch::{ArbiterSight, LeaveReason, RefuseCode};
use outlive_pair::{LossReason, PrimaryNote as Note};

use super::reminder::Reminder;
use super::stats::{BaseCost, Totals};
use crate::events::{Event, EventWriter};
use crate::link::LinkKind;
use crate::status::Standing;
use crate::told::Told;
use crate::vm::Runs;

/// A host that the arbiter has decided against learns of it within moments: after a hand-over it still ends its copy.
/// One that says for so long that it runs the VM does not learn of it.
const LEARNS_WITHIN: Duration = Duration::from_secs(10);

/// The other host runs this VM, too, in an older generation: whether it has had the time to learn that it has lost.
#[derive(Default)]
struct Loser(Option<(u64, Instant)>);

impl Loser {
    /// It says that it runs the VM in this generation, older than that of the VM here.
    fn had_its_time(&mut self, generation: u64, now: Instant) -> bool {
        let same = self.0.filter(|(heard, _)| *heard == generation);
        let (_, since) = *self.0.insert(same.unwrap_or((generation, now)));
        now.saturating_duration_since(since) >= LEARNS_WITHIN
    }
}

/// The writer; see the module.
pub(super) struct Notes {
    events: EventWriter,
    totals: Arc<Totals>,
    standing: Arc<Standing>,
    reminder: Reminder,
    /// Why no standby can be reached, as the log has said it.
    unreachable: Told,
    /// What standbys have refused, as the log has said it.
    refusals: Told,
    /// Why the arbiter does not answer the question that is open, as the log has said it.
    no_answer: Told,
    /// When the standby said that it cannot reach the arbiter, while that lasts.
    standby_without_arbiter: Option<Instant>,
    loser: Loser,
}

impl Notes {
    pub(super) fn new(events: EventWriter, totals: Arc<Totals>, standing: Arc<Standing>) -> Self {
        Self {
            events,
            totals,
            standing,
            reminder: Reminder::default(),
            unreachable: Told::default(),
            refusals: Told::default(),
            no_answer: Told::default(),
            standby_without_arbiter: None,
            loser: Loser::default(),
        }
    }

    /// Says that the VM is unprotected, if it is time to say so again.
    pub(super) fn remind(&mut self) {
        if let Some(lasts) = self.reminder.due(self.totals.is_protected(), Instant::now()) {
            let (why, for_s) = (self.standing.why(), lasts.as_secs());
            tracing::warn!("the VM has been UNPROTECTED for {} min: {why}", for_s / 60);
            self.events.emit(Event::StillUnprotected { why, for_s });
        }
    }

    /// Writes one note. `standby` is where the link of the note leads to, and what protects it.
    pub(super) fn say(&mut self, note: Note, standby: Option<(String, Option<LinkKind>)>) {
        match note {
            Note::DialFailed { why } => self.unreachable(&why),
            Note::Refused { code, text } => {
                if let Some(there) = Runs::parse(&text)
                    && self.runs_twice(there)
                {
                    return;
                }
                self.standing.now(&format!("the standby refuses: {text}"));
                match code {
                    // That it leaves was said already, or it has just come.
                    Ok(RefuseCode::Leaving) => tracing::info!("standby refused: {text}"),
                    _ if self.refusals.is_news(&text, Instant::now()) => {
                        tracing::warn!("standby refused: {text}");
                    }
                    _ => tracing::debug!("standby refused: {text}"),
                }
            }
            Note::Attached { .. } => {
                self.standby_without_arbiter = None;
                (self.unreachable, self.refusals) = (Told::default(), Told::default());
                // A link that is lost already has no address; what follows says so.
                let Some((addr, link)) = standby else {
                    return tracing::debug!("a standby accepted, and the link to it is lost already");
                };
                self.standing.peer(&addr);
                self.standing.now(&format!("synchronising with {addr}"));
                tracing::info!(standby = %addr, "standby attached, base synchronisation begins");
                self.events.emit(Event::StandbyAttached { addr, link });
            }
            Note::Protected { generation, checkpoint } => {
                let base_ms = self.totals.base_ms();
                self.totals.protected(true);
                self.standing.protected(generation);
                let BaseCost { rounds, held_ms, longest_stop_us } = self.totals.base_cost();
                tracing::info!(generation, checkpoint, base_ms, rounds, held_ms, "protected");
                self.events.emit(Event::Protected {
                    generation,
                    checkpoint,
                    base_ms,
                    rounds,
                    held_ms,
                    longest_stop_us,
                });
            }
            Note::LinkLost { why, held } => {
                self.standby_without_arbiter = None;
                self.totals.protected(false);
                let in_order = matches!(why, LossReason::Left(LeaveReason::Released));
                let why = why.to_string();
                self.standing.unprotected(&format!("the standby was lost: {why}"));
                if in_order && !held {
                    tracing::info!("standby left in order; the VM goes on here, UNPROTECTED: {why}");
                } else {
                    tracing::warn!(held_output = held, "standby lost: {why}");
                }
                self.events.emit(Event::LinkLost { reason: why.clone() });
                self.events.emit(Event::Unprotected { why });
            }
            Note::Dismissing { why } => {
                let now = "the standby is told that the VM goes on here without it";
                self.standing.asking(now);
                tracing::warn!("{now}; output is held until it answers: {why}");
            }
            Note::Arbitrating { generation } => {
                self.no_answer = Told::default();
                self.standing.asking("asking the arbiter who goes on");
                tracing::info!(generation, "asking the arbiter; output is held until it answers");
                self.events.emit(Event::Arbitrating { generation });
            }
            Note::RightHandedOver => {
                self.standing.goes_on("it has handed its right over");
                tracing::warn!("the standby has handed its right over: the VM goes on here, UNPROTECTED");
            }
            Note::ArbiterUnreachable { why, held } => {
                let what = if held { "output stays held" } else { "no new standby is looked for" };
                let now = self.standing.no_answer(what, &why);
                if held {
                    self.standing.asking(&now)
                } else {
                    self.standing.goes_on(&now)
                }
                if self.no_answer.is_news(&why, Instant::now()) {
                    tracing::error!("{now}");
                    self.events.emit(Event::ArbiterUnreachable { why });
                }
            }
            // Told of with its reason, where the reason is known.
            Note::GivenAway { .. } => {
                self.totals.protected(false);
                self.standing.unprotected("the VM was left to its standby");
            }
            Note::Won { generation } => {
                self.standing.won(generation);
                tracing::warn!(generation, "won: the VM goes on here, UNPROTECTED");
                self.events.emit(Event::Won { generation });
            }
        }
    }

    /// The standby says whether it reaches the clients' network. `pair` decides by it; here it is for people.
    pub(super) fn standby_reaches(&self, reaches: Option<bool>) {
        self.standing.other_reaches(reaches);
    }

    /// The standby says whether it sees the arbiter. Nothing is decided by it.
    pub(super) fn standby_sees(&mut self, sight: ArbiterSight) {
        self.standing.other_sees(sight.into());
        match sight {
            ArbiterSight::Unknown => {}
            ArbiterSight::Lost { for_s } => {
                if self.standby_without_arbiter.is_none() {
                    self.standby_without_arbiter = Some(Instant::now());
                    tracing::warn!(
                        for_s,
                        "THE STANDBY HAS LOST THE ARBITER: it could not take the VM over now; its own log and \
                         `outlive status` say why"
                    );
                    self.events.emit(Event::StandbyArbiterLost { for_s: for_s.into() });
                }
            }
            ArbiterSight::Seen => {
                if let Some(since) = self.standby_without_arbiter.take() {
                    let lost_ms = since.elapsed().as_millis() as u64;
                    tracing::warn!(lost_ms, "the standby sees the arbiter again");
                    self.events.emit(Event::StandbyArbiterBack { lost_ms });
                }
            }
        }
    }

    /// Whether the VM that the other host runs is this one, or is called like it. Then it is said loudly. This VM runs
    /// on: nobody here can know which of the two is the right one.
    fn runs_twice(&mut self, there: Runs) -> bool {
        let Some(here) = self.standing.runs() else { return false };
        let Runs { name, id, generation } = there;
        let same_vm = id == here.id;
        if !same_vm && name != here.name {
            return false;
        }
        if same_vm && generation < here.generation && !self.loser.had_its_time(generation, Instant::now()) {
            self.standing.now("the other host has not ended its copy of the VM yet");
            tracing::debug!(generation, "the host that has lost the VM still has it");
            return true;
        }
        let at = self.standing.other_hosts();
        let why = if same_vm {
            format!(
                "THE VM {name} RUNS ON BOTH HOSTS: here in generation {}, and at {at} in generation {generation}. Look at \
                 both (`outlive status`) and stop the one that is not to go on; what its clients were told is lost \
                 (docs/arbitration.md)",
                here.generation
            )
        } else {
            format!(
                "TWO VMS HAVE THE NAME {name}: this one (id {}) and one that runs at {at} (id {id}, generation \
                 {generation}). If they have one address, clients reach either: stop the wrong one. To protect the VM \
                 at {at}, stop this one and run `outlive standby` here; for two VMs give another --name and --standby",
                here.id
            )
        };
        self.standing.now(&why);
        tracing::error!("{why}");
        self.events.emit(Event::RunsTwice { vm: name, id, generation, at, same_vm });
        true
    }

    /// The primary tries again and again.
    fn unreachable(&mut self, why: &str) {
        self.standing.now(&format!("no standby can be reached: {why}"));
        if self.unreachable.is_news(why, Instant::now()) {
            tracing::warn!("standby not reachable, still trying: {why}");
            self.events.emit(Event::StandbyUnreachable { why: why.to_owned() });
        } else {
            tracing::debug!("standby not reachable: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_has_lost_the_vm_has_a_while_to_end_it() {
        let (mut loser, began) = (Loser::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        let said = [(2, 0), (2, 9), (2, 10), (2, 60), (3, 61), (3, 70), (3, 71)];
        let told = said.map(|(generation, second)| loser.had_its_time(generation, at(second)));
        assert_eq!(told, [false, false, true, true, false, false, true]);
    }
}
