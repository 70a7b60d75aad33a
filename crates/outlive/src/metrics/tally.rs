//! What a process counts by its events: whatever is told in the event stream, and has a line in the log, is counted here
//! and nowhere else.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::histogram::{Buckets, Histogram, TIMES};
use crate::events::{Event, Part};

/// Counts events. Any thread may, and none waits.
#[derive(Debug)]
pub(crate) struct Tally {
    counts: Vec<AtomicU64>,
    takeovers: Takeovers<Histogram>,
}

/// The steps of takeovers, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Takeovers<T> {
    /// All of them together.
    pub(crate) total: T,
    /// From the last sign of life of the primary until it was given up.
    pub(crate) detect: T,
    /// Until memory and disks were at the last commit.
    pub(crate) settle: T,
    /// Until the generation was won.
    pub(crate) arbitrate: T,
    /// Until the vCPUs ran.
    pub(crate) restore: T,
    /// From giving the primary up until the VM's first frame.
    pub(crate) first_frame: T,
}

impl<T> Takeovers<T> {
    fn map<R>(&self, read: impl Fn(&T) -> R) -> Takeovers<R> {
        Takeovers {
            total: read(&self.total),
            detect: read(&self.detect),
            settle: read(&self.settle),
            arbitrate: read(&self.arbitrate),
            restore: read(&self.restore),
            first_frame: read(&self.first_frame),
        }
    }

    /// Its parts, apart from the total, with the names that they have in metrics.
    pub(crate) fn steps(&self) -> [(&'static str, &T); 5] {
        [
            ("detect", &self.detect),
            ("settle", &self.settle),
            ("arbitrate", &self.arbitrate),
            ("restore", &self.restore),
            ("first_frame", &self.first_frame),
        ]
    }
}

/// Defines the counters: a number for each kind of event.
macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $pattern:pat,)+) => {
        /// How often events of a kind have happened in this process.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub(crate) struct Counted {
            $($(#[$doc])* pub(crate) $name: u64,)+
        }

        #[allow(non_camel_case_types, reason = "they are the names of the fields")]
        enum Kind {
            $($name,)+
        }

        fn kind(event: &Event) -> Option<Kind> {
            match event {
                $($pattern => Some(Kind::$name),)+
                _ => None,
            }
        }

        impl Tally {
            const KINDS: usize = [$(Kind::$name as usize,)+].len();

            /// What was counted so far.
            pub(crate) fn read(&self) -> (Counted, Takeovers<Buckets>) {
                let at = |kind: Kind| self.counts[kind as usize].load(Ordering::Relaxed);
                (Counted { $($name: at(Kind::$name),)+ }, self.takeovers.map(Histogram::read))
            }
        }
    };
}

kinds! {
    /// The VM was taken over here.
    takeovers: Event::Takeover { .. },
    /// The other host was lost.
    link_losses: Event::LinkLost { .. },
    /// The arbiter was lost.
    arbiter_losses: Event::ArbiterLost { .. },
    /// The standby said that it has lost it.
    standby_arbiter_losses: Event::StandbyArbiterLost { .. },
    /// Who goes on was asked, and nobody answered.
    claims_unanswered: Event::ArbiterUnreachable { .. },
    /// The other host was heard to run this VM, or one of its name.
    runs_twice: Event::RunsTwice { .. },
    /// The guest restarted.
    guest_restarts: Event::GuestRestarted { .. },
    /// Its kernel panicked.
    guest_panics: Event::GuestPanicked,
    /// A self-check found a difference.
    self_check_differences: Event::SelfCheck { difference: Some(_), .. },
    /// The fence command failed.
    fence_failures: Event::FenceFailed { .. },
    /// A vCPU, or KVM, failed.
    vcpu_faults: Event::HostFault { part: Part::Vcpu, .. },
    /// A disk failed.
    disk_faults: Event::HostFault { part: Part::Disk, .. },
    /// The way to the clients was lost.
    network_faults: Event::HostFault { part: Part::Network, .. },
    /// The VM was left to its standby by an operator's word.
    hand_overs: Event::HandOver { kept: None },
    /// The standby was slow.
    standby_slow: Event::StandbySlow { .. },
    /// A base synchronisation came to no end.
    base_stalls: Event::BaseStalled { .. },
    /// A standby refused a primary.
    primaries_refused: Event::PrimaryRefused { .. },
    /// What a primary sent was refused.
    streams_refused: Event::StreamRefused { .. },
}

impl Default for Tally {
    fn default() -> Self {
        let none =
            Takeovers { total: (), detect: (), settle: (), arbitrate: (), restore: (), first_frame: () };
        Self {
            counts: (0..Self::KINDS).map(|_| AtomicU64::new(0)).collect(),
            takeovers: none.map(|()| Histogram::new(TIMES)),
        }
    }
}

impl Tally {
    /// Counts an event.
    pub(crate) fn count(&self, event: &Event) {
        if let Some(kind) = kind(event) {
            self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
        }
        let micros = |histogram: &Histogram, us: u64| histogram.record_time(Duration::from_micros(us));
        let to = &self.takeovers;
        match *event {
            Event::Takeover { detect_us, settle_us, arbitrate_us, restore_us, total_us, .. } => {
                micros(&to.total, total_us);
                micros(&to.detect, detect_us);
                micros(&to.settle, settle_us);
                micros(&to.arbitrate, arbitrate_us);
                micros(&to.restore, restore_us);
            }
            Event::FirstPacket { after_us } => micros(&to.first_frame, after_us),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::EventWriter;

    #[test]
    fn what_is_told_is_counted_whoever_reads() {
        let events = EventWriter::disabled();
        events.emit(Event::ArbiterLost { why: "gone".into() });
        events.emit(Event::GuestPanicked);
        events.emit(Event::GuestPanicked);
        events.emit(Event::SelfCheck { checkpoint: 1, difference: None });
        events.emit(Event::HostFault { part: Part::Disk, why: "x".into(), kept: None });
        events.emit(Event::HandOver { kept: Some("no".into()) });
        events.clone().emit(Event::Takeover {
            generation: 2,
            checkpoint: 9,
            detect_us: 1_000,
            settle_us: 2_000,
            arbitrate_us: 3_000,
            restore_us: 4_000,
            first_packet_us: None,
            total_us: 10_000,
            input_given: 0,
            output_repeated: 0,
        });
        events.emit(Event::FirstPacket { after_us: 7 });
        let (counted, takeovers) = events.tally().read();
        let expected = Counted {
            arbiter_losses: 1,
            guest_panics: 2,
            disk_faults: 1,
            takeovers: 1,
            ..Counted::default()
        };
        assert_eq!(counted, expected);
        assert_eq!((takeovers.total.count(), takeovers.total.sum), (1, 10_000_000));
        let sums = takeovers.steps().map(|(name, step)| (name, step.sum));
        let expected = [
            ("detect", 1_000_000),
            ("settle", 2_000_000),
            ("arbitrate", 3_000_000),
            ("restore", 4_000_000),
            ("first_frame", 7_000),
        ];
        assert_eq!(sums, expected);
    }
}
