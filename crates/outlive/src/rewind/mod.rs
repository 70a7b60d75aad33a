//! `outlive rewind`: a VM as it was at a moment that a standby has recorded, as a new VM.
//!
//! ```text
//! folder.rs  the directory of its images: whole, or not there
//! copy.rs    from the record's disks to its images, without the holes
//! play.rs    from the record's base to the moment: memory, images, state
//! ```
//!
//! The old VM may run meanwhile, here or elsewhere, and its standby may go on recording. Nothing of either is touched: the
//! record is opened for reading, and the new VM has an id of its own, no arbiter, and images that say so
//! ([`descendant`](disk::descendant)). Its card is connected to nothing unless an operator says otherwise.
//!
//! What can be refused is refused before the disks are copied, which may take long.

mod copy;
mod error;
mod folder;
mod play;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use outlive_epoch::{DeviceInfo, DeviceKind, Hello, Wiring};
use outlive_machine::{DiskOptions, Host, MacAddr, Machine, MachineEvent, NetConfig, OutputMode, Ram};
use outlive_record::{Found, Playback, Record};

use crate::cli::{ActiveOptions, NetSpec, RewindOptions};
use crate::console::Console;
use crate::disk::{self, Books, Newborn, Provenance};
use crate::events::{self, Event, Role};
use crate::status::{self, Standing};
use crate::vm::{self, Board, CannotResume, Fitting, Identity, Launch, Relay, Stops, disks_of};
use crate::{sandbox, ui};

use copy::{CopyError, copy};
pub(crate) use error::RewindError;
pub(crate) use folder::{Folder, FolderError};
use play::Moving;

/// Behind the name of a VM whose past runs beside it.
const REWOUND: &str = "-rewound";
/// The longest name.
const NAME: usize = 64;

/// A moment of a record that this host can make a VM of, as far as that is known without one.
struct Past {
    playback: Playback,
    found: Found,
    board: Board,
    host: Arc<Host>,
}

impl Past {
    /// Finds the moment, and looks whether its VM can run here.
    fn find(options: &RewindOptions) -> Result<Self, RewindError> {
        let record = Record::open(&options.record)?;
        let found = record.find(&options.to.at(SystemTime::now()));
        let found = found.map_err(|source| RewindError::Find { source, record: options.record.clone() })?;
        let playback = record.play(&found)?;
        let run = record.runs().iter().find(|run| run.number() == found.run);
        if let Some(why) = run.filter(|run| run.is_suspect()).and_then(|run| run.ended()) {
            tracing::warn!("this moment may not be what the VM was: {}", outlive_node::shown_in_line(why));
        }
        let hello = playback.hello();
        vm::check_host(hello)?;
        let board = Board::of(hello)?;
        if options.net.is_some() && board.card.is_none() {
            return Err(RewindError::NoCard);
        }
        let without = disks_of(hello).zip(0..).find(|(_, disk)| playback.disk(*disk).is_none());
        if let Some((_, disk)) = without {
            return Err(RewindError::NoDisk(disk));
        }
        Ok(Self { found, board, host: Arc::new(Host::open()?), playback })
    }

    /// What it is, for a person.
    fn words(&self) -> String {
        let (hello, found) = (self.playback.hello(), &self.found);
        let ago = SystemTime::now().duration_since(found.time).unwrap_or_default();
        format!(
            "VM {} ({}) as of checkpoint {}, {} ({} ago)",
            hello.name,
            hello.vm,
            found.checkpoint,
            humantime::format_rfc3339_millis(found.time),
            status::span(ago.as_millis() as u64 / 1000 * 1000)
        )
    }

