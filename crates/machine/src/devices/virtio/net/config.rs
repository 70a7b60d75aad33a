//! The configuration space: address, link, number of queue pairs (virtio 1.2, 5.1.4).

use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use super::control::Settings;

/// What the driver reads. The link is always up; a device with one pair does not say how many it has.
pub(super) fn config_space(settings: &Settings, pairs: usize) -> [u8; 10] {
    let asks = if settings.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
    let status = (VIRTIO_NET_S_LINK_UP | asks) as u16;
    let pairs = if pairs > 1 { pairs as u16 } else { 0 };
    let mut space = [0; 10];
    space[..6].copy_from_slice(&settings.mac.0);
    space[6..8].copy_from_slice(&status.to_le_bytes());
    space[8..].copy_from_slice(&pairs.to_le_bytes());
    space
}
