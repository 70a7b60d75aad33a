//! The parts that the state of a machine consists of.

use outlive_epoch::image::limits::MAX_DEVICES;
use outlive_epoch::image::{StateKind, StateSection};

use crate::machine::Machine;
use crate::map::SLOTS;
use crate::state::{StateError, check_version};

/// How many sections of each kind a checkpoint of a machine has. A thread that does not own the machine can
/// use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateShape {
    vcpus: usize,
    counts: [(StateKind, usize); 4],
}

/// A machine whose state a checkpoint has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the state of {kind:?} {index} has {bytes} bytes, but a checkpoint has room for {limit}")]
pub struct StateTooLarge {
    /// What it belongs to.
    pub kind: StateKind,
    /// Which vCPU or device.
    pub index: usize,
    /// How large it is.
    pub bytes: usize,
    /// How large it may be.
    pub limit: usize,
}

// A standby is told of every device, and the serial port has no slot.
const _: () = assert!(SLOTS < MAX_DEVICES);

/// Checks the size of each part of a machine's state: kind, index, bytes. Sizes do not change while a machine
/// lives, so nothing can be found too large, or make a buffer grow, in a pause.
///
/// # Errors
/// The first that is too large.
fn check_sizes(parts: impl IntoIterator<Item = (StateKind, usize, usize)>) -> Result<(), StateTooLarge> {
    let too_large = |(kind, index, bytes): (StateKind, usize, usize)| {
        let limit = kind.limit();
        (bytes > limit).then_some(StateTooLarge { kind, index, bytes, limit })
    };
    parts.into_iter().find_map(too_large).map_or(Ok(()), Err)
}

impl StateShape {
    pub(crate) fn new(vcpus: usize, devices: usize, serial: bool) -> Self {
        let counts = [
            (StateKind::Vcpu, vcpus),
            (StateKind::Vm, 1),
            (StateKind::Device, devices),
            (StateKind::Serial, usize::from(serial)),
        ];
        Self { vcpus, counts }
    }

    /// How many sections of constant state a base has.
    pub fn constants(&self) -> usize {
        self.vcpus
    }

    /// Checks that sections can be restored into the machine: known versions, and exactly one section for
    /// everything that the machine has. `constants` is the number of those of the base checkpoint; of constant
    /// sections among the others the versions alone are looked at.
    ///
    /// # Errors
    /// [`StateError`] naming the section.
    pub fn check<'a>(
        &self,
        constants: usize,
        sections: impl Iterator<Item = StateSection<'a>>,
    ) -> Result<(), StateError> {
        if constants != self.vcpus {
            return Err(StateError::Section { kind: StateKind::VcpuConstant, index: constants as u16 });
        }
        // By kind, a bit for each index: no machine has as many vCPUs or devices as there are bits.
        let mut seen = [0u64; 4];
        for StateSection { kind, version, index, .. } in sections {
            check_version(kind, version)?;
            let Some(at) = self.counts.iter().position(|(known, _)| *known == kind) else { continue };
            let bit = 1u64.checked_shl(index.into()).unwrap_or(0);
            if usize::from(index) >= self.counts[at].1 || seen[at] & bit != 0 {
                return Err(StateError::Section { kind, index });
            }
            seen[at] |= bit;
        }
        for (seen, (kind, count)) in seen.into_iter().zip(self.counts) {
            let index = seen.trailing_ones() as u16;
            if usize::from(index) != count {
                return Err(StateError::Section { kind, index });
            }
        }
        Ok(())
    }
}

impl Machine {
    /// The parts that this machine's state consists of.
    pub fn shape(&self) -> StateShape {
        StateShape::new(self.vcpus.len(), self.devices.len(), self.serial.is_some())
    }

