//! The rtnetlink client: interfaces, addresses, routes.
//!
//! `netlink-packet-route` builds the requests; `answer` reads what the kernel answers, and `error` has what can go
//! wrong.

mod answer;
mod error;
mod vlan;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

pub use answer::{BridgeVlans, Link};
pub use error::NetlinkError;

use crate::process;
use answer::{parse_link, read_messages};

/// Longest interface name, without the closing zero (kernel: `IFNAMSIZ` - 1).
const LONGEST_NAME: usize = 15;

/// A connection to the kernel's network configuration.
///
/// It belongs to the network namespace of the thread that opened it, wherever it is used later.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects to the kernel, in the network namespace of the calling thread.
    pub fn open() -> Result<Netlink, NetlinkError> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(NetlinkError::Open)?;
        socket.bind_auto().map_err(NetlinkError::Open)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(NetlinkError::Open)?;
        // Both options only improve error texts, and old kernels lack them.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Netlink { socket, sequence: 0 })
    }

    /// Makes a bridge that forwards from the first moment: no spanning tree, no forward delay, no multicast
    /// snooping.
    ///
    /// The bridge gets its own hardware address. Without one it takes the lowest address of its ports, which
    /// changes as taps come and go, and guests that use the bridge as a gateway would lose it.
    pub fn create_bridge(&mut self, name: &str) -> Result<(), NetlinkError> {
        check_name(name)?;
        let what = format!("create bridge {name}");
        let mac = random_mac().map_err(|source| NetlinkError::Socket { what: what.clone(), source })?;
        let data = InfoData::Bridge(vec![
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::ForwardDelay(0),
            InfoBridge::MulticastSnooping(false),
        ]);
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_string()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]),
        ];
        self.create(link, "bridge", what)
    }

    /// Makes a virtual cable; its two ends are the interfaces `a` and `b`, both here and both down.
    pub fn create_veth(&mut self, a: &str, b: &str) -> Result<(), NetlinkError> {
        check_name(a)?;
        check_name(b)?;
        let what = format!("create veth pair {a} - {b}");
        let mut peer = LinkMessage::default();
        peer.attributes = vec![LinkAttribute::IfName(b.to_string())];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(a.to_string()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.create(link, "veth", what)
    }

    fn create(&mut self, link: LinkMessage, kind: &'static str, what: String) -> Result<(), NetlinkError> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        match self.change(RouteNetlinkMessage::NewLink(link), flags, what) {
            Err(NetlinkError::Refused { what, source, .. })
                if source.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) =>
            {
                Err(NetlinkError::NoSuchKind { what, kind })
            }
            other => other,
        }
    }

    /// Moves an interface into another network namespace. It arrives down and without addresses.
    pub fn move_to_namespace(&mut self, name: &str, namespace: BorrowedFd<'_>) -> Result<(), NetlinkError> {
        let fd = LinkAttribute::NetNsFd(namespace.as_raw_fd());
        self.set_link(name, format!("move {name} to another network namespace"), |link| {
            link.attributes.push(fd)
        })
    }

    /// Makes an interface a port of a bridge. It leaves the bridge that it was in.
    pub fn attach(&mut self, name: &str, bridge: &str) -> Result<(), NetlinkError> {
        // The kernel would first take the interface out of its present bridge and then refuse.
        let port = LinkAttribute::Controller(self.bridge(name, bridge)?.index);
        self.set_link(name, attaching(name, bridge), |link| link.attributes.push(port))
    }

    /// The bridge that an interface is to be attached to.
    pub fn bridge(&mut self, port: &str, bridge: &str) -> Result<Link, NetlinkError> {
        let what = attaching(port, bridge);
        let target = self.find(bridge, &what).map_err(|error| error.without(port))?;
        if target.kind.as_deref() != Some("bridge") {
            return Err(NetlinkError::NotBridge { what, name: bridge.to_string() });
        }
        Ok(target)
    }

    /// Takes an interface out of its bridge. It is no error if it is in none.
    pub fn detach(&mut self, name: &str) -> Result<(), NetlinkError> {
        let none = LinkAttribute::Controller(0);
        self.set_link(name, format!("detach {name} from its bridge"), |link| link.attributes.push(none))
    }

    /// Switches an interface on.
    pub fn set_up(&mut self, name: &str) -> Result<(), NetlinkError> {
        self.set_link(name, format!("set {name} up"), |link| {
            link.header.flags = LinkFlags::Up;
            link.header.change_mask = LinkFlags::Up;
        })
    }

    /// Switches an interface off, which cuts the cable for everything behind it.
    pub fn set_down(&mut self, name: &str) -> Result<(), NetlinkError> {
        self.set_link(name, format!("set {name} down"), |link| {
            link.header.flags = LinkFlags::empty();
            link.header.change_mask = LinkFlags::Up;
        })
    }

    /// Gives an interface this hardware address.
    pub fn set_mac(&mut self, name: &str, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let address = LinkAttribute::Address(mac.to_vec());
        self.set_link(name, format!("set the hardware address of {name}"), |link| {
            link.attributes.push(address)
        })
    }

    /// Lets an interface carry packets of up to so many bytes, without their Ethernet header.
    pub fn set_mtu(&mut self, name: &str, mtu: u32) -> Result<(), NetlinkError> {
        let mtu_of = LinkAttribute::Mtu(mtu);
        self.set_link(name, format!("set the MTU of {name} to {mtu}"), |link| link.attributes.push(mtu_of))
    }

    /// Adds an IPv4 address with its prefix length; the route to that network comes with it.
    pub fn add_address(&mut self, name: &str, address: Ipv4Addr, prefix: u8) -> Result<(), NetlinkError> {
        let what = format!("add address {address}/{prefix} to {name}");
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix;
        message.header.index = self.index_for(name, &what)?;
        message.attributes =
            vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        if prefix < 31 {
            let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast((address.to_bits() | host_bits).into()));
        }
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL, what)
    }

    /// Sends everything without a better route to this gateway.
    pub fn add_default_route(&mut self, gateway: Ipv4Addr) -> Result<(), NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway))];
        let what = format!("add a default route through {gateway}");
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL, what)
    }

    /// Deletes an interface; the other end of a veth pair goes with it.
    pub fn delete(&mut self, name: &str) -> Result<(), NetlinkError> {
        let what = format!("delete interface {name}");
        let mut message = LinkMessage::default();
        message.header.index = self.index_for(name, &what)?;
        self.change(RouteNetlinkMessage::DelLink(message), 0, what)
    }

    /// The number of an interface.
    pub fn index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        Ok(self.link(name)?.index)
    }

    /// Whether an interface of this name exists.
    pub fn exists(&mut self, name: &str) -> Result<bool, NetlinkError> {
        match self.link(name) {
            Ok(_) => Ok(true),
            Err(NetlinkError::NoInterface { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// What the kernel knows of one interface.
    pub fn link(&mut self, name: &str) -> Result<Link, NetlinkError> {
        self.find(name, "look it up")
    }

    /// All interfaces of this network namespace, by number.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let what = "list the interfaces";
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.request(request, NLM_F_DUMP, what)?;
        let mut links = answers.iter().map(|bytes| parse_link(bytes, what)).collect::<Result<Vec<_>, _>>()?;
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    fn find(&mut self, name: &str, what: &str) -> Result<Link, NetlinkError> {
        check_name(name)?;
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_string())];
        let answers = match self.request(RouteNetlinkMessage::GetLink(message), NLM_F_ACK, what) {
            Err(NetlinkError::Refused { source, .. })
                if source.raw_os_error() == Some(Errno::ENODEV as i32) =>
            {
                return Err(self.no_interface(name, what));
            }
            other => other?,
        };
        let no_answer = || NetlinkError::Answer { what: what.to_string(), problem: "no interface in it" };
        parse_link(answers.first().ok_or_else(no_answer)?, what)
    }

    /// The error for a missing interface. It lists those that exist: the usual cause is a wrong namespace.
    fn no_interface(&mut self, name: &str, what: &str) -> NetlinkError {
        let names: Vec<String> = self.links().unwrap_or_default().into_iter().map(|link| link.name).collect();
        NetlinkError::NoInterface { name: name.to_string(), what: what.to_string(), present: names }
    }

    fn index_for(&mut self, name: &str, what: &str) -> Result<u32, NetlinkError> {
        Ok(self.find(name, what)?.index)
    }

    fn set_link(
        &mut self,
        name: &str,
        what: String,
        fill: impl FnOnce(&mut LinkMessage),
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index_for(name, &what)?;
        fill(&mut message);
        self.change(RouteNetlinkMessage::SetLink(message), 0, what)
    }

    /// Sends a request that changes something: the kernel acknowledges it or says why not.
    fn change(&mut self, message: RouteNetlinkMessage, flags: u16, what: String) -> Result<(), NetlinkError> {
        self.request(message, flags | NLM_F_ACK, &what).map(drop)
    }

    /// Sends one request and collects its answers until the kernel marks the end.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        what: &str,
    ) -> Result<Vec<Vec<u8>>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::InnerMessage(message));
        packet.header.flags = NLM_F_REQUEST | flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        let failed = |source| NetlinkError::Socket { what: what.to_string(), source };
        self.socket.send(&bytes, 0).map_err(failed)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, sender) = receive(&self.socket).map_err(failed)?;
            // Only the kernel (port 0) may answer; anybody can send to a netlink socket.
            if sender.port_number() == 0 && read_messages(&datagram, self.sequence, what, &mut answers)? {
                return Ok(answers);
            }
        }
    }
}

