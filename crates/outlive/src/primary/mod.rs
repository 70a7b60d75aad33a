//! The host where the VM runs: `outlive run`, and a standby after its takeover.

mod active;
mod base;
mod control;
mod devices;
mod disks;
mod guest;
mod launch;
mod self_check;
mod stats;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use outlive_epoch::VmId;
use outlive_machine::{DiskOptions, Host, MacAddr, Machine, NetConfig, Options, OutputLimits, OutputMode};

use crate::arbiter::{self, Arbiter, Claim};
use crate::cli::{DiskSpec, NetSpec, RunOptions};
use crate::console::{Console, Port};
use crate::events::{Event, EventWriter, Role};
use crate::network::{Netlink, NetlinkError};
use crate::{check, disk, exit, process};

pub(crate) use control::Inbox;
pub(crate) use devices::fixed_queues;
use guest::Guest;
pub(crate) use launch::{Identity, Launch, launch};

/// Frames and bytes of output that may be held for uncommitted epochs.
const OUTPUT_LIMITS: OutputLimits = OutputLimits { frames: 16_384, bytes: 16 << 20 };

/// `outlive run`: returns the exit code.
pub fn command(options: &RunOptions) -> u8 {
    match prepare(options) {
        Ok(launching) => launch(launching),
        Err(line) => exit::usage(line),
    }
}

/// Everything that can be wrong with options or machine is found here, before the guest runs. The error is
/// one line that names the remedy; everything made so far goes away with it. The arbiter is written to last,
/// because a generation that was won stays won.
fn prepare(options: &RunOptions) -> Result<Launch, String> {
    let active = &options.active;
    check_memory(options.memory_bytes())?;
    let vm = VmId(process::random().map_err(no_random)?);
    let written: Vec<&Path> =
        options.disks.iter().filter(|d| !d.readonly && !d.shared).map(|d| d.path.as_path()).collect();
    disk::for_run(&written)?;
    let others: Vec<&Path> =
        options.disks.iter().filter(|d| d.readonly || d.shared).map(|d| d.path.as_path()).collect();
    disk::refuse_unfinished(&others)?;
    let (queue, inbox) = channel();
    let mac = mac_of(options.net.as_ref(), vm);
    let guest = Guest::read(options)?;
    let told = queue.clone();
    let console = Console::open(active.console.as_ref(), move |why| drop(told.send(Inbox::Stop(why))))?;
    let console = Arc::new(console);
    let mut machine = make_machine(options, &guest, mac, &console, queue.clone())?;
    guest.load(&mut machine)?;
    // Opening the arbiter and the event stream may make files, so nothing that is likely to fail comes after
    // them.
    let mut arbiter =
        options.arbiter.as_deref().map(arbiter::parse).transpose().map_err(|e| e.to_string())?;
    if let Some(arbiter) = &mut arbiter {
        disk::check_generation(&written, arbiter.as_mut())?;
    }
    let events = open_events(active.events.as_deref())?;
    let stop = queue.clone();
    process::on_stop(active.exit_with_stdin, move |why| drop(stop.send(Inbox::Stop(why))))
        .map_err(|e| format!("cannot watch signals: {e}"))?;
    let mut arbiter = arbiter.map(|arbiter| first_generation(arbiter, vm)).transpose()?;
    if let Some(arbiter) = &mut arbiter {
        disk::end_earlier_vms(&written, arbiter.as_mut())?;
    }
    let mut marked = disks::replicated(&machine);
    // Without an arbiter nobody asks for a generation, but what an earlier VM left would be wrong from here
    // on.
    marked.retain(|(_, path)| arbiter.is_some() || disk::has_sidecar(path));
    disk::mark_primary(&marked, vm, 1)?;
    events.emit(Event::Started {
        role: Role::Primary,
        vm: Some(options.name.clone()),
        vcpus: Some(options.vcpus.into()),
        memory: Some(options.memory_bytes()),
        tracker: Some(machine.tracker().kind().to_string()),
    });
    machine.go_live(false);
    machine.resume();
    if machine.net().is_none() {
        tracing::warn!("no --net: the VM has no network card, nobody can reach it");
    }
    let tracker = machine.tracker().kind();
    tracing::info!(vm = %vm, name = %options.name, %tracker, "VM started, unprotected");
    let identity = Identity {
        vm,
        name: options.name.clone(),
        vcpus: options.vcpus,
        mac: options.net.as_ref().map(|_| mac),
        devices: devices::of(&machine, options, guest.is_linux()),
        generation: 1,
        checkpoint: 0,
    };
    let options = active.clone();
    Ok(Launch { machine, queue, inbox, identity, arbiter, options, events, stop: None, console })
}

