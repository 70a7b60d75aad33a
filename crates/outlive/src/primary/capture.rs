//! When an epoch ends, and the pause in which its checkpoint is taken.

use std::time::{Duration, Instant};

use outlive_machine::{After as Then, CaptureError, CaptureReport, InPause, Outgoing, SpillError, VcpuError};
use outlive_pair::policy::{
    DirtyLogFull, DirtyTrigger, DiskLogFull, Facts, Interval, Latency, Longest, Next, Output, Pause, Policy,
    Rule,
};
use outlive_pair::{After, Link, LossReason, PrimaryEvent, PrimaryStatus, Ticket, Wanted};

use super::coordinator::{Coordinator, Protection};
use super::driver::SharedDriver;
use super::pool::Pool;
use super::ports::Commit;
use crate::cli::Ending;
use crate::events::Event;
use crate::link::CheckpointPart;

/// How long the VM waits for a buffer at a time, in the pause of a checkpoint that is larger than one buffer.
const BUFFER_PATIENCE: Duration = Duration::from_millis(20);

/// How long hashing one GiB of memory may take.
const HASH_GIB: Duration = Duration::from_secs(10);
const PAGES_OF_GIB: f64 = (1 << 18) as f64;

/// How long an epoch may be in which nothing changes, if its policy skips what says nothing new.
const UNCHANGED: Duration = Duration::from_millis(100);

/// What ends epochs, with logs that are full and with so many dirty pages as a matter of course.
pub(super) fn policy(ending: Ending, max_dirty: usize) -> Policy {
    let mut rules: Vec<Box<dyn Rule>> =
        vec![Box::new(DirtyLogFull), Box::new(DiskLogFull), Box::new(DirtyTrigger::new(max_dirty as u64))];
    match ending {
        Ending::Interval(length) => rules.push(Box::new(Interval::new(length))),
        Ending::Output { longest } => {
            rules.push(Box::new(Output::new(Output::COALESCE)));
            rules.push(Box::new(Longest::new(longest)));
        }
        Ending::Latency { target, longest } => {
            rules.push(Box::new(Latency::new(target)));
            rules.push(Box::new(Longest::new(longest)));
        }
        Ending::Adaptive { longest } => {
            rules.push(Box::new(Output::new(Output::COALESCE)));
            rules.push(Box::new(Longest::unless_unchanged(longest, UNCHANGED)));
        }
    }
    Policy::new(rules)
}

/// Logs that have no room left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FullLogs {
    /// A dirty ring: KVM holds its vCPU.
    pub(super) dirty: bool,
    /// The log of disk writes.
    pub(super) disk: bool,
}

/// When the next checkpoint is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    /// Not before this time; ask again then.
    At(Duration),
    Nothing,
}

impl Coordinator {
    /// When the wanted checkpoint is due.
    pub(super) fn due(&self, wanted: Wanted) -> Due {
        let has_buffer = || self.protection.as_ref().is_some_and(|protection| protection.pool.has_free());
        match wanted {
            Wanted::Epoch if has_buffer() => match self.with.policy.next(&self.facts()) {
                Next::Now(_) => Due::Now,
                Next::At(time) => Due::At(time),
                Next::Nothing => Due::Nothing,
            },
            Wanted::Last(_) | Wanted::HandOver if has_buffer() => Due::Now,
            // The base is due when its last round is sent: see `base.rs`.
            Wanted::Epoch | Wanted::Last(_) | Wanted::HandOver | Wanted::Base { .. } | Wanted::Nothing => {
                Due::Nothing
            }
        }
    }

    fn facts(&self) -> Facts {
        let machine = &self.with.machine;
        let pages = machine.tracker().estimate();
        Facts {
            now: self.with.driver.clock().now(),
            dirty_pages: machine.tracker().pending() as u64,
            // Hot pages may have changed; where nobody counts, any may have.
            changed: pages.logged != Some(0)
                || pages.marked + pages.hot > 0
                || machine.write_log().fill().0 > 0,
            // A guest that is held can use no more run time either.
            dirty_log_full: self.full.dirty || self.held.is_some(),
            disk_log_full: self.full.disk,
            held_since: self.with.driver.held_since(),
            acknowledged_in: self.acknowledged_in,
        }
    }

