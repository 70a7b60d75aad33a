//! The coordinator: the thread on which the VM's side of the protection happens.
//!
//! It takes checkpoints when the policy says so, runs the base synchronisation, and does what the decisions
//! demand. It waits for one thing at a time: a message, the state machine's next deadline, or the time that
//! the policy has named; it holds no lock while it waits.
//!
//! ```text
//! capture.rs   when an epoch ends, and the pause
//! base.rs      the base synchronisation of memory; disks.rs that of the disks
//! broken.rs    disks and networks that fail while the VM runs
//! hold.rs      holds a guest that writes more than the link carries; brake.rs, converge.rs: how much, how long
//! driver.rs    the decisions; ports.rs what they reach; links.rs connections
//! shared_disks.rs disks that both hosts use
//! restarts.rs  restarts of the guest; own_kernel.rs: of one that boots the kernel of its own disk
//! notes.rs     log lines and events about them
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::SignalsBlocked;
use outlive_epoch::{Audited, DiskAudited, EndReason, VmId};
use outlive_machine::{LogMode, Machine, MachineEvent, PowerRequest};
use outlive_pair::policy::Policy;
use outlive_pair::{ExitReason, KeptMemory, Link, PrimaryEvent, PrimaryNote, PrimaryStatus};

use super::base::Base;
use super::broken::Faults;
use super::capture::{Due, FullLogs, Trouble};
use super::disks;
use super::driver::SharedDriver;
use super::hand_over::UnderWay;
use super::hold::{Held, LastEpoch};
use super::inbox::{Inbox, Messages};
use super::known::Known;
use super::notes::Notes;
use super::own_kernel::OwnKernel;
use super::pool::Pool;
use super::restarts::Restarts;
use super::rivals::Rivals;
use super::self_check::SelfCheck;
use super::shared_disks::SharedDisks;
use super::stats::Totals;
use super::strays::GuardedStrays;
use crate::arbiter::Watch;
use crate::disk::{Books, Saying, Sidecars};
use crate::events::{Event, EventWriter, Part, Place};
use crate::link::SenderReport;
use crate::report::Reporter;
use crate::status::Standing;
use crate::vm::{End, KeptVm, Shelf};
use crate::{audit, notify, process};

/// How long an ending process lets its last messages go out.
const FAREWELL: Duration = Duration::from_secs(2);
/// A fault of the host that comes this soon after a takeover counts as the guest's crash.
pub(super) const SAME_FAULT: Duration = Duration::from_secs(10);
/// How long the coordinator sleeps if nothing is due.
const IDLE: Duration = Duration::from_millis(500);

/// What the coordinator works with.
pub(super) struct Setup {
    /// The machine, resumed.
    pub(super) machine: Machine,
    /// Decisions.
    pub(super) driver: Arc<SharedDriver>,
    /// Messages of all other threads.
    pub(super) inbox: Messages,
    /// Looks whether the arbiter is there, if there is one.
    pub(super) arbiter_watch: Option<Arc<Watch>>,
    /// Looks whether another host has won the VM.
    pub(super) rivals: Option<Rivals>,
    /// When the VM was taken over, if it did not start here.
    pub(super) took_over: Option<Instant>,
    /// It was taken over from a process that ended, perhaps because its host could not run the guest.
    pub(super) last_host_ended: bool,
    /// Whether it has a standby, or had one: it is not meant to be unprotected.
    pub(super) wants_protection: bool,
    /// How long a stop of the machine may take while a standby waits.
    pub(super) stop_budget: Duration,
    /// How long the guest may take to shut down.
    pub(super) stop_within: Duration,
    /// After how long a disk that does not answer counts as broken, if it ever does.
    pub(super) disk_timeout: Option<Duration>,
    /// A new host makes sure that this one writes nothing more, before it goes on.
    pub(super) fences: bool,
    /// When an epoch ends.
    pub(super) policy: Policy,
    /// How many pages a buffer has room for.
    pub(super) staging_pages: usize,
    /// How long the guest may stand still at the end of the base synchronisation.
    pub(super) longest_pause: Duration,
    /// Whether there are disks whose writes are part of a checkpoint.
    pub(super) replicates_disks: bool,
    /// What is known of the disks' images.
    pub(super) books: Books,
    /// What was written since the VM was handed over to this host.
    pub(super) known: Option<Known>,
    /// Where the VM's memory stays when it is handed over, and whose it is.
    pub(super) shelf: (Shelf, VmId),
    /// Keeps the sidecars of the disks' images.
    pub(super) sidecars: Arc<Sidecars>,
    /// Compares both copies now and then.
    pub(super) self_check: SelfCheck,
    /// Reads the kernel of the guest's own disk when it restarts.
    pub(super) own_kernel: OwnKernel,
    /// Counters.
    pub(super) totals: Arc<Totals>,
    /// Events.
    pub(super) events: EventWriter,
    /// What `outlive status` tells.
    pub(super) standing: Arc<Standing>,
    /// Reports the counters; stopped before the last event is written.
    pub(super) reporter: Option<Reporter>,
}

