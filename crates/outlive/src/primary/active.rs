//! The coordinator: the loop of the side where the VM runs.
//!
//! It ends epochs (by interval or by the dirty trigger), runs base synchronisation, and follows the decisions
//! of [`Control`]. One thread, no lock held while it waits.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use outlive_dirty::Gfn;
use outlive_epoch::EndReason;
use outlive_machine::{
    After, CaptureError, InPause, LogMode, Machine, MachineEvent, Outgoing, PowerRequest, ResetWay,
};
use outlive_pair::{ExitReason, Link, LossReason, PrimaryEvent, PrimaryStatus, Ticket, Wanted};

use super::base::Base;
use super::control::{Control, Inbox};
use super::disks::{DiskBase, Next};
use super::restarts::Restarts;
use super::self_check::SelfCheck;
use super::stats::{Reporter, Totals};
use crate::disk::{Saying, Sidecars, SyncReport};
use crate::events::{Event, EventWriter};
use crate::link::{CheckpointPart, Job, SenderReport};
use crate::process;
use crate::vm::limits::{DISK_BYTES, SLOTS};
use crate::vm::{End, Remedy, check_staging};

/// How often the dirty pages are counted between two checkpoints, so that the trigger is seen early.
const TRIGGER_POLL: Duration = Duration::from_micros(250);
/// How long an ending process lets its last messages go out.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the loop works with.
pub(crate) struct Active {
    /// The machine.
    pub(crate) machine: Machine,
    /// Decisions.
    pub(crate) control: Arc<Control>,
    /// Messages of all other threads.
    pub(crate) inbox: Receiver<Inbox>,
    /// Time between two checkpoints.
    pub(crate) interval: Duration,
    /// Pages that a staging buffer has room for.
    pub(crate) staging_pages: usize,
    /// The replicated disks with their images.
    pub(crate) replicated: Vec<(u16, PathBuf)>,
    /// What is said of them.
    pub(crate) sidecars: Arc<Sidecars>,
    /// Compares both copies now and then.
    pub(super) self_check: SelfCheck,
    /// Counters.
    pub(crate) totals: Arc<Totals>,
    /// Events.
    pub(crate) events: EventWriter,
    /// Reports the counters; stopped before the last event is written.
    pub(crate) reporter: Option<Reporter>,
}

/// The state of the loop.
struct Coordinator {
    active: Active,
    /// Messages that came while the loop waited for a certain one.
    deferred: VecDeque<Inbox>,
    free: Vec<Outgoing>,
    base: Option<Base>,
    next_epoch: Instant,
    captures: u64,
    restarts: Restarts,
    /// The guest has ended; no vCPU runs any more.
    guest_over: bool,
    /// The VM cannot run here any more.
    wedged: bool,
}

impl Active {
    /// Runs until the VM ends here. The machine must be resumed already.
    pub(crate) fn run(self) -> End {
        outlive_machine::precise_timers();
        let coordinator = Coordinator {
            active: self,
            deferred: VecDeque::with_capacity(64),
            free: Vec::new(),
            base: None,
            next_epoch: Instant::now(),
            captures: 0,
            restarts: Restarts::default(),
            guest_over: false,
            wedged: false,
        };
        coordinator.run()
    }
}

impl Coordinator {
    fn run(mut self) -> End {
        self.active.control.handle(PrimaryEvent::Tick);
        loop {
            let message = self.deferred.pop_front().or_else(|| self.wait());
            if let Some(message) = message
                && let Some(end) = self.take(message)
            {
                return end;
            }
            self.active.control.handle(PrimaryEvent::Tick);
            self.restart_if_due();
            if let Err(error) = self.capture_if_due() {
                self.capture_failed(&error);
            }
            if self.wedged {
                return self.give_up();
            }
        }
    }