    /// Tells the policy how long commits take.
    pub(super) fn note_commit(&mut self, committed: Option<Commit>) {
        let Some(Commit { number, at }) = committed else { return };
        while let Some((_, captured)) = self.on_their_way.pop_front_if(|(shipped, _)| *shipped <= number) {
            self.acknowledged_in = Some(at.saturating_sub(captured));
        }
    }

    pub(super) fn capture_if_due(&mut self) -> Result<(), CaptureError> {
        let wanted = self.with.driver.wanted();
        if self.due(wanted) == Due::Now { self.capture(wanted) } else { Ok(()) }
    }

    /// Takes the wanted checkpoint, and hands it to the sender.
    pub(super) fn capture(&mut self, wanted: Wanted) -> Result<(), CaptureError> {
        let Some(Protection { link, pool, .. }) = &self.protection else { return Ok(()) };
        let last = matches!(wanted, Wanted::Last(_) | Wanted::HandOver) || !self.with.driver.guest_may_run();
        let base = matches!(wanted, Wanted::Base { .. });
        let (of, pool) = (Of { link: *link, base, stays: last }, pool.clone());
        let Some(mut staging) = pool.take() else { return Ok(()) };
        self.captures += 1;
        if let Some(disks) = self.with.self_check.before(self.captures) {
            // All memory is hashed in the pause.
            let within = HASH_GIB.mul_f64(self.with.machine.ram().pages() as f64 / PAGES_OF_GIB);
            self.with.driver.handle(PrimaryEvent::LongWork { within });
            self.with.machine.check_next(disks);
        }
        let then = if last { Then::Stay } else { Then::Resume };
        let protected = self.with.driver.status() == PrimaryStatus::Protected;
        self.with.machine.set_stop_budget(protected.then_some(self.with.stop_budget));
        let driver = self.with.driver.clone();
        let mut inside = InsidePause::new(&driver, &pool, of);
        let result = self.pause(&mut staging, then, &mut inside);
        let decided = inside.decided;
        self.with.self_check.after();
        let report = match result {
            Ok(report) => report,
            Err(error) => {
                self.with.driver.follow(decided.after);
                return Err(error);
            }
        };
        if then == Then::Stay {
            // Devices rest, so nothing was written since the pages were taken; see `vm/kept.rs`.
            self.with.machine.ram().log().watch();
        }
        self.full = FullLogs::default();
        // Not this thread's time: the guest runs on without waiting for it.
        let ended = self.with.driver.clock().now().saturating_sub(report.ended.elapsed());
        let began = ended.saturating_sub(report.pause);
        self.with.policy.ended(&Pause { began, ended, pages: report.pages as u64 });
        self.last_epoch.ended(began, ended, report.pages);
        if then == Then::Resume {
            self.let_go();
        }
        match decided.ticket {
            Some(ticket) => {
                if ticket.flags.hand_over {
                    self.with.events.emit(Event::StandsStill { checkpoint: ticket.number });
                }
                let totals = (decided.sent_parts == 0).then_some((report.pages, staging.state().len()));
                self.with.driver.ship(Box::new(CheckpointPart { ticket, totals, last: true, staging }));
                self.on_their_way.push_back((ticket.number, ended));
            }
            // Nobody waits for it.
            None => drop(pool.put(staging)),
        }
        self.with.driver.follow(decided.after);
        self.with.totals.captured(&report);
        Ok(())
    }

    /// The pause itself. Between stopping and resuming the vCPUs nothing is allocated, and no lock is waited
    /// for that another thread holds over a system call (invariant 5). A vCPU's thread does most of it, while
    /// this one waits.
    pub(super) fn pause(
        &mut self,
        staging: &mut Outgoing,
        then: Then,
        inside: &mut dyn InPause,
    ) -> Result<CaptureReport, CaptureError> {
        self.with.machine.checkpoint(staging, then, inside)
    }

    /// The vCPUs are stopped and a checkpoint is half taken. Protection starts anew; the VM continues once
    /// the state machine allows it (invariant 7).
    pub(super) fn capture_failed(&mut self, error: &CaptureError) {
        tracing::error!("checkpoint failed: {error}");
        if let CaptureError::Vcpu(VcpuError::HostFault { vcpu, why }) = error {
            return self.host_fault(*vcpu, why);
        }
        if error.is_fatal() {
            self.over = Some(error.to_string());
            return;
        }
        if let Some(link) = self.protection.as_ref().map(|protection| protection.link) {
            self.trouble = Some(Trouble { link, why: error.to_string(), since: Instant::now() });
        }
        self.end_protection();
        self.resume();
    }

