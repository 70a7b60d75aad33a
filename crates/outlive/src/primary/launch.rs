//! From a running machine to its coordinator: the same for a first start and after a takeover.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_epoch::DeviceKind;
use outlive_machine::{Machine, PartLog, Valve};
use outlive_pair::{ExitReason, Primary, PrimaryConfig, Timing};

use super::capture;
use super::coordinator::{Coordinator, Setup};
use super::driver::SharedDriver;
use super::inbox::{Inbox, inbox};
use super::known::Known;
use super::links::{self, Plan};
use super::own_kernel::OwnKernel;
use super::ports::Ports;
use super::rivals;
use super::self_check::SelfCheck;
use super::stats::{Totals, report};
use crate::arbiter::{self, Claim, ClaimWorker};
use crate::audit::{AuditDisk, AuditShare, AuditThread, Source};
use crate::cli::ActiveOptions;
use crate::clock::Clock;
use crate::disk::{Image, Sidecars};
use crate::events::EventWriter;
use crate::heat::Heat;
use crate::link::FrameTail;
use crate::vm::{self, End, IntroductionError, Launch, limits};
use crate::{exit, logs, pulse};

/// How long the end of a VM waits for the arbiter to note it. The note is for people only.
const NOTE_PATIENCE: Duration = Duration::from_secs(2);

/// Runs the VM until it ends here. Unless this host has failed, the machine is gone when this returns, and with
/// it everything that prints, sends or writes: its devices wait for what is under way.
pub(crate) fn run(launch: Launch) -> End {
    let console = launch.console.clone();
    if launch.identity.devices.iter().all(|device| device.kind != DeviceKind::Serial) {
        console.prints_nothing();
    }
    coordinate(launch).unwrap_or_else(|error| End::Failed(error.to_string()))
}