    /// Waits for a message, but not beyond the next thing to do.
    fn wait(&self) -> Option<Inbox> {
        let (wanted, deadline) = self.active.control.wanted();
        let until_tick = deadline.map(|d| d.saturating_sub(self.active.control.clock.now()));
        let until_epoch = match wanted {
            Wanted::Epoch if !self.free.is_empty() => {
                let left = self.next_epoch.saturating_duration_since(Instant::now());
                // Above the poll's length the dirty pages are looked at in between.
                Some(left.min(TRIGGER_POLL))
            }
            Wanted::Last(_) if !self.free.is_empty() => Some(Duration::ZERO),
            _ => None,
        };
        let until_restart = self.restarts.due().map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = [until_tick, until_epoch, until_restart].into_iter().flatten().min();
        let timeout = timeout.unwrap_or(Duration::from_millis(500));
        if timeout.is_zero() {
            return self.active.inbox.try_recv().ok();
        }
        match self.active.inbox.recv_timeout(timeout) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            // The control keeps a sender, so this does not happen; going on is right all the same.
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    /// Follows one message. Returns the end when it was the last.
    fn take(&mut self, message: Inbox) -> Option<End> {
        match message {
            Inbox::Wake => {}
            Inbox::Machine(event) => self.machine_event(event),
            Inbox::Sender(link, report) => self.sender_report(link, report),
            Inbox::StartBase(link) => self.start_base(link),
            Inbox::DiskWant(link, want) => {
                if let Some(disks) = self.base_of(link).and_then(Base::disks) {
                    disks.want(want);
                }
            }
            Inbox::DiskSync(link, report) => self.disk_report(link, report),
            Inbox::DisksHashed(hashed) => self.active.self_check.hashed(hashed),
            // The VM goes on here in a new generation: whoever finds the images shall know that they are the
            // newest.
            Inbox::Won(generation) => self.active.sidecars.say(Saying::primary(generation)),
            Inbox::Detached(link) => self.detached(link),
            Inbox::AskGuest => self.ask_guest(),
            Inbox::StopGuest => {
                self.guest_over = true;
                self.active.machine.pause();
            }
            Inbox::Stop(why) => self.stop(why),
            Inbox::Exit(reason) => return Some(self.exit(reason)),
        }
        None
    }

    fn machine_event(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::DirtyLogFull => self.log_full(),
            MachineEvent::DiskLogFull => self.next_epoch = Instant::now(),
            MachineEvent::Power(PowerRequest::Off) => self.end(EndReason::PowerOff),
            MachineEvent::Power(PowerRequest::Reset(way)) => self.restart_asked(way),
            MachineEvent::GuestPanicked => {
                tracing::error!(
                    "the guest's kernel panicked; the VM runs on for what it does next (panic= of its command line)"
                );
                self.active.events.emit(Event::GuestPanicked);
            }
            MachineEvent::Power(PowerRequest::Panic) => {
                tracing::error!("the guest panicked");
                self.end(EndReason::Crash);
            }
            MachineEvent::Crashed { vcpu, why } => {
                tracing::error!(vcpu, "the guest crashed: {why}");
                self.end(EndReason::Crash);
            }
        }
    }

    /// The guest asks for a restart; one that cannot ends.
    fn restart_asked(&mut self, way: ResetWay) {
        if !self.active.machine.can_reset() {
            return self.end(EndReason::Reset);
        }
        let asked = self.restarts.ask(way, Instant::now());
        let wait = asked.wait.as_secs();
        match asked.soon.map(|ran| ran.as_secs()) {
            None => tracing::info!("the guest restarts, by {way}"),
            Some(ran) if wait == 0 => {
                tracing::warn!("the guest restarts, by {way}, {ran} s after its last restart");
            }
            Some(ran) => tracing::warn!(
                "the guest restarts, by {way}, {ran} s after its last restart, again and again: \
                 this one waits for {wait} s"
            ),
        }
    }

    /// The guest restarts, protected as before, if it is time.
    fn restart_if_due(&mut self) {
        let Some(way) = self.restarts.take(Instant::now()) else { return };
        if self.guest_over {
            return;
        }
        match self.active.machine.reset() {
            Ok(()) => {
                self.active.events.emit(Event::GuestRestarted { how: way.to_string() });
            }
            Err(error) => {
                tracing::error!("the guest cannot restart: {error}");
                self.end(EndReason::Crash);
            }
        }
    }

