//! The kernel's answers: messages, acknowledgements, interfaces. `netlink-packet-route` does not read them: a kernel
//! newer than the crate adds attributes, and an attribute that we do not need must never make a request fail. Only the
//! few fields below are read, directly from the bytes, and a length is believed only within its bounds.

use std::io;

use netlink_packet_core::NlasIterator;
use netlink_packet_route::link::LinkFlags;
use nix::errno::Errno;

use super::NetlinkError;

// Header sizes and attribute numbers of `linux/netlink.h` and `linux/if_link.h`.
const NLMSGHDR: usize = 16;
const IFINFOMSG: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BR_VLAN_DEFAULT_PVID: u16 = 39;

/// What the kernel reports of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Name, for example `tap0`.
    pub name: String,
    /// Number, unique in the network namespace.
    pub index: u32,
    /// Hardware address; `None` for interfaces without one of six bytes.
    pub mac: Option<[u8; 6]>,
    /// Whether its administrator has switched it on (`IFF_UP`).
    pub up: bool,
    /// Whether it has a carrier: its cable is plugged in (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// Number of the bridge that it is attached to.
    pub bridge: Option<u32>,
    /// Its kind: `bridge`, `veth`, `tun` (taps too). `None` for hardware and the loopback.
    pub kind: Option<String>,
    /// Most bytes of a packet, without the Ethernet header; 0 if the kernel does not say.
    pub mtu: u32,
    /// Of a bridge: how it treats VLANs.
    pub vlans: BridgeVlans,
}

/// How a bridge treats VLANs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BridgeVlans {
    /// Whether it looks at them.
    pub filtering: bool,
    /// The VLAN of untagged frames at a new port; 0 for none.
    pub default_pvid: u16,
}

impl Link {
    /// Whether it is a tap, which leads to a guest.
    pub fn is_tap(&self) -> bool {
        self.kind.as_deref() == Some("tun")
    }

    /// Whether it may lead out of this host, unlike a tap or a cable between namespaces.
    pub fn is_outward(&self) -> bool {
        !matches!(self.kind.as_deref(), Some("tun" | "veth" | "dummy"))
    }
}

