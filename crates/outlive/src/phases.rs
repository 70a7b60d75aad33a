//! The phases of a checkpoint, and how long they took.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::events::pairs;

/// A part of a checkpoint's way, or a span that covers several of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// From the order to stop to the order to continue, as the coordinator sees it.
    Pause,
    /// From the last exit of a vCPU to its next entry, for the vCPU that was away longest.
    VcpuPause,
    /// Until all vCPUs have left the guest.
    Stop,
    /// Saving vCPUs, VM and devices.
    State,
    /// Taking the dirty pages.
    Harvest,
    /// From the end of the last vCPU's part until the coordinator continues.
    Handover,
    /// Re-arming the traps.
    Rearm,
    /// The state machine's decision, and the order to the valve.
    Decide,
    /// Copying the pages.
    Copy,
    /// From the end of the copy until the last vCPU re-enters the guest.
    Resume,
    /// From the end of the pause until the sender's thread begins.
    Queue,
    /// Putting the checkpoint together for the link.
    Encode,
    /// Writing it to the link.
    Send,
    /// From the last write until the acknowledgement is read.
    Acknowledge,
    /// Letting the output out.
    Release,
}

impl Phase {
    /// All of them, in their order.
    pub(crate) const ALL: [Self; 15] = [
        Self::Pause,
        Self::VcpuPause,
        Self::Stop,
        Self::State,
        Self::Harvest,
        Self::Handover,
        Self::Rearm,
        Self::Decide,
        Self::Copy,
        Self::Resume,
        Self::Queue,
        Self::Encode,
        Self::Send,
        Self::Acknowledge,
        Self::Release,
    ];

    /// Its name in the event stream and in the demo's JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::VcpuPause => "vcpu_pause",
            Self::Stop => "stop",
            Self::State => "state",
            Self::Harvest => "harvest",
            Self::Handover => "handover",
            Self::Rearm => "rearm",
            Self::Decide => "decide",
            Self::Copy => "copy",
            Self::Resume => "resume",
            Self::Queue => "queue",
            Self::Encode => "encode",
            Self::Send => "send",
            Self::Acknowledge => "acknowledge",
            Self::Release => "release",
        }
    }
}

/// The longest time that is recorded as it is, in nanoseconds: 17 s.
const LONGEST_NS: u64 = 1 << 34;

/// A histogram of nanoseconds within 1 %. It never grows, so recording allocates nothing.
pub(crate) fn histogram_ns() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, 2).expect("constant bounds are valid")
}

/// What was recorded since the last report. Recording takes a lock that nobody holds for more than a few
/// instructions; no thread records in a pause.
#[derive(Debug)]
pub(crate) struct Recorded(Mutex<Histogram<u64>>);

impl Recorded {
    pub(crate) fn new(histogram: Histogram<u64>) -> Self {
        Self(Mutex::new(histogram))
    }

    pub(crate) fn record(&self, value: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(value);
    }

    /// Takes what was recorded, as [`pairs`]. `spare` is empty, of the same bounds, and empty again
    /// afterwards.
    pub(crate) fn take(&self, spare: &mut Histogram<u64>) -> Vec<(u64, u64)> {
        std::mem::swap(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), spare);
        let taken = pairs(spare);
        spare.reset();
        taken
    }
}

/// How long each phase took.
#[derive(Debug)]
pub(crate) struct Phases(Vec<Recorded>);

impl Phases {
    pub(crate) fn new() -> Self {
        Self(Phase::ALL.iter().map(|_| Recorded::new(histogram_ns())).collect())
    }

    pub(crate) fn record(&self, phase: Phase, took: Duration) {
        self.0[phase as usize].record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Takes what was recorded of each phase that has something.
    pub(crate) fn take(&self, spare: &mut Histogram<u64>) -> Vec<(Phase, Vec<(u64, u64)>)> {
        let taken = Phase::ALL.into_iter().map(|phase| (phase, self.0[phase as usize].take(spare)));
        taken.filter(|(_, pairs)| !pairs.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_a_place_and_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = Phase::ALL.iter().map(|phase| phase.name()).collect();
        assert_eq!(names.len(), Phase::ALL.len());
        for (position, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, position);
        }
    }

    #[test]
    fn what_is_taken_is_told_once() {
        let (phases, mut spare) = (Phases::new(), histogram_ns());
        phases.record(Phase::Copy, Duration::from_nanos(100));
        phases.record(Phase::Copy, Duration::from_nanos(100));
        phases.record(Phase::Send, Duration::from_secs(99));
        let taken = phases.take(&mut spare);
        assert_eq!(taken[0], (Phase::Copy, vec![(100, 2)]));
        assert_eq!((taken[1].0, taken[1].1[0].1, taken.len()), (Phase::Send, 1, 2));
        assert!(taken[1].1[0].0 >= LONGEST_NS, "more than can be told apart is not lost");
        phases.record(Phase::Copy, Duration::from_nanos(7));
        assert_eq!(phases.take(&mut spare), [(Phase::Copy, vec![(7, 1)])]);
        assert!(phases.take(&mut spare).is_empty());
    }
}
