//! The identity of a VM.

use std::fmt;
use std::str::FromStr;

/// The identity of a VM: random, made when the VM is first started, kept over takeovers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub [u8; 16]);

impl fmt::Display for VmId {
    /// 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The text is not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a VM's id has 32 hexadecimal digits")]
pub struct VmIdError;

impl FromStr for VmId {
    type Err = VmIdError;

    /// Reads 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<Self, VmIdError> {
        let mut id = [0; 16];
        if text.len() != 2 * id.len() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(VmIdError);
        }
        for (index, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).map_err(|_| VmIdError)?;
        }
        Ok(Self(id))
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId({self})")
    }
}
