//! From any state on: no more faults happen, and everything that is under way is done. Then the VM runs.

use crate::planted::Bug;

use super::steps::Act;
use super::world::{Process, World};

/// Steps of time after which nothing changes any more. A host that has left the VM to its standby lets that ahead for
/// ten of them.
const ROUNDS: usize = 18;

/// Steps between two steps of time: far more than there can be.
const SETTLED: usize = 200;

impl World {
    /// Why the VM does not run after everything was healed; `None` if it does, or nobody can run it.
    pub(super) fn after_healing(&self, bug: Option<Bug>) -> Option<String> {
        if self.ended || self.broken.is_some() {
            return None;
        }
        let mut world = self.clone();
        world.mend();
        for host in 0..world.hosts.len() {
            if world.hosts[host].paused {
                world.resume(host, bug);
            }
        }
        world.settle(bug);
        if let Some(verdict) = world.verdict() {
            return verdict;
        }
        if let Some(host) = (0..world.hosts.len()).find(|host| world.waits(*host)) {
            return Some(format!("host {host} has the VM and waits for ever"));
        }
        // Nobody alive has it. Every host that can come back does, and somebody starts the image that may be
        // started, if there is one.
        for host in 0..world.hosts.len() {
            if !world.hosts[host].gone && world.may_start(host, bug).is_some() {
                world.stop_process(host, true);
                world.start_image(host, bug);
                world.settle(bug);
            }
        }
        if let Some(verdict) = world.verdict() {
            return verdict;
        }
        let newest = world.newest().1;
        if world.hosts[newest.0].gone {
            // Whoever won the VM last is lost for good, and nobody can know what it has let out.
            return None;
        }
        let whole = |host: &&super::world::Host| {
            host.image.as_ref().is_some_and(|image| image.whole && image.history.starts_with(&world.tip))
        };
        let copies: Vec<_> = world.hosts.iter().filter(whole).map(|host| &host.image).collect();
        (!copies.is_empty()).then(|| format!("the VM runs nowhere; {newest:?} owns it; whole: {copies:?}"))
    }

    /// Whether it is known already how it ends well or badly.
    fn verdict(&self) -> Option<Option<String>> {
        if self.broken.is_some() {
            return Some(self.broken.clone());
        }
        (self.ended || (0..self.hosts.len()).any(|host| self.runs_at(host))).then_some(None)
    }

    /// Whether a host has the VM and neither runs it nor has given it up.
    fn waits(&self, host: usize) -> bool {
        match &self.hosts[host].process {
            Process::Standby(standby) => standby.machine.committed().is_some(),
            Process::Primary(_) => !self.runs_at(host),
            Process::Starting { .. } => true,
            Process::Down => false,
        }
    }

    /// Everything happens that is neither a fault nor an order, and time passes.
    fn settle(&mut self, bug: Option<Bug>) {
        let left = self.left;
        (self.left.faults, self.left.orders, self.left.outputs) = (0, 0, 0);
        (self.left.epochs, self.left.starts) = (0, 0);
        for _ in 0..ROUNDS {
            for _ in 0..SETTLED {
                let mut acts = Vec::new();
                self.acts(bug, &mut acts);
                let Some(act) = acts.into_iter().find(|act| !matches!(act, Act::Time | Act::Mend)) else {
                    break;
                };
                self.carry_out(&act, bug);
            }
            if self.broken.is_none() && !self.ended {
                self.carry_out(&Act::Time, bug);
            }
        }
        self.left = left;
    }
}
