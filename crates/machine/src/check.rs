//! The self-check: hashes of everything that a checkpoint covers, so that a standby can prove that its copy
//! is the same (invariant 4). Memory is hashed while the vCPUs are stopped, so this is for tests and for
//! cases of doubt. The caller hashes the disks beforehand; they rest from then on until the checkpoint is
//! taken.

use outlive_epoch::image::limits::MAX_CHECK_STATE;

use crate::machine::Machine;
use crate::map::SLOTS;
use crate::memory::Ram;
use crate::state::{FieldReader, FieldWriter, StateError};

/// Field of a `StateKind::Check` section: the hash of all memory.
const MEMORY: u16 = 1;
/// Field of a `StateKind::Check` section: pairs of a disk and the hash of its contents.
const DISKS: u16 = 2;

const _: () = assert!(2 * 6 + size_of::<u64>() + SLOTS * size_of::<[u64; 2]>() <= MAX_CHECK_STATE);

/// The hash of a disk's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskHash {
    /// The disk's position among the VM's disks.
    pub disk: u16,
    /// The hash. Both sides agree on how it is computed.
    pub hash: u64,
}

/// The hashes of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashes {
    /// All guest memory.
    pub memory: u64,
    /// Disks.
    pub disks: Vec<DiskHash>,
}

/// How a copy differs from the VM that it should match.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// A page is missing or wrong.
    #[error(
        "the memory of this copy differs from the VM's: its hash is {here:#018x}, but should be \
        {wanted:#018x}"
    )]
    Memory {
        /// This copy's.
        here: u64,
        /// The VM's.
        wanted: u64,
    },
}

impl Hashes {
    /// Replaces `to` with the section's bytes.
    pub(crate) fn encode(&self, to: &mut Vec<u8>) {
        let mut fields = FieldWriter::new(to);
        fields.put_plain(MEMORY, &self.memory);
        // Each disk has a slot.
        let mut pairs = [[0u64; 2]; SLOTS];
        let pairs = &mut pairs[..self.disks.len().min(SLOTS)];
        pairs.iter_mut().zip(&self.disks).for_each(|(pair, it)| *pair = [it.disk.into(), it.hash]);
        fields.put_plain(DISKS, pairs.as_flattened());
    }

    /// Reads a section's bytes.
    ///
    /// # Errors
    /// [`StateError`] when the bytes are no hashes.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let fields = FieldReader::new(bytes)?;
        let words: Vec<u64> = fields.get_array(DISKS)?;
        let (pairs, rest) = words.as_chunks();
        let disk = |&[disk, hash]: &[u64; 2]| Some(DiskHash { disk: u16::try_from(disk).ok()?, hash });
        let disks = pairs.iter().map(disk).collect::<Option<Vec<_>>>().filter(|_| rest.is_empty());
        let disks = disks.ok_or(StateError::Field { field: DISKS })?;
        Ok(Self { memory: fields.get_plain(MEMORY)?, disks })
    }

    /// Compares the memory of a copy with the VM's. The whole checkpoint must have been applied to the copy.
    ///
    /// # Errors
    /// [`CheckError`].
    pub fn compare_memory(&self, copy: &Ram) -> Result<(), CheckError> {
        let (here, wanted) = (copy.hash(), self.memory);
        if here == wanted { Ok(()) } else { Err(CheckError::Memory { here, wanted }) }
    }
}

impl Machine {
    /// Makes the next checkpoint carry a hash of all memory and these hashes of disks, for the standby to
    /// compare with its own. The vCPUs are stopped while memory is hashed. The disks must rest
    /// ([`rest_within`](crate::BlockDevice::rest_within)) from before the hashing until the checkpoint is
    /// taken; then the write logs up to this checkpoint hold exactly what is on the disks.
    pub fn check_next(&mut self, disks: Vec<DiskHash>) {
        self.check_due = Some(disks);
    }

    /// The hashes of a stopped machine.
    pub(crate) fn hashes(&self, disks: Vec<DiskHash>) -> Hashes {
        Hashes { memory: self.ram.hash(), disks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_come_back_and_what_is_none_is_refused() {
        let disks = vec![DiskHash { disk: 0, hash: u64::MAX }, DiskHash { disk: 18, hash: 0 }];
        for hashes in [Hashes { memory: 7, disks }, Hashes { memory: 0, disks: Vec::new() }] {
            let mut bytes = Vec::new();
            hashes.encode(&mut bytes);
            assert_eq!(Hashes::decode(&bytes), Ok(hashes));
        }
        for disks in [&[1u64][..], &[1 << 16, 1]] {
            let mut bytes = Vec::new();
            let mut fields = FieldWriter::new(&mut bytes);
            fields.put_plain(MEMORY, &7u64);
            fields.put_plain(DISKS, disks);
            assert_eq!(Hashes::decode(&bytes), Err(StateError::Field { field: DISKS }));
        }
    }
}