    /// Looks whether the processor has what the guest has seen of one.
    fn try_processor(&self, console: &Console, active: &ActiveOptions) -> Result<(), RewindError> {
        /// The least that a machine has.
        const LITTLE: u64 = 32 << 20;
        let alone = Hello {
            memory_bytes: LITTLE,
            firmware_bytes: 0,
            devices: Vec::new(),
            mac: None,
            ..self.playback.hello().clone()
        };
        let (card, disks, events) = (None, Vec::new(), Arc::new(Relay::<MachineEvent>::new().sender()));
        let fitting = Fitting { output: OutputMode::Discard, card, disks, console, active, events };
        vm::machine(self.host.clone(), &alone, Board::default(), fitting, None)?;
        Ok(())
    }

    /// The card's end of the wire, if it has a card.
    fn card(&self, net: Option<&NetSpec>) -> Result<Option<NetConfig>, RewindError> {
        let Some(seen) = self.board.card else { return Ok(None) };
        let mac = MacAddr(self.playback.hello().mac.unwrap_or_default());
        let Some(net) = net else { return Ok(Some(vm::card_without_network(seen, mac))) };
        let wiring = Wiring { vlan: net.vlan, ..seen.wiring };
        let tap = vm::open_card(net, seen.pairs, wiring)?;
        Ok(Some(NetConfig { pairs: seen.pairs, mtu: seen.wiring.mtu, ..vm::card(net, tap, mac) }))
    }
}

/// What is asked for without being made.
///
/// # Errors
/// See [`RewindError`].
pub(crate) fn dry_run(options: &RewindOptions) -> Result<(), RewindError> {
    let past = Past::find(options)?;
    let console = Console::open(None, |_| {})?;
    past.try_processor(&console, &options.active())?;
    let hello = past.playback.hello();
    let mut out = outlive_node::printed();
    let disks: Vec<_> = disks_of(hello).map(|disk| format!("{} MiB", disk.size >> 20)).collect();
    let disks =
        if disks.is_empty() { "no disks".to_owned() } else { format!("disks of {}", disks.join(", ")) };
    writeln!(out, "{}", past.words())?;
    writeln!(
        out,
        "  {} vCPUs, {} MiB of memory, {disks}: it can run here",
        hello.vcpus,
        hello.memory_bytes >> 20
    )?;
    Ok(())
}

/// Makes the VM and starts it. An error undoes everything made so far.
///
/// # Errors
/// See [`RewindError`].
pub(crate) fn start(
    options: &RewindOptions,
    active: ActiveOptions,
    mut folder: Folder,
    standing: Arc<Standing>,
    stops: Stops,
) -> Result<Launch, RewindError> {
    let mut past = Past::find(options)?;
    let words = past.words();
    standing.now("the VM is being made as it was");
    tracing::info!("making {words}");
    let console = Arc::new(Console::open(active.console.as_ref(), stops.sender())?);
    past.try_processor(&console, &active)?;
    let card = past.card(options.net.as_ref())?;
    let uplink = vm::watch_uplink(options.net.as_ref(), &active)?;
    let hello = past.playback.hello().clone();
    let name = options.name.clone().unwrap_or_else(|| rewound(&hello.name));
    let provenance = disk::descendant(&hello, past.found.generation, name).map_err(RewindError::NoRandom)?;

    let goes_on = || !stops.was_used();
    let disks = copy_disks(&past.playback, &mut folder, &goes_on)?;
    let ram = Ram::with_firmware(hello.memory_bytes, hello.firmware_bytes, active.max_dirty * 2)?;
    let ram = Arc::new(ram);
    vm::check_layout(&ram, &hello)?;
    play::fill(&ram, &hello.layout, past.playback.memory(), &goes_on)?;
    let mut moving = Moving::new(&ram, &disks, hello.limits.max_state_bytes);
    let bar = ui::checkpoints_bar(past.found.checkpoint);
    moving.play(&mut past.playback, &goes_on, &|number| bar.set_position(number))?;
    bar.finish_and_clear();
    let state = moving.state;
    let images = name_images(&folder, &disks, &hello, &provenance)?;
    drop(disks);

    let machine_events = Relay::new();
    let fitting = Fitting {
        output: OutputMode::PassThrough,
        card,
        disks: images,
        console: &console,
        active: &active,
        events: Arc::new(machine_events.sender()),
    };
    let mut machine = vm::machine(past.host.clone(), &hello, past.board, fitting, Some(ram))?;
    let (constants, sections) = state.parts();
    // No time has passed for the guest. A register that this host does not keep is a refusal: nothing is lost by it.
    machine.try_restore(constants, &sections).map_err(CannotResume)?;

    let events = events::open(&active.events_to())?;
    events.emit(Event::Confined { sandbox: sandbox::is_on() });
    standing.tells(&events);
    if let Some(uplink) = &uplink {
        standing.uplink(uplink);
    }
    if stops.was_used() {
        return Err(RewindError::Stopped);
    }
    folder.keep();
    let identity = identity(provenance, &hello, options.net.as_ref());
    events.of_vm(&identity.provenance.name, &identity.provenance.vm.to_string());
    say(&words, &identity.provenance, &hello, past.found, &events, options.net.as_ref());
    say_started(&machine, &identity, &events);
    machine.go_live(true);
    machine.resume();
    Ok(Launch {
        machine,
        machine_events,
        stops,
        identity,
        arbiter: None,
        place: None,
        watch: None,
        options: active,
        sidecars: None,
        events,
        stop: false,
        console,
        uplink,
        standing,
        books: Books::default(),
        since: None,
        last_host_ended: false,
        shelf: vm::Shelf::default(),
    })
}

