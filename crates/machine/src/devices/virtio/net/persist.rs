//! The saved state of a network device.
//!
//! Beside the transport there is what the driver has set over the control queue: the tap has no state of ours
//! that does not follow from it. Frames that wait in the tap, for a receive buffer or in the held output do
//! not belong to a checkpoint (a network may lose them; TCP sends them again).

use thiserror::Error;

use super::control::Settings;
use super::mac::MacAddr;
use super::offload::{GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ, effective};
use crate::devices::virtio::mmio::TransportRestoreError;
use crate::devices::virtio::persist::{DecodeError, Fields, TransportState};

/// The version written, and the only one read.
///
/// - 1: MAC address, transport.
/// - 2: MAC address of the card, settings, transport.
pub const VERSION: u16 = 2;

/// Everything a resumed guest expects to find again in its network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetState {
    /// The address of the card, which a reset brings back.
    pub mac: MacAddr,
    /// What the driver has set.
    pub settings: Settings,
    /// Registers and queue positions.
    pub transport: TransportState,
}

/// Why a saved state cannot be taken over. The device is then as after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// The state was written by an older release.
    #[error(
        "the state of the network device is of version {found}, this release knows {VERSION}: run the same \
         release on both hosts"
    )]
    Old {
        /// What the state says.
        found: u16,
    },
    /// The bytes are not a state.
    #[error("cannot read the state of the network device: {0}")]
    Decode(#[from] DecodeError),
    /// The state does not fit the device or the guest's memory.
    #[error("cannot restore the network device: {0}")]
    Transport(#[from] TransportRestoreError),
    /// The driver cannot have set this with the features it has accepted.
    #[error("the state of the network device has an impossible {0}")]
    Setting(&'static str),
}

impl NetState {
    /// Most bytes of an encoded state.
    pub const BYTES: usize = 2 + 6 + SETTINGS + TransportState::BYTES;

    /// Appends the state to `out`. Does not allocate if `out` has room for [`Self::BYTES`] more.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.mac.0);
        self.settings.encode(out);
        self.transport.encode(out);
    }

    /// Reads a state that [`encode`](Self::encode) wrote; `bytes` must hold nothing else.
    ///
    /// # Errors
    /// [`RestoreError::Old`] or [`RestoreError::Decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RestoreError> {
        let mut fields = Fields::new(bytes);
        let version = fields.u16()?;
        if version < VERSION {
            return Err(RestoreError::Old { found: version });
        }
        if version > VERSION {
            return Err(DecodeError::Version { found: version, known: VERSION }.into());
        }
        let mac = address(&mut fields)?;
        let settings = Settings::decode(&mut fields)?;
        let transport = TransportState::decode(&mut fields)?;
        fields.finish()?;
        Ok(Self { mac, settings, transport })
    }

    /// Whether the settings can be those of the driver in the transport's state, on a device with so many
    /// queue pairs.
    pub(super) fn check(&self, pairs: usize) -> Result<(), RestoreError> {
        let features = effective(self.transport.driver_features);
        let Settings { announce, offloads, .. } = self.settings;
        let most = if features & MQ != 0 { pairs } else { 1 };
        if !(1..=most).contains(&usize::from(self.settings.pairs)) {
            return Err(RestoreError::Setting("number of queue pairs"));
        }
        if offloads & !(features & GUEST_OFFLOADS) != 0 {
            return Err(RestoreError::Setting("set of offloads"));
        }
        if announce && features & GUEST_ANNOUNCE == 0 {
            return Err(RestoreError::Setting("announcement"));
        }
        Ok(())
    }
}

/// Length of encoded settings.
const SETTINGS: usize = 6 + 3 + 8 + 2;

impl Settings {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.mac.0);
        out.extend([self.announce, self.promiscuous, self.all_multicast].map(u8::from));
        out.extend_from_slice(&self.offloads.to_le_bytes());
        out.extend_from_slice(&self.pairs.to_le_bytes());
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            mac: address(fields)?,
            announce: fields.flag("announce")?,
            promiscuous: fields.flag("promiscuous")?,
            all_multicast: fields.flag("all multicast")?,
            offloads: u64::from_le_bytes(fields.array()?),
            pairs: fields.u16()?,
        })
    }
}

fn address(fields: &mut Fields<'_>) -> Result<MacAddr, DecodeError> {
    let mac = MacAddr(fields.array()?);
    if !mac.is_unicast() {
        let value = mac.0.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
        return Err(DecodeError::Value { field: "mac", value });
    }
    Ok(mac)
}