    /// The operator wants the VM stopped. Linux is asked first, as by its power button.
    fn stop(&mut self, why: &'static str) {
        tracing::info!("{why}: the VM is to stop");
        let ask_guest = why != process::ORPHANED && self.active.machine.can_reset();
        self.active.control.handle(PrimaryEvent::Stop { ask_guest });
    }

    fn ask_guest(&mut self) {
        tracing::info!("the guest is asked to shut down; a second stop does not ask");
        self.active.machine.press_power_button();
    }

    /// KVM holds a vCPU until its dirty ring is emptied.
    fn log_full(&mut self) {
        // In an epoch the next checkpoint does it, and is due at once.
        self.next_epoch = Instant::now();
        // During base synchronisation the guest must not wait for the round that is being sent.
        if let Some(base) = &mut self.base
            && let Err(error) = self.active.machine.take_dirty(base.early())
        {
            self.capture_failed(&error);
        }
    }

    fn end(&mut self, reason: EndReason) {
        if self.active.control.status() == PrimaryStatus::Arbitrating {
            tracing::warn!("the end waits for the arbiter: another host may have this VM too");
        }
        self.guest_over = true;
        self.active.machine.pause();
        self.active.control.handle(PrimaryEvent::End { reason });
    }

    fn sender_report(&mut self, link: Link, report: SenderReport) {
        match report {
            SenderReport::Free(staging) => self.put_back(link, staging),
            // Counted where it was reported.
            SenderReport::Sent(_) => {}
            SenderReport::BaseProgress { pages } => {
                if let Some(base) = &mut self.base {
                    base.sent(pages);
                }
            }
            SenderReport::BaseRoundDone(gfns) => self.base_round_done(link, gfns),
            SenderReport::Failed(why) => {
                self.active.control.handle(PrimaryEvent::LinkLost { link, why: LossReason::Error(why) });
            }
        }
    }

    fn put_back(&mut self, link: Link, staging: Outgoing) {
        // A buffer of an earlier link is dropped: its protection is over.
        if self.active.control.link() == Some(link) {
            self.free.push(staging);
        }
    }

    /// Protection begins: everything that checkpoints need is allocated now (invariant 5).
    fn start_base(&mut self, link: Link) {
        match self.prepare_base(link) {
            Ok(base) => self.base = Some(base),
            Err(why) => return self.base_failed(link, why),
        }
        if self.base.as_mut().and_then(Base::disks).is_none_or(|disks| !disks.comes_first()) {
            self.begin_memory(link);
        }
    }

    fn base_failed(&mut self, link: Link, why: String) {
        tracing::error!("protection cannot start: {why}");
        self.active.control.handle(PrimaryEvent::LinkLost { link, why: LossReason::Local(why) });
    }

    fn base_of(&mut self, link: Link) -> Option<&mut Base> {
        self.base.as_mut().filter(|base| base.link() == link)
    }

    fn prepare_base(&mut self, link: Link) -> Result<Base, String> {
        let active = &mut self.active;
        active.totals.base_begins();
        self.free.clear();
        let pages = active.staging_pages.min(active.machine.ram().pages() as usize);
        let disk_bytes = if active.replicated.is_empty() { 0 } else { DISK_BYTES };
        check_staging(pages, disk_bytes, SLOTS)?;
        for _ in 0..SLOTS {
            self.free.push(Outgoing::new(pages, disk_bytes).map_err(|e| e.with_remedy())?);
        }
        active.machine.begin_base();
        let disks = DiskBase::start(&active.machine, &active.control, link, &active.events)?;
        Ok(Base::new(link, active.events.clone(), disks))
    }

    /// The disks are at the standby, if there are any: memory follows.
    fn begin_memory(&mut self, link: Link) {
        let active = &mut self.active;
        if let Err(error) = active.machine.enable_tracking() {
            return self.base_failed(link, error.to_string());
        }
        // After tracking began: a page that is touched later is dirty. The standby's memory is zero, like
        // every page that was never touched here.
        let ram = active.machine.ram();
        let gfns: Vec<Gfn> = ram.touched().unwrap_or_else(|error| {
            tracing::warn!(%error, "sending untouched memory too");
            ram.gfns().collect()
        });
        if let Some(base) = &mut self.base {
            active.control.send(link, base.begin_memory(gfns, active.machine.ram()));
        }
    }

