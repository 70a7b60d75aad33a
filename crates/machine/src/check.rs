//! The self-check: hashes of all that a checkpoint stands for, so that a standby can prove that its copy is the same
//! (invariant 4). The hashes are made while the VM stands still, so this is for tests and for doubts.

use crate::machine::Machine;
use crate::state::{FieldReader, FieldWriter, StateError};

/// Field of a `Kind::Check` section: the hash of all memory.
const MEMORY: u16 = 1;

/// What a VM is made of, in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashes {
    /// All guest memory.
    pub memory: u64,
}

/// How a copy differs from the VM that it should equal.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The bytes are no hashes.
    #[error(transparent)]
    State(#[from] StateError),
    /// A page is missing or wrong.
    #[error("the memory of this copy is not that of the VM: hash {here:#018x}, should be {wanted:#018x}")]
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
        FieldWriter::new(to).put_plain(MEMORY, &self.memory);
    }

    /// Reads a section's bytes.
    ///
    /// # Errors
    /// [`StateError`] when they are no hashes.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let fields = FieldReader::new(bytes)?;
        Ok(Self { memory: fields.get_plain(MEMORY)? })
    }
}

impl Machine {
    /// Hashes of a machine that stands still.
    pub fn hashes(&self) -> Hashes {
        Hashes { memory: self.ram.hash() }
    }

    /// Compares this copy, in which a checkpoint has been applied whole, with what the checkpoint says of the VM.
    ///
    /// # Errors
    /// [`CheckError`], naming what differs.
    pub fn compare(&self, section: &[u8]) -> Result<(), CheckError> {
        let wanted = Hashes::decode(section)?;
        let here = self.hashes();
        if here.memory != wanted.memory {
            return Err(CheckError::Memory { here: here.memory, wanted: wanted.memory });
        }
        Ok(())
    }
}
