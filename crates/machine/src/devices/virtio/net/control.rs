//! The control queue: how the driver configures the device (virtio 1.2, 5.1.6.5).
//!
//! A command is two bytes (class and number) and its data; the answer is one byte. Everything a command
//! changes is in [`Settings`], which is part of the saved state.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::mac::MacAddr;
use super::offload::{CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ};

const RX: u8 = VIRTIO_NET_CTRL_RX as u8;
const PROMISCUOUS: u8 = VIRTIO_NET_CTRL_RX_PROMISC as u8;
const ALL_MULTICAST: u8 = VIRTIO_NET_CTRL_RX_ALLMULTI as u8;
const MAC: u8 = VIRTIO_NET_CTRL_MAC as u8;
const TABLE_SET: u8 = VIRTIO_NET_CTRL_MAC_TABLE_SET as u8;
const ADDR_SET: u8 = VIRTIO_NET_CTRL_MAC_ADDR_SET as u8;
const ANNOUNCE: u8 = VIRTIO_NET_CTRL_ANNOUNCE as u8;
const ANNOUNCE_ACK: u8 = VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8;
const SEVERAL: u8 = VIRTIO_NET_CTRL_MQ as u8;
const PAIRS_SET: u8 = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8;
const OFFLOADS: u8 = VIRTIO_NET_CTRL_GUEST_OFFLOADS as u8;
const OFFLOADS_SET: u8 = VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as u8;

/// What the guest can change about its network device, and what the device has asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Address of the interface.
    pub mac: MacAddr,
    /// The device asks the driver to announce the guest to the network, and the driver has not yet said that
    /// it did.
    pub announce: bool,
    /// The driver wants the frames to all addresses. It gets them in any case: what reaches the tap is meant
    /// for the guest.
    pub promiscuous: bool,
    /// The driver wants the frames to all groups.
    pub all_multicast: bool,
    /// Work on received frames that the guest does: feature bits.
    pub offloads: u64,
    /// Queue pairs in use.
    pub pairs: u16,
}

impl Settings {
    /// As after a reset, for a card with this address.
    pub fn new(mac: MacAddr) -> Self {
        Self { mac, announce: false, promiscuous: false, all_multicast: false, offloads: 0, pairs: 1 }
    }
}

/// What a driver may ask for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowed {
    /// The features in effect.
    pub(super) features: u64,
    /// Queue pairs the driver has set up.
    pub(super) pairs: u16,
}

/// Does one command and returns the answer. Commands of features that are not in effect, of a wrong length or
/// with an impossible value change nothing.
pub(super) fn execute(command: &[u8], allowed: Allowed, settings: &mut Settings) -> u8 {
    let done = command.split_first_chunk().and_then(|(&[class, number], data)| {
        let has = |feature| (allowed.features & feature != 0).then_some(());
        match (class, number) {
            (RX, PROMISCUOUS) => has(CTRL_RX).and_then(|()| set_flag(&mut settings.promiscuous, data)),
            (RX, ALL_MULTICAST) => has(CTRL_RX).and_then(|()| set_flag(&mut settings.all_multicast, data)),
            (MAC, TABLE_SET) => has(CTRL_RX).and_then(|()| check_tables(data)),
            (MAC, ADDR_SET) => has(CTRL_MAC_ADDR).and_then(|()| set_mac(&mut settings.mac, data)),
            (ANNOUNCE, ANNOUNCE_ACK) if data.is_empty() => {
                has(GUEST_ANNOUNCE).map(|()| settings.announce = false)
            }
            (SEVERAL, PAIRS_SET) => has(MQ).and_then(|()| set_pairs(settings, allowed.pairs, data)),
            (OFFLOADS, OFFLOADS_SET) => {
                has(CTRL_GUEST_OFFLOADS).and_then(|()| set_offloads(settings, allowed.features, data))
            }
            _ => None,
        }
    });
    if done.is_some() { VIRTIO_NET_OK as u8 } else { VIRTIO_NET_ERR as u8 }
}

fn set_flag(flag: &mut bool, data: &[u8]) -> Option<()> {
    *flag = match data {
        [0] => false,
        [1] => true,
        _ => return None,
    };
    Some(())
}

/// Two tables of addresses, of interfaces and of groups. The device has no filter to put them into.
fn check_tables(mut data: &[u8]) -> Option<()> {
    for _ in 0..2 {
        let (count, rest) = data.split_first_chunk()?;
        let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
        data = rest.get(bytes..)?;
    }
    data.is_empty().then_some(())
}

fn set_mac(mac: &mut MacAddr, data: &[u8]) -> Option<()> {
    let asked = MacAddr(data.try_into().ok()?);
    asked.is_unicast().then(|| *mac = asked)
}

fn set_pairs(settings: &mut Settings, most: u16, data: &[u8]) -> Option<()> {
    let pairs = u16::from_le_bytes(data.try_into().ok()?);
    (1..=most).contains(&pairs).then(|| settings.pairs = pairs)
}

fn set_offloads(settings: &mut Settings, features: u64, data: &[u8]) -> Option<()> {
    let offloads = u64::from_le_bytes(data.try_into().ok()?);
    let may = offloads & !(features & GUEST_OFFLOADS) == 0;
    may.then(|| settings.offloads = super::offload::effective(offloads))
}