    /// The synchronisation of the disks has come to a point.
    fn disk_report(&mut self, link: Link, report: SyncReport) {
        let Some(base) = self.base.as_mut().filter(|b| b.link() == link) else { return };
        let Some(disks) = base.disks() else { return };
        match disks.report(report) {
            Next::Wait => {}
            Next::Memory => self.begin_memory(link),
            Next::Final => {
                let dirty = self.active.machine.tracker().pending();
                match base.late_round(dirty, self.active.staging_pages) {
                    Some(gfns) => self.next_round(link, gfns),
                    None => self.capture_base(link),
                }
            }
            Next::Fail(why) => self.base_failed(link, format!("the disks cannot be synchronised: {why}")),
        }
    }

    /// A round is sent. Either the rest is small enough for the final stop, or there is another round.
    fn base_round_done(&mut self, link: Link, mut gfns: Vec<Gfn>) {
        let Some(base) = self.base.as_mut().filter(|b| b.link() == link) else { return };
        let dirty = self.active.machine.tracker().pending();
        if !base.is_last(dirty, self.active.staging_pages) {
            return self.next_round(link, gfns);
        }
        gfns.clear();
        if base.disks_are_ready(gfns) {
            self.capture_base(link);
        }
    }

    /// The final stop of the base synchronisation.
    fn capture_base(&mut self, link: Link) {
        if let Some(base) = &mut self.base {
            // What was taken early has not been sent since, so it is part of what the final checkpoint
            // carries.
            base.early().drain(..).for_each(|gfn| self.active.machine.ram().log().mark(gfn));
        }
        let (wanted, _) = self.active.control.wanted();
        if wanted == (Wanted::Base { link })
            && let Err(error) = self.capture(None)
        {
            self.capture_failed(&error);
        }
        if let Some(base) = self.base.take() {
            base.finish();
        }
    }

    fn next_round(&mut self, link: Link, mut gfns: Vec<Gfn>) {
        let Some(base) = &mut self.base else { return };
        gfns.clear();
        match self.active.machine.take_dirty(&mut gfns) {
            Ok(()) => {
                let job = base.next_round(gfns, self.active.machine.ram());
                self.active.control.send(link, job);
            }
            Err(error) => self.capture_failed(&error),
        }
    }

    fn detached(&mut self, _link: Link) {
        self.end_protection();
        if !self.guest_over {
            self.active.machine.resume();
        }
    }

    fn capture_if_due(&mut self) -> Result<(), CaptureError> {
        if self.free.is_empty() {
            return Ok(());
        }
        match self.active.control.wanted().0 {
            Wanted::Epoch => {
                let due = Instant::now() >= self.next_epoch || self.active.machine.tracker().should_stop();
                if due { self.capture(None) } else { Ok(()) }
            }
            Wanted::Last(reason) => self.capture(Some(reason)),
            Wanted::Nothing | Wanted::Base { .. } => Ok(()),
        }
    }

    /// Takes one checkpoint and hands it to the sender.
    fn capture(&mut self, end: Option<EndReason>) -> Result<(), CaptureError> {
        let Some(mut staging) = self.free.pop() else { return Ok(()) };
        self.captures += 1;
        if let Some(disks) = self.active.self_check.before(self.captures) {
            self.active.machine.check_next(disks);
        }
        let began = Instant::now();
        let mut pause = Pause {
            control: &self.active.control,
            inbox: &self.active.inbox,
            deferred: &mut self.deferred,
            free: &mut self.free,
            ticket: None,
            totals: (0, 0),
            sent_parts: 0,
        };
        let after = if end.is_some() || self.guest_over { After::Stay } else { After::Resume };
        let result = self.active.machine.checkpoint(&mut staging, after, &mut pause);
        let Pause { ticket, totals, sent_parts, .. } = pause;
        self.active.self_check.after();
        let report = result?;
        self.active.totals.captured(&report);
        match ticket {
            Some(ticket) => {
                let totals = (sent_parts == 0).then_some((totals.0, staging.state_bytes()));
                ship(&self.active.control, ticket, totals, true, staging);
            }
            None => self.free.push(staging),
        }
        // Epochs keep their rhythm; after a long pause they begin anew.
        let next = self.next_epoch + self.active.interval;
        self.next_epoch = next.max(began + self.active.interval / 2);
        Ok(())
    }

