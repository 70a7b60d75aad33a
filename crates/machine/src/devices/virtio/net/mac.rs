//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The address of a network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// Why a text is not the address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MacError {
    /// Not six numbers of two hexadecimal digits.
    #[error("\"{0}\" is not a MAC address; write it as 52:54:00:12:34:56")]
    Form(String),
    /// A group address, or all zero: no interface can have it.
    #[error("{0} cannot be the address of an interface: its first byte must be even and not all may be zero")]
    NotUnicast(MacAddr),
}

impl MacAddr {
    /// Whether an interface may have this address.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let form = || MacError::Form(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(form)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(form());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| form())?;
        }
        if parts.next().is_some() {
            return Err(form());
        }
        let mac = Self(bytes);
        if mac.is_unicast() { Ok(mac) } else { Err(MacError::NotUnicast(mac)) }
    }
}
