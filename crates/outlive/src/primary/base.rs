//! Base synchronisation: the disks and then all memory go to the standby while the guest runs, in shrinking
//! rounds. [`converge`](super::converge) decides what follows a round; [`hold`](super::hold) holds a guest that
//! writes too much.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::{EnableError, Gfn};
use outlive_epoch::ProtocolVersion;
use outlive_machine::{LogMode, Outgoing, OutgoingError, Ram};
use outlive_pair::{Forgotten, Link, LossReason, Needs, PrimaryEvent, Wanted};

use super::brake::{Brake, Step};
use super::converge::{Converge, Hopeless, Then};
use super::coordinator::{Coordinator, Protection};
use super::disks::{DiskBase, DiskBaseError, Next};
use super::inbox::Accepted;
use super::known::Known;
use super::pool::Pool;
use crate::disk::SyncReport;
use crate::events::{Event, EventWriter};
use crate::link::{Job, SentRound};
use crate::vm::limits::{DISK_BYTES, SLOTS};
use crate::vm::{Remedied, StagingTooLarge, check_staging};

/// Time between two progress events.
const REPORT: Duration = Duration::from_millis(100);

/// Why protection cannot start.
#[derive(Debug, thiserror::Error)]
enum BaseError {
    /// The buffers would take too much memory.
    #[error(transparent)]
    Staging(#[from] StagingTooLarge),
    /// There is no memory for a buffer.
    #[error(transparent)]
    Buffer(#[from] Remedied<OutgoingError>),
    /// The synchronisation of the disks cannot begin.
    #[error(transparent)]
    Disks(#[from] DiskBaseError),
    /// It failed. The text is its report's.
    #[error("cannot synchronise the disks: {0}")]
    DisksFailed(String),
    /// The tracking of dirty pages cannot begin.
    #[error(transparent)]
    Tracking(#[from] EnableError),
    /// The standby relies on what is not known any more.
    #[error(transparent)]
    Forgotten(#[from] Forgotten),
}

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
    /// What the standby needs of memory.
    needs: Needs,
    /// The disks, if there are any to synchronise.
    disks: Option<DiskBase>,
    /// An empty list for the next round.
    spare: Vec<Gfn>,
    converge: Converge,
    /// When the guest was last found to have no dirty pages, on the driver's clock.
    clean_at: Duration,
    /// For how long the guest has run since then.
    ran: Duration,
    /// How many pages the guest wrote in a second in the last round, for a tracker that cannot count while the
    /// guest runs.
    wrote_per_s: f64,
    brake: Option<Brake>,
    /// No round would help: the next one begins at this time.
    rests_until: Option<Duration>,
}

impl Base {
    /// Begins, with the disks if there are any. The last stop may take `longest_pause`, and carry `most` pages.
    pub(super) fn new(
        events: EventWriter,
        disks: Option<DiskBase>,
        longest_pause: Duration,
        most: usize,
    ) -> Self {
        Self {
            round: 1,
            sent_pages: 0,
            total_pages: 0,
            planned_pages: 0,
            events,
            reported: Instant::now(),
            early: Vec::new(),
            needs: Needs::Everything,
            disks,
            spare: Vec::new(),
            converge: Converge::new(longest_pause, most),
            clean_at: Duration::ZERO,
            ran: Duration::ZERO,
            wrote_per_s: 0.0,
            brake: None,
            rests_until: None,
        }
    }

    /// The same for a standby that needs this, with pages that were taken from the tracker before.
    fn of(self, needs: Needs, early: Option<Vec<Gfn>>) -> Self {
        Self { needs, early: early.unwrap_or_default(), ..self }
    }

    /// The disks.
    pub(super) fn disks(&mut self) -> Option<&mut DiskBase> {
        self.disks.as_mut()
    }

    /// Begins with the first round of memory, which is all of it.
    pub(crate) fn begin_memory(&mut self, gfns: Vec<Gfn>, ram: &Arc<Ram>, now: Duration) -> Job {
        self.total_pages = gfns.len() as u64;
        self.planned_pages = self.total_pages;
        self.report();
        self.round(gfns, ram, now)
    }

    /// Whether the disks are ready for the pause. If not, this orders them to get ready, and a report
    /// follows.
    fn disks_are_ready(&mut self) -> bool {
        self.disks.as_mut().is_none_or(DiskBase::is_ready)
    }

    /// Whether the write log of the disks has begun, which has room for a moment only.
    fn disks_are_done(&self) -> bool {
        self.disks.as_ref().is_some_and(DiskBase::is_done)
    }

    /// The job for the current round. The guest has no dirty pages now.
    fn round(&mut self, gfns: Vec<Gfn>, ram: &Arc<Ram>, now: Duration) -> Job {
        self.converge.begin_round(gfns.len());
        self.clean(now);
        Job::BaseRound { round: self.round, gfns, ram: ram.clone() }
    }

    /// The guest has no dirty pages now, but may write as many as are right.
    fn clean(&mut self, now: Duration) {
        (self.clean_at, self.ran) = (now, Duration::ZERO);
        let longest = self.converge.longest_pause();
        self.brake = self.converge.allowed().map(|pages| Brake::new(pages, longest, now));
    }

    /// The list for pages that are taken while a round is still being sent. They belong to the next one.
    pub(crate) fn early(&mut self) -> &mut Vec<Gfn> {
        // Each page once: a guest that is left alone for minutes fills its ring again and again.
        self.early.sort_unstable();
        self.early.dedup();
        &mut self.early
    }

    /// Begins the next round with the pages that became dirty during the last.
    pub(crate) fn next_round(&mut self, mut gfns: Vec<Gfn>, ram: &Arc<Ram>, now: Duration) -> Job {
        gfns.append(&mut self.early);
        gfns.sort_unstable();
        gfns.dedup();
        self.round += 1;
        self.planned_pages += gfns.len() as u64;
        self.report();
        self.round(gfns, ram, now)
    }

    /// What the guest may do now, with so many dirty pages: `None` if the tracker cannot count them while the
    /// guest runs. `ran` is for how long it ran since this was last asked.
    pub(super) fn step(&mut self, now: Duration, ran: Duration, dirty: Option<usize>) -> Step {
        self.ran += ran;
        let dirty = dirty.unwrap_or((self.wrote_per_s * self.ran.as_secs_f64()) as usize);
        let step = self.brake.as_mut().map_or(Step::Run(None), |brake| brake.step(now, dirty));
        match (step, self.rests_until) {
            (Step::Run(None), Some(until)) => Step::Run(Some(until.saturating_sub(now))),
            _ => step,
        }
    }

    /// So many pages became dirty since there was none.
    fn wrote(&mut self, pages: usize) {
        self.wrote_per_s = pages as f64 / self.ran.as_secs_f64().max(1e-3);
    }

    /// Whether a rest is over.
    pub(super) fn rested(&mut self, now: Duration) -> bool {
        self.rests_until.take_if(|until| *until <= now).is_some()
    }

    /// Counts pages that were sent.
    pub(crate) fn sent(&mut self, pages: u64) {
        self.sent_pages += pages;
        if self.reported.elapsed() >= REPORT {
            self.report();
        }
    }

    /// The base is captured. Returns the number of rounds.
    pub(crate) fn finish(mut self) -> u32 {
        self.report();
        self.round
    }

    fn report(&mut self) {
        self.reported = Instant::now();
        let Self { round, sent_pages, total_pages, planned_pages, .. } = *self;
        self.events.emit(Event::BaseProgress { round, sent_pages, total_pages, planned_pages });
    }
}

impl Coordinator {
    /// Begins protection: allocates everything that checkpoints need (invariant 5).
    pub(super) fn start_base(&mut self, accepted: Accepted) {
        let Accepted { link, pool, version, needs, strays } = accepted;
        if needs == Needs::Rest && self.with.known.is_none() {
            return self.base_failed(link, &Forgotten.into());
        }
        // Before what is known is taken: tracking must not be left without an owner. Nobody would empty the dirty logs then,
        // and a full log holds the guest.
        let base = match self.prepare_base(link, &pool, version) {
            Ok(base) => base,
            Err(error) => return self.base_failed(link, &error),
        };
        let early = self.with.known.take_if(|_| needs == Needs::Rest).map(Known::into_pages);
        // What is known counts for this base or for none.
        self.forget_writes();
        let base = base.of(needs, early);
        let disks_first = base.disks.as_ref().is_some_and(DiskBase::comes_first);
        let strays = strays.and_then(|(standby, key)| self.guard_strays(&standby, key));
        self.protection = Some(Protection { link, pool, base: Some(base), strays });
        if !disks_first {
            self.begin_memory(link);
        }
    }

    fn prepare_base(&mut self, link: Link, pool: &Pool, version: ProtocolVersion) -> Result<Base, BaseError> {
        let with = &mut self.with;
        with.totals.base_begins();
        let pages = with.staging_pages.min(with.machine.ram().pages() as usize);
        let disk_bytes = if with.replicates_disks { DISK_BYTES } else { 0 };
        check_staging(pages, disk_bytes, SLOTS)?;
        let buffers = (0..SLOTS).map(|_| Outgoing::new(pages, disk_bytes).map_err(Remedied));
        pool.open(buffers.collect::<Result<_, _>>()?);
        with.machine.next_is_base(version.state_versions());
        let disks = DiskBase::start(&with.machine, &with.driver, link, &with.books, &with.events)?;
        // So far no page is worth leaving unprotected: a hot one would be in every round.
        with.machine.tracker().set_heating(false);
        // Half, so that the guest may write something more before it stands still.
        Ok(Base::new(with.events.clone(), disks, with.longest_pause, pages / 2))
    }

    fn base_failed(&mut self, link: Link, error: &BaseError) {
        let why = error.to_string();
        tracing::error!("protection cannot start: {why}");
        // What is known counts for this base alone.
        self.forget_writes();
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
        if self.base_of(link).is_some_and(|base| base.needs == Needs::Rest) {
            return self.begin_rest(link);
        }
        if let Err(error) = self.with.machine.enable_tracking() {
            return self.base_failed(link, &error.into());
        }
        // After tracking began, so a page that is touched later is dirty. The standby's memory is zero, like
        // every page that was never touched here.
        let ram = self.with.machine.ram().clone();
        let gfns: Vec<Gfn> = ram.touched().unwrap_or_else(|error| {
            tracing::warn!(%error, "sending untouched memory too");
            ram.gfns().collect()
        });
        let now = self.with.driver.clock().now();
        if let Some(base) = self.base_of(link) {
            let job = base.begin_memory(gfns, &ram, now);
            self.with.driver.send(link, job);
        }
    }

    /// The standby's memory is that from which the VM runs on here: it needs what was written since. Tracking has been
    /// on all the time, and stays on.
    fn begin_rest(&mut self, link: Link) {
        let Some(base) = self.base_of(link) else { return };
        let mut gfns = std::mem::take(&mut base.early);
        if let Err(error) = self.with.machine.take_dirty(&mut gfns) {
            return self.capture_failed(&error);
        }
        gfns.sort_unstable();
        gfns.dedup();
        tracing::info!(pages = gfns.len(), "the standby has the VM's memory: it gets what was written since");
        let ram = self.with.machine.ram().clone();
        let now = self.with.driver.clock().now();
        if let Some(base) = self.base_of(link) {
            let job = base.begin_memory(gfns, &ram, now);
            self.with.driver.send(link, job);
        }
    }

    /// Takes a report of the disks' synchronisation.
    pub(super) fn disk_report(&mut self, link: Link, report: SyncReport) {
        let Some(disks) = self.base_of(link).and_then(Base::disks) else { return };
        match disks.report(report) {
            Next::Wait => {}
            Next::Memory => self.begin_memory(link),
            Next::Final => self.after_round(link),
            Next::Fail(why) => self.base_failed(link, &BaseError::DisksFailed(why)),
        }
    }

    /// A round was sent.
    pub(super) fn base_round_done(&mut self, link: Link, sent: SentRound) {
        let Some(base) = self.base_of(link) else { return };
        base.converge.sent(sent.bytes, sent.took);
        base.spare = sent.gfns;
        base.spare.clear();
        self.after_round(link);
    }

    /// Nothing is being sent: the last stop, another round, or a rest follows.
    fn after_round(&mut self, link: Link) {
        let Some(rest) = self.rest(link) else { return };
        let now = self.with.driver.clock().now();
        let Some(base) = self.base_of(link) else { return };
        base.wrote(rest);
        match base.converge.next(rest) {
            Then::Stop if base.disks_are_ready() => self.last_stop(link),
            // A report of the disks follows.
            Then::Stop => {}
            Then::Round => self.next_round(link),
            // The log of disk writes is nearly full by then, and its writes would wait.
            Then::Rest(_) if base.disks_are_done() => self.next_round(link),
            Then::Rest(hopeless) => {
                base.rests_until = Some(now + hopeless.again);
                base.brake = None;
                self.say_hopeless(&hopeless);
            }
        }
    }

    /// How many pages wait to be sent again. `None` if that cannot be known; then the protection has failed.
    fn rest(&mut self, link: Link) -> Option<usize> {
        let counts = self.with.machine.tracker().estimate().logged.is_some();
        if !counts {
            let protection = self.protection.as_mut().filter(|protection| protection.link == link)?;
            // This tracker counts only what it has taken.
            if let Err(error) = self.with.machine.take_dirty(protection.base.as_mut()?.early()) {
                self.capture_failed(&error);
                return None;
            }
        }
        let pending = if counts { self.with.machine.tracker().pending() } else { 0 };
        Some(pending + self.base_of(link)?.early().len())
    }

    /// The final stop of the base synchronisation. It is counted once more while nothing can be written: the
    /// thread that counts may have waited for a core.
    fn last_stop(&mut self, link: Link) {
        self.hold();
        let Some(rest) = self.rest(link) else { return };
        let is_small = self.base_of(link).is_some_and(|base| base.converge.is_small(rest));
        if is_small {
            self.capture_base(link);
        } else {
            self.next_round(link);
        }
        self.let_go();
    }

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
        self.with.machine.tracker().set_heating(true);
        if let Some(base) = self.protection.as_mut().and_then(|protection| protection.base.take()) {
            self.with.totals.base_rounds(base.finish());
        }
    }

    fn next_round(&mut self, link: Link) {
        let Some(mut gfns) = self.base_of(link).map(|base| std::mem::take(&mut base.spare)) else { return };
        if let Err(error) = self.with.machine.take_dirty(&mut gfns) {
            return self.capture_failed(&error);
        }
        let ram = self.with.machine.ram().clone();
        let now = self.with.driver.clock().now();
        if let Some(base) = self.base_of(link) {
            let job = base.next_round(gfns, &ram, now);
            self.with.driver.send(link, job);
        }
    }

    /// The next attempt, if the guest was left alone for long enough.
    pub(super) fn try_base_again(&mut self) {
        let now = self.with.driver.clock().now();
        let Some(protection) = &mut self.protection else { return };
        if protection.base.as_mut().is_some_and(|base| base.rested(now)) {
            let link = protection.link;
            self.next_round(link);
        }
    }

    fn say_hopeless(&mut self, hopeless: &Hopeless) {
        let Hopeless { pages, stop, link_bytes_per_s, again } = *hopeless;
        let (stop_ms, max_ms) = (stop.as_millis() as u64, self.with.longest_pause.as_millis() as u64);
        let (mbit, again_s) = (link_bytes_per_s * 8 / 1_000_000, again.as_secs());
        let what = format!(
            "the VM cannot be protected yet: it writes faster than the link carries ({mbit} Mbit/s); {pages} \
             pages are left, for which it would have to stop for {stop_ms} ms, and --max-pause allows {max_ms} \
             ms. The next attempt is in {again_s} s: use a faster link, allow more, or let the guest write less"
        );
        tracing::warn!("{what}");
        self.with.standing.now(&what);
        self.with.events.emit(Event::BaseStalled {
            pages: pages as u64,
            link_bytes_per_s,
            stop_ms,
            max_pause_ms: max_ms,
            again_ms: again.as_millis() as u64,
        });
    }
}