/// The protection by a standby that has accepted: the base is under way, or the VM is protected.
pub(super) struct Protection {
    pub(super) link: Link,
    pub(super) pool: Arc<Pool>,
    /// The base synchronisation, until the base is captured.
    pub(super) base: Option<Base>,
    /// Strays follow the guest to this standby.
    pub(super) strays: Option<GuardedStrays>,
}

/// The coordinator; see the module.
pub(super) struct Coordinator {
    pub(super) with: Setup,
    pub(super) protection: Option<Protection>,
    /// The logs that have filled up in this epoch.
    pub(super) full: FullLogs,
    /// Checkpoints that are not known to be committed, with the time at which their pause ended.
    pub(super) on_their_way: VecDeque<(u64, Duration)>,
    /// How long the last commit took.
    pub(super) acknowledged_in: Option<Duration>,
    /// The guest is held back.
    pub(super) held: Option<Held>,
    /// When it was last decided whether the guest is held, on the driver's clock.
    pub(super) looked_at: Duration,
    pub(super) last_epoch: LastEpoch,
    /// The number of checkpoints of this process.
    pub(super) captures: u64,
    /// Why the VM can no longer run here.
    pub(super) over: Option<String>,
    /// Whether the guest counts as crashed because no host can run it.
    pub(super) blamed: bool,
    /// What is broken at this host while the VM runs.
    pub(super) faults: Faults,
    /// An operator moves the VM to its standby.
    pub(super) hand_over: Option<UnderWay>,
    /// The disks that both hosts use.
    pub(super) shared: SharedDisks,
    /// A checkpoint has failed, and the standby does not know yet.
    pub(super) trouble: Option<Trouble>,
    pub(super) restarts: Restarts,
    /// When the guest that was asked to shut down is stopped.
    stop_due: Option<Instant>,
    notes: Notes,
}

impl Coordinator {
    /// A coordinator of an unprotected VM.
    pub(super) fn new(with: Setup) -> Self {
        Self {
            protection: None,
            full: FullLogs::default(),
            on_their_way: VecDeque::with_capacity(16),
            acknowledged_in: None,
            held: None,
            looked_at: Duration::ZERO,
            last_epoch: LastEpoch::default(),
            captures: 0,
            over: None,
            blamed: false,
            faults: Faults::default(),
            hand_over: None,
            shared: SharedDisks::default(),
            trouble: None,
            restarts: Restarts::of(with.machine.restarts()),
            stop_due: None,
            notes: Notes::new(with.events.clone(), with.totals.clone(), with.standing.clone()),
            with,
        }
    }

    /// Runs until the VM ends here.
    pub(super) fn run(mut self) -> End {
        outlive_machine::precise_timers();
        // A rearm blocks all signals, since one would lose pages; so does this, once for all of them.
        let _no_signals = SignalsBlocked::now();
        self.with.driver.handle(PrimaryEvent::Tick);
        loop {
            if let Some(end) = self.turn() {
                if matches!(end, End::Failed(_)) {
                    // The machine may have a thread that never comes, and freeing its memory takes time: the
                    // end of the process waits for neither.
                    std::mem::forget(self);
                }
                return end;
            }
        }
    }

    /// Waits for one thing and does it. Returns the end if it was the last.
    pub(super) fn turn(&mut self) -> Option<End> {
        notify::alive();
        if let Some(message) = self.wait()
            && let Some(end) = self.take(message)
        {
            return Some(end);
        }
        self.with.driver.handle(PrimaryEvent::Tick);
        self.restart_if_due();
        self.try_base_again();
        self.stop_if_due();
        self.look_at_disks();
        self.look_at_known();
        if self.with.wants_protection {
            self.notes.remind();
        }
        self.look_at_leaving();
        if let Err(error) = self.capture_if_due() {
            self.capture_failed(&error);
        }
        self.tell_trouble();
        self.over.take().map(|why| self.give_up(&why))
    }

