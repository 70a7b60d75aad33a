//! What is saved of a network card beside its registers: what the driver has set over the control queue.
//!
//! The tap has no state of ours that does not follow from it. Frames that wait in the tap, for a receive
//! buffer or in the held output do not belong to a checkpoint (a network may lose them; TCP sends them
//! again).

use thiserror::Error;

use super::control::Settings;
use super::mac::MacAddr;
use super::offload::{GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ, effective};
use crate::devices::virtio::persist::{DecodeError, DeviceState, Fields, SavedState, TransportState};

/// A network card's own part of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardState {
    /// The address of the card, which a reset brings back.
    pub mac: MacAddr,
    /// What the driver has set.
    pub settings: Settings,
}

/// Everything that a resumed guest expects to find again in its network card.
pub type NetState = SavedState<CardState>;

/// The driver cannot have set this with the features that it has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("its state has an impossible {0}")]
pub struct ImpossibleSetting(pub &'static str);

/// Length of encoded settings.
const SETTINGS: usize = 6 + 3 + 8 + 2;

impl DeviceState for CardState {
    /// - 1: MAC address, transport.
    /// - 2: MAC address of the card, settings, transport.
    const VERSION: u16 = 2;
    const BYTES: usize = 6 + SETTINGS;

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.mac.0);
        self.settings.encode(out);
    }

    fn decode(bytes: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self { mac: address(bytes)?, settings: Settings::decode(bytes)? })
    }
}

impl CardState {
    /// Whether the settings can be those of the driver in the transport's state, on a card with so many queue
    /// pairs.
    pub(super) fn check(&self, transport: &TransportState, pairs: usize) -> Result<(), ImpossibleSetting> {
        let features = effective(transport.driver_features);
        let Settings { announce, offloads, .. } = self.settings;
        let most = if features & MQ != 0 { pairs } else { 1 };
        if !(1..=most).contains(&usize::from(self.settings.pairs)) {
            return Err(ImpossibleSetting("number of queue pairs"));
        }
        if offloads & !(features & GUEST_OFFLOADS) != 0 {
            return Err(ImpossibleSetting("set of offloads"));
        }
        if announce && features & GUEST_ANNOUNCE == 0 {
            return Err(ImpossibleSetting("announcement"));
        }
        Ok(())
    }
}

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
            offloads: fields.u64()?,
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
