//! A VM as a primary has introduced it: the machine that it needs, and whether this host can be that. A standby makes its
//! copy from it, and a rewind the VM as it was.
//!
//! The list of devices decides alone: none is guessed from the kind of guest.

use std::sync::Arc;

use outlive_epoch::{DeviceInfo, DeviceKind, Hello, Wiring};
use outlive_machine::{
    CreateError, DiskOptions, EventSink, Host, Machine, NetConfig, Options, OutputMode, Ram, RestoreError,
    SectorSize,
};

use super::{VmMemoryError, check_memory, fixed_queues};
use crate::cli::ActiveOptions;
use crate::console::{Console, Port};
use crate::process;

/// What a network card must be like, because the guest has seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    /// Queue pairs.
    pub(crate) pairs: u16,
    /// How it is connected.
    pub(crate) wiring: Wiring,
}

/// Which devices a machine must have, besides its disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Board {
    /// The network card, if there is one.
    pub(crate) card: Option<Card>,
    /// A source of random numbers.
    pub(crate) rng: bool,
    /// A console.
    pub(crate) console: bool,
    /// A serial port.
    pub(crate) serial: bool,
}

/// Another release has other devices, or another order of them.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("this release builds no machine with these devices ({list}; {mac} network address)")]
pub(crate) struct UnknownDevices {
    list: String,
    mac: &'static str,
}

impl UnknownDevices {
    fn of(hello: &Hello) -> Self {
        let describe = |it: &DeviceInfo| format!("{:?} with {} queues", it.kind, it.queues);
        let list: Vec<String> = hello.devices.iter().map(describe).collect();
        let mac = if hello.mac.is_some() { "a" } else { "no" };
        Self { list: list.join(", "), mac }
    }
}

impl Board {
    /// Checks that a machine of this release can have these devices in this order: a card, disks, and one of each
    /// other kind.
    ///
    /// # Errors
    /// See [`UnknownDevices`].
    pub(crate) fn of(hello: &Hello) -> Result<Self, UnknownDevices> {
        let mut board = Self::default();
        let mut last = None;
        for DeviceInfo { kind, queues, wiring, .. } in &hello.devices {
            let follows = last
                .is_none_or(|last| last < *kind as u8 || *kind == DeviceKind::Disk && last == *kind as u8);
            let fits = fixed_queues(*kind).is_none_or(|fixed| fixed == *queues);
            if !follows || !fits {
                return Err(UnknownDevices::of(hello));
            }
            last = Some(*kind as u8);
            match kind {
                DeviceKind::Net => board.card = Some(Card { pairs: *queues, wiring: *wiring }),
                DeviceKind::Disk => {}
                DeviceKind::Rng => board.rng = true,
                DeviceKind::Console => board.console = true,
                DeviceKind::Serial => board.serial = true,
            }
        }
        if board.card.is_some() == hello.mac.is_some() { Ok(board) } else { Err(UnknownDevices::of(hello)) }
    }
}

/// The VM's disks, in their order.
pub(crate) fn disks_of(hello: &Hello) -> impl Iterator<Item = &DeviceInfo> {
    hello.devices.iter().filter(|device| device.kind == DeviceKind::Disk)
}

/// What the guest has seen of a disk, on an image here, which may differ from the primary's in everything else.
pub(crate) fn as_introduced(info: &DeviceInfo, image: DiskOptions) -> DiskOptions {
    DiskOptions {
        readonly: info.flags.read_only,
        shared: info.flags.shared,
        serial: (!info.serial.is_empty()).then(|| info.serial.clone()),
        sectors: Some(if info.flags.large_sectors { SectorSize::Large } else { SectorSize::Small }),
        queues: info.queues,
        ..image
    }
}

