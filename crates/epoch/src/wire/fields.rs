//! Reads the fields of a payload one after another; every step is checked against the end.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::error::WireError;
use super::kind::SectionKind;

/// A cursor over one payload.
pub(crate) struct Fields<'a> {
    kind: SectionKind,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(kind: SectionKind, payload: &'a [u8]) -> Self {
        Self { kind, rest: payload }
    }

    pub(crate) fn malformed(&self, what: &'static str, value: u64) -> WireError {
        WireError::Malformed { kind: self.kind, what, value }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.early(count))?;
        self.rest = rest;
        Ok(taken)
    }

    /// Fields of fixed length, without a copy.
    pub(crate) fn fixed<T>(&mut self) -> Result<&'a T, WireError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (value, rest) = T::ref_from_prefix(self.rest).map_err(|_| self.early(size_of::<T>()))?;
        self.rest = rest;
        Ok(value)
    }

    /// `count` times the same fields. `count` must have been checked against its limit.
    pub(crate) fn row<T>(&mut self, count: usize) -> Result<&'a [T], WireError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (values, rest) = <[T]>::ref_from_prefix_with_elems(self.rest, count)
            .map_err(|_| self.early(count * size_of::<T>()))?;
        self.rest = rest;
        Ok(values)
    }

    fn early(&self, wanted: usize) -> WireError {
        let missing = wanted.saturating_sub(self.rest.len());
        self.malformed("the payload ends early, bytes missing", missing as u64)
    }

    /// A text of at most `limit` bytes behind its length. `limit` bounds the allocation. Texts are for people and for
    /// commands: control characters, which would change the terminal of a reader or end a variable of a command's
    /// environment, are replaced. None becomes longer by that.
    pub(crate) fn text(&mut self, limit: usize) -> Result<String, WireError> {
        let length = usize::from(self.fixed::<zerocopy::little_endian::U16>()?.get());
        if length > limit {
            return Err(self.malformed("a text is longer than its limit", length as u64));
        }
        match std::str::from_utf8(self.bytes(length)?) {
            Ok(text) => Ok(text.replace(char::is_control, "?")),
            Err(error) => Err(self.malformed("a text is not UTF-8, at byte", error.valid_up_to() as u64)),
        }
    }

    /// A field that must be zero, so that a later version can give it a meaning.
    pub(crate) fn reserved(&self, field: &[u8]) -> Result<(), WireError> {
        match field.iter().find(|byte| **byte != 0) {
            Some(byte) => Err(self.malformed("a reserved field is not zero", u64::from(*byte))),
            None => Ok(()),
        }
    }

    /// Bytes that are left.
    pub(crate) fn len(&self) -> usize {
        self.rest.len()
    }

    /// Everything that is left, without taking it.
    pub(crate) fn peek(&self) -> &'a [u8] {
        self.rest
    }

    /// Everything that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Skips what is left: it belongs to a later release, which has said that it may be skipped.
    pub(crate) fn skip_later(self) {}

    /// Checks that nothing is left.
    pub(crate) fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(self.malformed("bytes are left over", extra as u64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_from_the_wire_has_no_control_characters_and_its_length() {
        let sent = "db\0\x1b[2J\n\u{9b}7ä";
        let mut payload = (sent.len() as u16).to_le_bytes().to_vec();
        payload.extend_from_slice(sent.as_bytes());
        let text = |limit| Fields::new(SectionKind::Hello, &payload).text(limit);
        assert_eq!(text(sent.len()).unwrap(), "db??[2J??7ä");
        assert!(text(sent.len() - 1).is_err());
    }
}
