//! Saved state: plain data in versioned sections, separate from the run-time types.
//!
//! A checkpoint's state is a list of sections {kind, version, index, bytes}. One table,
//! [`StateKind::versions`], has the versions. A section consists of fields {id u16, length u32, bytes}, so
//! that a later version can add one; a field that belongs to the version and is missing, too short or too
//! long is refused before anything is changed.

#[cfg(test)]
mod golden;

use outlive_epoch::image::StateKind;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Why saved state was refused. If the VM has not run yet, nothing was changed when one of these is returned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// A section of a version that this release does not read.
    #[error(
        "state section {kind:?} has version {version}, this host reads {oldest} to {newest}: upgrade Outlive on the older host"
    )]
    Version {
        /// The section.
        kind: StateKind,
        /// Its version.
        version: u16,
        /// The oldest that is read.
        oldest: u16,
        /// The newest that is read.
        newest: u16,
    },
    /// A section for a vCPU or device that this VM does not have, or a section that is missing.
    #[error("state section {kind:?} {index} is missing or does not belong to this VM")]
    Section {
        /// The section.
        kind: StateKind,
        /// Its index.
        index: u16,
    },
    /// A field that is cut short, has a wrong length or is missing.
    #[error("state field {field} is missing or has a wrong length")]
    Field {
        /// Field number.
        field: u16,
    },
}

/// Checks that sections of this kind and version are read here.
///
/// # Errors
/// [`StateError::Version`].
pub(crate) fn check_version(kind: StateKind, version: u16) -> Result<(), StateError> {
    let versions = kind.versions();
    if versions.contains(&version) {
        return Ok(());
    }
    Err(StateError::Version { kind, version, oldest: *versions.start(), newest: *versions.end() })
}

/// Writes fields into a buffer that was allocated before the pause.
pub(crate) struct FieldWriter<'a> {
    to: &'a mut Vec<u8>,
}

impl<'a> FieldWriter<'a> {
    pub(crate) fn new(to: &'a mut Vec<u8>) -> Self {
        to.clear();
        Self { to }
    }

    pub(crate) fn put(&mut self, field: u16, bytes: &[u8]) {
        self.to.extend_from_slice(&field.to_le_bytes());
        self.to.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.to.extend_from_slice(bytes);
    }

    /// A field of plain data: one value, or several in a row.
    pub(crate) fn put_plain<T: IntoBytes + Immutable + ?Sized>(&mut self, field: u16, value: &T) {
        self.put(field, value.as_bytes());
    }
}

/// Finds fields in a section's bytes.
#[derive(Clone, Copy)]
pub(crate) struct FieldReader<'a> {
    from: &'a [u8],
}

impl<'a> FieldReader<'a> {
    /// # Errors
    /// [`StateError::Field`] when the bytes are not a row of whole fields.
    pub(crate) fn new(from: &'a [u8]) -> Result<Self, StateError> {
        let mut rest = from;
        while !rest.is_empty() {
            let (_, _, after) = split(rest)?;
            rest = after;
        }
        Ok(Self { from })
    }

    pub(crate) fn get(&self, field: u16) -> Result<&'a [u8], StateError> {
        let mut rest = self.from;
        while !rest.is_empty() {
            let (id, bytes, after) = split(rest)?;
            if id == field {
                return Ok(bytes);
            }
            rest = after;
        }
        Err(StateError::Field { field })
    }

    /// A field that is one value of plain data.
    pub(crate) fn get_plain<T: FromBytes>(&self, field: u16) -> Result<T, StateError> {
        T::read_from_bytes(self.get(field)?).map_err(|_| StateError::Field { field })
    }

    /// Every field with its number, in the order in which they were written.
    #[cfg(test)]
    pub(crate) fn fields(&self) -> Vec<(u16, &'a [u8])> {
        let mut fields = Vec::new();
        let mut rest = self.from;
        // PANIC: `new` has checked that the bytes are whole fields.
        while !rest.is_empty() {
            let (id, bytes, after) = split(rest).unwrap();
            fields.push((id, bytes));
            rest = after;
        }
        fields
    }

    /// A field that is several values of plain data in a row.
    pub(crate) fn get_array<T: FromBytes>(&self, field: u16) -> Result<Vec<T>, StateError> {
        let bytes = self.get(field)?;
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(StateError::Field { field });
        }
        let value = |bytes| T::read_from_bytes(bytes).map_err(|_| StateError::Field { field });
        bytes.chunks_exact(size_of::<T>()).map(value).collect()
    }
}

fn split(from: &[u8]) -> Result<(u16, &[u8], &[u8]), StateError> {
    let (head, rest) = from.split_at_checked(6).ok_or(StateError::Field { field: 0 })?;
    let field = u16::from_le_bytes([head[0], head[1]]);
    let len = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
    let (bytes, rest) = rest.split_at_checked(len).ok_or(StateError::Field { field })?;
    Ok((field, bytes, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back() {
        let mut buffer = Vec::new();
        let mut w = FieldWriter::new(&mut buffer);
        w.put_plain(3, &7u64);
        w.put(9, b"abc");
        let r = FieldReader::new(&buffer).unwrap();
        assert_eq!(r.get_plain::<u64>(3), Ok(7));
        assert_eq!(r.get(9), Ok(&b"abc"[..]));
        assert_eq!(r.get(4), Err(StateError::Field { field: 4 }));
        assert_eq!(r.get_plain::<u32>(3), Err(StateError::Field { field: 3 }));
        assert_eq!(r.get_array::<u32>(3), Ok(vec![7, 0]));
    }

    #[test]
    fn cut_fields_are_refused_at_every_length() {
        let mut buffer = Vec::new();
        FieldWriter::new(&mut buffer).put(1, &[5; 20]);
        for len in 1..buffer.len() {
            assert!(FieldReader::new(&buffer[..len]).is_err(), "{len}");
        }
    }
}
