//! Base synchronisation: the disks, and then all memory, go to the standby while the guest runs, in rounds
//! that shrink.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::Gfn;
use outlive_machine::Ram;
use outlive_pair::Link;

use super::disks::DiskBase;
use crate::events::{Event, EventWriter};
use crate::link::Job;

/// After this many rounds the rest is sent with the VM stopped, however much it is: a guest that writes
/// faster than the link carries would never get there otherwise.
const MAX_ROUNDS: u32 = 6;
/// As many rounds more if the disks took long at the end.
const MAX_LATE_ROUNDS: u32 = 2;
/// Time between two progress events.
const REPORT: Duration = Duration::from_millis(100);

/// One base synchronisation.
pub(crate) struct Base {
    link: Link,
    round: u32,
    sent_pages: u64,
    total_pages: u64,
    /// Of all rounds so far.
    planned_pages: u64,
    events: EventWriter,
    reported: Instant,
    /// Taken from the tracker before their round, because a dirty ring was full.
    early: Vec<Gfn>,
    /// The disks, if there are any to synchronise.
    disks: Option<DiskBase>,
    /// Kept while the disks catch up.
    spare: Vec<Gfn>,
    /// Rounds made since the disks were ready.
    late_rounds: u32,
}

impl Base {
    /// Begins, with the disks if there are any.
    pub(super) fn new(link: Link, events: EventWriter, disks: Option<DiskBase>) -> Self {
        Self {
            link,
            round: 1,
            sent_pages: 0,
            total_pages: 0,
            planned_pages: 0,
            events,
            reported: Instant::now(),
            early: Vec::new(),
            disks,
            spare: Vec::new(),
            late_rounds: 0,
        }
    }

    /// The link that it goes over.
    pub(crate) fn link(&self) -> Link {
        self.link
    }

    /// The disks.
    pub(super) fn disks(&mut self) -> Option<&mut DiskBase> {
        self.disks.as_mut()
    }

    /// Begins with the first round of memory, which is all of it.
    pub(crate) fn begin_memory(&mut self, gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        self.total_pages = gfns.len() as u64;
        self.planned_pages = self.total_pages;
        self.report();
        self.round(gfns, ram)
    }

    /// Whether the disks are ready for the pause; if not, they have been told to get ready and a report
    /// follows.
    pub(super) fn disks_are_ready(&mut self, gfns: Vec<Gfn>) -> bool {
        self.spare = gfns;
        self.disks.as_mut().is_none_or(DiskBase::is_ready)
    }

    /// The disks are ready, which took its time. Returns a list for another round of memory if so much has
    /// become dirty meanwhile that the pause would be long.
    pub(super) fn late_round(&mut self, dirty: usize, staging_pages: usize) -> Option<Vec<Gfn>> {
        self.late_rounds += 1;
        let many = dirty + self.early.len() > staging_pages / 2;
        (many && self.late_rounds <= MAX_LATE_ROUNDS).then(|| std::mem::take(&mut self.spare))
    }

    /// The job for the current round.
    fn round(&self, gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        Job::BaseRound { round: self.round, gfns, ram: ram.clone() }
    }

    /// Where pages go that are taken while a round is still being sent. They belong to the next one.
    pub(crate) fn early(&mut self) -> &mut Vec<Gfn> {
        &mut self.early
    }

    /// Goes on to the next round with the pages that became dirty during the last.
    pub(crate) fn next_round(&mut self, mut gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        gfns.append(&mut self.early);
        gfns.sort_unstable();
        gfns.dedup();
        self.round += 1;
        self.planned_pages += gfns.len() as u64;
        self.report();
        self.round(gfns, ram)
    }

    /// Whether the rest is to be sent with the VM stopped: it fits half of a staging buffer, or there were
    /// rounds enough.
    pub(crate) fn is_last(&self, dirty: usize, staging_pages: usize) -> bool {
        // In bitmap mode `dirty` counts the device models' pages alone, so at least two rounds are made.
        self.round >= MAX_ROUNDS || self.round >= 2 && dirty + self.early.len() <= staging_pages / 2
    }

    /// So many pages more are sent.
    pub(crate) fn sent(&mut self, pages: u64) {
        self.sent_pages += pages;
        if self.reported.elapsed() >= REPORT {
            self.report();
        }
    }

    /// The base is captured.
    pub(crate) fn finish(mut self) {
        self.report();
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        let Self { round, sent_pages, total_pages, planned_pages, .. } = *self;
        self.events.emit(Event::BaseProgress { round, sent_pages, total_pages, planned_pages });
    }
}
