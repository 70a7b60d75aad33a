//! The header in front of every frame, and the work that guest and host leave to each other by it.
//!
//! A guest that has accepted the features may send frames whose checksum is unfinished, or TCP segments of up
//! to 64 KiB to be cut by the host's kernel or its network card; a tap that was told so gives it such frames
//! too. The header says what is to be done (`struct virtio_net_hdr_v1`, virtio 1.2, 5.1.6).
//!
//! The kernel checks the headers it is given and refuses bad ones. This module does not rely on that: only
//! claims that the accepted features allow and that lie within the frame are passed on, everything else in a
//! header is made zero.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use crate::devices::virtio::COMMON_FEATURES;

/// Length of the header in front of every frame: in guest memory, in the held output and at the tap.
pub const HEADER: usize = 12;

/// Length of an Ethernet header: the shortest frame, and where a checksum can begin at the earliest.
pub(super) const ETHERNET: usize = 14;
/// Shortest TCP header, and where the checksum is in it.
const TCP_HEADER: usize = 20;
const TCP_CHECKSUM: u16 = 16;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Features as bits.
pub(super) const CSUM: u64 = bit(VIRTIO_NET_F_CSUM);
pub(super) const HOST_TSO4: u64 = bit(VIRTIO_NET_F_HOST_TSO4);
pub(super) const HOST_TSO6: u64 = bit(VIRTIO_NET_F_HOST_TSO6);
pub(super) const HOST_ECN: u64 = bit(VIRTIO_NET_F_HOST_ECN);
pub(super) const GUEST_CSUM: u64 = bit(VIRTIO_NET_F_GUEST_CSUM);
pub(super) const GUEST_TSO4: u64 = bit(VIRTIO_NET_F_GUEST_TSO4);
pub(super) const GUEST_TSO6: u64 = bit(VIRTIO_NET_F_GUEST_TSO6);
pub(super) const GUEST_ECN: u64 = bit(VIRTIO_NET_F_GUEST_ECN);
pub(super) const MRG_RXBUF: u64 = bit(VIRTIO_NET_F_MRG_RXBUF);
pub(super) const CTRL_VQ: u64 = bit(VIRTIO_NET_F_CTRL_VQ);
pub(super) const CTRL_RX: u64 = bit(VIRTIO_NET_F_CTRL_RX);
pub(super) const CTRL_MAC_ADDR: u64 = bit(VIRTIO_NET_F_CTRL_MAC_ADDR);
pub(super) const CTRL_GUEST_OFFLOADS: u64 = bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
pub(super) const GUEST_ANNOUNCE: u64 = bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
pub(super) const MQ: u64 = bit(VIRTIO_NET_F_MQ);

/// What the host may leave to the guest: these bits also name them on the control queue.
pub(super) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;

/// The driver is told how large its packets may be.
pub(super) const MTU: u64 = bit(VIRTIO_NET_F_MTU);

/// The features that a device with this many queue pairs offers, and with a largest packet or without.
pub(super) const fn offered(pairs: usize, mtu: Option<u16>) -> u64 {
    let several = (if pairs > 1 { MQ } else { 0 }) | (if mtu.is_some() { MTU } else { 0 });
    let transmit = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
    let control = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | GUEST_ANNOUNCE;
    let simple = bit(VIRTIO_NET_F_MAC) | bit(VIRTIO_NET_F_STATUS) | MRG_RXBUF;
    COMMON_FEATURES | simple | transmit | GUEST_OFFLOADS | control | several
}

/// The accepted features without those that need one that was not accepted (virtio 1.2, 5.1.3.1).
pub(super) fn effective(accepted: u64) -> u64 {
    /// Features, and those of which they need one.
    const NEEDS: [(u64, u64); 6] = [
        (HOST_TSO4 | HOST_TSO6, CSUM),
        (HOST_ECN, HOST_TSO4 | HOST_TSO6),
        (GUEST_TSO4 | GUEST_TSO6, GUEST_CSUM),
        (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
        (CTRL_RX | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS, CTRL_VQ),
        (GUEST_ANNOUNCE | MQ, CTRL_VQ),
    ];
    NEEDS.iter().fold(
        accepted,
        |left, &(features, any_of)| {
            if left & any_of == 0 { left & !features } else { left }
        },
    )
}

/// `struct virtio_net_hdr_v1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    pub(super) hdr_len: u16,
    pub(super) gso_size: u16,
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
    pub(super) num_buffers: u16,
}

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header to send a frame of `len` bytes with; `None` if the driver claims what it must not.
    pub(super) fn to_send(self, len: usize, features: u64) -> Option<Self> {
        let mut sent = Self::default();
        if self.flags & NEEDS_CSUM != 0 {
            let start = usize::from(self.csum_start);
            let within = start >= ETHERNET && start + usize::from(self.csum_offset) + 2 <= len;
            if features & CSUM == 0 || !within {
                return None;
            }
            sent.flags = NEEDS_CSUM;
            sent.csum_start = self.csum_start;
            sent.csum_offset = self.csum_offset;
        }
        if self.gso_type == NONE {
            return Some(sent);
        }
        let allowed = match self.gso_type & !ECN {
            TCPV4 => features & HOST_TSO4 != 0,
            TCPV6 => features & HOST_TSO6 != 0,
            _ => false,
        } && (self.gso_type & ECN == 0 || features & HOST_ECN != 0);
        let tcp = sent.flags & NEEDS_CSUM != 0
            && self.csum_offset == TCP_CHECKSUM
            && usize::from(self.csum_start) + TCP_HEADER <= len;
        if !allowed || !tcp || self.gso_size == 0 {
            return None;
        }
        sent.gso_type = self.gso_type;
        sent.gso_size = self.gso_size;
        // Only a hint, and one that the kernel believes: not beyond the frame.
        sent.hdr_len = usize::from(self.hdr_len).min(len) as u16;
        Some(sent)
    }

    /// The header to deliver a frame with to a guest that does the work in `offloads`; `None` if the frame
    /// needs work the guest does not do. That happens to frames that were on their way when another driver
    /// took over.
    pub(super) fn to_deliver(self, offloads: u64) -> Option<Self> {
        // 1 also where no buffers are merged (5.1.6.4.1).
        let mut delivered = Self { num_buffers: 1, ..Self::default() };
        if offloads & GUEST_CSUM != 0 {
            delivered.flags = self.flags & (NEEDS_CSUM | DATA_VALID);
        } else if self.flags & NEEDS_CSUM != 0 {
            return None;
        }
        if delivered.flags & NEEDS_CSUM != 0 {
            delivered.csum_start = self.csum_start;
            delivered.csum_offset = self.csum_offset;
        }
        let allowed = match self.gso_type & !ECN {
            NONE => true,
            TCPV4 => offloads & GUEST_TSO4 != 0,
            TCPV6 => offloads & GUEST_TSO6 != 0,
            _ => false,
        } && (self.gso_type & ECN == 0 || offloads & GUEST_ECN != 0);
        if !allowed {
            return None;
        }
        if self.gso_type != NONE {
            delivered.gso_type = self.gso_type;
            delivered.gso_size = self.gso_size;
            delivered.hdr_len = self.hdr_len;
        }
        Some(delivered)
    }
}
