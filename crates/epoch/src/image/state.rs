//! State sections: what a VM is besides its memory and its disks.

use std::collections::TryReserveError;
use std::ops::RangeInclusive;

use super::limits::{MAX_CHECK_STATE, MAX_DEVICE_STATE, MAX_VCPU_CONSTANT, MAX_VCPU_STATE, MAX_VM_STATE};

/// What a section of state belongs to. The numbers are part of the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum StateKind {
    /// Constant after boot: CPUID and TSC frequency of one vCPU. Sent with the base checkpoint only.
    VcpuConstant = 1,
    /// Registers and the rest of one vCPU.
    Vcpu = 2,
    /// Clock, PIT and interrupt chips.
    Vm = 3,
    /// One device behind the virtio-mmio transport.
    Device = 4,
    /// The serial port.
    Serial = 5,
    /// Hashes of all memory and all disks, in a checkpoint that is to be compared. Not part of the VM's
    /// state.
    Check = 6,
}

impl StateKind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Self; 6] =
        [Self::VcpuConstant, Self::Vcpu, Self::Vm, Self::Device, Self::Serial, Self::Check];

    /// The kind with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// Whether the standby keeps it from one checkpoint to the next, so that it is sent again only when it
    /// changed. Constant state is kept in another way, and a check belongs to one checkpoint.
    pub const fn is_kept(self) -> bool {
        !matches!(self, Self::VcpuConstant | Self::Check)
    }

    /// The versions of its bytes that this release reads. It writes the newest one that the peer reads
    /// ([`StateVersions`]). When a version is dropped, its reader goes too.
    ///
    /// A version stands for what a section must have. A reader skips fields that it does not know, so a new
    /// field that an older release may safely skip needs no new version.
    pub const fn versions(self) -> RangeInclusive<u16> {
        match self {
            // Version 2 adds how the guest asked for a restart.
            Self::Vm => 1..=2,
            Self::VcpuConstant | Self::Vcpu | Self::Device | Self::Serial | Self::Check => 1..=1,
        }
    }

    /// Most bytes of one section.
    pub const fn limit(self) -> usize {
        match self {
            Self::VcpuConstant => MAX_VCPU_CONSTANT,
            Self::Vcpu => MAX_VCPU_STATE,
            Self::Vm => MAX_VM_STATE,
            Self::Device | Self::Serial => MAX_DEVICE_STATE,
            Self::Check => MAX_CHECK_STATE,
        }
    }
}

/// Which version of each kind a machine writes: one that the release on the other side reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateVersions([u16; StateKind::ALL.len()]);

impl StateVersions {
    /// The newest of each.
    pub const NEWEST: Self = {
        let mut versions = [0; StateKind::ALL.len()];
        let mut at = 0;
        while at < versions.len() {
            versions[at] = *StateKind::ALL[at].versions().end();
            at += 1;
        }
        Self(versions)
    };

    /// The same, except for one kind.
    pub const fn with(mut self, kind: StateKind, version: u16) -> Self {
        self.0[kind as usize - 1] = version;
        self
    }

    /// The version of this kind.
    pub const fn of(self, kind: StateKind) -> u16 {
        self.0[kind as usize - 1]
    }
}

/// One state section. The meaning of the bytes is a matter between the machine that wrote them and the one
/// that reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSection<'a> {
    /// What it belongs to.
    pub kind: StateKind,
    /// Version of the bytes.
    pub version: u16,
    /// Which vCPU or device.
    pub index: u16,
    /// The state itself, at most [`StateKind::limit`] bytes.
    pub bytes: &'a [u8],
}

/// What every vCPU of the VM is restored with, beside its number: CPUID and TSC frequency. Most of what a host can
/// lack is in it, so the standby looks at it before anything is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuConstant {
    /// Version of the bytes.
    pub version: u16,
    /// A section of constant state, that of the first vCPU: at most
    /// [`MAX_VCPU_CONSTANT`] bytes.
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    kind: StateKind,
    version: u16,
    index: u16,
    start: usize,
    len: usize,
}

/// The state sections of one checkpoint: their bytes, one section behind the other, and a table of them.
#[derive(Debug, Clone, Default)]
pub struct StateBuf {
    bytes: Vec<u8>,
    spans: Vec<Span>,
}