/// Reads the messages of one datagram and keeps the answers to request number `sequence`. True when that request
/// is complete.
pub(super) fn read_messages(
    mut rest: &[u8],
    sequence: u32,
    what: &str,
    answers: &mut Vec<Vec<u8>>,
) -> Result<bool, NetlinkError> {
    let bad = |problem| NetlinkError::Answer { what: what.to_string(), problem };
    while !rest.is_empty() {
        let length = u32_at(rest, 0).ok_or_else(|| bad("shorter than its header"))? as usize;
        if length < NLMSGHDR || length > rest.len() {
            return Err(bad("a message longer than the datagram"));
        }
        let (kind, flags) = (u16_at(rest, 4), u16_at(rest, 6));
        let body = &rest[NLMSGHDR..length];
        // An answer to an earlier request that was given up is not ours.
        if u32_at(rest, 8) == Some(sequence) {
            match kind {
                NLMSG_ERROR => return acknowledged(body, flags, what).map(|()| true),
                NLMSG_DONE => return Ok(true),
                _ => answers.push(body.to_vec()),
            }
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// Turns the kernel's acknowledgement (`struct nlmsgerr`) into a result.
fn acknowledged(body: &[u8], flags: u16, what: &str) -> Result<(), NetlinkError> {
    let bad = |problem| NetlinkError::Answer { what: what.to_string(), problem };
    let code = u32_at(body, 0).ok_or_else(|| bad("an acknowledgement without a code"))? as i32;
    if code == 0 {
        return Ok(());
    }
    let what = what.to_string();
    let source = io::Error::from_raw_os_error(code.wrapping_neg());
    match Errno::from_raw(code.wrapping_neg()) {
        Errno::EEXIST => Err(NetlinkError::Exists { what }),
        Errno::EPERM | Errno::EACCES => Err(NetlinkError::Permission { what }),
        _ => Err(NetlinkError::Refused { what, source, message: kernel_message(body, flags) }),
    }
}

/// The kernel's own words about an error, if it sent some (extended acknowledgement).
fn kernel_message(body: &[u8], flags: u16) -> String {
    if flags & NLM_F_ACK_TLVS == 0 {
        return String::new();
    }
    // After the code: the header of our request, and the request itself unless it was cut off.
    let request = if flags & NLM_F_CAPPED != 0 { NLMSGHDR } else { u32_at(body, 4).unwrap_or(0) as usize };
    let attributes = body.get(4 + request.next_multiple_of(4)..).unwrap_or_default();
    NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| text(attribute.value()))
        .unwrap_or_default()
}

/// Reads `struct ifinfomsg` and the attributes behind it.
pub(super) fn parse_link(bytes: &[u8], what: &str) -> Result<Link, NetlinkError> {
    let bad = |problem| NetlinkError::Answer { what: what.to_string(), problem };
    let index = u32_at(bytes, 4).ok_or_else(|| bad("an interface without a number"))?;
    let flags = u32_at(bytes, 8).ok_or_else(|| bad("an interface without flags"))?;
    let attributes = bytes.get(IFINFOMSG..).ok_or_else(|| bad("an interface without attributes"))?;
    let flags = LinkFlags::from_bits_retain(flags);
    let (up, carrier) = (flags.contains(LinkFlags::Up), flags.contains(LinkFlags::LowerUp));
    let (mac, bridge, kind, vlans) = Default::default();
    let mut link = Link { name: String::new(), index, mac, up, carrier, bridge, kind, mtu: 0, vlans };
    let mut data = Vec::new();
    for attribute in NlasIterator::new(attributes).filter_map(Result::ok) {
        match attribute.kind() {
            IFLA_IFNAME => link.name = text(attribute.value()),
            IFLA_ADDRESS => link.mac = attribute.value().try_into().ok(),
            IFLA_MASTER => link.bridge = u32_at(attribute.value(), 0),
            IFLA_MTU => link.mtu = u32_at(attribute.value(), 0).unwrap_or(0),
            IFLA_LINKINFO => {
                for info in NlasIterator::new(attribute.value()).filter_map(Result::ok) {
                    match info.kind() {
                        IFLA_INFO_KIND => link.kind = Some(text(info.value())),
                        IFLA_INFO_DATA => data = info.value().to_vec(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // Other kinds have other attributes with these numbers.
    if link.kind.as_deref() == Some("bridge") {
        link.vlans = parse_vlans(&data);
    }
    Ok(link)
}

fn parse_vlans(data: &[u8]) -> BridgeVlans {
    let mut vlans = BridgeVlans::default();
    for attribute in NlasIterator::new(data).filter_map(Result::ok) {
        let value = attribute.value();
        match (attribute.kind(), value.len()) {
            (IFLA_BR_VLAN_FILTERING, 1) => vlans.filtering = value[0] != 0,
            (IFLA_BR_VLAN_DEFAULT_PVID, 2) => vlans.default_pvid = u16_at(value, 0),
            _ => {}
        }
    }
    vlans
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset + 4)?;
    field.try_into().ok().map(u32::from_ne_bytes)
}

/// Like [`u32_at`], for fields of a header whose length was checked.
fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_ne_bytes([bytes[offset], bytes[offset + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer from the kernel is believed only within its bounds.
    #[test]
    fn mangled_answers_are_errors_and_never_panics() {
        use proptest::prelude::*;
        let sequence = 7_u32;
        proptest!(|(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), ours in any::<bool>(),
                    length in 0_u32..220, kind in prop_oneof![Just(2_u16), Just(3), Just(16)])| {
            if bytes.len() >= 12 {
                bytes[0..4].copy_from_slice(&length.to_ne_bytes());
                bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
                if ours {
                    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
                }
            }
            let mut answers = Vec::new();
            let _ = read_messages(&bytes, sequence, "test", &mut answers);
            let _ = parse_link(&bytes, "test");
            for flags in [0, NLM_F_ACK_TLVS, NLM_F_ACK_TLVS | NLM_F_CAPPED] {
                let _ = acknowledged(&bytes, flags, "test");
            }
        });
    }
}
