//! A file that is read.

use std::io;

use crate::error::ReadError;

/// A file or a block device.
pub trait Source {
    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// Of the file system.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// First byte at or behind `offset` that may not be zero; `None` if there is none.
    ///
    /// # Errors
    /// Of the file system.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

impl Source for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|from| self.get(from..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Reads what a format says is there. A file that ends before it was cut off on its way.
pub(crate) fn read(source: &dyn Source, buffer: &mut [u8], offset: u64) -> Result<(), ReadError> {
    let bytes = source.bytes();
    let end = offset.checked_add(buffer.len() as u64);
    match end {
        Some(end) if end <= bytes => Ok(source.read_at(buffer, offset)?),
        _ => Err(ReadError::CutOff { bytes, needs: end.unwrap_or(u64::MAX) }),
    }
}

/// The same, into memory of its own. The caller has bounded `length`.
pub(crate) fn read_vec(source: &dyn Source, offset: u64, length: usize) -> Result<Vec<u8>, ReadError> {
    // Looked at first: a file of 100 bytes gets no table of 32 MiB.
    if offset.checked_add(length as u64).is_none_or(|end| end > source.bytes()) {
        let needs = offset.saturating_add(length as u64);
        return Err(ReadError::CutOff { bytes: source.bytes(), needs });
    }
    let mut buffer = vec![0; length];
    read(source, &mut buffer, offset)?;
    Ok(buffer)
}