    /// Tells of a checkpoint that has failed, once the guest has run again. The standby gives its copy up then, and
    /// whatever kept KVM from taking a checkpoint may keep it from running the guest: then the VM belongs there.
    pub(super) fn tell_trouble(&mut self) {
        if self.over.is_some() {
            return;
        }
        if let Some(Trouble { link, why, .. }) = self.trouble.take_if(|it| it.due() == Duration::ZERO) {
            self.with.driver.handle(PrimaryEvent::LinkLost { link, why: LossReason::Local(why) });
        }
    }
}

/// A checkpoint has failed because of this host.
pub(super) struct Trouble {
    link: Link,
    why: String,
    since: Instant,
}

impl Trouble {
    /// How long the guest runs before the standby hears of it. Entering a vCPU takes microseconds.
    const RUNS: Duration = Duration::from_millis(5);

    /// How much longer that is.
    pub(super) fn due(&self) -> Duration {
        Self::RUNS.saturating_sub(self.since.elapsed())
    }
}

/// What a pause is for. Meanwhile the standby may leave, and another one may accept.
#[derive(Clone, Copy)]
pub(super) struct Of {
    /// The connection of the protection.
    pub(super) link: Link,
    /// Whether it is to be the base.
    pub(super) base: bool,
    /// Whether the vCPUs stay stopped after it.
    pub(super) stays: bool,
}

/// What was decided in a pause.
#[derive(Default)]
pub(super) struct Decided {
    /// Where the checkpoint goes; without a ticket it is useless.
    pub(super) ticket: Option<Ticket>,
    /// What to do after the pause.
    pub(super) after: After,
    /// How many parts are already under way.
    sent_parts: usize,
}

/// Nobody takes the rest of an oversized checkpoint.
#[derive(Debug, thiserror::Error)]
#[error("the standby was lost")]
struct StandbyLost;

/// The work while the vCPUs are stopped.
pub(super) struct InsidePause<'a> {
    driver: &'a SharedDriver,
    pool: &'a Pool,
    of: Of,
    /// The pages and state bytes of all parts.
    pages: usize,
    pub(super) decided: Decided,
}

impl InPause for InsidePause<'_> {
    fn counted(&mut self, pages: usize) {
        self.pages = pages;
        (self.decided.ticket, self.decided.after) =
            self.driver.captured(self.of.link, self.of.base, self.of.stays);
    }

    fn spill(&mut self, staging: &mut Outgoing) -> Result<(), SpillError> {
        let Some(ticket) = self.decided.ticket else { return Ok(()) };
        let next = self.next_buffer()?;
        let staging = std::mem::replace(staging, next);
        let totals = (self.decided.sent_parts == 0).then_some((self.pages, staging.state().len()));
        self.decided.sent_parts += 1;
        self.driver.ship(Box::new(CheckpointPart { ticket, totals, last: false, staging }));
        Ok(())
    }
}

impl<'a> InsidePause<'a> {
    pub(super) fn new(driver: &'a SharedDriver, pool: &'a Pool, of: Of) -> Self {
        Self { driver, pool, of, pages: 0, decided: Decided::default() }
    }

    /// The next free buffer. Only an oversized checkpoint needs it; the VM waits for the link.
    fn next_buffer(&self) -> Result<Outgoing, StandbyLost> {
        loop {
            if let Some(buffer) = self.pool.take_within(BUFFER_PATIENCE) {
                return Ok(buffer);
            }
            // A look at the clock. Not a tick: that is for the thread that waits, and a vCPU's thread may do this
            // in its place. A claim that is due is made after the pause, by the one that waits.
            self.driver.handle(PrimaryEvent::LongWork { within: Duration::ZERO });
            if !matches!(
                self.driver.status(),
                PrimaryStatus::Protected | PrimaryStatus::BaseCommit | PrimaryStatus::Ending
            ) {
                return Err(StandbyLost);
            }
        }
    }
}
