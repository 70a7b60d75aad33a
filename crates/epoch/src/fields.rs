//! Reads the fields of a payload one after another; every step is checked against the end.

use crate::error::WireError;
use crate::section::Kind;

/// A cursor over one payload.
pub(crate) struct Fields<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(kind: Kind, payload: &'a [u8]) -> Self {
        Self { kind, rest: payload }
    }

    pub(crate) fn malformed(&self, what: &'static str, value: u64) -> WireError {
        WireError::Malformed { kind: self.kind, what, value }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        if count > self.rest.len() {
            return Err(
                self.malformed("the payload ends early, bytes missing", (count - self.rest.len()) as u64)
            );
        }
        let (taken, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A text of at most `limit` bytes with its length in front. `limit` bounds the allocation.
    pub(crate) fn text(&mut self, limit: usize) -> Result<String, WireError> {
        let length = usize::from(self.u16()?);
        if length > limit {
            return Err(self.malformed("a text is longer than its limit", length as u64));
        }
        match std::str::from_utf8(self.bytes(length)?) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.malformed("a text is not UTF-8, at byte", error.valid_up_to() as u64)),
        }
    }

    /// A field that must be zero, so that a later version can give it a meaning.
    pub(crate) fn reserved(&mut self, count: usize) -> Result<(), WireError> {
        match self.bytes(count)?.iter().find(|byte| **byte != 0) {
            Some(byte) => Err(self.malformed("a reserved field is not zero", u64::from(*byte))),
            None => Ok(()),
        }
    }

    /// Everything that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(self.malformed("bytes are left over", extra as u64)),
        }
    }
}
