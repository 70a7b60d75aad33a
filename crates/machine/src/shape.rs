//! The parts that the state of a machine consists of.

use outlive_epoch::image::{StateKind, StateSection};

use crate::machine::Machine;
use crate::state::{StateError, check_version};

/// How many sections of each kind a checkpoint of a machine has. A thread that does not own the machine can
/// use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateShape {
    vcpus: usize,
    counts: [(StateKind, usize); 4],
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
