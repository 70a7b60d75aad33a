//! Saves and restores what belongs to the VM and not to a vCPU: clock, PIT, interrupt chips.

use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use crate::event::PowerRequest;
use crate::state::{FieldReader, FieldWriter, StateError};

/// One part of the VM's state; the numbers are field numbers of a `StateKind::Vm` section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Item {
    /// The programmable interval timer.
    Pit = 1,
    /// kvmclock.
    Clock = 2,
    /// First 8259.
    PicMaster = 3,
    /// Second 8259.
    PicSlave = 4,
    /// The I/O APIC.
    IoApic = 5,
}

/// Field of a `StateKind::Vm` section: what the guest has asked for, by [`PowerRequest::number`].
const ASKED: u16 = 6;
/// Field of a `StateKind::Vm` section from version 2 on: how it has asked for a reset, as
/// [`PowerRequest::way_number`].
const ASKED_BY: u16 = 7;

/// Field of a `StateKind::Vm` section: how often the guest has restarted in a row, and how many milliseconds ago it did
/// so last. An older release skips it, and does not have it either: then the count begins anew.
const RESTARTED: u16 = 8;

/// How often a guest has restarted, as far as its next restart depends on it. It goes with the VM's state to the host
/// that takes the VM over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestartCount {
    /// How many restarts came soon after another, including the last.
    pub in_a_row: u32,
    /// When it restarted last, if it ever did.
    pub last: Option<Instant>,
}

impl RestartCount {
    /// What stands for no restart at all.
    const NEVER: u64 = u64::MAX;

    fn numbers(self) -> [u64; 2] {
        let ago = self.last.map(|last| u64::try_from(last.elapsed().as_millis()).unwrap_or(Self::NEVER));
        [self.in_a_row.into(), ago.unwrap_or(Self::NEVER)]
    }

    /// A restart that is longer ago counts no more, and what a peer says may be nonsense.
    const LONGEST: Duration = Duration::from_secs(24 * 3600);

    /// The time between the checkpoint and now does not count: the guest has not run in it.
    fn from_numbers([in_a_row, ago]: [u64; 2]) -> Self {
        let ago = Some(Duration::from_millis(ago)).filter(|ago| *ago <= Self::LONGEST);
        let last = ago.and_then(|ago| Instant::now().checked_sub(ago));
        Self { in_a_row: u32::try_from(in_a_row).unwrap_or(u32::MAX), last }
    }
}

/// What a saved state says of the guest, beside the chips.
pub(crate) struct Restored {
    /// What it had asked for.
    pub(crate) asked: Option<PowerRequest>,
    pub(crate) restarts: RestartCount,
}

/// The order of save, and why. It comes after the vCPUs' part: an event that a vCPU's exit raises is then in
/// the chips.
pub const SAVE_ORDER: [(Item, &str); 5] = [
    (Item::Pit, "before the chips: a tick in between is then in them, and not lost"),
    (Item::Clock, "any place"),
    (Item::PicMaster, "any place"),
    (Item::PicSlave, "any place"),
    (Item::IoApic, "any place"),
];

/// The order of restore and of a restart, and why. It comes after the vCPUs' part: the LAPICs must exist
/// before the I/O APIC delivers to them.
pub const RESTORE_ORDER: [(Item, &str); 5] = [
    (Item::Pit, "before the chips: its tick goes through them, and the last old one is over by then"),
    (Item::Clock, "before any vCPU runs: a clock set later makes guests hang (Cloud Hypervisor #7930)"),
    (
        Item::PicSlave,
        "before the master: whenever a chip is set, KVM checks whether the slave has something pending and \
         latches it in the master (`pic_update_irq` in arch/x86/kvm/i8259.c), so a master that is set first \
         would get an interrupt from the old slave that nobody has sent",
    ),
    (Item::PicMaster, "after the slave"),
    (Item::IoApic, "last: setting it delivers what is pending"),
];

