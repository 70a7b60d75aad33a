//! The last minutes of each VM in figures: what a time line draws.
//!
//! A VM's process tells what it has counted since it began (`NAME.sock.metrics`, the socket of `outlive metrics`). Its keeper
//! hears that once a second, and what was counted since the last time is a [`Point`]. `meter`: makes them. `heat`: where the
//! guest writes, as its process says at the socket of `outlive status`. [`Store`]: keeps the last of all, for whoever asks.

mod heat;
mod meter;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

pub use heat::heat_in;
pub(crate) use heat::{Heat, taken_out};
pub(crate) use meter::Meter;
pub use meter::point_between;

/// How many points of a VM are kept: five minutes.
pub(crate) const KEPT: usize = 300;
/// The most of all VMs together. An answer with all of them is a few megabytes; where there are more than a hundred VMs, each
/// has fewer.
const ALL: usize = 30_000;

/// What a VM's process has counted in about a second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// When it ended: RFC 3339, UTC.
    pub(crate) time: String,
    /// How long it was.
    pub(crate) span_ms: u64,
    /// What the process is to the VM.
    pub(crate) role: Role,
    /// A standby has all of the VM.
    pub(crate) protected: bool,
    /// The VM runs there, and its output may leave.
    pub(crate) active: bool,
    /// Checkpoints committed.
    pub(crate) checkpoints: u64,
    /// For how long a checkpoint stopped the vCPUs.
    pub(crate) pause_us: Option<Spread>,
    /// From the end of the pause to the commit.
    pub(crate) commit_us: Option<Spread>,
    /// Pages that a checkpoint had.
    pub(crate) dirty_pages: Option<Spread>,
    /// What the guest had sent and waited for a commit, when it came.
    pub(crate) held_bytes: Option<Spread>,
    /// How long a standby took to apply a checkpoint.
    pub(crate) apply_us: Option<Spread>,
    /// Sent to the standby.
    pub(crate) sent_bytes: u64,
    /// For how long the guest was held because it wrote faster than the link carries.
    pub(crate) guest_held_ms: u64,
    /// What has happened.
    pub(crate) marks: Vec<Mark>,
}

/// Values of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spread {
    /// The mean.
    pub(crate) mean: u64,
    /// None was larger. `null`: one was larger than the process's largest bound.
    pub(crate) most: Option<u64>,
}

/// What a process is to its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Primary,
    Standby,
}

/// Something that happened once or more often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mark {
    /// The VM was taken over here.
    Takeover,
    /// It was left to its standby by an operator's word.
    HandOver,
    /// The protection has ended.
    ProtectionLost,
    /// The other host was lost.
    LinkLost,
    /// The arbiter was lost.
    ArbiterLost,
    /// The guest restarted.
    GuestRestart,
    /// Its kernel panicked.
    GuestPanic,
    /// KVM, a disk or the way to the clients has failed.
    HostFault,
}

/// The last points of all VMs.
#[derive(Debug)]
pub(crate) struct Store {
    /// The life of the node. A later one counts anew.
    life: String,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    newest: u64,
    vms: BTreeMap<String, VecDeque<(u64, Arc<Point>)>>,
    heat: BTreeMap<String, Arc<Heat>>,
}

/// Points after a place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Where to go on.
    pub(crate) next: String,
    /// These are all that are kept, and not only those after the place.
    pub(crate) reset: bool,
    /// The points of each VM that has some, oldest first.
    pub(crate) vms: BTreeMap<String, Vec<Point>>,
    /// Where each VM's memory is written now, if its process says it: a protected primary's does.
    #[serde(default)]
    pub(crate) heat: BTreeMap<String, Heat>,
}

impl Store {
    pub(crate) fn new(life: &str) -> Self {
        Self { life: life.to_owned(), kept: Mutex::default() }
    }

    /// Keeps a point of a VM.
    pub(crate) fn keep(&self, vm: &str, point: Point) {
        let mut kept = self.kept();
        kept.newest += 1;
        let number = kept.newest;
        let most = KEPT.min(ALL / (kept.vms.len() + 1));
        let points = kept.vms.entry(vm.to_owned()).or_default();
        points.push_back((number, Arc::new(point)));
        while points.len() > most {
            points.pop_front();
        }
    }

    /// Where a VM's memory is written now.
    pub(crate) fn keep_heat(&self, vm: &str, heat: Option<&Arc<Heat>>) {
        let mut kept = self.kept();
        match heat {
            None => drop(kept.heat.remove(vm)),
            Some(heat) => match kept.heat.get_mut(vm) {
                Some(it) => it.clone_from(heat),
                None => drop(kept.heat.insert(vm.to_owned(), heat.clone())),
            },
        }
    }

    /// Forgets a VM.
    pub(crate) fn forget(&self, vm: &str) {
        let mut kept = self.kept();
        kept.vms.remove(vm);
        kept.heat.remove(vm);
    }

    /// The points after a place; all that are kept if there is none, or if it is of another node's life.
    pub(crate) fn after(&self, place: Option<&str>) -> Figures {
        let number = place.and_then(|it| it.strip_prefix(&*self.life)?.strip_prefix('-')?.parse().ok());
        let kept = self.kept();
        let number = number.filter(|it| *it <= kept.newest);
        let after = |points: &VecDeque<(u64, Arc<Point>)>| -> Vec<_> {
            let from = points.partition_point(|(it, _)| Some(*it) <= number);
            points.range(from..).map(|(_, point)| point.clone()).collect()
        };
        let next = format!("{}-{}", self.life, kept.newest);
        let vms: Vec<_> = kept.vms.iter().map(|(vm, points)| (vm.clone(), after(points))).collect();
        let heat = kept.heat.clone();
        // Nobody who keeps a point waits for whoever asks.
        drop(kept);
        let own = |points: Vec<Arc<Point>>| points.iter().map(|it| Point::clone(it)).collect();
        let vms = vms.into_iter().filter(|(_, points)| !points.is_empty());
        Figures {
            next,
            reset: number.is_none(),
            vms: vms.map(|(vm, points)| (vm, own(points))).collect(),
            heat: heat.into_iter().map(|(vm, heat)| (vm, Heat::clone(&heat))).collect(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
