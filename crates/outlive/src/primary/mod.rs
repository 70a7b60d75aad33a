//! The host where the VM runs: `outlive run`, and a standby after its takeover.

mod ask;
mod base;
mod behind;
mod brake;
mod broken;
mod capture;
mod converge;
mod coordinator;
mod disks;
mod driver;
mod elsewhere;
mod hand_over;
mod hold;
mod inbox;
mod known;
mod launch;
mod links;
mod notes;
mod own_kernel;
mod pool;
mod ports;
mod reminder;
mod restarts;
mod rivals;
mod self_check;
mod shared_disks;
mod stats;
mod strays;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;

use outlive_machine::{CreateError, Host, HostError, MacAddr, Machine, MachineEvent, Options, OutputMode};

use crate::arbiter::{self, Arbiter, ArbiterSpecError, Here, Watch};
use crate::cli::{ActiveOptions, RunOptions};
use crate::console::{Console, ConsoleError, Port};
use crate::disk::{self, Accepted, Books, Held, PrepareError, Start};
use crate::events::{self, Event, EventWriter, EventsError, Role};
use crate::standby::{About, Stop, fence};
use crate::status::Standing;
use crate::vm::{
    self, CardError, Guest, GuestError, Identity, Launch, LoadError, Relay, Remedied, Stops, UplinkError,
    VmMemoryError,
};
use crate::{notify, sandbox};

pub(crate) use ask::{Answer, ask};
pub(crate) use elsewhere::Elsewhere;
pub(crate) use hand_over::{HandOverError, Waiting, ask as ask_to_hand_over};
pub(crate) use inbox::Queue;
pub(crate) use launch::run;
#[cfg(test)]
pub(crate) use stats::Totals;
#[cfg(test)]
pub(crate) use tests::hello as test_hello;