impl StateBuf {
    /// An empty buffer with room for this many bytes and sections.
    pub fn with_capacity(bytes: usize, sections: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), spans: Vec::with_capacity(sections) }
    }

    /// The same, for numbers from a peer.
    ///
    /// # Errors
    /// When there is not that much memory.
    pub fn try_with_capacity(bytes: usize, sections: usize) -> Result<Self, TryReserveError> {
        let mut buffer = Self::default();
        buffer.bytes.try_reserve_exact(bytes)?;
        buffer.spans.try_reserve_exact(sections)?;
        Ok(buffer)
    }

    /// An empty buffer whose memory is populated and not only promised, so filling it takes no page fault
    /// either.
    pub fn populated(bytes: usize, sections: usize) -> Self {
        let mut buffer = Self::with_capacity(bytes, sections);
        // Not zero: the allocator would only promise pages of zeroes.
        buffer.bytes.resize(bytes, 0xff);
        buffer.bytes.clear();
        buffer
    }

    /// Bytes of all sections.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no section, not even one without bytes.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Forgets the sections; keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.spans.clear();
    }

    /// Makes it a copy of another table. Allocates only if there is too little room.
    ///
    /// # Errors
    /// When there is not that much memory; the table is empty then.
    pub fn try_copy_from(&mut self, other: &Self) -> Result<(), TryReserveError> {
        self.clear();
        self.bytes.try_reserve(other.bytes.len())?;
        self.spans.try_reserve(other.spans.len())?;
        self.bytes.extend_from_slice(&other.bytes);
        self.spans.extend_from_slice(&other.spans);
        Ok(())
    }

    /// Adds a copy of a section. Allocates only beyond the room that was asked for.
    pub fn push(&mut self, section: StateSection<'_>) {
        let StateSection { kind, version, index, bytes } = section;
        debug_assert!(bytes.len() <= kind.limit(), "{} bytes of {kind:?}", bytes.len());
        self.spans.push(Span { kind, version, index, start: self.bytes.len(), len: bytes.len() });
        self.bytes.extend_from_slice(bytes);
    }

    /// Overwrites a part of the section that was added last. False if the part is not within it.
    pub(crate) fn patch_last(&mut self, at: usize, bytes: &[u8]) -> bool {
        let Some(&Span { start, len, .. }) = self.spans.last() else { return false };
        let Some(to) = self.bytes[start..start + len].get_mut(at..).and_then(|to| to.get_mut(..bytes.len()))
        else {
            return false;
        };
        to.copy_from_slice(bytes);
        true
    }

    /// Every section, in the order in which they were added.
    pub fn sections(&self) -> impl ExactSizeIterator<Item = StateSection<'_>> + Clone {
        self.spans.iter().map(|&Span { kind, version, index, start, len }| StateSection {
            kind,
            version,
            index,
            bytes: &self.bytes[start..start + len],
        })
    }

    /// The first section of this kind and index.
    pub fn find(&self, kind: StateKind, index: u16) -> Option<StateSection<'_>> {
        self.sections().find(|section| section.kind == kind && section.index == index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::limits::{MAX_STATE_BYTES, MAX_STATE_SECTIONS};

    #[test]
    fn sections_come_back_in_their_order() {
        let mut buffer = StateBuf::populated(100, 4);
        assert!(buffer.is_empty());
        let section = |kind, index, bytes| StateSection { kind, version: 3, index, bytes };
        let sections = [
            section(StateKind::Vcpu, 0, &[1, 2, 3][..]),
            section(StateKind::Vcpu, 1, &[]),
            section(StateKind::Device, 0, &[4; 90]),
        ];
        for _ in 0..2 {
            buffer.clear();
            let memory = buffer.bytes.as_ptr();
            sections.iter().for_each(|it| buffer.push(*it));
            assert!(buffer.sections().eq(sections) && buffer.len() == 93);
            assert_eq!(buffer.find(StateKind::Vcpu, 1), Some(sections[1]));
            assert_eq!(buffer.find(StateKind::Vm, 0), None);
            assert_eq!(buffer.bytes.as_ptr(), memory, "nothing was allocated");
        }
    }

    #[test]
    fn the_newest_version_of_each_kind_is_written_unless_an_older_one_is_asked_for() {
        for kind in StateKind::ALL {
            assert_eq!(StateVersions::NEWEST.of(kind), *kind.versions().end());
            let other = StateVersions::NEWEST.with(kind, 7);
            for each in StateKind::ALL {
                let newest = StateVersions::NEWEST.of(each);
                assert_eq!(other.of(each), if each == kind { 7 } else { newest });
            }
        }
    }

    #[test]
    fn numbers_and_limits_fit_each_other() {
        for kind in StateKind::ALL {
            assert_eq!(StateKind::from_wire(kind as u16), Some(kind));
        }
        assert_eq!((StateKind::from_wire(0), StateKind::from_wire(7)), (None, None));
        // Every section that a VM of this release can have, as large as it can be.
        let most: Vec<StateKind> = [
            (StateKind::VcpuConstant, 32),
            (StateKind::Vcpu, 32),
            (StateKind::Vm, 1),
            (StateKind::Device, 32),
            (StateKind::Serial, 1),
            (StateKind::Check, 1),
        ]
        .into_iter()
        .flat_map(|(kind, count)| std::iter::repeat_n(kind, count))
        .collect();
        assert_eq!(most.iter().map(|kind| kind.limit()).sum::<usize>(), MAX_STATE_BYTES);
        assert_eq!(most.len(), MAX_STATE_SECTIONS);
    }
}
