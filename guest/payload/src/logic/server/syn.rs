//! Recognises the first segment of a connection.

use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpEndpoint, IpProtocol, Ipv4Packet, TcpPacket};

/// The sender of this frame, if it is a SYN (without ACK) for `port`.
pub(super) fn remote_of_syn(frame: &[u8], port: u16) -> Option<IpEndpoint> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    if ethernet.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
    if ip.next_header() != IpProtocol::Tcp || ip.frag_offset() != 0 {
        return None;
    }
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    let first = tcp.syn() && !tcp.ack() && !tcp.rst() && tcp.dst_port() == port;
    first.then(|| IpEndpoint::new(ip.src_addr().into(), tcp.src_port()))
}