/// Why a VM that runs has no coordinator.
#[derive(Debug, thiserror::Error)]
enum CoordinateError {
    /// No standby could have a copy of it.
    #[error(transparent)]
    Introduction(#[from] IntroductionError),
    /// Nobody would make connections, look after the coordinator or write sidecars.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
    /// Nobody would ask the arbiter.
    #[error("cannot start the arbiter's thread: {0}")]
    NoClaims(#[source] io::Error),
}

/// Ends this process without a word when the coordinator of a protected VM does not move, for so long that
/// others take this host for dead: its standby learns of it at once.
fn watch(driver: &Arc<SharedDriver>, dead_after: Duration, events: &EventWriter) -> io::Result<()> {
    let (watched, events) = (Arc::downgrade(driver), events.clone());
    let leaving = watched.clone();
    let lasts = move || Some(watched.upgrade()?.pulse().lasts());
    let gone = move || {
        if leaving.upgrade().is_some_and(|driver| driver.leave_if_wedged()) {
            let why = "the VM cannot run here any more, leaving it to its standby: the thread that takes its \
                       checkpoints stands still";
            let code = exit::conclude(&End::Failed(why.into()), &events);
            logs::finish();
            std::process::exit(code.into());
        }
    };
    pulse::watch(dead_after / 10, lasts, gone)
}

/// The VM runs without an audit where none can be had.
fn start_audit(setup: &Setup, share: AuditShare, valve: Arc<Valve>) -> Option<AuditThread> {
    if share.is_off() {
        return None;
    }
    let epoch = Box::new(move || valve.running_epoch());
    let source = Source { ram: setup.machine.ram().clone(), epoch };
    audit_disks(&setup.machine)
        .and_then(|disks| AuditThread::start(setup.totals.audit().clone(), source, disks, share))
        .inspect_err(|error| tracing::warn!(%error, "no audit"))
        .ok()
}

/// The disks that each host has an image of, and that the guest writes to.
fn audit_disks(machine: &Machine) -> io::Result<Vec<AuditDisk>> {
    let replicated = machine.disks().iter().filter(|disk| !disk.is_shared() && !disk.is_readonly());
    let of = |disk: &vm::Disk| {
        let (image, asked) = (disk.image().file().try_clone()?, Arc::downgrade(disk));
        let part_log = Box::new(move |offset, len, last| {
            asked.upgrade().map_or(PartLog::Lacks, |disk| disk.part_log(offset, len, last))
        });
        Ok(AuditDisk { index: disk.index(), bytes: disk.capacity_bytes(), image, part_log })
    };
    replicated.map(of).collect()
}

/// Why a VM that begins to run here is not protected yet.
fn unprotected_because(options: &ActiveOptions, checkpoint: u64) -> &'static str {
    match (options.standbys.is_empty(), checkpoint) {
        (true, 0) => "no --standby is given",
        (true, _) => "this host took the VM over, and has no --standby itself",
        (false, 0) => "no standby has been attached yet",
        (false, _) => "this host took the VM over, and its own standby is not attached yet",
    }
}

fn coordinate(launch: Launch) -> Result<End, CoordinateError> {
    let Launch {
        machine,
        machine_events,
        stops,
        identity,
        arbiter,
        place,
        watch: arbiter_watch,
        options,
        sidecars,
        events,
        stop,
        standing,
        uplink,
        books,
        since,
        last_host_ended,
        shelf,
        ..
    } = launch;
    let (queue, inbox) = inbox();
    let to = queue.clone();
    machine_events.connect(move |event| drop(to.send(Inbox::Machine(event))));
    let to = queue.clone();
    stops.connect(move |why| drop(to.send(Inbox::Stop(why))));
    let to = queue.clone();
    if let Some(uplink) = uplink {
        uplink.listen(move |sight| drop(to.send(Inbox::Network(sight.clone()))));
    }
    let clock = Clock::start();
    let timing = Timing::new(options.dead_after);
    let config = PrimaryConfig {
        generation: identity.generation,
        checkpoint: identity.checkpoint,
        handed: since.is_some(),
        standbys: options.standbys.len(),
        slots: limits::SLOTS,
        timing,
    };
    let hello = vm::hello(&machine, &identity, &options)?;
    let totals = Totals::new(identity.checkpoint);
    totals.set_generation(identity.generation);
    let counted = totals.clone();
    standing.runs_here(
        &identity.provenance.name,
        &identity.provenance.vm.to_string(),
        identity.generation,
        unprotected_because(&options, identity.checkpoint),
        move || counted.progress(),
    );
    standing.hands_over(&queue);
    let output = machine.net().map(|net| net.output().clone());
    if let Some(output) = &output {
        totals.counts_output(output);
    }
    let heat = Heat::new(&machine.ram().slots());
    totals.counts_heat(&heat);
    standing.heats(&heat);
    let measured = totals.clone();
    standing.measured_by(move || measured.running());
    let (errand, errands) = links::errands();
    let valve = machine.valve().clone();
    let ending = options.epochs.ending();
    if ending.follows_output() {
        let bell = queue.bell();
        valve.on_held(move || bell.ring());
    }
    let tail = machine.net().filter(|_| options.frame_tail.is_on());
    let tail = tail.map(|net| FrameTail { input: net.input_tail().clone(), output: net.output().clone() });
    let ports = Ports::new(hello, clock, valve.clone(), queue.clone(), errand, totals.clone())
        .copying(tail)
        .knowing(since)
        .watching(arbiter_watch.clone());
    let driver = SharedDriver::new(
        Primary::new(config, clock.now()),
        ports,
        clock,
        valve.clone(),
        queue.clone(),
        totals.clone(),
    );
    let plan = Plan {
        standbys: options.standbys.clone(),
        security: options.security(),
        vm: identity.provenance.vm,
        heartbeat: timing.heartbeat(),
        totals: totals.clone(),
        inbox: queue.clone(),
    };
    links::start(errands, &driver, plan).map_err(CoordinateError::NoThread)?;
    let mut end_notes = None;
    if let Some(arbiter) = arbiter {
        // The driver has the thread, so the thread must not keep the driver.
        let (told, events, watch) = (Arc::downgrade(&driver), events.clone(), arbiter_watch.clone());
        let owner = arbiter::owner("primary");
        // A thread that stands still in the middle of a drain lets nothing of the VM out any more, however many generations
        // this host wins. Whoever drains waits for it.
        let drained = valve.clone();
        let ready = move || drained.drain();
        let vm = identity.provenance.vm;
        let claims = ClaimWorker::start_after(ready, arbiter, vm, owner, move |result| {
            if let Some(watch) = watch.as_ref().filter(|_| !matches!(result.claim, Claim::Unreachable { .. }))
            {
                watch.answered();
            }
            if let Some(driver) = told.upgrade() {
                driver.claimed(result.generation, result.claim, &events);
            }
        });
        let claims = claims.map_err(CoordinateError::NoClaims)?;
        end_notes = Some(claims.end_notes());
        driver.set_claims(claims);
    }
    let watch_rivals = |place| rivals::watch(place, identity.provenance.vm, &driver, events.clone());
    let rivals = place.map(watch_rivals).transpose().map_err(CoordinateError::NoThread)?;
    watch(&driver, timing.dead_after, &events).map_err(CoordinateError::NoThread)?;
    let reporter = report(totals.clone(), output, events.clone())
        .inspect_err(|error| tracing::warn!(%error, "no statistics"))
        .ok();
    if stop {
        // The guest is asked first, as by any order to stop.
        queue.send(Inbox::Stop("told to stop before the takeover")).ok();
    }
    let replicated = vm::replicated(&machine);
    let start_sidecars = || {
        let image = |(disk, path): &(u16, PathBuf)| Image { disk: *disk, path: path.clone(), accepted: None };
        let images = replicated.iter().map(image).collect();
        Sidecars::with_shared(images, vm::shared(&machine), identity.provenance.clone()).map(Arc::new)
    };
    let sidecars = sidecars.map_or_else(start_sidecars, Ok).map_err(CoordinateError::NoThread)?;
    let setup = Setup {
        sidecars: sidecars.clone(),
        replicates_disks: !replicated.is_empty(),
        books,
        known: since.map(|_| Known::begin(machine.ram().pages())),
        shelf: (shelf.clone(), identity.provenance.vm),
        own_kernel: OwnKernel::new(queue.clone()),
        self_check: SelfCheck::new(options.self_check, &machine, queue),
        machine,
        driver,
        inbox,
        rivals,
        arbiter_watch,
        wants_protection: !options.standbys.is_empty() || identity.checkpoint > 0,
        took_over: (identity.checkpoint > 0).then(Instant::now),
        last_host_ended,
        // A host that gives no sign of life for this long counts as dead.
        stop_budget: options.dead_after,
        stop_within: options.stop_within,
        disk_timeout: options.disk_timeout.0,
        fences: options.fence.is_some(),
        policy: capture::policy(ending, options.max_dirty),
        staging_pages: options.max_dirty * 2,
        longest_pause: options.max_pause,
        totals,
        events,
        standing,
        reporter,
    };
    let audit = start_audit(&setup, options.audit, valve);
    let end = Coordinator::new(setup).run();
    match &end {
        // Like the machine (`Coordinator::run`): the end of the process waits for no thread.
        End::Failed(_) => std::mem::forget(audit),
        // It has a part in the VM's memory, which must be free when this returns.
        End::Primary(_) | End::Standby(_) => drop(audit),
    }
    // The machine is gone.
    shelf.prove();
    if let End::Primary(ExitReason::Ended(why)) = &end {
        sidecars.over(identity.generation, NOTE_PATIENCE);
        if let Some(notes) = end_notes {
            notes.note(&why.to_string(), NOTE_PATIENCE);
        }
    }
    Ok(end)
}
