//! Certificates that count no longer: a list beside the keys, which every host can add to without the CA's key.
//!
//! A line has a serial number in hexadecimal digits, and after a space anything for people. Lines that begin with
//! `#` are comments. A line that is neither makes the list unreadable, and then no link is made: a list that was
//! cut off must not let a stranger in.

use std::collections::BTreeSet;

/// The list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked(BTreeSet<String>);

impl Revoked {
    /// Reads the list.
    ///
    /// # Errors
    /// The first line that is no serial number.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let serial = |line: &str| {
            let serial = line.split_whitespace().next().unwrap_or_default();
            is_serial(serial).then(|| serial.to_ascii_lowercase()).ok_or_else(|| line.to_owned())
        };
        lines.map(serial).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a certificate with this serial number counts no longer.
    pub fn has(&self, serial: &str) -> bool {
        self.0.contains(serial)
    }

    /// This list and another one.
    #[must_use]
    pub(super) fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// How many are on the list.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether a text can be a serial number: a whole number of bytes.
pub(super) fn is_serial(text: &str) -> bool {
    text.len() >= 16 && text.len().is_multiple_of(2) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_list_is_no_list() {
        let serial = "00112233445566778899aabbccddeeff";
        let list = format!("# revoked certificates\n\n{} hostb, stolen\n", serial.to_uppercase());
        let list = Revoked::parse(&list).unwrap();
        assert!(list.has(serial) && list.len() == 1 && !list.has("00"));
        assert_eq!(Revoked::parse("0011223344 hostb").unwrap_err(), "0011223344 hostb");
        assert!(Revoked::parse("hostb").is_err());
    }
}