/// Receives one datagram. Unlike `Socket::recv_from_full` it survives a signal.
fn receive(socket: &Socket) -> io::Result<(Vec<u8>, SocketAddr)> {
    // The kernel sends dumps in datagrams of at most 32 KiB and single links in a few KiB.
    let mut buffer = Vec::with_capacity(64 << 10);
    loop {
        match socket.recv_from(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
            Ok((_, sender)) => return Ok((buffer, sender)),
        }
    }
}

fn attaching(name: &str, bridge: &str) -> String {
    format!("attach {name} to bridge {bridge}")
}

fn check_name(name: &str) -> Result<(), NetlinkError> {
    let usable = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c == '\0' || c.is_whitespace());
    if usable { Ok(()) } else { Err(NetlinkError::BadName { name: name.to_string() }) }
}

/// A random address, locally administered and not multicast. It is random because the bridges of two hosts
/// may be in one network.
fn random_mac() -> io::Result<[u8; 6]> {
    let [a, b, c, d] = process::random::<4>()?;
    Ok([0x02, 0x6f, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_refuse_or_change_are_refused_here() {
        for good in ["a", "tap0", "outlive-bridge0", "br.10"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "sixteen-bytes-xx", "a/b", "a b", "a:1", "a\n", "x\0"] {
            assert!(matches!(check_name(bad), Err(NetlinkError::BadName { .. })), "{bad:?}");
        }
    }
}