    /// Checks that a checkpoint has room for the state of this machine, which has not run yet.
    ///
    /// # Errors
    /// [`StateTooLarge`].
    pub(crate) fn check_state_sizes(&self) -> Result<(), StateTooLarge> {
        let sizes =
            |kind, sizes: Vec<usize>| sizes.into_iter().enumerate().map(move |(i, size)| (kind, i, size));
        let devices = self.devices.iter().map(|device| device.state_bytes()).collect();
        let serial = self.serial.iter().map(|port| port.state_bytes()).collect();
        let parts = [
            sizes(StateKind::VcpuConstant, self.constants.iter().map(Vec::len).collect()),
            sizes(StateKind::Vcpu, self.fresh.vcpu_sizes().collect()),
            sizes(StateKind::Vm, vec![self.fresh.vm_size()]),
            sizes(StateKind::Device, devices),
            sizes(StateKind::Serial, serial),
        ];
        check_sizes(parts.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use outlive_epoch::image::StateVersions;

    use super::*;

    fn section(kind: StateKind, index: u16) -> StateSection<'static> {
        StateSection { kind, version: StateVersions::NEWEST.of(kind), index, bytes: &[] }
    }

    fn whole() -> Vec<StateSection<'static>> {
        let of = |kind, count| (0..count).map(move |index| section(kind, index));
        of(StateKind::Vcpu, 32)
            .chain(of(StateKind::Vm, 1))
            .chain(of(StateKind::Device, 3))
            .chain(of(StateKind::Serial, 1))
            .collect()
    }

    fn check(constants: usize, sections: &[StateSection<'static>]) -> Result<(), StateError> {
        StateShape::new(32, 3, true).check(constants, sections.iter().copied())
    }

    #[test]
    fn a_part_that_a_checkpoint_has_no_room_for_is_named() {
        for kind in StateKind::ALL {
            let (limit, bytes) = (kind.limit(), kind.limit() + 1);
            assert_eq!(check_sizes([(kind, 0, limit), (kind, 1, limit)]), Ok(()));
            let error = check_sizes([(kind, 0, limit), (kind, 1, bytes)]).unwrap_err();
            assert_eq!(error, StateTooLarge { kind, index: 1, bytes, limit });
        }
        let error = check_sizes([(StateKind::Vcpu, 31, 70_000)]).unwrap_err().to_string();
        assert_eq!(error, "the state of Vcpu 31 has 70000 bytes, but a checkpoint has room for 65536");
    }

    #[test]
    fn each_part_is_there_once_and_nothing_else_is() {
        assert_eq!(check(32, &whole()), Ok(()));
        let mut turned = whole();
        turned.reverse();
        turned.push(section(StateKind::Check, 0));
        assert_eq!(check(32, &turned), Ok(()));
        for constants in [0, 31, 33] {
            let missing = StateError::Section { kind: StateKind::VcpuConstant, index: constants as u16 };
            assert_eq!(check(constants, &whole()), Err(missing));
        }
        for left_out in 0..whole().len() {
            let mut sections = whole();
            let StateSection { kind, index, .. } = sections.remove(left_out);
            assert_eq!(check(32, &sections), Err(StateError::Section { kind, index }));
        }
        for (kind, index) in [
            (StateKind::Vcpu, 32),
            (StateKind::Vcpu, 31),
            (StateKind::Vm, 1),
            (StateKind::Device, 3),
            (StateKind::Device, 0),
            (StateKind::Serial, 0),
            (StateKind::Vcpu, 64),
            (StateKind::Device, u16::MAX),
        ] {
            let mut sections = whole();
            sections.push(section(kind, index));
            assert_eq!(check(32, &sections), Err(StateError::Section { kind, index }));
        }
        for kind in StateKind::ALL {
            let mut sections = whole();
            if !sections.iter().any(|section| section.kind == kind) {
                sections.push(section(kind, 0));
            }
            let at = sections.iter().position(|section| section.kind == kind).unwrap();
            let mut with = |version| {
                sections[at].version = version;
                check(32, &sections)
            };
            let versions = kind.versions();
            assert!(versions.clone().all(|version| with(version) == Ok(())));
            let (oldest, newest) = (*versions.start(), *versions.end());
            for version in [oldest - 1, newest + 1, u16::MAX] {
                assert_eq!(with(version), Err(StateError::Version { kind, version, oldest, newest }));
            }
        }
    }
}
