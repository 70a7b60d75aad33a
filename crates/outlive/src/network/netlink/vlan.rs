//! VLANs of a bridge's ports. The kernel takes them in messages of the address family of bridges.

use netlink_packet_route::link::{
    AfSpecBridge, BridgeVlanInfo, BridgeVlanInfoFlags, LinkAttribute, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, NetlinkError};

impl Netlink {
    /// Puts a port of a bridge into a VLAN: its untagged frames belong to the VLAN, and frames of the VLAN leave
    /// it untagged.
    pub fn set_port_vlan(&mut self, port: &str, vlan: u16) -> Result<(), NetlinkError> {
        let what = format!("put {port} into VLAN {vlan}");
        let flags = BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged;
        let message = self.port_vlan(port, vlan, flags, &what)?;
        self.change(RouteNetlinkMessage::SetLink(message), 0, what)
    }

    /// Takes a port of a bridge out of a VLAN.
    pub fn remove_port_vlan(&mut self, port: &str, vlan: u16) -> Result<(), NetlinkError> {
        let what = format!("take {port} out of VLAN {vlan}");
        let message = self.port_vlan(port, vlan, BridgeVlanInfoFlags::empty(), &what)?;
        self.change(RouteNetlinkMessage::DelLink(message), 0, what)
    }

    fn port_vlan(
        &mut self,
        port: &str,
        vlan: u16,
        flags: BridgeVlanInfoFlags,
        what: &str,
    ) -> Result<LinkMessage, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.interface_family = AddressFamily::Bridge;
        message.header.index = self.index_for(port, what)?;
        let info = BridgeVlanInfo { flags, vid: vlan };
        message.attributes = vec![LinkAttribute::AfSpecBridge(vec![AfSpecBridge::VlanInfo(info)])];
        Ok(message)
    }
}