/// The name of the new VM where none is given.
pub(crate) fn rewound(name: &str) -> String {
    match name.ends_with(REWOUND) {
        true => name.to_owned(),
        false => format!("{}{REWOUND}", &name[..name.floor_char_boundary(NAME - REWOUND.len())]),
    }
}

/// Copies the disks as the record's base has them, each to an image without its name.
fn copy_disks(
    playback: &Playback,
    folder: &mut Folder,
    goes_on: &dyn Fn() -> bool,
) -> Result<Vec<File>, RewindError> {
    let mut copies = Vec::new();
    for (info, disk) in disks_of(playback.hello()).zip(0..) {
        let original = playback.disk(disk).ok_or(RewindError::NoDisk(disk))?;
        let made = folder.add(info.size)?;
        let bar = ui::bytes_bar("copying disks", info.size);
        copy(original, &made, info.size, goes_on, &bar).map_err(|source| match source {
            CopyError::Stopped => RewindError::Stopped,
            source => RewindError::Copy { disk, source: source.into() },
        })?;
        copies.push(made);
    }
    Ok(copies)
}

/// Gives the images their names, with sidecars that say whose they are. Returns the disks on them.
fn name_images(
    folder: &Folder,
    files: &[File],
    hello: &Hello,
    provenance: &Provenance,
) -> Result<Vec<DiskOptions>, RewindError> {
    let locked = folder.finish(files, |images: &[PathBuf], now: &[PathBuf]| {
        let all = disks_of(hello).zip(0..).zip(images.iter().zip(now));
        // A sidecar is of what the VM writes to.
        let written = all.filter(|((info, _), _)| !info.flags.read_only);
        let newborn =
            written.map(|((_, disk), (image, now))| Newborn { disk, image: image.clone(), now: now.clone() });
        disk::write_sidecars(&newborn.collect::<Vec<_>>(), provenance).map_err(RewindError::from)
    })?;
    let disk = |(info, image): (&DeviceInfo, outlive_machine::LockedImage)| {
        let of_file = DiskOptions::new(image.path());
        // A disk that is only read has no such lock.
        let locked = (!info.flags.read_only).then_some(image);
        vm::as_introduced(info, DiskOptions { locked, ..of_file })
    };
    Ok(disks_of(hello).zip(locked).map(disk).collect())
}

