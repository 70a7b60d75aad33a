//! The saved state of a network device.
//!
//! Beside the transport there is only the MAC address: the tap has no state of ours, and frames that wait in
//! the tap or in the held output do not belong to a checkpoint (a network may lose them; TCP sends them
//! again).

use thiserror::Error;

use super::mac::MacAddr;
use crate::devices::virtio::mmio::TransportRestoreError;
use crate::devices::virtio::persist::{DecodeError, Fields, TransportState};

/// The version written.
///
/// - 1: MAC address, transport.
pub const VERSION: u16 = 1;

/// Everything a resumed guest expects to find again in its network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetState {
    /// The address the driver has read from the configuration space.
    pub mac: MacAddr,
    /// Registers and queue positions.
    pub transport: TransportState,
}

/// Why a saved state cannot be taken over. The device is then as after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// The bytes are not a state.
    #[error("cannot read the state of the network device: {0}")]
    Decode(#[from] DecodeError),
    /// The state does not fit the device or the guest's memory.
    #[error("cannot restore the network device: {0}")]
    Transport(#[from] TransportRestoreError),
}

impl NetState {
    /// Length of the encoded state in bytes.
    pub const BYTES: usize = 2 + 6 + TransportState::BYTES;

    /// Appends the state to `out`. Does not allocate if `out` has room for [`Self::BYTES`] more.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.mac.0);
        self.transport.encode(out);
    }

    /// Reads a state that [`encode`](Self::encode) wrote; `bytes` must hold nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(bytes);
        let version = fields.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let mac = MacAddr(fields.array()?);
        if !mac.is_unicast() {
            let value = mac.0.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
            return Err(DecodeError::Value { field: "mac", value });
        }
        let transport = TransportState::decode(&mut fields)?;
        fields.finish()?;
        Ok(Self { mac, transport })
    }
}
