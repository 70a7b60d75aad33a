//! Operators who copy images with their sidecars and start the copies: at once or much later, on hosts that reach the
//! arbiter, do not, or find another one; with and without a word that accepts what speaks against it.

use super::hosts::Process;
use super::images::{Image, Word};
use super::truth::{Life, Node};
use super::world::{Happening, World};
use crate::{Danger, PrimaryEvent, StandbyStatus, rival};

/// Time between two looks of a process that runs the VM, in µs.
const LOOK_AFTER: std::ops::Range<u64> = 100_000..300_000;
/// The longest time in µs from the start of a copy, or from the end of whatever keeps a host from the arbiter, until
/// that host lets nothing out any more: a look, an answer of a slow arbiter, and some.
const AWARE_AFTER: u64 = 700_000;

impl World {
    /// Draws what is copied and started when.
    pub(super) fn plan_copies(&mut self, (from, until): (u64, u64)) {
        self.tells_files_apart = !self.rng.one_in(4);
        for _ in 0..self.rng.range(1, 5) {
            let time = self.rng.range(1, until);
            self.at(time, Happening::Backup);
        }
        for _ in 0..self.rng.range(1, 4) {
            let time = self.rng.range(from, until);
            self.at(time, Happening::StartCopy);
        }
    }

    /// Copies an image with its sidecar, which may be in use.
    pub(super) fn backup(&mut self) {
        let host = self.rng.range(0, 3) as usize;
        let image = self.hosts[host].image.clone();
        self.backups.extend(image.filter(|image| image.whole));
    }

    /// The copy of an image: the newest state that a host has, or an older one.
    fn copied(&mut self) -> Option<Image> {
        if self.rng.one_in(2) {
            self.backup();
            return self.backups.pop();
        }
        let count = self.backups.len() as u64;
        (count > 0).then(|| self.backups[self.rng.range(0, count) as usize].clone())
    }

    /// An operator puts a copy in the place of a host's image and starts it.
    pub(super) fn start_copy(&mut self) {
        let host = self.rng.range(0, 3) as usize;
        let words = self.rng.range(0, 3);
        let (cut, swapped) = (self.rng.one_in(6), self.rng.one_in(6));
        // A VM runs on the image that is there, and has locked it. Nor does an operator stop a process that may have won
        // the VM already: whoever does that with the only copy of it loses it.
        let busy = match &self.hosts[host].process {
            Process::Primary(_) | Process::Starting => true,
            Process::Standby(s) => {
                matches!(s.driver.machine().status(), StandbyStatus::Settling | StandbyStatus::Arbitrating)
            }
            Process::Down => false,
        };
        if busy || self.healed || self.truth.ended {
            return;
        }
        let Some(image) = self.copied() else { return };
        if !matches!(self.hosts[host].process, Process::Down) {
            self.stop_process(host, true);
        }
        let word = if self.tells_files_apart { Word::Nobody } else { Word::Unseen };
        self.hosts[host].image = Some(Image { copied: true, word, begins: None, ..image });
        let until = self.now + 200_000;
        let at = &mut self.hosts[host];
        if cut {
            at.arbiter_cut_until = at.arbiter_cut_until.max(until);
        }
        if swapped {
            at.swapped_until = at.swapped_until.max(until);
        }
        let standing = self.standing(host);
        self.tell((host, 0), &format_args!("an operator starts a copy with words {words}: {standing:?}"));
        // No word makes the right arbiter of a wrong one: that there is no other host is an operator's to know, and
        // nothing here can know it.
        let one_vm_only = self.forks == 0;
        let accepted = |danger: &Danger| match danger {
            Danger::Replica { .. } | Danger::Moved(_) => words >= 1,
            Danger::Stale { .. } | Danger::Released { .. } => words == 2 && one_vm_only,
            _ => false,
        };
        match standing.filter(|standing| standing.dangers.iter().all(accepted)) {
            Some(standing) => {
                self.stats.copies_started += 1;
                self.stats.forks += u64::from(standing.dangers.iter().any(Danger::forks));
                self.start_image(host, &standing);
            }
            None => self.stats.copies_refused += 1,
        }
    }

    pub(super) fn look_for_rivals_later(&mut self, life: Life) {
        let delay = self.rng.range(LOOK_AFTER.start, LOOK_AFTER.end);
        self.after(delay, Happening::LookForRivals(life));
    }

    /// Asks the arbiter, as the program's thread does now and then.
    pub(super) fn look_for_rivals(&mut self, life: Life) {
        if matches!(self.hosts[life.0].process, Process::Primary(_)) {
            self.sees_rival(life);
            self.look_for_rivals_later(life);
        }
    }

    /// A look at the arbiter. Whether somebody else has won, which the process then hears.
    pub(super) fn sees_rival(&mut self, life: Life) -> bool {
        let Process::Primary(p) = &self.hosts[life.0].process else { return false };
        let history = self.truth.history(p.driver.machine().generation());
        let seen = rival(&history, &life).filter(|_| !self.cannot_reach_arbiter(life.0));
        let Some((generation, owner)) = seen else { return false };
        let delay = self.arbiter_delay();
        self.after(delay, Happening::Superseded { life, generation, owner });
        true
    }

    pub(super) fn superseded(&mut self, life: Life, generation: u64, owner: String) {
        self.stats.superseded += 1;
        self.primary(life, PrimaryEvent::Superseded { generation, owner });
    }

    /// Whether this host had no chance yet to learn that the VM was started elsewhere.
    pub(super) fn may_not_know(&self, host: usize) -> bool {
        let it = &self.hosts[host];
        let kept = [self.copy_won, self.arbiter_forgot_until, self.arbiter_slow_until, it.arbiter_cut_until];
        let kept = kept.into_iter().chain([it.swapped_until, it.frozen_until]).max().unwrap_or(0);
        self.now <= kept.saturating_add(AWARE_AFTER)
    }

    pub(super) fn lets_out(&mut self, node: Node, generation: u64, life: Life) {
        let may_not_know = self.may_not_know(life.0);
        self.truth.output(node, generation, life, may_not_know);
    }
}