    /// Waits for a message, but not beyond the next deadline.
    fn wait(&mut self) -> Option<Inbox> {
        let waiting = self.with.driver.wait();
        self.note_commit(waiting.committed);
        let look = self.hold_or_let_go(waiting.wanted);
        let now = self.with.driver.clock().now();
        let epoch_ends = match self.due(waiting.wanted) {
            Due::Now => Some(now),
            Due::At(time) => Some(time),
            Due::Nothing => None,
        };
        let until = [waiting.deadline, epoch_ends].into_iter().flatten().min();
        let until = until.map(|until| until.saturating_sub(now));
        // A guest that stands still for its hand-over restarts where it goes on.
        let due = self.restarts.due().filter(|_| !self.with.driver.stands_still());
        let until_restart = due.map(|due| due.saturating_duration_since(Instant::now()));
        let until_read = self.with.own_kernel.due().map(|due| due.saturating_duration_since(Instant::now()));
        let until_stop = self.stop_due.map(|due| due.saturating_duration_since(Instant::now()));
        let until_told = self.trouble.as_ref().map(Trouble::due);
        let leaving = self.shared.due();
        let timeout = [until, until_restart, until_read, until_stop, look, until_told, leaving]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(IDLE);
        self.with.inbox.next_within(timeout)
    }

    /// Handles one message. Returns the end if it was the last.
    fn take(&mut self, message: Inbox) -> Option<End> {
        match message {
            Inbox::Wake => {}
            Inbox::Machine(event) => self.machine_event(event),
            Inbox::Sender(link, report) => self.sender_report(link, report),
            Inbox::StartBase(accepted) => self.start_base(accepted),
            Inbox::DiskWant(link, want) => {
                if let Some(disks) = self.base_of(link).and_then(Base::disks) {
                    disks.want(want);
                }
            }
            Inbox::DiskSync(link, report) => self.disk_report(link, report),
            Inbox::Audited(audited) => self.audited(&audited),
            // What a connection has said that is over counts no more.
            Inbox::StandbySees(link, sight) => {
                if self.with.driver.standby(link).is_some() {
                    self.notes.standby_sees(sight);
                }
            }
            Inbox::StandbyReaches(link, reaches) => {
                if self.with.driver.standby(link).is_some() {
                    self.notes.standby_reaches(reaches);
                }
            }
            Inbox::DiskAudited(audited) => self.disks_audited(&audited),
            Inbox::BootRead(number, outcome) => {
                self.with.own_kernel.heard(number, outcome);
            }
            Inbox::DisksHashed(hashed) => self.with.self_check.hashed(hashed),
            Inbox::Detached(link) => self.detached(link),
            Inbox::Note(note) => self.note(note),
            Inbox::AskGuest => self.ask_guest(),
            Inbox::StopGuest => self.with.machine.pause(),
            Inbox::Network(broken) => self.network(broken),
            Inbox::GiveAway(what) => self.give_away(what),
            Inbox::Endure(what, kept) => self.endure(what, kept),
            Inbox::HandOver(asked) => self.hand_over(asked),
            Inbox::HandsOver => self.hands_over(),
            Inbox::LetGo => self.let_vm_go(),
            Inbox::Keeps(why) => self.keeps(why),
            Inbox::Stop(why) => self.stop(why),
            Inbox::Exit(reason) => return Some(self.exit(reason)),
        }
        None
    }

    fn note(&mut self, note: PrimaryNote) {
        let standby = match &note {
            PrimaryNote::Attached { link } => self.with.driver.standby(*link),
            _ => None,
        };
        if let PrimaryNote::Won { generation } = &note {
            // The sidecars must say that the images are the newest.
            self.with.sidecars.say(Saying::primary(*generation));
        }
        if matches!(note, PrimaryNote::Won { .. } | PrimaryNote::RightHandedOver) {
            self.faults.given_away = None;
            self.not_handed_over();
            // It may have stood still for the hand-over.
            self.resume();
        }
        let protected = matches!(note, PrimaryNote::Protected { .. });
        self.notes.say(note, standby);
        if protected && let Some(why) = self.with.arbiter_watch.as_ref().and_then(|watch| watch.sight().lost)
        {
            tracing::warn!("the VM is protected only once the arbiter is back: {why}");
        }
    }