/// Who the new VM is.
fn identity(provenance: Provenance, hello: &Hello, net: Option<&NetSpec>) -> Identity {
    let wired = |device: &DeviceInfo| match device.kind {
        DeviceKind::Net => {
            let vlan = net.and_then(|net| net.vlan);
            DeviceInfo { wiring: Wiring { vlan, ..device.wiring }, ..device.clone() }
        }
        _ => device.clone(),
    };
    Identity {
        provenance,
        vcpus: hello.vcpus as u8,
        mac: hello.mac.map(MacAddr),
        devices: hello.devices.iter().map(wired).collect(),
        generation: 1,
        checkpoint: 0,
    }
}

/// Says what this VM is, so that nobody takes it for the old one.
fn say(
    words: &str,
    new: &Provenance,
    old: &Hello,
    found: Found,
    events: &events::EventWriter,
    net: Option<&NetSpec>,
) {
    tracing::warn!(
        "REWOUND: this is {words}, as a NEW VM {} ({}); the old VM, its images and the record are untouched",
        new.name,
        new.vm
    );
    match (net, old.mac) {
        (Some(net), Some(mac)) => tracing::warn!(
            tap = net.tap,
            "the VM's card has the old VM's address {}: if that one still runs in this network, their packets get mixed up",
            MacAddr(mac)
        ),
        (None, Some(_)) => tracing::info!("the VM's network card is connected to nothing; --net connects it"),
        (_, None) => {}
    }
    events.emit(Event::Rewound {
        from: old.vm.to_string(),
        run: found.run,
        generation: found.generation,
        checkpoint: found.checkpoint,
        at: humantime::format_rfc3339_micros(found.time).to_string(),
    });
}

fn say_started(machine: &Machine, identity: &Identity, events: &events::EventWriter) {
    let memory = machine.ram().bytes();
    let tracker = machine.tracker().kind();
    events.emit(Event::Started {
        role: Role::Primary,
        vm: Some(identity.provenance.name.clone()),
        vcpus: Some(identity.vcpus.into()),
        memory: Some(memory),
        tracker: Some(tracker.to_string()),
    });
    let disks: Vec<_> = machine.disks().iter().map(|it| it.image().path().display().to_string()).collect();
    tracing::info!(
        vm = %identity.provenance.vm,
        name = %identity.provenance.name,
        vcpus = identity.vcpus,
        memory_mib = memory >> 20,
        disks = disks.join(","),
        %tracker,
        "VM started, unprotected"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rewound_vm_has_a_name_of_its_own() {
        assert_eq!(rewound("web"), "web-rewound");
        assert_eq!(rewound("web-rewound"), "web-rewound");
        let long = "x".repeat(64);
        assert_eq!(rewound(&long).len(), 64);
        assert!(rewound(&long).ends_with("x-rewound"));
        assert_eq!(rewound(&"ü".repeat(32)).len(), 64);
    }

    #[test]
    fn the_new_vm_is_nobodys_standby_and_in_the_network_that_it_was_given() {
        let wiring = Wiring { mtu: Some(9000), vlan: Some(7) };
        let card = DeviceInfo { wiring, ..DeviceInfo::new(DeviceKind::Net, 2) };
        let disk = DeviceInfo { size: 4096, ..DeviceInfo::new(DeviceKind::Disk, 1) };
        let hello =
            Hello { devices: vec![card, disk.clone()], mac: Some([2; 6]), ..crate::primary::test_hello() };
        let new = || disk::descendant(&hello, 3, "new".into()).unwrap();
        let vlan = |net: Option<&NetSpec>| {
            let identity = identity(new(), &hello, net);
            assert_eq!((identity.generation, identity.checkpoint), (1, 0));
            assert_eq!((identity.mac, &identity.devices[1]), (Some(MacAddr([2; 6])), &disk));
            assert_eq!((identity.devices[0].wiring.mtu, identity.devices[0].queues), (Some(9000), 2));
            identity.devices[0].wiring.vlan
        };
        assert_eq!(vlan(None), None);
        assert_eq!(vlan(Some(&"tap=t,bridge=b,vlan=9".parse().unwrap())), Some(9));
    }
}