    /// The VM stands still with a checkpoint half taken. Protection starts anew; the VM goes on once the
    /// state machine allows it (invariant 7).
    fn capture_failed(&mut self, error: &CaptureError) {
        tracing::error!("checkpoint failed: {error}");
        if error.is_overrun() {
            self.wedged = true;
            return;
        }
        if let Some(link) = self.active.control.link() {
            let why = LossReason::Local(error.to_string());
            self.active.control.handle(PrimaryEvent::LinkLost { link, why });
        }
        self.end_protection();
        if !self.guest_over {
            self.active.machine.resume();
        }
    }

    fn end_protection(&mut self) {
        self.base = None;
        self.free.clear();
        self.active.self_check.cancel();
        self.active.machine.disable_tracking();
        self.active.machine.write_log().set_mode(LogMode::Off);
    }

    /// KVM has lost writes of this VM and will not run it again. If a checkpoint was committed, it is whole:
    /// this process ends without a word on the link, so the standby takes over from there. Held output goes
    /// with it.
    fn give_up(&mut self) -> End {
        self.active.machine.valve().discard();
        self.active.control.finish_output();
        self.active.reporter.take();
        End::Failed(
            "dirty tracking was overrun and KVM runs this VM no more: leaving it to its standby, if it has one"
                .into(),
        )
    }

    fn exit(&mut self, reason: ExitReason) -> End {
        self.active.machine.pause();
        // The decision to end comes with the one to let the last output out, which another thread may still be
        // about to carry out.
        self.active.control.finish_output();
        self.active.control.finish(FAREWELL);
        // Its last report goes before the end.
        self.active.reporter.take();
        self.active.sidecars.written_within(FAREWELL).ok();
        End::Primary(reason)
    }
}

fn ship(control: &Control, ticket: Ticket, totals: Option<(usize, usize)>, last: bool, staging: Outgoing) {
    let part = CheckpointPart { ticket, totals, last, staging };
    control.send(ticket.link, Job::Checkpoint(Box::new(part)));
}

/// What is done while the VM stands still.
struct Pause<'a> {
    control: &'a Arc<Control>,
    inbox: &'a Receiver<Inbox>,
    deferred: &'a mut VecDeque<Inbox>,
    free: &'a mut Vec<Outgoing>,
    ticket: Option<Ticket>,
    /// Pages and state bytes of all parts.
    totals: (usize, usize),
    sent_parts: usize,
}

impl InPause for Pause<'_> {
    fn counted(&mut self, pages: usize) {
        self.totals.0 = pages;
        self.ticket = self.control.captured();
    }

    fn spill(&mut self, staging: &mut Outgoing) -> Result<(), String> {
        let Some(ticket) = self.ticket else { return Ok(()) };
        let mut next = self.wait_for_staging()?;
        std::mem::swap(staging, &mut next);
        if self.sent_parts == 0 {
            self.totals.1 = next.state_bytes();
        }
        let totals = (self.sent_parts == 0).then_some(self.totals);
        self.sent_parts += 1;
        ship(self.control, ticket, totals, false, next);
        Ok(())
    }
}

impl Pause<'_> {
    /// The next free buffer. Only an oversized checkpoint comes here; the VM waits for the link.
    fn wait_for_staging(&mut self) -> Result<Outgoing, String> {
        loop {
            if let Some(staging) = self.free.pop() {
                return Ok(staging);
            }
            if !matches!(
                self.control.status(),
                PrimaryStatus::Protected | PrimaryStatus::BaseCommit | PrimaryStatus::Ending
            ) {
                return Err("the standby was lost".into());
            }
            match self.inbox.recv_timeout(Duration::from_millis(20)) {
                Ok(Inbox::Sender(_, SenderReport::Free(staging))) => return Ok(staging),
                Ok(other) => self.deferred.push_back(other),
                Err(_) => self.control.handle(PrimaryEvent::Tick),
            }
        }
    }
}
