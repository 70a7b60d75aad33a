//! The arbiter of the model, and what an all-knowing observer checks.

use crate::planted::Bug;
use crate::{ClaimResult, PrimaryEvent, StandbyEvent};

use super::world::{History, Life, Process, UnderWay, World};

fn is_past_of(past: &History, of: &History) -> bool {
    of.starts_with(past)
}

impl World {
    pub(super) fn ask(&mut self, life: Life, generation: u64, base: History) {
        if !self.disturbed {
            self.fail(format!("{life:?} asks the arbiter although nothing has gone wrong"));
        }
        // A question that the process has given up may still be under way.
        let excused = self.stood_still || self.conns.iter().any(|conn| conn.reset);
        self.claims.push(UnderWay { life, generation, base, excused, answer: None });
    }

    /// A claim reaches the arbiter: the test-and-set. A process that has died meanwhile wins too, and is not
    /// told.
    pub(super) fn land(&mut self, at: usize, bug: Option<Bug>) {
        let UnderWay { life, generation, base, excused, .. } = self.claims[at].clone();
        let newest = self.newest().0;
        let won = if generation > newest || bug == Some(Bug::TwoWinners) && generation == newest {
            self.win(life, generation, &base, excused);
            true
        } else {
            self.won[generation as usize - 1] == life
        };
        if self.alive(life) {
            self.claims[at].answer = Some(won);
        } else {
            self.claims.remove(at);
        }
        self.tidy();
    }

    fn win(&mut self, life: Life, generation: u64, base: &History, excused: bool) {
        let newest = self.newest().0;
        if generation > newest + 1 {
            self.fail(format!("{life:?} claims generation {generation}, the newest is {newest}"));
        }
        // A primary runs on while it waits, and its image has all of it.
        let base = match &self.hosts[life.0].process {
            Process::Primary(primary) if self.alive(life) => primary.history.clone(),
            _ => base.clone(),
        };
        if !is_past_of(&self.tip, &base) {
            self.fail(format!("1 commit: {life:?} wins {generation} without a state whose output was seen"));
        }
        if generation > newest {
            self.won.push(life);
        } else {
            self.won[generation as usize - 1] = life;
        }
        (self.base, self.excused) = (base, excused);
    }

    /// The answer reaches the claimant; `None` says that nobody knows.
    pub(super) fn answered(&mut self, life: Life, generation: u64, won: Option<bool>, bug: Option<Bug>) {
        if !self.alive(life) {
            return;
        }
        let result = match won {
            Some(true) => ClaimResult::Won,
            Some(false) => ClaimResult::Lost { owner: "another".into() },
            None => ClaimResult::Unreachable { why: "no route".into() },
        };
        match &self.hosts[life.0].process {
            Process::Primary(_) => {
                self.tell_primary(life.0, PrimaryEvent::Claimed { generation, result }, bug)
            }
            Process::Standby(_) => {
                self.tell_standby(life.0, StandbyEvent::Claimed { generation, result }, bug)
            }
            Process::Starting { .. } if won == Some(true) => {
                let history = self.hosts[life.0].image.as_ref().map(|image| image.history.clone());
                self.goes_on(generation, life);
                self.start_primary(life.0, (generation, 0), history.unwrap_or_default(), bug);
                self.tell_primary(life.0, PrimaryEvent::Tick, bug);
            }
            Process::Starting { .. } => self.stop_process(life.0, true),
            Process::Down => {}
        }
    }

    /// A side goes live, or lets its output through again.
    pub(super) fn goes_on(&mut self, generation: u64, life: Life) {
        if self.won.get(generation as usize - 1) != Some(&life) {
            self.fail(format!("3 one side: {life:?} goes on in generation {generation} without owning it"));
        }
    }

    /// Output leaves a host.
    pub(super) fn output(&mut self, history: History, generation: u64, life: Life) {
        let (newest, owner) = self.newest();
        if self.won.get(generation as usize - 1) != Some(&life) {
            self.fail(format!("3 one side: {life:?} lets output out in {generation} without owning it"));
        }
        if owner != life {
            if !is_past_of(&history, &self.base) {
                self.fail(format!("1 commit: {life:?} lets out what the owner of {newest} does not know"));
            }
            if !self.excused {
                self.fail(format!(
                    "3 one side: {life:?} lets output out although {owner:?} has won {newest}"
                ));
            }
        } else if is_past_of(&self.tip, &history) {
            self.tip = history;
        } else if !is_past_of(&history, &self.tip) {
            self.fail(format!("1 commit: {life:?} lets out a second history"));
        }
    }

    pub(super) fn ends(&mut self, life: Life) {
        if self.newest().1 != life {
            self.fail(format!("8 orderly: {life:?} ends the VM without owning it"));
        }
        self.ended = true;
    }

    /// The generation in which `outlive run` would start this host's image, by sidecar and arbiter alone.
    pub(super) fn may_start(&self, host: usize, bug: Option<Bug>) -> Option<u64> {
        let image = self.hosts[host].image.as_ref().filter(|image| image.whole)?;
        let newest = self.newest().0;
        // What the process that wrote the sidecar has won belongs to its image.
        let own = (1..=newest).rev().find(|it| self.won[*it as usize - 1] == (host, image.process));
        let won = own.filter(|own| *own > image.generation);
        let generation = won.unwrap_or(image.generation);
        let stale = generation < newest && bug != Some(Bug::StaleImageStarts);
        let copy = won.is_none() && (image.replica || image.released);
        (!stale && !copy).then_some(newest + 1)
    }
}