/// Why a VM that was introduced cannot run on this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotHereError {
    /// It has more vCPUs than this release knows, or none.
    #[error("a VM with {0} vCPUs cannot run here")]
    Vcpus(u32),
    /// It cannot have its memory here.
    #[error(transparent)]
    Memory(#[from] VmMemoryError),
    /// The hosts' processors are of two makers.
    #[error("the VM runs on {there}, but this host is {here}: it cannot load the VM's state")]
    Vendor { there: String, here: String },
    /// The machine cannot be made.
    #[error(transparent)]
    Machine(#[from] CreateError),
    /// Its vCPUs would not run here.
    #[error(transparent)]
    CannotResume(#[from] CannotResume),
    /// Its memory has another layout.
    #[error("this release lays guest memory out differently: run the same release on both hosts")]
    Layout,
}

/// This host lacks something that the VM has seen.
#[derive(Debug, thiserror::Error)]
#[error("this host cannot resume the VM: {0}")]
pub(crate) struct CannotResume(#[from] pub(crate) RestoreError);

/// Finds out without a machine whether this host can run the VM.
///
/// # Errors
/// See [`NotHereError`].
pub(crate) fn check_host(hello: &Hello) -> Result<(), NotHereError> {
    if hello.vcpus == 0 || hello.vcpus > u32::from(outlive_machine::MAX_VCPUS) {
        return Err(NotHereError::Vcpus(hello.vcpus));
    }
    check_memory(hello.memory_bytes)?;
    let vendor = process::vendor();
    if vendor != hello.vendor {
        return Err(NotHereError::Vendor { there: hello.vendor.clone(), here: vendor });
    }
    let microcode = process::microcode();
    if differs(hello.microcode, microcode) {
        tracing::warn!(
            primary = format!("{:#x}", hello.microcode),
            here = format!("{microcode:#x}"),
            "the hosts' processors have different microcode: what it changes of their features is compared with \
             the VM's, but give both hosts the same"
        );
    }
    Ok(())
}

/// Whether both revisions are known, and not the same.
fn differs(there: u64, here: u64) -> bool {
    there != 0 && here != 0 && there != here
}

/// What a machine of this host has that its guest does not see.
pub(crate) struct Fitting<'a> {
    /// Its output at first.
    pub(crate) output: OutputMode,
    /// Its card's end of the wire, if it has a card.
    pub(crate) card: Option<NetConfig>,
    /// Its disks, in their order.
    pub(crate) disks: Vec<DiskOptions>,
    /// The host's ends of its ports.
    pub(crate) console: &'a Console,
    /// How its dirty pages are found.
    pub(crate) active: &'a ActiveOptions,
    /// Who hears of its guest.
    pub(crate) events: EventSink,
}

/// Makes the machine for a VM, on memory that is there already if it is given. It has not run, and is in no state of the VM
/// yet; its vCPUs can go on with the VM's.
///
/// # Errors
/// See [`NotHereError`].
pub(crate) fn machine(
    host: Arc<Host>,
    hello: &Hello,
    board: Board,
    fitting: Fitting<'_>,
    ram: Option<Arc<Ram>>,
) -> Result<Machine, NotHereError> {
    let Fitting { output, card, disks, console, active, events } = fitting;
    let options = Options {
        vcpus: hello.vcpus as u8,
        memory: hello.memory_bytes,
        firmware_bytes: hello.firmware_bytes,
        output,
        net: card,
        disks,
        rng: board.rng,
        console: board.console.then(|| console.end(Port::Hvc0)),
        serial: board.serial.then(|| console.end(Port::Serial)),
        tracker: active.tracker.into(),
        trigger: active.max_dirty,
        max_dirty: active.max_dirty * 2,
        events,
    };
    let mut machine = match ram {
        Some(ram) => Machine::with_memory(host, &options, ram)?,
        None => Machine::new(host, &options)?,
    };
    if let Some(vcpu) = &hello.vcpu {
        machine.try_constant(vcpu.clone()).map_err(CannotResume)?;
    }
    Ok(machine)
}

/// Looks whether memory that was made here has the VM's layout.
///
/// # Errors
/// [`NotHereError::Layout`].
pub(crate) fn check_layout(ram: &Ram, hello: &Hello) -> Result<(), NotHereError> {
    let here = ram.slots().into_iter().map(|slot| (slot.base.0, slot.pages));
    let there = hello.layout.ranges().iter().map(|range| (range.start, range.pages));
    if here.eq(there) { Ok(()) } else { Err(NotHereError::Layout) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board_of(kinds: &[(DeviceKind, u16)], mac: bool) -> Result<Board, UnknownDevices> {
        Board::of(&Hello {
            mac: mac.then_some([2; 6]),
            devices: kinds.iter().map(|(kind, queues)| DeviceInfo::new(*kind, *queues)).collect(),
            ..crate::primary::test_hello()
        })
    }

    #[test]
    fn the_list_alone_says_what_is_built() {
        use DeviceKind::{Console, Disk, Net, Rng, Serial};
        assert_eq!(board_of(&[], false), Ok(Board::default()));
        let card = |pairs| Some(Card { pairs, wiring: Wiring::default() });
        assert_eq!(board_of(&[(Net, 4)], true), Ok(Board { card: card(4), ..Board::default() }));
        let serial = Board { serial: true, ..Board::default() };
        assert_eq!(board_of(&[(Disk, 1), (Disk, 8), (Serial, 0)], false), Ok(serial));
        let all = [(Net, 1), (Disk, 1), (Rng, 1), (Console, 2), (Serial, 0)];
        let board = Board { card: card(1), rng: true, console: true, serial: true };
        assert_eq!(board_of(&all, true), Ok(board));
        for (wrong, mac) in [
            (&[(Disk, 1), (Net, 1)][..], true),
            (&[(Net, 1), (Net, 1)], true),
            (&[(Rng, 1), (Rng, 1)], false),
            (&[(Serial, 0), (Console, 2)], false),
            (&[(Rng, 2)], false),
            (&[(Console, 1)], false),
            (&[(Serial, 1)], false),
            (&[(Net, 1)], false),
            (&[], true),
        ] {
            let refused = board_of(wrong, mac).unwrap_err().to_string();
            assert!(refused.starts_with("this release builds no machine"), "{refused}");
            assert_eq!(refused.lines().count(), 1);
        }
        assert_eq!(
            board_of(&[(Disk, 1), (Rng, 9)], true).unwrap_err().to_string(),
            "this release builds no machine with these devices (Disk with 1 queues, Rng with 9 queues; a network address)"
        );
    }

    #[test]
    fn only_microcode_that_both_hosts_know_can_differ() {
        assert!(differs(0xb00_0040, 0xb00_0041));
        assert!(!differs(0xb00_0040, 0xb00_0040));
        assert!(!differs(0, 0xb00_0040) && !differs(0xb00_0040, 0));
    }
}
