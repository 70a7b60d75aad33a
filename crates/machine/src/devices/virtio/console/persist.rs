//! The saved state of a console: its transport and the size of the screen that the driver knows. Bytes that
//! the guest has not taken yet are not part of it: whoever typed them is attached to the old host.

use thiserror::Error;

use super::config::ScreenSize;
use crate::devices::virtio::mmio::TransportRestoreError;
use crate::devices::virtio::persist::{DecodeError, Fields, TransportState};

/// The version written.
///
/// - 1: columns, rows, transport.
pub const VERSION: u16 = 1;

/// Everything a resumed guest expects to find again in its console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleState {
    /// The size of the screen.
    pub size: ScreenSize,
    /// Registers and queue positions.
    pub transport: TransportState,
}

/// Why a saved state cannot be taken over. The device is then as after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// The bytes are not a state.
    #[error("cannot read the state of the console: {0}")]
    Decode(#[from] DecodeError),
    /// The state does not fit the device or the guest's memory.
    #[error("cannot restore the console: {0}")]
    Transport(#[from] TransportRestoreError),
}

impl ConsoleState {
    /// Length of the encoded state in bytes at most.
    pub const BYTES: usize = 2 + 4 + TransportState::BYTES;

    /// Appends the state to `out`. Does not allocate if `out` has room for [`Self::BYTES`] more.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.size.columns.to_le_bytes());
        out.extend_from_slice(&self.size.rows.to_le_bytes());
        self.transport.encode(out);
    }

    /// Reads a state that [`encode`](Self::encode) wrote; `bytes` must hold nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(bytes);
        let version = fields.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let size = ScreenSize { columns: fields.u16()?, rows: fields.u16()? };
        let transport = TransportState::decode(&mut fields)?;
        fields.finish()?;
        Ok(Self { size, transport })
    }
}