/// Why a VM cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// It cannot have its memory here.
    #[error(transparent)]
    Memory(#[from] VmMemoryError),
    /// Its images cannot be used.
    #[error(transparent)]
    Images(#[from] PrepareError),
    /// The option `--arbiter` is wrong.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// No VM starts from these images.
    #[error(transparent)]
    Plan(#[from] disk::StartError),
    /// Another host has the VM.
    #[error(transparent)]
    Elsewhere(#[from] Elsewhere),
    /// There is nothing to boot.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// There is no console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The machine cannot be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Nobody could watch the way to the clients.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// There is no event stream.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// Nobody would watch the arbiter.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
    /// An operator wants it so.
    #[error(
        "told to stop before the VM was started: it has not run here; if it waited for its fencing, the next start goes \
         on with that"
    )]
    Stopped,
}

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// This host cannot run any.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It has no card here.
    #[error(transparent)]
    Card(#[from] CardError),
    /// It cannot be as the options say.
    #[error(transparent)]
    Create(#[from] Remedied<CreateError>),
}

/// Starts a new VM, whose machine gets the images that are `held`. Everything that can be wrong with options or
/// machine is found here, before the guest runs; an error undoes everything made so far. The arbiter is written
/// to last, because a won generation stays won.
///
/// # Errors
/// See [`StartError`].
pub(crate) fn start(
    options: &RunOptions,
    held: &Held,
    standing: Arc<Standing>,
    stops: Stops,
) -> Result<Launch, StartError> {
    let active = &options.active;
    vm::check_memory(options.memory_bytes())?;
    let written = options.written();
    let paths: Vec<&Path> = written.iter().map(|(_, path)| *path).collect();
    disk::for_run(&paths, held)?;
    let others: Vec<&Path> =
        options.disks.iter().filter(|d| d.readonly || d.shared).map(|d| d.path.as_path()).collect();
    disk::refuse_unfinished(&others)?;
    let shared = options.shared();
    disk::refuse_shared_in_use(&shared)?;
    // Without an arbiter no other host takes it over.
    vm::warn_unfenced(!shared.is_empty() && options.arbiter.is_some(), active);
    let mut arbiter = options.arbiter.as_deref().map(arbiter::parse).transpose()?;
    let plan = |arbiter: &mut Option<Box<dyn Arbiter>>| {
        let (name, accept) = (options.name.as_deref(), options.accept.dangers());
        Start::plan(&written, &shared, arbiter.as_deref_mut(), name, &accept)
    };
    let mut start = plan(&mut arbiter)?;
    elsewhere::look(&start, &active.standbys, &active.security())?;
    let vm = start.provenance.vm;
    let machine_events = Relay::new();
    let guest = Guest::read(options, held, &stops);
    if guest.is_err() && stops.was_used() {
        return Err(StartError::Stopped);
    }
    let guest = guest?;
    let built_in = (!guest.is_linux()).then_some(options.ip.address);
    let mac = vm::mac_of(options.net.as_ref(), vm, built_in);
    let console = Arc::new(Console::open(active.console.as_ref(), stops.sender())?);
    let mut machine = make_machine(options, held, &guest, mac, &console, &machine_events)?;
    guest.load(&mut machine)?;
    let uplink = vm::watch_uplink(options.net.as_ref(), active)?;
    // Opening the event stream may make a file, so everything that is likely to fail comes before.
    let events = events::open(&active.events_to())?;
    events.emit(Event::Confined { sandbox: sandbox::is_on() });
    standing.tells(&events);
    if let Some(uplink) = &uplink {
        standing.uplink(uplink);
    }
    events.of_vm(&start.provenance.name, &vm.to_string());
    // Before the fencing, which may take long: `outlive status` tells of the arbiter.
    let watch = arbiter
        .as_ref()
        .map(|arbiter| Watch::start(arbiter.as_ref(), events.clone(), Here::Runs).map(Arc::new));
    let watch = watch.transpose().map_err(StartError::NoThread)?;
    if let Some(watch) = &watch {
        standing.watch(watch);
    }
    let begin = |start: &Start, arbiter: &mut Option<Box<dyn Arbiter>>| {
        // A guest that has not run need not be asked to shut down.
        if !fence_earlier(start, active, &events, &standing, &stops) || stops.was_used() {
            return Err(StartError::Stopped);
        }
        Ok(start.carry_out(&vm::replicated(&machine), arbiter.as_deref_mut())?)
    };
    match begin(&start, &mut arbiter) {
        // Perhaps by an earlier process that had this very image, and whose claim landed only after its death.
        // If so, the second look at the arbiter tells; if not, its error names the winner.
        Err(taken_over @ StartError::Plan(disk::StartError::TakenOver { .. })) => {
            start = plan(&mut arbiter)?;
            // A fork would be another VM than the one that the machine was made for.
            if start.provenance.vm != vm {
                return Err(taken_over);
            }
            begin(&start, &mut arbiter)?;
        }
        begun => begun?,
    }
    if let Guest::OfDisk(read) = &guest {
        own_kernel::say(read, &events);
    }
    for Accepted { danger, about, .. } in start.accepted() {
        tracing::warn!(?danger, "ACCEPTED: {about}");
        events.emit(Event::Accepted { danger: *danger, about: about.clone() });
    }
    events.emit(Event::Started {
        role: Role::Primary,
        vm: Some(start.provenance.name.clone()),
        vcpus: Some(options.vcpus.into()),
        memory: Some(options.memory_bytes()),
        tracker: Some(machine.tracker().kind().to_string()),
    });
    // The network may still know the VM at the host where it ran last, and a guest need not send anything.
    machine.go_live(true);
    machine.resume();
    if machine.net().is_none() {
        tracing::warn!("no --net: the VM has no network card, so nobody can reach it");
    }
    let tracker = machine.tracker().kind();
    let disks: Vec<_> = options.disks.iter().map(|disk| disk.path.display().to_string()).collect();
    tracing::info!(
        vm = %vm,
        name = %start.provenance.name,
        vcpus = options.vcpus,
        memory_mib = options.memory_bytes() >> 20,
        disks = disks.join(","),
        mac = options.net.as_ref().map(|_| mac.to_string()),
        %tracker,
        "VM started, unprotected"
    );
    let identity = Identity {
        provenance: start.provenance,
        vcpus: options.vcpus,
        mac: options.net.as_ref().map(|_| mac),
        devices: vm::devices(&machine, options, guest.is_linux()),
        generation: start.generation,
        checkpoint: 0,
    };
    let place = options.arbiter.clone();
    let options = active.clone();
    let (sidecars, stop) = (None, false);
    Ok(Launch {
        machine,
        machine_events,
        stops,
        identity,
        arbiter,
        place,
        watch,
        options,
        sidecars,
        events,
        stop,
        console,
        uplink,
        standing,
        books: Books::default(),
        since: None,
        last_host_ended: false,
        shelf: vm::Shelf::default(),
    })
}

/// Fences off the host that an earlier process of this one took over from, if nobody knows whether that was done.
/// Comes before the images become the VM's own: a process that is killed meanwhile must fence after its restart, too.
/// Returns false if the operator wants this process to end meanwhile: nothing is lost by that.
fn fence_earlier(
    start: &Start,
    active: &ActiveOptions,
    events: &EventWriter,
    standing: &Standing,
    stops: &Stops,
) -> bool {
    let Some((generation, command)) = start.unfenced().zip(active.fence()) else { return true };
    let peer = active.standbys.first().cloned().unwrap_or_default();
    let vm = start.provenance.vm.to_string();
    let about = About { name: start.provenance.name.clone(), vm, generation, peer };
    // The command has no time limit, but the start of a service has one.
    notify::ready();
    fence(&command, &about, events, standing, || if stops.was_used() { Stop::Now } else { Stop::No })
}

/// Makes the machine and attaches its card to the bridge.
fn make_machine(
    options: &RunOptions,
    held: &Held,
    guest: &Guest,
    mac: MacAddr,
    console: &Console,
    machine_events: &Relay<MachineEvent>,
) -> Result<Machine, MachineError> {
    let host = Arc::new(Host::open()?);
    let card = |net| vm::open_card(net, net.queues.into(), net.wiring()).map(|tap| vm::card(net, tap, mac));
    let machine_options = Options {
        vcpus: options.vcpus,
        memory: options.memory_bytes(),
        firmware_bytes: guest.firmware_bytes(),
        output: OutputMode::PassThrough,
        net: options.net.as_ref().map(card).transpose()?,
        disks: options.disks.iter().map(|disk| vm::disk_options(disk, held)).collect(),
        rng: guest.is_linux(),
        console: guest.is_linux().then(|| console.end(Port::Hvc0)),
        serial: guest.is_linux().then(|| console.end(Port::Serial)),
        tracker: options.active.tracker.into(),
        trigger: options.active.max_dirty,
        max_dirty: options.active.max_dirty * 2,
        events: Arc::new(machine_events.sender()),
    };
    Ok(Machine::new(host, &machine_options).map_err(Remedied)?)
}
