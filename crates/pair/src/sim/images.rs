//! Disk images with their sidecars, and what is started from them when hosts come back: the decisions of
//! `outlive run`, by the production code.

use super::hosts::Process;
use super::truth::{LINE, Life, Node};
use super::world::{Happening, World};
use crate::planted::{Bug, Planted};
use crate::{ClaimResult, Differs, ImageArbiter, ImageEnd, ImageFacts, ImageRole, ImageStanding};

/// The identity of the VM's arbiter, and that of another one.
const ARBITER: &str = "the arbiter";
const ANOTHER: &str = "another arbiter";

/// The disk image of a host.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) generation: u64,
    /// A standby's copy, or the VM's own disk.
    pub(super) replica: bool,
    /// The processes that had the image: what they have won belongs to it.
    pub(super) processes: Vec<Life>,
    /// What the VM has done up to this state of its disk.
    pub(super) node: Node,
    pub(super) whole: bool,
    /// Given up in order: the VM went on without it.
    pub(super) released: bool,
    /// It is a new VM's, which no arbiter knows yet.
    pub(super) unknown: bool,
    /// It is another file than the one that its sidecar was written for.
    pub(super) copied: bool,
    pub(super) word: Word,
    /// The new VM that begins with it once the old one has been ended.
    pub(super) begins: Option<u64>,
}

/// Who answers for what is lost when the VM goes on with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// Nobody: nothing may be lost.
    Nobody,
    /// An operator, for the generation that this start is to win.
    Operator(u64),
    /// Nobody can tell: it was copied where file systems do not tell files apart.
    Unseen,
}

impl Image {
    pub(super) fn primary(generation: u64, life: Life, node: Node) -> Self {
        Self { replica: false, node, whole: true, ..Self::copy(generation, life) }
    }

    pub(super) fn copy(generation: u64, life: Life) -> Self {
        Self {
            generation,
            replica: true,
            processes: vec![life],
            node: 0,
            whole: false,
            released: false,
            unknown: false,
            copied: false,
            word: Word::Nobody,
            begins: None,
        }
    }

    /// Whether somebody answers for what is lost when this generation is won with it.
    pub(super) fn excuses(&self, generation: u64) -> bool {
        match self.word {
            Word::Nobody => false,
            Word::Operator(accepted) => accepted == generation,
            Word::Unseen => true,
        }
    }
}

impl World {
    /// Whether a host gets no answer from its VM's arbiter.
    pub(super) fn cannot_reach_arbiter(&self, host: usize) -> bool {
        let Self { now, arbiter_forgot_until, .. } = *self;
        self.hosts[host].arbiter_cut_until.max(self.hosts[host].swapped_until).max(arbiter_forgot_until) > now
    }

    /// How `outlive run` judges this host's image; `None` if there is none, or nobody answers.
    pub(super) fn standing(&self, host: usize) -> Option<ImageStanding> {
        let (now, at) = (self.now, &self.hosts[host]);
        let image = at.image.as_ref().filter(|image| image.whole)?;
        let forgot = self.arbiter_forgot_until > now;
        let history = match forgot {
            true => Vec::new(),
            false => self.truth.history(image.generation),
        };
        let facts = ImageFacts {
            generation: image.generation,
            role: if image.replica { ImageRole::Replica } else { ImageRole::Primary },
            end: image.released.then_some(ImageEnd::Released),
            arbiter: if image.unknown { ImageArbiter::None } else { ImageArbiter::Id(ARBITER) },
            processes: &image.processes,
            differs: (image.copied && self.tells_files_apart).then_some(&Differs::File),
            by_hand: false,
        };
        let given = if at.swapped_until > now { ANOTHER } else { ARBITER };
        let answers = at.arbiter_cut_until <= now;
        facts.judge_with(Some(given), || answers.then_some(history).ok_or(()), Planted(self.bug)).ok()
    }

    /// Its standing, if the VM may go on with this host's image and nobody has to be asked.
    fn may_start(&self, host: usize) -> Option<ImageStanding> {
        self.standing(host).filter(|standing| standing.dangers.is_empty())
    }

    /// A supervisor starts the process of this host again after a while. A host that had the VM comes back
    /// later: first its standby has a chance.
    pub(super) fn restart_later(&mut self, host: usize) {
        let had_it = self.had_it(host);
        let delay = match self.quick_restarts {
            true => self.rng.range(1_000, 200_000),
            false => self.rng.range(20_000, 300_000) + if had_it { 200_000 } else { 0 },
        };
        self.after(delay, Happening::Restart { host });
    }

    fn had_it(&self, host: usize) -> bool {
        self.hosts[host].image.as_ref().is_some_and(|image| !image.replica)
    }

    /// The host starts its image if the VM may go on with it, and is a standby otherwise.
    pub(super) fn restart(&mut self, host: usize) {
        if !matches!(self.hosts[host].process, Process::Down) || self.truth.ended {
            return;
        }
        match self.may_start(host) {
            // One fault must not even cost the VM what is in its memory: nobody starts it again.
            _ if !self.company => self.start_standby(host),
            _ if self.had_it(host) && self.cannot_reach_arbiter(host) => self.restart_later(host),
            Some(standing) if !self.cannot_reach_arbiter(host) => self.start_image(host, &standing),
            _ => self.start_standby(host),
        }
    }