    fn machine_event(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::DirtyLogFull => self.dirty_log_full(),
            MachineEvent::DiskLogFull => self.full.disk = true,
            MachineEvent::Power(PowerRequest::Off) => self.end(EndReason::PowerOff),
            MachineEvent::Power(PowerRequest::Reset(way)) => self.restart_asked(way),
            MachineEvent::GuestPanicked => {
                tracing::error!(
                    "the guest's kernel panicked; the VM keeps running, and panic= of its command line \
                     decides what happens next"
                );
                self.with.events.emit(Event::GuestPanicked);
            }
            MachineEvent::Power(PowerRequest::Panic) => {
                tracing::error!("the guest panicked");
                self.end(EndReason::Crash);
            }
            MachineEvent::Crashed { vcpu, why } => {
                tracing::error!(vcpu, "the guest crashed: {why}");
                self.end(EndReason::Crash);
            }
            // The failed checkpoint came first.
            MachineEvent::HostFault { .. } if self.blamed => {}
            MachineEvent::HostFault { vcpu, why } => self.host_fault(vcpu, &why),
            MachineEvent::DiskFault { why, again, .. } => self.disk_fault(why, again),
        }
    }

    /// This host can no longer run a vCPU. As far as is known the guest did nothing wrong, so its standby
    /// takes over. A guest that makes every host fail does so again soon after the takeover, from the same
    /// checkpoint. Then it counts as crashed; otherwise two hosts would hand it to each other forever. Such a host ends
    /// its process: one that has lost its power, or has handed the VM over, had no such fault.
    pub(super) fn host_fault(&mut self, vcpu: u8, why: &str) {
        let soon =
            self.with.last_host_ended && self.with.took_over.is_some_and(|at| at.elapsed() < SAME_FAULT);
        if soon && !std::mem::replace(&mut self.blamed, true) {
            tracing::error!(
                vcpu,
                "soon after the takeover this host cannot run the guest either, so the guest counts as \
                 crashed: {why}"
            );
            self.with.machine.blame_guest();
            return self.end(EndReason::Crash);
        }
        let why = format!("a fault of this host, vCPU {vcpu}: {why}");
        self.with.events.emit(Event::HostFault { part: Part::Vcpu, why: why.clone(), kept: None });
        self.over = Some(why);
    }

    /// The operator wants the VM stopped. A Linux guest is asked first, by its power button, and has a limited
    /// time: a service manager that waits in vain kills this process, and the standby would take over what the
    /// operator wants stopped.
    fn stop(&mut self, why: &'static str) {
        tracing::info!("{why}: stopping the VM");
        let ask_guest = why != process::ORPHANED && self.with.machine.can_reset();
        if ask_guest {
            self.stop_due.get_or_insert(Instant::now() + self.with.stop_within);
        }
        self.with.driver.handle(PrimaryEvent::Stop { ask_guest });
    }

    /// Stops a guest that was asked to shut down and has not done so in time.
    fn stop_if_due(&mut self) {
        if self.stop_due.take_if(|due| Instant::now() >= *due).is_some() {
            let secs = self.with.stop_within.as_secs_f32();
            tracing::warn!("the guest has not shut down within {secs} s (--stop-within): stopping the VM");
            self.with.driver.handle(PrimaryEvent::Stop { ask_guest: false });
        }
    }

    fn ask_guest(&mut self) {
        match self.with.machine.press_power_button() {
            Ok(()) => tracing::info!("asked the guest to shut down; a second stop does not ask"),
            Err(error) => tracing::error!("cannot ask the guest to shut down: {error}"),
        }
    }

    /// KVM holds a vCPU until its dirty ring is emptied.
    fn dirty_log_full(&mut self) {
        // In an epoch the next checkpoint empties it, and is due at once.
        self.full.dirty = true;
        // During base synchronisation the guest must not wait for the round that is being sent.
        if let Some(base) = self.protection.as_mut().and_then(|protection| protection.base.as_mut())
            && let Err(error) = self.with.machine.take_dirty(base.early())
        {
            self.capture_failed(&error);
        }
        if self.protection.is_none() {
            self.keep_dirty();
        }
    }

    pub(super) fn end(&mut self, reason: EndReason) {
        if self.with.driver.status() == PrimaryStatus::Arbitrating {
            tracing::warn!("the end waits for the arbiter: another host may have this VM too");
        }
        self.with.machine.pause();
        self.with.driver.handle(PrimaryEvent::End { reason });
    }

    fn sender_report(&mut self, link: Link, report: SenderReport) {
        match report {
            SenderReport::BaseProgress { pages } => {
                if let Some(base) = self.base_of(link) {
                    base.sent(pages);
                }
            }
            SenderReport::BaseRoundDone(sent) => self.base_round_done(link, sent),
            // Handled where they are reported: see `links.rs`.
            SenderReport::Free(_)
            | SenderReport::Sent(_)
            | SenderReport::Shipped(_)
            | SenderReport::Written(_)
            | SenderReport::Failed(_) => {}
        }
    }

    /// The standby has compared pages. If they differ, it leaves next, and its copy is made anew.
    fn audited(&mut self, audited: &Audited) {
        self.with.totals.audit().heard(audited);
        if let Some((first, mask)) = audited.differs {
            let checkpoint = audited.checkpoint;
            tracing::error!(
                checkpoint,
                "AUDIT: the standby's copy differs from the VM in one of the pages from GFN {first:#x} on \
                 (mask {mask:#x}); it is made anew. Test the memory of both hosts"
            );
            let place = Place::Memory { first_page: first, mask };
            self.with.events.emit(Event::AuditDiffers { checkpoint, place });
        }
    }

    /// The same of its disks. Which of the two images is wrong is not known, so what is known of this one is
    /// forgotten: the new base must not go without the place because of what it was long ago.
    fn disks_audited(&mut self, audited: &DiskAudited) {
        self.with.totals.audit().heard_of_disks(audited);
        if let Some(chunks) = audited.differs {
            let checkpoint = audited.checkpoint;
            tracing::error!(
                checkpoint,
                "AUDIT: the standby's copy differs from the VM in {}; it is made anew. Test the storage and the \
                 memory of both hosts",
                audit::Place(chunks)
            );
            disks::forget(&self.with.machine, &self.with.books, chunks.disk);
            self.with.events.emit(Event::AuditDiffers { checkpoint, place: chunks.into() });
        }
    }

    fn detached(&mut self, link: Link) {
        if self.protection.as_ref().is_some_and(|protection| protection.link == link) {
            self.end_protection();
        }
        self.resume();
    }

    /// Lets the guest run, if it may.
    pub(super) fn resume(&mut self) {
        self.end_hold();
        if self.with.driver.guest_may_run() {
            self.with.machine.ram().log().unwatch();
            self.with.machine.resume();
        }
    }

    pub(super) fn end_protection(&mut self) {
        if let Some(protection) = self.protection.take() {
            protection.pool.close();
        }
        self.on_their_way.clear();
        // Nothing has to be sent any more. Whoever ends the protection lets the guest run, if it may.
        self.end_hold();
        self.with.self_check.cancel();
        self.forget_writes();
        self.with.machine.disable_tracking();
        self.with.machine.write_log().set_mode(LogMode::Off);
    }

    /// The VM can no longer run on this host. A committed checkpoint is whole, so this process ends without a
    /// word on the link and the standby takes over from there. Held output is lost with the process.
    fn give_up(&mut self, why: &str) -> End {
        let protected =
            self.faults.given_away.is_some() || self.with.driver.status() == PrimaryStatus::Protected;
        self.with.driver.leave();
        self.with.reporter.take();
        let then = if protected { "leaving it to its standby" } else { "and no standby has it" };
        End::Failed(format!("the VM can no longer run here, {then}: {why}"))
    }

    fn exit(&mut self, reason: ExitReason) -> End {
        if let (ExitReason::Fenced { .. }, Some(why)) = (&reason, self.faults.given_away.clone()) {
            // Its standby has the VM. The machine may have a disk that never answers.
            return self.give_up(&why);
        }
        let handed = self.hand_over.take().map(UnderWay::ended);
        self.with.machine.pause();
        // Committed output leaves now; after this, nothing else does.
        self.with.driver.finish_output();
        disks::let_go(&self.with.machine, &self.with.books);
        self.with.driver.finish(FAREWELL);
        // Its last report comes before the end.
        self.with.reporter.take();
        self.with.sidecars.written_within(FAREWELL).ok();
        if let (Some(moment), ExitReason::Fenced { .. }) = (self.with.driver.handed_over(), &reason) {
            let (shelf, vm) = &self.with.shelf;
            let tap = self.with.machine.net().and_then(|net| net.tap_again().ok());
            shelf.put(KeptMemory { vm: *vm, moment }, KeptVm { ram: self.with.machine.ram().clone(), tap });
        }
        if let (Some(handed), ExitReason::Fenced { generation, owner }) = (handed, &reason) {
            handed.to(*generation, owner);
        }
        End::Primary(reason)
    }
}
