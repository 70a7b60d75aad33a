//! Base synchronisation: the disks and then all memory go to the standby while the guest runs, in shrinking
//! rounds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::Gfn;
use outlive_epoch::ProtocolVersion;
use outlive_machine::{LogMode, Outgoing, Ram};
use outlive_pair::{Link, LossReason, PrimaryEvent, Wanted};

use super::coordinator::{Coordinator, Protection};
use super::disks::{DiskBase, Next};
use super::pool::Pool;
use crate::disk::SyncReport;
use crate::events::{Event, EventWriter};
use crate::link::Job;
use crate::vm::limits::{DISK_BYTES, SLOTS};
use crate::vm::{Remedy, check_staging};

/// After this many rounds the rest is sent with the VM stopped, however much it is. Otherwise a guest that
/// writes faster than the link carries would never be protected.
const MAX_ROUNDS: u32 = 6;
/// How many more rounds there are if the disks took long at the end.
const MAX_LATE_ROUNDS: u32 = 2;
/// Time between two progress events.
const REPORT: Duration = Duration::from_millis(100);

/// One base synchronisation.
pub(crate) struct Base {
    round: u32,
    sent_pages: u64,
    total_pages: u64,
    /// The pages of all rounds so far.
    planned_pages: u64,
    events: EventWriter,
    reported: Instant,
    /// Pages that were taken from the tracker before their round, because a dirty ring was full.
    early: Vec<Gfn>,
    /// The disks, if there are any to synchronise.
    disks: Option<DiskBase>,
    /// The pages of the last round, kept while the disks catch up.
    spare: Vec<Gfn>,
    /// How many rounds were made since the disks were ready.
    late_rounds: u32,
}