/// Why the VM's state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VmStateError {
    /// An ioctl failed.
    #[error("VM state {item:?}: {source}")]
    Ioctl {
        /// The part.
        item: Item,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// The saved bytes are not a VM's state.
    #[error(transparent)]
    State(#[from] StateError),
}

fn ioctl<T>(item: Item, result: Result<T, kvm_ioctls::Error>) -> Result<T, VmStateError> {
    result.map_err(|source| VmStateError::Ioctl { item, source })
}

fn chip(item: Item) -> Option<u32> {
    match item {
        Item::PicMaster => Some(KVM_IRQCHIP_PIC_MASTER),
        Item::PicSlave => Some(KVM_IRQCHIP_PIC_SLAVE),
        Item::IoApic => Some(KVM_IRQCHIP_IOAPIC),
        Item::Pit | Item::Clock => None,
    }
}

/// The first version of the section with [`ASKED_BY`].
const WITH_WAY: u16 = 2;

/// Reads the state of a stopped VM, as a section of this version, into a buffer that must have [`CAPACITY`] to
/// spare.
pub(crate) fn save(
    vm: &VmFd,
    asked: Option<PowerRequest>,
    restarts: RestartCount,
    version: u16,
    to: &mut Vec<u8>,
) -> Result<(), VmStateError> {
    let mut fields = FieldWriter::new(to);
    fields.put_plain(ASKED, &asked.map_or(0, PowerRequest::number));
    if version >= WITH_WAY {
        fields.put_plain(ASKED_BY, &asked.map_or(0, PowerRequest::way_number));
    }
    // Most guests have none to tell, and then the state is as releases up to 0.2 write it.
    if restarts != RestartCount::default() {
        fields.put_plain(RESTARTED, &restarts.numbers());
    }
    for (item, _reason) in SAVE_ORDER {
        let field = item as u16;
        match (item, chip(item)) {
            (_, Some(chip_id)) => {
                let mut state = kvm_irqchip { chip_id, ..Default::default() };
                ioctl(item, vm.get_irqchip(&mut state))?;
                fields.put_plain(field, &state);
            }
            (Item::Clock, None) => fields.put_plain(field, &ioctl(item, vm.get_clock())?),
            (_, None) => fields.put_plain(field, &ioctl(item, vm.get_pit2())?),
        }
    }
    Ok(())
}

/// How many bytes [`save`] writes at most.
pub(crate) const CAPACITY: usize = 4096;

/// What a restore does with kvmclock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// Continues from where it was saved, plus this much, counted until the moment when it is set.
    Advance {
        /// What had passed at `from`.
        elapsed: Duration,
        /// When `elapsed` was taken.
        from: Instant,
    },
    /// Stays as it is: the guest restarts on a host whose time continues.
    Keep,
}

/// Writes a saved state, a section of this version, into a VM whose vCPUs do not run. Returns what it says
/// of the guest.
pub(crate) fn restore(vm: &VmFd, version: u16, bytes: &[u8], clock: Clock) -> Result<Restored, VmStateError> {
    let fields = FieldReader::new(bytes)?;
    for (item, _reason) in RESTORE_ORDER {
        let field = item as u16;
        match (item, chip(item)) {
            (_, Some(chip_id)) => {
                let state: kvm_irqchip = fields.get_plain(field)?;
                if state.chip_id != chip_id {
                    return Err(StateError::Field { field }.into());
                }
                ioctl(item, vm.set_irqchip(&state))?;
            }
            (Item::Clock, None) => match clock {
                Clock::Keep => {}
                Clock::Advance { elapsed, from } => {
                    // Flags 0: not the host's idea of the time, which may differ from the other host's.
                    let saved: kvm_clock_data = fields.get_plain(field)?;
                    let nanos = u64::try_from((elapsed + from.elapsed()).as_nanos()).unwrap_or(0);
                    let clock = saved.clock.saturating_add(nanos);
                    ioctl(item, vm.set_clock(&kvm_clock_data { clock, flags: 0, ..Default::default() }))?;
                }
            },
            (_, None) => ioctl(item, vm.set_pit2(&fields.get_plain(field)?))?,
        }
    }
    // Version 1 does not have it; 0 stands for no way in particular.
    let way = if version >= WITH_WAY { fields.get_plain(ASKED_BY)? } else { 0 };
    let asked = PowerRequest::from_numbers(fields.get_plain(ASKED)?, way);
    // Releases up to 0.2 do not write it, nor is it there for a guest that has not restarted.
    let restarts = match fields.get_plain(RESTARTED) {
        Ok(numbers) => RestartCount::from_numbers(numbers),
        Err(_) if fields.get(RESTARTED).is_err() => RestartCount::default(),
        Err(error) => return Err(error.into()),
    };
    Ok(Restored { asked, restarts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_of_restarts_comes_back_whatever_a_peer_says() {
        assert_eq!(RestartCount::from_numbers(RestartCount::default().numbers()), RestartCount::default());
        let last = Instant::now().checked_sub(Duration::from_secs(7)).unwrap();
        let [in_a_row, ago] = RestartCount { in_a_row: 5, last: Some(last) }.numbers();
        assert!(in_a_row == 5 && (7_000..8_000).contains(&ago), "{ago}");
        let back = RestartCount::from_numbers([in_a_row, ago]);
        assert!(back.in_a_row == 5 && back.last.unwrap().elapsed() >= Duration::from_secs(7));
        let nonsense = RestartCount::from_numbers([u64::MAX, u64::MAX - 1]);
        assert_eq!(nonsense, RestartCount { in_a_row: u32::MAX, last: None });
    }
}