/// The machine with its card on its bridge.
fn make_machine(
    options: &RunOptions,
    guest: &Guest,
    mac: MacAddr,
    console: &Console,
    queue: Sender<Inbox>,
) -> Result<Machine, String> {
    let host = Arc::new(Host::open().map_err(|e| e.to_string())?);
    let machine_options = Options {
        vcpus: options.vcpus,
        memory: options.memory_bytes(),
        firmware_bytes: guest.firmware_bytes(),
        net: options.net.as_ref().map(|net| card(net, mac, OutputMode::PassThrough)),
        disks: options.disks.iter().map(disk_options).collect(),
        rng: guest.is_linux(),
        console: guest.is_linux().then(|| console.end(Port::Hvc0)),
        serial: guest.is_linux().then(|| console.end(Port::Serial)),
        tracker: options.active.tracker.into(),
        trigger: options.active.max_dirty,
        max_dirty: options.active.max_dirty * 2,
        events: Arc::new(move |event| drop(queue.send(Inbox::Machine(event)))),
    };
    let machine = Machine::new(host, &machine_options).map_err(|e| e.to_string())?;
    join_bridge(options.net.as_ref())?;
    Ok(machine)
}

fn no_random(error: std::io::Error) -> String {
    format!("this host has no random numbers (/dev/urandom): {error}")
}

/// Refuses a VM that this host has no memory for.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn check_memory(bytes: u64) -> Result<(), String> {
    outlive_machine::ranges(bytes).map_err(|e| e.to_string())?;
    match check::available_memory_bytes() {
        Some(available) if bytes > available => Err(format!(
            "a VM with {} MiB of memory does not fit: this host has {} MiB available; give it less with --memory",
            bytes >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// Refuses to start protection when its buffers would take more than half of what this host has left: the VM
/// itself must not be the victim.
fn check_staging(pages: usize, disk_bytes: usize, buffers: u64) -> Result<(), String> {
    // One buffer for disk writes more: the one that is being filled.
    let bytes =
        pages as u64 * outlive_machine::PAGE_SIZE as u64 * buffers + disk_bytes as u64 * (buffers + 1);
    match check::available_memory_bytes() {
        Some(available) if bytes > available / 2 => Err(format!(
            "protection needs {} MiB for checkpoints on their way and this host has {} MiB available; lower --max-dirty",
            bytes >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// Opens the event stream of an option.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn open_events(path: Option<&std::path::Path>) -> Result<EventWriter, String> {
    match path {
        None => Ok(EventWriter::disabled()),
        Some(path) => EventWriter::open(path).map_err(|e| {
            format!("cannot write events to {}: {e}; give --events another file", path.display())
        }),
    }
}

/// A network card's options.
pub(crate) fn card(net: &NetSpec, mac: MacAddr, output: OutputMode) -> NetConfig {
    NetConfig { tap: net.tap.clone(), mac, pairs: net.queues.into(), limits: OUTPUT_LIMITS, output }
}

/// A disk's options.
fn disk_options(spec: &DiskSpec) -> DiskOptions {
    let DiskSpec { path, readonly, shared, serial, queues } = spec.clone();
    DiskOptions { readonly, shared, serial, queues: queues.into(), ..DiskOptions::new(path) }
}

/// The card's address: the one asked for, or one made of the VM's id (locally administered, so it collides
/// with no vendor's).
pub(crate) fn mac_of(net: Option<&NetSpec>, vm: VmId) -> MacAddr {
    let [a, b, c, d, e, ..] = vm.0;
    MacAddr(net.and_then(|n| n.mac).unwrap_or([0x02, a, b, c, d, e]))
}

/// Sets the tap up and puts it on its bridge.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn join_bridge(net: Option<&NetSpec>) -> Result<(), String> {
    let Some(net) = net else { return Ok(()) };
    let text = |e: NetlinkError| e.to_string();
    let mut netlink = Netlink::open().map_err(text)?;
    let tap = netlink.link(&net.tap).map_err(text)?;
    // What an administrator has set up already needs no right of ours.
    if let Some(bridge) = &net.bridge
        && !(tap.bridge.is_some() && tap.bridge == netlink.index(bridge).ok())
    {
        netlink.attach(&net.tap, bridge).map_err(text)?;
    }
    if tap.up { Ok(()) } else { netlink.set_up(&net.tap).map_err(text) }
}

/// Wins generation 1 of a new VM. That the arbiter can be written is so known before the first client trusts
/// the VM.
fn first_generation(mut arbiter: Box<dyn Arbiter>, vm: VmId) -> Result<Box<dyn Arbiter>, String> {
    match arbiter.claim(&arbiter::VmId(vm.0), 1, &arbiter::owner("primary")) {
        Claim::Won => Ok(arbiter),
        Claim::Lost { owner } => {
            Err(format!("the arbiter says that this new VM belongs to {owner}: start again"))
        }
        Claim::Unreachable { why } => Err(format!("the arbiter cannot be used: {why}")),
    }
}
