//! Disk images with their sidecars, and what is started from them when hosts come back: the rules of
//! `outlive run`.

use super::hosts::Process;
use super::truth::{Life, Node};
use super::world::{Happening, World};
use crate::ClaimResult;
use crate::planted::Bug;

/// The disk image of a host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Image {
    pub(super) generation: u64,
    /// A standby's copy, or the VM's own disk.
    pub(super) replica: bool,
    /// The process that wrote the sidecar, and the first of those that had the image before: what they have won
    /// belongs to this image.
    pub(super) process: u32,
    pub(super) since: u32,
    /// What the VM has done up to this state of its disk.
    pub(super) node: Node,
    pub(super) whole: bool,
    /// Given up in order: the VM went on without it.
    pub(super) released: bool,
}

impl Image {
    pub(super) fn primary(generation: u64, process: u32, node: Node) -> Self {
        Self { generation, replica: false, process, since: process, node, whole: true, released: false }
    }

    pub(super) fn copy(generation: u64, process: u32) -> Self {
        Self { generation, replica: true, process, since: process, node: 0, whole: false, released: false }
    }
}

impl World {
    /// Whether a host gets no answer from its VM's arbiter.
    pub(super) fn cannot_reach_arbiter(&self, host: usize) -> bool {
        let Self { now, arbiter_forgot_until, .. } = *self;
        self.hosts[host].arbiter_cut_until.max(self.hosts[host].swapped_until).max(arbiter_forgot_until) > now
    }

    /// The generation in which `outlive run` would start this host's image, by its sidecar and the arbiter
    /// alone.
    fn may_start(&self, host: usize) -> Option<u64> {
        let image = self.hosts[host].image.filter(|image| image.whole)?;
        let newest = self.truth.newest().0;
        let own = (image.since..=image.process).filter_map(|life| self.truth.newest_of((host, life))).max();
        let won = own.filter(|own| *own > image.generation);
        let stale = won.unwrap_or(image.generation) < newest && self.bug != Some(Bug::StaleImageStarts);
        let copy = won.is_none() && (image.replica || image.released);
        (!stale && !copy).then_some(newest + 1)
    }

    /// A supervisor starts the process of this host again after a while. A host that had the VM comes back
    /// later: first its standby has a chance.
    pub(super) fn restart_later(&mut self, host: usize) {
        let had_it = self.hosts[host].image.is_some_and(|image| !image.replica);
        let delay = match self.quick_restarts {
            true => self.rng.range(1_000, 200_000),
            false => self.rng.range(20_000, 300_000) + if had_it { 200_000 } else { 0 },
        };
        self.after(delay, Happening::Restart { host });
    }

    /// The host starts its image if the VM may go on with it, and is a standby otherwise.
    pub(super) fn restart(&mut self, host: usize) {
        if !matches!(self.hosts[host].process, Process::Down) || self.truth.ended {
            return;
        }
        let had_it = self.hosts[host].image.is_some_and(|image| !image.replica);
        match self.may_start(host) {
            // One fault must not even cost the VM what is in its memory: nobody starts it again.
            _ if !self.company => self.start_standby(host),
            _ if had_it && self.cannot_reach_arbiter(host) => self.restart_later(host),
            Some(generation) if !self.cannot_reach_arbiter(host) => self.start_image(host, generation),
            _ => self.start_standby(host),
        }
    }

    fn start_image(&mut self, host: usize, generation: u64) {
        self.hosts[host].life += 1;
        let life = (host, self.hosts[host].life);
        if let Some(image) = &mut self.hosts[host].image {
            // Before it asks, the sidecar names the process that may win, beside those that had the image before:
            // their claims may be on their way.
            if image.generation + 1 < generation {
                (image.generation, image.replica, image.released) = (generation - 1, false, false);
            }
            image.process = life.1;
            if self.bug == Some(Bug::EarlierClaimForgotten) {
                image.since = life.1;
            }
        }
        self.hosts[host].look = None;
        self.hosts[host].process = Process::Starting;
        self.tell(life, &format_args!("starts from its image and asks for generation {generation}"));
        self.ask_arbiter(life, generation);
    }

    pub(super) fn image_answered(&mut self, life: Life, generation: u64, result: &ClaimResult) {
        match (result, self.hosts[life.0].image) {
            (ClaimResult::Won, Some(image)) => {
                self.stats.restarted += 1;
                self.truth.goes_on(generation, life);
                self.start_primary(life.0, generation, 0, image.node);
            }
            _ => self.stop_process(life.0, true),
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
            if let Some(generation) = self.may_start(host) {
                self.stop_process(host, true);
                return self.start_image(host, generation);
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
            let Self { now, .. } = *self;
            let lost = (until - now) * self.hosts[host].rate / 1000;
            (self.hosts[host].offset, self.hosts[host].stale) =
                (self.hosts[host].offset.saturating_sub(lost), None);
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