impl Base {
    /// Begins, with the disks if there are any.
    pub(super) fn new(events: EventWriter, disks: Option<DiskBase>) -> Self {
        Self {
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

    /// Whether the disks are ready for the pause. If not, this orders them to get ready, and a report
    /// follows.
    pub(super) fn disks_are_ready(&mut self, gfns: Vec<Gfn>) -> bool {
        self.spare = gfns;
        self.disks.as_mut().is_none_or(DiskBase::is_ready)
    }

    /// The disks are ready. Returns a list for another round of memory if so many pages have become dirty
    /// meanwhile that the pause would be long.
    pub(super) fn late_round(&mut self, dirty: usize, staging_pages: usize) -> Option<Vec<Gfn>> {
        self.late_rounds += 1;
        let many = dirty + self.early.len() > staging_pages / 2;
        (many && self.late_rounds <= MAX_LATE_ROUNDS).then(|| std::mem::take(&mut self.spare))
    }

    /// The job for the current round.
    fn round(&self, gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        Job::BaseRound { round: self.round, gfns, ram: ram.clone() }
    }

    /// The list for pages that are taken while a round is still being sent. They belong to the next one.
    pub(crate) fn early(&mut self) -> &mut Vec<Gfn> {
        &mut self.early
    }

    /// Begins the next round with the pages that became dirty during the last.
    pub(crate) fn next_round(&mut self, mut gfns: Vec<Gfn>, ram: &Arc<Ram>) -> Job {
        gfns.append(&mut self.early);
        gfns.sort_unstable();
        gfns.dedup();
        self.round += 1;
        self.planned_pages += gfns.len() as u64;
        self.report();
        self.round(gfns, ram)
    }

    /// Whether the rest should be sent with the VM stopped: it fits half of a staging buffer, or there were
    /// enough rounds.
    pub(crate) fn is_last(&self, dirty: usize, staging_pages: usize) -> bool {
        // In bitmap mode `dirty` counts the device models' pages alone, so at least two rounds are made.
        self.round >= MAX_ROUNDS || self.round >= 2 && dirty + self.early.len() <= staging_pages / 2
    }

    /// Counts pages that were sent.
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

impl Coordinator {
    /// Begins protection: allocates everything that checkpoints need (invariant 5).
    pub(super) fn start_base(&mut self, link: Link, pool: Arc<Pool>, version: ProtocolVersion) {
        let prepared = self.prepare_base(link, &pool, version);
        let base = match prepared {
            Ok(base) => base,
            Err(why) => return self.base_failed(link, why),
        };
        let disks_first = base.disks.as_ref().is_some_and(DiskBase::comes_first);
        self.protection = Some(Protection { link, pool, base: Some(base) });
        if !disks_first {
            self.begin_memory(link);
        }
    }

    fn prepare_base(&mut self, link: Link, pool: &Pool, version: ProtocolVersion) -> Result<Base, String> {
        let with = &mut self.with;
        with.totals.base_begins();
        let pages = with.staging_pages.min(with.machine.ram().pages() as usize);
        let disk_bytes = if with.replicates_disks { DISK_BYTES } else { 0 };
        check_staging(pages, disk_bytes, SLOTS)?;
        let buffers = (0..SLOTS).map(|_| Outgoing::new(pages, disk_bytes).map_err(|e| e.with_remedy()));
        pool.open(buffers.collect::<Result<_, _>>()?);
        with.machine.next_is_base(version.state_versions());
        let disks = DiskBase::start(&with.machine, &with.driver, link, &with.events)?;
        Ok(Base::new(with.events.clone(), disks))
    }

    fn base_failed(&mut self, link: Link, why: String) {
        tracing::error!("protection cannot start: {why}");
        self.with.machine.write_log().set_mode(LogMode::Off);
        self.with.driver.handle(PrimaryEvent::LinkLost { link, why: LossReason::Local(why) });
    }

    /// The base synchronisation over this link.
    pub(super) fn base_of(&mut self, link: Link) -> Option<&mut Base> {
        let protection = self.protection.as_mut().filter(|protection| protection.link == link)?;
        protection.base.as_mut()
    }

    /// The standby has the disks, if there are any: memory follows.
    fn begin_memory(&mut self, link: Link) {
        if let Err(error) = self.with.machine.enable_tracking() {
            return self.base_failed(link, error.to_string());
        }
        // After tracking began, so a page that is touched later is dirty. The standby's memory is zero, like
        // every page that was never touched here.
        let ram = self.with.machine.ram().clone();
        let gfns: Vec<Gfn> = ram.touched().unwrap_or_else(|error| {
            tracing::warn!(%error, "sending untouched memory too");
            ram.gfns().collect()
        });
        if let Some(base) = self.base_of(link) {
            let job = base.begin_memory(gfns, &ram);
            self.with.driver.send(link, job);
        }
    }

    /// Takes a report of the disks' synchronisation.
    pub(super) fn disk_report(&mut self, link: Link, report: SyncReport) {
        let (dirty, pages) = (self.with.machine.tracker().pending(), self.with.staging_pages);
        let Some(base) = self.base_of(link) else { return };
        let Some(disks) = base.disks() else { return };
        match disks.report(report) {
            Next::Wait => {}
            Next::Memory => self.begin_memory(link),
            Next::Final => match base.late_round(dirty, pages) {
                Some(gfns) => self.next_round(link, gfns),
                None => self.capture_base(link),
            },
            Next::Fail(why) => self.base_failed(link, format!("cannot synchronise the disks: {why}")),
        }
    }

    /// A round was sent. Either the rest is small enough for the final stop, or another round follows.
    pub(super) fn base_round_done(&mut self, link: Link, mut gfns: Vec<Gfn>) {
        let (dirty, pages) = (self.with.machine.tracker().pending(), self.with.staging_pages);
        let Some(base) = self.base_of(link) else { return };
        if !base.is_last(dirty, pages) {
            return self.next_round(link, gfns);
        }
        gfns.clear();
        if base.disks_are_ready(gfns) {
            self.capture_base(link);
        }
    }

    /// The final stop of the base synchronisation.
    fn capture_base(&mut self, link: Link) {
        let ram = self.with.machine.ram().clone();
        if let Some(base) = self.base_of(link) {
            // Pages that were taken early have not been sent since, so the final checkpoint carries them.
            base.early().drain(..).for_each(|gfn| ram.log().mark(gfn));
        }
        let wanted = self.with.driver.wanted();
        if wanted == (Wanted::Base { link })
            && let Err(error) = self.capture(wanted)
        {
            self.capture_failed(&error);
        }
        if let Some(base) = self.protection.as_mut().and_then(|protection| protection.base.take()) {
            base.finish();
        }
    }

    fn next_round(&mut self, link: Link, mut gfns: Vec<Gfn>) {
        gfns.clear();
        if let Err(error) = self.with.machine.take_dirty(&mut gfns) {
            return self.capture_failed(&error);
        }
        let ram = self.with.machine.ram().clone();
        if let Some(base) = self.base_of(link) {
            let job = base.next_round(gfns, &ram);
            self.with.driver.send(link, job);
        }
    }
}
