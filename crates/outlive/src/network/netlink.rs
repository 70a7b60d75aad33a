//! The rtnetlink client: interfaces, addresses, routes. `netlink-packet-route` builds the requests. Of the
//! answers, only the few fields below are read, directly from the bytes: a kernel newer than the crate adds
//! attributes, and an attribute that we do not need must never make a request fail.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NlasIterator,
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

use crate::process;

/// Longest interface name, without the closing zero (kernel: `IFNAMSIZ` - 1).
const LONGEST_NAME: usize = 15;

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
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;

/// Why a change of the network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket to the kernel could not be opened.
    #[error("cannot open a netlink socket to the kernel: {0}")]
    Open(#[source] io::Error),
    /// The socket failed in the middle of a request.
    #[error("cannot {what}: the netlink socket failed: {source}")]
    Socket {
        /// What was being done.
        what: String,
        /// What the socket said.
        source: io::Error,
    },
    /// The text cannot be the name of an interface.
    #[error(
        "'{name}' cannot be an interface name: 1 to 15 bytes, without '/', ':' and spaces, and not '.' or '..'"
    )]
    BadName {
        /// The name that was given.
        name: String,
    },
    /// There is no such interface in this network namespace.
    #[error(
        "no interface named {name}: cannot {what} (interfaces here: {present}); make it first, or name another one"
    )]
    NoInterface {
        /// The name that was asked for.
        name: String,
        /// What was being done.
        what: String,
        /// The names that exist, separated by commas.
        present: String,
    },
    /// The interface exists already.
    #[error("cannot {what}: an interface of this name already exists; delete it or choose another name")]
    Exists {
        /// What was being done.
        what: String,
    },
    /// The process may not administer this network namespace.
    #[error("cannot {what}: no permission; run as root or with CAP_NET_ADMIN in this network namespace")]
    Permission {
        /// What was being done.
        what: String,
    },
    /// The kernel lacks the kind of interface that was asked for.
    #[error("cannot {what}: this kernel has no '{kind}' interfaces; load its module (modprobe {kind})")]
    NoSuchKind {
        /// What was being done.
        what: String,
        /// `bridge` or `veth`.
        kind: &'static str,
    },
    /// The named interface is no bridge where one is needed.
    #[error("cannot {what}: {name} is no bridge; make one (ip link add br0 type bridge) or name another one")]
    NotBridge {
        /// What was being done.
        what: String,
        /// The name that was given for the bridge.
        name: String,
    },
    /// The kernel refused for another reason.
    #[error("cannot {what}: {source}{}", detail(.message))]
    Refused {
        /// What was being done.
        what: String,
        /// The kernel's error number.
        source: io::Error,
        /// The kernel's explanation, often empty.
        message: String,
    },
    /// The kernel's answer is invalid.
    #[error("cannot {what}: the kernel's answer is invalid ({problem})")]
    Answer {
        /// What was being done.
        what: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

fn detail(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

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
    /// Number of the bridge that it is attached to.
    pub bridge: Option<u32>,
    /// Its kind: `bridge`, `veth`, `tun` (taps too). `None` for hardware and the loopback.
    pub kind: Option<String>,
}

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
    /// snooping. The bridge gets its own hardware address. Without one it takes the lowest address of its
    /// ports, which changes as taps come and go, and guests that use the bridge as a gateway would lose it.
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
        let what = format!("attach {name} to bridge {bridge}");
        let target = self.find(bridge, &what)?;
        // The kernel would first take the interface out of its present bridge and then refuse.
        if target.kind.as_deref() != Some("bridge") {
            return Err(NetlinkError::NotBridge { what, name: bridge.to_string() });
        }
        let port = LinkAttribute::Controller(target.index);
        self.set_link(name, what, |link| link.attributes.push(port))
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
        let present = if names.is_empty() { "none".to_string() } else { names.join(", ") };
        NetlinkError::NoInterface { name: name.to_string(), what: what.to_string(), present }
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
            if sender.port_number() == 0 && self.take(&datagram, what, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    /// Reads the messages of one datagram. True when the request is complete.
    fn take(&self, mut rest: &[u8], what: &str, answers: &mut Vec<Vec<u8>>) -> Result<bool, NetlinkError> {
        let bad = |problem| NetlinkError::Answer { what: what.to_string(), problem };
        while !rest.is_empty() {
            let length = u32_at(rest, 0).ok_or_else(|| bad("shorter than its header"))? as usize;
            if length < NLMSGHDR || length > rest.len() {
                return Err(bad("a message longer than the datagram"));
            }
            let (kind, flags) = (u16_at(rest, 4), u16_at(rest, 6));
            let body = &rest[NLMSGHDR..length];
            // An answer to an earlier request that was given up is not ours.
            if u32_at(rest, 8) == Some(self.sequence) {
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
fn parse_link(bytes: &[u8], what: &str) -> Result<Link, NetlinkError> {
    let bad = |problem| NetlinkError::Answer { what: what.to_string(), problem };
    let index = u32_at(bytes, 4).ok_or_else(|| bad("an interface without a number"))?;
    let flags = u32_at(bytes, 8).ok_or_else(|| bad("an interface without flags"))?;
    let attributes = bytes.get(IFINFOMSG..).ok_or_else(|| bad("an interface without attributes"))?;
    let up = LinkFlags::from_bits_retain(flags).contains(LinkFlags::Up);
    let mut link = Link { name: String::new(), index, mac: None, up, bridge: None, kind: None };
    for attribute in NlasIterator::new(attributes).filter_map(Result::ok) {
        match attribute.kind() {
            IFLA_IFNAME => link.name = text(attribute.value()),
            IFLA_ADDRESS => link.mac = attribute.value().try_into().ok(),
            IFLA_MASTER => link.bridge = u32_at(attribute.value(), 0),
            IFLA_LINKINFO => {
                let mut info = NlasIterator::new(attribute.value()).filter_map(Result::ok);
                link.kind = info.find(|it| it.kind() == IFLA_INFO_KIND).map(|it| text(it.value()));
            }
            _ => {}
        }
    }
    Ok(link)
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

    #[test]
    fn names_that_the_kernel_would_refuse_or_change_are_refused_here() {
        for good in ["a", "tap0", "outlive-bridge0", "br.10"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "sixteen-bytes-xx", "a/b", "a b", "a:1", "a\n", "x\0"] {
            assert!(matches!(check_name(bad), Err(NetlinkError::BadName { .. })), "{bad:?}");
        }
    }

    /// An answer from the kernel is believed only within its bounds.
    #[test]
    fn mangled_answers_are_errors_and_never_panics() {
        use proptest::prelude::*;
        let client = Netlink::open().unwrap();
        proptest!(|(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), ours in any::<bool>(),
                    length in 0_u32..220, kind in prop_oneof![Just(2_u16), Just(3), Just(16)])| {
            if bytes.len() >= 12 {
                bytes[0..4].copy_from_slice(&length.to_ne_bytes());
                bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
                if ours {
                    bytes[8..12].copy_from_slice(&client.sequence.to_ne_bytes());
                }
            }
            let mut answers = Vec::new();
            let _ = client.take(&bytes, "test", &mut answers);
            let _ = parse_link(&bytes, "test");
            for flags in [0, NLM_F_ACK_TLVS, NLM_F_ACK_TLVS | NLM_F_CAPPED] {
                let _ = acknowledged(&bytes, flags, "test");
            }
        });
    }
}