    /// Starts an image whose dangers, if it has any, are accepted.
    pub(super) fn start_image(&mut self, host: usize, standing: &ImageStanding) {
        self.hosts[host].life += 1;
        let life = (host, self.hosts[host].life);
        self.hosts[host].look = None;
        self.hosts[host].process = Process::Starting;
        let accepted = !standing.dangers.is_empty();
        if standing.dangers.iter().any(crate::Danger::forks) {
            return self.fork(life, standing);
        }
        let generation = standing.next();
        if let Some(image) = &mut self.hosts[host].image {
            // Before it asks, the sidecar names the process that may win, beside those that had the image before:
            // their claims may be on their way.
            image.released &= image.generation == standing.generation;
            image.generation = standing.generation;
            image.replica = standing.role == ImageRole::Replica;
            if !standing.had_by_processes || self.bug == Some(Bug::EarlierClaimForgotten) {
                image.processes.clear();
            }
            image.processes.push(life);
            image.copied = false;
            if accepted && image.word != Word::Unseen {
                image.word = Word::Operator(generation);
            }
        }
        self.tell(life, &format_args!("starts from its image and asks for generation {generation}"));
        self.ask_arbiter(life, generation);
    }

    /// A new VM begins with the image: first the old one is ended where others could go on with it.
    fn fork(&mut self, life: Life, standing: &ImageStanding) {
        self.forks += 1;
        let (line, ending) = (self.forks * LINE, standing.ending());
        let ending = ending.filter(|_| self.bug != Some(Bug::ForkEndsNothing));
        self.tell(
            life,
            &format_args!("begins VM {line} with its image, and ends the old one with {ending:?}"),
        );
        if let Some(image) = &mut self.hosts[life.0].image {
            image.begins = Some(line);
            image.word = Word::Operator(ending.unwrap_or(line + 1));
        }
        match ending {
            Some(generation) => self.ask_arbiter(life, generation),
            None => self.begins(life, line),
        }
    }

    /// The image belongs to a new VM, which the arbiter does not know yet.
    fn begins(&mut self, life: Life, line: u64) {
        let Some(image) = &mut self.hosts[life.0].image else { return };
        let (node, word) = (image.node, Word::Operator(line + 1));
        *image = Image { unknown: true, word, ..Image::primary(line, life, node) };
        self.ask_arbiter(life, line + 1);
    }

    pub(super) fn image_answered(&mut self, life: Life, generation: u64, result: &ClaimResult) {
        let image = self.hosts[life.0].image.as_ref().map(|image| (image.node, image.begins));
        match (result, image) {
            (ClaimResult::Won, Some((_, Some(line)))) => self.begins(life, line),
            (ClaimResult::Won, Some((node, None))) => {
                self.stats.restarted += 1;
                self.truth.goes_on(generation, life);
                self.start_primary(life.0, generation, 0, node, false);
            }
            _ => {
                self.hosts[life.0].image.iter_mut().for_each(|image| image.begins = None);
                self.stop_process(life.0, true);
            }
        }
    }

    /// Nobody has the VM: the operator starts the image that may be started, if there is one.
    pub(super) fn operator(&mut self) {
        let holds = |process: &Process| match process {
            Process::Standby(s) => s.driver.machine().committed().is_some(),
            Process::Primary(_) | Process::Starting => true,
            Process::Down => false,
        };
        if self.truth.ended || !self.company || self.hosts.iter().any(|host| holds(&host.process)) {
            return;
        }
        for host in 0..self.hosts.len() {
            // A start that an operator has accepted, and that did not come to its end, is accepted once more.
            let accepted = |image: &Image| image.word != Word::Nobody;
            let again = self.hosts[host].image.as_ref().is_some_and(accepted);
            let standing = self.standing(host).filter(|standing| again || standing.dangers.is_empty());
            if let Some(standing) = standing {
                self.stop_process(host, true);
                return self.start_image(host, &standing);
            }
        }
    }

    /// A disk that is slow now makes its work longer than any patience.
    pub(super) fn slowness_of_disk(&mut self, host: usize) -> u64 {
        match self.hosts[host].slow_disk_until > self.now {
            true => self.rng.range(50_000, 600_000),
            false => 0,
        }
    }

    /// The clock of a host stands still together with the host, or jumps.
    pub(super) fn clock_fails(&mut self, host: usize, until: u64) {
        self.clock_failed = true;
        if self.rng.one_in(3) {
            self.hosts[host].offset += self.rng.range(10_000, 10_000_000);
            // Its sleepers wake up.
            self.look_within((host, self.hosts[host].life), 10);
        } else if !matches!(self.hosts[host].process, Process::Down) {
            self.freeze(host, until);
            let now = self.now;
            let host = &mut self.hosts[host];
            // No clock goes back: it loses only the time in which it did not stand still already.
            let lost = until.saturating_sub(now.max(host.clock_stands_until)) * host.rate / 1000;
            host.clock_stands_until = host.clock_stands_until.max(until);
            (host.offset, host.stale) = (host.offset.saturating_sub(lost), None);
        }
    }

    /// Something that takes long is under way, and explains why output is held for so long.
    pub(super) fn slow_for(&mut self, time: u64) {
        self.slow_total += time;
        self.slow_end = self.slow_end.max(self.now + time);
    }

    /// How much slowness has passed by now.
    pub(super) fn slowness(&self) -> u64 {
        self.slow_total - self.slow_end.saturating_sub(self.now).min(self.slow_total)
    }
}
